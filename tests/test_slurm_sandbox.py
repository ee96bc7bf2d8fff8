"""The sandbox is a real Slurm: jobs, arrays, GPUs; several at once; any user; nothing left behind."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from slurm_box import SCRIPT, load_sandbox_module

SLOW_TO_DIE = """#!/bin/bash
trap '' TERM
setsid nohup sleep 333.25 >/dev/null 2>&1 &
env -i sleep 333.25 &
sleep 333.25
"""


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        yield Path(name) / "box"


def _tool(*arguments, python=sys.executable, prefix=(), **environment):
    command = [*prefix, python, SCRIPT, *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100, env=environment)


def _sleepers():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"333.25" in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_jobs_run_on_all_nodes_with_their_gpus(slurm):
    show = "echo $SLURMD_NODENAME $SLURM_LOCALID $CUDA_VISIBLE_DEVICES $(hostname)"
    lines = slurm.run("srun", "-N4", "--ntasks-per-node=2", "--gpus-per-node=3", "bash", "-c", show).splitlines()
    assert sorted(line.rpartition(" ")[0] for line in lines) == [
        f"n{node} {local} 0,1,2" for node in range(1, 5) for local in range(2)
    ]
    if os.getuid() == 0:
        assert all(line.split()[0] == line.split()[-1] for line in lines), "hostname says the node's name"


def test_an_array_drains(slurm, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/bash\n[ "$SLURM_ARRAY_TASK_ID" != 7 ] && touch "$1/$SLURM_ARRAY_TASK_ID"\n')
    slurm.run("sbatch", "--array=0-39", "-o", "/dev/null", "--wait", script, tmp_path, check=False)
    assert len(list(tmp_path.iterdir())) == 40  # all but the seventh, and the script
    assert not (tmp_path / "7").exists()


def test_what_no_cluster_takes_is_refused_at_once(slurm):
    for options in (["--gpus-per-node=9"], ["-p", "nowhere"], ["-t", "2-00:00:00"], ["-N", "5"]):
        with pytest.raises(load_sandbox_module().SandboxError, match="Batch job submission failed"):
            slurm.run("sbatch", *options, "--wrap", "true")


def test_a_second_sandbox_comes_and_goes_beside_the_first(slurm, folder, tmp_path):
    up = _tool("up", "--dir", folder, "--nodes", "2", "--gpus-per-node", "0")
    assert up.returncode == 0, up.stderr
    assert "2 nodes are ready" in up.stdout
    env = _tool("env", "--dir", folder).stdout
    assert re.fullmatch(r"export SLURM_CONF=(.*)\n", env).group(1) == str(folder / "slurm.conf")
    (tmp_path / "job.sh").write_text(SLOW_TO_DIE)
    submit = (
        f'eval "$({sys.executable} {SCRIPT} env --dir {folder})"; sbatch -o /dev/null {tmp_path}/job.sh; sinfo -h -o %D'
    )
    shell = subprocess.run(["bash", "-c", submit], capture_output=True, text=True, timeout=30, check=True)
    assert shell.stdout.splitlines()[-1] == "2"
    deadline = time.monotonic() + 20
    while len(_sleepers()) < 3:
        assert time.monotonic() < deadline, _tool("status", "--dir", folder).stdout
        time.sleep(0.1)
    status = _tool("status", "--dir", folder)
    assert status.returncode == 0
    assert re.search(r"slurmctld +running", status.stdout)
    assert "job.sh" in status.stdout
    assert "runs there already" in _tool("up", "--dir", folder).stderr

    down = _tool("down", "--dir", folder)
    assert down.returncode == 0, down.stderr
    assert _sleepers() == []
    assert load_sandbox_module().processes_of(folder) == []
    assert not folder.exists()
    assert set(slurm.node_states()) == {"n1", "n2", "n3", "n4"}, "the other one still answers"


def test_when_what_started_it_is_killed_nothing_is_left_of_it_and_its_jobs(slurm, folder):
    code = (
        "import sys, time; from pathlib import Path; from slurm_box import load_sandbox_module\n"
        "box = load_sandbox_module().Sandbox(Path(sys.argv[1]), num_nodes=1, die_with_parent=True); box.up()\n"
        "box.run('sbatch', '-o', '/dev/null', '--wrap', 'srun sleep 1000')\n"
        "box.wait_for('the step', lambda: '.0' in box.run('squeue', '-h', '-s', '-o', '%i'))\n"
        "print('runs', flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", code, folder]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "runs\n"
        processes_of = load_sandbox_module().processes_of
        assert processes_of(folder)
        parent.kill()
    slurm.wait_for("its end", lambda: not folder.exists() and not processes_of(folder))


def test_it_needs_no_root(slurm, folder, tmp_path):
    script = folder.parent / "slurm_sandbox.py"  # where everybody may read it
    script.write_bytes(SCRIPT.read_bytes())
    folder.parent.chmod(0o777)
    name, as_user = getpass.getuser(), ["env", f"HOME={folder.parent}"]
    if os.getuid() == 0:
        name, as_user = "nobody", ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *as_user]

    def tool(command):
        command = [
            *as_user,
            shutil.which("python3", path="/usr/bin:/bin") or sys.executable,
            str(script),
            command,
            "--dir",
            str(folder),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")

    up = tool("up")
    try:
        assert up.returncode == 0, up.stderr
        srun = [*as_user, f"SLURM_CONF={folder}/slurm.conf", "srun", "-N4", "--gpus-per-node=2"]
        show = "echo $(id -un) $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
        result = subprocess.run([*srun, "bash", "-c", show], capture_output=True, text=True, timeout=30, cwd="/")
        assert sorted(result.stdout.splitlines()) == [f"{name} n{n} 0,1" for n in range(1, 5)], result.stderr
    finally:
        down = tool("down")
    assert down.returncode == 0, down.stderr
    assert load_sandbox_module().processes_of(folder) == []


def test_without_slurm_it_says_what_to_install(folder, tmp_path, monkeypatch):
    module = load_sandbox_module()
    monkeypatch.setattr(module, "_which", lambda program: None)
    with pytest.raises(
        module.SandboxError, match=r"slurmctld, .* not found; install with: apt-get install -y munge slurm-wlm$"
    ):
        module.Sandbox(folder).up()
    with pytest.raises(module.SandboxError, match=r"apt-get install -y mariadb-server munge slurm-wlm slurmdbd$"):
        module.Sandbox(folder, accounting=True).up()
    assert not folder.exists()


def test_a_folder_of_something_else_is_left_alone(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    for command in ("up", "down", "env", "status"):
        result = _tool(command, "--dir", folder)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1
    assert (folder / "thesis.tex").read_text() == "x"


def test_what_a_killed_sandbox_left_is_cleared_away(slurm, folder):
    assert _tool("up", "--dir", folder, "--nodes", "1").returncode == 0
    for pid in load_sandbox_module().processes_of(folder):
        os.kill(pid, 9)
    assert _tool("status", "--dir", folder).returncode == 1
    assert _tool("up", "--dir", folder, "--nodes", "1").returncode == 0
    assert _tool("down", "--dir", folder).returncode == 0


def test_accounting_remembers_what_left_the_queue(slurm_with_accounting):
    box = slurm_with_accounting
    job = box.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "exit 3").strip()

    def recorded():
        return box.run("sacct", "-XnP", "-j", job, "-o", "State,ExitCode").strip() == "FAILED|3:0"

    box.wait_for("sacct", recorded)
