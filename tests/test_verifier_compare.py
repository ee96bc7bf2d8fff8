"""Which answers are equal: respellings are, near misses aren't. The hard ones go through the pool's judge."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astro_hpc.verifier.compare import canonical, compare_exactly, number
from astro_hpc.verifier.judge import judge_math
from astro_hpc.verifier.limits import TooCostlyError
from astro_hpc.verifier.normalize import AnswerPolicy, normalize, split_unit

LOOSE = AnswerPolicy()


def equal(gold: str, answer: str, policy: AnswerPolicy = LOOSE) -> bool | None:
    fast = compare_exactly(gold, answer, policy)
    return judge_math(gold, answer, policy) if fast is None else fast


RIGHT = r"""
1/2 | 0.5
\frac{1}{2} | \frac12
-\frac{1}{2} | \frac{-1}{2}
3\sqrt{2} | \sqrt{18}
2\pi | 2π
1,-2 | -2,1
\{1,2\} | \{2,1\}
(1,2) | \left(1, 2\right)
[0,1) | \left[0,1\right)
x\ge 3 | [3,\infty)
x\ge 3 | 3\le x
(-\infty,-1)\cup(1,\infty) | (1,\infty)\cup(-\infty,-1)
12 | 12\text{ cm}
12\text{ cm} | 12
90^\circ | 90
\$5 | 5
1,000,000 | 1000000
1.2\times10^{3} | 1200
\text{Friday} | Friday
\text{(B)} | B
x=5 | 5
5 | x=5
y=2x+1 | y=1+2x
x^2+y^2=4 | x^2+y^2-4=0
\begin{pmatrix}1\\2\end{pmatrix} | \begin{bmatrix}1\\2\end{bmatrix}
3+4i | 4i+3
i(2-i) | 1+2i
\binom{5}{2} | 10
2\frac{1}{3} | \frac{7}{3}
1 1/2 | 1.5
\pm 3 | 3,-3
10\% | 0.1
10\% | 10
4x^3 | 4*x**3
f(x)=x^2 | x^2
(2,3),(4,5) | (4,5),(2,3)
1011_2 | 1011_{2}
\tan^2(y)+1 | \sec^2(y)
\cos(x) | \sin(90^{\circ}-x)
125.663 | 40\pi
11,\! 111 | 11111
20:34:00 | 20:34
V_{1}:V_{2}=11:21 | 11:21
(p,q,r)=(3,2,7) | (3,2,7)
10 | 10 square units
\frac{5}{2} | 2.5 or 5/2
""".strip().splitlines()

WRONG = r"""
2^{-99} | 2^{-98}
10^{-20} | 10^{-21}
0.3333333 | 1/3
1/3 | 0.3333333
\pi | 3.14159265358979
\sqrt{2} | 1.41421356
10^{100} | 10^{100}+1
\sqrt{3} | \sqrt{3}+10^{-20}
5 | -5
(1,2) | (2,1)
(3,1) | {1,3}
(1,2) | [1,2]
[1,2) | (1,2]
x<2 | x\le2
x<2 | y<2
1,2 | 1,2,3
1,2,3 | 1,2
\pm 3 | 3
x=5 | y=5
x | \sqrt{x^2}
A | B
\text{odd} | \text{oddd}
10\text{ cm} | 10\text{ m}
12 | 12m
1011_2 | 1011
3:4 | 4:3
\frac{1}{2} | 12
0 | 10^{-300}
2x+z=1 | 1
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
7 | \boxed{7} or \boxed{8}
1,234 | 1.234
123456789012345678901 | 123456789012345678902
x+2n+1 | x+1
\cos(x)=\frac{42}{59} | \sin(x)=\frac{42}{59}
32349 | 32, 349
x > 2 | 2
5 | x > 5
""".strip().splitlines()


@pytest.mark.parametrize("line", RIGHT)
def test_equal_answers(line: str) -> None:
    gold, answer = line.split(" | ")
    assert equal(gold, answer) is True


@pytest.mark.parametrize("line", WRONG)
def test_unequal_answers(line: str) -> None:
    gold, answer = line.split(" | ")
    assert equal(gold, answer) is not True


def _parts() -> list[tuple[str, list[str]]]:
    """(title, lines) of the parts of answer_pairs.txt."""
    parts: list[tuple[str, list[str]]] = []
    for line in (Path(__file__).parent / "answer_pairs.txt").read_text().splitlines()[1:]:
        if line.startswith("# "):
            parts.append((line[2:], []))
        else:
            parts[-1][1].append(line)
    return parts


@pytest.mark.parametrize(("title", "lines"), _parts())
def test_pairs_from_the_file(title: str, lines: list[str]) -> None:
    wrong = []
    for line in lines:
        gold, answer = line[2:].split(" ~ ") if not line.endswith("~ ") else (line[2:-3], "")
        if (equal(gold, answer) is True) != (line[0] == "="):
            wrong.append(line)
    assert lines
    assert not wrong, title


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("0.50", "1/2"),
        (r"\dfrac12", "1/2"),
        (r"\frac{1}{2}\text{ cm}", "1/2"),
        ("007", "7"),
        ("5.0", "5"),
        ("1,000", "1000"),
        (r"45^\circ", "45"),
        (r"50\%", "50%"),
        (r"x + \dfrac12", r"x + \frac{1}{2}"),
        ("", ""),
    ],
)
def test_one_text_for_votes(answer: str, text: str) -> None:
    assert canonical(answer) == text
    assert canonical(text) == text


def test_votes_keep_units_where_they_count() -> None:
    assert canonical("5 cm", AnswerPolicy(units="strict")) == "5 cm"


def test_policies() -> None:
    strict = AnswerPolicy(percent="strict", units="strict")
    assert equal("10\\%", "0.1", strict) is True
    assert equal("10\\%", "10", strict) is False
    assert equal("12\\text{ cm}", "12", strict) is False
    assert equal("12\\text{ cm}", "12 centimeters", strict) is True
    assert split_unit(normalize("15\\mbox{ cm}^2")) == ("15", "cm")
    assert split_unit("10m") == ("10m", "")


@settings(deadline=None)
@given(st.fractions(min_value=-(10**6), max_value=10**6), st.fractions(min_value=-(10**6), max_value=10**6))
def test_fractions_are_compared_exactly(a: Fraction, b: Fraction) -> None:
    def latex(f: Fraction) -> str:
        return f"{'-' if f < 0 else ''}\\frac{{{abs(f.numerator)}}}{{{f.denominator}}}"

    assert compare_exactly(latex(a), f"{a.numerator}/{a.denominator}") is True
    assert compare_exactly(latex(a), latex(b)) is (a == b)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_numbers_are_read_exactly(value: object) -> None:
    assert number(f"{value}") == Fraction(f"{value}")
    assert number(f"{value:,}") == Fraction(f"{value}")


@settings(deadline=None)
@given(st.text(alphabet="\\frac{}()[]12,.x^=<>% $abdnor:;_!+-/&", max_size=60))
def test_any_text_is_taken_by_the_fast_path(text: str) -> None:
    try:
        compare_exactly("\\frac{x}{2}", text)
        assert compare_exactly(text, text) in (True, False)
    except TooCostlyError:
        pass


@settings(deadline=None)
@given(st.text(max_size=80))
def test_normalising_twice_changes_nothing_that_counts(text: str) -> None:
    once = normalize(text)
    assert compare_exactly(once, once) is (once != "") or not once.strip()


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^{9}}}",
        "2^{2^{100}}",
        "(32!)!",
        "100000!",
        "3!!!",
        "x^{1000000}",
        "7" * 2000 + "x",
        "(" * 100,
        "x^x^x^x",
    ],
)
def test_costly_answers_are_turned_away(text: str) -> None:
    with pytest.raises(TooCostlyError):
        compare_exactly("x+1", text)
