"""The same prompts through transformers' model and through Megatron's, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from astro_hpc.config.schema import ParallelConfig, PrecisionConfig
from astro_hpc.conversion.hf import load_megatron
from astro_hpc.conversion.megatron_folder import MegatronTensors
from astro_hpc.model.build import build_model
from astro_hpc.model.cpu import device, megatron_device
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.parallel import initialise_parallel
from astro_hpc.run.seeds import derive_seed

_PROMPTS = (
    "What is 17 + 25? Let's think step by step.",
    "The area of a triangle with sides 3, 4 and 5 is",
    "\\boxed{42}",
)
_TOLERANCE = 1e-4
"""Of the largest logit, or of 1: float32 sums in another order differ by about 1e-6."""
_RANDOM_LENGTH = 24
_SHARE_OF_MEMORY = 0.6


@dataclass(frozen=True)
class LogitsComparison:
    """The largest absolute difference, and the largest logit it is to be judged by."""

    difference: float
    largest: float
    tokens: int
    prompts: int

    @property
    def within(self) -> bool:
        """Whether both models are the same up to rounding."""
        return self.difference <= _TOLERANCE * max(1.0, self.largest)


def why_too_large(shape: LlamaShape) -> str | None:
    """Why the model can't be run here in float32; None: it can."""
    needed, free = 4 * shape.num_parameters, _available_memory()
    if needed <= _SHARE_OF_MEMORY * free:
        return None
    return f"float32 weights are {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free"


def compare_logits(hf_dir: Path, megatron_dir: Path, shape: LlamaShape, prompts: Sequence[str]) -> LogitsComparison:
    """Run both models, one after the other, over `prompts` (some of our own when there are none).

    Weights are rounded to the checkpoint's dtype on both sides first. A folder without a tokenizer gets random tokens.
    """
    ids = _token_ids(hf_dir, shape, prompts or _PROMPTS)
    dtype = MegatronTensors(megatron_dir).dtype(shape) or torch.float32
    theirs = _hf_logits(hf_dir, ids, dtype)
    ours = _megatron_logits(hf_dir, megatron_dir, shape, ids)
    differences = [float((a - b).abs().max()) for a, b in zip(theirs, ours, strict=True)]
    # A NaN compares as equal to nothing, so it must not get lost in max().
    difference = max(differences) if all(value == value for value in differences) else float("inf")
    largest = max(float(logits.abs().max()) for logits in theirs)
    return LogitsComparison(difference, largest, sum(map(len, ids)), len(ids))


def _token_ids(hf_dir: Path, shape: LlamaShape, prompts: Sequence[str]) -> list[list[int]]:
    if any((hf_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(hf_dir)
        return [tokenizer(prompt)["input_ids"] for prompt in prompts]
    seeds = [derive_seed(0, "verify", prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.randint(shape.vocab_size, (_RANDOM_LENGTH,), generator=draw).tolist() for draw in generators]


@torch.no_grad()
def _hf_logits(hf_dir: Path, ids: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """[tokens, vocabulary] float32 of each prompt."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(hf_dir, dtype=dtype).float().eval()
    return [model(torch.tensor([prompt])).logits[0].float() for prompt in ids]


@torch.no_grad()
def _megatron_logits(hf_dir: Path, megatron_dir: Path, shape: LlamaShape, ids: list[list[int]]) -> list[torch.Tensor]:
    """[tokens, vocabulary] float32 of each prompt, the vocabulary's padding cut off."""
    initialise_parallel(ParallelConfig(), seed=0)
    try:
        (model,) = build_model(shape, ParallelConfig(), PrecisionConfig(dtype="fp32"))
        load_megatron([model], megatron_dir, hf_dir)
        model.eval()
        found = []
        for prompt in ids:
            tokens = torch.tensor([prompt], device=device())
            bounds = torch.tensor([0, len(prompt)], dtype=torch.int32, device=device())
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=bounds,
                cu_seqlens_kv=bounds,
                max_seqlen_q=len(prompt),
                max_seqlen_kv=len(prompt),
            )
            positions = torch.arange(len(prompt), device=device())[None]
            with megatron_device():
                logits = model(tokens, positions, None, packed_seq_params=packed)
            found.append(logits[0, :, : shape.vocab_size].float().cpu())
        return found
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _available_memory() -> int:
    with open("/proc/meminfo") as handle:
        for line in handle:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
