"""Checking a file of answers: what `astro-hpc verify FILE.jsonl` does."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import VerifierConfig
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.row_files import read_numbered
from astro_hpc.verifier.extract import read_answer
from astro_hpc.verifier.pool import Verdict, VerifierPool

_AHEAD = 256


def verify_file(path: Path, cfg: VerifierConfig | None = None) -> None:
    """Print one JSON result a line for each line of the file, as they become known. See `verify_lines`."""
    for row in verify_lines(path, VerifierConfig() if cfg is None else cfg):
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


def verify_lines(path: Path, cfg: VerifierConfig) -> Iterator[dict[str, Any]]:
    r"""Check the answers of a JSON Lines file, one result a line, in the file's order.

    A line holds {"gold", "pred"}, texts or numbers: answers as they are, boxed or within a text (see `read_answer`).
    The file is streamed: a few hundred lines are held, whatever its length.

    Yields:
        {"outcome": "right", "wrong" or "unknown", "seconds": of the comparison}.

    Raises:
        ConfigError: the file can't be read, or a line is not of this form; the line is named.
    """
    with VerifierPool(cfg) as pool:
        waiting: deque[Future[Verdict]] = deque()
        try:
            for gold, pred in _pairs(path):
                waiting.append(pool.submit_answer(Problem("file", "", read_answer(gold) or gold), read_answer(pred)))
                if len(waiting) >= _AHEAD:
                    yield _row(waiting.popleft())
        except ConfigError as error:
            broken: ConfigError | None = error  # raised after the results of the lines before it
        else:
            broken = None
        while waiting:
            yield _row(waiting.popleft())
        if broken is not None:
            raise broken


def _row(future: Future[Verdict]) -> dict[str, Any]:
    verdict = future.result()
    return {"outcome": verdict.outcome, "seconds": round(verdict.seconds, 6)}


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    for number, row in read_numbered(path):
        if not {"gold", "pred"} <= row.keys():
            raise ConfigError(f'{path}:{number}: expected {{"gold": ..., "pred": ...}}; mend or remove the line')
        yield _text(row["gold"], path, number, "gold"), _text(row["pred"], path, number, "pred")


def _text(value: Any, path: Path, line: int, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{path}:{line}: {key} is a {type(value).__name__}; give a text or a number")
    return value if isinstance(value, str) else repr(value)
