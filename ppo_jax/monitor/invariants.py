"""What must hold before the first step, and what must hold throughout: broken, the run ends with the likely cause."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.errors import UserError
from ppo_jax.models.decoder import Params

# Largest |log-prob difference| in nats between two correct computations of one token: the KV-cache decode or the
# update's forward against the scoring forward. float32 at 30 layers measures about 1e-4; bfloat16 keeps 8 bits. float64
# is that of `parity`.
LOGPROB_BOUND = {"float64": 1e-10, "float32": 2e-3, "bfloat16": 0.5}
# Largest exact KL per token between policy and reference while their weights are the same.
KL_BOUND = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-3}


def assert_equals_reference(metrics: dict[str, float], *, compute_dtype: str) -> None:
    """Before the first update: the policy is its reference, and sampling and training forward agree."""
    kl, gap = metrics["kl/token_max_nats"], metrics["rollout/logprob_gap_max"]
    if not kl <= KL_BOUND[compute_dtype]:
        raise UserError(
            f"step-0 check: KL(policy || reference) reaches {kl:.3g} nats at a token, expected at most "
            f"{KL_BOUND[compute_dtype]:g}. The reference is not the model that is being trained, or one of the two is "
            f"computed differently (temperature, padding, dtype)."
        )
    if not gap <= LOGPROB_BOUND[compute_dtype]:
        raise UserError(
            f"step-0 check: rollout and training log-probs of a token differ by {gap:.3g} nats, expected at most "
            f"{LOGPROB_BOUND[compute_dtype]:g}. The decode with its cache and the whole forward disagree: positions, "
            f"padding mask, or too low a precision (model.compute_dtype)."
        )


def assert_ratio_is_one(first_step: dict[str, float], *, compute_dtype: str) -> None:
    """The first minibatch of the first iteration: ratio 1 and nothing clipped, whatever the data."""
    gap, clipped = first_step["policy/log_ratio_abs_max"], first_step["policy/clip_frac"]
    if not gap <= LOGPROB_BOUND[compute_dtype] or clipped > 0:
        raise UserError(
            f"step-0 check: before any update the policy ratio must be 1 and nothing clipped, but |log ratio| reaches "
            f"{gap:.3g} (bound {LOGPROB_BOUND[compute_dtype]:g}) and the clip fraction is {clipped:.3g}. Scoring and "
            f"update compute different log-probs (temperature, mask, shift), or update.clip_eps is below rounding."
        )


@jax.jit
def _checksums(params: Params) -> list[jax.Array]:
    def checksum(leaf):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{leaf.dtype.itemsize * 8}"))
        # The index of an element in row-major order; made by axes, not by a reshape, which would gather the array.
        index = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            index = index * size + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)

    return [checksum(leaf) for leaf in jax.tree.leaves(params)]


def digest(params: Params) -> str:
    """A fingerprint of every bit of some parameters, computed on the device in one pass over them."""
    checksums = np.asarray(jax.device_get(_checksums(params)), np.uint32)
    return hashlib.sha256(checksums.tobytes()).hexdigest()[:16]


def assert_same_digest(found: str, expected: str) -> None:
    """The reference is the bottom line of PPO: it never changes."""
    if found != expected:
        raise UserError(f"the reference model moved: its digest is {found}, at the start it was {expected}")
