"""Advantages, the clipped policy objective and the mismatch gauges, as functions of tensors alone.

Shapes: B responses, T tokens of all responses one after the other. Everything is float32.
Sources: GRPO (arXiv 2402.03300), Dr.GRPO (arXiv 2503.20783), DAPO (arXiv 2503.14476).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from astro_hpc.config.schema import ObjectiveConfig

_STD_FLOOR = 1e-6


def group_advantages(rewards: Tensor, group_size: int, kind: str) -> Tensor:
    """Advantage of each response over its group.

    Args:
        rewards: [B], the responses of one prompt side by side.
        group_size: responses a prompt; divides B.
        kind: `dr_grpo`: r - mean(group); `grpo`: (r - mean) / std (population), 0 where all are equal.

    Returns:
        [B].
    """
    groups = rewards.float().view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if kind == "grpo":
        std = groups.std(dim=1, keepdim=True, unbiased=False)
        centred = torch.where(std > _STD_FLOOR, centred / std.clamp_min(_STD_FLOOR), torch.zeros_like(centred))
    return centred.flatten()


def groups_with_signal(rewards: Tensor, group_size: int) -> Tensor:
    """[B] bool: the response's group holds different rewards, so its advantages are not all 0."""
    groups = rewards.view(-1, group_size)
    differs = (groups != groups[:, :1]).any(dim=1, keepdim=True)
    return differs.expand_as(groups).flatten()


def token_weights(lengths: Tensor, aggregation: str, max_response_tokens: int) -> Tensor:
    """What one token of each response counts in the loss; the loss is the weighted sum over all tokens.

    Args:
        lengths: [B] response lengths in tokens, all responses of the step, also those without signal.
        aggregation: `response_mean`: 1 / (B * own length), GRPO; `token_mean`: 1 / sum of lengths, DAPO;
            `constant`: 1 / (B * max_response_tokens), Dr.GRPO.

    Returns:
        [B].
    """
    lengths = lengths.float()
    if aggregation == "response_mean":
        return 1.0 / (len(lengths) * lengths.clamp_min(1))
    if aggregation == "token_mean":
        return torch.full_like(lengths, 1.0 / float(lengths.sum().clamp_min(1)))
    return torch.full_like(lengths, 1.0 / (len(lengths) * max_response_tokens))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    objective: ObjectiveConfig,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, corrected for the engine's mismatch.

    `-sum_t w_t * c_t * min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)` with `r = exp(logp - logp_old)` and the
    truncated importance weight `c = min(exp(logp_old - logp_rollout), cap)`, which carries no gradient.

    Args:
        logprobs: [T] of the weights being trained, with gradient.
        old_logprobs: [T] of the trainer's weights when the rollouts were made.
        rollout_logprobs: [T] as the engine reported them.
        advantages, weights: [T].

    Returns:
        The loss (scalar) and which tokens were clipped ([T] bool).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    if objective.truncated_importance_cap is not None:
        correction = torch.exp(old_logprobs - rollout_logprobs).clamp_max(objective.truncated_importance_cap)
        surrogate = correction.detach() * surrogate
    clipped = (clipped_ratio * advantages < ratio * advantages) & (ratio != clipped_ratio)
    return -(weights * surrogate).sum(), clipped.detach()


@dataclass(frozen=True)
class Mismatch:
    """How far the engine's log-probabilities lie from the trainer's, same weights and tokens.

    Attributes:
        mean_abs: mean |trainer - engine|, nats.
        max_abs: the largest.
        kl: mean of exp(d) - 1 - d with d = trainer - engine: estimates KL(engine || trainer), never negative.
        effective_sample_size: (sum w)^2 / (n sum w^2) with w = exp(d), in (0, 1]; 1 is no mismatch.
        truncated_share: share of tokens whose weight is above the cap.
    """

    mean_abs: float
    max_abs: float
    kl: float
    effective_sample_size: float
    truncated_share: float


def mismatch(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float | None) -> Mismatch:
    """Gauge the mismatch over [T] tokens; T = 0 gives the values of no mismatch."""
    if old_logprobs.numel() == 0:
        return Mismatch(0.0, 0.0, 0.0, 1.0, 0.0)
    delta = (old_logprobs - rollout_logprobs).double()
    weights = delta.exp()
    return Mismatch(
        mean_abs=float(delta.abs().mean()),
        max_abs=float(delta.abs().max()),
        kl=float((weights - 1 - delta).mean()),
        effective_sample_size=float(weights.sum() ** 2 / (weights.numel() * (weights**2).sum())),
        truncated_share=float((weights > cap).double().mean()) if cap is not None else 0.0,
    )
