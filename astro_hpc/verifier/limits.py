"""Caps: what is not worth trying to evaluate. Looked at before anything is parsed, in linear time."""

from __future__ import annotations

import re

_MAX_NESTING = 60
_MAX_COMMANDS = 300
_COSTLY = re.compile(
    r"\d{2000}"  # endless literals
    r"|\d{5,}\s*[)}]*\s*!"  # factorials of more than 9,999
    r"|!\s*[)}]*\s*!\s*[)}]*\s*!|!\s*[)}]+\s*!"  # of factorials
    r"|\^\s*[{(]*\s*[+-]?\d{6,}"  # exponents of more than 99,999
    r"|\d\s*[})]*\s*\^\s*[{(]*\s*\d+\s*\^\s*[{(]*\s*\d{3,}"  # 2^{2^{100}}
    r"|\^\s*\{[^{}^]{1,8}\^\s*\{[^{}^]{1,8}\^|\^\s*\w\s*\^\s*\w\s*\^"  # towers
    r"|\\[dt]?binom\s*\{\s*\d{6,}"
    r"|\\(?:sum|prod)_\{[^{}]*\}\s*\^\s*\{?\s*\d{5,}"
)


class TooCostlyError(ValueError):
    """The answer asks for more than is worth trying; whether it is right can't be told."""


def refuse_costly(text: str) -> None:
    """Turn away a normalised answer that would cost too much.

    Raises:
        TooCostlyError: deep nesting, towers of exponents, huge factorials, literals, exponents or sums.
    """
    if _COSTLY.search(text) or text.count("\\") > _MAX_COMMANDS:
        raise TooCostlyError("too large")
    depth = 0
    for character in text:
        if character in "{([":
            depth += 1
            if depth > _MAX_NESTING:
                raise TooCostlyError("nested too deeply")
        elif character in "})]":
            depth -= 1
