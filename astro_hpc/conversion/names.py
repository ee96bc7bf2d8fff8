"""Names and layouts of Llama's tensors in Hugging Face and in Megatron-Core: pure functions.

Megatron keeps queries, keys and values of one attention layer in one tensor, interleaved by query group
([q..q, k, v] a group), gate and up projections in one ([gate; up] on each tensor-parallel rank), and pads the
vocabulary. Nothing is computed: every element of one side is an element of the other, so conversion is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from astro_hpc.model.llama import LlamaShape

Layout = Literal["plain", "qkv", "gate_up", "vocab"]


@dataclass(frozen=True)
class Mapping:
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    megatron: str
    """Name in the whole model (layers counted over all pipeline stages), in the local spec's naming."""
    hf: tuple[str, ...]
    layout: Layout
    split_dim: int | None
    """Dimension split over tensor-parallel ranks; None: each rank has all of it."""


_LAYERS = "decoder.layers."

# Norm weights sit inside the following linear layer in Transformer Engine's spec.
_TE_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def te_name(name: str) -> str:
    """A local-spec parameter name in Transformer Engine's naming."""
    for local, te in _TE_NORMS.items():
        if name.endswith("." + local):
            return name.removesuffix(local) + te
    return name


def local_name(name: str) -> str:
    """A Transformer-Engine parameter name in the local spec's naming; local names pass through."""
    for local, te in _TE_NORMS.items():
        if name.endswith("." + te):
            return name.removesuffix(te) + local
    return name


def checkpoint_key(name: str) -> tuple[str, int | None]:
    """A parameter's key in a Megatron checkpoint, and which slice of that key's tensor it is (None: all of it).

    The layers of a model are stacked: `decoder.layers.3.x` is slice 3 of `decoder.layers.x`. The keys are Transformer
    Engine's names whichever spec saved them, so that either loads the other's checkpoints.
    """
    name = te_name(name)
    if not name.startswith(_LAYERS):
        return name, None
    layer, rest = name.removeprefix(_LAYERS).split(".", 1)
    return _LAYERS + rest, int(layer)


def extra_state_keys(shape: LlamaShape) -> list[str]:
    """Keys of the objects that a model asks a checkpoint for beside its tensors: FP8 scales, of which there are none.

    Linear layers of both specs have one a layer. The final norm has one under Transformer Engine alone.
    """
    layered = [
        f"{_LAYERS}{module}._extra_state/shard_{layer}_{shape.num_layers}"
        for layer in range(shape.num_layers)
        for module in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    ]
    return [*layered, "decoder.final_layernorm._extra_state/shard_0_1"]


