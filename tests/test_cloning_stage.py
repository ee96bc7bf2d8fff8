"""The clone stage on trees grown from walks of the signs family."""

import json
import random

import pytest

from astro_hpc.cloning import stage
from astro_hpc.cloning.phrases import Phrases
from astro_hpc.cloning.verbalize import replay
from astro_hpc.cloning.warmup import write_examples
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig, SignsSource
from astro_hpc.inference.scripted import ScriptedEngine
from astro_hpc.problems import signs
from astro_hpc.run.files import Journal, read_jsonl
from astro_hpc.run.stage import StageContext
from astro_hpc.search.tree import Node, Tree


def walk_tree(problem, seed, num_walks=12):
    """A tree whose leaves are random walks, with equal steps merged, as a search with kept rollouts leaves it."""
    rng = random.Random(seed)
    tree = Tree(problem, [Node(0, None, 0, origin="root")])
    for _ in range(num_walks):
        node = tree.root
        lines = signs.random_walk(problem, rng)
        for line in lines:
            step = line if line is lines[-1] else line + "\n"
            found = next((child for child in tree.children(node) if child.step == step), None)
            if found is None:
                found = Node(len(tree.nodes), node.id, node.depth + 1, step=step, q=rng.random(), origin="rollout")
                tree.nodes.append(found)
                node.children.append(found.id)
            node = found
            node.visits += 1
        answer = lines[-1].removeprefix("\\boxed{").removesuffix("}")
        right = signs.check(problem.metadata["numbers"], problem.metadata["target"], answer)
        node.terminal, node.answer, node.outcome = True, answer, "right" if right else "wrong"
        node.q = node.reward = float(right)
    return tree


def walk_trees(count=30, seed=0):
    return [walk_tree(p, f"{seed}/{p.id}") for p in signs.generate(SignsSource(count=count, seed=seed))]


def make_config(tmp_path, **clone):
    clone = {"self_evaluation_samples": 0, "phrases": "short", "attempt_note": True, **clone}
    return RunConfig(
        name="t",
        runs_dir=tmp_path,
        problems={"train": [{"type": "signs", "count": 30}]},
        model={"prompt_style": "minimal-chat"},
        clone=clone,
    )


def run_stage(tmp_path, trees, folder="traces", model_dir=None, **clone):
    cfg = make_config(tmp_path, **clone)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    ctx = StageContext(cfg, tmp_path / folder, "clone")
    astro, direct, filters = stage.run(ctx, trees=trees, model_dir=model_dir)
    return list(read_jsonl(astro)), list(read_jsonl(direct)), json.loads(filters.read_text())


def test_both_arms_come_from_the_same_trees_in_equal_size(tmp_path):
    trees = walk_trees()
    astro, direct, filters = run_stage(tmp_path, trees)
    assert filters["trees"]["read"] == 30
    assert filters["trees"]["used"] == len({row["problem_id"] for row in astro}) == sum(tree.solved for tree in trees)
    assert filters["trees"]["unsolved"] + filters["trees"]["used"] == 30
    counts = filters["astro"]
    lost = counts["no_incorrect_terminal"] + counts["duplicate"] + counts["too_long"]
    assert counts["wanted"] == 4 * filters["trees"]["used"] == lost + counts["written"]
    assert counts["written"] == len(astro) > 50
    assert [row["problem_id"] for row in direct] == [row["problem_id"] for row in astro]
    assert {row["k"] for row in direct} == {0}
    assert {row["k"] for row in astro} == {0, 1, 2}
    assert filters["direct"]["repeats"] == sum(row["repeat"] > 0 for row in direct) > 0
    fresh = [row["completion"] for row in direct if row["repeat"] == 0]
    assert len({(row["problem_id"], row["completion"]) for row in direct}) == len(fresh)


