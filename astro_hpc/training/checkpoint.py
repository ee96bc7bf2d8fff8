"""Checkpoints of a training run: `step_00000100/` folders in Megatron's torch_dist format, and which to resume from.

A folder appears under its name only when every byte is on disk, and `latest` is moved after that, so a run killed while
saving resumes from the one before. `complete.json`, written last, lists the files' sizes: a folder that lost or cut
some (a copy that broke off) is skipped too.

Saving stops training only while the plan is made and a child process is forked: the child sees the tensors as they were
at the fork (copy on write) and writes them while training goes on.

torch_dist's `.metadata` and `common.pt` are pickles; `model/torch_dist.py` reads them without running what they say.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import shutil
import tempfile
import threading
import types
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from astro_hpc.model.parallel import on_any_rank, tell_all
from astro_hpc.model.torch_dist import MARKER, damage, load_sharded
from astro_hpc.run.files import fsync_dir, write_json_atomic, write_text_atomic
from astro_hpc.run.process import die_with_parent

_STATE = "state.json"
_LATEST = "latest"


class Saver:
    """Saves checkpoints one at a time; every rank has one and calls the same methods in the same order."""

    def __init__(self) -> None:
        self._writer: _Writer | None = None
        self._after: tuple[Path, Path, int, int | None] = (Path(), Path(), 0, None)
        self._cleaner: threading.Thread | None = None
        # Kept, because after two saves it knows that the plan stays as it is.
        self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1, cached_metadata=True)

    def start(
        self,
        folder: Path,
        step: int,
        sharded_state: dict[str, Any],
        state: dict[str, Any],
        keep_last: int,
        keep_every: int | None = None,
    ) -> None:
        """Begin to save `folder/step_N`; the tensors may change as soon as this returns.

        Args:
            folder: the run's `checkpoints` folder.
            sharded_state: Megatron's sharded state dict: tensors, and small tensors or numbers in its common part.
            state: JSON values: loader position, scheduler.
            keep_last: how many checkpoints to keep once this one is whole.
            keep_every: besides these, those of steps that it divides are kept.
        """
        self.finish(block=True)
        self._wait_for_cleaner()  # a fork would copy a thread's locks
        final = folder / _name(step)
        temporary = _shared_temporary(folder, final.name)
        # Megatron would start a server process for the writers' results, which a killed trainer leaves behind.
        with mock.patch.object(filesystem_async, "_get_write_results_queue", queue.SimpleQueue):
            request = dist_checkpointing.save(
                sharded_state,
                str(temporary),
                sharded_strategy=self._strategy,
                async_sharded_save=True,
                preprocess_common_before_consistancy_check=_comparable,
            )
        if _rank() == 0:
            write_json_atomic(temporary / _STATE, {"step": step, **state})
        self._writer = _Writer(request)
        self._after = (temporary, final, keep_last, keep_every)

    def finish(self, block: bool) -> bool:
        """Publish the checkpoint that is being written, if it has been written; returns whether none is pending.

        Args:
            block: wait for it.

        Raises:
            RuntimeError: it could not be written, for instance because the disk is full.
        """
        if self._writer is None:
            return True
        if not block and on_any_rank(not self._writer.done()):
            return False
        writer, self._writer = self._writer, None
        writer.finalise()
        temporary, final, keep_last, keep_every = self._after
        if _rank() == 0:
            _publish(temporary, final)
            write_text_atomic(final.parent / _LATEST, final.name + "\n")
            doomed = _set_aside(final.parent, keep_last, keep_every)
            self._cleaner = threading.Thread(target=_remove, args=(doomed,), name="old checkpoints")
            self._cleaner.start()
            if block:
                self._wait_for_cleaner()
        _barrier()
        return True

    def _wait_for_cleaner(self) -> None:
        if self._cleaner is not None:
            self._cleaner.join()
            self._cleaner = None


class _Writer:
    """A child process that writes this rank's tensors; none where all are written by other ranks."""

    def __init__(self, request: AsyncRequest) -> None:
        self._request = request
        self._child: Any = None
        if request.async_fn is None:
            return
        transforms = request.async_fn.args[0]  # a partial of Megatron's writer, whose other arguments follow
        _, buckets, self._results = request.async_fn_args
        buckets = request.preload_fn() if request.preload_fn else buckets
        context = multiprocessing.get_context("fork")
        self._receive, send = context.Pipe(duplex=False)
        self._child = context.Process(
            target=_write_buckets, args=(os.getpid(), transforms, buckets, send), daemon=True, name="checkpoint"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child only writes files
            self._child.start()
        send.close()

    def done(self) -> bool:
        """Whether the child has ended or has its results ready."""
        return self._child is None or self._receive.poll()

    def finalise(self) -> None:
        """Wait for the child, then let Megatron write the metadata; on every rank."""
        results = self._collect() if self._child is not None else None
        try:
            for function in self._request.finalize_fns:
                function()
        except CheckpointException as error:
            reason = f"{results}" if isinstance(results, Exception) else "see the other ranks' logs"
            raise RuntimeError(f"the checkpoint could not be written (is the disk full?): {reason}") from error

    def _collect(self) -> Any:
        """What the child reports, handed on to Megatron."""
        try:
            results = self._receive.recv()
        except EOFError:
            results = RuntimeError("the process that writes the checkpoint was killed")
        self._receive.close()
        # Not joined: the kernel takes a while to free a large child, and the next start of a process reaps it.
        self._results.put(results)
        return results


def _write_buckets(parent: int, transforms: list[Any], buckets: list[Any], send: Connection) -> None:
    """In the child: write each bucket's file, fsync it, and report where each tensor lies."""
    die_with_parent(parent)
    results: dict[int, Any] = {}
    for index, bucket in enumerate(buckets):
        reported: queue.SimpleQueue[Any] = queue.SimpleQueue()
        counted: Any = types.SimpleNamespace(get=lambda: None, task_done=lambda: None)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, index, bucket, reported, counted, use_fsync=True
        )
        _, written = reported.get()
        if isinstance(written, Exception):
            send.send(RuntimeError(f"{bucket[0]}: {written}"))
            return
        results[index] = written
    send.send(results)


