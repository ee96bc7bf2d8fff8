"""The search stage: shards, the journal, kill -9, stopping, failures, gathering."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from astro_hpc.cli import app
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ProblemsConfig, RunConfig
from astro_hpc.inference.engine import Sample, SampleRequest
from astro_hpc.inference.scripted import ScriptedEngine
from astro_hpc.pipeline import run_one, search_shards
from astro_hpc.pipeline import search as pipeline_search
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.files import Journal, Lock, read_jsonl
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.search.driver import search_problems
from astro_hpc.search.mcts import SearchTools
from astro_hpc.search.shards import gather, in_shard, read_trees, shard_of
from astro_hpc.search.stage import run, training_problems
from astro_hpc.search.steps import StepCutter
from astro_hpc.search.tree import Node, Tree
from astro_hpc.verifier.pool import Verdict, VerifierPool

# Imports once and then forks a search for each line, so that killing one costs milliseconds.
ZYGOTE = """
import os, sys
from pathlib import Path
import astro_hpc.inference.scripted
from astro_hpc.config.schema import RunConfig
from astro_hpc.run.stage import StageContext
from astro_hpc.search.stage import run

for line in sys.stdin:
    config, folder = line.split()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            cfg = RunConfig.model_validate_json(Path(config).read_text())
            run(StageContext(cfg, Path(folder), "search"), model_dir=Path("none"))
            code = 0
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""

