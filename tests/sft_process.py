"""Runs the SFT loop as a process of its own, for tests that kill it: sft_process.py MODEL FOLDER."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from astro_hpc.config.schema import (
    CheckpointConfig,
    MetricsConfig,
    OptimizerConfig,
    PrecisionConfig,
    ProblemsConfig,
    RunConfig,
    SignsSource,
    TrainingConfig,
)
from astro_hpc.run.stage import CheckpointedExit, StageContext


def context(folder: Path) -> StageContext:
    """A stage context whose folder holds examples.jsonl."""
    cfg = RunConfig(
        name="test",
        runs_dir=folder,
        problems=ProblemsConfig(train=[SignsSource(count=1)]),
        precision=PrecisionConfig(dtype="bf16"),
        metrics=MetricsConfig(tensorboard=True),
    )
    return StageContext(cfg=cfg, dir=folder, label="sft")


def training() -> TrainingConfig:
    """Two epochs of small steps, a checkpoint at every fifth, the validation loss at every fourth."""
    return TrainingConfig(
        num_epochs=2,
        seq_length=48,
        global_batch_size=2,
        loss_on="completion",
        validation_fraction=0.1,
        validate_every_steps=4,
        optimizer=OptimizerConfig(lr=1e-3),
        checkpoint=CheckpointConfig(every_steps=5, keep_last=2),
    )


def run(model: Path, folder: Path) -> StageContext:
    """Train in `folder`, as the SFT stage does."""
    from astro_hpc.training.sft import train

    ctx = context(folder)
    signal.signal(signal.SIGTERM, ctx.request_stop)
    train(ctx, examples=folder / "examples.jsonl", training=training(), init_hf=model, label="sft")
    return ctx


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]), Path(sys.argv[2]))
    except CheckpointedExit as stopped:
        print(stopped)
        sys.exit(75)
