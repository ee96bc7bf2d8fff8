"""The TRL side of bench_rl.py, run by the Python of an environment that has TRL; imports nothing of ours.

PYTHON tools/bench_rl_trl.py MODEL PROMPTS.jsonl OUT.json STEPS PROMPTS_PER_STEP GROUP MAX_TOKENS DTYPE
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Seconds from one optimizer step's end to the next's: generation, scoring and training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        print(f"trl step {len(self.seconds)}: {self.seconds[-1]:.2f} s", file=sys.stderr, flush=True)


def main() -> None:
    model, prompts, out, *numbers, dtype = sys.argv[1:]
    steps, prompts_per_step, group, max_tokens = map(int, numbers)
    rows = [json.loads(line) for line in open(prompts, encoding="utf-8")]  # noqa: SIM115
    clock, generated = Clock(), []

    def share_of_letters(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        generated.append(sum(map(len, completion_ids)))
        return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]

    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="bench-trl-"),
        max_steps=steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        per_device_train_batch_size=prompts_per_step * group,
        num_generations=group,
        max_completion_length=max_tokens,
        bf16=dtype == "bf16",
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=share_of_letters,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
    )
    trainer.train()
    with open(out, "w", encoding="utf-8") as handle:
        json.dump(
            {
                "seconds": clock.seconds,
                "tokens": generated[: len(clock.seconds)],
                "threads": torch.get_num_threads(),
                "versions": {"trl": trl.__version__, "transformers": transformers.__version__},
            },
            handle,
        )


if __name__ == "__main__":
    main()
