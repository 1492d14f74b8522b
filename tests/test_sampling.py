"""The kept sets of top-k and top-p, and the inverse CDF, against references that sort."""

import itertools

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
TOP_P = [0.0, 0.1, 0.5, 0.9, 0.99]


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


@given(seed=seeds, top_p=st.sampled_from(TOP_P))
def test_the_kept_set_reaches_p_and_loses_it_without_its_least_likely_token(seed, top_p):
    logits = np.round(draw_logits(seed))  # rounded, so that there are ties
    weights = np.asarray(weights_of(logits, temperature=1.0, top_p=top_p, top_k=0)).astype(np.float64)
    for row, kept in zip(logits, weights, strict=True):
        probs, ids = softmax64(row), np.flatnonzero(kept)
        assert np.argmax(probs) in ids
        assert probs[ids].sum() >= top_p - 1e-6
        smallest = probs[ids].min()
        dropped = np.setdiff1d(np.arange(V), ids)
        assert len(dropped) == 0 or probs[dropped].max() < smallest * (1 - 1e-6)  # ties stay together
        without_smallest = probs[ids][probs[ids] > smallest * (1 + 1e-6)].sum()
        assert without_smallest < top_p + 1e-6 or top_p == 0


def test_ties_at_the_edge_of_top_p_stay_together():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]]))
    kept = weights_of(logits, temperature=1.0, top_p=0.5, top_k=0) > 0
    np.testing.assert_array_equal(kept, [[True, True, True, True]])
    kept = weights_of(logits, temperature=1.0, top_p=0.39, top_k=0) > 0
    np.testing.assert_array_equal(kept, [[True, False, False, False]])


@given(seed=seeds)
def test_p_of_zero_keeps_the_most_likely_token_only(seed):
    logits = draw_logits(seed)
    kept = np.asarray(weights_of(logits, temperature=1.0, top_p=0.0, top_k=0)) > 0
    np.testing.assert_array_equal(kept, np.arange(V)[None] == logits.argmax(1)[:, None])


@given(seed=seeds)
def test_p_of_one_and_k_of_zero_cut_nothing(seed):
    logits = draw_logits(seed, scale=10.0)
    weights = weights_of(logits, temperature=0.7, top_p=1.0, top_k=0)
    np.testing.assert_allclose(weights, [softmax64(row, 0.7) for row in logits], rtol=2e-5, atol=1e-38)
    np.testing.assert_array_equal(weights, weights_of(logits, temperature=0.7, top_p=1.0, top_k=V))


@given(seed=seeds)
def test_a_larger_p_never_keeps_fewer_tokens(seed):
    logits = draw_logits(seed)
    kept = [np.asarray(weights_of(logits, temperature=1.0, top_p=p, top_k=0)) > 0 for p in (*TOP_P, 1.0)]
    for smaller, larger in itertools.pairwise(kept):
        assert (larger | ~smaller).all()


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


@given(seed=seeds, zeros=st.floats(0, 0.9))
def test_the_token_is_the_one_whose_interval_holds_the_uniform(seed, zeros):
    rng = np.random.default_rng(seed)
    weights = rng.gamma(0.5, size=(B, V)) * (rng.random((B, V)) > zeros)
    weights[:, 5] += 0.01
    weights = weights.astype(np.float32)
    uniforms = rng.random(B).astype(np.float32)
    tokens = np.asarray(draw_tokens(uniforms, weights))
    for row, u, token in zip(weights.astype(np.float64), uniforms, tokens, strict=True):
        assert row[token] > 0
        below, above = row[:token].sum() / row.sum(), row[: token + 1].sum() / row.sum()
        assert below - 1e-6 <= u <= above + 1e-6


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65])
def test_every_token_of_every_vocabulary_size_has_its_interval(vocab):
    uniforms = ((np.arange(vocab) + 0.5) / vocab).astype(np.float32)
    np.testing.assert_array_equal(draw_tokens(uniforms, np.ones((vocab, vocab), np.float32)), np.arange(vocab))


