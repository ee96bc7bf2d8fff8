"""Where a launched run's jobs stand, from Slurm's queue, its accounting where there is any, and what the jobs left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.launch import slurm
from astro_hpc.launch.cluster import load_cluster
from astro_hpc.launch.graph import Job, build_graph, from_ranges
from astro_hpc.launch.local import cancel_here, planned_here, queue_here, work_name
from astro_hpc.launch.pace import read_pace, together
from astro_hpc.launch.render import parse_comment
from astro_hpc.launch.submit import SUBMITTED, run_key, tasks_done
from astro_hpc.run.files import Journal
from astro_hpc.run.progress import format_seconds

STATES = ("done", "running", "pending", "failed", "unknown", "waiting")
"""Of a task: its results are there; Slurm runs it; Slurm has it queued; it left the queue without results; it was
submitted, and Slurm can't be asked about it; not yet submitted."""
_ENDED_FIELDS = ("verdict", "exit_code", "attempt", "node", "task_id", "log", "reason")


@dataclass
class JobState:
    """One job of the graph.

    Attributes:
        counts: tasks by state, in the order of STATES.
        attempt: highest restart number that a task reported or runs with.
        nodes: where its running tasks are.
        left: time to the limit of the running task with the least left, as Slurm writes it.
        reason: why it waits, or why it failed; while it runs, which of its nodes train and which serve.
        log: the file to open.
        failed_tasks: numbers of the tasks that failed.
        unit: what its tasks count, for instance trees or steps; known while some run.
        per_minute: units that all running tasks do a minute.
        seconds_left: until it is done, when as many tasks go on running as now.
    """

    job: str
    stage: str
    num_tasks: int
    counts: dict[str, int] = field(default_factory=dict)
    attempt: int | None = None
    nodes: list[str] = field(default_factory=list)
    left: str | None = None
    reason: str | None = None
    log: str | None = None
    failed_tasks: list[int] = field(default_factory=list)
    unit: str | None = None
    per_minute: float | None = None
    seconds_left: float | None = None

    @property
    def state(self) -> str:
        """The job's own state: the most urgent of its tasks'."""
        order = ("running", "failed", "pending", "unknown", "waiting", "done")
        return next(state for state in order if self.counts.get(state) or state == "done")

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**vars(self), "state": self.state}


def is_launched(run: Path) -> bool:
    """Whether the run was launched, or written by a dry run."""
    return (run / "jobs" / "cluster.yaml").is_file()


def job_states(cfg: RunConfig) -> list[JobState]:
    """Every job of a launched run.

    Asks squeue once, and sacct once where there is accounting and something left the queue without results; works
    without Slurm too, from what the jobs left.
    """
    run = cfg.run_dir.absolute()
    cluster = load_cluster(run / "jobs" / "cluster.yaml")
    jobs = build_graph(cfg, cluster)
    done = {job.name: tasks_done(run, job) for job in jobs}
    past: dict[str, str] = {}
    silence: str | None = None
    if cluster.executor == "local":
        planned = planned_here(run)
        submitted = {name: dict.fromkeys(tasks, ("local", "local")) for name, tasks in planned.items()}
        pending = {job.name: {*planned.get(job.name, ())} - done[job.name] for job in jobs}
        queued = queue_here(run, jobs, pending)
    else:
        (queued, silence), submitted = _queue_of(run), last_submissions(run)
        gone = {
            job_id
            for job in jobs
            for task, (job_id, _) in submitted.get(job.name, {}).items()
            if task not in queued.get(job.name, {}) and task not in done[job.name]
        }
        past = slurm.past_states(sorted(gone, key=int)) if silence is None else {}
    return [
        _job_state(run, job, done[job.name], queued.get(job.name, {}), submitted.get(job.name, {}), past, silence)
        for job in jobs
    ]


def _queue_of(run: Path) -> tuple[dict[str, dict[int, slurm.Queued]], str | None]:
    """(what Slurm has of a run, by job and task; why it can't be asked, if so)."""
    queued: dict[str, dict[int, slurm.Queued]] = {}
    if not slurm.is_available():
        return queued, "no Slurm on this machine to ask"
    try:
        for each in slurm.queue():
            known = parse_comment(each.comment, run_key(run))
            if known:
                queued.setdefault(known[0], {}).update({known[1] + index: each for index in each.indices})
    except ConfigError as error:
        return {}, f"Slurm doesn't answer ({error})"
    return queued, None


def last_submissions(run: Path) -> dict[str, dict[int, tuple[str, str]]]:
    """By job name and task: (Slurm's id, id of the task as sacct names it) of the last submission."""
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for row in Journal.read(run / "jobs" / SUBMITTED):
        for task in from_ranges(row["tasks"]):
            task_id = f"{row['id']}_{task - row['offset']}" if row["array"] else row["id"]
            found.setdefault(row["job"], {})[task] = (row["id"], task_id)
    return found


def read_ended(run: Path, job: Job, task: int) -> dict[str, str] | None:
    """What a task's last attempt wrote at its end; None: nothing yet."""
    try:
        lines = (run / "jobs" / "ended" / work_name(job, task)).read_text(errors="replace").split("\n")
    except OSError:
        return None
    return dict(zip(_ENDED_FIELDS, lines, strict=False))


