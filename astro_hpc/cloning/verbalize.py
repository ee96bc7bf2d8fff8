"""Procedure cloning (paper, section 2.4): a node sequence becomes one long chain of thought.

The template verbaliser takes each step's text as the policy wrote it and puts phrases from a file in between, so it
needs no language model. What it deviates in from the paper: steps are not rewritten, and a backtrack quotes the step
gone back to where the paper lets a model tell it in its own words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from astro_hpc.cloning.phrases import Phrases
from astro_hpc.search.tree import Node, Tree

SpanKind = Literal["step", "note", "reflection", "backtrack"]


@dataclass(frozen=True)
class Span:
    """A stretch of a trace's text.

    Attributes:
        start: first character, counted in the completion.
        end: behind the last character; the white space that follows belongs to no span.
        kind: `step`, `note` (what an attempt gave), `reflection` or `backtrack`.
        node: the tree's node: the step itself, the one noted or reflected on, or the one gone back to.
    """

    start: int
    end: int
    kind: SpanKind
    node: int


@dataclass
class Trace:
    """A chain of thought and the directed graph it tells.

    Attributes:
        text: the completion.
        spans: in the order of the text, without overlap.
        path: ids of the tree's nodes in the order of the sequence, from the root.
    """

    text: str = ""
    spans: list[Span] = field(default_factory=list)
    path: list[int] = field(default_factory=list)

    def graph(self, tree: Tree) -> dict[str, Any]:
        """The JSON form: nodes (steps), edges in the order they are walked, and spans."""
        nodes = [
            {
                "id": node.id,
                "depth": node.depth,
                "q": round(node.q, 6),
                "visits": node.visits,
                "outcome": node.outcome or "",
                "answer": node.answer or "",
            }
            for node in (tree.nodes[i] for i in dict.fromkeys(self.path))
        ]
        edges = [
            {"source": a, "target": b, "kind": "forward" if tree.nodes[b].parent == a else "backtrack"}
            for a, b in zip(self.path, self.path[1:], strict=False)
        ]
        return {"nodes": nodes, "edges": edges, "spans": [vars(span).copy() for span in self.spans]}


@dataclass(frozen=True)
class TemplateVerbalizer:
    """Writes traces from phrases; no model needed.

    Attributes:
        separator: the style's step delimiter; put behind each phrase, and behind a step without white space at its end.
        reflect_min_q: a confident reflection may follow a step whose Q is at least this...
        reflect_rate: ...and does at this rate.
        attempt_note: gives the sentence that tells what a terminal's attempt came to, or None where there is none.
    """

    phrases: Phrases
    separator: str = "\n"
    reflect_min_q: float = 0.75
    reflect_rate: float = 0.2
    attempt_note: Callable[[Tree, Node], str | None] | None = None

    def __call__(self, tree: Tree, sequence: Sequence[Node], rng: random.Random, *, reflect: bool = True) -> Trace:
        """Write out a sequence of `linearize`.

        Args:
            tree: where the nodes are from.
            sequence: from the root to a correct terminal.
            rng: draws wordings and reflections.
            reflect: off for the direct arm: the steps alone. Only for sequences that never go back.

        Raises:
            ValueError: neighbours in `sequence` are not parent and child or descendant and ancestor.
        """
        text = _Text(self.separator)
        for i, node in enumerate(sequence):
            following = sequence[i + 1] if i + 1 < len(sequence) else None
            walked = i > 0 and node.parent == sequence[i - 1].id
            if walked:
                text.add(node.step, "step", node.id)
            if following is not None and following.parent == node.id:
                if reflect and walked and node.q >= self.reflect_min_q and rng.random() < self.reflect_rate:
                    text.add(rng.choice(self.phrases.confident), "reflection", node.id)
                continue
            if following is not None and following.id not in {above.id for above in tree.path(node)[:-1]}:
                raise ValueError(f"node {following.id} is neither a child nor an ancestor of node {node.id}")
            if not reflect:
                if following is not None:
                    raise ValueError("a trace without reflections can't go back")
                continue
            if self.attempt_note is not None and (note := self.attempt_note(tree, node)):
                text.add(note, "note", node.id)
            if following is None:
                text.add(rng.choice(self.phrases.confident), "reflection", node.id)
            else:
                text.add(rng.choice(self.phrases.doubt), "reflection", node.id, behind=self.phrases.joiner)
                text.add(self.phrases.say_backtrack(following.step, rng), "backtrack", following.id)
        return Trace(text.value.rstrip(), text.spans, [node.id for node in sequence])


class _Text:
    """Text under construction, with its spans."""

    def __init__(self, separator: str) -> None:
        self.value = ""
        self.spans: list[Span] = []
        self.separator = separator

    def add(self, piece: str, kind: SpanKind, node: int, behind: str | None = None) -> None:
        stripped = piece.strip()
        start = len(self.value) + (len(piece) - len(piece.lstrip()) if stripped else 0)
        self.spans.append(Span(start, start + len(stripped), kind, node))
        if not piece[-1:].isspace():
            piece += self.separator if behind is None else behind
        self.value += piece


def replay(graph: Mapping[str, Any]) -> list[int]:
    """Map a trace's graph back to its path: node ids from the root, in the order the text walks them.

    Raises:
        ValueError: the edges don't join, or the spans tell another path than the edges.
    """
    path = [graph["edges"][0]["source"]] if graph["edges"] else []
    for edge in graph["edges"]:
        if edge["source"] != path[-1]:
            raise ValueError(f"edge {edge['source']} -> {edge['target']} starts elsewhere than at node {path[-1]}")
        path.append(edge["target"])
    told = [span["node"] for span in graph["spans"] if span["kind"] in ("step", "backtrack")]
    if told != path[1:]:
        raise ValueError("the text walks another path than the edges")
    return path
