"""Which parallel sizes can work for a model: arithmetic alone, importable without torch."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Mapping

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ParallelConfig
from astro_hpc.model.llama import LlamaShape

_VOCAB_MULTIPLE = 128  # keeps the padded vocabulary, and so a checkpoint's shapes, the same at tp 1, 2, 4 and 8


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """The vocabulary's size in Megatron: padded to divide by 128 and by the tensor-parallel size."""
    multiple = math.lcm(_VOCAB_MULTIPLE, tensor_parallel_size)
    return -(-vocab_size // multiple) * multiple


def sequence_multiple(parallel: ParallelConfig) -> int:
    """Every sequence of a pack is padded to a multiple of this.

    Context parallelism cuts each sequence into 2 x cp pieces (a rank takes one from either end, so that all have
    equal work under a causal mask); with sequence parallelism tp ranks share what one has.
    """
    cp, tp = parallel.context_parallel_size, parallel.tensor_parallel_size
    return 1 if cp == 1 else 2 * cp * (tp if parallel.sequence_parallel else 1)


def pack_multiple(parallel: ParallelConfig, token_multiple: int) -> int:
    """A pack's whole length is padded to a multiple of this, so that each rank's tokens are one of `token_multiple`."""
    ranks = parallel.context_parallel_size * (parallel.tensor_parallel_size if parallel.sequence_parallel else 1)
    return math.lcm(sequence_multiple(parallel), ranks * token_multiple)


def micro_batch_multiple(parallel: ParallelConfig) -> int:
    """A rank's micro-batches of a step are filled up to a multiple of this: the interleaved schedule's groups."""
    return parallel.pipeline_parallel_size if parallel.virtual_pipeline_parallel_size else 1


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """How many NVIDIA GPUs this process may use, by their device files and CUDA_VISIBLE_DEVICES."""
    devices = glob.glob("/dev/nvidia[0-9]*")
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(devices)
    return min(len(devices), len([name for name in chosen.split(",") if name.strip()]))


def local_world_size(parallel: ParallelConfig, gpus: int, for_servers: int = 0) -> int:
    """Ranks that a stage starts on this machine by itself: the product of the parallel sizes.

    Without `data_parallel_size` that is as many copies of the model as the GPUs hold, and one copy on a CPU.

    Args:
        for_servers: so many of the GPUs are for servers that the stage starts beside its ranks.

    Raises:
        ConfigError: there are GPUs, but too few.
    """
    copies = parallel.data_parallel_size or max(1, (gpus - for_servers) // parallel.model_parallel_size)
    ranks = copies * parallel.model_parallel_size
    if 0 < gpus < ranks + for_servers:
        beside = f", {for_servers} of them for inference.num_servers" if for_servers else ""
        lower = "lower a size" + (" or num_servers" if for_servers else "")
        raise ConfigError(
            f"parallel: {describe(parallel)} needs {ranks} GPUs and this machine has {gpus}{beside}; "
            f"start the stage on every node with srun or torchrun, or {lower}"
        )
    return ranks


def describe(parallel: ParallelConfig) -> str:
    """The sizes in one phrase, for instance `tp 2 x pp 4 x cp 1 x dp 2`."""
    sizes = [
        f"tp {parallel.tensor_parallel_size}",
        f"pp {parallel.pipeline_parallel_size}",
        f"cp {parallel.context_parallel_size}",
    ]
    if parallel.data_parallel_size is not None:
        sizes.append(f"dp {parallel.data_parallel_size}")
    return " x ".join(sizes)


def check_parallel(shape: LlamaShape, parallel: ParallelConfig, world_size: int, *, cpu: bool) -> None:
    """Refuse what can't work, and what would run and silently give wrong losses.

    Raises:
        ConfigError: names the sizes and a remedy.
    """
    check_world_size(parallel, world_size)
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    vpp = parallel.virtual_pipeline_parallel_size
    for what, count in (("attention heads", shape.num_heads), ("key/value heads", shape.num_kv_heads)):
        if count % tp:
            fits = [n for n in range(1, count + 1) if not shape.num_heads % n and not shape.num_kv_heads % n]
            raise ConfigError(
                f"parallel.tensor_parallel_size {tp}: the model's {count} {what} don't divide by it; "
                f"possible: {', '.join(map(str, fits))}"
            )
    if shape.ffn_hidden_size % tp:
        raise ConfigError(
            f"parallel.tensor_parallel_size {tp} doesn't divide the MLP's width {shape.ffn_hidden_size}; "
            f"{math.gcd(tp, shape.ffn_hidden_size)} does"
        )
    if vpp is not None and pp == 1:
        raise ConfigError("parallel.virtual_pipeline_parallel_size is set but pipeline_parallel_size is 1; unset it")
    stages = pp * (vpp or 1)
    if shape.num_layers % stages:
        fits = [n for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0]
        raise ConfigError(
            f"parallel: {shape.num_layers} layers don't divide into pp {pp} x vpp {vpp or 1} = {stages} stages; "
            f"the product can be {', '.join(map(str, fits))}"
        )
    if parallel.sequence_parallel and tp == 1:
        raise ConfigError("parallel.sequence_parallel needs tensor_parallel_size > 1; switch it off")
    if cpu and vpp is not None and pp == 2:
        raise ConfigError(
            "parallel: interleaved pipeline of 2 stages gives wrong losses over gloo (without a GPU); "
            "unset virtual_pipeline_parallel_size, or take pipeline_parallel_size 3 or more"
        )


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a number of ranks that the sizes don't give.

    Raises:
        ConfigError: names the numbers and a remedy.
    """
    one_copy = parallel.model_parallel_size
    wanted = one_copy * (parallel.data_parallel_size or 0)
    if wanted not in (0, world_size):
        raise ConfigError(
            f"parallel: {describe(parallel)} is {wanted} ranks, there are {world_size}; "
            "start that many, or unset data_parallel_size to let it follow from the ranks"
        )
    if world_size % one_copy:
        raise ConfigError(
            f"parallel: {describe(parallel)} needs a multiple of {one_copy} ranks, there are {world_size}; "
            "start as many, or lower a size"
        )
