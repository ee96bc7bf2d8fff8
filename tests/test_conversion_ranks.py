"""Imported checkpoints in live models and training checkpoints offline; certificates; every rank of 70B models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import TESTS, all_weights, assert_same_weights, llama_config, run_jobs, write_model
from tiny_models import make_llama, random_examples

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import InferenceConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from astro_hpc.conversion.hf import load_hf, named_hf_tensors
from astro_hpc.conversion.megatron_folder import MegatronTensors
from astro_hpc.conversion.offline import export_hf, import_hf
from astro_hpc.inference import make_engine
from astro_hpc.model import build
from astro_hpc.model.build import RMSNorm, build_model
from astro_hpc.model.llama import LlamaShape
from astro_hpc.model.parallel import initialise_parallel
from astro_hpc.training.packing import pack_examples
from astro_hpc.training.trainer import Trainer

LLAMA_70B = llama_config(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
)
LLAMA_8B = LLAMA_70B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize(("tied", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_a_live_model_loads_an_import(tmp_path: Path, tied: bool, dtype: str) -> None:
    source = make_llama(tmp_path / "hf", tied=tied, llama3_rope=True, dtype=dtype)
    made = import_hf(source, tmp_path / "megatron", piece_bytes=5_000, file_bytes=60_000)
    shape = LlamaShape.from_hf(made)
    initialise_parallel(ParallelConfig(), seed=0)
    models = []
    for folder in (source, made):
        chunks = build_model(shape, ParallelConfig(), PrecisionConfig(dtype="fp32"))
        load_hf(chunks, folder)
        models.append(dict(named_hf_tensors(chunks, shape)))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[1][name], tensor) for name, tensor in models[0].items())
    with pytest.raises(ConfigError, match="a Megatron checkpoint, which only training starts from.*convert export"):
        make_engine(made, InferenceConfig())


def test_a_vocabulary_padded_further_than_the_imports_is_filled_with_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_llama(tmp_path / "hf", tied=False, llama3_rope=False)
    made = import_hf(source, tmp_path / "megatron")
    shape = LlamaShape.from_hf(made)
    monkeypatch.setattr(build, "padded_vocab_size", lambda *_: 640)  # as with 5 tensor-parallel ranks
    initialise_parallel(ParallelConfig(), seed=0)
    chunks = build_model(shape, ParallelConfig(), PrecisionConfig(dtype="fp32"))
    load_hf(chunks, made)
    assert chunks[0].output_layer.weight.shape[0] == 640
    assert chunks[0].output_layer.weight[300:].count_nonzero() == 0
    weights = all_weights(source)
    assert all(torch.equal(weights[name], tensor) for name, tensor in named_hf_tensors(chunks, shape))


def test_a_training_checkpoint_is_exported_without_a_trainer(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", tied=False, llama3_rope=True)
    trainer = Trainer(source, ParallelConfig(), PrecisionConfig(dtype="fp32"), OptimizerConfig(lr=1e-3), 10, seed=0)
    with torch.no_grad():
        for parameter in trainer.chunks[0].parameters():
            parameter.add_(torch.randn_like(parameter))
    online = trainer.export_hf(tmp_path / "online")
    trainer.save_checkpoint(tmp_path / "checkpoints", 7, {})
    offline = export_hf(tmp_path / "checkpoints", tmp_path / "offline", reference=source)
    assert_same_weights(online, offline)
    assert (offline / "config.json").read_bytes() == (online / "config.json").read_bytes()
    # PyTorch's own checksum is in the archive: an altered byte is found here too.
    folder = tmp_path / "checkpoints/step_00000007"
    tensors = MegatronTensors(folder)
    chunk = tensors._chunks("embedding.word_embeddings.weight", None)[0]
    raw = bytearray(chunk.file.read_bytes())
    raw[chunk.start + chunk.length // 2] ^= 1
    chunk.file.write_bytes(bytes(raw))
    ((ended,),) = run_jobs(
        tmp_path,
        ("commands", {"argvs": [["convert", "export", str(folder), str(tmp_path / "x"), "--reference", str(source)]]}),
    )
    assert ended["code"] == 2
    assert f"{chunk.file}: embedding.word_embeddings.weight@0,0 is damaged" in ended["err"].splitlines()[-1]


def test_the_source_of_a_weight_kept_in_fp8_is_set_too(tmp_path: Path) -> None:
    made = import_hf(make_llama(tmp_path / "hf", tied=False, llama3_rope=True), tmp_path / "megatron")
    initialise_parallel(ParallelConfig(), seed=0)
    (model,) = build_model(LlamaShape.from_hf(made), ParallelConfig(), PrecisionConfig(dtype="fp32"))
    weight = model.decoder.layers[1].mlp.linear_fc1.weight
    kept = torch.zeros_like(weight)
    weight.get_high_precision_init_val = lambda: kept
    load_hf([model], made)
    assert kept.count_nonzero()
    assert torch.equal(kept, weight)


def test_checkpoints_load_where_more_modules_keep_extra_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformer Engine's norms do, which the local spec's don't."""
    source = make_llama(tmp_path / "hf", tied=False, llama3_rope=True)
    made = import_hf(source, tmp_path / "megatron")
    settings = (ParallelConfig(), PrecisionConfig(dtype="fp32"), OptimizerConfig(lr=1e-3), 10)
    trainer = Trainer(source, *settings, seed=0)
    batch = pack_examples(random_examples(2, 300), "all")
    trainer.train_step([batch], lambda logprobs, batch: (-logprobs.sum(), {}))  # the optimizer needs a state to save
    trainer.save_checkpoint(tmp_path / "checkpoints", 7, {})
    restored: list[Any] = []
    monkeypatch.setattr(RMSNorm, "get_extra_state", lambda self: torch.empty(0, dtype=torch.uint8), raising=False)
    monkeypatch.setattr(RMSNorm, "set_extra_state", lambda self, state: restored.append(state), raising=False)
    other = Trainer(made, *settings, seed=0)
    assert restored == [None] * 5
    assert other.load_checkpoint(tmp_path / "checkpoints") == (7, {})
    assert restored == [None] * 10
    assert torch.equal(
        other.chunks[0].module.decoder.final_layernorm.weight, trainer.chunks[0].module.decoder.final_layernorm.weight
    )


