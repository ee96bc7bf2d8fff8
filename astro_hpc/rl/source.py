"""Where a step's groups come from: sampled now, or read from a folder of earlier rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RLConfig
from astro_hpc.problems.problem import Problem
from astro_hpc.rl.batches import prompt_at
from astro_hpc.rl.rollouts import Group, Rollout
from astro_hpc.rl.worker import RolloutWorker
from astro_hpc.run.files import read_jsonl, write_jsonl_atomic

_MAX_STALE_SHARE = 4
"""Give up when a step throws away this many times the groups that it needs."""


@dataclass
class StepGroups:
    """The groups of one step.

    Attributes:
        used: `prompts_per_step` groups, by position.
        no_signal: groups of equal rewards that dynamic sampling left out.
        stale: groups that were too many weight versions behind.
    """

    used: list[Group] = field(default_factory=list)
    no_signal: list[Group] = field(default_factory=list)
    stale: list[Group] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write every group's rollouts, a line each, and what became of it."""
        kinds = (("used", self.used), ("no_signal", self.no_signal), ("stale", self.stale))
        write_jsonl_atomic(
            path,
            (
                {"position": group.position, "sample": sample, "fate": fate, **rollout.to_json()}
                for fate, groups in kinds
                for group in groups
                for sample, rollout in enumerate(group.rollouts)
            ),
        )

    @classmethod
    def load(cls, path: Path) -> StepGroups:
        """What `save` wrote.

        Raises:
            ConfigError: the file is missing, or a line is not a rollout.
        """
        rows: dict[tuple[str, int], list[Rollout]] = {}
        for number, row in enumerate(read_jsonl(path), 1):
            try:
                if row["fate"] not in ("used", "no_signal", "stale"):
                    raise ValueError(f"fate {row['fate']!r}")
                rows.setdefault((row["fate"], int(row["position"])), []).append(Rollout.from_json(row))
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{path}:{number}: {error}; give a folder that `astro-hpc rl` wrote") from None
        groups = cls()
        for (fate, position), rollouts in rows.items():
            getattr(groups, fate).append(Group(position, tuple(rollouts)))
        return groups

    @property
    def positions(self) -> list[int]:
        """Of all groups, whatever became of them."""
        return [group.position for group in [*self.used, *self.no_signal, *self.stale]]


def step_file(folder: Path, step: int) -> Path:
    """The file of a step's rollouts."""
    return folder / f"step_{step:08d}.jsonl"


