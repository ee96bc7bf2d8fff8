"""The search stage: shards, the journal, kill -9, stopping, failures, gathering."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.inference.engine import Sample, SampleRequest
from astro_hpc.inference.scripted import ScriptedEngine
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.files import Journal, Lock, read_jsonl
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.search.driver import search_problems
from astro_hpc.search.mcts import SearchTools
from astro_hpc.search.stage import gather, in_shard, read_trees, run, shard_of, training_problems
from astro_hpc.search.steps import StepCutter
from astro_hpc.search.tree import Node, Tree
from astro_hpc.verifier.pool import VerifierPool

CHILD = """
import sys
from pathlib import Path
from astro_hpc.config.schema import RunConfig
from astro_hpc.run.stage import StageContext
from astro_hpc.search.stage import run

cfg = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
folder = Path(sys.argv[2])
run(StageContext(cfg, folder, "search"), model_dir=Path("none"))
"""


def make_config(folder: Path, count: int = 20, **search: object) -> RunConfig:
    small = {"num_iterations": 6, "num_expansions": 4, "num_rollouts": 2, "keep_rollouts": True, "trees_in_flight": 8}
    return RunConfig.model_validate(
        {
            "name": "test",
            "runs_dir": folder,
            "seed": 5,
            "model": {"prompt_style": "minimal-chat"},
            "problems": {"train": [{"type": "signs", "count": count}]},
            "inference": {"engine": "scripted", "max_model_len": 1024},
            "search": small | search,
        }
    )


def make_context(cfg: RunConfig, shard: int = 0, num_shards: int = 1) -> StageContext:
    folder = cfg.run_dir / "search" / f"shard-{shard:05d}-of-{num_shards:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    return StageContext(cfg, folder, "search")


def search(cfg: RunConfig, shard: int = 0, num_shards: int = 1) -> StageContext:
    context = make_context(cfg, shard, num_shards)
    assert run(context, model_dir=Path("none"), shard=shard, num_shards=num_shards) == [
        context.dir / "trees.jsonl",
        context.dir / "problems.json",
    ]
    return context


def trees_of(context: StageContext) -> dict[str, Tree]:
    trees = list(read_trees(context.dir / "trees.jsonl"))
    assert len({tree.problem.id for tree in trees}) == len(trees)
    return {tree.problem.id: tree for tree in trees}


def test_every_problem_gets_its_tree_and_the_manifest_its_numbers(tmp_path):
    cfg = make_config(tmp_path)
    context = search(cfg)
    trees = trees_of(context)
    assert trees.keys() == {problem.id for problem in training_problems(cfg).problems}
    counts = context.counts
    assert counts["trees"] == 20
    assert counts["tokens"] == sum(tree.stats["generated_tokens"] for tree in trees.values()) > 0
    assert counts["rollouts"] == sum(tree.stats["rollouts"] for tree in trees.values()) > 0
    assert counts["valid_share"] == sum(tree.solved for tree in trees.values()) / 20
    terminals = [node for tree in trees.values() for node in tree.terminals()]
    assert counts["terminals_right"] + counts["terminals_wrong"] == len(terminals)
    assert counts["problems"]["problems"] == 20


def test_kill_9_at_any_moment_loses_no_finished_tree_and_doubles_none(tmp_path):
    uninterrupted = search(make_config(tmp_path / "whole", 100, num_iterations=24, num_rollouts=4))
    whole, total = trees_of(uninterrupted), _size(uninterrupted.dir / "trees.jsonl")
    cfg = make_config(tmp_path / "killed", 100, num_iterations=24, num_rollouts=4)
    context = make_context(cfg)
    journal = context.dir / "trees.jsonl"
    (tmp_path / "config.json").write_text(cfg.model_dump_json())
    rng = random.Random(0)
    finished: dict[str, Tree] = {}
    kills = 0
    while True:
        child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "config.json", context.dir])
        size, grown = _size(journal), rng.randrange(1, total // 3)
        while child.poll() is None and _size(journal) < size + grown:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        child.send_signal(signal.SIGKILL)
        if child.wait() == 0:
            break
        kills += 1
        now = trees_of(context)
        assert all(now[problem_id] == tree for problem_id, tree in finished.items())
        finished = now
    assert kills >= 3
    assert trees_of(context) == whole


def test_a_shard_in_use_is_refused(tmp_path):
    cfg = make_config(tmp_path)
    context = make_context(cfg)
    with Lock(context.dir / ".trees.lock"), pytest.raises(ConfigError, match="in use"):
        run(context, model_dir=Path("none"))


def test_asked_to_stop_it_keeps_what_is_finished_and_goes_on_later(tmp_path):
    cfg = make_config(tmp_path, 60, num_iterations=24, num_rollouts=4)
    context = make_context(cfg)

    def stop_soon() -> None:
        while _size(context.dir / "trees.jsonl") == 0:
            time.sleep(0.005)
        context.request_stop()

    thread = threading.Thread(target=stop_soon)
    thread.start()
    with pytest.raises(CheckpointedExit, match="of 60 trees"):
        run(context, model_dir=Path("none"))
    thread.join()
    before = trees_of(context)
    assert 0 < len(before) < 60
    after = trees_of(search(cfg))
    assert len(after) == 60
    assert all(after[problem_id] == tree for problem_id, tree in before.items())


def test_a_failing_tree_does_not_take_others_with_it():
    class Failing(ScriptedEngine):
        async def generate(self, request: SampleRequest) -> Sample:
            if "BROKEN" in self.tokenizer.decode(request.prompt_token_ids) and request.max_tokens > 300:
                raise OSError("lost")
            return await super().generate(request)

    cfg = make_config(Path("unused"), max_rollout_tokens=400).search
    problems = [Problem(f"p/{i}", "BROKEN" if i == 3 else f"problem {i}", "1") for i in range(12)]
    found: list[Tree] = []
    with VerifierPool(make_config(Path("unused")).verifier) as verifier:
        tools = _tools(Failing(max_model_len=1024), verifier, cfg)
        failures = asyncio.run(search_problems(problems, tools, 4, found.append))
        assert {tree.problem.id for tree in found} == {p.id for p in problems} - {"p/3"}
        assert [(name, type(error), str(error)) for name, error in failures.items()] == [("p/3", OSError, "lost")]
        all_broken = [Problem(f"q/{i}", "BROKEN", "1") for i in range(100)]
        with pytest.raises(OSError, match="lost"):
            asyncio.run(search_problems(all_broken, tools, 4, found.append))


def test_an_error_while_writing_ends_the_search():
    def full(tree: Tree) -> None:
        raise OSError("disk full")

    cfg = make_config(Path("unused"))
    problems = [Problem(f"p/{i}", f"problem {i}", "1") for i in range(12)]
    with VerifierPool(cfg.verifier) as verifier, pytest.raises(OSError, match="disk full"):
        asyncio.run(search_problems(problems, _tools(ScriptedEngine(), verifier, cfg.search), 4, full))


def test_shards_split_all_problems_and_adding_problems_moves_none(tmp_path):
    problems = training_problems(make_config(tmp_path, 300)).problems
    shards = [in_shard(problems, shard, 4) for shard in range(4)]
    assert sorted(p.id for shard in shards for p in shard) == sorted(p.id for p in problems)
    assert min(map(len, shards)) > 40
    fewer = in_shard(problems[:100], 2, 4)
    assert fewer == [p for p in shards[2] if p in problems[:100]]
    empty = 1 - shard_of(problems[0].id, 2)
    with pytest.raises(ConfigError, match="no problems"):
        run(make_context(make_config(tmp_path, 1)), model_dir=Path("none"), shard=empty, num_shards=2)


def test_gather_merges_shards_and_names_holes_duplicates_and_strangers(tmp_path):
    cfg = make_config(tmp_path, 30)
    wanted = training_problems(cfg).problems
    whole = trees_of(search(make_config(tmp_path / "whole", 30)))
    for shard in range(3):
        search(cfg, shard, 3)
    report = gather(cfg.run_dir, wanted)
    merged = {row["problem"]["id"]: Tree.from_json(row) for row in read_jsonl(report.path)}
    assert merged == whole
    assert (report.shards, report.holes, report.duplicates, report.strangers) == (3, [], [], [])
    assert report.statistics["trees"] == 30

    path = cfg.run_dir / "search" / "shard-00001-of-00003" / "trees.jsonl"
    rows = list(Journal.read(path))
    other = Tree(Problem("signs/other", "?", "1"), [Node(0, None, 0)]).to_json()
    path.unlink()
    with Journal(path) as journal:
        for row in [rows[0], rows[0], other, *rows[2:]]:
            journal.append(row)
    report = gather(cfg.run_dir, wanted)
    assert report.holes == [rows[1]["problem"]["id"]]
    assert report.duplicates == [rows[0]["problem"]["id"]]
    assert report.strangers == ["signs/other"]
    assert sum(1 for _ in read_jsonl(report.path)) == 29

    (cfg.run_dir / "search" / "shard-00000-of-00002").mkdir()
    with pytest.raises(ConfigError, match="different splits"):
        gather(cfg.run_dir, wanted)


def test_gathering_holds_one_tree_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder = tmp_path / "search" / "shard-00000-of-00001"
    problems = [Problem(f"p/{i}", "x" * 100_000, "1") for i in range(300)]
    with Journal(folder / "trees.jsonl") as journal:
        for problem in problems:
            journal.append(Tree(problem, [Node(0, None, 0, origin="root")]).to_json())
    wanted = [Problem(problem.id, "", "") for problem in problems]
    tracemalloc.start()
    report = gather(tmp_path, wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.statistics["trees"] == 300
    assert report.path.stat().st_size > 30_000_000
    assert peak < 4_000_000


def _tools(engine: ScriptedEngine, verifier: VerifierPool, cfg) -> SearchTools:
    style = PromptStyle.load("minimal-chat")
    return SearchTools(engine, verifier, style, StepCutter(engine.tokenizer, style.step_delimiter), cfg, seed=0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
