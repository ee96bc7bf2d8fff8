"""Where problems come from: generated families, reasoning-gym, and files. Nothing is dropped without being counted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import JsonlSource, ProblemSource, ReasoningGymSource, SignsSource
from astro_hpc.problems import signs
from astro_hpc.problems.decontaminate import Overlap, decontaminate
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.rows import UnusableRow, read_numbered, read_row
from astro_hpc.run.seeds import derive_seed

_TRAIN_SHARE = 0.7
_MAX_DRAWS_PER_PROBLEM = 50


@dataclass(frozen=True)
class SourceReport:
    """What became of a source's rows: `rows = used + filtered + over_limit + len(duplicates) + len(unusable)`.

    Attributes:
        name: of the source, as in the problems' ids.
        rows: rows read, or items generated.
        used: problems that were returned.
        filtered: rows of other levels or subjects, or of the other split.
        over_limit: usable rows left out by `limit`.
        duplicates: places (`FILE:LINE`) of rows whose text came before.
        unusable: (place, reason) of rows that make no problem.
    """

    name: str
    rows: int
    used: int
    filtered: int = 0
    over_limit: int = 0
    duplicates: tuple[str, ...] = ()
    unusable: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For manifests and reports."""
        return {
            "name": self.name,
            "rows": self.rows,
            "used": self.used,
            "filtered": self.filtered,
            "over_limit": self.over_limit,
            "duplicates": list(self.duplicates),
            "unusable": [{"where": where, "reason": reason} for where, reason in self.unusable],
        }

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.used} of {self.rows} used"]
        parts += [f"{self.filtered} filtered"] if self.filtered else []
        parts += [f"{self.over_limit} over the limit"] if self.over_limit else []
        parts += [f"{len(self.duplicates)} duplicates"] if self.duplicates else []
        if self.unusable:
            where, reason = self.unusable[0]
            parts += [f"{len(self.unusable)} unusable (first: {where}: {reason})"]
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

    def to_json(self) -> dict[str, Any]:
        """The account alone, for manifests."""
        return {
            "problems": len(self.problems),
            "sources": [report.to_json() for report in self.reports],
            "decontaminated": [overlap.to_json() for overlap in self.overlaps],
        }


def load_source(source: ProblemSource) -> list[Problem]:
    """The problems of one source; `read_source` gives the report too."""
    return read_source(source)[0]


def read_source(source: ProblemSource) -> tuple[list[Problem], SourceReport]:
    """The problems of one source and what became of its rows.

    Raises:
        ConfigError: the source can't give what is asked of it; a file's error names the line.
    """
    if isinstance(source, SignsSource):
        problems = signs.generate(source)
        return problems, SourceReport("signs", len(problems), len(problems))
    if isinstance(source, ReasoningGymSource):
        return _read_reasoning_gym(source)
    return _read_jsonl(source)


def load_sources(sources: Sequence[ProblemSource], exclude: Iterable[Problem] = (), ngram: int = 10) -> list[Problem]:
    """The problems of all sources; `read_sources` gives the account too."""
    return read_sources(sources, exclude, ngram).problems


def read_sources(sources: Sequence[ProblemSource], exclude: Iterable[Problem] = (), ngram: int = 10) -> LoadedProblems:
    """The problems of all sources, without repeated texts and without those that resemble `exclude`'s.

    Args:
        sources: read in this order; of equal texts the first is kept.
        exclude: benchmark problems. A problem with the text of one is always dropped; one that shares half its
            n-grams with one only when it comes from a file (generated splits are disjoint by construction).
        ngram: words of an n-gram; 0 compares whole texts only.
    """
    benchmark = list(exclude)
    problems: list[Problem] = []
    reports: list[SourceReport] = []
    overlaps: list[Overlap] = []
    seen: set[str] = set()
    for source in sources:
        found, report = read_source(source)
        kept, dropped = decontaminate(found, benchmark, ngram if isinstance(source, JsonlSource) else 0)
        overlaps += dropped
        fresh = [problem for problem in kept if problem.text not in seen]
        repeated = tuple(problem.id for problem in kept if problem.text in seen)
        seen.update(problem.text for problem in fresh)
        problems += fresh
        reports.append(_with_duplicates(report, repeated))
    return LoadedProblems(problems, reports, overlaps)


def _with_duplicates(report: SourceReport, repeated: tuple[str, ...]) -> SourceReport:
    if not repeated:
        return report
    changed = vars(report) | {"used": report.used - len(repeated), "duplicates": report.duplicates + repeated}
    return SourceReport(**changed)


# --- JSON Lines -----------------------------------------------------------------------------------------------


