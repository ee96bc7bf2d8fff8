"""A job as the text that sbatch takes: options through submitit, then a short shell script.

The script says what runs and sets the environment; job.sh, the same for every stage, runs the command as an srun step
and decides by its exit code what becomes of the job. slurm/*.sbatch are these texts for people who write their own.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from astro_hpc.launch.cluster import ClusterConfig
from astro_hpc.launch.graph import Job, as_ranges

TRAINING = ("warmup", "sft", "rl")
RUN_IT = '. "$CODE/astro_hpc/launch/job.sh"  # runs it, and decides by the exit code: done, again, or never again'


@dataclass(frozen=True)
class Place:
    """Where a launch's jobs find things.

    Attributes:
        run: the run folder.
        frozen: the copy of code and configuration that the jobs use; later edits don't reach them.
        workdir: the folder that relative paths of the configuration start from.
        key: names the run in Slurm's comments.
    """

    run: Path
    frozen: Path
    workdir: Path
    key: str


def render(job: Job, cluster: ClusterConfig, place: Place, offset: int = 0, size: int | None = None) -> str:
    """The sbatch text of a job, or of the chunk of an array that begins at task `offset` and has `size` tasks."""
    resources = job.resources
    log_name = "%A_%a" if job.num_tasks else "%j"
    options: dict[str, Any] = {
        **cluster.options,
        "chdir": place.workdir,
        "comment": comment(place.key, job, offset),
        "kill-on-invalid-dep": "yes",
        "ntasks-per-node": resources.tasks_per_node,
        "open-mode": "append",
        "output": place.run / "logs" / job.name / f"{log_name}.out",
        "requeue": True,
        "signal": f"B:USR1@{cluster.signal_seconds}",
        "time": resources.time,
    }
    if job.num_tasks:
        throttle = f"%{job.throttle}" if job.throttle else ""
        options["array"] = as_ranges(range(size or job.num_tasks)) + throttle
    if cluster.exclude:
        options["exclude"] = ",".join(cluster.exclude)
    given = {
        "account": cluster.account,
        "constraint": cluster.constraint,
        "cpus_per_task": resources.cpus_per_task,
        "exclusive": resources.exclusive or None,
        "gpus_per_node": resources.gpus_per_node or None,
        "mem": resources.memory,
        "nodes": resources.nodes,
        "partition": resources.partition,
        "qos": resources.qos,
    }
    return _make_sbatch_string(
        command="\n".join(body(job, cluster, place, offset)),
        folder=place.run / "logs" / job.name,
        job_name=f"{_safe(place.run.name)}.{job.name}",
        wckey=None,
        stderr_to_stdout=True,
        use_srun=False,
        additional_parameters={name: value for name, value in options.items() if value is not None},
        **{name: value for name, value in given.items() if value is not None},
    )


def body(job: Job, cluster: ClusterConfig, place: Place, offset: int = 0) -> list[str]:
    """The script below the options, line by line."""
    return [
        *_what_runs(job, cluster, place, offset),
        "",
        *_environment(job, cluster),
        "",
        *_parts(job),
        RUN_IT,
    ]


def _parts(job: Job) -> list[str]:
    """Which nodes train and which serve, where both do."""
    if job.engines is None:
        return []
    return [
        "# --- who does what: the first nodes train, the last ones serve ---",
        f"ENGINE_NODES={job.engines.nodes}",
        f"SERVERS={job.engines.servers}  # on each of them",
        f"RANKS={job.resources.tasks_per_node or 1}  # on each of the others",
        "",
    ]


def command_words(job: Job, shard: str = '"$SHARD"') -> list[str]:
    """The job's arguments of astro-hpc as words of its script."""
    num_shards = str(job.num_tasks) if shard.isdigit() else '"$NUM_SHARDS"'
    arm = shlex.quote(job.arm or "") if shard.isdigit() else '"$ARM"'
    meant = {"CONFIG": '"$CONFIG"', "RUN": '"$RUN"', "SHARD": shard, "NUM_SHARDS": num_shards, "ARM": arm}
    return [meant.get(word) or shlex.quote(word) for word in job.command]


def comment(key: str, job: Job, offset: int) -> str:
    """By this squeue's answer is known again: which run, job, and the array's first task."""
    return f"astro-hpc:{key}:{job.name}:{offset}"


def parse_comment(text: str, key: str) -> tuple[str, int] | None:
    """(job's name, offset) of a job of this run; None for all others."""
    match = re.fullmatch(r"astro-hpc:([^:]+):([^:]+):(\d+)", text)
    return (match[2], int(match[3])) if match and match[1] == key else None


