"""The select stage on a scripted engine: prompts within the window, and the account of the candidates' rows."""

import json
from pathlib import Path

from astro_hpc.config.schema import RunConfig
from astro_hpc.pipeline import select
from astro_hpc.run.files import Journal, read_jsonl
from astro_hpc.run.stage import run_stage


def test_prompts_within_the_window_and_what_became_of_the_rows(tmp_path: Path) -> None:
    rows = [{"problem": f"What is {i}?", "answer": str(i % 10)} for i in range(20)] + [{"problem": "Why?"}]
    data = tmp_path / "digits.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test" / "sft" / "astro" / "hf").mkdir(parents=True)
    cfg = RunConfig.model_validate(
        {
            "name": "test",
            "runs_dir": tmp_path,
            "inference": {"engine": "scripted", "max_model_len": 1024},
            "problems": {"train": [{"type": "signs", "count": 1}]},
            "select": {
                "problems": [{"type": "jsonl", "path": data}],
                "num_samples": 8,
                "min_pass_rate": 0.1,
                "max_pass_rate": 0.9,
                "max_tokens": 256,
            },
        }
    )
    run_stage(cfg, select(cfg, "astro"))
    folder = tmp_path / "test" / "select" / "astro"
    rates = {row["id"]: row["right"] / row["samples"] for row in Journal.read(folder / "rates.jsonl")}
    kept = list(read_jsonl(folder / "prompts.jsonl"))
    assert len(rates) == 20
    assert 0 < len(kept) < 20
    assert {row["id"] for row in kept} == {problem for problem, rate in rates.items() if 0.1 <= rate <= 0.9}
    report = json.loads((folder / "problems.json").read_text())
    assert report["sources"][0]["used"] == 20
    assert report["sources"][0]["unusable"]["count"] == 1
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {Path(name).name for name in manifest["outputs"]} == {"prompts.jsonl", "problems.json"}
