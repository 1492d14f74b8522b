"""Divergences between the policy π and the frozen reference ρ, in nats per token.

`exact_token_kl` is the whole expectation over the vocabulary; `k1`, `k2`, `k3` estimate it from the sampled token
(Schulman, "Approximating KL divergence", 2020). What each one's *gradient* is worth is another matter: see
docs/mathematics.md. In particular an exact KL in the reward alone, or in the loss alone, is biased, and k1 in the loss
has no gradient in expectation.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.ops import masking
from ppo_jax.ops.logprobs import log_distribution, token_logprobs


def _expm1_minus(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """exp(−d) − 1 + d ≥ 0 for d = log p − log q; expm1 keeps it non-negative down to one rounding, max removes that."""
    return jnp.maximum(jnp.expm1(-log_ratio) + log_ratio, jnp.zeros((), log_ratio.dtype))


def exact_token_kl(
    logits: Float[Array, "*rows V"], ref_logits: Float[Array, "*rows V"], *, temperature: float
) -> Float[Array, "*rows"]:
    """KL(π ‖ ρ) = Σ_v π(v) (log π(v) − log ρ(v)) at every position, in nats per token.

    Written as Σ π (exp(−d) − 1 + d) with d = log π − log ρ. The added Σ (ρ − π) is zero, and every summand becomes
    non-negative: the plain sum is negative on half of all nearly equal rows in float32. A token with π = 0 adds ρ; a
    token with π > 0 and ρ = 0 makes the KL infinite, as it is.
    """
    log_p = log_distribution(logits, temperature=temperature)
    log_q = log_distribution(ref_logits, temperature=temperature)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    zero = jnp.zeros((), log_p.dtype)
    d = jnp.where(p > 0, log_p - log_q, zero)
    # expm1 overflows for ρ ≫ π; there the same summand is ρ − π + π d, which cancels nothing.
    near = jnp.abs(d) < 1
    summand = jnp.where(near, p * _expm1_minus(jnp.where(near, d, zero)), q - p + p * d)
    return jnp.sum(jnp.where(p > 0, summand, q), axis=-1)


def k1(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """k1 = log π(a) − log ρ(a): unbiased, of either sign. The form that may be subtracted from a reward."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """k2 = ½ (log π(a) − log ρ(a))²: biased, never negative."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """k3 = ρ(a)/π(a) − 1 − log(ρ(a)/π(a)): unbiased, never negative, also not in float32 near 0. A monitor."""
    return _expm1_minus(logprobs - ref_logprobs)


def sampled_token_k3(
    logits: Float[Array, "*rows V"],
    ref_logits: Float[Array, "*rows V"],
    tokens: Int[Array, "*rows"],
    *,
    temperature: float,
) -> Float[Array, "*rows"]:
    """k3 of the sampled token, to be differentiated in the policy's logits, in nats per token.

        ρ(a)/π_θ(a) − 1 − log(ρ(a)/π_θ(a)),   gradient (1 − ρ(a)/π_θ(a)) ∇ log π_θ(a)

    Trap: the value is unbiased, the gradient is not. In expectation over π it is that of KL(ρ ‖ π) at this state, and
    what the choice does to later states is missing (docs/truth.md). Where π has left a token of the reference behind
    (88 nats in float32) it overflows. Source: Shao et al., "DeepSeekMath", 2024, equation 4 (GRPO).
    """
    logprobs = token_logprobs(logits, tokens, temperature=temperature)
    return k3(logprobs, token_logprobs(ref_logits, tokens, temperature=temperature))


def future_kl(token_kl: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """F_t = Σ_{t' > t} m_t' KL_t': what the choice at t can still change, in nats; its own KL_t is not in it.

    Half of the exact form of the penalty (docs/mathematics.md); the other half is the exact KL in the loss.
    """
    backwards = masking.zero_masked(token_kl, response_mask)[:, ::-1]
    # Exclusive by shifting, not by subtracting: (x + y) − x is not y in floating point.
    later = jnp.pad(jnp.cumsum(backwards, axis=1)[:, :-1], ((0, 0), (1, 0)))
    return masking.zero_masked(later[:, ::-1], response_mask)


def next_kl_coef(
    kl_coef: Float[Array, ""], seq_kl: Float[Array, ""], *, target_nats: float, horizon: float
) -> Float[Array, ""]:
    """Proportional controller: β ← β (1 + clip(KL / target − 1, ±0.2) / horizon).

    Shapes: scalars. Units: `seq_kl` and `target_nats` in nats per sequence, `horizon` in controller steps (at least 1,
    so that β stays positive). Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019,
    section 2.2.
    """
    error = jnp.clip(seq_kl / target_nats - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error / horizon)
