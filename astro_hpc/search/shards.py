"""Shards of a stage: which problems each has, where they lie; and a search's put together. Needs no engine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.problems.problem import Problem
from astro_hpc.run.files import Journal, write_json_atomic, write_jsonl_atomic
from astro_hpc.search.statistics import SearchCost, SearchStatistics
from astro_hpc.search.tree import Tree

SHARD_FOLDERS = {"search": "search", "clone": "clone", "select": "select-shards/{arm}", "eval": "eval-shards"}
"""By stage that may be done in shards: where its shards lie, relative to the run folder."""
WHOLE_FOLDERS = {
    "search": "search/shard-00000-of-00001",
    "clone": "traces",
    "select": "select/{arm}",
    "eval": "eval",
}
"""By such a stage: where its results lie when one process does it all; gathered shards too, but for the search."""
TREES, ATTEMPTS = "trees.jsonl", "attempts.jsonl"
"""Journals of a shard: its finished trees, and what each of its attempts cost."""


def shard_of(problem_id: str, num_shards: int) -> int:
    """Which shard a problem belongs to: a hash of its id, so that adding problems moves none."""
    return int.from_bytes(hashlib.sha256(problem_id.encode()).digest()[:8], "big") % num_shards


def in_shard(problems: Iterable[Problem], shard: int, num_shards: int) -> list[Problem]:
    """The problems of one shard."""
    return [problem for problem in problems if shard_of(problem.id, num_shards) == shard]


def shard_name(shard: int, num_shards: int) -> str:
    """Folder of a shard, for instance `shard-00003-of-00064`."""
    if not 0 <= shard < num_shards:
        raise ConfigError(f"--shard {shard}: must be from 0 to {num_shards - 1} with --num-shards {num_shards}")
    return f"shard-{shard:05d}-of-{num_shards:05d}"


@dataclass(frozen=True)
class Shards:
    """The shards of one stage that have a folder.

    Attributes:
        dir: where they lie.
        num_shards: into how many the problems are split.
        present: their numbers, in order.
    """

    dir: Path
    num_shards: int
    present: tuple[int, ...]

    @property
    def missing(self) -> list[int]:
        """Shards that nobody has begun."""
        return sorted(set(range(self.num_shards)) - set(self.present))

    def folder(self, shard: int) -> Path:
        """A shard's folder."""
        return self.dir / shard_name(shard, self.num_shards)


def find_shards(parent: Path) -> Shards | None:
    """The shards that lie in a folder, finished or not; None when there is none.

    Raises:
        ConfigError: shards of different splits lie side by side.
    """
    names = [folder.name for folder in parent.glob("shard-?????-of-?????") if folder.is_dir()]
    splits = sorted({int(name[-5:]) for name in names})
    if len(splits) > 1:
        raise ConfigError(
            f"{parent}: shards of different splits ({', '.join(map(str, splits))}); move the stale ones away"
        )
    return Shards(parent, splits[0], tuple(sorted(int(name[6:11]) for name in names))) if splits else None


def refuse_other_split(parent: Path, num_shards: int) -> None:
    """Make sure that shards which lie in a folder already are of the same split.

    Raises:
        ConfigError: they are of another, or of several.
    """
    begun = find_shards(parent)
    if begun is not None and begun.num_shards != num_shards:
        raise ConfigError(
            f"{parent}: is split into {begun.num_shards} already; go on with --num-shards {begun.num_shards}, "
            "or move its shards away"
        )


def made_in_one_process(run_dir: Path, stage: str, arm: str | None = None) -> Path | None:
    """What says that a stage was done (`manifest.json`), or begun (`state.json`), in one process.

    Args:
        stage: one of `WHOLE_FOLDERS`.

    Returns:
        The file; None where the stage was not begun, or in shards, or lies there gathered from them.
    """
    folder = run_dir / WHOLE_FOLDERS[stage].format(arm=arm)
    shards = (run_dir / SHARD_FOLDERS[stage].format(arm=arm)).glob("shard-?????-of-?????")
    if any(shard != folder for shard in shards):
        return None
    made = next((path for name in ("manifest.json", "state.json") if (path := folder / name).is_file()), None)
    if made is None or {path.name for path in folder.iterdir()} <= {"state.json"}:  # refused before it made anything
        return None
    shard = re.compile(f"{stage}/" + (f"{arm}/" if arm else "") + r"shard-\d{5}-of-\d{5}")  # a stage's label
    gathered = any(shard.fullmatch(name) for name in json.loads(made.read_text()).get("inputs", {}))
    return None if gathered else made


