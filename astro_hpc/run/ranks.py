"""The ranks of a stage: which one this process is, and starting, watching and stopping all of them on one machine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.run.files import write_json_atomic
from astro_hpc.run.process import EXIT_CHECKPOINTED, EXIT_NO_ROOM, EXIT_USAGE

LISTEN_FD = "ASTRO_HPC_LISTEN_FD"
"""The variable that names rank 0's listening socket, opened by whoever started the ranks: no port can be lost."""
_PLACE = "ASTRO_HPC_STAGE"
_POLL_SECONDS = 0.05
_TAIL_BYTES = 6000


class RankFailed(Exception):
    """A rank ended in a way that is not the user's error; the message names it and its log.

    Attributes:
        exit_code: what the command ends with; the rank's own where that says that it passes by itself.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Place:
    """This process among the ranks that were started together."""

    rank: int
    local_rank: int
    world_size: int


def place_from(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Which rank this process is, by torchrun's variables, ours, or those of an srun step; None: it is alone."""
    if environment.get("RANK") and environment.get("WORLD_SIZE"):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and environment.get("SLURM_PROCID"):
        # A batch script has SLURM_NTASKS and SLURM_PROCID too, but no step: nobody else would come.
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    else:
        return None
    rank, local_rank, world_size = (int(environment.get(name) or 0) for name in names)
    return Place(rank, local_rank, world_size) if world_size > 1 else None


def ranks_here(environment: Mapping[str, str] = os.environ) -> int:
    """How many of the ranks that were started together are on this machine."""
    if place_from(environment) is None:
        return 1
    # torchrun's and ours; Slurm's reads `8(x4)`, or `8,4` where the nodes differ, which no launch of ours asks for.
    text = environment.get("LOCAL_WORLD_SIZE") or environment.get("SLURM_STEP_TASKS_PER_NODE") or "1"
    return int(re.split("[(,]", text)[0])


def set_rendezvous(environment: MutableMapping[str, str] = os.environ) -> tuple[str, int]:
    """Where the ranks meet; sets MASTER_ADDR and MASTER_PORT for an srun step that has none.

    Raises:
        ConfigError: they are missing and can't be derived.
    """
    if not environment.get("MASTER_ADDR"):
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise ConfigError("MASTER_ADDR is not set; start the ranks with torchrun or srun, or set it to a host")
        environment["MASTER_ADDR"] = first_host(nodes)
    if not environment.get("MASTER_PORT"):
        # Jobs may share a node's network. Below the ports that kernels hand out by themselves.
        environment["MASTER_PORT"] = str(10000 + int(environment.get("SLURM_JOB_ID") or 0) % 20000)
    return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])


def first_host(nodes: str) -> str:
    """The first host of Slurm's compressed form, for instance `gpu[003-007,9],login` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[([^],-]+)[^]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise ConfigError(f"the node list {nodes!r} can't be read; set MASTER_ADDR to rank 0's host")
    return "".join(part or "" for part in match.groups())


def supervised() -> dict[str, Any] | None:
    """What `run_ranks` told this rank about its stage; None: it wasn't started by it."""
    text = os.environ.get(_PLACE)
    return json.loads(text) if text else None


def report(folder: Path, rank: int, **values: Any) -> None:
    """In a rank: leave a result for `run_ranks`: `outputs` and `counts`, or `refused` or `stopped` with a text."""
    write_json_atomic(folder / f"rank_{rank}.json", values)


