"""Megatron's torch_dist folders: whether one is whole, and reading its pickles without running what they say.

torch_dist stores tensors raw, but its `.metadata` and `common.pt` are pickles. `common.pt` and objects inside the
tensor files are read by torch's weights-only loader, and `.metadata` by an unpickler that knows only the classes which
torch's checkpoint format consists of, so that a crafted file is refused and not run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata

from astro_hpc.config.base import ConfigError

MARKER = "complete.json"
"""Written last into a checkpoint folder: the size of every file."""
METADATA = ".metadata"


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when it is whole."""
    try:
        sizes = json.loads((path / MARKER).read_text(encoding="utf-8"))["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MARKER} is missing or damaged"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes and had {size}"
    return None


def read_metadata(path: Path) -> Metadata:
    """What a torch_dist folder holds, and where.

    Raises:
        ConfigError: there is no such folder, or it holds objects that have no place there.
    """
    try:
        found = _MetadataUnpickler(io.BytesIO((path / METADATA).read_bytes())).load()
    except OSError as error:
        raise ConfigError(f"{path}: not a Megatron checkpoint ({METADATA}: {error.strerror}); check the path") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ConfigError(f"{path}: not a checkpoint of ours ({_first_line(error)}); remove it") from None
    if not isinstance(found, Metadata):
        raise ConfigError(f"{path}: not a checkpoint of ours ({METADATA} holds no metadata); remove it")
    return found


def load_sharded(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill a sharded state dict, by Megatron, from a checkpoint that may have been saved with the other layer spec.

    Each spec has modules that keep extra state (FP8 scales) where the other's have none. What the checkpoint lacks of
    it is left out of the request and given as None, which every module takes for "nothing saved".

    Raises:
        ConfigError: not a checkpoint, or it holds objects that are not tensors or plain values.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    stored = read_metadata(path).state_dict_metadata
    absent = [
        (part, name)
        for part, values in state.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if isinstance(value, ShardedObject) and str(name).endswith("_extra_state") and value.unique_key not in stored
    ]
    wanted = {part: dict(values) if isinstance(values, dict) else values for part, values in state.items()}
    for part, name in absent:
        del wanted[part][name]
    with no_foreign_pickles(path):
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(path))
    for part, name in absent:
        loaded[part][name] = None
    return loaded


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_METADATA_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},  # looks up a torch.layout by name
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles what torch's checkpoint metadata consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


@contextlib.contextmanager
def no_foreign_pickles(path: Path) -> Iterator[None]:
    """Within the block torch's checkpoint reader takes only plain values and tensors."""
    safe = types.SimpleNamespace(
        load=lambda handle: _MetadataUnpickler(io.BytesIO(handle.read())).load(),
        dump=pickle.dump,
        loads=None,
        dumps=pickle.dumps,
    )
    original = torch.load

    @functools.wraps(original)
    def weights_only(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "weights_only": True})

    try:
        with mock.patch.object(filesystem, "pickle", safe), mock.patch.object(torch, "load", weights_only):
            yield
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path}: not a checkpoint of ours ({_first_line(error)}); remove it") from None
