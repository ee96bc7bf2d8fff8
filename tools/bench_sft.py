"""Supervised fine-tuning measured in one run on one machine: our stage, TRL's SFTTrainer, a plain Hugging Face loop.

Every side trains the same model (the embedded SmolLM2-135M-Instruct, or --model) on the same traces in the same
precision with as many threads, each in a process of its own, one after the other. Counted are real tokens (no padding)
a second over the steps after the first. TRL runs with its defaults, by the Python of --trl-python; without it that side
is left out. The Hugging Face loop sees our packs' examples as rows of their own, without padding, and as one packed
row under a block-diagonal mask; the faster of the two counts.

Also: the difference of the first steps' losses to Hugging Face's (meant for --dtype fp32), and how long a step stands
still for a checkpoint that is written synchronously and asynchronously.

    python tools/bench_sft.py --trl-python TRL_ENV/bin/python [--dtype fp32] [--steps 4] [--traces FILE.jsonl]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from astro_hpc.config.schema import (
    CheckpointConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ProblemsConfig,
    RunConfig,
    SignsSource,
    TrainingConfig,
)
from astro_hpc.run.files import write_jsonl_atomic
from astro_hpc.run.metrics import read_metrics
from astro_hpc.run.stage import CheckpointedExit, StageContext
from astro_hpc.training.data import StepPlan, load_examples, load_tokenizer
from astro_hpc.training.packing import PackedBatch
from astro_hpc.training.sft import mean_cross_entropy, train
from astro_hpc.training.trainer import Trainer

LR = 1e-5


def synthetic_traces(count: int) -> list[dict[str, Any]]:
    """One to five random walks to a sign problem with a reflection between them: lengths spread as those of traces."""
    from astro_hpc.problems import signs
    from astro_hpc.problems.sources import load_source
    from astro_hpc.problems.style import PromptStyle

    style = PromptStyle.load("minimal-chat")
    draw = random.Random(0)
    rows = []
    for problem in load_source(SignsSource(count=count)):
        walks = ["\n".join(signs.random_walk(problem, draw)) for _ in range(draw.choice((1, 1, 2, 3, 5)))]
        reflection = (
            "\n\nBut wait, are we solving the problem correctly so far? Hmm... "
            "I'm not sure if we're solving the problem correctly so far. Let's go back to the start.\n\n"
        )
        rows.append({"prompt": style.render(problem.text), "completion": reflection.join(walks)})
    return rows


def settings(options: argparse.Namespace, checkpoints: int = 10**6) -> TrainingConfig:
    optimizer = OptimizerConfig(lr=LR, lr_schedule="constant", lr_warmup_fraction=0.0)
    return TrainingConfig(
        seq_length=options.seq_length,
        global_batch_size=1,
        loss_on=options.loss_on,
        num_epochs=100,
        optimizer=optimizer,
        checkpoint=CheckpointConfig(every_steps=checkpoints),
    )


def plan_of(options: argparse.Namespace) -> StepPlan:
    examples = load_examples(options.traces, load_tokenizer(options.model), options.seq_length).examples
    # The data seed of the stage below, so that all sides see the same packs.
    return StepPlan(examples, settings(options), stage_context(options, Path()).seed("bench", "data"))


class StopAfter(StageContext):
    """A stage that is asked to stop when its metrics have so many steps."""

    steps = 0

    @property
    def stop_requested(self) -> bool:
        return len(read_metrics(self.dir / "metrics.jsonl")) >= self.steps


def stage_context(options: argparse.Namespace, folder: Path) -> StageContext:
    cfg = RunConfig(
        name="bench",
        runs_dir=folder,
        problems=ProblemsConfig(train=[SignsSource(count=1)]),
        precision=PrecisionConfig(dtype=options.dtype),
    )
    ctx = StopAfter(cfg=cfg, dir=folder, label="bench")
    ctx.steps = options.steps + 1
    return ctx


# --- sides, each in a process of its own -----------------------------------------------------------------------


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """The SFT stage as it is, stopped after the steps that are wanted."""
    with tempfile.TemporaryDirectory(prefix="bench-sft-", dir=options.scratch) as folder:
        ctx = stage_context(options, Path(folder))
        with contextlib.suppress(CheckpointedExit):
            train(ctx, examples=options.traces, training=settings(options), init_hf=options.model, label="bench")
        rows = read_metrics(ctx.dir / "metrics.jsonl")
    return {
        "seconds": [r["data_seconds"] + r["compute_seconds"] + r["gradient_sync_seconds"] for r in rows],
        "tokens": [row["tokens"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "tflops": [row["tflops_per_rank"] for row in rows],
    }


def hugging_face(options: argparse.Namespace, packed: bool) -> dict[str, Any]:
    """LlamaForCausalLM with torch's AdamW, as a short script would write it, on our packs' examples."""
    from transformers import AutoModelForCausalLM

    plan = plan_of(options)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    seconds, tokens, losses = [], [], []
    for step in range(options.steps + 1):
        began = time.perf_counter()
        batches, count = plan.batches(step), plan.num_targets(step)
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            for loss in _packed(model, batch) if packed else _rows(model, batch):
                (loss / count).backward()
                total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        tokens.append(plan.num_tokens(step))
        losses.append(total)
        print(f"hugging_face step {step + 1}: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
    return {"seconds": seconds, "tokens": tokens, "losses": losses}


def _rows(model: Any, batch: PackedBatch) -> Any:
    """The summed loss of each example, alone in its row."""
    bounds = batch.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        logits = model(input_ids=batch.tokens[None, start:end], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits.float(), batch.targets[start:end], reduction="none")
        yield (losses * batch.loss_mask[start:end]).sum()


def _packed(model: Any, batch: PackedBatch) -> Any:
    """The summed loss of the pack in one row; the mask keeps the examples apart."""
    owner = torch.repeat_interleave(torch.arange(len(batch.cu_seqlens) - 1), batch.cu_seqlens.diff())
    allowed = (owner[:, None] == owner[None]).tril()
    mask = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, torch.finfo(model.dtype).min)
    logits = model(
        input_ids=batch.tokens[None],
        position_ids=batch.position_ids[None],
        attention_mask=mask[None, None],
        use_cache=False,
    ).logits[0]
    losses = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    yield (losses * batch.loss_mask).sum()


def checkpoints(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds that training stands still for a checkpoint, beside a step's own."""
    plan, training = plan_of(options), settings(options)
    precision = PrecisionConfig(dtype=options.dtype)
    trainer = Trainer(options.model, ParallelConfig(), precision, training.optimizer, 100, seed=0)

    def step() -> float:
        began = time.perf_counter()
        trainer.train_step(plan.batches(0), mean_cross_entropy(plan.num_targets(0)))
        return time.perf_counter() - began

    def save(number: int, asynchronous: bool) -> float:
        began = time.perf_counter()
        trainer.save_checkpoint(Path(folder), number, {}, 1, asynchronous=asynchronous)
        return time.perf_counter() - began

    step()
    with tempfile.TemporaryDirectory(prefix="bench-sft-", dir=options.scratch) as folder:
        plain = [step() for _ in range(2)]
        synchronous = [save(number, False) for number in (1, 2)]
        stalls, beside = [], []
        for number in (3, 4):
            step()  # in life too, steps lie between the end of one checkpoint and the next
            stall = save(number, True)
            beside.append(step())
            began = time.perf_counter()
            while not trainer.finish_checkpoint(block=False):  # what the loop does after each step
                stall += time.perf_counter() - began
                beside.append(step())
                began = time.perf_counter()
            stalls.append(stall + time.perf_counter() - began)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "bytes": size,
        "step_seconds": statistics.median(plain),
        "step_seconds_while_writing": statistics.median(beside),
        "synchronous_seconds": statistics.median(synchronous),
        "asynchronous_stall_seconds": statistics.median(stalls),
    }


