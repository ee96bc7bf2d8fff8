"""Launching: freeze code and configuration in the run folder, write every job's sbatch file, submit what is missing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import astro_hpc
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.launch import slurm
from astro_hpc.launch.cluster import ClusterConfig
from astro_hpc.launch.fresh import fresh_tasks, in_one_process
from astro_hpc.launch.graph import (
    Job,
    LiveJob,
    Plan,
    as_ranges,
    build_graph,
    choose,
    chunks,
    plan,
    refuse_shared_process,
)
from astro_hpc.launch.local import run_here
from astro_hpc.launch.render import Place, parse_comment, render
from astro_hpc.rl.checks import check_settings
from astro_hpc.run.files import Journal, Lock, write_text_atomic
from astro_hpc.run.stage import source_commit, write_resolved_config
from astro_hpc.search.shards import SHARD_FOLDERS, made_in_one_process

SUBMITTED = "submitted.jsonl"
"""Journal in RUN/jobs: one line a submission: job, id, offset, tasks, when."""
_REDO = "--redo"


@dataclass
class Launched:
    """What a launch did, or would have.

    Attributes:
        files: the sbatch files, in the graph's order.
        submitted: (job's name, Slurm's id, number of tasks); the id is None in a dry run.
        redone: names of those that set aside what was made from other inputs.
        skipped: names of the chosen jobs of which nothing was missing.
    """

    jobs_dir: Path
    files: list[Path] = field(default_factory=list)
    submitted: list[tuple[str, str | None, int]] = field(default_factory=list)
    redone: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        rows = [{"job": name, "id": job_id, "tasks": tasks} for name, job_id, tasks in self.submitted]
        files = [str(path) for path in self.files]
        found: dict[str, Any] = {"jobs_dir": str(self.jobs_dir), "submitted": rows, "redone": self.redone}
        return {**found, "skipped": self.skipped, "files": files}

    def lines(self, dry_run: bool) -> list[str]:
        """For people."""
        lines = []
        for name, job_id, tasks in self.submitted:
            array = f", {tasks} tasks" if tasks > 1 else ""
            redo = f" with {_REDO}" if name in self.redone else ""
            what = "would be submitted" if dry_run else f"job {job_id or 'here'}"
            lines.append(f"{name}: {what}{redo}{array}")
        lines += [f"{name}: done, queued or running already" for name in self.skipped]
        return [*lines, f"sbatch files: {self.jobs_dir}"]


def launch(
    cfg: RunConfig,
    cluster: ClusterConfig,
    *,
    stages: Collection[str] | None = None,
    first: str | None = None,
    dry_run: bool = False,
    workdir: Path | None = None,
) -> Launched:
    """Submit the jobs of a run that are neither done nor queued nor running.

    What is done, but was made from other inputs than there are now or will be, is submitted with `--redo`: old results
    are set aside where the inputs really differ (or the settings), and stay where not.

    Args:
        stages: only these; None: all.
        first: this stage and all behind it.
        dry_run: write everything, submit nothing; needs no Slurm.
        workdir: relative paths of the configuration start here; the working folder when absent.

    Raises:
        ConfigError: the cluster would refuse a job, a job's inputs are neither there nor coming, or another split of
            its work lies there: nothing has been submitted then. Or Slurm refused after all, or stopped answering,
            amid the submissions: the message names those that it took, and launching again submits the rest.
    """
    run = cfg.run_dir.absolute()
    cfg = cfg.model_copy(update={"runs_dir": run.parent})
    jobs = build_graph(cfg, cluster)
    chosen = choose(jobs, stages, first)
    if any(job.stage == "rl" for job in chosen):
        check_settings(cfg)  # a day of other stages would go before
    refuse_shared_process(chosen, cfg)
    _refuse_other_splits(run, jobs)
    done = {job.name: tasks_done(run, job) for job in jobs}
    with contextlib.ExitStack() as held:
        if not dry_run:  # two launches at the same time would both find nothing queued
            held.enter_context(Lock(run / "jobs" / ".launch.lock", f"{run}: launch"))
        live, found_size = _ask_slurm(run, cluster, dry_run)
        size = cluster.max_array_size or found_size
        steps = plan(jobs, chosen, fresh_tasks(run, jobs, done), live, size)
        _refuse_in_one_process(run, steps)
        steps = _with_redo(run, steps, done)
        submitted = {(step.job.name, step.offset): step.job for step in steps.submissions}
        frozen, contents = _what_to_freeze(cfg, run)
        place = Place(run, frozen, (workdir or Path.cwd()).absolute(), run_key(run))
        keeping_off = cluster.model_copy(update={"exclude": list(dict.fromkeys([*cluster.exclude, *bad_nodes(run)]))})
        texts = {
            (job.name, offset): render(submitted.get((job.name, offset), job), keeping_off, place, offset, len(tasks))
            for job in chosen
            for offset, tasks in chunks(job.tasks, size)
        }
        if cluster.executor == "slurm" and not dry_run:
            _refuse_what_slurm_would(steps, texts, cluster)
        _freeze(frozen, contents)
        # What has made the results, and what runs now, a dry run must not speak over.
        if not (dry_run and (run / "config.yaml").exists()):
            write_resolved_config(cfg)
        if not (dry_run and (run / "jobs" / "cluster.yaml").exists()):
            cluster_text = yaml.safe_dump(cluster.model_dump(mode="json"), sort_keys=False)
            write_text_atomic(run / "jobs" / "cluster.yaml", cluster_text)
        redone = list(dict.fromkeys(step.job.name for step in steps.submissions if _REDO in step.job.command))
        launched = Launched(run / "jobs", redone=redone, skipped=_skipped(chosen, steps))
        for (name, offset), text in texts.items():
            (run / "logs" / name).mkdir(parents=True, exist_ok=True)  # or Slurm drops the job's output
            sbatch_file(run, name, offset).write_text(text)
            launched.files.append(sbatch_file(run, name, offset))
        if cluster.executor == "local":
            run_here(run, cluster, place, [(step.job, step.tasks) for step in steps.submissions], dry_run)
            launched.submitted = [(step.job.name, None, len(step.tasks)) for step in steps.submissions]
        else:
            launched.submitted = _submit(run, steps, dry_run)
    return launched


def _submit(run: Path, steps: Plan, dry_run: bool) -> list[tuple[str, str | None, int]]:
    ids: dict[str, list[str]] = {}
    submitted: list[tuple[str, str | None, int]] = []
    if dry_run:
        return [(step.job.name, None, len(step.tasks)) for step in steps.submissions]
    with Journal(run / "jobs" / SUBMITTED) as journal:
        try:
            for step in steps.submissions:
                array = None
                if step.job.num_tasks:
                    throttle = f"%{step.job.throttle}" if step.job.throttle else ""
                    array = as_ranges(task - step.offset for task in step.tasks) + throttle
                dependency = _dependency([each for name in step.after_ok for each in ids[name]], step.after_any)
                job_id = slurm.submit(sbatch_file(run, step.job.name, step.offset), array, dependency)
                row: dict[str, Any] = {
                    "job": step.job.name,
                    "id": job_id,
                    "offset": step.offset,
                    "tasks": as_ranges(step.tasks),
                }
                row["array"] = array is not None
                journal.append({**row, "time": datetime.now(UTC).isoformat(timespec="seconds")})
                ids.setdefault(step.job.name, []).append(job_id)
                submitted.append((step.job.name, job_id, len(step.tasks)))
                _rewire(steps, step.job.name, ids)
        except ConfigError as error:
            if not submitted:
                raise
            those = ", ".join(f"{name} {job_id}" for name, job_id, _ in submitted)
            raise ConfigError(f"{error}; submitted: {those}; launch again submits the rest") from None
    return submitted


def _rewire(steps: Plan, name: str, ids: Mapping[str, Sequence[str]]) -> None:
    """Have those that wait in the queue wait for what was just submitted too: at once, for a launch may be cut off."""
    for waiting in steps.rewire:
        if name in waiting.after_ok:
            new = [each for input_ in waiting.after_ok for each in ids.get(input_, ())]
            for job_id in waiting.slurm_ids:
                slurm.set_dependency(job_id, _dependency(new, waiting.after_any) or "")


def _dependency(after_ok: Sequence[str], after_any: Sequence[str]) -> str | None:
    parts = [f"{kind}:{':'.join(ids)}" for kind, ids in (("afterok", after_ok), ("afterany", after_any)) if ids]
    return ",".join(parts) or None


def _with_redo(run: Path, steps: Plan, done: Mapping[str, Collection[int]]) -> Plan:
    """The commands that meet results of other inputs set them aside.

    Those are results that are there and are made again all the same, and what was begun of inputs that are on their
    way. `--redo` does nothing where the inputs turn out the same; and a redo that was cut off goes on, for what it has
    begun is of the new inputs. So a job keeps it when it is requeued.
    """

    submissions = []
    for step in steps.submissions:
        outdated = any(task in done[step.job.name] for task in step.tasks)
        begun = any((run / step.job.output_of(task) / "state.json").is_file() for task in step.tasks)
        behind = bool(step.after_ok or step.after_any)
        if step.job.marker == "manifest.json" and (outdated or (begun and behind)):
            step = replace(step, job=replace(step.job, command=(*step.job.command, _REDO)))
        submissions.append(step)
    return Plan(submissions, steps.rewire)


def _skipped(chosen: Sequence[Job], steps: Plan) -> list[str]:
    names = {step.job.name for step in steps.submissions}
    return [job.name for job in chosen if job.name not in names]


def sbatch_file(run: Path, name: str, offset: int = 0) -> Path:
    """Where a job's sbatch text lies; the chunks of a large array each have one."""
    return run / "jobs" / (f"{name}-from-{offset}.sbatch" if offset else f"{name}.sbatch")


