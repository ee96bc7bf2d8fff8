"""Accuracy, behaviour and cost from graded samples: plain numbers in, plain numbers out.

Intervals are 95 %, over problems: the samples of one problem are not independent of one another, so each problem
counts as one observation (its mean over samples).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

_Z95 = 1.959964


@dataclass(frozen=True)
class Attempt:
    """One complete final answer within a response.

    Attributes:
        correct: it is right.
        went_back: the text says so between this answer and the next, or the end.
        repeated: an earlier attempt of the response gave the same answer.
    """

    correct: bool
    went_back: bool = False
    repeated: bool = False


@dataclass(frozen=True)
class Graded:
    """One graded response.

    Attributes:
        correct: the last final answer is right.
        answer: the last final answer as votes compare it; None where there is none.
        num_tokens: generated, end of sequence included.
        num_backtracks: times the text says that it goes back.
        truncated: cut at the token limit.
        attempts: in the order of the text; the first is what the model gets without going back.
    """

    correct: bool
    answer: str | None
    num_tokens: int
    num_backtracks: int = 0
    truncated: bool = False
    attempts: tuple[Attempt, ...] = ()

    @property
    def first_correct(self) -> bool:
        """The first attempt is right."""
        return bool(self.attempts) and self.attempts[0].correct


Results = Mapping[str, Sequence[Graded]]
"""Problem id -> its samples, in the order of the sample index."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval's length: the figure behind the ±."""
        return (self.high - self.low) / 2


def share(per_problem: Sequence[float]) -> Estimate:
    """Mean of values in [0, 1], one a problem, with a Wilson interval at the effective sample size.

    The effective size is p (1 - p) / (standard error over problems)^2. Unlike the mean ± 1.96 standard errors, the
    interval stays within [0, 1] and does not shrink to nothing where every problem agrees.

    Raises:
        ValueError: no values.
    """
    n, p = len(per_problem), mean(per_problem)
    variance = (stdev(per_problem) / math.sqrt(n)) ** 2 if n > 1 else 0.0
    effective = p * (1 - p) / variance if variance > 0 else float(n)
    z2 = _Z95**2
    centre = (p + z2 / (2 * effective)) / (1 + z2 / effective)
    half = _Z95 / (1 + z2 / effective) * math.sqrt(p * (1 - p) / effective + z2 / (4 * effective**2))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def pass_at_1(results: Results) -> Estimate:
    """Mean correctness of a sample."""
    return share([mean(sample.correct for sample in samples) for samples in results.values()])


def first_attempt(results: Results) -> Estimate:
    """Mean correctness of the first final answer of a sample."""
    return share([mean(sample.first_correct for sample in samples) for samples in results.values()])


def pass_at_k(results: Results, k: int) -> Estimate:
    """Unbiased chance that one of k samples is right (an oracle picks): 1 - C(n - c, k) / C(n, k) of n with c right.

    Raises:
        ValueError: a problem has fewer than k samples.
    """
    values = []
    for samples in results.values():
        n, c = len(samples), sum(sample.correct for sample in samples)
        if n < k:
            raise ValueError(f"pass@{k} of {n} samples")
        values.append(1.0 - math.comb(n - c, k) / math.comb(n, k))
    return share(values)


def maj_at_k(results: Results, k: int) -> Estimate:
    """Correctness of the answer that most of k samples give; ties go to the earliest.

    The n samples are taken as n // k groups in their order, and averaged. Samples without an answer don't vote.

    Raises:
        ValueError: a problem has fewer than k samples.
    """
    values = []
    for samples in results.values():
        if len(samples) < k:
            raise ValueError(f"maj@{k} of {len(samples)} samples")
        groups = [samples[i : i + k] for i in range(0, len(samples) - k + 1, k)]
        values.append(mean(_majority_correct(group) for group in groups))
    return share(values)