def _comparable(common: dict[str, Any]) -> dict[str, Any]:
    """What ranks must agree on: the optimizer's state is None on ranks whose data-parallel leader saves it."""
    return {**common, "optimizer": {name: value for name, value in common["optimizer"].items() if value is not None}}


def _shared_temporary(folder: Path, name: str) -> Path:
    """A new empty folder `.NAME.xyz.tmp`, the same on every rank; what killed runs left is removed."""
    chosen = ""
    if _rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".step_*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        chosen = tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
        os.chmod(chosen, 0o755)
    return Path(tell_all(chosen))


def _publish(temporary: Path, final: Path) -> None:
    """Make every file durable, add the marker, and give the folder its name."""
    sizes = {}
    for path in sorted(temporary.iterdir()):
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
        sizes[path.name] = path.stat().st_size
    write_json_atomic(temporary / MARKER, {"bytes": sizes})
    fsync_dir(temporary)
    if final.exists():  # a torn one of the same step
        shutil.rmtree(final)
    os.rename(temporary, final)
    fsync_dir(final.parent)


def _set_aside(folder: Path, keep_last: int, keep_every: int | None) -> list[Path]:
    """Rename the checkpoints that go, which takes no time; removing many gigabytes does."""
    whole = [path for path in _checkpoints(folder) if damage(path) is None]
    doomed = []
    for path in whole[keep_last:]:
        if not keep_every or int(path.name.removeprefix("step_")) % keep_every:
            doomed.append(path.rename(folder / f".{path.name}.old.tmp"))
    return doomed


def _remove(folders: list[Path]) -> None:
    """What a kill leaves of them, the next save removes."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def find(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; torn ones are skipped with a warning. None: there is none.

    With several ranks, all call it; rank 0 looks.
    """
    found: Path | None = tell_all(_find(folder) if _rank() == 0 else None)
    return found


def _find(folder: Path) -> Path | None:
    for path in _checkpoints(folder):
        reason = damage(path)
        if reason is None:
            return path
        warnings.warn(f"{path}: {reason}; the checkpoint before it is used", stacklevel=4)
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The JSON values that `save` was given, and `step`."""
    state: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
    return state


def load(path: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    """Fill a sharded state dict from a checkpoint; the tensor-, pipeline- and data-parallel sizes may have changed.

    Raises:
        ConfigError: the checkpoint holds objects that are not tensors or plain values.
    """
    return load_sharded(path, sharded_state)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _barrier() -> None:
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
