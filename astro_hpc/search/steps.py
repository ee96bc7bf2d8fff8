"""Cutting a sample into steps on token boundaries: nothing is ever tokenised again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from astro_hpc.inference.engine import Sample


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a sample.

    Attributes:
        text: with its delimiter, where it has one.
        token_ids: as sampled, the end-of-sequence token excluded.
        logprob: sum of the tokens' log-probabilities (natural log).
        delimited: the delimiter was reached, so more steps may follow; else the sample ended or was cut in it.
    """

    text: str
    token_ids: tuple[int, ...]
    logprob: float
    delimited: bool


class StepCutter:
    """Cuts samples behind each token that completes the step delimiter, as an engine's stop string does."""

    def __init__(self, tokenizer: Any, delimiter: str) -> None:
        self._tokenizer = tokenizer
        self._delimiter = delimiter
        self._may_end: dict[int, bool] = {}

    def cut(self, sample: Sample) -> list[Step]:
        """The sample's steps in order; none when it holds nothing but the end of the sequence."""
        tokens = sample.token_ids[:-1] if sample.stopped_by_eos else sample.token_ids
        steps = []
        begin = 0
        for end, token in enumerate(tokens, 1):
            may_end = self._may_end.get(token)
            if may_end is None:
                may_end = self._may_end[token] = self._delimiter[-1] in self._decode((token,))
            # Only a token that holds the delimiter's last character can complete it: no other needs decoding.
            if may_end and self._delimiter in (text := self._decode(tokens[begin:end])):
                steps.append(Step(text, tokens[begin:end], math.fsum(sample.logprobs[begin:end]), True))
                begin = end
        if begin < len(tokens):
            logprob = math.fsum(sample.logprobs[begin : len(tokens)])
            steps.append(Step(self._decode(tokens[begin:]), tokens[begin:], logprob, False))
        return steps

    def _decode(self, tokens: tuple[int, ...]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
