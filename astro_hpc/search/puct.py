"""PUCT selection and the paper's backup (section 2.2), on the tree alone.

How the counts hang together. A backup passes every state from the reached leaf up to the root, so N(S) of a
state and N(S, a) of the edge into it are the same number, and the root's N(S) is the number of iterations. The
first time an edge is selected its child is expanded, each later time one of the child's own edges is selected:
an expanded child S' has N(S') = 1 + sum_i N(S', a_i). New children start at N = 0 with Q = R; they count for
their ancestors once they are selected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from astro_hpc.search.tree import Node, Tree


def is_expanded(tree: Tree, node: Node) -> bool:
    """Whether next steps have been sampled at `node`; kept rollouts below it don't count."""
    return any(child.origin == "expansion" for child in tree.children(node))


def puct(node: Node, parent: Node, c_puct: float) -> float:
    """Q(S,a) + c_puct * P(a|S) * sqrt(N(S)) / (1 + N(S,a)), for the edge from `parent` (S) into `node`."""
    return node.q + c_puct * node.prior * math.sqrt(parent.visits) / (1 + node.edge_visits)


def select_leaf(tree: Tree, c_puct: float) -> Node:
    """Follow the best edges from the root to a state that isn't expanded: a leaf or a terminal. Ties: the first."""
    node = tree.root
    while is_expanded(tree, node):
        node = max(tree.children(node), key=lambda child: puct(child, node, c_puct))
    return node


def backup(tree: Tree, leaf: Node) -> None:
    """Count one visit of every state and edge from the root to `leaf`, and renew the edges' Q from below up."""
    node = leaf
    while True:
        node.visits += 1
        if node.parent is None:
            return
        node.edge_visits += 1
        node.q = edge_value(node, tree.children(node))
        node = tree.nodes[node.parent]


def edge_value(node: Node, children: Sequence[Node]) -> float:
    """Q of the edge into `node` (S'): ``(sum_i Q(S',a_i) N(S',a_i) + R(S')) / (sum_i N(S',a_i) + 1)``."""
    visits = sum(child.edge_visits for child in children)
    return (math.fsum(child.q * child.edge_visits for child in children) + node.reward) / (visits + 1)


def set_priors(siblings: Sequence[Node], masses: Sequence[float]) -> None:
    """Give all children of one state their P(a|S): the masses, normalised."""
    total = math.fsum(masses)
    for node, mass in zip(siblings, masses, strict=True):
        node.prior = mass / total if total > 0 else 1 / len(siblings)


def step_mass(logprob: float, num_tokens: int) -> float:
    """exp of the step's mean token log-probability: what a sampled step weighs before normalisation (ours)."""
    return math.exp(logprob / num_tokens) if num_tokens else 0.0
