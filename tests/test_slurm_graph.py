"""The whole graph through a real Slurm, in arrays on four nodes, ends with what `astro-hpc run` makes on one machine.

The policy that samples is the scripted engine, so that no time goes into vLLM; training is Megatron's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from slurm_box import ROOT, Run

from astro_hpc.run.files import Journal, read_jsonl

SHARDS = {"search": 4, "clone": 2, "select": 3, "eval": 2}
SETTINGS: dict[str, object] = {
    "precision": {"dtype": "fp32"},
    "verifier": {"num_workers": 1},
    "sft": {"seq_length": 512, "global_batch_size": 8},
    "select": {"num_samples": 6, "min_pass_rate": 0.1, "max_pass_rate": 0.9, "max_tokens": 256},
    "rl": {
        "num_steps": 2,
        "prompts_per_step": 2,
        "group_size": 2,
        "max_response_tokens": 256,
        "seq_length": 1024,
        "max_mismatch_kl": None,  # scripted log-probabilities are nobody's
        "reward": {"function": "my_rewards:brevity"},
    },
    "eval": {"num_samples": 4, "max_tokens": 256, "benchmarks": {"other": {"type": "jsonl", "path": "other.jsonl"}}},
}


def test_the_whole_graph_in_arrays_ends_with_the_artefacts_of_one_machine(slurm, tmp_path, tiny_llama):
    run = Run(slurm, tmp_path, **SETTINGS)
    shutil.copytree(tiny_llama, tmp_path / "model", dirs_exist_ok=True)
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(problem, response, outcome):\n    return -len(response) / 99\n"
    )
    rows = [{"problem": f"Take {n} from {n + 3}.", "answer": str(n)} for n in range(6)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = {stage: {"shards": number, "throttle": 2} for stage, number in SHARDS.items()}
    cluster = {"gpus_per_node": 0, "memory": None, "exclusive": False, "signal_seconds": 20, "stages": stages}
    run.write_cluster(json.dumps({**cluster, "environment": {"OMP_NUM_THREADS": 1}}))

    submitted = run.launch()
    assert [row["job"] for row in submitted] == [
        *("search", "gather", "clone", "clone-gather", "sft-astro", "select-astro", "select-gather-astro"),
        *("rl-astro", "eval", "eval-gather", "report"),
    ]
    assert {row["job"].partition("-")[0]: row["tasks"] for row in submitted if row["tasks"] > 1} == SHARDS
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "astro_hpc", "run", "run.yaml", "name=alone"]
    alone = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    run.wait(seconds=500)

    states = run.status()
    assert {name: state["state"] for name, state in states.items()} == dict.fromkeys(states, "done"), run.logs()
    assert run.launch() == []
    one, many = tmp_path / "runs" / "alone", run.dir
    assert trees(many) == trees(one)
    assert len(trees(one)) == 24
    for folder in ("traces", "select/astro", "eval"):
        assert artefacts(many / folder) == artefacts(one / folder), folder
    for stage in ("sft", "rl"):
        assert losses(many, stage) == losses(one, stage)
        assert len(losses(one, stage)) >= 2
        weights = f"{stage}/astro/hf/model.safetensors"
        assert (many / weights).read_bytes() == (one / weights).read_bytes()
    assert (many / "report" / "index.html").exists()


def trees(run: Path) -> dict[str, Any]:
    rows = [row for path in run.glob("search/shard-*/trees.jsonl") for row in Journal.read(path)]
    assert len({row["problem"]["id"] for row in rows}) == len(rows)
    return {row["problem"]["id"]: row for row in rows}


def artefacts(folder: Path) -> dict[str, bytes]:
    """Everything but notes about how it was made."""
    notes = ("manifest.json", "state.json", "records.jsonl", "rates.jsonl")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in notes and path.name[0] != "."]
    assert paths
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def losses(run: Path, stage: str) -> list[list[Any]]:
    names = ("step", "loss", "grad_norm", "lr", "reward", "response_tokens", "mismatch_kl")
    return [[row.get(name) for name in names] for row in read_jsonl(run / stage / "astro" / "metrics.jsonl")]
