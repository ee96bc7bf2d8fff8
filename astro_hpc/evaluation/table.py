"""The table at the end of a run: accuracy beside chance, first attempt, behaviour and cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from astro_hpc.config.schema import RunConfig
from astro_hpc.run.stage import read_manifest


def table_columns(summary: Mapping[str, Any], benchmark: str) -> tuple[str, ...]:
    """Names of the columns; pass@1 carries its 95 % interval, shares are in percent, minutes are of training."""
    k = _most_samples(summary, benchmark)
    return (
        "model",
        "pass@1",
        f"pass@{k}",
        "first attempt",
        "chance",
        "backtracks/response",
        "tokens/response",
        "minutes",
    )


def table_rows(summary: Mapping[str, Any], benchmark: str, minutes: Mapping[str, float]) -> list[tuple[str, ...]]:
    """One row a model for `benchmark`, in the order of `table_columns`.

    Args:
        summary: the content of eval/summary.json.
        benchmark: its name in the configuration.
        minutes: model -> minutes of the stage that made it; absent ones show a dash.
    """
    rows: list[tuple[str, ...]] = []
    k = _most_samples(summary, benchmark)
    for result in summary["results"]:
        if result["benchmark"] != benchmark:
            continue
        low, high = result["pass_at_1_interval"]
        made_in = minutes.get(result["model"])
        rows.append(
            (
                result["model"],
                f"{percent(result['pass_at_1'])} ± {percent((high - low) / 2)}",
                percent(result["pass_at_k"]) + (f" (k {result['k']})" if result["k"] != k else ""),
                percent(result["first_attempt"]),
                percent(result["chance"]),
                f"{result['backtracks_per_response']:.2f}",
                f"{result['tokens_per_response']:.0f}",
                "-" if made_in is None else f"{made_in:.1f}",
            )
        )
    return rows


def percent(share: float | None) -> str:
    """`0.4821` -> `48.2`; a dash for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def benchmarks_of(summary: Mapping[str, Any]) -> list[str]:
    """The benchmarks' names, in order."""
    return list(dict.fromkeys(result["benchmark"] for result in summary["results"]))


def print_table(cfg: RunConfig, file: TextIO | None = None) -> None:
    """Print one table a benchmark: ruled on a terminal, aligned plain text elsewhere; nothing without an evaluation."""
    stream = file or sys.stdout
    summary = read_summary(cfg)
    minutes = training_minutes(cfg)
    for benchmark in benchmarks_of(summary):
        title = f"{benchmark}: % of {_problems(summary, benchmark)} problems, ± is a 95 % interval over problems"
        columns, rows = table_columns(summary, benchmark), table_rows(summary, benchmark, minutes)
        if stream.isatty():
            _print_rich(title, columns, rows, stream)
        else:
            print("\n".join([title, *_aligned([columns, *rows])]), file=stream)


def read_summary(cfg: RunConfig) -> dict[str, Any]:
    """The content of eval/summary.json; without results when there is none yet."""
    path = cfg.run_dir / "eval" / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {"results": []}


def training_minutes(cfg: RunConfig) -> dict[str, float]:
    """Model -> minutes of the finished stage that trained it."""
    folders = {"warmup": "warmup"} | {f"{arm}-{stage}": f"{stage}/{arm}" for arm in cfg.arms for stage in ("sft", "rl")}
    manifests = {model: read_manifest(cfg.run_dir / folder) for model, folder in folders.items()}
    return {model: manifest["seconds"] / 60 for model, manifest in manifests.items() if manifest}


def _problems(summary: Mapping[str, Any], benchmark: str) -> int:
    return next(result["num_problems"] for result in summary["results"] if result["benchmark"] == benchmark)


def _most_samples(summary: Mapping[str, Any], benchmark: str) -> int:
    return max(result["k"] for result in summary["results"] if result["benchmark"] == benchmark)


def _print_rich(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], stream: TextIO) -> None:
    # tight enough for 80 columns
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False)
    for name in columns:
        two_lines = name.replace("/", "\n/").replace(" ", "\n")
        table.add_column(two_lines, justify="left" if name == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(file=stream).print(table)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]))
    return lines
