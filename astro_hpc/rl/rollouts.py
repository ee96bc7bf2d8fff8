"""Rollouts: responses sampled from the policy, judged by the verifier, kept for replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from astro_hpc.inference.engine import Engine, SampleRequest
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.verifier.pool import Verdict, VerifierPool


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt.

    Attributes:
        prompt_token_ids, token_ids: as the engine saw and sampled them; an end-of-sequence token is the last.
        logprobs: one for each of `token_ids`, natural log, as the engine reported.
        outcome: `right`, `wrong` or `unknown` (the verifier could not tell; rewarded as wrong).
        reward: +1 for right, -1 otherwise (paper, section 3.2).
        truncated: cut by the length limit.
        weight_version: of the weights that sampled it.
    """

    problem_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    outcome: str
    reward: float
    truncated: bool
    weight_version: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        row = dict(vars(self))
        for name in ("prompt_token_ids", "token_ids"):
            row[name] = list(row[name])
        row["logprobs"] = [round(value, 6) for value in self.logprobs]
        return row


class Sampler:
    """Samples responses to problems and has them verified while others are still being generated."""

    def __init__(
        self,
        engine: Engine,
        pool: VerifierPool,
        style: PromptStyle,
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
    ) -> None:
        self.engine, self.pool, self.style = engine, pool, style
        self.temperature, self.top_p, self.max_tokens = temperature, top_p, max_tokens

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """The problem's prompt in tokens."""
        return tuple(self.engine.tokenizer.encode(self.style.render(problem.text), add_special_tokens=False))

    def sample(
        self,
        jobs: Sequence[tuple[Problem, int]],
        on_rollout: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Draw one response for each (problem, seed), in order.

        Args:
            on_rollout: called with (index, rollout) in this thread as responses are judged, in no fixed order.
        """
        prompts = [self.prompt_ids(problem) for problem, _ in jobs]
        requests = [
            SampleRequest(
                ids,
                # A long prompt leaves less room; one that leaves none is refused by the engine, with the numbers.
                max_tokens=max(1, min(self.max_tokens, self.engine.max_model_len - len(ids))),
                temperature=self.temperature,
                top_p=self.top_p,
                seed=seed,
                stop=self.style.stop,
            )
            for ids, (_, seed) in zip(prompts, jobs, strict=True)
        ]
        verdicts: dict[int, Future[Verdict]] = {}
        samples: dict[int, Any] = {}
        finished: dict[int, Rollout] = {}

        def finish(index: int) -> None:
            sample, verdict = samples.pop(index), verdicts.pop(index).result()
            finished[index] = Rollout(
                problem_id=jobs[index][0].id,
                prompt_token_ids=requests[index].prompt_token_ids,
                token_ids=sample.token_ids,
                logprobs=sample.logprobs,
                text=sample.text,
                outcome=verdict.outcome,
                reward=1.0 if verdict.outcome == "right" else -1.0,
                truncated=sample.finish_reason == "length",
                weight_version=sample.weight_version,
            )
            if on_rollout is not None:
                on_rollout(index, finished[index])

        def on_sample(index: int, sample: Any) -> None:
            samples[index] = sample
            verdicts[index] = self.pool.submit(jobs[index][0], sample.text)
            for judged in [i for i, future in verdicts.items() if future.done()]:
                finish(judged)

        self.engine.generate_many(requests, on_sample)
        for index in list(verdicts):
            finish(index)
        return [finished[index] for index in range(len(jobs))]
