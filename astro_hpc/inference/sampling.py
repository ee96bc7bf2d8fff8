"""What a request means to vLLM and what its answer means to us, the same for every way of reaching vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.inference.engine import Sample, SampleRequest


def check_request(request: SampleRequest, max_model_len: int) -> None:
    """Refuse what no engine can carry out.

    Raises:
        ConfigError: the prompt is empty, or with `max_tokens` longer than the model's context.
    """
    if not request.prompt_token_ids:
        raise ConfigError("a prompt of no tokens can't be continued; check the prompt style")
    if len(request.prompt_token_ids) + request.max_tokens > max_model_len:
        raise ConfigError(
            f"a prompt of {len(request.prompt_token_ids)} tokens and {request.max_tokens} new ones exceed "
            f"inference.max_model_len={max_model_len}; raise it or ask for fewer tokens"
        )


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Id of every special token by its text."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def sampling_fields(request: SampleRequest, special: Mapping[str, int]) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams, JSON-able, all that could have another default somewhere spelled out."""
    # A special token never shows in the text: as a stop it has to be a token.
    strings = [stop for stop in request.stop if stop not in special]
    return {
        "n": 1,
        "max_tokens": request.max_tokens,
        "min_tokens": 0,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": request.seed,
        "stop": strings,
        "stop_token_ids": [special[stop] for stop in request.stop if stop in special],
        "ignore_eos": False,
        "logprobs": 0,  # of the sampled token alone
        "include_stop_str_in_output": True,
        "detokenize": bool(strings),
    }


def make_sample(
    tokenizer: Any,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str | None,
    stop_reason: int | str | None,
    weight_version: int,
) -> Sample:
    """A sample from vLLM's fields of a completion."""
    return Sample(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        # not vLLM's text: that ends at the stop string even where the last token goes on
        text=tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        finish_reason="stop" if finish_reason == "stop" else "length" if finish_reason == "length" else "abort",
        stopped_by_eos=finish_reason == "stop" and not isinstance(stop_reason, str),
        weight_version=weight_version,
    )
