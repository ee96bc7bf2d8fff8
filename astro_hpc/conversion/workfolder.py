"""A folder that is written file by file over minutes or hours: goes on after a kill, appears only when it is whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.run.files import Lock, fsync_dir, write_json_atomic
from astro_hpc.run.progress import Progress

_PLAN = ".plan.json"
_SPARE_BYTES = 64 << 20
"""Left free beside what is counted: metadata, tokenizer, the file system's own."""


class WorkFolder:
    """`.NAME.partial` beside the target: which of its files are finished is on disk beside them."""

    def __init__(self, target: Path, plan: dict[str, Any]) -> None:
        self.path = target.with_name(f".{target.name}.partial")
        self._target, self._plan = target, plan

    def begin(self, sizes: Sequence[int]) -> None:
        """Go on with what a stopped conversion of the same plan left, else start anew.

        Args:
            sizes: bytes of each file.

        Raises:
            ConfigError: the disk has no room for what is not finished.
        """
        goes_on = False
        with contextlib.suppress(OSError, ValueError):
            goes_on = json.loads((self.path / _PLAN).read_text(encoding="utf-8")) == self._plan
        if goes_on:
            self._remove_half_written()
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        left = sum(size for number, size in enumerate(sizes) if self.result(number) is None)
        _check_space(self.path.parent, left)
        self.path.mkdir(exist_ok=True)
        write_json_atomic(self.path / _PLAN, self._plan)

    def _remove_half_written(self) -> None:
        finished = {json.loads(path.read_text(encoding="utf-8"))["file"] for path in self.path.glob(".done-*.json")}
        for path in self.path.iterdir():
            if path.name not in finished and path.name != _PLAN and not path.name.startswith(".done-"):
                path.unlink()

    def result(self, number: int) -> Any:
        """What was recorded when file `number` was finished; None: it wasn't."""
        try:
            record = json.loads(self._record(number).read_text(encoding="utf-8"))
            whole = (self.path / record["file"]).stat().st_size == record["bytes"]
            return record["result"] if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finished(self, number: int, file: str, result: Any) -> None:
        """Record that file `number` is whole and on disk."""
        size = (self.path / file).stat().st_size
        write_json_atomic(self._record(number), {"file": file, "bytes": size, "result": result})

    def publish(self) -> None:
        """Make every file durable and give the folder its name; an old folder of that name is replaced."""
        for path in self.path.glob(".done-*.json"):
            path.unlink()
        (self.path / _PLAN).unlink()
        for path in self.path.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        fsync_dir(self.path)
        parent = self._target.parent
        if self._target.exists():
            stale = Path(tempfile.mkdtemp(prefix=f".{self._target.name}.", suffix=".old", dir=parent))
            os.rename(self._target, stale / "was")
            os.rename(self.path, self._target)
            shutil.rmtree(stale)
        else:
            os.rename(self.path, self._target)
        fsync_dir(parent)

    def _record(self, number: int) -> Path:
        return self.path / f".done-{number:05d}.json"


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Keep other conversions from the same target; the folder that holds it is made."""
    lock = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{target.parent}: not a folder; choose another target") from None
    with Lock(lock, str(target)):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk can't hold.

    Raises:
        ConfigError: says how much is needed and free.
    """
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise ConfigError(
            f"{folder}: {(needed + _SPARE_BYTES) / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; "
            "free space or write elsewhere"
        )


class Stopped(Exception):
    """Another file failed, or the user interrupted."""


def convert_files(
    label: str,
    work: WorkFolder,
    sizes: Sequence[int],
    workers: int,
    convert: Callable[[int, Callable[[int], None]], tuple[str, Any]],
) -> list[Any]:
    """Convert the files that are not finished yet, `workers` at a time; returns every file's result.

    Args:
        sizes: bytes of each file, for the progress.
        convert: (number, step) -> (file name, JSON result). It calls `step(bytes)` for each piece it has done.
    """
    results = [work.result(number) for number in range(len(sizes))]
    todo = [number for number, result in enumerate(results) if result is None]
    done = sum(size for size, result in zip(sizes, results, strict=True) if result is not None)
    stop, counting = threading.Event(), threading.Lock()

    with Progress(label, total=round(sum(sizes) / 1e6), unit="MB", done=round(done / 1e6)) as progress:
        left_over = 0

        def step(count: int) -> None:
            nonlocal left_over
            if stop.is_set():
                raise Stopped
            with counting:
                left_over += count
                progress.update(left_over // 10**6)
                left_over %= 10**6

        def one(number: int) -> None:
            file, results[number] = convert(number, step)
            work.finished(number, file, results[number])

        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(one, number) for number in todo]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return results
