"""Advantages, loss and gauges against hand-worked numbers, autograd and their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astro_hpc.config.schema import ObjectiveConfig
from astro_hpc.rl.objective import group_advantages, groups_with_signal, mismatch, policy_loss, token_weights


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    assert group_advantages(rewards, 4, "dr_grpo").tolist() == [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0]
    # mean -1/2, population variance 3/4
    expected = [1.5 / math.sqrt(0.75)] + [-0.5 / math.sqrt(0.75)] * 3 + [0.0] * 4
    assert group_advantages(rewards, 4, "grpo").tolist() == pytest.approx(expected)
    assert groups_with_signal(rewards, 4).tolist() == [True] * 4 + [False] * 4


@given(st.lists(st.sampled_from([1.0, -1.0]), min_size=4, max_size=40).filter(lambda r: len(r) % 4 == 0))
def test_advantages_of_a_group_add_up_to_zero(rewards):
    for kind in ("grpo", "dr_grpo"):
        advantages = group_advantages(torch.tensor(rewards), 4, kind).view(-1, 4)
        assert advantages.sum(dim=1).abs().max() < 1e-5
        assert ((advantages > 0) <= (torch.tensor(rewards).view(-1, 4) > 0)).all()


def test_token_weights_by_hand():
    lengths = torch.tensor([2, 6])
    assert token_weights(lengths, "response_mean", 10).tolist() == pytest.approx([1 / 4, 1 / 12])
    assert token_weights(lengths, "token_mean", 10).tolist() == pytest.approx([1 / 8, 1 / 8])
    assert token_weights(lengths, "constant", 10).tolist() == pytest.approx([1 / 20, 1 / 20])


def _loss(delta_new, advantage, cap=None, delta_engine=0.0, **clip):
    old = torch.tensor([-1.0])
    new = (old + delta_new).requires_grad_()
    objective = ObjectiveConfig(truncated_importance_cap=cap, **clip)
    one = torch.ones(1)
    loss, clipped = policy_loss(new, old, old - delta_engine, torch.tensor([advantage]), one, objective)
    loss.backward()
    return loss.item(), new.grad.item(), bool(clipped)


def test_unclipped_gradient_is_minus_ratio_times_advantage():
    loss, gradient, clipped = _loss(0.1, 2.0)
    assert loss == pytest.approx(-2 * math.exp(0.1))
    assert gradient == pytest.approx(-2 * math.exp(0.1))
    assert not clipped


@pytest.mark.parametrize(
    ("delta", "advantage", "is_clipped"), [(0.5, 1.0, True), (0.5, -1.0, False), (-0.5, -1.0, True), (-0.5, 1.0, False)]
)
def test_clipping_only_stops_moves_that_would_pay(delta, advantage, is_clipped):
    loss, gradient, clipped = _loss(delta, advantage)
    assert clipped is is_clipped
    assert (gradient == 0.0) is is_clipped
    bound = (1.2 if delta > 0 else 0.8) if is_clipped else math.exp(delta)
    assert loss == pytest.approx(-advantage * bound)


def test_clip_higher_leaves_more_room_upwards():
    assert _loss(0.25, 1.0, clip_high=0.28)[2] is True  # exp(0.25) = 1.284
    assert _loss(0.24, 1.0, clip_high=0.28)[2] is False
    assert _loss(0.24, 1.0, clip_high=0.2)[2] is True


def test_importance_weight_is_truncated_and_carries_no_gradient():
    assert _loss(0.0, 1.0, cap=2.0, delta_engine=0.5)[0] == pytest.approx(-math.exp(0.5))
    loss, gradient, _ = _loss(0.0, 1.0, cap=2.0, delta_engine=3.0)
    assert loss == pytest.approx(-2.0)
    assert gradient == pytest.approx(-2.0)


def test_gradient_of_the_whole_loss_against_autograd_in_double():
    torch.manual_seed(0)
    size = 12
    old = -torch.rand(size, dtype=torch.float64) * 3
    new = (old + 0.3 * torch.randn(size, dtype=torch.float64)).requires_grad_()
    engine = old + 0.1 * torch.randn(size, dtype=torch.float64)
    advantages = torch.randn(size, dtype=torch.float64)
    weights = torch.rand(size, dtype=torch.float64)
    objective = ObjectiveConfig()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, engine, advantages, weights, objective)[0], (new,))


def test_on_policy_gradient_is_the_policy_gradient():
    new = torch.tensor([-0.5, -2.0], requires_grad=True)
    advantages, weights = torch.tensor([1.0, -3.0]), torch.tensor([0.25, 0.5])
    loss, _ = policy_loss(new, new.detach(), new.detach(), advantages, weights, ObjectiveConfig())
    loss.backward()
    assert new.grad.tolist() == pytest.approx([-0.25, 1.5])


def test_mismatch_gauges():
    logprobs = torch.tensor([-1.0, -2.0, -0.1])
    none = mismatch(logprobs, logprobs, 2.0)
    assert (none.mean_abs, none.max_abs, none.kl, none.truncated_share) == (0, 0, 0, 0)
    assert none.effective_sample_size == pytest.approx(1.0)
    off = mismatch(logprobs, logprobs - torch.tensor([0.0, 1.0, -0.5]), 2.0)
    assert off.mean_abs == pytest.approx(0.5)
    assert off.max_abs == pytest.approx(1.0)
    assert off.truncated_share == pytest.approx(1 / 3)
    assert off.kl == pytest.approx((0 + (math.e - 2) + (math.exp(-0.5) - 0.5)) / 3, rel=1e-5)
    assert 0 < off.effective_sample_size < 1
    assert mismatch(torch.zeros(0), torch.zeros(0), 2.0).effective_sample_size == 1.0
