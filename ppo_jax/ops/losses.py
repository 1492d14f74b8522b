"""The losses of step 6, per token and unreduced, and the weights that reduce them.

A loss of the update is Σ_bt w_bt ℓ_bt. The weights w are computed once for a whole minibatch, so that micro-batches add
up to the same number for any split: sums are added, nothing is averaged twice.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppo_jax.ops import masking


def clipped_policy_loss(
    policy_logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Float[Array, "B T"]:
    """ℓ_t = −min(r_t A_t, clip(r_t, 1 − ε, 1 + ε_high) A_t), r_t = exp(log π_θ − log π_old).

    Shapes [B, T], unreduced and unmasked: zero the masked inputs first (a NaN there reaches the gradient), then reduce
    with `weighted_sum`. `clip_eps_high` None is `clip_eps`. A log-ratio beyond 88 in float32 overflows and makes the
    gradient NaN. Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, equation 7; two bounds as in
    Yu et al., "DAPO", 2025, section 3.1.
    """
    ratio = jnp.exp(policy_logprobs - old_logprobs)
    clipped_ratio = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + (clip_eps if clip_eps_high is None else clip_eps_high))
    return -jnp.minimum(ratio * advantages, clipped_ratio * advantages)


def dual_clipped_policy_loss(
    policy_logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float,
) -> Float[Array, "B T"]:
    """`clipped_policy_loss`, bounded by −c A_t where A_t < 0: min(ℓ_t, −c A_t) with c = `dual_clip` > 1.

    A bad token that has become far more likely would otherwise have a loss, and a gradient, as large as its ratio.
    Beyond r_t = c it has none: nothing pulls such a token back. Source: Ye et al., "Mastering Complex Control in MOBA
    Games with Deep Reinforcement Learning", 2020, equation 8.
    """
    losses = clipped_policy_loss(
        policy_logprobs, old_logprobs, advantages, clip_eps=clip_eps, clip_eps_high=clip_eps_high
    )
    return jnp.where(advantages < 0, jnp.minimum(losses, -dual_clip * advantages), losses)


def clipping_acts(
    policy_logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> Bool[Array, "B T"]:
    """Where a bound, also the dual one, is the loss, so that the token's gradient is 0; its mean is the clip fraction.

    An advantage of 0 has no gradient either, and is not counted.
    """
    ratio = jnp.exp(policy_logprobs - old_logprobs)
    too_high = ratio > 1.0 + (clip_eps if clip_eps_high is None else clip_eps_high)
    too_low = ratio < 1.0 - clip_eps
    if dual_clip is not None:
        too_low = too_low | (ratio > dual_clip)
    return ((advantages > 0) & too_high) | ((advantages < 0) & too_low)


def clipped_value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    *,
    clip_eps: float,
) -> Float[Array, "B T"]:
    """ℓ_t = ½ max((V − R)², (clip(V, V_old ± ε) − R)²), unreduced [B, T]; ε = ∞ is ½ (V − R)², in its gradient too.

    Source: the clipped value loss of OpenAI's baselines PPO2, described in Engstrom et al., "Implementation Matters in
    Deep Policy Gradients", 2020, section 3.
    """
    clipped_values = jnp.clip(values, old_values - clip_eps, old_values + clip_eps)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped_values - returns) ** 2)


def weighted_sum(token_losses: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, ""]:
    """Σ_bt w_bt ℓ_bt; tokens of weight 0 touch neither the value nor the gradient."""
    return masking.masked_sum(weights * masking.zero_masked(token_losses, weights != 0), weights != 0)


def constant_weights(
    response_mask: Bool[Array, "B T"], *, max_response_tokens: int, dtype=jnp.float32
) -> Float[Array, "B T"]:
    """w = m / (B · max_response_tokens): the default, and the only one unbiased when lengths vary.

    The divisor is the configured maximum, not the padded T of this batch: the loss does not depend on its neighbours.
    """
    return response_mask.astype(dtype) / (response_mask.shape[0] * max_response_tokens)


def token_mean_weights(response_mask: Bool[Array, "B T"], *, dtype=jnp.float32) -> Float[Array, "B T"]:
    """w = m / Σ m: every token of the minibatch weighs the same, so long answers pull harder than short ones."""
    count = masking.masked_count(response_mask, dtype=dtype)
    return response_mask.astype(dtype) / jnp.maximum(count, jnp.ones((), dtype))


def sequence_mean_weights(response_mask: Bool[Array, "B T"], *, dtype=jnp.float32) -> Float[Array, "B T"]:
    """w = m / (length_b · number of answers): every answer weighs the same, so a short one's tokens pull harder."""
    lengths = masking.masked_count(response_mask, axis=1, dtype=dtype)
    answers = jnp.sum(lengths > 0, dtype=dtype)
    one = jnp.ones((), dtype)
    return response_mask.astype(dtype) / jnp.maximum(lengths, one)[:, None] / jnp.maximum(answers, one)
