"""The stages of a run, in order: what each one reads, what decides its result, and who does it.

This is the system's table of contents. A stage's module is imported only when the stage runs, so that reading a
configuration or a status needs no torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from astro_hpc.config import ConfigError, RunConfig
from astro_hpc.config.schema import Arm, TrainingConfig
from astro_hpc.inference.job_servers import started_here
from astro_hpc.problems.row_files import local_path
from astro_hpc.run.stage import Stage, StageContext, read_manifest, run_stage
from astro_hpc.search.shards import (
    SHARD_FOLDERS,
    TREES,
    GatherReport,
    earlier_trees,
    find_shards,
    gather,
    refuse_other_split,
    shard_name,
)

# How a stage is carried out, not what it makes: free to change between attempts.
_INFERENCE_ONLY_HOW = {
    *("max_num_seqs", "gpu_memory_utilization", "cpu_kv_cache_gb", "cpu_threads", "block_size"),
    *("servers", "num_servers", "server_api_key_env", "server_start_seconds", "server_lost_seconds"),
    "request_timeout_seconds",
}
_VERIFIER_ONLY_HOW = {"num_workers", "cache_size"}
_CHECKPOINT = {"checkpoint"}  # and `parallel`: the same mathematics, and checkpoints load into other sizes
_TRAINING_ONLY_HOW = {"checkpoint", "validate_every_steps"}
_RL_ONLY_HOW = {"weight_sync", "weight_check_every", "max_mismatch_kl", "rollout_timeout_minutes"}
_REWARD_ONLY_HOW = {"timeout_seconds"}


def base_model(cfg: RunConfig) -> Path:
    """The folder of the model that the run starts from."""
    from astro_hpc.conversion.embedded import resolve_model

    return resolve_model(cfg.model.path)


def policy_model(cfg: RunConfig) -> Path:
    """The folder of the model that searches and that SFT starts from: the warm-up's result where there is one."""
    return cfg.run_dir / "warmup" / "hf" if cfg.warmup.enabled else base_model(cfg)


def warmup(cfg: RunConfig) -> Stage:
    """Generated walks teach a small model the step format. Not in the paper; see README."""

    def body(ctx: StageContext) -> list[Path]:
        from astro_hpc.training.sft import train

        examples = ctx.dir / "examples.jsonl"
        return [examples, *train(ctx, examples=examples, training=cfg.warmup, init_hf=base_model(cfg), label="warmup")]

    def prepare(ctx: StageContext) -> Path:
        from astro_hpc.cloning.warmup import write_examples

        return write_examples(ctx)

    settings = {**_training_settings(cfg, cfg.warmup), "prompt_style": cfg.model.prompt_style}
    return Stage("warmup", Path("warmup"), {"model": base_model(cfg)}, settings, body, prepare, on_ranks=True)


def search(cfg: RunConfig, shard: int = 0, num_shards: int = 1) -> Stage:
    """Monte-Carlo tree search over the training problems.

    Raises:
        ConfigError: there is no such shard, or the search is split otherwise already.
    """
    name = shard_name(shard, num_shards)
    refuse_other_split(cfg.run_dir / "search", num_shards)
    benchmarks = _screened_benchmarks(cfg)
    sources = _source_files([*cfg.problems.train, *benchmarks])

    def body(ctx: StageContext) -> list[Path]:
        from astro_hpc.search.stage import run

        return run(
            ctx,
            model_dir=policy_model(cfg),
            shard=shard,
            num_shards=num_shards,
            earlier=earlier_trees(ctx.dir, {"problems", "benchmarks"}, set(sources)),
        )

    settings = {
        "seed": cfg.seed,
        "problems": _dump(cfg.problems),
        "benchmarks": [_dump(source) for source in benchmarks],
        "prompt_style": cfg.model.prompt_style,
        "verifier": _dump(cfg.verifier, _VERIFIER_ONLY_HOW),
        "inference": _dump(cfg.inference, _INFERENCE_ONLY_HOW),
        "search": _dump(cfg.search, {"trees_in_flight"}),
        "shard": [shard, num_shards],
    }
    inputs = {"model": policy_model(cfg)} | _files(cfg) | sources
    return Stage(f"search/{name}", Path("search") / name, inputs, settings, body)


