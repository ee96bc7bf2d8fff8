"""One row of a problem file, whichever of the usual forms it has, as text and normalised answer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from astro_hpc.problems.final_answer import last_marked, last_match, listed_boxes

_TEXT_KEYS = ("problem", "question", "text", "prompt")
_ANSWER_KEYS = ("expected_answer", "answer", "final_answer", "gold")
_SOLUTION_KEY = "solution"
_LEVEL_KEYS = ("level", "difficulty")
_SUBJECT_KEYS = ("subject", "type", "problem_type", "domain")
_NO_ANSWERS = frozenset({"proof", "notfound", "not found", "n/a", "nan"})
_GSM8K_MARK = "####"
_UNBRACED_BOX = re.compile(r"\\f?boxed\s+([^\s{}$\\.,;]+)|\\f?boxed\s*(\d)")
_INTEGRAL_FLOAT = re.compile(r"([+-]?\d+)\.0+")
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(?:(?:,|\{,\}|,\\!)\d{3})+(?:\.\d+)?")
_INTEGER = re.compile(r"([+-]?)0*(\d+)")
_MAX_TEXT_CHARS = 100_000
_MAX_ANSWER_CHARS = 2_000


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


def columns_to_read(text_column: str | None = None, answer_column: str | None = None) -> set[str]:
    """Names of all columns that `read_row` may look at."""
    own = {column.partition(".")[0] for column in (text_column, answer_column) if column}
    return {*_TEXT_KEYS, *_ANSWER_KEYS, _SOLUTION_KEY, *_LEVEL_KEYS, *_SUBJECT_KEYS, *own}


def read_row(row: Mapping[str, Any], text_column: str | None = None, answer_column: str | None = None) -> RowFields:
    r"""Read a row of the MATH, AMC, AIME, GSM8K, NeMo-Skills or a plain form.

    The text is `problem`, `question`, `text` or `prompt`, which may be a chat's messages, of which the user's only one
    counts. The answer is `expected_answer`, `answer`, `final_answer` or `gold`; a GSM8K answer counts from its last
    `####`; without any, the last \boxed{} of `solution` counts.

    Args:
        row: the row.
        text_column: where the text is instead; `a.b` is b within a.
        answer_column: where the answer is instead.

    Raises:
        UnusableRow: no text, or no answer that can be checked.
    """
    looked = (text_column,) if text_column else _TEXT_KEYS
    text = _message(_at(row, text_column) if text_column else _first(row, _TEXT_KEYS))
    if not isinstance(text, str) or not text.strip():
        raise UnusableRow(f"no problem text (looked for {', '.join(looked)})")
    if len(text) > _MAX_TEXT_CHARS:
        raise UnusableRow(f"problem text of {len(text)} characters (limit {_MAX_TEXT_CHARS})")
    answer = normalise_gold(_answer_text(row, answer_column))
    if not answer:
        raise UnusableRow("the answer is empty")
    if len(answer) > _MAX_ANSWER_CHARS:
        raise UnusableRow(f"an answer of {len(answer)} characters (limit {_MAX_ANSWER_CHARS})")
    if answer.lower() in _NO_ANSWERS:
        raise UnusableRow(f"the answer is {answer!r}: nothing to check")
    metadata = {"level": _level(_first(row, _LEVEL_KEYS)), "subject": _first(row, _SUBJECT_KEYS)}
    metadata = {key: value for key, value in metadata.items() if isinstance(value, str) and value}
    for part in (text, answer, *metadata.values()):
        if not _is_unicode(part):
            raise UnusableRow("half of a surrogate pair: not Unicode")
    return RowFields(text.strip(), answer, metadata)


def plain_level(level: str) -> str:
    """MATH's "Level 5" is 5."""
    return level.strip().removeprefix("Level ").strip()


def _level(level: Any) -> str | None:
    if isinstance(level, int | float) and not isinstance(level, bool):
        return f"{level:g}"
    return plain_level(level) if isinstance(level, str) else None


def _message(text: Any) -> Any:
    """The text of a chat's only user message; anything but a chat as it is."""
    if not isinstance(text, list) or not all(isinstance(message, Mapping) for message in text):
        return text
    said = [message.get("content") for message in text if message.get("role") == "user"]
    return said[0] if len(said) == 1 else None


def _at(row: Mapping[str, Any], column: str) -> Any:
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def _answer_text(row: Mapping[str, Any], column: str | None) -> str:
    answer = _at(row, column) if column else _first(row, _ANSWER_KEYS)
    if answer is not None:
        return _answer_value(answer)
    solution = None if column else row.get(_SOLUTION_KEY)
    if not isinstance(solution, str):
        raise UnusableRow(f"no answer (looked for {column or ', '.join([*_ANSWER_KEYS, _SOLUTION_KEY])})")
    boxed = boxed_answer(solution)
    if boxed is None:
        raise UnusableRow("no answer, and the solution has no complete \\boxed{}")
    return boxed


def _answer_value(answer: Any) -> str:
    if isinstance(answer, list) and answer and all(isinstance(part, str | int | float) for part in answer):
        return ", ".join(normalise_gold(_answer_value(part)) for part in answer)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UnusableRow(f"the answer is a {type(answer).__name__}, not a text or number")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise UnusableRow(f"the answer is {answer}: nothing to check")
    text = repr(answer) if isinstance(answer, float) else str(answer)
    if _GSM8K_MARK in text:
        return text.rpartition(_GSM8K_MARK)[2]
    boxed = last_marked(text) if "boxed" in text else None
    return boxed if boxed is not None else text


def boxed_answer(solution: str) -> str | None:
    r"""The last boxed answer of a reference solution, which may also be written without braces: `\boxed 5`.

    Boxes that a sentence lists are one answer, as they are in a model's response.
    """
    unbraced = last_match(_UNBRACED_BOX, solution)
    start = max(solution.rfind("\\boxed{"), solution.rfind("\\fbox{"))
    if unbraced is not None and unbraced.start() > start:
        return unbraced.group(1) or unbraced.group(2)
    return listed_boxes(solution) or last_marked(solution)
