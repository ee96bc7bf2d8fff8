"""The pool: verdicts on answers, at a bounded cost whatever the answer is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import astro_hpc
from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import VerifierConfig
from astro_hpc.problems import signs
from astro_hpc.problems.problem import Problem
from astro_hpc.verifier.compare import compare_exactly
from astro_hpc.verifier.extract import extract_answer
from astro_hpc.verifier.limits import TooCostlyError
from astro_hpc.verifier.normalize import AnswerPolicy, normalize

Outcome = Literal["right", "wrong", "unknown"]

VERSION = "1"
"""Of the rules of comparison: part of what a verdict is remembered under."""

_HEADER = struct.Struct("!I")
_START_SECONDS = 120.0
_RESERVE = 0.8


@dataclass(frozen=True)
class Verdict:
    """What became of one answer.

    Attributes:
        outcome: `right`, `wrong` (also when there is no answer), or `unknown`: could not tell within the limits.
        answer: the extracted answer, normalised as it is compared; None when there is none.
        seconds: wall clock of the comparison itself, 0 from the cache; waiting for a free worker is left out.
    """

    outcome: Outcome
    answer: str | None
    seconds: float


class VerifierPool:
    """Decides whether answers are right. Safe to use from several threads and from asyncio.

    Simple answers are compared in the caller's thread; the others go to worker processes, started when first
    needed, that are killed and replaced when an answer overruns its time or memory. Close it, or use it as a context
    manager; workers also end with the process, kill -9 included.
    """

    def __init__(self, cfg: VerifierConfig) -> None:
        self.cfg = cfg
        self._pid = os.getpid()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, Outcome] = OrderedDict()
        self._pending: dict[str, Future[tuple[Outcome, float]]] = {}
        self._closed = False

    def verify(self, problem: Problem, response_text: str) -> Verdict:
        """The verdict on the final answer of a response."""
        return self.submit(problem, response_text).result()

    def submit(self, problem: Problem, response_text: str) -> Future[Verdict]:
        """As `verify`, without waiting. Simple answers are decided before this returns."""
        return self.submit_answer(problem, extract_answer(response_text, self.cfg.answer_markers))

    def submit_answer(self, problem: Problem, answer: str | None) -> Future[Verdict]:
        """As `submit`, for an answer that was extracted already."""
        if self._closed or os.getpid() != self._pid:
            raise RuntimeError("this VerifierPool was closed, or made before a fork; make another one")
        verdict: Future[Verdict] = Future()
        if answer is None:
            verdict.set_result(Verdict("wrong", None, 0.0))
            return verdict
        if len(answer) > self.cfg.max_answer_chars:
            verdict.set_result(Verdict("unknown", answer[: self.cfg.max_answer_chars], 0.0))
            return verdict
        began = time.perf_counter()
        policy = self._policy(problem)
        shown = normalize(answer) if problem.checker == "math" else " ".join(answer.split())
        outcome = _at_once(problem, answer, policy)
        if outcome is not None:
            verdict.set_result(Verdict(outcome, shown, time.perf_counter() - began))
            return verdict
        request = {
            "checker": problem.checker,
            "gold": problem.answer,
            "answer": answer,
            "version": VERSION,
            **vars(policy),
        }
        if problem.checker == "reasoning_gym":
            request |= {"text": problem.text, "metadata": dict(problem.metadata)}
        self._compare(request).add_done_callback(lambda done: _hand_on(done, verdict, shown))
        return verdict

    async def averify(self, problem: Problem, response_text: str) -> Verdict:
        """As `verify`, for asyncio."""
        return await asyncio.wrap_future(self.submit(problem, response_text))

    def verify_many(self, pairs: Iterable[tuple[Problem, str]]) -> list[Verdict]:
        """The verdicts on many (problem, response), in order; the workers share them."""
        futures = [self.submit(problem, response) for problem, response in pairs]
        return [future.result() for future in futures]

    def close(self) -> None:
        """Stop the workers; unfinished answers are cancelled. Twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            threads = list(self._threads)
            while True:
                try:
                    task = self._tasks.get_nowait()
                except queue.Empty:
                    break
                if task is not None:
                    task.future.cancel()
            for _ in threads:
                self._tasks.put(None)
        for thread in threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _policy(self, problem: Problem) -> AnswerPolicy:
        own = problem.metadata.get("answer_policy", {})
        return AnswerPolicy(own.get("percent", self.cfg.percent), own.get("units", self.cfg.units))

    def _compare(self, request: dict[str, Any]) -> Future[tuple[Outcome, float]]:
        """Outcome and seconds from the cache, from an equal request under way, or from a worker."""
        body = json.dumps(request, sort_keys=True)
        future: Future[tuple[Outcome, float]] = Future()
        with self._lock:
            if body in self._cache:
                self._cache.move_to_end(body)
                future.set_result((self._cache[body], 0.0))
                return future
            if body in self._pending:
                return self._pending[body]
            self._pending[body] = future
            if len(self._threads) < self.cfg.num_workers:
                thread = threading.Thread(target=self._work, name="verifier", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._tasks.put(_Task(body, request["checker"], future))
        return future

    def _work(self) -> None:
        """A thread that owns one worker: the kernel ties the worker's life to the thread that started it."""
        worker = _Worker(self.cfg)
        try:
            while (task := self._tasks.get()) is not None:
                if not task.future.set_running_or_notify_cancel():
                    continue
                try:
                    result = worker.ask(task.body, task.checker)
                except BaseException as error:
                    with self._lock:
                        self._pending.pop(task.body, None)
                    task.future.set_exception(error)
                    continue
                with self._lock:
                    self._pending.pop(task.body, None)
                    if self.cfg.cache_size:
                        self._cache[task.body] = result[0]
                        if len(self._cache) > self.cfg.cache_size:
                            self._cache.popitem(last=False)
                task.future.set_result(result)
        finally:
            worker.stop()


def _at_once(problem: Problem, answer: str, policy: AnswerPolicy) -> Outcome | None:
    """The outcome where it costs next to nothing; None for the workers."""
    if problem.checker == "signs":
        right = signs.check(problem.metadata["numbers"], problem.metadata["target"], answer)
        return "right" if right else "wrong"
    if problem.checker == "math":
        try:
            equal = compare_exactly(problem.answer, answer, policy)
        except TooCostlyError:
            return "unknown"
        return None if equal is None else ("right" if equal else "wrong")
    if problem.checker == "reasoning_gym":
        return None
    raise ConfigError(f"problem {problem.id}: no checker {problem.checker!r}; use math, signs or reasoning_gym")


@dataclass(frozen=True)
class _Task:
    body: str
    checker: str
    future: Future[tuple[Outcome, float]]


def _hand_on(done: Future[tuple[Outcome, float]], verdict: Future[Verdict], answer: str) -> None:
    try:
        if done.cancelled():
            verdict.cancel()
        elif (error := done.exception()) is not None:
            verdict.set_exception(error)
        else:
            outcome, seconds = done.result()
            verdict.set_result(Verdict(outcome, answer, seconds))
    except InvalidStateError:  # whoever waited has cancelled
        pass


class _Worker:
    """One worker process: a parent that holds the imported libraries and a child that serves."""

    def __init__(self, cfg: VerifierConfig) -> None:
        self._memory = cfg.memory_mb << 20
        self._seconds = cfg.timeout_seconds * _RESERVE
        self._process: subprocess.Popen[bytes] | None = None
        self._imports: set[str] = set()
        self._buffer = b""
        self._ready = False
        self._count = 0

    def ask(self, request: str, checker: str) -> tuple[Outcome, float]:
        """Outcome and seconds of one request (JSON).

        Raises:
            ConfigError: the worker can't start, for instance within its memory.
        """
        self._ensure_ready(checker)
        assert self._process is not None
        assert self._process.stdin is not None
        self._count += 1
        body = f'{{"id": {self._count}, {request[1:]}'.encode()
        began = time.monotonic()
        try:
            self._process.stdin.write(_HEADER.pack(len(body)) + body)
            self._process.stdin.flush()
        except BrokenPipeError:
            self.stop()
            return "unknown", time.monotonic() - began
        reply = self._read_reply(began + self._seconds)
        if reply is None:
            self._ready = False
            self._process.send_signal(signal.SIGUSR2)  # ends the child; its successor will say that it is ready
        elif "outcome" in reply:
            self._ready = not reply["last"]
            return reply["outcome"], time.monotonic() - began
        return "unknown", time.monotonic() - began

    def stop(self) -> None:
        """End the process and, by the kernel's hand, its child."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._process = None

    def _ensure_ready(self, checker: str) -> None:
        if checker == "reasoning_gym" and checker not in self._imports:
            self._imports.add(checker)
            self.stop()
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._ready:
            line = self._read_line(deadline)
            if line is None or "fatal" in line:
                self.stop()
                why = line["fatal"] if line else f"no sign of life in {_START_SECONDS:.0f} s"
                raise ConfigError(
                    f"the verifier's worker can't start: {why}; check verifier.memory_mb and the packages"
                )
            self._ready = "ready" in line

    def _start(self) -> None:
        root = str(Path(astro_hpc.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._buffer, self._ready = b"", False
        arguments = [str(os.getpid()), str(self._memory), str(self._seconds), *sorted(self._imports)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "astro_hpc.verifier.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def _read_reply(self, deadline: float) -> dict[str, Any] | None:
        """The reply to the last request, or the news that a new child is ready instead; None for neither."""
        while (line := self._read_line(deadline)) is not None:
            if "ready" in line or line.get("id") == self._count:
                return line
        return None

    def _read_line(self, deadline: float) -> dict[str, Any] | None:
        """The next line; None at the deadline or when the process has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return None
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply
