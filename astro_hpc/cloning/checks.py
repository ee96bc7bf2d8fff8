"""What a language model may write into a trace: pure checks, in time linear in the text.

Model output is hostile until shown harmless: each check names a reason to refuse, or None. Lengths are looked at
first, so that nothing else sees an overlong text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_NUMBER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])|[0-9]*\.[0-9]+|[0-9]+")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_STATED = re.compile(r"\b(?:final answer|answer is|answer:|answer would be)", re.IGNORECASE)
_FORMULA_RUN = re.compile(r"[0-9+\-*/^=(). ]+")
_SHINGLE_WORDS = 8


@dataclass(frozen=True)
class Rules:
    """What the checks go by.

    Attributes:
        answer_of: the final answer that a verifier reads in a text, None where there is none.
        count_backtracks: how often a text says that it goes back.
        answer_markers: what precedes a final answer.
        delimiter: ends a step; where it is not white space, a text must not hold it (`tidy` sees to white space).
        reflections: sentences of the reflection phrases; none may stand in a step or a backtrack.
        leaks: strings of the prompt that must never come back: labels, tags, markers. Lower case.
        shingles: runs of eight words of the prompt's instructions and examples.
        growth: a text may have this many times its source's characters...
        spare_chars: ...and this many more.
    """

    answer_of: Callable[[str], str | None]
    count_backtracks: Callable[[str], int]
    answer_markers: tuple[str, ...] = ("\\boxed{", "\\fbox{")
    delimiter: str = "\n"
    reflections: tuple[str, ...] = ()
    leaks: tuple[str, ...] = ()
    shingles: frozenset[str] = field(default_factory=frozenset)
    growth: float = 4.0
    spare_chars: int = 240


def check_step(text: str, *, step: str, context: str, rules: Rules) -> str | None:
    """Why `text` can't stand for `step` in a trace, or None.

    Args:
        text: the model's, through `tidy`.
        step: as the policy wrote it.
        context: the problem and the trace so far: what the text may also speak of.
    """
    if reason := _check_form(text, step, context, rules):
        return reason
    if not numbers(step) <= numbers(text):
        return "lost_number"
    if not numbers(text) <= numbers(step) | numbers(context):
        return "new_number"
    if any(equation not in text.replace(" ", "") for equation in _equations(step)):
        return "lost_equation"
    return _check_answer(text, step, rules)


def check_backtrack(text: str, *, step: str, context: str, rules: Rules) -> str | None:
    """Why `text` can't stand for going back to `step` (empty: to the bare problem), or None.

    `text` includes the words it was made to begin with.
    """
    if reason := _check_form(text, step, context, rules, backtracks=1):
        return reason
    if not numbers(text) <= numbers(step) | numbers(context):
        return "new_number"
    return "early_answer" if _count_markers(text, rules) or _STATED.search(text) else None


def _check_form(text: str, step: str, context: str, rules: Rules, backtracks: int = 0) -> str | None:
    if not text:
        return "empty"
    if len(text) > rules.growth * len(step) + rules.spare_chars:
        return "too_long"
    if any(_is_control(character) for character in text):
        return "control_character"
    if not rules.delimiter.isspace() and rules.delimiter in text:
        return "several_steps"
    words = _words(text)
    plain, source = " ".join(words), " ".join(_words(f"{step} {context}"))
    if any(leak in plain and leak not in source for leak in rules.leaks):
        return "leaked_prompt"
    if any(run in rules.shingles and run not in source for run in _runs(words)):
        return "leaked_prompt"
    if any(sentence in plain for sentence in rules.reflections):
        return "reflection"
    return "backtrack" if rules.count_backtracks(text) != backtracks else None


def _check_answer(text: str, step: str, rules: Rules) -> str | None:
    """A step that holds no answer must not gain one; one that does must keep it and have no second."""
    had, has = _count_markers(step, rules), _count_markers(text, rules)
    if has > had:
        return "second_answer" if had else "early_answer"
    if has < had:
        return "lost_answer"
    if not had and len(_STATED.findall(text)) > len(_STATED.findall(step)):
        return "early_answer"
    if (boxes := [match.end() for match in _BOX.finditer(text)]) and _STATED.search(text, boxes[-1]):
        return "second_answer"  # in words, behind the box
    return "changed_answer" if rules.answer_of(text) != rules.answer_of(step) else None


def tidy(text: str, delimiter: str) -> str:
    """What a model wrote as one step: no white space around it, no step delimiter at its end or, if white, inside.

    With one line end as delimiter it becomes one line, with any other it loses its empty lines.
    """
    lines = [line.strip() for line in text.rstrip().removesuffix(delimiter).splitlines()]
    joined = " " if delimiter.strip(" ") == "\n" else "\n"
    return joined.join(line for line in lines if line)


def numbers(text: str) -> set[str]:
    """The numbers in a text, without thousands commas and leading zeros: `1,000` and `1000` are the same."""
    found = set()
    for match in _NUMBER.finditer(text):
        whole, point, decimals = match.group().replace(",", "").partition(".")
        found.add((whole.lstrip("0") or "0") + point + decimals)
    return found


def _equations(text: str) -> list[str]:
    """The plain equations in a text, without spaces: `4-2=2`, and `=5` of `x = 5`."""
    runs = [run.replace(" ", "").strip(".()") for run in _FORMULA_RUN.findall(text)]
    return [run for run in runs if "=" in run and any(character.isdigit() for character in run)]


def shingles_of(texts: Sequence[str]) -> frozenset[str]:
    """All runs of eight words, in lower case: what must not come back of a prompt."""
    return frozenset(run for text in texts for run in _runs(_words(text)))


def sentences_of(phrases: Sequence[str]) -> tuple[str, ...]:
    """The sentences of reflection phrases as `Rules.reflections` wants them; those of one or two words left out."""
    found: dict[str, None] = {}
    for phrase in phrases:
        for sentence in re.split(r"(?<=[.?!])\s+", " ".join(phrase.split())):
            if len(sentence.split()) > 2:
                found[sentence.lower().rstrip(".?!")] = None
    return tuple(found)


def _count_markers(text: str, rules: Rules) -> int:
    others = [marker for marker in rules.answer_markers if not _BOX.match(marker)]
    return len(_BOX.findall(text)) + sum(text.count(marker) for marker in others)


def _words(text: str) -> list[str]:
    return text.lower().replace("\u2019", "'").split()


def _runs(words: Sequence[str]) -> list[str]:
    return [" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1)]


def _is_control(character: str) -> bool:
    # U+FFFD stands where a tokenizer's bytes were no character.
    return character == "\ufffd" or (
        character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co")
    )
