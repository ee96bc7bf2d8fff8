"""Without Slurm: the jobs one after the other, in the background of this machine, as a session of their own."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from astro_hpc.config.base import ConfigError
from astro_hpc.launch.cluster import ClusterConfig
from astro_hpc.launch.graph import Job
from astro_hpc.launch.render import Place, command_words, python_of
from astro_hpc.launch.slurm import Queued
from astro_hpc.run.files import InUse, Lock, write_text_atomic

_HEAD = """\
#!/bin/bash
# All jobs of a launch in order, on this machine. A stage that saved and stopped (exit code 75) goes on at once.
exec 9> {lock}
flock -w 10 9 || {{ echo "another launch runs here"; exit 2; }}
cd {workdir} || exit 2
RUN={run}
CONFIG={config}
echo $$ > "$RUN/jobs/local.pid"  # of the whole session, for `astro-hpc cancel`
mkdir -p "$RUN/jobs/ended"
{setup}
export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1
export ASTRO_HPC_PARENT=$$  # a stage ends with this script, however that ends
trap 'cancelled=1; kill -TERM $child' TERM
end() {{  # a record for `astro-hpc status`
    reason=$(tail -c 4000 "$LOG/rank-0.log" |
        tr '\\r' '\\n' | tr -d '\\000-\\010\\013-\\037' | tail -n 1 | cut -c 1-500)
    printf '%s\\n' "$1" "$code" "$attempt" "$HOSTNAME" local "$LOG" "$reason" > "$RUN/jobs/ended/$WORK"
}}
do_stage() {{
    for ((attempt = 0; ; attempt++)); do
        LOG=$RUN/logs/$WORK/job-local-$$.attempt-$attempt
        mkdir -p "$LOG" && echo "$WORK" > "$RUN/jobs/local.now"
        env "${{ENV[@]}}" {python} -m astro_hpc "$@" > "$LOG/rank-0.log" 2>&1 &
        child=$!
        wait $child; code=$?
        while kill -0 $child 2> /dev/null; do wait $child; code=$?; done  # a signal ends `wait`, not the stage
        [ -z "$cancelled" ] || {{ end cancelled; exit 143; }}
        [ $code != 0 ] || {{ end done; return; }}
        [ $code = 75 ] || {{ end failed; exit $code; }}
    done
}}
"""
_PLAN = "local.plan"


def run_here(
    run: Path, cluster: ClusterConfig, place: Place, steps: Sequence[tuple[Job, Sequence[int]]], dry_run: bool
) -> None:
    """Write RUN/jobs/local.sh and, unless `dry_run`, start it in the background; it outlives this process.

    Raises:
        ConfigError: an earlier launch is still running, or the cluster file asks for a container.
    """
    if cluster.container is not None:
        raise ConfigError("container: the local executor starts none; remove it, or start the launch inside of one")
    lock = run / "jobs" / ".local.lock"
    with Lock(lock, f"{run}: local launch"):
        pass
    names = {"lock": lock, "workdir": place.workdir, "run": run, "config": place.frozen / "config.yaml"}
    quoted = {name: shlex.quote(str(path)) for name, path in names.items()}
    quoted |= {"code": shlex.quote(str(place.frozen)), "python": shlex.quote(str(python_of(cluster)))}
    lines = [_HEAD.format(**quoted, setup="\n".join(cluster.setup))]
    for job, tasks in steps:
        values = (f"{name}={shlex.quote(value)}" for name, value in job.resources.environment.items())
        lines.append(f"ENV=({' '.join(values)})")
        for task in tasks:
            lines.append(f"WORK={work_name(job, task)}")
            lines.append(f"do_stage {' '.join(command_words(job, shard=str(task)))}")
    script = _script(run)
    write_text_atomic(script, "\n".join(lines) + "\n")
    if dry_run or not steps:
        return
    planned = "".join(f"{job.name} {task}\n" for job, tasks in steps for task in tasks)
    write_text_atomic(run / "jobs" / _PLAN, planned)
    for stale in ("local.pid", "local.now"):
        (run / "jobs" / stale).unlink(missing_ok=True)
    # Not by submitit's local executor: its processes keep our caller's terminal and pipes for as long as they run.
    with open(run / "jobs" / "local.out", "ab") as output:
        subprocess.Popen(
            ["bash", str(script)], stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def work_name(job: Job, task: int) -> str:
    """What a task's logs and records are named by."""
    return f"{job.name}-{task:05d}" if job.num_tasks else job.name


def planned_here(run: Path) -> dict[str, list[int]]:
    """Tasks by job of the last local launch."""
    planned: dict[str, list[int]] = {}
    with contextlib.suppress(OSError):
        for line in (run / "jobs" / _PLAN).read_text().splitlines():
            name, _, task = line.rpartition(" ")
            planned.setdefault(name, []).append(int(task))
    return planned


def queue_here(run: Path, jobs: Sequence[Job], pending: dict[str, set[int]]) -> dict[str, dict[int, Queued]]:
    """By job and task, what the local launch still has to do, in the form of Slurm's queue; empty when it has ended.

    Args:
        pending: by job, the planned tasks without results.
    """
    if _leader(run) is None:
        return {}
    try:
        now = (run / "jobs" / "local.now").read_text().strip()
    except OSError:
        now = ""
    found: dict[str, dict[int, Queued]] = {}
    for job in jobs:
        for task in pending.get(job.name, ()):
            runs = work_name(job, task) == now
            state, reason, node = ("RUNNING", "None", platform.node()) if runs else ("PENDING", "its turn comes", "")
            queued = Queued("local", frozenset({task}), "local", state, reason, node, "", "", "")
            found.setdefault(job.name, {})[task] = queued
    return found


def cancel_here(run: Path, seconds: float = 60.0) -> list[str]:
    """End the local launch: its stage is told to save, and killed when it hasn't ended after `seconds`."""
    leader = _leader(run)
    if leader is None:
        return []
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGTERM)
        while _leader(run) is not None:
            if time.monotonic() > deadline:
                os.killpg(leader, signal.SIGKILL)
            time.sleep(0.1)
    return [f"local process {leader}"]


def _script(run: Path) -> Path:
    """Its name in the command line of the launch; the same by whichever link one comes."""
    return run.resolve() / "jobs" / "local.sh"


def _leader(run: Path) -> int | None:
    """The process of the local launch that runs, and its group; None: none does."""
    try:
        with Lock(run / "jobs" / ".local.lock"):
            return None
    except InUse:
        pass
    with contextlib.suppress(OSError, ValueError):
        pid = int((run / "jobs" / "local.pid").read_text())
        # The lock may be held by another launch that is only looking; the number may be somebody else's by now.
        if str(_script(run)).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pid
    return None
