"""The search stage: a shard of the training problems becomes a journal of trees; `gather` puts shards together."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ProblemSource, RunConfig
from astro_hpc.inference import make_engine
from astro_hpc.inference.engine import Engine
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.sources import LoadedProblems, load_source, read_sources
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.files import Journal, Lock, write_jsonl_atomic
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.search.driver import Stopped, search_problems
from astro_hpc.search.mcts import SearchTools
from astro_hpc.search.statistics import SearchStatistics
from astro_hpc.search.steps import StepCutter
from astro_hpc.search.tree import Tree
from astro_hpc.verifier.pool import VerifierPool


def run(ctx: StageContext, *, model_dir: Path, shard: int = 0, num_shards: int = 1) -> list[Path]:
    """Search the shard's problems; trees that the journal holds already are kept.

    `trees.jsonl` is a `Journal`: one finished tree (`Tree.to_json`) a line, durable before the next. A killed
    shard loses the trees in flight and nothing else.

    Raises:
        ConfigError: another process is at this shard, or no problem falls into it.
        CheckpointedExit: the stage was asked to stop; finished trees are in the journal.
        RuntimeError: some trees failed; the others are in the journal and the next attempt redoes those.
    """
    cfg = ctx.cfg
    loaded = training_problems(cfg)
    for report in loaded.reports:
        ctx.say(str(report))
    if loaded.overlaps:
        ctx.say(f"{len(loaded.overlaps)} problems dropped because they resemble a benchmark's")
    problems = in_shard(loaded.problems, shard, num_shards)
    if not problems:
        raise ConfigError(f"shard {shard} of {num_shards} has no problems; use fewer shards or more problems")
    path = ctx.dir / "trees.jsonl"
    statistics = SearchStatistics()
    with Lock(ctx.dir / ".trees.lock"), Journal(path) as journal:
        finished = set()
        for tree in read_trees(path):
            finished.add(tree.problem.id)
            statistics.add(tree)
        if finished:
            ctx.say(f"{len(finished)} trees are in the journal already")
        missing = [problem for problem in problems if problem.id not in finished]
        if missing:
            _search(ctx, missing, model_dir, journal, statistics)
    ctx.count(problems=loaded.to_json(), **statistics.to_json())
    ctx.say(f"{statistics.solved} of {statistics.trees} trees hold a right answer")
    return [path]


def training_problems(cfg: RunConfig, sources: Sequence[ProblemSource] | None = None) -> LoadedProblems:
    """Problems to learn from, those that resemble a benchmark's left out, with the account of all rows.

    Args:
        sources: where they are from; the training problems when absent.
    """
    ngram = cfg.problems.decontaminate_ngram
    benchmarks = [p for source in cfg.eval.benchmarks.values() for p in load_source(source)] if ngram else []
    return read_sources(sources or cfg.problems.train, benchmarks, ngram)


def in_shard(problems: Iterable[Problem], shard: int, num_shards: int) -> list[Problem]:
    """The problems of one shard. A problem's shard is a hash of its id: adding problems moves none."""
    return [problem for problem in problems if shard_of(problem.id, num_shards) == shard]


def shard_of(problem_id: str, num_shards: int) -> int:
    """Which shard a problem belongs to."""
    return int.from_bytes(hashlib.sha256(problem_id.encode()).digest()[:8], "big") % num_shards


def read_trees(path: Path) -> Iterator[Tree]:
    """The finished trees of a shard's journal, one at a time."""
    for row in Journal.read(path):
        yield Tree.from_json(row)


