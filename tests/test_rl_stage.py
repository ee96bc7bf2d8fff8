"""The RL loop with the real engine and the real trainer in one process, on a tiny random model."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path

import pytest

from astro_hpc.config import ConfigError
from astro_hpc.config.schema import RunConfig, SignsSource
from astro_hpc.problems.sources import load_source
from astro_hpc.rl.stage import run
from astro_hpc.run.files import read_jsonl, write_jsonl_atomic
from astro_hpc.run.metrics import read_metrics
from astro_hpc.run.stage import CheckpointedExit, StageContext

DECIDED_BY_THE_CLOCK = ("generate_seconds", "prepare_seconds", "train_seconds", "push_seconds")


def _config(tmp_path: Path, **rl: object) -> RunConfig:
    settings = {"num_steps": 2, "prompts_per_step": 2, "group_size": 2, "max_response_tokens": 12, "seq_length": 256}
    return RunConfig.model_validate(
        {
            "name": "rl",
            "runs_dir": str(tmp_path),
            "model": {"prompt_style": "minimal-chat"},
            "problems": {"train": [{"type": "signs", "count": 4}]},
            "inference": {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "cpu_kv_cache_gb": 0.1},
            "precision": {"dtype": "fp32"},
            # A random model is never right: without this no token would be trained on.
            "rl": {**settings, "objective": {"drop_equal_groups": False}, "checkpoint": {"every_steps": 1}, **rl},
        }
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_jsonl_atomic(path, (p.to_json() for p in load_source(SignsSource(count=4, split="train"))))
    return path


def _run(cfg: RunConfig, folder: Path, model: Path, prompts: Path, stop: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    context = StageContext(cfg, folder, "rl/astro")
    if stop:
        context.request_stop()
    try:
        run(context, model_dir=model, prompts=prompts)
    except CheckpointedExit:
        sys.exit(75)


def _run_apart(*arguments: object, exit_code: int = 0) -> list[dict]:
    """In a process of its own, as the command line does; returns the metrics without what the clock decides."""
    process = multiprocessing.get_context("spawn").Process(target=_run, args=arguments)
    process.start()
    process.join(240)
    assert process.exitcode == exit_code
    rows = read_metrics(arguments[1] / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in DECIDED_BY_THE_CLOCK} for row in rows]


def test_engine_and_trainer_agree_and_a_resumed_run_equals_an_uninterrupted_one(tiny_llama, prompts, tmp_path):
    whole = _run_apart(_config(tmp_path), tmp_path / "whole", tiny_llama, prompts)
    assert [row["step"] for row in whole] == [1, 2]
    for row in whole:
        assert row["trained_tokens"] > 0
        assert row["mismatch_mean_abs"] < 1e-4, "same weights in float32: the ratio is 1"
        assert row["mismatch_effective_sample_size"] == pytest.approx(1.0, abs=1e-6)
        assert row["reward"] == -1.0
    rollouts = list(read_jsonl(tmp_path / "whole" / "rollouts" / "step_00000002.jsonl"))
    assert {row["weight_version"] for row in rollouts} == {1}

    begun = _run_apart(_config(tmp_path), tmp_path / "cut", tiny_llama, prompts, True, exit_code=75)
    assert begun == whole[:1]
    assert _run_apart(_config(tmp_path), tmp_path / "cut", tiny_llama, prompts) == whole
    for step in (1, 2):
        name = f"step_{step:08d}.jsonl"
        assert (tmp_path / "cut/rollouts" / name).read_text() == (tmp_path / "whole/rollouts" / name).read_text()
    manifests = [json.loads((tmp_path / k / "hf" / "manifest.json").read_text())["sha256"] for k in ("whole", "cut")]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7}, "rl.temperature=0.7"),
        ({"mini_batches": 3}, "rl.mini_batches=3 does not divide the 4 responses"),
        ({"max_response_tokens": 128}, "leaves no room for a prompt"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_before_anything_starts(settings, message, tmp_path, prompts):
    with pytest.raises(ConfigError, match=message):
        _run(_config(tmp_path, **settings), tmp_path / "x", Path("/nowhere"), prompts)
