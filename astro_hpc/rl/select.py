"""`select`: which problems are worth practising on, by the SFT model's pass rate (paper, section 3.2)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from astro_hpc.config import ConfigError
from astro_hpc.inference import make_engine
from astro_hpc.problems.style import PromptStyle
from astro_hpc.rl.rollouts import Rollout, Sampler
from astro_hpc.run.files import Journal, write_jsonl_atomic
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.search.stage import training_problems
from astro_hpc.verifier.pool import VerifierPool

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
    """
    cfg, settings = ctx.cfg, ctx.cfg.select
    loaded = training_problems(cfg, settings.problems)
    loaded.report(ctx.dir / "problems.json", ctx.say)
    problems = loaded.problems
    rates = {row["id"]: row for row in Journal.read(ctx.dir / "rates.jsonl")}
    waiting = [problem for problem in problems if problem.id not in rates]
    tokens = sum(row["tokens"] for row in rates.values())

    if waiting:
        engine = make_engine(model_dir, cfg.inference, ctx.seed("select"), ctx.log_dir)
        with (
            Journal(ctx.dir / "rates.jsonl") as journal,
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
        tokens = sum(row["tokens"] for row in rates.values())
        engine.close()

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
        tokens=tokens,
    )
    return [prompts, ctx.dir / "problems.json"]
