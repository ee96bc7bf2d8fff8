"""What needs one H100: Transformer Engine's layers against Hugging Face, FP8 against BF16, the doctor there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import hf_model, make_llama, random_examples

from astro_hpc.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig, RunConfig
from astro_hpc.model.libraries import this_machine
from astro_hpc.model.precision import has_transformer_engine
from astro_hpc.training.packing import Example, pack_examples
from astro_hpc.training.sft import mean_cross_entropy
from astro_hpc.training.trainer import Trainer

pytestmark = pytest.mark.gpu

BF16 = PrecisionConfig(dtype="bf16")
RECIPES = {
    "tensorwise": PrecisionConfig(fp8="tensorwise"),
    "tensorwise without BF16 layers": PrecisionConfig(fp8="tensorwise", bf16_layers_at_start=0, bf16_layers_at_end=0),
    "delayed": PrecisionConfig(fp8="delayed", bf16_layers_at_start=0, bf16_layers_at_end=0),
    "blockwise": PrecisionConfig(fp8="blockwise", fp8_format="e4m3"),
    "tensorwise, weights in FP8": PrecisionConfig(fp8="tensorwise", fp8_param_gather=True),
    "tensorwise, narrow optimizer": PrecisionConfig(
        fp8="tensorwise", precision_aware_optimizer=True, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16"
    ),
}


def trainer(folder: Path, precision: PrecisionConfig, steps: int = 20) -> Trainer:
    distributed = precision.fp8_param_gather or precision.precision_aware_optimizer
    optimizer = OptimizerConfig(lr=1e-5, lr_schedule="constant", lr_warmup_fraction=0.0)
    return Trainer(folder, ParallelConfig(use_distributed_optimizer=distributed), precision, optimizer, steps, seed=0)


def texts(folder: Path) -> list[Example]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [
        (f"Put + or - between the numbers {a} {b} 3 4 to make {a - b + 7}.", f"Step 1: {a} - {b} = {a - b}\n" * 6)
        for a in range(1, 9)
        for b in range(1, 9)
    ]
    return [Example(tuple(tokenizer.encode(p)), (*tokenizer.encode(c), tokenizer.eos_token_id)) for p, c in pairs]


@pytest.fixture(params=["tied", "untied-llama3-rope", "smollm2"])
def model(request: pytest.FixtureRequest, tmp_path: Path, smollm2: Path) -> Path:
    if request.param == "smollm2":
        return smollm2
    return make_llama(tmp_path / "model", tied=request.param == "tied", llama3_rope=request.param != "tied")


def test_transformer_engines_layers_give_hugging_faces_logprobs(model: Path) -> None:
    assert has_transformer_engine(), "install transformer-engine[pytorch]: without it the local layers would be tested"
    examples = random_examples(6, 300, longest=200)
    reference = hf_model(model).cuda()
    with torch.no_grad():
        exact = torch.cat([_hf_on_gpu(reference, example) for example in examples])
        rounded = torch.cat([_hf_on_gpu(reference.bfloat16(), example) for example in examples])
    made = trainer(model, BF16)
    names = {type(module).__name__ for module in made.chunks[0].modules()}
    assert "TELayerNormColumnParallelLinear" in names
    ours = made.token_logprobs(pack_examples(examples, "all"))
    # As near to float32 as Hugging Face's own BF16 is, give or take.
    error = (ours - exact).abs().mean().item()
    assert error <= 1.5 * (rounded - exact).abs().mean().item() + 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_loses_less_than_one_percent_of_the_loss(recipe: str, smollm2: Path) -> None:
    examples = texts(smollm2)
    losses = {}
    for name, precision in (("bf16", BF16), ("fp8", RECIPES[recipe])):
        made = trainer(smollm2, precision)
        if name == "fp8":
            assert made.chunks[0].module.config.fp8_recipe == precision.fp8
        losses[name] = []
        for step in range(20):
            batch = pack_examples(examples[step % 4 :: 4], "all")
            losses[name].append(made.train_step([batch], mean_cross_entropy(int(batch.loss_mask.sum())))["loss"])
        del made
        torch.cuda.empty_cache()
    assert losses["bf16"][-1] < losses["bf16"][0]
    for bf16, fp8 in zip(losses["bf16"], losses["fp8"], strict=True):
        assert fp8 == pytest.approx(bf16, rel=0.01)


def test_the_doctor_finds_the_chip_and_what_fp8_needs(smollm2: Path, tmp_path: Path) -> None:
    from astro_hpc.launch import doctor

    cfg = RunConfig.model_validate(
        {
            "name": "t",
            "runs_dir": tmp_path,
            "model": {"path": str(smollm2)},
            "problems": {"train": [{"type": "signs", "count": 3}]},
            "precision": {"fp8": "tensorwise"},
        }
    )
    rows = {row.name: row for row in doctor.examine(cfg)}
    chip = this_machine().chip
    assert chip is not None
    assert chip.name in rows["GPU"].found
    assert rows["precision"].status == "pass"
    assert rows["Transformer Engine"].status == "pass"


def _hf_on_gpu(model: torch.nn.Module, example: Example) -> torch.Tensor:
    ids = torch.tensor([example.prompt + example.completion], device="cuda")
    logits = model(ids).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).squeeze(1)
