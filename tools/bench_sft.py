"""Tokens a second of our SFT step beside a plain Hugging Face loop on the same packed tokens, alternating, in one run.

Both train SmolLM2-135M-Instruct (or MODEL) on the same examples in the same packs with AdamW. The Hugging Face loop
has one row a pack with a block-diagonal causal mask (position ids restart), which is its plain way to keep packed
examples apart. Each side steps in turn, so that a busy machine hurts both alike.

    python tools/bench_sft.py [--examples FILE.jsonl] [--dtype bf16] [--loss-on all] [--steps 6]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from astro_hpc.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig, TrainingConfig
from astro_hpc.training.data import StepPlan, load_examples, load_tokenizer
from astro_hpc.training.packing import Example, PackedBatch
from astro_hpc.training.sft import mean_cross_entropy
from astro_hpc.training.trainer import Trainer


def synthetic_examples(count: int) -> list[Example]:
    """Random tokens in the lengths of the demo's traces: prompts of about 40, completions of 60 to 200."""
    draw = random.Random(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(100, 40000) for _ in range(draw.randint(low, high)))

    return [Example(ids(35, 45), ids(60, 200)) for _ in range(count)]


class HuggingFaceLoop:
    """LlamaForCausalLM with torch's AdamW, as a short script would write it."""

    def __init__(self, hf_dir: Path, dtype: torch.dtype, lr: float) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, batches: list[PackedBatch], num_targets: int) -> float:
        total = 0.0
        self.optimizer.zero_grad()
        for batch in batches:
            logits = self.model(
                input_ids=batch.tokens[None],
                position_ids=batch.position_ids[None],
                attention_mask=_block_causal(batch, self.model.dtype),
                use_cache=False,
            ).logits[0]
            losses = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
            loss = (losses * batch.loss_mask).sum() / num_targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return total


def _block_causal(batch: PackedBatch, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, T, T] additive mask: each token sees its own example's earlier ones."""
    owner = torch.repeat_interleave(torch.arange(len(batch.cu_seqlens) - 1), batch.cu_seqlens.diff())
    allowed = (owner[:, None] == owner[None]).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return mask[None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="Hugging Face folder (the embedded model)")
    parser.add_argument("--examples", type=Path, default=None, help="prompts and completions (synthetic ones)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--loss-on", choices=("all", "completion"), default="all")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2, help="packs a step")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each side")
    options = parser.parse_args()
    if options.model is None:
        from astro_hpc.conversion.embedded import resolve_model

        options.model = resolve_model("embedded:smollm2-135m-instruct")
    training = TrainingConfig(
        seq_length=options.seq_length,
        global_batch_size=options.batch,
        loss_on=options.loss_on,
        optimizer=OptimizerConfig(lr=1e-5),
        num_epochs=100,
    )
    if options.examples:
        examples = load_examples(options.examples, load_tokenizer(options.model), options.seq_length).examples
    else:
        examples = synthetic_examples(64)
    plan = StepPlan(examples, training, seed=0)
    ours = Trainer(
        options.model, ParallelConfig(), PrecisionConfig(dtype=options.dtype), training.optimizer, len(plan), seed=0
    )
    theirs = HuggingFaceLoop(options.model, {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype], 1e-5)

    rates: dict[str, list[float]] = {"ours": [], "hugging_face": []}
    for step in range(options.steps + 1):
        batches, targets, tokens = plan.batches(step), plan.num_targets(step), plan.num_tokens(step)
        for name in ("ours", "hugging_face") if step % 2 else ("hugging_face", "ours"):
            began = time.perf_counter()
            if name == "ours":
                loss = ours.train_step(batches, mean_cross_entropy(targets))["loss"]
            else:
                loss = theirs.step(batches, targets)
            seconds = time.perf_counter() - began
            if step:  # the first is a warm-up
                rates[name].append(tokens / seconds)
            print(f"step {step} {name:<12} loss {loss:.4f} {tokens} tokens {tokens / seconds:.1f} tokens/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["hugging_face"], strict=True)]
    summary = {
        "dtype": options.dtype,
        "loss_on": options.loss_on,
        "threads": torch.get_num_threads(),
        "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
