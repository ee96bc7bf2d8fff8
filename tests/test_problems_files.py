"""Parquet files and Hugging Face data sets, offline; hostile files; what becomes a stage's input."""

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import HuggingFaceSource, JsonlSource, ParquetSource, RunConfig
from astro_hpc.pipeline import search
from astro_hpc.problems.row_files import local_path, read_numbered, read_rows
from astro_hpc.problems.sources import load_source, read_source
from astro_hpc.run.stage import run_stage

ROWS: list[dict[str, Any]] = [
    {"problem": "What is 1+1?", "solution": r"so $\boxed{2}$", "level": "Level 1", "type": "Algebra"},
    {"problem": "What is 1/2 of 1?", "solution": r"so $\boxed{\frac{1}{2}}$", "level": "Level 5", "type": "Algebra"},
    {"problem": "Prove it.", "solution": "Left to the reader.", "level": "Level 5", "type": "Geometry"},
]
ANSWERS = ["2", r"\frac{1}{2}"]


@pytest.fixture(autouse=True)
def _no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are looked for in folders and an empty cache only."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hub(path: Path | str, **settings: Any) -> HuggingFaceSource:
    return HuggingFaceSource(type="huggingface", path=str(path), **settings)


def test_parquet_file_and_folder(tmp_path: Path) -> None:
    path = parquet(tmp_path / "one.parquet", ROWS)
    problems, report = read_source(ParquetSource(type="parquet", path=path))
    assert [problem.answer for problem in problems] == ANSWERS
    assert dict(problems[1].metadata) == {"level": "5", "subject": "Algebra"}
    assert report.unusable.examples[0][0] == f"{path}:row 3"
    folder = tmp_path / "many"
    for i, row in enumerate(ROWS):
        parquet(folder / f"train-{i}.parquet", [row])
    found = load_source(ParquetSource(type="parquet", path=folder, name="one"))
    assert found == problems


def test_a_folder_of_json_lines(tmp_path: Path) -> None:
    jsonl(tmp_path / "all" / "b.jsonl", ROWS[1:])
    jsonl(tmp_path / "all" / "a.jsonl", ROWS[:1])
    assert [p.answer for p in load_source(JsonlSource(type="jsonl", path=tmp_path / "all"))] == ANSWERS
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"no \*.jsonl files"):
        load_source(JsonlSource(type="jsonl", path=tmp_path / "none"))


def test_data_set_folders_are_read_offline(tmp_path: Path) -> None:
    import datasets

    parquet(tmp_path / "pq" / "train-00000-of-00001.parquet", ROWS)
    parquet(tmp_path / "pq" / "test-00000-of-00001.parquet", ROWS[1:])
    jsonl(tmp_path / "js" / "train.jsonl", ROWS)
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "split"))
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(str(tmp_path / "dict"))
    for name in ("pq", "js", "split", "dict"):
        problems, report = read_source(hub(tmp_path / name))
        assert [problem.answer for problem in problems] == ANSWERS, name
        assert (report.name, report.rows, report.unusable.count) == (name, 3, 1)
    for name in ("pq", "dict"):
        assert [p.answer for p in load_source(hub(tmp_path / name, split="test"))] == ANSWERS[1:]
        with pytest.raises(ConfigError, match="has no split 'dev'; it has test, train"):
            load_source(hub(tmp_path / name, split="dev"))