# Peak memory of a search and a gathering of as many trees as are asked for; problems are made one at a time.
MEMORY = """
import asyncio, json, os, sys
from pathlib import Path
from astro_hpc.config.schema import SearchConfig, VerifierConfig
from astro_hpc.inference.scripted import ScriptedEngine
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.files import Journal
from astro_hpc.search.driver import search_problems
from astro_hpc.search.mcts import SearchTools
from astro_hpc.search.shards import gather
from astro_hpc.search.steps import StepCutter
from astro_hpc.verifier.pool import VerifierPool

def peak() -> int:
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's pages before the exec
    return int(status.split("VmHWM:")[1].split()[0]) << 10

count, run_dir = int(sys.argv[1]), Path(sys.argv[2])
os.fsync = lambda descriptor: None
engine = ScriptedEngine(lambda context, rng: "go on\\n\\\\boxed{1}", max_model_len=4096)
style, folder = PromptStyle.load("minimal-chat"), run_dir / "search" / "shard-00000-of-00001"
cfg = SearchConfig(num_iterations=2, num_expansions=1, num_rollouts=1)
problems = (Problem(f"p/{i}", "?", "1", metadata={"long": "x" * 2500}) for i in range(count))
with VerifierPool(VerifierConfig()) as pool, Journal(folder / "trees.jsonl") as journal:
    tools = SearchTools(engine, pool, style, StepCutter(engine.tokenizer, style.step_delimiter), cfg, seed=0)
    asyncio.run(search_problems(problems, tools, 8, lambda tree: journal.append(tree.to_json())))
searched = peak()
report = gather(run_dir, (Problem(f"p/{i}", "", "") for i in range(count)))
print(json.dumps([report.statistics["trees"], report.path.stat().st_size, searched, peak()]))
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
    assert counts["max_depth"] == max(node.depth for tree in trees.values() for node in tree.nodes)
    assert counts["search_seconds_per_tree"] == pytest.approx(counts["search_seconds"] / 20, abs=1e-3)
    assert counts["cpu_seconds"] > 0
    assert counts["gpu_seconds"] == 0
    assert 0 < counts["mean_branching"] <= 4 + 2 * 4
    assert search(cfg).counts == counts  # from the journals alone, where nothing is left to do


def test_kill_9_at_20_random_moments_loses_no_finished_tree_and_doubles_none(tmp_path):
    uninterrupted = search(make_config(tmp_path / "whole", 200))
    whole, total = trees_of(uninterrupted), _size(uninterrupted.dir / "trees.jsonl")
    cfg = make_config(tmp_path / "killed", 200)
    context = make_context(cfg)
    journal = context.dir / "trees.jsonl"
    (tmp_path / "config.json").write_text(cfg.model_dump_json())
    rng = random.Random(0)
    finished: dict[str, Tree] = {}
    kills = torn = 0
    with subprocess.Popen(
        [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as zygote:
        while True:
            print(tmp_path / "config.json", context.dir, file=zygote.stdin, flush=True)
            child = int(zygote.stdout.readline())
            if kills < 20:
                enough = _size(journal) + rng.randrange(total // 40) + (kills == 0)
                while _size(journal) < enough:
                    time.sleep(0.001)
                time.sleep(rng.random() * 0.02)
                if kills == 0:
                    with pytest.raises(ConfigError, match=f"in use by process {child} "):
                        run(context, model_dir=Path("none"))
                os.kill(child, signal.SIGKILL)
            if (status := int(zygote.stdout.readline())) == 0:
                break
            assert status == signal.SIGKILL
            kills += 1
            now = trees_of(context)
            assert all(now[problem_id] == tree for problem_id, tree in finished.items())
            finished = now
            if rng.random() < 0.5:  # as a machine that loses its power would leave it
                torn += 1
                with open(journal, "ab") as handle:
                    handle.write(b'01234567 {"problem": {"id": "signs/')
    assert (kills, torn > 3) == (20, True)
    assert trees_of(context) == whole
    assert len(list(Journal.read(journal))) == 200


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


@pytest.mark.parametrize("slow", ["sample", "verdict"])
def test_a_slow_sample_or_verdict_holds_back_its_own_tree_alone(slow):
    """The first tree's are held until every other tree is finished: with a barrier anywhere this would never end."""
    others_done = asyncio.Event()

    class Engine(ScriptedEngine):
        async def generate(self, request: SampleRequest) -> Sample:
            if slow == "sample" and "problem 0" in self.tokenizer.decode(request.prompt_token_ids):
                await others_done.wait()
            return await super().generate(request)

    class Verifier:
        async def averify(self, problem: Problem, text: str) -> Verdict:
            if slow == "verdict" and problem.id == "p/0":
                await others_done.wait()
            return pool.verify(problem, text)

    def keep(tree: Tree) -> None:
        order.append(tree.problem.id)
        if len(order) == 11:
            loop.call_soon_threadsafe(others_done.set)

    async def search_all() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        tools = _tools(Engine(max_model_len=1024), Verifier(), cfg.search)
        await asyncio.wait_for(search_problems(problems, tools, 3, keep), 60)

    cfg, order, loop = make_config(Path("unused")), [], None
    problems = [Problem(f"p/{i}", f"problem {i};", "1") for i in range(12)]
    with VerifierPool(cfg.verifier) as pool:
        asyncio.run(search_all())
    assert order[-1] == "p/0"


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
    cfg = make_config(tmp_path, 1)
    only = shard_of(problems[0].id, 2)
    for shard in range(2):
        assert search(cfg, shard, 2).counts["trees"] == (shard == only)
    assert gather(cfg.run_dir, training_problems(cfg).problems).complete
    nothing = cfg.model_copy(update={"problems": ProblemsConfig(train=[])})
    with pytest.raises(ConfigError, match="no problem to search"):
        run(make_context(nothing), model_dir=Path("none"))


