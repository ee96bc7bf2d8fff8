"""A search in a hundred shards on a real Slurm, to its end: none is lost, none is done twice."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from slurm_box import ROOT, load_sandbox_module

from astro_hpc.run.files import Journal


def load_benchmark() -> ModuleType:
    """tools/bench_launch.py, which runs a thousand; a script and no part of the package."""
    load_sandbox_module()
    spec = importlib.util.spec_from_file_location("bench_launch", ROOT / "tools" / "bench_launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_hundred_shards_are_searched_and_gathered_without_one_lost(slurm, tmp_path: Path) -> None:
    benchmark = load_benchmark()
    benchmark.write_run(tmp_path, shards=100, at_once=4)  # more than cores: a task mostly waits for Slurm
    cluster = json.loads((tmp_path / "cluster.yaml").read_text())
    (tmp_path / "cluster.yaml").write_text(json.dumps({**cluster, "max_array_size": 70}))
    figures = benchmark.measure(slurm, tmp_path, shards=100, timeout=500)
    assert benchmark.all_arrived(figures), figures
    submitted = list(Journal.read(tmp_path / "runs" / "bench" / "jobs" / "submitted.jsonl"))
    assert [(row["job"], row["tasks"]) for row in submitted] == [
        ("search", "0-69"),
        ("search", "70-99"),
        ("gather", "0"),
    ]


def test_a_shard_of_the_scripted_engine_imports_no_torch(tmp_path: Path) -> None:
    load_benchmark().write_run(tmp_path, shards=4, at_once=1)
    code = (
        "import sys; sys.modules.update(torch=None, vllm=None, megatron=None, transformers=None); "
        "from astro_hpc.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "search", "run.yaml", "--shard", "1", "--num-shards", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    assert list(Journal.read(tmp_path / "runs/bench/search/shard-00001-of-00004/trees.jsonl"))
