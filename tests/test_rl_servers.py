"""RL over a real vLLM server beside two tensor-parallel ranks: weights arrive whole, with their version, each step.

They travel in buckets from the gloo side of rank 0 into the server's worker; test_slurm_training.py has the folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import save_tiny_llama

from astro_hpc.config.schema import RunConfig, SignsSource
from astro_hpc.problems.sources import load_source
from astro_hpc.run.files import read_jsonl, write_jsonl_atomic
from astro_hpc.run.metrics import read_metrics


def live_config(folder: Path, num_steps: int, lr: float, weight_sync: str) -> RunConfig:
    """Every step on the same two prompts: a server that kept its prefix cache over a push would be found out."""
    return RunConfig.model_validate(
        {
            "name": "rl",
            "runs_dir": str(folder),
            "model": {"prompt_style": "minimal-chat"},
            "problems": {"train": [{"type": "signs", "count": 2}]},
            "inference": {
                "engine": "vllm-server",
                "num_servers": 1,
                "dtype": "float32",
                "max_model_len": 128,
                "max_num_seqs": 8,
                "cpu_kv_cache_gb": 0.1,
                "cpu_threads": 1,
            },
            "parallel": {"tensor_parallel_size": 2},
            "precision": {"dtype": "fp32"},
            "rl": {
                "num_steps": num_steps,
                "prompts_per_step": 2,
                "group_size": 2,
                "max_response_tokens": 12,
                "seq_length": 256,
                "weight_sync": weight_sync,
                "weight_check_every": 1,
                # A random model is never right: its responses' lengths are told apart instead.
                "reward": {"function": "user_rewards:by_number_of_letters"},
                "optimizer": {"lr": lr, "lr_schedule": "constant"},
            },
        }
    )


def prepare(run: Path, model: Path) -> None:
    """What rl reads: the fine-tuned model and the selected prompts."""
    (run / "sft" / "astro").mkdir(parents=True)
    (run / "sft" / "astro" / "hf").symlink_to(model)
    (run / "select" / "astro").mkdir(parents=True)
    problems = [
        dataclasses.replace(problem, text=f"Think well before you write anything down. {problem.text}")
        for problem in load_source(SignsSource(count=2, split="train"))
    ]
    write_jsonl_atomic(run / "select" / "astro" / "prompts.jsonl", (each.to_json() for each in problems))


def check_trained(folder: Path, steps: int) -> None:
    """Every step sampled with the newest weights, which the server had whole, and trained on what it sampled."""
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert row["trained_tokens"] > 0
        assert row["loss"] != 0
        assert row["mismatch_max_abs"] < 1e-3, "the server samples from the model being trained"
    for step in range(1, steps + 1):
        rollouts = list(read_jsonl(folder / "rollouts" / f"step_{step:08d}.jsonl"))
        assert len(rollouts) == 4
        for rollout in rollouts:
            assert rollout["weight_versions"] == [[step - 1, len(rollout["token_ids"])]]
            assert len(rollout["prompt_token_ids"]) > 32, "more than a block of the prefix cache"
    assert (folder / "hf" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose heads two tensor-parallel ranks can share."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama", smollm2, num_key_value_heads=2)


def test_two_ranks_train_on_what_a_server_samples_and_nothing_is_left(model, tmp_path):
    cfg = live_config(tmp_path, num_steps=2, lr=1e-2, weight_sync="broadcast")
    prepare(cfg.run_dir, model)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "astro_hpc", "rl", str(config), "--arm", "astro"]
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stderr
    check_trained(cfg.run_dir / "rl" / "astro", steps=2)
    assert "can't be asked for its weights" not in result.stderr
    assert json.loads((cfg.run_dir / "rl" / "astro" / "manifest.json").read_text())["counts"]["ranks"] == 2
    assert (cfg.run_dir / "logs" / "rl" / "astro" / "server-0.log").exists()
    left = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in _text(path)]
    assert left == []


def _text(path: Path) -> str:
    try:
        return re.sub("\0", " ", path.read_text(errors="replace"))
    except OSError:
        return ""
