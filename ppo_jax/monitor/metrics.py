"""The numbers of an iteration's experience, all masked, unit and reduction in the name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ppo_jax.ops import kl, masking
from ppo_jax.ops.advantages import explained_variance
from ppo_jax.records import TRUNCATED, Rollout, Scored

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


@jax.jit
def experience_metrics(
    rollout: Rollout,
    scored: Scored,
    seq_scores: Float[Array, " B"],
    kl_coef: Float[Array, ""],
    *,
    shaped_scores: Float[Array, " B"],
    returns: Float[Array, "B T"] | None,
) -> dict[str, Float[Array, ""]]:
    """Scores, KL, lengths and log-probs of one batch of answers, before it is trained on.

    `reward/mean` is the score minus β times the exact KL, whatever form of the KL the recipe penalises: the forms have
    the same expectation, and this one is comparable between them. The KL is there four times: exact, and as k1, k2 and
    k3 estimate it from the sampled tokens.
    """
    mask = rollout.response_mask
    answered = jnp.any(mask, axis=1)
    lengths = masking.masked_count(mask, axis=1)

    def mean_over_answers(token_values):
        return masking.masked_mean(masking.masked_sum(token_values, mask, axis=1), answered)

    seq_kl = mean_over_answers(scored.token_kl)
    score = masking.masked_mean(seq_scores, answered)
    estimates = {
        f"kl/{name}_seq_nats": mean_over_answers(estimator(scored.old_logprobs, scored.ref_logprobs))
        for name, estimator in (("k1", kl.k1), ("k2", kl.k2), ("k3", kl.k3))
    }
    quantiles = masking.masked_quantiles(scored.old_logprobs, mask, tuple(QUANTILES.values()))
    return {
        "kl/seq_nats": seq_kl,
        "kl/token_nats": masking.masked_mean(scored.token_kl, mask),
        "kl/token_max_nats": masking.masked_max(scored.token_kl, mask),
        **estimates,
        "kl/coef": kl_coef,
        "score/mean": score,
        "score/std": jnp.sqrt(masking.masked_var(seq_scores, answered)),
        "score/shaped_mean": masking.masked_mean(shaped_scores, answered),
        "score/shaped_std": jnp.sqrt(masking.masked_var(shaped_scores, answered)),
        "reward/mean": score - kl_coef * seq_kl,
        "response/len_mean_tokens": masking.masked_mean(lengths, answered),
        "response/truncated_frac": jnp.mean(rollout.finish_reason == TRUNCATED, dtype=jnp.float32),
        "logprob/mean": masking.masked_mean(scored.old_logprobs, mask),
        **{f"logprob/{name}": quantiles[i] for i, name in enumerate(QUANTILES)},
        "policy/entropy_nats": masking.masked_mean(scored.token_entropy, mask),
        "rollout/logprob_gap_max": masking.masked_max(jnp.abs(rollout.behaviour_logprobs - scored.old_logprobs), mask),
        "rollout/kept_mass": masking.masked_mean(rollout.kept_mass, mask),
    } | _critic_metrics(scored.values, returns, mask)


def _critic_metrics(
    values: Float[Array, "B T"] | None, returns: Float[Array, "B T"] | None, mask: Bool[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """How much of the returns the critic foresaw, and what it gives on average; nothing without a critic."""
    if values is None or returns is None:
        return {}
    return {
        "critic/explained_variance": explained_variance(values, returns, mask),
        "critic/value_mean": masking.masked_mean(values, mask),
    }


@jax.jit
def named_score_means(
    response_mask: Bool[Array, "B T"], named_scores: dict[str, Float[Array, " B"]]
) -> dict[str, Float[Array, ""]]:
    """`score/NAME_mean` of every score that is part of the sum, before its weight."""
    answered = jnp.any(response_mask, axis=1)
    return {f"score/{name}_mean": masking.masked_mean(scores, answered) for name, scores in named_scores.items()}


def scalars(numbers: dict[str, Any]) -> dict[str, float]:
    """The numbers without the histograms."""
    return {name: value for name, value in numbers.items() if not isinstance(value, np.ndarray)}


def to_host(numbers: dict[str, Array]) -> dict[str, float]:
    """Scalars as Python floats, in one transfer."""
    return {name: float(value) for name, value in jax.device_get(numbers).items()}
