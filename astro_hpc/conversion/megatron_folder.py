"""Megatron checkpoints as files: reading tensors in pieces.

A torch_dist folder is a `.metadata` pickle, which says what lies where, and `.distcp` files, in which each chunk of a
tensor is a `torch.save` archive (a zip whose one large record is the raw elements). Reading goes to the record itself,
because `torch.load` takes a whole chunk into memory and overlooks altered bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from astro_hpc.config.base import ConfigError
from astro_hpc.conversion.hf_folder import as_bytes, read_into
from astro_hpc.conversion.names import Mapping, checkpoint_key, mappings, megatron_size
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.torch_dist import MARKER, damage, read_metadata

PIECE_BYTES = 64 << 20
"""Of a tensor that are in memory at once, and are stored together."""
_STEP_BYTES = 2 << 20
"""Of a piece as it is read: what was read is still in the processor's cache when it is hashed and written."""
RECORD = "conversion.json"
"""What an import writes beside the tensors: where they came from, and each chunk's CRC-32."""
_TRAINING_KEYS = ("optimizer.", "chained_", "rng", "rerun_state_machine")
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip record: lengths of name and extra field at the end


@dataclass(frozen=True)
class _Chunk:
    """A block of a matrix in a file; stacked layers are already chosen from."""

    index: str
    """Names the chunk in messages and in the record."""
    file: Path
    start: int
    """Of its archive in the file."""
    length: int
    row: int
    column: int
    rows: int
    columns: int


