"""Hugging Face folders in and out of a live Megatron model, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open

from astro_hpc.config.base import ConfigError
from astro_hpc.conversion.names import Mapping, hf_shapes, join, local_name, mappings, split, to_hf, to_megatron
from astro_hpc.model.llama import LlamaShape
from astro_hpc.run.files import atomic_dir, sha256_file, write_json_atomic

_SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
_COPIED = (
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


class HFTensors:
    """The tensors of a Hugging Face folder: one safetensors file, or many with an index."""

    def __init__(self, hf_dir: Path) -> None:
        """Read the index.

        Raises:
            ConfigError: no safetensors there, or a file of the index is missing or damaged.
        """
        self.hf_dir = Path(hf_dir)
        index, single = self.hf_dir / "model.safetensors.index.json", self.hf_dir / "model.safetensors"
        if index.exists():
            try:
                names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{index}: not a safetensors index ({error!r}); restore the file") from None
        elif single.exists():
            with _open(single) as handle:
                names = dict.fromkeys(handle.keys(), single.name)
        else:
            raise ConfigError(f"{self.hf_dir}: no model.safetensors, alone or with an index; no other weights are read")
        for file in sorted(set(names.values())):
            if Path(file).name != file or not (self.hf_dir / file).is_file():
                raise ConfigError(f"{self.hf_dir}: the index names {file}, which is not there; fetch it again")
        self.files = names
        self._open_name: str | None = None

    def check(self, shape: LlamaShape) -> None:
        """Compare names with the model's.

        Raises:
            ConfigError: a tensor is missing or unknown; it is named.
        """
        wanted = set(hf_shapes(shape))
        missing = sorted(wanted - set(self.files))
        # Old folders keep the tied output layer and RoPE's constants; both follow from the rest.
        unknown = sorted(
            name
            for name in set(self.files) - wanted
            if not name.endswith("rotary_emb.inv_freq") and not (shape.tied and name == "lm_head.weight")
        )
        for kind, names in (("lacks", missing), ("has an unknown", unknown)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ConfigError(
                    f"{self.hf_dir}: the checkpoint {kind} tensor {names[0]}{more}; "
                    "config.json and weights don't belong together"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self.hf_dir / self.files[name]
        if self._open_name != file.name:
            self._handle, self._open_name = _open(file), file.name
        try:
            return self._handle.get_tensor(name)
        except SafetensorError as error:
            raise ConfigError(f"{file}: {name} can't be read ({error}); fetch the file again") from None


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: damaged safetensors file ({error}); fetch it again") from None


def load_hf(model_chunks: Sequence[torch.nn.Module], hf_dir: Path) -> None:
    """Set the weights of this rank's model chunks from a Hugging Face folder, cast to the model's dtype.

    Raises:
        ConfigError: tensors are missing, unknown, damaged or of the wrong shape.
    """
    shape = LlamaShape.from_hf(hf_dir)
    tensors = HFTensors(hf_dir)
    tensors.check(shape)
    expected = hf_shapes(shape)
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    parameters = _named_parameters(model_chunks)
    for mapping in _local_mappings(shape, parameters):
        parts = [tensors[name] for name in mapping.hf]
        for name, part in zip(mapping.hf, parts, strict=True):
            if tuple(part.shape) != expected[name]:
                raise ConfigError(
                    f"{hf_dir}: {name} has shape {tuple(part.shape)}, config.json implies {expected[name]}"
                )
        copies = parameters.pop(mapping.megatron)
        padded = copies[0].shape[0] * size if mapping.layout == "vocab" else 0
        whole = to_megatron(mapping.layout, parts, shape, padded)
        with torch.no_grad():
            for parameter in copies:
                part = split(mapping, whole, rank, size)
                parameter.copy_(part)
                # Beside a weight kept in FP8 lies what it was made from, and the optimizer's master starts from that.
                if (kept := getattr(parameter, "get_high_precision_init_val", lambda: None)()) is not None:
                    kept.copy_(part)
    if parameters:
        raise AssertionError(f"parameters without a Hugging Face tensor: {sorted(parameters)}")


def named_hf_tensors(model_chunks: Sequence[torch.nn.Module], shape: LlamaShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, tensor) of the whole model in the dtype of training, in Hugging Face's order.

    Tensors may share memory with the model: use or copy one before asking for the next. With several ranks every rank
    must iterate, and every rank gets every tensor (gathered over tensor- and pipeline-parallel ranks, one at a time).
    """
    parameters = _named_parameters(model_chunks)
    for mapping in mappings(shape):
        with torch.no_grad():  # never around a yield: the mode would leak into the consumer
            parts = to_hf(mapping.layout, _gather(mapping, parameters.get(mapping.megatron), shape), shape)
        yield from zip(mapping.hf, parts, strict=True)


