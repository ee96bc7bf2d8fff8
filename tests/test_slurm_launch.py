"""Launching on a real Slurm: the graph runs in order, nothing is submitted twice, and what fails is said and mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slurm_box import Run

from astro_hpc.run.files import read_jsonl


@pytest.fixture(scope="module", autouse=True)
def short_of_time(slurm, tmp_path_factory):
    """A search that can't be done within its limit; begun first, because Slurm looks at limits seldom.

    The limit is set once the stage has begun: it listens to the signal that comes before, however slow the machine.
    """
    folder = tmp_path_factory.mktemp("short")
    search = {"num_iterations": 3000, "num_expansions": 4, "num_rollouts": 4, "trees_in_flight": 1}
    run = Run(slurm, folder, shards=1, search=search, problems={"train": [{"type": "signs", "count": 400}]})
    run.write_cluster(run.cluster().replace("00:10:00", "01:00:00").replace("20", "58"))
    [job] = run.launch("--stages", "search")
    run.wait(lambda: (run.dir / "search" / "shard-00000-of-00001" / "state.json").exists())
    run.limit_soon(job["id"])
    return run


def test_the_graph_runs_in_order_and_launching_again_submits_nothing(slurm, tmp_path):
    run = Run(slurm, tmp_path)
    run.write_cluster(f"{run.cluster()}setup: ['until [ -e {tmp_path}/go ]; do sleep 0.2; done']\n")
    first = run.launch("--stages", "search,gather,clone")
    assert [(row["job"], row["tasks"]) for row in first] == [("search", 4), ("gather", 1), ("clone", 1)]
    states = run.status()
    assert states["clone"]["state"] == "pending"
    assert states["clone"]["reason"] == "Dependency"
    assert run.launch("--stages", "search,gather,clone") == []
    (tmp_path / "go").touch()
    run.wait()
    assert len(run.trees()) == len(set(run.trees())) == 24, run.logs()
    assert len(list(read_jsonl(run.dir / "search" / "trees.jsonl"))) == 24
    assert (run.dir / "traces" / "manifest.json").exists(), run.logs()
    states = run.status()
    assert [states[name]["counts"] for name in ("search", "gather", "clone")] == [{"done": 4}, {"done": 1}, {"done": 1}]
    assert states["sft-astro"]["state"] == "waiting"
    assert run.launch("--stages", "search,gather,clone") == []
    manifest = json.loads((run.dir / "traces" / "manifest.json").read_text())
    assert manifest["commit"] == next(run.dir.glob("jobs/frozen-*/COMMIT")).read_text().strip()


def test_a_lost_shard_alone_is_submitted_again_with_what_was_made_from_it_and_by_hand_too(slurm, tmp_path):
    run = Run(slurm, tmp_path)
    run.launch("--stages", "search,gather")
    run.wait()
    whole = {path: path.stat().st_mtime_ns for path in run.dir.glob("search/shard-*/manifest.json")}
    assert len(whole) == 4, run.logs()
    lost = run.dir / "search" / "shard-00002-of-00004"
    (lost / "manifest.json").unlink()
    (lost / "trees.jsonl").unlink()
    assert run.status()["search"]["counts"] == {"done": 3, "failed": 1}
    again = run.launch("--stages", "search,gather")
    assert [(row["job"], row["tasks"]) for row in again] == [("search", 1), ("gather", 1)]
    run.wait()
    assert len(run.trees()) == 24, run.logs()
    gathered = (run.dir / "search" / "gather.json").stat().st_mtime_ns
    assert gathered > (lost / "manifest.json").stat().st_mtime_ns, "it waited for the shard"
    assert run.launch("--stages", "search,gather") == []
    assert sum(path.stat().st_mtime_ns == whole[path] for path in whole) == 3

    (lost / "manifest.json").unlink()
    slurm.run("sbatch", "--array=2", run.dir / "jobs" / "search.sbatch")
    assert run.launch("--stages", "search") == [], "a job submitted by hand is known too"
    run.wait()
    assert (lost / "manifest.json").exists(), run.logs()


def test_a_job_that_waits_is_told_of_what_it_must_wait_for_too(slurm, tmp_path):
    run = Run(slurm, tmp_path, shards=2)
    run.launch("--stages", "search,gather")
    run.wait()
    gathered, lost = run.dir / "search" / "gather.json", run.dir / "search" / "shard-00001-of-00002"
    assert gathered.exists(), run.logs()
    held = slurm.run("sbatch", "--parsable", "--hold", run.dir / "jobs" / "gather.sbatch").strip()
    for name in ("manifest.json", "trees.jsonl"):
        (lost / name).unlink()
    [again] = run.launch("--stages", "search,gather")
    assert (again["job"], again["tasks"]) == ("search", 1)
    waits_for = slurm.run("squeue", "-h", "-j", held, "-o", "%E")
    assert again["id"] in waits_for or (lost / "manifest.json").exists(), "or it is done by now"
    slurm.run("scontrol", "release", held)
    run.wait()
    assert gathered.stat().st_mtime_ns > (lost / "manifest.json").stat().st_mtime_ns, run.logs()


def test_a_bad_configuration_is_never_retried_and_its_dependants_go(slurm, tmp_path):
    run = Run(slurm, tmp_path, model={"path": "/nowhere"})
    run.launch("--stages", "search,gather,clone")
    run.wait()
    states = run.status()
    assert states["search"]["counts"] == {"failed": 4}, run.logs()
    assert "model.path: no folder /nowhere" in states["search"]["reason"]
    assert states["search"]["attempt"] == 0
    assert Path(states["search"]["log"]).read_text()
    assert states["gather"]["state"] == states["clone"]["state"] == "failed"
    ended = [path.read_text().splitlines()[:3] for path in sorted(run.dir.glob("jobs/ended/search-0000?"))]
    assert ended == [["refused", "2", "0"]] * 4


def test_cancel_takes_what_is_queued_and_running(slurm, tmp_path):
    run = Run(slurm, tmp_path, shards=2, search={"num_iterations": 100_000, "num_expansions": 2, "num_rollouts": 1})
    run.launch("--stages", "search,gather")
    run.wait(lambda: run.queued().count("RUNNING") == 2)
    states = run.status()
    assert states["search"]["counts"] == {"running": 2}
    assert states["search"]["nodes"]
    result = run.command("cancel", run.dir)
    assert result.stdout.startswith("cancelled: ")
    run.wait()
    assert run.command("cancel", run.dir).stdout == "nothing is queued or running\n"
    assert run.status()["gather"]["state"] == "failed"


def test_what_the_cluster_refuses_is_said_before_anything_is_submitted(slurm, tmp_path):
    run = Run(slurm, tmp_path)
    for text, message in (
        ("partition: gpu", "partition 'gpu': the cluster has batch, urgent; mend the cluster file"),
        (
            "{gpus_per_node: 9, memory: null}",
            "search: Slurm refuses it (Requested node configuration is not available)",
        ),
        ('{gpus_per_node: 0, memory: null, time: "30-00:00:00"}', "search: Slurm refuses it"),
        ("{gpus_per_node: 0, memory: null, stages: {sft: {nodes: 9}}}", "sft-astro: Slurm refuses it"),
    ):
        run.write_cluster(text)
        result = run.command("launch", "run.yaml", "--cluster", "cluster.yaml")
        assert result.returncode == 2, result.stdout
        [line] = result.stderr.strip().splitlines()
        assert message in line
    assert run.queued() == []


def test_saved_at_the_time_limit_it_is_requeued_and_goes_on(slurm, short_of_time):
    """USR1 comes before the limit, the shard saves (75), is requeued, and the next attempt goes on."""
    run = short_of_time
    state = run.dir / "jobs" / "ended" / "search-00000"
    run.wait(lambda: state.exists())
    # Of the first attempt: Slurm starts the next one by itself, and may have cut that short too by now.
    assert "search-00000: requeued (exit code 75, attempt 0)" in run.logs()
    before = run.trees()
    assert 0 < len(before) < 400
    assert run.launch("--stages", "search") == []

    def goes_on() -> bool:
        # Requeued, a job would wait two minutes.
        run.hurry()
        return "going on where attempt" in run.logs()

    run.wait(goes_on)
    run.command("cancel", run.dir)
    run.wait()
    assert run.trees()[: len(before)] == before


def test_accounting_says_how_a_job_ended_that_left_nothing(slurm_with_accounting, tmp_path):
    slurm = slurm_with_accounting
    run = Run(slurm, tmp_path, shards=1, search={"num_iterations": 100_000, "num_expansions": 2, "num_rollouts": 1})
    [job] = run.launch("--stages", "search")
    run.wait(lambda: run.queued() == ["RUNNING"])
    # The batch script alone: with its step killed a moment before, it would live to ask for a requeue.
    slurm.run("scancel", "--batch", "--signal=KILL", job["id"])
    run.wait()
    run.wait(lambda: "failed" in str(run.status()["search"]["counts"]))
    assert run.status()["search"]["state"] == "failed"
