"""Divergences: their gradient and corners.

What holds for any input, in both stacks, is in `parity.properties`.
"""

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


def test_the_policy_comes_first():
    # KL(p || q) with p = (3/4, 1/4), q = (1/2, 1/2); the other order gives 0.1438.
    p, q = jnp.log(jnp.array([[0.75, 0.25]])), jnp.zeros((1, 2))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    np.testing.assert_allclose(kl.exact_token_kl(p, q, temperature=1.0), [expected], rtol=1e-6)


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
def test_a_token_impossible_for_the_policy_alone_leaves_the_kl_finite(floor):
    logits, ref_logits = (x.astype(np.float64) for x in draw_pair(6))
    keep = np.arange(VOCAB) != 2
    ours, gradient = jax.value_and_grad(
        lambda z: exact_kl(z, jnp.asarray(ref_logits, jnp.float32), temperature=1.0).sum()
    )(jnp.asarray(np.where(keep, logits, floor), jnp.float32))
    log_p, log_q = log_softmax64(logits[:, keep]), log_softmax64(ref_logits)[:, keep]
    np.testing.assert_allclose(ours, (np.exp(log_p) * (log_p - log_q)).sum(), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_half_precision_logits_are_widened_first():
    logits, ref_logits = (jnp.asarray(x, jnp.bfloat16) for x in draw_pair(8))
    ours = kl.exact_token_kl(logits, ref_logits, temperature=1.0)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(
        ours, kl64(np.asarray(logits.astype(jnp.float32)), np.asarray(ref_logits.astype(jnp.float32))), rtol=2e-5
    )


# ---------------------------------------------------------------------------- sequences


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


def test_the_last_token_has_no_future_exactly():
    token_kl = jnp.array([[1e8, 0.1, 0.3], [0.7, 1e-8, 1e8]], jnp.float32)
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


def test_the_controller_does_not_hide_a_nan_or_run_away_at_infinity():
    assert math.isnan(next_coef(0.2, math.nan))
    assert next_coef(0.2, math.inf) == pytest.approx(0.2 * 1.02)


@given(seed=seeds)
def test_the_expected_gradient_of_k3_is_that_of_the_kl_of_the_other_direction(seed):
    """Why the form is called biased: Σ_a π(a) ∇k3(a) = ∇KL(ρ ‖ π), at this state; of later ones it knows nothing."""
    logits, ref_logits = (jnp.asarray(x[0]) for x in draw_pair(seed, 1.0))

    def k3_of_every_token(logits):
        every = jnp.arange(VOCAB, dtype=jnp.int32)
        rows, ref_rows = (jnp.broadcast_to(x, (VOCAB, VOCAB)) for x in (logits, ref_logits))
        return kl.sampled_token_k3(rows, ref_rows, every, temperature=0.7)

    gradients = jax.jacobian(k3_of_every_token)(logits)
    expected = jax.grad(lambda z: kl.exact_token_kl(ref_logits, z, temperature=0.7))(logits)
    mean = np.exp(log_softmax64(logits, 0.7)) @ np.asarray(gradients, np.float64)
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-5)
    forwards = jax.grad(lambda z: exact_kl(z, ref_logits, temperature=0.7))(logits)
    assert np.abs(mean - np.asarray(forwards)).max() > 1e-3
