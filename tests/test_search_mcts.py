"""Whole trees on the scripted engine and the real verifier."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator

import pytest

from astro_hpc.config.schema import SearchConfig, VerifierConfig
from astro_hpc.inference.engine import Sample, SampleRequest
from astro_hpc.inference.scripted import CharTokenizer, ScriptedEngine, numbered_steps
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.search.driver import search_problems
from astro_hpc.search.mcts import SearchTools
from astro_hpc.search.puct import is_expanded
from astro_hpc.search.steps import StepCutter
from astro_hpc.search.tree import Tree
from astro_hpc.verifier.pool import VerifierPool

CFG = SearchConfig(
    num_iterations=12, num_expansions=4, num_rollouts=3, max_depth=8, max_step_tokens=64, max_rollout_tokens=400
)
PROBLEMS = [Problem(f"test/{i}", f"problem {i}", str(i % 10)) for i in range(12)]


@pytest.fixture(scope="module")
def verifier() -> Iterator[VerifierPool]:
    with VerifierPool(VerifierConfig()) as pool:
        yield pool


@pytest.fixture
def build(verifier) -> Callable[..., list[Tree]]:
    """Searches problems with some settings changed; trees in the problems' order."""

    def build(
        script=numbered_steps, problems=PROBLEMS, in_flight=4, engine=None, style="minimal-chat", **settings
    ) -> list[Tree]:
        engine = engine or ScriptedEngine(script, max_model_len=2048)
        style = PromptStyle.load(style)
        cutter = StepCutter(engine.tokenizer, style.step_delimiter)
        tools = SearchTools(engine, verifier, style, cutter, CFG.model_copy(update=settings), seed=1)
        trees: dict[str, Tree] = {}
        failures = asyncio.run(
            search_problems(problems, tools, in_flight, lambda tree: trees.update({tree.problem.id: tree}))
        )
        assert failures == {}
        return [trees[problem.id] for problem in problems]

    return build


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("prior", ["policy", "uniform"])
def test_what_holds_in_every_tree(build, keep, merge, prior):
    trees = build(keep_rollouts=keep, merge_identical_steps=merge, prior=prior)
    for tree in trees:
        assert tree.root.visits == CFG.num_iterations
        assert sum(node.origin == "rollout" for node in tree.nodes) == 0 or keep
        for node in tree.nodes:
            children = tree.children(node)
            assert [child.parent for child in children] == [node.id] * len(children)
            assert all(child.id > node.id and child.depth == node.depth + 1 for child in children)
            assert node.depth <= CFG.max_depth
            assert 0 <= node.q <= 1
            assert 0 <= node.reward <= 1
            assert CharTokenizer().decode(node.token_ids) == node.step
            assert node.logprob == pytest.approx(sum(-(1 + token % 7) / 8 for token in node.token_ids))
            if node.parent is not None:
                assert node.visits == node.edge_visits
            if is_expanded(tree, node):
                assert node.visits == 1 + sum(child.edge_visits for child in children)
            else:
                assert all(child.visits == 0 for child in children)
            if children:
                assert not node.terminal
                assert sum(child.prior for child in children) == pytest.approx(1)
            if merge:
                assert len({child.step for child in children}) == len(children)
            assert node.terminal == (node.outcome is not None)
            if node.terminal:
                assert node.reward == node.q == (node.outcome == "right")
                answer = node.step.removeprefix("\\boxed{").removesuffix("}")
                assert node.outcome == ("right" if answer == tree.problem.answer else "wrong")
                assert node.answer == answer
    assert any(tree.solved for tree in trees)


