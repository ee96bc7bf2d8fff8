"""Tiny random Llamas that the tests share."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from astro_hpc.training.packing import Example

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def save_tiny_llama(folder: Path, tokenizer_from: Path, seed: int = 0, num_key_value_heads: int = 1) -> Path:
    """A random Llama with the embedded model's tokenizer; heads of 32, the smallest that vLLM takes on CPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=num_key_value_heads,
        vocab_size=49152,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return folder


def make_llama(
    folder: Path, *, tied: bool, llama3_rope: bool, vocab_size: int = 300, dtype: str = "float32", num_layers: int = 2
) -> Path:
    """A random Llama: 4 heads, 2 key/value heads of 16; the vocabulary doesn't divide by 128."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=16384,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        rope_parameters=LLAMA3_ROPE if llama3_rope else {"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def hf_model(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Hugging Face's model of a folder."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def random_examples(count: int, vocab_size: int, seed: int = 0, longest: int = 20) -> list[Example]:
    """Examples of random tokens and lengths."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocab_size) for _ in range(length))

    return [Example(ids(draw.randint(1, longest)), (*ids(draw.randint(0, longest)), 2)) for _ in range(count)]


def hf_logprobs(model: LlamaForCausalLM, example: Example) -> torch.Tensor:
    """Hugging Face's log-probabilities of an example's targets, the example alone in its batch: [T] float32."""
    ids = torch.tensor([example.prompt + example.completion])
    logits = model(ids).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).squeeze(1)
