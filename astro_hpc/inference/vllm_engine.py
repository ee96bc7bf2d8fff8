"""vLLM inside this process: one thread steps the engine, any number of callers ask it for samples."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig
from astro_hpc.inference.engine import EngineStats, Sample, SampleRequest
from astro_hpc.inference.sampling import check_request, make_sample, sampling_fields, special_tokens
from astro_hpc.inference.server_plugins import repack_head
from astro_hpc.inference.settings import engine_settings, prepare_environment
from astro_hpc.inference.weights import check_same_tensors, folder_shapes

if TYPE_CHECKING:
    import torch


class VLLMEngine:
    """One vLLM engine. See `astro_hpc.inference.engine.Engine` for the protocol.

    A thread of its own creates and steps the engine (OpenMP's threads belong to the thread that calls them),
    so requests join and leave the running batch at any step, from asyncio and from plain code alike. Closing
    it leaves torch.distributed as it is: a trainer in this process may be using it.

    A sample's seed makes its random numbers independent of the batch. The logits are not quite: sums are
    ordered by the batch's shape, so in low precision a near tie may fall differently in another batch.

    On CPU it runs eagerly with key-value blocks of 32 tokens. On GPU tensor_parallel_size,
    gpu_memory_utilization and quantization are passed on; that path has not been run by us yet.
    """

    def __init__(self, model_dir: Path, cfg: InferenceConfig, seed: int = 0) -> None:
        """Load a Hugging Face folder.

        Args:
            seed: of the engine itself; samples have their own.

        Raises:
            ConfigError: the folder holds no model, or the key-value cache can't hold one sequence.
        """
        for name in ("config.json", "tokenizer_config.json"):
            if not (model_dir / name).is_file():
                raise ConfigError(f"{model_dir}: no {name}; expected a Hugging Face model folder with its tokenizer")
        self._shapes = folder_shapes(model_dir)
        self.stats = EngineStats()
        self.max_model_len = cfg.max_model_len
        self._max_waiting = 2 * cfg.max_num_seqs
        self._version = 0
        self._on_cpu = False
        self._inbox: queue.SimpleQueue[_Job | _Call | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = False
        started: Future[Any] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(model_dir, cfg, seed, started), name="vllm-engine", daemon=True
        )
        self._thread.start()
        self.tokenizer = started.result()
        atexit.register(_close_if_alive, weakref.ref(self))  # a thread inside torch at exit aborts the process

    async def generate(self, request: SampleRequest) -> Sample:
        """Draw one sample; many calls may wait at once and are batched continuously. Cancelling it aborts it."""
        self._check(request)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sample] = loop.create_future()

        def deliver(result: Sample | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(_settle, future, result)

        job = _Job(request, deliver)
        self._inbox.put(job)
        try:
            return await future
        except asyncio.CancelledError:
            job.cancelled = True
            raise

    def generate_many(
        self, requests: Sequence[SampleRequest], on_sample: Callable[[int, Sample], None] | None = None
    ) -> list[Sample]:
        """Draw all of `requests`, in order; `on_sample(index, sample)` is called as each one ends."""
        for request in requests:
            self._check(request)
        done: queue.SimpleQueue[tuple[int, Sample | BaseException]] = queue.SimpleQueue()

        def submit(index: int, request: SampleRequest) -> _Job:
            job = _Job(request, lambda result: done.put((index, result)))
            self._inbox.put(job)
            return job

        jobs = [submit(index, request) for index, request in enumerate(requests)]
        samples: dict[int, Sample] = {}
        try:
            while len(samples) < len(jobs):
                index, result = done.get()
                if isinstance(result, BaseException):
                    raise result
                samples[index] = result
                if on_sample is not None:
                    on_sample(index, result)
        except BaseException:
            for job in jobs:
                job.cancelled = True
            raise
        return [samples[index] for index in range(len(jobs))]

    def load_weights(self, source: Path | Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace the weights by a Hugging Face folder's or by named tensors, and clear the prefix cache.

        Named tensors are handed over by reference and only where the engine runs in this process; a folder
        works everywhere.

        Raises:
            ConfigError: names or shapes differ from the loaded model's; the engine keeps its weights.
            RuntimeError: samples are in flight.
        """
        if isinstance(source, Path):
            check_same_tensors(self._shapes, folder_shapes(source), str(source))
            arguments: dict[str, Any] = {"weights_path": str(source)}
        else:
            tensors = list(source)
            check_same_tensors(self._shapes, {name: tuple(t.shape) for name, t in tensors}, "the new weights")
            arguments = {"weights_iterator": tensors}

        def reload(engine: Any) -> None:
            if engine.has_unfinished_requests():
                raise RuntimeError("weights can't be replaced while samples are in flight")
            engine.collective_rpc("reload_weights", kwargs=arguments)
            if self._on_cpu:
                engine.apply_model(repack_head)
            if not engine.reset_prefix_cache():
                raise RuntimeError("vLLM did not clear its prefix cache: it would serve the old weights' keys")
            self._version = version

        self._call(reload)

    def weight_digests(self, layer: int, columns: Sequence[int]) -> dict[str, str]:
        """See `Engine.weight_digests`."""
        from astro_hpc.inference.probe import engine_digests, of_all_ranks

        def probe(engine: Any) -> dict[str, str]:
            return of_all_ranks(engine.apply_model(partial(engine_digests, layer=layer, columns=list(columns))))

        return self._call(probe)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Free the engine's memory and processes; twice is harmless."""
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
            self._thread.join()
            gc.collect()

    def _check(self, request: SampleRequest) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self._failure is not None:
            raise RuntimeError("the engine has failed") from self._failure
        check_request(request, self.max_model_len)

    def _call(self, function: Callable[[Any], Any]) -> Any:
        """Run `function(vllm_engine)` on the engine's thread between two steps."""
        if self._closed or self._failure is not None:
            raise RuntimeError("the engine is closed or has failed") from self._failure
        call = _Call(function)
        self._inbox.put(call)
        return call.result.result()

    # --- the engine's thread ----------------------------------------------------------------------------------

    def _run(self, model_dir: Path, cfg: InferenceConfig, seed: int, started: Future[Any]) -> None:
        try:
            engine = _create(model_dir, cfg, seed)
            self._on_cpu = engine.vllm_config.device_config.device_type == "cpu"
            self.stats.extra["num_gpus"] = 0 if self._on_cpu else cfg.tensor_parallel_size
            started.set_result(engine.renderer.tokenizer)
        except BaseException as error:
            started.set_exception(error)
            return
        pump = _Pump(self, engine, engine.renderer.tokenizer)
        try:
            pump.run()
        except BaseException as error:
            self._failure = error
            while True:  # until closed: a request may still be on its way into the inbox
                pump.fail_all(error)
                item = self._inbox.get()
                if item is None:
                    break
                _refuse(item, error)
        finally:
            with contextlib.suppress(Exception):
                engine.engine_core.shutdown()


def _close_if_alive(reference: weakref.ref[VLLMEngine]) -> None:
    engine = reference()
    if engine is not None:
        engine.close()


@dataclass(eq=False)
class _Job:
    request: SampleRequest
    deliver: Callable[[Sample | BaseException], None]
    cancelled: bool = False


class _Call:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self.result: Future[Any] = Future()


def _refuse(item: _Job | _Call, error: BaseException) -> None:
    if isinstance(item, _Job):
        item.deliver(error)
    else:
        item.result.set_exception(error)


def _settle(future: asyncio.Future[Sample], result: Sample | BaseException) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)