def test_a_whole_search_worked_out_by_hand(build):
    """k = 2, M = 2, c = 1, depth 3; a step's mass is given, so that P(a) = .75, P(b) = .25, and .5 below.

    Iteration 1 expands the root: R(a) = 1/2, R(b) = 0. 2: a (1.25 beats .25) is expanded: t is right, R(c) = 1.
    3: a (1.03, .35), then t (1.5 each, the first). 4: a (1.18, .43), then c (1.71 beats 1.35), which is expanded: w is
    wrong, R(d) = 1/2. 5: a (1.21, .5), then t (1.43 each). 6: a (1.21, .56), c (1.5 beats 1.33), d (1 beats .5), which
    is as deep as it may be and only backs up.
    """
    told = {  # solution so far: ((next step, its mass) ...), rollouts
        "": ((("a\n", 0.6), ("b\n", 0.2)), ()),
        "a\n": ((("\\boxed{7}", 0.3), ("c\n", 0.3)), ("\\boxed{7}", "\\boxed{1}")),
        "b\n": ((), ("\\boxed{1}", "e\n\\boxed{2}")),
        "a\nc\n": ((("\\boxed{1}", 0.1), ("d\n", 0.1)), ("\\boxed{7}", "f\n\\boxed{7}")),
        "a\nc\nd\n": ((), ("\\boxed{7}", "no idea")),
    }

    class Told(ScriptedEngine):
        async def generate(self, request: SampleRequest) -> Sample:
            solution = self.tokenizer.decode(request.prompt_token_ids).rpartition("assistant\n")[2]
            steps, rollouts = (iter(replies) for replies in replies_of[solution])
            text, mass = next(steps) if "\n" in request.stop else (next(rollouts), 1.0)
            replies_of[solution] = (list(steps), list(rollouts))
            tokens = tuple(self.tokenizer.encode(text))
            return Sample(tokens, (math.log(mass),) * len(tokens), text, "stop")

    replies_of = {solution: (list(steps), list(rollouts)) for solution, (steps, rollouts) in told.items()}
    settings = {"num_expansions": 2, "num_rollouts": 2, "num_iterations": 6, "max_depth": 3, "c_puct": 1.0}
    tree = build(problems=[Problem("p", "?", "7")], engine=Told(max_model_len=2048), **settings)[0]
    figures = {node.step: (node.visits, node.edge_visits, node.q, node.reward, node.prior) for node in tree.nodes}
    assert tree.root.visits == 6
    expected = {
        1: ("a\n", 5, (1 * 2 + 0.75 * 2 + 0.5) / 5, 0.5, 0.75),
        2: ("b\n", 0, 0.0, 0.0, 0.25),
        3: ("\\boxed{7}", 2, 1.0, 1.0, 0.5),
        4: ("c\n", 2, (0.5 * 1 + 1.0) / 2, 1.0, 0.5),
        5: ("\\boxed{1}", 0, 0.0, 0.0, 0.5),
        6: ("d\n", 1, 0.5, 0.5, 0.5),
    }
    assert len(figures) == len(tree.nodes) == 1 + len(expected)
    for node_id, (step, visits, q, reward, prior) in expected.items():
        assert tree.nodes[node_id].step == step
        assert figures[step] == (visits, visits, pytest.approx(q), reward, pytest.approx(prior))
    assert not any(steps or rollouts for steps, rollouts in replies_of.values())  # all were asked for, once


@pytest.mark.parametrize("name", [*PromptStyle.names(), "own"])
def test_a_prompt_style_is_a_file_and_needs_no_code(build, tmp_path, name):
    path = tmp_path / "own.yaml"
    path.write_text('prompt: "Q: {problem} A:"\nstep_delimiter: " ; "\nstop: ["Q:"]\n')
    style = PromptStyle.load(name if name != "own" else str(path))
    step = "## Step 1: add\nthe two" + style.step_delimiter if style.step_delimiter == "\n\n" else "go on"
    text = step.removesuffix(style.step_delimiter) + style.step_delimiter
    script = lambda context, rng: (text if rng.random() < 0.7 else "") + "\\boxed{5}"  # noqa: E731
    tree = build(script, [Problem("p", "2 + 3", "5")], style=str(path) if name == "own" else name)[0]
    assert {node.step for node in tree.nodes[1:]} == {text, "\\boxed{5}"}
    assert tree.solved


def test_priors_follow_the_samples_of_a_step(build):
    tree = build(problems=PROBLEMS[:1], merge_identical_steps=True, num_iterations=1, num_expansions=16)[0]
    twin = build(problems=PROBLEMS[:1], merge_identical_steps=False, num_iterations=1, num_expansions=16)[0]
    steps = [node.step for node in twin.nodes[1:]]
    assert len(steps) == 16
    assert {node.step for node in tree.nodes[1:]} == set(steps)
    assert tree.stats["merged_steps"] == 16 - len(set(steps))
    mass = {node.step: steps.count(node.step) * math.exp(node.logprob / len(node.token_ids)) for node in tree.nodes[1:]}
    for node in tree.nodes[1:]:
        assert node.prior == pytest.approx(mass[node.step] / sum(mass.values()))
    uniform = build(problems=PROBLEMS[:1], num_iterations=1, num_expansions=16, prior="uniform")[0]
    for node in uniform.nodes[1:]:
        assert node.prior == pytest.approx(steps.count(node.step) / 16)


