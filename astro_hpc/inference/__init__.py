"""Engines: tokens in, tokens and log-probabilities out."""

from __future__ import annotations

from pathlib import Path

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig
from astro_hpc.inference.engine import Engine


def make_engine(
    model_dir: Path, cfg: InferenceConfig, seed: int = 0, log_dir: Path | None = None, gpus_taken: int = 0
) -> Engine:
    """The engine that `cfg.engine` names, with the weights and tokenizer of the Hugging Face folder `model_dir`.

    A process should hold one vLLM engine at a time; close it before making the next. All stages make theirs here.

    Args:
        log_dir: where the processes of an engine that has its own write what they have to say.
        gpus_taken: so many GPUs, the first, are the caller's own; servers that are started get the next ones.

    Raises:
        ConfigError: the folder is no model, the engine refuses the configuration, or a server can't be used.
    """
    if cfg.engine == "scripted":
        from astro_hpc.inference.scripted import ScriptedEngine

        return ScriptedEngine(max_model_len=cfg.max_model_len)
    if (model_dir / ".metadata").is_file():
        raise ConfigError(
            f"{model_dir}: a Megatron checkpoint, which only training starts from; give engines the Hugging Face "
            f"folder that `astro-hpc convert export {model_dir} OUT` makes"
        )
    if cfg.engine == "vllm-server":
        from astro_hpc.inference.server_engine import VLLMServerEngine

        return VLLMServerEngine(model_dir, cfg, seed, log_dir, gpus_taken)
    from astro_hpc.inference.vllm_engine import VLLMEngine

    return VLLMEngine(model_dir, cfg, seed)
