"""Real vLLM servers on a tiny random model: the same samples as in the process, and none lost when one is killed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny_models import save_tiny_llama

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig, RunConfig
from astro_hpc.inference import make_engine
from astro_hpc.inference.buckets import TensorInfo
from astro_hpc.inference.engine import Engine, Sample, SampleRequest
from astro_hpc.inference.local_server import choose_port
from astro_hpc.inference.server_engine import VLLMServerEngine
from astro_hpc.run.stage import StageContext
from astro_hpc.search import stage as search_stage

CFG = InferenceConfig(dtype="float32", max_model_len=256, max_num_seqs=16, cpu_kv_cache_gb=0.1, cpu_threads=1)
TEXT = "<|im_start|>user\n" + "Put + or - between the numbers 4 2 3 4 to make 5. " * 4 + "<|im_end|>\n"
KEY = "ASTRO_TEST_SERVER_KEY"
STYLE = {
    "description": "A delimiter that even a random model writes often",
    "prompt": "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n",
    "step_delimiter": "e",
    "answer_marker": "\\boxed{",
    "stop": ["<|im_end|>"],
    "special_tokens": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
}


@pytest.fixture(scope="module")
def world(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """One engine over two servers, of which an engine of its own started one and `astro-hpc serve` the other.

    `local` is the in-process engine with the same weights, `second` another model of the same shapes.
    """
    root = tmp_path_factory.mktemp("servers")
    first = save_tiny_llama(root / "first", smollm2, seed=0)
    second = save_tiny_llama(root / "second", smollm2, seed=1)
    os.environ[KEY] = "a-key-for-the-test"
    settings = {"name": "x", "runs_dir": str(root / "runs"), "problems": {"train": []}}
    settings |= {"model": {"path": str(first)}, "inference": {**CFG.model_dump(mode="json"), "server_api_key_env": KEY}}
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "astro_hpc", "serve", str(root / "run.yaml"), "--allow-weight-updates"]
    command += ["--port", str(choose_port(0))]
    cfg = CFG.model_copy(update={"engine": "vllm-server", "server_api_key_env": KEY})
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(root / "serve.log", "wb"))
        served = stack.enter_context(subprocess.Popen(command, stderr=log))
        stack.callback(served.kill)
        owner = make_engine(first, cfg.model_copy(update={"num_servers": 1}), seed=0, log_dir=root / "logs")
        assert isinstance(owner, VLLMServerEngine)
        stack.callback(owner.close)
        local = make_engine(first, CFG, seed=0)
        stack.callback(local.close)
        ready = f"serve: ready at http://127.0.0.1:{command[-1]}\n"
        wait_for(lambda: ready in (root / "serve.log").read_text() or served.poll() is not None, 240)
        urls = [replicas(owner)[0].url, ready.split()[-1]]
        engine = make_engine(first, cfg.model_copy(update={"servers": urls}), seed=0, log_dir=root / "logs")
        assert isinstance(engine, VLLMServerEngine)
        stack.callback(engine.close)
        prompt = tuple(local.tokenizer.encode(TEXT, add_special_tokens=False))
        yield SimpleNamespace(**{name: value for name, value in locals().items() if name not in ("stack", "settings")})
        pids = group(replicas(owner)[0].local.pid)
        assert len(pids) > 1
        owner.close()
        owner.close()
        wait_for(lambda: alive(pids) == [], 10)
    del os.environ[KEY]


def replicas(engine: VLLMServerEngine) -> list:
    return engine._replicas._replicas


def test_samples_are_those_of_the_engine_in_the_process(world):
    special = next(t.content for t in world.local.tokenizer.added_tokens_decoder.values() if t.special)
    requests = [SampleRequest(world.prompt, 12, temperature=0.0)]
    requests += [SampleRequest(world.prompt, 20, seed=2**62 + seed) for seed in range(8)]
    requests += [SampleRequest(world.prompt, 20, seed=seed, temperature=0.7, top_p=0.9) for seed in range(4)]
    requests += [SampleRequest(world.prompt[-9:], 40, seed=seed, stop=("e", special)) for seed in range(6)]
    assert_same(world.engine.generate_many(requests), world.local.generate_many(requests))

    async def together() -> list[Sample]:
        return await asyncio.gather(*[world.engine.generate(request) for request in requests[::-1]])

    assert_same(asyncio.run(together())[::-1], world.local.generate_many(requests))
    stopped = world.engine.generate_many(requests[-6:])
    assert any(sample.finish_reason == "stop" and "e" in sample.text for sample in stopped)


def test_a_special_token_named_as_a_stop_ends_the_sequence_as_in_the_process(world):
    tokenizer = world.local.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for first in range(0, 1000, 16):
        many = [SampleRequest(world.prompt[-4:], 60, seed=seed) for seed in range(first, first + 16)]
        samples = world.engine.generate_many(many)
        found = {
            i: [token for token in sample.token_ids if token in special and token != tokenizer.eos_token_id]
            for i, sample in enumerate(samples)
        }
        if any(found.values()):
            break
    at, tokens = next((i, tokens) for i, tokens in found.items() if tokens)
    request = dataclasses.replace(many[at], stop=(tokenizer.decode(tokens[:1]),))
    [sample] = world.engine.generate_many([request])
    assert_same([sample], world.local.generate_many([request]))
    assert sample.stopped_by_eos
    assert sample.token_ids[-1] == tokens[0]


def test_repeated_prompts_are_counted_as_cached_and_go_to_the_same_replica(world):
    prompt = tuple(range(500, 700))
    world.engine.generate_many([SampleRequest(prompt, 2)])
    before = dataclasses.replace(world.engine.stats)
    world.engine.generate_many([SampleRequest((*prompt, 7), 2, seed=1)])
    assert world.engine.stats.cached_prompt_tokens - before.cached_prompt_tokens == 192
    assert world.engine.stats.prompt_tokens - before.prompt_tokens == 201
    assert world.engine.stats.requests == before.requests + 1
    assert world.engine.stats.busy_seconds > before.busy_seconds


def test_a_cancelled_request_is_aborted_on_its_server(world):
    async def cancel_one() -> None:
        long = asyncio.create_task(world.engine.generate(SampleRequest(world.prompt, 160, seed=1)))
        await asyncio.sleep(0.1)
        long.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await long

    generated = world.engine.stats.generated_tokens
    asyncio.run(cancel_one())
    wait_for(lambda: running_requests(world.engine) == 0, 20)
    assert world.engine.stats.generated_tokens == generated


def test_new_weights_reach_all_servers_or_none(world, smollm2):
    from safetensors.torch import load_file

    requests = [SampleRequest(tuple(range(seed, seed + 40)), 8, seed=seed) for seed in range(12)]
    before = world.local.generate_many(requests)
    old_weights = world.engine.weight_digests(1, [0, 77])
    assert old_weights == world.local.weight_digests(1, [0, 77])
    with pytest.raises(ConfigError, match="has shape"):
        world.engine.load_weights(smollm2, version=3)
    tensors = load_file(world.second / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        world.engine.load_weights([(k, v) for k, v in tensors.items() if k != "model.norm.weight"], version=3)
    assert_same(world.engine.generate_many(requests), before)

    for source, folder, version in [
        (tensors.items(), world.second, 7),
        (world.first, world.first, 8),
        (world.second, world.second, 9),
        (world.first, world.first, 10),
    ]:
        world.engine.load_weights(source, version)
        world.local.load_weights(folder, version)
        samples = world.engine.generate_many(requests)
        assert_same(samples, world.local.generate_many(requests))
        assert {sample.weight_version for sample in samples} == {version}
        hashes = world.engine.weight_digests(1, [0, 77])
        assert hashes == world.local.weight_digests(1, [0, 77])
        assert (hashes == old_weights) == (folder == world.first)
    assert list((world.root / "logs").glob("weights-*")) == []

    announced = [TensorInfo.of(*each) for each in tensors.items()]
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        world.engine.broadcast_weights(iter([]), [each for each in announced if "model.norm" not in each.name], 11)
    world.engine.broadcast_weights(tensors.items(), announced, 11)
    world.local.load_weights(world.second, 11)
    samples = world.engine.generate_many(requests)
    assert_same(samples, world.local.generate_many(requests))
    assert {sample.weight_version for sample in samples} == {11}
    assert world.engine.weight_digests(1, [0, 77]) == world.local.weight_digests(1, [0, 77]) != old_weights
    for engine in (world.engine, world.local):  # as the other tests expect them
        engine.load_weights(world.first, 12)


def test_two_engines_share_servers_and_each_checks_what_it_needs(world, smollm2, monkeypatch):
    cfg = CFG.model_copy(update={"engine": "vllm-server", "servers": world.urls, "server_api_key_env": KEY})
    other = make_engine(world.first, cfg)
    try:
        requests = [SampleRequest(world.prompt, 10, seed=seed) for seed in range(6)]
        assert_same(other.generate_many(requests), world.engine.generate_many(requests), weight_version=0)
    finally:
        other.close()
    with pytest.raises(ConfigError, match=r"serves .*/first, not this stage's model .*/second; start it with"):
        make_engine(world.second, cfg)
    with pytest.raises(
        ConfigError, match=r"has a context of 256 tokens, inference.max_model_len is 300; start it with"
    ):
        make_engine(world.first, cfg.model_copy(update={"max_model_len": 300}))
    monkeypatch.setenv(KEY, "another-key")
    with pytest.raises(ConfigError, match="asks for an API key"):
        make_engine(world.first, cfg)


def test_slurms_warning_before_the_time_limit_ends_no_server(world):
    serve = world.served.pid
    pids = [serve, *group(replicas(world.owner)[0].local.pid), *(p for c in children_of(serve) for p in group(c))]
    assert len(pids) > 4
    for pid in pids:  # as Slurm does to all processes of a step
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    assert sorted(alive(pids)) == sorted(pids)
    requests = [SampleRequest(tuple(range(seed, seed + 40)), 2, seed=seed) for seed in range(6)]
    assert_same(world.engine.generate_many(requests), world.local.generate_many(requests))


def test_a_server_killed_in_mid_search_costs_no_tree_and_is_started_anew(world, tmp_path, monkeypatch, capfd):
    first = replicas(world.owner)[0].local.pid
    members = group(first)
    assert len(members) > 1  # the HTTP server, and the engine's process

    def kill_once(number_of_trees: int) -> None:
        if number_of_trees == 2:
            os.kill(first, signal.SIGKILL)

    servers = {"engine": "vllm-server", "servers": world.urls, "server_api_key_env": KEY}
    with_servers = search(tmp_path / "servers", world.first, servers, monkeypatch, kill_once)
    wait_for(lambda: alive(members) == [], 10)
    assert f"{world.urls[0]} is out of reach" in capfd.readouterr().err
    monkeypatch.setattr(search_stage, "make_engine", lambda *_: Unclosable(world.local))
    in_process = search(tmp_path / "local", world.first, {"engine": "vllm"}, monkeypatch, lambda _: None)
    assert len(with_servers) == 12
    assert with_servers == in_process

    wait_for(lambda: len(world.engine._replicas._well()) == 2, 240)
    assert world.owner.stats.extra["servers_restarted"] == 1
    assert replicas(world.owner)[0].local.pid != first
    requests = [SampleRequest(tuple(range(seed, seed + 40)), 8, seed=seed) for seed in range(20)]
    assert_same(world.engine.generate_many(requests), world.local.generate_many(requests))


def test_serve_ends_on_sigterm_without_leaving_anything(world):
    """Last of those that need both servers."""
    again = subprocess.run(world.command, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 2
    assert again.stderr.endswith(f" --port {world.command[-1]}: Address already in use; choose another\n")
    processes = [pid for child in children_of(world.served.pid) for pid in group(child)]
    assert len(processes) > 1
    world.served.send_signal(signal.SIGTERM)
    assert world.served.wait(60) == 0
    wait_for(lambda: alive(processes) == [], 10)
    assert os.environ[KEY] not in (world.root / "serve.log").read_text()


def test_servers_end_with_the_process_that_started_them_kill_9_included(world, tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from astro_hpc.config.schema import InferenceConfig\n"
        "from astro_hpc.inference.local_server import LocalServer, choose_port\n"
        "server = LocalServer(Path(sys.argv[1]), InferenceConfig(), seed=0, log=Path(sys.argv[2]))\n"
        "server.start(choose_port(0)); print(server.pid, flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(world.first), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        # It has tied itself to its parent before it imports what takes long.
        wait_for(lambda: b"torch" in Path(f"/proc/{child}/maps").read_bytes(), 60)
        process.kill()
        process.wait()
        wait_for(lambda: alive([child]) == [], 10)


class Unclosable:
    """The module's in-process engine for a stage that closes its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def close(self) -> None:
        pass


