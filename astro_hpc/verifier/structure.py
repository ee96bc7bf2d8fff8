r"""Answers that have parts: lists, tuples, intervals, sets, unions, matrices, equations, inequalities, `\pm`.

`parse` reads a normalised answer; `equality` compares what it returns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from astro_hpc.verifier.limits import TooCostlyError

_MAX_DEPTH = 12
_MAX_PARTS = 64


@dataclass(frozen=True)
class Scalar:
    """A single value, as text; `listed` where 60,120 may be two values as well as one with a separator."""

    text: str
    listed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Bracketed parts in order: a point, a vector, or (two parts) an interval."""

    opening: str
    closing: str
    parts: tuple[Value, ...]


@dataclass(frozen=True)
class Bag:
    """Parts whose order does not count: a list of solutions, or a set where `braces` is True.

    `decimal` is set where the text can also be read as one number with a decimal comma: 1,22.
    """

    parts: tuple[Value, ...]
    braces: bool = False
    decimal: str | None = None


@dataclass(frozen=True)
class Union:
    """A union of sets."""

    parts: tuple[Value, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of values; `kind` tells determinants, cases and matrices apart."""

    kind: str
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Equation:
    """`left = right`; of a chain the first and the last. `name` is set where the left side only names the value."""

    left: str
    right: Value
    name: str | None
    text: str


@dataclass(frozen=True)
class Inequality:
    """A chain of values and the relations between them (`<`, `>`, `\\le`, `\\ge`, `\\ne`)."""

    parts: tuple[str, ...]
    relations: tuple[str, ...]
    text: str


Value = Scalar | Group | Bag | Union | Matrix | Equation | Inequality


# --- reading --------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\\begin\{\w+\*?\}|\\end\{\w+\*?\}|\\[{}]|\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENING = {"(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil"}
_CLOSING = {")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil"}
_PAIRS = {"\\{": "\\}", "{": "}", "\\langle": "\\rangle"}
_WORD_SEPARATOR = re.compile(
    r"(?:,\s*)?(?:(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|(?<=[\d)\]}])(?:and|or)(?=[\d(\[\\A-Za-z-]))"
)
_SYSTEM = re.compile(r"^\\\{\s*\\begin\{(array|aligned|gathered)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}$", re.DOTALL)
_MATRIX = re.compile(
    r"^\\begin\{(\w*matrix\*?|cases|array|aligned|align\*?|gathered|gather\*?)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}$",
    re.DOTALL,
)
_OUTWARD = re.compile(r"^(?:(?=\])|(?=.*\[$))([\[\]])([^\[\]]+,[^\[\]]+)([\[\]])$")  # ]0,1[
_NAME = re.compile(
    r"^(?:[A-Z]{2,4}"  # AB, a segment
    r"|\\?[A-Za-z]+(?:_\w+|_\{[^{}]*\})?'*(?:\s*\(\s*[\w\\, +-]{1,12}\s*\))?"  # x, x_1, f(x)
    r"|[A-Za-z]\^\{-1\}\s*\(\s*\w\s*\)"  # f^{-1}(x)
    r"|\\frac\{d\w?\}\{d\w\}|\\det\s*\(?\s*[A-Z]\s*\)?"
    r"|(?:m\s*)?\\(?:angle|overline|triangle)\s*\{?[A-Z]{1,4}\}?"
    r"|\(\s*\w+(?:\s*,\s*\w+)+\s*\)"  # (x, y)
    r"|\w+(?:_\w+)?\s*:\s*\w+(?:_\w+)?)$"  # V_1 : V_2
)
_ABSOLUTE = re.compile(r"^(?:\||\\l?vert)\s*([a-z])\s*(?:\||\\r?vert)$")
_SUCH_THAT = {"\\mid", "|", ":"}
_MEMBER = re.compile(r"\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*$")
FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
"""The same relation read from the right."""
_RELATIONS = {"<", ">", "\\le", "\\ge", "\\ne"}
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?")
_COMMA_DECIMAL = re.compile(r"([+-]?\d+),(\d{2,})|([+-]?0),(\d)")


def parse(text: str, depth: int = 0) -> Value:
    """Read a normalised answer.

    Raises:
        TooCostlyError: too deep or too many parts.
    """
    if depth > _MAX_DEPTH:
        raise TooCostlyError("nested too deeply")
    text = _unwrapped(text.strip())
    if _GROUPED.fullmatch(text):
        return Scalar(text.replace(",", ""), tuple(text.split(",")))
    if _COMMA_DECIMAL.fullmatch(text):
        whole, decimals = text.split(",")
        return Bag((Scalar(whole), Scalar(decimals)), decimal=f"{whole}.{decimals}")
    marked = _WORD_SEPARATOR.sub(" ; ", text) if "nd" in text or "or" in text else text
    tokens = _TOKEN.findall(marked)
    parts = _split(tokens, {",", ";"})
    if len(parts) > 1:
        parts = [part for part in parts if part.strip()]
        if len(parts) > _MAX_PARTS:
            raise TooCostlyError("too many parts")
        return _bag([parse(part, depth + 1) for part in parts], braces=False)
    return _parse_single(text, _TOKEN.findall(text), depth)


def _parse_single(text: str, tokens: list[str], depth: int) -> Value:
    if len(approx := _split(tokens, {"\\approx"})) > 1:
        exact = approx[0].strip()
        return parse(approx[-1] if not exact or _NAME.match(exact) else exact, depth + 1)
    if len(member := _split(tokens, {"\\in"})) == 2:
        return parse(member[1], depth + 1)
    if relation := _relation(text, tokens, depth):
        return relation
    if len(pieces := _split(tokens, {"\\cup"})) > 1:
        sets = tuple(parse(piece, depth + 1) for piece in pieces)
        elements = [part for listed in sets if isinstance(listed, Bag) and listed.braces for part in listed.parts]
        finite = all(isinstance(listed, Bag) and listed.braces for listed in sets)
        return Bag(tuple(elements), braces=True) if finite else Union(sets)
    if outward := _OUTWARD.match(text):
        opening, closing = "(" if outward[1] == "]" else "[", ")" if outward[3] == "[" else "]"
        return parse(f"{opening}{outward[2]}{closing}", depth + 1)
    if system := _SYSTEM.match(text):  # a brace on the left alone
        return _matrix("aligned", system[2], depth)
    if (matrix := _MATRIX.match(text)) and _is_one_environment(tokens):
        return _matrix(matrix[1], matrix[2], depth)
    if tokens and (inner := _enclosed(tokens)) is not None:
        return _grouped(tokens[0], inner, tokens[-1], text, depth)
    if "\\pm" in tokens or "\\mp" in tokens:
        upper = "".join("+" if t == "\\pm" else "-" if t == "\\mp" else t for t in tokens)
        lower = "".join("-" if t == "\\pm" else "+" if t == "\\mp" else t for t in tokens)
        return Bag((parse(upper.removeprefix("+"), depth + 1), parse(lower, depth + 1)))
    return Scalar(text)


def is_name(text: str) -> bool:
    """Whether a text names a value rather than being one: x, f(x), AB, (x, y)."""
    return _NAME.match(text) is not None


def _unwrapped(text: str) -> str:
    """Without parentheses or braces around all of a single value."""
    for _ in range(_MAX_DEPTH):
        if len(text) <= 2 or text[0] not in "({":
            break
        tokens = _TOKEN.findall(text)
        inner = _enclosed(tokens)
        if inner is None or len(_split(inner, {",", ";"})) > 1 or not "".join(inner).strip():
            break
        text = "".join(inner).strip()
    else:
        raise TooCostlyError("nested too deeply")
    return text


def _enclosed(tokens: list[str]) -> list[str] | None:
    """What stands inside the first bracket, when it closes with the last token."""
    if tokens[0] not in _OPENING or tokens[-1] not in _CLOSING:
        return None
    depth = 0
    for index, token in enumerate(tokens):
        depth += _step(token)
        if depth == 0:
            return tokens[1:-1] if index == len(tokens) - 1 else None
    return None


def _is_one_environment(tokens: list[str]) -> bool:
    depth = 0
    for index, token in enumerate(tokens):
        depth += _step(token)
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _step(token: str) -> int:
    if token in _OPENING or token.startswith("\\begin{"):
        return 1
    return -1 if token in _CLOSING or token.startswith("\\end{") else 0


def _split(tokens: list[str], separators: set[str]) -> list[str]:
    """The texts between top-level separators."""
    parts: list[str] = []
    current: list[str] = []
    depth = 0
    for token in tokens:
        depth += _step(token)
        if depth == 0 and token in separators:
            parts.append("".join(current))
            current = []
        else:
            current.append(token)
    return [*parts, "".join(current)]


def _relation(text: str, tokens: list[str], depth: int) -> Value | None:
    if len(sides := _split(tokens, {"="})) > 1:
        left, right = sides[0].strip(), sides[-1].strip()
        if not right or any(_split(_TOKEN.findall(side), _RELATIONS)[1:] for side in sides):
            return None
        if not left:
            return parse("=".join(sides[1:]), depth + 1)
        name = next((side.strip() for side in (sides[0], sides[-2]) if _NAME.match(side.strip())), None)
        return Equation(left, parse(right, depth + 1), name and name.replace(" ", ""), text)
    parts: list[str] = []
    relations: list[str] = []
    current: list[str] = []
    level = 0
    if tokens and tokens[0] == "<" and tokens[-1] == ">":
        return Group("(", ")", tuple(parse(p, depth + 1) for p in _split(tokens[1:-1], {","})))
    for token in tokens:
        level += _step(token)
        if level == 0 and token in _RELATIONS:
            parts.append("".join(current).strip())
            relations.append(token)
            current = []
        else:
            current.append(token)
    if not relations:
        return None
    if len(relations) == 1 and relations[0] in ("<", "\\le") and (bounded := _ABSOLUTE.match(parts[0])):
        bound = "".join(current).strip()
        return Inequality((f"-({bound})", bounded[1], bound), (relations[0], relations[0]), text)
    return Inequality((*parts, "".join(current).strip()), tuple(relations), text)


def _grouped(opening: str, inner: list[str], closing: str, text: str, depth: int) -> Value:
    parts = [part for part in _split(inner, {",", ";"}) if part.strip()]
    if len(parts) > _MAX_PARTS:
        raise TooCostlyError("too many parts")
    if opening in _PAIRS and opening != "\\langle":
        if _PAIRS[opening] != closing:
            return Scalar(text)
        if any(t in _SUCH_THAT for t in inner):
            return _set_builder(inner, depth) or Scalar(text)
        return _bag([parse(part, depth + 1) for part in parts], braces=True)
    if opening.startswith("\\l") and opening != "\\langle":
        return Scalar(text)
    if len(parts) < 2:
        if opening != "[" or closing != "]" or not parts:
            return Scalar(text)
        single = parse(parts[0], depth + 1)
        return single if isinstance(single, Matrix) else Group("[", "]", (single,))
    opening, closing = ("(", ")") if opening == "\\langle" else (opening, closing)
    return Group(opening, closing, tuple(parse(part, depth + 1) for part in parts))


def _set_builder(inner: list[str], depth: int) -> Value | None:
    r"""`\{x : 2 < x \le 5\}` as the interval; None for any other condition."""
    name, *conditions = _split(inner, _SUCH_THAT)
    name = _MEMBER.sub("", name).strip()
    if len(conditions) != 1 or not is_name(name):
        return None
    condition = parse(conditions[0], depth + 1)
    return interval(condition) if isinstance(condition, Inequality) and name in condition.parts else None


def interval(inequality: Inequality) -> Group | None:
    """The set of a variable's values, where the inequality bounds one variable by itself."""
    parts, relations = inequality.parts, inequality.relations
    if all(relation in (">", "\\ge") for relation in relations):
        parts, relations = parts[::-1], tuple(FLIPPED[relation] for relation in relations[::-1])
    if not all(relation in ("<", "\\le") for relation in relations):
        return None
    if len(parts) == 3 and is_name(parts[1]):
        low, high = parts[0], parts[2]
        brackets = ("(" if relations[0] == "<" else "[", ")" if relations[1] == "<" else "]")
    elif len(parts) == 2 and is_name(parts[0]):
        low, high, brackets = "-\\infty", parts[1], ("(", ")" if relations[0] == "<" else "]")
    elif len(parts) == 2 and is_name(parts[1]):
        low, high, brackets = parts[0], "\\infty", ("(" if relations[0] == "<" else "[", ")")
    else:
        return None
    return Group(*brackets, (Scalar(low), Scalar(high)))


def _bag(parts: list[Value], *, braces: bool) -> Value:
    flat: list[Value] = []
    for part in parts:
        if isinstance(part, Equation) and isinstance(part.right, Bag) and not part.right.braces:  # x = \\pm 2
            flat += (Equation(part.left, value, part.name, part.text) for value in part.right.parts)
        else:
            flat += part.parts if isinstance(part, Bag) and not part.braces else (part,)
    return flat[0] if len(flat) == 1 and not braces else Bag(tuple(flat), braces)


def _matrix(kind: str, body: str, depth: int) -> Value:
    rows: list[tuple[Value, ...]] = []
    for row in _split(_TOKEN.findall(body), {"\\\\"}):
        if not row.strip():
            continue
        if kind.startswith(("align", "gather")):  # the & only lines equations up
            rows.append((parse("".join(_split(_TOKEN.findall(row), {"&"})), depth + 1),))
        else:
            rows.append(tuple(parse(cell, depth + 1) for cell in _split(_TOKEN.findall(row), {"&"})))
    if sum(map(len, rows)) > _MAX_PARTS:
        raise TooCostlyError("too many parts")
    if kind == "cases" or kind.startswith(("align", "gather")):
        return Bag(tuple(cell for row in rows for cell in row))
    return Matrix("determinant" if kind in ("vmatrix", "Vmatrix") else "matrix", tuple(rows))
