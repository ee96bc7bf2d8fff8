"""YAML to `RunConfig`: `base:` inheritance, dotted overrides, errors of one line that name the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import RunConfig

_MAX_BASES = 10
S = TypeVar("S", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: YAML file. Its `base:` (a path relative to it) is loaded first and overridden key by key; lists are
            replaced whole. Relative paths inside are relative to the working folder.
        overrides: `section.key=value`, the value in YAML; applied last.

    Raises:
        ConfigError: file, key or value is unusable; one line says what, where and how to mend it.
    """
    return load_section(RunConfig, path, overrides)


def load_section(section: type[S], path: Path, overrides: Sequence[str] = ()) -> S:
    """The same for any other kind of YAML file, for instance a cluster's."""
    values = _read_with_bases(Path(path), ())
    for override in overrides:
        _apply(values, override)
    return _validate(section, values, str(path))


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen or len(seen) >= _MAX_BASES:
        raise ConfigError(f"{path}: `base:` leads back to {path.name}; break the circle")
    values = _read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: `base` must be the path of one YAML file, found {base!r}")
    return merge(_read_with_bases(path.parent / base, (*seen, resolved)), values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; give a YAML file") from None
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not YAML ({error.problem}); check indentation and colons") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())[:120]})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top, found a {type(values).__name__}")
    return values


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice; plain YAML keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, mapping by mapping. A mapping whose `type` changes is replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and old.get("type") == value.get("type", old.get("type"))
        ):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None
    *parents, last = name.split(".")
    place = values
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section")
        place = inner
    place[last] = value


def _validate(section: type[S], values: dict[str, Any], where: str) -> S:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems = [_explain(section, details) for details in error.errors(include_url=False)]
        more = f" (and {len(problems) - 1} more: {'; '.join(problems[1:3])})" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: {problems[0]}{more}") from None


def _explain(section: type[BaseModel], details: Any) -> str:
    """One validation error in words, with the nearest key where a key is unknown."""
    location = [part for part in details["loc"] if part != "function-after"]
    path = ".".join(str(part) for part in location)
    if details["type"] == "extra_forbidden":
        known = _keys_at(section, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"valid keys: {', '.join(known)}"
        return f"unknown key {path}; {hint}"
    if details["type"] == "missing":
        return f"{path} is missing; add it"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return message if not path else f"{path}: {message}"
    given = details.get("input")
    return f"{path}: {message[0].lower()}{message[1:]}, got {str(given)[:80]!r}"


def _keys_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Valid keys of the section at `location`; steps through lists, dictionaries and unions by their tag."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = current.model_fields[str(part)].annotation
        else:
            tagged = [m for m in _models_in(current) if "type" in m.model_fields]
            by_tag = [m for m in tagged if part in get_args(m.model_fields["type"].annotation)]
            current = by_tag[0] if by_tag else current
        models = _models_in(current)
        current = models[0] if len(models) == 1 else current
    models = _models_in(current)
    return sorted({name for m in models for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """All sections named anywhere inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
