"""The fast path: comparing numbers, words and what is made of them, exactly and without any library."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from astro_hpc.verifier.equality import compare
from astro_hpc.verifier.limits import refuse_costly
from astro_hpc.verifier.normalize import AnswerPolicy, normalize, split_unit
from astro_hpc.verifier.structure import Value, parse

_MAX_DIGITS = 400
_MAX_EXPONENT = 400
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_INTEGER = re.compile(r"-?\d{1,300}", re.ASCII)
_PLAIN = re.compile(rf"([+-]?)({_DECIMAL})")
_GROUPED = re.compile(r"([+-]?)(\d{1,3}(?:[, ]\d{3})+(?:\.\d*)?)")
_FRACTION = re.compile(
    rf"([+-]?)(?:\\frac\{{([+-]?{_DECIMAL})\}}\{{([+-]?{_DECIMAL})\}}|({_DECIMAL})\s*(?:/|\\div)\s*({_DECIMAL}))"
)
_MIXED = re.compile(r"([+-]?)(\d+)(?:\s*\\frac\{(\d+)\}\{(0*[1-9]\d*)\}|\s+(\d+)\s*/\s*(0*[1-9]\d*))")
_SCIENTIFIC = re.compile(
    rf"([+-]?{_DECIMAL})\s*(?:(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{?\s*([+-]?\d+)\s*\}}?|[eE]([+-]?\d+))"
)
_LETTER = re.compile(r"[A-Za-z']")
_FORMULA = re.compile(r"[A-Za-z]'*\(")
_TEXT = re.compile(r"[A-Za-z][A-Za-z .,'()-]*")
_LONG_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{4,}")
_BASED = re.compile(r"\(?(-?[0-9A-Z]+)\)?_(?:(\d+)|\{(\d+|[a-z]+)\})")
_CHOICE = re.compile(
    r"\(\s*([A-J])\s*\)\s*(\S.*)|([A-J])\s*[).:]\s*(\S.*)|(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s*\(?([A-J])\)?"
)
_CHOICES = frozenset("ABCDEFGHIJ")
_NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        re.findall(
            r"\w+",
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen twenty",
        )
    )
}
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=[a-z]{3})", re.IGNORECASE)
_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+")


def compare_exactly(gold: str, answer: str, policy: AnswerPolicy = AnswerPolicy()) -> bool | None:  # noqa: B008
    """Whether two answers are equal; None when exact means can't tell. Cheap, whatever the texts are.

    Args:
        gold: the right answer, raw.
        answer: the answer in question, raw.
        policy: how percent signs and units are read.

    Raises:
        TooCostlyError: nobody should try to tell.
    """
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    left, right = normalize_cached(gold), normalize(answer)
    return compare_normalized(left, right, policy, lambda a, b: None)


def canonical(answer: str, policy: AnswerPolicy = AnswerPolicy()) -> str:  # noqa: B008
    """One text for answers that are the same at a glance: 0.5, 1/2 and `5/10 cm` are 1/2. Votes are counted by it."""
    text = normalize(answer)
    if policy.units == "ignore":
        text = split_unit(text)[0]
    value = number(text)
    return text if value is None else str(value)


def compare_normalized(
    gold: str, answer: str, policy: AnswerPolicy, hard: Callable[[str, str], bool | None]
) -> bool | None:
    """As `compare_exactly` for normalised texts; single values that it can't tell are put to `hard`.

    Raises:
        TooCostlyError: too large, too deep or too many parts.
    """
    if squeeze(gold) == squeeze(answer):
        return bool(gold)
    if not answer:
        return False
    refuse_costly(answer)
    letters, (gold, answer) = _choices(gold, answer)
    if letters:
        return letters[0] == letters[1]

    def scalars(a: str, b: str) -> bool | None:
        equal = compare_scalars(a, b, policy)
        return hard(a, b) if equal is None else equal

    return compare(_parse_cached(gold), parse(answer), scalars)


def _choices(gold: str, answer: str) -> tuple[tuple[str, str] | None, tuple[str, str]]:
    """(letters, texts) where one answer names a choice with its text, `(A) 5`: letters if the other has one too,
    else the texts without them."""
    found = [_CHOICE.fullmatch(text) for text in (gold, answer)]
    if not any(found):
        return None, (gold, answer)
    letters, texts = [], []
    for match, text in zip(found, (gold, answer), strict=True):
        letter = (match[1] or match[3] or match[5]) if match else text.strip("() ")
        letters.append(letter if letter in _CHOICES else None)
        texts.append((match[2] or match[4] or text) if match else text)
    if letters[0] and letters[1]:
        return (letters[0], letters[1]), (gold, answer)
    return None, (texts[0], texts[1])


def compare_scalars(gold: str, answer: str, policy: AnswerPolicy) -> bool | None:
    """Whether two single values are equal; None when exact means can't tell."""
    if squeeze(gold) == squeeze(answer):
        return True
    gold, gold_unit = split_unit(gold)
    answer, answer_unit = split_unit(answer)
    if gold_unit != answer_unit and (policy.units == "strict" or (gold_unit and answer_unit)):
        return False
    a, b = percent_number(gold), percent_number(answer)
    if a is not None and b is not None:
        return _equal_numbers(a, b, policy)
    if squeeze(gold) == squeeze(answer):
        return True
    return _compare_words(gold, answer)


