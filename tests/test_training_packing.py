"""Packing: every example once, no pack over its length, no cross-talk, targets and masks where they belong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astro_hpc.training.packing import Example, epoch_packs, masked_copy, pack_examples, pack_lengths

ids = st.lists(st.integers(0, 1000), min_size=1, max_size=12).map(tuple)
examples = st.builds(Example, prompt=ids, completion=ids)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 90), st.one_of(st.none(), st.integers(0, 9)))
def test_packs_hold_every_item_once_and_fit(lengths: list[int], capacity: int, seed: int | None) -> None:
    packs = pack_lengths(lengths, capacity, seed)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    fills = [sum(lengths[index] for index in pack) for pack in packs]
    assert all(0 < fill <= capacity for fill in fills)
    # First fit leaves at most one pack half empty (fewer packs than the open bins it looks at).
    assert sum(fill * 2 <= capacity for fill in fills) <= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(0, 5))
def test_epochs_are_deterministic_and_differ(lengths: list[int], seed: int) -> None:
    assert epoch_packs(lengths, 20, seed, 0) == epoch_packs(lengths, 20, seed, 0)
    both = [epoch_packs(lengths, 20, seed, epoch) for epoch in (0, 1)]
    assert all(sorted(index for pack in packs for index in pack) == list(range(len(lengths))) for packs in both)


def test_different_epochs_have_different_orders() -> None:
    lengths = list(range(1, 30))
    assert epoch_packs(lengths, 40, 0, 0) != epoch_packs(lengths, 40, 0, 1)
    assert epoch_packs(lengths, 40, 0, 0) != epoch_packs(lengths, 40, 1, 0)


def test_an_item_that_cannot_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="length 11"):
        pack_lengths([3, 11], 10, None)


@settings(deadline=None)
@given(st.lists(examples, min_size=1, max_size=6), st.sampled_from(["all", "completion"]))
def test_layout_of_a_pack(rows: list[Example], loss_on: str) -> None:
    rows = [row for row in rows if row.num_inputs > 0]
    if not rows:
        return
    batch = pack_examples(rows, loss_on)  # type: ignore[arg-type]
    bounds = batch.cu_seqlens.tolist()
    assert bounds[-1] == batch.num_tokens == sum(row.num_inputs for row in rows)
    assert batch.max_seqlen == max(row.num_inputs for row in rows)
    for row, start, end in zip(rows, bounds[:-1], bounds[1:], strict=True):
        whole = row.prompt + row.completion
        assert tuple(batch.tokens[start:end].tolist()) == whole[:-1]
        assert tuple(batch.targets[start:end].tolist()) == whole[1:]
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        weights = batch.loss_mask[start:end].tolist()
        trained = [target for target, weight in zip(whole[1:], weights, strict=True) if weight]
        assert tuple(trained) == (whole[1:] if loss_on == "all" else row.completion)


def test_extras_sit_on_completion_tokens() -> None:
    rows = [Example((1, 2, 3), (4, 5)), Example((6,), (7, 8, 9))]
    batch = pack_examples(rows, "completion", extras={"advantage": [[0.5, 0.25], [1.0, 2.0, 3.0]]})
    assert batch.extras["advantage"].tolist() == [0, 0, 0.5, 0.25, 1, 2, 3]
    assert batch.loss_mask.tolist() == [0, 0, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="extras"):
        pack_examples(rows, "completion", extras={"advantage": [[0.5], [1.0, 2.0, 3.0]]})


def test_a_masked_copy_carries_no_loss() -> None:
    batch = pack_examples([Example((1, 2), (3,))], "all")
    copy = masked_copy(batch)
    assert copy.loss_mask.sum() == 0
    assert copy.tokens.tolist() == batch.tokens.tolist()
