"""More of what a cluster does: a full disk, PreemptMode=CANCEL, scancel, a bad node; training cut short.

Nothing is lost, nothing is done twice, and the graph finishes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from slurm_box import Run, slurm_with_mortal_nodes, thaw_when_told, wait_until_told

from astro_hpc.config.schema import SignsSource
from astro_hpc.problems.sources import load_source
from astro_hpc.rl.rollouts import Group, Rollout
from astro_hpc.rl.source import StepGroups, step_file
from astro_hpc.run.files import Journal, write_jsonl_atomic
from astro_hpc.run.metrics import read_metrics

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
    yield from slurm_with_mortal_nodes(kill_wait=10)


# --- training that its time limit stops, begun first: Slurm looks at limits seldom --------------------------------

_RESULTS = ("step", "loss", "grad_norm", "lr", "tokens", "trained_tokens")
_FROZEN_AT = 2  # steps


def _sft_run(box, folder: Path, model: Path) -> Run:
    """Some hundred quick steps of SFT on random sums; the data is all that the stage needs of those before it."""
    sft = {"num_epochs": 24, "seq_length": 48, "global_batch_size": 2, "checkpoint": {"every_steps": 500}}
    return _training_run(box, folder, model, "sft", sft=sft)


def _rl_run(box, folder: Path, model: Path) -> Run:
    """Some hundred quick steps of RL on rollouts that are there already: no engine, the same trainer and loop."""
    folder.mkdir()
    draw = random.Random(0)
    for step in range(1, 201):
        groups = []
        for position in (2 * step - 2, 2 * step - 1):
            rollouts = []
            for reward in (0.0, 1.0):
                ids = tuple(draw.randrange(3, 40_000) for _ in range(6))
                words = {"problem_id": str(position), "text": "", "outcome": "right" if reward else "wrong"}
                known = {"prompt_token_ids": (5, 6, 7), "logprobs": (-10.0,) * 6, "weight_versions": ((step - 1, 6),)}
                rollouts.append(Rollout(**words, **known, token_ids=ids, reward=reward, truncated=False))
            groups.append(Group(position, tuple(rollouts)))
        path = step_file(folder / "rollouts", step)
        path.parent.mkdir(exist_ok=True)
        StepGroups(used=groups).save(path)
    rl = {"num_steps": 200, "prompts_per_step": 2, "group_size": 2, "max_response_tokens": 8, "seq_length": 64}
    rl |= {"replay": str(folder / "rollouts"), "checkpoint": {"every_steps": 500}, "max_mismatch_kl": None}
    return _training_run(box, folder, model, "rl", rl=rl)


def _training_run(box, folder: Path, model: Path, stage: str, **settings: object) -> Run:
    folder.mkdir(exist_ok=True)
    model_settings = {"path": str(model), "prompt_style": "minimal-chat"}
    small = {"inference": {"engine": "scripted", "max_model_len": 64}, "precision": {"dtype": "fp32"}}
    run = Run(box, folder, model=model_settings, **small, **settings)
    run.write_cluster(run.cluster().replace("00:10:00", "01:00:00").replace("exclusive: false", "exclusive: true"))
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(12)]
    for name in ("traces", "sft/astro", "select/astro"):
        if stage == "rl" or name == "traces":
            (run.dir / name).mkdir(parents=True)
            (run.dir / name / "manifest.json").write_text("{}")
    (run.dir / "traces" / "astro.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if stage == "rl":
        (run.dir / "sft" / "astro" / "hf").symlink_to(model)
        prompts = load_source(SignsSource(count=4, split="train"))
        write_jsonl_atomic(run.dir / "select" / "astro" / "prompts.jsonl", (each.to_json() for each in prompts))
    return run


def _steps(run: Run, stage: str) -> int:
    path = run.dir / stage / "astro" / "metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


def _freeze(run: Run, stage: str, step: int) -> int:
    """Stop the stage's process once it has done `step` steps, for it would be done in no time; its number."""
    return run.freeze(stage, lambda: _steps(run, stage) >= step)


def _cut_at_the_limit(box, run: Run, pid: int) -> None:
    """Let a frozen stage meet its time limit and save; from then on it is held, or Slurm would finish it some time.

    The limit is set only now, and lifted once the signal before it is there: a slow machine may take long to start
    and to save.
    """
    [submitted] = Journal.read(run.dir / "jobs" / "submitted.jsonl")
    run.limit_soon(submitted["id"])
    wait_until_told(pid)
    box.run("scontrol", "update", f"jobid={submitted['id']}", "TimeLimit=01:00:00")
    os.kill(pid, signal.SIGCONT)
    run.wait(lambda: run.queued() == ["PENDING"])
    box.run("scontrol", "hold", submitted["id"])


