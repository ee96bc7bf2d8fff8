"""What became of every row: nothing is dropped without being counted, and the first few are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astro_hpc.problems.decontaminate import Overlap
from astro_hpc.problems.problem import Problem
from astro_hpc.run.files import write_json_atomic

_NAMED = 20


@dataclass
class Noted:
    """Rows that were left out: how many, and (place, reason) of the first twenty."""

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """One more."""
        self.count += 1
        if len(self.examples) < _NAMED:
            self.examples.append((place, reason))

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        return {"count": self.count, "first": [{"where": where, "reason": reason} for where, reason in self.examples]}

    def __str__(self) -> str:
        if not self.examples:
            return str(self.count)
        where, reason = self.examples[0]
        return f"{self.count} (first: {where}: {reason})"


@dataclass
class SourceReport:
    """What became of a source's rows: `rows` is the sum of all the other counts.

    Attributes:
        name: of the source, as in the problems' ids.
        rows: rows read, or items generated.
        used: problems that were returned.
        filtered: rows of other levels or subjects, or of the other split.
        unusable: rows that make no problem.
        contaminated: problems that resemble a benchmark's.
        duplicates: rows whose text came before, here or in an earlier source.
        conflicting: those of them whose answer is another one; the first is kept.
        over_limit: usable rows left out by `limit`.
        outside_mixture: usable rows left out by the mixture's proportions.
        short_of_share: problems that the mixture asked for and the source didn't have.
    """

    name: str
    rows: int = 0
    used: int = 0
    filtered: int = 0
    unusable: Noted = field(default_factory=Noted)
    contaminated: int = 0
    duplicates: Noted = field(default_factory=Noted)
    conflicting: Noted = field(default_factory=Noted)
    over_limit: int = 0
    outside_mixture: int = 0
    short_of_share: int = 0

    def to_json(self) -> dict[str, Any]:
        """For manifests and reports."""
        return {name: value.to_json() if isinstance(value, Noted) else value for name, value in vars(self).items()}

    def __str__(self) -> str:
        shown = {
            "filtered": self.filtered,
            "over the limit": self.over_limit,
            "outside the mixture": self.outside_mixture,
            "like a benchmark's": self.contaminated,
            "duplicates": self.duplicates.count,
            "of them with another answer": self.conflicting,
            "unusable": self.unusable,
        }
        parts = [f"{self.name}: {self.used:,} of {self.rows:,} used"]
        for what, left_out in shown.items():
            if isinstance(left_out, Noted) and left_out.count:
                where, reason = left_out.examples[0]
                parts.append(f"{left_out.count:,} {what} (first: {where}: {reason})")
            elif isinstance(left_out, int) and left_out:
                parts.append(f"{left_out:,} {what}")
        if self.short_of_share:
            parts.append(f"{self.short_of_share:,} fewer than its share, so all are used and others fill up")
        return ", ".join(parts)


@dataclass(frozen=True)
class LoadedProblems:
    """Problems with the account of how they came about.

    Attributes:
        problems: in the sources' order, of different texts.
        reports: one a source.
        overlaps: problems dropped because they resemble a benchmark's.
    """

    problems: list[Problem]
    reports: list[SourceReport]
    overlaps: list[Overlap] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Counts alone, for manifests."""
        sources = [
            {key: value["count"] if isinstance(value, dict) else value for key, value in report.to_json().items()}
            for report in self.reports
        ]
        return {"problems": len(self.problems), "sources": sources, "contaminated": self._by_benchmark()}

    def to_json(self) -> dict[str, Any]:
        """The whole account: counts, the first places and reasons, and every problem like a benchmark's."""
        return {
            "problems": len(self.problems),
            "sources": [report.to_json() for report in self.reports],
            "contaminated": {
                "count": len(self.overlaps),
                "by_benchmark": self._by_benchmark(),
                "dropped": [overlap.to_json() for overlap in self.overlaps],
            },
        }

    def report(self, path: Path, say: Callable[[str], None]) -> None:
        """Write the whole account to `path`, and say it in a line a source."""
        write_json_atomic(path, self.to_json())
        for report in self.reports:
            say(str(report))
        if self.overlaps:
            of = ", ".join(f"{name} {count}" for name, count in self._by_benchmark().items())
            say(f"{len(self.overlaps)} problems dropped that resemble a benchmark's ({of}); named in {path}")

    def _by_benchmark(self) -> dict[str, int]:
        return dict(Counter(overlap.benchmark for overlap in self.overlaps))
