"""Log-probabilities of target tokens from logits: the one place where the vocabulary's width costs memory."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

_CHUNK_ELEMENTS = 4 << 20
"""Logits turned into float32 at a time: small enough to stay in cache, large enough to keep threads busy."""


class _TargetLogprobs(torch.autograd.Function):
    """log_softmax(logits)[target] in float32 from logits of any dtype, a few rows at a time.

    Only the logits and one float a row are kept for the backward pass; the logits' memory then takes the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows, width = logits.shape
        normaliser = torch.empty(rows, dtype=torch.float32, device=logits.device)
        for part in _chunks(rows, width):
            normaliser[part] = torch.logsumexp(logits[part].float(), dim=-1)
        ctx.save_for_backward(logits, targets, normaliser)
        return logits.gather(1, targets[:, None]).squeeze(1).float() - normaliser

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        logits, targets, normaliser = ctx.saved_tensors
        result = torch.empty_like(logits)
        for part in _chunks(*logits.shape):
            softmax = torch.exp(logits[part].float() - normaliser[part, None])
            softmax *= -gradient[part, None]
            softmax.scatter_add_(1, targets[part, None], gradient[part, None])
            result[part] = softmax
        return result, None


def _chunks(rows: int, width: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // width)
    return [slice(start, start + size) for start in range(0, rows, size)]


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Log-probability of each row's target under softmax(logits), at temperature 1, with gradient.

    Args:
        logits: [rows, padded vocabulary / tensor-parallel size], this rank's part.
        targets: [rows] int64, ids of the whole vocabulary.
        vocab_size: the true vocabulary; columns beyond it are padding and get no probability.

    Returns:
        [rows] float32
    """
    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    if size == 1:
        return _TargetLogprobs.apply(logits[:, :vocab_size], targets)
    # The loss overwrites float32 logits, and bf16 ones it would copy in any case.
    logits = logits.float().clone() if logits.dtype == torch.float32 else logits.float()
    padding = rank * logits.shape[1] + torch.arange(logits.shape[1], device=logits.device) >= vocab_size
    if bool(padding.any()):
        logits = logits.masked_fill(padding, float("-inf"))
    return -vocab_parallel_cross_entropy(logits[:, None], targets[:, None]).squeeze(1)
