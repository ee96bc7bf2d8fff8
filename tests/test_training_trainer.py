"""The Megatron train step against Hugging Face: log-probabilities, loss, gradients, updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import hf_logprobs, hf_model, make_llama, random_examples

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
from astro_hpc.conversion.names import mappings, to_hf
from astro_hpc.training.packing import Example, PackedBatch, pack_examples
from astro_hpc.training.trainer import Trainer

FP32 = PrecisionConfig(dtype="fp32")


def trainer(folder: Path, precision: PrecisionConfig = FP32, steps: int = 10, **optimizer: object) -> Trainer:
    options = {"lr": 1e-3, "clip_grad": 0.0} | optimizer
    return Trainer(folder, ParallelConfig(), precision, OptimizerConfig(**options), steps, seed=0)  # type: ignore[arg-type]


def mean_loss(count: float):  # type: ignore[no-untyped-def]
    def loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, float]]:
        return -(logprobs * batch.loss_mask).sum() / count, {"targets": float(batch.loss_mask.sum())}

    return loss


def gradients(made: Trainer) -> dict[str, torch.Tensor]:
    """Accumulated float32 gradients by Hugging Face name."""
    parameters = dict(made.chunks[0].module.named_parameters())
    return {
        name: part
        for mapping in mappings(made.shape)
        for name, part in zip(
            mapping.hf, to_hf(mapping.layout, parameters[mapping.megatron].main_grad, made.shape), strict=True
        )
    }


@pytest.fixture(scope="module", params=[(True, False), (False, True)], ids=["tied", "untied-llama3-rope"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied, llama3_rope = request.param
    return make_llama(tmp_path_factory.mktemp("tiny") / "model", tied=tied, llama3_rope=llama3_rope)


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_loss_logprobs_and_gradients_equal_hugging_faces(tiny: Path, loss_on: str) -> None:
    examples = random_examples(5, 300)
    batch = pack_examples(examples, loss_on)  # type: ignore[arg-type]
    count = float(batch.loss_mask.sum())
    reference = hf_model(tiny)
    expected = torch.cat([hf_logprobs(reference, example) for example in examples])
    loss = -(expected * batch.loss_mask).sum() / count
    loss.backward()

    made = trainer(tiny)
    assert torch.allclose(made.token_logprobs(batch), expected.detach() * batch.loss_mask, atol=2e-5)
    result = made.train_step([batch], mean_loss(count))
    assert result["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert result["targets"] == count
    found = gradients(made)
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        difference = (found[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-4, name
    norm = torch.stack([found[name].norm() for name, _ in reference.named_parameters()]).norm()
    assert result["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_three_updates_equal_torchs_adamw(tiny: Path) -> None:
    examples = random_examples(4, 300, seed=3)
    batch = pack_examples(examples, "all")
    count = float(batch.loss_mask.sum())
    reference = hf_model(tiny)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    made = trainer(tiny, lr_schedule="constant", lr_warmup_fraction=0.0, clip_grad=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = -torch.cat([hf_logprobs(reference, example) for example in examples]).sum() / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        assert made.train_step([batch], mean_loss(count))["loss"] == pytest.approx(loss.item(), abs=1e-4)
    trained = dict(made.named_hf_tensors())
    for name, parameter in reference.named_parameters():
        assert torch.allclose(trained[name], parameter, atol=2e-4), name


def test_packing_and_micro_batches_do_not_change_the_step(tiny: Path) -> None:
    examples = random_examples(6, 300, seed=1)
    count = float(sum(example.num_inputs for example in examples))
    ways = [
        [pack_examples(examples, "all")],
        [pack_examples([example], "all") for example in examples],
        [pack_examples(examples[2:], "all"), pack_examples(examples[:2], "all")],
    ]
    results, grads = [], []
    for batches in ways:
        made = trainer(tiny)
        results.append(made.train_step(batches, mean_loss(count)))
        grads.append(gradients(made))
    for result, found in zip(results[1:], grads[1:], strict=True):
        assert result["loss"] == pytest.approx(results[0]["loss"], abs=1e-5)
        assert result["targets"] == count
        for name, gradient in found.items():
            assert torch.allclose(gradient, grads[0][name], atol=1e-5, rtol=1e-4), name


def test_an_example_does_not_see_its_neighbours(tiny: Path) -> None:
    made = trainer(tiny)
    one, two, other = random_examples(3, 300, seed=2)
    first = made.token_logprobs(pack_examples([one, two], "all"))[-two.num_inputs :]
    second = made.token_logprobs(pack_examples([other, two], "all"))[-two.num_inputs :]
    assert torch.allclose(first, second, atol=1e-5)


def test_extras_reach_the_loss_and_may_be_negative(tiny: Path) -> None:
    made = trainer(tiny)
    batch = pack_examples([Example((5, 6), (7, 8))], "completion", extras={"advantages": [[2.0, -1.0]]})

    def loss(logprobs: torch.Tensor, got: PackedBatch) -> tuple[torch.Tensor, dict[str, float]]:
        return -(logprobs * got.extras["advantages"]).sum(), {"sum": float(got.extras["advantages"].sum())}

    logprobs = made.token_logprobs(batch)
    result = made.train_step([batch], loss)
    assert result["loss"] == pytest.approx(float(-(2 * logprobs[1] - logprobs[2])), abs=1e-5)
    assert result["sum"] == 1.0


def test_a_batch_without_loss_changes_nothing(tiny: Path) -> None:
    made = trainer(tiny)
    batch = pack_examples(random_examples(2, 300), "all")
    batch.loss_mask.zero_()
    before = {name: tensor.clone() for name, tensor in made.named_hf_tensors()}
    result = made.train_step([batch], mean_loss(1.0))
    assert result["loss"] == 0.0
    assert result["grad_norm"] == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in made.named_hf_tensors())


def test_learning_rate_rises_and_falls_and_no_step_is_wasted(tiny: Path) -> None:
    made = trainer(tiny, steps=10, lr=1.0e-3, lr_schedule="linear", lr_warmup_fraction=0.2)
    batch = pack_examples([Example((5, 6), (7, 8))], "all")
    rates = [made.train_step([batch], mean_loss(3.0))["lr"] for _ in range(10)]
    assert rates[0] == pytest.approx(0.5e-3)
    assert rates[1] == max(rates) == pytest.approx(1e-3)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] > 0


def test_bf16_trains_with_float32_masters(tiny: Path) -> None:
    made = trainer(tiny, PrecisionConfig(dtype="bf16"), lr=1e-5, lr_schedule="constant", lr_warmup_fraction=0.0)
    batch = pack_examples(random_examples(4, 300), "all")
    count = float(batch.loss_mask.sum())
    # A step moves a weight by 1e-5, far below bf16's spacing at 0.1: only masters can add that up.
    losses = [made.train_step([batch], mean_loss(count))["loss"] for _ in range(40)]
    assert losses[-1] < losses[0] - 0.005
    reference = trainer(tiny).train_step([batch], mean_loss(count))["loss"]
    assert losses[0] == pytest.approx(reference, rel=5e-3)
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in made.named_hf_tensors())


def test_first_loss_of_the_real_model_equals_hugging_faces(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [
        ("Put + or - between the numbers 4 2 3 4 to make 5.", "Step 1: 4 - 2 = 2\nStep 2: 2 + 3 = 5\n"),
        ("Name a colour.", " Blue is the colour of the sky."),
    ]
    examples = [Example(tuple(tokenizer.encode(p)), (*tokenizer.encode(c), tokenizer.eos_token_id)) for p, c in texts]
    batch = pack_examples(examples, "all")
    count = float(batch.loss_mask.sum())
    reference = hf_model(smollm2)
    with torch.no_grad():
        expected = torch.cat([hf_logprobs(reference, example) for example in examples])
    del reference
    made = trainer(smollm2, lr=1e-5)
    result = made.train_step([batch], mean_loss(count))
    assert result["loss"] == pytest.approx(float(-expected.mean()), abs=1e-4)
    assert made.train_step([batch], mean_loss(count))["loss"] < result["loss"]


def test_sizes_that_do_not_fit_are_refused_before_anything_is_built(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 2 ranks"):
        Trainer(tiny, ParallelConfig(tensor_parallel_size=2), FP32, OptimizerConfig(lr=1e-3), 1, 0)
    with pytest.raises(ConfigError, match="there is no GPU"):
        trainer(tiny, PrecisionConfig(fp8="tensorwise"))
