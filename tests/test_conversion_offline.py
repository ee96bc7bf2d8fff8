"""Hugging Face folders to Megatron checkpoints and back, by files alone: exact, resumable, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import TESTS, all_weights, assert_same_weights, llama_config, run_jobs, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from astro_hpc.config.base import ConfigError
from astro_hpc.conversion.megatron_folder import MegatronTensors
from astro_hpc.conversion.names import hf_shapes, mappings, megatron_size, row_blocks, to_megatron
from astro_hpc.conversion.offline import export_hf, import_hf
from astro_hpc.conversion.workfolder import exclusive
from astro_hpc.model.llama import LlamaShape

Usage = namedtuple("Usage", "total used free")


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small models of all sorts."""
    kv_heads = draw(st.integers(1, 3))
    return llama_config(
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 12)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 300)),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(configs())
def test_rows_read_by_blocks_are_the_rows_of_the_whole(config: dict[str, Any]) -> None:
    shape = LlamaShape.from_config(config)
    originals = {name: torch.randn(size) for name, size in hf_shapes(shape).items()}
    for mapping in mappings(shape):
        whole = to_megatron(mapping.layout, [originals[name] for name in mapping.hf], shape, 384)
        assert tuple(whole.shape) == megatron_size(mapping, shape, 384)
        made, next_row = torch.zeros_like(whole), 0
        for block in row_blocks(mapping, shape):
            assert block.megatron_row == next_row
            next_row += block.rows
            source = originals[mapping.hf[block.part]]
            made[block.megatron_row : next_row] = source[block.hf_row : block.hf_row + block.rows]
        assert torch.equal(made, whole)


