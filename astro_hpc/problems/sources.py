"""Where problems come from: generated families, reasoning-gym, and files. Nothing is dropped without being counted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import (
    MixtureConfig,
    ProblemSource,
    ReasoningGymSource,
    SignsSource,
)
from astro_hpc.problems import signs
from astro_hpc.problems.account import LoadedProblems, SourceReport
from astro_hpc.problems.decontaminate import Overlap, Screen, text_key
from astro_hpc.problems.mixture import apportion, draw, shares
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.row_files import RowsSource, read_rows, source_name
from astro_hpc.problems.rows import UnusableRow, plain_level, read_row

_TRAIN_SHARE = 0.7
_MAX_DRAWS_PER_PROBLEM = 50


def load_source(source: ProblemSource) -> list[Problem]:
    """The problems of one source; `read_source` gives the report too."""
    return read_source(source)[0]


def read_source(source: ProblemSource) -> tuple[list[Problem], SourceReport]:
    """The problems of one source and what became of its rows.

    Raises:
        ConfigError: the source can't give what is asked of it.
    """
    loaded = read_sources([source])
    return loaded.problems, loaded.reports[0]


def read_sources(
    sources: Sequence[ProblemSource],
    benchmarks: Mapping[str, Sequence[Problem]] | None = None,
    ngram: int = 10,
    mixture: MixtureConfig | None = None,
) -> LoadedProblems:
    """The problems of all sources: screened, without repeated texts, limited, and mixed, in this order.

    Args:
        sources: read in this order; of equal texts the first is kept. Texts of rows are compared without regard to
            case, white space and LaTeX's spacing; generated texts as they are.
        benchmarks: problems to keep away from, by benchmark. A problem with the text of one is always dropped; one
            that shares half its n-grams with one only when it is a row (generated splits are disjoint by
            construction).
        ngram: words of an n-gram; 0 compares whole texts only.
        mixture: how much each source gives; None: all it has.

    Raises:
        ConfigError: a source can't give what is asked of it.
    """
    screen = Screen(benchmarks or {}, ngram)
    found: list[list[Problem]] = []
    reports: list[SourceReport] = []
    overlaps: list[Overlap] = []
    seen: dict[str, tuple[str, str]] = {}
    for source in sources:
        candidates, report = _candidates(source)
        is_generated = isinstance(source, SignsSource | ReasoningGymSource)
        fresh = []
        for place, problem in candidates:
            if (overlap := screen.overlap(problem, whole_texts=is_generated)) is not None:
                overlaps.append(overlap)
                report.contaminated += 1
            elif _is_first(problem, place, problem.text if is_generated else text_key(problem.text), seen, report):
                fresh.append(problem)
        chosen = fresh
        if not isinstance(source, SignsSource | ReasoningGymSource) and source.limit is not None:
            chosen = draw(fresh, source.limit, source.seed, "problems", "limit")
        report.used, report.over_limit = len(chosen), len(fresh) - len(chosen)
        found.append(chosen)
        reports.append(report)
    if mixture is not None:
        found = _mixed(found, reports, mixture)
    return LoadedProblems([problem for problems in found for problem in problems], reports, overlaps)


def _is_first(problem: Problem, place: str, key: str, seen: dict[str, tuple[str, str]], report: SourceReport) -> bool:
    """Whether no text of this key came before; if one did, it is noted as a duplicate."""
    if key not in seen:
        seen[key] = (place, problem.answer)
        return True
    first, answer = seen[key]
    report.duplicates.add(place, f"as {first}")
    if answer != problem.answer:
        report.conflicting.add(place, f"answer {problem.answer[:40]!r}, but {answer[:40]!r} at {first}")
    return False


def _mixed(found: list[list[Problem]], reports: list[SourceReport], mixture: MixtureConfig) -> list[list[Problem]]:
    if mixture.size is None and (empty := [r.name for r, left in zip(reports, found, strict=True) if not left]):
        raise ConfigError(
            f"problems.mixture: nothing of source {empty[0]!r} is left after screening, so no proportion can be kept; "
            "leave it out, or give mixture.size"
        )
    counts = shares([len(problems) for problems in found], mixture.weights, mixture.size)
    wanted = apportion(mixture.size or sum(counts), mixture.weights)
    for report, problems, count, share in zip(reports, found, counts, wanted, strict=True):
        report.used, report.outside_mixture = count, len(problems) - count
        report.short_of_share = max(0, share - count)
    return [
        draw(problems, count, mixture.seed, "problems", "mixture")
        for problems, count in zip(found, counts, strict=True)
    ]


def _candidates(source: ProblemSource) -> tuple[list[tuple[str, Problem]], SourceReport]:
    """(place, problem) of all that a source has, and the report on the rest."""
    if isinstance(source, SignsSource):
        problems = signs.generate(source)
        return [(f"item {i}", problem) for i, problem in enumerate(problems)], SourceReport("signs", len(problems))
    if isinstance(source, ReasoningGymSource):
        return _read_reasoning_gym(source)
    return _read_rows(source)


# --- rows of files and data sets ------------------------------------------------------------------------------


def _read_rows(source: RowsSource) -> tuple[list[tuple[str, Problem]], SourceReport]:
    report = SourceReport(source_name(source))
    policy = _policy(source)
    levels = None if source.levels is None else {plain_level(level) for level in source.levels}
    subjects = None if source.subjects is None else {subject.lower() for subject in source.subjects}
    found: list[tuple[str, Problem]] = []
    for place, row in read_rows(source):
        report.rows += 1
        try:
            if isinstance(row, UnusableRow):
                raise row
            fields = read_row(row, source.text_column, source.answer_column)
        except UnusableRow as error:
            report.unusable.add(place, str(error))
            continue
        level, subject = fields.metadata.get("level"), fields.metadata.get("subject", "")
        if (levels is not None and level not in levels) or (subjects is not None and subject.lower() not in subjects):
            report.filtered += 1
            continue
        problem_id = Problem.make_id(report.name, fields.text)
        found.append((place, Problem(problem_id, fields.text, fields.answer, "math", {**fields.metadata, **policy})))
    if not found:
        raise ConfigError(_nothing_usable(source, report))
    return found, report


def _policy(source: RowsSource) -> dict[str, Any]:
    policy = {key: value for key in ("percent", "units") if (value := getattr(source, key)) is not None}
    return {"answer_policy": policy} if policy else {}


def _nothing_usable(source: RowsSource, report: SourceReport) -> str:
    if report.unusable.count:
        where, reason = report.unusable.examples[0]
        return (
            f"{where}: {reason}; no row of {source.path} is usable "
            f"({report.unusable.count} of {report.rows} for such reasons)"
        )
    if report.filtered:
        return f"{source.path}: no row has the levels or subjects asked for, of {report.rows}; check them"
    return f"{source.path}: has no rows; give at least one problem"


# --- reasoning-gym --------------------------------------------------------------------------------------------


def _read_reasoning_gym(source: ReasoningGymSource) -> tuple[list[tuple[str, Problem]], SourceReport]:
    """Items in order until `count` different questions of the split are found.

    An item depends on (seed, index) only, and the verifier makes it again to score an answer. The split is a hash
    of the question, because different seeds give the same questions.
    """
    dataset = make_reasoning_gym(source.dataset, source.seed, source.params)
    problems: dict[str, tuple[str, Problem]] = {}
    report = SourceReport(f"reasoning_gym/{source.dataset}")
    index = 0
    while len(problems) < source.count:
        if index >= source.count * _MAX_DRAWS_PER_PROBLEM + 1000:
            raise ConfigError(
                f"problems: reasoning_gym {source.dataset!r} gave only {len(problems)} different problems of split "
                f"{source.split!r} in {index} items; lower count (now {source.count}) or widen params"
            )
        entry = dataset[index]
        text, answer = entry["question"], entry.get("answer")
        if _text_split(text) != source.split:
            report.filtered += 1
        elif text in problems:
            report.duplicates.add(f"item {index}", f"as {problems[text][0]}")
        else:
            metadata = {
                "dataset": source.dataset,
                "seed": source.seed,
                "params": dict(source.params),
                "index": index,
            }
            problem_id = Problem.make_id(report.name, text)
            gold = "" if answer is None else str(answer)
            problems[text] = (f"item {index}", Problem(problem_id, text, gold, "reasoning_gym", metadata))
        index += 1
    report.rows = index
    return list(problems.values()), report


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
