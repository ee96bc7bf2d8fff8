"""Finding the final answer in a text, in time linear in its length."""

from __future__ import annotations

import re
from collections.abc import Sequence

BOXES = (r"\boxed{", r"\fbox{")
"""The markers of a final answer that are looked for where no others are named."""

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
"""A box's beginning."""

_MAX_GAP_CHARS = 60
_MAX_BOXES = 32
_MAX_GAP_WORDS = 4
_SPACING = re.compile(r"\\text\s*\{([^{}]*)\}|\\(?:quad|qquad|[,;:! ]|[()\[\]])|[$~{}]")
_CONNECTOR = re.compile(r"[,;&]|\b(?:and|or)\b")
_NAMES_NEXT = re.compile(r"[a-z]\w*(?:\s*\([a-z]\))?\s*=\s*$")
_BREAK = re.compile(
    r"[.!?:=<>]\s|\n\s*\n|\b(?:so|but|not|no|wait|then|thus|hence|therefore|is|are|gives|instead|actually)\b"
)
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


def listed_boxes(text: str) -> str | None:
    """The contents of the boxes listed at the end, comma-separated; None when the last box stands alone."""
    starts = _last_boxes(text)
    contents: list[str] = []
    following: int | None = None
    for start, begin in reversed(starts):
        end = closing_brace(text, begin)
        if end is None:
            break
        if following is not None and (end > following or not is_listing(text[end + 1 : following])):
            break
        contents.append(text[begin:end].strip())
        following = start
    return ", ".join(reversed(contents)) if len(contents) > 1 else None


def _last_boxes(text: str) -> list[tuple[int, int]]:
    """(start, start of the content) of the last few boxes, in order."""
    end = len(text)
    found: list[tuple[int, int]] = []
    while len(found) < _MAX_BOXES:
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            break
        if match := BOX.match(text, start):
            found.append((start, match.end()))
        elif not text.startswith("\\fbox", start):
            break
        end = start
    return found[::-1]


def is_listing(gap: str) -> bool:
    """Whether what stands between two boxes only lists them."""
    if len(gap) > _MAX_GAP_CHARS:
        return False
    plain = _SPACING.sub(lambda match: match.group(1) or " ", gap).lower()
    plain = _NAMES_NEXT.sub(" ", plain)
    if _BREAK.search(plain):
        return False
    if not plain.strip():
        return "\n" not in gap
    return bool(_CONNECTOR.search(plain)) and len(plain.split()) <= _MAX_GAP_WORDS
