"""That the conversion map and Megatron's model agree: every rank's parameters, joined, are the map's tensors."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from astro_hpc.config.schema import ParallelConfig
from astro_hpc.conversion.hf import named_parameters
from astro_hpc.conversion.names import checkpoint_key, join, mappings, megatron_size
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.meta import Request, checkpoint_requests, meta_rank
from astro_hpc.model.parallel import padded_vocab_size


@dataclass(frozen=True)
class Proof:
    """What was counted."""

    ranks: int
    parameters: int
    """Of the whole model, tied ones once, without vocabulary padding."""
    padded_parameters: int
    largest_rank: int
    """Parameters of the rank that has most."""


def model_ranks(parallel: ParallelConfig) -> list[tuple[int, int]]:
    """(tensor-parallel rank, pipeline rank) of each rank of one copy of the model, in Megatron's order."""
    tp, pp, cp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
    return [(rank % tp, rank // (tp * cp)) for rank in range(tp * cp * pp)]


def prove_shapes(shape: LlamaShape, parallel: ParallelConfig) -> Proof:
    """Build every rank on the meta device and compare with the conversion map.

    Raises:
        AssertionError: a parameter that the map doesn't know, one that no rank has, or one of another shape.
    """
    parts: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    requests: list[Request] = []
    largest = 0
    for rank, (tp_rank, _) in enumerate(model_ranks(parallel)):
        with meta_rank(shape, parallel, rank) as chunks:
            largest = max(largest, sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()))
            for name, copies in named_parameters(chunks).items():
                parts[name][tp_rank] = copies[0].detach()
            requests += checkpoint_requests(chunks)
    padded = padded_vocab_size(shape.vocab_size, parallel.tensor_parallel_size)
    table = mappings(shape)
    unknown, absent = set(parts) - {row.megatron for row in table}, {row.megatron for row in table} - set(parts)
    assert not unknown, f"the map has no {sorted(unknown)[0]}"
    assert not absent, f"no rank has {sorted(absent)[0]}"
    total = 0
    for row in table:
        tp_ranks = sorted(parts[row.megatron])
        assert tp_ranks == list(range(parallel.tensor_parallel_size)), f"{row.megatron}: only on ranks {tp_ranks}"
        whole = join(row, [parts[row.megatron][rank] for rank in tp_ranks])
        wanted = megatron_size(row, shape, padded)
        assert tuple(whole.shape) == wanted, f"{row.megatron}: ranks join to {tuple(whole.shape)}, the map has {wanted}"
        total += whole.numel()
    _check_requests(requests, shape, padded)
    padding = (padded - shape.vocab_size) * shape.hidden_size * (1 if shape.tied else 2)
    return Proof(len(model_ranks(parallel)), total - padding, total, largest)


def _check_requests(requests: list[Request], shape: LlamaShape, padded: int) -> None:
    """What ranks ask a checkpoint for covers exactly what conversion writes."""
    wanted: dict[str, tuple[int, ...]] = {}
    for row in mappings(shape):
        key, layer = checkpoint_key(row.megatron)
        size = megatron_size(row, shape, padded)
        wanted[key] = size if layer is None else (shape.num_layers, *size)
    regions: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(set)
    for request in requests:
        assert request.key in wanted, f"ranks ask for {request.key}, which conversion doesn't write"
        assert request.global_size == wanted[request.key], f"{request.key}: ranks expect {request.global_size}"
        regions[request.key].add((request.offsets, request.sizes))
    for key, size in wanted.items():
        covered = sum(torch.Size(sizes).numel() for _, sizes in regions[key])
        assert covered == torch.Size(size).numel(), f"{key}: ranks ask for {covered} elements of {size}"
