"""How busy the search keeps its engine, as ratios in one run on one machine.

    python tools/bench_search.py engine [--problems 24] [--rounds 3]
    python tools/bench_search.py driver [--problems 512]

`engine` searches with vLLM and compares, each round anew and with an empty prefix cache:
  search     generated tokens a second with `search.trees_in_flight` trees
  bare       the same prompts and generated lengths given to vLLM all at once: no stop strings, seeds or
             log-probabilities, end of sequence ignored
  lockstep   the same search where every sample waits for all others of its round of steps
  one tree   some of the same trees, one after another: what waiting at each step costs without other trees

`driver` replaces the engine by one that answers at once, with 256 trees in flight on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from astro_hpc.config.schema import InferenceConfig, SearchConfig, SignsSource, VerifierConfig
from astro_hpc.conversion.embedded import resolve_model
from astro_hpc.inference.engine import EngineStats, Sample, SampleRequest
from astro_hpc.inference.scripted import ScriptedEngine
from astro_hpc.inference.vllm_engine import VLLMEngine
from astro_hpc.problems.problem import Problem
from astro_hpc.problems.sources import load_source
from astro_hpc.problems.style import PromptStyle
from astro_hpc.run.files import Journal
from astro_hpc.search.driver import search_problems
from astro_hpc.search.mcts import SearchTools
from astro_hpc.search.steps import StepCutter
from astro_hpc.search.tree import Tree
from astro_hpc.verifier.pool import VerifierPool


class Recorder:
    """Passes requests on and remembers each with its generated length."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.tokenizer, self.stats, self.max_model_len = engine.tokenizer, engine.stats, engine.max_model_len
        self.made: list[tuple[SampleRequest, int]] = []

    async def generate(self, request: SampleRequest) -> Sample:
        sample = await self.engine.generate(request)
        self.made.append((request, len(sample.token_ids)))
        return sample


