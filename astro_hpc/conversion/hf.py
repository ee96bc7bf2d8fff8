"""Hugging Face folders in and out of a live Megatron model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from astro_hpc.conversion.hf_folder import (
    SHARD_BYTES,
    HFTensors,
    SafetensorsFile,
    finish_hf_folder,
    plan_shards,
    shard_name,
)
from astro_hpc.conversion.megatron_folder import MegatronTensors
from astro_hpc.conversion.names import Mapping, join, local_name, mappings, split, to_hf, to_megatron
from astro_hpc.model.cpu import megatron_device
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.torch_dist import METADATA, load_sharded
from astro_hpc.run.files import atomic_dir


def load_hf(model_chunks: Sequence[torch.nn.Module], hf_dir: Path) -> None:
    """Set the weights of this rank's model chunks from a Hugging Face folder, cast to the model's dtype.

    A folder that `convert import` made is one too, with Megatron's files for weights: a rank reads from it only what
    it needs.

    Raises:
        ConfigError: tensors are missing, unknown, damaged or of the wrong shape.
    """
    if (Path(hf_dir) / METADATA).is_file():
        load_megatron(model_chunks, hf_dir)
        return
    shape = LlamaShape.from_hf(hf_dir)
    tensors = HFTensors(hf_dir)
    tensors.check(shape)
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    parameters = named_parameters(model_chunks)
    for mapping in _local_mappings(shape, parameters):
        parts = [tensors[name] for name in mapping.hf]
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


def load_megatron(model_chunks: Sequence[torch.nn.Module], folder: Path, reference_dir: Path | None = None) -> None:
    """Set the weights of this rank's model chunks from a Megatron checkpoint of any parallel sizes, by Megatron.

    Its optimizer state, if it has one, is left alone. FP8 state that one layer spec keeps and the other doesn't is
    not asked for.

    Args:
        reference_dir: where config.json is; by default `folder`.

    Raises:
        ConfigError: not a whole checkpoint of this model.
    """
    source = MegatronTensors(folder)
    source.check(LlamaShape.from_hf(reference_dir or folder))
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    models = {f"model{number}": unwrap(chunk) for number, chunk in enumerate(model_chunks)}
    with megatron_device():
        state = {key: model.sharded_state_dict(metadata=metadata) for key, model in models.items()}
        loaded = load_sharded(Path(folder), state)
        for key, model in models.items():
            model.load_state_dict(loaded[key])
            # Beside a weight kept in FP8 lies what it was made from, and the optimizer's master starts from that.
            for name, parameter in model.named_parameters():
                if (kept := getattr(parameter, "get_high_precision_init_val", lambda: None)()) is not None:
                    kept.copy_(loaded[key][name])


def unwrap(chunk: torch.nn.Module) -> Any:
    """The GPTModel inside data parallelism's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def named_hf_tensors(model_chunks: Sequence[torch.nn.Module], shape: LlamaShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, tensor) of the whole model in the dtype of training, in Hugging Face's order.

    Tensors may share memory with the model: use or copy one before asking for the next. With several ranks every rank
    must iterate, and every rank gets every tensor (gathered over tensor- and pipeline-parallel ranks, one at a time).
    """
    parameters = named_parameters(model_chunks)
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


def named_parameters(model_chunks: Sequence[torch.nn.Module]) -> dict[str, list[torch.Tensor]]:
    """Parameters by whole-model local-spec name. A tied output layer on another stage is a second embedding."""
    found: dict[str, list[torch.Tensor]] = {}
    for chunk in model_chunks:
        model = unwrap(chunk)
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
    shard_bytes: int = SHARD_BYTES,
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
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights (in `hf_shapes` order), config.json, tokenizer files and manifest.json into `folder`."""
    shards = plan_shards(shape, dtype.itemsize, shard_bytes)
    source = iter(tensors)
    digests: dict[str, str] = {}
    for number, sizes in enumerate(shards):
        with open(folder / shard_name(number, len(shards)), "wb") as handle:
            file = SafetensorsFile(handle, sizes, dtype)
            for name, size in sizes.items():
                got, tensor = next(source)
                assert (got, tuple(tensor.shape), tensor.dtype) == (name, size, dtype), (got, tensor.shape, name, size)
                file.write(tensor.detach().cpu().contiguous())
        digests[shard_name(number, len(shards))] = file.hexdigest()
    finish_hf_folder(folder, shards, digests, Path(reference_dir), dtype)
