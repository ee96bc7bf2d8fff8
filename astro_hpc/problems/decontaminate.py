"""Keeping benchmark problems out of training data."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astro_hpc.problems.problem import Problem

_SPACING = re.compile(r"\\(?:left|right|displaystyle|textstyle|quad|qquad|[bB]igg?[lr]?)(?![A-Za-z])|\\[,;:! ]|~|\$")
_FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
_WORD = re.compile(r"[a-z]+|\d+|[^\sa-z\d]")
_SHARED = 0.5


@dataclass(frozen=True)
class Overlap:
    """A problem that was dropped.

    Attributes:
        problem_id: the dropped problem.
        benchmark: whose problem it resembles most.
        benchmark_id: that problem.
        share: n-grams of the smaller text that both hold, over all of it; 1.0 for equal texts.
    """

    problem_id: str
    benchmark: str
    benchmark_id: str
    share: float

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        return {
            "problem": self.problem_id,
            "benchmark": self.benchmark,
            "benchmark_problem": self.benchmark_id,
            "share": round(self.share, 4),
        }


class Screen:
    """Tells problems that resemble a benchmark's.

    One does when it shares at least half of its own or of the benchmark problem's n-grams. Words are runs of letters
    or of digits, lower-cased, and single other signs; white space, `$` and LaTeX's spacing don't count. A text shorter
    than an n-gram is one n-gram, so it must be equal.
    """

    def __init__(self, benchmarks: Mapping[str, Sequence[Problem]], ngram: int) -> None:
        """`benchmarks` are the problems to keep away from, `ngram` the words of an n-gram; 0 compares whole texts."""
        self._ngram = ngram
        self._problems = [(name, problem.id) for name, members in benchmarks.items() for problem in members]
        self._texts: dict[str, int] = {}
        self._index: dict[tuple[str, ...], set[int]] = defaultdict(set)
        self._sizes: list[int] = []
        for number, problem in enumerate(problem for members in benchmarks.values() for problem in members):
            tokens = words(problem.text)
            self._texts.setdefault(" ".join(tokens), number)
            if ngram:
                grams = _ngrams(tokens, ngram)
                self._sizes.append(len(grams))
                for gram in grams:
                    self._index[gram].add(number)

    def overlap(self, problem: Problem, whole_texts: bool = False) -> Overlap | None:
        """The benchmark problem that this one resembles most; None when it resembles none.

        Args:
            problem: a candidate for training.
            whole_texts: compare whole texts only.
        """
        tokens = words(problem.text)
        share, number = 1.0, self._texts.get(" ".join(tokens), -1)
        if number < 0 and self._ngram and not whole_texts:
            share, number = self._most_shared(_ngrams(tokens, self._ngram))
        if number < 0 or share < _SHARED:
            return None
        name, problem_id = self._problems[number]
        return Overlap(problem.id, name, problem_id, share)

    def _most_shared(self, grams: set[tuple[str, ...]]) -> tuple[float, int]:
        """(largest share, number) over the benchmark problems."""
        counts: dict[int, int] = defaultdict(int)
        for gram in grams:
            for number in self._index.get(gram, ()):
                counts[number] += 1
        shared = ((count / min(len(grams), self._sizes[number]), -number) for number, count in counts.items())
        share, number = max(shared, default=(0.0, 1))
        return share, -number


def words(text: str) -> list[str]:
    """The words of a text as overlap counts them."""
    plain = unicodedata.normalize("NFKC", text)
    return _WORD.findall(_FRACTION.sub(r"\\frac", _SPACING.sub(" ", plain)).lower())


def text_key(text: str) -> str:
    """Equal for texts that differ in case, white space and LaTeX's spacing only."""
    return " ".join(words(text))


def _ngrams(tokens: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + size]) for i in range(max(1, len(tokens) - size + 1))}