def run_key(run: Path) -> str:
    """What names a run in Slurm's comments: its folder's name and a hash of its path, links followed."""
    return f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"


def bad_nodes(run: Path) -> dict[str, str]:
    """Why, by node: what the run's jobs put into RUN/jobs/exclude. Remove a line there when its node is mended."""
    try:
        lines = (run / "jobs" / "exclude").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {node: reason for node, _, reason in (line.partition(" ") for line in lines) if node}


def live_jobs(run: Path) -> dict[str, list[LiveJob]]:
    """What Slurm has of a run, by job name."""
    found: dict[str, dict[str, tuple[set[int], bool]]] = {}
    for each in slurm.queue():
        known = parse_comment(each.comment, run_key(run))
        if known is None:
            continue
        name, offset = known
        tasks, pending = found.setdefault(name, {}).get(each.array_id, (set(), True))
        tasks |= {offset + index for index in each.indices}
        found[name][each.array_id] = (tasks, pending and each.state == "PENDING")
    return {
        name: [LiveJob(slurm_id, frozenset(tasks), pending) for slurm_id, (tasks, pending) in by_id.items()]
        for name, by_id in found.items()
    }


def tasks_done(run: Path, job: Job) -> set[int]:
    """Tasks whose results are there. A gathering counts as done when it found nothing missing.

    A stage that one process has done is done in all its shards.
    """
    whole = in_one_process(run, job)
    if whole is not None:
        return set(job.tasks) if whole.name == job.marker else set()
    done = set()
    for task in job.tasks:
        marker = run / job.output_of(task) / job.marker
        if marker.is_file() and (job.marker != "gather.json" or json.loads(marker.read_text()).get("complete")):
            done.add(task)
    return done


