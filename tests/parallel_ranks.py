"""Trains tiny models under many parallel sizes: parallel_ranks.py FOLDER.

Python, torch and Megatron are imported once; each group of ranks is forked from the warmed-up process and works
through its cases one after the other. FOLDER holds the models; results appear as CASE.json and CASE.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import random_examples

from astro_hpc.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
from astro_hpc.model.cpu import megatron_device
from astro_hpc.run.process import die_with_parent
from astro_hpc.training.packing import PackedBatch, pack_examples
from astro_hpc.training.trainer import Trainer

STEPS, SAVED_STEP, LR = 3, 2, 1e-2
VOCAB_SIZE = 300


@dataclass(frozen=True)
class Case:
    """One way to train."""

    name: str
    world_size: int
    sizes: dict[str, Any] = field(default_factory=dict)
    model: str = "untied"
    dtype: str = "fp32"
    saves: bool = False
    """Saves a checkpoint after the second step."""
    loads: str = ""
    """Starts from the checkpoint of this case."""

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(**self.sizes)


def _sizes(**values: Any) -> dict[str, Any]:
    names = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "cp": "context"}
    long = {f"{names[key]}_parallel_size": values.pop(key) for key in list(values) if key in names}
    if values.pop("sp", False):
        long["sequence_parallel"] = True
    if values.pop("dist", False):
        long["use_distributed_optimizer"] = True
    return long | values


CASES = [
    # What all others are compared with.
    Case("one", 1, saves=True),
    Case("one-tied", 1, model="tied"),
    Case("one-bf16", 1, dtype="bf16"),
    Case("recompute-full", 1, _sizes(recompute="full")),
    Case("recompute-selective", 1, _sizes(recompute="selective")),
    Case("recompute-full-bf16", 1, _sizes(recompute="full"), dtype="bf16"),
    # Two ranks.
    Case("tp2", 2, _sizes(tp=2), saves=True),
    Case("tp2-tied", 2, _sizes(tp=2), model="tied"),
    Case("tp2-sp", 2, _sizes(tp=2, sp=True)),
    Case("tp2-sp-recompute-full", 2, _sizes(tp=2, sp=True, recompute="full")),
    Case("pp2", 2, _sizes(pp=2)),
    Case("pp2-tied", 2, _sizes(pp=2), model="tied"),
    Case("cp2", 2, _sizes(cp=2)),
    Case("cp2-recompute-selective", 2, _sizes(cp=2, recompute="selective")),
    Case("dp2", 2, saves=True),
    Case("dp2-dist", 2, _sizes(dist=True), saves=True),
    Case("dp2-dist-bf16", 2, _sizes(dist=True), dtype="bf16", saves=True),
    Case("dp2-resumed", 2, loads="dp2"),
    Case("dp2-dist-resumed", 2, _sizes(dist=True), loads="dp2-dist"),
    Case("dp2-dist-bf16-resumed", 2, _sizes(dist=True), dtype="bf16", loads="dp2-dist-bf16"),
    Case("tp2-resumed", 2, _sizes(tp=2), loads="tp2"),
    Case("one-to-cp2", 2, _sizes(cp=2), loads="one"),
    Case("tp2-to-pp2", 2, _sizes(pp=2), loads="tp2"),
    Case("dp2-dist-to-tp2-dist", 2, _sizes(tp=2, sp=True, dist=True), loads="dp2-dist"),
    # Three.
    Case("pp3-vpp2", 3, _sizes(pp=3, vpp=2), saves=True),
    Case("pp3-vpp2-tied", 3, _sizes(pp=3, vpp=2), model="tied"),
    # Four.
    Case("tp2-pp2", 4, _sizes(tp=2, pp=2, sp=True)),
    Case("tp2-cp2", 4, _sizes(tp=2, cp=2, sp=True), saves=True),
    Case("pp2-cp2", 4, _sizes(pp=2, cp=2)),
    Case("pp2-dp2-dist", 4, _sizes(pp=2, dist=True), saves=True),
    Case("pp2-dp2-dist-tied", 4, _sizes(pp=2, dist=True), model="tied"),
    Case("dp2-dist-to-pp2-dp2-dist", 4, _sizes(pp=2, dist=True), loads="dp2-dist"),
    # Back to one.
    Case("dp2-dist-to-one", 1, _sizes(dist=True), loads="dp2-dist"),
    Case("pp2-dp2-dist-to-one", 1, _sizes(dist=True), loads="pp2-dp2-dist"),
    Case("pp3-vpp2-to-one", 1, loads="pp3-vpp2"),
    Case("tp2-cp2-to-one", 1, loads="tp2-cp2"),
]


def packs() -> list[PackedBatch]:
    """The micro-batches of every step: packs of several examples, of odd lengths, half with masked prompts."""
    return [
        pack_examples(random_examples(3, VOCAB_SIZE, seed), "completion" if seed % 2 else "all") for seed in range(4)
    ]


def num_targets() -> float:
    return float(sum(batch.loss_mask.sum() for batch in packs()))


def _loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, float]]:
    return -(logprobs * batch.loss_mask).sum() / num_targets(), {"targets": float(batch.loss_mask.sum())}


def _run(case: Case, folder: Path) -> None:
    trainer = Trainer(
        folder / case.model,
        case.parallel,
        PrecisionConfig(dtype=case.dtype),  # type: ignore[arg-type]
        OptimizerConfig(lr=LR, weight_decay=0.1, clip_grad=1.0),
        STEPS,
        seed=0,
    )
    rank, size = trainer.data_rank_and_size
    tensors = {"logprobs": _everywhere(trainer.token_logprobs(packs()[0]))}
    start = 0
    if case.loads:
        found = trainer.load_checkpoint(folder / "checkpoints" / case.loads)
        assert found == (SAVED_STEP, {"cursor": 17}), found
        start = SAVED_STEP
    results = []
    for step in range(start, STEPS):
        results.append(trainer.train_step(packs()[rank::size], _loss))
        if step == 0 and not case.parallel.use_distributed_optimizer:
            tensors |= {f"gradient.{name}": value for name, value in _gradients(trainer)}
        if step + 1 == SAVED_STEP and case.saves:
            trainer.save_checkpoint(folder / "checkpoints" / case.name, step + 1, {"cursor": 17}, asynchronous=True)
            tensors |= {f"saved.{name}": value.clone() for name, value in trainer.named_hf_tensors()}
    trainer.finish_checkpoint()
    tensors |= {f"weight.{name}": value.clone() for name, value in trainer.named_hf_tensors()}
    if torch.distributed.get_rank() == 0:
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{case.name}.safetensors")
        (folder / f"{case.name}.json").write_text(json.dumps(results))


def _everywhere(logprobs: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's log-probabilities; the other stages have zeros."""
    from megatron.core import parallel_state

    torch.distributed.all_reduce(logprobs, group=parallel_state.get_pipeline_model_parallel_group())
    return logprobs


