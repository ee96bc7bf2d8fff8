"""The model's own verdict on a solution (paper, section 2.3): Psi' keeps the correct terminals it stands behind."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import yaml

from astro_hpc.cloning.prompts import fill, read_prompt_file
from astro_hpc.inference.engine import Engine, SampleRequest
from astro_hpc.run.seeds import derive_seed

_ROUNDING = 1e-9
"""0.55 of 20 verdicts are 11, and not 11.000000000000002."""


@dataclass(frozen=True)
class Decision:
    """On one solution.

    Attributes:
        accepted: the quorum stands behind it.
        tokens: generated for it.
        fits: the model's context held question and verdict; else it is refused unasked.
    """

    accepted: bool
    tokens: int = 0
    fits: bool = True


@dataclass(frozen=True)
class SelfEvaluator:
    """Samples verdicts of the policy and accepts a solution when enough of them do.

    Attributes:
        engine: samples the verdicts.
        render: makes a prompt of a question (the run's prompt style).
        num_samples: N, verdicts a solution.
        quorum: share of the N that must accept; a verdict that can't be read does not.
        seed: of the stage; each verdict's seed comes from it, the problem and the solution.
    """

    engine: Engine
    render: Callable[[str], str]
    num_samples: int
    quorum: float
    seed: int

    async def decide(self, problem: str, solutions: Sequence[str]) -> list[Decision]:
        """One decision for each solution of a problem; all their verdicts are in flight at once."""
        return list(await asyncio.gather(*(self._decide(problem, solution) for solution in solutions)))

    async def _decide(self, problem: str, solution: str) -> Decision:
        prompt = self._prompt
        question = fill(prompt.question, {"problem": problem, "solution": solution.strip()})
        ids = tuple(self.engine.tokenizer.encode(self.render(question), add_special_tokens=False))
        room = self.engine.max_model_len - len(ids)
        if room < 1:
            return Decision(False, fits=False)
        requests = [
            SampleRequest(
                ids,
                max_tokens=min(prompt.max_tokens, room),
                temperature=prompt.temperature,
                seed=derive_seed(self.seed, "self_evaluation", problem, solution, i),
            )
            for i in range(self.num_samples)
        ]
        samples = await asyncio.gather(*(self.engine.generate(request) for request in requests))
        votes = sum(prompt.accepts(sample.text) for sample in samples)
        tokens = sum(len(sample.token_ids) for sample in samples)
        return Decision(votes >= self.quorum * self.num_samples - _ROUNDING, tokens)

    @cached_property
    def _prompt(self) -> _Prompt:
        return _Prompt(**yaml.safe_load(read_prompt_file("self_evaluation")))


@dataclass(frozen=True)
class _Prompt:
    question: str
    verdict_pattern: str
    accepting: str
    max_tokens: int
    temperature: float

    def accepts(self, text: str) -> bool:
        verdicts = re.findall(self.verdict_pattern, text)
        return bool(verdicts) and verdicts[-1] == self.accepting
