"""Supervised training on a JSON Lines file of prompts and completions: the warm-up and the SFT stages."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from astro_hpc.config.schema import TrainingConfig
from astro_hpc.run.metrics import check_metrics, open_metrics
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.training.data import ExampleSet, StepPlan, held_out_share, load_examples, load_tokenizer
from astro_hpc.training.meter import StepMeter
from astro_hpc.training.packing import PackedBatch
from astro_hpc.training.trainer import LossFunction, Trainer


def train(ctx: StageContext, *, examples: Path, training: TrainingConfig, init_hf: Path, label: str) -> list[Path]:
    """Train `init_hf` on `examples`, from the newest checkpoint in `ctx.dir` when there is one.

    The loss of a step is the mean over its targets (cross-entropy, as in section 3.1 of the paper). An interrupted
    and resumed run makes the same steps as an uninterrupted one. metrics.jsonl has one row a step; see `_row`.

    Args:
        examples: rows {"prompt": text, "completion": text, "problem_id": text, ...}.
        label: names the run in its seeds.

    Returns:
        The exported Hugging Face folder and metrics.jsonl.

    Raises:
        CheckpointedExit: a stop was asked for; everything is saved.
        ConfigError: the examples, the model, the precision or the metrics can't be had.
    """
    check_metrics(ctx.cfg.metrics)
    checkpoints, exported = ctx.dir / "checkpoints", ctx.dir / "hf"
    found = _load(ctx, examples, training, init_hf)
    plan = StepPlan(found.examples, training, ctx.seed(label, "data"))
    trainer = Trainer(
        init_hf, ctx.cfg.parallel, ctx.cfg.precision, training.optimizer, len(plan), ctx.seed(label, "trainer")
    )
    ctx.stop_after(training.checkpoint.deadline_minutes, training.checkpoint.limit_margin_minutes)
    validation = _Validation(found, training, trainer, len(plan))
    meter = StepMeter(trainer.shape, ctx.cfg.parallel, ctx.cfg.precision)
    resumed = trainer.load_checkpoint(checkpoints)
    start = plan.steps_done(*resumed) if resumed else 0
    if start:
        ctx.say(f"going on after step {start} of {len(plan)}")
    started, trained_tokens, checkpoint_seconds = time.monotonic(), 0, 0.0
    with (
        open_metrics(ctx.dir, ctx.cfg.metrics, f"{ctx.cfg.name}/{ctx.label}", start + 1, write=ctx.rank == 0) as log,
        ctx.progress(len(plan), "steps", start) as progress,
    ):
        for step in range(start, len(plan)):
            began = time.monotonic()
            batches = plan.batches(step, *trainer.data_rank_and_size)
            loss_fn = mean_cross_entropy(plan.num_targets(step))
            loaded = time.monotonic()
            result = trainer.train_step(batches, loss_fn)
            ended = time.monotonic()
            fed, sync = trainer.tokens_fed, trainer.gradient_sync_seconds
            speed = meter.measure(plan.lengths(step), plan.num_targets(step), fed, ended - began, sync)
            trained_tokens += plan.num_tokens(step)
            row = _row(result, speed, loaded - began, ended - loaded - sync, checkpoint_seconds)
            row |= validation.after(step)
            log.log(step + 1, **row)
            shown = {"loss": f"{row['loss']:.4f}", "tokens_per_second": f"{row['tokens_per_second']:.0f}"}
            progress.update(1, **shown, **_shown(row))
            logged = time.monotonic()
            trainer.finish_checkpoint(block=False)
            last, stop = step + 1 == len(plan), trainer.on_any_rank(ctx.stop_requested)
            if stop or last or (step + 1) % training.checkpoint.every_steps == 0:
                log.sync()
                keep_last, keep_every = training.checkpoint.keep_last, training.checkpoint.keep_every
                position = plan.position(step + 1)
                trainer.save_checkpoint(checkpoints, step + 1, position, keep_last, not stop, keep_every)
            checkpoint_seconds = time.monotonic() - logged
            if stop and not last:
                raise CheckpointedExit(f"{label}: stopped after step {step + 1} of {len(plan)}")
    trainer.export_hf(exported)
    trainer.finish_checkpoint()
    seconds = time.monotonic() - started
    ctx.count(
        examples=len(found.examples),
        examples_dropped=found.num_dropped,
        examples_cut=found.num_cut,
        examples_validation=len(found.validation),
        steps=len(plan),
        tokens=sum(plan.num_tokens(step) for step in range(len(plan))),
        tokens_per_second=round(trained_tokens / seconds, 1) if trained_tokens else None,
    )
    return [exported, ctx.dir / "metrics.jsonl"]


def _load(ctx: StageContext, path: Path, training: TrainingConfig, init_hf: Path) -> ExampleSet:
    """The examples, with what was left out or held out said to the user."""
    held_out = held_out_share(training.validation_fraction, ctx.seed)
    found = load_examples(path, load_tokenizer(init_hf), training.seq_length, training.over_long, held_out)
    if found.num_dropped:
        ctx.say(f"{found.num_dropped} examples longer than seq_length {training.seq_length} tokens left out")
    if found.num_cut:
        ctx.say(f"{found.num_cut} examples cut to seq_length {training.seq_length} tokens")
    if training.validation_fraction:
        ctx.say(f"{len(found.validation)} of {len(found.examples) + len(found.validation)} examples held out")
    return found


def _row(
    result: dict[str, float],
    speed: dict[str, float],
    data_seconds: float,
    compute_seconds: float,
    checkpoint_seconds: float,
) -> dict[str, Any]:
    """The numbers of one step.

    loss (mean over the step's targets), grad_norm (before clipping), lr; what `StepMeter.measure` returns;
    data_seconds: making the packs; compute_seconds: forward, backward and optimizer with the communication inside
    them, without gradient_sync_seconds; checkpoint_seconds: how long training stood still for checkpoints after the
    step before (0 at the first step of an attempt).
    """
    return {
        "loss": result["loss"],
        "grad_norm": result["grad_norm"],
        "lr": result["lr"],
        **speed,
        "data_seconds": data_seconds,
        "compute_seconds": compute_seconds,
        "checkpoint_seconds": checkpoint_seconds,
    }


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """What the terminal shows where it is there."""
    shown = {"mfu": f"{row['mfu']:.1%}"} if "mfu" in row else {}
    return shown | ({"validation_loss": f"{row['validation_loss']:.4f}"} if "validation_loss" in row else {})


class _Validation:
    """The mean loss on the examples that are held out."""

    def __init__(self, found: ExampleSet, training: TrainingConfig, trainer: Trainer, num_steps: int) -> None:
        self._trainer, self._every, self._num_steps = trainer, training.validate_every_steps, num_steps
        self._plan: StepPlan | None = None
        if found.validation:
            # One step that holds them all; no draw decides anything but the packs.
            whole = training.model_copy(update={"num_epochs": 1, "global_batch_size": len(found.validation)})
            self._plan = StepPlan(found.validation, whole, seed=0)

    def after(self, step: int) -> dict[str, float]:
        """validation_loss and validation_seconds where step `step` (0-based) is one to measure after, else nothing."""
        if self._plan is None or ((step + 1) % self._every and step + 1 < self._num_steps):
            return {}
        began = time.monotonic()
        batches = self._plan.batches(0, *self._trainer.data_rank_and_size)
        result = self._trainer.evaluate(batches, mean_cross_entropy(self._plan.num_targets(0)))
        return {"validation_loss": result["loss"], "validation_seconds": time.monotonic() - began}


def mean_cross_entropy(num_targets: int) -> LossFunction:
    """Cross-entropy added up over a micro-batch, divided by the whole step's targets."""

    def loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, float]]:
        return -(logprobs * batch.loss_mask).sum() / max(num_targets, 1), {}

    return loss
