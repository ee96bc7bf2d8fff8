"""The run room: atomic files, journals that survive kill -9, locks, seeds, the stage contract."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astro_hpc.config import ConfigError, load_config
from astro_hpc.run.files import (
    Journal,
    Lock,
    atomic_dir,
    fingerprint,
    read_jsonl,
    write_json_atomic,
    write_jsonl_atomic,
)
from astro_hpc.run.metrics import MetricsLog, read_metrics
from astro_hpc.run.seeds import derive_seed
from astro_hpc.run.stage import Stage, run_stage

ROOT = Path(__file__).parent.parent


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl_atomic(path, [{"x": 1}])

    def rows():
        yield {"x": 2}
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError):
        write_jsonl_atomic(path, rows())
    assert list(read_jsonl(path)) == [{"x": 1}]
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_atomic_dir_replaces_whole_or_not_at_all(tmp_path):
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "one").write_text("1")
    with pytest.raises(RuntimeError), atomic_dir(tmp_path / "out") as folder:
        (folder / "two").write_text("2")
        raise RuntimeError
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["one"]
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "three").write_text("3")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["three"]
    assert os.listdir(tmp_path) == ["out"]


def test_read_jsonl_names_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n{"x": \n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: not JSON"):
        list(read_jsonl(path))
    path.write_text('{"x": 1}\n[2]\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: expected a JSON object"):
        list(read_jsonl(path))
    with pytest.raises(ConfigError, match="can't be read"):
        list(read_jsonl(tmp_path / "none.jsonl"))


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20)), max_size=8), st.data())
def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, values, data):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    with Journal(path) as journal:
        for value in values:
            journal.append(value)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    assert list(Journal.read(path)) == values[:kept]
    with Journal(path) as journal:
        journal.append("after")
    assert list(Journal.read(path)) == [*values[:kept], "after"]


def test_damage_inside_a_journal_is_an_error(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append({"a": 1})
        journal.append({"a": 2})
    path.write_bytes(path.read_bytes().replace(b'{"a": 1}', b'{"a": 7}'))
    with pytest.raises(ConfigError, match=r"j\.jsonl:1: damaged"):
        list(Journal.read(path))


def test_a_lock_dies_with_its_owner(tmp_path):
    program = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from astro_hpc.run.files import Lock
        with Lock(Path({str(tmp_path)!r}) / "lock"):
            print("held", flush=True)
            time.sleep(60)
        """
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match=f"in use by process {owner.pid}"), Lock(tmp_path / "lock"):
        pass
    owner.kill()
    owner.wait()
    with Lock(tmp_path / "lock"):
        pass


@given(st.integers(0, 2**40), st.lists(st.text(max_size=8) | st.integers(0, 99), max_size=4))
def test_seeds_are_stable_and_in_range(seed, names):
    assert 0 <= derive_seed(seed, *names) < 2**63
    assert derive_seed(seed, *names) == derive_seed(seed, *names)
    assert derive_seed(seed, *names) != derive_seed(seed + 1, *names)


def test_names_of_seeds_do_not_run_together():
    assert len({derive_seed(1, "a", "b"), derive_seed(1, "ab"), derive_seed(1, 1), derive_seed(1, "1")}) == 4


def test_fingerprints_follow_content_and_names(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_text("1")
    before = fingerprint(folder)
    (folder / ".hidden").write_text("x")
    assert fingerprint(folder) == before
    (folder / "a").rename(folder / "b")
    assert fingerprint(folder) != before
    with pytest.raises(ConfigError, match="no such file"):
        fingerprint(tmp_path / "none")


def test_metrics_are_cut_at_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.log(step, loss=step / 2)
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    with MetricsLog(path, resume_step=3) as log:
        log.log(3, loss=9.0)
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 0.5), (2, 1.0), (3, 9.0)]


# --- the stage contract ------------------------------------------------------------------------------------------


def _config(tmp_path, **overrides):
    return load_config(
        ROOT / "configs" / "demo.yaml", [f"runs_dir={tmp_path}", *(f"{k}={v}" for k, v in overrides.items())]
    )


def _stage(tmp_path, calls, settings=None):
    def body(ctx):
        calls.append(ctx.resumed)
        ctx.count(tokens=5)
        out = ctx.dir / "out.txt"
        out.write_text("result")
        return [out]

    return Stage("toy", Path("toy"), {"data": tmp_path / "data"}, settings or {"a": {"b": 1}}, body)


def test_a_done_stage_is_skipped_and_a_changed_one_refused(tmp_path):
    cfg = _config(tmp_path)
    (tmp_path / "data").write_text("input")
    calls = []
    assert run_stage(cfg, _stage(tmp_path, calls))
    manifest = json.loads((cfg.run_dir / "toy" / "manifest.json").read_text())
    assert manifest["counts"] == {"tokens": 5}
    assert list(manifest["outputs"]) == ["toy/out.txt"]
    assert not run_stage(cfg, _stage(tmp_path, calls))
    assert calls == [False]

    with pytest.raises(
        ConfigError, match=r"done with other settings: a\.b=1 \(now 2\); give the run a new name, or --redo"
    ):
        run_stage(cfg, _stage(tmp_path, calls, {"a": {"b": 2}}))
    (tmp_path / "data").write_text("changed")
    with pytest.raises(ConfigError, match="other inputs: data"):
        run_stage(cfg, _stage(tmp_path, calls))
    assert run_stage(cfg, _stage(tmp_path, calls), redo=True)
    assert (cfg.run_dir / "toy.old-1" / "out.txt").exists()
    assert calls == [False, False]


def test_a_missing_input_or_output_is_named(tmp_path):
    cfg = _config(tmp_path)
    with pytest.raises(ConfigError, match="its input data is missing"):
        run_stage(cfg, _stage(tmp_path, []))
    assert not cfg.run_dir.exists()
    (tmp_path / "data").write_text("input")
    run_stage(cfg, _stage(tmp_path, []))
    (cfg.run_dir / "toy" / "out.txt").unlink()
    with pytest.raises(ConfigError, match=r"marked done but toy/out\.txt is gone"):
        run_stage(cfg, _stage(tmp_path, []))


def test_a_failed_stage_resumes_and_leaves_no_manifest(tmp_path):
    cfg = _config(tmp_path)
    (tmp_path / "data").write_text("input")
    stage = _stage(tmp_path, calls := [])

    def failing(ctx):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        run_stage(cfg, Stage(stage.label, stage.dir, stage.inputs, stage.settings, failing))
    assert not (cfg.run_dir / "toy" / "manifest.json").exists()
    assert run_stage(cfg, stage)
    assert calls == [True]
    assert json.loads((cfg.run_dir / "toy" / "manifest.json").read_text())["attempt"] == 2


def test_a_child_dies_with_its_killed_parent(tmp_path):
    program = textwrap.dedent(
        """
        import subprocess, sys, os, time
        child = subprocess.Popen([sys.executable, "-c",
            "import os,sys,time; from astro_hpc.run.process import die_with_parent;"
            "die_with_parent(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(60)", str(os.getpid())])
        time.sleep(60)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its parent")


def test_json_is_written_whole(tmp_path):
    write_json_atomic(tmp_path / "x.json", {"ü": [1, 2.5, None]})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"ü": [1, 2.5, None]}
