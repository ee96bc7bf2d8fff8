"""Two models of one architecture evaluated on one real vLLM engine, and a real self-evaluation."""

import asyncio
import json

import pytest
from tiny_models import save_tiny_llama

from astro_hpc.cloning.self_evaluation import SelfEvaluator
from astro_hpc.config.schema import RunConfig
from astro_hpc.evaluation import stage
from astro_hpc.run.files import read_jsonl
from astro_hpc.run.stage import StageContext


@pytest.fixture(scope="module")
def llamas(smollm2, tmp_path_factory):
    """Two tiny random models that differ in their weights."""
    root = tmp_path_factory.mktemp("llamas")
    return [save_tiny_llama(root / str(seed), smollm2, seed) for seed in (0, 1)]


def test_weights_are_swapped_between_models(llamas, tmp_path):
    first, second = llamas
    cfg = RunConfig(
        name="t",
        runs_dir=tmp_path,
        problems={"train": [{"type": "signs", "count": 5}]},
        model={"prompt_style": "minimal-chat"},
        inference={
            "max_model_len": 256,
            "max_num_seqs": 16,
            "cpu_kv_cache_gb": 0.1,
            "dtype": "float32",
            "cpu_threads": 1,
        },
        eval={
            "benchmarks": {"signs": {"type": "signs", "split": "heldout", "count": 6, "seed": 4}},
            "num_samples": 2,
            "max_tokens": 12,
        },
    )
    folder = cfg.run_dir / "eval"
    folder.mkdir(parents=True)
    stage.run(StageContext(cfg, folder, "eval"), models={"a": first, "b": second, "a-again": first})
    texts = {
        name: [
            row["generation"]
            for index in range(2)
            for row in read_jsonl(folder / name / "signs" / f"output-rs{index}.jsonl")
        ]
        for name in ("a", "b", "a-again")
    }
    assert len(texts["a"]) == 12
    assert texts["a"] == texts["a-again"]
    assert texts["a"] != texts["b"]
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["model"] for row in summary["results"]] == ["a", "b", "a-again"]
    assert all(row["tokens"] == 12 * 12 and row["truncated"] == 1 for row in summary["results"])


def test_a_random_model_accepts_no_solution(llamas):
    from astro_hpc.config.schema import InferenceConfig
    from astro_hpc.inference import make_engine

    cfg = InferenceConfig(max_model_len=1024, max_num_seqs=16, cpu_kv_cache_gb=0.1, dtype="float32", cpu_threads=1)
    engine = make_engine(llamas[0], cfg)
    try:
        evaluator = SelfEvaluator(engine, lambda question: question, num_samples=2, quorum=0.5, seed=1)
        (decision,) = asyncio.run(evaluator.decide("What is 1 + 1?", ["1 + 1 = 2. \\boxed{2}"]))
        assert not decision.accepted
        assert engine.stats.requests == 2
    finally:
        engine.close()
