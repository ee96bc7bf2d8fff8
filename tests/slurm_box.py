"""The Slurm sandbox as the tests use it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from astro_hpc.conversion.embedded import resolve_model
from astro_hpc.run.files import Journal

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "slurm_sandbox.py"


def load_sandbox_module() -> ModuleType:
    """tools/slurm_sandbox.py, which is a script and no part of the package."""
    if "slurm_sandbox" not in sys.modules:
        spec = importlib.util.spec_from_file_location("slurm_sandbox", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        sys.modules["slurm_sandbox"] = module
        spec.loader.exec_module(module)
    return sys.modules["slurm_sandbox"]


def slurm_with_mortal_nodes(kill_wait: int) -> Iterator[Any]:
    """A sandbox of its own, whose nodes may die; a dead one is noticed soon. `kill_wait`: seconds from TERM to KILL."""
    sandbox = load_sandbox_module().Sandbox(
        Path(tempfile.mkdtemp(prefix="slurm-")),
        num_nodes=4,
        die_with_parent=True,
        kill_wait=kill_wait,
        slurmd_timeout=5,
    )
    sandbox.up()
    yield sandbox
    sandbox.down()


CLUSTER = """
gpus_per_node: 0
memory: null
exclusive: false
time: "00:10:00"
signal_seconds: 20
environment: {OMP_NUM_THREADS: 1}
stages:
  search: {shards: SHARDS}