# --- refusing before anything is submitted --------------------------------------------------------------------


def _refuse_other_splits(run: Path, jobs: Sequence[Job]) -> None:
    """Shards of another number lie in the run folder already: a second split would do the work twice."""
    wanted: dict[tuple[str, Path], int] = {}
    for job in jobs:
        if job.stage in SHARD_FOLDERS:
            place = job.stage, run / SHARD_FOLDERS[job.stage].format(arm=job.arm)
            wanted[place] = max(wanted.get(place, 1), job.num_tasks or 1)
    for (stage, parent), num_shards in wanted.items():
        arm = parent.name if stage == "select" else None
        whole = made_in_one_process(run, stage, arm)
        for folder in parent.glob("shard-?????-of-?????"):
            found = int(folder.name[-5:])
            if found != num_shards and whole != folder / "manifest.json":
                raise ConfigError(
                    f"{folder}: was begun in {found} shards, the cluster file says {num_shards}; set "
                    f"stages.{stage}.shards to {found} or move it away"
                )


def _refuse_in_one_process(run: Path, steps: Plan) -> None:
    """What one process has begun, or has done and must do again, can't go on in shards."""
    for step in steps.submissions:
        if (made := in_one_process(run, step.job)) is not None:
            what = "done in one process, of other inputs" if made.name == "manifest.json" else "begun in one process"
            raise ConfigError(f"{made.parent}: was {what}; set stages.{step.job.stage}.shards to 1, or move it away")


