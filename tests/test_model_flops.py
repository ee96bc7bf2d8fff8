"""Model FLOPs against published counts and against what PyTorch counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from astro_hpc.model.flops import peak_flops, train_flops
from astro_hpc.model.llama import LlamaShape

LLAMA_70B = LlamaShape(80, 8192, 28672, 64, 8, 128, 128256, 131072, 1e-5, 500000.0, 8.0, False)
TINY = LlamaShape(2, 64, 96, 4, 2, 16, 300, 1024, 1e-5, 10000.0, None, True)


@pytest.mark.parametrize(("length", "giga"), [(4096, 433.1), (8192, 449.2), (16384, 481.4)])
def test_llama_70b_counts_what_is_published(length: int, giga: float) -> None:
    assert train_flops(LLAMA_70B, [length], length, 128256) / length / 1e9 == pytest.approx(giga, abs=0.06)


def test_a_small_model_counts_what_pytorch_counts() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=300,
            attn_implementation="eager",
        )
    )
    length = 48
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(1, length, dtype=torch.int64)).logits.sum().backward()
    # PyTorch counts the upper half of attention's matrices too, and nothing backward of a product with the tokens.
    full = train_flops(TINY, [length], length, 300) + 6 * 2 * 64 * length**2
    # ... and rotary tables: one product of 8 frequencies a position, forward only.
    assert counter.get_total_flops() == pytest.approx(full, rel=2e-3)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6))
def test_packing_adds_up_and_is_less_than_one_long_example(lengths: list[int]) -> None:
    parts = sum(train_flops(TINY, [length], length, 384) for length in lengths)
    assert train_flops(TINY, lengths, sum(lengths), 384) == pytest.approx(parts)
    assert parts <= train_flops(TINY, [sum(lengths)], sum(lengths), 384) * (1 + 1e-9)


def test_peaks_are_those_of_the_data_sheets() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", fp8=False) == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", fp8=True) == 1979e12
    assert peak_flops("NVIDIA H100 PCIe", fp8=False) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", fp8=True) is None
    assert peak_flops("AMD EPYC", fp8=False) is None
