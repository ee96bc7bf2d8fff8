"""Which accelerator and which optional libraries are here, asked once, without assuming that an import is harmless."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

Version = tuple[int, ...]


@dataclass(frozen=True)
class Library:
    """An optional library.

    Attributes:
        version: the installed version, None when it is not installed.
        error: why it can't be used although it is installed; empty when it can.
    """

    version: str | None
    error: str = ""

    @property
    def usable(self) -> bool:
        """Whether it is here and can be imported."""
        return self.version is not None and not self.error


@dataclass(frozen=True)
class Chip:
    """The GPU of this rank.

    Attributes:
        name: as the driver calls it, for instance `NVIDIA H100 80GB HBM3`.
        capability: CUDA compute capability; Ada is (8, 9), Hopper (9, 0).
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Machine:
    """What decides which arithmetic can be done here.

    Attributes:
        chip: None without a GPU.
        cuda: version of CUDA that torch was built for; None in a CPU build.
        transformer_engine: NVIDIA Transformer Engine.
    """

    chip: Chip | None
    cuda: Version | None
    transformer_engine: Library


def parse_version(text: str) -> Version:
    """`2.6.0.dev0+cu12` -> (2, 6, 0): the leading numbers, enough to compare minimums."""
    numbers: list[int] = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None; nothing is imported."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def transformer_engine() -> Library:
    """Transformer Engine; without cuDNN its import raises RuntimeError, not ImportError."""
    if importlib.util.find_spec("transformer_engine") is None:
        return Library(None)
    version = installed_version("transformer-engine") or "of unknown version"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return Library(version, (str(error).strip().splitlines() or [type(error).__name__])[0])
    return Library(version)


@functools.cache
def apex() -> Library:
    """NVIDIA Apex. PyPI's `apex` is an unrelated web toolkit, which is told apart without running it."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Library(None)
    version = installed_version("apex") or "of unknown version"
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return Library(version, "this is PyPI's unrelated web toolkit, not NVIDIA Apex")
    try:
        from apex.optimizers import FusedAdam  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return Library(version, (str(error).strip().splitlines() or [type(error).__name__])[0])
    return Library(version)


@functools.cache
def has_fused_weight_gradient() -> bool:
    """Whether Apex's extension is here that adds weight gradients into the float32 buffer inside the product.

    Megatron's output layer needs it for `gradient_accumulation_fusion`, with Transformer Engine too.
    """
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return False
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def this_machine() -> Machine:
    """The chip of the current device and the libraries beside it."""
    import torch

    chip = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        chip = Chip(properties.name, (properties.major, properties.minor), properties.total_memory)
    cuda = parse_version(torch.version.cuda) if torch.version.cuda else None
    return Machine(chip, cuda, transformer_engine())
