"""The model's own verdict on a solution (paper, section 2.3): Psi' keeps the correct terminals it stands behind."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import yaml

from astro_hpc.run.seeds import derive_seed

if TYPE_CHECKING:
    from astro_hpc.inference.engine import Engine


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

    def accepts(self, solutions: Sequence[tuple[str, str]]) -> list[bool]:
        """One decision for each (problem text, solution text), all sampled in one batch."""
        from astro_hpc.inference.engine import SampleRequest

        prompt = _load_prompt()
        requests = []
        for problem, solution in solutions:
            question = prompt.question.replace("{problem}", problem, 1).replace("{solution}", solution.strip(), 1)
            ids = tuple(self.engine.tokenizer.encode(self.render(question), add_special_tokens=False))
            requests += [
                SampleRequest(
                    ids,
                    max_tokens=prompt.max_tokens,
                    temperature=prompt.temperature,
                    seed=derive_seed(self.seed, "self_evaluation", problem, solution, i),
                )
                for i in range(self.num_samples)
            ]
        votes = [prompt.accepts(sample.text) for sample in self.engine.generate_many(requests)]
        return [
            sum(votes[i * self.num_samples : (i + 1) * self.num_samples]) >= self.quorum * self.num_samples
            for i in range(len(solutions))
        ]


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


def _load_prompt() -> _Prompt:
    text = resources.files("astro_hpc.cloning.prompts").joinpath("self_evaluation.yaml").read_text(encoding="utf-8")
    return _Prompt(**yaml.safe_load(text))
