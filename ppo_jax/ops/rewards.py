"""Score and KL penalty become one reward per response token (step 4)."""

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
    position = jnp.arange(response_mask.shape[1])[None, :]
    is_last = (position == masking.last_position(response_mask)[:, None]) & response_mask
    return -kl_coef * masking.zero_masked(token_k1, response_mask) + masking.zero_masked(
        jnp.broadcast_to(seq_scores[:, None], token_k1.shape), is_last
    )
