r"""One spelling for answers that are spelled alike: LaTeX variants, Unicode signs, units, percent, thousands.

Text in, text out, in time linear in its length; no meaning is looked for here.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

PercentPolicy = Literal["loose", "strict"]
UnitPolicy = Literal["ignore", "strict"]


@dataclass(frozen=True)
class AnswerPolicy:
    """How a data set's answers are to be read.

    Attributes:
        percent: `loose`: 10% equals 0.1 and 10, as data sets write either; `strict`: 10% is 0.1 only.
        units: `ignore`: a trailing unit is dropped, but two different known units differ; `strict`: a unit
            in the gold answer must be given, and none where it has none.
    """

    percent: PercentPolicy = "loose"
    units: UnitPolicy = "ignore"


_SPELLINGS = {
    "-": "−–—‐‑",
    "\\times ": "×",
    "\\cdot ": "·⋅∙",
    "\\div ": "÷",
    "\\pi ": "π",
    "\\infty ": "∞",
    "\\le ": "≤⩽",
    "\\ge ": "≥⩾",
    "\\ne ": "≠",
    "\\approx ": "≈",
    "\\pm ": "±",
    "\\mp ": "∓",
    "\\cup ": "∪",
    "\\cap ": "∩",
    "\\in ": "∈",
    "^\\circ ": "°",
    "\\frac{1}{2}": "½",
    "\\frac{1}{4}": "¼",
    "\\frac{3}{4}": "¾",
    "^{2}": "²",
    "^{3}": "³",
    "\\emptyset ": "∅",
    "\\theta ": "θ",
    "\\alpha ": "α",
    "\\beta ": "β",
    "\\lambda ": "λ",
    "\\sqrt": "√",
    "%": "％",
    ", ": "，",
    "(": "（",
    ")": "）",
    ";": "；",
    ":": "：",
    "'": "′’",
    "\\langle ": "⟨",
    "\\rangle ": "⟩",
    "^": "∧",
    "": "€£¥\u200b",
}
_UNICODE = str.maketrans({sign: spelling for spelling, signs in _SPELLINGS.items() for sign in signs})

_BLANK = frozenset({"Cc", "Zs", "Zl", "Zp", "Cs"})
_COMMANDS = (
    "frac|dfrac|tfrac|cfrac|sqrt|left|right|text|boxed|pi|le|leq|ge|geq|cdot|times|infty|pm|mp|cup|cap|in|begin|end|sin|cos|tan"
    "|log|ln|theta|alpha|beta|circ|mathrm|mathbf|mathbb|binom|quad|sum|lfloor|rfloor|overline|angle|ne|neq|approx"
)
_DOUBLED = re.compile(rf"(?<!\\)\\\\(?=(?:{_COMMANDS})(?![A-Za-z]))")
_SIZING = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits)(?![A-Za-z])\.?")
_THIN = re.compile(r"(?<!\\)\\!\s*")
_SPACES = re.compile(r"(?<!\\)\\(?:quad|qquad|enspace|thinspace|[,;: ])(?![A-Za-z])|~|\s+")
_WORDS = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|mathrm|mathbf|mathit|mathsf|hbox|operatorname)\s*\{([^{}]*)\}"
)
_RENAMED = [
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])|!="), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])|&lt;"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])|&gt;"), ">"),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:varnothing)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\union(?![A-Za-z])"), r"\\cup"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\(?:degree|degrees)(?![A-Za-z])"), r"^\\circ"),
]
_FRAC_SHORT = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_ROOT_SHORT = re.compile(r"\\?sqrt\s*(?:(\d)|\(([^()]*)\))")
_SUB_SHORT = re.compile(r"_\{(\w+)\}")
_POWER_SHORT = re.compile(r"\^\{([0-9A-Za-z])\}")
_PERCENT_WORD = re.compile(r"\s*(?:\\?%|\bper\s?cent(?:age)?\b|\bpct\b)", re.IGNORECASE)
_PERCENT_GLUED = re.compile(r"(?<=\d)\s*(?:percent|pct)\b", re.IGNORECASE)
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))(?!\s*[CF](?![A-Za-z]))")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|sec|csc|cot)(?![a-z])")
_CURRENCY = re.compile(r"\\\$|\$|\\text\{?dollars?\}?")
_TRAILING = re.compile(r"(?:\\+|[.,;:])\s*$")
_ALREADY = re.compile(r"-?\d+(?:\.\d+)?")
_QUOTES = re.compile(r"[\"“”`]")


def normalize(text: str) -> str:
    """The usual spelling of an answer: what two answers are compared by, and shown as."""
    if _ALREADY.fullmatch(text):
        return text
    text = unicodedata.normalize("NFC", text).translate(_UNICODE)
    text = "".join(" " if unicodedata.category(sign) in _BLANK else sign for sign in text)
    text = _DOUBLED.sub(r"\\", text)
    text = _CURRENCY.sub(" ", text)
    text = _THIN.sub("", text).replace("{,}", ",")
    text = _SIZING.sub("", text)
    for pattern, replacement in _RENAMED:
        text = pattern.sub(replacement, text)
    text = _QUOTES.sub("", text)
    text = _WORDS.sub(lambda match: f" {match.group(1)} ", text)
    text = _DEGREES.sub(r"\\cdot\\frac{\\pi}{180}" if _TRIGONOMETRIC.search(text) else " ", text)
    text = _PERCENT_WORD.sub("%", _PERCENT_GLUED.sub("%", text))
    text = _SPACES.sub(" ", text).strip()
    text = _FRAC_SHORT.sub(r"\\frac{\1\2}{\3\4}", text)
    text = _ROOT_SHORT.sub(r"\\sqrt{\1\2}", text)
    text = _SUB_SHORT.sub(r"_\1", text)
    text = _POWER_SHORT.sub(r"^\1", text)
    while (shorter := _TRAILING.sub("", text).rstrip()) != text:
        text = shorter
    return text


# --- units ----------------------------------------------------------------------------------------------------

_SPELLED = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram gm",
    "kg": "kilogram",
    "lb": "pound",
    "oz": "ounce",
    "ml": "milliliter millilitre",
    "l": "liter litre",
    "gal": "gallon",
    "s": "second sec",
    "min": "minute",
    "h": "hour hr",
    "year": "yr",
    "degree": "deg",
    "radian": "rad",
    "hertz": "hz",
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "box": "boxe",
    "am": "a.m.",
    "pm": "p.m.",
}
_COUNTED = """
    day week month cent dollar mph unit rpm newton joule watt volt ohm acre hectare page point student apple coin
    book ticket mark car egg time way digit step side edge hour cube square ball game bag pound quart cup pint
    mole worker term element solution integer number triangle paper bin card pair knot item house tree flower
    piece vote word letter