def _gradients(trainer: Trainer) -> list[tuple[str, torch.Tensor]]:
    """The last step's gradients, after clipping, of the whole model by Hugging Face name."""
    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.main_grad.to(parameter.dtype)  # type: ignore[attr-defined]
        with megatron_device():
            return [(name, value.clone()) for name, value in trainer.named_hf_tensors()]
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight


def _be_rank(parent: int, rank: int, world_size: int, group: int, cases: list[Case], folder: Path) -> None:
    die_with_parent(parent)
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / f"store-{group}"), world_size)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    for case in cases:
        try:
            _run(case, folder)
        except BaseException:
            print(f"rank {rank} of {world_size}, {case.name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(1)
    torch.distributed.destroy_process_group()


def main(folder: Path, chosen: list[str]) -> None:
    """Fork each group of ranks in turn; ends with 1 when a rank of it failed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    groups: list[list[Case]] = []
    for case in CASES:
        if chosen and case.name not in chosen:
            continue
        if not groups or groups[-1][0].world_size != case.world_size:
            groups.append([])
        groups[-1].append(case)
    for number, cases in enumerate(groups):
        world_size = cases[0].world_size
        children = []
        parent = os.getpid()
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                try:
                    _be_rank(parent, rank, world_size, number, cases, folder)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        if any(codes):
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
