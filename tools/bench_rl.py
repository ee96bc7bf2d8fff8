"""A whole RL step measured in one run on one machine: our loop, and TRL's GRPOTrainer with its own generation.

Both train the same model (the embedded SmolLM2-135M-Instruct, or --model) with the same prompts, group size, limit of
length and reward, in the same precision with as many threads, each in a process of its own, one after the other.
Counted are seconds a generated token over the steps after the first; what an engine or trainer needs to start is left
out on both sides. The reward is the share of letters in a response, so that every group has a signal. TRL runs by the
Python of --trl-python; without it that side is left out.

    python tools/bench_rl.py --trl-python TRL_ENV/bin/python [--steps 3] [--prompts 8] [--group 4] [--tokens 300]

--dtype bf16 is what both do by default: TRL keeps float32 weights and multiplies in bfloat16 (autocast), we keep a
bfloat16 model with float32 main weights and gradients, and sample in bfloat16. --dtype fp32 is float32 throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from astro_hpc.config.schema import RunConfig, SignsSource
from astro_hpc.problems.problem import Problem
from astro_hpc.run.files import write_jsonl_atomic
from astro_hpc.run.metrics import read_metrics
from astro_hpc.run.stage import StageContext

ENGINE_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def share_of_letters(problem: Problem, response: str, outcome: str) -> float:
    """The reward; TRL's side computes the same."""
    return sum(character.isalpha() for character in response) / max(len(response), 1)


def config(folder: Path, options: argparse.Namespace) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "bench",
            "runs_dir": str(folder),
            "model": {"path": options.model, "prompt_style": "minimal-chat"},
            "problems": {"train": [{"type": "signs", "count": options.prompts}]},
            "inference": {
                "dtype": ENGINE_DTYPES[options.dtype],
                "max_model_len": options.tokens + 112,
                "cpu_kv_cache_gb": 1.0,
            },
            "precision": {"dtype": options.dtype},
            "rl": {
                "num_steps": options.steps,
                "prompts_per_step": options.prompts,
                "group_size": options.group,
                "max_response_tokens": options.tokens,
                "seq_length": max(2048, options.tokens + 112),
                "mode": options.mode,
                "segment_tokens": 64 if options.mode == "async" else None,
                "reward": {"function": "bench_rl:share_of_letters"},
                "optimizer": {"lr": 1e-6, "lr_schedule": "constant"},
                "checkpoint": {"every_steps": options.steps},
            },
        }
    )


def problems(options: argparse.Namespace) -> list[Problem]:
    from astro_hpc.problems.sources import load_source

    return list(load_source(SignsSource(count=options.prompts)))


def ours(folder: Path, options: argparse.Namespace) -> None:
    """Run the stage; metrics.jsonl in `folder` tells the rest."""
    from astro_hpc.conversion.embedded import resolve_model
    from astro_hpc.rl.stage import run

    prompts = folder / "prompts.jsonl"
    write_jsonl_atomic(prompts, (problem.to_json() for problem in problems(options)))
    run(StageContext(config(folder, options), folder, "bench"), resolve_model(options.model), prompts)


def measure_ours(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-rl-") as name:
        folder = Path(name)
        environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], env=environment, check=True)
        rows = read_metrics(folder / "metrics.jsonl")
    return summary(
        [row["step_seconds"] for row in rows],
        [row["sampled_tokens"] for row in rows],
        parts={
            part: round(statistics.mean(row[f"{part}_seconds"] for row in rows[1:]), 2)
            for part in ("generate", "prepare", "logprobs", "train")
        }
        | {"push": round(max(row["push_seconds"] for row in rows[:-1]), 3)},  # the last step pushes nothing
        engine_idle_share=round(statistics.mean(row["engine_idle_share"] for row in rows[1:]), 3),
        trainer_idle_share=round(statistics.mean(row["trainer_idle_share"] for row in rows[1:]), 3),
        mismatch_mean_abs=max(row["mismatch_mean_abs"] for row in rows),
    )


def measure_trl(options: argparse.Namespace) -> dict[str, Any]:
    from astro_hpc.conversion.embedded import resolve_model
    from astro_hpc.problems.style import PromptStyle

    style = PromptStyle.load("minimal-chat")
    with tempfile.TemporaryDirectory(prefix="bench-rl-") as name:
        prompts, out = Path(name) / "prompts.jsonl", Path(name) / "out.json"
        write_jsonl_atomic(prompts, ({"prompt": style.render(problem.text)} for problem in problems(options)))
        numbers = [str(n) for n in (options.steps, options.prompts, options.group, options.tokens)]
        script = Path(__file__).with_name("bench_rl_trl.py")
        command = [options.trl_python, str(script), str(resolve_model(options.model)), str(prompts), str(out), *numbers]
        command.append(options.dtype)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run(command, env=environment, check=True)
        result = json.loads(out.read_text())
    return summary(result["seconds"], result["tokens"], versions=result["versions"], threads=result["threads"])


def summary(seconds: list[float], tokens: list[float], **more: Any) -> dict[str, Any]:
    """Seconds a generated token, without the first step, which warms up caches and kernels."""
    return {
        "seconds_a_step": [round(value, 2) for value in seconds],
        "generated_tokens_a_step": tokens,
        "milliseconds_a_token": round(1000 * sum(seconds[1:]) / sum(tokens[1:]), 3),
        **more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="the Python of an environment that has TRL")
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--dtype", choices=list(ENGINE_DTYPES), default="bf16")
    parser.add_argument("--mode", choices=["sync", "async"], default="sync")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        ours(options.only, options)
        return
    result = {"ours": measure_ours(options)}
    if options.trl_python:
        result["trl"] = measure_trl(options)
        ratio = result["trl"]["milliseconds_a_token"] / result["ours"]["milliseconds_a_token"]
        result["trl_over_ours"] = round(ratio, 2)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
