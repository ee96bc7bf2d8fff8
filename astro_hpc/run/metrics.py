"""metrics.jsonl: one line a step, readable while the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from astro_hpc.run.files import write_text_atomic


class MetricsLog:
    """Appends steps to a JSON Lines file; on resume, steps that will be done again are cut."""

    def __init__(self, path: Path, resume_step: int | None = None, write: bool = True) -> None:
        """Open `path`.

        Args:
            resume_step: the first step that will be logged again; lines from it on are dropped. None: all are.
            write: False where another rank writes the file.
        """
        self._handle = None
        if not write:
            return
        kept = [row for row in read_metrics(path) if resume_step is not None and row["step"] < resume_step]
        write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 - held until close

    def log(self, step: int, **values: Any) -> None:
        """Append one step."""
        if self._handle is None:
            return
        self._handle.write(json.dumps({"step": step, **values}) + "\n")
        self._handle.flush()

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, also while it is being written; empty when there is none."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the torn last line of a killed run
    return rows
