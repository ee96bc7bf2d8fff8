"""Hugging Face folders through a live Megatron model and back, and what damaged folders say."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_llama

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ParallelConfig, PrecisionConfig
from astro_hpc.conversion.hf import load_hf, named_hf_tensors, save_hf
from astro_hpc.model.build import build_model
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.parallel import initialise_parallel


def load(folder: Path, dtype: str = "fp32") -> list[torch.nn.Module]:
    initialise_parallel(ParallelConfig(), seed=0)
    chunks = build_model(LlamaShape.from_hf(folder), ParallelConfig(), PrecisionConfig(dtype=dtype))
    load_hf(chunks, folder)
    return chunks


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("tied", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_round_trip_is_bit_exact(tmp_path: Path, tied: bool, dtype: str) -> None:
    source = make_llama(tmp_path / "source", tied=tied, llama3_rope=True, dtype=dtype)
    chunks = load(source, {"float32": "fp32", "bfloat16": "bf16"}[dtype])
    out = save_hf(chunks, source, tmp_path / "out", getattr(torch, dtype))
    before, after = all_weights(source), all_weights(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


def test_real_model_round_trip_keeps_every_byte_of_the_weights(smollm2: Path, tmp_path: Path) -> None:
    out = save_hf(load(smollm2, "bf16"), smollm2, tmp_path / "out")
    before, after = all_weights(smollm2), all_weights(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (smollm2 / name).read_bytes()


def test_sharded_files_have_an_index_and_load_again(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source", tied=False, llama3_rope=False)
    out = save_hf(load(source), source, tmp_path / "out", torch.float32, shard_bytes=100_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in all_weights(source).values())
    shape = LlamaShape.from_hf(source)
    again = dict(named_hf_tensors(load(out), shape))
    assert all(torch.equal(again[name], tensor) for name, tensor in all_weights(source).items())


def test_export_loads_in_transformers_and_the_manifest_holds(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    source = make_llama(tmp_path / "source", tied=True, llama3_rope=True)
    out = save_hf(load(source), source, tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    expected = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["sha256"]) == {path.name for path in out.iterdir()} - {"manifest.json"}
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest


def test_vocabulary_padding_never_leaves_the_model(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source", tied=False, llama3_rope=False, vocab_size=300)
    chunks = load(source)
    assert chunks[0].output_layer.weight.shape[0] == 384
    assert chunks[0].output_layer.weight[300:].abs().sum() == 0
    assert dict(named_hf_tensors(chunks, LlamaShape.from_hf(source)))["lm_head.weight"].shape[0] == 300


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "broken", tied=False, llama3_rope=False)


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in change.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_named(broken: Path) -> None:
    rewrite(broken, {"model.layers.1.self_attn.k_proj.weight": None})
    with pytest.raises(ConfigError, match=r"lacks tensor model\.layers\.1\.self_attn\.k_proj\.weight"):
        load(broken)


def test_an_unknown_tensor_is_named(broken: Path) -> None:
    rewrite(broken, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with pytest.raises(ConfigError, match=r"unknown tensor model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(broken)


def test_a_wrong_shape_is_named(broken: Path) -> None:
    rewrite(broken, {"model.norm.weight": torch.zeros(63)})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \(63,\)"):
        load(broken)


def test_a_truncated_file_is_named(broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors: damaged"):
        load(broken)


def test_a_folder_without_weights_or_with_a_lost_shard(broken: Path, tmp_path: Path) -> None:
    sharded = save_hf(load(broken), broken, tmp_path / "sharded", torch.float32, shard_bytes=100_000)
    next(iter(sharded.glob("model-00002*"))).unlink()
    with pytest.raises(ConfigError, match="model-00002-of-"):
        load(sharded)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        load(broken)


def test_an_index_cannot_point_outside_the_folder(broken: Path, tmp_path: Path) -> None:
    shutil.move(broken / "model.safetensors", tmp_path / "elsewhere.safetensors")
    names = load_file(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="elsewhere"):
        load(broken)


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source", tied=True, llama3_rope=False)
    chunks = load(source)
    (source / "generation_config.json").unlink()
    (source / "generation_config.json").mkdir()
    (source / "tokenizer.json").symlink_to(source / "generation_config.json")
    with pytest.raises(ConfigError):
        save_hf(chunks, tmp_path / "absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
