"""Examples from JSON Lines, and the plan of steps."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from astro_hpc.config.base import ConfigError
from astro_hpc.config.schema import TrainingConfig
from astro_hpc.run.seeds import derive_seed
from astro_hpc.training.data import StepPlan, held_out_share, load_examples, load_tokenizer
from astro_hpc.training.packing import Example


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return load_tokenizer(smollm2)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prompt_and_completion_are_tokenised_apart_and_end_with_eos(tokenizer: Any, tmp_path: Path) -> None:
    prompt = "<|im_start|>user\n4 - 2<|im_end|>\n<|im_start|>assistant\n"
    path = write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": "2\n", "k": 1}])
    (example,) = load_examples(path, tokenizer, 100).examples
    assert example.prompt == tuple(tokenizer.encode(prompt, add_special_tokens=False))
    assert example.completion == (*tokenizer.encode("2\n", add_special_tokens=False), tokenizer.eos_token_id)
    assert example.prompt[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_examples_over_the_length_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": " b" * count} for count in (3, 8, 9)]
    found = load_examples(write(tmp_path / "a.jsonl", rows), tokenizer, 10)
    assert [example.num_inputs + 1 for example in found.examples] == [5, 10]
    assert found.num_dropped == 1
    with pytest.raises(ConfigError, match="all 3 examples are longer than seq_length 4"):
        load_examples(tmp_path / "a.jsonl", tokenizer, 4)


def test_over_long_examples_can_be_cut(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": " b" * count} for count in (3, 8, 9)]
    rows.append({"prompt": "a" + " b" * 9, "completion": " c"})  # its completion would be cut off whole
    found = load_examples(write(tmp_path / "a.jsonl", rows), tokenizer, 10, over_long="cut")
    assert [example.num_inputs + 1 for example in found.examples] == [5, 10, 10]
    assert found.examples[1].completion[-1] == tokenizer.eos_token_id
    assert found.examples[2].completion[-1] != tokenizer.eos_token_id
    assert (found.num_cut, found.num_dropped) == (1, 1)


def test_a_share_of_the_problems_is_held_out_whole(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "completion": f" {k}", "problem_id": f"p{i}"} for i in range(200) for k in range(2)]
    path = write(tmp_path / "a.jsonl", rows)
    held_out = held_out_share(0.25, partial(derive_seed, 7))
    found = load_examples(path, tokenizer, 10, held_out=held_out)
    assert 70 <= len(found.validation) <= 130
    train, validation = ({e.prompt for e in part} for part in (found.examples, found.validation))
    assert not train & validation
    assert len(found.examples) + len(found.validation) == 400
    # More or reordered rows and a larger share move nobody from validation to training.
    again = load_examples(write(tmp_path / "b.jsonl", rows[::-1]), tokenizer, 10, held_out=held_out)
    assert {e.prompt for e in again.validation} == validation
    assert all(held_out_share(0.5, partial(derive_seed, 7))(f"p{i}") for i in range(200) if held_out(f"p{i}"))
    assert not any(map(held_out_share(0.0, partial(derive_seed, 7)), map(str, range(99))))
    with pytest.raises(ConfigError, match="every problem is held out"):
        load_examples(path, tokenizer, 10, held_out=lambda _: True)


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt": "a", "completion": 3}, {"prompt": "", "completion": "b"}])
def test_a_bad_row_is_named(tokenizer: Any, tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: '(prompt|completion)'"):
        load_examples(path, tokenizer, 10)


def test_an_empty_file_and_a_folder_without_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no examples"):
        load_examples(write(tmp_path / "a.jsonl", []), tokenizer, 10)
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_steps_cover_each_epoch_and_split_over_ranks() -> None:
    examples = [Example((1,), tuple(range(2, 3 + size % 7))) for size in range(50)]
    training = TrainingConfig(num_epochs=2, seq_length=16, global_batch_size=4, loss_on="completion")
    plan = StepPlan(examples, training, seed=5)
    assert plan.steps == StepPlan(examples, training, seed=5).steps
    seen = [index for step in plan.steps for pack in step for index in pack]
    assert sorted(seen) == sorted(list(range(50)) * 2)
    assert sum(plan.num_tokens(step) for step in range(len(plan))) == 2 * sum(e.num_inputs for e in examples)
    for step in range(len(plan)):
        ranks = [plan.batches(step, rank, 3) for rank in range(3)]
        assert len({len(batches) for batches in ranks}) == 1
        targets = sum(float(batch.loss_mask.sum()) for batches in ranks for batch in batches)
        assert targets == plan.num_targets(step)