@pytest.fixture(scope="module")
def trained(box, tiny_llama, tmp_path_factory) -> Iterator[dict[str, tuple[Run, Future[None], Run]]]:
    """By stage: a run that its time limit cuts short, when that has come about, and a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("training")
    made: dict[str, Callable[..., Run]] = {"sft": _sft_run, "rl": _rl_run}
    cut = {stage: make(box, folder / f"{stage}-cut", tiny_llama) for stage, make in made.items()}
    whole = {stage: make(box, folder / f"{stage}-whole", tiny_llama) for stage, make in made.items()}
    for stage, run in cut.items():
        run.launch("--stages", stage)
    with ThreadPoolExecutor() as pool:
        frozen = dict(zip(cut, pool.map(lambda stage: _freeze(cut[stage], stage, _FROZEN_AT), cut), strict=True))
        saved = {stage: pool.submit(_cut_at_the_limit, box, run, frozen[stage]) for stage, run in cut.items()}
        for stage, run in whole.items():
            run.launch("--stages", stage)
        yield {stage: (cut[stage], saved[stage], whole[stage]) for stage in made}


@pytest.fixture(scope="module", autouse=True)
def _begin_training(trained) -> None:
    """Before the other tests, so that they pass while Slurm waits for the limit."""


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
    run.wait(lambda: all(_ended(run, f"search-{shard:05d}")[0] == "done" for shard in (0, 2, 3)))
    run.wait(lambda: run.queued() == ["PENDING"] * 2)
    assert _ended(run, "search-00001")[1] == "74", run.logs()
    assert ("No space left" if small_disk else "File too large") in _ended(run, "search-00001")[6]
    states = run.status()
    assert states["search"]["counts"] == {"done": 3, "pending": 1}
    before = run.trees_of(1)
    assert 0 < len(before) < 10

    run.hurry()  # once more while it is full: the same failure, and still no end
    run.wait(lambda: _ended(run, "search-00001")[2] not in ("", "0"))
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
        thaw_when_told(run.freeze("search", lambda: bool(run.trees_of(1)), task=1))
        node = box.run("squeue", "-h", "-j", f"{search['id']}_1", "-o", "%N").strip()
        before = run.trees_of(1)
        urgent = ["-p", "urgent", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
        box.run("sbatch", *urgent)
        run.wait(lambda: _ended(run, "search-00001")[0] == "requeued")
    finally:
        run.wait(lambda: not box.run("squeue", "-h", "-p", "urgent"))
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
    thaw_when_told(run.freeze("search", lambda: bool(run.trees_of(1)), task=1))
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
    """The first node that it gets loses its local disk: its check fails, and the job is requeued elsewhere."""
    run = Run(box, tmp_path, shards=1)
    for node in box.nodes:
        (tmp_path / "scratch" / node).mkdir(parents=True)
    check = f"node_check: {{disk: {tmp_path}/scratch/$SLURMD_NODENAME, min_disk_gb: 0}}\n"
    lose = f"! mkdir {tmp_path}/lost 2>/dev/null || rmdir {tmp_path}/scratch/$SLURMD_NODENAME"
    run.write_cluster(run.cluster().replace("gpus_per_node: 0", "gpus_per_node: 1") + check + f"setup: ['{lose}']\n")
    run.launch("--stages", "search")
    run.wait(lambda: run.hurry() and not run.queued())
    assert (run.dir / "search" / "shard-00000-of-00001" / "manifest.json").exists(), run.logs()
    bad, *why = (run.dir / "jobs" / "exclude").read_text().split()[:3]
    assert (bad in box.nodes, why) == (True, ["local", "disk:"])
    assert _ended(run, "search-00000")[:3] == ["done", "0", "1"]
    assert _ended(run, "search-00000")[3] in set(box.nodes) - {bad}
    shown = run.command("status", run.dir).stdout
    assert f"excluded {bad}: local disk" in shown
    (run.dir / "search" / "shard-00000-of-00001" / "manifest.json").unlink()
    run.launch("--stages", "search")
    assert f"--exclude={bad}" in (run.dir / "jobs" / "search.sbatch").read_text(), "later launches keep off it too"
    run.wait(lambda: not run.queued())


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_training_stopped_by_its_time_limit_and_a_dead_node_computes_the_same(stage, box, trained):
    run, cut, whole = trained[stage]
    work = f"{stage}-astro"
    cut.result()
    assert _ended(run, work)[:3] == ["requeued", "75", "0"], run.logs()
    saved = _steps(run, stage)
    assert 0 < saved < 190
    assert list((run.dir / stage / "astro" / "checkpoints").glob("step_*")), "saved before the limit"
    [submitted] = Journal.read(run.dir / "jobs" / "submitted.jsonl")
    box.run("scontrol", "release", submitted["id"])
    if stage == "sft":
        run.wait(lambda: run.hurry() and "RUNNING" in run.queued())
        pid = _freeze(run, stage, saved + 1)
        node = box.run("squeue", "-h", "-j", submitted["id"], "-o", "%N").strip()
        box.kill_node(node)
        run.wait(lambda: "PENDING" in run.queued())
        assert not Path(f"/proc/{pid}").exists()
        box.start_node(node)
    run.wait(lambda: run.hurry() and not run.queued())
    whole.wait()
    states = run.status()[work], whole.status()[work]
    assert [state["state"] for state in states] == ["done", "done"], run.logs()
    assert int(_ended(run, work)[2]) >= (2 if stage == "sft" else 1)
    assert "going on where attempt" in run.logs()
    found, expected = (read_metrics(each.dir / stage / "astro" / "metrics.jsonl") for each in (run, whole))
    assert [[row.get(name) for name in _RESULTS] for row in found] == [
        [row.get(name) for name in _RESULTS] for row in expected
    ]
    manifests = [json.loads((each.dir / stage / "astro/hf/manifest.json").read_text()) for each in (run, whole)]
    assert manifests[0]["sha256"] == manifests[1]["sha256"]
