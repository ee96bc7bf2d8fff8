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
_SPLIT_BY_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")
"""Of which a tensor-parallel rank has some columns; of the others it has some rows."""
_KEY_VALUE = ("self_attn.k_proj", "self_attn.v_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LAST_NORM = "model.norm.weight"


def engine_digests(model: Any, layer: int, columns: Sequence[int]) -> dict[str, str]:
    """Hashes of some columns of each linear layer, and of the norms, in decoder layer `layer` of a vLLM Llama.

    Of one tensor-parallel rank's part of the model; with them come `dtype`, and `copies`, the ranks that share a
    key/value head.

    Args:
        columns: indices; taken modulo the width of the rank's part of each layer.
    """
    import torch

    modules = dict(model.named_modules())
    prefix = f"model.layers.{layer}."
    found: dict[str, torch.Tensor] = {}
    for name in _PARTS:
        module = modules[prefix + name]
        width = getattr(module, "input_size_per_partition", module.input_size)
        units = torch.zeros(len(columns), width, dtype=module.params_dtype, device=_device(model))
        for row, column in enumerate(columns):
            units[row, column % width] = 1
        with torch.no_grad():
            found[name] = module.quant_method.apply(module, units, None)
    found |= {name: modules[prefix + name].weight.detach() for name in _NORMS}
    found[_LAST_NORM] = modules["model.norm"].weight.detach()
    dtype = str(found[_LAST_NORM].dtype).removeprefix("torch.")
    copies = str(modules[f"{prefix}self_attn.qkv_proj"].num_kv_head_replicas)
    return {"dtype": dtype, "copies": copies, **{name: _digest(tensor) for name, tensor in found.items()}}


def of_all_ranks(by_rank: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The digests of an engine's tensor-parallel ranks as one mapping, `RANK/NAME`; with `ranks`, their number."""
    first = by_rank[0]
    named = {
        f"{rank}/{name}": digest
        for rank, digests in enumerate(by_rank)
        for name, digest in digests.items()
        if name not in ("dtype", "copies")
    }
    return {"dtype": first["dtype"], "copies": first["copies"], "ranks": str(len(by_rank)), **named}


def trainer_digests(
    tensors: Iterable[tuple[str, torch.Tensor]],
    layer: int,
    columns: Sequence[int],
    dtype: torch.dtype,
    ranks: int = 1,
    copies: int = 1,
) -> dict[str, str]:
    """The same of Hugging Face tensors; all of them are gone through, so that every rank takes part in gathering.

    Args:
        dtype: the engine's.
        ranks: its tensor-parallel size.
        copies: how many of its ranks share a key/value head.
    """
    import torch

    prefix = f"model.layers.{layer}."
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name == _LAST_NORM:
            kept[name] = tensor.to(dtype, copy=True)
        elif name.startswith(prefix):
            short = name.removeprefix(prefix).removesuffix(".weight")
            if tensor.ndim != 2:
                kept[short] = tensor.to(dtype, copy=True)
                continue
            for rank in range(ranks):
                kept[f"{rank}/{short}"] = _part(tensor, short, columns, rank, ranks, copies).to(dtype, copy=True)
    digests = {}
    for rank in range(ranks):
        for name, parts in _PARTS.items():
            digests[f"{rank}/{name}"] = _digest(torch.cat([kept[f"{rank}/{part}"] for part in parts], dim=1))
        digests |= {f"{rank}/{name}": _digest(kept[name]) for name in (*_NORMS, _LAST_NORM)}
    return digests


def _part(tensor: torch.Tensor, name: str, columns: Sequence[int], rank: int, ranks: int, copies: int) -> torch.Tensor:
    """The chosen columns of what a tensor-parallel rank holds of a matrix, as rows: [columns, out]."""
    if name in _SPLIT_BY_COLUMNS:
        width = tensor.shape[1] // ranks
        return tensor[:, [rank * width + column % width for column in columns]].T
    if name in _KEY_VALUE:  # where there are fewer heads than ranks, neighbouring ranks have the same
        rank, ranks = rank // copies, ranks // copies
    height = tensor.shape[0] // ranks
    return tensor[rank * height : (rank + 1) * height, [column % tensor.shape[1] for column in columns]].T


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
