"""Rollouts: responses sampled from the policy, judged by the verifier, kept for replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        reward: of `rl.reward`; +1 for right, -1 otherwise in the paper (section 3.2).
        truncated: cut by the length limit.
        weight_versions: (version, tokens sampled with it), in the order of `token_ids`.
    """

    problem_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    outcome: str
    reward: float
    truncated: bool
    weight_versions: tuple[tuple[int, int], ...]

    @property
    def oldest_version(self) -> int:
        """Of the weights that sampled any of the tokens."""
        return min(version for version, _ in self.weight_versions)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        row = dict(vars(self))
        for name in ("prompt_token_ids", "token_ids"):
            row[name] = list(row[name])
        row["logprobs"] = list(self.logprobs)
        row["weight_versions"] = [list(span) for span in self.weight_versions]
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Rollout:
        """The rollout that `to_json` wrote.

        Raises:
            ValueError: a field is missing or of another type, or the tokens and what goes with them don't agree.
        """
        try:
            rollout = cls(
                problem_id=str(row["problem_id"]),
                prompt_token_ids=tuple(int(token) for token in row["prompt_token_ids"]),
                token_ids=tuple(int(token) for token in row["token_ids"]),
                logprobs=tuple(float(value) for value in row["logprobs"]),
                text=str(row["text"]),
                outcome=str(row["outcome"]),
                reward=float(row["reward"]),
                truncated=bool(row["truncated"]),
                weight_versions=tuple((int(version), int(count)) for version, count in row["weight_versions"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a rollout: {error!r}") from None
        sizes = {len(rollout.token_ids), len(rollout.logprobs), sum(count for _, count in rollout.weight_versions)}
        if len(sizes) != 1 or not rollout.prompt_token_ids or not rollout.weight_versions:
            raise ValueError("not a rollout: tokens, log-probabilities and weight versions differ in number")
        return rollout


@dataclass(frozen=True)
class Group:
    """The responses to one prompt.

    Attributes:
        position: the prompt's place in the endless sequence of prompts; names the group in seeds and files.
    """

    position: int
    rollouts: tuple[Rollout, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {"position": self.position, "rollouts": [rollout.to_json() for rollout in self.rollouts]}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Group:
        """The group that `to_json` wrote.

        Raises:
            ValueError: it is not one.
        """
        try:
            return cls(int(row["position"]), tuple(Rollout.from_json(rollout) for rollout in row["rollouts"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a group of rollouts: {error!r}") from None

    @property
    def has_signal(self) -> bool:
        """The rewards differ, so that advantages are not all 0."""
        return len({rollout.reward for rollout in self.rollouts}) > 1

    @property
    def oldest_version(self) -> int:
        """Of the weights that sampled any of the tokens."""
        return min(rollout.oldest_version for rollout in self.rollouts)


def rounded(logprobs: Sequence[float]) -> tuple[float, ...]:
    """Log-probabilities to six decimals: what a file keeps is then exactly what was trained on."""
    return tuple(round(value, 6) for value in logprobs)


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
                logprobs=rounded(sample.logprobs),
                text=sample.text,
                outcome=verdict.outcome,
                reward=1.0 if verdict.outcome == "right" else -1.0,
                truncated=sample.finish_reason == "length",
                weight_versions=((sample.weight_version, len(sample.token_ids)),),
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