def refuse_in_one_process(run_dir: Path, stage: str, arm: str | None = None) -> None:
    """Make sure that a stage that is to be done in shards was not done, or begun, in one process.

    Raises:
        ConfigError: it was.
    """
    if (made := made_in_one_process(run_dir, stage, arm)) is not None:
        verb = "done" if made.name == "manifest.json" else "begun"
        raise ConfigError(
            f"{made.parent}: was {verb} in one process; go on without --shard and --num-shards, or move it away"
        )


def earlier_trees(folder: Path, other_settings: set[str], other_inputs: set[str]) -> list[Path]:
    """Journals of this shard that `--redo` has set aside and whose trees are as this search would build them.

    A tree depends on its problem and not on the others: where the problems alone have changed, finished trees stay.

    Args:
        folder: the shard's, its `state.json` written.
        other_settings: settings that may differ.
        other_inputs: inputs that may differ.
    """

    def rest(facts: dict[str, Any]) -> list[Any]:
        settings = {key: value for key, value in facts["settings_values"].items() if key not in other_settings}
        return [settings, {key: value for key, value in facts["inputs"].items() if key not in other_inputs}]

    wanted = json.loads((folder / "state.json").read_text())
    found = []
    for aside in sorted(folder.parent.glob(f"{folder.name}.old-*")):
        state = aside / "state.json"
        if state.exists() and rest(json.loads(state.read_text())) == rest(wanted):
            found.append(aside / TREES)
    return found


def read_trees(path: Path) -> Iterator[Tree]:
    """The finished trees of a shard's journal, one at a time."""
    for row in Journal.read(path):
        yield Tree.from_json(row)


@dataclass
class GatherReport:
    """What `gather` found.

    Attributes:
        path: the merged trees, plain JSON Lines.
        num_shards: into how many shards the problems are split.
        missing_shards: those that nobody has begun.
        unfinished_shards: begun, and not finished yet.
        statistics: of the merged trees.
        cost: what all attempts that ended in order took together.
        holes: ids of problems without a tree.
        duplicates: ids that came up again; the first tree is kept.
        strangers: ids of trees whose problem isn't wanted, or which lie in another shard than they should; left out.
    """

    path: Path
    num_shards: int
    missing_shards: list[int] = field(default_factory=list)
    unfinished_shards: list[int] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    holes: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every problem has its tree."""
        return not self.holes

    def to_json(self) -> dict[str, Any]:
        """For `--json` and reports."""
        return {**vars(self), "path": str(self.path), "complete": self.complete}

    def lines(self) -> list[str]:
        """For people."""
        trees, solved = self.statistics["trees"], self.statistics["valid_trees"]
        lines = [f"{trees} trees of {self.num_shards} shards in {self.path}; {solved} hold a right answer"]
        findings: dict[str, Sequence[object]] = {
            "shards not begun": self.missing_shards,
            "shards not finished": self.unfinished_shards,
            "problems without a tree": self.holes,
            "trees that came twice (the first is kept)": self.duplicates,
            "trees of other problems or in the wrong shard (left out)": self.strangers,
        }
        for what, found in findings.items():
            if found:
                shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
                lines.append(f"{len(found)} {what}: {shown}")
        return lines


def gather(run_dir: Path, wanted: Iterable[Problem]) -> GatherReport:
    """Merge all shards' journals into `search/trees.jsonl`, and say what is missing in `search/gather.json`.

    Finished and running shards alike: a running one simply has holes yet. One tree is in memory at a time; besides
    it, only the ids of the wanted problems are.

    Args:
        wanted: the problems that should have a tree.

    Raises:
        ConfigError: there are no shards, shards of different splits, or a damaged journal.
    """
    shards = find_shards(run_dir / "search")
    if shards is None:
        raise ConfigError(f"{run_dir / 'search'}: no shards; run `astro-hpc search` first")
    report = GatherReport(shards.dir / TREES, shards.num_shards, missing_shards=shards.missing)
    statistics, cost = SearchStatistics(), SearchCost()
    missing = {problem.id: True for problem in wanted}

    def rows() -> Iterator[dict[str, Any]]:
        for shard in shards.present:
            folder = shards.folder(shard)
            if not (folder / "manifest.json").exists():
                report.unfinished_shards.append(shard)
            for attempt in Journal.read(folder / ATTEMPTS):
                cost.add(attempt)
            for row in Journal.read(folder / TREES):
                problem_id = row["problem"]["id"]
                if problem_id not in missing or shard_of(problem_id, shards.num_shards) != shard:
                    report.strangers.append(problem_id)
                elif not missing[problem_id]:
                    report.duplicates.append(problem_id)
                else:
                    missing[problem_id] = False
                    statistics.add(Tree.from_json(row))
                    yield row

    write_jsonl_atomic(report.path, rows())
    report.holes = [problem_id for problem_id, absent in missing.items() if absent]
    report.statistics, report.cost = statistics.to_json(), cost.to_json()
    write_json_atomic(shards.dir / "gather.json", report.to_json())
    return report
