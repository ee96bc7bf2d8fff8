"""Floating-point operations of training, and what a chip can do: model FLOPs as Megatron counts them.

The convention: a multiply-add is two operations; backward is twice forward; attention is causal, so half; what is
recomputed is not counted; the embedding look-up is not counted. Attention counts each packed example's own length.
The output layer counts the positions it works on, those whose target carries loss.
"""

from __future__ import annotations

from collections.abc import Iterable

from astro_hpc.model.llama import LlamaShape

CONVENTION = "model FLOPs: forward + 2x backward, causal attention halved, packed lengths, no recomputation"

# Dense matrix FLOP/s without sparsity, from the makers' data sheets: (BF16, FP8).
_PEAKS = {
    "H100 PCIe": (756e12, 1513e12),
    "H100 80GB HBM3": (989e12, 1979e12),
    "NVIDIA H200": (989e12, 1979e12),
    "A100": (312e12, None),
}


def train_flops(shape: LlamaShape, lengths: Iterable[int], num_targets: int, padded_vocab_size: int) -> float:
    """FLOPs of forward and backward over examples of the given lengths.

    Args:
        lengths: tokens of each example that is fed, without padding.
        num_targets: positions that the output layer works on.
        padded_vocab_size: columns of the output layer.
    """
    tokens = squares = 0
    for length in lengths:
        tokens += length
        squares += length * length
    queries = shape.num_heads * shape.head_dim
    keys = 2 * shape.num_kv_heads * shape.head_dim
    layer = 3 * shape.hidden_size * shape.ffn_hidden_size + shape.hidden_size * (2 * queries + keys)
    return 6.0 * (
        shape.num_layers * (tokens * layer + queries * squares)
        + float(num_targets) * shape.hidden_size * padded_vocab_size
    )


def peak_flops(chip_name: str, fp8: bool) -> float | None:
    """Dense matrix FLOP/s of a chip in BF16 or FP8; None where it is not known."""
    if "NVL" in chip_name:  # clocked lower than its namesakes
        return None
    for name, (bf16, in_fp8) in _PEAKS.items():
        if name in chip_name:
            return in_fp8 if fp8 else bf16
    return None