def _what_runs(job: Job, cluster: ClusterConfig, place: Place, offset: int) -> list[str]:
    step, inside = _container(cluster, place)
    if job.stage in TRAINING and job.resources.nodes * (job.resources.tasks_per_node or 1) > 1:
        step = ["--distribution=block", *step]  # the ranks of a tensor-parallel group on one node
    lines = [
        "# --- what runs, and where ---",
        f"RUN={_quote(place.run)}",
        f"CONFIG={_quote(place.frozen / 'config.yaml')}",
        f"CODE={_quote(place.frozen)}  # the folder that holds the package astro_hpc",
        f"PYTHON={_quote(python_of(cluster))}",
        f"STEP=({_words(step)})  # options of srun",
        f"INSIDE=({_words(inside)})  # what the command runs in",
    ]
    work = job.name
    if job.arm:
        lines.append(f"ARM={job.arm}")
        work = f"{job.name.removesuffix(job.arm)}$ARM"
    if job.num_tasks:
        lines.append(f"NUM_SHARDS={job.num_tasks}")
        lines.append(f"SHARD=$((SLURM_ARRAY_TASK_ID + {offset}))  # an array's indices begin at 0")
        work += "-$(printf %05d $SHARD)"
    output = job.output.format(shard="$(printf %05d $SHARD)", num_shards="$(printf %05d $NUM_SHARDS)", arm="$ARM")
    return [
        *lines,
        f"WORK={work}  # names its logs",
        f"OUTPUT=$RUN/{output}  # what it writes",
        f"COMMAND=({' '.join(command_words(job))})",
        f"MAX_REQUEUES={cluster.max_requeues}",
        f"MAX_FAILURES={cluster.max_failures}",
        f"NODE_CHECK=({_words(_node_check(job, cluster))})  # options of astro-hpc doctor --node; none: no check",
        f"MAX_BAD_NODES={cluster.node_check.max_bad_nodes}",
    ]


def _node_check(job: Job, cluster: ClusterConfig) -> list[str]:
    """Options of the node check; none where a job has neither GPUs nor several nodes, or it is switched off."""
    check = cluster.node_check
    if not check.enabled or not (job.resources.gpus_per_node or job.resources.nodes > 1):
        return []
    options = [f"--disk={check.disk}", f"--min-disk-gb={check.min_disk_gb:g}"]
    options += [f"--min-free-gpu-memory={check.min_free_gpu_memory:g}"]
    options += [f"--max-clock-skew={check.max_clock_skew_seconds:g}", f"--wait={check.wait_seconds:g}"]
    return [*options, *([] if check.all_reduce else ["--no-all-reduce"])]


def _environment(job: Job, cluster: ClusterConfig) -> list[str]:
    resources = job.resources
    lines = ["# --- environment ---", *cluster.setup]
    if resources.cpus_per_task:
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun doesn't take it from sbatch by itself")
    if resources.nodes * (resources.tasks_per_node or 1) > 1:
        lines += [
            '[ -n "$SLURM_JOB_NODELIST" ] && MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))  # jobs may share a node; below what kernels hand out",
            "export MASTER_ADDR MASTER_PORT",
        ]
    if resources.gpus_per_node and job.stage in TRAINING:
        lines += [
            "export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron overlaps communication in launch order",
            "export NCCL_NVLS_ENABLE=0  # its buffers cost GPU memory",
            "export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_FR_BUFFER_SIZE=2000  # a hang ends, and tells where it was",
        ]
        if job.stage != "rl":  # vLLM's memory pool can't live with it
            lines.append("export PYTORCH_ALLOC_CONF=expandable_segments:True")
    if cluster.network_interface:
        lines.append(f"export NCCL_SOCKET_IFNAME={cluster.network_interface}")
        lines.append("export GLOO_SOCKET_IFNAME=$NCCL_SOCKET_IFNAME")
    lines += [f"export {name}={_quote(value)}" for name, value in resources.environment.items()]
    # Last: whatever sets it above is kept, for functions of the user's own.
    lines.append('export PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1  # this code before any other')
    return lines


def _container(cluster: ClusterConfig, place: Place) -> tuple[list[str], list[str]]:
    """(options of srun, words before the command)."""
    container = cluster.container
    if container is None:
        return [], []
    own = [f"{folder}:{folder}" for folder in dict.fromkeys([place.run, place.workdir])]
    mounts = ",".join([*own, *container.mounts])
    if container.runtime == "pyxis":
        workdir = f"--container-workdir={place.workdir}"
        return [f"--container-image={container.image}", f"--container-mounts={mounts}", workdir], []
    return [], ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(place.workdir), container.image]


def python_of(cluster: ClusterConfig) -> Path | str:
    """The interpreter of the jobs."""
    if cluster.container is not None:
        return "python3"
    return cluster.venv / "bin" / "python" if cluster.venv is not None else sys.executable


def _words(words: Iterable[str]) -> str:
    return " ".join(map(_quote, words))


def _quote(value: object) -> str:
    return shlex.quote(str(value))


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)
