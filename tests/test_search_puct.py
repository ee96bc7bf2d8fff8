"""PUCT and the backup formula, on trees worked out by hand and on random ones."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astro_hpc.problems.problem import Problem
from astro_hpc.search.puct import backup, edge_value, is_expanded, puct, select_leaf, set_priors, step_mass
from astro_hpc.search.tree import Node, Tree

PROBLEM = Problem("p/1", "1 + 1", "2")


def test_a_tree_worked_out_by_hand():
    """c = 1. Root: 1 (R 1/2, P .6) and 2 (R 1/4, P .4); below 1: 3 (R 0) and 4 (right); below 2: 5 (R 1/2)."""
    tree = Tree(PROBLEM, [Node(0, None, 0, origin="root")])
    seen = []

    def iterate() -> None:
        leaf = select_leaf(tree, 1.0)
        if leaf.id == 0:
            _add(tree, 0, reward=0.5, prior=0.6)
            _add(tree, 0, reward=0.25, prior=0.4)
        elif leaf.id == 1:
            _add(tree, 1, reward=0.0, prior=0.5)
            _add(tree, 1, reward=1.0, prior=0.5, outcome="right")
        elif leaf.id == 2:
            _add(tree, 2, reward=0.5, prior=1.0)
        backup(tree, leaf)
        seen.append(leaf.id)

    iterate()  # the root is expanded
    assert _counts(tree) == {0: (1, 0, 0.0), 1: (0, 0, 0.5), 2: (0, 0, 0.25)}
    iterate()  # 1: .5 + .6*1 = 1.1 beats .25 + .4*1 = .65
    assert _counts(tree)[1] == (1, 1, 0.5)
    assert puct(tree.nodes[1], tree.root, 1.0) == pytest.approx(0.5 + 0.6 * math.sqrt(2) / 2)
    iterate()  # 1: .924 beats .816; below it 4: 1 + .5 beats 0 + .5
    assert _counts(tree) == {
        0: (3, 0, 0.0),
        1: (2, 2, (1 * 1 + 0.5) / 2),
        2: (0, 0, 0.25),
        3: (0, 0, 0.0),
        4: (1, 1, 1.0),
    }
    iterate()  # 1: .75 + .6*1.732/3 = 1.096 beats .25 + .4*1.732 = .943; 4 again, which only backs up
    iterate()  # 1: .833 + .6*2/4 = 1.133 beats .25 + .4*2 = 1.05
    assert _counts(tree)[4] == (3, 3, 1.0)
    assert _counts(tree)[1] == (4, 4, (1 * 3 + 0.5) / 4)
    iterate()  # 2: .25 + .4*2.236 = 1.1444 beats .875 + .6*2.236/5 = 1.1433
    assert _counts(tree)[2] == (1, 1, 0.25)
    iterate()  # 1: .875 + .6*2.449/5 = 1.169 beats .25 + .4*2.449/2 = .740
    assert seen == [0, 1, 4, 4, 4, 2, 4]
    assert _counts(tree) == {
        0: (7, 0, 0.0),
        1: (5, 5, pytest.approx((1 * 4 + 0.5) / 5)),
        2: (1, 1, 0.25),
        3: (0, 0, 0.0),
        4: (4, 4, 1.0),
        5: (0, 0, 0.5),
    }
    backup(tree, tree.nodes[5])
    assert _counts(tree)[5] == (1, 1, 0.5)
    assert _counts(tree)[2] == (2, 2, (0.5 * 1 + 0.25) / 2)


def test_edge_value_is_the_papers_formula():
    node = Node(0, None, 0, reward=0.25)
    children = [Node(1, 0, 1, q=0.5, edge_visits=3), Node(2, 0, 1, q=1.0, edge_visits=1), Node(3, 0, 1, q=0.9)]
    assert edge_value(node, []) == 0.25
    assert edge_value(node, children) == pytest.approx((0.5 * 3 + 1.0 * 1 + 0.9 * 0 + 0.25) / (3 + 1 + 0 + 1))


def test_priors_are_normalised_and_ties_go_to_the_first():
    tree = Tree(PROBLEM, [Node(0, None, 0, origin="root", visits=1)])
    for _ in range(3):
        _add(tree, 0, reward=0.0, prior=0.0)
    set_priors(tree.children(tree.root), [1.0, 1.0, 2.0])
    assert [child.prior for child in tree.children(tree.root)] == [0.25, 0.25, 0.5]
    assert select_leaf(tree, 1.0).id == 3
    set_priors(tree.children(tree.root), [0.0, 0.0, 0.0])
    assert [child.prior for child in tree.children(tree.root)] == [1 / 3] * 3
    assert select_leaf(tree, 1.0).id == 1


def test_a_steps_mass_is_exp_of_its_mean_token_logprob():
    assert step_mass(-3.0, 6) == pytest.approx(math.exp(-0.5))
    assert step_mass(0.0, 0) == 0.0


def test_kept_rollouts_do_not_make_a_state_expanded():
    tree = Tree(PROBLEM, [Node(0, None, 0, origin="root")])
    _add(tree, 0, reward=1.0, prior=1.0, origin="rollout")
    assert not is_expanded(tree, tree.root)
    _add(tree, 0, reward=1.0, prior=1.0)
    assert is_expanded(tree, tree.root)


@given(st.integers(0, 2**32), st.integers(1, 40), st.floats(0, 4), st.integers(1, 5))
def test_visits_add_up_and_q_is_the_mean_of_what_was_reached(seed, iterations, c_puct, most_children):
    rng = random.Random(seed)
    tree = Tree(PROBLEM, [Node(0, None, 0, origin="root")])
    reached: dict[int, list[float]] = {}
    for number in range(1, iterations + 1):
        before = {node.id: node.q for node in tree.nodes if node.edge_visits}
        leaf = select_leaf(tree, c_puct)
        if not leaf.terminal and leaf.depth < 6:
            for _ in range(rng.randint(1, most_children)):
                outcome = rng.choice([None, None, "right", "wrong"])
                reward = float(outcome == "right") if outcome else rng.randint(0, 4) / 4
                _add(tree, leaf.id, reward, rng.random(), outcome)
        backup(tree, leaf)
        path = tree.path(leaf)
        for node in path[1:]:
            reached.setdefault(node.id, []).append(leaf.reward)
            if leaf.outcome == "right" and node.id in before:
                assert node.q >= before[node.id] - 1e-12
        assert tree.root.visits == number
    for node in tree.nodes:
        assert 0.0 <= node.q <= 1.0 + 1e-12
        below = sum(child.edge_visits for child in tree.children(node))
        if node.parent is not None:
            assert node.visits == node.edge_visits
            if node.id in reached:
                assert node.q == pytest.approx(sum(reached[node.id]) / len(reached[node.id]))
            else:
                assert (node.edge_visits, node.q) == (0, node.reward)
        if is_expanded(tree, node):
            assert node.visits == 1 + below
        else:
            assert below == 0


def _add(tree: Tree, parent: int, reward: float, prior: float, outcome: str | None = None, origin="expansion") -> None:
    node = Node(len(tree.nodes), parent, tree.nodes[parent].depth + 1, origin=origin, reward=reward, q=reward)
    node.prior, node.outcome, node.terminal = prior, outcome, outcome is not None
    tree.nodes.append(node)
    tree.nodes[parent].children.append(node.id)


def _counts(tree: Tree) -> dict[int, tuple[int, int, float]]:
    return {node.id: (node.visits, node.edge_visits, node.q) for node in tree.nodes}
