"""From rollouts to packed training sequences, and which prompts a step takes. No engine, no files."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from astro_hpc.config import ConfigError
from astro_hpc.config.schema import RLConfig
from astro_hpc.rl.objective import group_advantages, groups_with_signal, overlong_penalty, token_weights
from astro_hpc.rl.rollouts import Group, Rollout
from astro_hpc.run.seeds import derive_seed
from astro_hpc.training.packing import Example, PackedBatch, pack_examples, pack_lengths


@dataclass(frozen=True)
class RolloutBatch:
    """A step's training data.

    Attributes:
        mini_batches: packed sequences of each optimizer step, pass after pass; `extras` hold advantages,
            rollout_logprobs, weights, and responses (the number of the response). One without signal is empty.
        advantages: [B] of all responses.
    """

    mini_batches: list[list[PackedBatch]]
    advantages: torch.Tensor


def make_batch(groups: Sequence[Group], settings: RLConfig, seed: int) -> RolloutBatch:
    """Give every response its advantage and token weight, deal them to mini-batches and pack them.

    Args:
        groups: the step's, of `group_size` responses each.
        seed: of the dealing, where there is more than one mini-batch.

    Raises:
        ConfigError: a response with its prompt is longer than `rl.seq_length`.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts])
    objective = settings.objective
    rewards = torch.tensor([rollout.reward for rollout in rollouts])
    rewards = rewards + overlong_penalty(lengths, settings.max_response_tokens, objective)
    advantages = group_advantages(rewards, settings.group_size, objective.advantage)
    # Normalised over a mini-batch, so that its gradient has the same scale however many there are.
    weights = token_weights(lengths, objective.loss_aggregation, settings.max_response_tokens) * settings.mini_batches
    useful = lengths > 0
    # The KL penalty pulls on a response whatever its advantage.
    if objective.drop_equal_groups and objective.kl_coefficient == 0:
        useful &= groups_with_signal(rewards, settings.group_size)

    share = len(rollouts) // settings.mini_batches
    mini_batches = []
    for epoch in range(settings.num_epochs):
        order = list(range(len(rollouts)))
        if settings.mini_batches > 1:
            random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
        for first in range(0, len(order), share):
            indices = [i for i in order[first : first + share] if bool(useful[i])]
            mini_batches.append(_pack(indices, rollouts, advantages, weights, settings.seq_length))
    return RolloutBatch(mini_batches, advantages)


def _pack(
    indices: Sequence[int], rollouts: Sequence[Rollout], advantages: torch.Tensor, weights: torch.Tensor, capacity: int
) -> list[PackedBatch]:
    examples = [Example(rollouts[i].prompt_token_ids, rollouts[i].token_ids) for i in indices]
    longest = max((example.num_inputs for example in examples), default=0)
    if longest > capacity:
        raise ConfigError(
            f"rl.seq_length={capacity} can't hold a response of {longest} tokens with its prompt; "
            f"raise it to rl.max_response_tokens plus the longest prompt"
        )
    packs = []
    for members in pack_lengths([example.num_inputs for example in examples], capacity, seed=None):
        chosen = [indices[member] for member in members]
        extras: dict[str, Sequence[Sequence[float]]] = {
            "advantages": [[float(advantages[i])] * len(rollouts[i].token_ids) for i in chosen],
            "weights": [[float(weights[i])] * len(rollouts[i].token_ids) for i in chosen],
            "rollout_logprobs": [rollouts[i].logprobs for i in chosen],
            "responses": [[float(i)] * len(rollouts[i].token_ids) for i in chosen],
        }
        packs.append(pack_examples([examples[member] for member in members], "completion", extras))
    return packs


def prompt_at(position: int, num_prompts: int, seed: int) -> int:
    """Index of the prompt at `position` of an endless sequence: a new permutation of all prompts each epoch.

    A function of its arguments alone, so that a resumed run takes the prompts an uninterrupted one would.
    """
    epoch, place = divmod(position, num_prompts)
    return _permutation(num_prompts, derive_seed(seed, "epoch", epoch))[place]


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int) -> list[int]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return order
