"""Conversion between folders, without a model in memory: Hugging Face -> Megatron torch_dist, and back.

Both directions go file by file and piece by piece: memory is a few pieces a worker (and a layer's queries, keys and
values in an export), whatever the model. A killed conversion goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from astro_hpc import __version__
from astro_hpc.config.base import ConfigError
from astro_hpc.conversion.hf_folder import (
    SHARD_BYTES,
    HFTensors,
    SafetensorsFile,
    copy_companions,
    finish_hf_folder,
    plan_shards,
    shard_name,
)
from astro_hpc.conversion.megatron_folder import PIECE_BYTES, RECORD, MegatronTensors
from astro_hpc.conversion.megatron_writer import ChunkPlan, MegatronPlan, without_slow_crc
from astro_hpc.conversion.names import Mapping, hf_shapes, mappings, row_blocks, to_hf
from astro_hpc.conversion.workfolder import WorkFolder, convert_files, exclusive
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.parallel import padded_vocab_size
from astro_hpc.model.torch_dist import MARKER, METADATA
from astro_hpc.run.files import write_json_atomic

WORKERS = 4
"""More than cores: while one waits for the disk another goes on."""
FILE_BYTES = 2 * 10**9
"""Of a torch_dist file: what a killed import may have to do again."""
_FORMAT = 1
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def import_hf(
    hf_dir: Path,
    out_dir: Path,
    *,
    dtype: str = "auto",
    workers: int = WORKERS,
    overwrite: bool = False,
    file_bytes: int = FILE_BYTES,
    piece_bytes: int = PIECE_BYTES,
) -> Path:
    """Write a Hugging Face folder as a Megatron checkpoint (torch_dist) that any parallel sizes load.

    config.json, tokenizer and generation configuration come along, so that the result is enough to export from.

    Args:
        dtype: of the weights written: bfloat16, float32, or auto, the source's.
        workers: files converted at a time.
        overwrite: replace what is at `out_dir`.

    Returns:
        out_dir

    Raises:
        ConfigError: the source is not a whole Llama that can be represented, or there is no room for the result.
    """
    hf_dir, out_dir = Path(hf_dir), Path(out_dir)
    shape = LlamaShape.from_hf(hf_dir)
    source = HFTensors(hf_dir)
    source.check(shape)
    target_dtype = _choose_dtype(dtype, source.dtype(hf_shapes(shape)), hf_dir)
    padded = padded_vocab_size(shape.vocab_size, 1)
    plan = MegatronPlan(shape, padded, target_dtype, file_bytes, piece_bytes)
    identity = _identity(hf_dir, [hf_dir / name for name in source.files], target_dtype, file_bytes, piece_bytes)

    def convert(number: int, step: Callable[[int], None]) -> tuple[str, Any]:
        def fill(chunk: ChunkPlan, out: torch.Tensor) -> None:
            read_megatron_rows(source, chunk.mapping, shape, chunk.row, out)
            step(out.nbytes)

        written = plan.write_file(work.path, number, fill)
        return written[0][2], written

    with exclusive(out_dir):
        if _is_done(out_dir, RECORD, identity, overwrite):
            return out_dir
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(source.check_digests, source.files))
        work = WorkFolder(out_dir, identity)
        sizes = [plan.num_bytes(number) for number in range(len(plan.files))]
        work.begin(sizes)
        with without_slow_crc():
            written = convert_files("import", work, sizes, workers, convert)
            crcs = plan.finish(work.path, written)
            torch.save({}, work.path / "common.pt")
        save_config(CheckpointingConfig("torch_dist"), str(work.path))
        (work.path / "config.json").write_bytes((hf_dir / "config.json").read_bytes())
        copy_companions(hf_dir, work.path)
        write_json_atomic(
            work.path / RECORD,
            {
                "converted_by": f"astro_hpc {__version__}",
                "from": str(hf_dir),
                "plan": identity,
                "dtype": str(target_dtype).removeprefix("torch."),
                "padded_vocab_size": padded,
                "crc32": crcs,
            },
        )
        files = [path for path in work.path.iterdir() if path.name == METADATA or not path.name.startswith(".")]
        write_json_atomic(work.path / MARKER, {"bytes": {path.name: path.stat().st_size for path in files}})
        work.publish()
    return out_dir


def read_megatron_rows(source: HFTensors, mapping: Mapping, shape: LlamaShape, row: int, out: torch.Tensor) -> None:
    """Fill the contiguous `out` with the Megatron tensor's rows from `row` on; a vocabulary's padding is zero."""
    rows, filled = out.shape[0], 0
    for block in row_blocks(mapping, shape):
        low, high = max(row, block.megatron_row), min(row + rows, block.megatron_row + block.rows)
        if low < high:
            first = block.hf_row + low - block.megatron_row
            source.read_rows(mapping.hf[block.part], first, out[low - row : high - row])
            filled = high - row
    out[filled:].zero_()


def export_hf(
    megatron_dir: Path,
    out_dir: Path,
    *,
    reference: Path | None = None,
    dtype: str = "auto",
    workers: int = WORKERS,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the model's weights in a Megatron checkpoint as a Hugging Face folder.

    Args:
        megatron_dir: an import, a training checkpoint (`sft/ARM/checkpoints/step_N`), or a `checkpoints` folder, of
            which the newest is taken. The optimizer's state is left alone.
        reference: where config.json and tokenizer come from; by default `megatron_dir` itself.
        dtype: of the weights written: bfloat16, float32, or auto, the checkpoint's.
        workers: files converted at a time.
        overwrite: replace what is at `out_dir`.
        shard_bytes: size at which weights files are split.

    Returns:
        out_dir

    Raises:
        ConfigError: the checkpoint is damaged or not of the reference's model, or there is no room for the result.
    """
    megatron_dir, out_dir = newest(Path(megatron_dir)), Path(out_dir)
    reference = Path(reference) if reference is not None else megatron_dir
    if not (reference / "config.json").is_file():
        raise ConfigError(f"{reference}: has no config.json; name the model's Hugging Face folder with --reference")
    shape = LlamaShape.from_hf(reference)
    source = MegatronTensors(megatron_dir)
    source.check(shape)
    target_dtype = _choose_dtype(dtype, source.dtype(shape), megatron_dir)
    shards = plan_shards(shape, target_dtype.itemsize, shard_bytes)
    weights = sorted(megatron_dir.glob("*.distcp"))
    identity = _identity(reference, [megatron_dir / METADATA, *weights], target_dtype, shard_bytes)

    def convert(number: int, step: Callable[[int], None]) -> tuple[str, Any]:
        name = shard_name(number, len(shards))
        with open(work.path / name, "wb") as handle:
            file = SafetensorsFile(handle, shards[number], target_dtype)
            for mapping in mappings(shape):
                if mapping.hf[0] in shards[number]:
                    _write_parts(file, source, mapping, shape, target_dtype, step)
            handle.flush()
            os.fsync(handle.fileno())
        return name, file.hexdigest()

    with exclusive(out_dir):
        if _is_done(out_dir, RECORD, identity, overwrite):
            return out_dir
        work = WorkFolder(out_dir, identity)
        sizes = [sum(target_dtype.itemsize * torch.Size(size).numel() for size in shard.values()) for shard in shards]
        work.begin(sizes)
        digests = convert_files("export", work, sizes, _export_workers(workers, shape), convert)
        by_name = {shard_name(number, len(shards)): digest for number, digest in enumerate(digests)}
        write_json_atomic(
            work.path / RECORD,
            {"converted_by": f"astro_hpc {__version__}", "from": str(megatron_dir), "plan": identity},
        )
        finish_hf_folder(work.path, shards, by_name, reference, target_dtype)
        work.publish()
    return out_dir


