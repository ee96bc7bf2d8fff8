"""The process group and Megatron's parallel state, from ParallelConfig."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ParallelConfig
from astro_hpc.model.cpu import megatron_device, on_cpu
from astro_hpc.model.llama import LlamaShape

_TIMEOUT = timedelta(minutes=30)
_VOCAB_MULTIPLE = 128  # keeps the padded vocabulary, and so a checkpoint's shapes, the same at tp 1, 2, 4 and 8


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """The vocabulary's size in Megatron: padded to divide by 128 and by the tensor-parallel size."""
    multiple = math.lcm(_VOCAB_MULTIPLE, tensor_parallel_size)
    return -(-vocab_size // multiple) * multiple


def check_parallel(shape: LlamaShape, parallel: ParallelConfig, world_size: int, *, cpu: bool) -> None:
    """Refuse what can't work, and what would run and silently give wrong losses.

    Raises:
        ConfigError: names the sizes and a remedy.
    """
    tp, pp, cp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
    vpp = parallel.virtual_pipeline_parallel_size
    if world_size % parallel.model_parallel_size:
        raise ConfigError(
            f"parallel: tp {tp} x pp {pp} x cp {cp} needs a multiple of {parallel.model_parallel_size} ranks, "
            f"there are {world_size}; lower a size (stages of several ranks are not built yet)"
        )
    for what, count in (("attention heads", shape.num_heads), ("key/value heads", shape.num_kv_heads)):
        if count % tp:
            fits = [n for n in range(1, count + 1) if not shape.num_heads % n and not shape.num_kv_heads % n]
            raise ConfigError(
                f"parallel.tensor_parallel_size {tp}: the model's {count} {what} don't divide by it; "
                f"possible: {', '.join(map(str, fits))}"
            )
    if shape.ffn_hidden_size % tp:
        raise ConfigError(f"parallel.tensor_parallel_size {tp} doesn't divide the MLP's width {shape.ffn_hidden_size}")
    if vpp is not None and pp == 1:
        raise ConfigError("parallel.virtual_pipeline_parallel_size is set but pipeline_parallel_size is 1; unset it")
    stages = pp * (vpp or 1)
    if shape.num_layers % stages:
        fits = [n for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0]
        raise ConfigError(
            f"parallel: {shape.num_layers} layers don't divide into pp {pp} x vpp {vpp or 1} = {stages} stages; "
            f"the product can be {', '.join(map(str, fits))}"
        )
    if cp > 1:
        raise ConfigError(
            f"parallel.context_parallel_size {cp}: packed sequences can't be split over context-parallel ranks yet; "
            "set it to 1 and raise tensor_parallel_size"
        )
    if parallel.sequence_parallel and tp == 1:
        raise ConfigError("parallel.sequence_parallel needs tensor_parallel_size > 1; switch it off")
    if cpu and vpp is not None and pp == 2:
        raise ConfigError(
            "parallel: interleaved pipeline of 2 stages gives wrong losses over gloo (without a GPU); "
            "unset virtual_pipeline_parallel_size, or take pipeline_parallel_size 3 or more"
        )


_made_in: Any = None
"""The process group that Megatron's groups were made in."""


def initialise_parallel(parallel: ParallelConfig, seed: int) -> None:
    """Join the process group and set up Megatron's parallel state and random states.

    A process group that is already there (an inference engine in this process makes one of its own) is used as it is.
    RANK, WORLD_SIZE and MASTER_ADDR as torchrun sets them, or srun's SLURM_PROCID and SLURM_NTASKS together with
    MASTER_ADDR, join several processes; without MASTER_ADDR this process is alone.

    Raises:
        ConfigError: the ranks that are there don't fit the sizes.
    """
    global _made_in
    _initialise_process_group()
    world_size = torch.distributed.get_world_size()
    if world_size % parallel.model_parallel_size:
        raise ConfigError(
            f"parallel: a multiple of {parallel.model_parallel_size} ranks is needed, there are {world_size}"
        )
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
    """Ranks that torchrun or srun started; 1 without them."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    if "MASTER_ADDR" not in os.environ:
        return 1
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def _initialise_process_group() -> None:
    local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    if not on_cpu():
        torch.cuda.set_device(local_rank)
    if torch.distributed.is_initialized():
        return
    backend = "gloo" if on_cpu() else "cpu:gloo,cuda:nccl"
    world_size = launched_world_size()
    if world_size == 1:
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        return
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    torch.distributed.init_process_group(backend, rank=rank, world_size=world_size, timeout=_TIMEOUT)
