"""The pool: bounded cost, no lost or left-over process, right from threads and asyncio."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import ReasoningGymSource, SignsSource, VerifierConfig
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.sources import load_source
from astro_hpc.verifier.cli_file import verify_lines
from astro_hpc.verifier.pool import VerifierPool

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from bench_verifier import hostile_answers

HARD = Problem("t/1", "?", "\\frac{x+1}{2}")


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(VerifierConfig()) as pool:
        yield pool


def test_outcomes(pool: VerifierPool) -> None:
    right = pool.verify(HARD, "so \\boxed{\\dfrac12(1+x)}")
    assert (right.outcome, right.answer) == ("right", "\\frac{1}{2}(1+x)")
    assert pool.verify(HARD, "so \\boxed{x}").outcome == "wrong"
    nothing = pool.verify(HARD, "I don't know")
    assert (nothing.outcome, nothing.answer) == ("wrong", None)
    assert pool.verify(HARD, "\\boxed{9^{9^{9^9}}}").outcome == "unknown"
    assert pool.verify(HARD, "\\boxed{" + "x+" * 2000 + "1}").outcome == "unknown"


def test_signs_and_reasoning_gym(pool: VerifierPool) -> None:
    signs = load_source(SignsSource(count=1))[0]
    total = sum(signs.metadata["numbers"])
    all_plus = " + ".join(map(str, signs.metadata["numbers"]))
    expected = "right" if total == signs.metadata["target"] else "wrong"
    assert pool.verify(signs, f"\\boxed{{{all_plus}}}").outcome == expected
    source = ReasoningGymSource(type="reasoning_gym", dataset="chain_sum", count=2)
    for problem in load_source(source):
        assert pool.verify(problem, f"\\boxed{{{problem.answer}}}").outcome == "right"
        assert pool.verify(problem, f"\\boxed{{about {problem.answer}}}").outcome == "wrong"
        assert pool.verify(problem, "\\boxed{\x00junk}").outcome == "wrong"
        changed = Problem(problem.id, problem.text + "!", problem.answer, problem.checker, problem.metadata)
        assert pool.verify(changed, f"\\boxed{{{problem.answer}}}").outcome == "unknown"


def test_a_source_can_have_its_own_policy(pool: VerifierPool) -> None:
    strict = Problem("t/2", "?", "10\\%", metadata={"answer_policy": {"percent": "strict"}})
    assert pool.verify(strict, "\\boxed{10}").outcome == "wrong"
    assert pool.verify(Problem("t/3", "?", "10\\%"), "\\boxed{10}").outcome == "right"


def test_unknown_checker(pool: VerifierPool) -> None:
    with pytest.raises(ConfigError, match="no checker 'oracle'"):
        pool.verify(Problem("t/4", "?", "1", "oracle"), "\\boxed{1}")


def test_a_runaway_answer_is_cut_off_and_the_next_one_served() -> None:
    with VerifierPool(VerifierConfig(timeout_seconds=2.0)) as pool:
        assert pool.verify(HARD, "\\boxed{\\frac{1+x}{2}}").outcome == "right"
        verdict = pool.verify(HARD, "\\boxed{\\prod_{k=1}^{9000} (x+k)}")
        assert verdict.outcome == "unknown"
        assert 1.0 < verdict.seconds <= 2.0
        assert pool.verify(HARD, "\\boxed{\\frac{2+2x}{4}}").outcome == "right"


def test_memory_is_capped() -> None:
    with VerifierPool(VerifierConfig(memory_mb=64)) as pool, pytest.raises(ConfigError, match=r"memory_mb"):
        pool.verify(HARD, "\\boxed{\\frac{1+x}{2}}")


def test_equal_requests_are_asked_once_and_remembered() -> None:
    with VerifierPool(VerifierConfig()) as pool:
        pairs = [(HARD, "\\boxed{\\frac{3+3x}{6}}")] * 50
        assert {verdict.outcome for verdict in pool.verify_many(pairs)} == {"right"}
        assert pool.verify(*pairs[0]).seconds == 0.0


def test_threads_and_asyncio(pool: VerifierPool) -> None:
    answers = [f"\\boxed{{\\frac{{{k}x+{k + i % 2}}}{{{2 * k}}}}}" for i, k in enumerate(range(2, 32))]
    expected = ["right" if i % 2 == 0 else "wrong" for i in range(30)]
    with ThreadPoolExecutor(8) as threads:
        assert [v.outcome for v in threads.map(lambda a: pool.verify(HARD, a), answers)] == expected

    async def gather() -> list[str]:
        return [v.outcome for v in await asyncio.gather(*(pool.averify(HARD, a + " ") for a in answers))]

    assert asyncio.run(gather()) == expected


def test_hostile_answers_leave_the_pool_alive() -> None:
    slowest = 0.0
    with VerifierPool(VerifierConfig(timeout_seconds=0.5)) as pool:
        pool.verify(HARD, "\\boxed{\\frac{1+x}{2}}")
        for text in hostile_answers(60):
            verdict = pool.verify(HARD, f"\\boxed{{{text}}}")
            assert verdict.outcome != "right"
            slowest = max(slowest, verdict.seconds)
        assert pool.verify(HARD, "\\boxed{\\frac{2x+2}{4}}").outcome == "right"
    assert slowest <= 0.5
    assert not list(Path("/tmp").glob("astro-hpc-pwned-*"))


def test_close_cancels_and_refuses() -> None:
    pool = VerifierPool(VerifierConfig())
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.verify(HARD, "\\boxed{1}")


PARENT = """
import sys, time
from astro_hpc.config.schema import VerifierConfig
from astro_hpc.problems.problem import Problem
from astro_hpc.verifier.pool import VerifierPool
pool = VerifierPool(VerifierConfig(timeout_seconds=60, num_workers=2))
hard = Problem("t", "?", "x+1")
print(pool.verify(hard, "\\\\boxed{1+x}").outcome, flush=True)
for k in (2, 3):
    pool.submit(hard, "\\\\boxed{\\\\prod_{k=1}^{90%d} (x+k)}" % k)
