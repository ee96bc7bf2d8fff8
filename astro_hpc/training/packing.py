"""Packing examples of different lengths into sequences of a fixed length, without padding and without cross-talk."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from astro_hpc.run.seeds import derive_seed

_OPEN_BINS = 256


@dataclass(frozen=True)
class Example:
    """One training example as token ids; the completion ends with the end-of-sequence token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def num_inputs(self) -> int:
        """Tokens that are fed to the model: all but the last, which is only a target."""
        return len(self.prompt) + len(self.completion) - 1

    def num_targets(self, loss_on: Literal["all", "completion"]) -> int:
        """Tokens that carry loss."""
        return self.num_inputs - (max(len(self.prompt) - 1, 0) if loss_on == "completion" else 0)


@dataclass
class PackedBatch:
    """One packed sequence: T input tokens of one or more examples, one after the other.

    `targets[i]` is the token that follows `tokens[i]` in its example. Examples don't see each other: `cu_seqlens`
    bounds attention and `position_ids` starts at 0 for each.
    """

    tokens: torch.Tensor
    """[T] int64"""
    targets: torch.Tensor
    """[T] int64"""
    loss_mask: torch.Tensor
    """[T] float32; a target's weight, 0 where it carries no loss."""
    position_ids: torch.Tensor
    """[T] int64"""
    cu_seqlens: torch.Tensor
    """[examples + 1] int32; bounds of the examples: 0, ..., T."""
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    """[T] tensors beside the targets, for instance advantages."""
    cu_seqlens_padded: torch.Tensor | None = None
    """[examples + 1] int32; where the examples begin when padding follows each, `cu_seqlens` being without it."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.tokens.numel()

    @property
    def bounds(self) -> torch.Tensor:
        """[examples + 1] int32; bounds of the examples as they lie, padding included."""
        return self.cu_seqlens if self.cu_seqlens_padded is None else self.cu_seqlens_padded

    @property
    def max_seqlen(self) -> int:
        """The longest example's tokens, padding included."""
        return int((self.bounds[1:] - self.bounds[:-1]).max())

    def map_tokens(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        """`function` of each tensor that has a value a token; the bounds stay."""
        return replace(
            self,
            tokens=function(self.tokens),
            targets=function(self.targets),
            loss_mask=function(self.loss_mask),
            position_ids=function(self.position_ids),
            extras={name: function(tensor) for name, tensor in self.extras.items()},
        )

    def take(self, rows: torch.Tensor) -> PackedBatch:
        """The tokens at `rows`, which lie as this rank's share; the bounds stay the whole pack's."""
        return self.map_tokens(lambda tensor: tensor[rows])


def pack_lengths(lengths: Sequence[int], capacity: int, seed: int | None) -> list[list[int]]:
    """Put items of the given lengths into packs of at most `capacity`: first fit, in an order shuffled by `seed`.

    Args:
        seed: None keeps the given order.

    Returns:
        Indices of `lengths` by pack; every index appears once.

    Raises:
        ValueError: an item is longer than the capacity, or not positive.
    """
    order = list(range(len(lengths)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    packs: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (pack, room left); only so many are looked at, to stay linear
    for index in order:
        length = lengths[index]
        if not 0 < length <= capacity:
            raise ValueError(f"item {index} has length {length}, capacity is {capacity}")
        for slot, (pack, room) in enumerate(open_bins):
            if length <= room:
                packs[pack].append(index)
                open_bins[slot] = (pack, room - length)
                break
        else:
            if len(open_bins) == _OPEN_BINS:
                open_bins.remove(min(open_bins, key=lambda bin: bin[1]))
            open_bins.append((len(packs), capacity - length))
            packs.append([index])
    return packs


def epoch_packs(lengths: Sequence[int], capacity: int, seed: int, epoch: int) -> list[list[int]]:
    """The packs of one epoch in training order: every example once, full packs not before others."""
    packs = pack_lengths(lengths, capacity, derive_seed(seed, "pack", epoch))
    random.Random(derive_seed(seed, "order", epoch)).shuffle(packs)
    return packs


def pack_examples(
    examples: Sequence[Example],
    loss_on: Literal["all", "completion"],
    extras: dict[str, Sequence[Sequence[float]]] | None = None,
) -> PackedBatch:
    """Lay examples one after the other.

    Args:
        extras: by name, for each example one value a completion token; positions before it hold 0.
    """
    tokens: list[int] = []
    targets: list[int] = []
    mask: list[float] = []
    positions: list[int] = []
    bounds = [0]
    laid_out: dict[str, list[float]] = {name: [] for name in extras or {}}
    for index, example in enumerate(examples):
        ids = example.prompt + example.completion
        inputs = example.num_inputs
        first = max(len(example.prompt) - 1, 0)  # the position that predicts the completion's first token
        tokens += ids[:-1]
        targets += ids[1:]
        mask += [1.0] * inputs if loss_on == "all" else [0.0] * first + [1.0] * (inputs - first)
        positions += range(inputs)
        bounds.append(len(tokens))
        for name, rows in (extras or {}).items():
            row = list(rows[index])[len(example.completion) - (inputs - first) :]
            if len(row) != inputs - first:
                raise ValueError(f"extras[{name!r}][{index}]: {len(rows[index])} values for {inputs - first} tokens")
            laid_out[name] += [0.0] * first + row
    return PackedBatch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        loss_mask=torch.tensor(mask, dtype=torch.float32),
        position_ids=torch.tensor(positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        extras={name: torch.tensor(values, dtype=torch.float32) for name, values in laid_out.items()},
    )


def pad_batch(batch: PackedBatch, sequence_multiple: int, pack_multiple: int) -> PackedBatch:
    """Fill up with tokens that carry no loss and that no real token sees.

    Args:
        sequence_multiple: each example is made to a multiple of this long; the padding follows it, so that under a
            causal mask it changes nothing.
        pack_multiple: the whole pack is made to a multiple of this long, by one example more.
    """
    if sequence_multiple > 1:
        lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).to(torch.int64)
        padded = -(-lengths // sequence_multiple) * sequence_multiple
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), padded.cumsum(0)])
        shift = torch.repeat_interleave(bounds[:-1] - batch.cu_seqlens[:-1], lengths)
        batch = _spread(batch, torch.arange(batch.num_tokens) + shift, int(bounds[-1]))
        batch.cu_seqlens_padded = bounds.to(torch.int32)
    lacking = -batch.num_tokens % pack_multiple
    if lacking:
        whole = batch.num_tokens + lacking
        batch = _spread(batch, torch.arange(batch.num_tokens), whole)
        # Of no real tokens where the real lengths are kept apart.
        real = lacking if batch.cu_seqlens_padded is None else 0
        batch.cu_seqlens = torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + real])
        if batch.cu_seqlens_padded is not None:
            batch.cu_seqlens_padded = torch.cat([batch.cu_seqlens_padded, torch.tensor([whole], dtype=torch.int32)])
    return batch


def _spread(batch: PackedBatch, rows: torch.Tensor, num_tokens: int) -> PackedBatch:
    """The batch's tokens at `rows` of `num_tokens`, zeros elsewhere."""
    return batch.map_tokens(lambda tensor: tensor.new_zeros(num_tokens).index_copy_(0, rows, tensor))


def masked_copy(batch: PackedBatch) -> PackedBatch:
    """The same tokens without loss: fills a data-parallel rank that has no pack of its own in a step."""
    return replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
