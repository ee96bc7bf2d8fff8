"""Without Slurm: the jobs one after the other, in the background of this machine, by submitit's local executor."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from submitit import LocalExecutor
from submitit.helpers import CommandFunction

from astro_hpc.launch.cluster import ClusterConfig
from astro_hpc.launch.graph import Job
from astro_hpc.launch.render import Place, command_words, python_of
from astro_hpc.run.files import Lock, write_text_atomic

_HEAD = """\
#!/bin/bash
# All jobs of a launch in order, on this machine. A stage that saved and stopped (exit code 75) goes on at once.
exec 9> {lock}
flock -n 9 || {{ echo "another launch runs here"; exit 2; }}
cd {workdir} || exit 2
RUN={run}
CONFIG={config}
export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1
do_stage() {{
    until {python} -m astro_hpc "$@"; do
        code=$?
        [ $code = 75 ] || exit $code
    done
}}
"""


def run_here(
    run: Path, cluster: ClusterConfig, place: Place, steps: Sequence[tuple[Job, Sequence[int]]], dry_run: bool
) -> None:
    """Write RUN/jobs/local.sh and, unless `dry_run`, start it in the background; it outlives this process.

    Raises:
        ConfigError: an earlier launch is still running.
    """
    lock = run / "jobs" / ".local.lock"
    with Lock(lock, f"{run}: local launch"):
        pass
    names = {"lock": lock, "workdir": place.workdir, "run": run, "config": place.frozen / "config.yaml"}
    quoted = {name: shlex.quote(str(path)) for name, path in names.items()}
    lines = [_HEAD.format(**quoted, code=shlex.quote(str(place.frozen)), python=shlex.quote(str(python_of(cluster))))]
    for job, tasks in steps:
        exports = [f"export {name}={shlex.quote(value)}" for name, value in job.resources.environment.items()]
        lines += exports + [f"do_stage {' '.join(command_words(job, shard=str(task)))}" for task in tasks]
    script = run / "jobs" / "local.sh"
    write_text_atomic(script, "\n".join(lines) + "\n")
    if dry_run or not steps:
        return
    executor = LocalExecutor(run / "jobs" / "local")
    executor.update_parameters(timeout_min=60 * 24 * 365, name=run.name)
    executor.submit(CommandFunction(["bash", str(script)], verbose=True))