def _refuse_what_slurm_would(steps: Plan, texts: Mapping[tuple[str, int], str], cluster: ClusterConfig) -> None:
    known = slurm.partitions()
    for step in steps.submissions:
        partition = step.job.resources.partition
        if partition is not None and not set(partition.split(",")) <= set(known):
            raise ConfigError(f"partition {partition!r}: the cluster has {', '.join(known)}; mend the cluster file")
    tried: set[tuple[str, bool]] = set()
    for step in steps.submissions:
        kind = step.job.stage, step.job.num_tasks is None  # a stage's shards, and the gathering of them
        if kind in tried:
            continue
        tried.add(kind)
        if reason := slurm.would_take(texts[step.job.name, step.offset]):
            asked = step.job.resources
            raise ConfigError(
                f"{step.job.name}: Slurm refuses it ({reason}); it asks for {asked.nodes} nodes, {asked.gpus_per_node} "
                f"GPUs and {asked.tasks_per_node} tasks each, for {asked.time}; mend the cluster file"
            )


def _ask_slurm(run: Path, cluster: ClusterConfig, dry_run: bool) -> tuple[dict[str, list[LiveJob]], int]:
    """(what Slurm has of this run, MaxArraySize). A dry run goes on where there is no Slurm to ask."""
    if cluster.executor == "slurm":
        try:
            size = slurm.settings().get("MaxArraySize", "")
            return live_jobs(run), int(size) if size.isdigit() else slurm.DEFAULT_MAX_ARRAY_SIZE
        except ConfigError:
            if not dry_run:
                raise
    return {}, slurm.DEFAULT_MAX_ARRAY_SIZE


# --- freezing -------------------------------------------------------------------------------------------------


def _what_to_freeze(cfg: RunConfig, run: Path) -> tuple[Path, dict[str, bytes]]:
    """(folder, contents by relative path): named by a hash, so that a changed launch never touches an older one's."""
    package = Path(astro_hpc.__file__).resolve().parent
    contents: dict[str, bytes] = {
        f"astro_hpc/{path.relative_to(package)}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    values: dict[str, Any] = cfg.model_dump(mode="json")
    contents["config.yaml"] = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()
    contents["COMMIT"] = f"{source_commit() or 'unknown'}\n".encode()
    digest = hashlib.sha256()
    for name, data in contents.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return run / "jobs" / f"frozen-{digest.hexdigest()[:12]}", contents


def _freeze(frozen: Path, contents: Mapping[str, bytes]) -> None:
    """Whole or absent, but not forced to the disk: a hundred small files take seconds on a busy file system, and after
    a power cut the next launch makes them again."""
    if frozen.exists():
        return
    frozen.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{frozen.name}.", suffix=".tmp", dir=frozen.parent) as name:
        whole = Path(name) / "whole"
        for relative, data in contents.items():
            (whole / relative).parent.mkdir(parents=True, exist_ok=True)
            (whole / relative).write_bytes(data)
        with contextlib.suppress(FileExistsError):
            whole.rename(frozen)
