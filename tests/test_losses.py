"""The clipped losses and the weights that reduce them."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.ops import losses, masking

B, T = 4, 5
EPS = 0.2
seeds = st.integers(0, 2**31)

WEIGHTS = {
    "constant": lambda mask: losses.constant_weights(mask, max_response_tokens=7),
    "token_mean": losses.token_mean_weights,
    "sequence_mean": losses.sequence_mean_weights,
}


def draw(seed, *, spread=0.5):
    """(policy log-probs, old log-probs, advantages) and a mask of right-padded rows, at least one token in all."""
    rng = np.random.default_rng(seed)
    old = -rng.gamma(2.0, size=(B, T)).astype(np.float32)
    policy = old + spread * rng.normal(size=(B, T)).astype(np.float32)
    lengths = rng.integers(0, T + 1, B)
    lengths[0] = max(lengths[0], 1)
    return policy, old, rng.normal(size=(B, T)).astype(np.float32), np.arange(T)[None] < lengths[:, None]


@jax.jit
def token_loss_and_gradient(policy, old, advantages):
    def total(policy):
        token_losses = losses.clipped_policy_loss(policy, old, advantages, clip_eps=EPS)
        return jnp.sum(token_losses), token_losses

    gradient, token_losses = jax.grad(total, has_aux=True)(policy)
    return token_losses, gradient, losses.clipping_acts(policy, old, advantages, clip_eps=EPS)


@given(seed=seeds, spread=st.sampled_from([0.01, 0.5, 3.0]))
def test_the_loss_its_gradient_and_its_clip_mask_are_equation_seven(seed, spread):
    policy, old, advantages, _ = draw(seed, spread=spread)
    token_losses, gradient, acts = token_loss_and_gradient(policy, old, advantages)
    for i in np.ndindex(B, T):
        ratio, advantage = math.exp(float(policy[i]) - float(old[i])), float(advantages[i])
        clipped = min(max(ratio, 1 - EPS), 1 + EPS)
        if abs(ratio - clipped) < 1e-5 and abs(ratio - 1) > 0.19:
            continue  # on the edge within rounding: either side is right
        expected = -min(ratio * advantage, clipped * advantage)
        np.testing.assert_allclose(token_losses[i], expected, rtol=1e-5, atol=1e-6)
        must_act = (advantage > 0 and ratio > 1 + EPS) or (advantage < 0 and ratio < 1 - EPS)
        assert bool(acts[i]) == must_act
        if must_act:
            assert gradient[i] == 0
        else:
            np.testing.assert_allclose(gradient[i], -ratio * advantage, rtol=1e-5)


@given(seed=seeds)
def test_clipping_is_pessimistic_at_every_token(seed):
    policy, old, advantages, _ = draw(seed, spread=2.0)
    clipped = np.asarray(token_loss_and_gradient(policy, old, advantages)[0])
    unclipped = -np.exp(policy - old) * advantages
    assert (clipped >= unclipped - 1e-6 * np.abs(unclipped)).all()
    assert (clipped > unclipped + 1e-3).any()


@given(seed=seeds)
def test_at_ratio_one_the_gradient_is_the_policy_gradient_exactly(seed):
    policy, _, advantages, _ = draw(seed)
    token_losses, gradient, acts = token_loss_and_gradient(policy, policy, advantages)
    np.testing.assert_array_equal(token_losses, -advantages)
    np.testing.assert_array_equal(gradient, -advantages)
    assert not acts.any()


@given(seed=seeds)
def test_with_epsilon_to_infinity_the_loss_is_the_unclipped_one(seed):
    policy, old, advantages, _ = draw(seed, spread=2.0)
    loss, gradient = jax.value_and_grad(
        lambda policy: jnp.sum(
            losses.clipped_policy_loss(policy, jnp.asarray(old), jnp.asarray(advantages), clip_eps=1e30)
        )
    )(jnp.asarray(policy))
    unclipped = -np.exp(policy.astype(np.float64) - old) * advantages
    np.testing.assert_allclose(loss, unclipped.sum(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, unclipped, rtol=1e-5)


@given(seed=seeds, scale=st.sampled_from([0.0, 0.5, 8.0]))
def test_the_loss_is_linear_in_a_positive_scale_of_the_advantages(seed, scale):
    policy, old, advantages, _ = draw(seed)
    scaled = token_loss_and_gradient(policy, old, scale * advantages)
    base = token_loss_and_gradient(policy, old, advantages)
    np.testing.assert_allclose(scaled[0], scale * np.asarray(base[0]), rtol=1e-6)
    np.testing.assert_allclose(scaled[1], scale * np.asarray(base[1]), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "extreme"), [(np.float32, 80.0), (np.float64, 700.0)])
def test_extreme_log_ratios_stay_finite_and_are_clipped_where_they_must_be(dtype, extreme):
    with jax.enable_x64(dtype == np.float64):
        policy = jnp.asarray([[extreme, extreme, -extreme, -extreme]], dtype)
        advantages = jnp.asarray([[1.0, -1.0, 1.0, -1.0]], dtype)
        old = jnp.zeros_like(policy)

        def total(policy):
            return jnp.sum(losses.clipped_policy_loss(policy, old, advantages, clip_eps=EPS))

        loss, gradient = jax.value_and_grad(total)(policy)
        assert loss.dtype == dtype
        ratio = math.exp(extreme)
        np.testing.assert_allclose(loss, ratio, rtol=1e-4)
        np.testing.assert_allclose(gradient, [[0.0, ratio, -1 / ratio, 0.0]], rtol=1e-4)


def test_the_ranks_of_advantages_cannot_mix_when_b_equals_t():
    square, per_answer = jnp.zeros((3, 3)), jnp.array([1.0, 2.0, 3.0])
    with pytest.raises(Exception, match="advantages"):
        losses.clipped_policy_loss(square, square, per_answer, clip_eps=EPS)


# ---------------------------------------------------------------------------- value loss


@given(seed=seeds)
def test_the_value_loss_is_the_larger_of_both_squares_and_stops_where_the_clipped_one_wins(seed):
    rng = np.random.default_rng(seed)
    values, old_values, returns = rng.normal(size=(3, B, T)).astype(np.float32)

    def total(values):
        token_losses = losses.clipped_value_loss(values, jnp.asarray(old_values), jnp.asarray(returns), clip_eps=EPS)
        return jnp.sum(token_losses), token_losses

    gradient, token_losses = jax.grad(total, has_aux=True)(jnp.asarray(values))
    for i in np.ndindex(B, T):
        value, old, target = float(values[i]), float(old_values[i]), float(returns[i])
        clipped = min(max(value, old - EPS), old + EPS)
        plain_square, clipped_square = (value - target) ** 2, (clipped - target) ** 2
        np.testing.assert_allclose(token_losses[i], max(plain_square, clipped_square) / 2, rtol=1e-4, atol=1e-6)
        if abs(value - old) > EPS + 1e-4 and abs(plain_square - clipped_square) > 1e-4:
            expected = 0.0 if clipped_square > plain_square else value - target
            np.testing.assert_allclose(gradient[i], expected, rtol=1e-4, atol=1e-6)
        elif abs(value - old) < EPS - 1e-4:
            np.testing.assert_allclose(gradient[i], value - target, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------- weights


@given(seed=seeds)
def test_weights_are_their_formulas(seed):
    *_, mask = draw(seed)
    lengths = mask.sum(1)
    for b, t in np.ndindex(B, T):
        expected = {
            "constant": 1 / (B * 7),
            "token_mean": 1 / lengths.sum(),
            "sequence_mean": 1 / (max(lengths[b], 1) * (lengths > 0).sum()),
        }
        for name, weights in WEIGHTS.items():
            got = float(weights(jnp.asarray(mask))[b, t])
            assert got == (pytest.approx(expected[name], rel=1e-6) if mask[b, t] else 0.0), name


@jax.jit
def loss_and_gradient(policy, old, advantages, weights):
    def loss(policy):
        return losses.weighted_sum(losses.clipped_policy_loss(policy, old, advantages, clip_eps=EPS), weights)

    return jax.value_and_grad(loss)(policy)


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_all_false_mask_gives_a_loss_of_zero_and_zero_gradients(name):
    weights = WEIGHTS[name](jnp.zeros((B, T), bool))
    loss, gradient = jax.value_and_grad(losses.weighted_sum)(jnp.full((B, T), jnp.nan), weights)
    assert loss == 0
    np.testing.assert_array_equal(gradient, np.zeros((B, T)))


@pytest.mark.parametrize("name", WEIGHTS)
@given(seed=seeds)
def test_duplicating_the_batch_changes_nothing(name, seed):
    *arrays, mask = draw(seed)

    def loss(copies):
        *copied, copied_mask = (np.concatenate([x] * copies) for x in (*arrays, mask))
        return loss_and_gradient(*copied, WEIGHTS[name](jnp.asarray(copied_mask)))[0]

    np.testing.assert_allclose(loss(3), loss(1), rtol=1e-5, atol=1e-7)


def test_the_constant_divisor_does_not_depend_on_lengths_or_on_the_padded_width():
    narrow = losses.constant_weights(jnp.array([[True], [True]]), max_response_tokens=8)
    wide = losses.constant_weights(jnp.array([[True, False, False], [True, True, True]]), max_response_tokens=8)
    assert float(narrow[0, 0]) == float(wide[0, 0]) == float(wide[1, 2]) == 1 / 16


@pytest.mark.parametrize("name", WEIGHTS)
@given(seed=seeds, cuts=st.sets(st.integers(1, B - 1)))
def test_any_partition_into_micro_batches_adds_up_to_the_whole(name, seed, cuts):
    policy, old, advantages, mask = draw(seed)
    whole_batch = policy, old, advantages, np.asarray(WEIGHTS[name](jnp.asarray(mask)))
    whole, whole_gradient = loss_and_gradient(*whole_batch)
    edges = [0, *sorted(cuts), B]
    parts = [loss_and_gradient(*(x[a:b] for x in whole_batch)) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(sum(float(value) for value, _ in parts), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([gradient for _, gradient in parts]), whole_gradient, rtol=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30, -1e30])
@pytest.mark.parametrize("name", WEIGHTS)
def test_masked_values_even_nan_change_neither_loss_nor_gradient(name, poison):
    """As the update composes it: log-probs, old log-probs and advantages pass through `zero_masked` first."""
    policy, old, advantages, mask = draw(3)
    mask_array = jnp.asarray(mask)

    def loss(policy, old, advantages):
        policy, old, advantages = (masking.zero_masked(x, mask_array) for x in (policy, old, advantages))
        return losses.weighted_sum(
            losses.clipped_policy_loss(policy, old, advantages, clip_eps=EPS), WEIGHTS[name](mask_array)
        )

    clean = jax.value_and_grad(loss)(*(jnp.asarray(x) for x in (policy, old, advantages)))
    dirty = jax.value_and_grad(loss)(
        *(jnp.asarray(np.where(mask, x, np.float32(poison))) for x in (policy, old, advantages))
    )
    assert dirty[0] == clean[0] != 0
    np.testing.assert_array_equal(dirty[1], clean[1])
    assert not np.asarray(dirty[1])[~mask].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_a_weighted_sum_never_reads_tokens_of_weight_zero(poison):
    weights = jnp.array([[0.25, 0.0], [0.5, 0.0]])
    value, gradient = jax.value_and_grad(losses.weighted_sum)(jnp.array([[4.0, poison], [6.0, poison]]), weights)
    assert value == 4.0
    np.testing.assert_array_equal(gradient, weights)
