"""Finding the final answer in a text, in time linear in its length."""

from __future__ import annotations

import re
from collections.abc import Sequence

BOXES = (r"\boxed{", r"\fbox{")
"""The markers of a final answer that are looked for where no others are named."""

_ESCAPE_OR_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_SPACED_BOX = re.compile(r"\\(boxed|fbox)\s+\{")


def last_marked(text: str, markers: Sequence[str] = BOXES) -> str | None:
    r"""What the last marker encloses, without outer white space.

    A marker that ends in `{` runs to its matching brace (escaped braces, `\{`, don't count); any other, such as
    `Answer:`, to the end of its line. The last marker decides: when it was never closed, as in a text cut off in
    the middle, there is no answer.

    Returns:
        The answer's text, possibly empty; None when there is no marker or the last one is unclosed.
    """
    if " {" in text or "\n{" in text:
        text = _SPACED_BOX.sub(r"\\\1{", text)
    start, marker = max((text.rfind(marker), marker) for marker in markers)
    if start < 0:
        return None
    begin = start + len(marker)
    if marker.endswith("{"):
        end = closing_brace(text, begin)
        return None if end is None else text[begin:end].strip()
    return text[begin:].partition("\n")[0].strip() or None


def closing_brace(text: str, begin: int) -> int | None:
    """Index of the brace that closes the one just before `begin`; None when there is none."""
    depth = 1
    for match in _ESCAPE_OR_BRACE.finditer(text, begin):
        token = match.group()
        if token == "{":
            depth += 1
        elif token == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last of the non-overlapping matches."""
    found = None
    for match in pattern.finditer(text):
        found = match
    return found
