"""The TRL side of bench_sft.py, run by the Python of an environment that has TRL; imports nothing of ours.

PYTHON tools/bench_sft_trl.py MODEL TRACES.jsonl OUT.json STEPS LR bf16|fp32 completion|all default|no-recompute
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
    """Seconds from one step's end to the next's, data loading included; real and fed tokens of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.fed: list[int] = []
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        print(f"trl step {len(self.seconds)}: {self.seconds[-1]:.2f} s", file=sys.stderr, flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    model, traces, out, steps, lr, dtype, loss_on, recompute = sys.argv[1:]
    rows = [json.loads(line) for line in open(traces, encoding="utf-8")]  # noqa: SIM115
    dataset = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    clock = Clock()
    changed = {} if recompute == "default" else {"gradient_checkpointing": False}
    config = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="bench-trl-"),
        max_steps=int(steps),
        learning_rate=float(lr),
        lr_scheduler_type="constant",
        bf16=dtype == "bf16",
        completion_only_loss=loss_on == "completion",
        # The rest is TRL's own defaults; these three write files or talk, and cost no step anything.
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        **changed,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
    )
    collate = trainer.data_collator

    def counting(examples: Any) -> Any:
        batch = collate(examples)
        real = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
        clock.tokens.append(int(real.sum()))
        clock.fed.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = counting
    trainer.train()
    result = {
        "seconds": clock.seconds,
        "tokens": clock.tokens[: len(clock.seconds)],
        "fed": clock.fed[: len(clock.seconds)],
        "losses": clock.losses,
        "threads": torch.get_num_threads(),
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "settings": {
            "per_device_train_batch_size": config.per_device_train_batch_size,
            "gradient_checkpointing": config.gradient_checkpointing,
            "packing": config.packing,
            "bf16": config.bf16,
            "optim": str(config.optim),
            "weights": str(next(trainer.model.parameters()).dtype),
        },
    }
    with open(out, "w", encoding="utf-8") as handle:
        json.dump(result, handle)


if __name__ == "__main__":
    main()