class GroupSource(Protocol):
    """Gives each step its groups."""

    def take(self, step: int) -> StepGroups:
        """The groups of `step` (from 1); asked for in order."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """JSON values from which the source goes on after `step`; files it needs are written."""
        ...


class ReplaySource:
    """Rollouts of an earlier run; needs no engine."""

    def __init__(self, folder: Path, settings: RLConfig) -> None:
        """Check that every step's file is there.

        Raises:
            ConfigError: one is missing.
        """
        self.folder, self.settings = folder, settings
        for step in range(1, settings.num_steps + 1):
            if not step_file(folder, step).is_file():
                raise ConfigError(
                    f"rl.replay={folder}: has no {step_file(folder, step).name}; set rl.num_steps={step - 1}"
                    if step > 1
                    else f"rl.replay={folder}: has no {step_file(folder, 1).name}; give a run's rl/ARM/rollouts folder"
                )

    def take(self, step: int) -> StepGroups:
        """The groups that the earlier run trained on at `step`."""
        path = step_file(self.folder, step)
        groups = StepGroups.load(path)
        check_shape(groups.used, self.settings, str(path))
        return groups

    def state(self, step: int) -> dict[str, Any]:
        """Nothing: the files are all there is."""
        return {}


def check_shape(groups: Sequence[Group], settings: RLConfig, where: str) -> None:
    """Refuse groups of another number or size than the settings'.

    Raises:
        ConfigError: names the numbers.
    """
    sizes = {len(group.rollouts) for group in groups}
    if len(groups) != settings.prompts_per_step or sizes != {settings.group_size}:
        raise ConfigError(
            f"{where}: holds {len(groups)} groups of {sorted(sizes)} responses; rl.prompts_per_step="
            f"{settings.prompts_per_step} and rl.group_size={settings.group_size} ask for others"
        )


class LiveSource:
    """Keeps a bounded number of groups in flight and hands out finished ones.

    In sync mode without over-sampling a step's groups are those of the next positions, whatever ends first, so the
    same weights give the same step. Otherwise the first to end are taken, and what is in flight at a checkpoint is
    sampled anew after it.
    """

    def __init__(
        self,
        worker: RolloutWorker,
        problems: Sequence[Problem],
        settings: RLConfig,
        *,
        folder: Path,
        order_seed: int,
        step: int,
        state: dict[str, Any] | None,
        on_group: Callable[[int, int], None] = lambda done, wanted: None,
    ) -> None:
        """Go on after `step`.

        Args:
            folder: where steps' rollouts are kept. Those of later steps, which an interrupted run had taken before it
                was cut off, are used and not sampled again.
            state: of `state(step)`; None at the start.
            on_group: told how many of a step's groups there are, and how many are wanted.
        """
        self.worker, self.problems, self.settings = worker, problems, settings
        self.folder, self.order_seed, self.on_group = folder, order_seed, on_group
        self.cursor = int(state["cursor"]) if state else 0
        """The next position that is to be started."""
        self.pending: set[int] = set(state["pending"]) if state else set()
        """Positions that were started and not handed out."""
        self.version = step
        self._finished: list[Group] = []
        self._started: set[int] = set()
        if state and state["buffer"]:
            self._finished = StepGroups.load(folder / state["buffer"]).used
        self._saved = self._claim_saved(step)

    @property
    def ordered(self) -> bool:
        """Whether a step's groups are decided beforehand."""
        return self.settings.mode == "sync" and self.settings.oversample == 1

    def take(self, step: int) -> StepGroups:
        """Sample the step's groups, or use those of a run that was cut off.

        Raises:
            TimeoutError: see `RolloutWorker.take`.
        """
        self.version = 0 if self.settings.rollouts_only else step - 1
        if (saved := self._saved.pop(step, None)) is not None:
            if self.settings.mode == "async":
                self._fill(self._capacity())
            return saved
        wanted, settings = self.settings.prompts_per_step, self.settings
        groups = StepGroups()
        while len(groups.used) < wanted:
            self._fill(self._capacity() - len(groups.used))
            for group in self._next(wanted - len(groups.used)):
                self._sort_out(group, groups)
            if len(groups.stale) > _MAX_STALE_SHARE * wanted:
                raise ConfigError(
                    f"rl: {len(groups.stale)} groups of step {step} were more than rl.max_lag={settings.max_lag} "
                    "weight versions behind; raise max_lag, lower oversample or sample faster (more engines)"
                )
            self.on_group(len(groups.used), wanted)
            sampled = len(groups.used) + len(groups.no_signal)
            if len(groups.used) < wanted and sampled >= wanted * settings.max_sampling_rounds:
                missing = wanted - len(groups.used)  # without signal they change nothing but complete the step
                groups.used += groups.no_signal[:missing]
                del groups.no_signal[:missing]
        groups.used.sort(key=lambda group: group.position)
        groups.save(step_file(self.folder, step))
        if settings.mode == "async":
            self._fill(self._capacity())  # sampled while this step is trained on
        return groups

    def state(self, step: int) -> dict[str, Any]:
        """The next position, what is in flight, and a file of what is finished and not handed out."""
        while True:
            try:
                self._finished.append(self.worker.take(timeout=0))
            except TimeoutError:
                break
        buffer = ""
        if self._finished:
            buffer = f"buffer_{step:08d}.jsonl"
            StepGroups(used=self._finished).save(self.folder / buffer)
        kept = self.settings.checkpoint.keep_last + 1  # the oldest checkpoint may still name its own
        for old in sorted(self.folder.glob("buffer_*.jsonl"))[:-kept]:
            old.unlink()
        return {"cursor": self.cursor, "pending": sorted(self.pending), "buffer": buffer}

    def _capacity(self) -> int:
        """Groups that may be in flight or waiting for a step."""
        lag = self.settings.max_lag if self.settings.mode == "async" else 0
        return lag * self.settings.prompts_per_step + math.ceil(
            self.settings.prompts_per_step * self.settings.oversample
        )

    def _fill(self, capacity: int) -> None:
        """Start groups: first those that a checkpoint found in flight, then new ones."""
        waiting = {group.position for group in self._finished}
        for position in sorted(self.pending - self._started - waiting):
            self._start(position)
        while len(self.pending) < capacity:
            self.pending.add(self.cursor)
            self._start(self.cursor)
            self.cursor += 1

    def _start(self, position: int) -> None:
        self._started.add(position)
        index = prompt_at(position, len(self.problems), self.order_seed)
        self.worker.start(position, self.problems[index])

    def _next(self, wanted: int) -> Iterable[Group]:
        """Finished groups: all that are in flight, by position, where the order is decided; else whichever ends."""
        timeout = self.settings.rollout_timeout_minutes * 60
        if not self.ordered:
            return [self._finished.pop(0) if self._finished else self.worker.take(timeout)]
        found, self._finished = self._finished, []
        while len(found) < len(self.pending):
            found.append(self.worker.take(timeout))
        return sorted(found, key=lambda group: group.position)

    def _sort_out(self, group: Group, groups: StepGroups) -> None:
        self.pending.discard(group.position)
        self._started.discard(group.position)
        if self.version - group.oldest_version > self.settings.max_lag:
            groups.stale.append(group)
        elif self.settings.dynamic_sampling and not group.has_signal:
            groups.no_signal.append(group)
        else:
            groups.used.append(group)

    def _claim_saved(self, step: int) -> dict[int, StepGroups]:
        """Steps after `step` whose rollouts are on disk; their positions count as handed out."""
        saved: dict[int, StepGroups] = {}
        while (path := step_file(self.folder, (following := step + len(saved) + 1))).exists():
            groups = StepGroups.load(path)
            check_shape(groups.used, self.settings, str(path))
            saved[following] = groups
            for position in groups.positions:
                self.pending |= set(range(self.cursor, position))
                self.cursor = max(self.cursor, position + 1)
                self.pending.discard(position)
            taken = set(groups.positions)
            self._finished = [group for group in self._finished if group.position not in taken]
        return saved
