"""Wordings of reflections and backtracks: one YAML file a set, shipped with the package or the user's own."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from astro_hpc.config.base import ConfigError, Section

Wordings = list[str]


class _File(Section):
    doubt: Wordings = Field(min_length=1)
    confident: Wordings = Field(min_length=1)
    backtrack: Wordings = Field(min_length=1)
    restart: Wordings = Field(min_length=1)
    joiner: str = " "
    backtrack_pattern: str


@dataclass(frozen=True)
class Phrases:
    """A set of wordings.

    Attributes:
        doubt: reflections at the end of a wrong attempt.
        confident: reflections after a step that seems right, and at the end.
        backtrack: going back to a step; `{step}` stands for its whole text, `{headline}` for its first line.
        restart: going back to the bare problem.
        joiner: between a reflection and the backtrack behind it.
        backtrack_pattern: regular expression that finds each backtrack once in a model's output.
    """

    doubt: tuple[str, ...]
    confident: tuple[str, ...]
    backtrack: tuple[str, ...]
    restart: tuple[str, ...]
    joiner: str
    backtrack_pattern: str

    @classmethod
    def load(cls, name_or_path: str) -> Phrases:
        """Read a shipped set by name, or a YAML file by path.

        Raises:
            ConfigError: there is no such set, or its file is malformed.
        """
        text, where = _read(name_or_path), f"phrases {name_or_path}"
        try:
            raw = yaml.safe_load(text)
            if not isinstance(raw, dict):
                raise ConfigError(f"{where}: the file must be a mapping with the key 'doubt' and others")
            file = _File(**raw)
            pattern = re.compile(file.backtrack_pattern)
        except yaml.YAMLError as error:
            raise ConfigError(f"{where}: not YAML ({str(error).splitlines()[0]})") from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{where}: {key}: {first['msg']}") from None
        except re.error as error:
            raise ConfigError(f"{where}: backtrack_pattern is not a regular expression: {error}") from None
        for wording in [*file.backtrack, *file.restart]:
            if len(pattern.findall(wording)) != 1:
                raise ConfigError(f"{where}: backtrack_pattern must match {wording!r} exactly once")
        for wording in [*file.doubt, *file.confident]:
            if pattern.search(wording):
                raise ConfigError(f"{where}: backtrack_pattern must not match the reflection {wording!r}")
        return cls(
            tuple(file.doubt),
            tuple(file.confident),
            tuple(file.backtrack),
            tuple(file.restart),
            file.joiner,
            file.backtrack_pattern,
        )

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.backtrack_pattern)

    def count_backtracks(self, text: str) -> int:
        """How many times `text` says that it goes back."""
        return sum(1 for _ in self._pattern.finditer(text))

    def say_backtrack(self, step: str, rng: random.Random) -> str:
        """A backtrack to `step`; a restart when the step is empty (the root)."""
        step = step.strip()
        if not step:
            return rng.choice(self.restart)
        headline = step.splitlines()[0].strip()
        return rng.choice(self.backtrack).replace("{step}", step).replace("{headline}", headline)


def _read(name_or_path: str) -> str:
    shipped = resources.files(__package__)
    names = sorted(entry.name[:-5] for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
    if name_or_path in names:
        return shipped.joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(f"clone.phrases: there is no set or file {name_or_path!r}; shipped: {', '.join(names)}")
    return path.read_text(encoding="utf-8")
