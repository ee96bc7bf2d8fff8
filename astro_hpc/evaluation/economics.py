"""What search buys: the trees against best-of-N at the same generated tokens, and against greedy, problem by problem.

Best-of-N spends on each problem exactly the tokens that its tree took, on independent solutions from the same policy
with the search's temperature, top-p and length limit; the last one is cut where the tokens end. Answers are judged
as the search judges its rollouts. Two ways to pick: `solved` (some solution is right: an oracle picks, and what
cloning needs) and `majority` (the answer that most solutions give).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.evaluation.metrics import Estimate, share
from astro_hpc.inference import make_engine
from astro_hpc.inference.engine import Sample, SampleRequest
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.files import Journal, write_json_atomic, write_jsonl_atomic
from astro_hpc.run.seeds import derive_seed
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.search.driver import Stopped, work_through
from astro_hpc.search.mcts import SearchTools, all_of, until_answered
from astro_hpc.search.shards import read_trees
from astro_hpc.search.steps import StepCutter
from astro_hpc.search.tree import Tree
from astro_hpc.verifier.pool import VerifierPool

METHODS = ("search", "best-of-n", "greedy")
_NAMES = {"solved": "solved", "seen": "right seen", "majority": "majority"}
_Z95 = 1.959964
_MAX_WAVE = 64
"""Solutions of one problem that are drawn at the same time."""


def run(ctx: StageContext, *, journals: Sequence[Path], model_dir: Path) -> list[Path]:
    """Write `economics.json` (`summarize`) and `problems.jsonl`, one row a problem.

    Rows are journaled as problems are done; a resumed stage does those that are missing.

    Args:
        ctx: the stage's context.
        journals: the search's trees.
        model_dir: the policy that searched.

    Raises:
        ConfigError: there are no trees.
        CheckpointedExit: asked to stop; finished problems are in the journal.
    """
    searched = _searched(ctx, journals)
    path = ctx.dir / "rows.jsonl"
    with Journal(path) as journal:
        rows = {row["problem_id"]: row for row in Journal.read(path)}
        missing = [problem for problem in searched.values() if problem.id not in rows]
        if missing:
            _sample_all(ctx, missing, len(searched), model_dir, journal)
    rows = {row["problem_id"]: row for row in Journal.read(path)}
    in_order = [rows[problem_id] for problem_id in searched]
    write_jsonl_atomic(ctx.dir / "problems.jsonl", in_order)
    write_json_atomic(ctx.dir / "economics.json", summarize(in_order))
    ctx.count(problems=len(rows), tokens=sum(row["drawn_tokens"] for row in in_order))
    return [ctx.dir / "economics.json", ctx.dir / "problems.jsonl"]


@dataclass(frozen=True)
class _Searched:
    """A problem and what its tree came to."""

    problem: Problem
    search: dict[str, Any]

    @property
    def id(self) -> str:
        return self.problem.id


def _searched(ctx: StageContext, journals: Sequence[Path]) -> dict[str, _Searched]:
    """The problems to compare on, by id, in the trees' order."""
    found = {tree.problem.id: _Searched(tree.problem, of_tree(tree)) for path in journals for tree in read_trees(path)}
    if not found:
        raise ConfigError("economics: the search has no trees; run `astro-hpc search` first")
    limit = ctx.cfg.economics.num_problems
    if limit is None or limit >= len(found):
        return found
    chosen = set(random.Random(ctx.seed("economics", "problems")).sample(sorted(found), limit))
    return {problem_id: searched for problem_id, searched in found.items() if problem_id in chosen}


def of_tree(tree: Tree) -> dict[str, Any]:
    """What a tree came to, as `summarize` reads it.

    `seen` is true too where a rollout was right that the tree does not hold; `majority` votes over the terminals.
    """
    right = list(tree.terminals("right"))
    texts = {"".join(node.step for node in tree.path(terminal)) for terminal in right}
    return {
        "solved": tree.solved,
        "seen": any(node.reward > 0 for node in tree.nodes),
        "majority": majority((node.answer, node.outcome == "right") for node in tree.terminals()),
        "right_solutions": len(texts),
        "tokens": int(tree.stats.get("generated_tokens", 0)),
    }


def majority(votes: Iterable[tuple[str | None, bool]]) -> bool:
    """Whether the answer that most (answer, is it right) give is right; ties go to the earliest, None does not vote."""
    given = [(answer, right) for answer, right in votes if answer is not None]
    if not given:
        return False
    winner = Counter(answer for answer, _ in given).most_common(1)[0][0]
    return any(right for answer, right in given if answer == winner)


# --- sampling -------------------------------------------------------------------------------------------------