def test_rows_hold_prompt_text_and_a_graph_that_replays(tmp_path):
    trees = {tree.problem.id: tree for tree in walk_trees()}
    astro, direct, _ = run_stage(tmp_path, list(trees.values()))
    phrases = Phrases.load("short")
    for row in [*astro, *direct]:
        tree = trees[row["problem_id"]]
        path = replay(row["graph"])
        assert tree.nodes[path[-1]].outcome == "right"
        assert row["answer"] == tree.nodes[path[-1]].answer
        assert sum(tree.nodes[i].outcome == "wrong" for i in path) == row["k"]
        assert phrases.count_backtracks(row["completion"]) == row["k"]
        assert row["prompt"] == f"<|im_start|>user\n{tree.problem.text}<|im_end|>\n<|im_start|>assistant\n"
        assert row["messages"][1]["content"] == row["completion"]
    assert len({row["id"] for row in [*astro, *direct]}) == len(astro) + len(direct)
    tried = [row for row in astro if row["k"]]
    assert all("We got" in row["completion"] for row in tried)
    assert not any("We got" in row["completion"] or "Our solution" in row["completion"] for row in direct)


def test_journals_and_trees_in_memory_give_the_same_bytes(tmp_path):
    trees = walk_trees()
    with Journal(tmp_path / "trees.jsonl") as journal:
        for tree in trees:
            journal.append(tree.to_json())
    run_stage(tmp_path, trees, "memory")
    run_stage(tmp_path, [tmp_path / "trees.jsonl"], "journal")
    for name in ("astro.jsonl", "direct.jsonl", "filters.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "journal" / name).read_bytes()


def test_arms_without_equal_size(tmp_path):
    _, direct, filters = run_stage(tmp_path, walk_trees(), equal_arms=False, num_direct=2)
    assert filters["direct"]["repeats"] == 0
    assert max(sum(r["problem_id"] == row["problem_id"] for r in direct) for row in direct) == 2


def test_examples_longer_than_sft_takes_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_token_counter", lambda model_dir: lambda prompt, text: len(prompt) + len(text) + 1)
    cfg = make_config(tmp_path)
    cfg.sft.seq_length = 330
    folder = tmp_path / "traces"
    folder.mkdir()
    ctx = StageContext(cfg, folder, "clone")
    astro, direct, filters = stage.run(ctx, trees=walk_trees())
    rows, report = list(read_jsonl(astro)), json.loads(filters.read_text())
    assert max(row["num_tokens"] for row in rows) <= 330
    assert report["astro"]["too_long"] > 0
    assert report["num_tokens"]["astro"]["max"] <= 330
    assert ctx.counts["trace_tokens"] == sum(row["num_tokens"] for row in [*rows, *read_jsonl(direct)])


def test_no_solved_tree_is_an_error_that_leaves_the_counts(tmp_path):
    unsolved = [tree for tree in walk_trees(80) if not tree.solved]
    with pytest.raises(ConfigError, match="none of"):
        run_stage(tmp_path, unsolved)
    assert json.loads((tmp_path / "traces" / "filters.json").read_text())["trees"]["unsolved"] == len(unsolved)


def test_self_evaluation_keeps_what_the_quorum_accepts(tmp_path, monkeypatch):
    def judge(context, rng):
        """Accepts solutions that begin with a plus, and now and then another."""
        solution = context.rsplit("Solution: ", 1)[1].splitlines()[0]
        return f"Looks fine.\nVerdict: {'correct' if '+' in solution or rng.random() < 0.3 else 'incorrect'}"

    engine = ScriptedEngine(judge, max_model_len=100_000)
    trees = walk_trees()

    monkeypatch.setattr(stage, "make_engine", lambda *_: engine)
    monkeypatch.setattr(stage, "_token_counter", lambda model_dir: None)
    judged = {"model_dir": tmp_path, "self_evaluation_samples": 4}
    strict, _, filters = run_stage(tmp_path, trees, **judged)
    for row in strict:
        if row["k"] == 0:
            assert "+" in row["completion"].splitlines()[0]
    counts = filters["trees"]
    assert counts["self_evaluation"] > 0
    assert counts["right_terminals_rejected"] > 0
    assert counts["read"] == counts["unsolved"] + counts["self_evaluation"] + counts["used"]
    assert engine.stats.requests == 4 * counts["right_terminals"]
    # a second attempt asks only what the journal lacks, and ends the same
    journal = tmp_path / "traces" / "records.jsonl"
    before = (tmp_path / "traces" / "astro.jsonl").read_bytes()
    asked = engine.stats.requests
    run_stage(tmp_path, trees, **judged)
    assert engine.stats.requests == asked
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:10]) + lines[10][:-5])
    run_stage(tmp_path, trees, **judged)
    assert asked < engine.stats.requests < 2 * asked
    assert (tmp_path / "traces" / "astro.jsonl").read_bytes() == before
    _, _, lenient = run_stage(tmp_path, trees, "lenient", **judged, self_evaluation_quorum=0.25)
    assert lenient["trees"]["right_terminals_rejected"] < counts["right_terminals_rejected"]


