"""The oracle of step 6: losses per token and the weights that reduce them."""

import math

import numpy as np

from parity import oracle
from parity.oracle import Array


def bounds(clip_eps: float, clip_eps_high: float | None) -> tuple[float, float]:
    """What the ratio is clipped to; one number is meant for both sides."""
    return 1 - clip_eps, 1 + (clip_eps_high if clip_eps_high is not None else clip_eps)


def clipped_policy_loss(
    policy_logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Array:
    """−min(r A, clip(r, 1 − ε, 1 + ε_high) A), r = π / π_old.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, equation 7, its sign turned.
    """
    low, high = bounds(clip_eps, clip_eps_high)
    out = np.zeros(advantages.shape)
    for i in np.ndindex(advantages.shape):
        ratio, advantage = math.exp(policy_logprobs[i] - old_logprobs[i]), advantages[i]
        out[i] = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
    return out


def dual_clipped_policy_loss(
    policy_logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float,
) -> Array:
    """−A times the ratio that counts: at most 1 + ε_high of a good token; of a bad one at least 1 − ε, at most c.

    Source: Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", 2020, equation 8.
    """
    low, high = bounds(clip_eps, clip_eps_high)
    out = np.zeros(advantages.shape)
    for i in np.ndindex(advantages.shape):
        ratio = math.exp(policy_logprobs[i] - old_logprobs[i])
        counts = min(ratio, high) if advantages[i] >= 0 else min(max(ratio, low), dual_clip)
        out[i] = -counts * advantages[i]
    return out


def clipping_acts(
    policy_logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> Array:
    """Where the loss is not −r A, so that the ratio is not in it."""
    c = math.inf if dual_clip is None else dual_clip
    inputs = (policy_logprobs, old_logprobs, advantages)
    losses = dual_clipped_policy_loss(*inputs, clip_eps=clip_eps, clip_eps_high=clip_eps_high, dual_clip=c)
    out = np.zeros(advantages.shape, bool)
    for i in np.ndindex(advantages.shape):
        out[i] = losses[i] != -math.exp(policy_logprobs[i] - old_logprobs[i]) * advantages[i]
    return out


def clipped_value_loss(values: Array, old_values: Array, returns: Array, *, clip_eps: float) -> Array:
    """½ max((V − R)², (V_clip − R)²), V_clip within ε of V_old.

    Source: Engstrom et al., "Implementation Matters in Deep Policy Gradients", 2020, section 3.
    """
    out = np.zeros(values.shape)
    for i in np.ndindex(values.shape):
        clipped = min(max(values[i], old_values[i] - clip_eps), old_values[i] + clip_eps)
        out[i] = max((values[i] - returns[i]) ** 2, (clipped - returns[i]) ** 2) / 2
    return out


def weighted_sum(token_losses: Array, weights: Array) -> float:
    """Σ_bt w_bt ℓ_bt."""
    return math.fsum(float(weights[i] * token_losses[i]) for i in np.ndindex(weights.shape) if weights[i] != 0)


def constant_weights(response_mask: Array, *, max_response_tokens: int) -> Array:
    """1 / (B · longest answer allowed)."""
    return oracle.on_answers([1 / (len(response_mask) * max_response_tokens)] * len(response_mask), response_mask)


def token_mean_weights(response_mask: Array) -> Array:
    """1 / all tokens."""
    return oracle.on_answers([1 / max(response_mask.sum(), 1)] * len(response_mask), response_mask)


def sequence_mean_weights(response_mask: Array) -> Array:
    """1 / (the answer's tokens · answers)."""
    lengths = [len(oracle.positions(mask)) for mask in response_mask]
    answers = sum(length > 0 for length in lengths)
    return oracle.on_answers([1 / (max(length, 1) * max(answers, 1)) for length in lengths], response_mask)
