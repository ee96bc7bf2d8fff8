"""Groups of responses sampled and judged in the background, while the caller trains or waits.

A thread runs an event loop with one coroutine a response. The engine batches them continuously; the verifier works
while others are still being sampled. The caller starts groups, takes finished ones, and holds sampling while it
replaces the weights.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RLConfig
from astro_hpc.inference.engine import Engine, SampleRequest
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.rl.reward import Reward
from astro_hpc.rl.rollouts import Group, Rollout, rounded
from astro_hpc.verifier.pool import VerifierPool

T = TypeVar("T")

SeedOf = Callable[[int, int, int], int]
"""(position, sample, piece) -> seed."""
_TICK_SECONDS = 0.05
_POLL_SECONDS = 0.2
"""How often a wait for a group looks whether a stop was asked for."""


class RolloutWorker:
    """Samples groups on one engine. Its methods are for one thread."""

    def __init__(
        self,
        engine: Engine,
        pool: VerifierPool,
        style: PromptStyle,
        reward: Reward,
        settings: RLConfig,
        seed_of: SeedOf,
        temperature: float | None = None,
    ) -> None:
        """Start the thread.

        Args:
            seed_of: gives each piece of each response its seed, so that a response does not depend on the others.
            temperature: in place of `settings.temperature`.

        Raises:
            ConfigError: responses can't be sampled in pieces with this prompt style.
        """
        special = {token.content for token in getattr(engine.tokenizer, "added_tokens_decoder", {}).values()}
        if settings.segment_tokens is not None and (texts := [stop for stop in style.stop if stop not in special]):
            raise ConfigError(
                f"rl.segment_tokens: the prompt style stops at the text {texts[0]!r}, which could fall between two "
                "pieces; unset it, or use a style that stops at special tokens"
            )
        self._engine, self._pool, self._style, self._reward = engine, pool, style, reward
        self._settings, self._seed_of = settings, seed_of
        self._temperature = settings.temperature if temperature is None else temperature
        self._finished: queue.SimpleQueue[Group | BaseException] = queue.SimpleQueue()
        self._in_flight: dict[int, asyncio.Task[None]] = {}
        self._sampling = 0
        self._judging = 0
        self._verifying = _Busy()
        self.event_loop_lag_seconds = 0.0
        """The longest that the loop was late since this was last set to 0."""
        self._loop = asyncio.new_event_loop()
        self._may_sample = asyncio.Event()
        self._may_sample.set()
        self._all_held = asyncio.Event()
        self._all_held.set()
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def start(self, position: int, problem: Problem) -> None:
        """Begin the group of the prompt at `position`."""
        self._call(self._begin(position, problem))

    def take(self, timeout: float, stop: Callable[[], bool] = lambda: False) -> Group | None:
        """The next finished group, in the order in which groups end.

        Args:
            timeout: in seconds; 0 takes one that is there.
            stop: asked all the time while waiting.

        Returns:
            None once `stop()` is true.

        Raises:
            TimeoutError: none ended within `timeout` seconds; says what is being waited for.
            Exception: what went wrong in the engine, the verifier or the reward.
        """
        deadline = time.monotonic() + timeout
        while not stop():
            left = deadline - time.monotonic()
            try:
                found = self._finished.get(timeout=max(0.0, min(left, _POLL_SECONDS)))
            except queue.Empty:
                if left > 0:
                    continue
                raise TimeoutError(
                    f"no group of responses was finished within {timeout / 60:.1f} minutes "
                    f"(rl.rollout_timeout_minutes): {len(self._in_flight)} groups in flight, waiting for "
                    f"{self._sampling} samples of the engine and {self._judging} verdicts"
                ) from None
            if isinstance(found, BaseException):
                raise found
            return found
        return None

    def hold(self, timeout: float) -> None:
        """Begin no piece of a response any more, and wait until those under way have ended.

        Raises:
            TimeoutError: they did not end in time.
        """
        try:
            self._call(asyncio.wait_for(self._hold(), timeout))
        except TimeoutError:
            raise TimeoutError(
                f"{self._sampling} samples were still under way {timeout / 60:.1f} minutes after sampling was held for "
                "new weights (rl.rollout_timeout_minutes); is the engine stuck?"
            ) from None

    def go_on(self) -> None:
        """Sample again."""
        self._loop.call_soon_threadsafe(self._may_sample.set)

    @property
    def verify_seconds(self) -> float:
        """How long verdicts and rewards were being waited for, altogether; sampling may have gone on meanwhile."""
        return self._verifying.seconds

    def close(self) -> None:
        """Drop what is in flight and end the thread; twice is harmless."""
        if self._thread.is_alive():
            self._call(self._cancel_all())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._gauge = self._loop.create_task(self._measure_lag())
        self._loop.run_forever()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result()

    # --- on the loop's thread ---------------------------------------------------------------------------------

    async def _begin(self, position: int, problem: Problem) -> None:
        assert position not in self._in_flight, position
        self._in_flight[position] = self._loop.create_task(self._group(position, problem))

    async def _group(self, position: int, problem: Problem) -> None:
        ids = tuple(self._engine.tokenizer.encode(self._style.render(problem.text), add_special_tokens=False))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._response(problem, ids, position, sample))
                    for sample in range(self._settings.group_size)
                ]
            self._finished.put(Group(position, tuple(task.result() for task in tasks)))
        except BaseExceptionGroup as errors:
            self._finished.put(_first(errors))
        finally:
            del self._in_flight[position]

    async def _response(self, problem: Problem, prompt: tuple[int, ...], position: int, sample: int) -> Rollout:
        """One response, in one piece or several, and its verdict."""
        # A prompt that leaves no room is refused by the engine, with the numbers.
        room = max(1, min(self._settings.max_response_tokens, self._engine.max_model_len - len(prompt)))
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[tuple[int, int]] = []
        for piece in range(room):
            size = min(room - len(tokens), self._settings.segment_tokens or room)
            seed = self._seed_of(position, sample, piece)
            got = await self._sample(
                SampleRequest((*prompt, *tokens), size, self._temperature, self._settings.top_p, seed, self._style.stop)
            )
            tokens += got.token_ids
            logprobs += rounded(got.logprobs)
            versions.append((got.weight_version, len(got.token_ids)))
            ended = got.finish_reason != "length"
            if ended or len(tokens) >= room:
                break
        text = got.text
        if len(versions) > 1:
            text = self._engine.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._judging += 1
        self._verifying.enter()
        try:
            verdict = await self._pool.averify(problem, text)
            reward = await self._reward.score(problem, text, verdict)
        finally:
            self._judging -= 1
            self._verifying.leave()
        return Rollout(
            problem_id=problem.id,
            prompt_token_ids=prompt,
            token_ids=tuple(tokens),
            logprobs=tuple(logprobs),
            text=text,
            outcome=verdict.outcome,
            reward=reward,
            truncated=not ended,
            weight_versions=_merged(versions),
        )

    async def _sample(self, request: SampleRequest) -> Any:
        await self._may_sample.wait()
        self._sampling += 1
        self._all_held.clear()
        try:
            return await self._engine.generate(request)
        finally:
            self._sampling -= 1
            if self._sampling == 0:
                self._all_held.set()

    async def _hold(self) -> None:
        self._may_sample.clear()
        await self._all_held.wait()

    async def _cancel_all(self) -> None:
        tasks = [self._gauge, *self._in_flight.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _measure_lag(self) -> None:
        while True:
            due = time.monotonic() + _TICK_SECONDS
            await asyncio.sleep(_TICK_SECONDS)
            self.event_loop_lag_seconds = max(self.event_loop_lag_seconds, time.monotonic() - due)


class _Busy:
    """How long at least one of several things that overlap was going on."""

    def __init__(self) -> None:
        self._count, self._since, self._seconds = 0, 0.0, 0.0

    def enter(self) -> None:
        """One begins."""
        if self._count == 0:
            self._since = time.monotonic()
        self._count += 1

    def leave(self) -> None:
        """One ends."""
        self._count -= 1
        if self._count == 0:
            self._seconds += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        """Up to now; approximate when another thread asks."""
        return self._seconds + (time.monotonic() - self._since if self._count else 0.0)


def _merged(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbouring spans of one version as one."""
    merged: list[tuple[int, int]] = []
    for version, count in spans:
        if merged and merged[-1][0] == version:
            merged[-1] = (version, merged[-1][1] + count)
        else:
            merged.append((version, count))
    return tuple(merged)


def _first(error: BaseException) -> BaseException:
    """What went wrong first, out of the groups that task groups wrap around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