def _majority_correct(group: Sequence[Graded]) -> bool:
    votes = Counter(sample.answer for sample in group if sample.answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # insertion order breaks ties
    return any(sample.correct for sample in group if sample.answer == winner)


def paired_difference(first: Results, second: Results) -> Estimate:
    """Mean of pass@1 of `first` minus `second` over the problems both have; mean ± 1.96 standard errors.

    Raises:
        ValueError: they share no problem.
    """
    shared = [key for key in first if key in second]
    if not shared:
        raise ValueError("no problem in common")
    deltas = [mean(s.correct for s in first[key]) - mean(s.correct for s in second[key]) for key in shared]
    half = _Z95 * stdev(deltas) / math.sqrt(len(deltas)) if len(deltas) > 1 else 0.0
    return Estimate(mean(deltas), mean(deltas) - half, mean(deltas) + half)


def token_matched_best_of_n(long: Results, short: Results) -> dict[str, float]:
    """What the `short` model's samples reach on the token budget of one response of the `long` one.

    n = mean tokens of a long response over those of a short one, at least 1, rounded down and capped by the samples
    there are. `pass` is best-of-n with an oracle verifier, `maj` with a majority vote.
    """
    budget = mean(s.num_tokens for samples in long.values() for s in samples)
    each = mean(s.num_tokens for samples in short.values() for s in samples)
    available = min(len(samples) for samples in short.values())
    affordable = max(1, int(budget / max(each, 1e-9)))
    n = min(affordable, available)
    return {
        "n": n,
        "affordable_n": affordable,
        "pass": pass_at_k(short, n).value,
        "maj": maj_at_k(short, n).value,
    }


def summarize(results: Results, majority: int = 8) -> dict[str, float | int | list[float] | None]:
    """Every metric of one model on one benchmark, JSON-able; `None` where it isn't defined.

    Intervals are `[low, high]`. `pass_at_k` and `maj_at_k` carry their k: the samples there are, and `majority` or
    fewer. Of all attempts, `right_attempts_kept` is the share of right ones that the model does not go back on,
    `wrong_attempts_left` the share of wrong ones that it does: how good its own verdicts are.
    """
    samples = [sample for group in results.values() for sample in group]
    num_samples = min(len(group) for group in results.values())
    summary: dict[str, float | int | list[float] | None] = {
        "num_problems": len(results),
        "num_samples": num_samples,
        "k": num_samples,
        "majority": min(majority, num_samples),
    }
    for name, estimate in {
        "pass_at_1": pass_at_1(results),
        "first_attempt": first_attempt(results),
        "pass_at_k": pass_at_k(results, num_samples),
        "maj_at_k": maj_at_k(results, min(majority, num_samples)),
    }.items():
        summary[name] = estimate.value
        summary[f"{name}_interval"] = [estimate.low, estimate.high]
    attempts = [attempt for sample in samples for attempt in sample.attempts]
    summary |= {
        "backtracks_per_response": mean(sample.num_backtracks for sample in samples),
        "responses_with_backtrack": mean(sample.num_backtracks > 0 for sample in samples),
        "attempts_per_response": len(attempts) / len(samples),
        "right_attempts_kept": _mean_or_none(not attempt.went_back for attempt in attempts if attempt.correct),
        "wrong_attempts_left": _mean_or_none(attempt.went_back for attempt in attempts if not attempt.correct),
        "repeated_attempts": _mean_or_none(attempt.repeated for attempt in attempts),
        "tokens_per_response": mean(sample.num_tokens for sample in samples),
        "tokens_right": _mean_or_none(sample.num_tokens for sample in samples if sample.correct),
        "tokens_wrong": _mean_or_none(sample.num_tokens for sample in samples if not sample.correct),
        "tokens": sum(sample.num_tokens for sample in samples),
        "truncated": mean(sample.truncated for sample in samples),
        "no_answer": mean(sample.answer is None for sample in samples),
    }
    return summary


def _mean_or_none(values: Iterable[float]) -> float | None:
    listed = list(values)
    return mean(listed) if listed else None
