"""Score and KL penalty become one reward per response token (step 4), in one of the two forms whose gradient is right.

docs/mathematics.md says why there are two and why nothing else may be put in their place.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppo_jax.ops import masking


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
