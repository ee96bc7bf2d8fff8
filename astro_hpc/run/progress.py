"""What the user sees while a stage runs: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LOG_EVERY_SECONDS = 20.0


def format_seconds(seconds: float) -> str:
    """`75.2` -> `1m15s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Counts `total` units of work with rate and time left."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        """Count from `done` (work a resumed stage found finished) to `total`; `shown` or not."""
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._first = done
        self._fields: dict[str, object] = {}
        self._started = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        self._shown = shown

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        if self._shown and sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description:<8}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TextColumn("[dim]{task.fields[note]}"),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, unit=self.unit, note="")
        return self

    def update(self, n: int = 1, **fields: object) -> None:
        """`n` more units are done; `fields` (already formatted) are shown beside the rate."""
        self.done += n
        self._fields.update(fields)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self._note())
        elif time.monotonic() - self._last_line >= _LOG_EVERY_SECONDS:
            self._last_line = time.monotonic()
            self._print_line()

    def _note(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = (self.done - self._first) / elapsed
        parts = [f"{rate:.2f} {self.unit}/s" if rate >= 1 or not rate else f"{60 * rate:.1f} {self.unit}/min"]
        parts += [f"{name} {value}" for name, value in self._fields.items()]
        return ", ".join(parts)

    def _print_line(self) -> None:
        if not self._shown:
            return
        new = self.done - self._first
        left = (time.monotonic() - self._started) / new * (self.total - self.done) if new else None
        eta = f", {format_seconds(left)} left" if left is not None else ""
        print(f"{self.label}: {self.done}/{self.total} {self.unit} ({self._note()}{eta})", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._print_line()
