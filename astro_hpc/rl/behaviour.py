"""What a step's responses were like: numbers for the log, and a few responses to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from astro_hpc.cloning.phrases import Phrases
from astro_hpc.problems.problem import Problem
from astro_hpc.rl.rollouts import Group, Rollout
from astro_hpc.rl.source import StepGroups
from astro_hpc.run.files import write_text_atomic

_MAX_CHARS = 20_000


def behaviour(groups: StepGroups, phrases: Phrases) -> dict[str, float]:
    """Rewards, shares, lengths of right and wrong responses apart, backtracks, and how old the weights were.

    A per-response mean of the loss can lengthen wrong responses by itself, hence the two lengths. `sampled_tokens`
    counts all that was sampled for the step, also what was left out.
    """
    rollouts = [rollout for group in groups.used for rollout in group.rollouts]
    left_out = [rollout for group in [*groups.no_signal, *groups.stale] for rollout in group.rollouts]
    right = [len(r.token_ids) for r in rollouts if r.outcome == "right"]
    wrong = [len(r.token_ids) for r in rollouts if r.outcome != "right"]
    newest = max(version for r in rollouts for version, _ in r.weight_versions)
    return {
        "reward": _mean([r.reward for r in rollouts]),
        "pass_rate": len(right) / len(rollouts),
        "unknown": sum(r.outcome == "unknown" for r in rollouts) / len(rollouts),
        "groups_with_signal": sum(group.has_signal for group in groups.used) / len(groups.used),
        "groups_left_out": len(groups.no_signal),
        "groups_stale": len(groups.stale),
        "response_tokens": _mean([*right, *wrong]),
        "response_tokens_right": _mean(right),
        "response_tokens_wrong": _mean(wrong),
        "truncated": sum(r.truncated for r in rollouts) / len(rollouts),
        "backtracks": _mean([phrases.count_backtracks(r.text) for r in rollouts]),
        # Mean surprise of sampled tokens, over all of them: an unbiased estimate of the policy's entropy, nats a token.
        "entropy": -_mean([logprob for r in rollouts for logprob in r.logprobs]),
        "version_spread": _mean([newest - r.oldest_version for r in rollouts]),
        "sampled_tokens": sum(len(r.token_ids) for r in [*rollouts, *left_out]),
    }


def write_samples(folder: Path, step: int, groups: Sequence[Group], problems: Sequence[Problem]) -> None:
    """One right and one wrong response of the step, to be read by people."""
    texts = {problem.id: problem.text for problem in problems}
    chosen: dict[bool, Rollout] = {}
    for group in groups:
        for rollout in group.rollouts:
            chosen.setdefault(rollout.outcome == "right", rollout)
    parts = [
        f"=== {r.problem_id}: {r.outcome}, reward {r.reward:+g}, {len(r.token_ids)} tokens\n"
        f"{texts.get(r.problem_id, '')}\n---\n{r.text[:_MAX_CHARS]}\n"
        for _, r in sorted(chosen.items(), reverse=True)
    ]
    write_text_atomic(folder / f"step_{step:08d}.txt", "\n".join(parts))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
