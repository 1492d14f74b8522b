"""Score on the last response token, penalty on all of them, nothing anywhere else.

What holds for any input, in both stacks, is in `parity.properties`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.ops.rewards import token_rewards


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