def _gather(mapping: Mapping, copies: list[torch.Tensor] | None, shape: LlamaShape) -> torch.Tensor:
    """The whole Megatron tensor of `mapping`, on every rank."""
    tensor = copies[0].detach() if copies else None
    size = parallel_state.get_tensor_model_parallel_world_size()
    if tensor is not None and size > 1 and mapping.split_dim is not None:
        parts = [torch.empty_like(tensor) for _ in range(size)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        tensor = join(mapping, parts)
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        assert tensor is not None, mapping.megatron
        return tensor
    return _broadcast_from_owner(tensor)


def _broadcast_from_owner(tensor: torch.Tensor | None) -> torch.Tensor:
    """Give every pipeline rank the tensor that one of them (the first that has it) holds."""
    from astro_hpc.model.cpu import device

    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    found: list[tuple[tuple[int, ...], torch.dtype] | None] = [None] * len(ranks)
    torch.distributed.all_gather_object(
        found, None if tensor is None else (tuple(tensor.shape), tensor.dtype), group=group
    )
    owner, (size, dtype) = next((i, what) for i, what in enumerate(found) if what is not None)
    if ranks[owner] != torch.distributed.get_rank():
        tensor = torch.empty(size, dtype=dtype, device=device())
    assert tensor is not None
    tensor = tensor.contiguous()
    torch.distributed.broadcast(tensor, src=ranks[owner], group=group)
    return tensor


def _named_parameters(model_chunks: Sequence[torch.nn.Module]) -> dict[str, list[torch.Tensor]]:
    """Parameters by whole-model local-spec name. A tied output layer on another stage is a second embedding."""
    found: dict[str, list[torch.Tensor]] = {}
    for chunk in model_chunks:
        model = chunk
        while hasattr(model, "module"):
            model = model.module  # type: ignore[assignment]
        tied = model.share_embeddings_and_output_weights
        for name, parameter in model.named_parameters():
            name = local_name(name)
            if name.startswith("decoder.layers."):
                _, _, index, rest = name.split(".", 3)
                name = f"decoder.layers.{model.decoder.layers[int(index)].layer_number - 1}.{rest}"  # type: ignore[union-attr, index]
            elif name == "output_layer.weight" and tied:
                name = "embedding.word_embeddings.weight"
            found.setdefault(name, []).append(parameter)
    return found


def _local_mappings(shape: LlamaShape, parameters: dict[str, list[torch.Tensor]]) -> list[Mapping]:
    return [mapping for mapping in mappings(shape) if mapping.megatron in parameters]


def save_hf(
    model_chunks: Sequence[torch.nn.Module],
    reference_dir: Path,
    out_dir: Path,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Write the model as a Hugging Face folder: weights, configuration, tokenizer, manifest. Atomic; rank 0 writes.

    The optimizer's float32 masters are not exported: what is written is the model's own weights. Under bf16 training
    these are the masters rounded to bf16; under fp32 training they are rounded here when `dtype` is bfloat16.

    Args:
        reference_dir: the folder the model came from: config.json (its dtype is updated) and tokenizer are copied.
        dtype: of the weights in the files.
        shard_bytes: a file larger than this is split, with an index.

    Returns:
        out_dir
    """
    shape = LlamaShape.from_hf(reference_dir)
    tensors = ((name, tensor.to(dtype)) for name, tensor in named_hf_tensors(model_chunks, shape))
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        for _ in tensors:  # rank 0's gathers need every rank
            pass
    else:
        with atomic_dir(out_dir) as folder:
            write_hf_folder(folder, tensors, shape, reference_dir, dtype, shard_bytes)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return out_dir


def write_hf_folder(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shape: LlamaShape,
    reference_dir: Path,
    dtype: torch.dtype,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write weights (in `hf_shapes` order), config.json, tokenizer files and manifest.json into `folder`."""
    shards = _plan_shards(hf_shapes(shape), dtype.itemsize, shard_bytes)
    source = iter(tensors)
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    total = 0
    for number, sizes in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[name], size = _write_safetensors(folder / name, sizes, dtype, source)
        total += size
        weight_map |= dict.fromkeys(sizes, name)
    if len(shards) > 1:
        write_json_atomic(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    config = json.loads((Path(reference_dir) / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json_atomic(folder / "config.json", config)
    for name in _COPIED:
        if (Path(reference_dir) / name).is_file():
            shutil.copyfile(Path(reference_dir) / name, folder / name)
    for path in sorted(folder.iterdir()):
        if path.name not in digests:
            digests[path.name] = sha256_file(path)
    write_json_atomic(
        folder / "manifest.json",
        {"format": "astro_hpc Hugging Face export", "dtype": config["dtype"], "sha256": dict(sorted(digests.items()))},
    )


def _plan_shards(
    shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """Consecutive tensors into files of at most `shard_bytes`, a larger tensor alone."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in shapes.items():
        need = itemsize * torch.Size(size).numel()
        if shards[-1] and filled + need > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += need
    return shards


def _write_safetensors(
    path: Path, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype, source: Iterator[tuple[str, torch.Tensor]]
) -> tuple[str, int]:
    """Stream tensors into one safetensors file; returns (hex sha256, bytes of data).

    The safetensors package wants a whole file's tensors in memory at once; the format is a length, a JSON header and
    the raw little-endian elements, which can be written one tensor at a time.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in sizes.items():
        end = offset + dtype.itemsize * torch.Size(size).numel()
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as handle:
        for block in (len(text).to_bytes(8, "little"), text):
            handle.write(block)
            digest.update(block)
        for name, size in sizes.items():
            got, tensor = next(source)
            assert (got, tuple(tensor.shape), tensor.dtype) == (name, size, dtype), (got, tensor.shape, name, size)
            raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
            handle.write(raw)
            digest.update(raw)
    return digest.hexdigest(), offset
