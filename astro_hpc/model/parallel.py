"""The process group and Megatron's parallel state, from ParallelConfig."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from astro_hpc.config.schema import ParallelConfig
from astro_hpc.model.cpu import megatron_device, on_cpu
from astro_hpc.model.sizes import check_parallel, check_world_size, padded_vocab_size
from astro_hpc.run import ranks

__all__ = [
    "check_parallel",
    "context_rows",
    "initialise_parallel",
    "join_process_group",
    "launched_world_size",
    "on_any_rank",
    "padded_vocab_size",
    "tell_all",
]
_TIMEOUT = timedelta(hours=12)  # ranks wait while rank 0 samples; a dead one is noticed by whoever started them
_made_in: Any = None
"""The process group that Megatron's groups were made in."""


def initialise_parallel(parallel: ParallelConfig, seed: int) -> None:
    """Join the process group and set up Megatron's parallel state and random states.

    A process group that is already there (an inference engine in this process makes one of its own) is used as it is.
    Several ranks meet by torchrun's variables or those of an srun step (`run.ranks.place_from`).

    Raises:
        ConfigError: the ranks that are there don't fit the sizes.
    """
    global _made_in
    join_process_group()
    check_world_size(parallel, torch.distributed.get_world_size())
    with megatron_device():
        wanted = (
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.virtual_pipeline_parallel_size,
            parallel.context_parallel_size,
        )
        # An engine that is closed takes the process group with it, and Megatron's groups are of no use without.
        stale = _made_in is not torch.distributed.group.WORLD
        if parallel_state.is_initialized() and (stale or _current_sizes() != wanted):
            parallel_state.destroy_model_parallel()
        if not parallel_state.is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=wanted[0],
                pipeline_model_parallel_size=wanted[1],
                virtual_pipeline_model_parallel_size=wanted[2],
                context_parallel_size=wanted[3],
            )
        _made_in = torch.distributed.group.WORLD
        model_parallel_cuda_manual_seed(seed % 2**31, force_reset_rng=True)


def _current_sizes() -> tuple[int, int, int | None, int]:
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )


def launched_world_size() -> int:
    """Ranks that were started together; 1 when this process is alone."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    place = ranks.place_from()
    return place.world_size if place else 1


def join_process_group() -> None:
    """Meet the other ranks, or be alone where nobody started several. A group that is there is used as it is."""
    place = ranks.place_from()
    # Megatron's order of kernels and tensor-parallel communication relies on it; read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not on_cpu():
        # Slurm may show each task its own GPU alone.
        torch.cuda.set_device((place.local_rank if place else 0) % torch.cuda.device_count())
    if torch.distributed.is_initialized():
        return
    backend = "gloo" if on_cpu() else "cpu:gloo,cuda:nccl"
    if place is None:
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        return
    host, port = ranks.set_rendezvous()
    store = None
    if ranks.supervised() is not None:
        listener = os.environ.get(ranks.LISTEN_FD)
        store = torch.distributed.TCPStore(
            host,
            port,
            place.world_size,
            is_master=place.rank == 0,
            timeout=_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=int(listener) if listener else None,
        )
    torch.distributed.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world_size, timeout=_TIMEOUT
    )


def tell_all(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    values = [value]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def on_any_rank(flag: bool) -> bool:
    """Whether `flag` is true on some rank; all ranks call it at the same point and get the same answer."""
    if torch.distributed.get_world_size() == 1:
        return flag
    seen = torch.tensor(int(flag))
    torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
    return bool(seen)


def context_rows(bounds: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Which tokens of a pack context-parallel rank `rank` of `size` holds, in its order: [tokens / size] int64.

    Each sequence is cut into 2 x size pieces; a rank has the rank-th from the front and from the back, as Transformer
    Engine and Megatron's rotary embedding expect it, so that under a causal mask all have equal work.

    Args:
        bounds: [sequences + 1] bounds of the sequences, whose lengths are multiples of 2 x size.
    """
    starts, ends = bounds[:-1].tolist(), bounds[1:].tolist()
    parts = []
    for start, end in zip(starts, ends, strict=True):
        piece = (end - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + number * piece, start + (number + 1) * piece))
    return torch.cat(parts).to(bounds.device)
