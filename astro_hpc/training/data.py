"""Examples of a JSON Lines file as token ids, and the order in which steps see them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import TrainingConfig
from astro_hpc.inference.tokenizer import load_tokenizer as load_tokenizer
from astro_hpc.run.files import read_jsonl
from astro_hpc.training.packing import Example, PackedBatch, epoch_packs, masked_copy, pack_examples


@dataclass
class ExampleSet:
    """Tokenised examples and what was left out."""

    examples: list[Example]
    num_dropped: int
    """Examples longer than the sequence length."""


def load_examples(path: Path, tokenizer: Any, seq_length: int) -> ExampleSet:
    """Tokenise the rows {"prompt": text, "completion": text, ...}; other fields are ignored.

    Prompt and completion are tokenised apart, so that the border is where sampling will have it, and the
    end-of-sequence token is added. Examples of more than `seq_length` tokens are dropped and counted.

    Raises:
        ConfigError: a row lacks a text, or no example is left.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{path}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    prompts: list[str] = []
    completions: list[str] = []
    for number, row in enumerate(read_jsonl(path), 1):
        for field, texts in (("prompt", prompts), ("completion", completions)):
            text = row.get(field)
            if not isinstance(text, str) or not text:
                raise ConfigError(f"{path}:{number}: {field!r} is {text!r:.40}; expected a text")
            texts.append(text)
    if not prompts:
        raise ConfigError(f"{path}: no examples; the stage that writes it found nothing usable")

    def encode(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"])

    pairs = zip(encode(prompts), encode(completions), strict=True)
    examples = [Example(tuple(prompt), (*completion, tokenizer.eos_token_id)) for prompt, completion in pairs]
    kept = [example for example in examples if example.num_inputs < seq_length]
    if not kept:
        shortest = min(example.num_inputs + 1 for example in examples)
        raise ConfigError(
            f"{path}: all {len(examples)} examples are longer than seq_length {seq_length} "
            f"(the shortest has {shortest} tokens); raise seq_length"
        )
    return ExampleSet(kept, len(examples) - len(kept))


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
        for _ in range(-(-len(packs) // data_size) - len(mine)):
            batches.append(masked_copy(self._pack(packs[0])))
        return batches

    def num_targets(self, step: int) -> int:
        """Targets that carry loss in the step, over all ranks: the divisor of the mean loss."""
        return sum(int(batch.loss_mask.sum()) for batch in self._all(step))

    def num_tokens(self, step: int) -> int:
        """Input tokens of the step, over all ranks."""
        return sum(self.examples[index].num_inputs for pack in self.steps[step] for index in pack)

    def _pack(self, pack: list[int]) -> PackedBatch:
        return pack_examples([self.examples[index] for index in pack], self.training.loss_on)

    def _all(self, step: int) -> Iterator[PackedBatch]:
        return (self._pack(pack) for pack in self.steps[step])
