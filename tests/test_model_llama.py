"""Shapes, parallel sizes and precision: what is accepted, and what an error says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ParallelConfig, PrecisionConfig
from astro_hpc.model.llama import LlamaShape, transformer_config

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def test_llama_3_sizes() -> None:
    # Parameter counts as published with the models.
    assert LlamaShape.from_config(LLAMA_8B).num_parameters == 8_030_261_248
    assert LlamaShape.from_config(LLAMA_70B).num_parameters == 70_553_706_496
    shape = LlamaShape.from_config(LLAMA_8B)
    assert (shape.head_dim, shape.queries_per_group) == (128, 4)
    assert (shape.rope_theta, shape.rope_scaling_factor, shape.tied) == (500000.0, 8.0, False)


def test_transformers_5_form_of_rope() -> None:
    config = {key: value for key, value in LLAMA_8B.items() if not key.startswith("rope")}
    config["rope_parameters"] = LLAMA_8B["rope_scaling"] | {"rope_theta": 500000.0}
    assert LlamaShape.from_config(config) == LlamaShape.from_config(LLAMA_8B)


def test_smollm2(smollm2: Path) -> None:
    shape = LlamaShape.from_hf(smollm2)
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.tied) == (30, 9, 3, True)
    assert shape.rope_theta == 100000.0
    assert shape.rope_scaling_factor is None
    assert shape.num_parameters == 134_515_008


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": LLAMA_8B["rope_scaling"] | {"high_freq_factor": 2.0}}, "high_freq_factor"),
    ],
)
def test_what_megatron_cannot_represent_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        LlamaShape.from_config(LLAMA_8B | change)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_config_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        LlamaShape.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not JSON"):
        LlamaShape.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]), encoding="utf-8")
    with pytest.raises(ConfigError, match="JSON object"):
        LlamaShape.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "world", "says"),
    [
        ({"tensor_parallel_size": 2}, 1, "multiple of 2 ranks"),
        ({"tensor_parallel_size": 16}, 16, "key/value heads"),
        ({"tensor_parallel_size": 3}, 3, "attention heads"),
        ({"pipeline_parallel_size": 3}, 3, "32 layers"),
        ({"pipeline_parallel_size": 4, "virtual_pipeline_parallel_size": 3}, 4, "32 layers"),
        ({"virtual_pipeline_parallel_size": 2}, 1, "pipeline_parallel_size is 1"),
        ({"sequence_parallel": True}, 1, "sequence_parallel"),
        ({"context_parallel_size": 2}, 3, "multiple of 2 ranks, there are 3"),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, 2, "x dp 2 is 4 ranks, there are 2"),
        ({"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}, 2, "wrong losses"),
    ],
)
def test_impossible_parallel_sizes(sizes: dict[str, Any], world: int, says: str) -> None:
    from astro_hpc.model.parallel import check_parallel

    with pytest.raises(ConfigError, match=says):
        check_parallel(LlamaShape.from_config(LLAMA_8B), ParallelConfig(**sizes), world, cpu=True)


def test_possible_parallel_sizes() -> None:
    from astro_hpc.model.parallel import check_parallel

    shape = LlamaShape.from_config(LLAMA_8B)
    check_parallel(shape, ParallelConfig(), 4, cpu=True)
    check_parallel(shape, ParallelConfig(tensor_parallel_size=8, sequence_parallel=True), 16, cpu=False)
    interleaved = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2)
    check_parallel(shape, interleaved, 2, cpu=False)
    check_parallel(shape, ParallelConfig(context_parallel_size=2, data_parallel_size=3), 6, cpu=True)
    deep = ParallelConfig(pipeline_parallel_size=4, virtual_pipeline_parallel_size=2)
    check_parallel(shape, deep, 4, cpu=True)


def test_what_packs_are_padded_to() -> None:
    from astro_hpc.model.sizes import pack_multiple, sequence_multiple

    plain = ParallelConfig(tensor_parallel_size=4)
    split = ParallelConfig(tensor_parallel_size=4, sequence_parallel=True, context_parallel_size=2)
    assert (sequence_multiple(plain), pack_multiple(plain, 1)) == (1, 1)
    assert pack_multiple(plain, 16) == 16
    assert (sequence_multiple(split), pack_multiple(split, 1)) == (16, 16)
    assert pack_multiple(split, 16) == 128
    assert pack_multiple(split, 128) == 1024


def test_vocabulary_padding_keeps_shapes_over_tensor_parallel_sizes() -> None:
    from astro_hpc.model.parallel import padded_vocab_size

    assert {padded_vocab_size(128_256, tp) for tp in (1, 2, 4, 8)} == {128_256}
    assert {padded_vocab_size(128_262, tp) for tp in (1, 2, 4, 8)} == {128_384}
    assert padded_vocab_size(49_152, 3) == 49_152
    assert padded_vocab_size(300, 3) % 3 == 0


def test_the_70b_configuration_is_accepted_by_megatron() -> None:
    parallel = ParallelConfig(tensor_parallel_size=8, pipeline_parallel_size=4, sequence_parallel=True)
    config = transformer_config(LlamaShape.from_config(LLAMA_70B), parallel, PrecisionConfig(), cpu=True)
    assert (config.num_layers, config.num_query_groups, config.kv_channels) == (80, 8, 128)
    assert config.bf16
    assert config.variable_seq_lengths
