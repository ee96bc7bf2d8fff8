"""What a worker does with a request. Imports sympy: only for the guarded process."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import math_verify

logging.disable(logging.CRITICAL)


def judge(request: dict[str, Any]) -> str:
    """`right`, `wrong` or `unknown` for {"checker", "gold", "answer", ...}; may raise, hang or eat memory."""
    if request["checker"] == "reasoning_gym":
        return _reasoning_gym(request)
    return _math(request["gold"], request["answer"])


def _math(gold: str, answer: str) -> str:
    parsed = math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not parsed:
        return "unknown"
    return "right" if math_verify.verify(_gold(gold), parsed, timeout_seconds=None) else "wrong"


@lru_cache(maxsize=4096)
def _gold(gold: str) -> Any:
    return math_verify.parse(f"${gold}$", parsing_timeout=None)


@lru_cache(maxsize=64)
def _dataset(name: str, seed: int, params: tuple[tuple[str, Any], ...]) -> Any:
    from astro_hpc.problems.sources import make_reasoning_gym

    return make_reasoning_gym(name, seed, dict(params))


def _reasoning_gym(request: dict[str, Any]) -> str:
    """Right is a score of exactly 1: scorers give part credit to any text that holds the answer."""
    made = request["metadata"]
    import json

    dataset = _dataset(made["dataset"], made["seed"], _freeze(made["params"]))
    entry = dataset[made["index"]]
    if entry["question"] != request["text"]:
        return "unknown"  # another version of reasoning-gym made the problem
    del json
    return "right" if float(dataset.score_answer(request["answer"], entry)) == 1.0 else "wrong"


def _freeze(params: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in params.items()))
