"""vLLM servers that we start on this machine: their processes, ports and GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig
from astro_hpc.inference.server_client import FINGERPRINT_PREFIX
from astro_hpc.run.files import fingerprint

_FIRST_PORT, _NUM_PORTS, _PORTS_A_JOB = 20_000, 12_000, 16
_OF_RANKS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("ASTRO_HPC_STAGE", "ASTRO_HPC_LISTEN_FD", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"),
)
"""Variables that tell a rank of the training where to meet the others; a server that it starts is none of them."""
_TERM_SECONDS, _KILL_SECONDS = 20.0, 5.0
_LOG_TAIL_BYTES = 16_384


def model_names(model_dir: Path) -> list[str]:
    """Names under which our servers offer a model: its path, and one that proves that it has these very files."""
    return [str(model_dir.resolve()), f"{FINGERPRINT_PREFIX}{fingerprint(model_dir)[:16]}"]


def choose_port(index: int, host: str = "127.0.0.1", environ: Mapping[str, str] = os.environ) -> int:
    """A port that is free now: derived from the Slurm job where there is one, else any.

    Jobs on one node share its ports; deriving them from the job's id keeps two jobs that start at once apart.
    """
    candidates = []
    job = environ.get("SLURM_JOB_ID", "")
    if job.isdecimal():
        candidates = [_FIRST_PORT + (int(job) * _PORTS_A_JOB + index % _PORTS_A_JOB) % _NUM_PORTS]
    for port in (*candidates, 0):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigError(f"no port is free on {host}")


def gpu_shares(num_servers: int, gpus_each: int, taken: int = 0) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each server; None on a machine without GPUs.

    Args:
        taken: so many GPUs, the first, are used by the ranks of a training that goes on beside the servers.

    Raises:
        ConfigError: there are fewer GPUs than the servers need.
    """
    import torch

    if not torch.cuda.is_available():
        return [None] * num_servers
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    return list(share_out(devices, num_servers, gpus_each, taken))


def share_out(devices: Sequence[str], num_servers: int, gpus_each: int, taken: int = 0) -> list[str]:
    """Disjoint shares of `gpus_each` devices, as CUDA_VISIBLE_DEVICES wants them; the first `taken` are in none.

    Raises:
        ConfigError: there are too few.
    """
    wanted = num_servers * gpus_each
    if taken + wanted > len(devices):
        beside = f" beside the {taken} of the ranks that train" if taken else ""
        raise ConfigError(
            f"inference.num_servers={num_servers} with tensor_parallel_size={gpus_each} needs {wanted} GPUs{beside}, "
            f"{len(devices)} are there; lower one of them" + (", or train on fewer ranks" if taken else "")
        )
    return [",".join(devices[first : first + gpus_each]) for first in range(taken, taken + wanted, gpus_each)]


def default_threads(num_servers: int) -> int:
    """Threads of each of several servers on CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_servers)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is that of the machine that asks."""
    return host in ("localhost", "::1") or host.startswith("127.")


class LocalServer:
    """One vLLM server as a child process. It ends with this process, however that ends.

    The kernel ties a child to the thread that starts it: call `start` from one that lives as long as the server.
    """

    def __init__(
        self,
        model_dir: Path,
        cfg: InferenceConfig,
        *,
        seed: int,
        host: str = "127.0.0.1",
        api_key: str | None = None,
        allow_weight_updates: bool = False,
        threads: int | None = None,
        gpus: str | None = None,
        log: Path | None = None,
    ) -> None:
        """Take note of what to start.

        Args:
            threads: on CPU; `cfg.cpu_threads` comes first.
            gpus: CUDA_VISIBLE_DEVICES of the server; None: this process's.
            log: where its output is appended; None: this process's own output.
        """
        self._spec = {
            "model_dir": str(model_dir.resolve()),
            "inference": cfg.model_copy(
                update={"engine": "vllm", "servers": [], "num_servers": None, "cpu_threads": None}
            ).model_dump(mode="json"),
            "names": model_names(model_dir),
            "host": host,
            "seed": seed,
        }
        self.log = log
        self._host = host
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self._environment = {
            **os.environ,
            "ASTRO_HPC_PARENT": str(os.getpid()),
            "OMP_NUM_THREADS": str(cfg.cpu_threads or threads or default_threads(1)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several servers would bind to the same cores
            "VLLM_SERVER_DEV_MODE": "1" if allow_weight_updates else "0",
        }
        for name in ("VLLM_API_KEY", *_OF_RANKS):
            self._environment.pop(name, None)
        if api_key is not None:
            self._environment["VLLM_API_KEY"] = api_key
        if gpus is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = gpus

    def start(self, port: int) -> None:
        """Start the process; it answers at `url` once it has loaded its model."""
        assert self._process is None, "stop it first"
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{port}"
        command = [sys.executable, "-m", "astro_hpc.inference.server_process", json.dumps({**self._spec, "port": port})]
        with self._output() as output:
            # A group of its own: Ctrl-C is for us to pass on, and everything it started can be ended with it.
            self._process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
            )

    @contextlib.contextmanager
    def _output(self) -> Iterator[IO[Any] | None]:
        if self.log is None:
            yield None
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as handle:
            yield handle

    @property
    def pid(self) -> int | None:
        """The process's id once it has been started."""
        return self._process.pid if self._process else None

    def exit_code(self) -> int | None:
        """How the process ended by itself; None while it runs, and once it has been stopped."""
        return self._process.poll() if self._process else None

    def last_words(self) -> str:
        """What the log says last about an error, for a message of one line; else its last line."""
        if self.log is None or not self.log.exists():
            return ""
        with open(self.log, "rb") as handle:
            handle.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
            lines = [line.strip() for line in handle.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"(Error|Exception|astro-hpc serve): ", line)]
        causes = [line for line in errors if "root cause above" not in line]
        return (causes or errors or lines or [""])[-1][-300:]

    def terminate(self) -> None:
        """Ask it to end; `stop` then waits less long."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """End it and all that it started, and wait until they are gone; twice is harmless."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TERM_SECONDS)
        deadline = time.monotonic() + _KILL_SECONDS
        with contextlib.suppress(ProcessLookupError, PermissionError):  # until nothing of its group is left
            while time.monotonic() < deadline:
                os.killpg(process.pid, signal.SIGKILL)
                process.poll()  # reaped it leaves the group; the others are for the system to reap
                time.sleep(0.02)
        process.wait()