def test_a_nodes_reward_is_the_mean_verdict_of_its_rollouts(build):
    """The script's answers depend on the first step alone, so each R is known."""

    def script(context: str, rng: random.Random) -> str:
        written = context.rpartition("assistant\n")[2]
        first = written[:1] or rng.choice("ab")
        rest = "\n" if not written else ""
        right = {"a": True, "b": rng.random() < 0.5}[first]
        return ("" if written else first) + rest + ("\\boxed{3}" if right else "\\boxed{4}")

    tree = build(script, [Problem("test/x", "x", "3")], num_iterations=1, num_expansions=8, num_rollouts=400)[0]
    rewards = {node.step: node.reward for node in tree.nodes[1:]}
    assert rewards["a\n"] == 1.0
    assert rewards["b\n"] == pytest.approx(0.5, abs=0.1)
    assert tree.stats["rollouts"] == 800


def test_the_number_of_trees_in_flight_and_the_order_of_samples_change_nothing(build):
    alone = build(in_flight=1, keep_rollouts=True)
    assert build(in_flight=5, keep_rollouts=True) == alone
    assert build(in_flight=64, keep_rollouts=True) == alone
    slow = ScriptedEngine(max_model_len=2048, latency=1.0)
    assert build(in_flight=7, keep_rollouts=True, engine=slow) == alone
    assert build(problems=PROBLEMS[::-1], in_flight=3, keep_rollouts=True) == alone[::-1]


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "423e8073af4861d5"),
        ({"keep_rollouts": True}, "6e93b57ee2bc8fff"),
        ({"merge_identical_steps": False}, "03412964fcf20e97"),
        ({"prior": "uniform", "keep_rollouts": True}, "602fcb555e119797"),
        ({"c_puct": 3.0, "max_depth": 3}, "4e32d88dbefb2d3b"),
    ],
)
def test_trees_stay_as_they_were(build, settings, digest):
    """A search that is made faster builds the same trees: all nodes and figures, to 9 digits."""

    def rounded(value: object) -> object:
        return float(f"{value:.9g}") if isinstance(value, float) else value

    rows = [[{k: rounded(v) for k, v in node.items()} for node in t.to_json()["nodes"]] for t in build(**settings)]
    assert hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16] == digest


def test_an_exhausted_tree_only_backs_up(build):
    tree = build(lambda context, rng: "\\boxed{1}", PROBLEMS[1:2], num_iterations=5)[0]
    assert [(n.step, n.outcome, n.visits, n.q) for n in tree.nodes[1:]] == [("\\boxed{1}", "right", 4, 1.0)]
    assert tree.stats["requests"] == CFG.num_expansions
    assert tree.stats["rollouts"] == 0


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("\n", {}),  # empty step
        ("   \n", {}),
        ("no answer", {}),  # ended by the model
        ("", {}),
        ("a long step that is cut\n", {"max_step_tokens": 5}),
    ],
)
def test_dead_ends_are_wrong_terminals_without_an_answer(build, text, settings):
    tree = build(lambda context, rng: text, PROBLEMS[:1], num_iterations=3, **settings)[0]
    assert [(n.terminal, n.outcome, n.answer, n.q) for n in tree.nodes[1:]] == [(True, "wrong", None, 0.0)]
    assert tree.stats["rollouts"] == 0


def test_an_answer_may_span_steps(build):
    def script(context: str, rng: random.Random) -> str:
        return "7}\n" if context.endswith("\\boxed{\n") else "\\boxed{\n7}\nmore\n"

    tree = build(script, [Problem("test/x", "x", "7")], num_iterations=3)[0]
    assert [(n.step, n.outcome) for n in tree.nodes[1:]] == [("\\boxed{\n", None), ("7}\n", "right")]
    assert tree.nodes[1].reward == 1.0


