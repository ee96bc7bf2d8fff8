"""What is done counts as done only while it was made from what is there: else a launch submits it again."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from slurm_box import Run

from astro_hpc import pipeline
from astro_hpc.config import RunConfig, load_config
from astro_hpc.launch.cluster import ClusterConfig
from astro_hpc.launch.fresh import fresh_tasks
from astro_hpc.launch.graph import Job, build_graph
from astro_hpc.launch.submit import tasks_done
from astro_hpc.run.stage import CheckpointedExit, Stage, StageContext, run_stage

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


def launched_by(cfg: RunConfig, folder: Path, **cluster: object) -> Run:
    run = Run.__new__(Run)
    run.slurm, run.folder, run.dir = None, folder, cfg.run_dir.absolute()
    run.write_cluster(json.dumps({"gpus_per_node": 0, "stages": {"search": {"shards": 2}}, **cluster}))
    return run


def test_a_launch_submits_again_what_is_outdated(cfg, tmp_path):
    run = launched_by(cfg, tmp_path)

    def submitted(*arguments: str) -> list[str]:
        return [row["job"] for row in run.launch("--dry-run", "--stages", "search,gather,clone", *arguments)]

    assert submitted() == []
    (cfg.run_dir / "search" / "shard-00001-of-00002" / "manifest.json").unlink()
    assert submitted() == ["search", "gather", "clone"]
    commands = {name: command_of(run.dir / "jobs" / f"{name}.sbatch") for name in ("search", "gather", "clone")}
    assert commands["search"].endswith('--num-shards "$NUM_SHARDS")'), "it begins with what the launch asks for"
    assert commands["gather"].endswith("--gather)"), "merges whatever is there"
    assert commands["clone"] == 'COMMAND=(clone "$CONFIG" --redo)'


def command_of(script: Path) -> str:
    return next(line for line in script.read_text().splitlines() if line.startswith("COMMAND="))


def test_what_is_outdated_is_done_again_by_the_launch_and_the_old_is_kept(cfg, tmp_path):
    more = cfg.model_copy(update={"search": cfg.search.model_copy(update={"num_iterations": 5})})
    for shard in range(2):
        run_stage(more, pipeline.search(more, shard, 2), redo=True)
    run = launched_by(cfg, tmp_path, executor="local")
    chosen = ("search.num_iterations=5", "--stages", "search,gather,clone")
    written = json.loads((cfg.run_dir / "traces" / "manifest.json").read_text())["inputs"]
    result = run.command("launch", "run.yaml", "--cluster", "cluster.yaml", *chosen)
    assert result.stdout.splitlines()[:3] == [
        "gather: job here",
        "clone: job here with --redo",
        "search: done, queued or running already",
    ], result.stderr
    deadline = time.monotonic() + 120
    while not (cfg.run_dir / "jobs" / "ended" / "clone").exists():
        assert time.monotonic() < deadline, [path.read_text() for path in run.dir.rglob("rank-0.log")]
        time.sleep(0.1)
    assert (cfg.run_dir / "jobs" / "ended" / "clone").read_text().startswith("done\n")
    assert stale(more) == set()
    assert json.loads((cfg.run_dir / "traces.old-1" / "manifest.json").read_text())["inputs"] == written
    assert run.launch("--dry-run", *chosen) == []


def test_a_redo_that_was_stopped_goes_on_and_one_of_the_same_inputs_does_nothing(cfg):
    read = cfg.run_dir / "read"
    attempts: list[StageContext] = []

    def body(ctx: StageContext) -> list[Path]:
        attempts.append(ctx)
        (ctx.dir / "half").touch()
        if len(attempts) == 2:
            raise CheckpointedExit
        return [ctx.dir / "half"]

    stage = Stage("made", Path("made"), {"read": read}, {}, body)
    read.write_text("old")
    assert run_stage(cfg, stage)
    assert not run_stage(cfg, stage, redo=True)
    read.write_text("new")
    with pytest.raises(CheckpointedExit):
        run_stage(cfg, stage, redo=True)
    assert run_stage(cfg, stage, redo=True)
    assert [(ctx.resumed, ctx.attempt) for ctx in attempts] == [(False, 1), (False, 1), (True, 2)]
    assert [path.name for path in cfg.run_dir.glob("made*")].count("made.old-1") == 1
    assert len(list(cfg.run_dir.glob("made*"))) == 2


def test_what_one_process_has_done_is_not_done_again_in_shards(cfg, tmp_path):
    shutil.rmtree(cfg.run_dir / "search")
    run_stage(cfg, pipeline.search(cfg))
    pipeline.gather_search(cfg)
    shutil.rmtree(cfg.run_dir / "traces")
    run_stage(cfg, pipeline.clone(cfg))
    run = launched_by(cfg, tmp_path, stages={"search": {"shards": 3}, "clone": {"shards": 2}})
    chosen = ("--dry-run", "--stages", "search,gather,clone")
    assert run.launch(*chosen) == []
    counts = {name: state["counts"] for name, state in run.status().items()}
    assert (counts["search"], counts["clone"], counts["clone-gather"]) == ({"done": 3}, {"done": 2}, {"done": 1})

    def refused() -> str:
        result = run.command("launch", "run.yaml", "--cluster", "cluster.yaml", *chosen)
        assert result.returncode == 2, result.stdout
        [line] = result.stderr.splitlines()
        return line

    manifest = cfg.run_dir / "traces" / "manifest.json"
    done = json.loads(manifest.read_text())
    manifest.unlink()
    advice = "; set stages.clone.shards to 1, or move it away"
    assert refused() == f"astro-hpc: {run.dir / 'traces'}: was begun in one process{advice}"
    manifest.write_text(json.dumps({**done, "inputs": dict.fromkeys(done["inputs"], "other")}))
    assert refused() == f"astro-hpc: {run.dir / 'traces'}: was done in one process, of other inputs{advice}"
    (cfg.run_dir / "search" / "shard-00000-of-00001" / "manifest.json").unlink()
    assert "shard-00000-of-00001: was begun in 1 shards, the cluster file says 3; set stages.search" in refused()


def test_a_gathered_result_is_no_result_of_one_process(cfg, tmp_path):
    shutil.rmtree(cfg.run_dir / "traces")
    for shard in range(2):
        run_stage(cfg, pipeline.clone_shard(cfg, shard, 2))
    run_stage(cfg, pipeline.clone(cfg))
    stages = {"search": {"shards": 2}, "clone": {"shards": 2}}
    run = launched_by(cfg, tmp_path, stages=stages)
    chosen = ("--dry-run", "--stages", "search,gather,clone")
    assert run.launch(*chosen) == []
    shutil.rmtree(cfg.run_dir / "clone")
    assert [row["job"] for row in run.launch(*chosen)] == ["clone", "clone-gather"]
