from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_jax import checkpoint
from ppo_jax.errors import UserError
from ppo_jax.ops.rewards import ScoreMoments
from ppo_jax.records import TrainState


def some_state(step, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "a": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "b": {"c": jnp.asarray(rng.normal(size=2), jnp.float32)},
    }
    optimizer = optax.adamw(1e-3)
    with jax.numpy_dtype_promotion("standard"):  # optax is not strict
        moments = optimizer.update(params, optimizer.init(params), params)[1]
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=moments,
        kl_coef=jnp.float32(0.05 + step),
        score_moments=ScoreMoments(*(jnp.float32(step + i) for i in range(3))),
    )


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = some_state(3)
    checkpoint.save(tmp_path, state, keep=2)
    restored = checkpoint.restore_newest(tmp_path, some_state(0, seed=1))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_only_the_newest_checkpoints_stay_and_the_newest_is_restored(tmp_path):
    for step in (1, 2, 9, 10):
        checkpoint.save(tmp_path, some_state(step), keep=2)
    assert list(checkpoint.saved_steps(tmp_path)) == [9, 10]
    assert int(checkpoint.restore_newest(tmp_path, some_state(0)).step) == 10


def test_a_directory_without_a_checkpoint_and_a_foreign_one_are_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.restore_newest(tmp_path, some_state(0))
    checkpoint.save(tmp_path, some_state(1), keep=1)
    other = replace(some_state(0), params={"x": jnp.zeros(7)}, opt_state=())
    with pytest.raises(UserError, match="does not fit"):
        checkpoint.restore_newest(tmp_path, other)
