"""`rl`: the trainer and the engine take turns in one process.

A step: sample a group of responses for each prompt, verify them, train on them, push the new weights into the engine.
The loop's state is the trainer's checkpoint and the number of finished steps; prompts and seeds follow from the step,
and on resume the weights are pushed before anything is sampled, so a resumed run equals an uninterrupted one as far as
the engine's arithmetic repeats.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from astro_hpc.cloning.phrases import Phrases
from astro_hpc.config import ConfigError
from astro_hpc.config.schema import RLConfig
from astro_hpc.inference import make_engine
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.rl.batches import RolloutBatch, make_batch, permuted_prompts
from astro_hpc.rl.objective import mismatch, policy_loss
from astro_hpc.rl.rollouts import Rollout, Sampler
from astro_hpc.run.files import read_jsonl, write_jsonl_atomic
from astro_hpc.run.metrics import check_metrics, open_metrics
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.training.packing import PackedBatch
from astro_hpc.training.trainer import Trainer
from astro_hpc.verifier.pool import VerifierPool


def run(ctx: StageContext, model_dir: Path, prompts: Path) -> list[Path]:
    """Train `model_dir` on the problems of `prompts`; writes checkpoints/, rollouts/, metrics.jsonl and hf/.

    Raises:
        ConfigError: settings that this topology can't carry out.
        CheckpointedExit: asked to stop; the state is saved.
    """
    settings = ctx.cfg.rl
    _check(settings, ctx.cfg.inference.max_model_len)
    check_metrics(ctx.cfg.metrics)
    problems = [Problem.from_json(row) for row in read_jsonl(prompts)]
    ctx.stop_after(settings.checkpoint.deadline_minutes, settings.checkpoint.limit_margin_minutes)
    loop = _Loop(ctx, model_dir, problems)
    try:
        loop.run()
        outputs = [loop.trainer.export_hf(ctx.dir / "hf")]
    finally:
        loop.close()
    return [*outputs, ctx.dir / "metrics.jsonl"]


def _check(settings: RLConfig, max_model_len: int) -> None:
    if torch.cuda.is_available():
        raise ConfigError(
            "rl: engine and trainer share one process and push weights in memory, which is built for CPU alone yet; "
            "run this stage where no GPU is visible (CUDA_VISIBLE_DEVICES=)"
        )
    if settings.temperature != 1.0:
        raise ConfigError(
            f"rl.temperature={settings.temperature}: the trainer's log-probabilities are at temperature 1, so the "
            f"importance ratio would be wrong; set it to 1.0"
        )
    responses = settings.prompts_per_step * settings.group_size
    if responses % settings.mini_batches:
        raise ConfigError(
            f"rl.mini_batches={settings.mini_batches} does not divide the {responses} responses of a step "
            f"(prompts_per_step={settings.prompts_per_step} x group_size={settings.group_size}); choose a divisor"
        )
    if settings.seq_length < max_model_len - 1:
        raise ConfigError(
            f"rl.seq_length={settings.seq_length} can't hold every prompt and response of up to "
            f"inference.max_model_len={max_model_len} tokens; raise it to {max_model_len}"
        )
    if settings.max_response_tokens >= max_model_len:
        raise ConfigError(
            f"rl.max_response_tokens={settings.max_response_tokens} leaves no room for a prompt in "
            f"inference.max_model_len={max_model_len}; lower it or raise max_model_len"
        )


class _Loop:
    def __init__(self, ctx: StageContext, model_dir: Path, problems: Sequence[Problem]) -> None:
        cfg = ctx.cfg
        self.ctx, self.settings, self.problems = ctx, cfg.rl, problems
        self.phrases = Phrases.load(cfg.clone.phrases)
        self.pool = VerifierPool(cfg.verifier)
        # The engine first: it sets up torch.distributed for itself, and the trainer joins what is there.
        self.engine = make_engine(model_dir, cfg.inference, ctx.seed("rl"), ctx.log_dir)
        self.trainer = Trainer(
            hf_dir=model_dir,
            parallel=cfg.parallel,
            precision=cfg.precision,
            optimizer=cfg.rl.optimizer,
            total_steps=cfg.rl.num_steps * cfg.rl.mini_batches,
            seed=ctx.seed("rl", "trainer"),
        )
        self.sampler = Sampler(
            self.engine,
            self.pool,
            PromptStyle.load(cfg.model.prompt_style),
            temperature=cfg.rl.temperature,
            top_p=1.0,
            max_tokens=cfg.rl.max_response_tokens,
        )
        self.checkpoints = ctx.dir / "checkpoints"
        self.tokens = 0

    def run(self) -> None:
        """From the last checkpoint, or from the start, to the last step."""
        first = 0
        if (found := self.trainer.load_checkpoint(self.checkpoints)) is not None:
            first, state = found
            self.tokens = int(state["tokens"])
            self.engine.load_weights(self.trainer.named_hf_tensors(), version=first)
            self.ctx.say(f"resumed after step {first}")
        with (
            open_metrics(self.ctx.dir, self.ctx.cfg.metrics, f"{self.ctx.cfg.name}/{self.ctx.label}", first + 1) as log,
            self.ctx.progress(self.settings.num_steps, "steps", done=first) as progress,
        ):
            for step in range(first + 1, self.settings.num_steps + 1):
                row = self._step(step)
                log.log(step, **row)
                progress.update(reward=f"{row['reward']:+.3f}", pass_rate=f"{row['pass_rate']:.2f}")
                last, stop = step == self.settings.num_steps, self.ctx.stop_requested
                if last or stop or step % self.settings.checkpoint.every_steps == 0:
                    self.trainer.save_checkpoint(
                        self.checkpoints,
                        step,
                        {"tokens": self.tokens},
                        self.settings.checkpoint.keep_last,
                        keep_every=self.settings.checkpoint.keep_every,
                    )
                if stop and not last:
                    raise CheckpointedExit(f"{self.ctx.label}: saved after step {step} of {self.settings.num_steps}")
        self.ctx.count(tokens=self.tokens, steps=self.settings.num_steps, prompts=len(self.problems))

    def close(self) -> None:
        """Free the engine and the verifier's workers."""
        self.engine.close()
        self.pool.close()

    def _step(self, step: int) -> dict[str, Any]:
        clock = _Clock()
        rollouts = self._generate(step)
        clock.lap("generate")
        write_jsonl_atomic(self.ctx.dir / "rollouts" / f"step_{step:08d}.jsonl", (r.to_json() for r in rollouts))
        batch = make_batch(rollouts, self.settings, self.ctx.seed("rl", "pack", step))
        clock.lap("prepare")
        trained = self._train(batch)
        clock.lap("train")
        if step < self.settings.num_steps:
            self.engine.load_weights(self.trainer.named_hf_tensors(), version=step)
        clock.lap("push")
        self.tokens += sum(len(rollout.token_ids) for rollout in rollouts)
        return {**self._behaviour(rollouts), **trained, "tokens": self.tokens, **clock.laps}

    def _generate(self, step: int) -> list[Rollout]:
        """The step's rollouts, a prompt's group side by side."""
        chosen = permuted_prompts(
            len(self.problems), self.settings.prompts_per_step, step, self.ctx.seed("rl", "order")
        )
        jobs = [
            (self.problems[index], self.ctx.seed("rl", step, place, sample))
            for place, index in enumerate(chosen)
            for sample in range(self.settings.group_size)
        ]
        return self.sampler.sample(jobs)

    def _train(self, batch: RolloutBatch) -> dict[str, float]:
        """One optimizer step a mini-batch; the gauges compare trainer and engine before the first of them."""
        objective = self.settings.objective
        on_policy = len(batch.mini_batches) == 1
        if not on_policy:
            for packs in batch.mini_batches:
                for pack in packs:
                    pack.extras["old_logprobs"] = self.trainer.token_logprobs(pack)
        seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def loss_fn(logprobs: torch.Tensor, pack: PackedBatch) -> tuple[torch.Tensor, dict[str, float]]:
            mask = pack.loss_mask > 0
            new = logprobs[mask]
            old = new.detach() if on_policy else pack.extras["old_logprobs"][mask]
            engine = pack.extras["rollout_logprobs"][mask]
            loss, clipped = policy_loss(
                new, old, engine, pack.extras["advantages"][mask], pack.extras["weights"][mask], objective
            )
            seen.append((old, engine, clipped))
            return loss, {}

        results = [self.trainer.train_step(packs, loss_fn) for packs in batch.mini_batches if packs]
        if not results:  # no group had a signal
            return {"trained_tokens": 0}
        old, engine, clipped = (torch.cat(parts) for parts in zip(*seen, strict=True))
        gauges = mismatch(old, engine, objective.truncated_importance_cap)
        return {
            "loss": sum(result["loss"] for result in results),
            "grad_norm": max(result["grad_norm"] for result in results),
            "lr": results[-1]["lr"],
            "trained_tokens": int(old.numel()),
            "clipped_share": float(clipped.float().mean()),
            "entropy": float(-engine.mean()),
            **{f"mismatch_{name}": value for name, value in asdict(gauges).items()},
        }

    def _behaviour(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """What the responses were like: rewards, lengths of right and wrong apart, backtracks."""
        right = [len(r.token_ids) for r in rollouts if r.outcome == "right"]
        wrong = [len(r.token_ids) for r in rollouts if r.outcome != "right"]
        size = self.settings.group_size
        groups = [{r.reward for r in rollouts[i : i + size]} for i in range(0, len(rollouts), size)]
        return {
            "reward": _mean([r.reward for r in rollouts]),
            "pass_rate": len(right) / len(rollouts),
            "unknown": sum(r.outcome == "unknown" for r in rollouts) / len(rollouts),
            "groups_with_signal": sum(len(rewards) > 1 for rewards in groups) / len(groups),
            "response_tokens": _mean([*right, *wrong]),
            "response_tokens_right": _mean(right),
            "response_tokens_wrong": _mean(wrong),
            "truncated": sum(r.truncated for r in rollouts) / len(rollouts),
            "backtracks": _mean([self.phrases.count_backtracks(r.text) for r in rollouts]),
        }


class _Clock:
    """Seconds between laps, as `NAME_seconds`."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[f"{name}_seconds"] = round(now - self._last, 3)
        self._last = now


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
