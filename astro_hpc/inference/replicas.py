"""The replicas behind an engine: found or started, looked after, given weights, and handed out to requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig
from astro_hpc.inference.balancer import Balancer, RetryPolicy
from astro_hpc.inference.engine import SampleRequest
from astro_hpc.inference.job_servers import KEY, job_servers
from astro_hpc.inference.local_server import LocalServer, choose_port, default_threads, gpu_shares
from astro_hpc.inference.probe import of_all_ranks
from astro_hpc.inference.server_client import INITIAL_WEIGHTS, ServerClient, ServerError, ServerFault, ServerUnfit
from astro_hpc.run.seeds import derive_seed

_HEALTH_SECONDS = 5.0
"""Between two looks at a replica that is well."""
_MISSED_LOOKS = 2
"""A replica that doesn't answer this often in a row is lost: one slow answer is none."""
_FAULTS_IN_A_ROW = 3
"""A replica whose answers are wrong this often in a row has to pass the whole check again."""
_MAX_RESTARTS = 3
"""Of one server that we started and that ended by itself."""


@dataclass(frozen=True)
class Weights:
    """Weights that the servers are to have.

    Attributes:
        version: the caller's number.
        name: what the servers call them once they have been pushed. Two engines that want the same files want the
            same name, and share servers in peace.
        folder: where they lie; None: they came over the network, and a server that missed them waits for the next.
        initial: they are the model's own, which a server that has just started has too.
    """

    version: int
    name: str
    folder: Path | None
    initial: bool = False

    def are(self, name: str | None) -> bool:
        """Whether a server that calls its weights `name` has these."""
        return name == self.name or (self.initial and name == INITIAL_WEIGHTS)


@dataclass(eq=False)
class Replica:
    """One server as the engine sees it.

    Attributes:
        well: new requests may go to it.
        lost: resolved when it is out of reach; requests that are at it are to be tried elsewhere.
        wake: set to look at it at once.
        faults: wrong answers in a row.
        trouble: what was wrong with it last.
        local: its process, where we started it.
        awaited: this job starts it on another node, and it may still be loading its model.
        updating: held by whoever gives it weights or sees whether it has the right ones, one at a time.
        missed: it is known not to have the wanted weights, which came over the network and are nowhere to be read.
    """

    client: ServerClient
    lost: asyncio.Future[None]
    wake: asyncio.Event
    local: LocalServer | None = None
    awaited: bool = False
    updating: asyncio.Lock = field(default_factory=asyncio.Lock)
    missed: bool = False
    well: bool = False
    faults: int = 0
    restarts: int = 0
    trouble: str = ""

    @property
    def url(self) -> str:
        """Its address, which is its name here."""
        return self.client.url


