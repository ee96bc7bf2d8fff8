"""A training stage on all its ranks: started here, or joined when torchrun or srun started them.

The stage's contract (lock, manifest, skip, refusal) is carried out once: by the process that starts the ranks, or by
rank 0 of those that came by themselves, which then tells the others.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ParallelConfig, RunConfig
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.sizes import check_parallel, local_world_size, visible_gpus
from astro_hpc.run import ranks
from astro_hpc.run.process import EXIT_CHECKPOINTED, EXIT_USAGE
from astro_hpc.run.stage import CheckpointedExit, Stage, StageContext, read_manifest, run_stage


def run_on_ranks(cfg: RunConfig, stage: Stage, redo: bool = False) -> bool:
    """`run_stage` with a body that as many ranks carry out as `parallel` says; returns whether there was work to do.

    Raises:
        ConfigError: as `run_stage`; the parallel sizes don't fit the model or the machine.
        CheckpointedExit: a stop was asked for, and all ranks have saved.
        RankFailed: a rank crashed.
    """
    place = ranks.place_from()
    told = ranks.supervised()
    if place is not None and told is not None:
        return _be_supervised(cfg, stage, place, told)
    gpus = visible_gpus()
    world_size = place.world_size if place else local_world_size(cfg.parallel, gpus, stage.server_gpus)
    model = stage.inputs["model"]
    if read_manifest(cfg.run_dir / stage.dir) is None and model.exists():
        check_parallel(LlamaShape.from_hf(model), cfg.parallel, world_size, cpu=gpus == 0)
    if place is not None:
        check_blocks(cfg.parallel, place)
        return _join(cfg, stage, redo, place)
    if world_size == 1:
        return run_stage(cfg, stage, redo)

    def start(ctx: StageContext) -> list[Path]:
        ctx.say(f"{world_size} ranks ({ctx.cfg.parallel.model_parallel_size} hold one copy of the model)")
        # The configuration as it was resolved: the user's file may be edited while the stage runs.
        name, _, arm = stage.label.partition("/")
        command = [sys.executable, "-m", "astro_hpc", name, str(cfg.run_dir / "config.yaml")]
        command += ["--arm", arm] if arm else []
        logs = cfg.run_dir / "logs" / stage.label / f"attempt_{ctx.attempt}"
        result = ranks.run_ranks(
            command,
            world_size,
            logs,
            {"dir": str(ctx.dir), "resumed": ctx.resumed, "attempt": ctx.attempt, "reports": str(logs)},
            lambda: ctx.stop_requested,
        )
        if "stopped" in result:
            raise CheckpointedExit(result["stopped"])
        ctx.count(**result["counts"], ranks=world_size)
        return [Path(path) for path in result["outputs"]]

    return run_stage(cfg, replace(stage, body=start), redo)


def check_blocks(parallel: ParallelConfig, place: ranks.Place) -> None:
    """Refuse ranks that were dealt out to the machines one by one: tensor parallel would go over the network.

    Raises:
        ConfigError: names the rank and a remedy.
    """
    tp = parallel.tensor_parallel_size
    if place.rank % tp != place.local_rank % tp:
        raise ConfigError(
            f"rank {place.rank} is number {place.local_rank} on its machine: the {tp} ranks of a tensor-parallel group "
            "are not together; start neighbouring ranks on one machine, with srun --distribution=block and a number "
            f"of ranks a machine that {tp} divides"
        )


def _be_supervised(cfg: RunConfig, stage: Stage, place: ranks.Place, told: dict[str, Any]) -> bool:
    """Carry out the body as one of the ranks that this machine's supervisor started, and report to it."""
    reports = Path(told["reports"])
    ctx = _context(cfg, stage, place, told)
    try:
        with ctx.handling_signals():
            outputs = stage.body(ctx)
    except CheckpointedExit as stopped:
        ranks.report(reports, place.rank, stopped=str(stopped))
        sys.exit(EXIT_CHECKPOINTED)
    except ConfigError as error:
        ranks.report(reports, place.rank, refused=str(error))
        sys.exit(EXIT_USAGE)
    ranks.report(reports, place.rank, outputs=[str(path) for path in outputs], counts=ctx.counts)
    return True


def _join(cfg: RunConfig, stage: Stage, redo: bool, place: ranks.Place) -> bool:
    """Carry out the body as one of the ranks that torchrun or srun started."""
    from astro_hpc.model.parallel import join_process_group, tell_all

    join_process_group()
    if place.rank != 0:
        told = tell_all(None)
        if "dir" not in told:
            if "refused" in told:
                sys.exit(EXIT_USAGE)  # rank 0 says why
            return False
        ctx = _context(cfg, stage, place, told)
        try:
            with ctx.handling_signals():
                stage.body(ctx)
        except CheckpointedExit:
            sys.exit(EXIT_CHECKPOINTED)
        return True
    begun = False

    def body(ctx: StageContext) -> list[Path]:
        nonlocal begun
        begun = True
        tell_all({"dir": str(ctx.dir), "resumed": ctx.resumed, "attempt": ctx.attempt})
        outputs = stage.body(ctx)
        ctx.count(ranks=place.world_size)
        return outputs

    try:
        done = run_stage(cfg, replace(stage, body=body), redo)
    except BaseException as error:
        if not begun:
            tell_all({"refused": str(error)})
        raise
    if not begun:
        tell_all({})
    return done


def _context(cfg: RunConfig, stage: Stage, place: ranks.Place, told: dict[str, Any]) -> StageContext:
    return StageContext(
        cfg, Path(told["dir"]), stage.label, resumed=told["resumed"], attempt=told["attempt"], rank=place.rank
    )
