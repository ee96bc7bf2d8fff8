"""Speed and peak memory of `convert import` and `convert export` against `cp` of the same files.

    python tools/bench_convert.py [--layers 2] [--workers 4] [--folder FOLDER] [--small] [--json]

Makes a random bfloat16 checkpoint of Llama-3.1-70B's widths (hidden 8192, MLP 28672, vocabulary 128256) with few
layers in a temporary folder, which is removed afterwards; 2 layers are 7.6 GB, and four times that must be free. A run
is `sync`, then the clock until the last byte is on disk: for cp, cp and fsync of every file it wrote; for a conversion,
its own fsyncs, without the start of the interpreter (given apart). Memory is the process's high-water mark.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from astro_hpc.conversion.hf_folder import SHARD_BYTES, SafetensorsFile, finish_hf_folder, plan_shards, shard_name
from astro_hpc.conversion.megatron_folder import PIECE_BYTES
from astro_hpc.conversion.names import hf_shapes
from astro_hpc.conversion.offline import FILE_BYTES, WORKERS, export_hf, import_hf
from astro_hpc.model.llama import LlamaShape

_GIB = 1 << 30
_LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
# An eighth of the widths: 119 MB with 2 layers. Pieces and files are scaled down as much as the checkpoint is.
_SMALL = _LLAMA_70B | {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 16032,
}
_SMALLER = 64


def _equal_tensors(first: Path, second: Path) -> bool:
    """Whether two folders hold the same bytes by tensor, however they are cut into files."""
    files = [{n: f for f in folder.glob("*.safetensors") for n in _names(f)} for folder in (first, second)]
    if files[0].keys() != files[1].keys():
        return False
    for name in files[0]:
        a, b = (safe_open(each[name], "pt").get_tensor(name).view(torch.uint8) for each in files)
        if not torch.equal(a, b):
            return False
    return True


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; by default the system's")
    parser.add_argument("--source", type=Path, help="a bfloat16 Hugging Face folder to convert instead of making one")
    parser.add_argument("--make", type=Path, help="only make the checkpoint, here, for a later --source")
    parser.add_argument("--small", action="store_true", help="an eighth of the widths: 100 MB, seconds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _convert_and_report(json.loads(args.child))
        return
    if args.make:
        make_checkpoint(args.make, _config(args.layers, args.small), SHARD_BYTES)
        return
    result = measure(args.layers, args.workers, args.folder, args.small, args.source)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    if not result["memory_within"]:
        sys.exit(1)


def _config(layers: int, small: bool) -> dict[str, Any]:
    return (_SMALL if small else _LLAMA_70B) | {"num_hidden_layers": layers}


def measure(layers: int, workers: int, folder: Path | None, small: bool, source: Path | None) -> dict[str, Any]:
    """Make the checkpoint, convert it to Megatron and back, copy the same files with cp; returns the figures."""
    scale = _SMALLER if small else 1
    shape = LlamaShape.from_hf(source) if source else LlamaShape.from_config(_config(layers, small))
    largest = 2 * max(torch.Size(size).numel() for size in [*hf_shapes(shape).values()])
    largest = max(largest, 4 * shape.ffn_hidden_size * shape.hidden_size)  # gate and up are one tensor in Megatron
    total = 2 * shape.num_parameters
    with tempfile.TemporaryDirectory(prefix="bench_convert.", dir=folder) as name:
        root = Path(name)
        free = shutil.disk_usage(root).free
        if free < 4 * total + _GIB:
            sys.exit(f"{root}: {4 * total / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free; give --folder")
        if source:
            (root / "hf").symlink_to(source.resolve())
        else:
            make_checkpoint(root / "hf", _config(layers, small), SHARD_BYTES // scale)
        bound = 2 * largest + 10**9 // scale
        result: dict[str, Any] = {"bytes": total, "layers": shape.num_layers, "workers": workers, "memory_bound": bound}
        sizes = {"piece_bytes": PIECE_BYTES // scale, "file_bytes": FILE_BYTES // scale, "workers": workers}
        result["import"] = _against_cp(root, "hf", {"do": "import", "from": "hf", "to": "megatron", **sizes})
        sizes = {"shard_bytes": SHARD_BYTES // scale, "workers": workers}
        result["export"] = _against_cp(root, "megatron", {"do": "export", "from": "megatron", "to": "back", **sizes})
        result["round_trip_equal"] = _equal_tensors(root / "hf", root / "back")
    # A process that has only imported torch and Megatron has used a fixed amount, which doesn't scale down.
    kind = "memory_added" if small else "memory_peak"
    result["memory_within"] = all(result[way][kind] < bound for way in ("import", "export"))
    return result


def make_checkpoint(folder: Path, config: dict[str, Any], shard_bytes: int) -> None:
    """A Hugging Face folder of random finite bfloat16 numbers."""
    shape = LlamaShape.from_config(config)
    draw = torch.Generator().manual_seed(1)
    folder.mkdir()
    shards = plan_shards(shape, 2, shard_bytes)
    digests = {}
    for number, sizes in enumerate(shards):
        path = folder / shard_name(number, len(shards))
        with open(path, "wb") as handle:
            file = SafetensorsFile(handle, sizes, torch.bfloat16)
            for size in sizes.values():
                left = torch.Size(size).numel()
                while left:
                    bits = torch.empty(min(left, 1 << 24), dtype=torch.int16)
                    bits.random_(-(1 << 15), 1 << 15, generator=draw)
                    bits &= ~(1 << 14)  # keeps the exponent below infinity's
                    file.write(bits.view(torch.bfloat16))
                    left -= bits.numel()
        digests[path.name] = file.hexdigest()
    with tempfile.TemporaryDirectory() as reference:
        (Path(reference) / "config.json").write_text(json.dumps(config))
        finish_hf_folder(folder, shards, digests, Path(reference), torch.bfloat16)
    (folder / "manifest.json").unlink()  # as on a hub: there is none, so an import has nothing to compare with


def _against_cp(root: Path, source: str, job: dict[str, Any]) -> dict[str, Any]:
    files = [path for path in (root / source).iterdir() if path.suffix in (".safetensors", ".distcp")]
    total = sum(path.stat().st_size for path in files)
    subprocess.run(["cat", *map(str, files)], check=True, stdout=subprocess.DEVNULL)  # all read from a warm cache
    before = _time_cp(root, files)
    job = job | {"from": str(root / job["from"]), "to": str(root / job["to"])}
    os.sync()
    started = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    process = time.perf_counter() - started
    after = _time_cp(root, files)
    cp = (before + after) / 2
    return {
        "seconds": found["seconds"],
        "process_seconds": process,
        "cp_seconds": [before, after],
        "mb_per_second": total / 1e6 / found["seconds"],
        "cp_mb_per_second": total / 1e6 / cp,
        "share_of_cp": cp / found["seconds"],
        "memory_peak": found["peak"],
        "memory_added": found["peak"] - found["base"],
    }


def _time_cp(root: Path, files: list[Path]) -> float:
    target = root / "copy"
    target.mkdir()
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    for path in target.iterdir():
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def _convert_and_report(job: dict[str, Any]) -> None:
    """In a process of its own: one conversion; prints seconds, and bytes of memory before it and at most."""
    source, target = Path(job.pop("from")), Path(job.pop("to"))
    convert: Any = {"import": import_hf, "export": export_hf}[job.pop("do")]
    base = _high_water_mark()
    started = time.perf_counter()
    convert(source, target, **job)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "base": base, "peak": _high_water_mark()}))


def _high_water_mark() -> int:
    """This process's peak resident memory. getrusage's would count the parent's from before exec."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['bytes'] / 1e9:.2f} GB, {result['layers']} layers, {result['workers']} workers; "
        f"round trip {'equal' if result['round_trip_equal'] else 'DIFFERS'}"
    )
    for way in ("import", "export"):
        row = result[way]
        print(
            f"{way}: {row['mb_per_second']:.0f} MB/s ({row['seconds']:.1f} s; process {row['process_seconds']:.1f} s), "
            f"cp {row['cp_mb_per_second']:.0f} MB/s ({', '.join(f'{s:.1f}' for s in row['cp_seconds'])} s): "
            f"{row['share_of_cp']:.2f} of cp; peak memory {row['memory_peak'] / 1e9:.2f} GB, "
            f"{row['memory_added'] / 1e9:.3f} of it by converting (bound {result['memory_bound'] / 1e9:.2f})"
        )


if __name__ == "__main__":
    main()
