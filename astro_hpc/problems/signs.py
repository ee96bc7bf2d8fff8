"""Sign placing: a family of problems that a small model can learn to search in (ours, not in the paper).

`Put + or - between the numbers 4 2 3 4 to make 5.` A *walk* goes through the numbers from left to right and
chooses a sign before each; it is *legal* when no running total falls below zero. Every generated target is
reached by a legal walk. An answer is right when it uses the numbers in order and has the target's value: the
text asks no more, so running totals below zero are accepted there.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import SignsSource
from astro_hpc.problems.problem import Problem
from astro_hpc.run.seeds import derive_seed

CHECKER = "signs"

_MAX_ANSWER_CHARS = 200
_ENUMERABLE_TUPLES = 100_000
_TRAIN_SHARE = 0.7
_TOKEN = re.compile(r"\d{1,4}|[+=-]")
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-"})


def generate(source: SignsSource) -> list[Problem]:
    """Different problems of one half of the number tuples.

    The half of a tuple is a hash of its ordered numbers, so the halves share none, whatever the seeds (about 70 %
    are for training). Two problems of one half may have the same numbers under different targets.

    Raises:
        ConfigError: fewer exist than `source.count`.
    """
    rng = random.Random(derive_seed(source.seed, "signs", source.split))
    pairs = _draw_pairs(source, rng)
    if len(pairs) < source.count:
        raise ConfigError(
            f"problems: source signs has only {len(pairs)} problems in split {source.split!r} with "
            f"num_operands {source.num_operands} and max_digit {source.max_digit}; lower count (now {source.count})"
        )
    return [_make_problem(numbers, target) for numbers, target in pairs]


def split_of(numbers: Sequence[int]) -> str:
    """The half that these ordered numbers belong to: `train` or `heldout`."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return "train" if int.from_bytes(digest[:8], "big") < _TRAIN_SHARE * 2**64 else "heldout"


def check(numbers: Sequence[int], target: int, answer_text: str) -> bool:
    """Whether `answer_text` places signs between exactly these numbers, in order, with the target's value.

    A tail `= TARGET` is tolerated; one that states another value makes the answer wrong.
    """
    parsed = _parse(answer_text)
    if parsed is None:
        return False
    used, value, claimed = parsed
    return used == list(numbers) and value == target and claimed in (None, value)


def random_walk(problem: Problem, rng: random.Random) -> list[str]:
    """The lines of a random legal walk that ignores the target, the boxed expression last.

    Each sign is drawn evenly from the legal ones.
    """
    first, *rest = problem.metadata["numbers"]
    total, expression, lines = first, str(first), []
    for index, number in enumerate(rest, 1):
        sign = rng.choice(_legal_signs(total, number))
        after = total + number if sign == "+" else total - number
        lines.append(f"Step {index}: {total} {sign} {number} = {after}")
        expression += f" {sign} {number}"
        total = after
    return [*lines, f"\\boxed{{{expression}}}"]


def chance(problem: Problem) -> float:
    """Probability, in [0, 1], that `random_walk` ends at the target; exact."""
    return _walk_ends(problem.metadata["numbers"]).get(problem.metadata["target"], 0.0)


def attempt_note(problem: Problem, answer_text: str) -> str | None:
    """What an attempt gave, such as `We got 9 and need 5.`; None when it is no chain of numbers and signs."""
    parsed = _parse(answer_text)
    if parsed is None:
        return None
    used, value, _ = parsed
    if used != list(problem.metadata["numbers"]):
        return f"We used {_join(used)} and need {_join(problem.metadata['numbers'])}."
    return f"We got {value} and need {problem.metadata['target']}."


