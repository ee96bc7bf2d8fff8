"""Equality of answers with parts, given a comparison of single values.

Three-valued throughout: True, False, or None for "can't tell".
"""

from __future__ import annotations

import re
from collections.abc import Callable

from astro_hpc.verifier.structure import (
    FLIPPED,
    Bag,
    Equation,
    Group,
    Inequality,
    Matrix,
    Scalar,
    Union,
    Value,
    interval,
)

ScalarComparison = Callable[[str, str], bool | None]

_ASSERTS_NOTHING = re.compile(r"[A-Za-z:]")  # a side that may name or define the other
_OPAQUE = re.compile(r"\\(?:begin|cap|setminus|mathbb)(?![a-z])")


def compare(gold: Value, answer: Value, scalars: ScalarComparison) -> bool | None:
    """Whether two answers are equal, part by part; None when some part can't be told.

    Of lists the order is free; points, vectors and intervals keep theirs. A named value equals the bare one
    (`x = 5` and 5, `(p, q) = (1, 2)` and (1, 2)), but not the same value under another name.
    """
    if isinstance(gold, Equation) or isinstance(answer, Equation):
        return _compare_equations(gold, answer, scalars)
    if isinstance(gold, Bag) and gold.braces and len(gold.parts) == 1 and isinstance(answer, Scalar | Group):
        return compare(gold.parts[0], answer, scalars)
    if isinstance(answer, Bag) and answer.braces and len(answer.parts) == 1 and isinstance(gold, Scalar | Group):
        return compare(gold, answer.parts[0], scalars)
    if isinstance(gold, Inequality) or isinstance(answer, Inequality):
        return _compare_inequalities(gold, answer, scalars)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
        return _compare_matrices(gold, answer, scalars)
    match gold, answer:
        case (Scalar(), Scalar()):
            return scalars(gold.text, answer.text)
        case (Bag(), Bag()):
            return _compare_bags(gold, answer, scalars)
        case (Bag(), Union() | Group()) if (solutions := _union(gold)) is not None:
            return compare(solutions, answer, scalars)
        case (Union(), Union()):
            return _unordered(gold.parts, answer.parts, scalars)
        case (Group(), Group()):
            same_brackets = (gold.opening, gold.closing) == (answer.opening, answer.closing)
            if len(gold.parts) == 2 and not same_brackets:
                return False
            return _ordered(gold.parts, answer.parts, scalars)
        case (Group(), Bag()) if not answer.braces and (gold.opening, gold.closing) == ("(", ")"):
            return not _one_name(answer) and _ordered(gold.parts, _by_name(answer.parts), scalars)
        case (Bag(), Group()) if not gold.braces and (answer.opening, answer.closing) == ("(", ")"):
            return not _one_name(gold) and _ordered(_by_name(gold.parts), answer.parts, scalars)
        case (Scalar(), Bag()) | (Bag(), Scalar()):
            return _compare_bag_and_single(gold, answer, scalars)
        case (Scalar(), _) | (_, Scalar()):
            opaque = gold.text if isinstance(gold, Scalar) else answer.text if isinstance(answer, Scalar) else ""
            return None if _OPAQUE.search(opaque) else False
    return False


def _ordered(gold: tuple[Value, ...], answer: tuple[Value, ...], scalars: ScalarComparison) -> bool | None:
    if len(gold) != len(answer):
        return False
    unsure = False
    for a, b in zip(gold, answer, strict=True):
        equal = compare(a, b, scalars)
        if equal is False:
            return False
        unsure |= equal is None
    return None if unsure else True


def _union(bag: Bag) -> Union | None:
    """`x < 1 or x > 2` as a union of intervals; None for a list of anything else."""
    intervals = [interval(part) for part in bag.parts if isinstance(part, Inequality)]
    if len(intervals) < len(bag.parts):
        return None
    known = tuple(part for part in intervals if part is not None)
    return Union(known) if len(known) == len(intervals) else None


def _one_name(bag: Bag) -> bool:
    """Whether a list gives several values of one thing, `x = 1, x = 2`: no point."""
    return len({part.name for part in bag.parts if isinstance(part, Equation) and part.name}) == 1


def _by_name(parts: tuple[Value, ...]) -> tuple[Value, ...]:
    """`y = 1, x = 2` in the order of a point, x first; anything but values of different letters as it is."""
    names = [part.name for part in parts if isinstance(part, Equation) and part.name and len(part.name) == 1]
    if len(names) < len(parts) or len(set(names)) < len(names):
        return parts
    return tuple(part for _, part in sorted(zip(names, parts, strict=True), key=lambda pair: pair[0]))


