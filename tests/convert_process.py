"""Conversions in a process of its own: convert_process.py JOB.json, which prints one line of JSON.

Some need a process without a process group, some ranks of their own, and one is killed in the middle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import astro_hpc.conversion.hf_folder as hf_folder
import astro_hpc.conversion.offline as offline
from astro_hpc import cli
from astro_hpc.config.loading import load_config
from astro_hpc.config.schema import ParallelConfig, PrecisionConfig
from astro_hpc.conversion.hf import load_hf, named_hf_tensors
from astro_hpc.conversion.hf_folder import HFTensors
from astro_hpc.conversion.logits import compare_logits
from astro_hpc.conversion.names import checkpoint_key, extra_state_keys, te_name
from astro_hpc.conversion.proof import model_ranks, prove_shapes
from astro_hpc.model.build import build_model
from astro_hpc.model.cpu import megatron_device
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.meta import meta_rank
from astro_hpc.model.parallel import initialise_parallel
from astro_hpc.run.process import die_with_parent


def commands(argvs: list[list[str]]) -> list[dict[str, Any]]:
    """Run command lines one after the other: exit code and what they print."""
    found = []
    for argv in argvs:
        sys.argv = ["astro-hpc", *argv]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as error:
                code = int(error.code or 0)
        found.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
    return found


def killed(argv: list[str], after_pieces: int) -> None:
    """Run a command line and kill this process, as with kill -9, when that many pieces have been converted."""
    count = itertools.count(1)
    rows, write = offline.read_megatron_rows, hf_folder.SafetensorsFile.write

    def counting(original: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            if next(count) > after_pieces:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        return wrapped

    offline.read_megatron_rows = counting(rows)
    hf_folder.SafetensorsFile.write = counting(write)  # type: ignore[method-assign]
    commands([argv])


def proofs(configs: list[dict[str, Any]], sizes: list[dict[str, int]], run_config: str | None) -> list[dict[str, Any]]:
    """Prove the shapes of each model at each parallel sizes, and at those of a run's YAML file."""
    found = []
    all_sizes = [ParallelConfig(**size) for size in sizes]
    if run_config:
        all_sizes.append(load_config(Path(run_config), []).parallel)
    for config in configs:
        shape = LlamaShape.from_config(config)
        for parallel in all_sizes:
            started = time.perf_counter()
            proof = prove_shapes(shape, parallel)
            found.append({**dataclasses.asdict(proof), "seconds": time.perf_counter() - started})
    return found


def spec_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint keys of the local spec, what Transformer Engine's spec calls its parameters, and extra state."""
    shape = LlamaShape.from_config(config)
    with meta_rank(shape, ParallelConfig(), 0) as (model,), megatron_device():
        state = model.sharded_state_dict()
        names = [name for name, _ in model.named_parameters()]
    keys = {value.key for name, value in state.items() if not name.endswith("_extra_state")}
    objects = {value.unique_key for name, value in state.items() if name.endswith("_extra_state")}
    return {
        "local": sorted(keys),
        "transformer_engine": sorted({".".join(p for p in te_name(n).split(".") if not p.isdigit()) for n in names}),
        "written": sorted({checkpoint_key(name)[0] for name in names}),
        "objects_asked_for": sorted(objects),
        "objects_written": extra_state_keys(shape),
    }


def load_on_ranks(folder: str, source: str, sizes: list[dict[str, int]], port_file: str) -> list[bool]:
    """Load a folder on as many forked ranks as the sizes take; whether the gathered model is the source's."""
    context = multiprocessing.get_context("fork")
    world = max(len(model_ranks(ParallelConfig(**size))) for size in sizes)
    queue = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(os.getpid(), rank, world, folder, source, sizes, port_file, queue))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"ranks ended with {[process.exitcode for process in ranks]}")
    return queue.get()  # type: ignore[no-any-return]


def _rank(
    parent: int, rank: int, world: int, folder: str, source: str, sizes: list[dict[str, int]], store: str, queue: Any
) -> None:
    die_with_parent(parent)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, world), rank=rank, world_size=world
    )
    shape, found = LlamaShape.from_hf(Path(folder)), []
    original = HFTensors(Path(source))
    for size in sizes:
        parallel = ParallelConfig(**size)
        initialise_parallel(parallel, seed=0)
        chunks = build_model(shape, parallel, PrecisionConfig(dtype="fp32"))
        load_hf(chunks, Path(folder))
        # Every rank must gather every tensor, so none may stop at the first difference.
        same = [torch.equal(tensor.float(), original[name].float()) for name, tensor in named_hf_tensors(chunks, shape)]
        found.append(all(same))
    if rank == 0:
        queue.put(found)


def logits(hf_dir: str, megatron_dir: str) -> dict[str, Any]:
    """How far the logits of two folders are apart."""
    found = compare_logits(Path(hf_dir), Path(megatron_dir), LlamaShape.from_hf(Path(hf_dir)), [])
    return {"within": found.within, "difference": found.difference, "tokens": found.tokens}


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([globals()[name](**arguments) for name, arguments in job]))
