"""The numbers of an iteration's experience, all masked, unit and reduction in the name."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppo_jax.ops import kl, masking
from ppo_jax.records import TRUNCATED, Rollout, Scored

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


@jax.jit
def experience_metrics(
    rollout: Rollout, scored: Scored, seq_scores: Float[Array, " B"], kl_coef: Float[Array, ""]
) -> dict[str, Float[Array, ""]]:
    """Scores, KL, lengths and log-probs of one batch of answers, before it is trained on.

    `reward/mean` is the score minus β times the exact KL, whatever form of the KL the recipe penalises: the forms have
    the same expectation, and this one is comparable between them.
    """
    mask = rollout.response_mask
    answered = jnp.any(mask, axis=1)
    lengths = masking.masked_count(mask, axis=1)

    def mean_over_answers(token_values):
        return masking.masked_mean(masking.masked_sum(token_values, mask, axis=1), answered)

    seq_kl = mean_over_answers(scored.token_kl)
    score = masking.masked_mean(seq_scores, answered)
    token_k1 = kl.k1(scored.old_logprobs, scored.ref_logprobs)
    quantiles = masking.masked_quantiles(scored.old_logprobs, mask, tuple(QUANTILES.values()))
    return {
        "kl/seq_nats": seq_kl,
        "kl/token_nats": masking.masked_mean(scored.token_kl, mask),
        "kl/token_max_nats": masking.masked_max(scored.token_kl, mask),
        "kl/k1_seq_nats": mean_over_answers(token_k1),
        "score/mean": score,
        "score/std": jnp.sqrt(masking.masked_var(seq_scores, answered)),
        "reward/mean": score - kl_coef * seq_kl,
        "response/len_mean_tokens": masking.masked_mean(lengths, answered),
        "response/truncated_frac": jnp.mean(rollout.finish_reason == TRUNCATED, dtype=jnp.float32),
        "logprob/mean": masking.masked_mean(scored.old_logprobs, mask),
        **{f"logprob/{name}": quantiles[i] for i, name in enumerate(QUANTILES)},
        "policy/entropy_nats": masking.masked_mean(scored.token_entropy, mask),
        "rollout/logprob_gap_max": masking.masked_max(jnp.abs(rollout.behaviour_logprobs - scored.old_logprobs), mask),
        "rollout/kept_mass": masking.masked_mean(rollout.kept_mass, mask),
    }


def to_host(numbers: dict[str, Array]) -> dict[str, float]:
    """Scalars as Python floats, in one transfer."""
    return {name: float(value) for name, value in jax.device_get(numbers).items()}
