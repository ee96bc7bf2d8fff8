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
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ⁽⁾]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ₍₎]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_ROOT_SIGN = re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])|\([^()]*\))")

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
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|mathrm|mathbf|mathit|mathsf|hbox|operatorname|underline|boldsymbol|bm)"
    r"\s*\{([^{}]*)\}"
)
_COLOUR = re.compile(r"\\(?:text)?color\s*\{[A-Za-z]+\}")
_FUNCTION = re.compile(
    r"\\operatorname\s*\{\s*([a-z]+)\s*\}"
    r"|(?<![A-Za-z\\])((?:arc)?(?:sin|cos|tan)|(?:sin|cos|tan)h|cot|sec|csc|ln|log|exp)"
    r"(?=\s*[\d(\\^_{]| [a-z](?![a-z]))"
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
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\(?:ldots|cdots|dotsc)(?![A-Za-z])|…|\.\.\."), r"\\dots "),
    (re.compile(r"\\equiv(?![A-Za-z])"), "="),
    (re.compile(r"\\backslash(?![A-Za-z])"), r"\\setminus "),
    (re.compile(r"\\union(?![A-Za-z])"), r"\\cup"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\(?:degree|degrees)(?![A-Za-z])"), r"^\\circ"),
]
_FRAC_SHORT = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_ROOT_SHORT = re.compile(r"\\?sqrt\s*(?:(\d)|\(([^()]*)\))")
_SUB_SHORT = re.compile(r"_\{(\w)\}(?!\s*\d)")
_SUB_LONG = re.compile(r"(?<!\\log)_(\d{2,})")
_POWER_SHORT = re.compile(r"\^\{([0-9A-Za-z])\}(?!\s*\d)")
_POWER_SIGNED = re.compile(r"\^\s*([+-]\s*(?:\d+|[A-Za-z]))(?!\d|\.\d|\s*\^)")
_PERCENT_WORD = re.compile(r"\s*(?:\\?%|\bper\s?cent(?:age)?\b|\bpct\b)", re.IGNORECASE)
_PERCENT_GLUED = re.compile(r"(?<=\d)\s*(?:percent|pct)\b", re.IGNORECASE)
_CIRCLE = r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))"
_TEMPERATURE = re.compile(_CIRCLE + r"\s*([CF])(?![A-Za-z])")
_CIRCLE_LETTER = re.compile(r"(?<=\d)\s*\^\s*\{?\s*o\s*\}?(?![A-Za-z])")
_DEGREES_LAST = re.compile(_CIRCLE + r"(?=\s*(?:$|[,;)\]]))")
_DEGREES = re.compile(_CIRCLE)
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|sec|csc|cot)(?![a-z])")
_CURRENCY = re.compile(r"\\\$|\$|\\text\{?dollars?\}?")
_ORDINAL = re.compile(
    r"(?<=\d)\s*(?:\^\s*\{?\s*)?\\(?:text|mathrm|rm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?|(?<=\d)(?:st|nd|rd|th)\b"
    r"|^(\d+)\^\{(?:st|nd|rd|th)\}$"
)
_REPEATING = re.compile(
    r"(?<![\d.])(\d{0,30})\.(\d{0,30})\\(?:overline|bar)\s*(?:\{\s*(\d{1,30})\s*\}|(\d))"
    r"|(?<![\d.])(\d{0,30})\.(\d{0,30})\\dot\s*\{?(\d)\}?(?:(\d{0,30})\\dot\s*\{?(\d)\}?)?"
)
_INTEGER_PARAMETER = re.compile(
    r"(?:,|;|\bwhere\b|\bfor\b|\bwith\b)\s*(?:any |all |some )?(?:integers? )?"
    r"[a-z]\s*\\in\s*\\mathbb\s*\{?\s*[ZN]\s*\}?\s*$"
)
_MULTIPLE = re.compile(r"(?<=[\d})])\s*(hundred|thousand|million|billion|trillion)(?![a-z])", re.IGNORECASE)
_ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_ACCENTED = re.compile(r"(\\(?:vec|hat|bar|overline|tilde|mathbb|mathcal))\s+([A-Za-z])(?![A-Za-z])")
_WORDED_RATIO = re.compile(r"(\d+) to (\d+)")
_WORDED_SETS = {
    **dict.fromkeys(("no solution", "no solutions", "empty set", "the empty set"), "\\emptyset"),
    **dict.fromkeys(("all real numbers", "all reals", "\\mathbb{R}"), "(-\\infty,\\infty)"),
}
_HEDGE = re.compile(r"^(?:approximately|approx\.?|about|roughly)\s+(?=[\d\\$-])", re.IGNORECASE)
_TRAILING = " \\.,;:"
_ALREADY = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)
_QUOTES = re.compile(r"[\"“”`]")


