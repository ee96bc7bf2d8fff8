"""The check of a job's nodes: what makes one bad, and that nodes find each other's files and reduce together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from astro_hpc.launch.node import NodeLimits, check_node, gpus

ROOT = Path(__file__).parent.parent
QUICK = NodeLimits(min_disk_gb=0, wait=1.0, all_reduce=False)


def canary(folder: Path, node: str, skew: float = 0.0) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / f"{node}.json"
    path.write_text(json.dumps({"node": node, "time": time.time() + skew, "checks": []}))


def test_one_node_alone(tmp_path):
    [report] = check_node("n1", ["n1"], tmp_path / "meet", NodeLimits(disk="$HERE", min_disk_gb=0))
    assert report.verdict == "bad"
    assert report.line() == "bad n1 local disk: $HERE: No such file or directory"
    limits = NodeLimits(disk=str(tmp_path), min_disk_gb=1e9)
    [report] = check_node("n1", ["n1"], tmp_path / "meet", limits)
    assert "free of 1e+09 wanted" in report.reason
    [report] = check_node("n1", ["n1"], tmp_path / "meet", NodeLimits(disk=str(tmp_path), min_disk_gb=0))
    assert report.line() == "ok n1"
    assert [path.name for path in tmp_path.iterdir()] == ["meet"], "the probe of the disk is gone"


def test_the_first_node_names_the_silent_one_and_the_one_whose_clock_is_off(tmp_path):
    for node, skew in (("n2", 0.0), ("n3", 90.0), ("n4", 0.2)):
        canary(tmp_path / "meet", node, skew)
    nodes = ["n1", "n2", "n3", "n4", "n5"]
    reports = check_node("n1", nodes, tmp_path / "meet", QUICK)
    assert [report.verdict for report in reports] == ["ok", "ok", "bad", "ok", "bad"]
    assert "+90 s against the other nodes" in reports[2].reason
    assert reports[4].reason == "nothing heard from it within 1 s"


def test_a_node_that_sees_nobody_blames_nobody_and_a_silent_first_one_is_named_by_the_others(tmp_path):
    [report] = check_node("n2", ["n1", "n2"], tmp_path / "not-shared", QUICK)
    assert report.verdict == "unsure", "n1, which sees nothing of n2, will say so"
    [report] = check_node("n1", ["n1", "n2", "n3"], tmp_path / "not-shared-either", QUICK)
    assert report.verdict == "unsure", "n2 and n3, which see each other, will name n1"
    canary(tmp_path / "meet", "n3", 0.0)
    reports = check_node("n2", ["n1", "n2", "n3"], tmp_path / "meet", QUICK)
    assert [report.line() for report in reports] == ["bad n1 nothing heard from it within 1 s", "ok n2"]
    (tmp_path / "file").write_text("")
    [report] = check_node("n1", ["n1", "n2"], tmp_path / "file" / "folder", QUICK)
    assert report.line().startswith("bad n1 shared folder: ")


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("0, 81559, 81000, 0\n1, 81559, 81000, [N/A]\n", {}),
        ("0, 81559, 81000, 3\n1, 81559, 40000, 0\n", {"GPU 0 ECC", "GPU 1 memory"}),
        ("0, 81559, 81000, 0\n", {"GPU"}),
        ("", {"GPU"}),
    ],
)
def test_gpus_by_what_nvidia_smi_writes(text, failed, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    rows = list(gpus(NodeLimits(), ask=lambda fields: text))
    assert {row.name for row in rows if row.status == "fail"} == set(failed)
    assert all(row.remedy for row in rows if row.status == "fail")


def test_a_promised_gpu_that_nobody_can_be_asked_about_is_a_warning(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    [row] = gpus(NodeLimits(), ask=lambda fields: None)
    assert row.status == "warn"
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert list(gpus(NodeLimits(), ask=lambda fields: None)) == []


def test_two_nodes_reduce_together_over_the_command_line(tmp_path):
    def start(node: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "SLURMD_NODENAME": node, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        options = ["--nodes", "n1,n2", "--folder", str(tmp_path / "meet"), "--min-disk-gb", "0"]
        command = [sys.executable, "-m", "astro_hpc", "doctor", "--node", *options]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    first, second = start("n1"), start("n2")
    assert first.communicate(timeout=200)[0] == "ok n1\nok n2\n"
    assert second.communicate(timeout=200)[0] == "ok n2\n"
    assert (first.returncode, second.returncode) == (0, 0)
