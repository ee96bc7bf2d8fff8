"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError


def load_tokenizer(hf_dir: Path) -> Any:
    """The tokenizer of a Hugging Face folder; code inside the folder is not run.

    Raises:
        ConfigError: the folder has none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(hf_dir), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{hf_dir}: no usable tokenizer ({reason}); copy tokenizer.json into it") from None
