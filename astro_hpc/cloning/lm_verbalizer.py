"""Procedure cloning by a language model (paper, section 2.4): node by node, conditioned on the trace so far.

The model rewrites steps and tells where a trace goes back to; the reflections stay the fixed phrases. What it writes
goes through `checks`; a refused text is asked for again with another seed, and after the last try the template's
words stand in. Many traces are under way at once, the nodes of one follow each other.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from astro_hpc.cloning.checks import Rules, check_backtrack, check_step, sentences_of, shingles_of, tidy
from astro_hpc.cloning.phrases import Phrases
from astro_hpc.cloning.prompts import Task, VerbalizePrompts, encode_task, special_tokens
from astro_hpc.cloning.verbalize import Piece, TemplateVerbalizer, Trace, TraceText, walk
from astro_hpc.config.base import ConfigError
from astro_hpc.inference.engine import Engine, SampleRequest
from astro_hpc.run.seeds import derive_seed
from astro_hpc.search.tree import Node, Tree


@dataclass(frozen=True)
class LMVerbalizer:
    """Writes traces with a language model.

    Attributes:
        engine: samples the words.
        template: says what the model isn't asked for, and what it fails at.
        prompts: the few-shot prompts.
        delimiter: the style's; ends a step.
        answer_markers: what precedes a final answer, for the verifier and in the prompt style.
        answer_of: the answer that the verifier would read in a text; None where there is none.
        stop: the style's stop strings, where the policy itself verbalises.
        temperature: of all samples.
        max_tokens: of one piece.
        retries: further tries after a refused text.
        seed: of the stage; each sample's seed comes from it, the problem, the trace, the node and the try.
        slots: traces under way at once.
    """

    engine: Engine
    template: TemplateVerbalizer
    prompts: VerbalizePrompts
    delimiter: str
    answer_markers: tuple[str, ...]
    answer_of: Callable[[str], str | None]
    stop: tuple[str, ...] = ()
    temperature: float = 0.7
    max_tokens: int = 512
    retries: int = 2
    seed: int = 0
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(64))

    @staticmethod
    def check(prompts: VerbalizePrompts, phrases: Phrases) -> None:
        """Whether prompts and phrases go together.

        Raises:
            ConfigError: a backtrack that the model writes would not be counted as one.
        """
        for task in (prompts.backtrack, prompts.restart):
            if phrases.count_backtracks(task.prefix) != 1:
                raise ConfigError(
                    f"clone.verbalizer_prompts: {task.prefix!r} must match backtrack_pattern of clone.phrases exactly "
                    "once, or backtracks would not be counted; change the pattern or the prefix"
                )

    async def write(self, tree: Tree, sequence: Sequence[Node], name: str, *, reflect: bool = True) -> Trace:
        """See `Verbalizer.write`."""
        async with self.slots:
            return await _Writing(self, tree, name).write(sequence, reflect)

    @cached_property
    def rules(self) -> Rules:
        """What the model's words are held against."""
        phrases, prompts = self.template.phrases, self.prompts
        special = dict.fromkeys([*special_tokens(self.engine.tokenizer), *(s for s in self.stop if s.strip())])
        return Rules(
            answer_of=self.answer_of,
            count_backtracks=phrases.count_backtracks,
            answer_markers=self.answer_markers,
            delimiter=self.delimiter,
            reflections=sentences_of([*phrases.doubt, *phrases.confident]),
            leaks=(*prompts.leaks(), *(" ".join(token.lower().split()) for token in special)),
            shingles=shingles_of(prompts.texts()),
            growth=prompts.max_growth,
            spare_chars=prompts.spare_chars,
        )


class _Writing:
    """One trace in the making."""

    def __init__(self, lm: LMVerbalizer, tree: Tree, name: str) -> None:
        self.lm, self.tree, self.name = lm, tree, name
        self.rules = lm.rules
        self.text = TraceText(lm.template)
        self.counts: Counter[str] = Counter()

    async def write(self, sequence: Sequence[Node], reflect: bool) -> Trace:
        rng = self.lm.template.draws(self.tree, self.name)
        pieces = walk(self.tree, sequence, rng, self.lm.template.reflections, reflect=reflect)
        for number, piece in enumerate(pieces):
            words = await self._ask(piece, number) if piece.kind in ("step", "backtrack") else None
            if words is None:
                self.text.add(piece, self.lm.template.say(self.tree, piece, rng))
            else:
                self.text.add(piece, words, by="lm")
        trace = self.text.finish(sequence)
        trace.counts = self.counts
        return trace

    async def _ask(self, piece: Piece, number: int) -> str | None:
        """The model's words for a step or a backtrack; None (counted) where no try was good."""
        self.counts["pieces"] += 1
        reason = "prompt_too_long"
        request = self._request(piece)
        for attempt in range(1 + self.lm.retries if request is not None else 0):
            assert request is not None
            names = ("verbalize", self.tree.problem.id, self.name, piece.kind, piece.node.id, number, attempt)
            sample = await self.lm.engine.generate(replace(request, seed=derive_seed(self.lm.seed, *names)))
            self.counts["tries"] += 1
            self.counts["generated_tokens"] += len(sample.token_ids)
            words, refusal = self._judge(piece, sample.text, sample.finish_reason == "stop")
            if refusal is None:
                self.counts["written"] += 1
                return words
            reason = refusal
            self.counts[f"refused/{reason}"] += 1
        self.counts[f"template/{reason}"] += 1
        return None

    def _request(self, piece: Piece) -> SampleRequest | None:
        """What to ask for a piece; None where the prompt leaves the model no room."""
        values = {
            "problem": self.tree.problem.text,
            "context": self.text.value.rstrip() or self.lm.prompts.nothing_yet,
            "step": piece.node.step.strip().removesuffix(self.lm.delimiter.strip()).strip(),
        }
        tokens = encode_task(self._task(piece), values, self.lm.engine.tokenizer, self.lm.prompts.layout)
        room = self.lm.engine.max_model_len - len(tokens)
        if room < 1:
            return None
        stop = ("\n" if self.lm.delimiter.strip(" ") == "\n" else "\n\n", *self.lm.stop)
        if not self.lm.delimiter.isspace():
            stop = (self.lm.delimiter, *stop)
        return SampleRequest(tokens, min(self.lm.max_tokens, room), self.lm.temperature, stop=stop)

    def _task(self, piece: Piece) -> Task:
        if piece.kind == "step":
            return self.lm.prompts.step
        return self.lm.prompts.backtrack if piece.node.step.strip() else self.lm.prompts.restart

    def _judge(self, piece: Piece, said: str, complete: bool) -> tuple[str, str | None]:
        """The words as they would stand in the trace, and why they can't."""
        if not complete:
            return "", "unfinished"
        step = piece.node.step
        if len(said) > self.rules.growth * len(step) + 2 * self.rules.spare_chars:
            return "", "too_long"
        for stop in self.lm.stop:
            said = said.removesuffix(stop)
        words = tidy(said, self.lm.delimiter)
        context = f"{self.tree.problem.text}\n{self.text.value}"
        if piece.kind == "step":
            refusal = check_step(words, step=step, context=context, rules=self.rules)
            if not self.lm.delimiter.isspace() and step.endswith(self.lm.delimiter):
                words += self.lm.delimiter
            return words, refusal
        prefix = self._task(piece).prefix
        glue = " " if words[:1].isalnum() or words[:1] in "\\$(" else ""
        words = f"{prefix}{glue if words else ''}{words}"
        if words[-1] not in ".!?":
            words += "."
        if words == f"{prefix}." and step.strip():
            return words, "empty"
        return words, check_backtrack(words, step=step, context=context, rules=self.rules)