def steps_agree(lines: Sequence[str], answer_text: str) -> bool:
    """Whether `lines` are the steps, with true arithmetic, of exactly the signs that the answer places."""
    if _parse(answer_text) is None:
        return False
    first, *rest = _TOKEN.findall(answer_text.translate(_MINUS).partition("=")[0])
    total, expected = int(first), []
    for index, (sign, number) in enumerate(zip(rest[::2], map(int, rest[1::2]), strict=True), 1):
        after = total + number if sign == "+" else total - number
        expected.append(f"Step {index}: {total} {sign} {number} = {after}")
        total = after
    return [line.strip() for line in lines] == expected


def _make_problem(numbers: tuple[int, ...], target: int) -> Problem:
    text = f"Put + or - between the numbers {_join(numbers)} to make {target}."
    metadata = {"numbers": list(numbers), "target": target}
    return Problem(Problem.make_id("signs", text), text, str(target), CHECKER, metadata)


def _join(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _draw_pairs(source: SignsSource, rng: random.Random) -> list[tuple[tuple[int, ...], int]]:
    """Up to `source.count` different (numbers, target), evenly among those of the split."""
    digits = range(1, source.max_digit + 1)
    size = len(digits) ** source.num_operands
    if size <= _ENUMERABLE_TUPLES or source.count > size // 10:
        pairs = list(_all_pairs(itertools.product(digits, repeat=source.num_operands), source.split))
        rng.shuffle(pairs)
        return pairs[: source.count]
    drawn: dict[tuple[tuple[int, ...], int], None] = {}
    while len(drawn) < source.count:  # ends: at most a tenth of the tuples is asked for, and 3 in 10 qualify
        numbers = tuple(rng.choices(digits, k=source.num_operands))
        candidates = [pair for pair in _all_pairs([numbers], source.split) if pair not in drawn]
        if candidates:
            drawn[rng.choice(candidates)] = None
    return list(drawn)


def _all_pairs(
    tuples: Iterator[tuple[int, ...]] | list[tuple[int, ...]], split: str
) -> Iterator[tuple[tuple[int, ...], int]]:
    for numbers in tuples:
        if split_of(numbers) == split:
            for target in sorted(_walk_ends(numbers)):
                yield numbers, target


def _walk_ends(numbers: Sequence[int]) -> dict[int, float]:
    """The totals that legal walks end at, each with its probability under `random_walk`."""
    ends: dict[int, float] = {numbers[0]: 1.0}
    for number in numbers[1:]:
        following: Counter[int] = Counter()
        for total, probability in ends.items():
            signs = _legal_signs(total, number)
            for sign in signs:
                following[total + number if sign == "+" else total - number] += probability / len(signs)  # type: ignore[assignment]
        ends = dict(following)
    return ends


def _legal_signs(total: int, number: int) -> str:
    return "+-" if total >= number else "+"


def _parse(text: str) -> tuple[list[int], int, int | None] | None:
    """(numbers, value, value claimed after `=`) of a chain like `4 - 2 + 3 = 5`; None when it is anything else."""
    if len(text) > _MAX_ANSWER_CHARS:
        return None
    text = text.translate(_MINUS).strip().strip("$").strip()
    tokens = _TOKEN.findall(text)
    if not tokens or _TOKEN.sub("", text).strip():
        return None
    claimed: int | None = None
    if "=" in tokens:
        at = tokens.index("=")
        claimed = _signed(tokens[at + 1 :])
        if claimed is None:
            return None
        tokens = tokens[:at]
    operands, signs = tokens[::2], tokens[1::2]
    if len(operands) != len(signs) + 1 or not all(map(str.isdigit, operands)) or any(s not in "+-" for s in signs):
        return None
    numbers = [int(operand) for operand in operands]
    value = numbers[0] + sum(n if sign == "+" else -n for sign, n in zip(signs, numbers[1:], strict=True))
    return numbers, value, claimed


def _signed(tokens: list[str]) -> int | None:
    """The integer spelled by `5`, `-5` or `+5`."""
    negative = tokens[:1] == ["-"]
    digits = tokens[1:] if tokens[:1] in (["-"], ["+"]) else tokens
    return None if len(digits) != 1 or not digits[0].isdigit() else int(digits[0]) * (-1 if negative else 1)
