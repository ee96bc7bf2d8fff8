"""Launching on this machine: the jobs run in the background, one after the other, and only what is missing."""

from __future__ import annotations

import time

from slurm_box import Run


def test_a_local_launch_runs_in_the_background_and_only_once(tmp_path):
    run = Run(None, tmp_path)
    run.write_cluster("{executor: local, gpus_per_node: 0, stages: {search: {shards: 2}}}")
    submitted = run.launch("--stages", "search")
    assert [(row["job"], row["tasks"]) for row in submitted] == [("search", 2)]
    log = tmp_path / "runs" / "test" / "jobs" / "local"
    deadline = time.monotonic() + 60
    second = None
    while len(list(run.dir.glob("search/shard-*/manifest.json"))) < 2:
        if second is None:
            second = run.command("launch", "run.yaml", "--cluster", "cluster.yaml", "--stages", "search")
        assert time.monotonic() < deadline, [path.read_text() for path in log.glob("*_log.*")]
        time.sleep(0.1)
    if second is not None and second.returncode != 0:
        assert "local launch: in use by" in second.stderr
    assert len(run.trees()) == len(set(run.trees())) == 24
    while run.command("launch", "run.yaml", "--cluster", "cluster.yaml", "--stages", "search").returncode != 0:
        assert time.monotonic() < deadline
    assert run.launch("--stages", "search") == []
    assert run.status()["search"]["counts"] == {"done": 2}
