"""One tree becomes SFT examples of both arms (paper, sections 2.3 and 2.4).

The astro arm holds `num_direct` plain solutions (k = 0) and `num_search` solutions that first fail k >= 1 times; the
direct arm holds plain solutions of the same tree, as many as the astro arm (`equal_arms`), without any reflection.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from astro_hpc.cloning.linearize import correct_terminals, incorrect_terminals, linearize, sample_incorrect
from astro_hpc.cloning.verbalize import TemplateVerbalizer, Trace, Verbalizer
from astro_hpc.config.schema import Arm, RunConfig
from astro_hpc.problems import signs
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.seeds import derive_seed
from astro_hpc.search.tree import Node, Tree
from astro_hpc.verifier.extract import extract_answer

KeepTrace = Callable[[str, Trace], None]
"""(name, trace): called once for each trace, as soon as it is written."""

_DRAWS_PER_EXAMPLE = 8
"""Tries to find a sequence that the tree hasn't given yet."""


@dataclass
class TreeExamples:
    """What became of one tree.

    Attributes:
        rows: by arm; see `TreeCloner.examples`.
        counts: of what each filter took, by group (`trees`, `astro`, `direct`, `verbalizer`).
        too_long: tokens of the examples that SFT would not take.
    """

    rows: dict[Arm, list[dict[str, Any]]] = field(default_factory=lambda: {"astro": [], "direct": []})
    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in ("trees", "astro", "direct", "verbalizer")}
    )
    too_long: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {"rows": self.rows, "counts": {k: dict(v) for k, v in self.counts.items()}, "too_long": self.too_long}


@dataclass(frozen=True)
class TreeCloner:
    """Makes the examples of trees, each by itself.

    Attributes:
        verbalizer: finds the words.
        template: stands in where the verbaliser's text would change the answer.
        count_tokens: tokens of (prompt, completion) and end of sequence; None: not counted, nothing is too long.
    """

    cfg: RunConfig
    style: PromptStyle
    verbalizer: Verbalizer
    template: TemplateVerbalizer
    count_tokens: Callable[[str, str], int] | None = None

    def sound_solutions(self, tree: Tree) -> list[Node]:
        """Psi: the correct terminals, where asked for only those whose steps agree with their answer."""
        return self._sound(tree, correct_terminals(tree))

    async def examples(
        self, tree: Tree, accepted: Sequence[Node], finished: Mapping[str, Trace], keep: KeepTrace
    ) -> TreeExamples:
        """The examples of one tree: a function of the tree, `accepted` and the settings alone.

        A row is `{"id", "problem_id", "prompt", "completion", "messages", "answer", "arm", "k", "repeat",
        "num_tokens", "graph"}`: k is the number of wrong paths; `repeat` is 0 unless the direct arm ran out of
        different solutions; `num_tokens` (prompt, completion and end of sequence) is 0 without a tokenizer.

        Args:
            accepted: Psi', the solutions that passed self-evaluation.
            finished: traces of an earlier attempt by name.
            keep: is handed each new trace.
        """
        return await _Examples(self, tree, accepted, finished, keep).make()

    def answer_of(self, text: str) -> str | None:
        """The answer that the verifier reads in a text, as it is written there but for white space."""
        answer = extract_answer(text, self.cfg.verifier.answer_markers)
        return None if answer is None else " ".join(answer.split())

    def _sound(self, tree: Tree, terminals: list[Node]) -> list[Node]:
        if not self.cfg.clone.check_steps or tree.problem.checker != signs.CHECKER:
            return terminals
        return [t for t in terminals if signs.steps_agree([n.step for n in tree.path(t)[1:-1]], t.answer or "")]

    def sound_failures(self, tree: Tree) -> list[Node]:
        """Lambda, under the same condition."""
        return self._sound(tree, incorrect_terminals(tree))


