"""Every random draw is a function of (seed, step, purpose, index): no default keys, no key that is carried along.

A key that depends on nothing else makes a run resumable without saving a generator, and a sample independent of the
batch it happened to sit in.
"""

from enum import IntEnum
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


class Purpose(IntEnum):
    """What a draw is for; distinct purposes never share noise."""

    ROLLOUT = 0
    SHUFFLE = 1
    FIXED_PROMPTS = 2
    EVALUATION = 3
    ADAPTER = 4
    GENERATE = 5


def purpose_key(seed: int, step: int | Int[Array, ""], purpose: Purpose) -> UInt32[Array, " key"]:
    """Key of one purpose at one iteration."""
    key = jax.random.PRNGKey(seed)
    return jax.random.fold_in(jax.random.fold_in(key, step), int(purpose))


@partial(jax.jit, static_argnames="length")
def rollout_uniforms(
    key: UInt32[Array, " key"], sample_index: Int[Array, " B"], *, length: int
) -> Float[Array, "B {length}"]:
    """Uniforms of [0, 1), one per sample and response position: functions of the sample's index, not of its row."""

    def draw(index, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, index), position))

    over_positions = jax.vmap(draw, in_axes=(None, 0))
    return jax.vmap(over_positions, in_axes=(0, None))(sample_index, jnp.arange(length))