def _search(
    ctx: StageContext, problems: Sequence[Problem], model_dir: Path, journal: Journal, statistics: SearchStatistics
) -> None:
    cfg = ctx.cfg
    style = PromptStyle.load(cfg.model.prompt_style)
    engine = make_engine(model_dir, cfg.inference, ctx.seed("search", "engine"), ctx.log_dir)
    total = statistics.trees + len(problems)
    started = time.monotonic()
    try:
        with (
            VerifierPool(cfg.verifier) as verifier,
            ctx.progress(total, "trees", done=statistics.trees) as bar,
        ):
            tools = SearchTools(
                engine, verifier, style, StepCutter(engine.tokenizer, style.step_delimiter), cfg.search, cfg.seed
            )

            def keep(tree: Tree) -> None:
                journal.append(tree.to_json())
                statistics.add(tree)
                bar.update(1, valid=statistics.solved)

            def should_stop() -> bool:
                rate = engine.stats.generated_tokens / (time.monotonic() - started)
                bar.update(0, tokens=f"{rate:.0f}/s")
                return ctx.stop_requested

            failures = asyncio.run(search_problems(problems, tools, cfg.search.trees_in_flight, keep, should_stop))
    except Stopped:
        raise CheckpointedExit(f"{statistics.trees} of {total} trees are finished") from None
    finally:
        seconds = time.monotonic() - started
        engine.close()
    _count_engine(ctx, engine, seconds)
    if failures:
        problem_id, error = next(iter(failures.items()))
        raise RuntimeError(
            f"{len(failures)} of {len(problems)} trees failed, the first for problem {problem_id}; "
            "all others are kept, and the next attempt redoes these"
        ) from error


def _count_engine(ctx: StageContext, engine: Engine, seconds: float) -> None:
    """Figures of this attempt alone: the engine's, which the journal doesn't hold."""
    stats = engine.stats
    ctx.count(
        engine_seconds=round(stats.busy_seconds, 2),
        search_seconds=round(seconds, 2),
        tokens_per_second=round(stats.generated_tokens / seconds, 1),
        prompt_tokens=stats.prompt_tokens,
        cache_hit_rate=round(stats.cached_prompt_tokens / max(stats.prompt_tokens, 1), 4),
    )


# --- gathering shards -----------------------------------------------------------------------------------------


@dataclass
class GatherReport:
    """What `gather` found.

    Attributes:
        path: the merged trees, plain JSON Lines.
        shards: folders merged.
        statistics: of the merged trees.
        holes: ids of problems without a tree.
        duplicates: ids that came up again; the first tree is kept.
        strangers: ids of trees whose problem isn't wanted, or which lie in another shard than they should; left out.
    """

    path: Path
    shards: int
    statistics: dict[str, Any] = field(default_factory=dict)
    holes: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For `--json` and reports."""
        return {**vars(self), "path": str(self.path)}


def gather(run_dir: Path, wanted: Iterable[Problem]) -> GatherReport:
    """Merge all shards' journals into `search/trees.jsonl`, one tree in memory at a time, and say what is missing.

    Finished and running shards alike: a running one simply has holes yet.

    Args:
        wanted: the problems that should have a tree, as `training_problems` gives them.

    Raises:
        ConfigError: there are no shards, or shards of different splits.
    """
    folders = sorted(folder for folder in (run_dir / "search").glob("shard-*-of-*") if folder.is_dir())
    folders = [folder for folder in folders if folder.name.count(".") == 0]
    splits = {int(folder.name.rpartition("-")[2]) for folder in folders}
    if not splits:
        raise ConfigError(f"{run_dir / 'search'}: no shards; run `astro-hpc search` first")
    if len(splits) > 1:
        raise ConfigError(
            f"{run_dir / 'search'}: shards of different splits ({', '.join(map(str, sorted(splits)))}); "
            "move the stale ones away"
        )
    num_shards = splits.pop()
    report = GatherReport(run_dir / "search" / "trees.jsonl", len(folders))
    statistics = SearchStatistics()
    missing = {problem.id: True for problem in wanted}

    def rows() -> Iterator[dict[str, Any]]:
        for folder in folders:
            shard = int(folder.name.split("-")[1])
            for row in Journal.read(folder / "trees.jsonl"):
                problem_id = row["problem"]["id"]
                if problem_id not in missing or shard_of(problem_id, num_shards) != shard:
                    report.strangers.append(problem_id)
                elif not missing[problem_id]:
                    report.duplicates.append(problem_id)
                else:
                    missing[problem_id] = False
                    statistics.add(Tree.from_json(row))
                    yield row

    write_jsonl_atomic(report.path, rows())
    report.holes = [problem_id for problem_id, absent in missing.items() if absent]
    report.statistics = statistics.to_json()
    return report
