"""Checks of the doctor that hold a cluster file against the Slurm that is here. Nothing is submitted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from astro_hpc.config.base import ConfigError
from astro_hpc.launch import slurm
from astro_hpc.launch.checks import Check
from astro_hpc.launch.cluster import STAGES, ClusterConfig, StageConfig

_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun")
_LOCAL_FILE_SYSTEMS = ("btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs")


def cluster_checks(cluster: ClusterConfig, folder: Path) -> Iterator[Check]:
    """Everything about a cluster.

    Args:
        folder: where runs are to lie; it need not exist.
    """
    if cluster.executor == "local":
        yield Check("executor", "pass", "local: this machine alone, no Slurm")
        return
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if missing:
        remedy = "run it on a login node, or load Slurm's module"
        yield Check("Slurm commands", "fail", f"{', '.join(missing)} not found", remedy)
        return
    try:
        settings = slurm.settings()
    except ConfigError as error:
        yield Check("slurmctld", "fail", str(error), "ask whether it is up; SLURM_CONF names its settings")
        return
    yield Check("Slurm commands", "pass", f"Slurm {settings.get('SLURM_VERSION', 'of an unknown version')}")
    yield from accounting(settings)
    yield from arrays(settings, cluster)
    yield from requeueing(settings)
    yield from preemption(settings)
    yield from signals(cluster)
    yield from stages(cluster)
    yield from environment(cluster)
    yield from shared_folder(folder)


def accounting(settings: Mapping[str, str]) -> Iterator[Check]:
    """Whether ended jobs can be asked about."""
    kind = settings.get("AccountingStorageType", "")
    if kind.endswith("none") or not kind:
        remedy = "nothing to do: `status` then knows of ended jobs what they wrote themselves"
        yield Check("accounting", "warn", "none", remedy)
    elif shutil.which("sacct") is None:
        yield Check("accounting", "warn", f"{kind}, but sacct isn't here", "install Slurm's client tools here")
    else:
        yield Check("accounting", "pass", kind)


def arrays(settings: Mapping[str, str], cluster: ClusterConfig) -> Iterator[Check]:
    """Array sizes and the number of jobs."""
    size, jobs = (int(settings.get(name, "0") or 0) for name in ("MaxArraySize", "MaxJobCount"))
    if cluster.max_array_size is not None and size and cluster.max_array_size > size:
        found = f"{size}, the cluster file says {cluster.max_array_size}"
        yield Check("MaxArraySize", "fail", found, f"set max_array_size to {size}, or remove it")
    else:
        yield Check("MaxArraySize", "pass", f"{size}; larger arrays go in parts")
    shards = {name: getattr(getattr(cluster.stages, name), "shards", 1) for name in STAGES}
    stage = max(shards, key=lambda name: shards[name])
    if jobs and shards[stage] > jobs // 2:
        found = f"{jobs} for everybody, {stage} has {shards[stage]} shards"
        yield Check("MaxJobCount", "warn", found, f"lower stages.{stage}.shards")


def requeueing(settings: Mapping[str, str]) -> Iterator[Check]:
    """Whether jobs come back; ours ask for it each by itself."""
    on = settings.get("JobRequeue") == "1"
    yield Check("JobRequeue", "pass", "1" if on else "0; jobs are submitted with --requeue, which goes before it")


def preemption(settings: Mapping[str, str]) -> Iterator[Check]:
    """What happens to a preempted job, and how it learns of it."""
    mode, kind = settings.get("PreemptMode", "OFF"), settings.get("PreemptType", "")
    if mode.startswith("OFF") or kind.endswith("none"):
        yield Check("PreemptMode", "pass", "OFF: jobs aren't preempted")
        return
    if "CANCEL" in mode:
        remedy = (
            "a preempted job asks itself back; what waits for an array may be dropped with it: launch again when "
            "`status` shows that"
        )
        yield Check("PreemptMode", "warn", mode, remedy)
    else:
        yield Check("PreemptMode", "pass", mode)
    if "preempt_send_user_signal" not in settings.get("SlurmctldParameters", ""):
        wait = settings.get("KillWait", "30 sec")
        remedy = "checkpoint often enough; or ask for SlurmctldParameters=preempt_send_user_signal and a GraceTime"
        yield Check("preemption notice", "warn", f"TERM alone, then {wait} to save", remedy)


def signals(cluster: ClusterConfig) -> Iterator[Check]:
    """Time limits against the time that jobs are given to save."""
    for name in STAGES:
        limit = str(cluster.stage(name).time)
        if seconds_of(limit) <= 2 * cluster.signal_seconds:
            found = f"{name} has {limit} and is told to save {cluster.signal_seconds} s before its end"
            yield Check(f"time of {name}", "fail", found, "raise time, or lower signal_seconds")


def stages(cluster: ClusterConfig) -> Iterator[Check]:
    """Whether Slurm would take each stage's job: partition, account, QOS, nodes, GPUs, memory, time limit."""
    try:
        known = slurm.partitions()
    except ConfigError as error:
        yield Check("partitions", "fail", str(error), "ask whether slurmctld is up")
        return
    refused: dict[str, list[str]] = {}
    for name in STAGES:
        resources = cluster.stage(name)
        wanted = set(resources.partition.split(",")) if resources.partition else set()
        if not wanted <= set(known):
            reason = f"no partition {', '.join(sorted(wanted - set(known)))}; there are {', '.join(known)}"
        else:
            reason = slurm.would_take(_script(resources, cluster)) or ""
        if reason:
            refused.setdefault(reason, []).append(name)
    for reason, names in refused.items():
        yield Check(f"jobs of {', '.join(names)}", "fail", f"Slurm refuses them: {reason}", "mend the cluster file")
    if not refused:
        yield Check("jobs", "pass", f"Slurm would take those of all stages; partitions: {', '.join(known)}")


