"""The clone stage's journal: kill -9, stopping, memory; shards and what becomes of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from scripted_writer import faithful, hostile
from test_cloning_lm import run_lm_stage
from test_cloning_stage import make_config, run_stage, walk_trees

from astro_hpc import cli, pipeline
from astro_hpc.cloning import stage
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.inference.scripted import ScriptedEngine
from astro_hpc.problems.problem import Problem
from astro_hpc.run.files import Journal, read_jsonl
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.run.stage import run_stage as carry_out
from astro_hpc.search.tree import Node, Tree

CHILD = """
import sys
from pathlib import Path
from scripted_writer import hostile
from astro_hpc.cloning import stage
from astro_hpc.config.schema import RunConfig
from astro_hpc.inference.scripted import ScriptedEngine
from astro_hpc.run.stage import StageContext

stage.make_engine = lambda *_: ScriptedEngine(hostile, 20_000)
stage._token_counter = lambda folder: None
cfg = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
stage.run(StageContext(cfg, Path(sys.argv[2]), "clone"), trees=[Path(sys.argv[3])], model_dir=Path("none"))
"""
OUTPUTS = ("astro.jsonl", "direct.jsonl", "filters.json")


def write_trees(path: Path, trees: list[Tree]) -> Path:
    with Journal(path) as journal:
        for tree in trees:
            journal.append(tree.to_json())
    return path


def test_kill_9_at_any_moment_does_nothing_twice_and_loses_nothing(tmp_path):
    trees = write_trees(tmp_path / "trees.jsonl", walk_trees(40))
    cfg = make_config(tmp_path, verbalizer="lm", phrases="paper", verbalizer_max_tokens=300, traces_in_flight=8)
    (tmp_path / "config.json").write_text(cfg.model_dump_json())
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", CHILD, tmp_path / "config.json"]
    subprocess.run([*command, tmp_path / "whole", trees], env=environment, check=True, capture_output=True)
    total = (tmp_path / "whole" / "records.jsonl").stat().st_size

    journal = tmp_path / "killed" / "records.jsonl"
    rng = random.Random(0)
    kills = 0
    kept = b""
    while True:
        child = subprocess.Popen([*command, tmp_path / "killed", trees], env=environment, stderr=subprocess.DEVNULL)
        size, grown = _size(journal), rng.randrange(1, total // 3)
        while child.poll() is None and _size(journal) < size + grown:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        if child.wait() == 0:
            break
        kills += 1
        now = journal.read_bytes()
        assert now.startswith(kept), "what is finished is never touched"
        kept = now[: now.rfind(b"\n") + 1]
    assert kills >= 3
    for name in OUTPUTS:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    records = list(Journal.read(journal))
    done = Counter((r["kind"], *r["tree"], r.get("name", "")) for r in records)
    assert max(done.values()) == 1, "no tree and no trace twice"
    kinds = Counter(record["kind"] for record in records)
    assert kinds == Counter(record["kind"] for record in Journal.read(tmp_path / "whole" / "records.jsonl"))


def test_asked_to_stop_it_keeps_what_is_finished_and_goes_on_later(tmp_path, monkeypatch):
    trees = walk_trees(30)
    whole = run_lm_stage(tmp_path, trees, ScriptedEngine(faithful, 20_000), "whole")
    cfg = make_config(tmp_path, verbalizer="lm", phrases="paper", verbalizer_max_tokens=300, traces_in_flight=4)
    (tmp_path / "stopped").mkdir()
    ctx = StageContext(cfg, tmp_path / "stopped", "clone")
    pieces = 0

    def script(context: str, rng: random.Random) -> str:
        nonlocal pieces
        pieces += 1
        if pieces == 150:
            ctx.request_stop()
        return faithful(context, rng)

    monkeypatch.setattr(stage, "make_engine", lambda *_: ScriptedEngine(script, 20_000))
    monkeypatch.setattr(stage, "_token_counter", lambda model_dir: None)
    with pytest.raises(CheckpointedExit, match="trees are finished"):
        stage.run(ctx, trees=trees, model_dir=tmp_path)
    assert not (ctx.dir / "astro.jsonl").exists()
    again = run_lm_stage(tmp_path, trees, ScriptedEngine(faithful, 20_000), "stopped")
    assert again == whole


def test_memory_does_not_grow_with_the_number_of_trees(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    trees = []
    for i in range(150):
        nodes = [Node(0, None, 0, origin="root", children=[1, 2])]
        nodes.append(Node(1, 0, 1, "\\boxed{1}", terminal=True, outcome="right", answer="1"))
        nodes.append(Node(2, 0, 1, "\\boxed{2}", terminal=True, outcome="wrong", answer="2"))
        trees.append(Tree(Problem(f"p/{i}", f"{i} " + "x" * 50_000, "1"), nodes))
    path = write_trees(tmp_path / "trees.jsonl", trees)
    tracemalloc.start()
    monkeypatch.setattr(stage, "_token_counter", lambda folder: None)
    astro, _, _ = stage.run(StageContext(make_config(tmp_path), tmp_path, "clone"), trees=[path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert astro.stat().st_size > 30_000_000
    assert peak < 6_000_000


def test_a_problem_searched_twice_gives_examples_once(tmp_path):
    trees = walk_trees(8)
    once = run_stage(tmp_path, trees, "once")
    astro, direct, filters = run_stage(tmp_path, [*trees, *trees[:3]], "twice")
    assert (astro, direct) == once[:2]
    assert filters["trees"]["same_problem"] == 3
    counts = filters["trees"]
    assert counts["read"] == 11 == counts["unsolved"] + counts["used"] + counts["same_problem"]


# --- shards through the pipeline --------------------------------------------------------------------------------


def make_run(folder: Path, model: Path) -> RunConfig:
    problems = folder / "problems.jsonl"
    if not problems.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"problem": f"Think of the digit after {i}.", "answer": str((i + 1) % 10)} for i in range(24)]
        problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig.model_validate(
        {
            "name": "run",
            "runs_dir": folder,
            "model": {"path": str(model), "prompt_style": "minimal-chat"},
            "problems": {"train": [{"type": "jsonl", "path": problems}]},
            "inference": {"engine": "scripted", "max_model_len": 6000},
            "search": {"num_iterations": 5, "num_expansions": 4, "num_rollouts": 3, "keep_rollouts": True},
            "clone": {"self_evaluation_samples": 0, "verbalizer": "lm", "verbalizer_max_tokens": 80},
        }
    )


@pytest.fixture(scope="module", autouse=True)
def hostile_writer():
    """In this module the verbalising model is one that tries everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "make_engine", lambda *_: ScriptedEngine(hostile, 20_000))
        patch.setattr(stage, "_token_counter", lambda folder: lambda prompt, text: len(prompt) + len(text) + 1)
        yield


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> RunConfig:
    """A run whose search is done, and cloned by one process."""
    cfg = make_run(tmp_path_factory.mktemp("clone-runs"), tiny_llama)
    carry_out(cfg, pipeline.search(cfg))
    carry_out(cfg, pipeline.clone(cfg))
    assert len(list(read_jsonl(cfg.run_dir / "traces" / "astro.jsonl"))) > 10
    return cfg


