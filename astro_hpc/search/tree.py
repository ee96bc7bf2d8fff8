"""The search tree as plain data: no engine, no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from astro_hpc.problems.problem import Problem

STATS = ("requests", "generated_tokens", "rollouts", "rollout_tokens", "merged_steps", "unknown_verdicts")
"""What `Tree.stats` counts; `merged_steps` are expansion samples that repeated a sibling."""


@dataclass
class Node:
    """A state: the problem and the steps down to here. Also holds the edge that leads into it.

    Attributes:
        id: index in `Tree.nodes`; 0 is the root, parents come before their children.
        parent: id of the parent; None at the root.
        depth: steps below the root.
        step: text of the step that leads here, with its delimiter; empty at the root.
        token_ids: the step's tokens as sampled, end-of-sequence excluded.
        logprob: sum of the step's token log-probabilities (natural log, untempered).
        prior: P(a|S), over the siblings; 1 at the root.
        visits: N(S), times a backup passed this state.
        edge_visits: N(S, a) of the edge into this node, times it was selected.
        q: Q(S, a) of the edge into this node, in [0, 1].
        reward: R(S), mean verdict of the rollouts from here, or the verdict itself at a terminal.
        terminal: the step holds a final answer (or can't go on); never expanded.
        outcome: the verdict at a terminal: "right", "wrong" or "unknown"; None elsewhere.
        answer: the extracted answer at a terminal, normalised as the verifier compares it; None where there is none.
        origin: "root", "expansion", or "rollout" (a kept rollout's step).
        children: ids, in order of creation.
    """

    id: int
    parent: int | None
    depth: int
    step: str = ""
    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    prior: float = 1.0
    visits: int = 0
    edge_visits: int = 0
    q: float = 0.0
    reward: float = 0.0
    terminal: bool = False
    outcome: str | None = None
    answer: str | None = None
    origin: str = "expansion"
    children: list[int] = field(default_factory=list)


@dataclass
class Tree:
    """A problem's search tree.

    Attributes:
        nodes: by id; the root first.
        stats: numbers about its making (generated tokens, rollouts, seconds, ...).
    """

    problem: Problem
    nodes: list[Node]
    stats: dict[str, float] = field(default_factory=dict)

    @property
    def root(self) -> Node:
        """The state that is the bare problem."""
        return self.nodes[0]

    def children(self, node: Node) -> list[Node]:
        """The node's children in order of creation."""
        return [self.nodes[i] for i in node.children]

    def path(self, node: Node) -> list[Node]:
        """Nodes from the root to `node`, both included."""
        path = [node]
        while path[-1].parent is not None:
            path.append(self.nodes[path[-1].parent])
        return path[::-1]

    def terminals(self, outcome: str | None = None) -> Iterator[Node]:
        """Terminal nodes depth first, of one outcome or of all."""
        stack = [0]
        while stack:
            node = self.nodes[stack.pop()]
            if node.terminal and (outcome is None or node.outcome == outcome):
                yield node
            stack.extend(reversed(node.children))

    @property
    def solved(self) -> bool:
        """At least one terminal is right: the paper's valid tree."""
        return any(node.outcome == "right" for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` undoes it."""
        nodes = []
        for node in self.nodes:
            row = dict(vars(node))
            row["token_ids"] = list(node.token_ids)
            nodes.append(row)
        return {"problem": self.problem.to_json(), "nodes": nodes, "stats": self.stats}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Tree:
        """Undoes `to_json`."""
        nodes = [Node(**{**n, "token_ids": tuple(n["token_ids"])}) for n in row["nodes"]]
        return cls(Problem.from_json(row["problem"]), nodes, dict(row["stats"]))