def gather_search(cfg: RunConfig) -> GatherReport:
    """Merge the shards' trees and say what is missing. No stage: it may be done at any time, also while shards run."""
    from astro_hpc.search.stage import training_problems

    return gather(cfg.run_dir, training_problems(cfg).problems)


def economics(cfg: RunConfig) -> Stage:
    """The search against best-of-N at equal tokens and against greedy. Not part of a run: asked for by itself."""
    shards = search_shards(cfg)

    def body(ctx: StageContext) -> list[Path]:
        from astro_hpc.evaluation.economics import run

        _refuse_unfinished(shards)
        return run(ctx, journals=[folder / TREES for folder in shards], model_dir=policy_model(cfg))

    settings = {
        "seed": cfg.seed,
        "prompt_style": cfg.model.prompt_style,
        "search": _dump(cfg.search, {"trees_in_flight"}),
        "economics": _dump(cfg.economics),
        "verifier": _dump(cfg.verifier, _VERIFIER_ONLY_HOW),
        "inference": _dump(cfg.inference, _INFERENCE_ONLY_HOW),
    }
    inputs = {"model": policy_model(cfg)} | {folder.name: folder / TREES for folder in shards} | _files(cfg)
    return Stage("economics", Path("search") / "economics", inputs, settings, body)


def clone(cfg: RunConfig) -> Stage:
    """Trees become chains of thought, for both arms; where shards of this lie in the run folder, they are gathered."""
    searches = search_shards(cfg)
    shards = [clone_shard(cfg, number, total, searches) for number, total in clone_shards(cfg)]

    def body(ctx: StageContext) -> list[Path]:
        from astro_hpc.cloning.stage import run

        _refuse_unfinished(searches)
        return run(ctx, trees=[folder / TREES for folder in searches], **_clone_models(cfg))

    def gather(ctx: StageContext) -> list[Path]:
        from astro_hpc.cloning.records import write_data_set

        return write_data_set(ctx, [cfg.run_dir / stage.dir / "records.jsonl" for stage in shards])

    if shards:
        inputs = {stage.label: cfg.run_dir / stage.dir / "records.jsonl" for stage in shards}
        return Stage("clone", Path("traces"), inputs, _clone_settings(cfg), gather, shards=shards)
    inputs = {folder.name: folder / TREES for folder in searches} | _clone_files(cfg)
    return Stage("clone", Path("traces"), inputs, _clone_settings(cfg), body)


def clone_shard(cfg: RunConfig, shard: int, num_shards: int, searches: list[Path] | None = None) -> Stage:
    """The trees of one shard become a journal of chains of thought; `clone` gathers the shards.

    Problems are split as the search splits them: with as many shards, each reads its own shard of the search alone.

    Args:
        searches: `search_shards(cfg)`, where it was asked already.
    """
    name = shard_name(shard, num_shards)
    searches = search_shards(cfg) if searches is None else searches
    if len(searches) == num_shards:
        searches = [searches[shard]]

    def body(ctx: StageContext) -> list[Path]:
        from astro_hpc.cloning.stage import run_shard

        _refuse_unfinished(searches)
        trees = [folder / TREES for folder in searches]
        return run_shard(ctx, trees=trees, shard=shard, num_shards=num_shards, **_clone_models(cfg))

    settings = {**_clone_settings(cfg), "shard": [shard, num_shards]}
    inputs = {folder.name: folder / TREES for folder in searches} | _clone_files(cfg)
    return Stage(f"clone/{name}", Path("clone") / name, inputs, settings, body)


def _clone_settings(cfg: RunConfig) -> dict[str, Any]:
    samples = cfg.clone.self_evaluation_samples or cfg.clone.verbalizer == "lm"
    return {
        "seed": cfg.seed,
        "prompt_style": cfg.model.prompt_style,
        "clone": _dump(cfg.clone, {"traces_in_flight"}),
        "seq_length": cfg.sft.seq_length,
        "verifier": _dump(cfg.verifier, _VERIFIER_ONLY_HOW),
        "inference": _dump(cfg.inference, _INFERENCE_ONLY_HOW) if samples else {},
    }