def sharded_copy(searched: RunConfig, folder: Path) -> RunConfig:
    """The same search, not cloned yet."""
    ignore = shutil.ignore_patterns("traces", ".locks")
    shutil.copytree(searched.runs_dir, folder, dirs_exist_ok=True, ignore=ignore)
    return searched.model_copy(update={"runs_dir": folder})


def test_shards_gathered_are_what_one_process_writes(searched, tmp_path):
    cfg = sharded_copy(searched, tmp_path)
    with pytest.raises(ConfigError, match="must be from 0 to 2"):
        pipeline.clone_shard(cfg, 3, 3)
    for shard in (2, 0):
        carry_out(cfg, pipeline.clone_shard(cfg, shard, 3))
    with pytest.raises(
        ConfigError, match=r"clone: 1 of 3 shards are missing or not finished: clone/shard-00001-of-00003;"
    ):
        carry_out(cfg, pipeline.clone(cfg))
    carry_out(cfg, pipeline.clone_shard(cfg, 1, 3))
    assert not carry_out(cfg, pipeline.clone_shard(cfg, 1, 3)), "done already"
    assert [command for command, _ in pipeline.pipeline(cfg)][1:5] == [
        *(f"clone --shard {shard} --num-shards 3" for shard in range(3)), "clone",
    ]  # fmt: skip
    carry_out(cfg, pipeline.clone(cfg))
    for name in OUTPUTS:
        one = searched.run_dir / "traces" / name
        assert (cfg.run_dir / "traces" / name).read_bytes() == one.read_bytes(), name
    counts = [json.loads(path.read_text())["counts"] for path in (cfg.run_dir / "clone").glob("*/manifest.json")]
    filters = json.loads((cfg.run_dir / "traces" / "filters.json").read_text())
    assert sum(count["trees"]["read"] for count in counts) == filters["trees"]["read"] == 24
    assert sum(count["astro"]["written"] for count in counts) == filters["astro"]["written"]

    changed = cfg.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match=r"clone: was done with other settings: seed=0 \(now 1\)"):
        carry_out(changed, pipeline.clone(changed))
    shutil.rmtree(cfg.run_dir / "traces")
    with pytest.raises(ConfigError, match=r"clone/shard-00000-of-00003: was done with other settings"):
        carry_out(changed, pipeline.clone(changed))
    (cfg.run_dir / "clone" / "shard-00000-of-00002").mkdir()
    with pytest.raises(ConfigError, match="different splits"):
        pipeline.clone(cfg)