def mappings(shape: LlamaShape) -> list[Mapping]:
    """Every tensor of the model, in Hugging Face's order: embedding, layers, final norm, output layer if untied."""
    table = [Mapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab", 0)]
    for layer in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = tuple(f"{theirs}self_attn.{name}_proj.weight" for name in "qkv")
        gate_up = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
        table += [
            Mapping(f"{ours}input_layernorm.weight", (f"{theirs}input_layernorm.weight",), "plain", None),
            Mapping(f"{ours}self_attention.linear_qkv.weight", qkv, "qkv", 0),
            Mapping(f"{ours}self_attention.linear_proj.weight", (f"{theirs}self_attn.o_proj.weight",), "plain", 1),
            Mapping(f"{ours}pre_mlp_layernorm.weight", (f"{theirs}post_attention_layernorm.weight",), "plain", None),
            Mapping(f"{ours}mlp.linear_fc1.weight", gate_up, "gate_up", 0),
            Mapping(f"{ours}mlp.linear_fc2.weight", (f"{theirs}mlp.down_proj.weight",), "plain", 1),
        ]
    table.append(Mapping("decoder.final_layernorm.weight", ("model.norm.weight",), "plain", None))
    if not shape.tied:
        table.append(Mapping("output_layer.weight", ("lm_head.weight",), "vocab", 0))
    return table


def hf_size(name: str, shape: LlamaShape) -> tuple[int, ...]:
    """The size of the Hugging Face tensor `name`."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    by_module: dict[str, tuple[int, ...]] = {
        "embed_tokens": (shape.vocab_size, hidden),
        "lm_head": (shape.vocab_size, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "norm": (hidden,),
    }
    return by_module[name.split(".")[-2]]


def hf_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model and its size, in the order of `mappings`."""
    return {name: hf_size(name, shape) for mapping in mappings(shape) for name in mapping.hf}


def megatron_size(mapping: Mapping, shape: LlamaShape, padded_vocab_size: int) -> tuple[int, ...]:
    """The size of the whole Megatron tensor that `to_megatron` makes."""
    sizes = [hf_size(name, shape) for name in mapping.hf]
    rows = padded_vocab_size if mapping.layout == "vocab" else sum(size[0] for size in sizes)
    return (rows, *sizes[0][1:])


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a Hugging Face tensor and where they lie in the Megatron tensor."""

    part: int
    """Index into `Mapping.hf`."""
    hf_row: int
    megatron_row: int
    rows: int


def row_blocks(mapping: Mapping, shape: LlamaShape) -> list[RowBlock]:
    """The rows of `mapping`'s Megatron tensor in order, padding left out: `to_megatron` as reads from files."""
    if mapping.layout == "qkv":
        groups, heads = shape.num_kv_heads, (shape.queries_per_group, 1, 1)
        counts = [count * shape.head_dim for count in heads]
    else:
        groups, counts = 1, [hf_size(name, shape)[0] for name in mapping.hf]
    blocks, row = [], 0
    for group in range(groups):
        for part, rows in enumerate(counts):
            blocks.append(RowBlock(part, group * rows, row, rows))
            row += rows
    return blocks


def to_megatron(
    layout: Layout, tensors: Sequence[torch.Tensor], shape: LlamaShape, padded_vocab_size: int
) -> torch.Tensor:
    """The whole (unsplit) Megatron tensor made of Hugging Face `tensors`, in `Mapping.hf`'s order."""
    if layout == "qkv":
        groups, per_group, dim = shape.num_kv_heads, shape.queries_per_group, shape.head_dim
        query, key, value = tensors
        parts = (query.view(groups, per_group * dim, -1), key.view(groups, dim, -1), value.view(groups, dim, -1))
        return torch.cat(parts, dim=1).flatten(0, 1)
    if layout == "gate_up":
        return torch.cat(tuple(tensors))
    (tensor,) = tensors
    if layout == "vocab" and padded_vocab_size > tensor.shape[0]:
        padding = tensor.new_zeros(padded_vocab_size - tensor.shape[0], tensor.shape[1])
        return torch.cat((tensor, padding))
    return tensor


def to_hf(layout: Layout, tensor: torch.Tensor, shape: LlamaShape) -> list[torch.Tensor]:
    """The Hugging Face tensors inside a whole Megatron `tensor`: the inverse of `to_megatron`; contiguous."""
    if layout == "qkv":
        groups, per_group, dim = shape.num_kv_heads, shape.queries_per_group, shape.head_dim
        by_group = tensor.view(groups, (per_group + 2) * dim, -1)
        parts = by_group.split((per_group * dim, dim, dim), dim=1)
        return [part.flatten(0, 1) for part in parts]
    if layout == "gate_up":
        return list(tensor.chunk(2))
    if layout == "vocab":
        return [tensor[: shape.vocab_size]]
    return [tensor]


def split(mapping: Mapping, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The part of a whole Megatron tensor that tensor-parallel rank `rank` of `size` holds."""
    if size == 1 or mapping.split_dim is None:
        return tensor
    if mapping.layout == "gate_up":
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, dim=mapping.split_dim)[rank]


def join(mapping: Mapping, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole Megatron tensor from the tensor-parallel ranks' parts, in rank order: the inverse of `split`."""
    if len(parts) == 1 or mapping.split_dim is None:
        return parts[0]
    if mapping.layout == "gate_up":
        halves = [part.chunk(2) for part in parts]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(tuple(parts), dim=mapping.split_dim)
