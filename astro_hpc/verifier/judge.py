"""What a worker does with a request. Imports sympy, and may hang or eat memory: only for the guarded process."""

from __future__ import annotations

import json
import logging
import re
from functools import lru_cache
from typing import Any

import math_verify
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from latex2sympy2_extended.logic import And
from sympy import (
    Add,
    Basic,
    Derivative,
    Expr,
    Float,
    I,
    Integral,
    Limit,
    MatrixBase,
    Pow,
    Product,
    Rational,
    Set,
    Sum,
    Symbol,
    nan,
    oo,
    preorder_traversal,
    zoo,
)
from sympy.core.function import AppliedUndef
from sympy.core.relational import Equality, Ne, Relational

from astro_hpc.verifier.compare import compare_normalized, normalize_cached
from astro_hpc.verifier.limits import TooCostlyError
from astro_hpc.verifier.normalize import AnswerPolicy, normalize

logging.disable(logging.CRITICAL)

_SPELLING = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
_LATEX = [math_verify.LatexExtractionConfig(normalization_config=_SPELLING)]
_DIGITS = 60
_TINY = 40
_SLACK, _NOISE = 15, 20
_MAX_DIGITS = 3000
_LOG_2 = 0.30103
_DECIMAL = re.compile(r"(?<![\d.\\])(\d*)\.(\d+)(?![\d.])")
# What the parser drops, or adds up, without a word.
_NO_FORMULA = re.compile(r"[:']|\d\s*_|(?<![\d_^])\d+\s+\.?\d|\.\d*\.|\\(?:p?mod|bmod|l?dots)")
_MIXED = re.compile(r"(?<![\w.^_{}\\])(\d{1,30})\s*\\frac\{(\d{1,30})\}\{(\d{1,30})\}")
_BRACKETS = re.compile(r"(?<!\\sqrt)\[([^\[\],;]*)\]")
_PARENTHESIS_TIMES = re.compile(r"\)\s*(?=\d|\\frac)")
_NUMBER_TIMES = re.compile(r"(?<![\w.^}])(\d+(?:\.\d+)?|\d+\))\s*\((?=\s*-?\d)|(?<=\d\))\s*\((?=\s*-?\d)")
_IRRATIONAL = re.compile(r"\\sqrt|\\pi|\\ln|\\log|\\sin|\\cos|\\tan|\\exp|\\frac\{\\pi|\be\b")
_MIN_ROUNDED_DECIMALS = 3
_WARM_UP = (
    r"x^{2}-3x\cdot y+\frac{1}{2}",
    r"(2x-1)(2x+3)",
    r"\frac{\sqrt{3}}{2}+2\sqrt[3]{5}",
    r"y=-2x+3",
    r"\sin(x)+\cos^{2}(y)",
    r"\log_2 3+\ln 5",
    r"\frac{8x^{2}}{9(x^{2}-2)^{5/3}}+\frac{2}{3(x^{2}-2)^{2/3}}",
    r"\sum_{k=0}^{n-1} F_k",
    r"e^{i\pi}+3^{x+1}",
    r"-x^2-3xy+y^{3}",
    r"\begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix}\begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix}",
    r"z \in [-\frac{3}{2}, -1] \cup (1, \infty)",
    r"\binom{10}{3}+5!",
    r"1\le|z|<3",
    r"\frac{a+b}{c}",
    r"(a+b)(b+c)(c+a)",
    r"x^3+y^3+z^3-3xyz",
    r"\frac{\frac{1}{2}x+1}{x-3}",
    r"\tan^{-1}\frac{1}{2}",
    r"2^{x}\times 10^{-3}",
)
_POINTS = (
    ("0.7310", "1.3170", "2.1930", "0.4190", "1.8610", "3.1070", "0.9370", "2.7290"),
    ("2.6170", "0.3530", "1.4590", "3.7010", "0.8110", "1.1230", "2.2390", "0.5690"),
    ("1.0930", "3.3010", "0.6430", "1.5310", "2.9170", "0.3890", "1.7870", "4.2010"),
    ("5.2130", "4.1270", "7.3190", "3.5470", "6.1030", "8.2910", "2.4230", "9.1370"),
    ("-0.8270", "1.6130", "-2.3810", "0.5030", "-1.2970", "2.8430", "-3.4210", "0.7570"),
    ("-3.1810", "-0.4210", "1.1510", "-1.7330", "2.2370", "-0.6910", "0.3370", "-2.5390"),
    ("1.9010", "-2.7410", "-0.5870", "-4.0130", "-1.4390", "-3.2570", "-0.9110", "-1.0610"),
)
_MIN_POINTS = 3