def test_a_search_in_as_many_shards_is_cloned_shard_by_shard_into_the_same(searched, tmp_path):
    cfg = searched.model_copy(update={"runs_dir": tmp_path})
    for shard in range(3):
        carry_out(cfg, pipeline.search(cfg, shard, 3))
    for shard in range(3):
        one = pipeline.clone_shard(cfg, shard, 3)
        assert [name for name in one.inputs if name.startswith("shard")] == [f"shard-{shard:05d}-of-00003"]
        carry_out(cfg, one)
    carry_out(cfg, pipeline.clone(cfg))
    for name in OUTPUTS:
        one = searched.run_dir / "traces" / name
        assert (cfg.run_dir / "traces" / name).read_bytes() == one.read_bytes(), name


def test_the_command_line_names_what_is_missing(searched, tmp_path, capsys, monkeypatch):
    cfg = sharded_copy(searched, tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(cfg.model_dump(mode="json")))

    def command(*options: str, of: tuple[str, ...] = ("clone", str(config))) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["astro-hpc", *of, *options])
        try:
            cli.main()
        except SystemExit as exit_:
            return int(exit_.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    assert command("--gather") == (2, f"astro-hpc: {cfg.run_dir / 'clone'}: no shards to gather; "
                                      "run clone with --shard and --num-shards\n")  # fmt: skip
    code, error = command("--shard", "1")
    assert (code, "needs --num-shards" in error) == (2, True)
    assert command("--shard", "0", "--num-shards", "2")[0] == 0
    code, error = command("--gather")
    assert (code, "1 of 2 shards are missing or not finished: clone/shard-00001-of-00002" in error) == (2, True)
    assert command("--shard", "1", "--num-shards", "2")[0] == 0
    assert command("--gather")[0] == 0
    code, error = command()
    assert (code, "clone: done already" in error) == (0, True)

    for arguments, message in [(["nope"], "no example 'nope'"), (["--arm", "both"], "the arms are astro and direct")]:
        code, error = command(*arguments, of=("trace", str(cfg.run_dir)))
        assert (code, message in error) == (2, True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
