"""One train step on Megatron-Core: forward and backward by its schedules, its gradient buffers, its optimizer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
from astro_hpc.conversion.hf import load_hf, named_hf_tensors, save_hf
from astro_hpc.model.build import build_model
from astro_hpc.model.cpu import device, megatron_device, on_cpu
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.parallel import context_rows, initialise_parallel, launched_world_size, on_any_rank
from astro_hpc.model.precision import fields_here, fp8_token_multiple, params_dtype
from astro_hpc.model.sizes import check_parallel, micro_batch_multiple, pack_multiple, sequence_multiple
from astro_hpc.training import checkpoint
from astro_hpc.training.adamw import prime_adamw, unshare_steps, use_fused_adamw
from astro_hpc.training.logprobs import RowSelector
from astro_hpc.training.packing import PackedBatch, masked_copy, pad_batch

_PLACE = "place"

LossFunction = Callable[[torch.Tensor, PackedBatch], tuple[torch.Tensor, dict[str, float]]]
"""(log-probabilities of the targets [T] float32 with gradient, batch) -> (scalar loss, numbers to add up)."""


class Trainer:
    """A Llama with its optimizer, ready to train: supervised and reinforcement learning share it."""

    def __init__(
        self,
        hf_dir: Path,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        optimizer: OptimizerConfig,
        total_steps: int,
        seed: int,
    ) -> None:
        """Build the model, load the weights of `hf_dir`, set up AdamW and its schedule over `total_steps`.

        Raises:
            ConfigError: the model, the parallel sizes or the precision can't be had here.
        """
        self.hf_dir = Path(hf_dir)
        self.shape = LlamaShape.from_hf(self.hf_dir)
        self.parallel, self.precision = parallel, precision
        check_parallel(self.shape, parallel, launched_world_size(), cpu=on_cpu())
        initialise_parallel(parallel, seed)
        with megatron_device():
            models = build_model(self.shape, parallel, precision)
            load_hf(models, self.hf_dir)
            self._config = models[0].config
            ddp = DistributedDataParallelConfig(
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                overlap_grad_reduce=False,
                **fields_here(precision, use_distributed_optimizer=parallel.use_distributed_optimizer).ddp,
            )
            self.chunks = [
                DistributedDataParallel(self._config, ddp, model, disable_bucketing=index > 0)
                for index, model in enumerate(models)
            ]
            self.optimizer = get_megatron_optimizer(_optimizer_config(optimizer, parallel, precision), self.chunks)
            use_fused_adamw(self.optimizer)
        self.scheduler = _scheduler(self.optimizer, optimizer, total_steps)
        self._config.finalize_model_grads_func = self._sum_gradients
        self.gradient_sync_seconds = 0.0
        """Of the last step, from the end of this rank's backward passes until gradients were added up over ranks."""
        self.tokens_fed = 0
        """Of the last step, this rank's packs' tokens, padding and fillers included."""
        self._config.grad_scale_func = None  # bf16 and fp32 need no loss scaling
        self._saver = checkpoint.Saver()
        self._rows = RowSelector(models[-1], enabled=not parallel.sequence_parallel)
        self._reference: list[torch.Tensor] = []

    @property
    def data_rank_and_size(self) -> tuple[int, int]:
        """This rank's place among the data-parallel ranks."""
        return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    @staticmethod
    def on_any_rank(flag: bool) -> bool:
        """Whether `flag` is true on some rank: what ranks must decide together. All call it at the same point."""
        return on_any_rank(flag)

    def train_step(self, micro_batches: Sequence[PackedBatch], loss_fn: LossFunction) -> dict[str, float]:
        """One optimizer step on the sum of the micro-batches' losses (the caller normalises).

        Gradients are accumulated in float32 and added up over data-parallel ranks, clipped by their global norm.

        Returns:
            loss (summed), grad_norm (before clipping), lr, and the sums of what `loss_fn` returned.
        """
        with megatron_device():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            outputs = self._run(micro_batches, loss_fn, forward_only=False)
            # Stepping the schedule first gives step i of n the rate at i / (n + 1): none is wasted at a rate of 0.
            self.scheduler.step(increment=1)
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            _, grad_norm, _ = self.optimizer.step()
        totals = _sum_dicts(outputs)
        return {**_reduce_metrics(totals), "grad_norm": float(grad_norm), "lr": lr}

    def skip_step(self) -> dict[str, float]:
        """What `train_step` gives where there is nothing to train on: the schedule moves on, nothing else changes."""
        self.scheduler.step(increment=1)
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return {"loss": 0.0, "grad_norm": 0.0, "lr": lr}

    def evaluate(self, micro_batches: Sequence[PackedBatch], loss_fn: LossFunction) -> dict[str, float]:
        """What `train_step` would give for loss and the sums of what `loss_fn` returned; nothing is trained."""
        with megatron_device(), torch.no_grad():
            outputs = self._run(micro_batches, loss_fn, forward_only=True)
        return _reduce_metrics(_sum_dicts(outputs))

    def token_logprobs(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probability of each target where `loss_mask` is not 0, elsewhere 0: [T] float32, no gradient.

        With pipeline parallelism only the last stage has it; the others return zeros.
        """
        found: list[tuple[PackedBatch, torch.Tensor]] = []

        def keep(logprobs: torch.Tensor, local: PackedBatch) -> tuple[torch.Tensor, dict[str, float]]:
            found.append((local, logprobs))
            return logprobs.sum(), {}

        # The rows' places in `batch` travel with them through padding and splitting.
        places = torch.arange(1, batch.num_tokens + 1, dtype=torch.float64)
        with megatron_device(), torch.no_grad():
            self._run([replace(batch, extras={_PLACE: places})], keep, forward_only=True)
            kept = torch.zeros(batch.num_tokens + 1, dtype=torch.float32, device=device())
            if found:
                local, logprobs = found[0]
                kept[local.extras[_PLACE].long()] = logprobs
            group = parallel_state.get_context_parallel_group()
            if group.size() > 1:
                torch.distributed.all_reduce(kept, group=group)
        return kept[1:]

    def token_logprobs_of(self, batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        """`token_logprobs` of each."""
        return [self.token_logprobs(batch) for batch in batches]

    def remember_reference(self) -> None:
        """Keep a copy of the current weights in main memory, for `reference_logprobs_of`."""
        self._reference = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters()]

    def reference_logprobs_of(self, batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        """`token_logprobs_of` by the remembered weights, which take the model's place for as long as it takes."""
        self._swap_reference()
        try:
            return self.token_logprobs_of(batches)
        finally:
            self._swap_reference()

    def _swap_reference(self) -> None:
        with torch.no_grad():
            for parameter, kept in zip(self._parameters(), self._reference, strict=True):
                current = parameter.detach().to("cpu", copy=True)
                parameter.copy_(kept)
                kept.copy_(current)

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for chunk in self.chunks for parameter in chunk.parameters())

    def named_hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The current weights by Hugging Face name; see `conversion.hf.named_hf_tensors`."""
        return named_hf_tensors(self.chunks, self.shape)

    def export_hf(self, out_dir: Path) -> Path:
        """Write the current weights as a Hugging Face folder, in the precision they are trained in.

        Rounding float32 weights to bfloat16 would undo small updates: what is evaluated would not be what was trained.
        """
        return save_hf(self.chunks, self.hf_dir, out_dir, params_dtype(self.precision))

    def save_checkpoint(
        self,
        folder: Path,
        step: int,
        loader_state: dict[str, Any],
        keep_last: int = 2,
        asynchronous: bool = False,
        keep_every: int | None = None,
    ) -> None:
        """Save model, optimizer, schedule, random state, `step` and `loader_state` (JSON values) under `folder`.

        The `keep_last` newest checkpoints and those of steps that `keep_every` divides stay.

        Asynchronous: returns when a snapshot is taken; `finish_checkpoint` publishes it. Otherwise returns when
        everything is on disk and `latest` names it.
        """
        state = {
            "loader": loader_state,
            "scheduler": self.scheduler.state_dict(),
            "parallel": self.parallel.model_dump(mode="json"),
        }
        with megatron_device():
            self._saver.start(folder, step, self._sharded_state(with_rng=True), state, keep_last, keep_every)
            self._saver.finish(block=not asynchronous)

    def finish_checkpoint(self, block: bool = True) -> bool:
        """Publish the checkpoint being written, if it is ready; returns whether none is pending. Cheap: call each step.

        With several ranks, all call it at the same step.
        """
        with megatron_device():
            return self._saver.finish(block)

    def load_checkpoint(self, folder: Path) -> tuple[int, dict[str, Any]] | None:
        """Go on from the newest whole checkpoint in `folder`: (step, loader_state); None when there is none.

        Tensor-, pipeline- and data-parallel sizes may differ from the run that saved it.
        """
        path = checkpoint.find(folder)
        if path is None:
            return None
        state = checkpoint.read_state(path)
        if "parallel" not in state:
            raise ConfigError(f"{path}: was saved by an earlier version of astro_hpc; remove it to start anew")
        saved_by = ParallelConfig.model_validate(state["parallel"])
        if saved_by.use_distributed_optimizer != self.parallel.use_distributed_optimizer:
            was = str(saved_by.use_distributed_optimizer).lower()
            raise ConfigError(
                f"{path}: was saved with parallel.use_distributed_optimizer={was}, whose optimizer state has another "
                "form; set it so again"
            )
        # Random states belong to places in the model: they are of use only where these are the same.
        same_places = _places(saved_by) == _places(self.parallel)
        with megatron_device():
            prime_adamw(self.optimizer)
            loaded = checkpoint.load(path, self._sharded_state(is_loading=True, with_rng=same_places))
            for key, chunk in zip(self._model_keys(), self.chunks, strict=True):
                chunk.module.load_state_dict(loaded[key])
            self.optimizer.load_state_dict(loaded["optimizer"])
            unshare_steps(self.optimizer)
            use_fused_adamw(self.optimizer)
            if same_places:
                get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])
                torch.set_rng_state(loaded["rng"]["torch"])
        self.scheduler.load_state_dict(state["scheduler"])
        return state["step"], state["loader"]

    def _sum_gradients(self, model: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
        """Megatron's reduction of gradients, timed; without its division by the tokens, since losses add up here."""
        _wait_for_device()
        began = time.monotonic()
        finalize_model_grads(model, None, **kwargs)
        _wait_for_device()
        self.gradient_sync_seconds = time.monotonic() - began

    def _model_keys(self) -> list[str]:
        return ["model"] if len(self.chunks) == 1 else [f"model{index}" for index in range(len(self.chunks))]

    def _sharded_state(self, *, is_loading: bool = False, with_rng: bool) -> dict[str, Any]:
        """Megatron's sharded state dict; torch_dist reshards it on loading."""
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            # One data-parallel rank gathers the optimizer's state, in host memory; else every rank's GPU would.
            "distrib_optim_fully_reshardable_mem_efficient": True,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        state: dict[str, Any] = {
            key: chunk.module.sharded_state_dict(metadata=metadata)
            for key, chunk in zip(self._model_keys(), self.chunks, strict=True)
        }
        models = state["model"] if len(self.chunks) == 1 else dict(state)
        state["optimizer"] = self.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
        if with_rng:
            state["rng"] = _sharded_rng()
        return state

    def _run(
        self, micro_batches: Sequence[PackedBatch], loss_fn: LossFunction, *, forward_only: bool
    ) -> list[dict[str, float]]:
        """Megatron's schedule over the micro-batches; returns their metrics (on the last pipeline stage)."""

        def forward_step(batches: Iterator[PackedBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            batch = next(batches)
            self._rows.select(batch.loss_mask)
            output = chunk(batch.tokens[None], batch.position_ids[None], None, packed_seq_params=_packed_params(batch))

            def loss_of(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
                logprobs = self._rows.scatter(logits[0], batch, self.shape.vocab_size)
                loss, metrics = loss_fn(logprobs, batch)
                # Megatron divides by nothing with calculate_per_token_loss; the token count would only be added up.
                return loss, torch.zeros((), dtype=torch.int, device=loss.device), {"loss": loss.detach(), **metrics}

            return output, loss_of

        fillers = -len(micro_batches) % micro_batch_multiple(self.parallel)
        batches = [self._own_part(batch) for batch in micro_batches]
        batches += [masked_copy(batches[0])] * fillers
        self.tokens_fed = sum(int(batch.bounds[-1]) for batch in batches)
        streams = [iter(batches) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=streams if len(streams) > 1 else streams[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=max(int(batch.bounds[-1]) for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _own_part(self, batch: PackedBatch) -> PackedBatch:
        """Of the batch, padded as the parallel sizes want it, this context-parallel rank's tokens, on its device."""
        whole = pack_multiple(self.parallel, fp8_token_multiple(self.precision))
        batch = pad_batch(batch, sequence_multiple(self.parallel), whole)
        group = parallel_state.get_context_parallel_group()
        if group.size() > 1:
            batch = batch.take(context_rows(batch.bounds, group.rank(), group.size()))
        return _to_device(batch)


def _optimizer_config(
    optimizer: OptimizerConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> MegatronOptimizerConfig:
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        # Megatron computes the norm only when it clips; an unreachable limit keeps the norm in the metrics.
        clip_grad=optimizer.clip_grad or float("inf"),
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        **fields_here(precision, use_distributed_optimizer=parallel.use_distributed_optimizer).optimizer,
    )


def _scheduler(optimizer: Any, config: OptimizerConfig, total_steps: int) -> OptimizerParamScheduler:
    """Warm-up and decay over `total_steps` calls of step(); the decay would end one step after the last."""
    decay_steps = total_steps + 1
    warmup = min(round(config.lr_warmup_fraction * total_steps), decay_steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay_steps,
        lr_decay_style=config.lr_schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
    )


def _places(parallel: ParallelConfig) -> tuple[int, ...]:
    """What a random state belongs to, besides the rank's coordinates."""
    return (parallel.tensor_parallel_size, parallel.pipeline_parallel_size)


def _sharded_rng() -> ShardedObject:
    """This rank's random states: one a tensor- and pipeline-parallel place, equal over the data-parallel ranks."""
    mpu = parallel_state
    return ShardedObject(
        "rng",
        {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()},
        (mpu.get_pipeline_model_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()),
        (mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank()),
        replica_id=mpu.get_data_parallel_rank(with_context_parallel=True),
    )


def _packed_params(batch: PackedBatch) -> PackedSeqParams:
    # The longest example exactly: Megatron takes a rotary table as long as the pack for one of running positions.
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=batch.cu_seqlens_padded,
        cu_seqlens_kv_padded=batch.cu_seqlens_padded,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def _wait_for_device() -> None:
    if not on_cpu():
        torch.cuda.synchronize()


def _to_device(batch: PackedBatch) -> PackedBatch:
    if on_cpu():
        return batch
    where = device()

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(where, non_blocking=True)

    return replace(
        batch.map_tokens(move),
        cu_seqlens=move(batch.cu_seqlens),
        cu_seqlens_padded=None if batch.cu_seqlens_padded is None else move(batch.cu_seqlens_padded),
    )


def _sum_dicts(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Add up by name; names that start with `max_` are maximised."""
    totals: dict[str, float] = {}
    for name, value in itertools.chain.from_iterable(row.items() for row in rows):
        number = float(value)
        totals[name] = (
            max(totals.get(name, number), number) if name.startswith("max_") else totals.get(name, 0.0) + number
        )
    return totals


def _reduce_metrics(totals: dict[str, float]) -> dict[str, float]:
    """Add up over data-parallel ranks; give the last pipeline stage's numbers to all stages."""
    if torch.distributed.get_world_size() == 1:
        return totals
    gathered: list[dict[str, float] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, totals)
    # Tensor-parallel ranks of one data-parallel rank report the same numbers: count each once.
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rows = [row for row in gathered if row]
    return _sum_dicts([{n: v if n.startswith("max_") else v / tp for n, v in row.items()} for row in rows])
