"""Engines: tokens in, tokens and log-probabilities out."""

from __future__ import annotations

from pathlib import Path

from astro_hpc.config.schema import InferenceConfig
from astro_hpc.inference.engine import Engine


def make_engine(model_dir: Path, cfg: InferenceConfig, seed: int = 0) -> Engine:
    """The engine that `cfg.engine` names, with the weights and tokenizer of the Hugging Face folder `model_dir`.

    A process should hold one vLLM engine at a time; close it before making the next.

    Raises:
        ConfigError: the folder is no model, or the engine refuses the configuration.
    """
    if cfg.engine == "scripted":
        from astro_hpc.inference.scripted import ScriptedEngine

        return ScriptedEngine(max_model_len=cfg.max_model_len)
    from astro_hpc.inference.vllm_engine import VLLMEngine

    return VLLMEngine(model_dir, cfg, seed)
