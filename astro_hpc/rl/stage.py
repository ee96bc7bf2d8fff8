"""`rl`: sample groups of responses, judge them, train on them, push the new weights to the engine; step after step.

The loop reads as one step does: `source` gives the step's groups (sampled in the background by `worker`, or replayed
from files), `batches` makes training data of them, `train` carries out the optimizer steps, `weights` pushes.

Its state is the trainer's checkpoint with the position in the sequence of prompts, what is in flight, and the weights'
version, which is the number of finished steps. On resume the weights are pushed before anything is sampled. Prompts and
seeds follow from positions, and the rollouts of steps that were under way are on disk, so in sync mode a resumed run
equals an uninterrupted one as far as the arithmetic repeats.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from astro_hpc.cloning.phrases import Phrases
from astro_hpc.config import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.inference import make_engine
from astro_hpc.inference.engine import Engine
from astro_hpc.model.parallel import launched_world_size, tell_all
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.style import PromptStyle
from astro_hpc.rl.batches import make_batch
from astro_hpc.rl.behaviour import behaviour, write_samples
from astro_hpc.rl.checks import check_settings
from astro_hpc.rl.reward import Reward
from astro_hpc.rl.rollouts import Sampler
from astro_hpc.rl.source import GroupSource, LiveSource, ReplaySource, StepGroups, step_file
from astro_hpc.rl.train import PolicyTrainer
from astro_hpc.rl.weights import check_equal_weights, make_weight_sync
from astro_hpc.rl.worker import RolloutWorker
from astro_hpc.run.files import read_jsonl, write_json_atomic
from astro_hpc.run.metrics import Metrics, check_metrics, open_metrics
from astro_hpc.run.progress import Progress
from astro_hpc.run.ranks import ranks_here
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.verifier.pool import VerifierPool

_MISMATCH_STEPS = 2
"""So many steps on end must exceed rl.max_mismatch_kl before the run stops."""


def run(ctx: StageContext, model_dir: Path, prompts: Path, replay: Path | None = None) -> list[Path]:
    """Train `model_dir` on the problems of `prompts`; writes checkpoints/, rollouts/, samples/, metrics.jsonl and hf/.

    Args:
        replay: train on this folder's rollouts; by default on that of `rl.replay`, where it is set.

    Raises:
        ConfigError: settings that can't be carried out, or a stop rule (`rl.max_mismatch_kl`) that came true.
        CheckpointedExit: asked to stop; the state is saved.
        FloatingPointError: the loss or the gradient is not finite; the last checkpoint is whole.
        TimeoutError: sampling stands still; says what was waited for.
    """
    check_settings(ctx.cfg)
    _check_place(ctx.cfg)
    check_metrics(ctx.cfg.metrics)
    problems = [Problem.from_json(row) for row in read_jsonl(prompts)]
    checkpoint = ctx.cfg.rl.checkpoint
    ctx.stop_after(checkpoint.deadline_minutes, checkpoint.limit_margin_minutes)
    with contextlib.ExitStack() as stack:
        loop = _Loop(ctx, model_dir, problems, replay or ctx.cfg.rl.replay, stack)
        if ctx.cfg.rl.rollouts_only:
            if ctx.rank == 0:
                loop.sample_only()
            return [ctx.dir / "rollouts", ctx.dir / "metrics.jsonl"]
        loop.run()
        exported = loop.policy.trainer.export_hf(ctx.dir / "hf")
    return [exported, ctx.dir / "metrics.jsonl"]


def _check_place(cfg: RunConfig) -> None:
    """Refuse an engine that these processes can't hold."""
    settings = cfg.rl
    in_process = settings.replay is None and cfg.inference.engine == "vllm"
    if settings.rollouts_only and launched_world_size() > 1:
        raise ConfigError(
            f"rl.rollouts_only samples in one process, and {launched_world_size()} ranks were started; start one"
        )
    if in_process and launched_world_size() > 1:
        raise ConfigError(
            f"rl: {launched_world_size()} ranks train, and inference.engine=vllm would sample in one of their "
            "processes, which can't hold two process groups; set inference.engine=vllm-server, or rl.replay"
        )
    if in_process and torch.cuda.is_available():
        raise ConfigError(
            "rl: engine and trainer sharing one process (inference.engine=vllm) is built for CPU alone yet; set "
            "inference.engine=vllm-server, or run where no GPU is visible (CUDA_VISIBLE_DEVICES=)"
        )


