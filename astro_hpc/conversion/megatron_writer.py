"""Writing a Megatron checkpoint (torch_dist) one file after another, through PyTorch's own `FileSystemWriter`.

The writer asks a planner for each chunk when its turn comes; ours makes it then, so that one chunk is in memory. The
files are as those of as many ranks: each is a plan of its own, written apart, and the metadata joins them.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, WriteItem
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from astro_hpc.conversion.hf_folder import as_bytes
from astro_hpc.conversion.megatron_folder import PIECE_BYTES, chunk_index
from astro_hpc.conversion.names import Mapping, checkpoint_key, extra_state_keys, mappings, megatron_size
from astro_hpc.model.llama import LlamaShape


@dataclass(frozen=True)
class ChunkPlan:
    """Rows of one Megatron tensor that are stored together."""

    mapping: Mapping
    key: str
    layer: int | None
    size: tuple[int, ...]
    """Of the whole tensor, its layer chosen."""
    row: int
    rows: int


class MegatronPlan:
    """Which rows of which tensors go into which file of a new torch_dist folder."""

    def __init__(
        self, shape: LlamaShape, padded: int, dtype: torch.dtype, file_bytes: int, piece_bytes: int = PIECE_BYTES
    ) -> None:
        """Chunks of at most `piece_bytes`, in files of about `file_bytes`.

        Chunks are equal rows where rows divide so, a power of two in number, so that most tensor-parallel ranks
        that load the folder read nothing twice.
        """
        self.dtype = dtype
        self.files: list[list[ChunkPlan]] = [[]]
        filled = 0
        for mapping in mappings(shape):
            key, layer = checkpoint_key(mapping.megatron)
            size = megatron_size(mapping, shape, padded)
            row_bytes = torch.Size(size[1:]).numel() * dtype.itemsize
            step = _rows_per_chunk(size[0], row_bytes, piece_bytes)
            for row in range(0, size[0], step):
                chunk = ChunkPlan(mapping, key, layer, size, row, min(step, size[0] - row))
                if self.files[-1] and filled + chunk.rows * row_bytes > file_bytes:
                    self.files.append([])
                    filled = 0
                self.files[-1].append(chunk)
                filled += chunk.rows * row_bytes
        plans = [SavePlan([_write_item(chunk, shape, dtype) for chunk in chunks]) for chunks in self.files]
        plans[-1].items.extend(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in extra_state_keys(shape))
        self.plans, self.metadata = create_default_global_save_plan(plans)

    def num_bytes(self, number: int) -> int:
        """Of the elements in file `number`."""
        return (
            sum(chunk.rows * torch.Size(chunk.size[1:]).numel() for chunk in self.files[number]) * self.dtype.itemsize
        )

    def write_file(self, folder: Path, number: int, fill: Callable[[ChunkPlan, torch.Tensor], None]) -> list[list[Any]]:
        """Write file `number` and wait until it is on disk.

        Args:
            fill: sets the rows of a chunk, given a contiguous tensor for them, when its turn comes.

        Returns:
            JSON values for `finish`: key, offsets or None, position in the file and CRC-32 of each item.
        """
        planner = _LazyPlanner(self.plans[number].items, self.files[number], self.dtype, fill)
        writer = _writer(folder)
        plan = writer.prepare_global_plan(self.plans)[number]
        written: list[WriteResult] = writer.write_data(plan, planner).wait()
        return [
            [
                result.index.fqn,
                None if result.index.offset is None else list(result.index.offset),
                result.storage_data.relative_path,
                result.storage_data.offset,
                result.storage_data.length,
                planner.crcs.get(result.index),
            ]
            for result in written
        ]

    def finish(self, folder: Path, written: list[list[list[Any]]]) -> dict[str, int]:
        """Write the metadata from what `write_file` returned for each file; returns the chunks' CRC-32s."""
        results, crcs = [], {}
        for rows in written:
            for key, offsets, file, start, length, crc in rows:
                index = MetadataIndex(key, offsets)
                results.append(WriteResult(index, length, _StorageInfo(file, start, length)))
                if crc is not None:
                    crcs[chunk_index(key, offsets)] = crc
        _writer(folder).finish(self.metadata, [results])
        return crcs


def _rows_per_chunk(rows: int, row_bytes: int, piece_bytes: int) -> int:
    count = 1
    while count * piece_bytes < rows * row_bytes and count < rows:
        count *= 2
    return -(-rows // count)


def _write_item(chunk: ChunkPlan, shape: LlamaShape, dtype: torch.dtype) -> WriteItem:
    offsets = (chunk.row, *(0 for _ in chunk.size[1:]))
    sizes, whole = (chunk.rows, *chunk.size[1:]), chunk.size
    if chunk.layer is not None:
        offsets, sizes, whole = (chunk.layer, *offsets), (1, *sizes), (shape.num_layers, *whole)
    data = TensorWriteData(
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)), TensorProperties(dtype), torch.Size(whole)
    )
    return WriteItem(MetadataIndex(chunk.key, offsets), WriteItemType.SHARD, tensor_data=data)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing: the default is the folder's path, which the folder need not keep."""


def _writer(folder: Path) -> FileSystemWriter:
    # One thread and no copying ahead: a chunk is made, written and dropped before the next.
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    return writer


class _LazyPlanner(DefaultSavePlanner):
    """Makes what is to be written when the writer asks for it, in the memory of what was written before."""

    def __init__(
        self,
        items: list[WriteItem],
        chunks: list[ChunkPlan],
        dtype: torch.dtype,
        fill: Callable[[ChunkPlan, torch.Tensor], None],
    ) -> None:
        super().__init__()
        self._chunks = {item.index: chunk for item, chunk in zip(items, chunks, strict=False)}
        self._dtype, self._fill = dtype, fill
        self._last = torch.empty(0, dtype=dtype)
        self.crcs: dict[MetadataIndex, int] = {}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([None], buffer)  # one object: no FP8 state
            return buffer
        chunk = self._chunks[write_item.index]
        size = (chunk.rows, *chunk.size[1:])
        # Of exactly the size: the writer copies a tensor that is part of a larger one.
        if self._last.numel() != torch.Size(size).numel():
            self._last = torch.empty(size, dtype=self._dtype)
        tensor = self._last.view(size)
        self._fill(chunk, tensor)
        self.crcs[write_item.index] = zlib.crc32(as_bytes(tensor))
        assert write_item.tensor_data is not None
        return tensor.view(write_item.tensor_data.chunk.sizes)


@contextlib.contextmanager
def without_slow_crc() -> Iterator[None]:
    """Within the block `torch.save` leaves out its own CRC-32, which is ten times slower than zlib's."""
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
