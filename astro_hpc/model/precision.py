"""PrecisionConfig -> the fields of Megatron-Core's TransformerConfig, refused where they would silently do nothing."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import PrecisionConfig

_FP8_CHIP = (8, 9)
"""The first compute capability with FP8 matrix units (Ada); Hopper is 9.0."""


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported here. It raises RuntimeError, not ImportError, without cuDNN."""
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def params_dtype(precision: PrecisionConfig) -> Any:
    """The torch dtype of the model's weights (the optimizer keeps float32 masters of bf16 ones)."""
    import torch

    return torch.bfloat16 if precision.dtype == "bf16" else torch.float32


def fp8_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """TransformerConfig's FP8 fields, without asking what this machine has.

    Raises:
        ConfigError: a combination that Megatron-Core can't run.
    """
    if precision.fp8 == "none":
        return {}
    if precision.dtype != "bf16":
        raise ConfigError(f"precision.fp8 {precision.fp8} needs bf16 weights; precision.dtype is {precision.dtype}")
    start, end = precision.bf16_layers_at_start, precision.bf16_layers_at_end
    if precision.fp8 == "delayed" and (start or end):
        raise ConfigError(
            "precision.fp8 is delayed, which can't keep edge layers in BF16: "
            "set precision.bf16_layers_at_start=0 precision.bf16_layers_at_end=0, or take tensorwise"
        )
    fields: dict[str, Any] = {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8,
        "fp8_param": precision.fp8_param_gather,
    }
    if precision.fp8 == "delayed":
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    elif start or end:
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": start,
            "num_layers_at_end_in_bf16": end,
        }
    return fields


def precision_fields(precision: PrecisionConfig, *, cpu: bool) -> dict[str, Any]:
    """The TransformerConfig fields that decide arithmetic.

    Raises:
        ConfigError: FP8 is asked for and this machine lacks Transformer Engine or an FP8 chip. Megatron-Core itself
            would train in BF16 without a word.
    """
    fields = fp8_fields(precision)
    if fields:
        missing = missing_for_fp8(cpu=cpu)
        if missing:
            raise ConfigError(f"precision.fp8 is {precision.fp8}, but {missing}; set precision.fp8=none here")
    dtype = params_dtype(precision)
    return {
        "bf16": precision.dtype == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "attention_softmax_in_fp32": True,
        **fields,
    }


def missing_for_fp8(*, cpu: bool) -> str:
    """What this machine lacks for FP8, in words; empty when nothing."""
    if cpu:
        return "there is no GPU"
    import torch

    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < _FP8_CHIP:
        return f"{name} (compute capability {capability[0]}.{capability[1]}) has no FP8; 8.9 is the first that has"
    if not has_transformer_engine():
        return "Transformer Engine can't be imported (pip install 'astro-hpc[gpu]')"
    return ""
