"""`astro-hpc`: one thin function a command."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from astro_hpc import __version__
from astro_hpc.config import ConfigError, RunConfig, load_config
from astro_hpc.run.files import InUse, no_room
from astro_hpc.run.process import EXIT_CHECKPOINTED, EXIT_IN_USE, EXIT_NO_ROOM, EXIT_USAGE, die_with_parent
from astro_hpc.run.ranks import RankFailed
from astro_hpc.run.stage import CheckpointedExit

app = typer.Typer(
    name="astro-hpc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Teach language models to reason by search (ASTRO, arXiv 2507.00417): "
    "tree search, procedure cloning, supervised fine-tuning and reinforcement learning.\n\n"
    "One YAML file describes a run. `astro-hpc run CONFIG` carries out all its stages and skips what is done; "
    "each stage is also a command of its own.",
    epilog="Start with `astro-hpc demo`. Override any setting on the command line: "
    "`astro-hpc run configs/demo.yaml search.num_iterations=6 name=mine`.\n\n"
    "Exit codes: 0 done; 1 failed, and may pass when tried again; 2 your input is wrong, in one line; 73 in use by "
    "another process; 74 disk full or quota used up; 75 told to stop, and saved: the same command goes on; 71 of "
    "`doctor --node`: the node is bad; 130 interrupted.",
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file, e.g. configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override, e.g. rl.num_steps=5."),
]
Redo = Annotated[bool, typer.Option("--redo", help="If made from other inputs or settings: set it aside, redo.")]
ArmOption = Annotated[str | None, typer.Option("--arm", help="astro or direct; by default all of the run's arms.")]
Shard = Annotated[int, typer.Option(help="Which shard to do.")]
NumShards = Annotated[int, typer.Option(min=1, help="Into how many shards the work is split, by problems.")]
Gather = Annotated[bool, typer.Option("--gather", help="Join finished shards; names those that are missing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def demo(
    overrides: Overrides = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Minutes; proves the plumbing and nothing else.")] = False,
) -> None:
    """The whole loop on this machine with the embedded model; goes on where it was stopped.

    The same as `astro-hpc run configs/demo.yaml`, or configs/demo-smoke.yaml with --smoke.
    """
    config = _shipped_config("demo-smoke.yaml" if smoke else "demo.yaml")
    _run_all(config, overrides or [])
    if smoke:
        print("This was the smoke run: it proves that every stage works. Its numbers mean nothing; run the whole demo.")


@app.command()
def run(config: Config, overrides: Overrides = None, redo: Redo = False) -> None:
    """All stages in order on this machine; skips what is done, goes on where it was stopped."""
    _run_all(config, overrides or [], redo)


@app.command()
def warmup(config: Config, overrides: Overrides = None, redo: Redo = False) -> None:
    """Teach a small model the step format from generated walks (not in the paper; warmup.enabled)."""
    from astro_hpc import pipeline

    cfg = load_config(config, overrides or [])
    if not cfg.warmup.enabled:
        raise ConfigError(f"{config}: warmup.enabled is false; set it, or start with `astro-hpc search`")
    pipeline.run_one(cfg, pipeline.warmup(cfg), redo)


@app.command()
def search(
    config: Config,
    overrides: Overrides = None,
    shard: Annotated[int, typer.Option(help="Which shard to search.")] = 0,
    num_shards: Annotated[int, typer.Option(help="Into how many shards the problems are split.")] = 1,
    gather: Annotated[
        bool, typer.Option("--gather", help="Search nothing: merge the shards' trees and say what is missing.")
    ] = False,
    economics: Annotated[
        bool, typer.Option("--economics", help="Search nothing: compare the search with best-of-N at equal tokens.")
    ] = False,
    redo: Redo = False,
    as_json: Json = False,
) -> None:
    """Monte-Carlo tree search over the training problems; one shard, or all of them.

    A problem's shard is a hash of its id, so adding problems moves none; after it, --redo searches the new ones and
    takes over the trees of those that stayed, as long as nothing else has changed. Any number of shards may run at
    the same time; one that is killed goes on with the same command and loses the trees in flight alone.

    --gather merges the trees of all shards, finished or running, into search/trees.jsonl and writes what it found
    (shards and problems missing, duplicates, statistics) to search/gather.json; exit code 1 while problems lack their
    tree.

    --economics, after the search, samples the same problems anew: independent solutions until the tokens of the
    problem's tree are spent, and one greedy solution. It costs about as many tokens as the search did
    (economics.num_problems limits it) and writes search/economics/economics.json.
    """
    from astro_hpc import pipeline

    cfg = load_config(config, overrides or [])
    if gather and economics:
        raise ConfigError("--gather and --economics are two commands; give one of them")
    if gather:
        report = pipeline.gather_search(cfg)
        print(json.dumps(report.to_json()) if as_json else "\n".join(report.lines()))
        raise typer.Exit(0 if report.complete else 1)
    if economics:
        from astro_hpc.evaluation.economics import read_economics, table

        pipeline.run_one(cfg, pipeline.economics(cfg), redo)
        summary = read_economics(cfg) or {}
        print(json.dumps(summary) if as_json else table(summary))
        return
    pipeline.run_one(cfg, pipeline.search(cfg, shard, num_shards), redo)


@app.command()
def clone(
    config: Config,
    overrides: Overrides = None,
    shard: Shard = 0,
    num_shards: NumShards = 1,
    gather: Gather = False,
    redo: Redo = False,
) -> None:
    """Linearise the trees and write them as chains of thought: traces/astro.jsonl and traces/direct.jsonl.

    With --num-shards the trees are split by their problems, as the search splits those.
    """
    from astro_hpc import pipeline

    cfg = load_config(config, overrides or [])
    if _is_shard(cfg, "clone", shard, num_shards, gather):
        pipeline.run_one(cfg, pipeline.clone_shard(cfg, shard, num_shards), redo)
    else:
        pipeline.run_one(cfg, pipeline.clone(cfg), redo)


@app.command()
def sft(config: Config, overrides: Overrides = None, arm: ArmOption = None, redo: Redo = False) -> None:
    """Supervised fine-tuning on the traces with Megatron-Core."""
    from astro_hpc import pipeline

    cfg = load_config(config, overrides or [])
    if (name := _one_arm(cfg, arm)) is not None:
        pipeline.run_one(cfg, pipeline.sft(cfg, name), redo)
    else:
        raise typer.Exit(pipeline.run_arms("sft", cfg, [str(config), *(overrides or [])], redo))


@app.command()
def select(
    config: Config,
    overrides: Overrides = None,
    arm: ArmOption = None,
    shard: Shard = 0,
    num_shards: NumShards = 1,
    gather: Gather = False,
    redo: Redo = False,
) -> None:
    """Choose RL prompts of moderate difficulty by the SFT model's pass rate: select/ARM/prompts.jsonl.

    With --num-shards the candidates are split by a hash of their ids; --gather then chooses among all, and the result
    is the same as without shards. After the SFT model has changed, --redo samples anew.
    """
    from astro_hpc import pipeline

    cfg = load_config(config, overrides or [])
    if (name := _one_arm(cfg, arm)) is None:
        options = f"--shard {shard} --num-shards {num_shards}" + (" --gather" if gather else "")
        raise typer.Exit(pipeline.run_arms(f"select {options}", cfg, [str(config), *(overrides or [])], redo))
    if _is_shard(cfg, "select", shard, num_shards, gather, name):
        pipeline.run_one(cfg, pipeline.select_shard(cfg, name, shard, num_shards), redo)
    else:
        pipeline.run_one(cfg, pipeline.select(cfg, name), redo)


@app.command()
def rl(config: Config, overrides: Overrides = None, arm: ArmOption = None, redo: Redo = False) -> None:
    """Reinforcement learning with a verifiable reward: vLLM rollouts, Megatron train steps."""
    from astro_hpc import pipeline

    cfg = load_config(config, overrides or [])
    if (name := _one_arm(cfg, arm)) is not None:
        pipeline.run_one(cfg, pipeline.rl(cfg, name), redo)
    else:
        raise typer.Exit(pipeline.run_arms("rl", cfg, [str(config), *(overrides or [])], redo))


@app.command("eval")
def evaluate(
    config: Config,
    overrides: Overrides = None,
    shard: Shard = 0,
    num_shards: NumShards = 1,
    gather: Gather = False,
    redo: Redo = False,
) -> None:
    """Base, warm-up, SFT and RL models on the held-out benchmarks: pass@1, pass@k, maj@k, backtracks.

    With --num-shards every benchmark's problems are split by a hash of their ids; --gather then computes the metrics
    of all, and the result is the same as without shards.
    """
    from astro_hpc import pipeline

    cfg = load_config(config, overrides or [])
    if not cfg.eval.benchmarks:
        raise ConfigError(f"{config}: eval.benchmarks is empty; name one, e.g. signs: {{type: signs, count: 100}}")
    if _is_shard(cfg, "eval", shard, num_shards, gather):
        pipeline.run_one(cfg, pipeline.evaluate_shard(cfg, shard, num_shards), redo)
    else:
        pipeline.run_one(cfg, pipeline.evaluate(cfg), redo)


@app.command()
def serve(
    config: Config,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 8000,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face folder to serve instead of the run's policy.")
    ] = None,
    allow_weight_updates: Annotated[
        bool, typer.Option("--allow-weight-updates", help="Let stages replace the weights, as eval and rl do.")
    ] = False,
    index: Annotated[
        int | None, typer.Option(help="Which of this machine's inference.num_servers it is: takes its GPUs.", min=0)
    ] = None,
) -> None:
    """One vLLM server for the run's policy, until Ctrl-C; stages use it with inference.engine=vllm-server."""
    from astro_hpc import pipeline
    from astro_hpc.inference.serve import serve as serve_model

    cfg = load_config(config, overrides or [])
    folder = model if model is not None else pipeline.policy_model(cfg)
    code = serve_model(folder, cfg.inference, cfg.seed, host, port, allow_weight_updates, index)
    raise typer.Exit(code)


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for instance runs/demo.")]


