"""`astro-hpc status`: where a run stands, from its manifests alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from astro_hpc.config import RunConfig
from astro_hpc.run.progress import format_seconds


def run_status(cfg: RunConfig) -> list[dict[str, Any]]:
    """One row a stage in order: stage, state (`done`, `begun`, `waiting`), attempt, seconds, tokens."""
    folders = ["warmup"] if cfg.warmup.enabled else []
    shards = sorted(path.name for path in (cfg.run_dir / "search").glob("shard-?????-of-?????"))
    folders += [f"search/{name}" for name in shards or ["shard-00000-of-00001"]]
    folders += [*_shards(cfg.run_dir, "clone"), "traces"]
    for arm in cfg.arms:
        folders += [f"sft/{arm}", *_shards(cfg.run_dir, f"select-shards/{arm}"), f"select/{arm}", f"rl/{arm}"]
    if cfg.evaluates:
        folders += [*_shards(cfg.run_dir, "eval-shards"), "eval"]
    return [_row(cfg.run_dir, folder) for folder in folders]


def _shards(run_dir: Path, parent: str) -> list[str]:
    """Folders of all shards of a stage that was begun in shards."""
    totals = {path.name[-5:] for path in (run_dir / parent).glob("shard-?????-of-?????")}
    return [f"{parent}/shard-{shard:05d}-of-{total}" for total in sorted(totals) for shard in range(int(total))]


def _row(run_dir: Path, folder: str) -> dict[str, Any]:
    label = "clone" if folder == "traces" else folder.replace("-shards/", "/")
    for name, state in (("manifest.json", "done"), ("state.json", "begun")):
        path = run_dir / folder / name
        if path.is_file():
            facts = json.loads(path.read_text())
            tokens = facts.get("counts", {}).get("tokens")
            seconds = facts.get("seconds")
            return {
                "stage": label,
                "state": state,
                "attempt": facts.get("attempt"),
                "seconds": seconds,
                "tokens": tokens,
            }
    return {"stage": label, "state": "waiting", "attempt": None, "seconds": None, "tokens": None}


def print_status(rows: list[dict[str, Any]]) -> None:
    """The rows as a table, and what to do next."""
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "state"):
        table.add_column(title)
    for title in ("attempt", "time", "tokens"):
        table.add_column(title, justify="right")
    for row in rows:
        seconds = format_seconds(row["seconds"]) if row["seconds"] else ""
        tokens = f"{row['tokens']:,}" if row["tokens"] else ""
        table.add_row(row["stage"], row["state"], str(row["attempt"] or ""), seconds, tokens)
    console = Console()
    console.print(table)
    unfinished = next((row for row in rows if row["state"] != "done"), None)
    if unfinished:
        console.print(f"next: {unfinished['stage']}; `astro-hpc run CONFIG` goes on from there")
