"""PrecisionConfig -> Megatron-Core's configuration fields, refused where they would silently do nothing.

Megatron-Core builds an FP8 configuration without Transformer Engine and then trains in BF16 without a word, so what
is asked for is held here against what is there, before anything is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import PrecisionConfig
from astro_hpc.model.libraries import (
    Machine,
    Version,
    installed_version,
    parse_version,
    this_machine,
    transformer_engine,
)

_OLDEST_MEGATRON, _UNKNOWN_MEGATRON = (0, 16), (0, 20)
_CUDA_GRAPHS_RENAMED = (0, 19)
# The first compute capability with what a recipe needs: FP8 matrix units (Ada), block scales (Hopper).
_CHIP = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
# Megatron-Core's own minimums; older ones fall back to another recipe or fail far from the cause.
_TRANSFORMER_ENGINE = {"delayed": (2, 1), "tensorwise": (2, 2), "blockwise": (2, 3)}
_TRANSFORMER_ENGINE_ADAM = (2, 1)
_BLOCKWISE_CUDA = (12, 9)
# Matrix products in FP8 need the number of rows in these multiples.
_TOKEN_MULTIPLE = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128}


@dataclass
class MegatronFields:
    """Arguments for the three configurations of Megatron-Core that arithmetic is spread over."""

    transformer: dict[str, Any] = field(default_factory=dict)
    """For TransformerConfig."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """For DistributedDataParallelConfig."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """For OptimizerConfig."""


def megatron_fields(
    precision: PrecisionConfig, version: Version, *, use_distributed_optimizer: bool = False
) -> MegatronFields:
    """The fields that decide arithmetic; a function of its arguments alone, whatever machine this is.

    Args:
        version: Megatron-Core's, for instance (0, 16, 1).

    Raises:
        ConfigError: a combination that Megatron-Core can't run or would silently run otherwise, or a version whose
            fields are not known.
    """
    _check_version(version)
    _check_combination(precision, use_distributed_optimizer)
    dtype, fp8 = params_dtype(precision), precision.fp8
    transformer: dict[str, Any] = {
        "bf16": precision.dtype == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "attention_softmax_in_fp32": True,
        # Graphs are not used; their list has another name from 0.19 on, and the old one warns.
        "cuda_graph_modules" if version >= _CUDA_GRAPHS_RENAMED else "cuda_graph_scope": [],
    }
    if fp8 != "none":
        transformer |= {
            "fp8": precision.fp8_format,
            "fp8_recipe": fp8,
            "fp8_param": precision.fp8_param_gather,
        }
    if fp8 == "delayed":
        transformer |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    elif fp8 != "none" and _edge_layers(precision):
        transformer |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": precision.bf16_layers_at_start,
            "num_layers_at_end_in_bf16": precision.bf16_layers_at_end,
        }
    ddp = {
        "grad_reduce_in_fp32": precision.grad_reduce_in_fp32,
        "fp8_param_gather": precision.fp8_param_gather,  # must equal fp8_param above
    }
    optimizer: dict[str, Any] = {
        "bf16": precision.dtype == "bf16",
        "params_dtype": dtype,
        "fp8_recipe": None if fp8 == "none" else fp8,
    }
    if precision.precision_aware_optimizer:
        optimizer |= {
            "use_precision_aware_optimizer": True,
            "main_grads_dtype": _dtype(precision.main_grads_dtype),
            "main_params_dtype": _dtype(precision.main_params_dtype),
            "exp_avg_dtype": _dtype(precision.exp_avg_dtype),
            "exp_avg_sq_dtype": _dtype(precision.exp_avg_sq_dtype),
        }
    return MegatronFields(transformer, ddp, optimizer)


def fields_here(precision: PrecisionConfig, *, use_distributed_optimizer: bool = False) -> MegatronFields:
    """`megatron_fields` for the Megatron-Core and the machine that are here.

    Raises:
        ConfigError: also when this machine lacks a chip or a library that `precision` needs; all are named.
    """
    version = parse_version(installed_version("megatron-core") or "")
    fields = megatron_fields(precision, version, use_distributed_optimizer=use_distributed_optimizer)
    lacking = missing(precision, this_machine())
    if lacking:
        raise ConfigError(f"precision: {'; '.join(lacking)}. {_remedy(precision)}")
    return fields


def missing(precision: PrecisionConfig, machine: Machine) -> list[str]:
    """What `machine` lacks for `precision`, each as words that say what needs it; empty when nothing."""
    lacking = []
    engine = machine.transformer_engine
    fp8 = precision.fp8
    if fp8 != "none":
        what = f"fp8 {fp8} needs"
        wanted = _CHIP[fp8]
        if machine.chip is None:
            lacking.append(f"{what} a GPU of compute capability {_dotted(wanted)} or later; there is no GPU")
        elif machine.chip.capability < wanted:
            lacking.append(
                f"{what} compute capability {_dotted(wanted)} or later, "
                f"{machine.chip.name} has {_dotted(machine.chip.capability)}"
            )
        if fp8 == "blockwise" and machine.chip is not None and (machine.cuda or ()) < _BLOCKWISE_CUDA:
            found = f"torch is built for {_dotted(machine.cuda)}" if machine.cuda else "torch is a CPU build"
            lacking.append(f"{what} CUDA {_dotted(_BLOCKWISE_CUDA)} or later, {found}")
        lacking += _missing_engine(what, engine.version, engine.error, _TRANSFORMER_ENGINE[fp8])
    if precision.precision_aware_optimizer:
        what = "precision_aware_optimizer needs"
        if machine.chip is None:
            lacking.append(f"{what} a GPU; there is no GPU")
        lacking += _missing_engine(what, engine.version, engine.error, _TRANSFORMER_ENGINE_ADAM)
    return lacking


def check_edge_layers(precision: PrecisionConfig, num_layers: int, pipeline_parallel_size: int) -> None:
    """Refuse more BF16 edge layers than a pipeline stage has.

    Raises:
        ConfigError: names the setting and the most there can be.
    """
    if precision.fp8 == "none":
        return
    most = num_layers // pipeline_parallel_size
    for name in ("bf16_layers_at_start", "bf16_layers_at_end"):
        if getattr(precision, name) > most:
            raise ConfigError(
                f"precision.{name} {getattr(precision, name)}: a pipeline stage has {most} of the model's "
                f"{num_layers} layers; lower it"
            )


def fp8_token_multiple(precision: PrecisionConfig) -> int:
    """A packed sequence's tokens must come in multiples of this on each rank: FP8's matrix products need it."""
    return _TOKEN_MULTIPLE[precision.fp8]


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported here."""
    return transformer_engine().usable


