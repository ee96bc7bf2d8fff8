"""Rates and time left, from lines as `Progress` prints them."""

from __future__ import annotations

import pytest

from astro_hpc.launch.pace import Pace, parse_pace, read_pace, together
from astro_hpc.run.progress import Progress


@pytest.mark.parametrize("per_second", [0.05, 0.9, 30.0])
def test_the_last_line_of_progress_is_read_back(per_second, tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 0.0, *(10.0 for _ in range(20))])
    monkeypatch.setattr("astro_hpc.run.progress.time.monotonic", lambda: next(clock))
    with Progress("search/shard-00001-of-00004", total=1000, unit="trees", done=100) as progress:
        progress.update(round(10 * per_second) or 1, tokens="5/s")
    log = tmp_path / "rank-0.log"
    log.write_text("x" * 10_000 + "\n" + capsys.readouterr().err + "search: 3 of 10 trees hold a right answer\n")
    pace = read_pace(log)
    done = round(10 * per_second) or 1
    assert (pace.done, pace.total, pace.unit) == (100 + done, 1000, "trees")
    assert pace.per_minute == pytest.approx(6 * done, rel=0.02)


def test_a_log_without_progress_has_no_pace(tmp_path):
    assert parse_pace("Traceback\nValueError: 3/4 things (7)") is None
    assert read_pace(tmp_path / "gone.log") is None
    assert together([], 4) is None


def test_running_and_pending_tasks_make_the_time_left():
    paces = [Pace(10, 100, "trees", 30.0), Pace(50, 100, "trees", 60.0)]
    unit, per_minute, left = together(paces, pending=3)
    assert (unit, per_minute) == ("trees", 90.0)
    assert left == pytest.approx(60 * (90 + 50 + 300) / 90)
    assert together([Pace(0, 5, "steps", 0.0)], 0) == ("steps", 0.0, None)