class _Examples:
    """The examples of one tree in the making."""

    def __init__(
        self, cloner: TreeCloner, tree: Tree, accepted: Sequence[Node], finished: Mapping[str, Trace], keep: KeepTrace
    ) -> None:
        self.cloner, self.tree, self.accepted, self.finished, self.keep = cloner, tree, accepted, finished, keep
        self.settings = cloner.cfg.clone
        self.prompt = cloner.style.render(tree.problem.text)
        self.result = TreeExamples()

    async def make(self) -> TreeExamples:
        rng = self._draws("astro")
        sequences = [*self._direct_sequences(rng), *self._search_sequences(rng)]
        self.result.counts["astro"]["wanted"] += self.settings.num_direct + self.settings.num_search
        traces = await self._all(
            self._trace(sequence, f"astro/{index}", reflect=True) for index, (_, sequence) in enumerate(sequences)
        )
        for index, ((k, sequence), trace) in enumerate(zip(sequences, traces, strict=True)):
            if (reason := self._refusal(sequence[-1], trace)) is None:
                self._add_row("astro", index, k, sequence[-1], trace)
            else:
                self.result.counts["astro"][reason] += 1
        await self._make_direct_arm()
        return self.result

    async def _make_direct_arm(self) -> None:
        """As many plain solutions as the astro arm has examples: different ones first, then the same again."""
        counts, equal = self.result.counts["direct"], self.settings.equal_arms
        wanted = len(self.result.rows["astro"]) if equal else self.settings.num_direct
        counts["wanted"] += wanted
        nodes = _different_solutions(self.tree, self.accepted, self._draws("direct"))
        usable: list[tuple[Node, Trace]] = []
        refusals: list[str] = []
        while nodes and len(usable) < wanted:
            batch, nodes = nodes[: wanted - len(usable)], nodes[wanted - len(usable) :]
            names = [f"direct/{node.id}" for node in batch]
            traces = await self._all(self._plain(node, name) for node, name in zip(batch, names, strict=True))
            for node, trace in zip(batch, traces, strict=True):
                if (reason := self._refusal(node, trace)) is None:
                    usable.append((node, trace))
                else:
                    refusals.append(reason)
        if not usable:
            if wanted:
                counts[refusals[0]] += wanted
            return
        different = len(usable)
        again = range(different, wanted if equal else different)
        repeats = await self._all(self._plain(usable[i % different][0], f"direct/again/{i}") for i in again)
        for i, trace in zip(again, repeats, strict=True):
            node, first = usable[i % different]
            usable.append((node, trace if self._refusal(node, trace) is None else first))
        for index, (node, trace) in enumerate(usable):
            self._add_row("direct", index, 0, node, trace, repeat=index // different)
        counts["repeats"] += len(repeats)
        counts["duplicate"] += wanted - len(usable)

    # --- sequences ------------------------------------------------------------------------------------------------

    def _direct_sequences(self, rng: random.Random) -> Iterator[tuple[int, list[Node]]]:
        nodes = _different_solutions(self.tree, self.accepted, rng)
        self.result.counts["astro"]["duplicate"] += max(0, self.settings.num_direct - len(nodes))
        for node in nodes[: self.settings.num_direct]:
            yield 0, self.tree.path(node)

    def _search_sequences(self, rng: random.Random) -> Iterator[tuple[int, list[Node]]]:
        settings, counts = self.settings, self.result.counts["astro"]
        incorrect = self.cloner.sound_failures(self.tree)
        max_k = min(settings.max_incorrect, len({node.answer for node in incorrect}))
        if max_k < settings.min_incorrect:
            counts["no_incorrect_terminal"] += settings.num_search
            return
        leave_at_q = settings.backtrack_max_q if settings.backtrack_from == "inner" else None
        seen: set[tuple[int, ...]] = set()
        for _ in range(settings.num_search * _DRAWS_PER_EXAMPLE):
            if len(seen) == settings.num_search:
                break
            chosen = sample_incorrect(incorrect, rng.randint(settings.min_incorrect, max_k), rng)
            sequence = linearize(self.tree, chosen, rng.choice(self.accepted), rng, leave_at_q)
            key = tuple(node.id for node in sequence)
            if key not in seen:
                seen.add(key)
                yield len(chosen), sequence
        counts["duplicate"] += settings.num_search - len(seen)

    # --- traces and rows ------------------------------------------------------------------------------------------

    def _plain(self, node: Node, name: str) -> Awaitable[Trace]:
        return self._trace(self.tree.path(node), name, reflect=False)

    async def _trace(self, sequence: Sequence[Node], name: str, *, reflect: bool) -> Trace:
        trace = self.finished.get(name)
        if trace is None:
            trace = await self.cloner.verbalizer.write(self.tree, sequence, name, reflect=reflect)
            if trace.counts and not self._keeps_answer(sequence[-1], trace):
                template = await self.cloner.template.write(self.tree, sequence, name, reflect=reflect)
                template.counts = trace.counts + Counter({"traces/answer_changed": 1})
                trace = template
            self.keep(name, trace)
        self.result.counts["verbalizer"] += trace.counts
        return trace

    def _keeps_answer(self, last: Node, trace: Trace) -> bool:
        """Whether a trace ends in the very answer that was judged at its tree's node."""
        return self.cloner.answer_of(trace.text) == self.cloner.answer_of(solution_text(self.tree, last))

    def _refusal(self, last: Node, trace: Trace) -> str | None:
        """Why a trace is no example: it ends in another answer than its tree's node, or is longer than SFT takes."""
        if not self._keeps_answer(last, trace):
            return "answer_changed"
        if (tokens := self._num_tokens(trace)) > self.cloner.cfg.sft.seq_length:
            self.result.too_long.append(tokens)
            return "too_long"
        return None

    def _num_tokens(self, trace: Trace) -> int:
        return self.cloner.count_tokens(self.prompt, trace.text) if self.cloner.count_tokens else 0

    def _add_row(self, arm: Arm, index: int, k: int, last: Node, trace: Trace, repeat: int = 0) -> None:
        problem, counts = self.tree.problem, self.result.counts[arm]
        counts["written"] += 1
        counts[f"k={k}"] += 1
        self.result.rows[arm].append(
            {
                "id": f"{problem.id}/{arm}/{index}",
                "problem_id": problem.id,
                "prompt": self.prompt,
                "completion": trace.text,
                "messages": [
                    {"role": "user", "content": problem.text},
                    {"role": "assistant", "content": trace.text},
                ],
                "answer": last.answer or "",
                "arm": arm,
                "k": k,
                "repeat": repeat,
                "num_tokens": self._num_tokens(trace),
                "graph": trace.graph(self.tree),
            }
        )

    def _draws(self, arm: Arm) -> random.Random:
        return random.Random(derive_seed(self.cloner.cfg.seed, "clone", arm, self.tree.problem.id))

    @staticmethod
    async def _all(traces: Iterator[Awaitable[Trace]]) -> list[Trace]:
        return list(await asyncio.gather(*traces))


def solution_text(tree: Tree, node: Node) -> str:
    """The steps that lead to `node`, as the policy wrote them."""
    return "".join(step.step for step in tree.path(node))


def _different_solutions(tree: Tree, nodes: Sequence[Node], rng: random.Random) -> list[Node]:
    """`nodes` shuffled, without those whose solution reads the same as another's."""
    by_text = {solution_text(tree, node).strip(): node for node in reversed(nodes)}
    different = sorted(by_text.values(), key=lambda node: node.id)
    rng.shuffle(different)
    return different