"""


class Run:
    """A run of the scripted engine on the sandbox: it imports no torch, a task takes a second."""

    def __init__(self, slurm: Any, folder: Path, shards: int = 4, **settings: object) -> None:
        self.slurm, self.folder, self.dir = slurm, folder, folder / "runs" / "test"
        self._hurried: dict[str, float] = {}
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        for path in resolve_model("embedded:smollm2-135m-instruct").glob("*token*"):
            shutil.copy(path, folder / "model")  # cloning counts tokens
        rows = [{"problem": f"What is {n} - {n // 2}?", "answer": str(n - n // 2)} for n in range(24)]
        (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "name": "test",
            "seed": 5,
            "runs_dir": "runs",
            "model": {"path": "model", "prompt_style": "minimal-chat"},
            "problems": {"train": [{"type": "jsonl", "path": "problems.jsonl"}]},
            "inference": {"engine": "scripted", "max_model_len": 1024},
            "search": {"num_iterations": 4, "num_expansions": 4, "num_rollouts": 4, "keep_rollouts": True},
            "clone": {"self_evaluation_samples": 0},
            "rl": {"max_response_tokens": 256},
            **settings,
        }
        (folder / "run.yaml").write_text(json.dumps(values))
        self.write_cluster(CLUSTER.replace("SHARDS", str(shards)))

    def cluster(self) -> str:
        return (self.folder / "cluster.yaml").read_text()

    def write_cluster(self, text: str) -> None:
        (self.folder / "cluster.yaml").write_text(text)

    def command(self, *arguments: object, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **(self.slurm.env if self.slurm else {}), "PYTHONPATH": f"{ROOT}:{self.folder}"}
        command = [sys.executable, "-m", "astro_hpc", *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )

    def launch(self, *arguments: str) -> list[dict[str, Any]]:
        """What was submitted."""
        result = self.command("launch", "run.yaml", "--cluster", "cluster.yaml", "--json", *arguments)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)["submitted"]

    def status(self) -> dict[str, dict[str, Any]]:
        result = self.command("status", self.dir, "--json")
        assert result.returncode == 0, result.stderr
        return {row["job"]: row for row in json.loads(result.stdout)}

    def queued(self) -> list[str]:
        """States of this run's jobs in the queue."""
        lines = self.slurm.run("squeue", "-h", "-r", "-o", "%T %k").splitlines()
        return [line.split()[0] for line in lines if f":test-{self._key()}:" in line]

    def _key(self) -> str:
        return hashlib.sha256(str(self.dir).encode()).hexdigest()[:8]

    def wait(self, ready: Callable[[], bool] | None = None, seconds: float = 300) -> None:
        """Until `ready`, or until nothing of this run is queued."""
        ready = ready or (lambda: not self.queued())
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"{self.slurm.run('squeue')}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in sorted(self.dir.glob("logs/**/*.[lo]*")))

    def trees(self) -> list[str]:
        """Problems of all trees in the shards' journals."""
        paths = self.dir.glob("search/shard-*/trees.jsonl")
        return [tree["problem"]["id"] for path in paths for tree in Journal.read(path)]

    def trees_of(self, shard: int) -> list[str]:
        paths = self.dir.glob(f"search/shard-{shard:05d}-of-*/trees.jsonl")
        return [tree["problem"]["id"] for path in paths for tree in Journal.read(path)]

    def process_of(self, stage: str, task: int | None = None) -> int | None:
        """The process of a stage, or of one task of its array; None: none runs."""
        for pid in load_sandbox_module().processes_of(self.slurm.dir):
            path = Path(f"/proc/{pid}")
            with suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                if words[1:4] != [b"-m", b"astro_hpc", stage.encode()] or str(self.dir).encode() not in b" ".join(
                    words
                ):
                    continue
                if task is not None and f"SLURM_ARRAY_TASK_ID={task}".encode() not in (
                    (path / "environ").read_bytes().split(b"\0")
                ):
                    continue
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if b"bash" in Path(f"/proc/{parent}/cmdline").read_bytes():  # and not a fork of the stage's own
                    return pid
        return None

    def freeze(self, stage: str, ready: Callable[[], bool], task: int | None = None, seconds: float = 300) -> int:
        """Stop a stage's process once `ready`, or it may be done before the test does anything to it; its number."""
        deadline = time.monotonic() + seconds
        while True:
            if ready() and (pid := self.process_of(stage, task)) is not None:
                os.kill(pid, signal.SIGSTOP)
                return pid
            assert time.monotonic() < deadline, f"{self.slurm.run('squeue')}\n{self.logs()}"
            time.sleep(0.02)

    def limit_soon(self, job_id: str) -> None:
        """Let the time limit of a running job come in one to two minutes."""
        facts = self.slurm.run("scontrol", "show", "job", job_id)
        hours, minutes, _ = facts.partition(" RunTime=")[2].split()[0].split(":")
        self.slurm.run("scontrol", "update", f"jobid={job_id}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")

    def hurry(self) -> bool:
        """Let requeued jobs start in two seconds: Slurm holds them back for two minutes.

        Not at once: a node that ended an attempt takes no other of the same job within that second.
        """
        for line in self.slurm.run("squeue", "-h", "-r", "-t", "PENDING", "-o", "%i %r %k").splitlines():
            job_id = line.split()[0]
            lately = time.monotonic() - self._hurried.get(job_id, -60.0) < 10
            if " BeginTime " in line and f":test-{self._key()}:" in line and not lately:
                self.slurm.run("scontrol", "update", f"jobid={job_id}", "StartTime=now+2", check=False)
                self._hurried[job_id] = time.monotonic()
        return True


def wait_until_told(pid: int, seconds: float = 500) -> None:
    """Until a frozen process has a signal of Slurm's that waits for it, or is gone."""
    deadline = time.monotonic() + seconds
    told = 1 << signal.SIGUSR1 - 1 | 1 << signal.SIGTERM - 1
    with suppress(OSError):
        while not int(Path(f"/proc/{pid}/status").read_text().partition("ShdPnd:")[2].split()[0], 16) & told:
            assert time.monotonic() < deadline, f"Slurm has not told process {pid} anything"
            time.sleep(0.1)


def thaw_when_told(pid: int) -> None:
    """Let a frozen process go on once a signal of Slurm's waits for it; at once returns."""

    def thaw() -> None:
        wait_until_told(pid)
        with suppress(OSError):
            os.kill(pid, signal.SIGCONT)

    threading.Thread(target=thaw, daemon=True).start()
