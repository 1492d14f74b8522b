"""Rotary positions: what `rope_parameters` of a Hugging Face config say, as frequencies in float64, and the rotation.

Two kinds let transformers change the frequencies with the length of the batch, which would make a token's log-prob
depend on its neighbours. Here the frequencies are fixed, and longer sequences are refused (`served_positions`):
`dynamic` is the default kind up to `max_position_embeddings`, and `longrope` uses its short factors, which are the
ones for sequences up to `original_max_position_embeddings`.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ppo_jax.errors import UserError
from ppo_jax.ops.logprobs import wide_dtype


@dataclass(frozen=True)
class RopeSpec:
    """Inverse frequencies in radians per position, one per pair of rotated channels; cos and sin times a factor.

    With fewer frequencies than half a head's channels, the last channels are passed through (partial rotary).
    """

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0


def rotate(x: Float[Array, "B S N H"], positions: Int[Array, "B S"], rope: RopeSpec) -> Float[Array, "B S N H"]:
    """Rotary embedding in the half-split layout: of R rotated channels, i is paired with i + R/2."""
    wide = x.astype(wide_dtype(x.dtype))
    frequencies = jnp.asarray(rope.inverse_frequencies, wide.dtype)
    angles = (positions[..., None].astype(wide.dtype) * frequencies[None, None])[:, :, None, :]
    cos, sin = rope.attention_factor * jnp.cos(angles), rope.attention_factor * jnp.sin(angles)
    pairs = len(rope.inverse_frequencies)
    first, second, unrotated = jnp.split(wide, (pairs, 2 * pairs), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, unrotated], axis=-1).astype(x.dtype)


# What each kind reads beside its type, θ and the rotated share; anything else in `rope_parameters` is refused.
# `factor` of `dynamic` and `long_factor` of `longrope` only act on lengths that are refused.
KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
    "longrope": ("factor", "short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"),
}


def rope_frequencies(rotated: int, theta: float) -> np.ndarray:
    """θ^(−2i/d) for i = 0 .. d/2 − 1 of d rotated channels, in float64."""
    return theta ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)


def rope_spec(parameters: dict[str, Any], head_dim: int, max_positions: int, *, partial: bool = False) -> RopeSpec:
    """The rotation that `rope_parameters` describe; `partial` says that the family can rotate a share of a head."""
    given = {key: value for key, value in parameters.items() if value is not None}
    kind = given.get("rope_type", "default")
    if kind not in KEYS:
        raise UserError(f"config.json: rope_type {kind!r} is not supported; supported are {', '.join(KEYS)}")
    share = given.get("partial_rotary_factor", 1.0)
    unknown = set(given) - set(KEYS[kind]) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if share != 1.0 and not partial:
        unknown.add(f"partial_rotary_factor={share}")
    if unknown:
        raise UserError(
            f"config.json: rope_parameters of type {kind!r} with {', '.join(sorted(unknown))} are not supported; they "
            f"may change the mathematics, so the model is refused"
        )
    rotated = int(head_dim * share)
    plain = rope_frequencies(rotated, _number(given, "rope_theta"))
    if kind == "linear":
        return RopeSpec(tuple((plain / _number(given, "factor")).tolist()))
    if kind == "llama3":
        return RopeSpec(tuple(_llama3_frequencies(plain, given).tolist()))
    if kind == "yarn":
        return _yarn(plain, given, rotated, max_positions)
    if kind == "longrope":
        return _longrope(plain, given, max_positions)
    return RopeSpec(tuple(plain.tolist()))


def served_positions(parameters: dict[str, Any], max_positions: int) -> int:
    """How many positions the fixed frequencies serve: all, but for `longrope` those of its short factors."""
    if parameters.get("rope_type") == "longrope":
        return min(max_positions, int(_number(parameters, "original_max_position_embeddings")))
    return max_positions


def _number(parameters: dict[str, Any], key: str) -> float:
    value = parameters.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(
            f"config.json: rope_parameters of type {parameters.get('rope_type')!r} need {key}, a number above 0; "
            f"got {value!r}"
        )
    return float(value)


def _llama3_frequencies(plain: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear ramp of the frequency between."""
    original, low, high, factor = (
        _number(parameters, key)
        for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    )
    turns = original * plain / (2 * math.pi)  # how often a channel turns within the original context
    kept_share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept_share + (1 - kept_share) / factor)


def _yarn(plain: np.ndarray, parameters: dict[str, Any], rotated: int, max_positions: int) -> RopeSpec:
    """YaRN (arXiv 2309.00071): frequencies blended by channel index, attention sharpened by `attention_factor`.

    Channels that turn more than `beta_fast` times within the original context are kept, those that turn less than
    `beta_slow` times are divided by `factor`, with a linear ramp between, whose ends are rounded unless `truncate` is
    false. The factor of cos and sin is 0.1 ln(factor) + 1, or the quotient of two such terms (DeepSeek's `mscale`).
    """
    original = parameters.get("original_max_position_embeddings") or max_positions
    factor = parameters.get("factor") or max_positions / original
    theta = _number(parameters, "rope_theta")

    def channel_that_turns(times: float) -> float:
        return rotated * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = channel_that_turns(float(parameters.get("beta_fast") or 32))
    high = channel_that_turns(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / ((high - low) or 0.001), 0.0, 1.0)

    def sharpening(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = (
            sharpening(float(mscale)) / sharpening(float(all_dim)) if mscale and all_dim else sharpening(1.0)
        )
    return RopeSpec(tuple((plain * (1 - ramp + ramp / factor)).tolist()), float(attention_factor))


def _longrope(plain: np.ndarray, parameters: dict[str, Any], max_positions: int) -> RopeSpec:
    """LongRoPE (arXiv 2402.13753): every channel divided by a factor of its own, here always a short one."""
    original = _number(parameters, "original_max_position_embeddings")
    divisors = parameters.get("short_factor") or ()
    if len(divisors) != len(plain):
        raise UserError(
            f"config.json: short_factor of rope_parameters has {len(divisors)} numbers, but {len(plain)} pairs of "
            f"channels are rotated"
        )
    factor = parameters.get("factor") or max_positions / original
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeSpec(tuple((plain / np.asarray(divisors, np.float64)).tolist()), float(attention_factor))
