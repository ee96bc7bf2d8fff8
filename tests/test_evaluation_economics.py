"""Search against best-of-N at equal tokens and greedy: the sampling to the token, resuming, the account."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from astro_hpc.cli import app
from astro_hpc.config.schema import RunConfig
from astro_hpc.evaluation.economics import cut_to, majority, of_tree, run, sentences, summarize, table
from astro_hpc.inference.engine import SampleRequest
from astro_hpc.inference.scripted import ScriptedEngine
from astro_hpc.problems.problem import Problem
from astro_hpc.run.files import Journal, read_jsonl
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.search.shards import read_trees
from astro_hpc.search.stage import run as run_search
from astro_hpc.search.tree import Node, Tree


def make_config(folder: Path, **economics: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test",
            "runs_dir": folder,
            "seed": 3,
            "model": {"prompt_style": "minimal-chat", "path": str(folder)},
            "problems": {"train": [{"type": "signs", "count": 20}]},
            "inference": {"engine": "scripted", "max_model_len": 1024},
            "search": {"num_iterations": 4, "num_expansions": 3, "num_rollouts": 2, "keep_rollouts": True},
            "economics": economics,
        }
    )


def searched(cfg: RunConfig) -> Path:
    folder = cfg.run_dir / "search" / "shard-00000-of-00001"
    folder.mkdir(parents=True)
    return run_search(StageContext(cfg, folder, "search"), model_dir=Path("none"))[0]


def context(cfg: RunConfig, name: str = "economics") -> StageContext:
    folder = cfg.run_dir / "search" / name
    folder.mkdir(parents=True, exist_ok=True)
    return StageContext(cfg, folder, "economics")


def test_each_problem_gets_its_trees_tokens_and_not_one_more(tmp_path):
    cfg = make_config(tmp_path)
    trees = {tree.problem.id: tree for tree in read_trees(searched(cfg))}
    ctx = context(cfg)
    economics, problems = run(ctx, journals=[searched_path(cfg)], model_dir=Path("none"))
    rows = list(read_jsonl(problems))
    assert [row["problem_id"] for row in rows] == list(trees)
    for row in rows:
        tree = trees[row["problem_id"]]
        assert row["search"] == of_tree(tree)
        assert row["best-of-n"]["tokens"] == tree.stats["generated_tokens"]
        assert row["best-of-n"]["samples"] > row["greedy"]["samples"] == 1
        assert row["best-of-n"]["solved"] == (row["best-of-n"]["right_solutions"] > 0)
        assert row["drawn_tokens"] >= row["best-of-n"]["tokens"] + row["greedy"]["tokens"]
    summary = json.loads(economics.read_text())
    search, best_of_n, greedy = summary["methods"]
    assert search["tokens_per_problem"] == best_of_n["tokens_per_problem"] > greedy["tokens_per_problem"]
    assert search["solved"]["value"] == sum(tree.solved for tree in trees.values()) / 20
    assert ctx.counts["problems"] == 20


def test_stopped_and_gone_on_it_is_the_same_account(tmp_path, monkeypatch):
    cfg = make_config(tmp_path)
    searched(cfg)
    whole = run(context(cfg, "whole"), journals=[searched_path(cfg)], model_dir=Path("none"))
    ctx = context(cfg)
    append = Journal.append

    def append_and_stop(journal: Journal, row: object) -> None:
        append(journal, row)
        ctx.request_stop()

    monkeypatch.setattr(Journal, "append", append_and_stop)
    monkeypatch.setattr("astro_hpc.search.driver._STOP_POLL_SECONDS", 0.0)
    with pytest.raises(CheckpointedExit):
        run(ctx, journals=[searched_path(cfg)], model_dir=Path("none"))
    monkeypatch.undo()
    assert 0 < len(list(Journal.read(ctx.dir / "rows.jsonl"))) < 20
    resumed = run(context(cfg), journals=[searched_path(cfg)], model_dir=Path("none"))
    assert [path.read_text() for path in resumed] == [path.read_text() for path in whole]


def test_the_command_compares_on_as_many_problems_as_asked(tmp_path, monkeypatch):
    cfg = make_config(tmp_path, num_problems=7)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    monkeypatch.setattr("astro_hpc.pipeline.base_model", lambda cfg: config)
    runner = CliRunner()
    assert runner.invoke(app, ["search", str(config)]).exit_code == 0
    result = runner.invoke(app, ["search", str(config), "--economics"])
    assert result.exit_code == 0
    assert "search economics on 7 problems" in result.stdout
    assert result.stdout.count(" ± ") == 3 * 5 + 1
    summary = json.loads(runner.invoke(app, ["search", str(config), "--economics", "--json"]).stdout)
    assert summary["problems"] == 7


def test_a_cut_sample_is_what_a_lower_limit_gives():
    engine = ScriptedEngine(max_model_len=1024)
    prompt = tuple(engine.tokenizer.encode("?"))
    full, short = engine.generate_many([SampleRequest(prompt, limit, seed=5) for limit in (500, 9)])
    cut = cut_to(full, 9)
    assert (cut.token_ids, cut.logprobs, cut.finish_reason) == (short.token_ids, short.logprobs, "length")
    assert not cut.stopped_by_eos
    assert cut_to(full, len(full.token_ids)) is full


def test_what_a_tree_came_to():
    """Two right terminals, one text of theirs the same as another's; a right rollout alone is seen, not held."""
    problem = Problem("p", "?", "1")
    nodes = [Node(0, None, 0, origin="root", children=[1, 2, 3])]
    for node_id, (answer, outcome) in enumerate([("1", "right"), ("2", "wrong"), ("1", "right")], 1):
        reward = float(outcome == "right")
        nodes.append(
            Node(node_id, 0, 1, step=f"is {answer}", terminal=True, outcome=outcome, answer=answer, reward=reward)
        )
    held = of_tree(Tree(problem, nodes, {"generated_tokens": 9}))
    assert held == {"solved": True, "seen": True, "majority": True, "right_solutions": 1, "tokens": 9}
    unheld = Tree(problem, [Node(0, None, 0, children=[1]), Node(1, 0, 1, reward=0.5)], {"generated_tokens": 4})
    assert of_tree(unheld) == {"solved": False, "seen": True, "majority": False, "right_solutions": 0, "tokens": 4}


