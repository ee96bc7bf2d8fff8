"""The server engine against servers that misbehave on purpose. What a real server says: test_inference_server.py."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig
from astro_hpc.inference import make_engine
from astro_hpc.inference import replicas as replicas_module
from astro_hpc.inference import server_engine as server_engine_module
from astro_hpc.inference.balancer import RetryPolicy
from astro_hpc.inference.buckets import Group, TensorInfo, join_store
from astro_hpc.inference.engine import Sample, SampleRequest
from astro_hpc.inference.job_servers import ADDRESSES, KEY
from astro_hpc.inference.local_server import model_names
from astro_hpc.inference.server_engine import VLLMServerEngine
from astro_hpc.inference.tokenizer import load_tokenizer

PROMPT = tuple(range(10, 30))
_load_once = functools.cache(load_tokenizer)
FAULTS = ("500", "503", "drop", "truncated", "not-json", "too-few-logprobs", "too-many-tokens", "wrong-prompt")
FAULTS += ("wrong-token", "nan", "huge", "abort", "no-choice", "redirect")


def expected_tokens(request: SampleRequest) -> tuple[int, ...]:
    """What the servers below sample: decided by the seed alone, as a real one's are."""
    return tuple((request.seed * 7 + 13 * i) % 40_000 + 100 for i in range(request.max_tokens))


