"""The process that compares what is too hard to compare exactly. Run by the pool, never imported by it.

It imports its libraries once, then serves requests in a forked child. A child that overruns its time or memory is
killed and the next one is forked from here within milliseconds. Requests and replies are JSON with a length before
them; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

from astro_hpc.run.process import die_with_parent

_HEADER = struct.Struct("!I")
_LEAST_FREE_BYTES = 128 << 20


def main() -> None:
    """Serve until standard input closes.

    Arguments: the parent's process id, memory in bytes, seconds an answer, and what to import beforehand besides.
    """
    parent, memory, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    die_with_parent(parent)
    requests, replies = os.dup(0), os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    try:
        from astro_hpc.verifier import judge

        if "reasoning_gym" in sys.argv[4:]:
            judge.preload_reasoning_gym()
        _check_memory(memory)
        judge.warm_up()
        gc.freeze()  # what is there now is shared with the children and never collected
    except Exception as error:  # the pool reports it: standard error is closed
        _send(replies, {"fatal": f"{type(error).__name__}: {error}"})
        return
    child = 0
    # Meant for the stage, which ends this process when it is through; the kernel does when the stage is killed.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, lambda *_: os.kill(child, signal.SIGKILL) if child else None)
    while True:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        this = os.getpid()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGUSR2, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
            code = 1
            with contextlib.suppress(BaseException):
                die_with_parent(this)
                resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
                code = _serve(judge, requests, replies, seconds)
            os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        _, status = os.waitpid(child, 0)
        child = 0
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return


def _check_memory(memory: int) -> None:
    """Refuse a limit that the libraries alone take up: every answer would fail."""
    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/statm") as handle:
        taken = int(handle.read().split()[0]) * resource.getpagesize()
    if memory < taken + _LEAST_FREE_BYTES:
        raise MemoryError(
            f"verifier.memory_mb of {memory >> 20} is too little: the libraries take {taken >> 20} MB, "
            f"and {_LEAST_FREE_BYTES >> 20} MB should be left"
        )


def _serve(judge: Any, requests: int, replies: int, seconds: float) -> int:
    """Answer requests; returns the exit code: 0 when the pool closed the pipe, 1 to be replaced."""
    _send(replies, {"ready": True})
    while True:
        header = _receive(requests, _HEADER.size)
        if header is None:
            return 0
        body = _receive(requests, _HEADER.unpack(header)[0])
        if body is None:
            return 0
        request = json.loads(body)
        # A second guard, should the pool be gone or stopped: the default action of SIGALRM ends this process.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
        last = False
        try:
            outcome = judge.judge(request)
        except (MemoryError, RecursionError):
            outcome, last = "unknown", True
        except Exception:
            outcome = "unknown"
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, {"id": request["id"], "outcome": outcome, "last": last})
        if last:
            return 1


def _receive(descriptor: int, size: int) -> bytes | None:
    chunks = []
    while size:
        chunk = os.read(descriptor, min(size, 1 << 20))
        if not chunk:
            return None
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _send(descriptor: int, value: dict[str, Any]) -> None:
    os.write(descriptor, json.dumps(value).encode() + b"\n")


if __name__ == "__main__":
    main()
