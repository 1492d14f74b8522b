from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_jax.config import UpdateConfig
from ppo_jax.optimizer import clip_by_global_norm, learning_rate, make_optimizer, step_if_finite


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + np.cos(np.pi / 4)) / 2, 0.5, (1 - np.cos(np.pi / 4)) / 2]),
    ],
)
def test_the_learning_rate_warms_up_from_above_zero_and_decays(schedule, expected):
    rates = [
        float(learning_rate(step, peak=2.0, schedule=schedule, warmup_steps=2, total_steps=6)) for step in range(6)
    ]
    np.testing.assert_allclose(rates, 2.0 * np.asarray(expected), rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_clipping_is_that_of_optax(max_norm):
    gradients = {"matrix": jnp.asarray([[3.0, -4.0], [1e-6, 2.0]]), "vector": jnp.asarray([0.5, -1.0])}
    ours, theirs = clip_by_global_norm(max_norm), optax.clip_by_global_norm(max_norm)
    clipped, expected = (clip.update(gradients, optax.EmptyState())[0] for clip in (ours, theirs))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), clipped, expected)


def test_gradients_of_nothing_are_clipped_to_nothing():
    clipped, _ = clip_by_global_norm(1.0).update([jnp.zeros(3)], optax.EmptyState())
    np.testing.assert_array_equal(clipped[0], np.zeros(3))


PARAMS = {"matrix": jnp.full((4, 4), 0.5), "vector": jnp.full((4,), -0.5)}
GRADIENTS = jax.tree.map(lambda x: jnp.full_like(x, 0.1), PARAMS)


def updated(optimizer, state, *, planned_step):
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(GRADIENTS, state, PARAMS, planned_step=planned_step)


def taken(optimizer, gradients=GRADIENTS, watched=0.0):
    """Parameters and state before, and what `step_if_finite` makes of them."""
    state = optimizer.init(PARAMS)
    _, state = updated(optimizer, state, planned_step=0)  # moments that are not 0
    step = partial(step_if_finite, optimizer, gradients, planned_step=1)
    return state, step(state, PARAMS, jnp.asarray(watched))


def test_a_finite_step_is_that_of_the_optimizer():
    optimizer = make_optimizer(UpdateConfig(learning_rate=0.1, weight_decay=0.2, max_grad_norm=0.01), 10)
    state, (params, new_state, updates, finite) = taken(optimizer)
    expected, expected_state = updated(optimizer, state, planned_step=1)
    equal = partial(np.testing.assert_allclose, rtol=1e-6)
    assert finite
    jax.tree.map(equal, updates, expected)
    jax.tree.map(equal, new_state, expected_state)
    jax.tree.map(equal, params, optax.apply_updates(PARAMS, expected))


@pytest.mark.parametrize(
    ("learning_rate", "gradient", "watched"),
    [(0.1, np.nan, 0.0), (0.1, np.inf, 0.0), (1e38, 0.1, 0.0), (0.1, 0.1, np.nan)],
    ids=["a gradient of NaN", "of inf", "an update beyond float32", "a loss of NaN"],
)
def test_what_is_not_finite_leaves_parameters_and_moments_as_they_were(learning_rate, gradient, watched):
    optimizer = make_optimizer(UpdateConfig(learning_rate=learning_rate), 10)
    gradients = GRADIENTS | {"vector": GRADIENTS["vector"].at[0].set(gradient)}
    state, (params, new_state, _, finite) = taken(optimizer, gradients, watched)
    assert not finite
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)


def test_a_step_holds_one_array_of_the_models_size_beside_the_state_that_it_updates_in_place():
    """A second copy of both moments would be 3 of them, a gradient written out once more 4."""
    params = {"one": jnp.zeros((512, 512)), "other": jnp.zeros((512, 512))}
    optimizer = make_optimizer(UpdateConfig(), 10)
    step = jax.jit(
        lambda params, state, gradients: step_if_finite(optimizer, gradients, state, params, planned_step=1)[:2],
        donate_argnums=(0, 1),  # in the order of what is returned: JAX pairs buffers of a shape by their order
    )
    memory = step.lower(params, optimizer.init(params), params).compile().memory_analysis()
    size = 2 * 4 * 512**2
    assert memory.alias_size_in_bytes >= 3 * size
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes < 1.2 * size