class _Loop:
    def __init__(
        self,
        ctx: StageContext,
        model_dir: Path,
        problems: Sequence[Problem],
        replay: Path | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.ctx, self.settings, self.problems, self.replay = ctx, ctx.cfg.rl, problems, replay
        self.stack = stack
        self.style = PromptStyle.load(ctx.cfg.model.prompt_style)
        self.phrases = Phrases.load(ctx.cfg.clone.phrases)
        self.rollouts = ctx.dir / "rollouts" if replay is None else replay
        self.checkpoints = ctx.dir / "checkpoints"
        self.weights = make_weight_sync(self.settings.weight_sync, ctx.dir / "weights")
        self.tokens = 0
        self.best = -1.0
        self.mismatched_steps = 0
        self.saved_step = 0
        self.worker: RolloutWorker | None = None
        self.engine: Engine | None = None
        if replay is None and ctx.rank == 0:
            self._start_sampling(model_dir, stack)
        if not self.settings.rollouts_only:
            self.policy = PolicyTrainer(ctx, model_dir)

    def _start_sampling(self, model_dir: Path, stack: contextlib.ExitStack) -> None:
        """The engine and what goes with it; before the trainer, which joins the process group that an engine makes."""
        cfg = self.ctx.cfg
        reward = Reward(self.settings.reward)  # first: it may be refused
        self.pool = stack.enter_context(VerifierPool(cfg.verifier))
        trained = 0 if self.settings.rollouts_only else ranks_here()
        self.engine = make_engine(model_dir, cfg.inference, self.ctx.seed("rl"), self.ctx.log_dir, gpus_taken=trained)
        stack.callback(self.engine.close)
        self.worker = RolloutWorker(
            self.engine,
            self.pool,
            self.style,
            reward,
            self.settings,
            seed_of=lambda position, sample, piece: self.ctx.seed("rl", position, sample, piece),
        )
        stack.callback(self.worker.close)

    # --- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """From the last checkpoint, or from the start, to the last step."""
        first, state = 0, None
        if (found := self.policy.trainer.load_checkpoint(self.checkpoints)) is not None:
            first, state = found
            self.saved_step = first
            self.tokens, self.best = int(state["tokens"]), float(state["best"])
            self.ctx.say(f"resumed after step {first}")
            self._push(first)  # before anything is sampled
        elif self.settings.weight_check_every and self.replay is None:
            self._check_weights(0)
        source = self._source(first, state)
        with self._log(first) as (log, progress):
            for step in range(first + 1, self.settings.num_steps + 1):
                if (row := self._step(step, source)) is None:  # a stop was asked for before its groups were there
                    self._stop(step - 1, source, log)
                log.log(step, **row)
                progress.update(reward=f"{row['reward']:+.3f}", pass_rate=f"{row['pass_rate']:.2f}")
                last, stop = step == self.settings.num_steps, self.policy.trainer.on_any_rank(self.ctx.stop_requested)
                if last or stop or step % self.settings.checkpoint.every_steps == 0:
                    log.sync()
                    self._save(step, source)
                if stop and not last:
                    self._stop(step, source, log)
        self.ctx.count(tokens=self.tokens, steps=self.settings.num_steps, prompts=len(self.problems))

    def sample_only(self) -> None:
        """Every step's rollouts, from the weights that the stage was given; those that are there are kept."""
        source = self._source(0, None)
        assert source is not None, "one process samples; there are no ranks"
        with self._log(0) as (log, progress):
            for step in range(1, self.settings.num_steps + 1):
                if (groups := source.take(step)) is None:
                    raise CheckpointedExit(f"{self.ctx.label}: sampled {step - 1} of {self.settings.num_steps} steps")
                row = self._behaviour(groups)
                log.log(step, **row)
                progress.update(reward=f"{row['reward']:+.3f}", pass_rate=f"{row['pass_rate']:.2f}")
                if self.ctx.stop_requested and step < self.settings.num_steps:
                    raise CheckpointedExit(f"{self.ctx.label}: sampled {step} of {self.settings.num_steps} steps")
        self.ctx.count(tokens=self.tokens, steps=self.settings.num_steps, prompts=len(self.problems))

    def _step(self, step: int, source: GroupSource | None) -> dict[str, Any] | None:
        """One whole step's numbers; None: a stop was asked for while its groups were being sampled."""
        clock = _Clock(self.engine, self.worker)
        groups: StepGroups | None = tell_all(source.take(step) if source is not None else None)
        if groups is None:
            return None
        clock.lap("generate")
        if self.ctx.rank == 0:
            write_samples(self.ctx.dir / "samples", step, groups.used, self.problems)
        batch = make_batch(groups.used, self.settings, self.ctx.seed("rl", "pack", step))
        trained = self.policy.train(batch, clock)
        self._check_health(step, trained)
        clock.lap("train")
        validation = self.settings.validation
        validates = validation is not None and step % validation.every_steps == 0
        # A push may wait for whole responses; a stage that is told to stop saves first, and pushes when it goes on.
        ends = step == self.settings.num_steps or self.policy.trainer.on_any_rank(self.ctx.stop_requested)
        if self.replay is None and (validates or not ends):
            self._push(step)
        clock.lap("push")
        row = {**self._behaviour(groups), **trained}
        if validates:
            row |= self._validate(step)
            clock.lap("validate")
        if self.worker is not None:
            row["event_loop_lag_seconds"] = round(self.worker.event_loop_lag_seconds, 3)
            self.worker.event_loop_lag_seconds = 0.0
        return {**row, "tokens": self.tokens, **clock.summary(row["sampled_tokens"])}

    def _stop(self, step: int, source: GroupSource | None, log: Metrics) -> NoReturn:
        """End the stage after `step`, so that it can go on from there."""
        if step > self.saved_step:
            log.sync()
            self._save(step, source)
        done = f"saved after step {step}" if step else "stopped before the first step"
        raise CheckpointedExit(f"{self.ctx.label}: {done} of {self.settings.num_steps}")

    def _source(self, first: int, state: dict[str, Any] | None) -> GroupSource | None:
        """Where groups come from; None on the ranks that are told."""
        if self.ctx.rank != 0:
            return None
        if self.replay is not None:
            return ReplaySource(self.replay, self.settings)
        assert self.worker is not None
        source = LiveSource(
            self.worker,
            self.problems,
            self.settings,
            folder=self.rollouts,
            order_seed=self.ctx.seed("rl", "order"),
            step=first,
            state=state,
            stop=lambda: self.ctx.stop_requested,
        )
        self.stack.callback(source.close)
        return source

    def _push(self, version: int) -> None:
        """Sampling is held only while the weights are replaced."""
        if self.worker is not None:
            self.worker.hold(self.settings.rollout_timeout_minutes * 60)
        self.weights.push(self.policy.trainer, self.engine, version)
        every = self.settings.weight_check_every
        if every and version % every == 0:
            self._check_weights(version)
        if self.worker is not None:
            self.worker.go_on()

    def _check_weights(self, version: int) -> None:
        seed = self.ctx.seed("rl", "weight check", version)
        asked = check_equal_weights(self.policy.trainer, self.engine, seed, f"{self.ctx.label}, version {version}")
        if not asked and self.ctx.rank == 0 and version == 0:
            self.ctx.say("this engine can't be asked for its weights: rl.weight_check_every has no effect")

    def _save(self, step: int, source: GroupSource | None) -> None:
        state = tell_all({"tokens": self.tokens, "best": self.best, **(source.state() if source else {})})
        checkpoint = self.settings.checkpoint
        self.policy.trainer.save_checkpoint(
            self.checkpoints, step, state, checkpoint.keep_last, keep_every=checkpoint.keep_every
        )
        self.saved_step = step

    def _check_health(self, step: int, trained: dict[str, Any]) -> None:
        """Stop before a spoilt model overwrites a good checkpoint, or when the two halves disagree."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(trained.get(name, 0.0)):
                raise FloatingPointError(
                    f"{self.ctx.label}: {name} is {trained[name]} at step {step}; checkpoints before this step are "
                    f"whole, and {step_file(self.rollouts, step)} holds what it was trained on (see rl.replay)"
                )
        limit, kl = self.settings.max_mismatch_kl, trained["mismatch_kl"]
        self.mismatched_steps = self.mismatched_steps + 1 if limit is not None and kl > limit else 0
        if self.mismatched_steps >= _MISMATCH_STEPS:
            raise ConfigError(
                f"{self.ctx.label}: KL(engine || trainer) is {kl:.3g}, above rl.max_mismatch_kl={limit}, for "
                f"{_MISMATCH_STEPS} steps up to step {step}: the engine does not sample from the model being trained; "
                "compare inference.dtype and quantization with precision, lower max_lag, or raise the limit"
            )

    def _validate(self, step: int) -> dict[str, float]:
        """Held-out problems; the best model so far is exported."""
        from astro_hpc.problems.sources import load_source

        validation = self.settings.validation
        assert validation is not None
        passed = 0.0
        if self.engine is not None:
            sampler = Sampler(
                self.engine,
                self.pool,
                self.style,
                temperature=validation.temperature,
                top_p=1.0,
                max_tokens=self.settings.max_response_tokens,
            )
            jobs = [
                (problem, self.ctx.seed("rl", "validation", problem.id, sample))
                for problem in load_source(validation.problems)
                for sample in range(validation.num_samples)
            ]
            answers = sampler.sample(jobs)
            passed = sum(answer.outcome == "right" for answer in answers) / len(answers)
        passed = tell_all(passed)
        if passed > self.best:
            self.best = passed
            self.policy.trainer.export_hf(self.ctx.dir / "hf_best")
            if self.ctx.rank == 0:
                write_json_atomic(self.ctx.dir / "best.json", {"step": step, "validation_pass_rate": passed})
        return {"validation_pass_rate": passed}

    def _behaviour(self, groups: StepGroups) -> dict[str, float]:
        row = behaviour(groups, self.phrases)
        self.tokens += int(row["sampled_tokens"])
        return row

    @contextlib.contextmanager
    def _log(self, first: int) -> Iterator[tuple[Metrics, Progress]]:
        """The metrics and the progress bar; other ranks than 0 have ones that show nothing."""
        name = f"{self.ctx.cfg.name}/{self.ctx.label}"
        with (
            open_metrics(self.ctx.dir, self.ctx.cfg.metrics, name, first + 1, write=self.ctx.rank == 0) as log,
            self.ctx.progress(self.settings.num_steps, "steps", done=first) as progress,
        ):
            yield log, progress


class _Clock:
    """Seconds between laps as `NAME_seconds`, and how much of the whole each side stood idle."""

    def __init__(self, engine: Engine | None, worker: RolloutWorker | None) -> None:
        self._engine, self._worker = engine, worker
        self._laps: dict[str, float] = {}
        self._began = self._last = time.monotonic()
        self._busy = engine.stats.busy_seconds if engine else 0.0
        self._verify = worker.verify_seconds if worker else 0.0

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.monotonic()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def summary(self, sampled_tokens: float) -> dict[str, float]:
        """Seconds by lap and of the whole step, tokens a second, idle shares of engine and trainer.

        The trainer is idle while it waits for groups. Verifying overlaps with sampling: `verify_seconds` is how long
        anything at all was being judged.
        """
        total = self._last - self._began
        row = {f"{name}_seconds": round(seconds, 3) for name, seconds in self._laps.items()}
        row["step_seconds"] = round(total, 3)
        row["tokens_per_second"] = round(sampled_tokens / total, 2) if total else 0.0
        row["trainer_idle_share"] = round(self._laps.get("generate", 0.0) / total, 4) if total else 0.0
        if self._worker is not None:
            row["verify_seconds"] = round(self._worker.verify_seconds - self._verify, 3)
        if self._engine is not None:
            busy = self._engine.stats.busy_seconds - self._busy
            row["engine_idle_share"] = round(max(0.0, 1 - busy / total), 4) if total else 0.0
        return row
