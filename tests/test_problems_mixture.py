"""Mixtures: proportions hold, nothing is used twice, a draw repeats itself, and what is missing is made up for."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import JsonlSource, MixtureConfig, ProblemsConfig
from astro_hpc.problems.mixture import draw, shares
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.sources import read_sources

sources = st.lists(st.tuples(st.integers(0, 500), st.floats(0.01, 100)), min_size=1, max_size=6)


@given(sources, st.integers(1, 2000))
def test_shares_add_up_and_stay_within_the_sources(pairs: list[tuple[int, float]], size: int) -> None:
    sizes, weights = [n for n, _ in pairs], [weight for _, weight in pairs]
    counts = shares(sizes, weights, size)
    assert sum(counts) == min(size, sum(sizes))
    assert all(0 <= count <= n for count, n in zip(counts, sizes, strict=True))
    unexhausted = [(c, w) for c, n, w in zip(counts, sizes, weights, strict=True) if c < n]
    for count, weight in unexhausted:  # those that are not used up keep their proportions
        for other, other_weight in unexhausted:
            assert abs(count - other * weight / other_weight) <= 1 + weight / other_weight


@given(sources)
def test_without_a_size_no_source_is_short(pairs: list[tuple[int, float]]) -> None:
    sizes, weights = [n for n, _ in pairs], [weight for _, weight in pairs]
    counts = shares(sizes, weights)
    total = sum(counts)
    assert all(count <= n for count, n in zip(counts, sizes, strict=True))
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) <= 1


def test_shares_by_example() -> None:
    assert shares([1000, 1000], [3, 1], 100) == [75, 25]
    assert shares([10, 1000, 1000], [1, 1, 2], 400) == [10, 130, 260]
    assert shares([30, 1000], [1, 3]) == [30, 90]
    assert shares([5, 5], [1, 1], 100) == [5, 5]


def test_a_draw_is_nested_and_does_not_move() -> None:
    problems = [Problem(f"p/{i}", str(i), "1") for i in range(200)]
    small, large = draw(problems, 20, 7, "mixture"), draw(problems, 50, 7, "mixture")
    assert all(problem in large for problem in small)
    assert large == sorted(large, key=problems.index)
    assert draw(problems, 20, 8, "mixture") != small
    fewer = [problem for problem in problems if problem not in large or problem in small]
    assert draw(fewer, 20, 7, "mixture") == small
    assert draw(problems, 500, 7, "mixture") == problems


def test_a_mixture_of_files(tmp_path: Path) -> None:
    def file(name: str, count: int) -> JsonlSource:
        rows = [{"problem": f"{name} {i}?", "answer": str(i)} for i in range(count)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return JsonlSource(type="jsonl", path=path)

    three = [file("small", 10), file("large", 100), file("other", 100)]
    mixture = MixtureConfig(weights=[1, 1, 2], size=80)
    loaded = read_sources(three, mixture=mixture)
    assert [report.used for report in loaded.reports] == [10, 23, 47]
    assert len({problem.id for problem in loaded.problems}) == 80
    assert read_sources(three, mixture=mixture).problems == loaded.problems
    assert "10 fewer than its share" in str(loaded.reports[0])
    assert loaded.reports[1].outside_mixture == 77
    reseeded = read_sources(three, mixture=MixtureConfig(weights=[1, 1, 2], size=80, seed=1))
    assert reseeded.problems != loaded.problems
    assert [report.used for report in reseeded.reports] == [10, 23, 47]


def test_a_source_with_nothing_left_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"problem": "A?", "answer": "1"}) + "\n")
    source = JsonlSource(type="jsonl", path=path)
    twice = [source, source.model_copy(update={"name": "again"})]
    with pytest.raises(ConfigError, match="nothing of source 'again' is left"):
        read_sources(twice, mixture=MixtureConfig(weights=[1, 1]))
    assert len(read_sources(twice, mixture=MixtureConfig(weights=[1, 1], size=2)).problems) == 1


def test_a_weight_for_each_source() -> None:
    sources = [{"type": "signs", "count": 1}] * 2
    with pytest.raises(ValidationError, match="1 entries for 2 sources"):
        ProblemsConfig.model_validate({"train": sources, "mixture": {"weights": [1]}})
    with pytest.raises(ValidationError, match="greater than 0"):
        ProblemsConfig.model_validate({"train": sources, "mixture": {"weights": [1, 0]}})