def test_after_adding_problems_redo_keeps_the_trees_of_those_that_stayed(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setattr("astro_hpc.pipeline.base_model", lambda cfg: tmp_path / "model")
    few, more = make_config(tmp_path, 20), make_config(tmp_path, 30)
    for shard in range(2):
        run_one(few, pipeline_search(few, shard, 2))
    with pytest.raises(ConfigError, match="split into 2 already; go on with --num-shards 2"):
        pipeline_search(few, 0, 3)
    folder = few.run_dir / "search" / "shard-00000-of-00002"
    before = {tree.problem.id: tree for tree in read_trees(folder / "trees.jsonl")}
    with pytest.raises(ConfigError, match="--redo"):
        run_one(more, pipeline_search(more, 0, 2))
    run_one(more, pipeline_search(more, 0, 2), redo=True)
    after = {tree.problem.id: tree for tree in read_trees(folder / "trees.jsonl")}
    assert after.keys() == {p.id for p in in_shard(training_problems(more).problems, 0, 2)} > before.keys()
    assert {problem_id: after[problem_id] for problem_id in before} == before
    assert sum(attempt["trees"] for attempt in Journal.read(folder / "attempts.jsonl")) == len(after) - len(before)

    deeper = make_config(tmp_path, 30, num_iterations=7)  # other trees: all are built anew
    run_one(deeper, pipeline_search(deeper, 0, 2), redo=True)
    assert sum(attempt["trees"] for attempt in Journal.read(folder / "attempts.jsonl")) == len(after)


def test_gather_merges_shards_and_names_holes_duplicates_and_strangers(tmp_path):
    cfg = make_config(tmp_path, 30)
    wanted = training_problems(cfg).problems
    whole = trees_of(search(make_config(tmp_path / "whole", 30)))
    for shard in range(3):
        search(cfg, shard, 3)
    report = gather(cfg.run_dir, wanted)
    merged = {row["problem"]["id"]: Tree.from_json(row) for row in read_jsonl(report.path)}
    assert merged == whole
    assert (report.num_shards, report.holes, report.duplicates, report.strangers) == (3, [], [], [])
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


def test_gathering_says_what_is_missing_and_what_it_took(tmp_path):
    cfg = make_config(tmp_path, 30)
    wanted = training_problems(cfg).problems
    with pytest.raises(ConfigError, match="no shards"):
        gather(cfg.run_dir, wanted)
    spent = [search(cfg, shard, 3).counts for shard in (0, 2)]
    report = gather(cfg.run_dir, wanted)
    assert (report.missing_shards, report.unfinished_shards, report.complete) == ([1], [0, 2], False)
    assert report.holes == [p.id for p in wanted if shard_of(p.id, 3) == 1]
    assert report.cost["search_seconds"] == pytest.approx(sum(counts["search_seconds"] for counts in spent), abs=0.01)
    assert json.loads((cfg.run_dir / "search" / "gather.json").read_text()) == report.to_json()
    text = "\n".join(report.lines())
    assert "1 shards not begun: 1" in text
    assert f"{len(report.holes)} problems without a tree: {report.holes[0]}" in text


def test_gather_and_a_missing_shard_on_the_command_line(tmp_path):
    cfg = make_config(tmp_path, 12)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    search(cfg, 0, 2)
    with pytest.raises(ConfigError, match="1 of 2 shards are there; run the others, for instance --shard 1"):
        search_shards(cfg)
    result = CliRunner().invoke(app, ["search", str(config), "--gather"])
    assert result.exit_code == 1
    assert "1 shards not begun: 1" in result.stdout
    search(cfg, 1, 2)
    result = CliRunner().invoke(app, ["search", str(config), "--gather", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["statistics"]["trees"] == 12
    assert [folder.name for folder in search_shards(cfg)] == ["shard-00000-of-00002", "shard-00001-of-00002"]


def test_progress_shows_rates_solved_trees_and_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("astro_hpc.run.progress._LOG_EVERY_SECONDS", 0.0)
    search(make_config(tmp_path, 20))
    lines = [line for line in capsys.readouterr().err.splitlines() if re.search(r": \d+/20 trees", line)]
    assert any(re.search(r"trees/(s|min), .*solved \d+ \(\d+%\).*left\)", line) for line in lines)
    assert any(re.search(r"tokens [\d,]+/s", line) for line in lines)


def test_the_memory_of_a_search_and_of_gathering_does_not_grow_with_the_trees(tmp_path):
    """Only the ids of the wanted problems may: 200 bytes each."""

    def measure(count: int) -> tuple[int, int, int]:
        command = [sys.executable, "-c", MEMORY, str(count), str(tmp_path / str(count))]
        trees, size, *peaks = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        assert trees == count
        return size, *peaks

    few_bytes, few_searched, few_gathered = measure(1000)
    many_bytes, many_searched, many_gathered = measure(10_000)
    assert many_bytes - few_bytes > 25e6
    assert many_searched - few_searched < 2e6
    assert many_gathered - few_gathered < 2e6 + 9000 * 200


def _tools(engine: ScriptedEngine, verifier: VerifierPool, cfg) -> SearchTools:
    style = PromptStyle.load("minimal-chat")
    return SearchTools(engine, verifier, style, StepCutter(engine.tokenizer, style.step_delimiter), cfg, seed=0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