def _sample_all(
    ctx: StageContext, problems: Sequence[_Searched], total: int, model_dir: Path, journal: Journal
) -> None:
    cfg = ctx.cfg
    style = PromptStyle.load(cfg.model.prompt_style)
    engine = make_engine(model_dir, cfg.inference, ctx.seed("economics", "engine"), ctx.log_dir)
    started = time.monotonic()
    try:
        with (
            VerifierPool(cfg.verifier) as verifier,
            ctx.progress(total, "problems", done=total - len(problems)) as bar,
        ):
            tools = SearchTools(
                engine, verifier, style, StepCutter(engine.tokenizer, style.step_delimiter), cfg.search, cfg.seed
            )

            def keep(row: dict[str, Any]) -> None:
                journal.append(row)
                bar.update(1)

            def should_stop() -> bool:
                bar.update(0, tokens=f"{engine.stats.generated_tokens / (time.monotonic() - started):,.0f}/s")
                return ctx.stop_requested

            failures = asyncio.run(
                work_through(problems, lambda p: _compare(p, tools), cfg.search.trees_in_flight, keep, should_stop)
            )
    except Stopped:
        raise CheckpointedExit("finished problems are kept") from None
    finally:
        engine.close()
    if failures:
        problem_id, error = next(iter(failures.items()))
        raise RuntimeError(
            f"{len(failures)} problems failed, the first {problem_id}; all others are kept, and the next attempt "
            "redoes these"
        ) from error


async def _compare(searched: _Searched, tools: SearchTools) -> dict[str, Any]:
    """One problem's row."""
    sampler = _Sampler(searched.problem, tools)
    greedy, best_of_n = await all_of([sampler.greedy(), sampler.best_of_n(searched.search["tokens"])])
    return {
        "problem_id": searched.id,
        "search": searched.search,
        "best-of-n": best_of_n,
        "greedy": greedy,
        "drawn_tokens": sampler.drawn_tokens,
    }


class _Sampler:
    """Whole solutions of one problem."""

    def __init__(self, problem: Problem, tools: SearchTools) -> None:
        self.problem, self.tools = problem, tools
        prompt = tools.style.render(problem.text)
        self.prompt_ids = tuple(tools.engine.tokenizer.encode(prompt, add_special_tokens=False))
        self.room = min(tools.cfg.max_rollout_tokens, tools.engine.max_model_len - len(self.prompt_ids))
        self.drawn_tokens = 0

    async def greedy(self) -> dict[str, Any]:
        """The most likely solution, token by token."""
        return await self._judge([await self._draw("greedy", 0, 0.0)] if self.room > 0 else [])

    async def best_of_n(self, budget: int) -> dict[str, Any]:
        """Independent solutions of `budget` tokens together; the last one is cut where they end.

        Solutions count in the order of their numbers, so how many are drawn at a time changes nothing.
        """
        samples: list[Sample] = []
        spent = 0
        while spent < budget and self.room > 0:
            each = spent / len(samples) if samples else self.room
            wave = min(_MAX_WAVE, math.ceil((budget - spent) / each))
            numbers = range(len(samples), len(samples) + wave)
            drawn = await all_of(self._draw("sample", number, self.tools.cfg.temperature) for number in numbers)
            for sample in drawn:
                if spent < budget:
                    samples.append(cut_to(sample, budget - spent))
                    spent += max(1, len(samples[-1].token_ids))
        return await self._judge(samples)

    async def _draw(self, kind: str, number: int, temperature: float) -> Sample:
        seed = derive_seed(self.tools.seed, "economics", self.problem.id, kind, number)
        request = SampleRequest(
            self.prompt_ids, self.room, temperature, self.tools.cfg.top_p, seed, self.tools.style.stop
        )
        sample = await self.tools.engine.generate(request)
        self.drawn_tokens += len(sample.token_ids)
        return sample

    async def _judge(self, samples: Sequence[Sample]) -> dict[str, Any]:
        votes: list[tuple[str | None, bool]] = []
        right = set()
        for sample in samples:
            answered = until_answered(self.tools.cutter.cut(sample), self.tools.style)
            if answered is not None:
                verdict = await self.tools.verifier.averify(self.problem, answered[1])
                votes.append((verdict.answer, verdict.outcome == "right"))
                right |= {answered[1]} if verdict.outcome == "right" else set()
        return {
            "solved": bool(right),
            "seen": bool(right),
            "majority": majority(votes),
            "right_solutions": len(right),
            "tokens": sum(len(sample.token_ids) for sample in samples),
            "samples": len(samples),
        }


