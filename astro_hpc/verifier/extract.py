r"""Finding the answer in what a model wrote, in time linear in its length."""

from __future__ import annotations

import re
from collections.abc import Sequence

from astro_hpc.problems.final_answer import BOX, BOXES, is_listing, last_marked, last_match, listed_boxes

__all__ = ["BOXES", "extract_answer"]


def extract_answer(text: str, markers: Sequence[str] = BOXES) -> str | None:
    r"""The final answer of a response: what its last `\boxed{...}` encloses.

    Several boxes that a sentence lists, as in `\boxed{1} and \boxed{2}` or `\boxed{2}, \boxed{3}`, are one answer:
    their contents joined by commas. See `last_marked` for other markers and for what counts as complete.

    Returns:
        None when there is no marker or the last one was never closed.
    """
    last = last_marked(text, markers)
    if last is None or not any(marker in BOXES for marker in markers):
        return last
    return listed_boxes(text) or last


# --- texts without a marker -----------------------------------------------------------------------------------

_MAX_FREE_CHARS = 10_000
_CONTROL_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>")
_MATH = re.compile(
    r"\$\$(?P<display>(?:[^$\\]|\\.){1,1000})\$\$|\\\[(?P<bracket>(?:[^\\]|\\(?![\[\]]).){1,1000})\\\]"
    r"|\$(?P<inline>(?:[^$\\\n]|\\.){1,1000})\$|\\\((?P<round>(?:[^\\\n]|\\(?![()])[^\n]){1,1000})\\\)",
    re.DOTALL,
)
_ANSWER_PHRASE = re.compile(
    r"\b(?:final\s+)?answer\b(?:[^.\n]{0,80}?\b(?:is|are)\b|\s*\**\s*:)?\s*:?\**"
    r"|\bcorrect\s+(?:option|choice)\s+is\b\s*:?\**"
    r"|\b(?:solutions|roots|answers|values)\s+(?:of\s+\S{1,20}\s+)?are\b\s*:?\**",
    re.IGNORECASE,
)
_GSM8K_LINE = re.compile(r"^####\s*(\S[^\n]*)", re.MULTILINE)
_LEAD = re.compile(r"^(?:so|thus|hence|therefore|then|we\s+(?:get|have|find)|that's|it's)\b[\s,:]*", re.IGNORECASE)
_SENTENCE = re.compile(r"\s*(?:[A-Z][a-z]*|That's|It's)\s+[a-z][a-z']*\s.*[\d\x00]", re.DOTALL)
_FINAL_PHRASE = re.compile(r"\bfinal\s+answer\s+(?:is|are)\b\s*:?\**", re.IGNORECASE)
_HOPE = re.compile(r"\.?\s*I hope it is correct\.?.*", re.IGNORECASE | re.DOTALL)
_PROSE_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,40}(?![A-Za-z]{0,40}\()")
_NUMBER = re.compile(
    r"(?<![\w.\\^_{])[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\s*/\s*\d+|\d+,\d{2}(?!\d)|\d*\.\d+|\d+)"
    r"(?:\s*(?:\\?%|percent\b|pct\b))?"
)
_PLAIN_GROUP = re.compile(r"[(\[]\s*[-+]?[\d./]{1,20}(?:\s*,\s*[-+]?[\d./]{1,20}){1,8}\s*[)\]]")
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*\}")
_SHOWN_RELATION = re.compile(r"\b[A-Za-z]\w{0,20}\s{0,5}(?:\\in\b|\\?[<>]=?|\\[lg]eq?t?\b|!=|=|\\neq?\b)\s{0,5}\S+")
_LABEL = re.compile(r"\s*[A-Za-z]{3,}\s*:\s")
_PROSE_WORDS = 3