def test_steps_that_contradict_the_answer_can_be_left_out(tmp_path):
    trees = walk_trees()
    for tree in trees[::2]:
        for node in tree.nodes:
            node.step = node.step.replace("Step 2: ", "Step 2: 1")  # 4 + 2 = 6 becomes 14 + 2 = 6
    _, _, loose = run_stage(tmp_path, trees, "loose")
    astro, direct, strict = run_stage(tmp_path, trees, "strict", check_steps=True)
    assert strict["trees"]["used"] == sum(tree.solved for tree in trees[1::2]) < loose["trees"]["used"]
    assert strict["trees"]["no_sound_solution"] == sum(tree.solved for tree in trees[::2])
    assert strict["trees"]["terminals_with_bad_steps"] > 0
    assert not any("Step 2: 1" in row["completion"] and row["problem_id"] in {t.problem.id for t in trees[::2]}
                   for row in [*astro, *direct])  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "answer", "agree"),
    [
        (["Step 1: 4 - 2 = 2", "Step 2: 2 + 3 = 5\n"], "4 - 2 + 3", True),
        (["Step 1: 4 - 2 = 2", "Step 2: 2 + 3 = 6"], "4 - 2 + 3", False),
        (["Step 1: 4 - 2 = 2"], "4 - 2 + 3", False),
        (["Step 1: 4 + 2 = 6", "Step 2: 6 + 3 = 9"], "4 - 2 + 3", False),
        (["Step 1: 2 - 4 = -2"], "2 - 4 = -2", True),
        ([], "nonsense", False),
    ],
)
def test_steps_agree_with_the_answer(lines, answer, agree):
    assert signs.steps_agree(lines, answer) is agree


def test_self_evaluation_needs_a_model(tmp_path):
    with pytest.raises(ConfigError, match="self_evaluation_samples"):
        run_stage(tmp_path, walk_trees(2), self_evaluation_samples=8)


def test_fixed_phrases_can_be_left_out(tmp_path):
    astro, direct, _ = run_stage(tmp_path, walk_trees(), fixed_phrase=False, attempt_note=False)
    phrases = Phrases.load("short")
    for row in [*astro, *direct]:
        assert "But wait" not in row["completion"]
        assert "seems to be correct" not in row["completion"]
        assert {span["kind"] for span in row["graph"]["spans"]} <= {"step", "backtrack"}
        assert phrases.count_backtracks(row["completion"]) == row["k"]


def test_wrong_paths_can_be_left_before_their_answer(tmp_path):
    trees = {tree.problem.id: tree for tree in walk_trees()}
    astro, _, _ = run_stage(tmp_path, list(trees.values()), backtrack_from="inner", backtrack_max_q=1.0)
    early = 0
    for row in astro:
        tree, path = trees[row["problem_id"]], replay(row["graph"])
        left = [edge["source"] for edge in row["graph"]["edges"] if edge["kind"] == "backtrack"]
        assert len(left) == row["k"]
        assert tree.nodes[path[-1]].outcome == "right"
        early += sum(not tree.nodes[node].terminal for node in left)
    assert early > 20


