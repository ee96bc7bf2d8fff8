"""How the trainer's weights reach the engine, versioned: version N is the model after N steps.

In memory, where both share a process; in buckets over the network, straight into servers; or through
`weights/version_N/`, a Hugging Face folder with a `STABLE` marker that is written last, which any engine on a shared
file system can load. Every rank of the trainer takes part in gathering the weights; rank 0 alone talks to the engine.
The engine drops its prefix cache with the old weights.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Literal, Protocol

import torch

from astro_hpc.inference.buckets import TensorInfo
from astro_hpc.inference.engine import Engine
from astro_hpc.inference.probe import different, trainer_digests
from astro_hpc.inference.server_engine import VLLMServerEngine
from astro_hpc.model.parallel import tell_all
from astro_hpc.run.files import write_text_atomic
from astro_hpc.training.trainer import Trainer

MARKER = "STABLE"
_KEPT_VERSIONS = 2
_COLUMNS = 4


class WeightSync(Protocol):
    """Pushes weights into an engine."""

    def push(self, trainer: Trainer, engine: Engine | None, version: int) -> None:
        """Replace the engine's weights by the trainer's; all ranks call it, `engine` is rank 0's.

        Raises:
            ConfigError: the engine's model is another one; it keeps its weights.
        """
        ...


def make_weight_sync(kind: Literal["memory", "folder", "broadcast"], folder: Path) -> WeightSync:
    """The way that `rl.weight_sync` names; `folder` is where versions are kept."""
    if kind == "broadcast":
        return BroadcastSync()
    return MemorySync() if kind == "memory" else FolderSync(folder)


class MemorySync:
    """Hands the tensors over in this process, one at a time."""

    def push(self, trainer: Trainer, engine: Engine | None, version: int) -> None:
        """See `WeightSync.push`."""
        tensors = trainer.named_hf_tensors()
        if engine is not None:
            engine.load_weights(tensors, version)
        else:
            for _ in tensors:  # rank 0's gathers need every rank
                pass


class FolderSync:
    """Writes a folder a version; the two newest are kept, for an engine may still be reading the older one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def push(self, trainer: Trainer, engine: Engine | None, version: int) -> None:
        """See `WeightSync.push`."""
        path = self.folder / f"version_{version:08d}"
        if engine is not None:  # versions of an attempt that died after this step are of another model
            for stale in self.folder.glob("version_*"):
                if stale.name >= path.name:
                    shutil.rmtree(stale)
        trainer.export_hf(path)
        if engine is None:
            return
        write_text_atomic(path / MARKER, f"{version}\n")
        engine.load_weights(path, version)
        for old in sorted(self.folder.glob("version_*"))[:-_KEPT_VERSIONS]:
            shutil.rmtree(old)


class BroadcastSync:
    """Sends the tensors in buckets over the network into the servers' workers; nothing is written."""

    def __init__(self) -> None:
        self._announced: list[TensorInfo] | None = None

    def push(self, trainer: Trainer, engine: Engine | None, version: int) -> None:
        """See `WeightSync.push`."""
        if self._announced is None:  # once: gathering is what tells the whole shapes
            self._announced = [TensorInfo.of(name, tensor) for name, tensor in trainer.named_hf_tensors()]
        tensors = trainer.named_hf_tensors()
        if engine is not None:
            assert isinstance(engine, VLLMServerEngine), "rl.checks.check_settings"
            engine.broadcast_weights(tensors, self._announced, version)
        for _ in tensors:  # rank 0's gathers need every rank
            pass


def check_equal_weights(trainer: Trainer, engine: Engine | None, seed: int, where: str) -> bool:
    """Compare parts of one decoder layer, and the last norm, of trainer and engine by hash; all ranks call it.

    Args:
        seed: chooses the layer and the columns.
        where: for the message.

    Returns:
        Whether the engine could be asked.

    Raises:
        RuntimeError: names the parts that differ.
    """
    draw = random.Random(seed)
    layer = draw.randrange(trainer.shape.num_layers)
    columns = [draw.randrange(1 << 20) for _ in range(_COLUMNS)]
    theirs = engine.weight_digests(layer, columns) if engine is not None else None
    if not tell_all(theirs is not None):  # before the gathering, which is what costs
        return False
    dtype = getattr(torch, theirs["dtype"]) if theirs else torch.float32
    split = (int(theirs["ranks"]), int(theirs["copies"])) if theirs else (1, 1)
    ours = trainer_digests(trainer.named_hf_tensors(), layer, columns, dtype, *split)
    if theirs is None:  # another rank compares
        return True
    if differing := different(theirs, ours):
        raise RuntimeError(
            f"{where}: trainer and engine hold different weights in layer {layer}: {', '.join(differing)}; "
            "the last push did not arrive whole"
        )
    return True
