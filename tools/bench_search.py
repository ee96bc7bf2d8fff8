"""How busy the search keeps its engine, as ratios in one run on one machine.

    python tools/bench_search.py [--trees 48] [--json]      everything, about 6 minutes on two cores
    python tools/bench_search.py --only driver              the search's own work, seconds
    python tools/bench_search.py --only engine              with vLLM

With vLLM, each with an empty prefix cache:
  search        tokens generated a second with `--in-flight` trees, all of it and without the tail: the time at the
                end when too few requests are left to fill the batch
  bare          the same requests (prompt, length, temperature, seed, log-probabilities) given to the same vLLM all at
                once, the end of the sequence ignored
  barest        as bare, without seeds and log-probabilities, which a search can't do without
  lockstep      the same search, on `--slow-trees` trees, where every sample waits for all others of its round
  tree by tree  a driver that finishes one tree before the next and waits for every sample of a step

The driver alone: the engine answers at once with sentences made beforehand (real tokenizer), 256 trees in flight,
finished trees journaled; one core does it all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from astro_hpc.config.schema import InferenceConfig, SearchConfig, SignsSource, VerifierConfig
from astro_hpc.conversion.embedded import resolve_model
from astro_hpc.inference.engine import EngineStats, Sample, SampleRequest
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

_DRIVER_TREES_IN_FLIGHT = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["engine", "driver"])
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct", help="folder, or the embedded model")
    parser.add_argument("--style", default="fewshot-raw", help="one whose format the model keeps")
    parser.add_argument("--trees", type=int, default=48, help="trees of the search; more make the tail shorter")
    parser.add_argument("--slow-trees", type=int, default=12, help="trees of the lockstep driver; a quarter: by tree")
    parser.add_argument("--in-flight", type=int, default=SearchConfig().trees_in_flight)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--cpu-threads", type=int, help="of the engine on a CPU; all cores by default")
    parser.add_argument("--driver-trees", type=int, default=320)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {platform.machine()}"}
    if arguments.only != "engine":
        result |= bench_driver(arguments)
    if arguments.only != "driver":
        result |= bench_engine(arguments)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<36} " + (f"{value:,.3f}" if isinstance(value, float) else str(value)))


# --- with vLLM ------------------------------------------------------------------------------------------------


class Recorder:
    """Passes requests on and remembers them in their order, each with its generated length."""

    def __init__(self, engine: Any, full: int) -> None:
        """`full`: requests that fill the engine's batch."""
        self.engine, self._full = engine, full
        self.tokenizer, self.stats, self.max_model_len = engine.tokenizer, engine.stats, engine.max_model_len
        self.made: list[tuple[SampleRequest, int]] = []
        self._running = self._ended_tokens = 0
        self.last_full: tuple[float, int] | None = None
        """When the batch was full for the last time, and the tokens of what had ended by then."""

    async def generate(self, request: SampleRequest) -> Sample:
        number = len(self.made)
        self.made.append((request, 0))
        self._running += 1
        sample = await self.engine.generate(request)
        self.made[number] = (request, len(sample.token_ids))
        self._ended_tokens += len(sample.token_ids)
        if self._running >= self._full:
            self.last_full = (time.perf_counter(), self._ended_tokens)
        self._running -= 1
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


