"""Divergences: exact, never negative, and right in the corners where float32 gives out."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.ops import kl

ROWS, VOCAB = 4, 7
seeds = st.integers(0, 2**31)
scales = st.sampled_from([0.1, 1.0, 5.0, 40.0])
exact_kl = jax.jit(kl.exact_token_kl, static_argnames="temperature")


def draw_pair(seed, scale=2.0, shape=(ROWS, VOCAB)):
    rng = np.random.default_rng(seed)
    return rng.normal(scale=scale, size=shape).astype(np.float32), rng.normal(scale=scale, size=shape).astype(
        np.float32
    )


def log_softmax64(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def kl64(logits, ref_logits, temperature=1.0):
    """The definition, token by token, in float64."""
    log_p, log_q = log_softmax64(logits, temperature), log_softmax64(ref_logits, temperature)
    total = np.zeros(log_p.shape[:-1])
    for row in np.ndindex(*total.shape):
        for v in range(log_p.shape[-1]):
            total[row] += math.exp(log_p[row][v]) * (log_p[row][v] - log_q[row][v])
    return total


@given(seed=seeds, scale=scales, temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_the_exact_kl_is_its_definition_at_the_temperature_of_both(seed, scale, temperature):
    logits, ref_logits = draw_pair(seed, scale)
    ours = exact_kl(jnp.asarray(logits), jnp.asarray(ref_logits), temperature=temperature)
    np.testing.assert_allclose(ours, kl64(logits, ref_logits, temperature), rtol=2e-5, atol=1e-6)


@given(seed=seeds, exponent=st.integers(-9, -2))
def test_the_kl_of_nearly_equal_rows_is_never_negative_and_keeps_its_digits(seed, exponent):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(64, 512)).astype(np.float32)
    ref_logits = (logits + 10.0**exponent * rng.normal(size=logits.shape)).astype(np.float32)
    ours = np.asarray(exact_kl(jnp.asarray(logits), jnp.asarray(ref_logits), temperature=1.0))
    assert (ours >= 0).all()
    # Rounding of two float32 log-softmaxes moves d by about 1e-6, hence the KL by about 1e-6 * sqrt(KL).
    expected = kl64_fast(logits, ref_logits)
    np.testing.assert_array_less(np.abs(ours - expected), 1e-5 * expected + 4e-6 * np.sqrt(expected) + 1e-12)


def kl64_fast(logits, ref_logits):
    """The definition with Σ (ρ − π) = 0 added, which float64 too needs for rows this close."""
    log_p, log_q = log_softmax64(logits), log_softmax64(ref_logits)
    return (np.exp(log_p) * (np.expm1(log_q - log_p) + log_p - log_q)).sum(-1)


@given(seed=seeds, scale=scales)
def test_the_kl_of_equal_rows_is_exactly_zero_and_so_is_its_gradient(seed, scale):
    logits = jnp.asarray(draw_pair(seed, scale)[0])
    value, gradient = jax.value_and_grad(lambda z: exact_kl(z, logits, temperature=0.7).sum())(logits)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((ROWS, VOCAB)))


@given(seed=seeds, shift=st.sampled_from([-512.0, 3.0, 4096.0]))
def test_constants_per_row_and_the_order_of_the_vocabulary_do_not_matter(seed, shift):
    logits, ref_logits = (np.round(x * 64) / 64 for x in draw_pair(seed))
    base = exact_kl(jnp.asarray(logits), jnp.asarray(ref_logits), temperature=1.0)
    shifted = exact_kl(jnp.asarray(logits + np.float32(shift)), jnp.asarray(ref_logits), temperature=1.0)
    np.testing.assert_allclose(shifted, base, rtol=1e-5, atol=1e-6)
    order = np.random.default_rng(seed).permutation(VOCAB)
    permuted = exact_kl(jnp.asarray(logits[:, order]), jnp.asarray(ref_logits[:, order]), temperature=1.0)
    np.testing.assert_allclose(permuted, base, rtol=1e-5, atol=1e-6)


def test_the_policy_comes_first():
    # KL(p || q) with p = (3/4, 1/4), q = (1/2, 1/2); the other order gives 0.1438.
    p, q = jnp.log(jnp.array([[0.75, 0.25]])), jnp.zeros((1, 2))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    np.testing.assert_allclose(kl.exact_token_kl(p, q, temperature=1.0), [expected], rtol=1e-6)


@given(seed=seeds, scale=st.sampled_from([1e2, 1e3, 1e4]))
def test_logits_up_to_ten_thousand_give_finite_values_and_gradients(seed, scale):
    rng = np.random.default_rng(seed)
    logits, ref_logits = rng.uniform(-scale, scale, (2, ROWS, VOCAB)).astype(np.float32)
    value, gradients = jax.value_and_grad(lambda z, r: exact_kl(z, r, temperature=1.0).sum(), argnums=(0, 1))(
        jnp.asarray(logits), jnp.asarray(ref_logits)
    )
    np.testing.assert_allclose(value, kl64(logits, ref_logits).sum(), rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@given(seed=seeds, scale=st.sampled_from([0.01, 1.0, 6.0]))
def test_the_gradient_is_p_times_the_excess_of_the_log_ratio(seed, scale):
    logits, ref_logits = draw_pair(seed, scale)
    gradient = jax.grad(lambda z: exact_kl(z, jnp.asarray(ref_logits), temperature=1.0).sum())(jnp.asarray(logits))
    log_p, log_q = log_softmax64(logits), log_softmax64(ref_logits)
    excess = (log_p - log_q) - (np.exp(log_p) * (log_p - log_q)).sum(-1, keepdims=True)
    roundings = 5e-7 * (1 + np.abs(log_p - log_q).max())
    np.testing.assert_allclose(gradient, np.exp(log_p) * excess, rtol=1e-4, atol=roundings)


FLOOR = float(np.finfo(np.float32).min)


@pytest.mark.parametrize("floor", [FLOOR, -math.inf])
def test_a_token_impossible_for_both_adds_nothing_to_value_or_gradient(floor):
    logits, ref_logits = (jnp.asarray(x) for x in draw_pair(5))
    banned = (jnp.arange(VOCAB) == 2)[None]
    floor = jnp.float32(floor)

    def total(z, r):
        return exact_kl(jnp.where(banned, floor, z), jnp.where(banned, floor, r), temperature=1.0).sum()

    keep = np.arange(VOCAB) != 2
    value, gradient = jax.value_and_grad(total)(logits, ref_logits)
    np.testing.assert_allclose(value, kl64(logits[:, keep], ref_logits[:, keep]).sum(), rtol=1e-5)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[:, 2].any()


@pytest.mark.parametrize("floor", [FLOOR, -math.inf])
def test_a_token_impossible_for_the_policy_alone_leaves_the_kl_finite(floor):
    logits, ref_logits = (x.astype(np.float64) for x in draw_pair(6))
    keep = np.arange(VOCAB) != 2
    ours, gradient = jax.value_and_grad(
        lambda z: exact_kl(z, jnp.asarray(ref_logits, jnp.float32), temperature=1.0).sum()
    )(jnp.asarray(np.where(keep, logits, floor), jnp.float32))
    log_p, log_q = log_softmax64(logits[:, keep]), log_softmax64(ref_logits)[:, keep]
    np.testing.assert_allclose(ours, (np.exp(log_p) * (log_p - log_q)).sum(), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_a_token_impossible_for_the_reference_alone_makes_the_kl_infinite_or_huge_but_never_nan():
    logits, ref_logits = draw_pair(7)
    ref_logits[:, 2] = -np.inf
    assert (np.asarray(exact_kl(jnp.asarray(logits), jnp.asarray(ref_logits), temperature=1.0)) == np.inf).all()
    ref_logits[:, 2] = FLOOR
    value = np.asarray(exact_kl(jnp.asarray(logits), jnp.asarray(ref_logits), temperature=1.0))
    assert (value > 1e30).all()


def test_half_precision_logits_are_widened_first():
    logits, ref_logits = (jnp.asarray(x, jnp.bfloat16) for x in draw_pair(8))
    ours = kl.exact_token_kl(logits, ref_logits, temperature=1.0)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(
        ours, kl64(np.asarray(logits.astype(jnp.float32)), np.asarray(ref_logits.astype(jnp.float32))), rtol=2e-5
    )


# ---------------------------------------------------------------------------- estimators


@given(seed=seeds)
def test_the_estimators_are_their_formulas(seed):
    logprobs, ref_logprobs = draw_pair(seed)
    d = logprobs.astype(np.float64) - ref_logprobs.astype(np.float64)
    a, b = jnp.asarray(logprobs), jnp.asarray(ref_logprobs)
    np.testing.assert_allclose(kl.k1(a, b), d, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kl.k2(a, b), d**2 / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kl.k3(a, b), np.exp(-d) - 1 + d, rtol=1e-5, atol=1e-6)


@given(seed=seeds, exponent=st.integers(-12, 0))
def test_k3_is_never_negative_also_next_to_zero(seed, exponent):
    rng = np.random.default_rng(seed)
    ref_logprobs = -np.abs(rng.normal(size=4096)).astype(np.float32)
    logprobs = (ref_logprobs + 10.0**exponent * rng.normal(size=4096)).astype(np.float32)
    ours = np.asarray(kl.k3(jnp.asarray(logprobs), jnp.asarray(ref_logprobs)))
    assert (ours >= 0).all()
    d = logprobs.astype(np.float64) - ref_logprobs.astype(np.float64)
    # expm1 is good to some roundings of d; exp(-d) - 1 + d instead errs by 1e-7 whatever d is.
    np.testing.assert_array_less(np.abs(ours - (np.expm1(-d) + d)), 1e-6 * np.abs(d) + 1e-5 * d**2 + 1e-30)


@given(seed=seeds)
def test_the_expectations_of_k1_and_k3_under_the_policy_are_the_exact_kl(seed):
    logits, ref_logits = draw_pair(seed)
    with jax.enable_x64(True):
        log_p, log_q = (jnp.asarray(log_softmax64(x)) for x in (logits, ref_logits))
        exact = kl.exact_token_kl(log_p, log_q, temperature=1.0)
        for estimator in (kl.k1, kl.k3):
            np.testing.assert_allclose((jnp.exp(log_p) * estimator(log_p, log_q)).sum(-1), exact, atol=1e-13)
        # and k2's is not: the name "exact" means something
        assert (np.abs((jnp.exp(log_p) * kl.k2(log_p, log_q)).sum(-1) - exact) > 1e-6).any()


def test_the_kl_of_a_sequence_is_the_sum_of_its_expected_token_kls_by_enumeration():
    rng = np.random.default_rng(0)
    vocab, length = 3, 3
    prefixes = [p for n in range(length) for p in itertools.product(range(vocab), repeat=n)]
    logits = {p: rng.normal(size=(1, vocab)) for p in prefixes}
    ref_logits = {p: rng.normal(size=(1, vocab)) for p in prefixes}
    with jax.enable_x64(True):
        token_kl = {
            p: float(kl.exact_token_kl(jnp.asarray(logits[p]), jnp.asarray(ref_logits[p]), temperature=1.0)[0])
            for p in prefixes
        }
    sequence_kl = expected_sum = 0.0
    for sequence in itertools.product(range(vocab), repeat=length):
        log_p = sum(log_softmax64(logits[sequence[:t]])[0, sequence[t]] for t in range(length))
        log_q = sum(log_softmax64(ref_logits[sequence[:t]])[0, sequence[t]] for t in range(length))
        sequence_kl += math.exp(log_p) * (log_p - log_q)
        expected_sum += math.exp(log_p) * sum(token_kl[sequence[:t]] for t in range(length))
    np.testing.assert_allclose(expected_sum, sequence_kl, atol=1e-13)


# ---------------------------------------------------------------------------- future KL


@given(seed=seeds)
def test_the_future_kl_is_the_sum_over_later_response_tokens_only(seed):
    rng = np.random.default_rng(seed)
    token_kl = rng.gamma(1.0, size=(3, 6)).astype(np.float32)
    lengths = rng.integers(0, 7, 3)
    mask = np.arange(6)[None] < lengths[:, None]
    expected = np.zeros((3, 6))
    for b in range(3):
        for t in range(lengths[b]):
            expected[b, t] = sum(float(token_kl[b, later]) for later in range(t + 1, lengths[b]))
    poisoned = jnp.asarray(np.where(mask, token_kl, np.float32("nan")))
    ours = kl.future_kl(poisoned, jnp.asarray(mask))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert not np.asarray(ours)[~mask].any()


def test_the_last_token_has_no_future_exactly():
    token_kl = jnp.array([[1e8, 0.1, 0.3], [0.7, 1e-8, 1e8]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    future = np.asarray(kl.future_kl(token_kl, mask))
    assert future[0, 2] == 0
    assert future[1, 1] == 0
    assert future[0, 1] == np.float32(0.3)
    assert future[1, 0] == np.float32(1e-8)


# ---------------------------------------------------------------------------- controller


def next_coef(coef, seq_kl, *, target=6.0, horizon=10.0):
    return float(kl.next_kl_coef(jnp.float32(coef), jnp.float32(seq_kl), target_nats=target, horizon=horizon))


def test_the_controller_is_its_formula():
    assert next_coef(0.2, 6.0) == pytest.approx(0.2)
    assert next_coef(0.2, 6.6) == pytest.approx(0.2 * (1 + 0.1 / 10))
    assert next_coef(0.2, 600.0) == pytest.approx(0.2 * (1 + 0.2 / 10))
    assert next_coef(0.2, 0.0) == pytest.approx(0.2 * (1 - 0.2 / 10))


@given(
    coef=st.floats(1e-6, 10),
    kls=st.lists(st.floats(0, 1e4), min_size=2, max_size=2).map(sorted),
    horizon=st.sampled_from([1.0, 10.0, 1e4]),
)
def test_the_controller_is_monotone_bounded_and_stays_positive(coef, kls, horizon):
    low, high = (next_coef(coef, value, horizon=horizon) for value in kls)
    assert 0 < low <= high
    assert coef * (1 - 0.2001 / horizon) * (1 - 1e-6) <= low
    assert high <= coef * (1 + 0.2001 / horizon) * (1 + 1e-6)


def test_the_controller_does_not_hide_a_nan_or_run_away_at_infinity():
    assert math.isnan(next_coef(0.2, math.nan))
    assert next_coef(0.2, math.inf) == pytest.approx(0.2 * 1.02)