def test_majority():
    assert majority([("1", True), ("2", False), ("1", True)])
    assert not majority([("2", False), ("1", True)])  # a tie goes to the earliest
    assert majority([(None, False), (None, False), ("1", True)])
    assert not majority([])


def _row(search: tuple[int, int], best: tuple[int, int], greedy: tuple[int, int]) -> dict[str, object]:
    row: dict[str, object] = {"problem_id": "p", "drawn_tokens": 0}
    for method, (right, tokens) in zip(("search", "best-of-n", "greedy"), (search, best, greedy), strict=True):
        row[method] = {"solved": right > 0, "seen": right > 0, "majority": right > 1, "right_solutions": right}
        row[method] |= {"tokens": tokens, "samples": 4}
    return row


def test_the_account_worked_out_by_hand():
    summary = summarize([_row((2, 100), (1, 100), (0, 10)), _row((0, 300), (1, 300), (1, 10))])
    search, best, greedy = summary["methods"]
    assert [m["solved"]["value"] for m in (search, best, greedy)] == [0.5, 1.0, 0.5]
    assert [m["majority"]["value"] for m in (search, best, greedy)] == [0.5, 0.0, 0.0]
    assert search["right_solutions_per_million_tokens"]["value"] == pytest.approx(2e6 / 400)
    assert greedy["solved_per_million_tokens"]["value"] == pytest.approx(1e6 / 20)
    # residuals 2 - 100/200 and 0 - 300/200: a standard deviation of 1.5 * sqrt(2)
    half = 1.959964 * 1.5 * math.sqrt(2) * math.sqrt(2) / 400
    assert search["right_solutions_per_million_tokens"]["high"] == pytest.approx(1e6 * (2 / 400 + half))
    first = summary["differences"][0]
    assert (first["of"], first["minus"], first["value"]) == ("solved", "best-of-n", -0.5)
    assert "solved, search minus best-of-N at the same tokens: -50.0 percentage points" in sentences(summary)[0]
    assert table(summary).splitlines()[1].startswith("method")


@given(st.lists(st.tuples(*[st.tuples(st.integers(0, 5), st.integers(0, 500))] * 3), min_size=1, max_size=20))
def test_figures_lie_in_their_intervals(rows):
    for method in summarize([_row(*row) for row in rows])["methods"]:
        for name, figure in method.items():
            if isinstance(figure, dict):
                assert 0 <= figure["low"] <= figure["value"] + 1e-9 <= figure["high"] + 2e-9, name


def searched_path(cfg: RunConfig) -> Path:
    return cfg.run_dir / "search" / "shard-00000-of-00001" / "trees.jsonl"
