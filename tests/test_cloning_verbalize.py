"""From a node sequence to text and back."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cloning_linearize import make_tree, trees

from astro_hpc.cloning.linearize import correct_terminals, incorrect_terminals, linearize, sample_incorrect
from astro_hpc.cloning.phrases import Phrases
from astro_hpc.cloning.verbalize import Reflections, TemplateVerbalizer, replay
from astro_hpc.config.base import ConfigError

SETS = ["paper", "short", "varied"]


def two_attempts():
    """4 + 2 = 6, a wrong end, back to step 1, a right end."""
    tree = make_tree([0, 1, 1], [("wrong", "9"), ("right", "5")])
    for node, step in zip(tree.nodes[1:], ("Step 1: 4 + 2 = 6\n", "\\boxed{6 + 3}", "\\boxed{6 - 1}"), strict=True):
        node.step = step
    return tree


def test_the_short_phrases_give_the_documented_text():
    tree = two_attempts()
    rng = random.Random(0)
    verbalizer = TemplateVerbalizer(
        Phrases.load("short"),
        reflections=Reflections(rate=0.0),
        attempt_note=lambda tree, node: f"We got {node.answer} and need 5.",
    )
    trace = verbalizer(tree, linearize(tree, [tree.nodes[2]], tree.nodes[3], rng), rng)
    assert trace.text == (
        "Step 1: 4 + 2 = 6\n"
        "\\boxed{6 + 3}\n"
        "We got 9 and need 5.\n"
        "But wait, are we correct so far? Hmm... No. Let's go back to Step 1: 4 + 2 = 6.\n"
        "\\boxed{6 - 1}\n"
        "We got 5 and need 5.\n"
        "Our solution seems to be correct so far."
    )
    pieces = [(span.kind, trace.text[span.start : span.end]) for span in trace.spans]
    assert pieces[0] == ("step", "Step 1: 4 + 2 = 6")
    assert pieces[3] == ("reflection", "But wait, are we correct so far? Hmm... No.")
    assert pieces[4] == ("backtrack", "Let's go back to Step 1: 4 + 2 = 6.")
    graph = trace.graph(tree)
    assert [(e["source"], e["target"], e["kind"]) for e in graph["edges"]] == [
        (0, 1, "forward"), (1, 2, "forward"), (2, 1, "backtrack"), (1, 3, "forward"),
    ]  # fmt: skip


def test_the_paper_phrases_restart_at_the_root():
    tree = make_tree([0, 0], [("wrong", "9"), ("right", "5")])
    rng = random.Random(0)
    trace = TemplateVerbalizer(Phrases.load("paper"))(tree, [tree.root, tree.nodes[1], tree.root, tree.nodes[2]], rng)
    assert "But wait, are we solving the problem correctly so far? Hmm...\nI'm not sure" in trace.text
    assert "Let's restart our solution from the beginning." in trace.text
    assert trace.text.endswith("Our solution seems to be correct so far.")


@settings(max_examples=150, deadline=None)
@given(trees(), st.integers(0, 3), st.integers(0, 99), st.sampled_from(SETS), st.booleans())
def test_traces_replay_into_their_path(tree, k, seed, name, noted):
    rng = random.Random(seed)
    correct = correct_terminals(tree)
    if not correct:
        return
    chosen = sample_incorrect(incorrect_terminals(tree), k, rng)
    sequence = linearize(tree, chosen, rng.choice(correct), rng)
    phrases = Phrases.load(name)
    note = (lambda tree, node: f"We got {node.answer}.") if noted else None
    trace = TemplateVerbalizer(phrases, reflections=Reflections(rate=0.5), attempt_note=note)(tree, sequence, rng)
    assert replay(trace.graph(tree)) == [node.id for node in sequence]
    assert phrases.count_backtracks(trace.text) == len(chosen)
    for span in trace.spans:
        text = trace.text[span.start : span.end]
        assert text == text.strip()
        if span.kind == "step":
            assert text == tree.nodes[span.node].step.strip()
    ends = [0, *(span.end for span in trace.spans)]
    for end, span in zip(ends, trace.spans, strict=False):
        assert trace.text[end : span.start].strip() == ""
    assert trace.text[ends[-1] :] == ""


def test_confident_reflections_follow_steps_of_high_q_at_their_rate():
    tree = make_tree([0, 1, 2, 3], [("right", "5")])
    for node, q in zip(tree.nodes[1:], (0.9, 0.1, 0.75, 1.0), strict=True):
        node.q = q
    verbalizer = TemplateVerbalizer(Phrases.load("short"), reflections=Reflections(0.75, 1.0))
    trace = verbalizer(tree, tree.path(tree.nodes[4]), random.Random(0))
    assert [span.node for span in trace.spans if span.kind == "reflection"] == [1, 3, 4]
    silent = TemplateVerbalizer(Phrases.load("short"), reflections=Reflections(0.75, 0.0))
    trace = silent(tree, tree.path(tree.nodes[4]), random.Random(0))
    assert [span.node for span in trace.spans if span.kind == "reflection"] == [4]


def test_the_direct_arm_is_the_steps_alone():
    tree = two_attempts()
    trace = TemplateVerbalizer(Phrases.load("paper"))(tree, tree.path(tree.nodes[3]), random.Random(0), reflect=False)
    assert trace.text == "Step 1: 4 + 2 = 6\n\\boxed{6 - 1}"


def test_torn_sequences_are_refused():
    tree = two_attempts()
    verbalizer = TemplateVerbalizer(Phrases.load("paper"))
    with pytest.raises(ValueError, match="neither a child nor an ancestor"):
        verbalizer(tree, [tree.root, tree.nodes[1], tree.nodes[2], tree.nodes[3]], random.Random(0))
    graph = verbalizer(tree, tree.path(tree.nodes[3]), random.Random(0)).graph(tree)
    graph["edges"][1]["source"] = 2
    with pytest.raises(ValueError, match="starts elsewhere"):
        replay(graph)


def test_bad_phrase_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no set or file 'nope'; shipped: paper, short, varied"):
        Phrases.load("nope")
    file = tmp_path / "mine.yaml"
    good = {"doubt": '["Hm."]', "confident": '["Good."]', "backtrack": '["Back to {step}"]', "restart": '["Back."]'}
    for change, message in [
        ({"backtrack_pattern": "'('"}, "not a regular expression"),
        ({"backtrack_pattern": "return"}, "must match 'Back to {step}' exactly once"),
        ({"backtrack_pattern": "'Back|Hm'"}, "must not match the reflection"),
        ({"backtrack_pattern": "Back", "doubts": "[]"}, "doubts"),
        ({"backtrack_pattern": "Back", "doubt": "[]"}, "doubt"),
    ]:
        file.write_text("".join(f"{key}: {value}\n" for key, value in {**good, **change}.items()))
        with pytest.raises(ConfigError, match=message):
            Phrases.load(str(file))
    file.write_text("".join(f"{key}: {value}\n" for key, value in {**good, "backtrack_pattern": "Back"}.items()))
    assert Phrases.load(str(file)).say_backtrack("Step 2: a\nmore", random.Random(0)) == "Back to Step 2: a\nmore"
