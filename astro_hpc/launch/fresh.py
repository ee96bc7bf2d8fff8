"""Which results are still those of what they were made from; the others are submitted again."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from astro_hpc.launch.graph import Job
from astro_hpc.search.shards import made_in_one_process


def in_one_process(run: Path, job: Job) -> Path | None:
    """For an array of several shards whose stage was done or begun in one process: the manifest or state of that."""
    return made_in_one_process(run, job.stage, job.arm) if (job.num_tasks or 1) > 1 else None


def fresh_tasks(run: Path, jobs: Sequence[Job], done: Mapping[str, Collection[int]]) -> dict[str, set[int]]:
    """Of the tasks that are done, those whose inputs are as they were.

    A stage's manifest says what its inputs and outputs were, so a stage is outdated when what it read is not what the
    stage that makes it wrote last. A gathering or a report has no manifest: it is outdated when it is older than one of
    its inputs' markers.
    """
    markers = {(job.name, task): path for job in jobs for task, path in _markers(run, job, done[job.name]).items()}
    known = {path: json.loads(path.read_text()) for path in set(markers.values()) if path.name == "manifest.json"}
    written = {path: seen for each in known.values() for path, seen in each.get("outputs", {}).items()}

    def is_fresh(job: Job, task: int) -> bool:
        marker = markers[job.name, task]
        if marker in known:
            return _reads_what_was_written(run, known[marker], written)
        made = marker.stat().st_mtime_ns
        inputs = {markers[name, each] for name in job.after for each in done[name]}
        return all(path.stat().st_mtime_ns <= made for path in inputs)

    return {job.name: {task for task in done[job.name] if is_fresh(job, task)} for job in jobs}


def _markers(run: Path, job: Job, tasks: Collection[int]) -> dict[int, Path]:
    whole = in_one_process(run, job)
    return {task: whole or run / job.output_of(task) / job.marker for task in tasks}


def _reads_what_was_written(run: Path, manifest: Mapping[str, Any], written: Mapping[str, str]) -> bool:
    for name, path in manifest.get("input_paths", {}).items():
        inside = _inside_of_run(run, path, written)
        if inside is not None and written[inside] != manifest["inputs"].get(name):
            return False
    return True


def _inside_of_run(run: Path, path: str, written: Collection[str]) -> str | None:
    """The path relative to the run folder, which may have been named from elsewhere, or moved, when it was written."""
    parts = Path(path).parts
    for at, part in enumerate(parts):
        if part == run.name and (inside := "/".join(parts[at + 1 :])) in written:
            return inside
    return None