def read_answer(text: str) -> str | None:
    r"""The answer in a text that may be a whole response or just an answer, boxed or not.

    In this order: the last `\boxed{}`; the last `####` line; the text itself when it is no prose; what follows
    `(final) answer (is)`; the last formula; the last number or point. Meant for files of mixed origin: a model that
    is trained gets `extract_answer`.

    Returns:
        None when nothing looks like an answer.
    """
    text = text.replace("\\\\boxed", "\\boxed")
    if "\\boxed" in text or "\\fbox" in text:
        boxed = extract_answer(text)
        if boxed is not None:
            return _stated_last(text[text.rfind("box") :]) or boxed
        text = BOX.sub(" ", text)  # never closed: what is there counts
    text = _CONTROL_TOKEN.split(text[-_MAX_FREE_CHARS:])[0] if "<|" in text else text[-_MAX_FREE_CHARS:]
    if marked := last_match(_GSM8K_LINE, text):
        return marked[1].strip()
    text = _LEAD.sub("", text.strip())
    formulas = list(_MATH.finditer(text))
    outside = _MATH.sub(" \x00 ", text)
    if not _is_prose(outside, bool(formulas)):
        return _listed_formulas(text, formulas) if formulas else text.strip() or None
    phrase = last_match(_ANSWER_PHRASE, text)
    if phrase is not None:
        tail = _HOPE.sub("", text[phrase.end() :]).strip()
        if found := _first_answer(tail):
            return found
    formulas = list(_MATH.finditer(_HOPE.sub("", text)))
    return _last_answer(_HOPE.sub("", text), formulas)


def _stated_last(tail: str) -> str | None:
    """The answer of a `Final answer: ...` that comes after the last box."""
    phrase = last_match(_FINAL_PHRASE, tail[:_MAX_FREE_CHARS])
    return None if phrase is None else _first_answer(_HOPE.sub("", tail[phrase.end() : _MAX_FREE_CHARS]).strip())


def _is_prose(outside: str, has_formulas: bool) -> bool:
    words = _PROSE_WORD.findall(_TEXT_COMMAND.sub(" ", outside))
    words = [word for word in words if word.lower() not in ("and", "or")]
    if not has_formulas:
        labelled = "answer" in outside.lower() or _LABEL.match(outside) or _SENTENCE.match(outside)
        return (
            bool(labelled)
            or _ANSWER_PHRASE.search(outside) is not None
            or (len(words) >= _PROSE_WORDS and bool(re.search(r"[\d$\\=]", outside)))
        )
    return bool(words)


def _listed_formulas(text: str, formulas: list[re.Match[str]]) -> str:
    """Formulas with nothing but `and`, commas or a percent sign around them, as one answer."""
    return _MATH.sub(lambda match: f" {_body(match)} ", text).strip()


def _body(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def _first_answer(tail: str) -> str | None:
    """The answer right after `the answer is`."""
    sentence = re.split(r"(?<=[^\d\s])\.\s|\n\s*\n", tail, maxsplit=1)[0].strip()
    if not sentence:
        return None
    formulas = list(_MATH.finditer(sentence))
    if formulas and not _PROSE_WORD.search(sentence[: formulas[0].start()]):
        listed = [formulas[0]]
        for formula in formulas[1:]:
            if not is_listing(sentence[listed[-1].end() : formula.start()]):
                break
            listed.append(formula)
        return ", ".join(map(_body, listed)) + _percent_after(sentence[listed[-1].end() :])
    bare = sentence.strip(" *.")
    if not formulas and bare and len(_PROSE_WORD.findall(bare)) < _PROSE_WORDS and not _open_formula(bare):
        return bare
    return _last_answer(sentence, formulas)


def _last_answer(text: str, formulas: list[re.Match[str]]) -> str | None:
    """The last formula or the last number, whichever stands later."""
    end = formulas[-1].end() if formulas else 0
    rest = text[end:]
    if _open_formula(rest):
        return None
    number, relation = last_match(_NUMBER, rest), last_match(_SHOWN_RELATION, rest)
    if relation is not None and (number is None or relation.end() >= number.end()):
        return relation.group().strip(" .")
    group = last_match(_PLAIN_GROUP, rest)
    if group is not None and (number is None or group.end() > number.end()):
        return group.group()
    if number is not None:
        return number.group()
    if not formulas:
        return None
    return _body(formulas[-1]) + _percent_after(rest)


def _percent_after(text: str) -> str:
    return "%" if re.match(r"\s*(?:\\?%|percent\b|pct\b)", text) else ""


def _open_formula(text: str) -> bool:
    """Whether a formula begins and was not understood: its numbers are no answers."""
    return "\\(" in text or "\\[" in text
