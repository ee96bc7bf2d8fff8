"""What HTTP costs: the same requests on the in-process engine and on vLLM servers, as ratios in one run.

    python tools/bench_servers.py [--servers 1] [--requests 128] [--tokens 48] [--rounds 3]

Requests are those of a search: few prompts with many samples each, a stop string that never comes, a seed each,
log-probabilities. Each round gives them to one engine after the other, all at once, and both engines stay loaded;
the prefix caches are warm for all rounds alike. The samples are compared too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from astro_hpc.config.schema import InferenceConfig, SignsSource
from astro_hpc.conversion.embedded import resolve_model
from astro_hpc.inference import make_engine
from astro_hpc.inference.engine import SampleRequest
from astro_hpc.problems.sources import load_source
from astro_hpc.problems.style import PromptStyle

_SAMPLES_A_PROMPT = 8


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    model = resolve_model("embedded:smollm2-135m-instruct")
    cfg = InferenceConfig(max_model_len=1024, max_num_seqs=64, cpu_kv_cache_gb=1.0)
    over_http = cfg.model_copy(update={"engine": "vllm-server", "num_servers": arguments.servers})
    rates: dict[str, list[float]] = {"in_process": [], "servers": []}
    with tempfile.TemporaryDirectory() as logs:
        engines = {"in_process": make_engine(model, cfg), "servers": make_engine(model, over_http, 0, Path(logs))}
        try:
            requests = _requests(engines["in_process"].tokenizer, arguments.requests, arguments.tokens)
            samples = {name: engine.generate_many(requests) for name, engine in engines.items()}  # warm-up
            for _ in range(arguments.rounds):
                for name, engine in engines.items():
                    started = time.perf_counter()
                    made = engine.generate_many(requests)
                    rates[name].append(sum(len(s.token_ids) for s in made) / (time.perf_counter() - started))
        finally:
            for engine in engines.values():
                engine.close()
    ratios = [b / a for a, b in zip(rates["in_process"], rates["servers"], strict=True)]
    pairs = zip(samples["in_process"], samples["servers"], strict=True)
    print(
        json.dumps(
            {
                **{f"{name}_tokens_per_second": round(statistics.median(values), 1) for name, values in rates.items()},
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "same_samples": sum(a.token_ids == b.token_ids for a, b in pairs) / len(requests),
                "servers": arguments.servers,
                "requests": len(requests),
            },
            indent=2,
        )
    )


def _requests(tokenizer: object, count: int, tokens: int) -> list[SampleRequest]:
    style = PromptStyle.load("minimal-chat")
    problems = load_source(SignsSource(count=-(-count // _SAMPLES_A_PROMPT)))
    prompts = [tuple(tokenizer.encode(style.render(p.text), add_special_tokens=False)) for p in problems]  # type: ignore[attr-defined]
    return [
        SampleRequest(prompts[number // _SAMPLES_A_PROMPT], tokens, seed=number, stop=("\0never",))
        for number in range(count)
    ]


if __name__ == "__main__":
    main()
