"""The SFT loop: what it writes, and that kill -9, SIGTERM and damaged checkpoints change nothing in the result."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sft_process import run
from tiny_models import random_examples

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
from astro_hpc.run.metrics import read_metrics
from astro_hpc.training import checkpoint
from astro_hpc.training.packing import PackedBatch, pack_examples
from astro_hpc.training.trainer import Trainer

RESULTS = ("step", "loss", "grad_norm", "lr", "tokens", "validation_loss")


def prepare(folder: Path) -> Path:
    """A folder with examples; returns it."""
    folder.mkdir()
    draw = random.Random(0)
    rows = [
        {"prompt": f"{a} + {b} =", "completion": " " + " ".join(str(draw.randrange(9)) for _ in range(b + 1))}
        for a in range(8)
        for b in range(12)
    ]
    rows.append({"prompt": "long", "completion": " 1" * 100})
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def results(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.get(name) for name in RESULTS) for row in read_metrics(folder / "metrics.jsonl")]


def in_tensorboard(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of every event file, in the order of writing."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [
        (event.step, value.tensor.float_val[0])
        for path in sorted((folder / "tensorboard").iterdir())
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == tag
    ]


def exported(folder: Path) -> str:
    digest: str = json.loads((folder / "hf" / "manifest.json").read_text())["sha256"]["model.safetensors"]
    return digest


def start(model: Path, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
        # Sums over threads depend on their number.
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    script = str(Path(__file__).with_name("sft_process.py"))
    return subprocess.Popen(
        [sys.executable, script, str(model), str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    while len(read_metrics(folder / "metrics.jsonl")) < step:
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.01)


def processes_of(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("sft") / "whole")
    ctx = run(tiny_llama, folder)
    assert ctx.counts["examples"] + ctx.counts["examples_validation"] == 96
    assert 2 <= ctx.counts["examples_validation"] <= 20
    assert ctx.counts["examples_dropped"] == 1
    return folder


def test_the_loop_learns_and_logs_every_step(uninterrupted: Path) -> None:
    rows = read_metrics(uninterrupted / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > 15
    assert rows[-1]["loss"] < rows[0]["loss"]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["tflops_per_rank"] > 0
        assert row["peak_memory_gib"] > 0.1
        assert row["padded_share"] == 0.0
        assert row["gradient_sync_seconds"] >= 0
        assert {"data_seconds", "compute_seconds", "checkpoint_seconds"} <= set(row)
    measured = [row["step"] for row in rows if "validation_loss" in row]
    assert measured == [step for step in range(1, len(rows) + 1) if step % 4 == 0 or step == len(rows)]
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert validation[-1] < validation[0]
    assert in_tensorboard(uninterrupted, "loss") == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    names = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert names == ["latest", f"step_{len(rows) // 5 * 5:08d}", f"step_{len(rows):08d}"]
    assert (uninterrupted / "checkpoints/latest").read_text().strip() == names[-1]
    assert (uninterrupted / "hf/tokenizer.json").exists()


def test_kill_9_and_resume_gives_the_same_losses_to_the_last_bit(
    tiny_llama: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = prepare(tmp_path / "killed")
    process = start(tiny_llama, folder)
    wait_for_step(folder, 12, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(folder) == []
    reached = len(read_metrics(folder / "metrics.jsonl"))
    assert reached < len(results(uninterrupted))
    ctx = run(tiny_llama, folder)
    assert ctx.counts["steps"] == len(results(uninterrupted))
    assert results(folder) == results(uninterrupted)
    assert in_tensorboard(folder, "loss") == in_tensorboard(uninterrupted, "loss")
    assert exported(folder) == exported(uninterrupted)
    assert not list((folder / "checkpoints").glob(".*"))


def test_sigterm_saves_and_the_next_start_goes_on_from_there(
    tiny_llama: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = prepare(tmp_path / "stopped")
    process = start(tiny_llama, folder)
    wait_for_step(folder, 7, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    done = len(read_metrics(folder / "metrics.jsonl"))
    assert f"stopped after step {done} of" in output
    assert (folder / "checkpoints/latest").read_text().strip() == f"step_{done:08d}"
    run(tiny_llama, folder)
    assert results(folder) == results(uninterrupted)
    assert exported(folder) == exported(uninterrupted)


# --- checkpoints by themselves --------------------------------------------------------------------------------


def make(model: Path, dtype: str = "fp32", distributed: bool = False) -> Trainer:
    return Trainer(
        model,
        ParallelConfig(use_distributed_optimizer=distributed),
        PrecisionConfig(dtype=dtype),  # type: ignore[arg-type]
        OptimizerConfig(lr=1e-3, weight_decay=0.1),
        20,
        seed=0,
    )


def step(trainer: Trainer, seed: int) -> dict[str, float]:
    batch = pack_examples(random_examples(3, 49000, seed), "all")

    def loss(logprobs: torch.Tensor, got: PackedBatch) -> tuple[torch.Tensor, dict[str, float]]:
        return -logprobs.mean(), {}

    return trainer.train_step([batch], loss)


@pytest.mark.parametrize(("dtype", "distributed"), [("fp32", False), ("bf16", False), ("bf16", True), ("fp32", True)])
def test_a_loaded_checkpoint_goes_on_as_if_nothing_happened(
    tiny_llama: Path, tmp_path: Path, dtype: str, distributed: bool
) -> None:
    first = make(tiny_llama, dtype, distributed)
    for seed in range(3):
        step(first, seed)
    first.save_checkpoint(tmp_path, 3, {"cursor": 17}, asynchronous=True)
    expected = [step(first, seed) for seed in range(3, 6)]  # while the checkpoint is being written
    assert first.finish_checkpoint(block=True)
    second = make(tiny_llama, dtype, distributed)
    assert second.load_checkpoint(tmp_path) == (3, {"cursor": 17})
    assert [step(second, seed) for seed in range(3, 6)] == expected
    for (name, ours), (_, theirs) in zip(second.named_hf_tensors(), first.named_hf_tensors(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.fixture(scope="module")
def saved(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer = make(tiny_llama)
    for number in (1, 2, 3):
        step(trainer, number)
        trainer.save_checkpoint(folder, number, {"cursor": number}, keep_last=2)
    return trainer, folder


@pytest.fixture
def copied(saved: tuple[Trainer, Path], tmp_path: Path) -> tuple[Trainer, Path]:
    subprocess.run(["cp", "-r", str(saved[1]), str(tmp_path / "c")], check=True)
    return saved[0], tmp_path / "c"


def test_old_checkpoints_are_pruned(saved: tuple[Trainer, Path]) -> None:
    assert sorted(path.name for path in saved[1].iterdir()) == ["latest", "step_00000002", "step_00000003"]
    assert checkpoint.find(saved[1] / "nothing") is None


@pytest.mark.parametrize("harm", ["marker", "cut", "lost"])
def test_a_torn_checkpoint_is_skipped_for_the_one_before(copied: tuple[Trainer, Path], harm: str) -> None:
    trainer, folder = copied
    newest = folder / "step_00000003"
    data = newest / "__0_0.distcp"
    if harm == "marker":
        (newest / "complete.json").unlink()
    elif harm == "cut":
        os.truncate(data, data.stat().st_size - 1)
    else:
        data.unlink()
    with pytest.warns(UserWarning, match="step_00000003"):
        assert trainer.load_checkpoint(folder) == (2, {"cursor": 2})


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_crafted_pickle_is_refused_and_not_run(copied: tuple[Trainer, Path], name: str) -> None:
    trainer, folder = copied
    ran = folder / "ran"

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(ran),)

    victim = folder / "step_00000003" / name
    if name == ".metadata":
        victim.write_bytes(pickle.dumps(Harmful()))
    else:
        torch.save({"optimizer": Harmful()}, victim)
    marker = folder / "step_00000003/complete.json"
    sizes = json.loads(marker.read_text())
    sizes["bytes"][name] = victim.stat().st_size
    marker.write_text(json.dumps(sizes))
    with pytest.raises(ConfigError, match="not a checkpoint of ours"):
        trainer.load_checkpoint(folder)
    assert not ran.exists()


def test_a_full_disk_leaves_the_previous_checkpoint(copied: tuple[Trainer, Path]) -> None:
    import resource

    trainer, folder = copied
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(RuntimeError, match="could not be written"):
            trainer.save_checkpoint(folder, 9, {}, keep_last=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert (folder / "latest").read_text().strip() == "step_00000003"
    found = checkpoint.find(folder)
    assert found is not None
    assert found.name == "step_00000003"
