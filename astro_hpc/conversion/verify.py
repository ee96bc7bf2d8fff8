"""The certificate of a conversion: that a Megatron checkpoint is the Hugging Face model, checked and not assumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from astro_hpc import __version__
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ParallelConfig, PrecisionConfig
from astro_hpc.conversion.hf_folder import COMPANIONS, HFTensors, as_bytes
from astro_hpc.conversion.logits import compare_logits, why_too_large
from astro_hpc.conversion.megatron_folder import PIECE_BYTES, MegatronTensors
from astro_hpc.conversion.names import Mapping, checkpoint_key, hf_size, mappings, to_hf
from astro_hpc.conversion.offline import WORKERS, newest, read_megatron_rows
from astro_hpc.conversion.proof import model_ranks, prove_shapes
from astro_hpc.model.cpu import on_cpu
from astro_hpc.model.llama import LlamaShape, transformer_config
from astro_hpc.model.meta import Request, checkpoint_requests, meta_rank

_NOT_THE_MODEL = {"torch_dtype", "dtype", "transformers_version", "_name_or_path"}
"""Fields of config.json that say how it was written."""


@dataclass
class Certificate:
    """What was checked and what came out."""

    checks: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, str] = field(default_factory=dict)
    """Hex sha256 of each Hugging Face tensor's bytes, in the checkpoint's dtype."""

    @property
    def passed(self) -> bool:
        """Whether no check failed; one that could not be made doesn't count."""
        return all(check["passed"] is not False for check in self.checks)

    def run(self, name: str, check: Callable[[], str]) -> bool:
        """Make one check. It returns what was found equal; `_Failed` or a ConfigError says what was not."""
        try:
            passed, detail = True, check()
        except (_Failed, ConfigError) as error:
            passed, detail = False, str(error)
        self.checks.append({"check": name, "passed": passed, "detail": detail})
        return passed

    def line(self) -> str:
        """One line for people."""
        if self.passed:
            return "verified: " + "; ".join(check["detail"] for check in self.checks)
        failed = (f"{check['check']}: {check['detail']}" for check in self.checks if check["passed"] is False)
        return "NOT verified: " + "; ".join(failed)


class _Failed(Exception):
    """The two sides differ; says where."""


def verify(
    hf_dir: Path,
    megatron_dir: Path,
    *,
    exported: Path | None = None,
    prompts: Sequence[str] = (),
    logits: str = "auto",
    workers: int = WORKERS,
) -> tuple[Certificate, dict[str, Any]]:
    """Compare a Hugging Face folder, the Megatron checkpoint made from it, and an export of that.

    Memory stays within a few pieces a worker, but for the logits. Must run in a process of no process group.

    Args:
        exported: a Hugging Face folder made from the checkpoint; None: only the way back is checked, not written.
        prompts: texts for the logits; some are there by default.
        logits: auto (when both models fit this machine's memory, one after the other), on or off.

    Returns:
        The certificate, and the same as JSON values.

    Raises:
        ConfigError: `hf_dir` has no readable config.json.
    """
    megatron_dir = newest(megatron_dir)
    shape = LlamaShape.from_hf(hf_dir)
    certificate = Certificate()
    sides: dict[str, Any] = {}

    def names() -> str:
        sides["hf"], sides["megatron"] = HFTensors(hf_dir), MegatronTensors(megatron_dir)
        sides["hf"].check(shape)
        sides["megatron"].check(shape)
        if exported is not None:
            sides["exported"] = HFTensors(exported)
            sides["exported"].check(shape)
        count = sum(len(mapping.hf) for mapping in mappings(shape))
        return f"all {count} tensors of {shape.num_parameters:,} parameters are there"

    if certificate.run("names", names):
        hf, megatron = sides["hf"], sides["megatron"]
        certificate.run("tensors", lambda: _compare_tensors(certificate, hf, megatron, shape, workers))
        if exported is not None:
            certificate.run("export", lambda: _compare_export(certificate, hf_dir, sides["exported"], shape, workers))
        for parallel in _parallel_sizes(shape):
            name = f"tp{parallel.tensor_parallel_size} pp{parallel.pipeline_parallel_size}"
            certificate.run(f"reshard {name}", lambda p=parallel: _compare_parts(hf, megatron, shape, p, workers))  # type: ignore[misc]
    certificate.run("config", lambda: _compare_configs(hf_dir, [megatron_dir, exported], shape))
    _check_logits(certificate, hf_dir, megatron_dir, shape, prompts, logits)
    return certificate, {
        "certificate": f"astro_hpc {__version__} conversion",
        "passed": certificate.passed,
        "hugging_face": str(hf_dir),
        "megatron": str(megatron_dir),
        "exported": None if exported is None else str(exported),
        "parameters": shape.num_parameters,
        "checks": certificate.checks,
        "sha256": certificate.tensors,
    }


