"""One offline page about a run, finished or not: results, stages, curves, a tree and its trace, responses, lineage."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astro_hpc.cloning.phrases import Phrases
from astro_hpc.cloning.verbalize import replay
from astro_hpc.config.schema import RunConfig
from astro_hpc.evaluation import economics
from astro_hpc.evaluation.table import benchmarks_of, percent, read_summary, table_columns, table_rows, training_minutes
from astro_hpc.report.charts import plotly_script, result_chart, training_charts
from astro_hpc.report.status import run_status
from astro_hpc.report.tree_svg import tree_svg
from astro_hpc.run.files import Journal, read_jsonl, write_text_atomic
from astro_hpc.run.metrics import read_metrics
from astro_hpc.run.progress import format_seconds
from astro_hpc.run.stage import read_manifest

_TRACES_LOOKED_AT = 300
_RESPONSES_LOOKED_AT = 2000
_MAX_TRACE_CHARS = 6000
_MAX_SHARD_ROWS = 4
_MAX_SAMPLE_CHARS = 100_000


@dataclass(frozen=True)
class Segment:
    """A stretch of text with one look: a kind for its colour, and the tree's node where it has one."""

    text: str
    kind: str = ""
    node: int | None = None


def build_page(cfg: RunConfig) -> Path:
    """Write report/index.html; what the run has not reached yet is named there. Returns its path."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("astro_hpc.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "duration": lambda s: "" if s is None else format_seconds(s)}
    summary = read_summary(cfg)
    charts = [result_chart(summary["results"], name) for name in benchmarks_of(summary)]
    curves = training_charts(_metrics(cfg))
    html = environment.get_template("template.html.j2").render(
        cfg=cfg,
        facts=_facts(cfg),
        results=_results(cfg, summary),
        stages=_stages(cfg),
        result_charts=dict(zip(benchmarks_of(summary), charts, strict=True)),
        curves=curves,
        last_metrics=_last_metrics(cfg),
        best=_best(cfg),
        rollouts=_rollouts(cfg),
        filters=_filters(cfg),
        economics=_economics(cfg),
        trace=_trace(cfg),
        responses=_responses(cfg, summary),
        lineage=_lineage(cfg),
        dict_of_charts={chart.id: chart.figure for chart in [*charts, *curves]},
        plotly=plotly_script() if charts or curves else "",
    )
    path = cfg.run_dir / "report" / "index.html"
    write_text_atomic(path, html)
    return path


def _folder(cfg: RunConfig, label: str) -> Path:
    return cfg.run_dir / ("traces" if label == "clone" else label)


def _manifests(cfg: RunConfig) -> dict[str, dict[str, Any]]:
    """Stage label -> manifest, in order, of the finished stages."""
    labels = [row["stage"] for row in run_status(cfg)]
    return {label: m for label in labels if (m := read_manifest(_folder(cfg, label))) is not None}


def _facts(cfg: RunConfig) -> dict[str, Any]:
    manifests = _manifests(cfg)
    last = next(reversed(manifests.values()), None)
    return {
        "total_seconds": sum(m["seconds"] for m in manifests.values()),
        "total_tokens": sum(m["counts"].get("tokens") or 0 for m in manifests.values()),
        "last": last,
        "finished": all(row["state"] == "done" for row in run_status(cfg)),
    }


def _stages(cfg: RunConfig) -> list[dict[str, Any]]:
    """The stages in order; many search shards become one row."""
    rows = [dict(row) for row in run_status(cfg)]
    shards = [row for row in rows if row["stage"].startswith("search/")]
    if len(shards) > _MAX_SHARD_ROWS:
        done = [row for row in shards if row["state"] == "done"]
        merged = {
            "stage": f"search, {len(shards)} shards",
            "state": "done" if len(done) == len(shards) else f"{len(done)} of {len(shards)} done",
            "attempt": max(row["attempt"] or 0 for row in shards) or None,
            "seconds": sum(row["seconds"] or 0 for row in shards),
            "tokens": sum(row["tokens"] or 0 for row in shards),
        }
        rows[rows.index(shards[0])] = merged
        rows = [row for row in rows if row not in shards]
    longest = max((row["seconds"] or 0 for row in rows), default=0) or 1
    for row in rows:
        row["share"] = (row["seconds"] or 0) / longest
        row["rate"] = row["tokens"] / row["seconds"] if row["tokens"] and row["seconds"] else None
    return rows


def _results(cfg: RunConfig, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    minutes = training_minutes(cfg)
    return [
        {
            "benchmark": benchmark,
            "columns": table_columns(summary, benchmark),
            "rows": table_rows(summary, benchmark, minutes),
            "details": [row for row in summary["results"] if row["benchmark"] == benchmark],
            "differences": [row for row in summary["differences"] if row["benchmark"] == benchmark],
            "sentences": list(_sentences(cfg, summary, benchmark)),
            "best_of_n": [row for row in summary["token_matched_best_of_n"] if row["benchmark"] == benchmark],
        }
        for benchmark in benchmarks_of(summary)
    ]


def _sentences(cfg: RunConfig, summary: Mapping[str, Any], benchmark: str) -> Iterator[str]:
    """The comparisons that the run is about, in words."""
    differences = {(row["model"], row["minus"]): row for row in summary["differences"] if row["benchmark"] == benchmark}
    start = "warmup" if cfg.warmup.enabled else "base"
    pairs = [pair for arm in cfg.arms for pair in ((f"{arm}-sft", start), (f"{arm}-rl", f"{arm}-sft"))]
    for model, minus in [*pairs, ("astro-sft", "direct-sft"), ("astro-rl", "direct-rl")]:
        if row := differences.get((model, minus)) or _turned(differences.get((minus, model))):
            low, high = row["interval"]
            clear = "" if low > 0 or high < 0 else ": no clear difference"
            yield (
                f"{model} minus {minus}: {100 * row['value']:+.1f} percentage points of pass@1 "
                f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}){clear}."
            )
    for row in summary["token_matched_best_of_n"]:
        if row["n"] < row["affordable_n"]:
            continue  # fewer samples were drawn than the budget pays for: no fair match
        if row["benchmark"] == benchmark and row["budget_of"] == "astro-rl" and row["model"] in (start, "direct-rl"):
            yield (
                f"At the tokens of one {row['budget_of']} response, {row['n']} independent samples of {row['model']} "
                f"reach {percent(row['pass'])} % when an oracle picks, {percent(row['maj'])} % by majority."
            )


def _turned(row: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The same difference the other way round."""
    if row is None:
        return None
    low, high = row["interval"]
    return {**row, "value": -row["value"], "interval": [-high, -low]}