def normalize(text: str) -> str:
    """The usual spelling of an answer: what two answers are compared by, and shown as."""
    if _ALREADY.fullmatch(text):
        return text
    text = _plain_signs(text)
    text = _DOUBLED.sub(r"\\", text)
    text = _CURRENCY.sub(" ", text)
    text = _THIN.sub("", text).replace("{,}", ",")
    text = _SIZING.sub("", text).strip(" *")
    for pattern, replacement in _RENAMED:
        text = pattern.sub(replacement, text)
    text = _QUOTES.sub("", text)
    text = _ORDINAL.sub(r"\1", _COLOUR.sub("", text))
    text = _FUNCTION.sub(lambda match: f"\\{match.group(1) or match.group(2)} ", text)
    text = _WORDS.sub(lambda match: f" {match.group(1)} ", text)
    text = _without_circles(_ACCENTED.sub(r"\1{\2}", text))
    text = _PERCENT_WORD.sub("%", _PERCENT_GLUED.sub("%", text))
    text = _SPACES.sub(" ", text).strip()
    text = _HEDGE.sub("", _INTEGER_PARAMETER.sub("", text))
    text = _MULTIPLE.sub(lambda match: f"\\times 10^{{{_ZEROS[match.group(1).lower()]}}}", text)
    text = _REPEATING.sub(_repeating_fraction, text)
    text = _FRAC_SHORT.sub(r"\\frac{\1\2}{\3\4}", text)
    text = _ROOT_SHORT.sub(r"\\sqrt{\1\2}", text)
    text = _SUB_LONG.sub(r"_{\1}", _SUB_SHORT.sub(r"_\1", text))
    text = _POWER_SIGNED.sub(r"^{\1}", _POWER_SHORT.sub(r"^\1", text))
    text = text.rstrip(_TRAILING)
    if ratio := _WORDED_RATIO.fullmatch(text):
        return f"{ratio[1]}:{ratio[2]}"
    return _WORDED_SETS.get(text.lower() if text.isalpha() or " " in text else text, text)


def _plain_signs(text: str) -> str:
    """Unicode's signs as LaTeX has them: raised and lowered digits, fractions, roots, wide digits, blanks."""
    if not text.isascii():
        text = _VULGAR.sub(_vulgar_fraction, unicodedata.normalize("NFC", text))
        text = _RAISED.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match.group())}}}", text)
        text = _LOWERED.sub(lambda match: f"_{{{unicodedata.normalize('NFKC', match.group())}}}", text)
        text = _ROOT_SIGN.sub(lambda match: f"\\sqrt{{{match.group(1)}}}", text).translate(_UNICODE)
        text = "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() else sign for sign in text)
    return "".join(" " if unicodedata.category(sign) in _BLANK else sign for sign in text)


def _vulgar_fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match.group()).partition("\u2044")
    return f"\\frac{{{top}}}{{{bottom}}}"


def _without_circles(text: str) -> str:
    """Degrees as a unit after a value, as a factor under a sine, and as nothing within a formula."""
    text = _CIRCLE_LETTER.sub(r"^\\circ", text)
    if "\\circ" not in text:
        return text
    text = _TEMPERATURE.sub(lambda match: " celsius " if match.group(1) == "C" else " fahrenheit ", text)
    if _TRIGONOMETRIC.search(text):
        return _DEGREES.sub(r"\\cdot\\frac{\\pi}{180}", text)
    return _DEGREES.sub(" ", _DEGREES_LAST.sub(" degree", text))


