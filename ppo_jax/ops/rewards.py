"""Score and KL penalty become one reward per response token (step 4), in one of the two forms whose gradient is right.

docs/mathematics.md says why there are two and why nothing else may be put in their place. Scores are shaped first, in
this order: normalised, clipped, and then the penalties are subtracted, which so keep their size.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppo_jax.ops import masking


class ScoreMoments(NamedTuple):
    """Moments of all scores seen so far: scalars of one float dtype; m2 is the sum of squared distances to the mean."""

    count: Float[Array, ""]
    mean: Float[Array, ""]
    m2: Float[Array, ""]


def first_moments(dtype: Any) -> ScoreMoments:
    """Those of no score at all."""
    zero = jnp.zeros((), dtype)
    return ScoreMoments(zero, zero, zero)


def merged_moments(moments: ScoreMoments, seq_scores: Float[Array, " B"], answered: Bool[Array, " B"]) -> ScoreMoments:
    """The moments of what was seen and of this batch together, without either being read again.

        n' = n + n_B,   μ' = μ + δ n_B / n',   M' = M + M_B + δ² n n_B / n',   δ = μ_B − μ

    `seq_scores` [B] in the units of the reward source; `answered` [B] is True on the rows that count. Equal scores,
    however large, give their own mean exactly and M' = 0. Source: Chan et al., "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances", 1979, equation 2.1.
    """
    scores = masking.zero_masked(seq_scores, answered)
    centered = masking.masked_center(scores, answered)
    first = jnp.argmax(answered)
    n = masking.masked_count(answered, dtype=scores.dtype)
    total = moments.count + n
    share = n / jnp.maximum(total, 1.0)
    # A score less its distance to the mean: of equal numbers their own, which a sum divided by n need not be.
    delta = scores[first] - centered[first] - moments.mean
    m2 = moments.m2 + masking.masked_sum(centered**2, answered) + delta**2 * moments.count * share
    return ScoreMoments(total, moments.mean + delta * share, m2)


def normalised_scores(seq_scores: Float[Array, " B"], moments: ScoreMoments) -> Float[Array, " B"]:
    """(s − μ) / sqrt(M / n + 1e-8), the population's variance: a single score, or equal ones, give 0, not NaN.

    Shapes: [B], no unit. With the moments of one batch this whitens it; with running ones the scale of the scores
    drifts slower than any batch does. Trap: a score divided by its deviation is worth other nats of KL.
    """
    variance = moments.m2 / jnp.maximum(moments.count, 1.0)
    return (seq_scores - moments.mean) / jnp.sqrt(variance + 1e-8)


def clipped_scores(seq_scores: Float[Array, " B"], *, bound: float) -> Float[Array, " B"]:
    """clip(s, −bound, bound), [B], in the units of its argument: one outlier cannot be the whole batch's direction."""
    return jnp.clip(seq_scores, -bound, bound)


def missing_eos_penalty(ended: Bool[Array, " B"], *, penalty: float, dtype=jnp.float32) -> Float[Array, " B"]:
    """`penalty` >= 0 where an answer was cut off, 0 where it ended by itself; [B], to be subtracted from the score."""
    return jnp.where(ended, jnp.zeros((), dtype), jnp.asarray(penalty, dtype))


def too_short_penalty(lengths: Float[Array, " B"], *, min_tokens: int, penalty: float) -> Float[Array, " B"]:
    """penalty · max(0, 1 − L / min_tokens): all of it at no token, falling evenly to 0 at `min_tokens`.

    `lengths` [B] in response tokens, the EOS included; [B], to be subtracted from the score. `min_tokens` 0 is 0.
    """
    missing = jnp.maximum(min_tokens - lengths, 0.0)
    return penalty * (missing / max(min_tokens, 1))


def too_long_penalty(
    lengths: Float[Array, " B"], *, soft_max_tokens: int, max_tokens: int, penalty: float
) -> Float[Array, " B"]:
    """penalty · clip((L − soft) / (max − soft), 0, 1): 0 up to `soft_max_tokens`, all of it at `max_tokens`.

    `lengths` [B] in response tokens, the EOS included; [B], to be subtracted from the score. Needs soft < max. Source:
    Yu et al., "DAPO", 2025, equation 13 (soft overlong punishment).
    """
    return penalty * jnp.clip((lengths - soft_max_tokens) / (max_tokens - soft_max_tokens), 0.0, 1.0)


def kl_per_token(token_k1: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """k1_t / L: the answer's k1 divided by its length, so that the penalty is its mean per token. Masked positions 0.

    Trap: then the length of an answer changes what a nat costs; the gradient is no longer that of the sequence's KL.
    """
    lengths = masking.masked_count(response_mask, axis=1, dtype=token_k1.dtype)
    return masking.zero_masked(token_k1, response_mask) / jnp.maximum(lengths, 1.0)[:, None]


def token_rewards(
    seq_scores: Float[Array, " B"],
    token_k1: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    kl_coef: float | Float[Array, ""],
) -> Float[Array, "B T"]:
    """r_t = −β k1_t on every response token, plus the score on the last one (the EOS, or the last token if truncated).

    Shapes: `seq_scores` [B] in the units of the reward source, `token_k1` [B, T] in nats per token. Masked positions
    are 0; a row without a response token gets nothing, not even its score. The name `token_k1` is the guard: k1 is the
    only form of the KL whose gradient survives being put into the reward (an exact KL there loses the pull at the
    current token; docs/mathematics.md).
    """
    return _score_on_last_token(seq_scores, response_mask) - kl_coef * masking.zero_masked(token_k1, response_mask)


def exact_kl_token_rewards(
    seq_scores: Float[Array, " B"],
    token_kl: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    kl_coef: float | Float[Array, ""],
) -> Float[Array, "B T"]:
    """r_t = −β m_{t+1} KL_{t+1}, plus the score on the last response token: half of the exact form of the penalty.

    KL_t is a function of the state that token t is drawn from, so it is charged to the token that led there, t − 1;
    from t on the rewards add up to s − β F_t with F of `kl.future_kl`. KL_0 depends on the prompt alone and is charged
    to nobody. The pull of KL_t on the choice at t itself is the other half: β KL_t in the loss, without which this is
    biased. Shapes: `seq_scores` [B] in the units of the reward source, `token_kl` [B, T] the exact KL in nats per
    token; masked positions are 0.
    """
    kl_of_next = jnp.pad(masking.zero_masked(token_kl, response_mask)[:, 1:], ((0, 0), (0, 1)))
    return _score_on_last_token(seq_scores, response_mask) - kl_coef * masking.zero_masked(kl_of_next, response_mask)


def _score_on_last_token(seq_scores: Float[Array, " B"], response_mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    position = jnp.arange(response_mask.shape[1])[None, :]
    is_last = (position == masking.last_position(response_mask)[:, None]) & response_mask
    return masking.zero_masked(jnp.broadcast_to(seq_scores[:, None], response_mask.shape), is_last)
