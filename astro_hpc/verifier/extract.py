r"""Finding the answer in what a model wrote, in time linear in its length."""

from __future__ import annotations

import re
from collections.abc import Sequence

from astro_hpc.problems.final_answer import BOXES, closing_brace, last_marked

__all__ = ["BOXES", "extract_answer"]

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MAX_GAP_CHARS = 60
_MAX_BOXES = 32
_MAX_GAP_WORDS = 4
_SPACING = re.compile(r"\\text\s*\{([^{}]*)\}|\\(?:quad|qquad|[,;:! ]|[()\[\]])|[$~{}]")
_CONNECTOR = re.compile(r"[,;&]|\b(?:and|or)\b")
_BREAK = re.compile(r"[.!?:=<>]\s|\n\s*\n|\b(?:so|but|not|no|wait|then|thus|hence|therefore|is|are|gives|instead|actually)\b")


def extract_answer(text: str, markers: Sequence[str] = BOXES) -> str | None:
    r"""The final answer of a response: what its last `\boxed{...}` encloses.

    Several boxes that a sentence lists, as in `\boxed{1} and \boxed{2}` or `\boxed{2}, \boxed{3}`, are one answer: their
    contents joined by commas. See `last_marked` for other markers and for what counts as complete.

    Returns:
        None when there is no marker or the last one was never closed.
    """
    last = last_marked(text, markers)
    if last is None or not any(marker in BOXES for marker in markers):
        return last
    return _listed_boxes(text) or last


def _listed_boxes(text: str) -> str | None:
    """The contents of the boxes listed at the end, comma-separated; None when the last box stands alone."""
    starts = _last_boxes(text)
    contents: list[str] = []
    following: int | None = None
    for start, begin in reversed(starts):
        end = closing_brace(text, begin)
        if end is None:
            break
        if following is not None and (end > following or not _is_listing(text[end + 1 : following])):
            break
        contents.append(text[begin:end].strip())
        following = start
    return ", ".join(reversed(contents)) if len(contents) > 1 else None


def _last_boxes(text: str) -> list[tuple[int, int]]:
    """(start, start of the content) of the last few boxes, in order."""
    end, found = len(text), []
    while len(found) < _MAX_BOXES:
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            break
        if match := _BOX.match(text, start):
            found.append((start, match.end()))
        elif not text.startswith("\\fbox", start):
            break
        end = start
    return found[::-1]


def _is_listing(gap: str) -> bool:
    """Whether what stands between two boxes only lists them."""
    if len(gap) > _MAX_GAP_CHARS:
        return False
    plain = _SPACING.sub(lambda match: match.group(1) or " ", gap).lower()
    if _BREAK.search(plain):
        return False
    if not plain.strip():
        return "\n" not in gap
    return bool(_CONNECTOR.search(plain)) and len(plain.split()) <= _MAX_GAP_WORDS
