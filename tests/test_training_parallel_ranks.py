"""Starting, watching and stopping ranks: none is left behind, and a stage that was cut off ends as if it weren't."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ParallelConfig
from astro_hpc.model.sizes import local_world_size, visible_gpus
from astro_hpc.run.metrics import read_metrics
from astro_hpc.run.ranks import Place, RankFailed, first_host, place_from, run_ranks, set_rendezvous
from astro_hpc.run.stage import StageContext
from astro_hpc.training.ranks import check_blocks

ROOT = Path(__file__).parent.parent
RESULTS = ("step", "loss", "grad_norm", "lr", "tokens")


# --- the supervisor by itself ------------------------------------------------------------------------------------


def program(text: str) -> list[str]:
    start = "import os, sys, time, json, signal\nrank = int(os.environ['RANK'])\n"
    return [sys.executable, "-c", start + textwrap.dedent(text)]


def never() -> bool:
    return False


def alive(marker: str) -> list[int]:
    """Processes whose command line holds `marker`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def wait_until_gone(marker: str) -> None:
    deadline = time.monotonic() + 30
    while alive(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(marker) == []


REPORT = """
from astro_hpc.run import ranks
from pathlib import Path
told = ranks.supervised()
ranks.report(Path(told["reports"]), rank, outputs=[], counts={"threads": os.environ["OMP_NUM_THREADS"]}, told=told)
"""


def test_ranks_know_their_place_and_rank_0_reports(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = program(f"{REPORT}\nprint('I am', rank, 'of', os.environ['WORLD_SIZE'])")
    told = {"reports": str(tmp_path), "attempt": 3}
    result = run_ranks(command, 3, tmp_path, told, never)
    assert result["told"] == told
    assert int(result["counts"]["threads"]) == max(1, len(os.sched_getaffinity(0)) // 3)
    assert [(tmp_path / f"rank_{rank}.log").read_text() for rank in range(3)] == [f"I am {r} of 3\n" for r in range(3)]
    assert capfd.readouterr().err == "I am 0 of 3\n"


def test_one_failing_rank_ends_all_and_its_traceback_is_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marker = f"marker-{tmp_path.name}"
    command = [*program("if rank == 2:\n    raise ValueError('broken here')\ntime.sleep(300)"), marker]
    with pytest.raises(RankFailed, match=r"rank 2 of 3 ended with exit code 1; its log: .*rank_2\.log"):
        run_ranks(command, 3, tmp_path, {}, never)
    assert "ValueError: broken here" in capfd.readouterr().err
    assert alive(marker) == []


def test_of_several_failures_the_first_is_named(tmp_path: Path) -> None:
    command = program(
        """
        time.sleep(0 if rank == 1 else 0.2)
        print("it was me" if rank == 1 else "the peer is gone", flush=True)
        os.kill(os.getppid(), signal.SIGSTOP) if rank == 1 else None
        time.sleep(0.5)
        os.kill(os.getppid(), signal.SIGCONT)
        sys.exit(1)
        """
    )
    outer = f"""
    import sys
    from pathlib import Path
    from astro_hpc.run.ranks import RankFailed, run_ranks
    try:
        run_ranks({command!r}, 3, Path({str(tmp_path)!r}), {{}}, lambda: False)
    except RankFailed as error:
        print(error)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(outer)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.startswith("rank 1 of 3 ended"), found


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    command = program("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(300)")
    with pytest.raises(RankFailed, match="rank 1 of 2 was killed by SIGKILL"):
        run_ranks(command, 2, tmp_path, {}, never)


def test_a_refusal_is_the_users_one_line(tmp_path: Path) -> None:
    command = program(
        """
        from pathlib import Path
        from astro_hpc.run import ranks
        ranks.report(Path(ranks.supervised()["reports"]), rank, refused="too many ranks; lower a size")
        sys.exit(2)
        """
    )
    with pytest.raises(ConfigError, match="too many ranks; lower a size"):
        run_ranks(command, 2, tmp_path, {"reports": str(tmp_path)}, never)


def test_a_stop_reaches_every_rank_once(tmp_path: Path) -> None:
    command = program(
        """
        from pathlib import Path
        from astro_hpc.run import ranks
        got = []
        signal.signal(signal.SIGTERM, lambda *_: got.append(1))
        print("ready", flush=True)
        while not got:
            time.sleep(0.01)
        time.sleep(0.3)
        ranks.report(Path(ranks.supervised()["reports"]), rank, stopped=f"{len(got)}")
        sys.exit(75)
        """
    )

    def ready() -> bool:
        return all("ready" in (tmp_path / f"rank_{rank}.log").read_text() for rank in range(3))

    assert run_ranks(command, 3, tmp_path, {"reports": str(tmp_path)}, ready) == {"stopped": "1"}
    assert json.loads((tmp_path / "rank_2.json").read_text()) == {"stopped": "1"}


def test_a_stop_before_the_ranks_can_hear_it_is_a_stop(tmp_path: Path) -> None:
    found = run_ranks(program("time.sleep(300)"), 2, tmp_path, {}, lambda: True)
    assert found == {"stopped": "stopped while its ranks were starting"}


def test_no_rank_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    marker = f"marker-{tmp_path.name}"
    command = [*program("from astro_hpc.run.process import die_with_parent"), marker]
    command[2] += "\ndie_with_parent(int(os.environ['ASTRO_HPC_PARENT']))\nprint('up', flush=True)\ntime.sleep(300)"
    outer = f"""
    from pathlib import Path
    from astro_hpc.run.ranks import run_ranks
    run_ranks({command!r}, 2, Path({str(tmp_path)!r}), {{}}, lambda: False)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(outer)], cwd=ROOT)
    logs = [tmp_path / f"rank_{rank}.log" for rank in range(2)]
    while not all(log.exists() and "up" in log.read_text() for log in logs):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    wait_until_gone(marker)


def test_places_and_meeting_points() -> None:
    assert place_from({}) is None
    assert place_from({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert place_from({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}) == Place(5, 1, 8)
    step = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16"}
    assert place_from(step) == Place(9, 1, 16)
    batch_script = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
    assert place_from(batch_script) is None
    environment = {"SLURM_STEP_NODELIST": "gpu[003-007,9],login", "SLURM_JOB_ID": "41"}
    assert set_rendezvous(environment) == ("gpu003", 10041)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("gpu003", "10041")
    assert set_rendezvous({"MASTER_ADDR": "a", "MASTER_PORT": "7"}) == ("a", 7)
    assert [first_host(text) for text in ("n1", "n1,n2", "n[1-2]", "a[07,9]b,c", "x-1-[2]")] == [
        "n1", "n1", "n1", "a07b", "x-1-2",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        set_rendezvous({})


def test_ranks_that_were_dealt_out_one_by_one_are_refused() -> None:
    two = ParallelConfig(tensor_parallel_size=2)
    for rank in range(4):
        check_blocks(two, Place(rank, rank % 2, 4))
        check_blocks(ParallelConfig(), Place(rank, rank // 2, 4))
    with pytest.raises(ConfigError, match="rank 1 is number 0 on its machine: .* --distribution=block"):
        check_blocks(two, Place(1, 0, 4))


def test_how_many_ranks_a_machine_starts() -> None:
    two = ParallelConfig(tensor_parallel_size=2)
    assert local_world_size(ParallelConfig(), 0) == 1
    assert local_world_size(two, 0) == 2
    assert local_world_size(two, 8) == 8
    assert local_world_size(ParallelConfig(tensor_parallel_size=2, data_parallel_size=3), 0) == 6
    assert local_world_size(ParallelConfig(data_parallel_size=1), 8) == 1
    with pytest.raises(ConfigError, match="tp 2 x pp 1 x cp 1 x dp 8 needs 16 GPUs and this machine has 8"):
        local_world_size(ParallelConfig(tensor_parallel_size=2, data_parallel_size=8), 8)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0


def test_the_deadline_is_the_nearer_of_ours_and_slurms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ctx = StageContext(None, tmp_path, "sft")  # type: ignore[arg-type]
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    ctx.stop_after(None, 5.0)
    assert not ctx.stop_requested
    ctx.stop_after(1e-9, 5.0)
    assert ctx.stop_requested
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 240))
    ctx.stop_after(60.0, 5.0)
    assert ctx.stop_requested
    ctx.stop_after(60.0, 1.0)
    assert not ctx.stop_requested


# --- the stage on its ranks --------------------------------------------------------------------------------------


class Run:
    """A run folder with traces and a configuration."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder / "r"
        self.stage = self.folder / "sft" / "astro"
        self.config = folder / "config.yaml"
        (self.folder / "traces").mkdir(parents=True)
        draw = random.Random(0)
        rows = [
            {"prompt": f"{a} + {b} =", "completion": " " + " ".join(str(draw.randrange(9)) for _ in range(b + 1))}
            for a in range(8)
            for b in range(12)
        ]
        (self.folder / "traces" / "astro.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.config.write_text(
            yaml.safe_dump(
                {
                    "name": "r",
                    "runs_dir": str(folder),
                    "model": {"path": str(model)},
                    "problems": {"train": [{"type": "signs", "count": 1}]},
                    "precision": {"dtype": "bf16"},
                    "parallel": {"data_parallel_size": 2, "use_distributed_optimizer": True},
                    "sft": {
                        "num_epochs": 2,
                        "seq_length": 48,
                        "global_batch_size": 2,
                        "loss_on": "completion",
                        "optimizer": {"lr": 1e-3},
                        "checkpoint": {"every_steps": 5, "keep_last": 2, "keep_every": 10},
                    },
                }
            )
        )

    def start(self, *overrides: str, launcher: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "astro_hpc", "sft", str(self.config), *overrides],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> str:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        return output

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        while len(read_metrics(self.stage / "metrics.jsonl")) < step:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)

    def processes(self) -> list[int]:
        return alive(str(self.folder))

    def results(self) -> list[tuple[Any, ...]]:
        return [tuple(row[name] for name in RESULTS) for row in read_metrics(self.stage / "metrics.jsonl")]

    def weights(self) -> str:
        digest: str = json.loads((self.stage / "hf" / "manifest.json").read_text())["sha256"]["model.safetensors"]
        return digest

    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.stage / "manifest.json").read_text())
        return found

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.stage / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two data-parallel ranks, never interrupted."""
    run = Run(tmp_path_factory.mktemp("whole"), tiny_llama)
    run.finish(run.start())
    return run


def test_the_stage_starts_its_ranks_and_is_done_once(whole: Run) -> None:
    rows = read_metrics(whole.stage / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > 15
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert whole.manifest()["counts"]["ranks"] == 2
    logs = whole.folder / "logs" / "sft" / "astro" / "attempt_1"
    assert {path.name for path in logs.glob("*.log")} == {"rank_0.log", "rank_1.log"}
    last = len(rows)
    kept = {*range(10, last, 10), (last - 1) // 5 * 5, last}  # every tenth, and the two newest
    expected = {f"step_{number:08d}" for number in kept}
    assert set(whole.checkpoints()) == {"latest", *expected}
    assert "done already" in whole.finish(whole.start())
    assert {path.name for path in logs.parent.iterdir()} == {"attempt_1"}


def test_whatever_cuts_it_off_the_result_is_the_same_to_the_last_bit(
    whole: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, tiny_llama)
    # A rank is killed: the other goes too, and the dead one is named.
    process = run.start()
    run.wait_for_step(3, process)
    ranks = [pid for pid in run.processes() if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(min(ranks), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 of 2 was killed by SIGKILL" in output
    assert "attempt_1/rank_1.log" in output
    wait_until_gone(str(run.folder))
    # SIGUSR1: both save the same step.
    process = run.start()
    run.wait_for_step(7, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    done = len(run.results())
    assert f"stopped after step {done} of" in output
    assert (run.stage / "checkpoints" / "latest").read_text().strip() == f"step_{done:08d}"
    assert "Traceback" not in output
    # The starting process is killed while a checkpoint is being written.
    process = run.start()
    run.wait_for_step(done + 1, process)
    while not list((run.stage / "checkpoints").glob(".step_*.tmp")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.kill()
    process.wait()
    wait_until_gone(str(run.folder))
    assert not (run.stage / "manifest.json").exists()
    # torchrun brings the ranks for the last attempt.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    output = run.finish(run.start(launcher=torchrun))
    assert "going on after step" in output
    assert run.results() == whole.results()
    assert run.weights() == whole.weights()
    assert not list((run.stage / "checkpoints").glob(".*"))
    assert run.manifest()["attempt"] == 4


def test_other_parallel_sizes_go_on_with_the_same_batches(whole: Run, tiny_llama: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, tiny_llama)
    one = "parallel.data_parallel_size=1"
    process = run.start(one, "sft.checkpoint.deadline_minutes=0.0001")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    done = len(run.results())
    assert 0 < done < len(whole.results())
    # As an srun step would: one process a rank, no supervisor.
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "MASTER_ADDR": "127.0.0.1"}
    processes = [run.start(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **slurm) for rank in range(2)]
    for process in processes:
        run.finish(process)
    for ours, theirs in zip(run.results(), whole.results(), strict=True):
        assert ours[0] == theirs[0]
        assert ours[3:] == theirs[3:]
        assert ours[1] == pytest.approx(theirs[1], rel=2e-2)
    assert run.manifest()["counts"]["ranks"] == 2


def test_sizes_that_cannot_work_are_refused_before_anything_starts(tiny_llama: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, tiny_llama)
    process = run.start("parallel.tensor_parallel_size=2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "key/value heads" in output
    assert "possible: 1" in output
    assert not run.stage.exists()
