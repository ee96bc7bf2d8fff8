"""Which results are still those of what they were made from; the others are submitted again."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from astro_hpc.launch.graph import Job


def fresh_tasks(run: Path, jobs: Sequence[Job], done: Mapping[str, Collection[int]]) -> dict[str, set[int]]:
    """Of the tasks that are done, those whose inputs are as they were.

    A stage's manifest says what its inputs and outputs were, so a stage is outdated when what it read is not what the
    stage that makes it wrote last. A gathering or a report has no manifest: it is outdated when it is older than one of
    its inputs' markers.
    """
    manifests = {
        (job.name, task): json.loads(_marker(run, job, task).read_text())
        for job in jobs
        if job.marker == "manifest.json"
        for task in done[job.name]
    }
    written = {path: seen for each in manifests.values() for path, seen in each.get("outputs", {}).items()}
    by_name = {job.name: job for job in jobs}

    def is_fresh(job: Job, task: int) -> bool:
        if (job.name, task) in manifests:
            return _reads_what_was_written(run, manifests[job.name, task], written)
        made = _marker(run, job, task).stat().st_mtime_ns
        inputs = (_marker(run, by_name[name], each) for name in job.after for each in done[name])
        return all(path.stat().st_mtime_ns <= made for path in inputs)

    return {job.name: {task for task in done[job.name] if is_fresh(job, task)} for job in jobs}


def _marker(run: Path, job: Job, task: int) -> Path:
    return run / job.output_of(task) / job.marker


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
