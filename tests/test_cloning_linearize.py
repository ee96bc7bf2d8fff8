"""Algorithm 1's invariants on random trees."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astro_hpc.cloning.linearize import (
    correct_terminals,
    incorrect_terminals,
    linearize,
    lowest_common_ancestor,
    sample_incorrect,
)
from astro_hpc.problems.problem import Problem
from astro_hpc.search.tree import Node, Tree


def make_tree(parents, verdicts):
    """A tree from parent indices; `verdicts` cycles over the leaves: (outcome, answer)."""
    nodes = [Node(0, None, 0, origin="root")]
    for i, parent in enumerate(parents, 1):
        nodes.append(Node(i, parent, nodes[parent].depth + 1, step=f"Step {i}: text {i}\n", q=(i % 5) / 4))
        nodes[parent].children.append(i)
    leaves = [node for node in nodes[1:] if not node.children]
    for leaf, (outcome, answer) in zip(leaves, verdicts * len(leaves), strict=False):
        leaf.terminal, leaf.outcome, leaf.answer = True, outcome, answer
        if answer is not None:
            leaf.step = f"Step {leaf.id}: \\boxed{{{answer}}}"
    return Tree(Problem("signs/0", "Put signs.", "5"), nodes)


@st.composite
def trees(draw):
    size = draw(st.integers(2, 30))
    parents = [0] + [draw(st.integers(max(0, i - 8), i - 1)) for i in range(2, size + 1)]
    verdict = st.one_of(
        st.just(("right", "5")),
        st.tuples(st.just("wrong"), st.one_of(st.none(), st.sampled_from("abcd"))),
        st.just(("unknown", None)),
    )
    return make_tree(parents, [*draw(st.lists(verdict, min_size=4, max_size=12)), ("right", "5")])


@settings(max_examples=300, deadline=None)
@given(trees(), st.integers(0, 4), st.integers(0, 99))
def test_sequences_keep_the_invariants(tree, k, seed):
    correct = correct_terminals(tree)
    if not correct:
        return
    rng = random.Random(seed)
    chosen = sample_incorrect(incorrect_terminals(tree), k, rng)
    goal = rng.choice(correct)
    sequence = linearize(tree, chosen, goal, rng)

    assert sequence[0] is tree.root
    assert sequence[-1] is goal
    ancestors = {node.id: {a.id for a in tree.path(node)[:-1]} for node in tree.nodes}
    for a, b in itertools.pairwise(sequence):
        assert b.parent == a.id or (a.terminal and b.id in ancestors[a.id])
    wrong = [node.answer for node in sequence if node.outcome == "wrong"]
    assert len(wrong) == len(set(wrong)) == len(chosen)
    assert None not in wrong
    # every node of the paths is walked to once; only ancestors that are gone back to occur again
    walked = [b.id for a, b in itertools.pairwise(sequence) if b.parent == a.id]
    assert len(walked) == len(set(walked))
    assert {0, *walked} == {node.id for t in [*chosen, goal] for node in tree.path(t)}
    assert len(sequence) == 1 + len(walked) + len(chosen)


@given(trees(), st.integers(0, 4), st.integers(0, 99))
def test_samples_as_many_different_answers_as_there_are(tree, k, seed):
    candidates = incorrect_terminals(tree)
    chosen = sample_incorrect(candidates, k, random.Random(seed))
    assert len(chosen) == min(k, len({node.answer for node in candidates}))


@settings(max_examples=300, deadline=None)
@given(trees(), st.integers(0, 4), st.integers(0, 99), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_leaving_paths_before_their_end_keeps_the_invariants(tree, k, seed, max_q):
    correct = correct_terminals(tree)
    if not correct:
        return
    rng = random.Random(seed)
    chosen = sample_incorrect(incorrect_terminals(tree), k, rng)
    goal = rng.choice(correct)
    sequence = linearize(tree, chosen, goal, rng, leave_at_q=max_q)

    assert (sequence[0], sequence[-1]) == (tree.root, goal)
    ancestors = {node.id: {a.id for a in tree.path(node)[:-1]} for node in tree.nodes}
    left = [a for a, b in itertools.pairwise(sequence) if b.parent != a.id]
    assert len(left) == len(chosen), "each wrong path is gone down and left once"
    for a, b in itertools.pairwise(sequence):
        assert b.parent == a.id or b.id in ancestors[a.id]
    for node in left:
        assert node in chosen or (node.q <= max_q and any(node.id in ancestors[wrong.id] for wrong in chosen))
    walked = [b.id for a, b in itertools.pairwise(sequence) if b.parent == a.id]
    assert len(walked) == len(set(walked))
    wrong = [node.answer for node in sequence if node.outcome == "wrong"]
    assert len(wrong) == len(set(wrong))


def test_a_later_path_may_share_more_with_an_earlier_one():
    # root -> 1 -> {2 wrong a, 3 right}, root -> 4 -> 5 wrong b: a, b, right would tear at "right"
    tree = make_tree([0, 1, 1, 0, 4], [("wrong", "a"), ("right", "5"), ("wrong", "b")])
    for seed in range(20):
        sequence = linearize(tree, [tree.nodes[2], tree.nodes[5]], tree.nodes[3], random.Random(seed))
        assert [node.id for node in sequence] == [0, 4, 5, 0, 1, 2, 1, 3]


def test_a_path_is_left_at_its_first_own_step_of_low_q():
    # root -> 1 -> 2 -> 3 -> 4 wrong, 1 -> 5 right
    tree = make_tree([0, 1, 2, 3, 1], [("wrong", "a"), ("right", "5")])
    for node, q in zip(tree.nodes[1:], (0.1, 0.5, 0.2, 0.0, 1.0), strict=True):
        node.q = q

    def ids(leave_at_q):
        sequence = linearize(tree, [tree.nodes[4]], tree.nodes[5], random.Random(0), leave_at_q)
        return [node.id for node in sequence]

    assert ids(None) == [0, 1, 2, 3, 4, 1, 5]
    assert ids(0.25) == [0, 1, 2, 3, 1, 5]
    assert ids(0.5) == [0, 1, 2, 1, 5]
    assert ids(0.1) == [0, 1, 2, 3, 4, 1, 5]


def test_order_of_incorrect_paths_varies_where_it_is_free():
    tree = make_tree([0, 0, 0], [("wrong", "a"), ("wrong", "b"), ("right", "5")])
    orders = {
        tuple(n.id for n in linearize(tree, tree.nodes[1:3], tree.nodes[3], random.Random(seed))) for seed in range(20)
    }
    assert orders == {(0, 1, 0, 2, 0, 3), (0, 2, 0, 1, 0, 3)}


def test_refuses_inner_nodes_and_repeats():
    tree = make_tree([0, 1], [("right", "5")])
    with pytest.raises(ValueError, match="distinct terminals"):
        linearize(tree, [tree.nodes[1]], tree.nodes[2], random.Random(0))
    with pytest.raises(ValueError, match="distinct terminals"):
        linearize(tree, [tree.nodes[2]], tree.nodes[2], random.Random(0))


def test_lowest_common_ancestor():
    tree = make_tree([0, 1, 1, 2], [("right", "5")])
    assert lowest_common_ancestor(tree.path(tree.nodes[4]), tree.path(tree.nodes[3])).id == 1