@pytest.mark.slow
def test_several_ranks_load_an_import(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", tied=True, llama3_rope=True)
    made = import_hf(source, tmp_path / "megatron", piece_bytes=5_000, file_bytes=60_000)
    sizes = [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]
    job = {"folder": str(made), "source": str(source), "sizes": sizes, "port_file": str(tmp_path / "store")}
    assert run_jobs(tmp_path, ("load_on_ranks", job)) == [[True, True]]


@pytest.mark.slow
def test_certificates(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", llama_config(), shard_bytes=20_000)
    made = import_hf(source, tmp_path / "megatron", piece_bytes=3_000)
    back = export_hf(made, tmp_path / "back")
    other = write_model(tmp_path / "other", llama_config(), seed=1)
    another = import_hf(other, tmp_path / "another")
    config_changed = tmp_path / "changed"
    shutil.copytree(made, config_changed)
    config = json.loads((made / "config.json").read_text()) | {"rope_theta": 10000.0}
    (config_changed / "config.json").write_text(json.dumps(config))
    report = tmp_path / "report.json"
    verify = ["convert", "verify", str(source)]
    found, far = run_jobs(
        tmp_path,
        (
            "commands",
            {
                "argvs": [
                    [*verify, str(made), "--exported", str(back)],
                    [*verify, str(another), "--certificate", str(report)],
                    [*verify, str(config_changed)],
                    [*verify, str(tmp_path / "absent")],
                    [*verify, str(made), "--logits", "maybe"],
                ]
            },
        ),
        ("logits", {"hf_dir": str(source), "megatron_dir": str(another)}),
    )
    assert [row["code"] for row in found] == [0, 1, 1, 2, 2], found
    assert found[0]["out"].startswith("verified: all 21 tensors")
    assert len(found[0]["out"].splitlines()) == 1
    certificate = json.loads((made / "certificate.json").read_text())
    assert certificate["passed"]
    names = [row["check"] for row in certificate["checks"]]
    assert names == ["names", "tensors", "export", "reshard tp2 pp1", "reshard tp1 pp2", "config", "logits"]
    assert all(row["passed"] for row in certificate["checks"])
    assert len(certificate["sha256"]) == 21
    failed = {row["check"] for row in json.loads(report.read_text())["checks"] if row["passed"] is False}
    assert failed == {"tensors", "reshard tp2 pp1", "reshard tp1 pp2"}
    assert found[1]["out"].startswith("NOT verified: tensors: model.embed_tokens.weight differs, and ")
    assert "rope_theta is 10000.0, was 500000.0" in found[2]["out"]
    assert found[3]["err"].startswith("astro-hpc: ")
    assert len(found[3]["err"].splitlines()) == 1
    assert not far["within"], "logits of different weights must differ"


def test_every_rank_of_llama_31_has_the_maps_tensors(tmp_path: Path) -> None:
    vocabulary_plus_6 = LLAMA_70B | {"vocab_size": 128262}
    config = str(TESTS.parent / "configs/llama3.1-70b.yaml")
    sizes = [{"tensor_parallel_size": 2, "pipeline_parallel_size": 2}]
    configs: dict[str, Any] = {"configs": [LLAMA_70B, vocabulary_plus_6], "sizes": [], "run_config": config}
    large, small, keys = run_jobs(
        tmp_path,
        ("proofs", configs),
        ("proofs", {"configs": [LLAMA_8B], "sizes": sizes, "run_config": None}),
        ("spec_keys", {"config": LLAMA_70B}),
    )
    assert [row["ranks"] for row in large] == [32, 32]
    assert [row["parameters"] for row in large] == [70_553_706_496, 70_553_706_496 + 6 * 2 * 8192]
    assert large[0]["padded_parameters"] == 70_553_706_496
    assert large[1]["padded_parameters"] == large[1]["parameters"] + (128384 - 128262) * 2 * 8192
    assert small[0]["parameters"] == 8_030_261_248
    # Either layer spec loads the other's checkpoints: keys are the same, and what else is asked for is written.
    assert keys["local"] == keys["transformer_engine"] == keys["written"]
    assert set(keys["objects_asked_for"]) < set(keys["objects_written"])
    assert set(keys["objects_written"]) - set(keys["objects_asked_for"]) == {
        "decoder.final_layernorm._extra_state/shard_0_1"
    }


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """The benchmark on a 119 MB model of an eighth of 70B's widths: what converting adds is under the scaled bound."""
    done = subprocess.run(
        [sys.executable, "tools/bench_convert.py", "--small", "--json", "--folder", str(tmp_path)],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["round_trip_equal"]
    assert found["bytes"] > 100e6
    for way in ("import", "export"):
        assert 0 < found[way]["memory_added"] < found["memory_bound"] < 100e6
    assert list(tmp_path.iterdir()) == []
