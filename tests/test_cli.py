"""The command line: help everywhere, user errors in one line with exit code 2."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from astro_hpc.cli import _told
from astro_hpc.config import ConfigError
from astro_hpc.run.files import InUse, Lock

ROOT = Path(__file__).parent.parent
COMMANDS = [
    "demo",
    "run",
    "warmup",
    "search",
    "clone",
    "sft",
    "select",
    "rl",
    "eval",
    "serve",
    "launch",
    "cancel",
    "doctor",
    "report",
    "status",
    "trace",
    "verify",
]


def _run(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "astro_hpc", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_help_names_every_command_and_each_explains_itself():
    top = _run("--help")
    assert top.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in top.stdout


@pytest.mark.parametrize("command", ["search", "run", "status"])
def test_help_of_a_command(command):
    result = _run(command, "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "none.yaml"), "none.yaml: can't be read"),
        (("search", "configs/demo.yaml", "search.k=8"), "unknown key search.k"),
        (("search", "configs/demo.yaml", "--shard", "3", "--num-shards", "2"), "--shard 3: must be from 0 to 1"),
        (("sft", "configs/demo.yaml", "--arm", "direct"), "--arm direct: the configuration's arms are astro"),
        (("warmup", "configs/llama3.1-70b.yaml"), "warmup.enabled is false"),
        (
            ("search", "configs/demo.yaml", "warmup.enabled=false", "model.path=embedded:gpt"),
            "'embedded:gpt' is not embedded",
        ),
        (("search", "configs/demo.yaml", "model.path=/nowhere", "warmup.enabled=false"), "no folder /nowhere"),
        (("status", "nowhere"), "nowhere: not a run folder"),
        (("report", "nowhere"), "nowhere: not a run folder"),
        (("verify", "none.jsonl"), "none.jsonl"),
        (("serve", "configs/demo.yaml"), "demo/warmup/hf: no config.json; expected a Hugging Face model folder"),
        (("serve", "configs/demo.yaml", "inference.num_servers=2"), "set engine to vllm-server"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(arguments, message, tmp_path):
    extra = [f"runs_dir={tmp_path}"] if arguments[0] in ("run", "search", "sft", "warmup", "serve") else []
    result = _run(*arguments, *extra)
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_stage_out_of_order_names_what_to_run_first(tmp_path):
    result = _run("clone", "configs/demo.yaml", f"runs_dir={tmp_path}")
    assert result.returncode == 2
    assert "run the stage that makes it first" in result.stderr.strip().splitlines()[-1]


def test_verify_reads_and_writes_lines(tmp_path):
    cases = [
        {"gold": "1/2", "pred": r"so \boxed{0.5}"},
        {"gold": "7", "pred": r"\boxed{8}"},
        {"gold": "7", "pred": "?"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    result = _run("verify", tmp_path / "in.jsonl")
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["outcome"] for line in result.stdout.splitlines()] == ["right", "wrong", "wrong"]


def test_status_of_a_begun_run(tmp_path):
    config = tmp_path / "runs" / "x" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text((ROOT / "configs" / "demo.yaml").read_text())
    rows = json.loads(_run("status", config.parent, "--json").stdout)
    assert [row["state"] for row in rows] == ["waiting"] * len(rows)
    assert rows[0]["stage"] == "warmup"
    assert rows[-1]["stage"] == "eval"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/x"), 74),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 74),
        (RuntimeError("a writer failed: OSError(28, 'No space left on device')"), 74),
        (ConfigError("x: can't be written (No space left on device)"), 74),
        (InUse("runs/x: sft: in use by process 7"), 73),
        (ConfigError("unknown key"), 2),
        (OSError(errno.EACCES, "Permission denied", "/runs/x"), 2),
        (OSError(errno.ECONNREFUSED, "Connection refused"), None),
        (KeyError("step"), None),
    ],
)
def test_what_passes_by_itself_has_an_exit_code_of_its_own(error, code):
    found, line = _told(error)
    assert found == code
    assert "\n" not in line


def test_a_run_in_use_leaves_with_73(tmp_path):
    (tmp_path / "cluster.yaml").write_text("{executor: local, gpus_per_node: 0}")
    with Lock(tmp_path / "demo" / "jobs" / ".launch.lock"):
        result = _run("launch", "configs/demo.yaml", "--cluster", tmp_path / "cluster.yaml", f"runs_dir={tmp_path}")
    assert result.returncode == 73, result.stderr
    assert "demo: launch: in use by process" in result.stderr


def test_status_watches_a_run_that_was_not_launched(tmp_path):
    config = tmp_path / "runs" / "x" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text((ROOT / "configs" / "demo.yaml").read_text())
    command = [sys.executable, "-m", "astro_hpc", "status", str(config.parent), "--watch"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    lines = [process.stdout.readline()]
    while "next: " not in lines[-1]:
        assert lines[-1], process.stderr.read()
        lines.append(process.stdout.readline())
    time.sleep(1)  # it waits now: an interrupt in the middle of printing may get lost
    assert process.poll() is None, "it goes on"
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            break
    assert process.returncode == 0
    assert process.stderr.read() == ""
