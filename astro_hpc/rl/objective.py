"""Advantages, the clipped policy objective and the mismatch gauges, as functions of tensors alone.

Shapes: B responses, T tokens of all responses one after the other. Everything is float32.
Sources: GRPO (arXiv 2402.03300), Dr.GRPO (arXiv 2503.20783), DAPO (arXiv 2503.14476); the KL estimators k1, k2 and k3
are Schulman's ("Approximating KL Divergence", 2020).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from astro_hpc.config.schema import ObjectiveConfig

_STD_FLOOR = 1e-6
_MAX_LOG_RATIO = 20.0
"""Bound of a log-ratio before exp, so that one impossible token can't make a weight infinite."""


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


def overlong_penalty(lengths: Tensor, max_response_tokens: int, objective: ObjectiveConfig) -> Tensor:
    """What is added to each response's reward for coming close to the length limit (DAPO, section 3.4).

    0 up to `max_response_tokens - overlong_buffer_tokens`, from there linearly down to `-overlong_penalty` at
    `max_response_tokens`.

    Args:
        lengths: [B], tokens.

    Returns:
        [B] float32, in [-overlong_penalty, 0].
    """
    buffer = objective.overlong_buffer_tokens
    if buffer == 0:
        return torch.zeros(len(lengths))
    over = (lengths.float() - (max_response_tokens - buffer)).clamp(0, buffer)
    return -objective.overlong_penalty * over / buffer


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


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, responses: Tensor, objective: ObjectiveConfig
) -> Tensor:
    """Weight of each token that corrects for the engine having sampled with other probabilities than the trainer's.

    With r = exp(logp_old - logp_rollout) of a token, or the product of these over the token's response (`sequence`):
    min(r, cap), or for the masked variants r where floor <= r <= cap and 0 elsewhere. Masking by response drops the
    whole response.

    Args:
        old_logprobs: [T] of the trainer's weights when the rollouts were made.
        rollout_logprobs: [T] as the engine reported them.
        responses: [T] int64, equal for tokens of one response; any numbers from 0.

    Returns:
        [T], without gradient.
    """
    kind = objective.importance_correction
    log_ratio = (old_logprobs - rollout_logprobs).detach()
    if kind == "none" or log_ratio.numel() == 0:
        return torch.ones_like(log_ratio)
    if kind.startswith("sequence"):
        sums = log_ratio.new_zeros(int(responses.max()) + 1).index_add(0, responses, log_ratio)
        log_ratio = sums[responses]
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    if kind.endswith("_mask"):
        inside = (ratio >= objective.importance_floor) & (ratio <= objective.importance_cap)
        return torch.where(inside, ratio, torch.zeros_like(ratio))
    return ratio.clamp_max(objective.importance_cap)


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) on the policy's own samples, with gradient to `logprobs`.

    With d = logp_reference - logp: k1 = -d (unbiased, can be negative), k2 = d^2 / 2, k3 = exp(d) - 1 - d (unbiased,
    never negative). k2's gradient is the KL's own; k3's is that of the reversed KL.

    Args:
        logprobs, reference_logprobs: [T].

    Returns:
        [T].
    """
    difference = reference_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.clamp_max(_MAX_LOG_RATIO).exp() - 1 - difference


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    correction: Tensor,
    advantages: Tensor,
    weights: Tensor,
    objective: ObjectiveConfig,
    reference_logprobs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, corrected for the engine's mismatch, plus the KL penalty where there is one.

    `-sum_t w_t * (c_t * min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) - beta * kl_t)` with
    `r = exp(logp - logp_old)`.

    Args:
        logprobs: [T] of the weights being trained, with gradient.
        old_logprobs: [T] of the trainer's weights when the rollouts were made.
        correction: [T], c, from `importance_weights`.
        advantages, weights: [T].
        reference_logprobs: [T] of the model that RL started from; None: no penalty.

    Returns:
        The loss (scalar) and which tokens were clipped ([T] bool).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high)
    surrogate = correction.detach() * torch.minimum(ratio * advantages, clipped_ratio * advantages)
    if reference_logprobs is not None:
        penalty = kl_penalty(logprobs, reference_logprobs, objective.kl_estimator)
        surrogate = surrogate - objective.kl_coefficient * penalty
    clipped = (clipped_ratio * advantages < ratio * advantages) & (ratio != clipped_ratio)
    return -(weights * surrogate).sum(), clipped.detach()


def mismatch_sums(
    old_logprobs: Tensor, rollout_logprobs: Tensor, responses: Tensor, objective: ObjectiveConfig
) -> dict[str, float]:
    """What `mismatch_gauges` needs of [T] tokens, as numbers that add up over packs and ranks.

    The one that starts with `max_` is to be maximised instead. Arguments: see `importance_weights`.
    """
    delta = (old_logprobs - rollout_logprobs).double()
    bounded = delta.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    weights = bounded.exp()
    uncut = objective.model_copy(update={"importance_cap": float("inf"), "importance_floor": 0.0})
    applied, raw = (importance_weights(old_logprobs, rollout_logprobs, responses, o) for o in (objective, uncut))
    return {
        "mismatch_tokens": delta.numel(),
        "mismatch_abs": float(delta.abs().sum()),
        "max_mismatch_abs": float(delta.abs().max()) if delta.numel() else 0.0,
        "mismatch_kl": float((weights - 1 - bounded).sum()),
        "mismatch_weights": float(weights.sum()),
        "mismatch_squares": float(weights.square().sum()),
        "mismatch_corrected": float((applied != raw).sum()),
    }


def mismatch_gauges(sums: Mapping[str, float]) -> dict[str, float]:
    """How far the engine's log-probabilities lie from the trainer's, same weights and tokens.

    Returns:
        mismatch_mean_abs, mismatch_max_abs: |trainer - engine| in nats.
        mismatch_kl: mean of exp(d) - 1 - d with d = trainer - engine: estimates KL(engine || trainer), never negative.
        effective_sample_size: (sum w)^2 / (n sum w^2) with w = exp(d), in (0, 1]; 1 is no mismatch.
        corrected_share: share of tokens whose weight was truncated or masked.
    """
    count = max(sums.get("mismatch_tokens", 0), 1)
    squares = sums.get("mismatch_squares", 0.0)
    return {
        "mismatch_mean_abs": sums.get("mismatch_abs", 0.0) / count,
        "mismatch_max_abs": sums.get("max_mismatch_abs", 0.0),
        "mismatch_kl": sums.get("mismatch_kl", 0.0) / count,
        "effective_sample_size": sums["mismatch_weights"] ** 2 / (count * squares) if squares else 1.0,
        "corrected_share": sums.get("mismatch_corrected", 0.0) / count,
    }