def _unordered(gold: tuple[Value, ...], answer: tuple[Value, ...], scalars: ScalarComparison) -> bool | None:
    """Each part of one equals a different part of the other."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    unsure = False
    for part in gold:
        for index, candidate in enumerate(left):
            equal = compare(part, candidate, scalars)
            if equal:
                del left[index]
                break
            unsure |= equal is None
        else:
            return None if unsure else False
    return True


def _compare_bags(gold: Bag, answer: Bag, scalars: ScalarComparison) -> bool | None:
    named = [isinstance(part, Equation) and part.name is not None for part in gold.parts]
    bare = not any(isinstance(part, Equation) for part in answer.parts)
    if all(named) and bare and len({part.name for part in gold.parts if isinstance(part, Equation)}) > 1:
        return _ordered(gold.parts, answer.parts, scalars)
    gold_parts, answer_parts = gold.parts, answer.parts
    points = all(isinstance(part, Group) for part in gold_parts + answer_parts)
    if gold.braces or answer.braces or points:  # a set names each element once; so does a list of points
        gold_parts, answer_parts = tuple(dict.fromkeys(gold_parts)), tuple(dict.fromkeys(answer_parts))
    return _unordered(gold_parts, answer_parts, scalars)


def _compare_equations(gold: Value, answer: Value, scalars: ScalarComparison) -> bool | None:
    if isinstance(gold, Equation) and isinstance(answer, Equation):
        if gold.name is not None and answer.name is not None:
            if _bare_name(gold.name) == _bare_name(answer.name):
                return compare(gold.right, answer.right, scalars)
            swapped = isinstance(gold.right, Scalar) and isinstance(answer.right, Scalar)
            return scalars(gold.text, answer.text) if swapped else False
        if isinstance(gold.right, Scalar) and isinstance(answer.right, Scalar):
            sides = [scalars(gold.left, answer.left), scalars(gold.right.text, answer.right.text)]
            return True if all(sides) else scalars(gold.text, answer.text)
        return False
    if isinstance(gold, Equation):
        return compare(gold.right, answer, scalars) if gold.name is not None else False
    assert isinstance(answer, Equation)
    asserts = not _ASSERTS_NOTHING.search(answer.left)
    if asserts and isinstance(answer.right, Scalar) and scalars(answer.left, answer.right.text) is False:
        return False  # 6 = 5
    return compare(gold, answer.right, scalars)  # the answer may show its working: 2 + 3 = 5


def _bare_name(name: str) -> str:
    return re.sub(r"(?<=[A-Za-z])\([^,()]*\)$", "", name)


def _compare_matrices(gold: Value, answer: Value, scalars: ScalarComparison) -> bool | None:
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        if gold.kind != answer.kind or len(gold.rows) != len(answer.rows):
            return False
        results = [_ordered(a, b, scalars) for a, b in zip(gold.rows, answer.rows, strict=True)]
        return False if False in results else None if None in results else True
    vector, other = (gold, answer) if isinstance(gold, Matrix) else (answer, gold)
    assert isinstance(vector, Matrix)
    if isinstance(other, Scalar):
        return None
    if isinstance(other, Group) and (len(vector.rows) == 1 or all(len(row) == 1 for row in vector.rows)):
        cells = tuple(cell for row in vector.rows for cell in row)
        return _ordered(cells, other.parts, scalars) if vector is gold else _ordered(other.parts, cells, scalars)
    return False


def _compare_inequalities(gold: Value, answer: Value, scalars: ScalarComparison) -> bool | None:
    if isinstance(gold, Inequality) and isinstance(answer, Inequality):
        unsure = False
        for parts, relations in (
            (answer.parts, answer.relations),
            (answer.parts[::-1], tuple(FLIPPED[relation] for relation in answer.relations[::-1])),
        ):
            if relations != gold.relations:
                continue
            results = [scalars(a, b) for a, b in zip(gold.parts, parts, strict=True)]
            if all(results):
                return True
            unsure |= False not in results
        if len(gold.relations) == len(answer.relations) == 1:
            return scalars(gold.text, answer.text)
        return None if unsure else False
    if isinstance(gold, Inequality):
        solutions = interval(gold)
        return None if solutions is None else compare(solutions, answer, scalars)
    # An inequality for a gold set says more than was asked, or less: which variable? Left to the caller.
    return None if isinstance(gold, Group | Union) else False


def _compare_bag_and_single(gold: Value, answer: Value, scalars: ScalarComparison) -> bool | None:
    """A list is a single value where it says the same one twice (`1.5 or 3/2`), or is a decimal comma (`1,22`)."""
    if isinstance(gold, Bag):
        assert isinstance(answer, Scalar)
        if answer.listed and not gold.braces:
            return _unordered(gold.parts, tuple(map(Scalar, answer.listed)), scalars)
        return gold.decimal == answer.text or _says_one_value(gold, answer, scalars, list_is_answer=False)
    assert isinstance(gold, Scalar)
    assert isinstance(answer, Bag)
    if answer.decimal == gold.text:
        return True
    if gold.listed:
        return _unordered(tuple(map(Scalar, gold.listed)), answer.parts, scalars)
    return _says_one_value(answer, gold, scalars, list_is_answer=True)


def _says_one_value(bag: Bag, single: Scalar, scalars: ScalarComparison, list_is_answer: bool) -> bool | None:
    """Whether every part of a list is the single value: 4/5 or 0.8."""
    if bag.braces or not all(isinstance(part, Scalar) for part in bag.parts):
        return False
    texts = [part.text for part in bag.parts if isinstance(part, Scalar)]
    results = [scalars(single.text, text) if list_is_answer else scalars(text, single.text) for text in texts]
    return False if False in results else None if None in results else True
