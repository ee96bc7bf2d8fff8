"""How vLLM is set up, inside a stage's process and in a server's alike: environment and engine arguments."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig

_CPU_BLOCK_SIZE = 32
"""vLLM's CPU default is 128, and only whole blocks are cached: short steps would share nothing."""


def prepare_environment() -> None:
    """Set what vLLM and torch read from the environment; call before vLLM is imported. What the user has set stays.

    Called before torch is imported too, it also silences torch's warning that memory is bound to a NUMA node.
    """
    settings = {
        "VLLM_LOGGING_LEVEL": "ERROR",  # its chatter would drown the progress bar
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)

    import torch

    if not torch.cuda.is_available():
        # One process: starts in 5 s, not 48, and takes weights from memory.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    # vLLM speaks before it has configured its loggers.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*", category=FutureWarning)


def engine_settings(model_dir: Path, cfg: InferenceConfig, seed: int) -> dict[str, Any]:
    """vLLM's engine arguments for this machine.

    Raises:
        ConfigError: something is asked for that this machine can't do.
    """
    import torch

    on_cpu = not torch.cuda.is_available()
    settings: dict[str, Any] = {
        "model": str(model_dir),
        "dtype": cfg.dtype,
        "seed": seed % 2**31,
        "max_model_len": cfg.max_model_len,
        "max_num_seqs": cfg.max_num_seqs,
        "tensor_parallel_size": cfg.tensor_parallel_size,
        "quantization": cfg.quantization,
        "block_size": cfg.block_size or (_CPU_BLOCK_SIZE if on_cpu else None),
        "enable_prefix_caching": True,
        "generation_config": "vllm",  # the folder's generation_config.json would change temperature and top-p
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if on_cpu:
        if cfg.quantization is not None:
            raise ConfigError(f"inference.quantization={cfg.quantization} needs an NVIDIA GPU; remove it")
        # A prompt in two parts makes vLLM 0.32 turn a seeded request's generator back, which CPU generators can't.
        settings |= {"enable_chunked_prefill": False}
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": int(cfg.cpu_kv_cache_gb * 2**30)}
        if cfg.dtype == "auto" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            settings["dtype"] = "float32"  # bfloat16 without its instructions is several times slower
    else:
        settings["gpu_memory_utilization"] = cfg.gpu_memory_utilization
    return settings