def _compare_tensors(
    certificate: Certificate, hf: HFTensors, megatron: MegatronTensors, shape: LlamaShape, workers: int
) -> str:
    """Hash every Hugging Face tensor, and what comes back out of the Megatron tensor it is in."""
    dtype = megatron.dtype(shape)
    if dtype is None:
        raise _Failed(f"{megatron.folder}: the weights have several dtypes")

    def one(mapping: Mapping) -> list[tuple[str, str, str]]:
        back = _hashes_back(mapping, megatron, shape)
        return [(name, _hash(hf, name, dtype), digest) for name, digest in zip(mapping.hf, back, strict=True)]

    with ThreadPoolExecutor(workers) as pool:
        rows = [row for found in pool.map(one, mappings(shape)) for row in found]
    certificate.tensors = {name: digest for name, digest, _ in rows}
    _refuse_differing([name for name, there, back in rows if there != back])
    rounded = "" if hf.dtype(certificate.tensors) == dtype else f" after rounding to {str(dtype)[6:]}"
    return f"every one's sha256 is the same after the round trip{rounded}"


def _hashes_back(mapping: Mapping, megatron: MegatronTensors, shape: LlamaShape) -> list[str]:
    """Hex sha256 of each Hugging Face tensor inside a Megatron tensor; its vocabulary padding must be zero."""
    if mapping.layout == "qkv":
        return [hashlib.sha256(as_bytes(part)).hexdigest() for part in to_hf("qkv", megatron.whole(mapping), shape)]
    sizes = [hf_size(name, shape)[0] for name in mapping.hf]
    digests = [hashlib.sha256() for _ in sizes]
    part, left = 0, sizes[0]
    for piece in megatron.pieces(mapping):
        while piece.shape[0] and part < len(sizes):
            taken, piece = piece[:left], piece[left:]
            digests[part].update(as_bytes(taken))
            left -= taken.shape[0]
            if left == 0:
                part += 1
                left = sizes[part] if part < len(sizes) else 0
        if piece.count_nonzero():
            raise _Failed(f"{mapping.megatron}: the vocabulary's padding is not zero")
    return [digest.hexdigest() for digest in digests]


