"""What the clone stage leaves of each tree: a journal while it works, and the data set made of one or more of them.

A journal holds, one a line: the verdicts on a tree's solutions, each trace as it is written, and a tree's finished
examples with the counts of its filters. The first two serve an interrupted stage alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astro_hpc.cloning.verbalize import Trace
from astro_hpc.config.base import ConfigError
from astro_hpc.run.files import Journal, write_json_atomic, write_jsonl_atomic
from astro_hpc.run.stage import StageContext

Key = tuple[int, int]
"""A tree's place: which source, and which tree of it."""

_GROUPS = {
    "trees": ("read", "unsolved", "no_sound_solution", "self_evaluation", "same_problem", "used"),
    "astro": ("wanted", "no_incorrect_terminal", "duplicate", "answer_changed", "too_long", "written"),
    "direct": ("wanted", "duplicate", "answer_changed", "too_long", "written", "repeats"),
    "verbalizer": (),
}
"""Counts that are shown also where they are 0."""


@dataclass
class Unfinished:
    """What an earlier attempt has left, without the finished trees' texts.

    Attributes:
        finished: trees whose examples are in the journal.
        accepted: ids of the solutions that passed self-evaluation, of trees that are not finished.
        traces: by name, of trees that are not finished.
    """

    finished: set[Key] = field(default_factory=set)
    accepted: dict[Key, list[int]] = field(default_factory=dict)
    traces: dict[Key, dict[str, Trace]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Unfinished:
        """What the journal at `path` holds; nothing where there is none."""
        found = cls()
        for record in Journal.read(path):
            key = (record["tree"][0], record["tree"][1])
            if record["kind"] == "verdicts":
                found.accepted[key] = record["accepted"]
            elif record["kind"] == "trace":
                found.traces.setdefault(key, {})[record["name"]] = Trace.from_json(record["trace"])
            else:
                found.finish(key)
        return found

    def finish(self, key: Key) -> None:
        """Forget what a tree needed until it was finished."""
        self.finished.add(key)
        self.accepted.pop(key, None)
        self.traces.pop(key, None)


def verdicts_record(key: Key, accepted: Sequence[int], counts: Mapping[str, int]) -> dict[str, Any]:
    """The solutions of a tree that passed self-evaluation."""
    return {"kind": "verdicts", "tree": key, "accepted": list(accepted), "counts": {"trees": dict(counts)}}


def trace_record(key: Key, name: str, trace: Trace) -> dict[str, Any]:
    """A written trace."""
    return {"kind": "trace", "tree": key, "name": name, "trace": trace.to_json()}


def tree_record(key: Key, problem_id: str, examples: Mapping[str, Any]) -> dict[str, Any]:
    """A finished tree, with `TreeExamples.to_json()`."""
    return {"kind": "tree", "tree": key, "problem_id": problem_id, **examples}


@dataclass
class Records:
    """What journals hold, without the texts.

    Attributes:
        report: what each filter took, lengths in tokens: `filters.json`.
        places: (problem id, number of the journal, offset) of each tree with examples, in the order of problem ids.
    """

    report: dict[str, Any]
    places: list[tuple[str, int, int]]


def read_records(ctx: StageContext, journals: Sequence[Path]) -> Records:
    """Go through journals once."""
    summary = _Summary()
    places: list[tuple[str, int, int]] = []
    for number, path in enumerate(journals):
        for offset, record in Journal.read_with_offsets(path):
            summary.add(record)
            if record["kind"] == "tree" and (record["rows"]["astro"] or record["rows"]["direct"]):
                places.append((record["problem_id"], number, offset))
    return Records(summary.report(ctx.cfg.sft.seq_length), sorted(places))


def write_data_set(ctx: StageContext, journals: Sequence[Path]) -> list[Path]:
    """Write `astro.jsonl`, `direct.jsonl` and `filters.json` into the stage's folder.

    Rows are in the order of problem ids, so neither the order of trees nor that of journals shows. Of the journals
    only ids and places are held, never texts.

    Raises:
        ConfigError: no tree gives an example; `filters.json` is written all the same.
    """
    records = read_records(ctx, journals)

    def rows(arm: str) -> Iterator[dict[str, Any]]:
        for _, number, offset in records.places:
            yield from Journal.read_at(journals[number], offset)["rows"][arm]

    filters = ctx.dir / "filters.json"
    write_json_atomic(filters, records.report)
    if not records.report["astro"]["written"]:
        raise ConfigError(
            f"clone: none of {records.report['trees']['read']} trees gives an example (see {filters}); "
            "search with more iterations or rollouts, or easier problems"
        )
    paths = [ctx.dir / "astro.jsonl", ctx.dir / "direct.jsonl"]
    for path in paths:
        write_jsonl_atomic(path, rows(path.stem))
    lengths = records.report["num_tokens"].values()
    ctx.count(**records.report, trace_tokens=sum(spread.get("sum", 0) for spread in lengths))
    return [*paths, filters]


class _Summary:
    """Sums over records; its size does not depend on their number."""

    def __init__(self) -> None:
        self.counts = {name: Counter(dict.fromkeys(shown, 0)) for name, shown in _GROUPS.items()}
        self.lengths: dict[str, Counter[int]] = {"astro": Counter(), "direct": Counter()}
        self.longest_too_long = 0

    def add(self, record: Mapping[str, Any]) -> None:
        for group, counts in record.get("counts", {}).items():
            self.counts[group].update(counts)
        if record["kind"] == "tree":
            for arm, rows in record["rows"].items():
                self.lengths[arm].update(row["num_tokens"] for row in rows)
            self.longest_too_long = max(self.longest_too_long, *record["too_long"], 0)

    def report(self, limit: int) -> dict[str, Any]:
        return {
            **{name: _in_order(counts, _GROUPS[name]) for name, counts in self.counts.items()},
            "num_tokens": {arm: _spread(lengths) for arm, lengths in self.lengths.items()},
            "max_tokens": limit,
            "longest_too_long": self.longest_too_long,
        }


def _in_order(counts: Counter[str], first: Sequence[str]) -> dict[str, int]:
    """Named counts first, the others by name: the order of records doesn't show."""
    return {name: counts[name] for name in [*first, *sorted(counts.keys() - set(first))]}


def _spread(lengths: Counter[int]) -> dict[str, float]:
    """Mean, quantiles (each a length that occurs), largest and sum; nothing where lengths were not counted."""
    total = lengths.total()
    if not total or max(lengths) == 0:
        return {}
    ordered = sorted(lengths.items())
    spread: dict[str, float] = {"mean": round(sum(n * c for n, c in ordered) / total, 1)}
    for percent in (50, 90, 95, 99):
        rank, below = -(-total * percent // 100), 0
        for length, count in ordered:
            below += count
            if below >= rank:
                spread[f"p{percent}"] = length
                break
    return {**spread, "max": ordered[-1][0], "sum": sum(n * c for n, c in ordered)}