def test_data_sets_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load_source(hub(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="check the folder"):
        load_source(hub(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"someone/something: not loaded .* local folder") as caught:
        load_source(hub("someone/something"))
    assert "\n" not in str(caught.value)


class Trap:
    """Leaves a trace when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_code_and_pickles_that_come_with_data_are_not_run(tmp_path: Path) -> None:
    trace, folder = tmp_path / "trace", tmp_path / "set"
    jsonl(folder / "train.jsonl", ROWS)
    (folder / "train.pkl").write_bytes(pickle.dumps(Trap(trace)))
    assert [problem.answer for problem in load_source(hub(folder))] == ANSWERS
    (folder / "set.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    with pytest.raises(ConfigError, match="scripts are no longer supported"):
        load_source(hub(folder))
    (folder / "set.py").unlink()
    (folder / "train.jsonl").unlink()
    with pytest.raises(ConfigError):
        load_source(hub(folder))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("missing", "source"),
    [
        ("datasets", HuggingFaceSource(type="huggingface", path="someone/something")),
        ("pyarrow", ParquetSource(type="parquet", path=Path("x.parquet"))),
    ],
)
def test_a_missing_package_names_the_extra(missing: str, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf'need the package {missing}, .* pip install "astro-hpc\[data\]"'):
        load_source(source)


@pytest.mark.parametrize("damage", ["text", "cut", "zeroed"])
def test_damaged_parquet(tmp_path: Path, damage: str) -> None:
    rows = [{"problem": f"What is {i} and {i * 7919 % 1000003}?", "answer": str(i)} for i in range(3000)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="snappy")
    whole = path.read_bytes()
    damaged = {
        "text": b"problem,answer\n1,2\n",
        "cut": whole[: len(whole) // 2],
        "zeroed": whole[:200] + bytes(4000) + whole[4200:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ConfigError, match="not a sound Parquet file") as caught:
        load_source(ParquetSource(type="parquet", path=path))
    assert "\n" not in str(caught.value)


def test_lines_without_an_end_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with open(path, "w") as handle:
        handle.write(json.dumps({"problem": "A?", "answer": "1"}) + "\n")
        handle.write('{"problem": "' + "x" * (9 << 20) + '", "answer": "1"}\n')
        handle.write('{"problem": "B?", "answer": "2"}\n')
        handle.write('{"problem": ' + "[" * (1 << 20) + "\n")
        handle.write('{"problem": "C?", "answer": ' + "9" * 100_000 + "}\n")
        handle.write(json.dumps({"problem": "y" * 200_000, "answer": "1"}) + "\n")
    problems, report = read_source(JsonlSource(type="jsonl", path=path))
    assert [problem.text for problem in problems] == ["A?", "B?"]
    reasons = {where.rpartition(":")[2]: reason for where, reason in report.unusable.examples}
    assert set(reasons) == {"2", "4", "5", "6"}
    assert "more than 8 MB" in reasons["2"]
    with pytest.raises(ConfigError, match="long.jsonl:2: a line of more than 8 MB"):
        list(read_numbered(path))


def test_own_columns(tmp_path: Path) -> None:
    rows = [{"ask": "A?", "reward_model": {"ground_truth": "7", "style": "rule"}, "answer": "no"}]
    for source in (
        JsonlSource(
            type="jsonl",
            path=jsonl(tmp_path / "a.jsonl", rows),
            text_column="ask",
            answer_column="reward_model.ground_truth",
        ),
        ParquetSource(
            type="parquet",
            path=parquet(tmp_path / "a.parquet", rows),
            text_column="ask",
            answer_column="reward_model.ground_truth",
        ),
    ):
        assert [(problem.text, problem.answer) for problem in load_source(source)] == [("A?", "7")]
    with pytest.raises(ConfigError, match="no problem text"):
        load_source(JsonlSource(type="jsonl", path=tmp_path / "a.jsonl"))


def test_only_needed_columns_are_read(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [{**ROWS[0], "image": b"\xff" * 100}])
    _, row = next(read_rows(ParquetSource(type="parquet", path=path)))
    assert isinstance(row, dict)
    assert "image" not in row


def test_files_and_folders_are_stage_inputs(tmp_path: Path) -> None:
    file, folder = jsonl(tmp_path / "a.jsonl", ROWS), parquet(tmp_path / "pq" / "train.parquet", ROWS).parent
    cfg = RunConfig.model_validate(
        {
            "name": "test",
            "runs_dir": tmp_path,
            "warmup": {"enabled": True, "problems": {"type": "signs", "count": 1}},
            "problems": {
                "train": [
                    {"type": "jsonl", "path": file},
                    {"type": "parquet", "path": folder},
                    {"type": "huggingface", "path": str(folder)},
                    {"type": "huggingface", "path": "owner/name"},
                    {"type": "signs", "count": 2},
                ]
            },
            "eval": {"benchmarks": {"held": {"type": "parquet", "path": folder / "train.parquet"}}},
        }
    )
    inputs = set(search(cfg).inputs.values())
    assert {file, folder, folder / "train.parquet"} <= inputs
    assert [local_path(source) for source in cfg.problems.train] == [file, folder, folder, None, None]


def test_a_search_says_what_became_of_the_rows_and_notices_changed_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sums = [{"problem": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(12)]
    (tmp_path / "test" / "warmup" / "hf").mkdir(parents=True)
    cfg = RunConfig.model_validate(
        {
            "name": "test",
            "runs_dir": tmp_path,
            "warmup": {"enabled": True, "problems": {"type": "signs", "count": 1}},
            "inference": {"engine": "scripted", "max_model_len": 1024},
            "search": {"num_iterations": 2, "num_expansions": 2, "num_rollouts": 1},
            "problems": {
                "train": [
                    {"type": "jsonl", "path": jsonl(tmp_path / "sums.jsonl", [*sums, {"problem": "Why?"}])},
                    {"type": "huggingface", "path": str(parquet(tmp_path / "pq" / "train.parquet", ROWS).parent)},
                ],
                "mixture": {"weights": [2, 1], "size": 6},
            },
            "eval": {"benchmarks": {"held": {"type": "jsonl", "path": jsonl(tmp_path / "held.jsonl", sums[:3])}}},
        }
    )
    run_stage(cfg, search(cfg))
    folder = tmp_path / "test" / "search" / "shard-00000-of-00001"
    written = json.loads((folder / "problems.json").read_text())
    assert written["problems"] == 6
    assert [source["used"] for source in written["sources"]] == [5, 1]  # 1+1 is among the sums, and the held-out ones
    assert written["contaminated"]["by_benchmark"] == {"held": 4}
    assert written["sources"][0]["unusable"]["first"][0]["where"] == f"{tmp_path / 'sums.jsonl'}:13"
    said = capsys.readouterr().err
    assert "sums: 5 of 13 used" in said
    assert "1 unusable (first: " in said
    assert "4 problems dropped that resemble a benchmark's (held 4)" in said
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["problems"]["contaminated"] == {"held": 4}
    run_stage(cfg, search(cfg))
    parquet(tmp_path / "pq" / "train.parquet", ROWS[:2])
    with pytest.raises(ConfigError, match=r"done with other inputs: .*pq"):
        run_stage(cfg, search(cfg))