def judge(request: dict[str, Any]) -> str:
    """`right`, `wrong` or `unknown` for {"checker", "gold", "answer", "percent", "units", ...}."""
    if request["checker"] == "reasoning_gym":
        return _reasoning_gym(request)
    policy = AnswerPolicy(request["percent"], request["units"])
    equal = judge_math(request["gold"], request["answer"], policy)
    return "unknown" if equal is None else "right" if equal else "wrong"


def warm_up() -> None:
    """Fill the parser's tables, which it builds as it meets new forms, before requests come.

    Without this a first answer of some form can take a second, and on a busy machine run into its limit.
    """
    for form in _WARM_UP:
        _parse(form)
    compare_by_sympy(_WARM_UP[0], _WARM_UP[1])


def judge_math(gold: str, answer: str, policy: AnswerPolicy) -> bool | None:
    """Whether two answers are equal; None when that can't be told."""
    left, right = normalize_cached(gold), normalize(answer)
    try:
        equal = compare_normalized(left, right, policy, compare_by_sympy)
    except TooCostlyError:
        return None
    return compare_by_sympy(left, right) if equal is None else equal


def compare_by_sympy(gold: str, answer: str) -> bool | None:
    """Whether two single values are equal as mathematics.

    Decimals are read as exact fractions. Rational values are compared exactly, others to 45 digits and more where
    very large or small numbers occur; with variables, at every one of several points where both are defined.
    A gold answer written as a decimal equals an irrational number that rounds to it.
    """
    a, b = _parse(gold), _parse(answer)
    if b is None:
        return False
    if a is None:
        return None
    if a == b:
        return True
    if isinstance(a, Relational) and isinstance(b, Relational):
        return _same_relation(a, b)
    if isinstance(a, Expr) and isinstance(b, Expr) and not _symbolic_only(a) and not _symbolic_only(b):
        tolerance = _rounding(gold, answer)
        return _same_value(a, b, tolerance)
    if _symbolic_only(a) and _symbolic_only(b) and _rebuilt(a) == _rebuilt(b):
        return True
    if isinstance(a, Relational | And) != isinstance(b, Relational | And) and not isinstance(b, Set):
        return False
    return bool(math_verify.verify(a, b, float_rounding=_TINY, numeric_precision=_DIGITS, timeout_seconds=None))


