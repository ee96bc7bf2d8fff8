"""Only tests marked `gpu` may be skipped: the rule in conftest.py, tried on a suite of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SUITE = """
import pytest

def test_passes():
    pass

@pytest.mark.gpu
def test_on_a_gpu():
    pass

@pytest.mark.xfail(reason="known")
def test_known_to_fail():
    assert False
"""
SKIPPING = """
import pytest

@pytest.mark.skipif(True, reason="not today")
def test_marked():
    pass

def test_inside():
    pytest.importorskip("no_such_module")
"""
SKIPPING_FILE = "import pytest\npytest.importorskip('no_such_module')\n"


def outcome(folder: Path) -> tuple[int, str]:
    # The copied conftest.py finds the modules beside the original.
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-ra", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    return result.returncode, result.stdout + result.stderr


def suite(folder: Path, **files: str) -> Path:
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_only_gpu_tests_may_be_skipped(tmp_path: Path) -> None:
    code, said = outcome(suite(tmp_path, test_good=SUITE))
    assert code == 0, said
    assert "1 passed, 1 skipped, 1 xfailed" in said
    assert "needs an NVIDIA GPU" in said  # visibly
    code, said = outcome(suite(tmp_path, test_skipping=SKIPPING))
    assert code == 1
    assert "test_marked was skipped" in said
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed, 1 error" in said
    code, said = outcome(suite(tmp_path, test_file=SKIPPING_FILE))
    assert code != 0
    assert "test_file.py was skipped" in said
