"""More of what a cluster does: a full disk, PreemptMode=CANCEL, scancel, a bad node; SFT's time limit and dead node.

Nothing is lost, nothing is done twice, and the graph finishes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_box import Run, load_sandbox_module

SLOW_SEARCH = {"num_iterations": 600, "num_expansions": 4, "num_rollouts": 4, "trees_in_flight": 1}
_DISK_KIB = 2048


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory) -> Iterator[Path | None]:
    """A file system of 2 MiB, before the nodes start and see it; None where this user may not mount one."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_KIB}k", "tmpfs", str(folder)]
    mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def box(small_disk):
    """A Slurm of its own, whose nodes may die; a dead one is noticed soon."""
    module = load_sandbox_module()
    sandbox = module.Sandbox(
        Path(tempfile.mkdtemp(prefix="slurm-")), num_nodes=4, die_with_parent=True, kill_wait=10, slurmd_timeout=5
    )
    sandbox.up()
    yield sandbox
    sandbox.down()


def _ended(run: Run, work: str) -> list[str]:
    """Verdict, exit code, attempt, node, task, log and reason of a task's last attempt."""
    with contextlib.suppress(OSError):
        return (run.dir / "jobs" / "ended" / work).read_text().split("\n")
    return [""] * 7


def test_a_full_disk_in_one_shard_is_told_requeued_and_passes(box, small_disk, tmp_path):
    run = Run(box, tmp_path, shards=4, problems={"train": [{"type": "signs", "count": 40}]})
    full = tmp_path / "full"
    full.touch()
    shard = run.dir / "search" / "shard-00001-of-00004"
    if small_disk is not None:
        shard.parent.mkdir(parents=True)
        shard.symlink_to(small_disk)
        (small_disk / "ballast").write_bytes(bytes((_DISK_KIB - 80) << 10))
    else:  # the kernel's other limit on what can be written
        line = f'[ -e {full} ] && [ "$SLURM_ARRAY_TASK_ID" = 1 ] && ulimit -f 80'
        run.write_cluster(run.cluster() + f"setup: [{json.dumps(line)}]\n")
    run.launch("--stages", "search,gather")
    run.wait(lambda: _ended(run, "search-00001")[0] == "requeued")
    run.wait(lambda: run.queued().count("RUNNING") == 0)
    assert _ended(run, "search-00001")[1] == "74", run.logs()
    assert ("No space left" if small_disk else "File too large") in _ended(run, "search-00001")[6]
    states = run.status()
    assert states["search"]["counts"] == {"done": 3, "pending": 1}
    before = run.trees_of(1)
    assert 0 < len(before) < 10

    run.hurry()  # once more while it is full: the same failure, and still no end
    run.wait(lambda: _ended(run, "search-00001")[2] == "1")
    assert _ended(run, "search-00001")[:2] == ["requeued", "74"], run.logs()
    (small_disk / "ballast" if small_disk else full).unlink()
    run.wait(lambda: run.hurry() and not run.queued())
    assert (run.dir / "search" / "gather.json").exists(), run.logs()
    assert len(run.trees()) == len(set(run.trees())) == 40
    assert run.trees_of(1)[: len(before)] == before


def test_preempted_where_slurm_cancels_it_comes_back_by_itself(box, tmp_path):
    run = Run(box, tmp_path, shards=2, search=SLOW_SEARCH, problems={"train": [{"type": "signs", "count": 30}]})
    run.write_cluster(run.cluster().replace("exclusive: false", "exclusive: true", 1))
    box.run("scontrol", "update", "PartitionName=batch", "PreemptMode=CANCEL", "GraceTime=0")
    try:
        [search, _] = run.launch("--stages", "search,gather")
        run.wait(lambda: all(run.trees_of(shard) for shard in range(2)))
        node = box.run("squeue", "-h", "-j", f"{search['id']}_1", "-o", "%N").strip()
        before = run.trees_of(1)
        urgent = ["-p", "urgent", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
        box.run("sbatch", *urgent)
        run.wait(lambda: _ended(run, "search-00001")[0] == "requeued")
    finally:
        run.wait(lambda: "RUNNING" not in box.run("squeue", "-h", "-p", "urgent", "-o", "%T"))
        box.run("scontrol", "update", "PartitionName=batch", "PreemptMode=REQUEUE")
    assert run.launch("--stages", "search,gather") == [], "it is queued still"
    run.wait(lambda: run.hurry() and not run.queued())
    assert len(run.trees()) == len(set(run.trees())) == 30, run.logs()
    # Slurm holds a cancelled task against its whole array for ever, and drops what waits for the array.
    assert [row["job"] for row in run.launch("--stages", "search,gather")] == ["gather"]
    run.wait(lambda: not run.queued())
    assert (run.dir / "search" / "gather.json").exists(), run.logs()
    assert run.trees_of(1)[: len(before)] == before


def test_a_cancelled_task_is_told_and_launching_again_finishes_the_graph(box, tmp_path):
    run = Run(box, tmp_path, shards=3, search=SLOW_SEARCH, problems={"train": [{"type": "signs", "count": 30}]})
    [search, _] = run.launch("--stages", "search,gather")
    run.wait(lambda: all(run.trees_of(shard) for shard in range(3)))
    box.run("scancel", f"{search['id']}_1")
    run.wait(lambda: not run.queued())
    states = run.status()
    assert states["search"]["counts"] == {"done": 2, "failed": 1}, run.logs()
    assert states["search"]["failed_tasks"] == [1]
    assert states["search"]["reason"] == "cancelled"
    assert states["gather"]["state"] == "failed", "its dependant is cancelled, not left pending"
    whole = {shard: run.trees_of(shard) for shard in range(3)}
    again = run.launch("--stages", "search,gather")
    assert [(row["job"], row["tasks"]) for row in again] == [("search", 1), ("gather", 1)]
    run.wait(lambda: not run.queued())
    assert (run.dir / "search" / "gather.json").exists(), run.logs()
    assert len(run.trees()) == len(set(run.trees())) == 30
    assert [run.trees_of(shard) for shard in (0, 2)] == [whole[0], whole[2]]
    assert run.trees_of(1)[: len(whole[1])] == whole[1]


def test_a_bad_node_is_named_and_the_job_goes_on_without_it(box, tmp_path):
    """The first node has no local disk where the others do: its check fails, and the job is requeued elsewhere."""
    run = Run(box, tmp_path, shards=1)
    for node in box.nodes[1:]:
        (tmp_path / "scratch" / node).mkdir(parents=True)
    check = f"node_check: {{disk: {tmp_path}/scratch/$SLURMD_NODENAME, min_disk_gb: 0}}\n"
    run.write_cluster(run.cluster().replace("gpus_per_node: 0", "gpus_per_node: 1") + check)
    run.launch("--stages", "search")
    run.wait(lambda: run.hurry() and not run.queued())
    assert (run.dir / "search" / "shard-00000-of-00001" / "manifest.json").exists(), run.logs()
    assert (run.dir / "jobs" / "exclude").read_text().split()[:3] == ["n1", "local", "disk:"]
    assert _ended(run, "search-00000")[:3] == ["done", "0", "1"]
    assert _ended(run, "search-00000")[3] in box.nodes[1:]
    shown = run.command("status", run.dir).stdout
    assert "excluded n1: local disk" in shown
    (run.dir / "search" / "shard-00000-of-00001" / "manifest.json").unlink()
    run.launch("--stages", "search")
    assert "--exclude=n1" in (run.dir / "jobs" / "search.sbatch").read_text(), "later launches keep off it too"
    run.wait(lambda: not run.queued())
