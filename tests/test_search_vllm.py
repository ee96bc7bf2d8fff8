"""A small search with the real model on vLLM."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from astro_hpc.config.schema import InferenceConfig, RunConfig
from astro_hpc.inference.engine import SampleRequest
from astro_hpc.inference.vllm_engine import VLLMEngine
from astro_hpc.run.stage import StageContext
from astro_hpc.search.shards import read_trees
from astro_hpc.search.stage import run


def test_a_search_on_vllm_keeps_the_tokens_it_sampled(smollm2: Path, tmp_path: Path):
    rows = [{"problem": f"What is {a} + {b} - {c}?", "answer": str(a + b - c)} for a, b, c in [(2, 3, 1), (5, 4, 2)]]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = RunConfig.model_validate(
        {
            "name": "test",
            "runs_dir": tmp_path,
            "model": {"prompt_style": "fewshot-raw"},
            "problems": {"train": [{"type": "jsonl", "path": tmp_path / "problems.jsonl"}]},
            "inference": {"max_model_len": 512, "max_num_seqs": 32, "cpu_kv_cache_gb": 0.25, "cpu_threads": 1},
            "search": {
                "num_iterations": 2,
                "num_expansions": 2,
                "num_rollouts": 1,
                "keep_rollouts": True,
                "max_step_tokens": 24,
                "max_rollout_tokens": 40,
            },
        }
    )
    context = StageContext(cfg, tmp_path / "search", "search")
    context.dir.mkdir()
    run(context, model_dir=smollm2)

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    trees = list(read_trees(context.dir / "trees.jsonl"))
    assert len(trees) == 2
    for tree in trees:
        assert tree.root.visits == 2
        assert len(tree.nodes) > 3
        for node in tree.nodes[1:]:
            assert tokenizer.decode(node.token_ids) == node.step
            assert "\n" not in tokenizer.decode(node.token_ids[:-1])
            assert node.terminal or node.step.endswith("\n")
            assert node.logprob < 0
            assert tokenizer.eos_token_id not in node.token_ids
    assert any(node.answer is not None for tree in trees for node in tree.nodes)
    assert context.counts["cache_hit_rate"] > 0.5
    assert context.counts["tokens"] > 0


def test_many_long_seeded_prompts_at_once(tiny_llama: Path):
    """More prompt tokens than one step of the engine takes: each prompt is still computed in one piece."""
    cfg = InferenceConfig(max_model_len=512, max_num_seqs=32, cpu_kv_cache_gb=0.25, cpu_threads=1, dtype="float32")
    prompts = [tuple(range(100 + i, 400 + i)) for i in range(24)]
    requests = [SampleRequest(prompt, 4, seed=i) for i, prompt in enumerate(prompts)]
    engine = VLLMEngine(tiny_llama, cfg)
    try:
        together = engine.generate_many(requests)
        alone = [engine.generate_many([request])[0] for request in requests[:8]]
    finally:
        engine.close()
    assert [sample.token_ids for sample in together[:8]] == [sample.token_ids for sample in alone]
