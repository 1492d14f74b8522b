"""Log-probabilities: of the full softmax, at the temperature, in float32 at least.

What holds for any input, in both stacks, is in `parity.properties`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.ops.logprobs import entropy, log_distribution, token_logprobs

ROWS, VOCAB = 4, 7


def draw_logits(seed, scale=3.0):
    return np.random.default_rng(seed).normal(scale=scale, size=(ROWS, VOCAB)).astype(np.float32)


def numpy_log_softmax(row, temperature):
    scaled = [float(z) / temperature for z in row]
    top = max(scaled)
    log_sum = top + math.log(sum(math.exp(z - top) for z in scaled))
    return [z - log_sum for z in scaled]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_are_widened_before_anything_is_computed(dtype):
    logits = jnp.asarray(draw_logits(0, 8.0), dtype)
    tokens = jnp.zeros(ROWS, jnp.int32)
    ours = token_logprobs(logits, tokens, temperature=0.7)
    assert ours.dtype == jnp.float32
    expected = [numpy_log_softmax(row, 0.7)[0] for row in np.asarray(logits.astype(jnp.float32))]
    np.testing.assert_allclose(ours, expected, rtol=3e-6, atol=3e-6)


def test_float64_logits_stay_float64():
    with jax.enable_x64(True):
        logits = jnp.asarray(draw_logits(3).astype(np.float64))
        ours = log_distribution(logits, temperature=0.7)
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, [numpy_log_softmax(row, 0.7) for row in np.asarray(logits)], atol=1e-14)


def test_ranks_are_those_of_the_tokens_also_in_sequences():
    logits = np.stack([draw_logits(1), draw_logits(2)])
    tokens = np.array([[0, 1, 2, 3], [6, 5, 4, 3]], np.int32)
    ours = token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), temperature=1.0)
    expected = [[numpy_log_softmax(logits[b, t], 1.0)[tokens[b, t]] for t in range(4)] for b in range(2)]
    np.testing.assert_allclose(ours, expected, rtol=3e-6, atol=3e-6)


def test_extreme_logits_give_finite_log_probabilities_and_gradients():
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    tokens = jnp.array([1, 2], jnp.int32)
    value, gradient = jax.value_and_grad(lambda z: token_logprobs(z, tokens, temperature=1.0).sum())(logits)
    np.testing.assert_allclose(value, -2e4 - math.log(3), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-1.0, 1.0, 0.0], [-1 / 3, -1 / 3, 2 / 3]], atol=1e-6)


def test_a_banned_token_adds_nothing_to_the_entropy_and_has_a_zero_gradient():
    logits = jnp.array([[0.3, -jnp.inf, -1.2, -jnp.inf]])
    value, gradient = jax.value_and_grad(lambda z: entropy(z, temperature=1.0).sum())(logits)
    np.testing.assert_allclose(value, entropy(logits[:, ::2], temperature=1.0)[0], rtol=1e-6)
    kept = jax.grad(lambda z: entropy(z, temperature=1.0).sum())(logits[:, ::2])
    np.testing.assert_allclose(gradient, [[kept[0, 0], 0.0, kept[0, 1], 0.0]], atol=1e-7)
    assert abs(kept[0, 0]) > 0.01


def test_entropy_is_log_v_when_uniform_and_zero_when_certain():
    np.testing.assert_allclose(entropy(jnp.zeros((1, 50)), temperature=1.0), math.log(50), rtol=1e-6)
    assert entropy(jnp.array([[1e4, 0.0, 0.0]]), temperature=1.0)[0] == 0