def _repeating_fraction(match: re.Match[str]) -> str:
    r"""A repeating decimal as the fraction that it is: 0.1\overline{6} is 15/90."""
    if match[3] or match[4]:
        whole, first, period = match[1], match[2], match[3] or match[4]
    else:
        whole, first, period = match[5], match[6], match[7] + (f"{match[8]}{match[9]}" if match[9] else "")
    all_digits, before = int(f"{whole}{first}{period}"), int(f"{whole}{first}" or "0")
    return f"\\frac{{{all_digits - before}}}{{{'9' * len(period)}{'0' * len(first)}}}"


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
    "celsius": "centigrade",
    "fahrenheit": "",
    "mi/h": "mph",
    "km/h": "kph kmh kmph",
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
    day week month cent dollar unit rpm newton joule watt volt ohm acre hectare page point student apple coin
    book ticket mark car egg time way digit step side edge hour cube square ball game bag pound quart cup pint
    mole worker term element solution integer number triangle paper bin card pair knot item house tree flower
    piece vote word letter
"""
_UNITS = dict.fromkeys(_COUNTED.split(), "") | _SPELLED
_UNIT_NAMES = {name: unit for unit, names in _UNITS.items() for name in (unit, *names.split())}
_AFTER_NUMBERS = """
    is are was if no not wrong or plus minus times over squared cubed dozen score gross half halves third thirds
    hundred thousand million billion trillion factorial mod percent less more bigger smaller
"""
_NO_UNITS = frozenset(_AFTER_NUMBERS.split())
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
    r"^(?P<value>.*(?:[\d})%]|\\pi))(?P<gap>\s*)(?P<unit>[A-Za-z][A-Za-z.]*(?:\s*[/ ]\s*[A-Za-z][A-Za-z.]*){0,5})"
    r"(?P<power>\s*\^\s*\{?-?\d\}?)?$"
)
_UNIT_NAME = re.compile(r"/|[^/ ]+")
_MODULUS = re.compile(r"^(?P<value>.*\S)\s*(?:\\pmod\s*\{?\s*(\w+)\s*\}?|\(\s*(?:\\?mod|\\bmod)\s*(\w+)\s*\))$")
_SHORT_UNIT_CHARS = 2


def split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit) of a normalised answer: ("10", "cm") for `10 cm^2`; the unit is empty where there is none.

    A short name glued to the value, as in `10m`, is read as a variable unless it carries a power (`10m^2` is not
    told from a product either and stays). Unknown words after a number, `17 any text`, are a unit too, and so is
    a modulus, `5 \pmod 7`.
    """
    if "mod" in text and (modulus := _MODULUS.match(text)):
        return modulus["value"], f"mod {modulus[2] or modulus[3]}"
    match = _UNIT_TAIL.match(text)
    if match is None:
        return text, ""
    value, unit = match["value"], match["unit"]
    names = [name.strip(".") or name for name in _UNIT_NAME.findall(unit.lower())]
    if _NO_UNITS.intersection(names) or (not match["gap"] and len(names) == 1 and len(unit) <= _SHORT_UNIT_CHARS):
        return text, ""
    names = [name for name in names if name not in _MODIFIERS or name in ("per", "/")] or names[:1]
    if any(map(_unit_of, names)) or (not match["power"] and all(len(name) > _SHORT_UNIT_CHARS for name in names)):
        if len(names) == 1 and len(unit) == 1 and not match["gap"]:
            return text, ""
        return value.strip(), _whole_unit(names)
    return text, ""


def _whole_unit(names: list[str]) -> str:
    """The first unit known, over the first one after `per` or a slash: `miles per hour` is mi/h."""
    upper: str = ""
    lower: str | None = None
    for name in names:
        if name in ("per", "/"):
            lower = lower or ""
        elif unit := _unit_of(name):
            if lower is None:
                upper = upper or unit
            else:
                lower = lower or unit
    return f"{upper}/{lower}" if upper and lower else upper


def _unit_of(name: str) -> str:
    return _UNIT_NAMES.get(name) or _UNIT_NAMES.get(name.removesuffix("s")) or ""