@lru_cache(maxsize=4096)
def _parse(text: str) -> Basic | MatrixBase | None:
    if _NO_FORMULA.search(text):
        return None
    text = _PARENTHESIS_TIMES.sub(r")\\cdot ", _BRACKETS.sub(r"(\1)", text))  # (2)5 is 10, not 2 and a fraction
    text = _NUMBER_TIMES.sub(lambda m: f"{m[1] or ''}\\cdot (", text)
    text = _MIXED.sub(_improper, text)
    exact = _DECIMAL.sub(lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
    for spelling in dict.fromkeys((exact, text)):
        parsed = math_verify.parse(f"${spelling}$", _LATEX, fallback_mode="no_fallback", parsing_timeout=None)
        if parsed and isinstance(parsed[0], Basic | MatrixBase):
            return _with_real_roots(_with_imaginary_unit(parsed[0]))
    return None


def _improper(match: re.Match[str]) -> str:
    """A mixed number as one fraction; a product, where the fraction is none of a mixed number, as it is."""
    whole, top, bottom = map(int, match.groups())
    return f"\\frac{{{whole * bottom + top}}}{{{bottom}}}" if 0 < top < bottom else match.group()


def _with_real_roots(expression: Basic | MatrixBase) -> Basic | MatrixBase:
    r"""\sqrt[3]{-8} is -2, as in school; sympy takes the principal root."""
    roots = {}
    for part in preorder_traversal(expression):
        if isinstance(part, Pow) and isinstance(part.exp, Rational) and part.exp.q % 2 and part.exp.q > 1:
            base = None if part.base.free_symbols else part.base.evalf(_SLACK)
            if base is not None and base.is_real and base < 0:
                roots[part] = (-1) ** (part.exp.p % 2) * Pow(-part.base, part.exp)
    return expression.xreplace(roots) if roots else expression


def _with_imaginary_unit(expression: Basic | MatrixBase) -> Basic | MatrixBase:
    """The parser leaves i a variable; it is one only where it counts terms."""
    units = [symbol for symbol in expression.free_symbols if getattr(symbol, "name", "") == "i"]
    if not units or expression.has(Sum, Product):
        return expression
    return expression.xreplace(dict.fromkeys(units, I))


def _rounding(gold: str, answer: str) -> float:
    """A unit in the gold answer's last place, where it may be the answer rounded or cut off; else 0."""
    decimals = [len(match[2]) for match in _DECIMAL.finditer(gold)]
    if not decimals or min(decimals) < _MIN_ROUNDED_DECIMALS or "." in answer or not _IRRATIONAL.search(answer):
        return 0.0
    return 10.0 ** -min(decimals)


def _rebuilt(expression: Basic) -> Basic:
    """With every factor and term in sympy's own order: the parser keeps the text's."""
    return expression.func(*map(_rebuilt, expression.args)) if expression.args else expression


def _symbolic_only(expression: Basic) -> bool:
    """Whether numbers in place of the variables would not give a number."""
    return bool(expression.has(AppliedUndef, Sum, Product, Integral, Derivative, Limit)) and bool(
        expression.free_symbols
    )


def _same_value(a: Expr, b: Expr, tolerance: float) -> bool | None:
    names = sorted({symbol.name for symbol in a.free_symbols | b.free_symbols})
    digits = _digits_needed(a, b)
    if digits is None:
        return None
    if not names:
        return _same_number(a, b, tolerance, digits)
    if len(names) > len(_POINTS[0]):
        return bool(math_verify.verify(a, b, float_rounding=_TINY, numeric_precision=_DIGITS, timeout_seconds=None))
    agreed = 0
    for at, x, y in _values_at_points(a, b, names, digits):
        if not (_agree(x, y, digits, a, b, at) or (tolerance and abs(x - y) <= tolerance * max(1, abs(x), abs(y)))):
            return False
        agreed += 1
    if agreed >= _MIN_POINTS:
        return True
    return bool(math_verify.verify(a, b, float_rounding=_TINY, numeric_precision=_DIGITS, timeout_seconds=None))


def _digits_needed(a: Expr, b: Expr) -> int | None:
    """Digits that tell a + 10^{-99} from a: more than the largest and smallest numbers within; None: too many."""
    largest = 0
    for part in {*preorder_traversal(a), *preorder_traversal(b)}:
        if isinstance(part, Rational):
            largest = max(largest, int(max(abs(part.p), part.q).bit_length() * _LOG_2))
        elif isinstance(part, Expr) and not part.free_symbols and not isinstance(part, Add):
            value = abs(part.evalf(3))
            if value.is_Float and value.is_finite and value != 0:
                _, _, exponent, bits = value._mpf_
                largest = max(largest, int(abs(exponent + bits) * _LOG_2))
    digits = _DIGITS + 4 * max(0, largest - _NOISE // 4)
    return digits if digits <= _MAX_DIGITS else None


def _agree(x: Any, y: Any, digits: int, a: Expr, b: Expr, at: dict[str, str]) -> bool:
    """Whether two values to so many digits, of `a` and `b` at a point, are the same."""
    scale = max(abs(x), abs(y))
    if scale == 0 or abs(x - y) <= scale * Float(10) ** (_SLACK - digits):
        return True
    if scale > Float(10) ** (_NOISE - digits):
        return False
    finer = [_value(expression, at, 2 * digits) for expression in (a, b)]  # does what looks like nothing shrink?
    return all(value is not None and abs(value) < Float(10) ** (_NOISE - 2 * digits) for value in finer)


def _values_at_points(a: Expr, b: Expr, names: list[str], digits: int) -> list[tuple[dict[str, str], Any, Any]]:
    """(point, value, value) of both where both are finite; where a variable is negative also real throughout."""
    found = []
    for point in _POINTS:
        at = dict(zip(names, point, strict=False))
        negative = any(value.startswith("-") for value in at.values())
        x, y = _value(a, at, digits), _value(b, at, digits)
        if x is None or y is None:
            if (x is None) != (y is None) and not negative:
                found.append((at, Float(0), Float(1)))  # one is defined where the other isn't
            continue
        if negative and not (x.is_real and y.is_real and _roots_are_real(a, at) and _roots_are_real(b, at)):
            continue
        found.append((at, x, y))
    return found


def _value(expression: Expr, at: dict[str, str], digits: int) -> Any:
    """The expression's value at a point, to so many digits; None where it has none."""
    values = {s: Float(at[s.name], digits) for s in expression.free_symbols if isinstance(s, Symbol)}
    value = expression.xreplace(values).doit().evalf(digits)
    return value if value.is_number and value.is_finite and not value.has(nan, zoo, oo) else None


def _roots_are_real(expression: Expr, at: dict[str, str]) -> bool:
    r"""Whether no root of a negative value occurs at a point: \sqrt{x}\sqrt{y} is \sqrt{xy} where both are real."""
    for part in preorder_traversal(expression):
        if isinstance(part, Pow) and isinstance(part.exp, Rational) and part.exp.q > 1:
            base = _value(part.base, at, _SLACK)
            if base is None or not base.is_real or base < 0:
                return False
    return True


def _same_number(a: Expr, b: Expr, tolerance: float, digits: int) -> bool | None:
    x, y = a.evalf(digits), b.evalf(digits)
    if not (x.is_number and y.is_number):
        return None
    if not (x.is_finite and y.is_finite):
        return bool(x == y)
    if tolerance and abs(x - y) <= tolerance:
        return True
    if not _agree(x, y, digits, a, b, {}):
        return False
    exact = [_rebuilt(value.doit()) for value in (a, b)]
    if all(isinstance(value, Rational) for value in exact):
        return bool(exact[0] == exact[1])
    return True


def _same_relation(a: Relational, b: Relational) -> bool | None:
    """Equations that differ by a constant factor; inequalities too, turned round where it is negative."""
    if isinstance(a, Equality | Ne) and type(a) is not type(b):
        return False
    try:
        left, right = a.lhs - a.rhs, b.lhs - b.rhs
    except (TypeError, AttributeError):
        return bool(math_verify.verify(a, b, timeout_seconds=None))
    names = sorted({symbol.name for symbol in left.free_symbols | right.free_symbols})
    if not names:  # a statement about numbers: the same only when it says the same of them
        sides = [_same_value(x, y, 0) for x, y in ((a.lhs, b.lhs), (a.rhs, b.rhs))]
        return type(a) is type(b) and (None if None in sides and False not in sides else all(sides))
    if len(names) > len(_POINTS[0]) or _symbolic_only(left) or _symbolic_only(right):
        return bool(math_verify.verify(a, b, timeout_seconds=None))
    digits = _digits_needed(left, right)
    if digits is None:
        return None
    ratios = [x / y for _, x, y in _values_at_points(left, right, names, digits) if x != 0 and y != 0]
    allowed = abs(ratios[0]) * Float(10) ** (_NOISE - digits) if ratios else 0
    if len(ratios) < _MIN_POINTS or any(abs(ratio - ratios[0]) > allowed for ratio in ratios):
        return False
    if isinstance(a, Equality | Ne):
        return True
    return bool(type(b) is type(a) if ratios[0] > 0 else type(b) is type(a.reversed))


# --- reasoning-gym --------------------------------------------------------------------------------------------


def preload_reasoning_gym() -> None:
    """Import it before requests come: it takes a second."""
    from astro_hpc.problems.sources import make_reasoning_gym

    dataset = make_reasoning_gym("chain_sum", 0, {})
    dataset.score_answer("1", dataset[0])


@lru_cache(maxsize=64)
def _dataset(name: str, seed: int, params: str) -> Any:
    from astro_hpc.problems.sources import make_reasoning_gym

    return make_reasoning_gym(name, seed, json.loads(params))


def _reasoning_gym(request: dict[str, Any]) -> str:
    """Right is a score of exactly 1: scorers give part credit to any text that holds the answer."""
    made = request["metadata"]
    dataset = _dataset(made["dataset"], made["seed"], json.dumps(made["params"], sort_keys=True))
    entry = dataset[made["index"]]
    if entry["question"] != request["text"]:
        return "unknown"  # another version of reasoning-gym made the problem
    try:
        score = float(dataset.score_answer(request["answer"], entry))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # scorers raise all kinds of things on junk
        return "wrong"
    return "right" if score == 1.0 else "wrong"
