"""Problem files in their usual forms, and the account of what became of every row."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import JsonlSource, ReasoningGymSource, SignsSource
from astro_hpc.problems.decontaminate import Screen, text_key
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.rows import boxed_answer, normalise_gold
from astro_hpc.problems.sources import load_source, read_source, read_sources


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
    ({"problem": "L?", "solution": r"so $x$ is \boxed{1} or \boxed{2}."}, "1, 2"),
    ({"question": "M?", "final_answer": ["3", 4.0]}, "3, 4"),
    ({"prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "N?"}], "answer": "1"}, "1"),
    ({"problem": "O?", "answer": "6", "difficulty": 4.0, "problem_type": "Algebra"}, "6"),
]


def test_every_usual_form_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.jsonl", [row for row, _ in FORMS])
    problems, report = read_source(JsonlSource(type="jsonl", path=path))
    assert [problem.answer for problem in problems] == [answer for _, answer in FORMS]
    assert all(problem.checker == "math" and problem.id.startswith("mixed/") for problem in problems)
    assert dict(problems[0].metadata) == {"level": "5", "subject": "Algebra"}
    assert dict(problems[-1].metadata) == {"level": "4", "subject": "Algebra"}
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
        '{"problem": "cut o',
        [1],
        {"problem": "F?", "answer": "proof"},
        '{"problem": "G?", "answer": NaN}',
        '{"problem": "half \\ud800", "answer": "1"}',
        {"problem": "a ?", "answer": "2"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    problems, report = read_source(JsonlSource(type="jsonl", path=path))
    assert [problem.text for problem in problems] == ["A?"]
    unusable = {where.rpartition(":")[2]: reason for where, reason in report.unusable.examples}
    assert list(unusable) == ["3", "4", "5", "6", "8", "9", "10", "11", "12", "13"]
    assert "not JSON" in unusable["9"]
    assert "list" in unusable["10"]
    assert "nothing to check" in unusable["11"]
    assert report.duplicates.examples == [(f"{path}:7", f"as {path}:1"), (f"{path}:14", f"as {path}:1")]
    assert report.conflicting.examples == [(f"{path}:14", f"answer '2', but '1' at {path}:1")]
    assert report.rows == report.used + report.duplicates.count + report.unusable.count == 13
    assert "10 unusable (first: " in str(report)


def test_only_the_first_unusable_rows_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"problem": "A?", "answer": "1"}, *[{"problem": "B?"}] * 100])
    _, report = read_source(JsonlSource(type="jsonl", path=path))
    assert (report.unusable.count, len(report.unusable.examples)) == (100, 20)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"problem": '], r"rows.jsonl:1: not JSON .* no row of .* is usable \(1 of 1"),
        (["[1]"], r"rows.jsonl:1: expected a JSON object"),
        ([{"problem": "A?"}], r"rows.jsonl:1: no answer .* no row of .* is usable"),
        ([], r"rows.jsonl: has no rows"),
    ],
)
def test_files_without_a_usable_row_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
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
    benchmarks = {
        "counting": [Problem("bench/1", f"{long} of them?", "40")],
        "sums": [Problem("bench/2", "What is 2+2?", "4")],
    }
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
    loaded = read_sources(sources, benchmarks, ngram=10)
    assert [problem.text for problem in loaded.problems[:2]] == ["What is 2+3?", "New?"]
    assert len(loaded.problems) == 5
    assert [(overlap.benchmark, overlap.benchmark_id, overlap.share == 1.0) for overlap in loaded.overlaps] == [
        ("sums", "bench/2", True),
        ("counting", "bench/1", False),
    ]
    assert loaded.reports[1].duplicates.examples == [(f"{second}:1", f"as {first}:3")]
    assert loaded.summary()["contaminated"] == {"sums": 1, "counting": 1}
    said: list[str] = []
    loaded.report(tmp_path / "run" / "problems.json", said.append)
    written = json.loads((tmp_path / "run" / "problems.json").read_text())
    assert written == json.loads(json.dumps(loaded.to_json()))
    assert written["contaminated"]["by_benchmark"] == {"sums": 1, "counting": 1}
    assert {row["benchmark_problem"] for row in written["contaminated"]["dropped"]} == {"bench/1", "bench/2"}
    for report in written["sources"]:
        counts = [report[key] for key in ("used", "filtered", "contaminated", "over_limit", "outside_mixture")]
        assert report["rows"] == sum(counts) + report["duplicates"]["count"] + report["unusable"]["count"]
    assert said[0] == "a: 1 of 3 used, 2 like a benchmark's"
    assert said[-1].startswith("2 problems dropped that resemble a benchmark's (sums 1, counting 1)")


def test_the_limit_counts_what_is_left_after_screening(tmp_path: Path) -> None:
    rows = [{"problem": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    benchmarks = {"b": [Problem(f"b/{i}", f"What is ${i} + {i}$?", "") for i in range(20)]}
    drawn = read_sources([JsonlSource(type="jsonl", path=path, limit=8, seed=3)], benchmarks)
    assert len(drawn.problems) == 8
    assert (drawn.reports[0].contaminated, drawn.reports[0].over_limit) == (20, 2)
    fewer = read_sources([JsonlSource(type="jsonl", path=path, limit=5, seed=3)], benchmarks)
    assert len(fewer.problems) == 5
    assert all(problem in drawn.problems for problem in fewer.problems)


def test_texts_are_compared_without_case_and_spacing() -> None:
    assert text_key("Find  $\\dfrac{1}{2}\\,x$.") == text_key("find \\frac{1}{2} x .")
    assert text_key("Find 12.") != text_key("Find 1 2.")
    assert text_key("Find $x$.") != text_key("Find $y$.")


def test_decontamination_needs_half_of_the_ngrams() -> None:
    words = [f"w{i}" for i in range(40)]
    benchmarks = {"long": [Problem("b", " ".join(words), "1")]}
    half = Problem("half", " ".join(words[:20] + [f"v{i}" for i in range(20)]), "1")
    most = Problem("most", " ".join(words[:30]), "1")
    screen = Screen(benchmarks, ngram=10)
    assert screen.overlap(half) is None
    found = screen.overlap(most)
    assert found is not None
    assert (found.problem_id, found.benchmark, found.benchmark_id) == ("most", "long", "b")
    assert screen.overlap(most, whole_texts=True) is None
    assert Screen(benchmarks, ngram=0).overlap(most) is None


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
