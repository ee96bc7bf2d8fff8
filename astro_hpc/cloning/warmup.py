"""Examples for the optional warm-up: random legal walks teach a small model the step format. Not in the paper."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.problems import signs
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.sources import load_source
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.files import write_jsonl_atomic
from astro_hpc.run.seeds import derive_seed
from astro_hpc.run.stage import StageContext


def write_examples(ctx: StageContext) -> Path:
    """Write `examples.jsonl` into the stage's folder, from `warmup.problems`."""
    if ctx.cfg.warmup.problems is None:
        raise ConfigError("warmup.problems is missing; name a source, for instance {type: signs, count: 600}")
    path = ctx.dir / "examples.jsonl"
    write_jsonl_atomic(path, make_examples(ctx.cfg, load_source(ctx.cfg.warmup.problems)))
    return path


def make_examples(cfg: RunConfig, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """`warmup.num_walks` examples in the form of the clone stage's rows, going round `problems` in their order.

    A walk draws its signs evenly and ignores the target, so it teaches how to write steps and not which to take.

    Raises:
        ConfigError: there is no problem, or one of a family that can't generate walks.
    """
    if not problems:
        raise ConfigError("warmup.problems gives no problem; raise its count")
    if other := next((problem for problem in problems if problem.checker != signs.CHECKER), None):
        raise ConfigError(f"warmup.problems: {other.id} is not of the signs family; only that family generates walks")
    style = PromptStyle.load(cfg.model.prompt_style)
    separator = style.step_delimiter if style.step_delimiter.isspace() else "\n\n"
    rows = []
    for index in range(cfg.warmup.num_walks):
        problem = problems[index % len(problems)]
        rng = random.Random(derive_seed(cfg.seed, "warmup", problem.id, index))
        rows.append(
            {
                "id": f"{problem.id}/warmup/{index}",
                "problem_id": problem.id,
                "prompt": style.render(problem.text),
                "completion": separator.join(signs.random_walk(problem, rng)),
            }
        )
    return rows
