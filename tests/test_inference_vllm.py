"""The real vLLM engine on a tiny random model."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import save_tiny_llama

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig
from astro_hpc.conversion.offline import export_hf, import_hf
from astro_hpc.inference import make_engine
from astro_hpc.inference.engine import Sample, SampleRequest

CFG = InferenceConfig(dtype="float32", max_model_len=256, max_num_seqs=16, cpu_kv_cache_gb=0.1, cpu_threads=1)
TEXT = "<|im_start|>user\n" + "Put + or - between the numbers 4 2 3 4 to make 5. " * 4 + "<|im_end|>\n"


@pytest.fixture(scope="module")
def models(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`first` is `original` after the way to Megatron and back."""
    root = tmp_path_factory.mktemp("vllm")
    original = save_tiny_llama(root / "original", smollm2, seed=0)
    return SimpleNamespace(
        original=original,
        first=export_hf(import_hf(original, root / "megatron"), root / "first", shard_bytes=5_000_000),
        second=save_tiny_llama(root / "second", smollm2, seed=1),
    )


@pytest.fixture(scope="module")
def started(models: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """The engine, and what making it wrote to the terminal."""
    with _terminal_output() as output:
        engine = make_engine(models.first, CFG, seed=0)
    yield SimpleNamespace(engine=engine, output=output())
    engine.close()
    engine.close()


@pytest.fixture
def engine(started: SimpleNamespace, models: SimpleNamespace):
    return started.engine


@pytest.fixture(scope="module")
def prompt(started: SimpleNamespace) -> tuple[int, ...]:
    return tuple(started.engine.tokenizer.encode(TEXT, add_special_tokens=False))


def test_making_an_engine_is_quiet(started):
    # torch's warning can be silenced only before torch is imported, which other tests have done
    assert [line for line in started.output.splitlines() if "NUMA binding" not in line] == []


def test_a_seed_decides_its_sample_whatever_the_batch(engine, prompt):
    requests = [SampleRequest(prompt, 12, seed=seed) for seed in range(6)]
    alone = [engine.generate_many([request])[0] for request in requests]
    assert _tokens(engine.generate_many(requests)) == _tokens(alone)
    assert _tokens(engine.generate_many(requests[::-1])) == _tokens(alone[::-1])

    async def together() -> list[Sample]:
        return await asyncio.gather(*[engine.generate(request) for request in requests])

    assert _tokens(asyncio.run(together())) == _tokens(alone)
    assert len({sample.token_ids for sample in alone}) == 6


def test_logprobs_are_those_of_the_untempered_model(engine, models, prompt):
    sample = engine.generate_many([SampleRequest(prompt, 20, seed=3, temperature=0.7, top_p=0.9)])[0]
    assert sample.logprobs == pytest.approx(_reference_logprobs(models.first, prompt, sample.token_ids), abs=2e-4)


def test_a_converted_model_is_served_as_the_original(engine, models, prompt):
    assert len(list(models.first.glob("*.safetensors"))) > 1
    sample = engine.generate_many([SampleRequest(prompt, 20, temperature=0.0)])[0]
    assert sample.logprobs == pytest.approx(_reference_logprobs(models.original, prompt, sample.token_ids), abs=2e-4)


def test_temperature_0_is_greedy(engine, models, prompt):
    sample = engine.generate_many([SampleRequest(prompt, 5, temperature=0.0)])[0]
    assert sample.token_ids == _greedy(models.first, prompt, 5)


def test_stop_strings_stay_and_special_tokens_end(engine, prompt):
    tokenizer = engine.tokenizer
    free = engine.generate_many([SampleRequest(prompt, 30, seed=seed) for seed in range(8)])
    assert {sample.finish_reason for sample in free} <= {"stop", "length"}
    sample = next(s for s in free if s.finish_reason == "length")
    assert sample.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    seed = free.index(sample)
    piece = tokenizer.decode(sample.token_ids[10:11])
    stopped = engine.generate_many([SampleRequest(prompt, 30, seed=seed, stop=(piece,))])[0]
    assert stopped.finish_reason == "stop"
    assert not stopped.stopped_by_eos
    assert piece in stopped.text
    assert stopped.token_ids == sample.token_ids[: len(stopped.token_ids)]
    assert piece not in tokenizer.decode(stopped.token_ids[:-1])


def test_a_special_token_named_as_a_stop_ends_the_sequence(engine, prompt):
    # In a sample that holds one by chance: of 30 random tokens each, 17 of 49152 are special.
    special = {i for i, token in engine.tokenizer.added_tokens_decoder.items() if token.special}
    for seed in range(3000):
        request = SampleRequest(prompt[-4:], 60, seed=seed)
        sample = engine.generate_many([request])[0]
        found = [token for token in sample.token_ids if token in special and token != engine.tokenizer.eos_token_id]
        if found:
            break
    stop = engine.tokenizer.decode(found[:1])
    ended = engine.generate_many([dataclasses.replace(request, stop=(stop,))])[0]
    assert ended.stopped_by_eos
    assert ended.finish_reason == "stop"
    assert ended.token_ids[-1] == found[0]
    assert stop not in ended.text


def test_what_does_not_fit_is_a_user_error(engine, prompt, models, tmp_path):
    with pytest.raises(ConfigError, match="max_model_len=256"):
        engine.generate_many([SampleRequest(prompt, 250)])
    with pytest.raises(ConfigError, match=r"no config\.json"):
        make_engine(tmp_path, CFG)


def test_new_weights_replace_the_old_and_their_cached_keys(engine, models, prompt):
    from safetensors.torch import load_file

    request = SampleRequest(prompt, 10, seed=1)
    before = engine.generate_many([request])[0]
    cached = engine.stats.cached_prompt_tokens
    assert engine.generate_many([request])[0] == before
    assert engine.stats.cached_prompt_tokens - cached >= 32  # a whole block at least

    engine.load_weights(models.second, version=7)
    cached = engine.stats.cached_prompt_tokens
    after = engine.generate_many([request])[0]
    assert engine.stats.cached_prompt_tokens == cached
    assert after.weight_version == 7
    assert after.token_ids != before.token_ids
    assert after.logprobs == pytest.approx(_reference_logprobs(models.second, prompt, after.token_ids), abs=2e-4)

    engine.load_weights(load_file(models.original / "model.safetensors").items(), version=8)
    assert engine.generate_many([request])[0] == dataclasses.replace(before, weight_version=8)


def test_weights_of_another_model_are_refused_and_the_old_ones_stay(engine, models, prompt, smollm2):
    from safetensors.torch import load_file

    before = engine.generate_many([SampleRequest(prompt, 10, seed=1)])
    tensors = load_file(models.second / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ConfigError, match=name):
        engine.load_weights([(key, value) for key, value in tensors.items() if key != name], version=9)
    with pytest.raises(ConfigError, match="has shape"):
        engine.load_weights(smollm2, version=9)
    assert engine.generate_many([SampleRequest(prompt, 10, seed=1)]) == before


def test_a_cancelled_sample_is_dropped_and_the_others_go_on(engine, prompt):
    async def cancel_one() -> Sample:
        long = asyncio.create_task(engine.generate(SampleRequest(prompt, 150, seed=1)))
        short = asyncio.create_task(engine.generate(SampleRequest(prompt, 5, seed=2)))
        await asyncio.sleep(0.05)
        long.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await long
        return await short

    requests = engine.stats.requests
    sample = asyncio.run(cancel_one())
    assert _tokens([sample]) == _tokens(engine.generate_many([SampleRequest(prompt, 5, seed=2)]))
    assert engine.stats.requests == requests + 2


def test_an_error_in_the_callback_leaves_the_engine_usable(engine, prompt):
    requests = [SampleRequest(prompt, 20, seed=seed) for seed in range(40)]

    def fail(index: int, sample: Sample) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.generate_many(requests, fail)
    seen: list[int] = []
    samples = engine.generate_many(requests, lambda index, sample: seen.append(index))
    assert sorted(seen) == list(range(40))
    assert [len(sample.logprobs) for sample in samples] == [len(sample.token_ids) for sample in samples]


def test_two_engines_can_follow_each_other_in_one_process_and_a_failed_one_says_so(started, models, prompt):
    """Last, because it closes the module's engine."""
    first = started.engine
    before = first.generate_many([SampleRequest(prompt, 10, seed=1)])
    first.close()
    with pytest.raises(RuntimeError, match="closed"):
        first.generate_many([SampleRequest(prompt, 10)])
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        make_engine(models.first, CFG.model_copy(update={"max_model_len": 5000}))
    second = make_engine(models.first, CFG)
    try:
        [after] = second.generate_many([SampleRequest(prompt, 10, seed=1)])
        assert after.token_ids == before[0].token_ids

        def fail() -> None:
            raise OSError("broken")

        second._call(lambda vllm: setattr(vllm, "step", fail))
        with pytest.raises(OSError, match="broken"):
            second.generate_many([SampleRequest(prompt, 10, seed=seed) for seed in range(3)])
        with pytest.raises(RuntimeError, match="has failed"):
            second.generate_many([SampleRequest(prompt, 10)])
    finally:
        second.close()


def _tokens(samples: list[Sample]) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in samples]


def _logits(folder: Path, tokens: tuple[int, ...]):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def _reference_logprobs(folder: Path, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> list[float]:
    import torch

    rows = _logits(folder, prompt + tokens).log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def _greedy(folder: Path, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    for _ in range(count):
        tokens += (int(_logits(folder, prompt + tokens)[-1].argmax()),)
    return tokens


@contextlib.contextmanager
def _terminal_output():
    """File descriptors 1 and 2 while the block runs: C++ writes there too."""
    with tempfile.TemporaryFile() as file:
        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        text = ""

        def restore() -> None:
            nonlocal text
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            file.seek(0)
            text = file.read().decode()

        try:
            yield lambda: text
        finally:
            restore()