def _job_state(
    run: Path,
    job: Job,
    done: Collection[int],
    queued: Mapping[int, slurm.Queued],
    submitted: Mapping[int, tuple[str, str]],
    past: Mapping[str, str],
    silence: str | None,
) -> JobState:
    state = JobState(job.name, job.stage, len(job.tasks))
    counts = Counter[str]()
    shown: tuple[int, int] | None = None  # (urgency, task) of the task whose reason and log are shown
    for task in job.tasks:
        kind = _task_state(task, done, queued, submitted)
        if kind == "failed" and silence is not None and not _has_failed(run, job, task):
            kind, state.reason = "unknown", silence
        counts[kind] += 1
        if kind == "failed":
            state.failed_tasks.append(task)
        urgency = ("failed", "running", "pending").index(kind) if kind in ("failed", "running", "pending") else 9
        if shown is None or urgency < shown[0]:
            shown = (urgency, task)
    state.counts = {name: counts[name] for name in STATES if counts[name]}
    running = [each for each in queued.values() if each.state != "PENDING"]
    state.nodes = sorted({each.nodes for each in running if each.nodes})
    state.left = min((each.left for each in running), key=lambda left: (len(left), left), default=None)
    logs = [_last_log(run, job, task) for task, each in queued.items() if each.state != "PENDING"]
    known = together(filter(None, (read_pace(log) for log in logs if log)), counts["pending"])
    if known:
        state.unit, state.per_minute, state.seconds_left = known
    if shown is not None and shown[0] != 9:
        _explain(state, run, job, shown[1], queued, submitted, past)
    return state


def _task_state(
    task: int, done: Collection[int], queued: Mapping[int, slurm.Queued], submitted: Mapping[int, tuple[str, str]]
) -> str:
    if task in queued:
        return "pending" if queued[task].state == "PENDING" else "running"
    if task in done:
        return "done"
    return "failed" if task in submitted else "waiting"


def _has_failed(run: Path, job: Job, task: int) -> bool:
    """Whether a task's last attempt wrote that it was the last."""
    return (read_ended(run, job, task) or {}).get("verdict") in ("failed", "refused", "cancelled")


def _explain(
    state: JobState,
    run: Path,
    job: Job,
    task: int,
    queued: Mapping[int, slurm.Queued],
    submitted: Mapping[int, tuple[str, str]],
    past: Mapping[str, str],
) -> None:
    """Attempt, reason and log of the task that matters most."""
    ended = read_ended(run, job, task)
    if task in queued:
        waits = queued[task].state == "PENDING"
        state.reason = queued[task].reason if waits else None
    else:
        slurm_state = past.get(submitted[task][1]) if task in submitted else None
        reason = (ended or {}).get("reason") or None
        left_nothing = "it left the queue without a word: cancelled, or its node died"
        parts = [slurm_state.lower() if slurm_state not in (None, "COMPLETED", "FAILED") else None, reason]
        state.reason = ": ".join(dict.fromkeys(part for part in parts if part)) or left_nothing
    if ended:
        state.attempt = int(ended.get("attempt") or 0)
    log = _last_log(run, job, task)
    if log is not None:
        state.log = str(log)
        attempt = log.parent.name.rpartition("-")[2]
        state.attempt = max(state.attempt or 0, int(attempt) if attempt.isdigit() else 0)
        split = log.with_name("parts")  # of a job whose nodes do different work
        if task in queued and state.reason is None and split.is_file():
            state.reason = split.read_text().strip()


def _last_log(run: Path, job: Job, task: int) -> Path | None:
    """Rank 0's log of a task's last attempt."""
    logs = (run / "logs" / work_name(job, task)).glob("job-*/rank-0.log")
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def print_states(states: list[JobState], excluded: Mapping[str, str]) -> None:
    """A table, what to open, and the bad nodes that the run keeps off, with why."""
    table = Table(box=None, pad_edge=False)
    for title in ("job", "state", "tasks"):
        table.add_column(title)
    for title in ("attempt", "rate", "done in", "limit in"):
        table.add_column(title, justify="right")
    table.add_column("nodes")
    table.add_column("reason", overflow="fold")
    for state in states:
        tasks = ", ".join(f"{count} {name}" for name, count in state.counts.items()) if state.num_tasks > 1 else ""
        nodes = ",".join(state.nodes[:4]) + (", ..." if len(state.nodes) > 4 else "")
        attempt = "" if state.attempt is None else str(state.attempt)
        rate = f"{state.per_minute:.1f} {state.unit}/min" if state.per_minute is not None else ""
        finish = format_seconds(state.seconds_left) if state.seconds_left is not None else ""
        limit = state.left or ""
        table.add_row(state.job, state.state, tasks, attempt, rate, finish, limit, nodes, escape(state.reason or ""))
    console = Console()
    console.print(table)
    for state in states:
        if state.state in ("failed", "running") and state.log:
            console.print(f"{state.job}: {state.log}", soft_wrap=True, highlight=False, markup=False)
    for node, why in excluded.items():
        console.print(f"excluded {node}: {why}", soft_wrap=True, highlight=False, markup=False)
    if any(state.counts.get("failed") for state in states):
        console.print("`astro-hpc launch` again submits what failed, and nothing that is queued or running")


def cancel_run(run: Path) -> list[str]:
    """Cancel whatever Slurm, or this machine's local launch, has of a run; the ids."""
    if is_launched(run) and load_cluster(run / "jobs" / "cluster.yaml").executor == "local":
        return cancel_here(run.absolute())
    ids = sorted({each.array_id for each in slurm.queue() if parse_comment(each.comment, run_key(run.absolute()))})
    if ids:
        slurm.cancel(ids)
    return ids
