"""Rollouts become packed sequences without losing or mixing anything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from astro_hpc.config import ConfigError
from astro_hpc.config.schema import ObjectiveConfig, RLConfig
from astro_hpc.rl.batches import make_batch, prompt_at
from astro_hpc.rl.rollouts import Group, Rollout


def _rollout(index, length, reward):
    tokens = tuple(1000 * (index + 1) + i for i in range(length))
    logprobs = tuple(-0.01 * t for t in range(length))
    return Rollout(f"p{index}", (7, 8, index), tokens, logprobs, "", "right", reward, False, ((0, length),))


def _groups(rollouts):
    return [Group(i // 2, tuple(rollouts[i : i + 2])) for i in range(0, len(rollouts), 2)]


def _settings(**values):
    return RLConfig(prompts_per_step=2, group_size=2, max_response_tokens=50, seq_length=60, **values)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([1.0, -1.0])), min_size=4, max_size=4),
    st.sampled_from([1, 2, 4]),
)
def test_every_useful_token_is_trained_once_with_its_own_values(shapes, mini_batches):
    rollouts = [_rollout(i, length, reward) for i, (length, reward) in enumerate(shapes)]
    batch = make_batch(_groups(rollouts), _settings(mini_batches=mini_batches), seed=3)
    assert len(batch.mini_batches) == mini_batches
    seen = {}
    for pack in (pack for packs in batch.mini_batches for pack in packs):
        assert pack.num_tokens <= 60
        rows = (pack.loss_mask > 0).nonzero().flatten().tolist()
        for row in rows:
            values = [float(pack.extras[name][row]) for name in ("advantages", "rollout_logprobs", "weights")]
            assert seen.setdefault(int(pack.targets[row]), values) is values
    for index, rollout in enumerate(rollouts):
        group = [rollouts[i].reward for i in (index // 2 * 2, index // 2 * 2 + 1)]
        for place, token in enumerate(rollout.token_ids):
            if group[0] == group[1]:
                assert token not in seen
            else:
                expected = [float(batch.advantages[index]), rollout.logprobs[place], mini_batches / (4 * 50)]
                assert seen[token] == pytest.approx(expected, abs=1e-6)


def test_groups_without_signal_are_kept_when_asked():
    rollouts = [_rollout(i, 5, 1.0) for i in range(4)]
    assert make_batch(_groups(rollouts), _settings(), 0).mini_batches == [[]]
    kept = make_batch(_groups(rollouts), _settings(objective=ObjectiveConfig(drop_equal_groups=False)), 0)
    assert sum(int((pack.loss_mask > 0).sum()) for pack in kept.mini_batches[0]) == 20


def test_a_response_too_long_for_the_sequence_is_named():
    with pytest.raises(ConfigError, match="rl.seq_length=60 can't hold a response of 62"):
        make_batch(_groups([_rollout(0, 60, 1.0), _rollout(1, 2, -1.0)]), _settings(), 0)


@given(st.integers(1, 20), st.integers(0, 5))
def test_every_prompt_comes_once_an_epoch(num_prompts, seed):
    order = [prompt_at(position, num_prompts, seed) for position in range(3 * num_prompts)]
    for first in range(0, len(order), num_prompts):
        assert sorted(order[first : first + num_prompts]) == list(range(num_prompts))


def test_each_epoch_trains_every_useful_token_once():
    rollouts = [_rollout(0, 4, 1.0), _rollout(1, 5, -1.0), _rollout(2, 6, 1.0), _rollout(3, 7, -1.0)]
    batch = make_batch(_groups(rollouts), _settings(mini_batches=2, num_epochs=3), 1)
    assert len(batch.mini_batches) == 6
    for epoch in range(3):
        packs = [pack for mini in batch.mini_batches[2 * epoch : 2 * epoch + 2] for pack in mini]
        assert sum(int((pack.loss_mask > 0).sum()) for pack in packs) == 22
        responses = torch.cat([pack.extras["responses"][pack.loss_mask > 0] for pack in packs])
        assert sorted(responses.unique().tolist()) == [0, 1, 2, 3]


def test_coming_close_to_the_length_limit_costs_reward():
    objective = ObjectiveConfig(overlong_buffer_tokens=10, overlong_penalty=1.0)
    rollouts = [_rollout(i, length, 1.0) for i, length in enumerate((10, 50, 10, 10))]
    assert make_batch(_groups(rollouts), _settings(objective=objective), 0).advantages.tolist() == [0.5, -0.5, 0, 0]


def test_with_a_kl_penalty_groups_without_signal_are_trained_on():
    rollouts = [_rollout(i, 5, 1.0) for i in range(4)]
    batch = make_batch(_groups(rollouts), _settings(objective=ObjectiveConfig(kl_coefficient=0.1)), 0)
    assert sum(int((pack.loss_mask > 0).sum()) for pack in batch.mini_batches[0]) == 20


def test_weights_of_mini_batches_keep_the_gradient_scale():
    rollouts = [_rollout(0, 4, 1.0), _rollout(1, 4, -1.0), _rollout(2, 4, 1.0), _rollout(3, 4, -1.0)]
    for count in (1, 2):
        packs = make_batch(_groups(rollouts), _settings(mini_batches=count), 1).mini_batches
        total = [sum(float(p.extras["weights"][p.loss_mask > 0].sum()) for p in mini) for mini in packs]
        assert total == pytest.approx([16 / (4 * 50)] * count)
        assert all(torch.isfinite(p.extras["advantages"]).all() for mini in packs for p in mini)
