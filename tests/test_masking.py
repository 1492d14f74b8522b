"""Reductions: masked elements reach neither a value nor a gradient, and nothing divides by zero.

What holds for any input, in both stacks, is in `parity.properties`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.ops import masking

SHAPE = (3, 5)


def test_an_all_false_mask_gives_zero_everywhere_and_zero_gradients():
    x, nothing = jnp.full(SHAPE, jnp.nan), jnp.zeros(SHAPE, bool)
    for reduction in (masking.masked_sum, masking.masked_mean, masking.masked_var):
        value, gradient = jax.value_and_grad(reduction)(x, nothing)
        assert value == 0
        assert not np.any(gradient)
    assert masking.masked_max(x, nothing) == -np.inf
    assert masking.masked_count(nothing) == 0
    np.testing.assert_array_equal(masking.masked_center(x, nothing), np.zeros(SHAPE))
    assert np.isnan(masking.masked_quantiles(x, nothing, [0.5])).all()


def test_variance_divides_by_n_and_not_by_n_minus_one():
    assert masking.masked_var(jnp.array([0.0, 2.0, 9.0]), jnp.array([True, True, False])) == 1.0


@pytest.mark.parametrize("value", [0.1, 1e8, 3e30, -1.7e4])
def test_equal_elements_however_large_have_variance_and_centre_exactly_zero(value):
    x = jnp.where(jnp.arange(37) % 5 > 0, jnp.float32(value), jnp.float32(7.0))
    mask = jnp.arange(37) % 5 > 0
    assert masking.masked_var(x, mask) == 0
    np.testing.assert_array_equal(masking.masked_center(x, mask), np.zeros(37))


def test_a_single_element_has_variance_exactly_zero_and_no_nan_gradient():
    value, gradient = jax.value_and_grad(masking.masked_var)(jnp.array([3.3e7, jnp.nan]), jnp.array([True, False]))
    assert value == 0
    np.testing.assert_array_equal(gradient, [0.0, 0.0])


def test_the_variance_of_small_differences_on_a_large_offset_survives_float32():
    x = np.float32(2.0**20) + np.array([0.0, 1.0, 2.0, 3.0, 4.0], np.float32)
    np.testing.assert_allclose(masking.masked_var(jnp.asarray(x), jnp.ones(5, bool)), 2.0, rtol=1e-6)


def test_the_last_position_is_that_of_the_last_true_even_behind_a_gap():
    mask = jnp.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(masking.last_position(mask), [1, 2, 3, 0, 3])


def test_counts_beyond_sixteen_million_are_those_of_integers():
    # A float32 running sum of ones stops at 2**24; the reduction must not.
    many = jnp.ones((2**24 + 2,), bool)
    assert masking.masked_count(many) == 2**24 + 2
    assert masking.masked_count(jnp.array([[True, False], [True, True]]), axis=1).tolist() == [1.0, 2.0]
