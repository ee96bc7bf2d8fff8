"""An engine over vLLM servers: requests go to the replica with the least to do, and survive the loss of any."""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import random
import secrets
import shutil
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig
from astro_hpc.inference.balancer import RetryPolicy
from astro_hpc.inference.buckets import Group, TensorInfo, open_store
from astro_hpc.inference.engine import EngineStats, Sample, SampleRequest
from astro_hpc.inference.local_server import is_loopback, model_names
from astro_hpc.inference.replicas import Replica, ReplicaSet, Weights
from astro_hpc.inference.sampling import check_request, make_sample, special_tokens
from astro_hpc.inference.server_client import RequestRefused, ServerError, ServerFault
from astro_hpc.inference.tokenizer import load_tokenizer
from astro_hpc.inference.weights import check_same_tensors, folder_shapes, write_folder
from astro_hpc.run.seeds import derive_seed

if TYPE_CHECKING:
    import torch

_Result = TypeVar("_Result")
_STANDSTILL_SECONDS = 300.0
"""A broadcast of weights that gets no further for so long has failed."""


class VLLMServerEngine:
    """Several vLLM servers as one engine. See `astro_hpc.inference.engine.Engine` for the protocol.

    A thread of its own holds the connections, so asyncio and plain code alike can ask for samples. A request that
    fails is tried again, on another replica where there is one; with its own seed it gives the same sample wherever
    it is answered, up to the order of floating-point sums. Only when no replica has been well for
    `inference.server_lost_seconds` does the engine fail.

    New weights travel as a safetensors folder that the servers can read (`load_weights`), or in buckets over the
    network (`broadcast_weights`). A sample counts only if the server says that all its tokens came from the wanted
    version. A replica with other weights than the wanted ones is given those before it gets requests, or waits for
    the next ones where they came over the network; when that leaves nobody to answer, the engine fails at once.
    """

    def __init__(
        self,
        model_dir: Path,
        cfg: InferenceConfig,
        seed: int = 0,
        log_dir: Path | None = None,
        gpus_taken: int = 0,
    ) -> None:
        """Connect to the servers, or start them.

        Args:
            seed: of the servers that are started, and of the jitter between attempts.
            log_dir: for the output of servers that are started, and for weights on their way to the servers.
            gpus_taken: so many GPUs, the first, are not for servers that are started.

        Raises:
            ConfigError: a server can't be reached or does not fit this run: which, why, and how to mend it.
        """
        self.tokenizer = load_tokenizer(model_dir)
        self.stats = EngineStats()
        self.max_model_len = cfg.max_model_len
        self._cfg, self._seed, self._log_dir = cfg, seed, log_dir
        self._special = special_tokens(self.tokenizer)
        self._shapes = folder_shapes(model_dir)
        self._retry = RetryPolicy()
        self._in_flight, self._busy_since = 0, 0.0
        self._closed = False
        self._written: Path | None = None
        """A folder of ours with the weights that the servers have now."""
        if log_dir is not None:
            for left_over in log_dir.glob("weights-*"):  # of an attempt that was killed
                shutil.rmtree(left_over, ignore_errors=True)
        self._names = model_names(model_dir)
        probe = SampleRequest((self.tokenizer.encode("1", add_special_tokens=False)[0],), 1, temperature=0.0)
        self._replicas = ReplicaSet(
            model_dir.resolve(), cfg, seed, log_dir, self._names, probe, self._count, gpus_taken
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True)
        self._thread.start()
        atexit.register(_close_if_alive, weakref.ref(self))
        try:
            self._on_loop(self._replicas.open()).result()
        except BaseException:
            self.close()
            raise

    async def generate(self, request: SampleRequest) -> Sample:
        """Draw one sample; many calls may wait at once. Cancelling it aborts it on its server."""
        self._check(request)
        return await asyncio.wrap_future(self._on_loop(self._sample(request)))

    def generate_many(
        self, requests: Sequence[SampleRequest], on_sample: Callable[[int, Sample], None] | None = None
    ) -> list[Sample]:
        """Draw all of `requests`, in order; `on_sample(index, sample)` is called as each one ends."""
        for request in requests:
            self._check(request)
        done: queue.SimpleQueue[tuple[int, Future[Sample]]] = queue.SimpleQueue()
        futures = [self._on_loop(self._sample(request)) for request in requests]
        samples: dict[int, Sample] = {}
        try:
            for index, future in enumerate(futures):
                future.add_done_callback(lambda ended, index=index: done.put((index, ended)))  # type: ignore[misc]
            while len(samples) < len(requests):
                index, ended = done.get()
                samples[index] = ended.result()
                if on_sample is not None:
                    on_sample(index, samples[index])
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [samples[index] for index in range(len(requests))]

    def load_weights(self, source: Path | Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Give all servers new weights and clear their prefix caches; nothing may be in flight.

        Tensors from memory are first written to a folder beside the logs, which the servers must be able to read.
        A server that fails at it is left out until it has them.

        Raises:
            ConfigError: names or shapes differ from the model's, or a server doesn't allow updates; all keep what
                they have.
            RuntimeError: samples are in flight, or no server could load them.
        """
        self._check_open()
        if self._in_flight:
            raise RuntimeError("weights can't be replaced while samples are in flight")
        if isinstance(source, Path):
            check_same_tensors(self._shapes, folder_shapes(source), str(source))
            folder, written = source.resolve(), None
            name = model_names(folder)[1]
        else:
            if self._log_dir is not None:
                self._log_dir.mkdir(parents=True, exist_ok=True)
            folder = written = Path(tempfile.mkdtemp(prefix="weights-", dir=self._log_dir)).resolve()
            name = f"{version}-{secrets.token_hex(8)}"
        try:
            if not isinstance(source, Path):
                write_folder(folder, source)
                check_same_tensors(self._shapes, folder_shapes(folder), "the new weights")
            weights = Weights(version, name, folder, initial=name in self._names)
            self._on_loop(self._replicas.push(weights)).result()
        except BaseException:
            if written is not None and self._replicas.wanted.folder != written:
                shutil.rmtree(written, ignore_errors=True)
            raise
        before, self._written = self._written, written
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

    def broadcast_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], announced: Sequence[TensorInfo], version: int
    ) -> None:
        """As `load_weights`, without files: in buckets over the network, NCCL on GPUs and gloo on a CPU.

        A server that is away meanwhile is left out until the next push.

        Args:
            announced: what `tensors` will give, in order.

        Raises:
            ConfigError: names or shapes differ from the model's, or a server doesn't allow updates.
            RuntimeError: samples are in flight, or a server didn't receive them, at the latest
                `inference.server_start_seconds` after all were sent: sampling can't go on then.
        """
        import torch

        self._check_open()
        if self._in_flight:
            raise RuntimeError("weights can't be replaced while samples are in flight")
        check_same_tensors(self._shapes, {tensor.name: tensor.shape for tensor in announced}, "the new weights")
        workers = self._on_loop(self._replicas.count_workers()).result()
        if not workers:
            raise RuntimeError("no server is there to take new weights; their logs say why")
        world_size = 1 + sum(workers.values())
        store = open_store(world_size, _STANDSTILL_SECONDS)
        weights = Weights(version, f"{version}-{secrets.token_hex(8)}", None)
        self._replicas.wanted = weights
        address = address_for([replica.url for replica in workers])
        common = {
            "host": address,
            "port": store.port,
            "world_size": world_size,
            "tensors": [tensor.to_json() for tensor in announced],
            "seconds": _STANDSTILL_SECONDS,
        }
        receiving, first_rank = [], 1
        for replica, count in workers.items():
            arguments = {**common, "first_rank": first_rank}
            receiving.append(self._on_loop(self._replicas.receive(weights, replica, arguments)))
            first_rank += count
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        try:
            Group(store, 0, world_size, device, _STANDSTILL_SECONDS, gloo_address(address)).send(tensors, announced)
            self._wait_for_receivers(list(workers), receiving)
        except RuntimeError as error:
            failed = [str(each.exception()) for each in receiving if each.done() and each.exception() is not None]
            raise RuntimeError(f"the weights did not reach the servers: {'; '.join(failed) or error}") from error
        finally:
            for each in receiving:
                each.cancel()

    def _wait_for_receivers(self, replicas: Sequence[Replica], receiving: Sequence[Future[None]]) -> None:
        """All has been sent: what is left to the servers is to put the last part in its place, and to answer."""
        limit = self._cfg.server_start_seconds
        ended, late = wait(receiving, limit)
        if late:
            urls = ", ".join(replica.url for replica, each in zip(replicas, receiving, strict=True) if each in late)
            raise RuntimeError(f"{urls}: no answer for inference.server_start_seconds={limit:g} after all was sent")
        for each in ended:
            each.result()

    def weight_digests(self, layer: int, columns: Sequence[int]) -> dict[str, str] | None:
        """See `Engine.weight_digests`; None where no server allows weight updates.

        Raises:
            ConfigError: two servers are split over different numbers of GPUs, so that their hashes differ anyway.
            RuntimeError: two servers hold different weights.
        """
        self._check_open()
        by_url = self._on_loop(self._replicas.weight_digests(layer, columns)).result()
        if not by_url:
            return None
        (first, digests), *others = by_url.items()
        for url, theirs in others:
            if theirs["ranks"] != digests["ranks"]:
                raise ConfigError(
                    f"inference.servers: {first} has tensor parallel size {digests['ranks']} and {url} "
                    f"{theirs['ranks']}: their weights can't be compared; start them alike, or set "
                    "rl.weight_check_every to 0"
                )
            if theirs != digests:
                raise RuntimeError(f"{first} and {url} hold different weights; see their logs for a failed load")
        return digests

    def close(self) -> None:
        """End the connections, and the servers that were started; twice is harmless."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._replicas.close(), self._loop).result()
        self._replicas.stop_servers()  # before the thread ends that they are tied to
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._written is not None:
            shutil.rmtree(self._written, ignore_errors=True)

    def _check(self, request: SampleRequest) -> None:
        self._check_open()
        check_request(request, self.max_model_len)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self._replicas.failure is not None:
            raise RuntimeError(f"the engine has failed: {self._replicas.failure}")

    def _on_loop(self, work: Coroutine[Any, Any, _Result]) -> Future[_Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # --- on the loop ------------------------------------------------------------------------------------------

    async def _sample(self, request: SampleRequest) -> Sample:
        """Until a replica has answered well, or the request has failed too often."""
        if self._in_flight == 0:
            self._busy_since = time.monotonic()
        self._in_flight += 1
        try:
            failures: list[str] = []
            avoid: set[str] = set()
            while True:
                replica = await self._replicas.acquire(request, avoid)
                try:
                    return await self._attempt(replica, request)
                except RequestRefused as error:
                    raise RuntimeError(f"{replica.url} refuses a request: {error}") from None
                except ServerError as error:
                    failures.append(f"{replica.url}: {error}")
                    avoid.add(replica.url)
                    self._replicas.blame(replica, error)
                finally:
                    self._replicas.release(replica, request)
                self._count("retries")
                if len(failures) >= self._retry.max_attempts:
                    raise RuntimeError(f"a request failed {len(failures)} times, at last at {failures[-1]}")
                draw = random.Random(derive_seed(self._seed, "retry", request.seed, len(failures)))
                await asyncio.sleep(self._retry.delay(len(failures), draw))
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self.stats.busy_seconds += time.monotonic() - self._busy_since

    async def _attempt(self, replica: Replica, request: SampleRequest) -> Sample:
        """One try at one replica; ends early when the replica is lost."""
        wanted = self._replicas.wanted
        answer = asyncio.ensure_future(replica.client.generate(request, self._special))
        try:
            limit = self._cfg.request_timeout_seconds
            ends: list[asyncio.Future[Any]] = [answer, replica.lost]
            await asyncio.wait(ends, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                if replica.lost.done():
                    raise ServerFault(f"was lost ({replica.trouble})")
                raise ServerFault(f"no answer within inference.request_timeout_seconds={limit:g}")
            completion = answer.result()
        finally:
            if not answer.done():
                answer.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else asks
                answer.cancel()
                await asyncio.wait([answer])  # its connection is closed then
        if not wanted.are(completion.weights):
            self._replicas.suspect(replica, f"has weights {completion.weights}, not {wanted.name}")
            raise ServerFault(replica.trouble)
        replica.faults = 0
        self.stats.requests += 1
        self.stats.prompt_tokens += len(request.prompt_token_ids)
        self.stats.cached_prompt_tokens += completion.cached_tokens
        self.stats.generated_tokens += len(completion.token_ids)
        return make_sample(
            self.tokenizer,
            completion.token_ids,
            completion.logprobs,
            completion.finish_reason,
            completion.stop_reason,
            wanted.version,
        )

    def _count(self, name: str) -> None:
        self.stats.extra[name] = self.stats.extra.get(name, 0) + 1


def address_for(urls: Sequence[str], environ: Mapping[str, str] = os.environ) -> str:
    """An address of this machine that the servers reach."""
    elsewhere = [host for url in urls if not is_loopback(host := urlsplit(url).hostname or "")]
    if not elsewhere:
        return "127.0.0.1"
    meeting = environ.get("MASTER_ADDR", "")  # where the ranks meet is where rank 0 is
    if meeting and not is_loopback(meeting):
        return meeting
    return _address_towards(elsewhere[0])  # all ranks are on this machine, and meet where no other reaches them


def gloo_address(address: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The address that gloo has to listen at for servers that reach this machine at `address`; None: its own choice.

    Ranks that all run on one machine are told to use its loopback interface among themselves.
    """
    return address if environ.get("GLOO_SOCKET_IFNAME") == "lo" and not is_loopback(address) else None


def _address_towards(host: str) -> str:
    """This machine's address on its way to another; nothing is sent."""
    try:
        for family, kind, _, _, there in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                probe.connect(there)
                return str(probe.getsockname()[0])
    except OSError:
        pass
    return socket.gethostname()


def _close_if_alive(reference: weakref.ref[VLLMServerEngine]) -> None:
    engine = reference()
    if engine is not None:
        engine.close()
