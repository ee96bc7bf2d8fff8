"""Megatron-Core's GPTModel as a Llama: Transformer Engine's layer spec where it is, our own parts elsewhere."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from astro_hpc.config.schema import ParallelConfig, PrecisionConfig
from astro_hpc.model.cpu import device, megatron_device, on_cpu
from astro_hpc.model.llama import LlamaShape, transformer_config
from astro_hpc.model.parallel import context_rows
from astro_hpc.model.precision import has_transformer_engine, params_dtype
from astro_hpc.model.sizes import padded_vocab_size


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm that also works with sequence parallelism, which Megatron's local norm refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Tells Megatron to add up this weight's gradient over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(torch.nn.Module):
    """Causal grouped-query attention, each packed sequence by itself, by PyTorch's scaled_dot_product_attention.

    Megatron's local attention refuses packed (thd) input, which is the only form training uses here. With context
    parallelism a rank has two pieces of each sequence (`context_rows`); it gathers the keys and values of all.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [tokens, heads, head_dim]; key and value: [tokens, kv_heads, head_dim]. This rank's tokens.
            packed_seq_params: `cu_seqlens_q_padded`, or else `cu_seqlens_q`, holds the whole sequences' bounds.

        Returns:
            [tokens, heads * head_dim]
        """
        bounds = packed_seq_params.cu_seqlens_q_padded
        bounds = packed_seq_params.cu_seqlens_q if bounds is None else bounds
        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), group.rank()
        if size > 1:
            key, value = _gather_context(torch.cat((key, value), dim=-1), bounds, group).chunk(2, dim=-1)
        # [tokens, heads, dim] -> [1, heads, tokens, dim]; views, no copies.
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        parts = []
        done = 0
        for start, end in itertools.pairwise(bounds.tolist()):
            for first, last in _own_pieces(end - start, rank, size):
                parts.append(
                    self._attend(
                        query[:, :, done : done + last - first],
                        key[:, :, start : start + last],
                        value[:, :, start : start + last],
                    )
                )
                done += last - first
        # [1, heads, part, dim] -> [tokens, heads * dim]
        return torch.cat([part[0].transpose(0, 1) for part in parts]).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries that are the last of the keys' positions."""
        queries, keys = query.shape[2], key.shape[2]
        mask = None
        if queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=self.grouped
        )


def _own_pieces(length: int, rank: int, size: int) -> list[tuple[int, int]]:
    """The positions of one sequence that context-parallel rank `rank` has, as `context_rows` lays them out."""
    if size == 1:
        return [(0, length)]
    piece = length // (2 * size)
    return [(number * piece, (number + 1) * piece) for number in (rank, 2 * size - 1 - rank)]


def _gather_context(tensor: torch.Tensor, bounds: torch.Tensor, group: Any) -> torch.Tensor:
    """All context-parallel ranks' rows in the pack's order; the gradient is added up and given back to their owners."""
    rows = torch.cat([context_rows(bounds, rank, group.size()) for rank in range(group.size())])
    gathered = gather_from_sequence_parallel_region(tensor, group=group)
    return gathered.index_select(0, rows.argsort())


def layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules | ModuleSpec:
    """The spec of this rank's layers: Transformer Engine's, or Megatron's local layers with our norm and attention."""
    if has_transformer_engine() and not on_cpu():
        return get_gpt_layer_with_transformer_engine_spec()
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def build_model(
    shape: LlamaShape, parallel: ParallelConfig, precision: PrecisionConfig, where: torch.device | None = None
) -> list[GPTModel]:
    """This rank's model chunks (one, or as many as virtual pipeline stages), weights not yet set.

    Megatron's parallel state must be initialised.

    Args:
        where: the device to build on, by default this rank's; `meta` gives shapes without memory.
    """
    where = where or device()
    config = transformer_config(shape, parallel, precision, cpu=on_cpu())
    virtual = parallel.virtual_pipeline_parallel_size
    chunks = []
    with megatron_device():
        for vp_stage in range(virtual) if virtual else [None]:
            first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
            last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
            model = GPTModel(
                config=config,
                transformer_layer_spec=layer_spec(config, vp_stage),
                vocab_size=padded_vocab_size(shape.vocab_size, parallel.tensor_parallel_size),
                max_sequence_length=shape.max_position_embeddings,
                pre_process=first,
                post_process=last,
                parallel_output=True,
                share_embeddings_and_output_weights=shape.tied,
                position_embedding_type="rope",
                rotary_base=shape.rope_theta,
                rope_scaling=shape.rope_scaling_factor is not None,
                rope_scaling_factor=shape.rope_scaling_factor or 1.0,
                vp_stage=vp_stage,
            )
            _mark_split_weights(model)
            chunks.append(model.to(device=where, dtype=params_dtype(precision)))
    return chunks


def _mark_split_weights(model: torch.nn.Module) -> None:
    """Say which weights tensor-parallel ranks have parts of; the gradient norm counts all others on one rank only.

    Megatron's own layers do it while they draw initial values, which is left out here.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear)):
            weight = module.weight
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                dim = 1 if isinstance(module, RowParallelLinear) else 0
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
