"""Launching on this machine: jobs in the background, one after the other; only what is missing; status and cancel."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from slurm_box import Run

LOCAL = "{executor: local, gpus_per_node: 0, stages: {search: {shards: 2}}"
ENDLESS = {"num_iterations": 100_000, "num_expansions": 2, "num_rollouts": 1}


def _until(ready: Callable[[], bool], run: Run) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        logs = [path.read_text() for path in [*run.dir.glob("logs/*/job-*/*.log"), *run.dir.glob("jobs/local.out")]]
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)


def test_a_local_launch_runs_in_the_background_and_only_once(tmp_path):
    run = Run(None, tmp_path)
    run.write_cluster(LOCAL + ", setup: ['echo $CONFIG > setup-was-here']}")
    submitted = run.launch("--stages", "search")
    assert [(row["job"], row["tasks"]) for row in submitted] == [("search", 2)]
    second = run.command("launch", "run.yaml", "--cluster", "cluster.yaml", "--stages", "search")
    if second.returncode != 0:
        assert "local launch: in use by" in second.stderr
        assert second.returncode == 73
    _until(lambda: len(list(run.dir.glob("search/shard-*/manifest.json"))) == 2, run)
    assert len(run.trees()) == len(set(run.trees())) == 24
    again = ("launch", "run.yaml", "--cluster", "cluster.yaml", "--stages", "search")
    _until(lambda: run.command(*again).returncode == 0, run)
    assert run.launch("--stages", "search") == []
    assert run.status()["search"]["counts"] == {"done": 2}
    assert "/frozen-" in (tmp_path / "setup-was-here").read_text()
    assert "trees" in next(run.dir.glob("logs/search-00001/job-local-*.attempt-0/rank-0.log")).read_text()


def test_status_shows_a_local_launch_and_cancel_ends_all_of_it(tmp_path):
    run = Run(None, tmp_path, search=ENDLESS)
    run.write_cluster(LOCAL + "}")
    run.launch("--stages", "search,gather")
    _until(lambda: bool(run.dir.glob("search/shard-00000-*/state.json")) and len(run.trees()) > 0, run)
    states = run.status()
    assert states["search"]["counts"] == {"running": 1, "pending": 1}
    assert states["gather"]["counts"] == {"pending": 1}
    assert re.search(r"search-00000/job-local-\d+\.attempt-0/rank-0\.log$", states["search"]["log"])
    assert run.command("cancel", run.dir).stdout.startswith("cancelled: local process ")
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(run.dir).encode() in _read(path)]
    assert left == [], "no process is left"
    states = run.status()
    assert states["search"]["counts"] == {"failed": 2}
    assert states["search"]["failed_tasks"] == [0, 1]
    assert run.command("cancel", run.dir).stdout == "nothing is queued or running\n"
    before = run.trees()
    run.launch("--stages", "search")
    _until(lambda: len(run.trees()) > len(before), run)
    assert run.trees()[: len(before)] == before, "it goes on"
    run.command("cancel", run.dir)


def test_a_container_is_refused_by_name(tmp_path):
    run = Run(None, tmp_path)
    run.write_cluster(LOCAL + ", container: {runtime: apptainer, image: /x.sif}}")
    result = run.command("launch", "run.yaml", "--cluster", "cluster.yaml", "--stages", "search")
    assert result.returncode == 2
    assert "container: the local executor starts none" in result.stderr


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
