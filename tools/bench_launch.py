#!/usr/bin/env python3
"""A large search array on the Slurm sandbox, run to its end and gathered: how long launch takes, what a shard costs.

    python tools/bench_launch.py --shards 1000

The engine is the scripted one: what is measured is launching, Slurm and the stages' start, not generation. A shard
takes about a second of one core. Exit code 1 when a shard or a tree is missing, or comes twice.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from slurm_sandbox import Sandbox

from astro_hpc.run.files import Journal

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS_PER_SHARD = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 2, help="array tasks at the same time")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slurm-bench-") as name:
        folder = Path(name)
        write_run(folder, arguments.shards, arguments.at_once)
        sandbox = Sandbox(folder / "box", gpus_per_node=0, die_with_parent=True)
        sandbox.up()
        try:
            figures = measure(sandbox, folder, arguments.shards, arguments.timeout)
        finally:
            sandbox.down()
    print(json.dumps(figures) if arguments.json else "\n".join(f"{key}: {value}" for key, value in figures.items()))
    return 0 if all_arrived(figures) else 1


def all_arrived(figures: dict[str, object]) -> bool:
    """Whether no shard and no tree was lost, none came twice, and the gathering found them all."""
    shards = figures["shards"]
    lost = figures["shards_done"] != shards or figures["trees"] != figures["problems"] or figures["left_in_queue"]
    return not lost and not figures["twice"] and bool(figures["gathered"])


def write_run(folder: Path, shards: int, at_once: int) -> None:
    """A configuration with two problems a shard on average (some have none), and the sandbox's cluster file."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    rows = [
        {"problem": f"What is {n} + {n % 7}?", "answer": str(n + n % 7)} for n in range(PROBLEMS_PER_SHARD * shards)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "name": "bench",
        "runs_dir": "runs",
        "model": {"path": "model", "prompt_style": "minimal-chat"},
        "problems": {"train": [{"type": "jsonl", "path": "problems.jsonl"}]},
        "inference": {"engine": "scripted", "max_model_len": 1024},
        "search": {"num_iterations": 2, "num_expansions": 2, "num_rollouts": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    stages = {"search": {"shards": shards, "throttle": at_once}}
    cluster = {"gpus_per_node": 0, "memory": None, "exclusive": False, "stages": stages}
    (folder / "cluster.yaml").write_text(json.dumps(cluster))


def measure(sandbox: Sandbox, folder: Path, shards: int, timeout: float) -> dict[str, object]:
    """Launch, wait until nothing of it is queued, and count."""
    environment = {**os.environ, **sandbox.env, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "astro_hpc", "launch", "run.yaml", "--cluster", "cluster.yaml"]
    started = time.monotonic()
    subprocess.run([*command, "--stages", "search,gather"], cwd=folder, env=environment, check=True)
    launched = time.monotonic() - started
    queue = ["squeue", "-h", "--name", "bench.search,bench.gather"]
    while (queued := sandbox.run(*queue)) and time.monotonic() - started < timeout:
        time.sleep(1)
    total = time.monotonic() - started
    run = folder / "runs" / "bench"
    trees = collections.Counter(
        tree["problem"]["id"] for path in run.glob("search/shard-*/trees.jsonl") for tree in Journal.read(path)
    )
    report = run / "search" / "gather.json"
    return {
        "shards": shards,
        "launch_seconds": round(launched, 2),
        "total_seconds": round(total, 1),
        "seconds_per_shard": round((total - launched) / shards, 2),
        "shards_done": len(list(run.glob("search/shard-*/manifest.json"))),
        "left_in_queue": len(queued.splitlines()),
        "problems": PROBLEMS_PER_SHARD * shards,
        "trees": len(trees),
        "twice": sum(count > 1 for count in trees.values()),
        "gathered": report.exists() and json.loads(report.read_text())["complete"],
    }


if __name__ == "__main__":
    sys.exit(main())
