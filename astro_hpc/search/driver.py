"""Many trees on one engine: a bounded number in flight, none of them waiting for another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from astro_hpc.config.base import ConfigError
from astro_hpc.problems.problem import Problem
from astro_hpc.search.mcts import SearchTools, search_tree
from astro_hpc.search.tree import Tree

_MAX_FAILURES_IN_A_ROW = 8
_STOP_POLL_SECONDS = 0.2


class Stopped(Exception):
    """The search was asked to stop; trees in flight are dropped."""


async def search_problems(
    problems: Iterable[Problem],
    tools: SearchTools,
    trees_in_flight: int,
    on_tree: Callable[[Tree], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Exception]:
    """Build each problem's tree and hand it to `on_tree` as it is finished.

    `trees_in_flight` coroutines take problems in order, so the engine's queue doesn't drain while any are left.
    A tree that fails is dropped and the others go on; the search gives up when many fail in a row, because then
    the engine has failed and not a tree.

    Args:
        on_tree: called on the event loop's own worker thread, one call at a time: it may wait for the disk.

    Returns:
        The errors of failed trees by problem id.

    Raises:
        Stopped: `should_stop()` became true.
        ConfigError: a problem can't be searched with this configuration.
        Exception: the last error, when trees kept failing; errors of `on_tree`.
    """
    queue = iter(problems)
    failures: dict[str, Exception] = {}
    failed_in_a_row = 0
    writing = asyncio.Lock()

    async def work() -> None:
        nonlocal failed_in_a_row
        for problem in queue:
            try:
                tree = await search_tree(problem, tools)
            except Exception as error:
                failures[problem.id] = _first(error)
                failed_in_a_row += 1
                if failed_in_a_row >= _MAX_FAILURES_IN_A_ROW or isinstance(_first(error), ConfigError):
                    raise
            else:
                failed_in_a_row = 0
                async with writing:
                    await asyncio.to_thread(on_tree, tree)

    async def watch() -> None:
        while not should_stop():
            await asyncio.sleep(_STOP_POLL_SECONDS)
        raise Stopped

    watcher = asyncio.create_task(watch())
    try:
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(work()) for _ in range(trees_in_flight)]
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