class BadServer:
    """Speaks vLLM's token protocol and does wrong what `faults` says, one fault a request; then all is well."""

    def __init__(self, names: list[str], port: int = 0, key: str | None = None) -> None:
        self.faults: deque[str] = deque()
        self.names, self.key, self.port, self.max_model_len = names, key, port, 512
        self.weights = "default"
        self.served: list[int] = []
        self.dropped = 0
        self.running = 0
        self.most_running = 0
        self.delay = 0.0
        self.scale_out = True
        self.updatable = False
        self.loads: list[str] = []
        self.failing_loads = 0
        self.received: list[dict[str, torch.Tensor]] = []
        self.stuck = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    def kill(self) -> None:
        """Close the port and every connection, as the kernel does for a process that was killed."""
        asyncio.run_coroutine_threadsafe(self._kill(), self._loop).result()

    def close(self) -> None:
        self.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/inference/v1/generate", self._generate)
        if self.updatable:
            app.router.add_get("/weight_info", self._weight_info)
            app.router.add_get("/get_world_size", self._get_world_size)
            app.router.add_post("/update_weight_version", self._update_weight_version)
            app.router.add_post("/collective_rpc", self._collective_rpc)
            app.router.add_post("/reset_prefix_cache", self._reset_prefix_cache)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def _kill(self) -> None:
        for connection in self._runner.server.connections if self._runner.server else []:
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()

    def _unauthorized(self, request: web.Request) -> web.Response | None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return None

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        cards = [{"id": n, "root": self.names[0], "max_model_len": self.max_model_len} for n in self.names]
        return self._unauthorized(request) or web.json_response({"data": cards})

    async def _weight_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.weights})

    async def _get_world_size(self, request: web.Request) -> web.Response:
        return self._unauthorized(request) or web.json_response({"world_size": 1})

    async def _update_weight_version(self, request: web.Request) -> web.Response:
        self.weights = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["method"] == "receive_weights":
            await asyncio.to_thread(self._receive, **body["kwargs"])
            await asyncio.sleep(3600 if self.stuck else 0)
            return web.json_response({"results": [None]})
        assert body["method"] == "load_weights_folder"
        assert self.weights.startswith("loading-")
        self.loads.append(body["kwargs"]["weights_path"])
        if self.failing_loads:
            self.failing_loads -= 1
            return web.json_response({"error": {"message": "half loaded"}}, status=500)
        return web.json_response({"results": [None]})

    def _receive(
        self, host: str, port: int, first_rank: int, world_size: int, tensors: list[Any], seconds: float
    ) -> None:
        group = Group(join_store(host, port, world_size, seconds), first_rank, world_size, torch.device("cpu"), seconds)
        self.received.append(dict(group.receive([TensorInfo.from_json(row) for row in tensors])))

    async def _reset_prefix_cache(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if (answer := self._unauthorized(request)) is not None:
            return answer
        if not self.scale_out:
            return web.json_response({"error": {"message": "Scale-out endpoints are disabled."}}, status=403)
        body = await request.json()
        prompt, fields = body["token_ids"], body["sampling_params"]
        seed = fields["seed"]
        probe = fields["max_tokens"] == 1 and len(prompt) == 1
        fault = self.faults.popleft() if self.faults and not probe else "none"
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(3600 if fault == "hang" else self.delay)
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        finally:
            self.running -= 1
        if fault == "drop":
            request.transport.abort()
            return web.Response()
        if fault in ("500", "503", "400"):
            return web.json_response({"error": {"message": f"on purpose\n{fault}"}}, status=int(fault))
        if fault == "redirect":
            return web.Response(status=307, headers={"Location": "http://127.0.0.1:1/"})
        if fault == "not-json":
            return web.Response(text="<html>gateway</html>")
        tokens = list(expected_tokens(SampleRequest(tuple(prompt), fields["max_tokens"], seed=seed)))
        logprobs: list[Any] = [{"token_id": token, "logprob": -0.5, "rank": 1} for token in tokens]
        choice: dict[str, Any] = {"index": 0, "token_ids": tokens, "logprobs": {"content": logprobs}}
        choice |= {"finish_reason": "length", "stop_reason": None}
        choice["weight_versions"] = [{"version": self.weights, "start": 0, "end": len(tokens)}]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
        answer_json = {"choices": [choice], "usage": usage}
        if fault == "too-few-logprobs":
            logprobs.pop()
        elif fault == "too-many-tokens":
            tokens.append(5)
            logprobs.append({"token_id": 5, "logprob": -0.5})
        elif fault == "wrong-token":
            logprobs[-1] = {"token_id": tokens[-1] + 1, "logprob": -0.5}
        elif fault == "nan":
            logprobs[0]["logprob"] = float("nan")
        elif fault == "wrong-prompt":
            usage["prompt_tokens"] += 1
        elif fault == "abort":
            choice["finish_reason"] = "abort"
        elif fault == "no-choice":
            answer_json["choices"] = []
        elif fault == "huge":
            answer_json["padding"] = "x" * (3 << 20)
        if not probe and fault == "none":
            self.served.append(seed)
        if fault == "truncated":
            whole = web.json_response(answer_json).text.encode()
            response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
            await response.prepare(request)
            await response.write(whole[: len(whole) // 2])
            request.transport.abort()
            return response
        return web.json_response(answer_json)


@pytest.fixture(scope="module")
def names(tiny_llama: Path) -> list[str]:
    return model_names(tiny_llama)


@pytest.fixture
def servers(names: list[str]) -> Iterator[list[BadServer]]:
    both = [BadServer(names), BadServer(names)]
    yield both
    for server in both:
        server.close()


@pytest.fixture
def open_engine(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., VLLMServerEngine]]:
    """Makes engines over the given servers, with short waits, and closes them."""
    monkeypatch.setattr(replicas_module, "_HEALTH_SECONDS", 0.05)
    monkeypatch.setattr(server_engine_module, "load_tokenizer", _load_once)
    engines: list[VLLMServerEngine] = []

    def make(servers: list[BadServer], **settings: Any) -> VLLMServerEngine:
        cfg = config(servers, **settings)
        engine = make_engine(tiny_llama, cfg)
        assert isinstance(engine, VLLMServerEngine)
        engine._retry = RetryPolicy(first_delay=0.001, longest_delay=0.02)
        engine._replicas._retry = RetryPolicy(first_delay=0.01, longest_delay=0.05)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def config(servers: list[BadServer], **settings: Any) -> InferenceConfig:
    given = {"engine": "vllm-server", "servers": [s.url for s in servers], "max_model_len": 256, "max_num_seqs": 8}
    return InferenceConfig.model_validate(given | settings)


def requests(count: int, first: int = 0) -> list[SampleRequest]:
    return [SampleRequest(PROMPT, 4, seed=seed) for seed in range(first, first + count)]


def check(samples: list[Sample], asked: list[SampleRequest]) -> None:
    assert [sample.token_ids for sample in samples] == [expected_tokens(request) for request in asked]
    assert all(len(sample.logprobs) == len(sample.token_ids) for sample in samples)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_is_asked_for_again(fault: str, servers, open_engine):
    engine = open_engine(servers[:1])
    servers[0].faults.append(fault)
    check(engine.generate_many(requests(3)), requests(3))
    assert engine.stats.extra["retries"] == 1
    assert engine.stats.requests == 3
    assert engine.stats.generated_tokens == 12


def test_no_request_is_lost_whatever_goes_wrong_in_whatever_order(servers, open_engine):
    engine = open_engine(servers)

    @settings(max_examples=25, deadline=None)
    @given(*[st.lists(st.sampled_from(FAULTS), max_size=12)] * 2)
    def all_are_answered(first: list[str], second: list[str]) -> None:
        servers[0].faults.extend(first)
        servers[1].faults.extend(second)
        check(engine.generate_many(requests(24)), requests(24))
        for server in servers:
            server.faults.clear()

    all_are_answered()


def test_a_request_that_always_fails_is_given_up_and_the_engine_goes_on(servers, open_engine):
    engine = open_engine(servers)
    for server in servers:
        server.faults.extend(["500"] * 30)
    with pytest.raises(RuntimeError, match=r"failed 10 times, at last at http://127\.0\.0\.1:\d+: HTTP 500 on purpose"):
        engine.generate_many(requests(1))
    for server in servers:
        server.faults.clear()
    check(engine.generate_many(requests(5)), requests(5))


def test_what_the_server_calls_wrong_is_not_asked_twice(servers, open_engine):
    engine = open_engine(servers[:1])
    servers[0].faults.append("400")
    with pytest.raises(RuntimeError, match="refuses a request: 400: on purpose 400"):
        engine.generate_many(requests(1))
    assert "retries" not in engine.stats.extra


def test_a_hanging_request_is_moved_after_its_deadline(servers, open_engine):
    engine = open_engine(servers, request_timeout_seconds=0.3)
    servers[0].faults.append("hang")
    servers[1].faults.append("hang")
    check(engine.generate_many(requests(6)), requests(6))
    assert sum(server.dropped for server in servers) == 2


def test_a_killed_replicas_requests_move_and_it_comes_back(servers, open_engine):
    engine = open_engine(servers)
    for server in servers:
        server.delay = 0.2
    seen: list[int] = []

    def kill_one(index: int, sample: Sample) -> None:
        seen.append(index)
        if len(seen) == 3:
            servers[0].kill()

    asked = requests(60)
    check(engine.generate_many(asked, kill_one), asked)
    assert sorted(seen) == list(range(60))
    assert engine.stats.extra["replicas_lost"] >= 1
    before = len(servers[0].served)
    servers[0].start()
    wait_for(lambda: len(engine._replicas._well()) == 2)
    check(engine.generate_many(requests(40)), requests(40))
    assert len(servers[0].served) > before


def test_when_all_replicas_are_gone_the_engine_says_what_it_waited_for(servers, open_engine):
    engine = open_engine(servers, server_lost_seconds=0.5)
    for server in servers:
        server.kill()
    with pytest.raises(RuntimeError) as error:
        engine.generate_many(requests(3))
    assert "no server for 0.5 s (inference.server_lost_seconds)" in str(error.value)
    assert all(server.url in str(error.value) for server in servers)
    with pytest.raises(RuntimeError, match="the engine has failed: no server"):
        engine.generate_many(requests(1))
    for server in servers:
        server.start()


def test_replicas_that_all_come_back_in_time_lose_nothing(servers, open_engine):
    engine = open_engine(servers, server_lost_seconds=60)
    for server in servers:
        server.kill()
    restart = threading.Timer(0.5, lambda: [server.start() for server in servers])
    restart.start()
    check(engine.generate_many(requests(20)), requests(20))
    restart.join()


def test_load_is_shared_and_bounded(servers, open_engine):
    engine = open_engine(servers, max_num_seqs=2)
    for server in servers:
        server.delay = 0.02
    asked = [SampleRequest(tuple(range(seed, seed + 50)), 4, seed=seed) for seed in range(40)]
    check(engine.generate_many(asked), asked)
    assert [server.most_running for server in servers] == [4, 4]
    assert min(len(server.served) for server in servers) >= 12


def test_a_cancelled_request_closes_its_connection(servers, open_engine):
    engine = open_engine(servers[:1])
    servers[0].faults.append("hang")

    async def cancel_one() -> Sample:
        hanging = asyncio.create_task(engine.generate(requests(1)[0]))
        while servers[0].running == 0:
            await asyncio.sleep(0.01)
        hanging.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await hanging
        return await engine.generate(requests(1, first=5)[0])

    check([asyncio.run(cancel_one())], requests(1, first=5))
    wait_for(lambda: servers[0].dropped == 1)
    assert engine._in_flight == 0
    assert all(load.requests == load.tokens == 0 for load in engine._replicas._balancer.loads.values())


def test_an_error_in_the_callback_cancels_the_rest(servers, open_engine):
    engine = open_engine(servers)

    def fail(index: int, sample: Sample) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.generate_many(requests(40), fail)
    wait_for(lambda: engine._in_flight == 0)
    check(engine.generate_many(requests(10)), requests(10))


def test_closing_ends_what_is_in_flight(servers, open_engine):
    engine = open_engine(servers[:1])
    servers[0].faults.append("hang")
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            engine.generate_many(requests(1))
        except BaseException as error:
            ended.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: servers[0].running == 1)
    engine.close()
    asking.join(20)
    assert len(ended) == 1
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.generate_many(requests(1))


def test_samples_of_other_weights_do_not_count(servers, open_engine):
    engine = open_engine(servers)
    servers[0].weights = "7-of-another-run"
    check(engine.generate_many(requests(10)), requests(10))
    assert len(engine._replicas._well()) == 1
    wait_for(lambda: "takes no new weights" in engine._replicas._replicas[0].trouble)


@pytest.fixture
def updatable(servers: list[BadServer]) -> list[BadServer]:
    for server in servers:
        server.kill()
        server.updatable = True
        server.start()
    return servers


def test_a_half_loaded_server_is_left_out_until_it_has_the_weights(updatable, open_engine, tiny_llama):
    engine = open_engine(updatable)
    updatable[0].failing_loads = 3
    engine.load_weights(tiny_llama, version=4)
    samples = engine.generate_many(requests(8))
    check(samples, requests(8))
    assert {sample.weight_version for sample in samples} == {4}
    wait_for(lambda: len(engine._replicas._well()) == 2)
    assert updatable[0].loads == [str(tiny_llama.resolve())] * 4
    assert updatable[0].weights == updatable[1].weights


def test_a_server_that_was_started_anew_gets_the_weights_that_the_others_have(updatable, open_engine, tiny_llama):
    engine = open_engine(updatable)
    engine.load_weights(load_file(tiny_llama / "model.safetensors").items(), version=2)
    [folder] = set(updatable[0].loads + updatable[1].loads)
    assert list(Path(folder).glob("*.safetensors"))
    updatable[0].kill()
    updatable[0].weights = "default"
    updatable[0].start()  # so quickly that no look at it may have missed it: its samples tell
    apart = [SampleRequest(tuple(range(seed, seed + 40)), 4, seed=seed) for seed in range(12)]
    samples = engine.generate_many(apart)
    check(samples, apart)
    assert {sample.weight_version for sample in samples} == {2}
    wait_for(lambda: updatable[0].loads == [folder, folder])
    wait_for(lambda: len(engine._replicas._well()) == 2)
    engine.load_weights(tiny_llama, version=3)
    assert not Path(folder).exists()


def test_when_no_server_can_load_the_weights_the_caller_hears_why(updatable, open_engine, tiny_llama):
    engine = open_engine(updatable)
    for server in updatable:
        server.failing_loads = 1
    with pytest.raises(RuntimeError, match=r"no server could load .*: HTTP 500 half loaded"):
        engine.load_weights(tiny_llama, version=5)
    assert {sample.weight_version for sample in engine.generate_many(requests(4))} == {5}  # they have tried again


def test_a_server_that_takes_no_weights_keeps_its_own(servers, open_engine, tiny_llama):
    engine = open_engine(servers)
    with pytest.raises(ConfigError, match=r"takes no new weights; start it with .* --allow-weight-updates`"):
        engine.load_weights(tiny_llama, version=1)
    check(engine.generate_many(requests(4)), requests(4))


@pytest.fixture
def broadcast(
    updatable: list[BadServer], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[VLLMServerEngine, int], None]:
    """Sends an engine's servers the model's own weights over the network, as a version."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tensors = load_file(tiny_llama / "model.safetensors")
    announced = [TensorInfo.of(*each) for each in tensors.items()]
    return lambda engine, version: engine.broadcast_weights(tensors.items(), announced, version)


def test_servers_that_missed_a_broadcast_wait_for_the_next_unless_nobody_is_left_to_answer(
    updatable, open_engine, broadcast
):
    engine = open_engine(updatable, server_lost_seconds=3600)
    broadcast(engine, 1)
    assert [len(server.received) for server in updatable] == [1, 1]
    updatable[0].weights = "default"  # it was started anew
    apart = [SampleRequest(tuple(range(seed, seed + 40)), 4, seed=seed) for seed in range(12)]
    assert {sample.weight_version for sample in engine.generate_many(apart)} == {1}
    wait_for(lambda: "waits for the next push" in engine._replicas._replicas[0].trouble)
    updatable[1].kill()
    wait_for(lambda: not engine._replicas._well())
    updatable[1].weights = "default"
    updatable[1].start()
    wait_for(lambda: all(replica.missed for replica in engine._replicas._replicas))
    time.sleep(1.5)  # a look at all of them
    broadcast(engine, 2)  # nobody has asked meanwhile, so nothing is lost
    assert {sample.weight_version for sample in engine.generate_many(requests(4))} == {2}
    for server in updatable:
        server.kill()
        server.weights = "default"
        server.start()
    with pytest.raises(RuntimeError, match=r"no server is left that has the newest weights.*rl\.weight_sync=folder"):
        engine.generate_many(requests(4))


def test_a_server_that_receives_all_and_never_answers_is_named(updatable, open_engine, broadcast):
    engine = open_engine(updatable, server_start_seconds=0.5)
    updatable[1].stuck = True
    with pytest.raises(RuntimeError, match=rf"{updatable[1].url}: no answer for .*server_start_seconds=0\.5 after all"):
        broadcast(engine, 1)
    assert [len(server.received) for server in updatable] == [1, 1]
    wait_for(lambda: not any(replica.updating.locked() for replica in engine._replicas._replicas[1:]))


def test_a_server_that_fails_after_it_has_received_comes_back_by_its_weights_name(updatable, open_engine, broadcast):
    engine = open_engine(updatable)
    updatable[0].max_model_len = 128
    broadcast(engine, 1)
    assert engine._replicas._well() == engine._replicas._replicas[1:]
    assert {sample.weight_version for sample in engine.generate_many(requests(4))} == {1}
    updatable[0].max_model_len = 512
    wait_for(lambda: len(engine._replicas._well()) == 2)
    assert len(updatable[0].received) == 1


def test_a_stranger_at_the_port_of_a_server_of_the_job_is_no_error_of_the_configuration(
    updatable, open_engine, broadcast, monkeypatch
):
    monkeypatch.setenv(ADDRESSES, ",".join(server.url for server in updatable))
    monkeypatch.setenv(KEY, "key-of-the-job")
    updatable[0].key, updatable[1].key = "key-of-the-job", "key-of-another"
    engine = open_engine([], num_servers=2)
    check(engine.generate_many(requests(4)), requests(4))
    broadcast(engine, 1)
    assert [len(server.received) for server in updatable] == [1, 0]
    updatable[0].key = "key-of-another"
    with pytest.raises(RuntimeError, match="none of the job's servers came up: .*asks for an API key"):
        open_engine([], num_servers=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["/models/other", "astro-0123456789abcdef"]}, r"serves /models/other, not this stage's model .*"),
        ({"max_model_len": 128}, r"has a context of 128 tokens, inference.max_model_len is 256; .*"),
        ({"scale_out": False}, r"gives no token ids; start it with `astro-hpc serve CONFIG` or --enable-scale-out"),
        ({"key": "secret-key"}, r"asks for an API key; name its environment variable in .*server_api_key_env"),
        ({"weights": "3-left-behind"}, r"takes no new weights; start it with .* --allow-weight-updates`"),
    ],
)
def test_a_server_that_does_not_fit_is_named_with_the_remedy(change, message, servers, open_engine):
    for name, value in change.items():
        setattr(servers[1], name, value)
    with pytest.raises(ConfigError, match=rf"^inference\.servers: {servers[1].url} {message}$") as error:
        open_engine(servers)
    assert "\n" not in str(error.value)


def test_an_address_where_nobody_answers_is_named_with_the_remedy(servers, open_engine):
    servers[1].kill()
    with pytest.raises(ConfigError, match=rf"{servers[1].url} can't be used \(Connection refused\); start it"):
        open_engine(servers)
    servers[1].start()


def test_the_api_key_is_sent_and_never_shown(servers, open_engine, monkeypatch, capfd, caplog):
    for server in servers:
        server.key = "secret-key"
    with pytest.raises(ConfigError, match="the environment variable ASTRO_TEST_KEY is not set"):
        open_engine(servers, server_api_key_env="ASTRO_TEST_KEY")
    monkeypatch.setenv("ASTRO_TEST_KEY", "secret-key")
    engine = open_engine(servers, server_api_key_env="ASTRO_TEST_KEY")
    servers[0].faults.append("500")
    check(engine.generate_many(requests(5)), requests(5))
    monkeypatch.setenv("ASTRO_TEST_KEY", "wrong-key")
    with pytest.raises(ConfigError) as error:
        open_engine(servers, server_api_key_env="ASTRO_TEST_KEY")
    shown = str(error.value) + "".join(capfd.readouterr()) + caplog.text
    assert "secret-key" not in shown
    assert "wrong-key" not in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "vllm-server"}, "needs either servers"),
        ({"engine": "vllm-server", "servers": ["http://a:1"], "num_servers": 2}, "needs either servers"),
        ({"num_servers": 2}, "engine is vllm; set engine to vllm-server"),
        ({"engine": "vllm-server", "servers": ["a:1"]}, "write it as http://host:port"),
        ({"engine": "vllm-server", "servers": ["http://user:pw@a:1"]}, "write it as http://host:port"),
        ({"engine": "vllm-server", "servers": ["http://a:1", "http://a:1/"]}, "given twice"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        InferenceConfig.model_validate(given)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
