"""Algorithm 1 of the paper (section 2.3): a search tree becomes a sequence of nodes that fails, goes back and succeeds.

The paper appends, path by path, the nodes not visited yet. That alone can tear the sequence: when the third path
shares more with the first than with the second, its unvisited nodes do not start below any ancestor of where the
second one ended. The sampled terminals come without an order, so we choose one that never tears: depth first through
the tree, children shuffled, with the child that leads to the chosen correct terminal last. In a depth-first order the
path before shares at least as much with the next one as any earlier path does; the lowest common ancestor of the two
is then the parent of the first unvisited node, and it is put in between as the place that is gone back to.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence

from astro_hpc.search.tree import Node, Tree


def correct_terminals(tree: Tree) -> list[Node]:
    """Psi: the terminals whose answer is right, depth first."""
    return list(tree.terminals("right"))


def incorrect_terminals(tree: Tree) -> list[Node]:
    """Lambda: the terminals whose answer is wrong, depth first.

    A terminal without an answer (cut off, malformed) or with the verdict "unknown" is left out: it can't be said to
    differ from another.
    """
    return [node for node in tree.terminals("wrong") if node.answer is not None]


def sample_incorrect(candidates: Sequence[Node], num: int, rng: random.Random) -> list[Node]:
    """At most `num` of `candidates` with pairwise different answers: answers drawn evenly, then a terminal of each."""
    by_answer: dict[str, list[Node]] = {}
    for node in candidates:
        if node.answer is not None:
            by_answer.setdefault(node.answer, []).append(node)
    answers = rng.sample(list(by_answer), min(num, len(by_answer)))
    return [rng.choice(by_answer[answer]) for answer in answers]


def linearize(
    tree: Tree, incorrect: Sequence[Node], correct: Node, rng: random.Random, leave_at_q: float | None = None
) -> list[Node]:
    """The node sequence that visits `incorrect` in a depth-first order and ends at `correct`.

    Starts at the root; each neighbouring pair is parent -> child or descendant -> ancestor; each terminal occurs
    once, and `correct` is last. A node occurs again only as the place gone back to.

    Args:
        leave_at_q: None: a wrong path is walked to its terminal (the paper). Else it is left at its first own step
            before the terminal whose Q is at most this, and walked to the end where there is none.

    Raises:
        ValueError: a node isn't a terminal, or the same one is given twice.
    """
    targets = [*incorrect, correct]
    if len({node.id for node in targets}) != len(targets) or not all(node.terminal for node in targets):
        raise ValueError("linearize needs distinct terminals")
    sequence: list[Node] = []
    visited: set[int] = set()
    previous: list[Node] = []
    paths = [tree.path(target) for target in _depth_first(tree, {node.id for node in targets}, correct, rng)]
    for path, following in zip(paths, [*paths[1:], None], strict=True):
        if previous:
            sequence.append(lowest_common_ancestor(previous, path))
        if following is not None and leave_at_q is not None:
            # Its own steps: below what it shares with the path before and with the one that follows.
            shared = lowest_common_ancestor(path, following).depth
            shared = max(shared, lowest_common_ancestor(path, previous).depth) if previous else shared
            early = next((i for i in range(shared + 1, len(path) - 1) if path[i].q <= leave_at_q), len(path) - 1)
            path = path[: early + 1]
        sequence += [node for node in path if node.id not in visited]
        visited.update(node.id for node in path)
        previous = path
    return sequence


def lowest_common_ancestor(first: Sequence[Node], second: Sequence[Node]) -> Node:
    """The last node that two paths from the same root share."""
    common = first[0]
    for a, b in zip(first, second, strict=False):
        if a.id != b.id:
            break
        common = a
    return common


def _depth_first(tree: Tree, targets: Collection[int], last: Node, rng: random.Random) -> Iterator[Node]:
    """The target terminals, depth first with shuffled children, the branch of `last` behind its siblings."""
    last_path = {node.id for node in tree.path(last)}
    leads: set[int] = set()
    for target in sorted(targets):
        leads.update(node.id for node in tree.path(tree.nodes[target]))
    stack = [0]
    while stack:
        node = tree.nodes[stack.pop()]
        if node.id in targets:
            yield node
        branches = [child for child in node.children if child in leads]
        rng.shuffle(branches)
        branches.sort(key=lambda child: child in last_path)
        stack.extend(reversed(branches))