def _script(resources: StageConfig, cluster: ClusterConfig) -> str:
    options = {
        "account": cluster.account,
        "constraint": cluster.constraint,
        "cpus-per-task": resources.cpus_per_task,
        "gpus-per-node": resources.gpus_per_node or None,
        "mem": resources.memory,
        "nodes": resources.nodes,
        "ntasks-per-node": resources.tasks_per_node,
        "partition": resources.partition,
        "qos": resources.qos,
        "time": resources.time,
        "exclude": ",".join(cluster.exclude) or None,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines += ["#SBATCH --exclusive"] if resources.exclusive else []
    return "\n".join(["#!/bin/bash", *lines, "true", ""])


def environment(cluster: ClusterConfig) -> Iterator[Check]:
    """The Python of the jobs: a container with its runtime, or a virtual environment."""
    container = cluster.container
    if container is None:
        if cluster.venv is not None and not (cluster.venv / "bin" / "python").exists():
            yield Check("venv", "fail", f"{cluster.venv}: has no bin/python", "make it on a shared file system")
        return
    if container.runtime == "pyxis":
        help_text = slurm.srun_help()
        if "--container-image" not in help_text:
            remedy = "ask for the pyxis plug-in, or set container.runtime to apptainer with a .sif file"
            yield Check("pyxis", "fail", "srun doesn't know --container-image", remedy)
        else:
            yield Check("pyxis", "pass", "srun knows --container-image")
    elif shutil.which("apptainer") is None:
        yield Check("apptainer", "warn", "not found here", "make sure that the nodes have it")
    else:
        yield Check("apptainer", "pass", "installed here")
    if container.image.startswith("/") and not Path(container.image).exists():
        yield Check("container image", "fail", f"{container.image}: not there", "build or copy it")


def shared_folder(folder: Path) -> Iterator[Check]:
    """Whether the run folder's file system is one that other nodes can see."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    kind, mounted = file_system_of(place.resolve(), Path("/proc/mounts").read_text())
    if kind in _LOCAL_FILE_SYSTEMS:
        remedy = "set runs_dir to a shared file system, unless this machine exports it; `srun -N 2 ls` of it tells"
        yield Check("shared folder", "warn", f"{place} is on {kind} at {mounted}, a local file system", remedy)
    else:
        yield Check("shared folder", "pass", f"{place} is on {kind} at {mounted}")


def file_system_of(place: Path, mounts: str) -> tuple[str, str]:
    """(kind, where it is mounted) of a path, by the text of /proc/mounts."""
    best = ("unknown", "/")
    for line in mounts.splitlines():
        _, where, kind, *_ = line.split()
        where = where.replace("\\040", " ")
        if (place == Path(where) or Path(where) in place.parents) and len(where) >= len(best[1]):
            best = (kind, where)
    return best


def seconds_of(limit: str) -> int:
    """`1-02:00:00` -> 93600, as a cluster file writes time limits."""
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
