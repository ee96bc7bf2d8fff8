"""Slurm's commands, each asked once and never waited for long."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from astro_hpc.config.base import ConfigError
from astro_hpc.launch.graph import from_ranges

DEFAULT_MAX_ARRAY_SIZE = 1001
_TIMEOUT_SECONDS = 30
_SQUEUE_FIELDS = "%F|%K|%i|%T|%r|%N|%M|%L|%k"  # the comment last: it is ours, and the only one with any text


@dataclass(frozen=True)
class Queued:
    """One line of squeue: a job, a task of an array, or an array's tasks that wait.

    Attributes:
        array_id: the job's id; for a task its array's.
        indices: in the array; {0} for a job that is none.
        task_id: as scancel and scontrol name it.
        state: for instance PENDING, RUNNING, COMPLETING.
        reason: why it waits; `None` while it runs.
        nodes: where it runs.
        used: time since its start.
        left: time to its limit.
        comment: what it was submitted with.
    """

    array_id: str
    indices: frozenset[int]
    task_id: str
    state: str
    reason: str
    nodes: str
    used: str
    left: str
    comment: str


def is_available() -> bool:
    """Whether Slurm's commands are installed here."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def queue() -> list[Queued]:
    """All of this user's jobs that Slurm has; one question, however many tasks."""
    # By default squeue shortens an array's list of waiting tasks after 64 characters.
    text = run(["squeue", "--me", "--noheader", "--format", _SQUEUE_FIELDS], SLURM_BITSTR_LEN="0")
    return [parse_queue_line(line) for line in text.splitlines() if line.strip()]


def parse_queue_line(line: str) -> Queued:
    """One line in the form that `queue` asks for."""
    array_id, indices, task_id, state, reason, nodes, used, left, comment = line.split("|", 8)
    numbers = frozenset({0} if indices == "N/A" else from_ranges(indices))
    return Queued(array_id, numbers, task_id, state, reason, nodes, used, left, comment)


def submit(script: Path, array: str | None = None, dependency: str | None = None) -> str:
    """Submit a file; the job's id."""
    options = [f"--array={array}"] if array else []
    options += [f"--dependency={dependency}"] if dependency else []
    return run(["sbatch", "--parsable", *options, str(script)]).strip().partition(";")[0]


def would_take(script: str) -> str | None:
    """What Slurm has against a script's options; None: nothing. Nothing is submitted."""
    result = _run(["sbatch", "--test-only"], script)
    if result.returncode == 0:
        return None
    lines = [line for line in result.stderr.splitlines() if "error:" in line] or result.stderr.splitlines()
    reason = lines[-1] if lines else "it gives no reason"
    return re.sub(r"^(\w+: error: |allocation failure: )+", "", reason).strip()


def set_dependency(job_id: str, dependency: str) -> None:
    """Replace what a waiting job waits for."""
    run(["scontrol", "update", f"jobid={job_id}", f"dependency={dependency}"])


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs; those that have ended are no error."""
    run(["scancel", "--quiet", *job_ids])


def settings() -> dict[str, str]:
    """The cluster's configuration as scontrol shows it."""
    found = {}
    for line in run(["scontrol", "show", "config"]).splitlines():
        name, equals, value = line.partition("=")
        if equals:
            found[name.strip()] = value.strip()
    return found


def partitions() -> list[str]:
    """Names of the partitions that this user sees."""
    return sorted({line.rstrip("*") for line in run(["sinfo", "--noheader", "--format", "%P"]).split()})


def srun_help() -> str:
    """Options that srun knows here, those of plug-ins among them."""
    return _run(["srun", "--help"]).stdout


def past_states(job_ids: Sequence[str]) -> dict[str, str]:
    """State by task id (`12`, or `12_3` of an array) of jobs that left the queue; empty without accounting.

    One question for all jobs. Where there is no accounting sacct isn't asked at all; where it doesn't answer in time
    the answer is empty too.
    """
    if not job_ids or shutil.which("sacct") is None:
        return {}
    try:
        if settings().get("AccountingStorageType", "").endswith("none"):
            return {}
        command = ["sacct", "-X", "--noheader", "--parsable2", "--format=JobID,State", "--jobs", ",".join(job_ids)]
        result = _run(command, timeout=_TIMEOUT_SECONDS)
    except ConfigError:
        return {}
    lines = result.stdout.splitlines() if result.returncode == 0 else []
    states = {}
    for line in lines:
        task_id, _, state = line.partition("|")
        states[task_id] = state.split(" ")[0]  # `CANCELLED by 1000`
    return states


def run(command: Sequence[str], **environment: str) -> str:
    """Standard output of one of Slurm's commands.

    Raises:
        ConfigError: it failed, is missing, or doesn't answer.
    """
    result = _run(command, environment=environment)
    if result.returncode != 0:
        error = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise ConfigError(f"{command[0]}: {error}")
    return result.stdout


def _run(
    command: Sequence[str],
    text: str | None = None,
    timeout: float = _TIMEOUT_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**_outside_of_jobs(), **(environment or {})},
            check=False,
        )
    except FileNotFoundError:
        raise ConfigError(f"{command[0]}: not installed here; launch from a login node, or use --dry-run") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{command[0]}: no answer within {timeout:.0f} s; is the cluster's controller up?") from None


def _outside_of_jobs() -> dict[str, str]:
    """The environment without an enclosing job's: sbatch would take its size and array index for the new job's."""
    return {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
