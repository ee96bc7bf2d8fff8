"""How fast a training step was, in tokens, FLOPs and bytes, over all ranks."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import torch

from astro_hpc.config.schema import ParallelConfig, PrecisionConfig
from astro_hpc.model.flops import peak_flops, train_flops
from astro_hpc.model.libraries import this_machine
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.parallel import padded_vocab_size


class StepMeter:
    """Turns what a step worked on and how long it took into the metrics that are logged."""

    def __init__(self, shape: LlamaShape, parallel: ParallelConfig, precision: PrecisionConfig) -> None:
        """torch.distributed must be initialised."""
        self._shape = shape
        self._vocab = padded_vocab_size(shape.vocab_size, parallel.tensor_parallel_size)
        self._copies = parallel.model_parallel_size
        self._ranks = torch.distributed.get_world_size()
        chip = this_machine().chip
        self._peak = peak_flops(chip.name, fp8=precision.fp8 != "none") if chip else None

    def measure(
        self, lengths: Sequence[int], num_targets: int, num_fed_here: int, seconds: float, gradient_sync_seconds: float
    ) -> dict[str, float]:
        """One step's numbers. A collective call: every rank makes it with the same first two arguments.

        Args:
            lengths: tokens of each example, over all ranks.
            num_targets: targets that carry loss, over all ranks.
            num_fed_here: tokens that this rank's packs have, padding and fillers included.
            seconds: of this rank, from asking for data to the updated weights.
            gradient_sync_seconds: of those, from the end of this rank's backward passes to reduced gradients.

        Returns:
            tokens: real ones, each once. padded_share: of the tokens fed, what was padding or filler.
            tokens_per_second: real tokens, over all ranks. tflops_per_rank: see `model.flops.CONVENTION`.
            mfu: share of the chip's peak, where that is known. peak_memory_gib: of the fullest rank, since its start:
            allocated by torch on a GPU, resident on a CPU. gradient_sync_seconds: of the rank that waited longest.
        """
        tokens = sum(lengths)
        fed, slowest, memory, sync = self._over_ranks(num_fed_here, seconds, _peak_memory(), gradient_sync_seconds)
        flops = train_flops(self._shape, lengths, num_targets, self._vocab) / slowest / self._ranks
        values: dict[str, Any] = {
            "tokens": tokens,
            "padded_share": round(1 - tokens / fed, 4),
            "tokens_per_second": tokens / slowest,
            "tflops_per_rank": flops / 1e12,
            "peak_memory_gib": round(memory / 2**30, 3),
            "gradient_sync_seconds": sync,
        }
        if self._peak is not None:
            values["mfu"] = flops / self._peak
        return values

    def _over_ranks(self, fed: int, seconds: float, memory: float, sync: float) -> tuple[float, float, float, float]:
        """(sum over data-parallel ranks, and the largest of the others); on the host, where gloo carries it."""
        if self._ranks == 1:
            return float(fed), seconds, memory, sync
        total = torch.tensor(float(fed), dtype=torch.float64)
        largest = torch.tensor([seconds, memory, sync], dtype=torch.float64)
        torch.distributed.all_reduce(total)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        # The ranks of one model copy are fed the same packs.
        return (float(total) / self._copies, *largest.tolist())


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
