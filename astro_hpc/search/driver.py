"""Many problems on one engine: a bounded number in flight, none of them waiting for another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from astro_hpc.config.base import ConfigError
from astro_hpc.problems.problem import Problem
from astro_hpc.search.mcts import SearchTools, search_tree
from astro_hpc.search.tree import Tree


class Identified(Protocol):
    """Something with an id."""

    @property
    def id(self) -> str:
        """Different for each."""
        ...


P = TypeVar("P", bound=Identified)
T = TypeVar("T")

_MAX_FAILURES_IN_A_ROW = 8
_STOP_POLL_SECONDS = 0.2


class Stopped(Exception):
    """Asked to stop; what is in flight is dropped."""


async def search_problems(
    problems: Iterable[Problem],
    tools: SearchTools,
    trees_in_flight: int,
    on_tree: Callable[[Tree], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Exception]:
    """Build each problem's tree and hand it to `on_tree` as it is finished; see `work_through`."""
    return await work_through(
        problems, lambda problem: search_tree(problem, tools), trees_in_flight, on_tree, should_stop
    )


async def work_through(
    problems: Iterable[P],
    work: Callable[[P], Awaitable[T]],
    in_flight: int,
    on_result: Callable[[T], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Exception]:
    """Do the work on each problem and hand its result to `on_result` as it is finished.

    `in_flight` coroutines take problems in order, so the engine's queue doesn't drain while any are left.
    A problem that fails is dropped and the others go on; all of it is given up when many fail in a row, because
    then the engine has failed and not a problem.

    Args:
        on_result: called on the event loop's own worker thread, one call at a time: it may wait for the disk.

    Returns:
        The errors by problem id.

    Raises:
        Stopped: `should_stop()` became true.
        ConfigError: a problem can't be worked on with this configuration.
        Exception: the last error, when problems kept failing; errors of `on_result`.
    """
    queue = iter(problems)
    failures: dict[str, Exception] = {}
    failed_in_a_row = 0
    writing = asyncio.Lock()

    async def worker() -> None:
        nonlocal failed_in_a_row
        for problem in queue:
            try:
                result = await work(problem)
            except Exception as error:
                failures[problem.id] = _first(error)
                failed_in_a_row += 1
                if failed_in_a_row >= _MAX_FAILURES_IN_A_ROW or isinstance(_first(error), ConfigError):
                    raise
            else:
                failed_in_a_row = 0
                async with writing:
                    await asyncio.to_thread(on_result, result)

    async def watch() -> None:
        while not should_stop():
            await asyncio.sleep(_STOP_POLL_SECONDS)
        raise Stopped

    watcher = asyncio.create_task(watch())
    try:
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(worker()) for _ in range(in_flight)]
            await asyncio.wait([watcher, group.create_task(_all_done(workers))], return_when=asyncio.FIRST_COMPLETED)
            if watcher.done():
                watcher.result()
    except ExceptionGroup as errors:
        raise _first(errors) from None
    finally:
        watcher.cancel()
    return failures


async def _all_done(tasks: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)


def _first(error: Exception) -> Exception:
    """What went wrong first, out of the groups that task groups wrap around it."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
