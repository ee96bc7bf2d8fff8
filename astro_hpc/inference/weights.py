"""Names and shapes of a Hugging Face folder's tensors, read from the safetensors headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from astro_hpc.config.base import ConfigError

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
_MAYBE_TIED = "lm_head.weight"
_SHARD_BYTES = 4 << 30


def folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name.

    Raises:
        ConfigError: there are no safetensors files, or one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: no *.safetensors files; expected a Hugging Face model folder")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(f"{file}: damaged ({error}); export or download it again") from None
    return shapes


def check_same_tensors(loaded: Shapes, new: Shapes, where: str) -> None:
    """Refuse weights that would leave the engine half replaced. A tied output head may be there or not.

    Raises:
        ConfigError: the first tensor that is missing, unknown or of another shape.
    """
    for name in sorted((loaded.keys() | new.keys()) - {_MAYBE_TIED}):
        if loaded.get(name) != new.get(name):
            raise ConfigError(
                f"{where}: tensor {name} has shape {new.get(name)}, the engine's model has {loaded.get(name)}; "
                "only weights of the same model can be loaded"
            )


def write_folder(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write named tensors as safetensors files of about 4 GiB, at most that much copied at a time."""
    from safetensors.torch import save_file

    shard: dict[str, torch.Tensor] = {}
    size = number = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            save_file(shard, folder / f"model-{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
        # A copy: tied or sliced tensors may share memory, which safetensors refuses.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    if shard:
        save_file(shard, folder / f"model-{number:05d}.safetensors")
