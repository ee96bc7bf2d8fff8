"""Hugging Face model folders as files: reading rows of tensors, planning and writing safetensors, what goes beside."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from astro_hpc.config.base import ConfigError
from astro_hpc.conversion.names import hf_shapes, mappings
from astro_hpc.model.llama import LlamaShape
from astro_hpc.run.files import sha256_file, write_json_atomic

SHARD_BYTES = 2 * 10**9
"""Small enough that a few files at a time keep both processor and disk busy."""
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a model folder that say how to use the model, beside config.json; copied byte for byte."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor's elements lie."""

    file: Path
    dtype: torch.dtype
    size: tuple[int, ...]
    offset: int
    """Of the first byte, from the file's start."""


class HFTensors:
    """The tensors of a Hugging Face folder: one safetensors file, or many with an index.

    Rows are read with plain reads, not through a memory map, so that memory in use is what the caller asked for.
    """

    def __init__(self, hf_dir: Path) -> None:
        """Read the index and every file's header.

        Raises:
            ConfigError: no safetensors there, or a file of the index is missing, damaged or cut.
        """
        self.hf_dir = Path(hf_dir)
        index, single = self.hf_dir / INDEX, self.hf_dir / "model.safetensors"
        if index.exists():
            named = _read_index(index)
        elif single.exists():
            named = None
        else:
            raise ConfigError(f"{self.hf_dir}: no model.safetensors, alone or with an index; no other weights are read")
        self.files = [single.name] if named is None else sorted(set(named.values()))
        for file in self.files:
            if Path(file).name != file or not (self.hf_dir / file).is_file():
                raise ConfigError(f"{self.hf_dir}: the index names {file}, which is not there; fetch it again")
        self._stored: dict[str, Stored] = {}
        for file in self.files:
            self._stored |= _read_header(self.hf_dir / file)
        for name, file in (named or {}).items():
            if name not in self._stored or self._stored[name].file.name != file:
                raise ConfigError(f"{self.hf_dir / file}: lacks {name}, which the index puts there; fetch it again")

    def check(self, shape: LlamaShape) -> None:
        """Compare names and sizes with the model's.

        Raises:
            ConfigError: a tensor is missing, unknown or of another size; it is named.
        """
        wanted = hf_shapes(shape)
        missing = sorted(set(wanted) - set(self._stored))
        # Old folders keep the tied output layer and RoPE's constants; both follow from the rest.
        unknown = sorted(
            name
            for name in set(self._stored) - set(wanted)
            if not name.endswith("rotary_emb.inv_freq") and not (shape.tied and name == "lm_head.weight")
        )
        for kind, names in (("lacks", missing), ("has an unknown", unknown)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ConfigError(
                    f"{self.hf_dir}: the checkpoint {kind} tensor {names[0]}{more}; "
                    "config.json and weights don't belong together"
                )
        for name, size in wanted.items():
            if self._stored[name].size != size:
                raise ConfigError(
                    f"{self.hf_dir}: {name} has shape {self._stored[name].size}, config.json implies {size}"
                )

    def dtype(self, names: Iterable[str]) -> torch.dtype | None:
        """The one dtype of `names`; None when they differ."""
        found = {self._stored[name].dtype for name in names}
        return found.pop() if len(found) == 1 else None

    def size(self, name: str) -> tuple[int, ...]:
        """The size of the tensor `name`."""
        return self._stored[name].size

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        tensor = torch.empty(stored.size, dtype=stored.dtype)
        self.read_rows(name, 0, tensor)
        return tensor

    def read_rows(self, name: str, row: int, out: torch.Tensor) -> None:
        """Fill the contiguous tensor `out` with rows of `name` from `row` on, cast to `out`'s dtype.

        Raises:
            ConfigError: the file can't be read, or ends early.
        """
        stored = self._stored[name]
        raw = out if out.dtype == stored.dtype else torch.empty(out.shape, dtype=stored.dtype)
        row_bytes = stored.dtype.itemsize * torch.Size(stored.size[1:]).numel()
        with open(stored.file, "rb", buffering=0) as handle:
            handle.seek(stored.offset + row * row_bytes)
            read_into(handle, raw, f"{stored.file}: {name}")
        if raw is not out:
            out.copy_(raw)

    def check_digests(self, file: str) -> None:
        """Compare one weights file with the folder's manifest, where there is one (our own exports have it).

        Raises:
            ConfigError: the bytes are not those that were written.
        """
        try:
            digests = json.loads((self.hf_dir / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if file in digests and sha256_file(self.hf_dir / file) != digests[file]:
            raise ConfigError(f"{self.hf_dir / file}: damaged (its sha256 is not {MANIFEST}'s); fetch the file again")


def as_bytes(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def read_into(handle: Any, tensor: torch.Tensor, what: str) -> None:
    """Fill a contiguous tensor from an unbuffered file.

    Raises:
        ConfigError: `what` ends early or can't be read.
    """
    left = memoryview(as_bytes(tensor))
    while left:
        try:
            count = handle.readinto(left)
        except OSError as error:
            raise ConfigError(f"{what} can't be read ({error.strerror}); fetch the file again") from None
        if not count:
            raise ConfigError(f"{what} ends early; fetch the file again")
        left = left[count:]


def _read_index(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise TypeError("weight_map is not an object of file names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index}: not a safetensors index ({error!r}); restore the file") from None
    return names


def _read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of one safetensors file."""
    try:
        with safe_open(path, framework="pt"):  # checks the header against the file's size, and offsets against shapes
            pass
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header: dict[str, Any] = json.loads(handle.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: damaged safetensors file ({error}); fetch it again") from None
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ConfigError(f"{path}: {name} is stored as {entry['dtype']}; only {', '.join(DTYPES)} are read")
        found[name] = Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
    return found


def plan_shards(shape: LlamaShape, itemsize: int, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Names and sizes of each weights file: consecutive tensors of at most `shard_bytes` in all, about equal files.

    Tensors that are one in Megatron stay in one file; a larger one is alone.
    """
    sizes = hf_shapes(shape)
    groups = [{name: sizes[name] for name in mapping.hf} for mapping in mappings(shape)]
    bytes_of = [itemsize * sum(torch.Size(size).numel() for size in group.values()) for group in groups]
    fewest = len(_cut(bytes_of, shard_bytes))
    for percent in range(100, 200, 5):
        limit = min(shard_bytes, sum(bytes_of) * percent // (100 * fewest))
        if len(cuts := _cut(bytes_of, limit)) <= fewest:
            break
    else:
        cuts = _cut(bytes_of, shard_bytes)
    return [{name: size for i in cut for name, size in groups[i].items()} for cut in cuts]


def _cut(sizes: list[int], limit: int) -> list[list[int]]:
    """Consecutive indices whose sizes add up to at most `limit`; a larger one is alone."""
    cuts: list[list[int]] = [[]]
    filled = 0
    for i, size in enumerate(sizes):
        if cuts[-1] and filled + size > limit:
            cuts.append([])
            filled = 0
        cuts[-1].append(i)
        filled += size
    return cuts


def shard_name(number: int, count: int) -> str:
    """The name of weights file `number` (from 0) of `count`."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


class SafetensorsFile:
    """Writes one safetensors file as its bytes come, and hashes them.

    The safetensors package wants a whole file's tensors in memory at once; the format is a length, a JSON header and
    the raw little-endian elements, which can be written a piece at a time.
    """

    def __init__(self, handle: BinaryIO, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, size in sizes.items():
            end = offset + dtype.itemsize * torch.Size(size).numel()
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(size), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._handle, self._digest, self._left = handle, hashlib.sha256(), offset
        for block in (len(text).to_bytes(8, "little"), text):
            handle.write(block)
            self._digest.update(block)

    def write(self, piece: torch.Tensor) -> None:
        """Append elements (contiguous, of the file's dtype) in the header's order."""
        raw = as_bytes(piece)
        self._handle.write(raw)
        self._digest.update(raw)
        self._left -= piece.nbytes

    def hexdigest(self) -> str:
        """Hex sha256 of the whole file."""
        assert self._left == 0, f"{self._left} bytes were not written"
        return self._digest.hexdigest()


def copy_companions(reference_dir: Path, folder: Path) -> None:
    """Copy tokenizer, generation configuration and chat template, where there are any."""
    for name in COMPANIONS:
        if (reference_dir / name).is_file():
            shutil.copyfile(reference_dir / name, folder / name)


def finish_hf_folder(
    folder: Path,
    shards: list[dict[str, tuple[int, ...]]],
    digests: dict[str, str],
    reference_dir: Path,
    dtype: torch.dtype,
) -> None:
    """Write what goes beside the weights: index, config.json, tokenizer files and the manifest.

    Args:
        digests: hex sha256 of the weights files.
        reference_dir: config.json (its dtype is updated) and the companions come from here.
    """
    if len(shards) > 1:
        total = sum(dtype.itemsize * torch.Size(size).numel() for sizes in shards for size in sizes.values())
        weight_map = {name: shard_name(i, len(shards)) for i, sizes in enumerate(shards) for name in sizes}
        write_json_atomic(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = json.loads((reference_dir / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json_atomic(folder / "config.json", config)
    copy_companions(reference_dir, folder)
    digests = dict(digests)
    for path in folder.iterdir():
        if path.is_file() and path.name not in digests and not path.name.startswith("."):
            digests[path.name] = sha256_file(path)
    write_json_atomic(
        folder / MANIFEST,
        {"format": "astro_hpc Hugging Face export", "dtype": config["dtype"], "sha256": dict(sorted(digests.items()))},
    )
