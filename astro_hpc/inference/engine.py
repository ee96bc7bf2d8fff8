"""What every engine offers: tokens in, tokens and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SampleRequest:
    """One sample to draw.

    Attributes:
        prompt_token_ids: the whole context; engines never tokenise.
        max_tokens: at most this many new tokens.
        seed: of this sample alone, so that a sample does not depend on its batch mates' number or order.
        stop: sampling ends after one of these strings, which stays part of the output's tokens and text. One that
            is a special token of the tokenizer counts as the end of the sequence.
    """

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """What came back.

    Attributes:
        token_ids: the new tokens, the end-of-sequence token included where it was sampled.
        logprobs: one for each token, natural log, of the untempered softmax.
        text: the decoded tokens without special tokens.
        finish_reason: `stop` (end of sequence or a stop string), `length`, or `abort`.
        stopped_by_eos: the end-of-sequence token was sampled, or a special token named in `stop`.
        weight_version: version of the weights that sampled it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    stopped_by_eos: bool = False
    weight_version: int = 0


@dataclass
class EngineStats:
    """Running totals since the engine started."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    busy_seconds: float = 0.0
    """Seconds in which the engine was computing."""
    extra: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A source of samples. One process may hold one vLLM engine."""

    tokenizer: Any
    """A Hugging Face tokenizer (`encode`, `decode`, `eos_token_id`)."""
    stats: EngineStats
    max_model_len: int
    """Prompt and new tokens together are at most this many."""

    async def generate(self, request: SampleRequest) -> Sample:
        """Draw one sample; many calls may wait at once and are batched continuously.

        Raises:
            ConfigError: the prompt and `max_tokens` do not fit the model's length.
        """
        ...

    def generate_many(
        self, requests: Sequence[SampleRequest], on_sample: Callable[[int, Sample], None] | None = None
    ) -> list[Sample]:
        """Draw all of `requests`, in order; `on_sample(index, sample)` is called as each one ends."""
        ...

    def load_weights(self, source: Path | Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace the weights by a Hugging Face folder's or by named tensors, and clear the prefix cache.

        Nothing may be in flight.
        """
        ...

    def weight_digests(self, layer: int, columns: Sequence[int]) -> dict[str, str] | None:
        """Hashes of parts of the weights in use, see `inference.probe`; None where the engine can't tell.

        Args:
            layer: a decoder layer.
            columns: which columns of its matrices.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory and processes; twice is harmless."""
        ...
