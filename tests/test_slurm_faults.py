"""What a cluster does to jobs, done to them: nothing is lost, nothing is done twice, and the graph finishes."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from slurm_box import Run, slurm_with_mortal_nodes, thaw_when_told

# A shard takes some seconds, and saves every tree.
SLOW_SEARCH = {"num_iterations": 600, "num_expansions": 4, "num_rollouts": 4, "trees_in_flight": 1}


@pytest.fixture(scope="module")
def box():
    """A Slurm of its own, whose nodes may die; a dead one is noticed soon."""
    yield from slurm_with_mortal_nodes(kill_wait=3)


def test_kill_requeue_dead_node_preemption_and_a_new_controller_lose_nothing(box, tmp_path):
    run = Run(box, tmp_path, shards=4, search=SLOW_SEARCH, problems={"train": [{"type": "signs", "count": 60}]})
    cluster = (tmp_path / "cluster.yaml").read_text()
    run.write_cluster(cluster + "  gather: {exclusive: false, memory: null}\nexclude: []\n")
    run.write_cluster(run.cluster().replace("exclusive: false", "exclusive: true", 1))  # one shard a node
    [search, gather] = run.launch("--stages", "search,gather")
    assert (search["tasks"], gather["tasks"]) == (4, 1)

    def nodes() -> dict[int, str]:
        lines = box.run("squeue", "-h", "-t", "RUNNING", "-j", search["id"], "-o", "%K %N").splitlines()
        return {int(index): node for index, node in map(str.split, lines)}

    with ThreadPoolExecutor() as pool:  # at the same time: all are to be at work when the faults come
        frozen = list(pool.map(lambda shard: run.freeze("search", lambda: bool(run.trees_of(shard)), shard), range(4)))
    where = nodes()
    for shard in (1, 3):
        thaw_when_told(frozen[shard])
    os.kill(frozen[0], signal.SIGKILL)
    box.run("scontrol", "requeue", f"{search['id']}_1")
    box.kill_node(where[2])
    box.run("sbatch", "-p", "urgent", "-w", where[3], "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    before = {shard: run.trees_of(shard) for shard in range(4)}
    assert run.launch("--stages", "search,gather") == [], "all of it is still queued or running"

    run.wait(lambda: run.hurry() and "DOWN" in box.run("sinfo", "-h", "-n", where[2], "-o", "%T").upper())
    assert run.launch("--stages", "search,gather") == []
    box.kill_daemon("slurmctld")
    box.start_controller()
    box.start_node(where[2])
    run.wait(lambda: run.hurry() and not run.queued(), seconds=400)

    assert (run.dir / "search" / "gather.json").exists(), run.logs()
    trees = run.trees()
    assert len(trees) == len(set(trees)) == 60
    for shard, earlier in before.items():
        assert run.trees_of(shard)[: len(earlier)] == earlier, "finished trees stay"
    assert run.status()["gather"]["state"] == "done"
    attempts = [len(list(run.dir.glob(f"logs/search-0000{shard}/job-*"))) for shard in range(4)]
    assert min(attempts) >= 2, attempts


def test_what_fails_the_same_way_twice_stops_with_its_reason(box, tmp_path):
    run = Run(box, tmp_path, shards=1)
    # What every attempt writes anew, as a search does before its engine starts, is no progress.
    anew = 'mkdir -p "$OUTPUT"; date > "$OUTPUT/problems.json"; date >> "$OUTPUT/attempts.jsonl"'
    broken = f"srun() {{ {anew}; command srun bash -c 'echo ValueError: broken; exit 3'; }}"
    run.write_cluster(run.cluster() + f"setup: [{json.dumps(broken)}]\n")
    run.launch("--stages", "search,gather")
    run.wait(lambda: run.hurry() and not run.queued())
    state = run.status()
    assert state["search"]["state"] == "failed"
    ended = (run.dir / "jobs" / "ended" / "search-00000").read_text().split("\n")
    assert ended[:3] == ["failed", "3", "1"], "one retry, no more"
    assert state["gather"]["state"] == "failed", "its dependant doesn't wait for ever"
