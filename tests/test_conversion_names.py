"""Hugging Face <-> Megatron tensors: the maps are exact inverses, whole and split over tensor-parallel ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from astro_hpc.conversion.names import hf_shapes, join, local_name, mappings, split, te_name, to_hf, to_megatron
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.parallel import padded_vocab_size


@st.composite
def shapes(draw: st.DrawFn) -> tuple[LlamaShape, int]:
    """A small model and a tensor-parallel size that divides it."""
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    kv_heads = tp * draw(st.integers(1, 2))
    head_dim = draw(st.sampled_from([2, 4]))
    return (
        LlamaShape(
            num_layers=draw(st.integers(1, 2)),
            hidden_size=draw(st.integers(1, 5)),
            ffn_hidden_size=tp * draw(st.integers(1, 4)),
            num_heads=kv_heads * draw(st.integers(1, 3)),
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=draw(st.integers(1, 300)),
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            rope_scaling_factor=None,
            tied=draw(st.booleans()),
        ),
        tp,
    )


@settings(max_examples=60, deadline=None)
@given(shapes(), st.sampled_from([torch.bfloat16, torch.float32]))
def test_round_trip_is_exact(model: tuple[LlamaShape, int], dtype: torch.dtype) -> None:
    shape, tp = model
    padded = padded_vocab_size(shape.vocab_size, tp)
    originals = {name: torch.randn(size).to(dtype) for name, size in hf_shapes(shape).items()}
    for mapping in mappings(shape):
        whole = to_megatron(mapping.layout, [originals[name] for name in mapping.hf], shape, padded)
        parts = [split(mapping, whole, rank, tp) for rank in range(tp)]
        rejoined = join(mapping, parts)
        assert torch.equal(rejoined, whole)
        for name, back in zip(mapping.hf, to_hf(mapping.layout, rejoined, shape), strict=True):
            assert torch.equal(back, originals[name]), name
            assert back.is_contiguous()


@settings(max_examples=30, deadline=None)
@given(shapes())
def test_every_tensor_is_named_once_and_parameters_add_up(model: tuple[LlamaShape, int]) -> None:
    shape, _ = model
    table = mappings(shape)
    names = [name for mapping in table for name in mapping.hf]
    assert len(names) == len(set(names))
    assert len({mapping.megatron for mapping in table}) == len(table)
    assert sum(torch.Size(size).numel() for size in hf_shapes(shape).values()) == shape.num_parameters


def test_queries_are_interleaved_by_group() -> None:
    shape = LlamaShape(1, 1, 1, 4, 2, 1, 1, 1, 1e-5, 1e4, None, True)
    query, key, value = [1.0, 2, 3, 4], [10.0, 20], [100.0, 200]
    packed = to_megatron("qkv", [torch.tensor(part)[:, None] for part in (query, key, value)], shape, 0)
    assert packed.flatten().tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


@pytest.mark.parametrize(
    "name", ["decoder.layers.3.input_layernorm.weight", "decoder.layers.0.pre_mlp_layernorm.weight"]
)
def test_transformer_engine_names_of_norms(name: str) -> None:
    assert te_name(name) != name
    assert local_name(te_name(name)) == name
    assert local_name(name) == name


def test_other_names_are_the_same_in_both_specs() -> None:
    for name in ("embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc1.weight"):
        assert te_name(name) == local_name(name) == name


def test_the_real_model_has_exactly_these_tensors(smollm2: Path) -> None:
    from safetensors import safe_open

    shape = LlamaShape.from_hf(smollm2)
    with safe_open(smollm2 / "model.safetensors", framework="pt") as handle:
        found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    assert found == hf_shapes(shape)
    assert json.loads((smollm2 / "config.json").read_text())["tie_word_embeddings"] is True