def _clone_models(cfg: RunConfig) -> dict[str, Path | None]:
    return {"model_dir": policy_model(cfg), "verbalizer_dir": _verbalizer_model(cfg)}


def _clone_files(cfg: RunConfig) -> dict[str, Path]:
    """What decides the clone stage's result besides trees: the models that sample, and files of the user's own."""
    files = _files(cfg)
    if cfg.clone.self_evaluation_samples or cfg.clone.verbalizer == "lm":
        files["model"] = policy_model(cfg)
    if (model := _verbalizer_model(cfg)) is not None:
        files["verbalizer"] = model
    if cfg.clone.verbalizer == "lm" and cfg.clone.verbalizer_prompts.endswith((".yaml", ".yml")):
        files[cfg.clone.verbalizer_prompts] = Path(cfg.clone.verbalizer_prompts)
    return files


def _verbalizer_model(cfg: RunConfig) -> Path | None:
    """The folder of `clone.verbalizer_model`; None where the policy verbalises, or nobody does."""
    if cfg.clone.verbalizer != "lm" or cfg.clone.verbalizer_model is None:
        return None
    from astro_hpc.conversion.embedded import resolve_model

    return resolve_model(cfg.clone.verbalizer_model)


def sft(cfg: RunConfig, arm: Arm) -> Stage:
    """Supervised fine-tuning on one arm's traces."""
    examples = cfg.run_dir / "traces" / f"{arm}.jsonl"

    def body(ctx: StageContext) -> list[Path]:
        from astro_hpc.training.sft import train

        return train(ctx, examples=examples, training=cfg.sft, init_hf=policy_model(cfg), label=f"sft/{arm}")

    inputs = {"model": policy_model(cfg), "traces": examples}
    return Stage(f"sft/{arm}", Path("sft") / arm, inputs, _training_settings(cfg, cfg.sft), body, on_ranks=True)


def select(cfg: RunConfig, arm: Arm) -> Stage:
    """Prompts of moderate difficulty for RL, by the SFT model's pass rate; its shards, where there are any, gathered.

    Of another model than the one it was done with: once more, with --redo.
    """
    model = cfg.run_dir / "sft" / arm / "hf"
    shards = [select_shard(cfg, arm, number, total) for number, total in select_shards(cfg, arm)]
    rates = {shard.label: cfg.run_dir / shard.dir / "rates.jsonl" for shard in shards}

    def body(ctx: StageContext) -> list[Path]:
        from astro_hpc.rl.select import gather, run

        return gather(ctx, list(rates.values())) if shards else run(ctx, model_dir=model)

    inputs = {"model": model} | rates | _select_files(cfg)
    return Stage(f"select/{arm}", Path("select") / arm, inputs, _select_settings(cfg), body, shards=shards)


def select_shard(cfg: RunConfig, arm: Arm, shard: int, num_shards: int) -> Stage:
    """Pass rates of one shard of the candidates; `select` gathers the shards."""
    name = shard_name(shard, num_shards)
    model = cfg.run_dir / "sft" / arm / "hf"

    def body(ctx: StageContext) -> list[Path]:
        from astro_hpc.rl.select import run_shard

        return run_shard(ctx, model_dir=model, shard=shard, num_shards=num_shards)

    settings = {**_select_settings(cfg), "shard": [shard, num_shards]}
    inputs = {"model": model} | _select_files(cfg)
    return Stage(f"select/{arm}/{name}", Path("select-shards") / arm / name, inputs, settings, body)


def _select_files(cfg: RunConfig) -> dict[str, Path]:
    return _files(cfg, [*(cfg.select.problems or cfg.problems.train), *_screened_benchmarks(cfg)])


