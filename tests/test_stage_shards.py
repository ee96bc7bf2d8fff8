"""Selection and evaluation in shards: gathered they are what one process writes, whatever the number of shards."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from astro_hpc import cli, pipeline
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.report.status import run_status
from astro_hpc.rl import select as select_stage
from astro_hpc.run.files import Journal, read_jsonl
from astro_hpc.run.stage import CheckpointedExit, StageContext, read_manifest, run_stage

NOT_RESULTS = ("manifest.json", "state.json", "rates.jsonl")


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    """A run whose models are there (the scripted engine needs no weights); of five problems and more of each kind."""
    rows = [{"problem": f"What is {i}?", "answer": str(i % 10)} for i in range(12)] + [{"problem": "Why?"}]
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [{"problem": f"Which digit comes {i} places after nought?", "answer": str(i)} for i in range(4)]
    (tmp_path / "places.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    cfg = RunConfig.model_validate(
        {
            "name": "run",
            "runs_dir": tmp_path,
            "model": {"path": str(tmp_path / "model"), "prompt_style": "minimal-chat"},
            "inference": {"engine": "scripted", "max_model_len": 1024},
            "verifier": {"num_workers": 1},
            "problems": {"train": [{"type": "jsonl", "path": tmp_path / "digits.jsonl"}]},
            "select": {"num_samples": 6, "min_pass_rate": 0.1, "max_pass_rate": 0.9, "max_tokens": 256},
            "eval": {
                "benchmarks": {
                    "signs": {"type": "signs", "split": "heldout", "count": 5},
                    "places": {"type": "jsonl", "path": tmp_path / "places.jsonl"},
                },
                "num_samples": 3,
                "max_tokens": 256,
                "limits": {"base": {"num_samples": 2}},
            },
        }
    )
    for folder in (tmp_path / "model", cfg.run_dir / "sft" / "astro" / "hf", cfg.run_dir / "rl" / "astro" / "hf"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    return cfg


def elsewhere(cfg: RunConfig) -> RunConfig:
    """The same models, and nothing selected or evaluated yet."""
    other = cfg.model_copy(update={"runs_dir": cfg.runs_dir / "other"})
    for stage in ("sft", "rl"):
        shutil.copytree(cfg.run_dir / stage, other.run_dir / stage)
    return other


def results(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_RESULTS]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def counts(cfg: RunConfig, stage: str) -> dict[str, object]:
    manifest = read_manifest(cfg.run_dir / stage)
    assert manifest is not None
    return manifest["counts"]


@pytest.mark.parametrize("num_shards", [2, 17])
def test_selection_in_shards_is_the_selection(cfg: RunConfig, num_shards: int) -> None:
    run_stage(cfg, pipeline.select(cfg, "astro"))
    assert 0 < len(list(read_jsonl(cfg.run_dir / "select" / "astro" / "prompts.jsonl"))) < 12

    sharded = elsewhere(cfg)
    for shard in reversed(range(num_shards)):
        run_stage(sharded, pipeline.select_shard(sharded, "astro", shard, num_shards))
    assert run_stage(sharded, pipeline.select(sharded, "astro"))
    assert results(sharded.run_dir / "select") == results(cfg.run_dir / "select")
    assert counts(sharded, "select/astro") == counts(cfg, "select/astro")
    sizes = [counts(sharded, str(folder))["candidates"] for folder in shard_folders(sharded, "select-shards/astro")]
    assert sum(sizes) == 12
    assert num_shards == 2 or 0 in sizes, "a shard may be empty"


@pytest.mark.parametrize("num_shards", [11])
def test_evaluation_in_shards_is_the_evaluation(cfg: RunConfig, num_shards: int) -> None:
    run_stage(cfg, pipeline.evaluate(cfg))
    sharded = elsewhere(cfg)
    for shard in reversed(range(num_shards)):
        run_stage(sharded, pipeline.evaluate_shard(sharded, shard, num_shards))
    assert run_stage(sharded, pipeline.evaluate(sharded))
    whole = results(cfg.run_dir / "eval")
    assert len(whole) == 1 + 6 + 2 * (2 + 3 + 3), "a summary, one a model and benchmark, and all their samples"
    assert results(sharded.run_dir / "eval") == whole
    assert counts(sharded, "eval") == counts(cfg, "eval")
    tokens = [counts(sharded, str(folder))["tokens"] for folder in shard_folders(sharded, "eval-shards")]
    assert sum(tokens) == counts(cfg, "eval")["tokens"]
    assert 0 in tokens, "a shard may be empty"


def test_a_stopped_shard_goes_on_and_samples_nothing_twice(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cfg.run_dir / "select-shards" / "astro" / "shard-00001-of-00002"
    append = Journal.append

    def append_and_stop(journal: Journal, value: object) -> None:
        append(journal, value)
        contexts[-1].request_stop()

    contexts: list[StageContext] = []
    remember = select_stage.run_shard
    monkeypatch.setattr(select_stage, "run_shard", lambda ctx, **rest: [contexts.append(ctx), remember(ctx, **rest)][1])
    with monkeypatch.context() as patch, pytest.raises(CheckpointedExit, match="problems sampled"):
        patch.setattr(Journal, "append", append_and_stop)
        run_stage(cfg, pipeline.select_shard(cfg, "astro", 1, 2))
    before = list(Journal.read(folder / "rates.jsonl"))
    assert before
    for shard in (0, 1):
        run_stage(cfg, pipeline.select_shard(cfg, "astro", shard, 2))
    rows = list(Journal.read(folder / "rates.jsonl"))
    assert rows[: len(before)] == before
    assert len({row["id"] for row in rows}) == len(rows) > len(before)
    run_stage(cfg, pipeline.select(cfg, "astro"))


def test_holes_are_named_and_another_split_is_refused(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cfg.runs_dir / "config.yaml"
    config.write_text(json.dumps(cfg.model_dump(mode="json")))

    def command(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["astro-hpc", words[0], str(config), *words[1:]])
        try:
            cli.main()
        except SystemExit as exit_:
            return int(exit_.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    for stage, label, folder in (("select", "select/astro", "select-shards/astro"), ("eval", "eval", "eval-shards")):
        code, error = command(stage, "--gather")
        assert (code, f"{cfg.run_dir / folder}: no shards to gather; run {stage} with" in error) == (2, True)
        code, error = command(stage, "--shard", "1")
        assert (code, "needs --num-shards" in error) == (2, True)
        made = cfg.run_dir / label
        made.mkdir(parents=True)
        for name in ("rates.jsonl", "state.json"):
            (made / name).write_text("{}")
        code, error = command(stage, "--shard", "1", "--num-shards", "3")
        assert (code, f"{made}: was begun in one process; go on without --shard" in error) == (2, True), error
        (made / "manifest.json").write_text("{}")
        code, error = command(stage, "--shard", "1", "--num-shards", "3")
        assert (code, f"{made}: was done in one process; go on without --shard" in error) == (2, True), error
        shutil.rmtree(made)
        code, error = command(stage, "--shard", "3", "--num-shards", "3")
        assert (code, "must be from 0 to 2" in error) == (2, True)
        assert command(stage, "--shard", "1", "--num-shards", "3")[0] == 0
        code, error = command(stage, "--gather")
        missing = f"{label}/shard-00000-of-00003, {label}/shard-00002-of-00003"
        message = f"astro-hpc: {label}: 2 of 3 shards are missing or not finished: {missing}; run them first"
        assert (code, message in error) == (2, True), error
        assert not (cfg.run_dir / stage / "manifest.json").exists()
        code, error = command(stage, "--shard", "1", "--num-shards", "4")
        assert (code, "is split into 3 already; go on with --num-shards 3" in error) == (2, True)
    rows = {row["stage"]: row["state"] for row in run_status(cfg)}
    assert [rows[f"eval/shard-0000{shard}-of-00003"] for shard in range(3)] == ["waiting", "done", "waiting"]
    assert rows["select/astro/shard-00001-of-00003"] == "done"


def test_after_the_model_has_changed_redo_selects_anew(cfg: RunConfig) -> None:
    for shard in range(2):
        run_stage(cfg, pipeline.select_shard(cfg, "astro", shard, 2))
    run_stage(cfg, pipeline.select(cfg, "astro"))
    before = results(cfg.run_dir / "select")
    (cfg.run_dir / "sft" / "astro" / "hf" / "config.json").write_text('{"better": true}')
    for stage in (pipeline.select_shard(cfg, "astro", 0, 2), pipeline.select(cfg, "astro")):
        with pytest.raises(ConfigError, match=r"was done with other inputs: model.*--redo"):
            run_stage(cfg, stage)
    run_stage(cfg, pipeline.select_shard(cfg, "astro", 0, 2), redo=True)
    with pytest.raises(ConfigError, match=r"select/astro/shard-00001-of-00002: was done with other inputs: model; do"):
        run_stage(cfg, pipeline.select(cfg, "astro"), redo=True)
    assert results(cfg.run_dir / "select") == before, "nothing was set aside"
    run_stage(cfg, pipeline.select_shard(cfg, "astro", 1, 2), redo=True)
    run_stage(cfg, pipeline.select(cfg, "astro"), redo=True)
    assert results(cfg.run_dir / "select" / "astro.old-1").keys() == results(cfg.run_dir / "select" / "astro").keys()


def shard_folders(cfg: RunConfig, parent: str) -> list[Path]:
    return sorted((cfg.run_dir / parent).iterdir())
