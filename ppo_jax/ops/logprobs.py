"""From logits to log-probabilities: always in float32 at least, always divided by the sampling temperature.

The distribution described here is the *full* softmax. What top-k, top-p or a banned token cut away while sampling is
measured apart, as kept mass (`sampling.truncated_weights`), and never enters these numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def wide_dtype(dtype: Any) -> Any:
    """`dtype`, or float32 where it is narrower; written so that it holds under strict dtype promotion too."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def log_distribution(logits: Float[Array, "*rows V"], *, temperature: float) -> Float[Array, "*rows V"]:
    """log softmax(logits / temperature) in nats, float32 or wider.

    Trap: bfloat16 log-softmax errs by up to 0.25 nats, so the cast comes first.
    """
    wide = logits.astype(wide_dtype(logits.dtype))
    return jax.nn.log_softmax(wide / temperature, axis=-1)


def token_logprobs(
    logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"], *, temperature: float
) -> Float[Array, "*rows"]:
    """Log-probability of each given token, in nats per token.

        log π(a_t | s_t) = z_t[a_t] / τ − logsumexp(z_t / τ)

    `logits[..., t, :]` must be the ones that *predict* `tokens[..., t]`; the shift by one is the caller's
    (`models.decoder.response_hidden`). Token ids outside the vocabulary give NaN here (and another token's embedding
    in the model) without an error: they are checked on the host, before anything runs.
    """
    return _entries(log_distribution(logits, temperature=temperature), tokens)


@jax.custom_jvp
def _entries(log_probs: Float[Array, "*rows V"], tokens: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """log_probs[..., tokens], whose gradient is a comparison with the tokens and no scatter.

    A scatter takes an array of zeros of the logits' size, which is written, read and added to; a comparison is computed
    where it is read.
    """
    return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


@_entries.defjvp
def _entries_jvp(primals, tangents):
    (log_probs, tokens), (tangent, _) = primals, tangents
    chosen = jax.nn.one_hot(tokens, log_probs.shape[-1], dtype=bool)
    return _entries(log_probs, tokens), jnp.sum(jnp.where(chosen, tangent, jnp.zeros((), tangent.dtype)), axis=-1)


def entropy(logits: Float[Array, "*rows V"], *, temperature: float) -> Float[Array, "*rows"]:
    """H(π) = −Σ_v π(v) log π(v) in nats per token; a token of probability 0 (a logit of −inf) adds 0."""
    log_probs = log_distribution(logits, temperature=temperature)
    probs = jnp.exp(log_probs)
    # 0 · (−inf) is NaN, and so is its gradient, unless the −inf is replaced before the product.
    finite_log_probs = jnp.where(probs > 0, log_probs, jnp.zeros((), log_probs.dtype))
    return -jnp.sum(probs * finite_log_probs, axis=-1)