def run_ranks(
    command: Sequence[str],
    world_size: int,
    log_dir: Path,
    told: dict[str, Any],
    stop_requested: Callable[[], bool],
) -> dict[str, Any]:
    """Run `command` as `world_size` processes of this machine until all have ended.

    Each writes `log_dir/rank_K.log`; rank 0's is shown as it grows. A stop that is asked for is passed on as SIGTERM.
    When one fails the others are killed at once, and none outlives this process, however it ends.

    Args:
        told: JSON values that `supervised` returns in the ranks.

    Returns:
        What rank 0 reported, `stopped` with a text among it when a stop was asked for in time.

    Raises:
        ConfigError: a rank refused the user's input.
        RankFailed: a rank crashed or was killed.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    for stale in log_dir.glob("rank_*.json"):
        stale.unlink()
    children: list[subprocess.Popen[bytes]] = []
    shown = _Follower(log_dir / "rank_0.log")
    told_to_stop = False
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(2048)
        try:
            for rank in range(world_size):
                children.append(_start(command, rank, world_size, log_dir, told, listener))
            while True:
                codes = [child.poll() for child in children]
                shown.show()
                if None not in codes or any(code not in (None, 0, EXIT_CHECKPOINTED) for code in codes):
                    break
                if stop_requested() and not told_to_stop:
                    told_to_stop = True
                    for child in children:
                        child.send_signal(signal.SIGTERM)
                time.sleep(_POLL_SECONDS)
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.wait()
            shown.show()
    if told_to_stop and -signal.SIGTERM in codes and not any(_is_failure(code) for code in codes):
        return {"stopped": "stopped while its ranks were starting"}  # too early for one to have a handler
    _raise_failure(codes, log_dir)
    result: dict[str, Any] = json.loads((log_dir / "rank_0.json").read_text(encoding="utf-8"))
    return result


def _start(
    command: Sequence[str], rank: int, world_size: int, log_dir: Path, told: dict[str, Any], listener: socket.socket
) -> subprocess.Popen[bytes]:
    threads = max(1, len(os.sched_getaffinity(0)) // world_size) if hasattr(os, "sched_getaffinity") else 1
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONFAULTHANDLER": "1",
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        "ASTRO_HPC_PARENT": str(os.getpid()),
        _PLACE: json.dumps(told),
    }
    inherited = (listener.fileno(),) if rank == 0 else ()
    if inherited:
        environment[LISTEN_FD] = str(inherited[0])
    with open(log_dir / f"rank_{rank}.log", "wb") as log:
        # A group of its own: a terminal's Ctrl-C reaches it through us, once.
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            pass_fds=inherited,
        )


def _is_failure(code: int | None) -> bool:
    return code not in (None, 0, EXIT_CHECKPOINTED, -signal.SIGTERM)


def _raise_failure(codes: Sequence[int | None], log_dir: Path) -> None:
    """Tell which rank failed first; the others' errors only follow from it."""
    failed = [rank for rank, code in enumerate(codes) if code not in (None, 0, EXIT_CHECKPOINTED)]
    if not failed:
        return
    for rank in failed:
        refused = log_dir / f"rank_{rank}.json"
        if codes[rank] == EXIT_USAGE and refused.exists():
            raise ConfigError(json.loads(refused.read_text(encoding="utf-8"))["refused"])

    def order(rank: int) -> tuple[bool, int]:
        # One that was killed wrote nothing; of the rest the first to write its traceback.
        return (codes[rank] or 0) >= 0, (log_dir / f"rank_{rank}.log").stat().st_mtime_ns

    first = min(failed, key=order)
    code, log = codes[first] or 0, log_dir / f"rank_{first}.log"
    if first != 0:  # rank 0's log has been shown
        print(_tail(log), file=sys.stderr, flush=True)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    if -code == signal.SIGKILL:
        how += " (out of memory?)"
    exit_code = EXIT_NO_ROOM if EXIT_NO_ROOM in codes else 1
    raise RankFailed(f"rank {first} of {len(codes)} {how}; its log: {log}", exit_code)


def _tail(log: Path) -> str:
    """The end of a log, from the start of its last traceback if there is one."""
    text = log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").rstrip()
    start = text.rfind("Traceback (most recent call last)")
    return text[start:] if start >= 0 else "\n".join(text.splitlines()[-15:])


class _Follower:
    """Shows what is appended to a file on this process's stderr."""

    def __init__(self, path: Path) -> None:
        self._path, self._shown = path, 0

    def show(self) -> None:
        try:
            with open(self._path, "rb") as handle:
                handle.seek(self._shown)
                new = handle.read()
        except FileNotFoundError:
            return
        if new:
            self._shown += len(new)
            sys.stderr.write(new.decode(errors="replace"))
            sys.stderr.flush()
