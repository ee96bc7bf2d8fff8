"""One row of a problem file, whichever of the usual forms it has, as text and normalised answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.problems.final_answer import last_marked, last_match

_TEXT_KEYS = ("problem", "question", "text", "prompt")
_ANSWER_KEYS = ("expected_answer", "answer", "final_answer", "gold")
_GSM8K_MARK = "####"
_UNBRACED_BOX = re.compile(r"\\f?boxed\s+([^\s{}$\\.,;]+)|\\f?boxed\s*(\d)")
_INTEGRAL_FLOAT = re.compile(r"([+-]?\d+)\.0+")
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(?:(?:,|\{,\}|,\\!)\d{3})+(?:\.\d+)?")
_INTEGER = re.compile(r"([+-]?)0*(\d+)")
_MAX_TEXT_CHARS = 100_000


def read_numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a JSON Lines file that isn't blank, one at a time.

    Raises:
        ConfigError: the file can't be read, or a line is no JSON object; file and line are named.
    """
    try:
        handle = open(path, "rb")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); check the path") from None
    with handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}:{number}: not JSON ({error}); mend or remove the line") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}:{number}: expected a JSON object a line, found {type(row).__name__}")
            yield number, row


class UnusableRow(ValueError):
    """The row makes no problem; the message says why."""


@dataclass(frozen=True)
class RowFields:
    """What a row says.

    Attributes:
        text: the problem.
        answer: the gold answer, normalised.
        metadata: level and subject as strings, where the row has them.
    """

    text: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict)


def read_row(row: Mapping[str, Any]) -> RowFields:
    r"""Read a row of the MATH, AMC, AIME, GSM8K, NeMo-Skills or a plain form.

    The text is `problem`, `question`, `text` or `prompt`. The answer is `expected_answer`, `answer`, `final_answer` or
    `gold`; a GSM8K answer counts from its last `####`; without any, the last \boxed{} of `solution` counts.

    Raises:
        UnusableRow: no text, or no answer.
    """
    text = _first(row, _TEXT_KEYS)
    if not isinstance(text, str) or not text.strip():
        raise UnusableRow(f"no problem text (looked for {', '.join(_TEXT_KEYS)})")
    if len(text) > _MAX_TEXT_CHARS:
        raise UnusableRow(f"problem text of {len(text)} characters (limit {_MAX_TEXT_CHARS})")
    answer = normalise_gold(_answer_text(row))
    if not answer:
        raise UnusableRow("the answer is empty")
    metadata = {}
    if (level := row.get("level")) not in (None, ""):
        metadata["level"] = str(level).removeprefix("Level ").strip()
    if (subject := row.get("subject") or row.get("type")) and isinstance(subject, str):
        metadata["subject"] = subject
    return RowFields(text.strip(), answer, metadata)


def normalise_gold(text: str) -> str:
    """A gold answer as it is kept: "025" and "27.0" are the integers 25 and 27, "1,000" is 1000.

    Anything but a plain number is left as it is, for the verifier.
    """
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
        text = text[1:-1].strip()
    if _GROUPED.fullmatch(text):
        text = re.sub(r"[,{}!\\]", "", text)
    if match := _INTEGRAL_FLOAT.fullmatch(text):
        text = match.group(1)
    if match := _INTEGER.fullmatch(text):
        sign, digits = match.groups()
        return f"-{digits}" if sign == "-" and digits != "0" else digits
    return text


def _first(row: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _answer_text(row: Mapping[str, Any]) -> str:
    answer = _first(row, _ANSWER_KEYS)
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, bool) or (answer is not None and not isinstance(answer, str | int | float)):
        raise UnusableRow(f"the answer is a {type(answer).__name__}, not a text or number")
    if answer is not None:
        text = repr(answer) if isinstance(answer, float) else str(answer)
        if _GSM8K_MARK in text:
            return text.rpartition(_GSM8K_MARK)[2]
        boxed = last_marked(text) if "boxed" in text else None
        return boxed if boxed is not None else text
    solution = row.get("solution")
    if not isinstance(solution, str):
        raise UnusableRow(f"no answer (looked for {', '.join(_ANSWER_KEYS)}, solution)")
    boxed = boxed_answer(solution)
    if boxed is None:
        raise UnusableRow("no answer, and the solution has no complete \\boxed{}")
    return boxed


def boxed_answer(solution: str) -> str | None:
    r"""The last boxed answer of a reference solution, which may also be written without braces: `\boxed 5`."""
    unbraced = last_match(_UNBRACED_BOX, solution)
    start = max(solution.rfind("\\boxed{"), solution.rfind("\\fbox{"))
    if unbraced is not None and unbraced.start() > start:
        return unbraced.group(1) or unbraced.group(2)
    return last_marked(solution)