"""
_UNITS = dict.fromkeys(_COUNTED.split(), "") | _SPELLED
_UNIT_NAMES = {name: unit for unit, names in _UNITS.items() for name in (unit, *names.split())}
_MODIFIERS = {
    "square",
    "sq",
    "cubic",
    "cu",
    "per",
    "of",
    "the",
    "total",
    "different",
    "distinct",
    "each",
    "a",
    "in",
    "and",
}
_UNIT_TAIL = re.compile(
    r"^(?P<value>.*[\d})%])(?P<gap>\s*)(?P<unit>[A-Za-z][A-Za-z.]*(?:\s*[/ ]\s*[A-Za-z][A-Za-z.]*){0,5})"
    r"(?P<power>\s*\^\s*\{?-?\d\}?)?$"
)
_SHORT_UNIT_CHARS = 2


def split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit) of a normalised answer: ("10", "cm") for `10 cm^2`; the unit is empty where there is none.

    A short name glued to the value, as in `10m`, is read as a variable unless it carries a power (`10m^2` is not
    told from a product either and stays). Unknown words after a number, `17 any text`, are a unit too.
    """
    match = _UNIT_TAIL.match(text)
    if match is None:
        return text, ""
    value, unit = match["value"], match["unit"]
    names = [name.strip(".") or name for name in re.split(r"[/ ]+", unit.lower())]
    if not match["gap"] and len(names) == 1 and len(unit) <= _SHORT_UNIT_CHARS:
        return text, ""
    known = [_unit_of(name) for name in names if name not in _MODIFIERS]
    if any(known) or (not match["power"] and all(len(name) > _SHORT_UNIT_CHARS for name in names)):
        if len(names) == 1 and len(unit) == 1 and not match["gap"]:
            return text, ""
        return value.strip(), next((name for name in known if name), "")
    return text, ""


def _unit_of(name: str) -> str:
    return _UNIT_NAMES.get(name) or _UNIT_NAMES.get(name.removesuffix("s")) or ""
