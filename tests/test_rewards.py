"""Score on the last response token, penalty on all of them, nothing anywhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.ops.rewards import exact_kl_token_rewards, token_rewards

B, T = 4, 5
seeds = st.integers(0, 2**31)


def draw(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, T + 1, B)
    mask = np.arange(T)[None] < lengths[:, None]
    return rng.normal(size=B).astype(np.float32), rng.normal(size=(B, T)).astype(np.float32), mask


@given(seed=seeds, kl_coef=st.sampled_from([0.0, 0.05, 2.0]))
def test_rewards_are_the_penalty_and_the_score_on_the_last_response_token(seed, kl_coef):
    scores, token_k1, mask = draw(seed)
    expected = np.zeros((B, T))
    for b in range(B):
        last = None
        for t in range(T):
            if mask[b, t]:
                expected[b, t] = -kl_coef * float(token_k1[b, t])
                last = t
        if last is not None:
            expected[b, last] += float(scores[b])
    dirty = jnp.asarray(np.where(mask, token_k1, np.float32("nan")))
    ours = np.asarray(token_rewards(jnp.asarray(scores), dirty, jnp.asarray(mask), kl_coef=kl_coef))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
    assert not ours[~mask].any()


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
    ours = token_rewards(jnp.array([0.7, -1.9]), jnp.zeros((2, 1)), jnp.ones((2, 1), bool), kl_coef=0.1)
    np.testing.assert_array_equal(ours[:, 0], np.float32([0.7, -1.9]))
    with pytest.raises(Exception, match="seq_scores"):
        token_rewards(jnp.array([1, 2]), jnp.zeros((2, 1)), jnp.ones((2, 1), bool), kl_coef=0.1)


def test_a_higher_coefficient_penalises_a_positive_k1_more():
    mask = jnp.ones((1, 2), bool)
    weak, strong = (
        token_rewards(jnp.zeros(1), jnp.array([[0.5, 1.0]]), mask, kl_coef=c) for c in (0.1, jnp.float32(0.4))
    )
    np.testing.assert_allclose(weak, [[-0.05, -0.1]], rtol=1e-6)
    np.testing.assert_allclose(strong, [[-0.2, -0.4]], rtol=1e-6)


def test_masked_log_ratios_reach_no_gradient_not_even_that_of_the_coefficient():
    mask = jnp.array([[True, False]])
    gradient = jax.grad(
        lambda beta: jnp.sum(token_rewards(jnp.ones(1), jnp.array([[0.5, jnp.nan]]), mask, kl_coef=beta))
    )(jnp.float32(0.1))
    assert gradient == -0.5


# ---------------------------------------------------------------------------- the exact form


@given(seed=seeds, kl_coef=st.sampled_from([0.05, 2.0]))
def test_exact_kl_rewards_still_to_come_are_the_score_minus_the_kl_of_the_later_tokens(seed, kl_coef):
    scores, token_kl, mask = draw(seed)
    dirty = jnp.asarray(np.where(mask, token_kl, np.float32("nan")))
    ours = np.asarray(exact_kl_token_rewards(jnp.asarray(scores), dirty, jnp.asarray(mask), kl_coef=kl_coef))
    for b in range(B):
        length = int(mask[b].sum())
        for t in range(length):
            later = float(token_kl[b, t + 1 : length].astype(np.float64).sum())
            np.testing.assert_allclose(ours[b, t:].sum(), scores[b] - kl_coef * later, rtol=1e-5, atol=1e-5)
    assert not ours[~mask].any()
