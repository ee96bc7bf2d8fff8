"""What weights an engine really computes with, read off by asking its layers.

Kernels repack weights and drop the originals, so there is no tensor to compare. A layer applied to unit vectors gives
columns of its weight to the last bit: every other product is zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""vLLM's fused layer -> the Hugging Face tensors whose rows it holds, in order."""
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LAST_NORM = "model.norm.weight"


def engine_digests(model: Any, layer: int, columns: Sequence[int]) -> dict[str, str]:
    """Hashes of some columns of each linear layer, and of the norms, in decoder layer `layer` of a vLLM Llama; `dtype`.

    Args:
        columns: indices; taken modulo each layer's width.
    """
    import torch

    modules = dict(model.named_modules())
    prefix = f"model.layers.{layer}."
    found: dict[str, torch.Tensor] = {}
    for name in _PARTS:
        module = modules[prefix + name]
        width = module.input_size
        units = torch.zeros(len(columns), width, dtype=module.params_dtype, device=_device(model))
        for row, column in enumerate(columns):
            units[row, column % width] = 1
        with torch.no_grad():
            found[name] = module.quant_method.apply(module, units, None)
    found |= {name: modules[prefix + name].weight.detach() for name in _NORMS}
    found[_LAST_NORM] = modules["model.norm"].weight.detach()
    dtype = str(found[_LAST_NORM].dtype).removeprefix("torch.")
    return {"dtype": dtype, **{name: _digest(tensor) for name, tensor in found.items()}}


def trainer_digests(
    tensors: Iterable[tuple[str, torch.Tensor]], layer: int, columns: Sequence[int], dtype: torch.dtype
) -> dict[str, str]:
    """The same of Hugging Face tensors; all of them are gone through, so that every rank takes part in gathering.

    Args:
        dtype: the engine's.
    """
    import torch

    prefix = f"model.layers.{layer}."
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name == _LAST_NORM:
            kept[name] = tensor.to(dtype, copy=True)
        elif name.startswith(prefix):
            short = name.removeprefix(prefix).removesuffix(".weight")
            if tensor.ndim == 2:
                tensor = tensor[:, [column % tensor.shape[1] for column in columns]].T
            kept[short] = tensor.to(dtype, copy=True)
    fused = {name: torch.cat([kept[part] for part in parts], dim=1) for name, parts in _PARTS.items()}
    fused |= {name: kept[name] for name in (*_NORMS, _LAST_NORM)}
    return {name: _digest(tensor) for name, tensor in fused.items()}


def different(engine: Mapping[str, str], trainer: Mapping[str, str]) -> list[str]:
    """Names whose hashes differ."""
    return [name for name in trainer if engine.get(name) != trainer[name]]


def _digest(tensor: torch.Tensor) -> str:
    import torch

    # + 0: a product with zero can be -0
    raw = (tensor.detach().cpu() + 0).contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()


def _device(model: Any) -> torch.device:
    return next(parameter.device for parameter in model.parameters())
