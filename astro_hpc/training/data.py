"""Examples of a JSON Lines file as token ids, and the order in which steps see them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import TrainingConfig
from astro_hpc.inference.tokenizer import load_tokenizer as load_tokenizer
from astro_hpc.run.files import read_jsonl
from astro_hpc.training.packing import Example, PackedBatch, epoch_packs, masked_copy, pack_examples


@dataclass
class ExampleSet:
    """Tokenised examples and what was left out."""

    examples: list[Example]
    validation: list[Example]
    """Examples of the problems that are held out."""
    num_dropped: int
    """Examples longer than the sequence length that were left out."""
    num_cut: int
    """Examples longer than the sequence length whose end was cut off."""


def load_examples(
    path: Path,
    tokenizer: Any,
    seq_length: int,
    over_long: Literal["drop", "cut"] = "drop",
    held_out: Callable[[str], bool] = lambda _: False,
) -> ExampleSet:
    """Tokenise the rows {"prompt": text, "completion": text, "problem_id": text, ...}; other fields are ignored.

    Prompt and completion are tokenised apart, so that the border is where sampling will have it, and the
    end-of-sequence token is added.

    Args:
        over_long: `drop` leaves out examples of more than `seq_length` tokens; `cut` keeps their first `seq_length`
            as long as one token of the completion is among them. They then lack the end-of-sequence token.
        held_out: whether a problem is for validation, by its id, or by the prompt in a row that has no id.

    Raises:
        ConfigError: a row lacks a text, or no example is left.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{path}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    prompts: list[str] = []
    completions: list[str] = []
    problems: list[str] = []
    for number, row in enumerate(read_jsonl(path), 1):
        for field, texts in (("prompt", prompts), ("completion", completions)):
            text = row.get(field)
            if not isinstance(text, str) or not text:
                raise ConfigError(f"{path}:{number}: {field!r} is {text!r:.40}; expected a text")
            texts.append(text)
        problems.append(str(row.get("problem_id") or row["prompt"]))
    if not prompts:
        raise ConfigError(f"{path}: no examples; the stage that writes it found nothing usable")

    def encode(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"])

    found = ExampleSet([], [], 0, 0)
    shortest = None
    for prompt, completion, problem in zip(encode(prompts), encode(completions), problems, strict=True):
        example = Example(tuple(prompt), (*completion, tokenizer.eos_token_id))
        length = example.num_inputs + 1
        shortest = min(shortest or length, length)
        if length > seq_length:
            room = seq_length - len(prompt)
            if over_long == "drop" or room < 1:
                found.num_dropped += 1
                continue
            found.num_cut += 1
            example = Example(example.prompt, example.completion[:room])
        (found.validation if held_out(problem) else found.examples).append(example)
    if not found.examples and not found.validation:
        raise ConfigError(
            f"{path}: all {len(prompts)} examples are longer than seq_length {seq_length} "
            f"(the shortest has {shortest} tokens); raise seq_length"
        )
    if not found.examples:
        raise ConfigError(f"{path}: every problem is held out for validation; lower validation_fraction")
    return found


def held_out_share(fraction: float, seed: Callable[..., int]) -> Callable[[str], bool]:
    """Whether a problem belongs to the share that is held out: the same in every arm, attempt and order of rows.

    Args:
        seed: gives a 63-bit seed for a name, for instance `StageContext.seed`.
    """
    limit = int(fraction * 2**63)
    return lambda problem: seed("validation", problem) < limit


class StepPlan:
    """Which packs each optimizer step sees: a function of the examples, the settings and the seed alone.

    A step is `global_batch_size` packs of one epoch; an epoch's last step may have fewer. So the loader's whole
    position is the number of steps done.
    """

    def __init__(self, examples: list[Example], training: TrainingConfig, seed: int) -> None:
        self.examples = examples
        self.training = training
        self.steps: list[list[list[int]]] = []
        lengths = [example.num_inputs for example in examples]
        size = training.global_batch_size
        for epoch in range(training.num_epochs):
            packs = epoch_packs(lengths, training.seq_length, seed, epoch)
            self.steps += [packs[start : start + size] for start in range(0, len(packs), size)]

    def __len__(self) -> int:
        return len(self.steps)

    def position(self, steps_done: int) -> dict[str, Any]:
        """Where the loader is after `steps_done` steps, for a checkpoint. How ranks share a step is no part of it."""
        seen = self.steps[:steps_done]
        order = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
        return {"steps": steps_done, "packs": sum(len(packs) for packs in seen), "order": order}

    def steps_done(self, step: int, position: dict[str, Any]) -> int:
        """The steps done at `position`, which a checkpoint after `step` steps holds.

        Raises:
            ConfigError: the steps before it saw other packs than this plan's.
        """
        if position != self.position(step):
            raise ConfigError(f"the checkpoint after step {step} saw other data than there is now; --redo starts anew")
        return step

    def batches(self, step: int, data_rank: int = 0, data_size: int = 1) -> list[PackedBatch]:
        """The packs of step `step` (0-based) that data-parallel rank `data_rank` of `data_size` sees.

        All ranks get equally many; where packs are short, one without loss fills in.
        """
        packs = self.steps[step]
        mine = packs[data_rank::data_size]
        batches = [self._pack(pack) for pack in mine]
        for _ in range(_num_fillers(len(packs), data_size, data_rank)):
            batches.append(masked_copy(self._pack(packs[0])))
        return batches

    def num_targets(self, step: int) -> int:
        """Targets that carry loss in the step, over all ranks: the divisor of the mean loss."""
        return sum(self.examples[index].num_targets(self.training.loss_on) for index in self._indices(step))

    def lengths(self, step: int) -> list[int]:
        """Input tokens of each example of the step, over all ranks."""
        return [self.examples[index].num_inputs for index in self._indices(step)]

    def num_tokens(self, step: int) -> int:
        """Input tokens of the step, over all ranks, each once."""
        return sum(self.lengths(step))

    def _indices(self, step: int) -> Iterator[int]:
        return (index for pack in self.steps[step] for index in pack)

    def _pack(self, pack: list[int]) -> PackedBatch:
        return pack_examples([self.examples[index] for index in pack], self.training.loss_on)


def _num_fillers(num_packs: int, data_size: int, data_rank: int) -> int:
    """Packs without loss that a rank needs to have as many as the others."""
    return -(-num_packs // data_size) - len(range(data_rank, num_packs, data_size))