@settings(max_examples=12, deadline=None)
@given(
    configs(),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(1, 3),
    st.sampled_from([200, 2000, 10**6]),
    st.sampled_from([3000, 10**6]),
    st.sampled_from([3000, 10**6]),
)
def test_round_trip_is_bit_exact(
    config: dict[str, Any], dtype: torch.dtype, workers: int, piece_bytes: int, file_bytes: int, shard_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_model(folder / "hf", config, dtype, shard_bytes)
        made = import_hf(source, folder / "megatron", workers=workers, piece_bytes=piece_bytes, file_bytes=file_bytes)
        back = export_hf(made, folder / "back", workers=workers, shard_bytes=shard_bytes)
        assert_same_weights(source, back)
        for file in ("config.json", "generation_config.json"):
            assert json.loads((back / file).read_text()) == json.loads((source / file).read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "hf", llama_config(), shard_bytes=20_000)


@pytest.fixture(scope="module")
def megatron(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_hf(source, tmp_path_factory.mktemp("made") / "megatron", file_bytes=30_000, piece_bytes=3_000)


def test_rounding_to_bfloat16_and_widening(source: Path, tmp_path: Path) -> None:
    rounded = import_hf(source, tmp_path / "rounded", dtype="bfloat16")
    wide = export_hf(rounded, tmp_path / "wide", dtype="float32")
    before, after = all_weights(source), all_weights(wide)
    assert all(torch.equal(after[name], tensor.bfloat16().float()) for name, tensor in before.items())
    narrow = export_hf(rounded, tmp_path / "narrow")
    assert {tensor.dtype for tensor in all_weights(narrow).values()} == {torch.bfloat16}
    assert json.loads((narrow / "config.json").read_text())["dtype"] == "bfloat16"


def test_padding_of_the_vocabulary_is_zero_and_goes_again(source: Path, megatron: Path, tmp_path: Path) -> None:
    tensors = MegatronTensors(megatron)
    embedding = mappings(LlamaShape.from_hf(source))[0]
    assert tensors.rows(embedding) == 384
    assert tensors.whole(embedding)[300:].count_nonzero() == 0
    assert all_weights(export_hf(megatron, tmp_path / "back"))["lm_head.weight"].shape[0] == 300


def test_export_loads_in_transformers_with_the_same_logits(source: Path, megatron: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    back = export_hf(megatron, tmp_path / "back", shard_bytes=30_000)
    ids = torch.arange(20)[None]
    models = [LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, back)]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_a_second_conversion_finds_the_first(source: Path, megatron: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in megatron.iterdir()}
    assert import_hf(source, megatron, file_bytes=30_000, piece_bytes=3_000) == megatron
    assert {path.name: path.stat().st_mtime_ns for path in megatron.iterdir()} == before
    with pytest.raises(ConfigError, match="exists and is something else"):
        import_hf(source, megatron, dtype="bfloat16")


def test_overwrite_replaces(source: Path, tmp_path: Path) -> None:
    made = import_hf(source, tmp_path / "megatron")
    import_hf(source, made, dtype="bfloat16", overwrite=True)
    assert MegatronTensors(made).dtype(LlamaShape.from_hf(source)) == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


@pytest.mark.parametrize("way", ["import", "export"])
def test_kill_9_in_the_middle_then_the_same_command_goes_on(way: str, tmp_path: Path) -> None:
    # 12 layers in about 8 files of 1.1 MB each way (the smallest that --shard-gb takes is 1 MB).
    config = llama_config(hidden_size=256, intermediate_size=384, num_hidden_layers=6, vocab_size=1000)
    source = write_model(tmp_path / "hf", config)
    if way == "import":
        argv, suffix = ["import", str(source), str(tmp_path / "out")], ".distcp"
    else:
        made = import_hf(source, tmp_path / "megatron")
        argv, suffix = ["export", str(made), str(tmp_path / "out"), "--shard-gb", "0.001"], ".safetensors"
    argv = ["convert", *argv, "--workers", "1"]
    if way == "import":
        argv += ["--file-gb", "0.001"]
    (code,) = run_jobs(tmp_path, ("killed", {"argv": argv, "after_pieces": 25}), check=False)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    finished = {json.loads(path.read_text())["file"] for path in partial.glob(".done-*.json")}
    written = {path.name for path in partial.glob(f"*{suffix}")}
    assert finished
    assert len(written - finished) == 1, "one file was being written"
    before = {name: (partial / name).stat().st_mtime_ns for name in finished}

    ((ended,),) = run_jobs(tmp_path, ("commands", {"argvs": [argv]}))
    assert ended["code"] == 0, ended["err"]
    out = tmp_path / "out"
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == before
    back = export_hf(out, tmp_path / "back") if way == "import" else out
    assert_same_weights(source, back)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")]
    assert not [path.name for path in out.iterdir() if path.name.startswith((".done", ".plan"))]


def test_what_another_plan_left_is_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / ".plan.json").write_text('{"format": 0}')
    (partial / "stale").write_text("x")
    made = import_hf(source, tmp_path / "out")
    assert not (made / "stale").exists()
    assert_same_weights(source, export_hf(made, tmp_path / "back"))


def test_the_tool_is_the_command_and_its_help_has_examples() -> None:
    tool = [sys.executable, str(TESTS.parent / "tools/convert_checkpoint.py"), "--help"]
    shown = subprocess.run(tool, capture_output=True, text=True, check=True, timeout=120).stdout
    for words in ("Examples:", "convert import Llama-3.1-8B-Instruct", "convert verify", "convert export runs/mine"):
        assert words in shown


def test_two_conversions_to_one_folder(source: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path / "out"), pytest.raises(ConfigError, match="in use by process"):
        import_hf(source, tmp_path / "out")


def test_a_full_disk_is_said_before_anything_is_written(
    source: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    for convert, folder in ((import_hf, source), (export_hf, megatron)):
        with pytest.raises(ConfigError, match=r"GB are needed, 0\.00 GB are free"):
            convert(folder, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures is"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}}, "low_freq_factor is 2.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"vocab_size": 301}, r"has shape \(300, 32\), config.json implies \(301, 32\)"),
        ({"num_hidden_layers": 3}, "lacks tensor model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "unknown tensor model.layers.1.input_layernorm.weight"),
    ],
)
def test_models_that_are_not_known_are_refused(
    source: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message) as error:
        import_hf(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_dtypes_that_are_not_trained_in_need_a_choice(tmp_path: Path) -> None:
    half = write_model(tmp_path / "half", llama_config(), torch.float16)
    with pytest.raises(ConfigError, match="has float16 tensors; choose --dtype"):
        import_hf(half, tmp_path / "out")
    wide = import_hf(half, tmp_path / "out", dtype="float32")
    after = all_weights(export_hf(wide, tmp_path / "back"))
    assert all(torch.equal(after[name], tensor.float()) for name, tensor in all_weights(half).items())
    mixed = write_model(tmp_path / "mixed", llama_config())
    weights = all_weights(mixed)
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()
    save_file(weights, mixed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="tensors of several dtypes"):
        import_hf(mixed, tmp_path / "never")
    with pytest.raises(ConfigError, match="--dtype int8: possible are auto, bfloat16, float32"):
        import_hf(mixed, tmp_path / "never", dtype="int8")


def test_damaged_weights_files_are_named(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(ConfigError, match=rf"{shard.name}: damaged safetensors file"):
        import_hf(folder, tmp_path / "out")
    shard.write_bytes(whole)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file, message in (("../../etc/passwd", "names ../../etc/passwd"), (shard.name, f"{shard.name}: lacks")):
        changed = {"weight_map": index["weight_map"] | {"model.embed_tokens.weight": file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=message):
            import_hf(folder, tmp_path / "out")


def test_an_altered_byte_is_named_on_both_sides(source: Path, megatron: Path, tmp_path: Path) -> None:
    folder = tmp_path / "megatron"
    shutil.copytree(megatron, folder)
    back = export_hf(folder, tmp_path / "back", shard_bytes=20_000)
    shard = sorted(back.glob("*.safetensors"))[1]
    _flip(shard, -5)
    with pytest.raises(ConfigError, match=rf"{shard.name}: damaged \(its sha256"):
        import_hf(back, tmp_path / "again")
    file = folder / "__1_0.distcp"
    info = next(iter(MegatronTensors(folder)._where.values()))
    _flip(file, info.length // 2)
    with pytest.raises(ConfigError, match=r"__1_0\.distcp: .* is damaged"):
        export_hf(folder, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"__1_0\.distcp has \d+ bytes and had"):
        export_hf(folder, tmp_path / "never")


def _flip(file: Path, position: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(bytes(raw))


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/astro-hpc-must-not-exist"),))


def test_a_crafted_checkpoint_is_refused_and_not_run(megatron: Path, tmp_path: Path) -> None:
    import pickle

    folder = tmp_path / "megatron"
    shutil.copytree(megatron, folder)
    (folder / "complete.json").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(_Malicious()))
    with pytest.raises(ConfigError, match="has no place in a checkpoint"):
        export_hf(folder, tmp_path / "out")
    assert not Path("/tmp/astro-hpc-must-not-exist").exists()
    (folder / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(ConfigError, match="not a checkpoint of ours"):
        export_hf(folder, tmp_path / "out")


def test_a_checkpoint_of_another_model_is_refused(megatron: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", llama_config(intermediate_size=64))
    with pytest.raises(ConfigError, match=r"decoder\.layers\.mlp\.linear_fc1\.weight has shape"):
        export_hf(megatron, tmp_path / "out", reference=other)
    tied = write_model(tmp_path / "tied", llama_config(tie_word_embeddings=True))
    with pytest.raises(ConfigError, match=r"unknown tensor output_layer\.weight"):
        export_hf(megatron, tmp_path / "out", reference=tied)
    with pytest.raises(ConfigError, match=r"no such folder"):
        export_hf(tmp_path / "absent", tmp_path / "out")
