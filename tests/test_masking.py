"""Reductions: masked elements reach neither a value nor a gradient, and nothing divides by zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.ops import masking

SHAPE = (3, 5)
POISON = [float("nan"), float("inf"), -float("inf"), 1e30]
seeds = st.integers(0, 2**31)


def draw(seed, *, empty_row=False):
    rng = np.random.default_rng(seed)
    mask = rng.random(SHAPE) < 0.6
    mask[0, 2] = True
    if empty_row:
        mask[1] = False
    return rng.normal(size=SHAPE).astype(np.float32), mask


def poisoned(x, mask, value):
    return jnp.asarray(np.where(mask, x, np.float32(value)))


REDUCTIONS = {
    "sum": (masking.masked_sum, np.sum),
    "mean": (masking.masked_mean, np.mean),
    "var": (masking.masked_var, np.var),
    "max": (masking.masked_max, np.max),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@given(seed=seeds, poison=st.sampled_from(POISON))
def test_a_masked_reduction_is_the_reduction_of_the_compacted_array(name, seed, poison):
    ours, numpy_reduction = REDUCTIONS[name]
    x, mask = draw(seed)
    expected = numpy_reduction(x[mask].astype(np.float64))
    np.testing.assert_allclose(ours(poisoned(x, mask, poison), jnp.asarray(mask)), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS)
@given(seed=seeds, poison=st.sampled_from(POISON))
def test_masked_elements_have_no_gradient_and_change_no_other(name, seed, poison):
    x, mask = draw(seed)
    gradient = jax.grad(lambda x: REDUCTIONS[name][0](x, jnp.asarray(mask)))
    clean, dirty = gradient(jnp.asarray(x)), gradient(poisoned(x, mask, poison))
    np.testing.assert_array_equal(dirty, clean)
    assert not np.any(np.asarray(dirty)[~mask])
    assert np.any(np.asarray(dirty)[mask])


@given(seed=seeds)
def test_reductions_along_an_axis_leave_empty_rows_at_zero(seed):
    x, mask = draw(seed, empty_row=True)
    poison = poisoned(x, mask, float("nan"))
    for ours, numpy_reduction in (REDUCTIONS["sum"], REDUCTIONS["mean"]):
        expected = [
            numpy_reduction(row[m].astype(np.float64)) if m.any() else 0.0 for row, m in zip(x, mask, strict=True)
        ]
        np.testing.assert_allclose(ours(poison, jnp.asarray(mask), axis=1), expected, rtol=2e-6, atol=1e-6)


def test_an_all_false_mask_gives_zero_everywhere_and_zero_gradients():
    x, nothing = jnp.full(SHAPE, jnp.nan), jnp.zeros(SHAPE, bool)
    for name in ("sum", "mean", "var"):
        value, gradient = jax.value_and_grad(REDUCTIONS[name][0])(x, nothing)
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


@given(seed=seeds)
def test_a_centred_array_sums_to_zero_and_keeps_differences(seed):
    x, mask = draw(seed)
    centred = np.asarray(masking.masked_center(poisoned(x, mask, float("nan")), jnp.asarray(mask)))
    np.testing.assert_allclose(centred[mask], x[mask] - x[mask].astype(np.float64).mean(), atol=1e-6)
    assert not centred[~mask].any()


@given(seed=seeds)
def test_quantiles_are_those_of_the_compacted_array(seed):
    x, mask = draw(seed)
    probabilities = [0.05, 0.25, 0.5, 0.75, 0.95]
    ours = masking.masked_quantiles(poisoned(x, mask, 1e30), jnp.asarray(mask), probabilities)
    np.testing.assert_allclose(ours, np.quantile(x[mask].astype(np.float64), probabilities), rtol=1e-5, atol=1e-6)


def test_the_last_position_is_that_of_the_last_true_even_behind_a_gap():
    mask = jnp.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(masking.last_position(mask), [1, 2, 3, 0, 3])


def test_counts_beyond_sixteen_million_are_those_of_integers():
    # A float32 running sum of ones stops at 2**24; the reduction must not.
    many = jnp.ones((2**24 + 2,), bool)
    assert masking.masked_count(many) == 2**24 + 2
    assert masking.masked_count(jnp.array([[True, False], [True, True]]), axis=1).tolist() == [1.0, 2.0]
