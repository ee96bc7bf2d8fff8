"""Advantages, loss and gauges against hand-worked numbers, autograd and their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astro_hpc.config.schema import ObjectiveConfig
from astro_hpc.rl.objective import (
    group_advantages,
    groups_with_signal,
    importance_weights,
    kl_penalty,
    mismatch_gauges,
    mismatch_sums,
    overlong_penalty,
    policy_loss,
    token_weights,
)


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


def _loss(delta_new, advantage, correction="none", delta_engine=0.0, **clip):
    old = torch.tensor([-1.0])
    new = (old + delta_new).requires_grad_()
    objective = ObjectiveConfig(importance_correction=correction, **clip)
    weight = importance_weights(old, old - delta_engine, torch.zeros(1, dtype=torch.int64), objective)
    loss, clipped = policy_loss(new, old, weight, torch.tensor([advantage]), torch.ones(1), objective)
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
    assert _loss(0.0, 1.0, "token", delta_engine=0.5)[0] == pytest.approx(-math.exp(0.5))
    loss, gradient, _ = _loss(0.0, 1.0, "token", delta_engine=3.0)
    assert loss == pytest.approx(-2.0)
    assert gradient == pytest.approx(-2.0)


def _weights(kind, deltas, responses, **settings):
    rollout = torch.zeros(len(deltas))
    return importance_weights(
        torch.tensor(deltas), rollout, torch.tensor(responses), ObjectiveConfig(importance_correction=kind, **settings)
    ).tolist()


def test_corrections_by_hand():
    deltas, responses = [math.log(1.5), math.log(1.5), math.log(4.0), math.log(0.1)], [0, 0, 3, 3]
    assert _weights("none", deltas, responses) == [1, 1, 1, 1]
    assert _weights("token", deltas, responses) == pytest.approx([1.5, 1.5, 2.0, 0.1])
    assert _weights("token_mask", deltas, responses) == pytest.approx([1.5, 1.5, 0, 0])
    # products over the responses: 2.25 and 0.4
    assert _weights("sequence", deltas, responses) == pytest.approx([2.0, 2.0, 0.4, 0.4])
    assert _weights("sequence_mask", deltas, responses, importance_cap=3.0) == pytest.approx([2.25, 2.25, 0, 0])
    assert _weights("sequence", [], []) == []
    assert all(math.isfinite(w) for w in _weights("token", [1e4, -1e4], [0, 1], importance_cap=1e30))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.sampled_from(["token", "sequence"]))
def test_without_mismatch_every_correction_is_one(logprobs, kind):
    same = torch.tensor(logprobs)
    responses = torch.arange(len(logprobs)) // 3
    for suffix in ("", "_mask"):
        weights = importance_weights(same, same, responses, ObjectiveConfig(importance_correction=kind + suffix))
        assert weights.tolist() == [1.0] * len(logprobs)


def test_gradient_of_the_whole_loss_against_autograd_in_double():
    torch.manual_seed(0)
    size = 12
    old = -torch.rand(size, dtype=torch.float64) * 3
    new = (old + 0.3 * torch.randn(size, dtype=torch.float64)).requires_grad_()
    correction = torch.rand(size, dtype=torch.float64) + 0.5
    reference = old + 0.2 * torch.randn(size, dtype=torch.float64)
    advantages = torch.randn(size, dtype=torch.float64)
    weights = torch.rand(size, dtype=torch.float64)
    for estimator in ("k1", "k2", "k3"):
        objective = ObjectiveConfig(kl_coefficient=0.3, kl_estimator=estimator)
        assert torch.autograd.gradcheck(
            lambda x, o=objective: policy_loss(x, old, correction, advantages, weights, o, reference)[0], (new,)
        )


def test_on_policy_gradient_is_the_policy_gradient():
    new = torch.tensor([-0.5, -2.0], requires_grad=True)
    advantages, weights = torch.tensor([1.0, -3.0]), torch.tensor([0.25, 0.5])
    loss, _ = policy_loss(new, new.detach(), torch.ones(2), advantages, weights, ObjectiveConfig())
    loss.backward()
    assert new.grad.tolist() == pytest.approx([-0.25, 1.5])


def test_kl_estimators_by_hand_and_their_gradients():
    new, reference = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.5])
    for estimator, value, gradient in (
        ("k1", 0.5, 1.0),
        ("k2", 0.125, 0.5),
        ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)),
    ):
        new.grad = None
        penalty = kl_penalty(new, reference, estimator)
        penalty.sum().backward()
        assert penalty.item() == pytest.approx(value)
        assert new.grad.item() == pytest.approx(gradient)


def test_kl_estimators_are_unbiased_on_the_policys_own_samples():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = float((policy * (policy / reference).log()).sum())
    for estimator in ("k1", "k3"):
        mean = float((policy * kl_penalty(policy.log(), reference.log(), estimator)).sum())
        assert mean == pytest.approx(exact, abs=1e-6)


def test_the_penalty_is_weighted_like_a_token_and_pulls_towards_the_reference():
    new = torch.tensor([-1.0], requires_grad=True)
    objective = ObjectiveConfig(kl_coefficient=0.5, kl_estimator="k2")
    zero, weight = torch.zeros(1), torch.tensor([0.25])
    loss, _ = policy_loss(new, new.detach(), torch.ones(1), zero, weight, objective, torch.tensor([-2.0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * 0.5 * 0.5)
    assert new.grad.item() == pytest.approx(0.25 * 0.5 * 1.0)  # descent lowers logp, towards the reference


def test_overlong_penalty_by_hand():
    objective = ObjectiveConfig(overlong_buffer_tokens=4, overlong_penalty=0.5)
    lengths = torch.tensor([1, 6, 7, 8, 10, 12])
    assert overlong_penalty(lengths, 10, objective).tolist() == [0, 0, -0.125, -0.25, -0.5, -0.5]
    assert overlong_penalty(lengths, 10, ObjectiveConfig()).tolist() == [0.0] * 6


def _gauges(old, rollout, **settings):
    responses = torch.arange(len(old))
    return mismatch_gauges(mismatch_sums(old, rollout, responses, ObjectiveConfig(**settings)))


def test_mismatch_gauges():
    logprobs = torch.tensor([-1.0, -2.0, -0.1])
    none = _gauges(logprobs, logprobs)
    assert none == {
        "mismatch_mean_abs": 0,
        "mismatch_max_abs": 0,
        "mismatch_kl": 0,
        "effective_sample_size": pytest.approx(1.0),
        "corrected_share": 0,
    }
    off = _gauges(logprobs, logprobs - torch.tensor([0.0, 1.0, -0.5]))
    assert off["mismatch_mean_abs"] == pytest.approx(0.5)
    assert off["mismatch_max_abs"] == pytest.approx(1.0)
    assert off["corrected_share"] == pytest.approx(1 / 3)
    assert off["mismatch_kl"] == pytest.approx((0 + (math.e - 2) + (math.exp(-0.5) - 0.5)) / 3, rel=1e-5)
    assert 0 < off["effective_sample_size"] < 1
    assert mismatch_gauges({})["effective_sample_size"] == 1.0


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=12), st.integers(1, 11))
def test_gauges_of_parts_add_up_to_the_gauges_of_the_whole(deltas, cut):
    old, rollout = torch.tensor(deltas), torch.zeros(len(deltas))
    responses, objective = torch.arange(len(deltas)), ObjectiveConfig()
    whole = mismatch_sums(old, rollout, responses, objective)
    parts = [mismatch_sums(old[s], rollout[s], responses[s], objective) for s in (slice(cut), slice(cut, None))]
    joined = {n: (max if n.startswith("max_") else sum)(part[n] for part in parts) for n in whole}
    assert mismatch_gauges(joined) == pytest.approx(mismatch_gauges(whole))
