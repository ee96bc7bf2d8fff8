"""`select`: which problems are worth practising on, by the SFT model's pass rate (paper, section 3.2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from astro_hpc.config import ConfigError
from astro_hpc.inference import make_engine
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.rl.rollouts import Rollout, Sampler
from astro_hpc.run.files import Journal, write_jsonl_atomic
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.search.shards import in_shard
from astro_hpc.search.stage import training_problems
from astro_hpc.verifier.pool import VerifierPool

RATES = "rates.jsonl"
"""Journal: one row a problem, `{"id", "right", "unknown", "samples", "tokens"}`."""
_BATCH_OF_PROBLEMS = 256  # bounds what is held in memory


def in_window(pass_rate: float, low: float, high: float) -> bool:
    """Moderate difficulty: low <= pass rate <= high."""
    return low <= pass_rate <= high


def run(ctx: StageContext, model_dir: Path) -> list[Path]:
    """Sample every candidate a few times; keep those within the window.

    Writes `rates.jsonl` (a journal: problem id, right, samples) and `prompts.jsonl` (the kept problems, each with its
    pass rate), in the candidates' order.

    Raises:
        ConfigError: no problem falls within the window.
        CheckpointedExit: asked to stop; what is sampled is in the journal.
    """
    problems = _candidates(ctx)
    _sample_rates(ctx, model_dir, problems)
    return _keep(ctx, problems, [ctx.dir / RATES])


def run_shard(ctx: StageContext, model_dir: Path, shard: int, num_shards: int) -> list[Path]:
    """Sample one shard of the candidates into the journal `rates.jsonl`; a shard may be empty.

    Raises:
        CheckpointedExit: asked to stop; what is sampled is in the journal.
    """
    problems = in_shard(_candidates(ctx), shard, num_shards)
    rates = _sample_rates(ctx, model_dir, problems)
    ctx.count(candidates=len(problems), tokens=sum(row["tokens"] for row in rates.values()))
    return [ctx.dir / RATES]


def gather(ctx: StageContext, journals: Sequence[Path]) -> list[Path]:
    """Choose among all candidates by the pass rates that the shards hold: the prompts that `run` would find.

    Raises:
        ConfigError: no problem falls within the window, or one has no pass rate.
    """
    return _keep(ctx, _candidates(ctx), journals)


def _candidates(ctx: StageContext) -> list[Problem]:
    loaded = training_problems(ctx.cfg, ctx.cfg.select.problems)
    loaded.report(ctx.dir / "problems.json", ctx.say)
    return loaded.problems


def _sample_rates(ctx: StageContext, model_dir: Path, problems: Sequence[Problem]) -> dict[str, Any]:
    """Fill the journal `rates.jsonl`; its rows by problem."""
    cfg, settings = ctx.cfg, ctx.cfg.select
    with Journal(ctx.dir / RATES) as journal:
        rates = {row["id"]: row for row in Journal.read(journal.path)}
        waiting = [problem for problem in problems if problem.id not in rates]
        if not waiting:
            return rates
        engine = make_engine(model_dir, cfg.inference, ctx.seed("select"), ctx.log_dir)
        try:
            with (
                VerifierPool(cfg.verifier) as pool,
                ctx.progress(len(problems), "problems", done=len(rates)) as progress,
            ):
                sampler = Sampler(
                    engine,
                    pool,
                    PromptStyle.load(cfg.model.prompt_style),
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    max_tokens=settings.max_tokens,
                )
                for first in range(0, len(waiting), _BATCH_OF_PROBLEMS):
                    batch = waiting[first : first + _BATCH_OF_PROBLEMS]
                    jobs = [
                        (problem, ctx.seed("select", problem.id, i))
                        for problem in batch
                        for i in range(settings.num_samples)
                    ]
                    by_problem: dict[str, list[Rollout]] = defaultdict(list)

                    def on_rollout(_: int, rollout: Rollout, by_problem: dict[str, list[Rollout]] = by_problem) -> None:
                        if ctx.stop_requested:
                            raise CheckpointedExit(f"{ctx.label}: {len(rates)} of {len(problems)} problems sampled")
                        answers = by_problem[rollout.problem_id]
                        answers.append(rollout)
                        if len(answers) == settings.num_samples:
                            row = {
                                "id": rollout.problem_id,
                                "right": sum(answer.outcome == "right" for answer in answers),
                                "unknown": sum(answer.outcome == "unknown" for answer in answers),
                                "samples": len(answers),
                                "tokens": sum(len(answer.token_ids) for answer in answers),
                            }
                            journal.append(row)
                            rates[rollout.problem_id] = row
                            progress.update()

                    sampler.sample(jobs, on_rollout)
        finally:
            engine.close()
    return rates


def _keep(ctx: StageContext, problems: Sequence[Problem], journals: Sequence[Path]) -> list[Path]:
    """Write the problems within the window, and count."""
    settings = ctx.cfg.select
    rates = {row["id"]: row for path in journals for row in Journal.read(path)}
    if holes := [problem.id for problem in problems if problem.id not in rates]:
        raise ConfigError(f"{ctx.label}: {len(holes)} problems have no pass rate, {holes[0]} first; select them again")
    by_rate = {problem.id: rates[problem.id]["right"] / rates[problem.id]["samples"] for problem in problems}
    low, high = settings.min_pass_rate, settings.max_pass_rate
    kept = [problem for problem in problems if in_window(by_rate[problem.id], low, high)]
    too_hard = sum(rate < low for rate in by_rate.values())
    too_easy = sum(rate > high for rate in by_rate.values())
    ctx.say(f"{len(kept)} of {len(problems)} problems kept; {too_hard} below {low}, {too_easy} above {high}")
    if not kept:
        raise ConfigError(
            f"{ctx.label}: no problem's pass rate lies within [{low}, {high}] ({too_hard} below, {too_easy} above); "
            f"widen select.min_pass_rate / select.max_pass_rate or add problems"
        )
    prompts = ctx.dir / "prompts.jsonl"
    write_jsonl_atomic(prompts, ({**problem.to_json(), "pass_rate": by_rate[problem.id]} for problem in kept))
    ctx.count(
        candidates=len(problems),
        kept=len(kept),
        too_hard=too_hard,
        too_easy=too_easy,
        mean_pass_rate=round(sum(by_rate.values()) / len(problems), 4),
        unknown=sum(row["unknown"] for row in rates.values()),
        tokens=sum(row["tokens"] for row in rates.values()),
    )
    return [prompts, ctx.dir / "problems.json"]
