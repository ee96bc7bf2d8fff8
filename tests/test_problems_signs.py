"""The sign-placing family: what is generated can be solved, the split holds, the checker is exact."""

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import SignsSource
from astro_hpc.problems import signs


def values(numbers: list[int]) -> dict[str, int]:
    """Every placing of signs and its value, by brute force."""
    found = {}
    for choice in itertools.product("+-", repeat=len(numbers) - 1):
        text, total = str(numbers[0]), numbers[0]
        for sign, number in zip(choice, numbers[1:], strict=True):
            text, total = f"{text} {sign} {number}", total + (number if sign == "+" else -number)
        found[text] = total
    return found


def test_problems_differ_and_can_be_solved() -> None:
    problems = signs.generate(SignsSource(count=500))
    assert len({problem.text for problem in problems}) == len({problem.id for problem in problems}) == 500
    for problem in problems:
        numbers, target = problem.metadata["numbers"], problem.metadata["target"]
        assert problem.text == f"Put + or - between the numbers {' '.join(map(str, numbers))} to make {target}."
        assert problem.answer == str(target)
        right = [text for text, value in values(numbers).items() if value == target]
        assert right
        assert all(signs.check(numbers, target, text) for text in right)
        assert 0 < signs.chance(problem) <= 1


def test_generation_depends_on_the_seed_only() -> None:
    source = SignsSource(count=50, seed=3)
    assert signs.generate(source) == signs.generate(source)
    assert signs.generate(source) != signs.generate(SignsSource(count=50, seed=4))


def test_halves_share_no_numbers_whatever_the_seeds() -> None:
    train = signs.generate(SignsSource(count=3000, seed=1))
    heldout = signs.generate(SignsSource(count=1500, seed=2, split="heldout"))
    numbers = [{tuple(problem.metadata["numbers"]) for problem in half} for half in (train, heldout)]
    assert not numbers[0] & numbers[1]
    assert all(signs.split_of(n) == "train" for n in numbers[0])
    everything = itertools.product(range(1, 7), repeat=4)
    share = sum(signs.split_of(n) == "train" for n in everything) / 6**4
    assert 0.65 < share < 0.75


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="only .* problems in split 'heldout'"):
        signs.generate(SignsSource(count=100_000, split="heldout"))


def test_a_large_family_is_sampled() -> None:
    problems = signs.generate(SignsSource(count=200, num_operands=8, max_digit=9))
    assert len({problem.text for problem in problems}) == 200


PROBLEMS = signs.generate(SignsSource(count=401))


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 2**32))
def test_walks_are_legal_and_end_where_they_say(index: int, seed: int) -> None:
    problem = PROBLEMS[index]
    *steps, boxed = signs.random_walk(problem, random.Random(seed))
    expression = re.fullmatch(r"\\boxed\{(.*)\}", boxed)
    assert expression is not None
    total = problem.metadata["numbers"][0]
    for number, line in enumerate(steps, 1):
        match = re.fullmatch(rf"Step {number}: (\d+) ([+-]) (\d+) = (\d+)", line)
        assert match is not None
        assert int(match[1]) == total
        total = total + int(match[3]) if match[2] == "+" else total - int(match[3])
        assert total == int(match[4]) >= 0
    assert values(problem.metadata["numbers"])[expression[1]] == total
    reached = total == problem.metadata["target"]
    assert signs.check(problem.metadata["numbers"], problem.metadata["target"], expression[1]) == reached


def test_chance_is_the_share_of_walks_that_hit() -> None:
    problem = signs.generate(SignsSource(count=10))[7]
    rng = random.Random(0)
    target = f"= {problem.metadata['target']}"
    hits = sum(signs.random_walk(problem, rng)[-2].endswith(target) for _ in range(4000))
    assert abs(hits / 4000 - signs.chance(problem)) < 0.04


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("4 - 2 + 3 - 4", False),
        ("4-2+3+4", True),
        ("  4 - 2 + 3 + 4 = 9 ", True),
        ("$4 - 2 + 3 + 4$", True),
        ("4 − 2 + 3 + 4", True),
        ("4 - 2 + 3 + 4 = 8", False),
        ("4 + 2 + 3", False),
        ("9", False),
        ("2 - 4 + 3 + 8", False),
        ("4 - 2 + 3 + + 4", False),
        ("(4 - 2) + 3 + 4", False),
        ("4 - 2 + 3 + 4; import os", False),
        ("4 - 2 + 3 + 4 = 9 = 9", False),
        ("٤ - 2 + 3 + 4", True),
        ("", False),
        ("4" * 1000, False),
        ("4 - 2 + 3 + 4" + " " * 1000, False),
    ],
)
def test_checker(text: str, right: bool) -> None:
    assert signs.check([4, 2, 3, 4], 9, text) is right


@settings(deadline=None)
@given(st.text(max_size=300))
def test_checker_takes_any_text(text: str) -> None:
    assert signs.check([4, 2], 99, text) is False


def test_attempt_note() -> None:
    problem = next(p for p in signs.generate(SignsSource(count=300)) if p.metadata["target"] > 0)
    numbers, target = problem.metadata["numbers"], problem.metadata["target"]
    total = sum(numbers)
    assert signs.attempt_note(problem, " + ".join(map(str, numbers))) == f"We got {total} and need {target}."
    assert signs.attempt_note(problem, "hm") is None
    assert "need" in (signs.attempt_note(problem, f"{numbers[0]}") or "")