def newest(folder: Path) -> Path:
    """`folder`, or the checkpoint that its `latest` names.

    Raises:
        ConfigError: there is no such folder, or `latest` names something that is not there.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give what `convert import` made, or a checkpoint of a run")
    latest = folder / "latest"
    if not latest.is_file():
        return folder
    name = latest.read_text(encoding="utf-8").strip()
    if not name or Path(name).name != name or not (folder / name).is_dir():
        raise ConfigError(f"{latest}: names {name!r}, which is not a folder beside it; name a step_N folder instead")
    return folder / name


def _write_parts(
    file: SafetensorsFile,
    source: MegatronTensors,
    mapping: Mapping,
    shape: LlamaShape,
    dtype: torch.dtype,
    step: Callable[[int], None],
) -> None:
    """Append one Megatron tensor's Hugging Face tensors, in their order."""

    def write(piece: torch.Tensor) -> None:
        file.write(piece.to(dtype))
        step(piece.numel() * dtype.itemsize)

    if mapping.layout == "qkv":  # the one layout whose rows are in another order
        for part in to_hf("qkv", source.whole(mapping), shape):
            write(part)
        return
    left = sum(block.rows for block in row_blocks(mapping, shape))
    for piece in source.pieces(mapping):
        if left > 0:  # what follows is a vocabulary's padding, read only for its checksum
            write(piece[:left])
        left -= piece.shape[0]


def _export_workers(workers: int, shape: LlamaShape) -> int:
    """No more than can hold a layer's queries, keys and values twice each, within twice the largest tensor."""
    qkv = shape.hidden_size * shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
    largest = shape.hidden_size * max(2 * shape.ffn_hidden_size, shape.vocab_size, qkv // shape.hidden_size)
    return max(1, min(workers, largest // qkv))


def _choose_dtype(wanted: str, found: torch.dtype | None, where: Path) -> torch.dtype:
    if wanted == "auto":
        if found not in _DTYPES.values():
            what = "tensors of several dtypes" if found is None else f"{str(found).removeprefix('torch.')} tensors"
            raise ConfigError(f"{where}: has {what}; choose --dtype bfloat16 or --dtype float32")
        assert found is not None
        return found
    if wanted not in _DTYPES:
        raise ConfigError(f"--dtype {wanted}: possible are auto, {', '.join(_DTYPES)}")
    return _DTYPES[wanted]


def _identity(config_dir: Path, files: list[Path], dtype: torch.dtype, *sizes: int) -> dict[str, Any]:
    """What a conversion's result depends on: the same means that a stopped one can be gone on with."""
    stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    config = hashlib.sha256((config_dir / "config.json").read_bytes()).hexdigest()
    return {"format": _FORMAT, "files": stats, "config_sha256": config, "dtype": str(dtype), "sizes": list(sizes)}


def _is_done(out_dir: Path, record: str, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out_dir` is the result of the same conversion already."""
    if overwrite or not out_dir.exists():
        return False
    try:
        if json.loads((out_dir / record).read_text(encoding="utf-8"))["plan"] == identity:
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{out_dir}: exists and is something else; choose another name, or --overwrite")
