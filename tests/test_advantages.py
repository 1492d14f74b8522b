"""Advantages: which answers were better than their batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.ops.advantages import (
    batch_mean_advantages,
    gae_advantages,
    leave_one_out_to_go_advantages,
    whiten,
)

SHAPES = [(4, 5), (5, 5), (1, 3)]
seeds = st.integers(0, 2**31)
gae = jax.jit(gae_advantages, static_argnames=("discount", "gae_lambda"))


def draw(seed, shape, *, empty_rows=True):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0 if empty_rows else 1, shape[1] + 1, shape[0])
    lengths[0] = max(lengths[0], 1)
    mask = np.arange(shape[1])[None] < lengths[:, None]
    return rng.normal(size=shape).astype(np.float32), mask


def dirty(x, mask, value="nan"):
    return jnp.asarray(np.where(mask, x, np.float32(value)))


# ---------------------------------------------------------------------------- batch mean


@given(seed=seeds, shape=st.sampled_from(SHAPES))
def test_every_token_gets_its_answers_total_minus_the_mean_of_the_answers(seed, shape):
    rewards, mask = draw(seed, shape)
    totals = {b: float(rewards[b][mask[b]].astype(np.float64).sum()) for b in range(shape[0]) if mask[b].any()}
    mean = sum(totals.values()) / len(totals)
    expected = np.zeros(shape)
    for b, total in totals.items():
        for t in range(shape[1]):
            if mask[b, t]:
                expected[b, t] = total - mean
    ours = np.asarray(batch_mean_advantages(dirty(rewards, mask), jnp.asarray(mask)))
    np.testing.assert_allclose(ours, expected, atol=3e-6)
    assert not ours[~mask].any()


def test_when_b_equals_t_advantages_vary_along_answers_not_along_tokens():
    rewards = jnp.diag(jnp.array([1.0, 2.0, 6.0]))
    ours = batch_mean_advantages(rewards, jnp.ones((3, 3), bool))
    np.testing.assert_allclose(ours, np.repeat([[-2.0], [-1.0], [3.0]], 3, axis=1), rtol=1e-6)


@given(seed=seeds, shift=st.sampled_from([-64.0, 0.25, 1024.0]))
def test_a_constant_on_every_score_changes_no_advantage(seed, shift):
    rewards, mask = draw(seed, (4, 5), empty_rows=False)
    rewards = np.round(rewards * 64) / 64
    shifted = rewards.copy()
    shifted[:, 0] += np.float32(shift)
    np.testing.assert_allclose(
        batch_mean_advantages(jnp.asarray(shifted), jnp.asarray(mask)),
        batch_mean_advantages(jnp.asarray(rewards), jnp.asarray(mask)),
        atol=1e-6,
    )


@pytest.mark.parametrize("value", [0.1, -3.3, 1e8, 7e30])
@pytest.mark.parametrize("batch", [1, 3, 7, 48])
def test_equal_rewards_however_large_give_advantages_of_exactly_zero(value, batch):
    rewards = jnp.zeros((batch, 4)).at[:, 2].set(value)
    mask = jnp.ones((batch, 4), bool)
    np.testing.assert_array_equal(batch_mean_advantages(rewards, mask), np.zeros((batch, 4)))
    np.testing.assert_array_equal(whiten(jnp.full((batch,), value), jnp.ones(batch, bool)), np.zeros(batch))


def test_a_batch_of_one_has_no_advantage_and_no_nan():
    np.testing.assert_array_equal(
        batch_mean_advantages(jnp.array([[1.0, 5.0]]), jnp.array([[True, False]])), np.zeros((1, 2))
    )
    np.testing.assert_array_equal(whiten(jnp.array([3.0]), jnp.array([True])), [0.0])


def test_rows_of_padding_are_left_out_of_the_mean():
    rewards = jnp.array([[1.0], [3.0], [1000.0]])
    ours = batch_mean_advantages(rewards, jnp.array([[True], [True], [False]]))
    np.testing.assert_array_equal(ours, [[-1.0], [1.0], [0.0]])


# ---------------------------------------------------------------------------- leave one out, to go


def to_go(rewards, mask, b, t):
    """Reward still to come at t, or that of the last token where the answer has ended."""
    length = int(mask[b].sum())
    return float(rewards[b, min(t, length - 1) : length].astype(np.float64).sum())


@given(seed=seeds, shape=st.sampled_from(SHAPES[:2]), poison=st.sampled_from(["nan", "1e30"]))
def test_every_token_gets_its_reward_to_go_minus_the_mean_of_the_others_at_its_position(seed, shape, poison):
    rewards, mask = draw(seed, shape)
    answered = [b for b in range(shape[0]) if mask[b].any()]
    expected = np.zeros(shape)
    for b in answered:
        for t in range(int(mask[b].sum())):
            others = [to_go(rewards, mask, other, t) for other in answered if other != b]
            expected[b, t] = to_go(rewards, mask, b, t) - np.mean(others) if others else 0.0
    ours = np.asarray(leave_one_out_to_go_advantages(dirty(rewards, mask, poison), jnp.asarray(mask)))
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert not ours[~mask].any()


@pytest.mark.parametrize("batch", [1, 3])
def test_equal_scores_or_a_single_answer_leave_nothing_to_go_for(batch):
    mask = jnp.arange(4)[None] < jnp.array([4, 1, 3])[:batch, None]
    rewards = jnp.where(jnp.arange(4)[None] == jnp.array([3, 0, 2])[:batch, None], 1e8 / 3, 0.0)
    np.testing.assert_array_equal(leave_one_out_to_go_advantages(rewards, mask), np.zeros((batch, 4)))


# ---------------------------------------------------------------------------- whitening


@given(seed=seeds)
def test_whitened_elements_are_those_of_the_formula_with_ddof_zero(seed):
    x, mask = draw(seed, (4, 5))
    kept = x[mask].astype(np.float64)
    expected = np.zeros((4, 5))
    expected[mask] = (kept - kept.mean()) / np.sqrt(((kept - kept.mean()) ** 2).mean() + 1e-8)
    ours = np.asarray(whiten(dirty(x, mask), jnp.asarray(mask)))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert not ours[~mask].any()


def test_the_epsilon_is_inside_of_the_square_root():
    # var = 1e-8: inside gives x / sqrt(2e-8), outside would give x / (1e-4 + 1e-8), larger by sqrt(2).
    ours = whiten(jnp.array([-1e-4, 1e-4]), jnp.ones(2, bool))
    np.testing.assert_allclose(ours, [-(0.5**0.5), 0.5**0.5], rtol=1e-4)


@given(seed=seeds, scale=st.sampled_from([0.5, 4.0]), shift=st.sampled_from([-8.0, 32.0]))
def test_whitening_undoes_a_positive_affine_map_and_flips_with_a_negative_one(seed, scale, shift):
    x = np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32)
    mask = jnp.ones((3, 4), bool)
    base = np.asarray(whiten(jnp.asarray(x), mask))
    np.testing.assert_allclose(whiten(jnp.asarray(x * scale + shift), mask), base, atol=1e-4)
    np.testing.assert_allclose(whiten(jnp.asarray(-x * scale + shift), mask), -base, atol=1e-4)
    np.testing.assert_allclose([base.mean(), base.std()], [0.0, 1.0], atol=1e-5)


# ---------------------------------------------------------------------------- GAE


def gae_by_loop(rewards, values, mask, discount, gae_lambda):
    """Schulman et al. 2016, from the end of each answer backwards, in float64."""
    advantages = np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        next_value = next_advantage = 0.0
        for t in reversed(range(int(mask[b].sum()))):
            td_error = float(rewards[b, t]) + discount * next_value - float(values[b, t])
            next_advantage = advantages[b, t] = td_error + discount * gae_lambda * next_advantage
            next_value = float(values[b, t])
    return advantages


@given(
    seed=seeds,
    shape=st.sampled_from(SHAPES[1:]),
    factors=st.sampled_from([(1.0, 0.95), (0.9, 0.8)]),
    poison=st.sampled_from(["nan", "1e30"]),
)
def test_gae_is_its_recursion_and_nothing_behind_an_answer_reaches_it(seed, shape, factors, poison):
    discount, gae_lambda = factors
    rewards, mask = draw(seed, shape)
    values = np.random.default_rng(seed + 1).normal(size=shape).astype(np.float32)
    advantages, returns = gae(
        dirty(rewards, mask, poison),
        dirty(values, mask, poison),
        jnp.asarray(mask),
        discount=discount,
        gae_lambda=gae_lambda,
    )
    expected = gae_by_loop(rewards, values, mask, discount, gae_lambda)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), rtol=1e-5, atol=1e-5)
    assert not np.asarray(advantages)[~mask].any()


def test_lambda_zero_is_the_td_error_and_lambda_one_the_reward_to_go_minus_the_value():
    rewards, values = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0.5, 0.25, 8.0]])
    mask = jnp.ones((1, 3), bool)
    td, _ = gae(rewards, values, mask, discount=0.5, gae_lambda=0.0)
    np.testing.assert_array_equal(td, [[1 + 0.125 - 0.5, 2 + 4 - 0.25, 4 - 8]])
    to_go, returns = gae(rewards, values, mask, discount=0.5, gae_lambda=1.0)
    np.testing.assert_array_equal(returns, [[1 + 1 + 1, 2 + 2, 4]])
    np.testing.assert_array_equal(to_go, [[3 - 0.5, 4 - 0.25, 4 - 8]])


@given(seed=seeds)
def test_gae_is_linear_in_rewards_and_values_together(seed):
    (r1, mask), (r2, _) = draw(seed, (4, 5)), draw(seed + 1, (4, 5))
    (v1, _), (v2, _) = draw(seed + 2, (4, 5)), draw(seed + 3, (4, 5))

    def advantages(rewards, values):
        return np.asarray(
            gae(jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask), discount=0.9, gae_lambda=0.8)[0]
        )

    combined = advantages(2 * r1 + r2, 2 * v1 + v2)
    np.testing.assert_allclose(combined, 2 * advantages(r1, v1) + advantages(r2, v2), atol=2e-5)