def bench_engine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the search and of what it is held against, and the ratios."""
    cfg = SearchConfig(
        num_iterations=2,
        num_expansions=4,
        num_rollouts=2,
        keep_rollouts=True,
        max_step_tokens=48,
        max_rollout_tokens=96,
        trees_in_flight=arguments.in_flight,
    )
    inference = InferenceConfig(
        max_model_len=512,
        max_num_seqs=arguments.max_num_seqs,
        cpu_kv_cache_gb=1.0,
        cpu_threads=arguments.cpu_threads,
    )
    problems = load_source(SignsSource(count=arguments.trees))
    engine = VLLMEngine(resolve_model(arguments.model), inference, seed=0)
    with VerifierPool(VerifierConfig()) as verifier:

        def search(client: Any, problems: Sequence[Problem], in_flight: int) -> dict[str, float]:
            engine._call(lambda vllm: vllm.reset_prefix_cache())
            first, started = replace(engine.stats), time.perf_counter()
            _search(client, verifier, arguments.style, cfg, problems, in_flight)
            seconds, stats = time.perf_counter() - started, engine.stats
            _say(f"{type(client).__name__} with {len(problems)} trees took {seconds:.0f} s")
            return {
                "started": started,
                "seconds": seconds,
                "rate": (stats.generated_tokens - first.generated_tokens) / seconds,
                "busy": (stats.busy_seconds - first.busy_seconds) / seconds,
                "cached": (stats.cached_prompt_tokens - first.cached_prompt_tokens)
                / max(stats.prompt_tokens - first.prompt_tokens, 1),
            }

        search(engine, problems[:2], 2)  # whatever is done once
        recorder = Recorder(engine, arguments.max_num_seqs)
        searched = search(recorder, problems, cfg.trees_in_flight)
        if recorder.last_full is None:
            raise SystemExit(f"{arguments.trees} trees never fill the engine's batch; give it more with --trees")
        until_tail, tokens_until_tail = recorder.last_full[0] - searched["started"], recorder.last_full[1]
        bare = _bare_rate(engine, recorder.made, same_parameters=True)
        barest = _bare_rate(engine, recorder.made, same_parameters=False)
        some = problems[: arguments.slow_trees]
        lockstep = search(LockStep(engine), some, cfg.trees_in_flight)
        by_tree = search(LockStep(engine), problems[: max(2, arguments.slow_trees // 4)], 1)
    engine.close()
    return {
        "trees": len(problems),
        "trees in flight": cfg.trees_in_flight,
        "requests": len(recorder.made),
        "generated tokens": sum(length for _, length in recorder.made),
        "search: seconds": searched["seconds"],
        "search: seconds of tail": searched["seconds"] - until_tail,
        "search: engine busy": searched["busy"],
        "search: prompt tokens cached": searched["cached"],
        "search tokens/s": searched["rate"],
        "search tokens/s before the tail": tokens_until_tail / until_tail,
        "bare tokens/s": bare,
        "barest tokens/s": barest,
        "lockstep tokens/s": lockstep["rate"],
        "tree by tree tokens/s": by_tree["rate"],
        "search / bare": searched["rate"] / bare,
        "search before the tail / bare": tokens_until_tail / until_tail / bare,
        "search / barest": searched["rate"] / barest,
        "search / lockstep": searched["rate"] / lockstep["rate"],
        "search / tree by tree": searched["rate"] / by_tree["rate"],
    }


def _bare_rate(engine: VLLMEngine, made: Sequence[tuple[SampleRequest, int]], same_parameters: bool) -> float:
    """Tokens a second of vLLM alone on the recorded prompts and lengths."""

    def run(vllm: Any) -> float:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        vllm.reset_prefix_cache()
        started = time.perf_counter()
        for number, (request, length) in enumerate(made):
            same = {"seed": request.seed, "logprobs": 0, "flat_logprobs": True} if same_parameters else {}
            parameters = SamplingParams(
                max_tokens=length,
                ignore_eos=True,
                temperature=request.temperature,
                top_p=request.top_p,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                **same,
            )
            vllm.add_request(f"bare-{number}", tokens_input(list(request.prompt_token_ids)), parameters)
        tokens = 0
        while vllm.has_unfinished_requests():
            tokens += sum(len(output.outputs[0].token_ids) for output in vllm.step() if output.finished)
        assert tokens == sum(length for _, length in made)
        _say(f"bare vLLM, {'same' if same_parameters else 'fewest'} parameters: {time.perf_counter() - started:.0f} s")
        return tokens / (time.perf_counter() - started)

    return engine._call(run)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the driver alone -----------------------------------------------------------------------------------------


class InstantEngine:
    """Answers at once with samples made beforehand, so that what is measured is the search alone."""

    max_model_len = 1 << 20

    def __init__(self, tokenizer: Any, style: PromptStyle) -> None:
        self.tokenizer = tokenizer
        self.stats = EngineStats()
        self._is_step = style.step_delimiter
        draw = random.Random(0)
        self._steps = [self._sample(_step(draw), False) for _ in range(500)]
        self._steps += [self._sample(f"\\boxed{{{draw.randrange(4)}}}", True) for _ in range(50)]
        self._rollouts = [
            self._sample("".join(_step(draw) for _ in range(draw.randrange(2, 10))) + f"\\boxed{{{i % 4}}}", True)
            for i in range(500)
        ]

    async def generate(self, request: SampleRequest) -> Sample:
        samples = self._steps if request.stop[0] == self._is_step else self._rollouts
        sample = samples[request.seed % len(samples)]
        self.stats.requests += 1
        self.stats.generated_tokens += len(sample.token_ids)
        await asyncio.sleep(0)
        return sample

    def _sample(self, text: str, ended: bool) -> Sample:
        tokens = [*self.tokenizer.encode(text, add_special_tokens=False), *[self.tokenizer.eos_token_id] * ended]
        return Sample(tuple(tokens), tuple(-0.1 * (1 + token % 7) for token in tokens), text, "stop", ended)


def _step(draw: random.Random) -> str:
    a, b = draw.randrange(10, 60), draw.randrange(10, 40)
    return f"Step {draw.randrange(1, 9)}: {a} + {b} = {a + b}\n"


def bench_driver(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the search's own work: the tree, requests, cutting, verdicts, journal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    cfg = SearchConfig(num_iterations=2)
    engine = InstantEngine(
        AutoTokenizer.from_pretrained(resolve_model(arguments.model)), PromptStyle.load(arguments.style)
    )
    problems = [Problem(f"bench/{i}", f"What is {i} + {i + 1}?", str(i % 4)) for i in range(arguments.driver_trees)]
    with VerifierPool(VerifierConfig()) as verifier, _one_core():
        started, cpu = time.perf_counter(), time.process_time()
        _search(engine, verifier, arguments.style, cfg, problems, _DRIVER_TREES_IN_FLIGHT)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    stats = engine.stats
    return {
        "driver: trees": len(problems),
        "driver: trees in flight": _DRIVER_TREES_IN_FLIGHT,
        "driver: seconds": seconds,
        "driver: requests/s": stats.requests / seconds,
        "driver: tokens a request": stats.generated_tokens / stats.requests,
        "driver: cores used": cpu / seconds,
        "driver tokens/s": stats.generated_tokens / seconds,
    }


class _one_core:
    """Keep this process, all its threads, on one core."""

    def __enter__(self) -> None:
        self._before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(self._before)})

    def __exit__(self, *_: object) -> None:
        os.sched_setaffinity(0, self._before)


def _search(
    engine: Any, verifier: VerifierPool, style: str, cfg: SearchConfig, problems: Iterable[Problem], in_flight: int
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