@app.command()
def report(run: RunFolder) -> None:
    """Build RUN/report/index.html, one offline page about the run, finished or not."""
    cfg = _run_config(run)
    print(_build_report(cfg))


@app.command()
def launch(
    config: Config,
    cluster: Annotated[Path, typer.Option(help="Cluster file, or the name of one in configs/clusters.")],
    overrides: Overrides = None,
    stages: Annotated[str | None, typer.Option(help="Only these, for instance search,gather,clone.")] = None,
    first: Annotated[str | None, typer.Option("--from", help="This stage and all behind it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the sbatch files, submit nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Submit the whole graph of jobs to Slurm; again: only what is missing or was made from other inputs.

    The latter with --redo, which sets old results aside where they differ. What one process has done stays done,
    however many shards the cluster file says.

    Every sbatch text, and the code and configuration that the jobs use, go to RUN/jobs.
    """
    from astro_hpc.launch.cluster import load_cluster
    from astro_hpc.launch.submit import launch as launch_run

    chosen = stages.split(",") if stages else None
    cfg = load_config(config, overrides or [])
    done = launch_run(cfg, load_cluster(cluster), stages=chosen, first=first, dry_run=dry_run)
    print(json.dumps(done.to_json(), indent=2) if as_json else "\n".join(done.lines(dry_run)))


@app.command()
def cancel(run: RunFolder) -> None:
    """Cancel everything that Slurm, or a local launch, has of a run, queued and running; what is finished stays."""
    from astro_hpc.launch.status import cancel_run

    ids = cancel_run(_run_config(run).run_dir)
    print(f"cancelled: {', '.join(ids)}" if ids else "nothing is queued or running")


@app.command()
def status(
    run: RunFolder,
    as_json: Json = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again, ever less often, until done.")
    ] = False,
) -> None:
    """The run's stages: done, begun or waiting, with seconds and tokens; of a launched run the state of its jobs.

    Rates come from the last progress in the logs of running tasks; "limit in" is Slurm's. --watch ends when nothing is
    queued or running any more, of a run that wasn't launched when all stages are done, and with Ctrl-C.
    """
    from astro_hpc.launch.status import is_launched, job_states, print_states
    from astro_hpc.launch.submit import bad_nodes
    from astro_hpc.report.status import print_status, run_status

    cfg = _run_config(run)

    def show(again: bool) -> bool:
        """Print it; whether anything may still change."""
        if is_launched(cfg.run_dir):
            states = job_states(cfg)
            if again:
                click.clear()
            if as_json:
                print(json.dumps([state.to_json() for state in states], indent=2))
            else:
                print_states(states, bad_nodes(cfg.run_dir))
            return any(state.counts.get(name) for state in states for name in ("running", "pending", "unknown"))
        rows = run_status(cfg)
        if again:
            click.clear()
        if as_json:
            print(json.dumps(rows, indent=2))
        else:
            print_status(rows)
        return any(row["state"] != "done" for row in rows)

    pause = 5.0
    with contextlib.suppress(KeyboardInterrupt):
        going_on = show(again=False)
        while watch and going_on:
            time.sleep(pause)
            pause = min(1.5 * pause, 60.0)  # Slurm's controller serves everybody
            going_on = show(again=True)


@app.command()
def trace(
    run: RunFolder,
    example: Annotated[str | None, typer.Argument(metavar="[ID]", help="An example's id, or a problem's.")] = None,
    arm: Annotated[str, typer.Option("--arm", help="astro or direct.")] = "astro",
    as_json: Json = False,
) -> None:
    """Show one example of the SFT data with its steps, reflections and backtracks marked."""
    from astro_hpc.report.trace_text import find_example, print_example

    if arm not in ("astro", "direct"):
        raise ConfigError(f"--arm {arm}: the arms are astro and direct")
    row = find_example(_run_config(run), arm, example)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(row, indent=2, ensure_ascii=False))
    else:
        print_example(row)


_NODE = "Of --node"


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Also check what this run needs.")] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Also check a cluster: its file, or the name of one in configs/clusters.")
    ] = None,
    node: Annotated[
        bool, typer.Option("--node", help="Check this node alone, fast: the first step of jobs; see below.")
    ] = False,
    as_json: Json = False,
    nodes: Annotated[
        str | None, typer.Option(help="All nodes of the job, separated by commas.", rich_help_panel=_NODE)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="On the shared file system, where nodes meet.", rich_help_panel=_NODE)
    ] = None,
    disk: Annotated[
        str, typer.Option(help="Folder on the local disk; $VARIABLES are put in.", rich_help_panel=_NODE)
    ] = "/tmp",
    min_disk_gb: Annotated[float, typer.Option(help="Free there.", rich_help_panel=_NODE)] = 1.0,
    min_free_gpu_memory: Annotated[float, typer.Option(help="Share of each GPU.", rich_help_panel=_NODE)] = 0.9,
    max_clock_skew: Annotated[float, typer.Option(help="Seconds.", rich_help_panel=_NODE)] = 10.0,
    wait: Annotated[float, typer.Option(help="Seconds for the other nodes.", rich_help_panel=_NODE)] = 120.0,
    all_reduce: Annotated[bool, typer.Option(help="A small one over all nodes.", rich_help_panel=_NODE)] = True,
) -> None:
    """What this machine has and lacks, with the remedy; exit code 1 when something fails. Changes nothing.

    --node checks a node within seconds: local disk, GPU memory and ECC errors, the shared folder (every node reads what
    the others wrote there), clocks, and a small all-reduce (NCCL, or gloo without GPUs). Jobs with GPUs or several
    nodes start with it; `node_check` of the cluster file has its settings. It prints a line a node, `ok NODE` or
    `bad NODE reason`, and leaves with 71 when a node is bad: the job is requeued without that node.
    """
    from astro_hpc.launch import doctor

    if node:
        from astro_hpc.launch.node import NodeLimits

        limits = NodeLimits(disk, min_disk_gb, min_free_gpu_memory, max_clock_skew, wait, all_reduce)
        raise typer.Exit(doctor.examine_node(nodes, folder, limits, as_json))
    from astro_hpc.launch.cluster import load_cluster

    cfg = load_config(config, overrides or []) if config else None
    rows = doctor.examine(cfg, load_cluster(cluster) if cluster else None)
    if as_json:
        print(json.dumps(doctor.as_json(rows), indent=2))
    else:
        doctor.print_checks(rows)
    if not doctor.healthy(rows):
        raise typer.Exit(1)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help='One {"gold": ..., "pred": ...} a line.')],
) -> None:
    r"""Check answers: a line in, a line {"outcome": "right|wrong|unknown", "seconds"} out, order kept."""
    from astro_hpc.verifier.cli_file import verify_file

    verify_file(file)


convert = typer.Typer(
    no_args_is_help=True,
    help="Hugging Face -> Megatron checkpoints and back, on CPU, without a model in memory; and a certificate.\n\n"
    "A Hugging Face folder is config.json and safetensors, one file or many with an index. A Megatron checkpoint is "
    "a torch_dist folder, which any tensor- and pipeline-parallel sizes load: `model.path` may name it. "
    "A conversion that was killed goes on when the same command is given again, and the result appears under its "
    "name only when it is whole.",
    epilog="Examples:\n\n"
    "`astro-hpc convert import Llama-3.1-8B-Instruct llama-8b-megatron`\n\n"
    "`astro-hpc convert verify Llama-3.1-8B-Instruct llama-8b-megatron`\n\n"
    "`astro-hpc convert export runs/mine/sft/astro/checkpoints my-8b --reference Llama-3.1-8B-Instruct`",
)
app.add_typer(convert, name="convert")
Workers = Annotated[int, typer.Option(min=1, help="Files that are converted at a time.")]
Dtype = Annotated[str, typer.Option(help="Of the weights written: auto (as they are), bfloat16 or float32.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there under the new folder's name.")]
NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")]
HFModel = Annotated[str, typer.Argument(metavar="HF_MODEL", help="A Hugging Face folder, as in model.path.")]
MegatronFolder = Annotated[
    Path,
    typer.Argument(
        metavar="MEGATRON_DIR", help="An import, a step_N of a run's checkpoints, or `checkpoints`: its newest."
    ),
]


@convert.command("import")
def convert_import(
    hf_model: HFModel,
    out: NewFolder,
    dtype: Dtype = "auto",
    file_gb: Annotated[float, typer.Option(min=0.001, help="Size in GB of a file; a kill loses at most one.")] = 2.0,
    workers: Workers = 4,
    overwrite: Overwrite = False,
) -> None:
    """A Hugging Face folder -> a Megatron checkpoint for any parallel sizes."""
    from astro_hpc.conversion.embedded import resolve_model
    from astro_hpc.conversion.offline import import_hf

    source, file_bytes = resolve_model(hf_model), round(file_gb * 1e9)
    print(import_hf(source, out, dtype=dtype, workers=workers, overwrite=overwrite, file_bytes=file_bytes))


@convert.command("export")
def convert_export(
    megatron_dir: MegatronFolder,
    out: NewFolder,
    reference: Annotated[
        str | None,
        typer.Option(help="The Hugging Face model that config.json and tokenizer come from; an import has its own."),
    ] = None,
    dtype: Dtype = "auto",
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Size in GB at which weights files are split.")] = 2.0,
    workers: Workers = 4,
    overwrite: Overwrite = False,
) -> None:
    """A Megatron checkpoint -> a Hugging Face folder that transformers and vLLM load."""
    from astro_hpc.conversion.embedded import resolve_model
    from astro_hpc.conversion.offline import export_hf

    source = None if reference is None else resolve_model(reference)
    shard_bytes = round(shard_gb * 1e9)
    print(
        export_hf(
            megatron_dir,
            out,
            reference=source,
            dtype=dtype,
            workers=workers,
            overwrite=overwrite,
            shard_bytes=shard_bytes,
        )
    )


@convert.command("verify")
def convert_verify(
    hf_model: HFModel,
    megatron_dir: MegatronFolder,
    exported: Annotated[Path | None, typer.Option(help="Also an export of the checkpoint.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A text for the logits; may be given several times.")] = None,
    logits: Annotated[
        str, typer.Option(help="Compare logits: auto (when the model fits in memory), on, off.")
    ] = "auto",
    workers: Workers = 4,
    certificate: Annotated[
        Path | None, typer.Option(help="Where to write the certificate; by default MEGATRON_DIR/certificate.json.")
    ] = None,
) -> None:
    """Check tensor for tensor that a checkpoint is the model; writes a certificate, exits with 1 if it is not."""
    from astro_hpc.conversion.embedded import resolve_model
    from astro_hpc.conversion.verify import verify
    from astro_hpc.run.files import write_json_atomic

    if logits not in ("auto", "on", "off"):
        raise ConfigError(f"--logits {logits}: possible are auto, on, off")
    result, values = verify(
        resolve_model(hf_model),
        megatron_dir,
        exported=exported,
        prompts=prompt or [],
        logits=logits,
        workers=workers,
    )
    write_json_atomic(certificate or megatron_dir / "certificate.json", values)
    print(result.line())
    if not result.passed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point. Errors a user can cause end as one line on stderr and exit code 2."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read at torch's import; silences its NUMA warning
    parent = os.environ.pop("ASTRO_HPC_PARENT", None)
    if parent is not None:
        die_with_parent(int(parent))
    try:
        app()
    except CheckpointedExit as error:
        print(f"astro-hpc: {error or 'checkpointed'}; the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_CHECKPOINTED)
    except RankFailed as error:
        print(f"astro-hpc: {error}; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        code, line = _told(error)
        if code is None:
            raise
        print(f"astro-hpc: {line}", file=sys.stderr)
        sys.exit(code)
    except KeyboardInterrupt:
        print("astro-hpc: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _told(error: Exception) -> tuple[int | None, str]:
    """(exit code, the one line) of an error that isn't ours; None: an internal fault, which shows its traceback."""
    if no_room(error):
        where = (error.filename or "writing") if isinstance(error, OSError) else type(error).__name__
        what = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        remedy = "free space or choose another runs_dir, then the same command goes on from here"
        return EXIT_NO_ROOM, str(error) if isinstance(error, ConfigError) else f"{where}: {what}; {remedy}"
    if isinstance(error, ConfigError):
        return EXIT_IN_USE if isinstance(error, InUse) else EXIT_USAGE, str(error)
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        remedy = "change its permissions or choose another runs_dir, then the same command goes on from here"
        return EXIT_USAGE, f"{error.filename or 'writing'}: {error.strerror}; {remedy}"
    return None, ""


def _run_all(config: Path, overrides: list[str], redo: bool = False) -> None:
    """Every stage, then the table and the page; leaves with the code of a stage that did not finish."""
    from astro_hpc.pipeline import run_pipeline

    cfg = load_config(config, overrides)
    code = run_pipeline(cfg, [str(config), *overrides], redo)
    if code != 0:
        raise typer.Exit(code)
    _finish(cfg)


def _one_arm(cfg: RunConfig, arm: str | None) -> Any:
    """The arm that is meant, or None where the run has several and all are meant."""
    if arm is None:
        return cfg.arms[0] if len(cfg.arms) == 1 else None
    if arm not in cfg.arms:
        raise ConfigError(f"--arm {arm}: the configuration's arms are {', '.join(cfg.arms)}; add it to `arms`")
    return arm


def _is_shard(cfg: RunConfig, command: str, shard: int, num_shards: int, gather: bool, arm: str | None = None) -> bool:
    """Whether one shard is meant, and not the whole stage or its gathering.

    Raises:
        ConfigError: the options don't fit together or what has been begun.
    """
    from astro_hpc import pipeline
    from astro_hpc.search.shards import find_shards, refuse_in_one_process, refuse_other_split

    folder = pipeline.shard_folder(cfg, command, arm)
    if num_shards > 1 and not gather:
        refuse_other_split(folder, num_shards)
        refuse_in_one_process(cfg.run_dir, command, arm)
        return True
    if shard != 0:
        raise ConfigError(f"--shard {shard}: needs --num-shards, and not --gather")
    if gather and find_shards(folder) is None:
        raise ConfigError(f"{folder}: no shards to gather; run {command} with --shard and --num-shards")
    return False


def _shipped_config(name: str) -> Path:
    for folder in (Path("configs"), Path(__file__).resolve().parent.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"configs/{name}: not found; run from the project's folder, or `astro-hpc run YOUR.yaml`")


def _run_config(run: Path) -> RunConfig:
    config = run / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{run}: not a run folder (it has no config.yaml); give one, for instance runs/demo")
    cfg = load_config(config)
    # The folder may have been moved or be named from elsewhere.
    return cfg.model_copy(update={"runs_dir": run.resolve().parent, "name": run.resolve().name})


def _build_report(cfg: RunConfig) -> Path:
    from astro_hpc.report.page import build_page

    return build_page(cfg)


def _finish(cfg: RunConfig) -> None:
    """The result table and the page's address, at the end of a run."""
    from astro_hpc.evaluation.table import print_table

    page = _build_report(cfg)
    print_table(cfg)
    print(f"report: {page}")