def _hash(hf: HFTensors, name: str, dtype: torch.dtype) -> str:
    """Hex sha256 of a Hugging Face tensor in `dtype`, a piece at a time."""
    size = hf.size(name)
    step = max(1, PIECE_BYTES // (torch.Size(size[1:]).numel() * dtype.itemsize))
    digest = hashlib.sha256()
    for row in range(0, size[0], step):
        piece = torch.empty(min(step, size[0] - row), *size[1:], dtype=dtype)
        hf.read_rows(name, row, piece)
        digest.update(as_bytes(piece))
    return digest.hexdigest()


def _refuse_differing(names: list[str]) -> None:
    if names:
        raise _Failed(f"{names[0]} differs" + (f", and {len(names) - 1} more" if len(names) > 1 else ""))


def _compare_export(
    certificate: Certificate, hf_dir: Path, exported: HFTensors, shape: LlamaShape, workers: int
) -> str:
    """The export's tensors and tokenizer files against the source's."""
    dtype = exported.dtype(certificate.tensors)
    if dtype is None:
        raise _Failed(f"{exported.hf_dir}: the weights have several dtypes")
    original = HFTensors(hf_dir)
    names = list(certificate.tensors)
    with ThreadPoolExecutor(workers) as pool:
        same = pool.map(lambda name: _hash(original, name, dtype) == _hash(exported, name, dtype), names)
        _refuse_differing([name for name, equal in zip(names, same, strict=True) if not equal])
    copied = [name for name in COMPANIONS if (hf_dir / name).is_file()]
    for name in copied:
        other = exported.hf_dir / name
        if not other.is_file() or other.read_bytes() != (hf_dir / name).read_bytes():
            raise _Failed(f"{other}: is not {hf_dir / name}")
    return f"the export's tensors and {len(copied)} tokenizer and generation files are the same"


def _parallel_sizes(shape: LlamaShape) -> list[ParallelConfig]:
    """The smallest tensor- and pipeline-parallel sizes above 1 that the model divides by, each alone."""
    sizes = []
    for size in range(2, max(shape.num_kv_heads, shape.num_layers) + 1):
        if not (shape.num_kv_heads % size or shape.num_heads % size or shape.ffn_hidden_size % size):
            sizes.append(ParallelConfig(tensor_parallel_size=size))
            break
    for size in range(2, shape.num_layers + 1):
        if shape.num_layers % size == 0:
            sizes.append(ParallelConfig(pipeline_parallel_size=size))
            break
    return sizes


def _compare_parts(
    hf: HFTensors, megatron: MegatronTensors, shape: LlamaShape, parallel: ParallelConfig, workers: int
) -> str:
    """What each rank of `parallel` would load, in Megatron's own words, against the same part of the source."""
    try:
        prove_shapes(shape, parallel)
    except AssertionError as error:
        raise _Failed(str(error)) from None
    requests: list[Request] = []
    for rank in range(len(model_ranks(parallel))):
        with meta_rank(shape, parallel, rank) as chunks:
            requests += checkpoint_requests(chunks)
    by_key = {checkpoint_key(mapping.megatron): mapping for mapping in mappings(shape)}
    dtype = megatron.dtype(shape)
    assert dtype is not None

    def same(request: Request) -> bool:
        layered = request.key.startswith("decoder.layers.")
        mapping = by_key[request.key, request.offsets[0] if layered else None]
        skip = 1 if layered else 0
        row, *column = request.offsets[skip:]
        rows, *inner = request.sizes[skip:]
        whole_row = hf_size(mapping.hf[0], shape)[1:]
        step = max(1, PIECE_BYTES // (torch.Size(whole_row).numel() * dtype.itemsize))
        for first in range(row, row + rows, step):
            count = min(step, row + rows - first)
            expected = torch.empty(count, *whole_row, dtype=dtype)
            read_megatron_rows(hf, mapping, shape, first, expected)
            if column:
                expected = expected[:, column[0] : column[0] + inner[0]]
            offsets = (*request.offsets[:skip], first, *column)
            found = megatron.region(request.key, offsets, (*request.sizes[:skip], count, *inner))
            if not torch.equal(found.view(count, *inner), expected):
                return False
        return True

    unique = sorted(set(requests), key=lambda request: (request.key, request.offsets))
    with ThreadPoolExecutor(workers) as pool:
        wrong = [request for request, equal in zip(unique, pool.map(same, unique), strict=True) if not equal]
    _refuse_differing([f"{request.key} at {request.offsets}" for request in wrong])
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    return f"the {tp * pp} ranks' parts at tp {tp} pp {pp} make the whole"


def _compare_configs(hf_dir: Path, others: Iterable[Path | None], shape: LlamaShape) -> str:
    """config.json field by field, and the fields that Megatron's model is built with."""
    original = json.loads((hf_dir / "config.json").read_text(encoding="utf-8"))
    fields = sorted(set(original) - _NOT_THE_MODEL)
    for other in others:
        if other is None or not (other / "config.json").is_file():
            continue  # a training checkpoint has none
        copy = json.loads((other / "config.json").read_text(encoding="utf-8"))
        for name in sorted(set(original) | set(copy)):
            if name not in _NOT_THE_MODEL and original.get(name) != copy.get(name):
                raise _Failed(f"{other}/config.json: {name} is {copy.get(name)!r}, was {original.get(name)!r}")
    compared = _compare_megatron_fields(hf_dir, shape)
    return f"{len(fields)} fields of config.json and {compared} of Megatron's model are the same"


def _compare_megatron_fields(hf_dir: Path, shape: LlamaShape) -> int:
    """transformers' reading of config.json against the model that Megatron builds; returns how many values."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig.from_pretrained(hf_dir)
    ours = transformer_config(shape, ParallelConfig(), PrecisionConfig(dtype="bf16"), cpu=on_cpu())
    with meta_rank(shape, ParallelConfig(), 0) as (model,):
        pairs = {
            "num_hidden_layers": (theirs.num_hidden_layers, len(model.decoder.layers)),
            "hidden_size": (theirs.hidden_size, ours.hidden_size),
            "intermediate_size": (theirs.intermediate_size, ours.ffn_hidden_size),
            "num_attention_heads": (theirs.num_attention_heads, ours.num_attention_heads),
            "num_key_value_heads": (theirs.num_key_value_heads, ours.num_query_groups),
            "head_dim": (theirs.head_dim, ours.kv_channels),
            "rms_norm_eps": (theirs.rms_norm_eps, ours.layernorm_epsilon),
            "max_position_embeddings": (theirs.max_position_embeddings, model.max_sequence_length),
            "tie_word_embeddings": (theirs.tie_word_embeddings, model.share_embeddings_and_output_weights),
            "attention_bias": (theirs.attention_bias, ours.add_bias_linear or ours.add_qkv_bias),
            "attention_dropout": (theirs.attention_dropout, ours.attention_dropout),
        }
        frequencies = model.rotary_pos_emb.inv_freq.float().cpu()
    for name, (there, here) in pairs.items():
        if there != here:
            raise _Failed(f"{name} is {there!r} in config.json and {here!r} in Megatron's model")
    # The frequencies are what theta, scaling type, factor and original length come down to.
    expected = LlamaRotaryEmbedding(theirs).inv_freq.float().cpu()
    if not torch.allclose(frequencies, expected, rtol=1e-6, atol=0.0):
        raise _Failed("the rotary frequencies of Megatron's model are not those of config.json")
    return len(pairs) + expected.numel()


def _check_logits(
    certificate: Certificate, hf_dir: Path, megatron_dir: Path, shape: LlamaShape, prompts: Sequence[str], wanted: str
) -> None:
    reason = why_too_large(shape) if wanted == "auto" else None
    if not certificate.passed:
        reason = "another check failed"
    if wanted == "off" or reason is not None:
        detail = "logits not compared" + (f" ({reason})" if reason else "")
        certificate.checks.append({"check": "logits", "passed": None, "detail": detail})
        return

    def check() -> str:
        found = compare_logits(hf_dir, megatron_dir, shape, prompts)
        if not found.within:
            raise _Failed(f"they differ by up to {found.difference:.2g} at logits of up to {found.largest:.3g}")
        how = f"within {found.difference:.1g}" if found.difference else "equal"
        return f"logits {how} on {found.tokens} tokens of {found.prompts} prompts"

    certificate.run("logits", check)
