"""Training split over ranks equals training in one process; checkpoints move between parallel sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_helpers import all_weights
from hypothesis import given
from hypothesis import strategies as st
from parallel_ranks import CASES, SAVED_STEP, STEPS, VOCAB_SIZE, Case, num_targets, packs
from safetensors.torch import load_file
from tiny_models import hf_logprobs, hf_model, make_llama, random_examples

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
from astro_hpc.conversion.offline import export_hf
from astro_hpc.model.parallel import context_rows
from astro_hpc.training.packing import Example, pack_examples, pad_batch
from astro_hpc.training.trainer import Trainer

FRESH = [case for case in CASES if not case.loads]
LOADED = [case for case in CASES if case.loads]
SAVED = [case for case in CASES if case.saves]
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, carried out for real over gloo."""
    folder = tmp_path_factory.mktemp("parallel")
    make_llama(folder / "untied", tied=False, llama3_rope=True, num_layers=6)
    make_llama(folder / "tied", tied=True, llama3_rope=False, num_layers=6)
    script = Path(__file__).with_name("parallel_ranks.py")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(folder)], env=environment, check=True, timeout=500)
    return folder


def steps(folder: Path, case: Case) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((folder / f"{case.name}.json").read_text())
    return found


def tensors(folder: Path, case: Case, kind: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(f"{kind}."): tensor
        for name, tensor in load_file(folder / f"{case.name}.safetensors").items()
        if name.startswith(kind)
    }


def reference(case: Case) -> Case:
    """The same training in one process."""
    suffix = "-bf16" if case.dtype == "bf16" else "" if case.model == "untied" else "-tied"
    return BY_NAME[f"one{suffix}"]