def cut_to(sample: Sample, num_tokens: int) -> Sample:
    """What the sample would have been with this token limit."""
    if len(sample.token_ids) <= num_tokens:
        return sample
    return Sample(
        sample.token_ids[:num_tokens],
        sample.logprobs[:num_tokens],
        text="",  # nobody reads it: steps are decoded from the tokens
        finish_reason="length",
        weight_version=sample.weight_version,
    )


# --- the account ----------------------------------------------------------------------------------------------


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares and per-token figures of each method, and the differences, with 95 % intervals over problems.

    Every figure is `{"value", "low", "high"}`. A figure per token is the sum over problems by the sum of tokens.
    """
    methods = []
    for method in METHODS:
        results = [row[method] for row in rows]
        tokens = [result["tokens"] for result in results]
        methods.append(
            {
                "method": method,
                "tokens_per_problem": mean(tokens),
                **{name: _json(share([float(r[name]) for r in results])) for name in ("solved", "seen", "majority")},
                "solved_per_million_tokens": _json(_per_token([r["solved"] for r in results], tokens, 1e6)),
                "right_solutions_per_million_tokens": _json(
                    _per_token([r["right_solutions"] for r in results], tokens, 1e6)
                ),
            }
        )
    differences = []
    for minus in METHODS[1:]:
        for name in ("solved", "seen", "majority"):
            deltas = [float(row["search"][name]) - float(row[minus][name]) for row in rows]
            differences.append({"of": name, "first": "search", "minus": minus, **_json(_mean(deltas))})
    return {
        "problems": len(rows),
        "samples_per_problem": mean(row["best-of-n"]["samples"] for row in rows),
        "methods": methods,
        "differences": differences,
    }


def _per_token(amounts: Sequence[float], tokens: Sequence[int], scale: float) -> Estimate:
    """Sum of amounts by sum of tokens, times `scale`; the interval is the linearised ratio's, 0 at least."""
    total = sum(tokens)
    if total == 0:
        return Estimate(0.0, 0.0, 0.0)
    ratio, n = sum(amounts) / total, len(tokens)
    half = (
        _Z95 * stdev(a - ratio * t for a, t in zip(amounts, tokens, strict=True)) * math.sqrt(n) / total
        if n > 1
        else 0.0
    )
    return Estimate(scale * ratio, scale * max(0.0, ratio - half), scale * (ratio + half))


def _mean(values: Sequence[float]) -> Estimate:
    half = _Z95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(mean(values), mean(values) - half, mean(values) + half)


def _json(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def read_economics(cfg: RunConfig) -> dict[str, Any] | None:
    """The finished comparison of a run, or None."""
    path = cfg.run_dir / "search" / "economics" / "economics.json"
    return json.loads(path.read_text()) if path.exists() else None


COLUMNS = ("method", "tokens/problem", "solved %", "right seen %", "majority %", "solved/Mtoken", "solutions/Mtoken")


LEGEND = (
    "solved: some solution is right (in the tree); right seen: counts right rollouts that the tree does not hold; "
    "majority: the answer that most give; solutions: right ones of different texts"
)


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a method, in the order of `COLUMNS`; ± is half of the 95 % interval."""
    rows = []
    for method in summary["methods"]:
        shares = [_plus_minus(method[name], 100) for name in ("solved", "seen", "majority")]
        per_token = [_plus_minus(method[f"{name}_per_million_tokens"], 1) for name in ("solved", "right_solutions")]
        rows.append((method["method"], f"{method['tokens_per_problem']:,.0f}", *shares, *per_token))
    return rows


def _plus_minus(figure: Mapping[str, float], scale: float) -> str:
    return f"{scale * figure['value']:,.1f} ± {scale * (figure['high'] - figure['low']) / 2:,.1f}"


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """The comparisons at equal tokens in words."""
    texts = []
    for row in summary["differences"]:
        if row["minus"] == "best-of-n":
            clear = "" if row["low"] > 0 or row["high"] < 0 else ": no clear difference"
            texts.append(
                f"{_NAMES[row['of']]}, search minus best-of-N at the same tokens: {100 * row['value']:+.1f} percentage "
                f"points (95 % interval {100 * row['low']:+.1f} to {100 * row['high']:+.1f}){clear}."
            )
    return texts


def table(summary: Mapping[str, Any]) -> str:
    """The comparison as aligned text."""
    rows = [COLUMNS, *table_rows(summary)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"search economics on {summary['problems']} problems, {summary['samples_per_problem']:.1f} solutions each for "
        "best-of-N; ± is a 95 % interval over problems"
    ]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return "\n".join([*lines, LEGEND, *sentences(summary)])