@dataclass(eq=False)
class _Waiting:
    """A request that waits for a replica with room."""

    request: SampleRequest
    avoid: set[str]
    replica: asyncio.Future[Replica] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class ReplicaSet:
    """The servers of one engine. All but `stop_servers` belongs to one event loop.

    A replica that is lost is given no request until it has passed all checks again and has the wanted weights. One
    that we started and that ended is started anew.
    """

    def __init__(
        self,
        model_dir: Path,
        cfg: InferenceConfig,
        seed: int,
        log_dir: Path | None,
        names: list[str],
        probe: SampleRequest,
        count: Callable[[str], None],
        gpus_taken: int = 0,
    ) -> None:
        """Take note of what is wanted; `open` does it.

        Args:
            seed: of the servers that are started, and of the jitter between looks at a lost one.
            log_dir: for the output of servers that are started; None: this process's own output.
            names: of the model, as `model_names` gives them.
            probe: a short request, which a server has to answer to be used.
            count: called with the name of an event that is worth counting.
            gpus_taken: so many GPUs, the first, are not for servers that are started.
        """
        self.wanted = Weights(0, names[1], model_dir, initial=True)
        self.failure: str | None = None
        self._model_dir, self._cfg, self._seed, self._log_dir = model_dir, cfg, seed, log_dir
        self._probe, self._count = probe, count
        self._names, self._gpus_taken = names, gpus_taken
        self._retry = RetryPolicy()
        self._replicas: list[Replica] = []
        self._waiting: deque[_Waiting] = deque()
        self._session: aiohttp.ClientSession | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._none_well_since: float | None = None

    # --- opening and closing ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect to the servers, or start them and wait until they answer.

        Raises:
            ConfigError: a server can't be reached or does not fit: which, why, and how to mend it.
        """
        key = api_key(self._cfg)
        # Shorter than vLLM keeps idle connections: a request hardly ever meets one that is being closed.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        for url in (of_job := job_servers(self._cfg)):
            self._add(url, os.environ.get(KEY), awaited=True)
        if self._cfg.num_servers is not None and not of_job:
            self._start_servers(self._cfg.num_servers, key or secrets.token_hex(16))
        for url in self._cfg.servers:
            self._add(url, key)
        self._balancer = Balancer(
            [replica.url for replica in self._replicas], 2 * self._cfg.max_num_seqs, self._cfg.block_size or 32
        )
        checks = [asyncio.create_task(self._first_check(replica)) for replica in self._replicas]
        try:
            await asyncio.gather(*checks)
        finally:
            for check in checks:
                check.cancel()
        if not self._well():
            raise RuntimeError(f"none of the job's servers came up: {self._troubles()}; their logs lie beside this one")
        for work in (*[self._keep(replica) for replica in self._replicas], self._watch()):
            self._keepers.append(asyncio.create_task(work))
            self._keepers[-1].add_done_callback(self._keeper_ended)

    async def close(self) -> None:
        """End all that goes on on this loop, requests too, and let go of the connections."""
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)
        if self._session is not None:
            await self._session.close()

    def stop_servers(self) -> None:
        """End the servers that were started, from any thread."""
        servers = [replica.local for replica in self._replicas if replica.local is not None]
        for server in servers:
            server.terminate()
        for server in servers:
            server.stop()

    def _add(self, url: str, key: str | None, local: LocalServer | None = None, awaited: bool = False) -> None:
        assert self._session is not None
        lost = asyncio.get_running_loop().create_future()
        self._replicas.append(Replica(ServerClient(url, self._session, key), lost, asyncio.Event(), local, awaited))

    def _start_servers(self, count: int, key: str) -> None:
        for index, gpus in enumerate(gpu_shares(count, self._cfg.tensor_parallel_size, self._gpus_taken)):
            local = LocalServer(
                self._model_dir,
                self._cfg,
                seed=self._seed,
                api_key=key,
                allow_weight_updates=True,
                threads=default_threads(count),
                gpus=gpus,
                log=self._log_dir / f"server-{index}.log" if self._log_dir else None,
            )
            local.start(choose_port(index))
            self._add(local.url, key, local)

    async def _first_check(self, replica: Replica) -> None:
        try:
            if replica.local is not None or replica.awaited:
                await self._wait_until_up(replica)
            await self._admit(replica)
        except ServerError as error:
            if replica.awaited:  # the others can begin; it may still come, and a stranger at its port may go
                return self._lose(replica, str(error))
            if replica.local is not None:
                raise ConfigError(f"inference.num_servers: {error}") from None
            mend = "; start it with `astro-hpc serve CONFIG --port PORT`, or take it out of the list"
            text = f"can't be used ({error}){mend}" if isinstance(error, ServerFault) else str(error)
            raise ConfigError(f"inference.servers: {replica.url} {text}") from None

    async def _wait_until_up(self, replica: Replica) -> None:
        """Until a server that was just started answers."""
        limit = self._cfg.server_start_seconds
        deadline = time.monotonic() + limit
        while True:
            if (local := replica.local) is not None and (code := local.exit_code()) is not None:
                log = f" ({local.log})" if local.log else ""
                raise ServerFault(f"a server ended with exit code {code} at its start: {local.last_words()}{log}")
            with contextlib.suppress(ServerFault):
                return await replica.client.check_health()
            if time.monotonic() > deadline:
                raise ServerFault(f"no answer within inference.server_start_seconds={limit:g}; raise it")
            await asyncio.sleep(0.25)

    # --- handing out ------------------------------------------------------------------------------------------

    async def acquire(self, request: SampleRequest, avoid: set[str]) -> Replica:
        """The replica for a request, waiting for one with room; give it back with `release`.

        Args:
            avoid: addresses that are only taken where nothing else has room.

        Raises:
            RuntimeError: no replica has been well for too long.
        """
        if self.failure is not None:
            raise RuntimeError(self.failure)
        waiting = _Waiting(request, avoid)
        self._waiting.append(waiting)
        self._dispatch()
        try:
            return await waiting.replica
        except asyncio.CancelledError:
            if waiting.replica.done() and not waiting.replica.cancelled():
                self.release(waiting.replica.result(), request)
            raise

    def release(self, replica: Replica, request: SampleRequest) -> None:
        """The request is done with the replica, one way or another."""
        self._balancer.finish(replica.url, request_cost(request))
        self._dispatch()

    def _dispatch(self) -> None:
        """Hand out replicas to those who wait, first come first served, while there is room."""
        while self._waiting:
            first = self._waiting[0]
            if not first.replica.done():  # else it was cancelled
                well = {replica.url: replica for replica in self._replicas if replica.well}
                tokens, cost = first.request.prompt_token_ids, request_cost(first.request)
                url = self._balancer.pick(tokens, cost, well, first.avoid)
                if url is None:
                    return
                self._balancer.start(url, tokens, cost)
                first.replica.set_result(well[url])
            self._waiting.popleft()

    # --- looking after them -----------------------------------------------------------------------------------

    def blame(self, replica: Replica, error: ServerError) -> None:
        """A request failed at `replica`: a failed connection is looked into, wrong answers are borne a few times."""
        replica.faults += 1
        lost = isinstance(error, ServerUnfit) or (isinstance(error, ServerFault) and error.lost)
        if lost or replica.faults >= _FAULTS_IN_A_ROW:
            self.suspect(replica, str(error))

    def suspect(self, replica: Replica, trouble: str) -> None:
        """Send nothing new to a replica until it has passed all checks, now; what it is at goes on."""
        replica.trouble = trouble
        replica.wake.set()
        replica.well = False
        if not self._well() and self._none_well_since is None:
            self._none_well_since = time.monotonic()

    def _lose(self, replica: Replica, trouble: str) -> None:
        """As `suspect`; and what the replica is at is tried elsewhere."""
        self.suspect(replica, trouble)
        if not replica.lost.done():
            replica.lost.set_result(None)
            self._count("replicas_lost")
            _say(f"{replica.url} is out of reach ({trouble}); its requests go elsewhere")

    async def _admit(self, replica: Replica) -> None:
        """Let a replica take requests once it has passed all checks and has the wanted weights."""
        async with replica.updating:
            await self._admit_alone(replica)

    async def _admit_alone(self, replica: Replica) -> None:
        wanted = self.wanted
        await replica.client.check_health()
        if not wanted.are(await replica.client.check_fit(self._names, self._cfg.max_model_len, self._probe)):
            if wanted.folder is None:
                replica.missed = True
                raise ServerFault("is up, and waits for the next push of weights (rl.weight_sync=broadcast)")
            await replica.client.push_weights(str(wanted.folder), wanted.name, self._cfg.server_start_seconds)
        if wanted is not self.wanted:
            raise ServerFault("there are newer weights already")
        replica.trouble, replica.faults, replica.missed = "", 0, False
        self._balancer.forget(replica.url)
        if replica.lost.done():
            _say(f"{replica.url} is back")
            replica.lost = asyncio.get_running_loop().create_future()
        replica.well, self._none_well_since = True, None
        self._dispatch()

    async def _keep(self, replica: Replica) -> None:
        """Look at one replica from time to time, and bring it back when it has been lost."""
        draw = random.Random(derive_seed(self._seed, "health", replica.url))
        failures = 0
        while True:
            pause = _HEALTH_SECONDS if replica.well else self._retry.delay(max(failures, 1), draw)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):  # not wait_for: Python 3.11's can swallow a cancellation
                    await replica.wake.wait()
            replica.wake.clear()
            try:
                if replica.well:
                    await replica.client.check_health()
                else:
                    if replica.local is not None and replica.local.exit_code() is not None:
                        self._lose(replica, f"ended with exit code {replica.local.exit_code()}")
                        await self._restart(replica, replica.local)
                    await self._admit(replica)
                failures = 0
            except ServerError as error:
                failures += 1
                gone = isinstance(error, ServerFault) and error.lost
                if gone or not replica.well or failures >= _MISSED_LOOKS:
                    self._lose(replica, str(error))
                    replica.wake.clear()  # a look that failed is followed by a pause

    async def _restart(self, replica: Replica, local: LocalServer) -> None:
        if replica.restarts >= _MAX_RESTARTS:
            raise ServerFault(f"it ended again after {_MAX_RESTARTS} restarts: {local.last_words()}")
        replica.restarts += 1
        replica.missed = self.wanted.folder is None
        local.stop()
        local.start(int(replica.url.rpartition(":")[2]))  # on this thread, as long as which the child lives
        self._count("servers_restarted")
        await self._wait_until_up(replica)

    async def _watch(self) -> None:
        """Give up when no replica has been well for too long, or none can be any more."""
        limit = self._cfg.server_lost_seconds
        while self._none_well_since is None or time.monotonic() - self._none_well_since < limit:
            if self._waits_in_vain():
                self._fail(
                    "no server is left that has the newest weights, which came over the network: "
                    f"{self._troubles()}; the same command goes on from the last checkpoint; "
                    "rl.weight_sync=folder would have given them the weights"
                )
                return
            await asyncio.sleep(min(1.0, limit / 4))
        self._fail(f"no server for {limit:g} s (inference.server_lost_seconds), waited for {self._troubles()}")

    def _waits_in_vain(self) -> bool:
        """A request waits, and all servers wait for the next push, which comes after the requests."""
        return (
            bool(self._waiting)
            and self.wanted.folder is None
            and all(replica.missed and not replica.well for replica in self._replicas)
        )

    def _troubles(self) -> str:
        return "; ".join(f"{replica.url} ({replica.trouble})" for replica in self._replicas)

    def _keeper_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, failure: str) -> None:
        """The servers are of no more use: tell everybody who waits."""
        self.failure = failure
        for waiting in self._waiting:
            if not waiting.replica.done():
                waiting.replica.set_exception(RuntimeError(failure))
        self._waiting.clear()

    # --- weights ----------------------------------------------------------------------------------------------

    async def push(self, weights: Weights) -> None:
        """Give all replicas that are well new weights; the others get them before they come back.

        Raises:
            ConfigError: one doesn't allow it; all keep what they have.
            RuntimeError: none could load them.
        """
        for replica in self._well():
            try:
                await replica.client.check_updatable()
            except ServerUnfit as error:
                raise ConfigError(f"inference.servers: {replica.url} {error}") from None
            except ServerError as error:
                self.suspect(replica, str(error))
        self.wanted = weights

        async def push(replica: Replica) -> str:
            try:
                async with replica.updating:
                    await replica.client.push_weights(str(weights.folder), weights.name, self._cfg.server_start_seconds)
            except ServerError as error:
                self.suspect(replica, str(error))
                return f"{replica.url}: {error}"
            self._balancer.forget(replica.url)
            return ""

        troubles = await asyncio.gather(*[push(replica) for replica in self._well()])
        if troubles and all(troubles):
            raise RuntimeError(f"no server could load {weights.folder}: {troubles[0]}")

    async def count_workers(self) -> dict[Replica, int]:
        """The replicas that can take weights over the network, also those that missed the last ones: their workers.

        Raises:
            ConfigError: one doesn't allow it; all keep what they have.
        """
        found = {}
        for replica in self._replicas:
            try:
                await replica.client.check_health()
                found[replica] = await replica.client.count_workers()
            except ServerError as error:
                if isinstance(error, ServerUnfit) and not replica.awaited:
                    raise ConfigError(f"inference.servers: {replica.url} {error}") from None
                self.suspect(replica, str(error))
        return found

    async def receive(self, weights: Weights, replica: Replica, arguments: dict[str, Any]) -> None:
        """Let one replica receive weights; the caller sends them, to all replicas at once.

        There is no limit of time: how long sending takes depends on the model. The caller cancels it.

        Raises:
            RuntimeError: it failed; the others then wait for it in vain.
        """
        async with replica.updating:
            try:
                await replica.client.receive_weights(weights.name, **arguments)
            except ServerError as error:
                self.suspect(replica, str(error))
                raise RuntimeError(f"{replica.url}: {error}") from None
            except asyncio.CancelledError:
                self.suspect(replica, "has not received the weights in time")
                raise
            replica.missed = False
            try:
                await self._admit_alone(replica)
            except ServerError as error:  # it has the weights, by whose name it is known when it comes back
                self.suspect(replica, str(error))

    async def weight_digests(self, layer: int, columns: Sequence[int]) -> dict[str, dict[str, str]]:
        """By address, hashes of parts of the weights of the replicas that are well and can be asked."""
        found = {}
        for replica in self._well():
            with contextlib.suppress(ServerUnfit):
                try:
                    found[replica.url] = of_all_ranks(await replica.client.weight_digests(layer, columns))
                except ServerFault as error:
                    self.suspect(replica, str(error))
        return found

    def _well(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.well]


def _say(text: str) -> None:
    """One line for the user: what was lost and found again explains a slow stage."""
    print(f"servers: {text}", file=sys.stderr, flush=True)


def request_cost(request: SampleRequest) -> int:
    """Tokens that a request may take: its prompt and its longest output."""
    return len(request.prompt_token_ids) + request.max_tokens


def api_key(cfg: InferenceConfig, environ: Mapping[str, str] = os.environ) -> str | None:
    """The servers' API key, where the configuration names the environment variable that holds it.

    Raises:
        ConfigError: it names one that isn't set.
    """
    name = cfg.server_api_key_env
    if name is None:
        return None
    if not environ.get(name):
        raise ConfigError(
            f"inference.server_api_key_env: the environment variable {name} is not set; export it, "
            "or remove the setting"
        )
    return environ[name]
