"""From a verdict to a reward: the verifier's +1 / -1 (paper, section 3.2), or a function of the user's."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RewardConfig
from astro_hpc.problems.problem import Problem
from astro_hpc.verifier.pool import Verdict

UserReward = Callable[[Problem, str, str], float]
"""(problem, response, outcome) -> reward."""


class Reward:
    """Scores responses."""

    def __init__(self, cfg: RewardConfig) -> None:
        """Look up the user's function, where there is one.

        Raises:
            ConfigError: it can't be imported or called.
        """
        self.cfg = cfg
        self._function = _import(cfg.function) if cfg.function else None

    def __call__(self, problem: Problem, response: str, verdict: Verdict) -> float:
        """The reward of one response.

        Raises:
            ConfigError: the user's function gave no finite number.
        """
        if self._function is None:
            score = self.cfg.right if verdict.outcome == "right" else self.cfg.wrong
        else:
            score = self._function(problem, response, verdict.outcome)
            if not isinstance(score, int | float) or not math.isfinite(score):
                raise ConfigError(f"rl.reward.function={self.cfg.function}: gave {score!r}, expected a finite number")
        return float(score) + (self.cfg.no_answer if verdict.answer is None else 0.0)


def _import(path: str) -> UserReward:
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rl.reward.function={path}: {error}; is its folder on PYTHONPATH?") from None
    if not callable(function):
        raise ConfigError(f"rl.reward.function={path}: is not a function")
    return function  # type: ignore[no-any-return]