def test_the_number_of_wrong_paths_can_be_fixed(tmp_path):
    astro, _, filters = run_stage(tmp_path, walk_trees(), min_incorrect=2, max_incorrect=2)
    assert {row["k"] for row in astro} == {0, 2}
    assert filters["astro"]["k=2"] > 10
    with pytest.raises(ValueError, match="min_incorrect=3 is above"):
        make_config(tmp_path, min_incorrect=3)


def test_a_trace_that_ends_in_another_answer_is_dropped_and_counted(tmp_path):
    phrases = tmp_path / "mine.yaml"
    phrases.write_text(
        'doubt: ["Hm."]\nconfident: ["Or is it \\\\boxed{1 + 1}?"]\nbacktrack: ["Back to {step}"]\nrestart: ["Back."]\n'
        "backtrack_pattern: Back\n"
    )
    with pytest.raises(ConfigError, match="none of"):
        run_stage(tmp_path, walk_trees(), phrases=str(phrases))
    counts = json.loads((tmp_path / "traces" / "filters.json").read_text())["astro"]
    assert counts["answer_changed"] > 20


def test_rows_load_with_datasets_and_both_arms_agree_in_form(tmp_path):
    import datasets

    loaded = {}
    for folder, rate in (("plain", 0.0), ("reflecting", 1.0)):
        astro, direct, _ = run_stage(tmp_path, walk_trees(), folder, reflect_rate=rate)
        for arm, rows in (("astro", astro), ("direct", direct)):
            path = str(tmp_path / folder / f"{arm}.jsonl")
            data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
            assert data.num_rows == len(rows)
            assert data[0]["completion"] == rows[0]["completion"]
            span = data[1]["graph"]["spans"][0]
            assert rows[1]["completion"][span["start"] : span["end"]]
            loaded[folder, arm] = data.features
    assert len({str(features) for features in loaded.values()}) == 1
    assert set(loaded["plain", "astro"]) == set(_types(rows[0])) == {
        "id", "problem_id", "prompt", "completion", "messages", "answer", "arm", "k", "repeat", "num_tokens", "graph",
    }  # fmt: skip
    everything = [
        *read_jsonl(tmp_path / "plain" / "astro.jsonl"),
        *read_jsonl(tmp_path / "reflecting" / "direct.jsonl"),
    ]
    assert len({json.dumps(_types(row)) for row in everything}) == 1, "no field changes its type"


def _types(value):
    """The JSON types in a value, lists by their elements'."""
    if isinstance(value, dict):
        return {key: _types(inner) for key, inner in value.items()}
    if isinstance(value, list):
        kinds = {json.dumps(_types(inner)) for inner in value}
        assert len(kinds) == 1
        return [json.loads(kinds.pop())]
    return type(value).__name__


def test_warmup_walks_are_legal_and_ignore_the_target(tmp_path):
    cfg = make_config(tmp_path)
    cfg.warmup.problems = SignsSource(count=40, seed=2)
    cfg.warmup.num_walks = 100
    rows = list(read_jsonl(write_examples(StageContext(cfg, tmp_path, "warmup"))))
    problems = {problem.id: problem for problem in signs.generate(cfg.warmup.problems)}
    assert len(rows) == len({row["id"] for row in rows}) == 100
    right = 0
    for row in rows:
        problem = problems[row["problem_id"]]
        *steps, last = row["completion"].split("\n")
        assert len(steps) == 3
        expression = last.removeprefix("\\boxed{").removesuffix("}")
        right += signs.check(problem.metadata["numbers"], problem.metadata["target"], expression)
    assert 5 < right < 60
