"""Log-probabilities of target tokens from logits: the one place where the vocabulary's width costs memory."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from astro_hpc.training.packing import PackedBatch

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


class RowSelector:
    """Lets the output layer work only on positions whose target carries loss.

    A vocabulary is large: with prompts masked this saves much of the step. A forward pre-hook of the output layer
    does it, so that GPTModel stays as it is. With sequence parallelism the layer itself gathers its input, so all
    rows go through it and are chosen from afterwards.
    """

    def __init__(self, last_chunk: torch.nn.Module, enabled: bool) -> None:
        self._enabled = enabled
        self._rows: torch.Tensor | None = None
        if enabled and last_chunk.post_process:
            last_chunk.output_layer.register_forward_pre_hook(self._hook)

    def select(self, loss_mask: torch.Tensor) -> None:
        """Set the rows of the next forward pass; at least one, so that the graph is whole."""
        rows = loss_mask.nonzero().flatten()
        self._chosen = rows if rows.numel() else torch.zeros(1, dtype=torch.int64, device=loss_mask.device)
        self._all = self._chosen.numel() == loss_mask.numel()

    def _hook(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if self._all else (args[0].index_select(0, self._chosen), *args[1:])

    def scatter(self, logits: torch.Tensor, batch: PackedBatch, vocab_size: int) -> torch.Tensor:
        """Logits of the chosen rows -> log-probabilities of all targets, 0 elsewhere. [T] float32."""
        chosen = batch.loss_mask.nonzero().flatten()
        if not chosen.numel():
            return logits.new_zeros(batch.num_tokens, dtype=torch.float32) + logits.sum() * 0.0
        if not self._enabled and chosen.numel() < batch.num_tokens:
            logits = logits.index_select(0, chosen)
        logprobs = target_logprobs(logits, batch.targets[chosen], vocab_size)
        if chosen.numel() == batch.num_tokens:
            return logprobs
        return logprobs.new_zeros(batch.num_tokens).index_copy(0, chosen, logprobs)
