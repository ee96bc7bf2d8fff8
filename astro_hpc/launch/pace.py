"""How fast a job goes and when it will be done, from the last lines of progress in its running tasks' logs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TAIL_BYTES = 4096
_LINE = re.compile(r": (\d+)/(\d+) ([a-z]+) \((\d+(?:\.\d+)?) [a-z]+/(s|min)\b")
"""A line of `run/progress.py`, for instance `search: 40/250 trees (12.0 trees/min, ..., 17m30s left)`."""


@dataclass(frozen=True)
class Pace:
    """Of one task: `done` of `total` units, and units a minute."""

    done: int
    total: int
    unit: str
    per_minute: float


def parse_pace(text: str) -> Pace | None:
    """The last line of progress in a log's text."""
    found = None
    for found in _LINE.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    if found is None:
        return None
    rate = float(found[4]) * (60 if found[5] == "s" else 1)
    return Pace(int(found[1]), int(found[2]), found[3], rate)


def read_pace(log: Path) -> Pace | None:
    """From the end of a log; None where there is no such line."""
    try:
        with open(log, "rb") as handle:
            handle.seek(max(os.fstat(handle.fileno()).st_size - _TAIL_BYTES, 0))
            return parse_pace(handle.read().decode(errors="replace"))
    except OSError:
        return None


def together(paces: Iterable[Pace], pending: int) -> tuple[str, float, float | None] | None:
    """(unit, units a minute, seconds left) of tasks that run side by side, with `pending` more to come like them.

    The time left takes it that as many tasks go on running as do now; None where nothing moves. None at all without
    tasks that tell their progress.
    """
    paces = list(paces)
    if not paces:
        return None
    per_minute = sum(pace.per_minute for pace in paces)
    left = sum(pace.total - pace.done for pace in paces) + pending * sum(pace.total for pace in paces) / len(paces)
    return paces[0].unit, per_minute, 60 * left / per_minute if per_minute else None
