"""An engine that writes what a function says: for tests and for measuring drivers. Needs no torch."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.inference.engine import EngineStats, Sample, SampleRequest

Script = Callable[[str, random.Random], str]
"""(context so far, random numbers of this sample) -> the text up to the end of the sequence."""


class CharTokenizer:
    """One token a character: its code point plus one. Token 0 ends the sequence."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of `text`; there are no special tokens to add."""
        return [ord(character) + 1 for character in text]

    def decode(
        self, token_ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Text of `token_ids`; the end of the sequence is written as nothing."""
        return "".join(chr(token - 1) for token in token_ids if token)


def numbered_steps(context: str, random_numbers: random.Random) -> str:
    """The default script: continues a list of at most six numbered steps and boxes a digit."""
    done = context.count("\nStep ")
    lines = [
        f"Step {number}: take {random_numbers.randrange(4)}\n"
        for number in range(done + 1, random_numbers.randrange(done, 7) + 1)
    ]
    return "".join(lines) + f"\\boxed{{{random_numbers.randrange(10)}}}"


class ScriptedEngine:
    """Deterministic: a sample depends on its request alone, whatever else is in flight.

    Log-probabilities are a fixed function of the token. With `latency` samples end in the order of a virtual
    clock on which each token takes that long; nothing ever sleeps.
    """

    def __init__(self, script: Script = numbered_steps, max_model_len: int = 8192, latency: float = 0.0) -> None:
        self.script = script
        self.max_model_len = max_model_len
        self.tokenizer = CharTokenizer()
        self.stats = EngineStats()
        self._latency = latency
        self._version = 0
        self._due: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._now = 0.0

    async def generate(self, request: SampleRequest) -> Sample:
        """Draw one sample; gives way to other coroutines at least once."""
        sample = self._sample(request)
        loop = asyncio.get_running_loop()
        if self._latency == 0.0:
            await asyncio.sleep(0)
            return sample
        future = loop.create_future()
        if not self._due:
            loop.call_soon(self._tick)
        heapq.heappush(self._due, (self._now + self._latency * len(sample.token_ids), next(self._order), future))
        await future
        return sample

    def generate_many(
        self, requests: Sequence[SampleRequest], on_sample: Callable[[int, Sample], None] | None = None
    ) -> list[Sample]:
        """Draw all of `requests`, in order; `on_sample(index, sample)` is called as each one ends."""
        samples = []
        for index, request in enumerate(requests):
            samples.append(self._sample(request))
            if on_sample is not None:
                on_sample(index, samples[-1])
        return samples

    def load_weights(self, source: Path | Iterable[tuple[str, Any]], version: int) -> None:
        """Take note of the version; the script stays."""
        self._version = version

    def weight_digests(self, layer: int, columns: Sequence[int]) -> None:
        """There are no weights."""

    def close(self) -> None:
        """Nothing to free."""

    def _tick(self) -> None:
        """Let the earliest sample end."""
        self._now, _, future = heapq.heappop(self._due)
        if not future.done():
            future.set_result(None)
        if self._due:
            asyncio.get_running_loop().call_soon(self._tick)

    def _sample(self, request: SampleRequest) -> Sample:
        if len(request.prompt_token_ids) + request.max_tokens > self.max_model_len:
            raise ConfigError(
                f"a prompt of {len(request.prompt_token_ids)} tokens and {request.max_tokens} new ones exceed "
                f"inference.max_model_len={self.max_model_len}; raise it or ask for fewer tokens"
            )
        text = self.script(self.tokenizer.decode(request.prompt_token_ids), random.Random(request.seed))
        ends = [at + len(stop) for stop in request.stop if (at := text.find(stop)) >= 0]
        text = text[: min(ends, default=len(text))]
        tokens = self.tokenizer.encode(text)
        if not ends:
            tokens.append(self.tokenizer.eos_token_id)
        complete = len(tokens) <= request.max_tokens
        tokens = tokens[: request.max_tokens]
        self.stats.requests += 1
        self.stats.prompt_tokens += len(request.prompt_token_ids)
        self.stats.generated_tokens += len(tokens)
        return Sample(
            token_ids=tuple(tokens),
            logprobs=tuple([-(1 + token % 7) / 8 for token in tokens]),
            text=self.tokenizer.decode(tokens),
            finish_reason="stop" if complete else "length",
            stopped_by_eos=complete and not ends,
            weight_version=self._version,
        )