class MegatronTensors:
    """The model's tensors in a torch_dist folder: an import, or a training checkpoint of any parallel sizes."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            ConfigError: not a whole checkpoint.
        """
        self.folder = Path(folder)
        if (self.folder / MARKER).exists() and (reason := damage(self.folder)):
            raise ConfigError(f"{self.folder}: {reason}; make the checkpoint again")
        metadata = read_metadata(self.folder)
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._where: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        for info in self._where.values():
            if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
                raise ConfigError(f"{self.folder}: the metadata names {info.relative_path}, which is not a file of it")
        self._crcs: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self._crcs = dict(json.loads((self.folder / RECORD).read_text(encoding="utf-8"))["crc32"])

    def check(self, shape: LlamaShape) -> None:
        """Compare keys and sizes with the model's.

        Raises:
            ConfigError: a tensor is missing, unknown or of another size; it is named.
        """
        wanted: dict[str, tuple[int, ...]] = {}
        for mapping in mappings(shape):
            key, layer = checkpoint_key(mapping.megatron)
            if key not in self._tensors:
                raise ConfigError(f"{self.folder}: the checkpoint lacks {key}; it is not of this model")
            padded = self._tensors[key].size[0] if mapping.layout == "vocab" else 0
            size = megatron_size(mapping, shape, padded)
            wanted[key] = size if layer is None else (shape.num_layers, *size)
            if padded and padded < shape.vocab_size:
                raise ConfigError(f"{self.folder}: {key} has {padded} rows, the vocabulary {shape.vocab_size}")
        for key, found in self._tensors.items():
            if key.startswith(_TRAINING_KEYS):
                continue
            if key not in wanted:
                raise ConfigError(f"{self.folder}: the checkpoint has an unknown tensor {key}; it is not of this model")
            if tuple(found.size) != wanted[key]:
                raise ConfigError(f"{self.folder}: {key} has shape {tuple(found.size)}, not {wanted[key]}")

    def dtype(self, shape: LlamaShape) -> torch.dtype | None:
        """The one dtype of the model's weights; None when they differ."""
        found = {self._tensors[checkpoint_key(row.megatron)[0]].properties.dtype for row in mappings(shape)}
        return found.pop() if len(found) == 1 else None

    def rows(self, mapping: Mapping) -> int:
        """Rows of the Megatron tensor, a vocabulary's padding included."""
        key, layer = checkpoint_key(mapping.megatron)
        return int(self._tensors[key].size[0 if layer is None else 1])

    def pieces(self, mapping: Mapping, piece_bytes: int = _STEP_BYTES) -> Iterator[torch.Tensor]:
        """Yield the Megatron tensor's rows in order, some at a time: [rows, ...], in its own dtype.

        A piece is good until the next is asked for: they share memory.

        Raises:
            ConfigError: a file is missing, cut or damaged; it is named.
        """
        key, layer = checkpoint_key(mapping.megatron)
        found = self._tensors[key]
        size = tuple(found.size) if layer is None else tuple(found.size[1:])
        dtype = found.properties.dtype
        rows, columns = size[0], torch.Size(size[1:]).numel()
        chunks = [(chunk, _Archive(chunk, dtype)) for chunk in self._chunks(key, layer)]
        step = max(1, piece_bytes // (columns * dtype.itemsize))
        buffer = torch.empty(min(rows, step), columns, dtype=dtype)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            piece = buffer[: last - first]
            filled = 0
            for chunk, archive in chunks:
                low, high = max(first, chunk.row), min(last, chunk.row + chunk.rows)
                if low >= high:
                    continue
                target = piece[low - first : high - first, chunk.column : chunk.column + chunk.columns]
                block = target if target.is_contiguous() else torch.empty(target.shape, dtype=dtype)
                archive.read_next(block)
                if block is not target:
                    target.copy_(block)
                filled += block.numel()
            if filled != piece.numel():
                raise ConfigError(f"{self.folder}: the chunks of {key} don't make the whole tensor")
            yield piece.view(last - first, *size[1:])
        for chunk, archive in chunks:
            archive.check(self._crcs.get(chunk.index))

    def whole(self, mapping: Mapping) -> torch.Tensor:
        """The whole Megatron tensor."""
        found = None
        row = 0
        for piece in self.pieces(mapping):
            if found is None:
                found = piece.new_empty(self.rows(mapping), *piece.shape[1:])
            found[row : row + piece.shape[0]] = piece
            row += piece.shape[0]
        assert found is not None
        return found

    def region(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """A block of the tensor `key` as a rank that loads it would read it; one layer of stacked ones.

        Rows beyond the tensor's end (a vocabulary padded further) are zeros.
        """
        found = self._tensors[key]
        layered = key.startswith("decoder.layers.")
        layer, skip = (offsets[0], 1) if layered else (None, 0)
        dtype = found.properties.dtype
        inner, inner_sizes = offsets[skip:], sizes[skip:]
        row, rows = inner[0], inner_sizes[0]
        column, columns = (inner[1], inner_sizes[1]) if len(inner) > 1 else (0, 1)
        out = torch.zeros(rows, columns, dtype=dtype)
        for chunk in self._chunks(key, layer):
            low, high = max(row, chunk.row), min(row + rows, chunk.row + chunk.rows)
            left, right = max(column, chunk.column), min(column + columns, chunk.column + chunk.columns)
            if low >= high or left >= right:
                continue
            block = torch.empty(high - low, chunk.columns, dtype=dtype)
            archive = _Archive(chunk, dtype)
            archive.skip(low - chunk.row)
            archive.read_next(block)
            archive.close()
            source = block[:, left - chunk.column : right - chunk.column]
            out[low - row : high - row, left - column : right - column] = source
        return out.view(inner_sizes)

    def _chunks(self, key: str, layer: int | None) -> list[_Chunk]:
        found = []
        for chunk in self._tensors[key].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if layer is not None:
                if offsets[0] != layer:
                    continue
                if sizes[0] != 1:
                    raise ConfigError(f"{self.folder}: {key} stores {sizes[0]} layers in one chunk; one is expected")
                offsets, sizes = offsets[1:], sizes[1:]
            info = self._where.get(MetadataIndex(key, chunk.offsets))
            if info is None:
                raise ConfigError(f"{self.folder}: the metadata doesn't say where {key} at {offsets} is")
            found.append(
                _Chunk(
                    chunk_index(key, chunk.offsets),
                    self.folder / info.relative_path,
                    info.offset,
                    info.length,
                    row=offsets[0],
                    column=offsets[1] if len(offsets) > 1 else 0,
                    rows=sizes[0],
                    columns=sizes[1] if len(sizes) > 1 else 1,
                )
            )
        return found


def chunk_index(key: str, offsets: Any) -> str:
    """How messages and the record name a chunk."""
    return f"{key}@{','.join(map(str, offsets))}"


class _Archive:
    """Reads the rows of one chunk in order, straight from its `torch.save` archive."""

    def __init__(self, chunk: _Chunk, dtype: torch.dtype) -> None:
        self._chunk, self._row_bytes = chunk, chunk.columns * dtype.itemsize
        self._position, self._crc = 0, 0
        self._handle: io.FileIO | None = None
        try:
            self._open(chunk, dtype)
        except ConfigError:
            raise
        except Exception as error:  # damaged archives raise nearly anything
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{chunk.file}: {chunk.index} is damaged ({text}); restore the file") from None

    def _open(self, chunk: _Chunk, dtype: torch.dtype) -> None:
        with open(chunk.file, "rb", buffering=0) as handle:
            view = _View(handle, chunk.start, chunk.length)
            with zipfile.ZipFile(view) as archive:
                records = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
            view.seek(0)
            stored = torch.load(view, map_location="meta", weights_only=True)  # its layout; elements are not read
            (record,) = records
            rows = chunk.rows * self._row_bytes
            if stored.dtype != dtype or not stored.is_contiguous() or record.file_size != rows or record.compress_type:
                raise ConfigError(f"{chunk.file}: {chunk.index} isn't stored as the metadata says; restore the file")
            view.seek(record.header_offset)
            name, extra = _LOCAL_HEADER.unpack(view.read(_LOCAL_HEADER.size))
            self._start = chunk.start + record.header_offset + _LOCAL_HEADER.size + name + extra
            self._stored_crc = record.CRC

    def skip(self, rows: int) -> None:
        """Go on `rows` further down."""
        self._position += rows * self._row_bytes

    def read_next(self, block: torch.Tensor) -> None:
        """Fill `block` with the next rows."""
        if self._handle is None:
            self._handle = open(self._chunk.file, "rb", buffering=0)  # noqa: SIM115 - closed after the last row
            self._handle.seek(self._start + self._position)
        read_into(self._handle, block, f"{self._chunk.file}: {self._chunk.index}")
        self._position += block.nbytes
        self._crc = zlib.crc32(as_bytes(block), self._crc)
        if self._position == self._chunk.rows * self._row_bytes:
            self.close()

    def close(self) -> None:
        """Close the file; twice is harmless."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def check(self, recorded: int | None) -> None:
        """Compare the checksum of all rows with the recorded one, or the archive's (0: it has none)."""
        expected = self._stored_crc if recorded is None else recorded
        if expected and self._crc != expected:
            raise ConfigError(
                f"{self._chunk.file}: {self._chunk.index} is damaged (its CRC-32 differs); restore the file"
            )


class _View(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, handle: io.RawIOBase, start: int, length: int) -> None:
        self._handle, self._start, self._length, self._position = handle, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._length - self._position))
        self._handle.seek(self._start + self._position)
        count = self._handle.readinto(memoryview(buffer)[:wanted]) or 0
        self._position += count
        return count
