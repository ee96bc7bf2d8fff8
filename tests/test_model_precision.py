"""PrecisionConfig against Megatron-Core's fields, for the version that is here and the next; what is refused."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer import TransformerConfig

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ParallelConfig, PrecisionConfig
from astro_hpc.model import libraries
from astro_hpc.model.libraries import Chip, Library, Machine, parse_version
from astro_hpc.model.llama import LlamaShape, transformer_config
from astro_hpc.model.precision import (
    MegatronFields,
    check_edge_layers,
    fields_here,
    fp8_token_multiple,
    megatron_fields,
    missing,
)

# Names that the two versions' sources share, of those that arithmetic may use.
TRANSFORMER = {
    "bf16", "params_dtype", "pipeline_dtype", "attention_softmax_in_fp32", "fp8", "fp8_recipe", "fp8_param",
    "fp8_amax_history_len", "fp8_amax_compute_algo", "first_last_layers_bf16", "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
}  # fmt: skip
DDP = {"grad_reduce_in_fp32", "fp8_param_gather"}
OPTIMIZER = {
    "bf16", "params_dtype", "fp8_recipe", "use_precision_aware_optimizer", "main_grads_dtype", "main_params_dtype",
    "exp_avg_dtype", "exp_avg_sq_dtype",
}  # fmt: skip
ONLY = {(0, 16, 1): "cuda_graph_scope", (0, 19, 2): "cuda_graph_modules"}
VERSIONS = list(ONLY)

H100 = Chip("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30)
GOOD = Machine(H100, (12, 9), Library("2.20.2"))


def config(**changes: Any) -> PrecisionConfig:
    return PrecisionConfig(**changes)


def no_edges(**changes: Any) -> PrecisionConfig:
    return config(bf16_layers_at_start=0, bf16_layers_at_end=0, **changes)


NARROW = {
    "precision_aware_optimizer": True,
    "grad_reduce_in_fp32": False,
    "main_grads_dtype": "bf16",
    "main_params_dtype": "fp16",
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "fp8",
}
USED = [
    config(),
    config(dtype="fp32"),
    no_edges(fp8="delayed"),
    config(fp8="tensorwise"),
    config(fp8="blockwise", fp8_format="e4m3", bf16_layers_at_start=2, bf16_layers_at_end=0),
    no_edges(fp8="tensorwise", fp8_param_gather=True),
    config(**NARROW),
]


def made(precision: PrecisionConfig, version: tuple[int, ...]) -> MegatronFields:
    return megatron_fields(precision, version, use_distributed_optimizer=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", USED)
def test_every_field_has_a_name_that_the_version_knows(precision: PrecisionConfig, version: tuple[int, ...]) -> None:
    found = made(precision, version)
    assert set(found.transformer) <= TRANSFORMER | {ONLY[version]}
    assert set(found.ddp) <= DDP
    assert set(found.optimizer) <= OPTIMIZER
    assert found.ddp["fp8_param_gather"] == found.transformer.get("fp8_param", False)
    assert found.optimizer["fp8_recipe"] == found.transformer.get("fp8_recipe")


@pytest.mark.parametrize("precision", USED)
def test_the_megatron_that_is_here_takes_the_fields(precision: PrecisionConfig) -> None:
    found = made(precision, (0, 16, 1))
    made_config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, **found.transformer)
    for name, value in found.transformer.items():
        assert getattr(made_config, name) == value
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, **found.ddp)
    assert ddp.grad_reduce_in_fp32 == precision.grad_reduce_in_fp32
    assert set(found.optimizer) <= {field.name for field in fields(MegatronOptimizerConfig)}
    if not precision.precision_aware_optimizer:  # Megatron itself asks for Transformer Engine then
        MegatronOptimizerConfig(optimizer="adam", use_distributed_optimizer=True, **found.optimizer)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_each_recipe_becomes(version: tuple[int, ...]) -> None:
    plain = made(config(), version)
    assert plain.transformer["bf16"] is True
    assert plain.transformer["params_dtype"] is torch.bfloat16
    assert plain.transformer[ONLY[version]] == []
    assert not {name for name in plain.transformer if "fp8" in name}
    tensorwise = made(config(fp8="tensorwise", bf16_layers_at_end=2), version).transformer
    assert (tensorwise["fp8"], tensorwise["fp8_recipe"], tensorwise["fp8_param"]) == ("hybrid", "tensorwise", False)
    assert (tensorwise["num_layers_at_start_in_bf16"], tensorwise["num_layers_at_end_in_bf16"]) == (1, 2)
    assert tensorwise["first_last_layers_bf16"] is True
    blockwise = made(no_edges(fp8="blockwise", fp8_format="e4m3", fp8_param_gather=True), version)
    assert (blockwise.transformer["fp8"], blockwise.transformer["fp8_param"]) == ("e4m3", True)
    assert blockwise.ddp["fp8_param_gather"] is True
    assert "first_last_layers_bf16" not in blockwise.transformer
    delayed = made(no_edges(fp8="delayed"), version).transformer
    assert (delayed["fp8_amax_history_len"], delayed["fp8_amax_compute_algo"]) == (1024, "max")
    narrow = made(config(**NARROW), version)
    assert narrow.ddp["grad_reduce_in_fp32"] is False
    assert narrow.optimizer["use_precision_aware_optimizer"] is True
    assert narrow.optimizer["main_params_dtype"] is torch.float16
    assert (narrow.optimizer["exp_avg_dtype"], narrow.optimizer["exp_avg_sq_dtype"]) == (torch.bfloat16, torch.uint8)


@pytest.mark.parametrize(
    ("precision", "distributed", "says"),
    [
        (config(dtype="fp32", fp8="tensorwise"), True, "fp8 tensorwise needs bf16 weights"),
        (config(fp8="delayed"), True, "can't keep edge layers in BF16"),
        (config(fp8="delayed", bf16_layers_at_start=0), True, "can't keep edge layers in BF16"),
        (config(fp8_param_gather=True), True, "fp8 is none"),
        (config(fp8="tensorwise", fp8_param_gather=True), False, "needs the distributed optimizer"),
        (config(precision_aware_optimizer=True), False, "needs the distributed optimizer"),
        (config(precision_aware_optimizer=True, dtype="fp32"), True, "needs bf16 weights"),
        (config(exp_avg_dtype="bf16"), True, "exp_avg_dtype=bf16 needs precision_aware_optimizer"),
        (config(precision_aware_optimizer=True, main_grads_dtype="bf16"), True, "contradicts grad_reduce_in_fp32"),
    ],
)
def test_combinations_that_are_refused_in_one_line(precision: PrecisionConfig, distributed: bool, says: str) -> None:
    for version in VERSIONS:
        with pytest.raises(ConfigError, match=says) as caught:
            megatron_fields(precision, version, use_distributed_optimizer=distributed)
        assert "\n" not in str(caught.value)


def test_more_edge_layers_than_a_stage_has_are_refused() -> None:
    check_edge_layers(config(fp8="tensorwise", bf16_layers_at_start=8), 32, 4)
    check_edge_layers(config(bf16_layers_at_start=99), 32, 4)
    with pytest.raises(ConfigError, match="bf16_layers_at_end 9: a pipeline stage has 8 of the model's 32 layers"):
        check_edge_layers(config(fp8="tensorwise", bf16_layers_at_end=9), 32, 4)


@pytest.mark.parametrize("version", [(0, 15, 3), (0, 20), ()])
def test_versions_whose_fields_are_not_known_are_refused(version: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"megatron-core is .*0\.16 to 0\.19"):
        megatron_fields(config(), version)


@pytest.mark.parametrize(
    ("precision", "machine", "says"),
    [
        (config(fp8="tensorwise"), Machine(None, None, Library(None)), ["there is no GPU", "not installed"]),
        (
            config(fp8="tensorwise"),
            Machine(Chip("NVIDIA A100-SXM4-80GB", (8, 0), 80 << 30), (12, 9), Library("2.20.2")),
            ["fp8 tensorwise needs compute capability 8.9 or later, NVIDIA A100-SXM4-80GB has 8.0"],
        ),
        (config(fp8="tensorwise"), Machine(Chip("NVIDIA L4", (8, 9), 24 << 30), (12, 4), Library("2.20.2")), []),
        (
            config(fp8="blockwise"),
            Machine(Chip("NVIDIA L4", (8, 9), 24 << 30), (12, 8), Library("2.2")),
            ["compute capability 9.0", "CUDA 12.9 or later, torch is built for 12.8", "2.3 or later, 2.2 is installed"],
        ),
        (
            config(fp8="tensorwise"),
            Machine(H100, (12, 9), Library("2.20.2", "cudnn shared object not found")),
            ["2.20.2 is installed and can't be imported (cudnn shared object not found)"],
        ),
        (no_edges(fp8="delayed"), GOOD, []),
        (config(fp8="blockwise"), GOOD, []),
        (config(**NARROW), GOOD, []),
        (config(**NARROW), Machine(H100, (12, 9), Library(None)), ["precision_aware_optimizer needs Transformer"]),
        (config(), Machine(None, None, Library(None)), []),
    ],
)
def test_what_a_machine_lacks_is_named_exactly(precision: PrecisionConfig, machine: Machine, says: list[str]) -> None:
    found = missing(precision, machine)
    assert len(found) == len(says)
    for text, wanted in zip(found, says, strict=True):
        assert wanted in text


def test_the_stage_refuses_what_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fields_here(config()).transformer["bf16"] is True
    monkeypatch.setattr("astro_hpc.model.precision.this_machine", lambda: Machine(None, None, Library(None)))
    with pytest.raises(ConfigError, match=r"there is no GPU.*Transformer Engine.*precision\.fp8=none"):
        fields_here(config(fp8="tensorwise"))
    with pytest.raises(ConfigError, match=r"precision_aware_optimizer needs.*precision_aware_optimizer=false"):
        fields_here(config(precision_aware_optimizer=True), use_distributed_optimizer=True)


def test_the_models_configuration_checks_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astro_hpc.model.precision.this_machine", lambda: GOOD)
    shape = LlamaShape(4, 64, 96, 4, 2, 16, 300, 1024, 1e-5, 10000.0, None, True)
    built = transformer_config(shape, ParallelConfig(), config(fp8="tensorwise"), cpu=True)
    assert (built.fp8, built.fp8_recipe, built.first_last_layers_bf16) == ("hybrid", "tensorwise", True)
    with pytest.raises(ConfigError, match="bf16_layers_at_start 5"):
        transformer_config(shape, ParallelConfig(), config(fp8="tensorwise", bf16_layers_at_start=5), cpu=True)
    with pytest.raises(ConfigError, match="distributed optimizer"):
        transformer_config(shape, ParallelConfig(), config(fp8="tensorwise", fp8_param_gather=True), cpu=True)


def test_packs_come_in_the_multiples_that_fp8_products_need() -> None:
    multiples = [fp8_token_multiple(config(fp8=fp8)) for fp8 in ("none", "delayed", "tensorwise", "blockwise")]
    assert multiples == [1, 16, 16, 128]


# --- libraries ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.sampled_from(["", "+cu129", ".dev0", ".post1", "rc1"]))
def test_versions_keep_their_leading_numbers(numbers: list[int], tail: str) -> None:
    text = ".".join(map(str, numbers)) + tail
    found = parse_version(text)
    assert found == tuple(numbers[: len(found)])
    assert len(found) >= len(numbers) - (tail == "rc1")


def test_pypis_apex_is_told_apart_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    libraries.apex.cache_clear()
    try:
        found = libraries.apex()
    finally:
        libraries.apex.cache_clear()
    assert "not NVIDIA Apex" in found.error
    assert not found.usable
    assert not ran.exists()


def test_an_engine_whose_import_raises_anything_is_not_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "transformer_engine"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('cudnn shared object not found\\nat all')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)  # hidden where there is no GPU
    libraries.transformer_engine.cache_clear()
    try:
        found = libraries.transformer_engine()
    finally:
        libraries.transformer_engine.cache_clear()
    assert found.error == "cudnn shared object not found"
