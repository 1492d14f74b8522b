"""Advantages: which answers were better than their batch.

What holds for any input, in both stacks, is in `parity.properties`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.ops.advantages import (
    batch_mean_advantages,
    explained_variance,
    gae_advantages,
    group_leave_one_out_advantages,
    group_mean_advantages,
    group_normalised_advantages,
    importance_weights,
    leave_one_out_advantages,
    whiten,
)

gae = jax.jit(gae_advantages, static_argnames=("discount", "gae_lambda"))


def test_when_b_equals_t_advantages_vary_along_answers_not_along_tokens():
    rewards = jnp.diag(jnp.array([1.0, 2.0, 6.0]))
    ours = batch_mean_advantages(rewards, jnp.ones((3, 3), bool))
    np.testing.assert_allclose(ours, np.repeat([[-2.0], [-1.0], [3.0]], 3, axis=1), rtol=1e-6)


def test_rows_of_padding_are_left_out_of_the_mean():
    rewards = jnp.array([[1.0], [3.0], [1000.0]])
    ours = batch_mean_advantages(rewards, jnp.array([[True], [True], [False]]))
    np.testing.assert_array_equal(ours, [[-1.0], [1.0], [0.0]])


def test_the_epsilon_is_inside_of_the_square_root():
    # var = 1e-8: inside gives x / sqrt(2e-8), outside would give x / (1e-4 + 1e-8), larger by sqrt(2).
    ours = whiten(jnp.array([-1e-4, 1e-4]), jnp.ones(2, bool))
    np.testing.assert_allclose(ours, [-(0.5**0.5), 0.5**0.5], rtol=1e-4)


def test_lambda_zero_is_the_td_error_and_lambda_one_the_reward_to_go_minus_the_value():
    rewards, values = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0.5, 0.25, 8.0]])
    mask = jnp.ones((1, 3), bool)
    td, _ = gae(rewards, values, mask, discount=0.5, gae_lambda=0.0)
    np.testing.assert_array_equal(td, [[1 + 0.125 - 0.5, 2 + 4 - 0.25, 4 - 8]])
    to_go, returns = gae(rewards, values, mask, discount=0.5, gae_lambda=1.0)
    np.testing.assert_array_equal(returns, [[1 + 1 + 1, 2 + 2, 4]])
    np.testing.assert_array_equal(to_go, [[3 - 0.5, 4 - 0.25, 4 - 8]])


def test_a_value_behind_a_truncated_answer_is_discounted_once_per_token():
    rewards, values = jnp.array([[1.0, 2.0], [1.0, 0.0]]), jnp.array([[0.5, 0.25], [0.5, 99.0]])
    mask = jnp.array([[True, True], [True, False]])
    ours, returns = gae(rewards, values, mask, discount=0.5, gae_lambda=1.0, bootstrap_values=jnp.array([8.0, 0.0]))
    # 2 + 8/2 = 6 is the return of the last token, 1 + 6/2 = 4 that of the first; the second answer ended.
    np.testing.assert_array_equal(returns, [[4, 6], [1, 0]])
    np.testing.assert_array_equal(ours, [[3.5, 5.75], [0.5, 0]])


def test_answers_to_one_prompt_are_neighbours():
    rewards = jnp.array([[1.0], [3.0], [10.0], [50.0]])
    mask = jnp.ones((4, 1), bool)
    np.testing.assert_array_equal(
        group_mean_advantages(rewards, mask, answers_per_prompt=2)[:, 0], [-1.0, 1.0, -20.0, 20.0]
    )
    np.testing.assert_array_equal(
        group_leave_one_out_advantages(rewards, mask, answers_per_prompt=2)[:, 0], [-2.0, 2.0, -40.0, 40.0]
    )
    normalised = group_normalised_advantages(rewards, mask, answers_per_prompt=2)
    np.testing.assert_allclose(normalised[:, 0], [-1.0, 1.0, -1.0, 1.0], rtol=1e-6)


def test_a_batch_that_groups_do_not_fill_is_refused():
    with pytest.raises(TypeError):
        group_mean_advantages(jnp.ones((5, 2)), jnp.ones((5, 2), bool), answers_per_prompt=2)


def test_the_mean_of_the_others_leaves_out_rows_of_padding():
    rewards = jnp.array([[1.0], [3.0], [8.0], [1000.0]])
    ours = leave_one_out_advantages(rewards, jnp.array([[True], [True], [True], [False]]))
    np.testing.assert_allclose(ours[:, 0], [1 - 5.5, 3 - 4.5, 8 - 2, 0.0], rtol=1e-6)


def test_a_token_that_behaviour_thought_impossible_weighs_the_cap():
    old, behaviour = jnp.array([[-1.0, -1.0, -2.0]]), jnp.array([[-500.0, -jnp.inf, -1.0]])
    ours = importance_weights(old, behaviour, jnp.ones((1, 3), bool), cap=2.0)
    np.testing.assert_allclose(ours, [[2.0, 2.0, np.exp(-1.0)]], rtol=1e-6)


def test_a_critic_that_is_worse_than_none_explains_less_than_nothing():
    returns = jnp.array([[1.0, -1.0]])
    assert explained_variance(-returns, returns, jnp.ones((1, 2), bool)) == 1 - 4
