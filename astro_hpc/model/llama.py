"""The shape of a Llama model, read from a Hugging Face `config.json`. Importable without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ParallelConfig, PrecisionConfig

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

# Megatron-Core's RotaryEmbedding takes only the factor of Llama 3's scaling; the rest is fixed in its code.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Fields that must have one value, because Megatron's Llama block or our conversion has no place for another.
_FIXED_FIELDS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama model; all counts of elements, not bytes."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None
    """Factor of Llama 3's RoPE scaling; None: no scaling."""
    tied: bool
    """Whether the output layer is the embedding."""

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones once, without vocabulary padding."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    @classmethod
    def from_hf(cls, hf_dir: Path) -> LlamaShape:
        """Read `hf_dir/config.json`.

        Raises:
            ConfigError: the file is missing or not JSON, or the model is not a Llama that Megatron-Core can represent.
        """
        path = Path(hf_dir) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: can't be read ({error.strerror}); give a Hugging Face model folder") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON ({error}); restore the file") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: expected a JSON object")
        return cls.from_config(config, where=str(path))

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> LlamaShape:
        """Read the fields of a Hugging Face Llama configuration (the forms of transformers 4 and 5).

        Raises:
            ConfigError: a field is missing, wrong, or has a value that can't be represented; it is named.
        """
        if config.get("model_type") != "llama":
            raise ConfigError(f"{where}: model_type is {config.get('model_type')!r}; only Llama models can be trained")
        architectures = config.get("architectures") or ["LlamaForCausalLM"]
        if architectures != ["LlamaForCausalLM"]:
            raise ConfigError(f"{where}: architectures is {architectures}; only LlamaForCausalLM can be trained")
        for name, wanted in _FIXED_FIELDS.items():
            if config.get(name, wanted) not in (wanted, None):
                raise ConfigError(f"{where}: {name} is {config[name]!r}; only {wanted!r} can be represented")

        def size(name: str, default: int | None = None) -> int:
            value = config.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"{where}: {name} is {value!r}; expected a positive integer")
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(f"{where}: num_key_value_heads {kv_heads} doesn't divide num_attention_heads {heads}")
        if config.get("head_dim") is None and hidden % heads:
            raise ConfigError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        theta, factor = _rope(config, where)
        return cls(
            num_layers=size("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=size("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=size("head_dim", hidden // heads),
            vocab_size=size("vocab_size"),
            max_position_embeddings=size("max_position_embeddings", 2048),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling_factor=factor,
            tied=bool(config.get("tie_word_embeddings", False)),
        )


def _rope(config: dict[str, Any], where: str) -> tuple[float, float | None]:
    """(theta, factor of Llama 3's scaling or None)."""
    rope: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor is {partial!r}; only 1.0 can be represented")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"{where}: rope_type is {kind!r}; only 'default' and 'llama3' can be represented")
    for name, wanted in _LLAMA3_ROPE.items():
        if rope.get(name, wanted) != wanted:
            raise ConfigError(f"{where}: rope {name} is {rope[name]!r}; Megatron-Core has {wanted} built in")
    return theta, float(rope.get("factor", 8.0))


def transformer_config(
    shape: LlamaShape, parallel: ParallelConfig, precision: PrecisionConfig, *, cpu: bool
) -> TransformerConfig:
    """Megatron-Core's configuration of the model.

    Losses are summed over micro-batches and data-parallel ranks (`calculate_per_token_loss`); the caller normalises.

    Args:
        cpu: train without CUDA: gloo, and no fused kernels.

    Raises:
        ConfigError: the precision can't be had, with this Megatron-Core or on this machine.
    """
    import torch
    from megatron.core.transformer import TransformerConfig

    from astro_hpc.model.libraries import has_fused_weight_gradient
    from astro_hpc.model.precision import check_edge_layers, fields_here, has_transformer_engine

    pipeline = parallel.pipeline_parallel_size
    check_edge_layers(precision, shape.num_layers, pipeline)
    arithmetic = fields_here(precision, use_distributed_optimizer=parallel.use_distributed_optimizer)
    virtual = parallel.virtual_pipeline_parallel_size
    fields: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "layernorm_epsilon": shape.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "perform_initialization": False,  # weights are always loaded
        "calculate_per_token_loss": True,
        "tensor_model_parallel_size": parallel.tensor_parallel_size,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        # Packed sequences differ in length; for a dense model Megatron accepts that only with this dispatcher's name.
        "variable_seq_lengths": pipeline > 1,
        "moe_token_dispatcher_type": "alltoall",
        "deallocate_pipeline_outputs": pipeline > 1,
        "use_cpu_initialization": cpu,
        # On gloo the overlapped exchange gives wrong losses without a word; so does batched exchange's absence.
        "batch_p2p_comm": cpu or virtual is None,
        "batch_p2p_sync": not cpu,
        "overlap_p2p_comm": virtual is not None and not cpu,
        # TE's fused kernels come with its layer spec; these are Megatron's own and Apex's.
        "gradient_accumulation_fusion": not cpu and has_fused_weight_gradient(),
        "masked_softmax_fusion": False,
        "bias_activation_fusion": not cpu,
        "bias_dropout_fusion": not cpu,
        "cross_entropy_loss_fusion": False,
        "apply_rope_fusion": not cpu and has_transformer_engine(),
        "persist_layer_norm": False,
        **_recompute_fields(parallel),
        **arithmetic.transformer,
    }
    return TransformerConfig(**fields)


def _recompute_fields(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}
