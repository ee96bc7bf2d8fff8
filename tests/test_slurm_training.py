"""Training on several virtual nodes of a real Slurm: the ranks of a stage as srun steps that meet over the network."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from slurm_box import ROOT, Run
from test_rl_servers import check_trained, live_config, prepare
from test_training_parallel_ranks import alive, wait_until_gone
from tiny_models import save_tiny_llama

from astro_hpc.run.metrics import read_metrics

SPLIT = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
TWO_BY_TWO = "  {stage}: {{nodes: 2, tasks_per_node: 2, exclusive: true}}\n"


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that two tensor-parallel ranks and two pipeline stages can share."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama", smollm2, num_key_value_heads=2)


def settings(model: Path) -> dict[str, object]:
    return {
        "model": {"path": str(model), "prompt_style": "minimal-chat"},
        "precision": {"dtype": "fp32"},
        "parallel": SPLIT,
        "sft": {
            "num_epochs": 1,
            "seq_length": 1024,
            "global_batch_size": 4,
            "optimizer": {"lr": 1e-3, "lr_schedule": "constant"},
        },
    }


def test_sft_on_two_nodes_of_two_ranks_computes_what_one_process_does(slurm, model, tmp_path):
    run = Run(slurm, tmp_path, shards=2, **settings(model))
    run.write_cluster(run.cluster() + TWO_BY_TWO.format(stage="sft"))
    run.launch("--stages", "search,gather,clone,sft")
    run.wait(seconds=300)
    stage = run.dir / "sft" / "astro"
    assert (stage / "manifest.json").exists(), run.logs()
    assert json.loads((stage / "manifest.json").read_text())["counts"]["ranks"] == 4
    [attempt] = run.dir.glob("logs/sft-astro/job-*.attempt-0")
    assert {path.name for path in attempt.glob("rank-*.log")} == {f"rank-{rank}.log" for rank in range(4)}

    alone = tmp_path / "runs" / "alone"
    alone.mkdir()
    (alone / "traces").symlink_to(run.dir / "traces")
    one = ["parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1", "name=alone"]
    result = run.command("sft", "run.yaml", *one, seconds=240)
    assert result.returncode == 0, result.stderr
    found, expected = (read_metrics(folder / "metrics.jsonl") for folder in (stage, alone / "sft" / "astro"))
    assert len(found) == len(expected) >= 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert (ours["step"], ours["tokens"], ours["lr"]) == (theirs["step"], theirs["tokens"], theirs["lr"])


def test_rl_trains_on_one_node_what_a_server_on_another_samples_though_it_is_killed(slurm, model, tmp_path):
    """The server is killed between two steps: it is started anew, given the newest weights, and sampling goes on."""
    steps = 16
    live = live_config(tmp_path / "runs", steps, lr=1e-3, weight_sync="folder")
    values = {**live.model_dump(mode="json"), "name": "test", "runs_dir": "runs", "model": settings(model)["model"]}
    run = Run(slurm, tmp_path, **values)
    run.write_cluster(
        run.cluster().replace("OMP_NUM_THREADS: 1", f"OMP_NUM_THREADS: 1, PYTHONPATH: '{ROOT / 'tests'}:{ROOT}'")
        + "  rl: {nodes: 2, engine_nodes: 1, tasks_per_node: 2, exclusive: true}\n"
    )
    prepare(run.dir, model)
    for stage in ("sft", "select"):
        (run.dir / stage / "astro" / "manifest.json").write_text("{}")
    run.launch("--stages", "rl")
    stage = run.dir / "rl" / "astro"
    run.wait(lambda: (stage / "rollouts" / "step_00000002.jsonl").exists() or not run.queued(), seconds=300)
    [serve] = [
        pid for pid in alive(str(tmp_path)) if b"\0serve\0" in command_line(pid) and b"bash" not in command_line(pid)
    ]
    os.kill(serve, signal.SIGKILL)
    assert run.status()["rl-astro"]["reason"] == "trainer: n1; engines: n2", run.logs()
    run.wait(seconds=300)

    assert (stage / "manifest.json").exists(), run.logs()
    check_trained(stage, steps)
    last = steps - 1  # nothing samples with the weights of the last step
    assert (stage / "weights" / f"version_{last:08d}" / "STABLE").read_text() == f"{last}\n"
    [attempt] = run.dir.glob("logs/rl-astro/job-*.attempt-0")
    assert {path.name for path in attempt.glob("*-*.log")} == {"rank-0.log", "rank-1.log", "engine-n2-0.log"}
    assert (attempt / "engine-n2-0.log").read_text().count("serve: ready at") == 2
    assert run.status()["rl-astro"]["state"] == "done"
    wait_until_gone(str(tmp_path))


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
