"""The RL loop with the real engine and the real trainer in one process, on a tiny random model."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tiny_models import save_tiny_llama

from astro_hpc.config import ConfigError
from astro_hpc.config.schema import RunConfig, SignsSource
from astro_hpc.problems.sources import load_source
from astro_hpc.rl.source import JOURNAL
from astro_hpc.rl.stage import run
from astro_hpc.run.files import Journal, read_jsonl, write_jsonl_atomic
from astro_hpc.run.metrics import read_metrics
from astro_hpc.run.stage import CheckpointedExit, StageContext

_CLOCKED = ("seconds", "idle_share", "per_second")


def _config(tmp_path: Path, **rl: object) -> RunConfig:
    settings = {
        "num_steps": 3,
        "prompts_per_step": 2,
        "group_size": 2,
        "max_response_tokens": 12,
        "seq_length": 256,
        # A random model is never right: its responses' lengths are told apart instead.
        "reward": {"function": "user_rewards:by_number_of_letters"},
        "checkpoint": {"every_steps": 1},
        "optimizer": {"lr": 1e-3, "lr_schedule": "constant"},
    }
    return RunConfig.model_validate(
        {
            "name": "rl",
            "runs_dir": str(tmp_path),
            "model": {"prompt_style": "minimal-chat"},
            "problems": {"train": [{"type": "signs", "count": 4}]},
            "inference": {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "cpu_kv_cache_gb": 0.1},
            "precision": {"dtype": "fp32"},
            "rl": {**settings, **rl},
        }
    )


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose heads two tensor-parallel ranks can share."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama", smollm2, num_key_value_heads=2)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_jsonl_atomic(path, (p.to_json() for p in load_source(SignsSource(count=4, split="train"))))
    return path


def _run(cfg: RunConfig, folder: Path, model: Path, prompts: Path, fault: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    context = StageContext(cfg, folder, "rl/astro")
    if fault == "stop":
        context.request_stop()
    elif fault:
        _arm(fault, context)
    try:
        run(context, model_dir=model, prompts=prompts)
    except CheckpointedExit:
        sys.exit(75)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _arm(fault: str, context: StageContext) -> None:
    """Make this process kill itself in the second step's `fault`, or give the engine other weights than the trainer.

    `group` and `stop at a group`: when one of the second step's two groups is there.
    """
    import torch

    from astro_hpc.rl import source, stage, train, weights

    owner, name = {
        "generate": (source.LiveSource, "_next"),
        "group": (source.LiveSource, "_keep"),
        "stop at a group": (source.LiveSource, "_keep"),
        "save rollouts": (source.StepGroups, "save"),
        "train": (train.PolicyTrainer, "train"),
        "push": (weights.MemorySync, "push"),
        "save": (stage._Loop, "_save"),
        "perturb": (weights.MemorySync, "push"),
    }[fault]
    original, calls = getattr(owner, name), []

    def instead(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if fault == "perturb":

            class Perturbed:
                def named_hf_tensors(self) -> Any:
                    for tensor_name, tensor in args[1].named_hf_tensors():
                        yield tensor_name, tensor + 0.5 * torch.randn_like(tensor)

            return original(args[0], Perturbed(), *args[2:], **kwargs)
        if name == "_keep":
            original(*args)
            if len(calls) == 3:
                context.request_stop() if fault.startswith("stop") else os.kill(os.getpid(), signal.SIGKILL)
            return None
        if len(calls) == 2:
            if fault in ("train", "push"):  # half-way, with what was done in memory lost
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, instead)


def _run_apart(*arguments: Any, exit_code: int = 0) -> list[dict[str, Any]]:
    """In a process of its own, as the command line does; returns the metrics without what the clock decides."""
    process = multiprocessing.get_context("spawn").Process(target=_run, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode == exit_code
    rows = read_metrics(arguments[1] / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.endswith(_CLOCKED)} for row in rows]


@pytest.fixture(scope="module")
def whole(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """An uninterrupted run and its metrics."""
    folder = tmp_path_factory.mktemp("rl") / "whole"
    return folder, _run_apart(_config(folder), folder, model, prompts)


def _exported(folder: Path) -> dict[str, str]:
    return json.loads((folder / "hf" / "manifest.json").read_text())["sha256"]


def test_engine_and_trainer_agree(whole, model):
    folder, rows = whole
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["trained_tokens"] > 0
        assert row["mismatch_mean_abs"] < 1e-4, "same weights in float32: the ratio is 1"
        assert row["effective_sample_size"] == pytest.approx(1.0, abs=1e-6)
        assert row["corrected_share"] == 0
    for step in (1, 2, 3):
        rollouts = list(read_jsonl(folder / "rollouts" / f"step_{step:08d}.jsonl"))
        assert {tuple(map(tuple, row["weight_versions"])) for row in rollouts} == {
            ((step - 1, len(row["token_ids"])),) for row in rollouts
        }
    assert "reward" in (folder / "samples" / "step_00000001.txt").read_text()
    assert _exported(folder)["model.safetensors"] != _exported_start(model)


def _exported_start(model: Path) -> str:
    from astro_hpc.run.files import sha256_file

    return sha256_file(model / "model.safetensors")


@pytest.mark.parametrize(
    "phase", ["stop", "generate", "group", "stop at a group", "save rollouts", "train", "push", "save"]
)
def test_a_run_killed_in_any_phase_and_resumed_equals_an_uninterrupted_one(phase, whole, model, prompts, tmp_path):
    folder, rows = whole
    code = 75 if phase.startswith("stop") else -signal.SIGKILL
    _run_apart(_config(tmp_path), tmp_path / "cut", model, prompts, phase, exit_code=code)
    kept = len(list(Journal.read(tmp_path / "cut" / "rollouts" / JOURNAL)))
    assert kept >= 1 if "group" in phase else kept <= 2
    assert _run_apart(_config(tmp_path), tmp_path / "cut", model, prompts) == rows
    for step in (1, 2, 3):
        name = f"rollouts/step_{step:08d}.jsonl"
        assert (tmp_path / "cut" / name).read_text() == (folder / name).read_text()
    assert _exported(tmp_path / "cut") == _exported(folder)


def test_replayed_rollouts_train_the_same_model_without_an_engine(whole, model, prompts, tmp_path):
    folder, rows = whole
    replayed = _run_apart(_config(tmp_path, replay=str(folder / "rollouts")), tmp_path / "replay", model, prompts)
    assert [row["loss"] for row in replayed] == [row["loss"] for row in rows]
    assert _exported(tmp_path / "replay") == _exported(folder)


def test_a_step_without_signal_moves_the_schedule_and_nothing_else(whole, model, prompts, tmp_path):
    folder = tmp_path / "rollouts"
    for step in (1, 2, 3):
        rows = list(read_jsonl(whole[0] / "rollouts" / f"step_{step:08d}.jsonl"))
        write_jsonl_atomic(folder / f"step_{step:08d}.jsonl", ({**row, "reward": 1.0} for row in rows))
    optimizer = {"lr": 1e-3, "lr_schedule": "linear", "weight_decay": 0.1}
    cfg = _config(tmp_path, replay=str(folder), optimizer=optimizer)
    rows = _run_apart(cfg, tmp_path / "same", model, prompts)
    assert [(row["loss"], row["grad_norm"], row["trained_tokens"], row["groups_with_signal"]) for row in rows] == [
        (0.0, 0.0, 0, 0.0)
    ] * 3
    assert 1e-3 > rows[0]["lr"] > rows[1]["lr"] > rows[2]["lr"] > 0
    start, end = (load_file(path / "model.safetensors") for path in (model, tmp_path / "same" / "hf"))
    assert start.keys() == end.keys()
    assert all(tensor.equal(end[name]) for name, tensor in start.items())
    assert set(whole[1][0]) - set(rows[0]) <= {"event_loop_lag_seconds"}


@pytest.mark.parametrize(
    "sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"data_parallel_size": 2}], ids=str
)
def test_ranks_compute_the_same_step_as_one_process(sizes, whole, model, prompts, tmp_path):
    folder, rows = whole
    cfg = _config(tmp_path, replay=str(folder / "rollouts"), num_steps=2)
    cfg = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update=sizes)})
    (cfg.run_dir / "sft" / "astro").mkdir(parents=True)
    (cfg.run_dir / "sft" / "astro" / "hf").symlink_to(model)
    (cfg.run_dir / "select" / "astro").mkdir(parents=True)
    (cfg.run_dir / "select" / "astro" / "prompts.jsonl").write_bytes(prompts.read_bytes())
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-m", "astro_hpc", "rl", str(config), "--arm", "astro"]
    subprocess.run(command, env=environment, check=True, timeout=240)
    found = read_metrics(cfg.run_dir / "rl" / "astro" / "metrics.jsonl")
    assert len(found) == 2
    # AdamW's first update is nearly the gradient's sign: a rounding difference can turn one, so step 2 is looser.
    for ours, theirs, loss, grad_norm in zip(found, rows, (1e-5, 1e-4), (1e-4, 1e-2), strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=loss)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=grad_norm)
        assert ours["trained_tokens"] == theirs["trained_tokens"]
        assert ours["mismatch_max_abs"] == pytest.approx(theirs["mismatch_max_abs"], abs=1e-3)


def test_rollouts_alone_start_no_trainer_and_go_on_where_they_stopped(whole, model, prompts, tmp_path):
    _, rows = whole
    cfg = _config(tmp_path, rollouts_only=True)
    _run_apart(cfg, tmp_path / "only", model, prompts, "stop", exit_code=75)
    only = _run_apart(cfg, tmp_path / "only", model, prompts)
    assert [row["step"] for row in only] == [1, 2, 3]
    assert only[0]["reward"] == rows[0]["reward"]
    assert not (tmp_path / "only" / "checkpoints").exists()
    versions = [row["weight_versions"] for row in read_jsonl(tmp_path / "only" / "rollouts" / "step_00000003.jsonl")]
    assert {version for spans in versions for version, _ in spans} == {0}


def test_an_engine_with_other_weights_is_caught(model, prompts, tmp_path, capfd):
    _run_apart(_config(tmp_path, num_steps=5), tmp_path / "p", model, prompts, "perturb", exit_code=2)
    assert "above rl.max_mismatch_kl=0.1, for 2 steps up to step 3" in capfd.readouterr().err


def test_async_with_pieces_folder_sync_epochs_and_a_reference(model, prompts, tmp_path):
    cfg = _config(
        tmp_path,
        mode="async",
        segment_tokens=4,
        weight_sync="folder",
        num_epochs=2,
        mini_batches=2,
        objective={"kl_coefficient": 0.1, "importance_correction": "sequence"},
        validation={"problems": {"type": "signs", "split": "heldout", "count": 2}, "every_steps": 2, "num_samples": 2},
    )
    rows = _run_apart(cfg, tmp_path / "async", model, prompts)
    assert len(rows) == 3
    assert all(row["loss"] != 0 and row["mismatch_kl"] < 1.0 for row in rows)
    assert rows[1]["validation_pass_rate"] == 0.0
    versions = sorted(path.name for path in (tmp_path / "async" / "weights").iterdir())
    assert versions == ["version_00000001", "version_00000002"]
    assert (tmp_path / "async" / "weights" / "version_00000002" / "STABLE").read_text() == "2\n"
    assert json.loads((tmp_path / "async" / "best.json").read_text()) == {"step": 2, "validation_pass_rate": 0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7}, "rl.temperature=0.7"),
        ({"top_p": 0.9}, "rl.top_p=0.9"),
        ({"mini_batches": 3}, "rl.mini_batches=3 does not divide the 4 responses"),
        ({"max_response_tokens": 128}, "leaves no room for a prompt"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_before_anything_starts(settings, message, tmp_path, prompts):
    with pytest.raises(ConfigError, match=message):
        run(StageContext(_config(tmp_path, **settings), tmp_path, "rl"), model_dir=Path("/nowhere"), prompts=prompts)