if "exit" in sys.argv:
    sys.exit(0)
time.sleep(600)
"""


def children(pid: int) -> set[int]:
    """Descendants, by /proc."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | children(child)
    return found


def gone(pids: set[int], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and " Z " not in _stat(pid)]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def _stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return " Z "


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_kill_9_of_the_parent_leaves_no_worker() -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "right\n"
        deadline = time.monotonic() + 60
        while len(workers := children(process.pid)) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)  # two workers, and the child of each that computes for a minute
        assert len(workers) == 4
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert gone(workers)


def test_leaving_without_close_does_not_wait_for_the_workers() -> None:
    process = subprocess.run([sys.executable, "-c", PARENT, "exit"], capture_output=True, text=True, timeout=50)
    assert process.stdout == "right\n"
    assert process.returncode == 0


def test_workers_do_not_import_torch() -> None:
    code = "import sys; import astro_hpc.verifier.judge; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_files_are_answered_in_order(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    rows = [{"gold": "x+1", "pred": f"\\boxed{{{i % 2}+x}}"} for i in range(300)] + [{"gold": 5, "pred": "5.0"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = list(verify_lines(path, VerifierConfig()))
    assert [row["outcome"] for row in results] == [*(["wrong", "right"] * 150), "right"]
    assert all(set(row) == {"outcome", "seconds"} for row in results)


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"gold": 1', ":2: not JSON"), ('{"gold": "1"}', ":2: expected"), ('{"gold": "1", "pred": null}', ":2: pred is")],
)
def test_bad_lines_are_named_after_the_results_before_them(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"gold": "1", "pred": "1"}}\n{line}\n')
    results = verify_lines(path, VerifierConfig())
    assert next(results)["outcome"] == "right"
    with pytest.raises(ConfigError, match=message):
        next(results)