def search(
    folder: Path, model: Path, inference: dict, monkeypatch: pytest.MonkeyPatch, on_tree: Callable[[int], None]
) -> dict:
    """The trees of a search stage by problem, log-probabilities rounded; `on_tree(n)` after the n-th."""
    folder.mkdir()
    (folder / "style.yaml").write_text(yaml.safe_dump(STYLE))
    cfg = RunConfig.model_validate(
        {
            "name": "test",
            "runs_dir": folder,
            "model": {"prompt_style": str(folder / "style.yaml")},
            "problems": {"train": [{"type": "signs", "count": 12}]},
            "inference": CFG.model_dump(mode="json") | inference,
            "search": {
                "num_iterations": 4,
                "num_expansions": 3,
                "num_rollouts": 1,
                "max_step_tokens": 16,
                "max_rollout_tokens": 40,
                "trees_in_flight": 4,
            },
        }
    )
    context = StageContext(cfg, folder / "search", "search")
    context.dir.mkdir()
    count = 0
    original = search_stage.Journal.append

    def append(journal, row) -> None:
        nonlocal count
        original(journal, row)
        count += 1
        on_tree(count)

    with monkeypatch.context() as patch:
        patch.setattr(search_stage.Journal, "append", append)
        search_stage.run(context, model_dir=model)
    trees = list(search_stage.read_trees(context.dir / "trees.jsonl"))
    return {
        tree.problem.id: [(node.parent, node.visits, node.token_ids, round(node.logprob, 2)) for node in tree.nodes]
        for tree in trees
    }


def assert_same(samples: list[Sample], wanted: list[Sample], **change: int) -> None:
    assert len(samples) == len(wanted)
    for sample, other in zip(samples, wanted, strict=True):
        assert sample.logprobs == pytest.approx(other.logprobs, abs=2e-4)
        assert sample == dataclasses.replace(other, logprobs=sample.logprobs, **change)


def running_requests(engine: VLLMServerEngine) -> int:
    total = 0
    for url in engine._cfg.servers:
        request = urllib.request.Request(url + "/metrics", headers={"Authorization": f"Bearer {os.environ[KEY]}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read().decode()
        found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} ([0-9.]+)$", text, re.MULTILINE)
        assert found
        total += int(sum(map(float, found)))
    return total


def group(leader: int) -> list[int]:
    """Processes of a process group."""
    found = subprocess.run(["ps", "-eo", "pid=,pgid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, pgid in map(str.split, found.splitlines()) if int(pgid) == leader]


def children_of(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, ppid in map(str.split, found.splitlines()) if int(ppid) == parent]


def alive(pids: list[int]) -> list[int]:
    """Those that still run; what has ended and only waits to be reaped doesn't count."""
    running = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                running.append(pid)
    return running


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
