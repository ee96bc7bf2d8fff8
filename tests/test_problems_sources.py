"""Problem files in their usual forms, and the account of what became of every row."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import JsonlSource, ReasoningGymSource, SignsSource
from astro_hpc.problems.decontaminate import decontaminate
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.rows import boxed_answer, normalise_gold
from astro_hpc.problems.sources import load_source, load_sources, read_source, read_sources


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


FORMS = [
    ({"problem": "A?", "solution": r"so \boxed{\frac{1}{2}}", "level": "Level 5", "type": "Algebra"}, r"\frac{1}{2}"),
    ({"problem": "B?", "solution": "...", "answer": "7", "level": 3, "subject": "Geometry"}, "7"),
    ({"problem": "C?", "answer": "025"}, "25"),
    ({"problem": "D?", "answer": 27.0}, "27"),
    ({"problem": "E?", "answer": -4}, "-4"),
    ({"question": "F?", "answer": "2+3 = <<2+3=5>>5\n#### 1,005"}, "1005"),
    ({"problem": "G?", "expected_answer": "x+1"}, "x+1"),
    ({"text": "H?", "answer": "$3$"}, "3"),
    ({"question": "I?", "answer": ["12"]}, "12"),
    ({"problem": "J?", "solution": r"so \boxed 9"}, "9"),
    ({"problem": "K?", "answer": r"the answer is \boxed{8}"}, "8"),
]


def test_every_usual_form_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.jsonl", [row for row, _ in FORMS])
    problems, report = read_source(JsonlSource(type="jsonl", path=path))
    assert [problem.answer for problem in problems] == [answer for _, answer in FORMS]
    assert all(problem.checker == "math" and problem.id.startswith("mixed/") for problem in problems)
    assert dict(problems[0].metadata) == {"level": "5", "subject": "Algebra"}
    assert report.used == report.rows == len(FORMS)
    assert Problem.from_json(json.loads(json.dumps(problems[0].to_json()))) == problems[0]


def test_unusable_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [
        {"problem": "A?", "answer": "1"},
        "",
        {"problem": "B?"},
        {"answer": "3"},
        {"problem": "C?", "solution": r"cut off \boxed{4"},
        {"problem": "D?", "answer": {"value": 1}},
        {"problem": "A?", "answer": "1"},
        {"problem": "E?", "answer": "  "},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    problems, report = read_source(JsonlSource(type="jsonl", path=path))
    assert [problem.text for problem in problems] == ["A?"]
    assert [where.rpartition(":")[2] for where, _ in report.unusable] == ["3", "4", "5", "6", "8"]
    assert report.duplicates == (f"{path}:7",)
    assert report.rows == report.used + len(report.duplicates) + len(report.unusable)
    assert "5 unusable" in str(report)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"problem": '], r"rows.jsonl:1: not JSON"),
        ([{"problem": "A?", "answer": "1"}, "[1]"], r"rows.jsonl:2: expected a JSON object"),
        ([{"problem": "A?"}], r"rows.jsonl:1: no answer .* no row of the file is usable"),
        ([], r"rows.jsonl: has no rows"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match=message):
        load_source(JsonlSource(type="jsonl", path=path))


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load_source(JsonlSource(type="jsonl", path=Path("/nowhere/problems.jsonl")))


def test_levels_subjects_limit_and_policy(tmp_path: Path) -> None:
    rows = [
        {"problem": f"{level} {subject} {i}?", "answer": "1", "level": f"Level {level}", "type": subject}
        for level in (1, 2)
        for subject in ("Algebra", "Geometry")
        for i in range(10)
    ]
    path = write(tmp_path / "math.jsonl", rows)
    source = JsonlSource(
        type="jsonl", path=path, levels=["Level 2"], subjects=["algebra"], limit=4, seed=1, percent="strict"
    )
    problems, report = read_source(source)
    assert len(problems) == 4
    assert all(problem.text.startswith("2 Algebra") for problem in problems)
    assert (report.filtered, report.over_limit) == (30, 6)
    assert problems == load_source(source)
    assert problems[0].metadata["answer_policy"] == {"percent": "strict"}
    with pytest.raises(ConfigError, match="levels or subjects"):
        load_source(JsonlSource(type="jsonl", path=path, levels=["9"]))


def test_sources_together_drop_repeats_and_benchmarks(tmp_path: Path) -> None:
    long = "How many positive whole numbers below one hundred are divisible by three or by five but not by both"
    benchmark = [Problem("bench/1", f"{long} of them?", "40"), Problem("bench/2", "What is 2+2?", "4")]
    first = write(
        tmp_path / "a.jsonl",
        [
            {"problem": "What is $2 + 2$?", "answer": "4"},
            {"problem": f"{long}? Explain.", "answer": "40"},
            {"problem": "What is 2+3?", "answer": "5"},
        ],
    )
    second = write(
        tmp_path / "b.jsonl", [{"problem": "What is 2+3?", "answer": "5"}, {"problem": "New?", "answer": "1"}]
    )
    sources = [JsonlSource(type="jsonl", path=first), JsonlSource(type="jsonl", path=second), SignsSource(count=3)]
    loaded = read_sources(sources, benchmark, ngram=10)
    assert [problem.text for problem in loaded.problems[:2]] == ["What is 2+3?", "New?"]
    assert len(loaded.problems) == 5
    assert [(overlap.benchmark_id, overlap.share == 1.0) for overlap in loaded.overlaps] == [
        ("bench/2", True),
        ("bench/1", False),
    ]
    assert loaded.reports[1].duplicates
    assert json.dumps(loaded.to_json())
    assert load_sources(sources, benchmark) == loaded.problems


def test_decontamination_needs_half_of_the_ngrams() -> None:
    words = [f"w{i}" for i in range(40)]
    benchmark = [Problem("b", " ".join(words), "1")]
    half = Problem("half", " ".join(words[:20] + [f"v{i}" for i in range(20)]), "1")
    most = Problem("most", " ".join(words[:30]), "1")
    kept, dropped = decontaminate([half, most], benchmark, ngram=10)
    assert [problem.id for problem in kept] == ["half"]
    assert [overlap.problem_id for overlap in dropped] == ["most"]
    assert decontaminate([half, most], benchmark, ngram=0) == ([half, most], [])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("025", "25"),
        ("000", "0"),
        ("-07", "-7"),
        ("27.0", "27"),
        ("1,000", "1000"),
        ("12,345.0", "12345"),
        ("1,00", "1,00"),
        ("0.50", "0.50"),
        ("1{,}234", "1234"),
        ("x+1", "x+1"),
        ("(1,2)", "(1,2)"),
    ],
)
def test_gold_answers_are_normalised(text: str, kept: str) -> None:
    assert normalise_gold(text) == kept


def test_boxed_answer_of_a_reference_solution() -> None:
    assert boxed_answer(r"\boxed{1} and then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert boxed_answer(r"\boxed{1}, so $\boxed 2$.") == "2"
    assert boxed_answer("no box") is None


def test_reasoning_gym_halves_share_no_question() -> None:
    halves = []
    for split, seed in (("train", 1), ("heldout", 2)):
        source = ReasoningGymSource.model_validate(
            {"type": "reasoning_gym", "dataset": "chain_sum", "split": split, "count": 40, "seed": seed}
        )
        problems, report = read_source(source)
        assert problems == load_source(source)
        assert report.used == 40
        assert all(problem.checker == "reasoning_gym" and problem.answer for problem in problems)
        halves.append({problem.text for problem in problems})
    assert not halves[0] & halves[1]


def test_reasoning_gym_errors() -> None:
    with pytest.raises(ConfigError, match="nearest: chain_sum"):
        load_source(ReasoningGymSource(type="reasoning_gym", dataset="chain_sun", count=1))
    with pytest.raises(ConfigError, match="refuses params"):
        load_source(ReasoningGymSource(type="reasoning_gym", dataset="chain_sum", count=1, params={"terms": 3}))
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ConfigError, match="gave only"):
        load_source(ReasoningGymSource(type="reasoning_gym", dataset="chain_sum", count=400, params=few))