def test_the_ends_of_the_unit_interval_hit_the_first_and_last_token_of_positive_weight():
    weights = np.zeros((2, V), np.float32)
    weights[:, [3, 9, 17]] = 0.1, 0.5, 0.4
    np.testing.assert_array_equal(draw_tokens(np.array([0.0, LARGEST]), weights), [3, 17])


@pytest.mark.parametrize("kind", ["flat", "steep", "one huge, rest tiny", "sparse"])
def test_a_token_of_weight_zero_is_never_drawn_from_a_real_vocabulary(kind):
    vocab = 151_936
    rng = np.random.default_rng(0)
    weights = {
        "flat": lambda: np.ones(vocab),
        "steep": lambda: np.exp(rng.normal(scale=6.0, size=vocab)),
        "one huge, rest tiny": lambda: np.where(np.arange(vocab) == 77_777, 1.0, 1e-9),
        "sparse": lambda: (rng.random(vocab) < 1e-4).astype(float),
    }[kind]()
    weights[rng.random(vocab) < 0.5] = 0.0
    weights[[0, 1, 511, 512, vocab - 1, vocab - 2]] = 0.0
    weights = (weights / weights.sum()).astype(np.float32)
    uniforms = np.concatenate([[0.0, 2**-24, 0.5, LARGEST, 1 - 2**-23], rng.random(11)]).astype(np.float32)
    tokens = np.concatenate([draw_tokens(part, np.broadcast_to(weights, (4, vocab))) for part in np.split(uniforms, 4)])
    assert tokens.max() < vocab
    assert (weights[tokens] > 0).all()
    exact = weights.astype(np.float64)
    upper = np.cumsum(exact) / exact.sum()
    for u, token in zip(uniforms.astype(np.float64), tokens, strict=True):
        assert upper[token] - exact[token] / exact.sum() - 1e-6 <= u <= upper[token] + 1e-6


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_logits_that_are_nan_still_give_an_id_inside_of_the_vocabulary(top_p):
    tokens = sample(jnp.full((B,), 0.5), jnp.full((B, V), jnp.nan), temperature=1.0, top_p=top_p)
    assert ((tokens >= 0) & (tokens < V)).all()


def test_frequencies_follow_the_probabilities():
    probs = np.array([0.4, 0.25, 0.0, 0.15, 0.1, 0.06, 0.04])
    n = 20_000
    uniforms = np.random.default_rng(1).random(n).astype(np.float32)
    logits = np.broadcast_to(np.log(np.maximum(probs, 1e-45)), (n, 7)).astype(np.float32)
    tokens = np.asarray(sample(uniforms, logits, temperature=1.0))
    counts, kept = np.bincount(tokens, minlength=7), probs > 0
    assert counts[2] == 0
    chi_square = ((counts[kept] - n * probs[kept]) ** 2 / (n * probs[kept])).sum()
    assert chi_square < 20.5  # 0.1% point for 5 degrees of freedom


@given(seed=seeds)
def test_a_row_depends_on_its_own_uniform_and_logits_only(seed):
    rng = np.random.default_rng(seed)
    logits, uniforms = draw_logits(seed), rng.random(B).astype(np.float32)
    arguments = {"temperature": 0.8, "top_p": 0.95, "top_k": 12}
    whole = np.asarray(sample(uniforms, logits, **arguments))
    other = logits.copy()
    other[1:] = rng.normal(scale=9.0, size=(B - 1, V))
    first = sample(uniforms, other, **arguments)
    assert first[0] == whole[0]
    order = rng.permutation(B)
    permuted = sample(uniforms[order], logits[order], **arguments)
    np.testing.assert_array_equal(permuted, whole[order])
    alone = sample(uniforms[2:], logits[2:], **arguments)
    assert alone[0] == whole[2]


def test_bfloat16_logits_are_sampled_in_float32():
    logits = jnp.asarray(draw_logits(0), jnp.bfloat16)
    weights = truncated_weights(logits, temperature=1.0, top_p=0.9, top_k=0)
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(
        weights, truncated_weights(logits.astype(jnp.float32), temperature=1.0, top_p=0.9, top_k=0)
    )
