"""Metrics against hand-worked figures and their definitions."""

import itertools
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from astro_hpc.evaluation.metrics import (
    Attempt,
    Graded,
    maj_at_k,
    paired_difference,
    pass_at_1,
    pass_at_k,
    share,
    summarize,
    token_matched_best_of_n,
)


def samples(pattern, answers=None, tokens=10):
    """`"1101"` -> four samples; right answers say R, wrong ones w, unless given."""
    answers = answers or ["R" if c == "1" else "w" for c in pattern]
    return [Graded(c == "1", a, tokens, attempts=(Attempt(c == "1"),)) for c, a in zip(pattern, answers, strict=True)]


@given(st.integers(0, 8), st.integers(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(correct, k):
    pattern = "1" * correct + "0" * (8 - correct)
    subsets = list(itertools.combinations(pattern, k))
    expected = sum("1" in subset for subset in subsets) / len(subsets)
    assert pass_at_k({"a": samples(pattern)}, k).value == pytest.approx(expected)


def test_pass_at_1_weighs_problems_not_samples():
    results = {"a": samples("1111"), "b": samples("00"), "c": samples("10")}
    assert pass_at_1(results).value == pytest.approx(0.5)


def test_majority_with_ties_missing_answers_and_groups():
    assert maj_at_k({"a": samples("100", ["x", "y", "y"])}, 3).value == 0
    assert maj_at_k({"a": samples("10", ["x", "y"])}, 2).value == 1  # a tie goes to the earlier
    assert maj_at_k({"a": samples("100", ["x", None, None])}, 3).value == 1  # no answer, no vote
    assert maj_at_k({"a": samples("000", [None] * 3)}, 3).value == 0
    assert maj_at_k({"a": samples("11001")}, 2).value == 0.5  # groups 11 and 00; the fifth is left over
    with pytest.raises(ValueError, match="maj@3 of 2"):
        maj_at_k({"a": samples("11")}, 3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
@example([0.0, 1.1e-308])
def test_interval_holds_the_value_and_stays_within_bounds(values):
    estimate = share(values)
    assert 0 <= estimate.low <= estimate.value + 1e-9
    assert estimate.value <= estimate.high + 1e-9
    assert estimate.high <= 1 + 1e-9


def test_interval_equals_wilsons_for_one_sample_a_problem():
    # 20 of 100: Wilson's 95 % interval is [0.1333, 0.2888]
    estimate = share([1.0] * 20 + [0.0] * 80)
    assert estimate.low == pytest.approx(0.1333, abs=2e-3)
    assert estimate.high == pytest.approx(0.2888, abs=2e-3)
    assert share([0.0] * 100).high == pytest.approx(0.0370, abs=1e-3)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = random.Random(5)
    covered = 0
    for _ in range(400):
        difficulty = [rng.betavariate(1, 2) for _ in range(60)]  # problems differ; their mean is 1/3
        results = {str(i): samples("".join("01"[rng.random() < p] for _ in range(4))) for i, p in enumerate(difficulty)}
        estimate = pass_at_1(results)
        covered += estimate.low <= 1 / 3 <= estimate.high
    assert 0.92 <= covered / 400 <= 0.98


def test_paired_difference_uses_shared_problems_and_their_correlation():
    first = {str(i): samples("1" if i % 2 else "0") for i in range(40)}
    same = paired_difference(first, first)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = {**first, "0": samples("1"), "2": samples("1"), "extra": samples("1")}
    delta = paired_difference(better, first)
    assert delta.value == pytest.approx(0.05)
    assert delta.half_width < pass_at_1(first).half_width
    with pytest.raises(ValueError, match="no problem in common"):
        paired_difference(first, {"x": samples("1")})


def test_best_of_n_spends_the_longer_models_tokens():
    long = {"a": samples("10", tokens=35), "b": samples("00", tokens=35)}
    short = {"a": samples("1000", tokens=10), "b": samples("0100", tokens=10)}
    matched = token_matched_best_of_n(long, short)
    assert (matched["n"], matched["affordable_n"]) == (3, 3)
    assert matched["pass"] == pytest.approx(0.75)
    assert token_matched_best_of_n(short, long)["n"] == 1
    wide = token_matched_best_of_n({"a": samples("1", tokens=900), "b": samples("1", tokens=900)}, short)
    assert (wide["n"], wide["affordable_n"]) == (4, 90)


def test_summary_of_two_problems():
    miss, hit = Attempt(False, went_back=True), Attempt(True)
    results = {
        "a": [Graded(True, "5", 30, 2, attempts=(miss, miss, hit)), Graded(True, "5", 10, 0, attempts=(hit,))],
        "b": [
            Graded(False, None, 50, 4, truncated=True, attempts=(miss, Attempt(False, True, repeated=True))),
            Graded(False, "7", 10, 0, attempts=(Attempt(False),)),
        ],
    }
    summary = summarize(results, majority=8)
    assert summary["pass_at_1"] == 0.5
    assert summary["first_attempt"] == 0.25
    assert (summary["k"], summary["majority"]) == (2, 2)
    assert summary["pass_at_k"] == 0.5
    assert summary["backtracks_per_response"] == 1.5
    assert summary["responses_with_backtrack"] == 0.5
    assert summary["attempts_per_response"] == 7 / 4
    assert (summary["right_attempts_kept"], summary["wrong_attempts_left"]) == (1, 4 / 5)
    assert summary["repeated_attempts"] == 1 / 7
    assert (summary["tokens_per_response"], summary["tokens_right"], summary["tokens_wrong"]) == (25, 20, 30)
    assert (summary["truncated"], summary["no_answer"]) == (0.25, 0.25)
    assert summarize({"a": samples("00")})["tokens_right"] is None
    assert summarize({"a": [Graded(False, None, 3)]})["right_attempts_kept"] is None
