"""The doctor: what it finds here, what it fails on, and that it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_llama
from typer.testing import CliRunner

from astro_hpc.cli import app
from astro_hpc.config.schema import JsonlSource, ProblemsConfig, RunConfig, SignsSource
from astro_hpc.launch import checks, doctor, run_checks
from astro_hpc.launch.checks import Check
from astro_hpc.launch.cluster import ClusterConfig
from astro_hpc.launch.cluster_checks import cluster_checks, file_system_of, preemption
from astro_hpc.model.libraries import Chip, Library, Machine

H100 = Chip("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(tmp_path_factory.mktemp("doctor") / "model", tied=False, llama3_rope=True)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def config(model: Path, tmp_path: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "runs_dir": tmp_path,
            "model": {"path": str(model)},
            "problems": {"train": [{"type": "signs", "count": 3}]},
            "precision": {"dtype": "fp32"},
            **sections,
        }
    )


def row(rows: list[Check], name: str) -> Check:
    (found,) = [row for row in rows if row.name == name]
    return found


def test_this_environment_is_fit_for_a_small_run(model: Path, tmp_path: Path) -> None:
    rows = doctor.examine(config(model, tmp_path))
    assert doctor.healthy(rows), [row for row in rows if row.status == "fail"]
    names = [row.name for row in rows]
    assert len(names) == len(set(names))
    for name in ("Python", "torch", "GPU", "megatron-core", "vllm", "math-verify", "model", "memory", "disk"):
        assert row(rows, name).found
    assert list(tmp_path.iterdir()) == []


def test_every_failure_and_warning_has_a_remedy(model: Path, tmp_path: Path) -> None:
    cfg = config(
        model,
        tmp_path,
        parallel={"tensor_parallel_size": 3},
        precision={"fp8": "blockwise"},
        problems={"train": [{"type": "jsonl", "path": "no/such.jsonl"}]},
    )
    rows = doctor.examine(cfg)
    assert not doctor.healthy(rows)
    assert {"parallel", "precision", "problems"} <= {row.name for row in rows if row.status == "fail"}
    for found in rows:
        assert (found.remedy != "") == (found.status != "pass"), found
    assert "no/such.jsonl" in row(rows, "problems").found


def test_precision_is_held_against_chip_and_libraries(model: Path, tmp_path: Path) -> None:
    cfg = config(model, tmp_path, precision={"fp8": "tensorwise"})
    shape = None
    good = Machine(H100, (12, 9), Library("2.20.2"))
    (found,) = run_checks.arithmetic(cfg, good, shape)
    assert (found.status, found.found) == ("pass", "fp8 tensorwise (hybrid)")
    (found,) = run_checks.arithmetic(cfg, Machine(Chip("A100", (8, 0), 80 << 30), (12, 9), Library(None)), shape)
    assert found.status == "fail"
    assert "A100 has 8.0" in found.found
    assert "Transformer Engine, which is not installed" in found.found
    (found,) = run_checks.arithmetic(config(model, tmp_path, precision={"exp_avg_dtype": "bf16"}), good, shape)
    assert found.remedy == "set precision.precision_aware_optimizer=true"


def test_pypis_apex_and_a_missing_engine_on_a_gpu(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "apex", lambda: Library("0.9.10", "this is PyPI's unrelated web toolkit"))
    machine = Machine(H100, (12, 9), Library(None))
    engine, apex = checks.kernels(machine, config(model, tmp_path, parallel={"sequence_parallel": True}))
    assert (engine.status, apex.status) == ("fail", "warn")
    assert "sequence" in engine.remedy
    assert apex.remedy.startswith("pip uninstall apex")
    engine, _ = checks.kernels(machine, None)
    assert engine.status == "warn"


def test_a_damaged_model_folder(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((model / "config.json").read_text())
    rows = run_checks.Model(config(folder, tmp_path)).rows
    assert rows[0].status == "fail"
    assert "lacks tokenizer.json and *.safetensors" in rows[0].found
    rows = run_checks.Model(config(tmp_path / "gone", tmp_path)).rows
    assert rows[0].status == "fail"


def test_a_model_too_large_for_memory_and_disk_fails(tmp_path: Path) -> None:
    from astro_hpc.model.llama import LlamaShape

    shape = LlamaShape(80, 8192, 28672, 64, 8, 128, 128256, 131072, 1e-5, 500000.0, 8.0, False)
    cfg = config(tmp_path, tmp_path, precision={"dtype": "bf16"})
    machine = Machine(H100, (12, 9), Library("2.20.2"))
    assert run_checks.state_bytes(shape, cfg, 1) == pytest.approx(18 * 70.55e9, rel=1e-3)
    split = {"tensor_parallel_size": 8, "pipeline_parallel_size": 4, "use_distributed_optimizer": True}
    cfg_split = config(tmp_path, tmp_path, precision={"dtype": "bf16"}, parallel=split)
    assert run_checks.state_bytes(shape, cfg_split, 64) == pytest.approx((6 + 12 / 2) * 70.55e9 / 32, rel=1e-3)
    (memory,) = run_checks.memory(cfg, machine, shape)
    assert memory.status == "fail"
    (disk,) = run_checks.disk(cfg, shape)
    assert (disk.status == "fail") == ("free some" in disk.remedy)
    (small,) = run_checks.memory(None, machine, None)
    assert small.status in ("pass", "warn")


def test_the_command_prints_json_and_leaves_with_1_on_a_failure(model: Path, tmp_path: Path) -> None:
    cfg = config(model, tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(cfg.model_dump_json())  # JSON is YAML
    result = CliRunner().invoke(app, ["doctor", str(path), "--json"])
    told = json.loads(result.stdout)
    assert told["ok"] is True
    assert result.exit_code == 0
    assert {"name", "status", "found", "remedy"} == set(told["checks"][0])
    result = CliRunner().invoke(app, ["doctor", str(path), "precision.dtype=bf16", "precision.fp8=tensorwise"])
    assert result.exit_code == 1
    assert "fail" in result.stdout
    assert "there is no GPU" in result.stdout


def test_sources_without_files_need_none(model: Path, tmp_path: Path) -> None:
    cfg = config(model, tmp_path)
    assert list(run_checks.inputs(cfg)) == []
    there = tmp_path / "p.jsonl"
    there.write_text("{}\n")
    problems = ProblemsConfig(train=[JsonlSource(type="jsonl", path=there), SignsSource(count=1)])
    (found,) = run_checks.inputs(cfg.model_copy(update={"problems": problems}))
    assert found.status == "pass"


def test_problem_folders_parquet_and_rl_settings_are_looked_at(model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    train = [{"type": "jsonl", "path": str(tmp_path / "folder")}, {"type": "parquet", "path": str(tmp_path / "no.pq")}]
    cfg = config(model, tmp_path, problems={"train": train}, rl={"temperature": 0.7})
    (found,) = run_checks.inputs(cfg)
    assert (found.status, found.found) == ("fail", f"missing: {tmp_path / 'no.pq'}")
    (found,) = run_checks.reinforcement(cfg)
    assert found.status == "fail"
    assert found.found.startswith("rl.temperature=0.7")
    train = [{"type": "jsonl", "path": str(tmp_path / "folder")}, {"type": "huggingface", "path": "org/math"}]
    there, hub = run_checks.inputs(config(model, tmp_path, problems={"train": train}))
    assert (there.status, hub.status) == ("pass", "warn")


# --- clusters -------------------------------------------------------------------------------------------------


def cluster(**values: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"gpus_per_node": 0, "memory": None, "exclusive": False, **values})


def test_a_cluster_that_fits_its_file(slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    rows = list(cluster_checks(cluster(partition="batch"), tmp_path / "runs"))
    assert [found for found in rows if found.status == "fail"] == []
    for name, status, text in (
        ("Slurm commands", "pass", "Slurm 2"),
        ("accounting", "warn", "none"),
        ("MaxArraySize", "pass", "1001"),
        ("JobRequeue", "pass", "1"),
        ("PreemptMode", "pass", "REQUEUE"),
        ("jobs", "pass", "batch, urgent"),
    ):
        found = row(rows, name)
        assert found.status == status
        assert text in found.found


def test_what_a_cluster_lacks_fails_with_its_remedy(
    slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    bad = cluster(
        max_array_size=5000,
        signal_seconds=600,
        container={"runtime": "pyxis", "image": "/nowhere/image.sqsh"},
        stages={"sft": {"nodes": 9}, "eval": {"partition": "gpu"}, "search": {"time": "00:10:00"}},
    )
    failed = {found.name: found for found in cluster_checks(bad, tmp_path) if found.status == "fail"}
    names = {"MaxArraySize", "time of search", "jobs of sft", "jobs of eval", "pyxis", "container image"}
    assert set(failed) == names
    assert failed["MaxArraySize"].remedy == "set max_array_size to 1001, or remove it"
    assert "no partition gpu; there are batch, urgent" in failed["jobs of eval"].found
    assert all(found.remedy for found in failed.values())


def test_without_a_controller_the_doctor_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = cluster_checks(cluster(), tmp_path)
    assert found.status == "fail"
    assert "sbatch, squeue" in found.found
    (found,) = cluster_checks(cluster(executor="local"), tmp_path)
    assert found.status == "pass"


def test_file_systems_and_preemption(tmp_path: Path) -> None:
    mounts = "/dev/vda / ext4 rw 0 0\nserver:/x /shared nfs4 rw 0 0\n/dev/vdb /shared2 xfs rw 0 0\n"
    assert file_system_of(Path("/shared/runs"), mounts) == ("nfs4", "/shared")
    assert file_system_of(Path("/shared2"), mounts) == ("xfs", "/shared2")
    assert file_system_of(Path("/home"), mounts) == ("ext4", "/")
    mode, notice = preemption({"PreemptMode": "CANCEL", "PreemptType": "preempt/qos", "KillWait": "30 sec"})
    assert (mode.status, notice.status) == ("warn", "warn")
    assert "launch again" in mode.remedy
    (mode,) = preemption({"PreemptMode": "OFF", "PreemptType": "preempt/none"})
    assert mode.status == "pass"
