"""Where the numbers of each step go: TensorBoard, Weights & Biases (offline), nowhere; and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import MetricsConfig, WandbConfig
from astro_hpc.run.metrics import Metrics, check_metrics, open_metrics, read_metrics


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every event file in the order of writing."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [
        (value.tag, event.step, value.tensor.float_val[0])
        for path in sorted((folder / "tensorboard").iterdir())
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


def wandb_history(path: Path) -> list[dict[str, str]]:
    """The history rows of a W&B file, {key: JSON}: LevelDB's log format, in blocks of 32 KiB, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header: the block's end is padding
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            parsed, record = Record.FromString(record), b""
            if parsed.WhichOneof("record_type") == "history":
                rows.append({i.key or ".".join(i.nested_key): i.value_json for i in parsed.history.item})
    return rows


def test_a_resumed_log_has_each_step_once_everywhere(tmp_path: Path) -> None:
    settings = MetricsConfig(tensorboard=True)
    with open_metrics(tmp_path, settings, "demo/sft") as log:
        for step in range(1, 5):
            log.log(step, loss=step / 2, note="text", flag=True)
        log.sync()
    with open_metrics(tmp_path, settings, "demo/sft", resume_step=3) as log:
        for step in range(3, 6):
            log.log(step, loss=float(step))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 3.0), (4, 4.0), (5, 5.0)]
    assert rows[0]["note"] == "text"
    assert scalars(tmp_path) == [("loss", row["step"], row["loss"]) for row in rows]


def test_ranks_that_do_not_write_use_the_same_calls(tmp_path: Path) -> None:
    with open_metrics(tmp_path, MetricsConfig(tensorboard=True), "demo/sft", write=False) as log:
        log.log(1, loss=0.5)
        log.sync()
    assert type(log) is Metrics
    assert list(tmp_path.iterdir()) == []


def test_wandb_writes_offline_and_keeps_one_run_for_all_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")  # whatever the settings of this test become, nothing leaves here
    settings = MetricsConfig(wandb=WandbConfig(enabled=True, mode="offline"))
    with open_metrics(tmp_path, settings, "demo/sft") as log:
        log.log(1, loss=0.5)
    identity = (tmp_path / "wandb-id").read_text().strip()
    with open_metrics(tmp_path, settings, "demo/sft", resume_step=2) as log:
        log.log(2, loss=0.25)
    assert (tmp_path / "wandb-id").read_text().strip() == identity
    written = list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert len(written) == 2

    def losses() -> list[str]:
        return sorted(row["loss"] for path in written for row in wandb_history(path))

    deadline = time.monotonic() + 20
    while len(losses()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # W&B's own process may write the file's end just after it has said that it has finished
    assert losses() == ["0.25", "0.5"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_missing_package_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for settings in (MetricsConfig(tensorboard=True), MetricsConfig(wandb=WandbConfig(enabled=True))):
        with pytest.raises(ConfigError, match=r"not installed; pip install 'astro-hpc\["):
            check_metrics(settings)
        with pytest.raises(ConfigError):
            open_metrics(tmp_path, settings, "demo/sft")
    assert list(tmp_path.iterdir()) == []
    check_metrics(MetricsConfig())
    assert json.loads(MetricsConfig().model_dump_json())["wandb"]["enabled"] is False
