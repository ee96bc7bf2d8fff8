"""`launch --dry-run`: every sbatch text and the frozen code and configuration, without Slurm, torch or much time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from astro_hpc.config import load_config

ROOT = Path(__file__).parent.parent
NO_TORCH = "import sys; sys.modules.update(torch=None, vllm=None, megatron=None, transformers=None); "


def launch(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    code = NO_TORCH + "from astro_hpc.cli import main; main()"
    command = [sys.executable, "-c", code, "launch", *map(str, arguments)]
    environment = {**os.environ, "PATH": "/nowhere", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_the_large_run_in_full(tmp_path):
    arguments = [ROOT / "configs/llama3.1-70b.yaml", "--cluster", "h100-example", "--dry-run", f"runs_dir={tmp_path}/r"]
    result = launch(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    jobs = tmp_path / "r" / "llama3.1-70b-astro" / "jobs"
    names = [f"{stage}-{arm}" for arm in ("astro", "direct") for stage in ("sft", "select", "select-gather", "rl")]
    names += ["search", "gather", "clone", "clone-gather", "eval", "eval-gather", "report"]
    assert {path.name for path in jobs.glob("*.sbatch")} == {f"{name}.sbatch" for name in names}
    assert "search: would be submitted, 64 tasks" in result.stdout
    for path in jobs.glob("*.sbatch"):
        assert subprocess.run(["bash", "-n", path], check=False).returncode == 0, path
    sft = (jobs / "sft-astro.sbatch").read_text()
    options = "--nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --exclusive --mem=0 --requeue --open-mode=append"
    for option in [*options.split(), "--signal=B:USR1@600", "--kill-on-invalid-dep=yes", f"--chdir={tmp_path}"]:
        assert f"#SBATCH {option}\n" in sft
    assert "--container-image=/shared/images/astro-hpc.sqsh" in sft
    assert "SOCKET_IFNAME" not in sft, "NCCL chooses by itself where network_interface isn't given"
    assert "#SBATCH --array=0-63%32\n" in (jobs / "search.sbatch").read_text()
    assert not (jobs / "submitted.jsonl").exists()


def test_code_and_configuration_are_frozen(tmp_path):
    arguments = [ROOT / "configs/demo.yaml", "--cluster", "sandbox", "--dry-run", f"runs_dir={tmp_path}"]
    assert launch(*arguments).returncode == 0
    jobs = tmp_path / "demo" / "jobs"
    [frozen] = jobs.glob("frozen-*")
    assert load_config(frozen / "config.yaml") == load_config(tmp_path / "demo" / "config.yaml")
    for name in ("cli.py", "problems/styles/minimal-chat.yaml", "report/page.html.j2"):
        source = ROOT / "astro_hpc" / name
        if source.exists():
            assert (frozen / "astro_hpc" / name).read_bytes() == source.read_bytes()
    show = "import astro_hpc, astro_hpc.run.stage as s; print(astro_hpc.__file__, s.source_commit())"
    environment = {**os.environ, "PYTHONPATH": str(frozen), "PYTHONSAFEPATH": "1"}
    run = [sys.executable, "-c", show]
    text = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert text.split()[0] == str(frozen / "astro_hpc" / "__init__.py"), "not the working folder's code"
    assert text.split()[1] == (frozen / "COMMIT").read_text().strip()

    assert launch(*arguments).returncode == 0
    assert list(jobs.glob("frozen-*")) == [frozen], "nothing changed, nothing is copied again"
    kept = {path: path.read_bytes() for path in (tmp_path / "demo" / "config.yaml", jobs / "cluster.yaml")}
    assert launch(*arguments, "seed=8", "--cluster", "local").returncode == 0
    assert len(list(jobs.glob("frozen-*"))) == 2
    assert kept == {path: path.read_bytes() for path in kept}, "it does not change what is running or was done"


def test_a_thousand_and_more_shards_in_arrays_below_the_limit(tmp_path):
    (tmp_path / "c.yaml").write_text("{max_array_size: 1001, stages: {search: {shards: 2500, throttle: 100}}}")
    arguments = [ROOT / "configs/demo.yaml", "--cluster", tmp_path / "c.yaml", "--dry-run", "--json"]
    result = launch(*arguments, "--stages", "warmup,search", f"runs_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    tasks = [row["tasks"] for row in json.loads(result.stdout)["submitted"]]
    assert tasks == [1, 1001, 1001, 498]
    last = (tmp_path / "demo" / "jobs" / "search-from-2002.sbatch").read_text()
    assert "#SBATCH --array=0-497%100\n" in last
    assert "SHARD=$((SLURM_ARRAY_TASK_ID + 2002))" in last


def test_the_local_cluster_writes_one_script(tmp_path):
    arguments = [ROOT / "configs/demo.yaml", "--cluster", "local", "--dry-run", f"runs_dir={tmp_path}"]
    assert launch(*arguments).returncode == 0
    script = tmp_path / "demo" / "jobs" / "local.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    stages = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("do_stage ")]
    assert stages == ["warmup", "search", "search", "clone", "sft", "select", "rl", "eval", "report"]

    (tmp_path / "c.yaml").write_text("{executor: local, gpus_per_node: 0, stages: {select: {shards: 2}}}")
    assert launch(arguments[0], "--cluster", tmp_path / "c.yaml", "--dry-run", f"runs_dir={tmp_path}").returncode == 0
    selects = [line for line in script.read_text().splitlines() if line.startswith("do_stage select ")]
    assert selects == [
        'do_stage select "$CONFIG" --arm astro --shard 0 --num-shards 2',
        'do_stage select "$CONFIG" --arm astro --shard 1 --num-shards 2',
        'do_stage select "$CONFIG" --arm astro --gather',
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cluster", "nowhere"), "--cluster nowhere: no such file"),
        (("--cluster", "sandbox", "--stages", "serch"), "'serch' is no stage of this run"),
        (("--cluster", "sandbox", "--stages", "rl"), "rl-astro: needs sft-astro, which is neither done nor queued"),
        (("--cluster", "sandbox", "parallel.tensor_parallel_size=0"), "parallel.tensor_parallel_size"),
        (("--cluster", "sandbox", "rl.temperature=0.7"), "rl.temperature=0.7: the trainer's log-probabilities are at"),
        (("--cluster", "sandbox", "rl.mini_batches=7"), "rl.mini_batches=7 does not divide the"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(arguments, message, tmp_path):
    result = launch("configs/demo.yaml", *arguments, "--dry-run", f"runs_dir={tmp_path}")
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_settings_of_rl_don_t_matter_where_it_is_not_launched(tmp_path):
    arguments = ["--cluster", "sandbox", "--dry-run", "--stages", "warmup,search", "rl.temperature=0.7"]
    result = launch("configs/demo.yaml", *arguments, f"runs_dir={tmp_path}")
    assert result.returncode == 0, result.stderr


def test_the_user_s_modules_stay_importable_and_this_code_comes_before_any_other(tmp_path):
    """In a job's script, in slurm/'s, and where the jobs run here; the working folder's code never counts."""
    user, workdir = tmp_path / "user", tmp_path / "work"
    for folder in (user, workdir / "astro_hpc"):
        folder.mkdir(parents=True)
    (user / "my_rewards.py").write_text(
        "def shorter(problem, response, outcome):\n    return 1 / (1 + len(response))\n"
    )
    show = "import astro_hpc, my_rewards; print(astro_hpc.__file__, my_rewards.__file__)"
    scripts = {}
    for cluster in ("sandbox", "local"):
        own = ["--cluster", cluster, "--dry-run", f"runs_dir={tmp_path}", f"name={cluster}"]
        assert launch(ROOT / "configs/demo.yaml", *own, cwd=workdir).returncode == 0
        [frozen] = tmp_path.glob(f"{cluster}/jobs/frozen-*")
        name = "local.sh" if cluster == "local" else "rl-astro.sbatch"
        scripts[tmp_path / cluster / "jobs" / name] = frozen
    scripts[ROOT / "slurm" / "rl.sbatch"] = None
    (workdir / "astro_hpc" / "__init__.py").write_text("raise SystemExit('the wrong code')")
    for script, frozen in scripts.items():
        lines = [line for line in script.read_text().splitlines() if re.match("CODE=|export PYTHONPATH=", line)]
        assert len(lines) == (1 if script.name == "local.sh" else 2)
        code = "\n".join(["cd " + str(workdir if frozen else ROOT), *lines, f'"{sys.executable}" -c "{show}"'])
        environment = {**os.environ, "PYTHONPATH": str(user)}
        run = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == [f"{frozen or ROOT}/astro_hpc/__init__.py", f"{user}/my_rewards.py"]


def test_without_slurm_a_real_launch_says_so(tmp_path):
    result = launch("configs/demo.yaml", "--cluster", "sandbox", f"runs_dir={tmp_path}")
    assert result.returncode == 2
    assert "scontrol: not installed here; launch from a login node, or use --dry-run" in result.stderr


@pytest.mark.parametrize(
    ("folder", "stage", "configured"),
    [("search", "search", 4), ("clone", "clone", 2), ("select-shards/astro", "select", 2), ("eval-shards", "eval", 2)],
)
def test_another_number_of_shards_than_begun_is_refused(folder, stage, configured, tmp_path):
    (tmp_path / "demo" / folder / "shard-00001-of-00007").mkdir(parents=True)
    result = launch("configs/demo.yaml", "--cluster", "sandbox", "--dry-run", f"runs_dir={tmp_path}")
    assert result.returncode == 2
    message = f"was begun in 7 shards, the cluster file says {configured}; set stages.{stage}.shards to 7"
    assert message in result.stderr
