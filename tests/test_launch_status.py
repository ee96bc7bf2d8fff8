"""What `status` says when Slurm can't be asked, and of reasons that are whatever a job's log ended with."""

from __future__ import annotations

from pathlib import Path

import pytest

from astro_hpc.config import ConfigError, load_config
from astro_hpc.config.schema import RunConfig
from astro_hpc.launch import slurm
from astro_hpc.launch.cluster import load_cluster
from astro_hpc.launch.status import job_states, print_states
from astro_hpc.launch.submit import SUBMITTED, launch
from astro_hpc.run.files import Journal

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run whose search was submitted, in two tasks, to a Slurm whose controller doesn't answer."""
    cfg = load_config(ROOT / "configs" / "demo-smoke.yaml", [f"runs_dir={tmp_path}"])
    launch(cfg, load_cluster(Path("sandbox")), dry_run=True)
    with Journal(cfg.run_dir / "jobs" / SUBMITTED) as journal:
        journal.append({"job": "search", "id": "7", "offset": 0, "tasks": "0-1", "array": True})

    def silent() -> list[slurm.Queued]:
        raise ConfigError("squeue: no answer within 30 s")

    monkeypatch.setattr(slurm, "is_available", lambda: True)
    monkeypatch.setattr(slurm, "queue", silent)
    return cfg


def test_a_silent_controller_is_no_failure(cfg: RunConfig) -> None:
    [search] = [state for state in job_states(cfg) if state.job == "search"]
    assert (search.counts["unknown"], search.counts.get("failed")) == (2, None)
    assert search.reason == "Slurm doesn't answer (squeue: no answer within 30 s)"


def test_a_reason_is_shown_as_it_is(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    ended = cfg.run_dir / "jobs" / "ended"
    ended.mkdir()
    (ended / "search-00000").write_text("failed\n1\n0\nn1\n7_0\nlog\nKeyError: '[/INST]' [bold]\n")
    states = job_states(cfg)
    [search] = [state for state in states if state.job == "search"]
    assert (search.counts["failed"], search.counts["unknown"]) == (1, 1)
    print_states(states, {})
    assert "[/INST]" in capsys.readouterr().out.replace("\n", "")