def _metrics(cfg: RunConfig) -> dict[str, list[dict[str, Any]]]:
    labels = ["warmup"] * cfg.warmup.enabled + [f"{stage}/{arm}" for stage in ("sft", "rl") for arm in cfg.arms]
    series = {label: read_metrics(cfg.run_dir / label / "metrics.jsonl") for label in labels}
    return {label: rows for label, rows in series.items() if rows}


def _last_metrics(cfg: RunConfig) -> list[tuple[str, int, list[tuple[str, str]]]]:
    """What a reader without scripts gets of the curves: every stage's first and last values."""
    tables = []
    for label, rows in _metrics(cfg).items():
        first, last = rows[0], rows[-1]
        values = [
            (key, f"{first[key]:.4g} → {last[key]:.4g}")
            for key in last
            if key != "step" and isinstance(last[key], int | float) and isinstance(first.get(key), int | float)
        ]
        tables.append((label, len(rows), values))
    return tables


def _best(cfg: RunConfig) -> list[dict[str, Any]]:
    """Each arm's best RL model on held-out problems so far."""
    found = []
    for arm in cfg.arms:
        path = cfg.run_dir / "rl" / arm / "best.json"
        if path.exists():
            found.append({"arm": arm, "folder": f"rl/{arm}/hf_best", **json.loads(path.read_text())})
    return found


def _rollouts(cfg: RunConfig) -> list[dict[str, Any]]:
    """A right and a wrong response of each arm's first and last RL step, as far as there are any."""
    pattern = re.compile(Phrases.load(cfg.clone.phrases).backtrack_pattern)
    found = []
    for arm in cfg.arms:
        files = sorted((cfg.run_dir / "rl" / arm / "samples").glob("step_*.txt"))
        for path in dict.fromkeys([*files[:1], *files[-1:]]):
            with open(path, encoding="utf-8", errors="replace") as handle:
                text = handle.read(_MAX_SAMPLE_CHARS)
            parts = re.split(r"^=== (?=.*: (?:right|wrong|unknown), reward )", text, flags=re.MULTILINE)[1:3]
            samples = [part.partition("\n") for part in parts]
            found.append(
                {
                    "arm": arm,
                    "step": int(path.stem.removeprefix("step_")),
                    "samples": [
                        {"what": what, "segments": _response_segments(rest, pattern)} for what, _, rest in samples
                    ],
                }
            )
    return found


def _filters(cfg: RunConfig) -> dict[str, Any] | None:
    path = cfg.run_dir / "traces" / "filters.json"
    return json.loads(path.read_text()) if path.exists() else None


def _economics(cfg: RunConfig) -> dict[str, Any] | None:
    summary = economics.read_economics(cfg)
    if summary is None:
        return None
    return {
        **summary,
        "columns": economics.COLUMNS,
        "rows": economics.table_rows(summary),
        "legend": economics.LEGEND,
        "sentences": economics.sentences(summary),
    }


