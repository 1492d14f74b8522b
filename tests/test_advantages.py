"""Advantages: which answers were better than their batch.

What holds for any input, in both stacks, is in `parity.properties`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.ops.advantages import (
    batch_mean_advantages,
    gae_advantages,
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