def _equal_numbers(a: tuple[Fraction, bool], b: tuple[Fraction, bool], policy: AnswerPolicy) -> bool:
    (x, x_percent), (y, y_percent) = a, b
    if x_percent == y_percent:
        return x == y
    if policy.percent == "loose" and x == y:
        return True
    return (x / 100 if x_percent else x) == (y / 100 if y_percent else y)


def percent_number(text: str) -> tuple[Fraction, bool] | None:
    """(number as written, whether a percent sign follows); None for anything but a plain number."""
    percent = text.endswith("%")
    value = number(text[:-1].rstrip("\\ ") if percent else text)
    return None if value is None else (value, percent)


def number(text: str) -> Fraction | None:
    """An integer, decimal, fraction, mixed number or scientific notation, exactly; None for anything else."""
    text = text.strip()
    if not text or len(text) > _MAX_DIGITS:
        return None
    if text[0] == "-" and text[1:2] == " ":
        text = "-" + text[1:].lstrip()
    if match := _PLAIN.fullmatch(text) or _GROUPED.fullmatch(text):
        plain = Fraction(re.sub("[, ]", "", match[2]).removesuffix("."))
        return -plain if match[1] == "-" else plain
    if match := _FRACTION.fullmatch(text):
        top, bottom = Fraction(match[2] or match[4]), Fraction(match[3] or match[5])
        return None if bottom == 0 else (-top / bottom if match[1] == "-" else top / bottom)
    if match := _MIXED.fullmatch(text):
        proper = Fraction(int(match[3] or match[5]), int(match[4] or match[6]))
        mixed = int(match[2]) + proper
        return None if proper >= 1 else -mixed if match[1] == "-" else mixed
    if match := _SCIENTIFIC.fullmatch(text):
        exponent = match[2] or match[3]
        if len(exponent) > 5 or abs(int(exponent)) > _MAX_EXPONENT:
            return None
        return Fraction(match[1]) * Fraction(10) ** int(exponent)
    word = _NUMBER_WORDS.get(text.lower())
    return None if word is None else Fraction(word)


def _compare_words(gold: str, answer: str) -> bool | None:
    """Words, choices, numbers in a base, times and ratios; None for anything that may be mathematics."""
    gold_based, answer_based = _based(gold), _based(answer)
    if gold_based or answer_based:
        if gold_based and answer_based:
            return gold_based == answer_based
        digits, base = gold_based or answer_based or ("", "")
        value = number(answer if gold_based else gold)
        return value is not None and base == "10" and number(digits) == value
    if _TIME.fullmatch(gold) and _TIME.fullmatch(answer):
        return _colon_parts(gold) == _colon_parts(answer)
    if _RATIO.fullmatch(gold) and _RATIO.fullmatch(answer):
        return _same_ratio(_colon_parts(gold), _colon_parts(answer))
    if _RATIO.fullmatch(gold) or _RATIO.fullmatch(answer):
        ratio, other = (gold, answer) if _RATIO.fullmatch(gold) else (answer, gold)
        parts, value = _colon_parts(ratio), number(other)
        return None if value is None else len(parts) == 2 and parts[1] > 0 and Fraction(*parts) == value
    gold, answer = _ARTICLE.sub("", gold), _ARTICLE.sub("", answer)
    gold_text, answer_text = _is_text(gold), _is_text(answer)
    if gold_text and answer_text:
        if len(gold_text) > 1 and gold_text.casefold() == answer_text.casefold():
            return True
        words = _LONG_WORD.search(gold) or _LONG_WORD.search(answer)
        return False if words or sorted(gold_text) != sorted(answer_text) else None  # else a product of variables
    if (gold_text and _LONG_WORD.search(gold) and number(answer) is not None) or (
        answer_text and _LONG_WORD.search(answer) and number(gold) is not None
    ):
        return False
    return None


def _based(text: str) -> tuple[str, str] | None:
    """(digits, base) of a number written with its base, as in 1011_2; None for anything else, x_1 for instance."""
    match = _BASED.fullmatch(text.replace(" ", ""))
    if match is None:
        return None
    base = match[2] or match[3]
    base = str(_NUMBER_WORDS.get(base, base))
    return (match[1], base) if any(map(str.isdigit, match[1])) or len(match[1]) > 1 < len(base) else None


def _same_ratio(gold: list[int], answer: list[int]) -> bool:
    """Proportional; what a ratio of 0 means is left to the spelling."""
    if len(gold) != len(answer):
        return False
    if 0 in gold or 0 in answer:
        return gold == answer
    return len({Fraction(a, b) for a, b in zip(gold, answer, strict=True)}) == 1


def _is_text(text: str) -> str:
    """The letters of a text that is words only; empty for anything else, f(x) and x - y for instance."""
    is_words = _TEXT.fullmatch(text) and not _FORMULA.search(text) and ("-" not in text or _LONG_WORD.search(text))
    return "".join(_LETTER.findall(text)) if is_words else ""


def _colon_parts(text: str) -> list[int]:
    parts = [int(part) for part in text.split(":")]
    return parts[:2] if len(parts) == 3 and parts[2] == 0 and _TIME.fullmatch(text) else parts


def squeeze(text: str) -> str:
    """Without white space, where none separates two words, numbers or a command from a letter."""
    return _SPACE.sub("", text)


_SPACE = re.compile(r"(?<![A-Za-z\d])\s+|\s+(?![A-Za-z\d])")


@lru_cache(maxsize=8192)
def normalize_cached(text: str) -> str:
    """`normalize`, remembered: a gold answer is read once."""
    return normalize(text)


@lru_cache(maxsize=8192)
def _parse_cached(text: str) -> Value:
    return parse(text)