def _select_settings(cfg: RunConfig) -> dict[str, Any]:
    return {
        "seed": cfg.seed,
        "select": _dump(cfg.select),
        "problems": _dump(cfg.problems),
        "benchmarks": [_dump(source) for source in _screened_benchmarks(cfg)],
        "prompt_style": cfg.model.prompt_style,
        "verifier": _dump(cfg.verifier, _VERIFIER_ONLY_HOW),
        "inference": _dump(cfg.inference, _INFERENCE_ONLY_HOW),
    }


def rl(cfg: RunConfig, arm: Arm) -> Stage:
    """Reinforcement learning with a verifiable reward."""
    model = cfg.run_dir / "sft" / arm / "hf"
    prompts = cfg.run_dir / "select" / arm / "prompts.jsonl"
    replay = cfg.rl.replay_of(arm)

    def prepare(ctx: StageContext) -> None:
        from astro_hpc.rl.reward import Reward

        if replay is None:
            Reward(cfg.rl.reward)  # a wrong path is told before torch and an engine are loaded

    def body(ctx: StageContext) -> list[Path]:
        from astro_hpc.rl.stage import run

        return run(ctx, model_dir=model, prompts=prompts, replay=replay)

    settings = {
        "seed": cfg.seed,
        "rl": {
            **_dump(cfg.rl, _CHECKPOINT | _RL_ONLY_HOW | {"reward"}),
            "reward": _dump(cfg.rl.reward, _REWARD_ONLY_HOW),
        },
        "phrases": cfg.clone.phrases,
        "prompt_style": cfg.model.prompt_style,
        "verifier": _dump(cfg.verifier, _VERIFIER_ONLY_HOW),
        "inference": _dump(cfg.inference, _INFERENCE_ONLY_HOW),
        "precision": _dump(cfg.precision),
    }
    held_out = [cfg.rl.validation.problems] if cfg.rl.validation is not None else []
    inputs = {"model": model, "prompts": prompts} | _files(cfg, held_out)
    if replay is not None:
        folder = (cfg.run_dir / "rl" / arm).resolve()
        if replay.resolve().is_relative_to(folder):
            raise ConfigError(f"rl.replay={replay}: lies in {folder}, which this stage writes; copy it elsewhere")
        inputs["rollouts"] = replay
    # Without training there is nothing for ranks to share: one process samples.
    ranks = not cfg.rl.rollouts_only
    servers = 0 if replay is not None else started_here(cfg.inference)
    server_gpus = servers * cfg.inference.tensor_parallel_size
    label = f"rl/{arm}"
    return Stage(label, Path(label), inputs, settings, body, prepare, on_ranks=ranks, server_gpus=server_gpus)


def evaluate(cfg: RunConfig) -> Stage:
    """Base, warm-up, SFT and RL models on the held-out benchmarks; its shards, where there are any, gathered."""
    models = _evaluated_models(cfg)
    shards = [evaluate_shard(cfg, number, total) for number, total in evaluate_shards(cfg)]
    responses = {shard.label: cfg.run_dir / shard.dir / "responses" for shard in shards}

    def body(ctx: StageContext) -> list[Path]:
        from astro_hpc.evaluation.stage import gather, run

        return gather(ctx, models=models, shards=list(responses.values())) if shards else run(ctx, models=models)

    inputs = models | responses | _files(cfg, cfg.eval.benchmarks.values())
    return Stage("eval", Path("eval"), inputs, _evaluate_settings(cfg), body, shards=shards)


def evaluate_shard(cfg: RunConfig, shard: int, num_shards: int) -> Stage:
    """All models on one shard of every benchmark's problems; `evaluate` gathers the shards."""
    name = shard_name(shard, num_shards)
    models = _evaluated_models(cfg)

    def body(ctx: StageContext) -> list[Path]:
        from astro_hpc.evaluation.stage import run_shard

        return run_shard(ctx, models=models, shard=shard, num_shards=num_shards)

    settings = {**_evaluate_settings(cfg), "shard": [shard, num_shards]}
    inputs = models | _files(cfg, cfg.eval.benchmarks.values())
    return Stage(f"eval/{name}", Path("eval-shards") / name, inputs, settings, body)


