"""What of the RL settings can be refused before anything runs: where a run is launched from there may be no torch."""

from __future__ import annotations

from astro_hpc.config import ConfigError
from astro_hpc.config.schema import RunConfig


def check_settings(cfg: RunConfig) -> None:
    """Refuse settings that would be wrong or could not work.

    Raises:
        ConfigError: names the setting, the numbers and a remedy.
    """
    settings, max_model_len = cfg.rl, cfg.inference.max_model_len
    if settings.temperature != 1.0:
        raise ConfigError(
            f"rl.temperature={settings.temperature}: the trainer's log-probabilities are at temperature 1, so the "
            f"importance ratio would be wrong; set it to 1.0"
        )
    if settings.top_p != 1.0:
        raise ConfigError(
            f"rl.top_p={settings.top_p}: the engine's log-probabilities are of the whole distribution, so the "
            f"importance ratio would be off by the mass that top-p cuts off; set it to 1.0"
        )
    responses = settings.prompts_per_step * settings.group_size
    if responses % settings.mini_batches:
        raise ConfigError(
            f"rl.mini_batches={settings.mini_batches} does not divide the {responses} responses of a step "
            f"(prompts_per_step={settings.prompts_per_step} x group_size={settings.group_size}); choose a divisor"
        )
    if settings.seq_length < max_model_len - 1:
        raise ConfigError(
            f"rl.seq_length={settings.seq_length} can't hold every prompt and response of up to "
            f"inference.max_model_len={max_model_len} tokens; raise it to {max_model_len}"
        )
    if settings.max_response_tokens >= max_model_len:
        raise ConfigError(
            f"rl.max_response_tokens={settings.max_response_tokens} leaves no room for a prompt in "
            f"inference.max_model_len={max_model_len}; lower it or raise max_model_len"
        )
    if settings.weight_sync == "broadcast" and cfg.inference.engine != "vllm-server" and settings.replay is None:
        raise ConfigError(
            f"rl.weight_sync=broadcast sends weights to servers, and inference.engine is {cfg.inference.engine}; "
            "set weight_sync to memory, or engine to vllm-server"
        )