def test_the_depth_limit_stops_expansion_not_evaluation(build):
    tree = build(lambda context, rng: "go\n\\boxed{1}", PROBLEMS[1:2], max_depth=1, num_iterations=4)[0]
    assert [(n.step, n.terminal, n.reward, n.visits) for n in tree.nodes[1:]] == [("go\n", False, 1.0, 3)]
    kept = build(lambda context, rng: "go\n" * 9, PROBLEMS[1:2], max_depth=3, num_iterations=1, keep_rollouts=True)[0]
    assert [n.depth for n in kept.nodes] == [0, 1, 2, 3]
    assert not any(n.terminal for n in kept.nodes)


@pytest.mark.parametrize("room", [30, 36])
def test_a_full_context_ends_the_path(build, room):
    length = len(PromptStyle.load("minimal-chat").render(PROBLEMS[0].text))
    engine = ScriptedEngine(lambda context, rng: "x" * 9 + "\n", max_model_len=length + room)
    tree = build(problems=PROBLEMS[:1], engine=engine, num_iterations=30)[0]
    deepest = max(tree.nodes, key=lambda node: node.depth)
    assert deepest.outcome == "wrong"
    assert sum(len(node.token_ids) for node in tree.path(deepest)) == room
    assert engine.stats.generated_tokens == tree.stats["generated_tokens"]


def test_a_prompt_that_fills_the_context_gives_a_tree_of_the_root_alone(build):
    length = len(PromptStyle.load("minimal-chat").render(PROBLEMS[0].text))
    tree = build(problems=PROBLEMS[:1], engine=ScriptedEngine(max_model_len=length))[0]
    assert (len(tree.nodes), tree.stats["prompt_too_long"], tree.root.visits) == (1, 1, 0)


def test_kept_rollouts_become_paths_that_expansions_take_over(build):
    """One rollout from each child, always the same continuation: what the expansion then samples is there already."""

    def script(context: str, rng: random.Random) -> str:
        depth = context.rpartition("assistant\n")[2].count("\n")
        return "".join(f"step {i}\n" for i in range(depth, 4)) + "\\boxed{1}"

    kept = build(script, PROBLEMS[1:2], num_iterations=1, keep_rollouts=True)[0]
    assert [n.step for n in kept.nodes[1:]] == ["step 0\n", "step 1\n", "step 2\n", "step 3\n", "\\boxed{1}"]
    assert [n.origin for n in kept.nodes[1:]] == ["expansion"] + ["rollout"] * 4
    assert [n.reward for n in kept.nodes[1:]] == [1.0] * 5
    assert kept.stats["rollouts"] == CFG.num_rollouts
    more = build(script, PROBLEMS[1:2], num_iterations=4, keep_rollouts=True)[0]
    assert [n.origin for n in more.nodes[1:]] == ["expansion"] * 4 + ["rollout"]
    assert more.stats["rollouts"] == CFG.num_rollouts  # the kept ones count for the nodes they run through
    assert [n.visits for n in more.nodes] == [4, 3, 2, 1, 0, 0]


def test_steps_are_cut_behind_the_token_that_completes_the_delimiter():
    class Pairs:
        """Two characters a token, so a delimiter may end in the middle of one."""

        def decode(self, tokens, **_) -> str:
            return "".join({1: "ab", 2: "c\n", 3: "\n\n", 4: "\nd", 5: "e"}[token] for token in tokens)

    def cut(delimiter: str, *tokens: int, eos: bool = False) -> list[tuple[str, bool]]:
        logprobs = tuple(-0.5 * token for token in tokens)
        steps = StepCutter(Pairs(), delimiter).cut(Sample(tokens, logprobs, "", "stop", stopped_by_eos=eos))
        assert tuple(token for step in steps for token in step.token_ids) == tokens[: len(tokens) - eos]
        assert all(step.logprob == sum(-0.5 * token for token in step.token_ids) for step in steps)
        return [(step.text, step.delimited) for step in steps]

    assert cut("\n", 1, 2, 1, 3, 1) == [("abc\n", True), ("ab\n\n", True), ("ab", False)]
    assert cut("\n\n", 1, 2, 1, 2, 4, 5) == [("abc\nabc\n\nd", True), ("e", False)]
    assert cut("\n", 1, 5, eos=True) == [("ab", False)]
    assert cut("\n", 5, eos=True) == []
    assert cut("\n") == []


def test_a_tree_survives_json(build):
    tree = build(problems=PROBLEMS[:1], keep_rollouts=True)[0]
    assert Tree.from_json(tree.to_json()) == tree
    assert dataclasses.asdict(tree.root)["origin"] == "root"
