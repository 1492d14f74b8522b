"""Noise is a function of (seed, step, purpose, sample, position) and of nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.ops.randomness import Purpose, purpose_key, rollout_uniforms

draw_uniforms = jax.jit(rollout_uniforms, static_argnames="length")


def uniforms(seed=0, step=0, purpose=Purpose.ROLLOUT, samples=(0, 1, 2, 3), length=6):
    key = purpose_key(seed, step, purpose)
    return np.asarray(draw_uniforms(key, jnp.asarray(samples, jnp.int32), length=length))


def test_seeds_steps_and_purposes_never_share_a_draw():
    draws = [
        uniforms(seed, step, purpose)
        for seed, step, purpose in itertools.product((0, 1, 2**32 - 1), (0, 1, 1000), Purpose)
    ]
    # 27 x 24 draws of 23 bits: a chance collision has probability 0.025, and this one is fixed.
    values = np.concatenate([draw.ravel() for draw in draws])
    assert len(set(values.tolist())) == len(values)


def test_purposes_have_distinct_numbers():
    assert len({int(purpose) for purpose in Purpose}) == len(Purpose.__members__)


def test_the_same_arguments_give_the_same_noise():
    np.testing.assert_array_equal(uniforms(3, 4), uniforms(3, 4))


def test_samples_and_positions_differ_and_do_not_swap_roles():
    draw = uniforms(samples=range(6), length=6)
    assert len(set(draw.ravel().tolist())) == 36  # in particular draw[i, j] != draw[j, i]


def test_a_sample_does_not_depend_on_the_batch_it_sits_in_nor_on_the_length():
    whole = uniforms(samples=(0, 1, 2, 3, 4, 5, 6, 7), length=9)
    np.testing.assert_array_equal(uniforms(samples=(6, 1), length=9), whole[[6, 1]])
    np.testing.assert_array_equal(uniforms(samples=(5,), length=4), whole[[5], :4])


def test_draws_are_uniform_on_the_half_open_interval():
    draw = uniforms(samples=range(64), length=64).ravel().astype(np.float64)
    assert (draw >= 0).all()
    assert (draw < 1).all()
    counts = np.histogram(draw, bins=16, range=(0, 1))[0]
    expected = len(draw) / 16
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # 0.1% point of chi-square with 15 degrees of freedom
    neighbours = np.corrcoef(draw[:-1], draw[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(len(draw))