def _evaluated_models(cfg: RunConfig) -> dict[str, Path]:
    models = {"base": base_model(cfg)}
    if cfg.warmup.enabled:
        models["warmup"] = cfg.run_dir / "warmup" / "hf"
    for arm in cfg.arms:
        models[f"{arm}-sft"] = cfg.run_dir / "sft" / arm / "hf"
        models[f"{arm}-rl"] = cfg.run_dir / "rl" / arm / "hf"
    return models


def _evaluate_settings(cfg: RunConfig) -> dict[str, Any]:
    return {
        "eval": _dump(cfg.eval),
        "phrases": cfg.clone.phrases,
        "prompt_style": cfg.model.prompt_style,
        "verifier": _dump(cfg.verifier, _VERIFIER_ONLY_HOW),
        "inference": _dump(cfg.inference, _INFERENCE_ONLY_HOW),
    }


def pipeline(cfg: RunConfig) -> list[tuple[str, Stage]]:
    """Every stage of the run in order, with the command that carries it out."""
    stages = [("warmup", warmup(cfg))] if cfg.warmup.enabled else []
    for folder in search_shards(cfg):
        shard, num_shards = int(folder.name[6:11]), int(folder.name[-5:])
        options = f" --shard {shard} --num-shards {num_shards}" if num_shards > 1 else ""
        stages.append((f"search{options}", search(cfg, shard, num_shards)))
    for shard, num_shards in clone_shards(cfg):
        stages.append((f"clone --shard {shard} --num-shards {num_shards}", clone_shard(cfg, shard, num_shards)))
    stages.append(("clone", clone(cfg)))
    for arm in cfg.arms:
        stages += [(f"sft --arm {arm}", sft(cfg, arm))]
        for shard, total in select_shards(cfg, arm):
            options = f"--arm {arm} --shard {shard} --num-shards {total}"
            stages.append((f"select {options}", select_shard(cfg, arm, shard, total)))
        stages += [(f"select --arm {arm}", select(cfg, arm))]
        stages += [(f"rl --arm {arm}", rl(cfg, arm))]
    if cfg.evaluates:
        for shard, total in evaluate_shards(cfg):
            stages.append((f"eval --shard {shard} --num-shards {total}", evaluate_shard(cfg, shard, total)))
        stages.append(("eval", evaluate(cfg)))
    return stages


def run_pipeline(cfg: RunConfig, config_arguments: Sequence[str], redo: bool = False) -> int:
    """Carry out every stage in a process of its own, and build the page at the end.

    A stage's process frees all its memory when it ends, and is exactly what a cluster job runs.

    Args:
        config_arguments: the configuration's path and overrides, passed on to each stage's command.

    Returns:
        0, or the exit code of the first stage that did not finish.
    """
    commands = pipeline(cfg)
    for number, (command, stage) in enumerate(commands, 1):
        print(f"[{number}/{len(commands)}] {stage.label}", file=sys.stderr, flush=True)
        code = _run_command(command, config_arguments, redo)
        if code != 0:
            if code not in (2, 130):
                print(
                    f"{stage.label}: stopped with exit code {code}; the same command goes on from here", file=sys.stderr
                )
            return code
    if cfg.eval.benchmarks and not cfg.evaluates:
        print("eval: left out, for rl.rollouts_only=true trains no model; unset it and run again", file=sys.stderr)
    return 0


def run_arms(command: str, cfg: RunConfig, config_arguments: Sequence[str], redo: bool = False) -> int:
    """Carry out one stage for every arm, each in a process of its own: engine and trainer leave no state behind."""
    for arm in cfg.arms:
        code = _run_command(f"{command} --arm {arm}", config_arguments, redo)
        if code != 0:
            return code
    return 0


def _run_command(command: str, config_arguments: Sequence[str], redo: bool) -> int:
    name, *options = command.split()
    arguments = [name, *config_arguments, *options, *(["--redo"] if redo else [])]
    return _run_child([sys.executable, "-m", "astro_hpc", *arguments])


