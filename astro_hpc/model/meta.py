"""Any rank of any model, without its memory and without the other ranks: parameters on PyTorch's meta device.

A process group that only pretends to have members lets Megatron-Core build rank 17 of 32 in one process, so that names,
shapes and what each rank asks a checkpoint for can be checked for a 70B model in seconds on a laptop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from astro_hpc.config.schema import ParallelConfig, PrecisionConfig
from astro_hpc.model.build import build_model
from astro_hpc.model.cpu import megatron_device
from astro_hpc.model.llama import LlamaShape


@dataclass(frozen=True)
class Request:
    """One region of a checkpoint's tensor that a rank loads."""

    key: str
    global_size: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    """Of the region; as many dimensions as the tensor has in the checkpoint, stacked layers included."""


@contextlib.contextmanager
def meta_rank(shape: LlamaShape, parallel: ParallelConfig, rank: int) -> Iterator[list[GPTModel]]:
    """Yield the model chunks of one rank of `parallel.model_parallel_size` on the meta device.

    This process must not be part of a process group; afterwards it is of none.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise AssertionError("a rank on the meta device needs a process without a process group")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.model_parallel_size)
    try:
        with megatron_device():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor_parallel_size,
                pipeline_model_parallel_size=parallel.pipeline_parallel_size,
                virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_parallel_size,
                context_parallel_size=parallel.context_parallel_size,
                create_gloo_process_groups=False,
            )
            model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            with torch.device("meta"):
                chunks = build_model(shape, parallel, PrecisionConfig(dtype="bf16"), torch.device("meta"))
        yield chunks
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def checkpoint_requests(chunks: list[GPTModel]) -> list[Request]:
    """What this rank's model asks a checkpoint for, from Megatron's own sharded state dict. Inside `meta_rank`."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    found = []
    for chunk in chunks:
        with megatron_device():
            state = chunk.sharded_state_dict(metadata=metadata)
            apply_factories(state)
        for value in _leaves(state):
            if isinstance(value, ShardedTensor):
                sizes = (1,) * value.prepend_axis_num + tuple(value.local_shape)
                found.append(Request(value.key, tuple(value.global_shape), tuple(value.global_offset), sizes))
    return found


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
