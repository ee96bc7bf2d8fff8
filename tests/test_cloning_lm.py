"""The language-model verbaliser on scripted engines, and on vLLM."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_writer import faithful, hostile
from test_cloning_linearize import make_tree, trees
from test_cloning_stage import make_config, walk_trees

from astro_hpc.cloning import stage
from astro_hpc.cloning.linearize import correct_terminals, incorrect_terminals, linearize, sample_incorrect
from astro_hpc.cloning.lm_verbalizer import LMVerbalizer
from astro_hpc.cloning.phrases import Phrases
from astro_hpc.cloning.prompts import VerbalizePrompts
from astro_hpc.cloning.verbalize import Reflections, TemplateVerbalizer, Trace, replay
from astro_hpc.config.base import ConfigError
from astro_hpc.inference.engine import SampleRequest
from astro_hpc.inference.scripted import ScriptedEngine
from astro_hpc.run.files import Journal, read_jsonl
from astro_hpc.run.stage import StageContext
from astro_hpc.verifier.extract import extract_answer

MARKERS = ("\\boxed{", "\\fbox{")


def make_verbalizer(engine, rate: float = 0.0, **changes) -> LMVerbalizer:
    template = TemplateVerbalizer(Phrases.load("paper"), reflections=Reflections(rate=rate), seed=3)
    return LMVerbalizer(
        engine,
        template,
        VerbalizePrompts.load("verbalize"),
        "\n",
        MARKERS,
        lambda text: extract_answer(text, MARKERS),
        max_tokens=400,
        seed=3,
        **changes,
    )


def two_attempts():
    tree = make_tree([0, 1, 1, 0], [("wrong", "9"), ("right", "5"), ("wrong", "1")])
    for node, step in zip(
        tree.nodes[1:], ("4 + 2 = 6\n", "\\boxed{6 + 3}", "\\boxed{6 - 1}", "\\boxed{1}"), strict=True
    ):
        node.step = step
    return tree, [tree.nodes[i] for i in (0, 4, 0, 1, 2, 1, 3)]


def test_the_model_tells_steps_and_backtracks_and_the_phrases_the_rest():
    contexts = []

    def script(context: str, rng: random.Random) -> str:
        contexts.append(context)
        return faithful(context, random.Random(0))

    tree, sequence = two_attempts()
    trace = asyncio.run(make_verbalizer(ScriptedEngine(script, 20_000)).write(tree, sequence, "astro/1"))
    assert trace.text == (
        "Next comes \\boxed{1}.\n"
        "But wait, are we solving the problem correctly so far? Hmm...\n"
        "I'm not sure if we're solving the problem correctly so far. "
        "Let's restart our solution from the beginning and read the problem again.\n"
        "Next comes 4 + 2 = 6.\n"
        "Next comes \\boxed{6 + 3}.\n"
        "But wait, are we solving the problem correctly so far? Hmm...\n"
        "I'm not sure if we're solving the problem correctly so far. "
        "Let's go back to where we had come so far.\n"
        "Next comes \\boxed{6 - 1}.\n"
        "But wait, are we solving the problem correctly so far? Hmm...\n"
        "Our solution seems to be correct so far."
    )
    assert [(span.kind, span.by) for span in trace.spans] == [
        ("step", "lm"), ("reflection", "phrases"), ("backtrack", "lm"), ("step", "lm"), ("step", "lm"),
        ("reflection", "phrases"), ("backtrack", "lm"), ("step", "lm"), ("reflection", "phrases"),
    ]  # fmt: skip
    assert replay(trace.graph(tree)) == [node.id for node in sequence]
    assert (trace.counts["pieces"], trace.counts["written"], trace.counts["tries"]) == (6, 6, 6)
    assert trace.counts["generated_tokens"] > 100
    # each request goes on from the text so far
    assert "Solution so far: (nothing yet)" in contexts[0]
    assert "Solution so far: Next comes \\boxed{1}.\nBut wait" in contexts[1]
    assert contexts[-1].count("Next comes") == 3
    assert Trace.from_json(json.loads(json.dumps(trace.to_json()))) == trace


@settings(max_examples=150, deadline=None)
@given(trees(), st.integers(0, 3), st.integers(0, 10**6))
def test_whatever_the_model_says_the_trace_tells_its_path_and_ends_in_the_answer(tree, k, seed):
    rng = random.Random(seed)
    correct = correct_terminals(tree)
    if not correct:
        return
    chosen = sample_incorrect(incorrect_terminals(tree), k, rng)
    sequence = linearize(tree, chosen, rng.choice(correct), rng)

    def script(context: str, own: random.Random) -> str:
        return hostile(context, random.Random(f"{seed} {own.random()}"))

    verbalizer = make_verbalizer(ScriptedEngine(script, 100_000), rate=0.5)
    trace = asyncio.run(verbalizer.write(tree, sequence, "astro/0"))
    assert replay(trace.graph(tree)) == [node.id for node in sequence]
    assert verbalizer.template.phrases.count_backtracks(trace.text) == len(chosen)
    assert extract_answer(trace.text, MARKERS) == sequence[-1].answer
    assert trace.text.count("box") == sum(node.step.count("box") for node in {n.id: n for n in sequence}.values())
    ends = [0, *(span.end for span in trace.spans)]
    for end, span in zip(ends, trace.spans, strict=False):
        assert trace.text[end : span.start].strip() == ""
        text = trace.text[span.start : span.end]
        assert text == text.strip()
        if span.kind == "step" and span.by == "policy":
            assert text == tree.nodes[span.node].step.strip()
    counts = trace.counts
    told = [span for span in trace.spans if span.kind in ("step", "backtrack")]
    assert counts["pieces"] == len(told)
    assert counts["written"] == sum(span.by == "lm" for span in told)
    assert counts["pieces"] == counts["written"] + sum(n for name, n in counts.items() if name.startswith("template/"))
    assert counts["tries"] == counts["written"] + sum(n for name, n in counts.items() if name.startswith("refused/"))


def test_a_refused_text_is_asked_for_again_with_another_seed():
    seeds: list[int] = []

    class Counting(ScriptedEngine):
        async def generate(self, request: SampleRequest):
            seeds.append(request.seed)
            return await super().generate(request)

    def script(context: str, rng: random.Random) -> str:
        return "7\n" if len(seeds) % 3 else faithful(context, rng)

    tree, _ = two_attempts()
    path = [tree.nodes[i] for i in (0, 1, 3)]
    trace = asyncio.run(make_verbalizer(Counting(script, 20_000)).write(tree, path, "direct/3", reflect=False))
    assert trace.counts["tries"] == len(set(seeds)) == 6
    assert trace.counts["refused/lost_number"] == 4
    assert trace.counts["written"] == 2
    assert [span.kind for span in trace.spans] == ["step", "step"]
    seeds.clear()
    trace = asyncio.run(
        make_verbalizer(Counting(script, 20_000), retries=1).write(tree, path, "direct/3", reflect=False)
    )
    assert trace.text == "4 + 2 = 6\n" + trace.text.splitlines()[1]
    assert trace.counts["template/lost_number"] == 1


def test_prompts_that_leave_no_room_and_texts_that_do_not_end_are_refused():
    tree, sequence = two_attempts()
    trace = asyncio.run(make_verbalizer(ScriptedEngine(faithful, 300)).write(tree, sequence, "astro/1"))
    assert trace.counts == Counter({"pieces": 6, "template/prompt_too_long": 6})
    endless = ScriptedEngine(lambda context, rng: "and " * 1000, 20_000)
    trace = asyncio.run(make_verbalizer(endless, retries=0).write(tree, sequence, "astro/1"))
    assert trace.counts["template/unfinished"] == 6
    assert trace.counts["generated_tokens"] == 6 * 400


def test_phrases_and_prompts_must_agree_on_what_a_backtrack_is(tmp_path):
    phrases = tmp_path / "mine.yaml"
    phrases.write_text(
        'doubt: ["Hm."]\nconfident: ["Good."]\nbacktrack: ["Return to {step}"]\nrestart: ["Return."]\n'
        "backtrack_pattern: Return\n"
    )
    with pytest.raises(ConfigError, match="must match backtrack_pattern"):
        run_lm_stage(tmp_path, walk_trees(2), ScriptedEngine(faithful, 20_000), phrases=str(phrases))


def run_lm_stage(tmp_path, trees, engine, folder="traces", **clone):
    cfg = make_config(tmp_path, **{"verbalizer": "lm", "phrases": "paper", "verbalizer_max_tokens": 300, **clone})
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    ctx = StageContext(cfg, tmp_path / folder, "clone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "make_engine", lambda *_: engine)
        patch.setattr(stage, "_token_counter", lambda model_dir: None)
        astro, direct, filters = stage.run(ctx, trees=trees, model_dir=tmp_path)
    return list(read_jsonl(astro)), list(read_jsonl(direct)), json.loads(filters.read_text())


def test_results_do_not_depend_on_what_else_is_in_flight(tmp_path):
    trees = walk_trees(12)
    for folder, in_flight, latency in [("one", 1, 0.0), ("many", 32, 0.1), ("few", 3, 0.1)]:
        engine = ScriptedEngine(hostile, 20_000, latency)
        order = trees if folder == "one" else trees[::-1]
        astro, direct, filters = run_lm_stage(tmp_path, order, engine, folder, traces_in_flight=in_flight)
    for name in ("astro.jsonl", "direct.jsonl", "filters.json"):
        texts = {(tmp_path / folder / name).read_bytes() for folder in ("one", "many", "few")}
        assert len(texts) == 1, name
    counts = filters["verbalizer"]
    assert counts["written"] > 50
    assert sum(n for name, n in counts.items() if name.startswith("template/")) == counts["pieces"] - counts["written"]
    assert counts["refused/early_answer"] > 0
    assert counts["refused/unfinished"] > 0
    by_id = {tree.problem.id: tree for tree in trees}
    for row in [*astro, *direct]:
        tree = by_id[row["problem_id"]]
        last = tree.nodes[replay(row["graph"])[-1]]
        assert last.outcome == "right"
        assert " ".join((extract_answer(row["completion"]) or "").split()) == last.answer == row["answer"]
        assert Phrases.load("paper").count_backtracks(row["completion"]) == row["k"]
    repeated = [row for row in direct if row["repeat"]]
    assert len({row["completion"] for row in repeated}) > 1, "the same solution again is told in other words"


def test_a_trace_that_would_end_elsewhere_is_told_by_the_template(tmp_path, monkeypatch):
    """Even if the checks of single pieces let something through."""
    monkeypatch.setattr("astro_hpc.cloning.lm_verbalizer.check_step", lambda *_, **__: None)
    engine = ScriptedEngine(lambda context, rng: faithful(context, rng).rstrip("\n") + " \\boxed{9 + 9}\n", 20_000)
    trees = walk_trees(10)
    astro, direct, filters = run_lm_stage(tmp_path, trees, engine)
    assert filters["verbalizer"]["traces/answer_changed"] >= len(astro)
    assert not any("9 + 9" in row["completion"] for row in [*astro, *direct])


def test_both_models_are_loaded_one_after_the_other(tmp_path, monkeypatch):
    loaded, alive = [], set()

    class Tracked(ScriptedEngine):
        def __init__(self, folder: Path, script) -> None:
            super().__init__(script, 100_000)
            assert not alive, "one engine at a time"
            loaded.append(folder.name)
            alive.add(self)

        def close(self) -> None:
            alive.discard(self)

    scripts = {"policy": lambda context, rng: "Verdict: correct\n", "writer": faithful}
    monkeypatch.setattr(stage, "make_engine", lambda folder, *_: Tracked(folder, scripts[folder.name]))
    monkeypatch.setattr(stage, "_token_counter", lambda model_dir: None)
    cfg = make_config(tmp_path, verbalizer="lm", phrases="paper", self_evaluation_samples=2)
    ctx = StageContext(cfg, tmp_path, "clone")
    stage.run(ctx, trees=walk_trees(6), model_dir=Path("policy"), verbalizer_dir=Path("writer"))
    assert loaded == ["policy", "writer"]
    assert not alive
    assert ctx.counts["verbalizer"]["written"] > 20
    assert ctx.counts["tokens"] == ctx.counts["trees"]["verdict_tokens"] + ctx.counts["verbalizer"]["generated_tokens"]
    again = StageContext(cfg, tmp_path, "clone")
    stage.run(again, trees=walk_trees(6), model_dir=Path("policy"), verbalizer_dir=Path("writer"))
    assert loaded == ["policy", "writer"], "nothing is left to ask"


def test_on_vllm_the_machinery_runs_end_to_end(tiny_llama: Path, tmp_path: Path):
    """A random model writes nothing usable; what it fails at is counted, and the template's words stand in."""
    cfg = make_config(tmp_path, verbalizer="lm", phrases="paper", verbalizer_max_tokens=16, verbalizer_retries=1)
    cfg.inference.max_model_len = 1024
    cfg.inference.max_num_seqs = 16
    cfg.inference.cpu_kv_cache_gb = 0.25
    cfg.inference.cpu_threads = 1
    trees = walk_trees(5)
    ctx = StageContext(cfg, tmp_path, "clone")
    astro, direct, filters = stage.run(ctx, trees=trees, model_dir=tiny_llama)
    counts = json.loads(filters.read_text())["verbalizer"]
    assert counts["tries"] > counts["pieces"] > 20
    assert counts["generated_tokens"] > 20
    assert sum(n for name, n in counts.items() if name.startswith("template/")) == counts["pieces"] - counts["written"]
    rows = [*read_jsonl(astro), *read_jsonl(direct)]
    solved = {tree.problem.id: tree for tree in trees if tree.solved}
    assert {row["problem_id"] for row in rows} == solved.keys()
    for row in rows:
        assert solved[row["problem_id"]].nodes[replay(row["graph"])[-1]].outcome == "right"
        assert row["num_tokens"] > 20
    records = Counter(record["kind"] for record in Journal.read(tmp_path / "records.jsonl"))
    assert records["tree"] == 5
    assert records["trace"] >= len(rows)