class _Pump:
    """Feeds the vLLM engine and hands out what it finishes. Lives on the engine's thread."""

    def __init__(self, owner: VLLMEngine, engine: Any, tokenizer: Any) -> None:
        self.owner, self.engine, self.tokenizer = owner, engine, tokenizer
        self.waiting: deque[_Job] = deque()
        self.running: dict[str, _Job] = {}
        self.count = 0
        self.special = special_tokens(tokenizer)

    def run(self) -> None:
        """Step while there is work, until told to end."""
        while self._take():
            self._drop_cancelled()
            while self.waiting and len(self.running) < self.owner._max_waiting:
                self._start(self.waiting.popleft())
            if self.running:
                started = time.perf_counter()
                outputs = self.engine.step()
                self.owner.stats.busy_seconds += time.perf_counter() - started
                for output in outputs:
                    if output.finished:
                        self._finish(output)

    def _take(self) -> bool:
        """Empty the inbox, waiting for something when idle; False: the engine is to end."""
        idle = not self.running and not self.waiting
        while True:
            try:
                item = self.owner._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if item is None:
                self.fail_all(RuntimeError("the engine was closed"))
                return False
            if isinstance(item, _Call):
                try:
                    item.result.set_result(item.function(self.engine))
                except BaseException as error:
                    item.result.set_exception(error)
            else:
                self.waiting.append(item)

    def _drop_cancelled(self) -> None:
        cancelled = [name for name, job in self.running.items() if job.cancelled]
        if cancelled:
            self.engine.abort_request(cancelled)
            for name in cancelled:
                del self.running[name]

    def _start(self, job: _Job) -> None:
        if job.cancelled:
            return
        from vllm.inputs.engine import tokens_input

        self.count += 1
        name = str(self.count)
        try:
            self.engine.add_request(
                name, tokens_input(list(job.request.prompt_token_ids)), self._sampling_params(job.request)
            )
        except ValueError as error:  # vLLM's validation
            job.deliver(error)
            return
        except BaseException as error:  # the job is in neither list here, so nobody else would tell it
            job.deliver(error)
            raise
        self.running[name] = job

    def _sampling_params(self, request: SampleRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            **sampling_fields(request, self.special),
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )

    def _finish(self, output: Any) -> None:
        job = self.running.pop(output.request_id, None)
        if job is None:
            return
        completion = output.outputs[0]
        tokens = tuple(completion.token_ids)
        stats = self.owner.stats
        stats.requests += 1
        stats.prompt_tokens += len(output.prompt_token_ids)
        stats.cached_prompt_tokens += output.num_cached_tokens or 0
        stats.generated_tokens += len(tokens)
        job.deliver(
            make_sample(
                self.tokenizer,
                tokens,
                completion.logprobs.logprobs,
                completion.finish_reason,
                completion.stop_reason,
                self.owner._version,
            )
        )

    def fail_all(self, error: BaseException) -> None:
        """Give `error` to everyone who waits."""
        for job in [*self.running.values(), *self.waiting]:
            job.deliver(error)
        self.running.clear()
        self.waiting.clear()


@contextlib.contextmanager
def _unchanged_environment(*names: str) -> Iterator[None]:
    """vLLM adds libraries to LD_PRELOAD for its workers; every other child process would get them too."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _create(model_dir: Path, cfg: InferenceConfig, seed: int) -> Any:
    """A vLLM `LLMEngine` on the calling thread."""
    prepare_environment()
    import torch

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise RuntimeError("an engine can't share its process with a trainer of several ranks; give it its own")
    settings = engine_settings(model_dir, cfg, seed)
    if not torch.cuda.is_available() and cfg.cpu_threads is not None:
        torch.set_num_threads(cfg.cpu_threads)

    set_num_threads = torch.set_num_threads
    with _unchanged_environment("LD_PRELOAD", "LOCAL_WORLD_SIZE"):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        try:
            return LLMEngine.from_engine_args(EngineArgs(**settings))
        except ValueError as error:
            raise ConfigError(f"vLLM refuses this model or configuration: {' '.join(str(error).split())}") from error
        finally:
            # vLLM disables it for the whole process; OpenMP's setting belongs to a thread, so others may keep theirs.
            torch.set_num_threads = set_num_threads
