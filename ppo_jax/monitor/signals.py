"""How scores, lengths and log-probs are distributed over a batch of answers; their means are in `metrics`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ppo_jax import sharding
from ppo_jax.monitor.metrics import QUANTILES, to_host
from ppo_jax.monitor.texts import text_metrics
from ppo_jax.ops import kl, masking
from ppo_jax.processes import from_all
from ppo_jax.records import EOS, Rollout, Scored

# Edges of the histograms, in nats.
LOGPROB_EDGES = tuple(np.linspace(-20.0, 0.0, 81).tolist())
LOG_RATIO_EDGES = tuple(np.linspace(-5.0, 5.0, 81).tolist())
HISTOGRAM_EDGES = {
    "logprob/histogram": LOGPROB_EDGES,
    "ref_logprob/histogram": LOGPROB_EDGES,
    "log_ratio/histogram": LOG_RATIO_EDGES,
}


def of_answers(
    mesh: jax.sharding.Mesh,
    rollout: Rollout,
    scored: Scored,
    seq_scores: Float[Array, " B"],
    shaped_scores: Float[Array, " B"],
    token_rewards: Float[Array, "B T"],
    *,
    texts: list[str],
) -> dict[str, Any]:
    """All that is watched beside the means of `metrics`: distributions, histograms (as arrays), and the texts.

    `texts` are the answers of this process; the numbers are those of all answers, and the same in every process.
    """
    tokens, mask = (sharding.read(mesh, x) for x in (rollout.response_tokens, rollout.response_mask))
    return (
        to_host(distribution_metrics(rollout, scored, seq_scores, shaped_scores, token_rewards))
        | jax.device_get(histograms(rollout, scored))
        | text_metrics(from_all(texts), tokens, mask)
    )


@jax.jit
def distribution_metrics(
    rollout: Rollout,
    scored: Scored,
    seq_scores: Float[Array, " B"],
    shaped_scores: Float[Array, " B"],
    token_rewards: Float[Array, "B T"],
) -> dict[str, Float[Array, ""]]:
    """Quantiles, extremes and spreads; masked positions and rows without a response token are in none of them.

    The penalty of an answer is what its token rewards lack of its shaped score: in the units of that score, whatever
    form of the KL is paid, and 0 where all of it is in the loss.

    `log_ratio` is log π − log ρ of each sampled token, policy to reference: how the log-probs have moved since the SFT
    model. (That of the optimizer steps within an iteration is watched by `policy/...`, that of rollout and training by
    `rollout/logprob_gap_max`.)
    """
    mask = rollout.response_mask
    answered = jnp.any(mask, axis=1)
    lengths = masking.masked_count(mask, axis=1, dtype=seq_scores.dtype)
    log_ratio = kl.k1(scored.old_logprobs, scored.ref_logprobs)
    penalty = shaped_scores - masking.masked_sum(token_rewards, mask, axis=1)
    largest, smallest = masking.masked_max(seq_scores, answered), -masking.masked_max(-seq_scores, answered)
    ref_mean = masking.masked_mean(scored.ref_logprobs, mask)

    def frac(of_answers):
        return masking.masked_mean(of_answers.astype(seq_scores.dtype), answered)

    def quantiles(prefix, x, mask, unit=""):
        found = masking.masked_quantiles(x, mask, tuple(QUANTILES.values()))
        return {f"{prefix}{name}{unit}": found[i] for i, name in enumerate(QUANTILES)}

    return {
        **quantiles("score/", seq_scores, answered),
        "score/at_min_frac": frac(seq_scores == smallest),
        "score/at_max_frac": frac(seq_scores == largest),
        "score/len_correlation": masking.masked_correlation(seq_scores, lengths, answered),
        "reward/penalty_std": jnp.sqrt(masking.masked_var(penalty, answered)),
        **quantiles("response/len_", lengths, answered, "_tokens"),
        "response/empty_frac": frac((lengths == 1) & (rollout.finish_reason == EOS)),
        **quantiles("log_ratio/", log_ratio, mask),
        "ref_logprob/mean": ref_mean,
        **quantiles("ref_logprob/", scored.ref_logprobs, mask),
        "ref_logprob/perplexity": jnp.exp(-ref_mean),
    }


@jax.jit
def histograms(rollout: Rollout, scored: Scored) -> dict[str, Int[Array, " bins"]]:
    """Tokens in each bin of `HISTOGRAM_EDGES`."""
    values = {
        "logprob/histogram": scored.old_logprobs,
        "ref_logprob/histogram": scored.ref_logprobs,
        "log_ratio/histogram": kl.k1(scored.old_logprobs, scored.ref_logprobs),
    }
    mask = rollout.response_mask
    return {name: masking.masked_histogram(x, mask, HISTOGRAM_EDGES[name]) for name, x in values.items()}
