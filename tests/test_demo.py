"""The whole loop, for real: the smoke demo with the 135M model, killed in search and in sft, and what it leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from astro_hpc.run.files import Journal, read_jsonl
from astro_hpc.run.metrics import read_metrics

ROOT = Path(__file__).parent.parent
STAGES = ["warmup", "search/shard-00000-of-00001", "traces", "sft/astro", "select/astro", "rl/astro", "eval"]


def _command(runs: Path, *extra: str) -> list[str]:
    settings = [f"runs_dir={runs}", "sft.checkpoint.every_steps=1", "search.trees_in_flight=2", *extra]
    return [sys.executable, "-m", "astro_hpc", "demo", "--smoke", *settings]


def _kill_when(command: list[str], ready: Callable[[], bool], log: Path) -> None:
    """Run until `ready`, then kill -9 the parent; its children must end by themselves."""
    with open(log, "ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        deadline = time.monotonic() + 500
        while not ready():
            assert process.poll() is None, f"it ended before it could be killed:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not ready in time:\n{log.read_text()[-3000:]}"
            time.sleep(0.05)
        children = _descendants(process.pid)
        assert children, "a stage should be running in a child"
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 20
    while alive := [pid for pid in children if _is_alive(pid)]:
        assert time.monotonic() < deadline, f"orphans are left: {alive}"
        time.sleep(0.1)


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished smoke run that was killed twice on its way."""
    runs = tmp_path_factory.mktemp("runs")
    run, log = runs / "demo-smoke", runs / "log.txt"
    trees = run / STAGES[1] / "trees.jsonl"
    _kill_when(_command(runs), lambda: trees.exists() and trees.read_bytes().count(b"\n") >= 2, log)
    before = trees.read_bytes()

    steps = run / "sft" / "astro" / "metrics.jsonl"
    _kill_when(_command(runs), lambda: len(read_metrics(steps)) >= 2, log)
    assert trees.read_bytes().startswith(before[: before.rfind(b"\n") + 1]), "finished trees are never touched"

    finished = subprocess.run(_command(runs), cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return run, finished


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_leaves_a_manifest_and_what_it_promises(demo):
    run, _ = demo
    manifests = {stage: json.loads((run / stage / "manifest.json").read_text()) for stage in STAGES}
    for stage, manifest in manifests.items():
        assert manifest["outputs"], stage
        assert all((run / output).exists() for output in manifest["outputs"]), stage
        assert manifest["seconds"] > 0
    assert manifests["search/shard-00000-of-00001"]["attempt"] == 2
    assert manifests["sft/astro"]["attempt"] == 2
    assert (run / "report" / "index.html").stat().st_size > 10_000
    assert not list(run.rglob("*.tmp")), "nothing half-written is left"


@pytest.mark.slow
def test_nothing_is_lost_or_done_twice(demo):
    run, _ = demo
    ids = [tree["problem"]["id"] for tree in Journal.read(run / STAGES[1] / "trees.jsonl")]
    assert len(ids) == len(set(ids)) == 10
    steps = [row["step"] for row in read_metrics(run / "sft" / "astro" / "metrics.jsonl")]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    rates = [row["id"] for row in Journal.read(run / "select" / "astro" / "rates.jsonl")]
    assert len(rates) == len(set(rates)) == 6


@pytest.mark.slow
def test_models_learn_and_answers_are_graded(demo):
    run, finished = demo
    losses = [row["loss"] for row in read_metrics(run / "warmup" / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
    for model in ("base", "warmup", "astro-sft", "astro-rl"):
        rows = list(read_jsonl(run / "eval" / model / "signs-heldout" / "output-rs0.jsonl"))
        assert len(rows) == 10
        assert {"problem", "expected_answer", "generation", "predicted_answer", "is_correct"} <= set(rows[0])
        assert model in finished.stdout
    assert "numbers mean nothing" in finished.stdout
    [step] = read_metrics(run / "rl" / "astro" / "metrics.jsonl")
    assert -1 <= step["reward"] <= 1
    rollouts = list(read_jsonl(run / "rl" / "astro" / "rollouts" / "step_00000001.jsonl"))
    assert len(rollouts) == 8
    assert all(len(r["token_ids"]) == len(r["logprobs"]) for r in rollouts)


@pytest.mark.slow
def test_running_again_does_nothing(demo):
    run, _ = demo
    times = {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")}
    again = subprocess.run(_command(run.parent), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0
    assert again.stderr.count("done already") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")} == times


@pytest.mark.slow
def test_changed_settings_are_refused_in_one_line(demo):
    run, _ = demo
    command = [sys.executable, "-m", "astro_hpc", "clone", "configs/demo-smoke.yaml"]
    command += [f"runs_dir={run.parent}", "clone.num_search=7"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    [line] = result.stderr.strip().splitlines()
    assert "clone.num_search=2 (now 7)" in line
    assert "--redo" in line
