"""Keeping benchmark problems out of training data."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from astro_hpc.problems.problem import Problem

_WORD = re.compile(r"[a-z]+|\d+|[^\sa-z\d]")
_SHARED = 0.5


@dataclass(frozen=True)
class Overlap:
    """A problem that was dropped.

    Attributes:
        problem_id: the dropped problem.
        benchmark_id: the benchmark problem that it resembles most.
        share: n-grams of the smaller text that both hold, over all of it; 1.0 for equal texts.
    """

    problem_id: str
    benchmark_id: str
    share: float

    def to_json(self) -> dict[str, Any]:
        """For manifests."""
        return {"problem": self.problem_id, "benchmark": self.benchmark_id, "share": round(self.share, 4)}


def decontaminate(
    problems: Sequence[Problem], benchmark: Sequence[Problem], ngram: int
) -> tuple[list[Problem], list[Overlap]]:
    """Split problems into those to keep and those that resemble a benchmark problem.

    A problem goes when it shares at least half of its own or of the benchmark problem's n-grams. Words are runs of
    letters or of digits, lower-cased, and single other signs; white space and `$` don't count. A text shorter than
    `ngram` words is one n-gram, so it must be equal.

    Args:
        problems: candidates for training.
        benchmark: problems to keep away from.
        ngram: words of an n-gram; 0 drops equal texts only.
    """
    texts = {_key(words(problem.text)): problem.id for problem in benchmark}
    index: dict[tuple[str, ...], set[int]] = defaultdict(set)
    sizes: list[int] = []
    if ngram:
        for number, problem in enumerate(benchmark):
            grams = _ngrams(words(problem.text), ngram)
            sizes.append(len(grams))
            for gram in grams:
                index[gram].add(number)
    kept, dropped = [], []
    for problem in problems:
        tokens = words(problem.text)
        overlap: tuple[float, str] | None = None
        if (same := texts.get(_key(tokens))) is not None:
            overlap = (1.0, same)
        elif ngram:
            share, number = _most_shared(_ngrams(tokens, ngram), index, sizes)
            overlap = (share, benchmark[number].id) if share >= _SHARED else None
        if overlap is None:
            kept.append(problem)
        else:
            dropped.append(Overlap(problem.id, overlap[1], overlap[0]))
    return kept, dropped


def words(text: str) -> list[str]:
    """The words of a text as overlap counts them."""
    return [word for word in _WORD.findall(text.lower()) if word != "$"]


def _key(tokens: list[str]) -> str:
    return " ".join(tokens)


def _ngrams(tokens: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + size]) for i in range(max(1, len(tokens) - size + 1))}


def _most_shared(
    grams: set[tuple[str, ...]], index: dict[tuple[str, ...], set[int]], sizes: list[int]
) -> tuple[float, int]:
    """(largest share, benchmark number) over the benchmark problems."""
    counts: dict[int, int] = defaultdict(int)
    for gram in grams:
        for number in index.get(gram, ()):
            counts[number] += 1
    return max(
        ((count / min(len(grams), sizes[number]), number) for number, count in counts.items()), default=(0.0, -1)
    )
