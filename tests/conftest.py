"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from slurm_box import load_sandbox_module

Sandbox = Any  # of tools/slurm_sandbox.py

# Two processes of a test must not fight for the cores with one thread team each.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

# A property that holds slowly, on a busy machine, holds.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skipped test fails, unless it is marked `gpu`: what is not run is not tested, and must not look so."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped ({_reason(report)}); only tests marked gpu may be"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a file that skips itself."""
    report = yield
    if report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped ({_reason(report)}); only tests marked gpu may be"
    return report


def _reason(report: Any) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct as a Hugging Face folder, from the installation's own copy."""
    from astro_hpc.conversion.embedded import resolve_model

    return resolve_model("embedded:smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tiny_llama(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama (2 layers, hidden 64, tied) with SmolLM2's tokenizer, float32."""
    from tiny_models import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", smollm2)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Sandbox]:
    """A real Slurm of four virtual nodes with 8 pretended GPUs each, shared by all test modules; no accounting."""
    sandbox = _sandbox(num_nodes=4, min_job_age=4)
    yield sandbox
    sandbox.down()


@pytest.fixture(scope="session")
def slurm_with_accounting() -> Iterator[Sandbox]:
    """Two nodes and slurmdbd: sacct works."""
    sandbox = _sandbox(num_nodes=2, min_job_age=4, accounting=True)
    yield sandbox
    sandbox.down()


def _sandbox(**options: int) -> Sandbox:
    module = load_sandbox_module()
    try:
        module.check_installed(bool(options.get("accounting")))
    except module.SandboxError as missing:
        pytest.skip(str(missing))
    # Not below pytest's own folders: their paths are too long for a socket.
    sandbox = module.Sandbox(Path(tempfile.mkdtemp(prefix="slurm-")), die_with_parent=True, kill_wait=3, **options)
    sandbox.up()
    return sandbox
