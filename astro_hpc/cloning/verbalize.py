"""Procedure cloning (paper, section 2.4): a node sequence becomes one long chain of thought.

`walk` says which pieces a sequence is told in; a verbaliser finds words for each. The template verbaliser here takes
each step's text as the policy wrote it and puts phrases from a file in between, so it needs no language model. What it
deviates in from the paper: steps are not rewritten, and a backtrack quotes the step gone back to where the paper lets
a model tell it in its own words. `lm_verbalizer` does as the paper does.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from astro_hpc.cloning.phrases import Phrases
from astro_hpc.run.seeds import derive_seed
from astro_hpc.search.tree import Node, Tree

PieceKind = Literal["step", "note", "confident", "doubt", "backtrack"]
SpanKind = Literal["step", "note", "reflection", "backtrack"]
Author = Literal["policy", "phrases", "lm"]

_SPAN_KINDS: dict[PieceKind, SpanKind] = {
    "step": "step",
    "note": "note",
    "confident": "reflection",
    "doubt": "reflection",
    "backtrack": "backtrack",
}


@dataclass(frozen=True)
class Piece:
    """What a stretch of a trace is to say.

    Attributes:
        node: the step itself, the one noted or reflected on, or the one gone back to.
    """

    kind: PieceKind
    node: Node


@dataclass(frozen=True)
class Span:
    """A stretch of a trace's text.

    Attributes:
        start: first character, counted in the completion.
        end: behind the last character; the white space that follows belongs to no span.
        kind: `step`, `note` (what an attempt gave), `reflection` or `backtrack`.
        node: the tree's node: the step itself, the one noted or reflected on, or the one gone back to.
        by: who wrote it: the searching `policy`, the `phrases` file, or the verbalising `lm`.
    """

    start: int
    end: int
    kind: SpanKind
    node: int
    by: Author


@dataclass
class Trace:
    """A chain of thought and the directed graph it tells.

    Attributes:
        text: the completion.
        spans: in the order of the text, without overlap.
        path: ids of the tree's nodes in the order of the sequence, from the root.
        counts: of its making: pieces, tries, what was rejected and why; empty for the template.
    """

    text: str = ""
    spans: list[Span] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def graph(self, tree: Tree) -> dict[str, Any]:
        """The JSON form: nodes (steps), edges in the order they are walked, and spans."""
        nodes = [
            {
                "id": node.id,
                "depth": node.depth,
                "q": round(float(node.q), 6),
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

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` undoes it."""
        return {**vars(self), "spans": [vars(span).copy() for span in self.spans], "counts": dict(self.counts)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Trace:
        """Undoes `to_json`."""
        return cls(row["text"], [Span(**span) for span in row["spans"]], list(row["path"]), Counter(row["counts"]))


class Verbalizer(Protocol):
    """Finds the words for a sequence."""

    async def write(self, tree: Tree, sequence: Sequence[Node], name: str, *, reflect: bool = True) -> Trace:
        """Write out a sequence of `linearize`.

        The trace depends on the tree, the sequence, the name and the settings alone: not on what else is in flight.

        Args:
            tree: where the nodes are from.
            sequence: from the root to a correct terminal.
            name: of the trace among its problem's; its draws are derived from it.
            reflect: off for the direct arm: the steps alone. Only for sequences that never go back.

        Raises:
            ValueError: neighbours in `sequence` are not parent and child or descendant and ancestor.
        """
        ...


@dataclass(frozen=True)
class Reflections:
    """Where a trace reflects.

    Attributes:
        min_q: a confident reflection may follow a step whose Q is at least this...
        rate: ...and does at this rate.
        fixed_phrase: off: no reflection anywhere, a backtrack stands alone (an ablation).
    """

    min_q: float = 0.75
    rate: float = 0.2
    fixed_phrase: bool = True


def walk(
    tree: Tree, sequence: Sequence[Node], rng: random.Random, reflections: Reflections, *, reflect: bool = True
) -> Iterator[Piece]:
    """The pieces that tell a sequence, in order.

    Raises:
        ValueError: neighbours in `sequence` are not parent and child or descendant and ancestor.
    """
    speak = reflect and reflections.fixed_phrase
    for i, node in enumerate(sequence):
        following = sequence[i + 1] if i + 1 < len(sequence) else None
        walked = i > 0 and node.parent == sequence[i - 1].id
        if walked:
            yield Piece("step", node)
        if following is not None and following.parent == node.id:
            if speak and walked and node.q >= reflections.min_q and rng.random() < reflections.rate:
                yield Piece("confident", node)
            continue
        if following is not None and following.id not in {above.id for above in tree.path(node)[:-1]}:
            raise ValueError(f"node {following.id} is neither a child nor an ancestor of node {node.id}")
        if not reflect:
            if following is not None:
                raise ValueError("a trace without reflections can't go back")
            continue
        yield Piece("note", node)
        if speak:
            yield Piece("confident" if following is None else "doubt", node)
        if following is not None:
            yield Piece("backtrack", following)


@dataclass(frozen=True)
class TemplateVerbalizer:
    """Writes traces from phrases; no model needed.

    Attributes:
        separator: the style's step delimiter; put behind each phrase, and behind a step without white space at its end.
        attempt_note: gives the sentence that tells what a terminal's attempt came to, or None where there is none.
        seed: of the stage; a trace's draws are derived from it, the problem and the trace's name.
    """

    phrases: Phrases
    separator: str = "\n"
    reflections: Reflections = Reflections()
    attempt_note: Callable[[Tree, Node], str | None] | None = None
    seed: int = 0

    async def write(self, tree: Tree, sequence: Sequence[Node], name: str, *, reflect: bool = True) -> Trace:
        """See `Verbalizer.write`."""
        return self(tree, sequence, self.draws(tree, name), reflect=reflect)

    def __call__(self, tree: Tree, sequence: Sequence[Node], rng: random.Random, *, reflect: bool = True) -> Trace:
        """As `write`, with the random numbers given."""
        text = TraceText(self)
        for piece in walk(tree, sequence, rng, self.reflections, reflect=reflect):
            text.add(piece, self.say(tree, piece, rng))
        return text.finish(sequence)

    def draws(self, tree: Tree, name: str) -> random.Random:
        """The random numbers of a trace."""
        return random.Random(derive_seed(self.seed, "verbalize", tree.problem.id, name))

    def say(self, tree: Tree, piece: Piece, rng: random.Random) -> str:
        """The words for one piece; empty where there is nothing to say."""
        if piece.kind == "step":
            return piece.node.step
        if piece.kind == "note":
            return (self.attempt_note(tree, piece.node) or "") if self.attempt_note is not None else ""
        if piece.kind == "backtrack":
            return self.phrases.say_backtrack(piece.node.step, rng)
        return rng.choice(self.phrases.confident if piece.kind == "confident" else self.phrases.doubt)


class TraceText:
    """A trace under construction."""

    def __init__(self, template: TemplateVerbalizer) -> None:
        self.value = ""
        self.spans: list[Span] = []
        self._separator, self._joiner = template.separator, template.phrases.joiner

    def add(self, piece: Piece, words: str, by: Author | None = None) -> None:
        """Append a piece's words; `by` is whoever a piece of this kind is by in a template."""
        if not words and piece.kind == "note":
            return
        stripped = words.strip()
        start = len(self.value) + (len(words) - len(words.lstrip()) if stripped else 0)
        author = by or ("policy" if piece.kind == "step" else "phrases")
        self.spans.append(Span(start, start + len(stripped), _SPAN_KINDS[piece.kind], piece.node.id, author))
        if not words[-1:].isspace():
            words += self._joiner if piece.kind == "doubt" else self._separator
        self.value += words

    def finish(self, sequence: Sequence[Node]) -> Trace:
        """The trace of what was added."""
        return Trace(self.value.rstrip(), self.spans, [node.id for node in sequence])


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
