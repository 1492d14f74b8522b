"""The clipped losses and the weights that reduce them.

What holds for any input, in both stacks, is in `parity.properties`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.ops import losses


def test_the_ranks_of_advantages_cannot_mix_when_b_equals_t():
    square, per_answer = jnp.zeros((3, 3)), jnp.array([1.0, 2.0, 3.0])
    with pytest.raises(Exception, match="advantages"):
        losses.clipped_policy_loss(square, square, per_answer, clip_eps=0.2)


def test_the_constant_divisor_does_not_depend_on_lengths_or_on_the_padded_width():
    narrow = losses.constant_weights(jnp.array([[True], [True]]), max_response_tokens=8)
    wide = losses.constant_weights(jnp.array([[True, False, False], [True, True, True]]), max_response_tokens=8)
    assert float(narrow[0, 0]) == float(wide[0, 0]) == float(wide[1, 2]) == 1 / 16


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_a_weighted_sum_never_reads_tokens_of_weight_zero(poison):
    weights = jnp.array([[0.25, 0.0], [0.5, 0.0]])
    value, gradient = jax.value_and_grad(losses.weighted_sum)(jnp.array([[4.0, poison], [6.0, poison]]), weights)
    assert value == 4.0
    np.testing.assert_array_equal(gradient, weights)


def at_ratios(ratios, advantages):
    """Log-probs at some ratios to those of the old policy, of one answer."""
    return jnp.log(jnp.array([ratios])), jnp.zeros((1, len(ratios))), jnp.array([advantages])


def test_an_upper_bound_of_its_own_leaves_the_lower_one():
    ours = losses.clipped_policy_loss(*at_ratios([1.5, 1.3, 0.5], [1.0, 1.0, -1.0]), clip_eps=0.2, clip_eps_high=0.4)
    np.testing.assert_allclose(ours, [[-1.4, -1.3, 0.8]], rtol=1e-6)
    closed = losses.clipped_policy_loss(*at_ratios([1.5, 0.5], [1.0, -1.0]), clip_eps=0.2, clip_eps_high=0.0)
    np.testing.assert_allclose(closed, [[-1.0, 0.8]], rtol=1e-6)


def test_the_dual_clip_bounds_what_a_bad_token_loses_and_stops_its_gradient():
    inputs = at_ratios([9.0, 2.0, 9.0, 0.5], [-1.0, -1.0, 1.0, -1.0])
    bounds = {"clip_eps": 0.2, "dual_clip": 3.0}
    ours = losses.dual_clipped_policy_loss(*inputs, **bounds)
    np.testing.assert_allclose(ours, [[3.0, 2.0, -1.2, 0.8]], rtol=1e-6)
    gradient = jax.grad(lambda x: losses.dual_clipped_policy_loss(x, *inputs[1:], **bounds).sum())(inputs[0])
    np.testing.assert_allclose(gradient, [[0.0, 2.0, 0.0, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(losses.clipping_acts(*inputs, **bounds), [[True, False, True, True]])
    np.testing.assert_array_equal(losses.clipping_acts(*inputs, clip_eps=0.2), [[False, False, True, True]])


def test_an_unclipped_value_loss_does_not_know_the_old_value():
    """Clipping the distance to the old value instead would round: 1e8 + (0.1 − 1e8) is 0 in float32."""
    values, returns, old = jnp.array([[0.1, -3.0]]), jnp.array([[1.0, 2.0]]), jnp.array([[1e8, 1e8]])
    loss = functools.partial(losses.clipped_value_loss, clip_eps=math.inf)
    np.testing.assert_array_equal(loss(values, old, returns), 0.5 * (values - returns) ** 2)
    gradient = jax.grad(lambda x: loss(x, old, returns).sum())(values)
    np.testing.assert_array_equal(gradient, values - returns)
