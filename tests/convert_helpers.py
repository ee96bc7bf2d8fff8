"""What the conversion tests share: folders of random weights without transformers, and jobs in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from astro_hpc.conversion.hf_folder import SafetensorsFile, finish_hf_folder, plan_shards, shard_name
from astro_hpc.model.llama import LlamaShape

TESTS = Path(__file__).resolve().parent

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama_config(**changes: Any) -> dict[str, Any]:
    """A small config.json: 2 layers, 4 heads in 2 groups; the vocabulary doesn't divide by 128."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_SCALING,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    } | changes


def write_model(
    folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32, shard_bytes: int = 10**9, seed: int = 0
) -> Path:
    """A Hugging Face folder of random weights, tokenizer.json and generation_config.json."""
    shape = LlamaShape.from_config(config)
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    shards = plan_shards(shape, dtype.itemsize, shard_bytes)
    for number, sizes in enumerate(shards):
        with open(folder / shard_name(number, len(shards)), "wb") as handle:
            file = SafetensorsFile(handle, sizes, dtype)
            for size in sizes.values():
                file.write((torch.randn(size, generator=draw) * 0.1).to(dtype))
    reference = folder / "reference"
    reference.mkdir()
    (reference / "config.json").write_text(json.dumps(config))
    (reference / "generation_config.json").write_text('{"temperature": 0.6}')
    finish_hf_folder(folder, shards, {}, reference, dtype)
    for path in reference.iterdir():
        path.unlink()
    reference.rmdir()
    (folder / "manifest.json").unlink()
    return folder


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder, by the safetensors package."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_weights(a: Path, b: Path) -> None:
    before, after = all_weights(a), all_weights(b)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


def run_jobs(tmp_path: Path, *jobs: tuple[str, dict[str, Any]], check: bool = True) -> list[Any]:
    """Call functions of convert_process.py in one new process; returns what each returned."""
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(TESTS / "convert_process.py"), str(file)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if not check:
        return [done.returncode]
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