# --- a tree and its trace -------------------------------------------------------------------------------------


def _trace(cfg: RunConfig) -> dict[str, Any] | None:
    """A trace that goes back, with its tree; None before there is one."""
    path = cfg.run_dir / "traces" / "astro.jsonl"
    if not path.exists():
        return None
    rows = itertools.islice(read_jsonl(path), _TRACES_LOOKED_AT)
    candidates = [row for row in rows if len(row["completion"]) <= _MAX_TRACE_CHARS]
    if not candidates:
        return None
    row = max(candidates, key=lambda row: (row["k"], len({e["target"] for e in row["graph"]["edges"]})))
    tree = _find_tree(cfg, row["problem_id"])
    return {
        "row": row,
        "problem": row["messages"][0]["content"],
        "segments": list(_trace_segments(row)),
        "svg": tree_svg(tree["nodes"], replay(row["graph"])) if tree else None,
        "stats": tree["stats"] if tree else {},
    }


def _find_tree(cfg: RunConfig, problem_id: str) -> dict[str, Any] | None:
    for journal in sorted((cfg.run_dir / "search").glob("shard-?????-of-?????/trees.jsonl")):
        for tree in Journal.read(journal):
            if tree["problem"]["id"] == problem_id:
                return tree
    return None


def _trace_segments(row: Mapping[str, Any]) -> Iterator[Segment]:
    outcomes = {node["id"]: node["outcome"] for node in row["graph"]["nodes"]}
    text, at = row["completion"], 0
    for span in row["graph"]["spans"]:
        yield Segment(text[at : span["start"]])
        kind = f"{span['kind']} {outcomes[span['node']]}" if span["kind"] == "step" else span["kind"]
        yield Segment(text[span["start"] : span["end"]], kind, span["node"])
        at = span["end"]
    yield Segment(text[at:])


# --- sample responses -----------------------------------------------------------------------------------------


def _responses(cfg: RunConfig, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Responses of the furthest model to held-out problems: right after going back, right at once, wrong."""
    wanted = [f"{arm}-{stage}" for stage in ("rl", "sft") for arm in cfg.arms]
    evaluated = {(row["model"], row["benchmark"]) for row in summary["results"]}
    for model, benchmark in itertools.product(wanted, benchmarks_of(summary)):
        path = cfg.run_dir / "eval" / model / benchmark / "output-rs0.jsonl"
        if (model, benchmark) in evaluated and path.exists():
            rows = list(itertools.islice(read_jsonl(path), _RESPONSES_LOOKED_AT))
            pattern = re.compile(Phrases.load(cfg.clone.phrases).backtrack_pattern)
            return {
                "model": model,
                "benchmark": benchmark,
                "samples": [
                    {"what": what, "row": row, "segments": _response_segments(row["generation"], pattern)}
                    for what, row in _typical(rows)
                ],
            }
    return None


def _typical(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The first response of each kind that is no longer than most of its kind."""
    kinds = {
        "right, after going back": [r for r in rows if r["is_correct"] and r["num_backtracks"]],
        "right at once": [r for r in rows if r["is_correct"] and not r["num_backtracks"]],
        "wrong": [r for r in rows if not r["is_correct"]],
    }
    for what, group in kinds.items():
        if group:
            middle = sorted(row["num_generated_tokens"] for row in group)[len(group) // 2]
            yield what, next(row for row in group if row["num_generated_tokens"] <= middle)


def _response_segments(text: str, backtrack: re.Pattern[str]) -> list[Segment]:
    """The text by lines, those that go back and those that give an answer marked."""
    segments = []
    for line in text[:_MAX_TRACE_CHARS].splitlines(keepends=True):
        kind = "backtrack" if backtrack.search(line) else "answer" if "\\boxed{" in line else ""
        segments.append(Segment(line, kind))
    if len(text) > _MAX_TRACE_CHARS:
        segments.append(Segment(f"\n… {len(text) - _MAX_TRACE_CHARS:,} more characters", "note"))
    return segments


# --- lineage --------------------------------------------------------------------------------------------------


def _lineage(cfg: RunConfig) -> list[dict[str, Any]]:
    """Each finished stage with its inputs, and which stage of this run wrote exactly those bytes."""
    manifests = _manifests(cfg)
    makers: dict[str, str] = {}
    for label, manifest in manifests.items():
        for digest in manifest["outputs"].values():
            makers.setdefault(digest, label)  # a stage that changed nothing is not the maker
    return [
        {
            "stage": label,
            "inputs": [(name, digest[:10], makers.get(digest)) for name, digest in manifest["inputs"].items()],
            "outputs": [(path, digest[:10]) for path, digest in manifest["outputs"].items()],
            "settings": manifest["settings"][:10],
            "commit": manifest["commit"],
            "finished": manifest["finished"],
        }
        for label, manifest in manifests.items()
    ]
