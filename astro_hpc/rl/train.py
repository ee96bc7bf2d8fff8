"""A step's optimizer steps on the policy objective, with the gauges that compare trainer and engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from astro_hpc.config import ConfigError
from astro_hpc.rl.batches import RolloutBatch
from astro_hpc.rl.objective import (
    importance_weights,
    kl_penalty,
    mismatch_gauges,
    mismatch_sums,
    policy_loss,
)
from astro_hpc.run.stage import StageContext
from astro_hpc.training.packing import PackedBatch, masked_copy
from astro_hpc.training.trainer import Trainer


class Clock(Protocol):
    """What measures the parts of a step."""

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        ...


class PolicyTrainer:
    """The Megatron trainer with the RL objective."""

    def __init__(self, ctx: StageContext, model_dir: Path) -> None:
        """Load `model_dir`; it is also the reference of the KL penalty, where there is one.

        Raises:
            ConfigError: the model, the parallel sizes or the precision can't be had here.
        """
        cfg = ctx.cfg
        self.settings, self.objective = cfg.rl, cfg.rl.objective
        if self.objective.importance_correction.startswith("sequence") and cfg.parallel.context_parallel_size > 1:
            raise ConfigError(
                f"rl.objective.importance_correction={self.objective.importance_correction} needs whole responses on "
                "a rank; set parallel.context_parallel_size=1 or correct by token"
            )
        self.trainer = Trainer(
            hf_dir=model_dir,
            parallel=cfg.parallel,
            precision=cfg.precision,
            optimizer=cfg.rl.optimizer,
            total_steps=cfg.rl.num_steps * cfg.rl.mini_batches * cfg.rl.num_epochs,
            seed=ctx.seed("rl", "trainer"),
        )
        if self.objective.kl_coefficient > 0:
            self.trainer.remember_reference()

    def train(self, batch: RolloutBatch, clock: Clock) -> dict[str, Any]:
        """One optimizer step a mini-batch. The old log-probabilities are those of the weights before the first.

        A mini-batch without signal has nothing to learn from: weights and moments stay as they are, but the schedule
        moves on, so that its position follows from the number of steps alone.
        """
        packs = [self._mine(packs) for packs in batch.mini_batches]
        clock.lap("prepare")
        # With one optimizer step the policy is the old policy while its gradient is taken.
        on_policy = len(packs) == 1
        if not on_policy:
            self._add("old_logprobs", packs, self.trainer.token_logprobs_of)
        if self.objective.kl_coefficient > 0:
            self._add("reference_logprobs", packs, self.trainer.reference_logprobs_of)
        clock.lap("logprobs")

        def loss_fn(logprobs: torch.Tensor, pack: PackedBatch) -> tuple[torch.Tensor, dict[str, float]]:
            mask = pack.loss_mask > 0
            extras = {name: values[mask] for name, values in pack.extras.items()}
            new = logprobs[mask]
            old = new.detach() if on_policy else extras["old_logprobs"]
            engine, responses = extras["rollout_logprobs"], extras["responses"].long()
            correction = importance_weights(old, engine, responses, self.objective)
            loss, clipped = policy_loss(
                new,
                old,
                correction,
                extras["advantages"],
                extras["weights"],
                self.objective,
                extras.get("reference_logprobs"),
            )
            sums = {**mismatch_sums(old, engine, responses, self.objective), "clipped": float(clipped.sum())}
            if "reference_logprobs" in extras:
                sums["reference_kl"] = float(kl_penalty(new.detach(), extras["reference_logprobs"], "k3").sum())
            return loss, sums

        rows = [self.trainer.train_step(mine, loss_fn) if mine else self.trainer.skip_step() for mine in packs]
        return _summary(rows)

    def _mine(self, packs: Sequence[PackedBatch]) -> list[PackedBatch]:
        """This data-parallel rank's packs; all ranks get equally many, one without loss fills in."""
        if not packs:
            return []
        rank, size = self.trainer.data_rank_and_size
        mine = list(packs[rank::size])
        filler = masked_copy(packs[0])
        filler.extras = {name: torch.zeros_like(values) for name, values in packs[0].extras.items()}
        return mine + [filler] * (-(-len(packs) // size) - len(mine))

    def _add(self, name: str, packs: Sequence[Sequence[PackedBatch]], score: Any) -> None:
        """Put a log-probability of each target into the packs' extras."""
        flat = [pack for mine in packs for pack in mine]
        for pack, logprobs in zip(flat, score(flat), strict=True):
            pack.extras[name] = logprobs


def _summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """A step's numbers from those of its optimizer steps; gauges are over all of them."""
    sums: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            sums[name] = max(sums.get(name, 0.0), value) if name.startswith("max_") else sums.get(name, 0.0) + value
    tokens = int(sums.get("mismatch_tokens", 0))
    row = {
        "loss": sums["loss"],
        "grad_norm": max(row["grad_norm"] for row in rows),
        "lr": rows[-1]["lr"],
        "trained_tokens": tokens,
        "clipped_share": sums.get("clipped", 0.0) / max(tokens, 1),
        **mismatch_gauges(sums),
    }
    if "reference_kl" in sums:
        row["reference_kl"] = sums["reference_kl"] / max(tokens, 1)
    return row
