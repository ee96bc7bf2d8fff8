"""The numbers of each step: metrics.jsonl always, TensorBoard and Weights & Biases where the settings say so."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import MetricsConfig, WandbConfig
from astro_hpc.run.files import write_text_atomic


class Metrics:
    """Takes the numbers of each step and keeps none: what all ranks but the first have. Same use as `MetricsLog`."""

    def log(self, step: int, **values: Any) -> None:
        """Take one step's numbers."""

    def sync(self) -> None:
        """Make what was logged durable; call it before a checkpoint, which must never be ahead of the metrics."""

    def close(self) -> None:
        """Nothing is logged any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Sink(Protocol):
    """A further place that numbers go to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take one step's numbers; steps rise."""

    def close(self) -> None:
        """Write what is pending."""


class MetricsLog(Metrics):
    """Appends steps to a JSON Lines file; on resume, steps that will be done again are cut."""

    def __init__(self, path: Path, resume_step: int | None = None, sinks: Sequence[Sink] = ()) -> None:
        """Open `path`.

        Args:
            resume_step: the first step that will be logged again; lines from it on are dropped. None: all are.
            sinks: get the same numbers; closed with this.
        """
        kept = kept_rows(path, resume_step)
        write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 - held until close
        self._sinks = sinks

    def log(self, step: int, **values: Any) -> None:
        """Append one step."""
        self._handle.write(json.dumps({"step": step, **values}) + "\n")
        self._handle.flush()
        for sink in self._sinks:
            sink.log(step, _numbers(values))

    def sync(self) -> None:
        """Wait until what was logged is on disk."""
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Close the file and the sinks."""
        self._handle.close()
        for sink in self._sinks:
            sink.close()


class TensorBoard:
    """Event files in a folder, made anew from the kept rows at each start, so that no step is there twice."""

    def __init__(self, folder: Path, kept: Sequence[Mapping[str, Any]]) -> None:
        from tensorboard.summary import Writer

        shutil.rmtree(folder, ignore_errors=True)
        self._writer = Writer(str(folder))
        for row in kept:
            self.log(row["step"], _numbers(row))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one step's scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run, one for all attempts of a stage; it ignores steps that it has already."""

    def __init__(self, folder: Path, settings: WandbConfig, name: str) -> None:
        import wandb

        identity = folder / "wandb-id"
        if not identity.exists():
            write_text_atomic(identity, uuid.uuid4().hex[:12] + "\n")
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                mode=settings.mode,
                id=identity.read_text().strip(),
                resume="allow",
                name=name,
                dir=str(folder),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"metrics.wandb: can't start ({reason}); set metrics.wandb.mode=offline") from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one step's numbers."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until everything is sent, or written when offline."""
        self._run.finish()


def check_metrics(settings: MetricsConfig) -> None:
    """Refuse what can't be written here, before anything is computed.

    Raises:
        ConfigError: a package is missing; its name and the remedy are given.
    """
    for name, wanted in (("tensorboard", settings.tensorboard), ("wandb", settings.wandb.enabled)):
        if wanted and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"metrics.{name} is on, but {name} is not installed; pip install 'astro-hpc[{name}]', or switch it off"
            )


def open_metrics(
    folder: Path, settings: MetricsConfig, name: str, resume_step: int | None = None, write: bool = True
) -> Metrics:
    """`folder/metrics.jsonl` and what the settings add to it.

    Args:
        name: what the stage is called where several runs are shown together.
        resume_step: see `MetricsLog`.
        write: False on all ranks but the first: takes the numbers and keeps none.

    Raises:
        ConfigError: a package is missing or Weights & Biases can't be started.
    """
    if not write:
        return Metrics()
    check_metrics(settings)
    path = folder / "metrics.jsonl"
    sinks: list[Sink] = []
    if settings.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", kept_rows(path, resume_step)))
    if settings.wandb.enabled:
        sinks.append(Wandb(folder, settings.wandb, name))
    return MetricsLog(path, resume_step, sinks)


def kept_rows(path: Path, resume_step: int | None) -> list[dict[str, Any]]:
    """The rows before `resume_step`; none when that is None."""
    return [row for row in read_metrics(path) if resume_step is not None and row["step"] < resume_step]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, also while it is being written; empty when there is none."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the torn last line of a killed run
    return rows


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn: numbers, but for the step itself."""
    return {
        name: value
        for name, value in values.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