SIDES = {
    "ours": ours,
    "hugging_face_rows": lambda options: hugging_face(options, packed=False),
    "hugging_face_packed": lambda options: hugging_face(options, packed=True),
    "checkpoints": checkpoints,
}


# --- the comparison -------------------------------------------------------------------------------------------


def run_side(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One side in a process of its own, with our number of threads."""
    out = folder / f"{name}.json"
    if name.startswith("trl"):
        script = str(Path(__file__).with_name("bench_sft_trl.py"))
        recompute = "no-recompute" if name.endswith("no_recompute") else "default"
        steps = str(options.steps + 1)
        arguments = [options.model, options.traces, out, steps, LR, options.dtype, options.loss_on, recompute]
        command = [options.trl_python, script, *map(str, arguments)]
    else:
        command = [sys.executable, __file__, "--side", name, "--out", str(out), "--model", str(options.model)]
        command += ["--traces", str(options.traces), "--dtype", options.dtype, "--loss-on", options.loss_on]
        command += ["--seq-length", str(options.seq_length), "--steps", str(options.steps)]
        command += ["--scratch", str(options.scratch)] if options.scratch else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    if name.startswith("trl"):
        environment.pop("PYTHONPATH", None)
    print(f"--- {name}", file=sys.stderr, flush=True)
    subprocess.run(command, env=environment, check=True)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def tokens_per_second(result: dict[str, Any]) -> float:
    """Real tokens a second over the steps after the first."""
    return sum(result["tokens"][1:]) / sum(result["seconds"][1:])


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All sides that are wanted, and what they say together."""
    with tempfile.TemporaryDirectory(prefix="bench-sft-") as scratch:
        folder = Path(scratch)
        if options.traces is None:
            options.traces = folder / "traces.jsonl"
            write_jsonl_atomic(options.traces, synthetic_traces(160))
        results = {name: run_side(name, options, folder) for name in options.sides}
    stall = results.pop("checkpoints", None)
    rates = {name: tokens_per_second(result) for name, result in results.items()}
    plain = [rate for name, rate in rates.items() if name.startswith("hugging_face")]
    summary: dict[str, Any] = {
        "dtype": options.dtype,
        "loss_on": options.loss_on,
        "threads": options.threads,
        "cpu_bf16_native": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "steps": options.steps,
        "tokens_a_step": {name: round(statistics.mean(result["tokens"][1:])) for name, result in results.items()},
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
    }
    if "ours" in rates and plain:
        summary["ours_to_hugging_face"] = round(rates["ours"] / max(plain), 2)
    for name in ("trl", "trl_no_recompute"):
        if "ours" in rates and name in rates:
            summary[f"ours_to_{name}"] = round(rates["ours"] / rates[name], 2)
    if "ours" in results and "hugging_face_rows" in results:
        pairs = zip(results["ours"]["losses"], results["hugging_face_rows"]["losses"], strict=True)
        summary["largest_loss_difference_to_hugging_face"] = max(abs(a - b) for a, b in pairs)
    if "trl" in results:
        trl = results["trl"]
        padded = 1 - sum(trl["tokens"][1:]) / sum(trl["fed"][1:])
        summary["trl"] = {**trl["versions"], **trl["settings"], "threads": trl["threads"], "padded_share": padded}
    if stall is not None:
        summary["checkpoint"] = stall
        ratio = stall["asynchronous_stall_seconds"] / stall["synchronous_seconds"]
        summary["asynchronous_to_synchronous_stall"] = round(ratio, 3)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, default=None, help="the Python of an environment that has TRL")
    parser.add_argument("--model", type=Path, default=None, help="Hugging Face folder (the embedded model)")
    parser.add_argument("--traces", type=Path, default=None, help="prompts and completions (synthetic ones)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--loss-on", choices=("all", "completion"), default="completion", help="TRL's default")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of our packs; one pack a step")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--scratch", type=Path, default=None, help="where checkpoints are written (the temporary folder)"
    )
    everything = [*SIDES, "trl", "trl_no_recompute"]
    parser.add_argument("--sides", nargs="+", choices=everything, default=None, help="these alone")
    parser.add_argument("--side", choices=SIDES, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model is None:
        from astro_hpc.conversion.embedded import resolve_model

        options.model = resolve_model("embedded:smollm2-135m-instruct")
    if options.sides is None:
        options.sides = everything if options.trl_python else list(SIDES)
    if options.side:
        options.out.write_text(json.dumps(SIDES[options.side](options)))
    else:
        print(json.dumps(compare(options), indent=2))


if __name__ == "__main__":
    main()
