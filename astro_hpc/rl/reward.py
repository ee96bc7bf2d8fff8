"""From a verdict to a reward: the verifier's +1 / -1 (paper, section 3.2), or a function of the user's."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import threading
import traceback
from collections.abc import Callable

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RewardConfig
from astro_hpc.problems.problem import Problem
from astro_hpc.verifier.pool import Verdict

UserReward = Callable[[Problem, str, str], float]
"""(problem, response, outcome) -> reward."""
_AT_ONCE = 16
"""Calls of the user's function that may run side by side; it may well wait for something over a network."""


class Reward:
    """Scores responses."""

    def __init__(self, cfg: RewardConfig) -> None:
        """Look up the user's function, where there is one.

        Raises:
            ConfigError: it can't be imported or called.
        """
        self.cfg = cfg
        self._function = _import(cfg.function) if cfg.function else None
        self._may_call = asyncio.Semaphore(_AT_ONCE)

    def __call__(self, problem: Problem, response: str, verdict: Verdict) -> float:
        """The reward of one response.

        Raises:
            ConfigError: the user's function raised, or gave no finite number; names the problem and the line.
        """
        if self._function is None:
            score = self.cfg.right if verdict.outcome == "right" else self.cfg.wrong
        else:
            where = f"rl.reward.function={self.cfg.function}, called for a response to {problem.id}"
            try:
                score = self._function(problem, response, verdict.outcome)
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__}: {error!s:.200}"
                raise ConfigError(f"{where}: {what} ({last.filename}:{last.lineno}); mend the function") from error
            if not isinstance(score, int | float) or not math.isfinite(score):
                raise ConfigError(f"{where}: gave {score!r:.80}, expected a finite number")
        return float(score) + (self.cfg.no_answer if verdict.answer is None else 0.0)

    async def score(self, problem: Problem, response: str, verdict: Verdict) -> float:
        """As a call, without holding up the event loop and within `timeout_seconds`.

        A function that hangs can't be ended; its thread is a daemon, so that it does not keep the process alive.

        Raises:
            ConfigError: as a call.
            TimeoutError: the function took too long; it may have waited for something that passes.
        """
        if self._function is None:
            return self(problem, response, verdict)
        async with self._may_call:
            try:
                return await asyncio.wait_for(
                    _in_daemon_thread(lambda: self(problem, response, verdict)), self.cfg.timeout_seconds
                )
            except TimeoutError:
                raise TimeoutError(
                    f"rl.reward.function={self.cfg.function}: gave no reward for a response to {problem.id} within "
                    f"{self.cfg.timeout_seconds:g} s; mend the function or raise rl.reward.timeout_seconds"
                ) from None


def _in_daemon_thread(function: Callable[[], float]) -> asyncio.Future[float]:
    """What `function` returns or raises; the loop's own executor would wait for its threads when the process ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[float] = loop.create_future()

    def settle(value: float | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            assert value is not None
            future.set_result(value)

    def run() -> None:
        value, error = None, None
        try:
            value = function()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future


def _import(path: str) -> UserReward:
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module does when it is imported
        what = f"{type(error).__name__}: {error!s:.200}"
        raise ConfigError(f"rl.reward.function={path}: {what}; is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise ConfigError(f"rl.reward.function={path}: is not a function")
    return function  # type: ignore[no-any-return]
