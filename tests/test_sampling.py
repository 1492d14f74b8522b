"""The kept sets of top-k and top-p, and the inverse CDF, against references that sort.

What holds for any input, in both stacks, is in `parity.properties`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.ops.sampling import inverse_cdf, sample_tokens, truncated_weights

B, V = 3, 23
seeds = st.integers(0, 2**31)
OPTIONS = ("temperature", "top_p", "top_k")
weights_of = jax.jit(truncated_weights, static_argnames=OPTIONS)
sample = jax.jit(sample_tokens, static_argnames=OPTIONS)


def draw_logits(seed, scale=2.0):
    return np.random.default_rng(seed).normal(scale=scale, size=(B, V)).astype(np.float32)


def softmax64(row, temperature=1.0):
    scaled = np.asarray(row, np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max())
    return exponentials / exponentials.sum()


def sorted_keep(row, temperature, top_p, top_k):
    """Ids kept: temperature, the k likeliest, then the shortest prefix whose renormalised mass reaches p."""
    probs = softmax64(row, temperature)
    order = sorted(range(len(probs)), key=lambda v: -probs[v])
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        total, mass, n = sum(probs[v] for v in order), 0.0, 0
        while n == 0 or mass < top_p * total:
            mass, n = mass + probs[order[n]], n + 1
        order = order[:n]
    return set(order)


@given(seed=seeds, cuts=st.sampled_from([(0.7, 0.9, 5), (1.0, 0.5, 0), (1.0, 0.6, 2), (1.0, 1.0, 5), (1.0, 0.0, 3)]))
def test_the_kept_tokens_are_those_of_sorting_top_k_then_top_p(seed, cuts):
    temperature, top_p, top_k = cuts
    logits = draw_logits(seed)
    weights = np.asarray(weights_of(logits, temperature=temperature, top_p=top_p, top_k=top_k))
    for row, kept in zip(logits, weights, strict=True):
        expected = sorted_keep(row, temperature, top_p, top_k)
        assert set(np.flatnonzero(kept)) == expected
        probs = softmax64(row, temperature)
        np.testing.assert_allclose(kept, [probs[v] if v in expected else 0 for v in range(V)], rtol=1e-5)


def test_ties_at_the_edge_of_top_p_stay_together():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]]))
    kept = weights_of(logits, temperature=1.0, top_p=0.5, top_k=0) > 0
    np.testing.assert_array_equal(kept, [[True, True, True, True]])
    kept = weights_of(logits, temperature=1.0, top_p=0.39, top_k=0) > 0
    np.testing.assert_array_equal(kept, [[True, False, False, False]])


@pytest.mark.parametrize("top_k", [1, 2, 5, V - 1, V, V + 10])
def test_top_k_keeps_exactly_k_distinct_tokens(top_k):
    kept = np.asarray(weights_of(draw_logits(0), temperature=1.0, top_p=1.0, top_k=top_k)) > 0
    np.testing.assert_array_equal(kept.sum(1), [min(top_k, V)] * B)


def test_the_cuts_are_exact_between_probabilities_that_differ_in_the_last_bits():
    logits = (2e-6 * np.random.default_rng(0).permutation(V)).astype(np.float32)[None]
    for options in ({"top_p": 1.0, "top_k": 3}, {"top_p": 2.5 / V, "top_k": 0}):
        kept = np.asarray(weights_of(logits, temperature=1.0, **options))[0] > 0
        assert set(np.flatnonzero(kept)) == set(np.argsort(logits[0])[-3:])


def test_top_p_is_taken_of_what_top_k_left_renormalised():
    # After top-k 2 the first token has 0.5 / 0.8 = 0.625 of the mass and is enough for p = 0.6; of the whole it is not.
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    kept = weights_of(logits, temperature=1.0, top_p=0.6, top_k=2) > 0
    np.testing.assert_array_equal(kept, [[True, False, False]])


def test_the_temperature_comes_before_the_cuts():
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))  # at temperature 1/2: 0.78, 0.20, 0.02
    assert np.asarray(weights_of(logits, temperature=0.5, top_p=0.7, top_k=0) > 0).tolist() == [[True, False, False]]
    assert np.asarray(weights_of(logits, temperature=1.0, top_p=0.7, top_k=0) > 0).tolist() == [[True, True, False]]


def test_the_sum_of_the_weights_is_the_kept_mass():
    weights = weights_of(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), temperature=1.0, top_p=0.75, top_k=0)
    np.testing.assert_allclose(weights.sum(), 0.8, rtol=1e-6)


def test_banned_tokens_are_never_kept_nor_counted():
    logits = jnp.array([[0.0, -jnp.inf, 0.0, -jnp.inf]])
    for top_p, top_k in ((1.0, 0), (0.99, 0), (1.0, 3), (0.5, 4)):
        weights = weights_of(logits, temperature=1.0, top_p=top_p, top_k=top_k)
        np.testing.assert_allclose(weights, [[0.5, 0.0, 0.5, 0.0]], rtol=1e-6)


# ---------------------------------------------------------------------------- inverse CDF

draw_tokens = jax.jit(inverse_cdf)
LARGEST = np.float32(1 - 2**-24)


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65])
def test_every_token_of_every_vocabulary_size_has_its_interval(vocab):
    uniforms = ((np.arange(vocab) + 0.5) / vocab).astype(np.float32)
    np.testing.assert_array_equal(draw_tokens(uniforms, np.ones((vocab, vocab), np.float32)), np.arange(vocab))


def test_the_ends_of_the_unit_interval_hit_the_first_and_last_token_of_positive_weight():
    weights = np.zeros((2, V), np.float32)
    weights[:, [3, 9, 17]] = 0.1, 0.5, 0.4
    np.testing.assert_array_equal(draw_tokens(np.array([0.0, LARGEST]), weights), [3, 17])


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_logits_that_are_nan_still_give_an_id_inside_of_the_vocabulary(top_p):
    tokens = sample(jnp.full((B,), 0.5), jnp.full((B, V), jnp.nan), temperature=1.0, top_p=top_p)
    assert ((tokens >= 0) & (tokens < V)).all()


def test_bfloat16_logits_are_sampled_in_float32():
    logits = jnp.asarray(draw_logits(0), jnp.bfloat16)
    weights = truncated_weights(logits, temperature=1.0, top_p=0.9, top_k=0)
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(
        weights, truncated_weights(logits.astype(jnp.float32), temperature=1.0, top_p=0.9, top_k=0)
    )
