"""The clipped losses and the weights that reduce them.

What holds for any input, in both stacks, is in `parity.properties`.
"""

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