class LockStep:
    """Lets no sample go on before all that were asked for with it have ended."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.tokenizer, self.stats, self.max_model_len = engine.tokenizer, engine.stats, engine.max_model_len
        self._round: list[asyncio.Future[None]] = []
        self._running = 0

    async def generate(self, request: SampleRequest) -> Sample:
        self._running += 1
        sample = await self.engine.generate(request)
        self._running -= 1
        gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._round.append(gate)
        if self._running == 0:
            waiting, self._round = self._round, []
            for future in waiting:
                future.set_result(None)
        await gate
        return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["engine", "driver"])
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct", help="folder, or the embedded model")
    parser.add_argument("--style", default="fewshot-raw", help="the model should keep its format")
    parser.add_argument("--problems", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trees-in-flight", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = bench_engine(arguments) if arguments.what == "engine" else bench_driver(arguments)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<32} {value:,.3f}" if isinstance(value, float) else f"{name:<32} {value:,}")


def bench_engine(arguments: argparse.Namespace) -> dict[str, float]:
    """Medians over rounds of tokens a second, and their ratios."""
    cfg = SearchConfig(
        num_iterations=4,
        num_expansions=4,
        num_rollouts=2,
        keep_rollouts=True,
        max_step_tokens=24,
        max_rollout_tokens=64,
        trees_in_flight=arguments.trees_in_flight or 16,
    )
    inference = InferenceConfig(max_model_len=512, max_num_seqs=64, cpu_kv_cache_gb=1.0)
    problems = load_source(SignsSource(count=arguments.problems or 24))
    engine = VLLMEngine(resolve_model(arguments.model), inference, seed=0)
    rates: dict[str, list[float]] = {"search": [], "bare": [], "lockstep": [], "one tree": []}
    busy: list[float] = []
    with VerifierPool(VerifierConfig()) as verifier:

        def rate(client: Any, problems: Sequence[Problem], in_flight: int) -> float:
            engine._call(lambda vllm: vllm.reset_prefix_cache())
            before, started = replace(engine.stats), time.perf_counter()
            _search(client, verifier, arguments.style, cfg, problems, in_flight)
            seconds = time.perf_counter() - started
            busy.append((engine.stats.busy_seconds - before.busy_seconds) / seconds)
            return (engine.stats.generated_tokens - before.generated_tokens) / seconds

        for _ in range(arguments.rounds):
            recorder = Recorder(engine)
            rates["search"].append(rate(recorder, problems, cfg.trees_in_flight))
            rates["bare"].append(_bare_rate(engine, recorder.made))
            rates["lockstep"].append(rate(LockStep(engine), problems, cfg.trees_in_flight))
            rates["one tree"].append(rate(engine, problems[:: len(problems) // 3], 1))
        requests, tokens = len(recorder.made), sum(length for _, length in recorder.made)
    engine.close()
    ratios = {name: [a / b for a, b in zip(rates["search"], rates[name], strict=True)] for name in rates}
    return {
        "trees": len(problems),
        "requests": requests,
        "generated tokens": tokens,
        "engine busy in search": busy[0],
        **{f"{name} tokens/s": statistics.median(values) for name, values in rates.items()},
        **{f"search / {name}": statistics.median(ratios[name]) for name in ratios if name != "search"},
    }


def _bare_rate(engine: VLLMEngine, made: Sequence[tuple[SampleRequest, int]]) -> float:
    """Tokens a second of vLLM alone on the recorded prompts and lengths."""

    def run(vllm: Any) -> float:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        vllm.reset_prefix_cache()
        started = time.perf_counter()
        for number, (request, length) in enumerate(made):
            parameters = SamplingParams(
                max_tokens=length,
                ignore_eos=True,
                temperature=request.temperature,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            vllm.add_request(f"bare-{number}", tokens_input(list(request.prompt_token_ids)), parameters)
        tokens = 0
        while vllm.has_unfinished_requests():
            tokens += sum(len(output.outputs[0].token_ids) for output in vllm.step())
        assert tokens == sum(length for _, length in made)
        return tokens / (time.perf_counter() - started)

    return engine._call(run)


def bench_driver(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of the search's own work, the scripted engine's included."""
    cfg = SearchConfig(num_iterations=16, num_expansions=8, num_rollouts=8, max_rollout_tokens=1024)
    problems = [Problem(f"bench/{i}", f"problem {i}", "1") for i in range(arguments.problems or 512)]
    engine = ScriptedEngine(_long_steps)
    engine_alone = _seconds_alone(engine, problems, cfg)
    engine.stats = EngineStats()
    in_flight = arguments.trees_in_flight or 256
    with VerifierPool(VerifierConfig()) as verifier:
        started, cpu = time.perf_counter(), time.process_time()
        _search(engine, verifier, arguments.style, cfg, problems, in_flight)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    stats = engine.stats
    return {
        "trees": len(problems),
        "trees in flight": in_flight,
        "requests": stats.requests,
        "generated tokens": stats.generated_tokens,
        "tokens/s": stats.generated_tokens / seconds,
        "requests/s": stats.requests / seconds,
        "cores used": cpu / seconds,
        "share of the scripted engine": engine_alone * stats.generated_tokens / seconds,
    }


def _long_steps(context: str, random_numbers: Any) -> str:
    """Up to ten steps of 39 tokens, each one of nine, then a boxed digit."""
    done = context.count("\nStep ")
    steps = [
        f"Step {done + i + 1:2}: add {random_numbers.randrange(1, 10)} to both sides of it, done.\n"
        for i in range(max(0, 10 - done))
    ]
    return "".join(steps) + f"\\boxed{{{random_numbers.randrange(3)}}}"


def _seconds_alone(engine: ScriptedEngine, problems: Sequence[Problem], cfg: SearchConfig) -> float:
    """Seconds that the scripted engine itself takes for a token of a rollout."""
    prompt = tuple(engine.tokenizer.encode("x" * 300))
    requests = [SampleRequest(prompt, cfg.max_rollout_tokens, seed=i) for i in range(2000)]
    started = time.perf_counter()
    samples = engine.generate_many(requests)
    return (time.perf_counter() - started) / sum(len(sample.token_ids) for sample in samples)


def _search(
    engine: Any, verifier: VerifierPool, style: str, cfg: SearchConfig, problems: Sequence[Problem], in_flight: int
) -> None:
    prompt_style = PromptStyle.load(style)
    cutter = StepCutter(engine.tokenizer, prompt_style.step_delimiter)
    tools = SearchTools(engine, verifier, prompt_style, cutter, cfg, seed=0)
    with TemporaryDirectory() as folder, Journal(Path(folder) / "trees.jsonl") as journal:

        def keep(tree: Tree) -> None:
            journal.append(tree.to_json())

        failures = asyncio.run(search_problems(problems, tools, in_flight, keep))
    if failures:
        raise next(iter(failures.values()))


if __name__ == "__main__":
    main()
