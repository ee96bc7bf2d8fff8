"""Where a step's groups come from: sampled now, or read from a folder of earlier rollouts."""

from __future__ import annotations

import math
import os
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
from astro_hpc.run.files import Journal, read_jsonl, write_jsonl_atomic

_MAX_STALE_SHARE = 4
"""Give up when a step throws away this many times the groups that it needs."""
JOURNAL = "finished.journal"
"""Groups that are finished and in no step's file yet."""


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

    def take(self, step: int) -> StepGroups | None:
        """The groups of `step` (from 1), asked for in order; None when a stop was asked for meanwhile."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON values from which the source goes on after `step`, the last that was taken whole; files are written."""
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

    def state(self) -> dict[str, Any]:
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

    Finished groups are journaled while a step's groups are waited for (those that end while a step is trained on: at
    the next look), until a step's file holds them: a run that is cut off samples again only what wasn't.
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
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Go on after `step`.

        Args:
            folder: where steps' rollouts are kept. Those of later steps, which an interrupted run had taken before it
                was cut off, are used and not sampled again.
            state: of `state()`; None at the start.
            stop: whether to stop; asked all the time while waiting for groups.
        """
        self.worker, self.problems, self.settings = worker, problems, settings
        self.folder, self.order_seed, self.stop = folder, order_seed, stop
        self.cursor = int(state["cursor"]) if state else 0
        """The next position that is to be started."""
        self.pending: set[int] = set(state["pending"]) if state else set()
        """Positions that were started and not handed out."""
        self.version = step
        self._finished: list[Group] = []
        self._started: set[int] = set()
        self._saved = self._claim_saved(step)
        self._kept = self._claim_journal()
        """Groups that an interrupted run had finished, by position: starting one finishes it at once."""
        self._journal = Journal(folder / JOURNAL)

    @property
    def ordered(self) -> bool:
        """Whether a step's groups are decided beforehand."""
        return self.settings.mode == "sync" and self.settings.oversample == 1

    def take(self, step: int) -> StepGroups | None:
        """Sample the step's groups, or use those of a run that was cut off.

        Returns:
            None when a stop was asked for; `state` is then still that after the step before, and what was finished of
            this step is in the journal.

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
        before = self.cursor, set(self.pending)
        while len(groups.used) < wanted:
            self._fill(self._capacity() - len(groups.used))
            if (ended := self._next()) is None:
                self._drain()
                self.cursor, self.pending = before
                return None
            for group in ended:
                self._sort_out(group, groups)
            if len(groups.stale) > _MAX_STALE_SHARE * wanted:
                raise ConfigError(
                    f"rl: {len(groups.stale)} groups of step {step} were more than rl.max_lag={settings.max_lag} "
                    "weight versions behind; raise max_lag, lower oversample or sample faster (more engines)"
                )
            sampled = len(groups.used) + len(groups.no_signal)
            if len(groups.used) < wanted and sampled >= wanted * settings.max_sampling_rounds:
                missing = wanted - len(groups.used)  # without signal they change nothing but complete the step
                groups.used += groups.no_signal[:missing]
                del groups.no_signal[:missing]
        groups.used.sort(key=lambda group: group.position)
        groups.save(step_file(self.folder, step))
        self._rewrite_journal()
        if settings.mode == "async":
            self._fill(self._capacity())  # sampled while this step is trained on
        return groups

    def state(self) -> dict[str, Any]:
        """The next position, and what was started and not handed out; of it, what is finished is in the journal."""
        self._drain()
        return {"cursor": self.cursor, "pending": sorted(self.pending)}

    def close(self) -> None:
        """Close the journal; twice is harmless."""
        self._journal.close()

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
        if (group := self._kept.pop(position, None)) is not None and self._is_of_these_weights(group):
            self._finished.append(group)
            return
        index = prompt_at(position, len(self.problems), self.order_seed)
        self.worker.start(position, self.problems[index])

    def _is_of_these_weights(self, group: Group) -> bool:
        """Where a step's groups are decided beforehand, weights of another version would have sampled others."""
        versions = {version for rollout in group.rollouts for version, _ in rollout.weight_versions}
        return not self.ordered or versions == {self.version}

    def _next(self) -> Iterable[Group] | None:
        """Finished groups: all that are in flight, by position, where the order is decided; else whichever ends.

        None: a stop was asked for.
        """
        wanted = len(self.pending) if self.ordered else 1
        while len(self._finished) < wanted:
            group = self.worker.take(self.settings.rollout_timeout_minutes * 60, self.stop)
            if group is None:
                return None
            self._keep(group)
        if not self.ordered:
            return [self._finished.pop(0)]
        found, self._finished = self._finished, []
        return sorted(found, key=lambda group: group.position)

    def _drain(self) -> None:
        """Take in all groups that have ended."""
        while True:
            try:
                group = self.worker.take(timeout=0)
            except TimeoutError:
                return
            assert group is not None
            self._keep(group)

    def _keep(self, group: Group) -> None:
        """Have a group that the worker finished, also after a crash."""
        self._journal.append(group.to_json())
        self._finished.append(group)

    def _rewrite_journal(self) -> None:
        """Keep what is in no step's file."""
        self._journal.close()
        path = self._journal.path
        fresh = path.with_name(f".{path.name}.tmp")
        fresh.unlink(missing_ok=True)
        with Journal(fresh) as journal:
            for group in [*self._finished, *self._kept.values()]:
                journal.append(group.to_json())
        os.replace(fresh, path)
        self._journal = Journal(path)

    def _claim_journal(self) -> dict[int, Group]:
        """Groups of the journal by position, without those that a step's file holds or that were handed out."""
        path, kept = self.folder / JOURNAL, {}
        for row in Journal.read(path):
            try:
                group = Group.from_json(row)
            except ValueError as error:
                raise ConfigError(f"{path}: {error}; remove it, and its groups are sampled again") from None
            if group.position in self.pending or group.position >= self.cursor:
                kept[group.position] = group
        return kept

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
        return saved