def _run_child(command: list[str]) -> int:
    """Run a stage's process to its end; it never outlives this one, however this one ends."""
    environment = {**os.environ, "ASTRO_HPC_PARENT": str(os.getpid())}
    # A group of its own: a terminal's Ctrl-C reaches it through us, once, however this process was told.
    child = subprocess.Popen(command, env=environment, process_group=0)

    def forward(number: int, _: object) -> None:
        child.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        code = child.wait()
        return 128 - code if code < 0 else code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_one(cfg: RunConfig, stage: Stage, redo: bool = False) -> None:
    """Carry out one stage, on all its ranks where it has several, or say that it is done."""
    carry_out = run_stage
    if stage.on_ranks:
        from astro_hpc.training.ranks import run_on_ranks

        carry_out = run_on_ranks
    if not carry_out(cfg, stage, redo):
        print(f"{stage.label}: done already", file=sys.stderr)


def search_shards(cfg: RunConfig) -> list[Path]:
    """Folders of all shards of the search, finished or not; the one-shard search when none is there yet.

    Raises:
        ConfigError: shards of different splits lie side by side, or one is missing.
    """
    shards = find_shards(cfg.run_dir / "search")
    if shards is None:
        return [cfg.run_dir / "search" / shard_name(0, 1)]
    if shards.missing:
        raise ConfigError(
            f"{shards.dir}: {len(shards.present)} of {shards.num_shards} shards are there; run the others, "
            f"for instance --shard {shards.missing[0]} --num-shards {shards.num_shards}"
        )
    return [shards.folder(shard) for shard in shards.present]


def _refuse_unfinished(shards: Iterable[Path]) -> None:
    for folder in shards:
        if read_manifest(folder) is None:
            raise ConfigError(f"{folder}: this search is not finished; `astro-hpc search` goes on with it")


def clone_shards(cfg: RunConfig) -> list[tuple[int, int]]:
    """(shard, number of shards) of a clone stage that was begun in shards; none where it was not.

    Raises:
        ConfigError: shards of different splits lie side by side.
    """
    return _begun_shards(shard_folder(cfg, "clone"))


def select_shards(cfg: RunConfig, arm: Arm) -> list[tuple[int, int]]:
    """As `clone_shards`, of one arm's selection."""
    return _begun_shards(shard_folder(cfg, "select", arm))


def evaluate_shards(cfg: RunConfig) -> list[tuple[int, int]]:
    """As `clone_shards`, of the evaluation."""
    return _begun_shards(shard_folder(cfg, "eval"))


def shard_folder(cfg: RunConfig, command: str, arm: str | None = None) -> Path:
    """Where the shards of a stage lie that is done in shards: `search`, `clone`, `select` (of an arm) or `eval`."""
    return cfg.run_dir / SHARD_FOLDERS[command].format(arm=arm)


def _begun_shards(parent: Path) -> list[tuple[int, int]]:
    shards = find_shards(parent)
    return [] if shards is None else [(shard, shards.num_shards) for shard in range(shards.num_shards)]


def _screened_benchmarks(cfg: RunConfig) -> list[Any]:
    """Sources of the benchmarks that training problems are held against."""
    return list(cfg.eval.benchmarks.values()) if cfg.problems.decontaminate_ngram else []


def _files(cfg: RunConfig, sources: Iterable[Any] = ()) -> dict[str, Path]:
    """Data files and folders that decide a stage's result: problems, a prompt style or phrases of the user's own."""
    paths = [Path(name) for name in (cfg.model.prompt_style, cfg.clone.phrases) if name.endswith((".yaml", ".yml"))]
    return _source_files(sources) | {str(path): path for path in paths}


def _source_files(sources: Iterable[Any]) -> dict[str, Path]:
    return {str(path): path for source in sources if (path := local_path(source)) is not None}


def _training_settings(cfg: RunConfig, training: TrainingConfig) -> dict[str, Any]:
    return {
        "seed": cfg.seed,
        "training": _dump(training, _TRAINING_ONLY_HOW),
        "precision": _dump(cfg.precision),
    }


def _dump(section: Any, leave_out: set[str] | None = None) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude=leave_out or set())
