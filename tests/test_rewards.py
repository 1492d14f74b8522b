"""Score on the last response token, penalty on all of them, nothing anywhere else.

What holds for any input, in both stacks, is in `parity.properties`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.ops.rewards import (
    first_moments,
    kl_per_token,
    merged_moments,
    missing_eos_penalty,
    normalised_scores,
    token_rewards,
    too_long_penalty,
    too_short_penalty,
)


def test_an_answer_that_is_only_an_eos_gets_its_score_on_it():
    mask = jnp.array([[True, False, False]])
    ours = token_rewards(jnp.array([0.75]), jnp.array([[2.0, 9.0, 9.0]]), mask, kl_coef=0.25)
    np.testing.assert_array_equal(ours, [[0.25, 0.0, 0.0]])


def test_a_row_without_a_response_token_gets_nothing_not_even_a_nan_score():
    mask = jnp.array([[False, False], [True, True]])
    ours = token_rewards(jnp.array([jnp.nan, 1.0]), jnp.full((2, 2), jnp.nan).at[1].set(0.0), mask, kl_coef=0.1)
    np.testing.assert_array_equal(ours, [[0.0, 0.0], [0.0, 1.0]])


def test_a_truncated_answer_gets_its_score_on_the_last_token():
    ours = token_rewards(jnp.array([3.0]), jnp.zeros((1, 3)), jnp.ones((1, 3), bool), kl_coef=0.1)
    np.testing.assert_array_equal(ours, [[0.0, 0.0, 3.0]])


def test_scores_belong_to_their_rows_also_when_b_equals_t():
    mask = jnp.ones((3, 3), bool)
    ours = token_rewards(jnp.array([1.0, 2.0, 4.0]), jnp.zeros((3, 3)), mask, kl_coef=0.0)
    np.testing.assert_array_equal(ours, [[0, 0, 1], [0, 0, 2], [0, 0, 4]])


def test_fractional_scores_are_not_rounded_and_integer_scores_are_refused():
    scores = jnp.array([0.7, -1.9])
    ours = token_rewards(scores, jnp.zeros((2, 1)), jnp.ones((2, 1), bool), kl_coef=0.1)
    np.testing.assert_array_equal(ours[:, 0], scores)
    with pytest.raises(Exception, match="seq_scores"):
        token_rewards(jnp.array([1, 2]), jnp.zeros((2, 1)), jnp.ones((2, 1), bool), kl_coef=0.1)


def test_a_higher_coefficient_penalises_a_positive_k1_more():
    mask = jnp.ones((1, 2), bool)
    weak, strong = (
        token_rewards(jnp.zeros(1), jnp.array([[0.5, 1.0]]), mask, kl_coef=c) for c in (0.1, jnp.asarray(0.4))
    )
    np.testing.assert_allclose(weak, [[-0.05, -0.1]], rtol=1e-6)
    np.testing.assert_allclose(strong, [[-0.2, -0.4]], rtol=1e-6)


def test_masked_log_ratios_reach_no_gradient_not_even_that_of_the_coefficient():
    mask = jnp.array([[True, False]])
    gradient = jax.grad(
        lambda beta: jnp.sum(token_rewards(jnp.ones(1), jnp.array([[0.5, jnp.nan]]), mask, kl_coef=beta))
    )(jnp.asarray(0.1))
    assert gradient == -0.5


def test_running_moments_are_those_of_all_scores_and_a_nan_of_nobody_stays_out():
    dtype = jnp.ones(()).dtype
    first = merged_moments(first_moments(dtype), jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True]))
    both = merged_moments(first, jnp.array([5.0, 7.0]), jnp.array([True, True]))
    # 1, 3, 5, 7: mean 4, squared distances 9 + 1 + 1 + 9.
    assert [float(x) for x in both] == [4.0, 4.0, 20.0]
    assert all(x.dtype == dtype for x in both)
    nothing_new = merged_moments(both, jnp.full(2, jnp.nan), jnp.zeros(2, bool))
    assert [float(x) for x in nothing_new] == [4.0, 4.0, 20.0]


def test_scores_are_divided_by_the_deviation_of_the_population():
    moments = merged_moments(first_moments(jnp.ones(()).dtype), jnp.array([1.0, 3.0]), jnp.ones(2, bool))
    np.testing.assert_allclose(normalised_scores(jnp.array([1.0, 3.0, 6.0]), moments), [-1.0, 1.0, 4.0], rtol=1e-6)


def test_moments_of_a_million_scores_keep_their_digits():
    """One batch a million times as long as the other: a sum of squares would have lost the small one's spread."""
    moments = first_moments(jnp.ones(()).dtype)._replace(count=jnp.asarray(1e6), mean=jnp.asarray(1e4))
    count, mean, m2 = merged_moments(moments, jnp.array([1e4 - 1.0, 1e4 + 1.0]), jnp.ones(2, bool))
    assert (float(count), float(mean), float(m2)) == (1e6 + 2, 1e4, 2.0)


def test_penalties_by_length():
    lengths = jnp.array([0.0, 1.0, 4.0, 6.0, 8.0, 9.0])
    short = too_short_penalty(lengths, min_tokens=4, penalty=2.0)
    np.testing.assert_array_equal(short, [2.0, 1.5, 0.0, 0.0, 0.0, 0.0])
    long = too_long_penalty(lengths, soft_max_tokens=4, max_tokens=8, penalty=2.0)
    np.testing.assert_array_equal(long, [0.0, 0.0, 0.0, 1.0, 2.0, 2.0])
    np.testing.assert_array_equal(too_short_penalty(lengths, min_tokens=0, penalty=2.0), 0.0)


def test_only_a_truncated_answer_pays_for_its_missing_eos():
    ours = missing_eos_penalty(jnp.array([True, False]), penalty=0.5)
    np.testing.assert_array_equal(ours, [0.0, 0.5])
    assert ours.dtype == jnp.float32


def test_a_nat_costs_a_long_answer_less_per_token():
    mask = jnp.array([[True, False, False], [True, True, True], [False, False, False]])
    ours = kl_per_token(jnp.full((3, 3), 3.0), mask)
    np.testing.assert_array_equal(ours, [[3, 0, 0], [1, 1, 1], [0, 0, 0]])
