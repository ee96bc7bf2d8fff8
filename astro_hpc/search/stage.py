"""The search stage: a shard of the training problems becomes a journal of trees."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ProblemSource, RunConfig
from astro_hpc.inference import make_engine
from astro_hpc.inference.engine import Engine
from astro_hpc.problems.account import LoadedProblems
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.sources import load_source, read_sources
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.files import Journal, Lock
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.search.driver import Stopped, search_problems
from astro_hpc.search.mcts import SearchTools
from astro_hpc.search.shards import ATTEMPTS, TREES, in_shard, read_trees
from astro_hpc.search.statistics import SearchCost, SearchStatistics
from astro_hpc.search.steps import StepCutter
from astro_hpc.search.tree import Tree
from astro_hpc.verifier.pool import VerifierPool


def run(
    ctx: StageContext, *, model_dir: Path, shard: int = 0, num_shards: int = 1, earlier: Sequence[Path] = ()
) -> list[Path]:
    """Search the shard's problems; trees that the journal holds already are kept.

    `trees.jsonl` is a `Journal`: one finished tree (`Tree.to_json`) a line, durable before the next. A killed
    shard loses the trees in flight and nothing else. `attempts.jsonl` holds what each attempt took that ended in
    order, by itself or when asked to stop. `problems.json` says what became of every source's rows.

    Args:
        ctx: the stage's context.
        model_dir: the policy's Hugging Face folder.
        shard: which one, from 0.
        num_shards: into how many the problems are split.
        earlier: journals of an earlier search whose trees may be taken over, where their problem is still wanted.

    Raises:
        ConfigError: another process is at this shard, or there are no problems.
        CheckpointedExit: the stage was asked to stop; finished trees are in the journal.
        RuntimeError: some trees failed; the others are in the journal and the next attempt redoes those.
    """
    cfg = ctx.cfg
    loaded = training_problems(cfg)
    report = ctx.dir / "problems.json"
    loaded.report(report, ctx.say)
    problems = in_shard(loaded.problems, shard, num_shards)
    if not loaded.problems:
        raise ConfigError("problems.train gives no problem to search; see what became of its rows above")
    if not problems:  # a hash leaves some of many shards empty: nothing to do, and nothing wrong
        ctx.say(f"none of the {len(loaded.problems)} problems falls into shard {shard} of {num_shards}")
    path = ctx.dir / TREES
    statistics, cost = SearchStatistics(), SearchCost()
    with Lock(ctx.dir / ".trees.lock"), Journal(path) as journal:
        finished = set()
        for tree in read_trees(path):
            finished.add(tree.problem.id)
            statistics.add(tree)
        if finished:
            ctx.say(f"{len(finished)} trees are in the journal already")
        taken_over, wanted = 0, {problem.id: problem for problem in problems if problem.id not in finished}
        for tree in (tree for journaled in earlier for tree in read_trees(journaled)):
            if tree.problem == wanted.pop(tree.problem.id, None):
                journal.append(tree.to_json())
                finished.add(tree.problem.id)
                statistics.add(tree)
                taken_over += 1
        if taken_over:
            ctx.say(f"{taken_over} trees are taken over from the search that was set aside")
        missing = [problem for problem in problems if problem.id not in finished]
        if missing:
            _search(ctx, missing, model_dir, journal, statistics)
    for attempt in Journal.read(ctx.dir / ATTEMPTS):
        cost.add(attempt)
    ctx.count(problems=loaded.summary(), **statistics.to_json(), **cost.to_json())
    ctx.say(f"{statistics.solved} of {statistics.trees} trees hold a right answer")
    return [path, report]


def training_problems(cfg: RunConfig, sources: Sequence[ProblemSource] | None = None) -> LoadedProblems:
    """Problems to learn from, those that resemble a benchmark's left out, with the account of all rows.

    Args:
        sources: where they are from, all of each; the mixture of training problems when absent.
    """
    ngram = cfg.problems.decontaminate_ngram
    benchmarks = {name: load_source(source) for name, source in cfg.eval.benchmarks.items()} if ngram else {}
    if sources:
        return read_sources(sources, benchmarks, ngram)
    return read_sources(cfg.problems.train, benchmarks, ngram, cfg.problems.mixture)


def _search(
    ctx: StageContext, problems: Sequence[Problem], model_dir: Path, journal: Journal, statistics: SearchStatistics
) -> None:
    cfg = ctx.cfg
    style = PromptStyle.load(cfg.model.prompt_style)
    engine = make_engine(model_dir, cfg.inference, ctx.seed("search", "engine"), ctx.log_dir)
    before, total = statistics.trees, statistics.trees + len(problems)
    started, cpu = time.monotonic(), _cpu_seconds()
    try:
        with (
            VerifierPool(cfg.verifier) as verifier,
            ctx.progress(total, "trees", done=before) as bar,
        ):
            tools = SearchTools(
                engine, verifier, style, StepCutter(engine.tokenizer, style.step_delimiter), cfg.search, cfg.seed
            )

            def keep(tree: Tree) -> None:
                journal.append(tree.to_json())
                statistics.add(tree)
                bar.update(1, solved=f"{statistics.solved} ({statistics.solved / statistics.trees:.0%})")

            def should_stop() -> bool:
                rate = engine.stats.generated_tokens / (time.monotonic() - started)
                bar.update(0, tokens=f"{rate:,.0f}/s")
                return ctx.stop_requested

            failures = asyncio.run(search_problems(problems, tools, cfg.search.trees_in_flight, keep, should_stop))
    except Stopped:
        raise CheckpointedExit(f"{statistics.trees} of {total} trees are finished") from None
    finally:
        seconds = time.monotonic() - started
        engine.close()
        _journal_cost(ctx, engine, statistics.trees - before, seconds, _cpu_seconds() - cpu)
    if failures:
        problem_id, error = next(iter(failures.items()))
        raise RuntimeError(
            f"{len(failures)} of {len(problems)} trees failed, the first for problem {problem_id}; "
            "all others are kept, and the next attempt redoes these"
        ) from error


def _journal_cost(ctx: StageContext, engine: Engine, trees: int, seconds: float, cpu_seconds: float) -> None:
    """Keep what this attempt took: figures that the journal of trees doesn't hold."""
    stats = engine.stats
    with Journal(ctx.dir / ATTEMPTS) as journal:
        journal.append(
            {
                "trees": trees,
                "search_seconds": seconds,
                "engine_seconds": stats.busy_seconds,
                "cpu_seconds": cpu_seconds,
                "gpu_seconds": seconds * stats.extra.get("num_gpus", 0),
                "generated_tokens": stats.generated_tokens,
                "prompt_tokens": stats.prompt_tokens,
                "cached_prompt_tokens": stats.cached_prompt_tokens,
            }
        )


def _cpu_seconds() -> float:
    """Of this process, its threads, and its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
