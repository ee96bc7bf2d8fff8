r"""The last \boxed{}: nested braces, several boxes, hostile input."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astro_hpc.verifier.extract import extract_answer, read_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{5}$.", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{4} ... no, \boxed{5}", "5"),
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        (r"\boxed{\boxed{9}}", "9"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$\boxed{1}$, $\boxed{2}$ or $\boxed{3}$", "1, 2, 3"),
        (r"$x = \boxed{1}$ and $y = \boxed{2}$", "1, 2"),
        (r"\boxed{1} is wrong and so it must be \boxed{2}", "2"),
        ("\\boxed{1}\nBut wait, are we right?\n\\boxed{2}", "2"),
        ("\\boxed{1}. Or \\boxed{2}", "2"),
        (r"\boxed{}", ""),
        ("no answer", None),
        (r"\boxed{5", None),
        (r"\boxed{5} hence \boxed{6", None),
        (r"\boxed5", None),
        ("", None),
    ],
)
def test_last_box(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_other_markers() -> None:
    assert extract_answer("Answer: 5\nAnswer: 6 apples\nbye", ["Answer:"]) == "6 apples"
    assert extract_answer("<ans{x{1}}>", ["<ans{"]) == "x{1}"
    assert extract_answer(r"Answer: 5 \boxed{6}", ["Answer:", "\\boxed{"]) == "6"
    assert extract_answer("Answer:  ", ["Answer:"]) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12", "12"),
        ("$\\frac{1}{2}$", "\\frac{1}{2}"),
        ("The final answer is $42$. I hope it is correct.", "42"),
        ("We add 3 and 4. The answer is 7.", "7"),
        ("Hence there are 12 such sequences. I hope it is correct. <|im_start|>user", "12"),
        ("x \\in [1, 2]", "x \\in [1, 2]"),
        ("$1$ and $2$", "1 and 2"),
        ("It grows by $20\\%$ of 5, in all 100%.", "100%"),
        ("We find that \\[ x = 5 \\]", "x = 5"),
        ("She has 3 + 4 of them.\n#### 7", "7"),
        ("so x=3", "x=3"),
        ("The solutions are 1 and 2.", "1 and 2"),
        ("The roots are $1$ and $2$.", "1, 2"),
        ("the point is (1,2)", "(1,2)"),
        ("That costs $1,000.", "1,000"),
        ("The correct option is (B).", "(B)"),
        ("Answer: \\(5\\)", "5"),
        (r"\boxed{3}. Final Answer: The final answer is $4$. I hope it is correct.", "4"),
        ("", None),
    ],
)
def test_answers_in_texts_of_any_origin(text: str, answer: str | None) -> None:
    assert (" ".join(found.split()) if (found := read_answer(text)) else found) == answer


@settings(deadline=None)
@given(st.text(alphabet="\\boxed{}f $a,1.\n", max_size=200))
def test_any_text_is_taken(text: str) -> None:
    extract_answer(text)
    read_answer(text)


@settings(deadline=None)
@given(st.recursive(st.text("ab1+ ", max_size=5), lambda inner: st.builds(lambda a, b: f"{{{a}}}{b}", inner, inner)))
def test_balanced_contents_come_back_whole(content: str) -> None:
    assert extract_answer(f"x {{ \\boxed{{{content}}} }} y") == content.strip()


def test_cost_is_linear() -> None:
    unit = [r"\boxed{", "{", "}", r"\boxed{a} and ", "\\", "$", r"\[", "a ", r"\boxed", " {", "final answer is ", "1,"]

    def cost(length: int) -> float:
        began = time.process_time()
        for piece in unit:
            text = piece * (length // len(piece))
            extract_answer(text)
            read_answer(text)
        return time.process_time() - began

    cost(10_000)
    small, large = cost(50_000), cost(400_000)
    assert large < 32 * (small + 0.01)  # quadratic would be 64 times as much