def params_dtype(precision: PrecisionConfig) -> Any:
    """The torch dtype of the model's weights (the optimizer keeps float32 masters of bf16 ones)."""
    return _dtype(precision.dtype)


def _dtype(name: str) -> Any:
    import torch

    # Adam's 8-bit moments are bytes beside a scale.
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}[name]


def _check_version(version: Version) -> None:
    if not _OLDEST_MEGATRON <= version < _UNKNOWN_MEGATRON:
        found = _dotted(version) if version else "not installed"
        raise ConfigError(
            f"megatron-core is {found}; 0.16 to 0.19 are known here: pip install 'megatron-core>=0.16.1,<0.20'"
        )


def _check_combination(precision: PrecisionConfig, use_distributed_optimizer: bool) -> None:
    fp8 = precision.fp8
    narrow = [
        f"{name}={getattr(precision, name)}"
        for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
        if getattr(precision, name) != "fp32"
    ]
    wrong = ""
    if fp8 != "none" and precision.dtype != "bf16":
        wrong = f"fp8 {fp8} needs bf16 weights, dtype is {precision.dtype}; set precision.dtype=bf16"
    elif fp8 == "delayed" and _edge_layers(precision):
        wrong = (
            "fp8 delayed can't keep edge layers in BF16; set precision.bf16_layers_at_start=0 "
            "precision.bf16_layers_at_end=0, or take tensorwise"
        )
    elif precision.fp8_param_gather and fp8 == "none":
        wrong = "fp8_param_gather keeps weights in FP8, but fp8 is none; choose a recipe or switch it off"
    elif precision.fp8_param_gather and not use_distributed_optimizer:
        wrong = "fp8_param_gather needs the distributed optimizer; set parallel.use_distributed_optimizer=true"
    elif precision.precision_aware_optimizer and not use_distributed_optimizer:
        wrong = "precision_aware_optimizer needs the distributed optimizer; set parallel.use_distributed_optimizer=true"
    elif precision.precision_aware_optimizer and precision.dtype != "bf16":
        wrong = f"precision_aware_optimizer needs bf16 weights, dtype is {precision.dtype}; switch it off"
    elif narrow and not precision.precision_aware_optimizer:
        wrong = f"{narrow[0]} needs precision_aware_optimizer; set precision.precision_aware_optimizer=true"
    elif precision.main_grads_dtype == "bf16" and precision.grad_reduce_in_fp32:
        wrong = "main_grads_dtype=bf16 contradicts grad_reduce_in_fp32; set precision.grad_reduce_in_fp32=false"
    if wrong:
        raise ConfigError(f"precision: {wrong}")


def _edge_layers(precision: PrecisionConfig) -> int:
    return precision.bf16_layers_at_start + precision.bf16_layers_at_end


def _missing_engine(what: str, version: str | None, error: str, wanted: Version) -> list[str]:
    if version is None:
        return [f"{what} Transformer Engine, which is not installed"]
    if error:
        return [f"{what} Transformer Engine; {version} is installed and can't be imported ({error})"]
    if parse_version(version) < wanted:
        return [f"{what} Transformer Engine {_dotted(wanted)} or later, {version} is installed"]
    return []


def _remedy(precision: PrecisionConfig) -> str:
    away = ["precision.fp8=none"] * (precision.fp8 != "none")
    away += ["precision.precision_aware_optimizer=false"] * precision.precision_aware_optimizer
    return f"Install or move to what is missing, or set {' '.join(away)} here"


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
