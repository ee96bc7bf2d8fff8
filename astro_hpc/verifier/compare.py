"""Exact comparison of simple answers, without any library: the fast path."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"([+-]?)(\d+(?:,\d{3})*)?(?:\.(\d+))?")


def compare_exactly(gold: str, answer: str) -> bool | None:
    """Whether two answers are equal; None when this can't tell."""
    if gold == answer:
        return True
    a, b = _number(gold), _number(answer)
    return None if a is None or b is None else a == b


def _number(text: str) -> Fraction | None:
    text = text.strip().strip("$").strip()
    if len(text) > 100 or not text or not _NUMBER.fullmatch(text) or not any(map(str.isdigit, text)):
        return None
    return Fraction(text.replace(",", ""))
