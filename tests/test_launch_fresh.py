"""What is done counts as done only while it was made from what is there: else a launch submits it again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from slurm_box import Run

from astro_hpc import pipeline
from astro_hpc.config import RunConfig, load_config
from astro_hpc.launch.cluster import ClusterConfig
from astro_hpc.launch.fresh import fresh_tasks
from astro_hpc.launch.graph import Job, build_graph
from astro_hpc.launch.submit import tasks_done
from astro_hpc.run.stage import run_stage

CLUSTER = ClusterConfig.model_validate({"gpus_per_node": 0, "stages": {"search": {"shards": 2}}})


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Searched in two shards, gathered and cloned by the scripted engine; a report was written."""
    run = Run(None, tmp_path)
    monkeypatch.chdir(tmp_path)
    cfg = load_config(run.folder / "run.yaml")
    for shard in range(2):
        run_stage(cfg, pipeline.search(cfg, shard, 2))
    pipeline.gather_search(cfg)
    run_stage(cfg, pipeline.clone(cfg))
    write_later(cfg.run_dir / "report" / "index.html")
    return cfg


def write_later(path: Path) -> None:
    """After everything, also where the file system's clock is coarse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    later = max(each.stat().st_mtime_ns for each in path.parents[1].rglob("*")) + 10**9
    os.utime(path, ns=(later, later))


def stale(cfg: RunConfig, run: Path | None = None) -> set[str]:
    run = run or cfg.run_dir.absolute()
    jobs = build_graph(cfg, CLUSTER)
    done = {job.name: tasks_done(run, job) for job in jobs}
    fresh = fresh_tasks(run, jobs, done)
    return {name for name, tasks in done.items() if fresh[name] != tasks}


def test_a_gathering_older_than_a_shard_and_a_stage_that_read_something_else_are_outdated(cfg, tmp_path):
    assert stale(cfg) == set()
    copy = tmp_path / "elsewhere" / "test"
    shutil.copytree(cfg.run_dir, copy)
    assert stale(cfg, copy) == set(), "a copied run is the same run"

    other = cfg.model_copy(update={"search": cfg.search.model_copy(update={"num_iterations": 5})})
    run_stage(other, pipeline.search(other, 0, 2), redo=True)
    gathered = cfg.run_dir / "search" / "gather.json"
    written = gathered.stat().st_mtime_ns
    os.utime(gathered, ns=(written - 10**9, written - 10**9))
    assert stale(cfg) == {"gather", "clone"}
    pipeline.gather_search(cfg)
    assert stale(cfg) == {"clone"}
    run_stage(cfg, pipeline.clone(cfg), redo=True)
    assert stale(cfg) == set()


def test_a_report_older_than_the_evaluation_is_outdated(tmp_path):
    cfg = RunConfig.model_validate({"name": "x", "problems": {"train": [{"type": "signs", "count": 3}]}})
    jobs: dict[str, Job] = {job.name: job for job in build_graph(cfg, CLUSTER)}
    for name in ("rl-astro", "report"):
        write_later(tmp_path / jobs[name].output_of(0) / jobs[name].marker)
    done = {name: tasks_done(tmp_path, job) for name, job in jobs.items()}
    assert fresh_tasks(tmp_path, list(jobs.values()), done)["report"] == {0}
    manifest = {"input_paths": {"model": "/models/base"}, "inputs": {"model": "1"}, "outputs": {"rl/astro/hf": "2"}}
    write_later(tmp_path / "rl" / "astro" / "manifest.json")
    (tmp_path / "rl" / "astro" / "manifest.json").write_text(json.dumps(manifest))
    later = (tmp_path / "report" / "index.html").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "rl" / "astro" / "manifest.json", ns=(later, later))
    fresh = fresh_tasks(tmp_path, list(jobs.values()), done)
    assert (fresh["report"], fresh["rl-astro"]) == (set(), {0})


def test_a_launch_submits_again_what_is_outdated(cfg, tmp_path):
    run = Run.__new__(Run)
    run.slurm, run.folder, run.dir = None, tmp_path, cfg.run_dir
    run.write_cluster(json.dumps({"gpus_per_node": 0, "stages": {"search": {"shards": 2}}}))

    def submitted(*arguments: str) -> list[str]:
        return [row["job"] for row in run.launch("--dry-run", "--stages", "search,gather,clone", *arguments)]

    assert submitted() == []
    (cfg.run_dir / "search" / "shard-00001-of-00002" / "manifest.json").unlink()
    assert submitted() == ["search", "gather", "clone"]