def ids(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("case", FRESH, ids=ids(FRESH))
def test_every_split_trains_as_one_process_does(trained: Path, case: Case) -> None:
    same = reference(case)
    tolerance = 1e-5 if case.dtype == "fp32" else 2e-3
    found, expected = steps(trained, case), steps(trained, same)
    assert len(found) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance)
        assert ours["targets"] == theirs["targets"] == num_targets()
        assert ours["lr"] == theirs["lr"]
    for kind in ("logprobs", "gradient", "weight"):
        ours_by_name, theirs_by_name = tensors(trained, case, kind), tensors(trained, same, kind)
        assert ours_by_name or (kind == "gradient" and case.parallel.use_distributed_optimizer)
        for name, tensor in ours_by_name.items():
            assert relative(tensor, theirs_by_name[name]) < 10 * tolerance, (kind, name)


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_logprobs_loss_and_gradients_are_hugging_faces(trained: Path, model: str) -> None:
    """Of one process; the test above carries it over to every split."""
    case = BY_NAME["one" if model == "untied" else "one-tied"]
    network = hf_model(trained / model)
    losses = []
    for number, batch in enumerate(packs()):
        logprobs = torch.cat([hf_logprobs(network, example) for example in random_examples(3, VOCAB_SIZE, number)])
        losses.append(-(logprobs * batch.loss_mask).sum() / num_targets())
        if number == 0:
            assert torch.allclose(tensors(trained, case, "logprobs")["logprobs"], logprobs * batch.loss_mask, atol=2e-5)
    loss = torch.stack(losses).sum()
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0))
    first = steps(trained, case)[0]
    assert first["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)
    gradients = tensors(trained, case, "gradient")
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert relative(gradients[name], parameter.grad) < 1e-4, name


def test_recomputing_changes_no_bit(trained: Path) -> None:
    for name in ("recompute-full", "recompute-selective", "recompute-full-bf16"):
        assert steps(trained, BY_NAME[name]) == steps(trained, reference(BY_NAME[name])), name


@pytest.mark.parametrize("case", LOADED, ids=ids(LOADED))
def test_a_checkpoint_loads_into_other_sizes_and_training_goes_on(trained: Path, case: Case) -> None:
    saver = BY_NAME[case.loads]
    found, expected = steps(trained, case), steps(trained, saver)[SAVED_STEP:]
    ours, theirs = tensors(trained, case, "weight"), tensors(trained, saver, "weight")
    if (case.sizes, case.world_size) == (saver.sizes, saver.world_size):  # a resumed run
        assert found == expected
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        return
    for key in ("loss", "grad_norm"):
        assert found[0][key] == pytest.approx(expected[0][key], rel=1e-4)
    assert found[0]["lr"] == expected[0]["lr"]
    for name, tensor in theirs.items():
        assert relative(ours[name], tensor) < 1e-4, name


@pytest.mark.parametrize("case", SAVED, ids=ids(SAVED))
def test_a_checkpoint_of_several_ranks_is_exported_without_them(trained: Path, tmp_path: Path, case: Case) -> None:
    exported = export_hf(trained / "checkpoints" / case.name, tmp_path / "hf", reference=trained / case.model)
    found, expected = all_weights(exported), tensors(trained, case, "saved")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_other_optimizers_checkpoint_is_refused_by_name(trained: Path) -> None:
    trainer = Trainer(
        trained / "untied",
        ParallelConfig(use_distributed_optimizer=True),
        PrecisionConfig(dtype="fp32"),
        OptimizerConfig(lr=1e-2),
        STEPS,
        seed=0,
    )
    with pytest.raises(ConfigError, match="saved with parallel.use_distributed_optimizer=false"):
        trainer.load_checkpoint(trained / "checkpoints" / "one")


# --- splitting a pack over context-parallel ranks ----------------------------------------------------------------

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(lengths, st.integers(1, 4), st.sampled_from([1, 2, 3]))
def test_context_parallel_ranks_share_a_pack_without_loss(sizes: list[int], cp: int, tp: int) -> None:
    batch = pack_examples([Example(tuple(range(3, 3 + size)), (9,)) for size in sizes], "all", None)
    padded = pad_batch(batch, 2 * cp * tp, 2 * cp * tp)
    assert padded.cu_seqlens.tolist() == batch.cu_seqlens.tolist()
    lengths = padded.bounds[1:] - padded.bounds[:-1]
    assert all(length % (2 * cp * tp) == 0 for length in lengths.tolist())
    assert all(length - size < 2 * cp * tp for length, size in zip(lengths.tolist(), sizes, strict=True))
    assert padded.max_seqlen == int(lengths.max())
    shares = [context_rows(padded.bounds, rank, cp) for rank in range(cp)]
    assert len({len(share) for share in shares}) == 1
    assert torch.cat(shares).sort().values.tolist() == list(range(padded.num_tokens))
    parts = [padded.take(share) for share in shares]
    # Work under a causal mask grows with the position: the shares' positions within the sequences add up alike.
    begins = torch.repeat_interleave(padded.bounds[:-1].long(), lengths.long())
    assert len({int((share - begins[share]).sum()) for share in shares}) == 1
    seen = sorted(
        (int(token), int(target), int(position))
        for part in parts
        for token, target, position, mask in zip(
            part.tokens, part.targets, part.position_ids, part.loss_mask, strict=True
        )
        if mask
    )
    real = zip(batch.tokens.tolist(), batch.targets.tolist(), batch.position_ids.tolist(), strict=True)
    assert seen == sorted(real)


@given(lengths, st.integers(1, 8))
def test_a_pack_is_filled_up_by_an_example_without_loss(sizes: list[int], multiple: int) -> None:
    batch = pack_examples([Example(tuple(range(3, 3 + size)), (9,)) for size in sizes], "all", None)
    padded = pad_batch(batch, 1, multiple)
    assert padded.num_tokens % multiple == 0
    assert padded.num_tokens - batch.num_tokens < multiple
    assert padded.cu_seqlens[-1] == padded.num_tokens
    assert padded.cu_seqlens[: len(sizes) + 1].tolist() == batch.cu_seqlens.tolist()
    assert padded.tokens[: batch.num_tokens].tolist() == batch.tokens.tolist()
    assert float(padded.loss_mask.sum()) == float(batch.loss_mask.sum())