def _read_jsonl(source: JsonlSource) -> tuple[list[Problem], SourceReport]:
    name = source.name or source.path.stem
    problems: dict[str, Problem] = {}
    unusable: list[tuple[str, str]] = []
    duplicates: list[str] = []
    rows = filtered = 0
    for number, row in read_numbered(source.path):
        rows, place = rows + 1, f"{source.path}:{number}"
        try:
            fields = read_row(row)
        except UnusableRow as error:
            unusable.append((place, str(error)))
            continue
        if not _wanted(fields.metadata, source):
            filtered += 1
        elif fields.text in problems:
            duplicates.append(place)
        else:
            metadata = {**fields.metadata, **_policy(source)}
            problem_id = Problem.make_id(name, fields.text)
            problems[fields.text] = Problem(problem_id, fields.text, fields.answer, "math", metadata)
    if not problems:
        raise ConfigError(_nothing_usable(source, rows, filtered, unusable))
    chosen = _limited(list(problems.values()), source)
    over_limit = len(problems) - len(chosen)
    return chosen, SourceReport(name, rows, len(chosen), filtered, over_limit, tuple(duplicates), tuple(unusable))


def _wanted(metadata: Mapping[str, Any], source: JsonlSource) -> bool:
    level, subject = metadata.get("level"), metadata.get("subject")
    if source.levels is not None and level not in {_plain_level(wanted) for wanted in source.levels}:
        return False
    return source.subjects is None or (subject or "").lower() in {wanted.lower() for wanted in source.subjects}


def _plain_level(level: str) -> str:
    return level.removeprefix("Level ").strip()


def _policy(source: JsonlSource) -> dict[str, Any]:
    policy = {key: value for key in ("percent", "units") if (value := getattr(source, key, None)) is not None}
    return {"answer_policy": policy} if policy else {}


def _limited(problems: list[Problem], source: JsonlSource) -> list[Problem]:
    """`limit` of the problems, drawn with `seed`, in the file's order."""
    if source.limit is None or source.limit >= len(problems):
        return problems
    rng = random.Random(derive_seed(source.seed, "jsonl", "limit"))
    return [problems[i] for i in sorted(rng.sample(range(len(problems)), source.limit))]


def _nothing_usable(source: JsonlSource, rows: int, filtered: int, unusable: list[tuple[str, str]]) -> str:
    if unusable:
        where, reason = unusable[0]
        return f"{where}: {reason}; no row of the file is usable ({len(unusable)} of {rows} for such reasons)"
    if filtered:
        return f"{source.path}: no row has the levels or subjects asked for ({rows} rows); check levels and subjects"
    return f"{source.path}: has no rows; give a file with one problem a line"


# --- reasoning-gym --------------------------------------------------------------------------------------------


def _read_reasoning_gym(source: ReasoningGymSource) -> tuple[list[Problem], SourceReport]:
    """Items in order until `count` different questions of the split are found.

    An item depends on (seed, index) only, and the verifier makes it again to score an answer. The split is a hash
    of the question, because different seeds give the same questions.
    """
    dataset = make_reasoning_gym(source.dataset, source.seed, source.params)
    problems: dict[str, Problem] = {}
    duplicates: list[str] = []
    filtered = index = 0
    while len(problems) < source.count:
        if index >= source.count * _MAX_DRAWS_PER_PROBLEM + 1000:
            raise ConfigError(
                f"problems: reasoning_gym {source.dataset!r} gave only {len(problems)} different problems of split "
                f"{source.split!r} in {index} items; lower count (now {source.count}) or widen params"
            )
        entry = dataset[index]
        text, answer = entry["question"], entry.get("answer")
        if _text_split(text) != source.split:
            filtered += 1
        elif text in problems:
            duplicates.append(f"item {index}")
        else:
            metadata = {
                "dataset": source.dataset,
                "seed": source.seed,
                "params": dict(source.params),
                "index": index,
            }
            problem_id = Problem.make_id(f"reasoning_gym/{source.dataset}", text)
            problems[text] = Problem(problem_id, text, "" if answer is None else str(answer), "reasoning_gym", metadata)
        index += 1
    found = list(problems.values())
    return found, SourceReport(f"reasoning_gym/{source.dataset}", index, len(found), filtered, 0, tuple(duplicates))


def make_reasoning_gym(dataset: str, seed: int, params: Mapping[str, Any]) -> Any:
    """The generator; item i of it depends on (seed, i) only.

    Raises:
        ConfigError: there is no such generator, or it refuses the parameters.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        from difflib import get_close_matches

        near = get_close_matches(dataset, list(DATASETS), n=3) or sorted(DATASETS)[:3]
        raise ConfigError(f"problems: reasoning_gym has no dataset {dataset!r}; nearest: {', '.join(near)}")
    try:
        return reasoning_gym.create_dataset(dataset, **{"size": 2**31 - 1, **dict(params), "seed": seed})
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"problems: reasoning_gym {dataset!r} refuses params {dict(params)}: {error}") from None


def _text_split(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "train" if int.from_bytes(digest[:8], "big") < _TRAIN_SHARE * 2**64 else "heldout"
