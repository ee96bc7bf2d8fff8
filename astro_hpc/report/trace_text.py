"""`astro-hpc trace`: one example of the SFT data on a terminal, its steps, reflections and backtracks marked."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from astro_hpc.config import ConfigError, RunConfig
from astro_hpc.config.schema import Arm
from astro_hpc.run.files import read_jsonl

_STYLES = {"step right": "green", "step wrong": "red", "reflection": "yellow", "backtrack": "bold cyan", "note": "dim"}


def find_example(cfg: RunConfig, arm: Arm, example_id: str | None = None) -> dict[str, Any]:
    """The example of that id, or the first of that problem; without an id the first of those with most backtracks.

    Raises:
        ConfigError: there are no examples yet, or none of that id.
    """
    path = cfg.run_dir / "traces" / f"{arm}.jsonl"
    if not path.exists():
        raise ConfigError(f"{path}: no examples yet; run `astro-hpc clone` first")
    found: dict[str, Any] | None = None
    for row in read_jsonl(path):
        if example_id is not None:
            if example_id in (row["id"], row["problem_id"]):
                return row
        elif found is None or row["k"] > found["k"]:
            found = row
    if found is None:
        raise ConfigError(f"{path}: no example {example_id!r}; give an id or a problem's id out of this file")
    return found


def marked_pieces(row: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(mark, kind, words) of each piece in order, for instance `("step 3  Q 0.50", "step", "4 + 2 = 6")`.

    The kind of a step that ends an attempt is `step right` or `step wrong`.
    """
    nodes = {node["id"]: node for node in row["graph"]["nodes"]}
    for span in row["graph"]["spans"]:
        node, kind = nodes[span["node"]], span["kind"]
        mark = f"{kind} to {span['node']}" if kind == "backtrack" else f"{kind} {span['node']}"
        if kind == "step":
            mark += f"  Q {node['q']:.2f}"
            if node["outcome"]:
                kind, mark = f"step {node['outcome']}", f"{mark} {node['outcome']}"
        if span.get("by") == "lm":
            mark += "  (lm)"
        yield mark, kind, row["completion"][span["start"] : span["end"]]


def print_example(row: Mapping[str, Any]) -> None:
    """The example in colours where the terminal has them."""
    console = Console(highlight=False)
    console.print(Text(f"{row['id']}  k={row['k']}  {row['num_tokens']} tokens", style="bold"))
    console.print(Text(_printable(row["messages"][0]["content"])), "", sep="\n")
    for mark, kind, words in marked_pieces(row):
        line = Text(f"{mark:<30} ", style="dim")
        indented = _printable(words).replace("\n", "\n" + " " * 31)
        console.print(line + Text(indented, style=_STYLES.get(kind, "")), soft_wrap=True)


def _printable(text: str) -> str:
    """Without what would steer the terminal: a model wrote it."""
    return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)
