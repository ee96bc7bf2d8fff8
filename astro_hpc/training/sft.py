"""Supervised training on a JSON Lines file of prompts and completions: the warm-up and the SFT stages."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from astro_hpc.config.schema import TrainingConfig
from astro_hpc.run.metrics import MetricsLog
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.training.data import StepPlan, load_examples, load_tokenizer
from astro_hpc.training.packing import PackedBatch
from astro_hpc.training.trainer import LossFunction, Trainer


def train(ctx: StageContext, *, examples: Path, training: TrainingConfig, init_hf: Path, label: str) -> list[Path]:
    """Train `init_hf` on `examples`, from the newest checkpoint in `ctx.dir` when there is one.

    The loss of a step is the mean over its targets (cross-entropy, as in section 3.1 of the paper). An interrupted
    and resumed run makes the same steps as an uninterrupted one.

    Args:
        examples: rows {"prompt": text, "completion": text, ...}.
        label: names the run in its seeds.

    Returns:
        The exported Hugging Face folder and metrics.jsonl.

    Raises:
        CheckpointedExit: a stop was asked for; everything is saved.
        ConfigError: the examples or the model can't be used.
    """
    metrics_path, checkpoints, exported = ctx.dir / "metrics.jsonl", ctx.dir / "checkpoints", ctx.dir / "hf"
    found = load_examples(examples, load_tokenizer(init_hf), training.seq_length)
    if found.num_dropped:
        ctx.say(f"{found.num_dropped} examples longer than seq_length {training.seq_length} tokens left out")
    plan = StepPlan(found.examples, training, ctx.seed(label, "data"))
    trainer = Trainer(
        init_hf, ctx.cfg.parallel, ctx.cfg.precision, training.optimizer, len(plan), ctx.seed(label, "trainer")
    )
    ctx.stop_after(training.checkpoint.deadline_minutes, training.checkpoint.limit_margin_minutes)
    resumed = trainer.load_checkpoint(checkpoints)
    start = plan.steps_done(*resumed) if resumed else 0
    if start:
        ctx.say(f"going on after step {start} of {len(plan)}")
    started, trained_tokens, checkpoint_seconds = time.monotonic(), 0, 0.0
    with (
        MetricsLog(metrics_path, start + 1, write=ctx.rank == 0) as log,
        ctx.progress(len(plan), "steps", start) as progress,
    ):
        for step in range(start, len(plan)):
            began = time.monotonic()
            batches = plan.batches(step, *trainer.data_rank_and_size)
            loss_fn = mean_cross_entropy(plan.num_targets(step))
            loaded = time.monotonic()
            result = trainer.train_step(batches, loss_fn)
            ended = time.monotonic()
            tokens = plan.num_tokens(step)
            trained_tokens += tokens
            log.log(
                step + 1,
                loss=result["loss"],
                grad_norm=result["grad_norm"],
                lr=result["lr"],
                tokens=tokens,
                tokens_per_second=tokens / (ended - began),
                data_seconds=loaded - began,
                compute_seconds=ended - loaded,
                checkpoint_seconds=checkpoint_seconds,
            )
            progress.update(1, loss=f"{result['loss']:.4f}", tokens_per_second=f"{tokens / (ended - began):.0f}")
            trainer.finish_checkpoint(block=False)
            last, stop = step + 1 == len(plan), trainer.on_any_rank(ctx.stop_requested)
            if stop or last or (step + 1) % training.checkpoint.every_steps == 0:
                keep_last, keep_every = training.checkpoint.keep_last, training.checkpoint.keep_every
                position = plan.position(step + 1)
                trainer.save_checkpoint(checkpoints, step + 1, position, keep_last, not stop, keep_every)
            checkpoint_seconds = time.monotonic() - ended
            if stop and not last:
                raise CheckpointedExit(f"{label}: stopped after step {step + 1} of {len(plan)}")
    trainer.export_hf(exported)
    trainer.finish_checkpoint()
    seconds = time.monotonic() - started
    ctx.count(
        examples=len(found.examples),
        examples_dropped=found.num_dropped,
        steps=len(plan),
        tokens=sum(plan.num_tokens(step) for step in range(len(plan))),
        tokens_per_second=round(trained_tokens / seconds, 1) if trained_tokens else None,
    )
    return [exported, metrics_path]


def mean_cross_entropy(num_targets: int) -> LossFunction:
    """Cross-entropy added up over a micro-batch, divided by the whole step's targets."""

    def loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, float]]:
        return -(logprobs * batch.loss_mask).sum() / max(num_targets, 1), {}

    return loss
