"""From token rewards to advantages (step 5): which answers were better than their batch, group or value.

Every estimator returns [B, T], 0 at masked positions; rows without a response token are left out of every mean.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppo_jax.ops import masking


def batch_mean_advantages(token_rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """The article's advantage: the answer's whole reward minus the mean of the batch, on every response token.

        A_bt = R_b − (1/B) Σ_b' R_b',   R_b = Σ_t r_bt

    Shapes: [B, T], units of the reward, masked positions 0. Rows without a response token are left out of the mean.
    The mean includes the answer itself, which shrinks the expected gradient by 1 − 1/B: harmless alone, wrong beside a
    loss term that is not shrunk. A batch of one gives 0.
    """
    seq_rewards = masking.masked_sum(token_rewards, response_mask, axis=1)
    return _on_every_token(masking.masked_center(seq_rewards, jnp.any(response_mask, axis=1)), response_mask)


def whitened_batch_mean_advantages(
    token_rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Batch-mean advantages over the standard deviation of the batch's rewards: (R_b − mean R) / sqrt(var R + 1e-8).

    Mean and variance are over answers, not tokens, so the baseline stays the batch mean. Shapes: [B, T], no unit.
    """
    seq_rewards = masking.masked_sum(token_rewards, response_mask, axis=1)
    return _on_every_token(whiten(seq_rewards, jnp.any(response_mask, axis=1)), response_mask)


def leave_one_out_advantages(
    token_rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """The answer's whole reward minus the mean of the *other* answers of the batch, on every response token.

        A_bt = R_b − 1/(B−1) Σ_{b'≠b} R_b',   R_b = Σ_t r_bt

    Shapes: [B, T], units of the reward, masked positions 0. The batch mean's advantage times B / (B − 1): not shrunk,
    because the answer is not in its own baseline. A single answer gives 0. Source: Kool et al., "Buy 4 REINFORCE
    Samples, Get a Baseline for Free!", 2019, equation 8.
    """
    seq_rewards = masking.masked_sum(token_rewards, response_mask, axis=1)
    answered = jnp.any(response_mask, axis=1)
    centered = masking.masked_center(seq_rewards, answered)
    return _on_every_token(centered * _without_itself(answered, centered.dtype), response_mask)


def leave_one_out_to_go_advantages(
    token_rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Reward still to come, minus what it is at the same position in the *other* answers of the batch.

        A_bt = G_bt − 1/(B−1) Σ_{b'≠b} G_b't,   G_bt = Σ_{t' >= t} r_bt'

    An answer that has ended keeps the G of its last token, so that every position has B − 1 others to be compared with.
    The answer itself is not in its baseline, so the expected gradient is not shrunk: the one to use beside a KL term in
    the loss, which is not shrunk either. Shapes: [B, T], units of the reward, masked positions 0. Rows without a
    response token are left out; a single answer gives 0. Source: Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline
    for Free!", 2019, equation 8, taken at every position.
    """
    to_go = jnp.cumsum(masking.zero_masked(token_rewards, response_mask)[:, ::-1], axis=1)[:, ::-1]
    last = masking.last_position(response_mask)[:, None]
    held = jnp.take_along_axis(to_go, jnp.minimum(jnp.arange(response_mask.shape[1])[None], last), axis=1)
    answered = jnp.broadcast_to(jnp.any(response_mask, axis=1, keepdims=True), response_mask.shape)
    centered = masking.masked_center(held, answered, axis=0)
    return masking.zero_masked(centered, response_mask) * _without_itself(answered[:, 0], held.dtype)


def _without_itself(answered: Bool[Array, " B"], dtype: Any) -> Float[Array, ""]:
    """n / (n − 1) of the n answers: x minus the mean of all, times this, is x minus the mean of the others."""
    answers = masking.masked_count(answered, dtype=dtype)
    return answers / jnp.maximum(answers - 1.0, 1.0)


def _on_every_token(seq_values: Float[Array, " B"], response_mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    return masking.zero_masked(jnp.broadcast_to(seq_values[:, None], response_mask.shape), response_mask)


def whiten(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """(x − mean) / sqrt(var + 1e-8) over the unmasked elements, 0 at masked ones.

    Population variance (ddof 0). Equal elements, also large ones, and a batch of one give 0, not NaN.
    """
    return masking.masked_center(x, mask) / jnp.sqrt(masking.masked_var(x, mask) + 1e-8)


def group_mean_advantages(
    token_rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, answers_per_prompt: int
) -> Float[Array, "B T"]:
    """`batch_mean_advantages` within the answers to one prompt: R_b minus the mean of its group, shrunk by 1 − 1/n."""
    return _within_groups(batch_mean_advantages, token_rewards, response_mask, answers_per_prompt)


def group_normalised_advantages(
    token_rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, answers_per_prompt: int
) -> Float[Array, "B T"]:
    """`whitened_batch_mean_advantages` within the answers to one prompt: (R_b − mean) / sqrt(var + 1e-8). No unit.

    The standard deviation is the group's (ddof 0), so a prompt whose answers hardly differ pulls as hard as any other;
    a group of equal rewards gives 0. Source: Shao et al., "DeepSeekMath", 2024, section 4.1.2 (GRPO), with the 1e-8 of
    `whiten`.
    """
    return _within_groups(whitened_batch_mean_advantages, token_rewards, response_mask, answers_per_prompt)


def group_leave_one_out_advantages(
    token_rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, answers_per_prompt: int
) -> Float[Array, "B T"]:
    """`leave_one_out_advantages` within the answers to one prompt: not shrunk, not divided.

    Source: Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback
    in LLMs", 2024 (RLOO).
    """
    return _within_groups(leave_one_out_advantages, token_rewards, response_mask, answers_per_prompt)


def group_leave_one_out_to_go_advantages(
    token_rewards: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, answers_per_prompt: int
) -> Float[Array, "B T"]:
    """`leave_one_out_to_go_advantages` within the answers to one prompt: the one beside a KL term in the loss."""
    return _within_groups(leave_one_out_to_go_advantages, token_rewards, response_mask, answers_per_prompt)


def _within_groups(
    estimator: Callable[[Array, Array], Array],
    token_rewards: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    answers_per_prompt: int,
) -> Float[Array, "B T"]:
    """The estimator of a batch on every n neighbouring rows, the answers to one prompt: [B, T] as [N, n, T]."""
    groups = (x.reshape(-1, answers_per_prompt, x.shape[1]) for x in (token_rewards, response_mask))
    return jax.vmap(estimator)(*groups).reshape(token_rewards.shape)


def gae_advantages(
    token_rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    discount: float,
    gae_lambda: float,
    bootstrap_values: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation; returns (advantages, returns), both [B, T].

        δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γ λ A_{t+1},   returns = A + V

    `values[:, t]` is read from the hidden state that predicts token t. Behind an answer's last token A is 0 and V is
    `bootstrap_values` [B]: 0 (or None for all of them) where nothing comes after, the value of the state behind the
    last token where an answer was cut off and would have gone on. Nothing else behind the EOS reaches back. Source:
    Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", 2016, equation 16.
    """
    has_next = jnp.pad(response_mask[:, 1:], ((0, 0), (0, 1)))
    behind = jnp.zeros_like(values[:, 0]) if bootstrap_values is None else bootstrap_values
    next_values = jnp.where(has_next, jnp.pad(values[:, 1:], ((0, 0), (0, 1))), behind[:, None])
    td_errors = masking.zero_masked(token_rewards + discount * next_values - values, response_mask)

    def step(next_advantage, td_error):
        advantage = td_error + discount * gae_lambda * next_advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros_like(values[:, 0]), td_errors.T, reverse=True)
    return advantages.T, masking.zero_masked(advantages.T + values, response_mask)


def whitened_gae_advantages(
    token_rewards: Float[Array, "B T"], values: Float[Array, "B T"], response_mask: Bool[Array, "B T"], **settings: Any
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`gae_advantages` of the same settings, the advantages whitened over all response tokens of the batch; returns
    (advantages, returns).

    The returns are those of the unwhitened advantages: the critic's target keeps the units of the reward.
    """
    advantages, returns = gae_advantages(token_rewards, values, response_mask, **settings)
    return whiten(advantages, response_mask), returns


def importance_weights(
    old_logprobs: Float[Array, "B T"],
    behaviour_logprobs: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    cap: float,
) -> Float[Array, "B T"]:
    """w_t = min(π_old(a_t) / μ(a_t), cap): what a token's advantage is multiplied by where μ drew it, not π_old.

    `old_logprobs` are those of the training forward, `behaviour_logprobs` those of the decoder that drew the tokens, in
    nats per token; they part by rounding, or by an update when the rollout is behind. Shapes: [B, T], no unit, masked
    positions 0. A weight, not a ratio: no gradient belongs in it. The cap (at least 1) bounds the variance and biases
    what it bounds. Source: Espeholt et al., "IMPALA", 2018, section 4.1, for the truncation.
    """
    log_ratio = masking.zero_masked(old_logprobs - behaviour_logprobs, response_mask)
    return masking.zero_masked(jnp.minimum(jnp.exp(log_ratio), cap), response_mask)


def explained_variance(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """1 − var(returns − values) / var(returns) over response tokens: 1 for a perfect critic, 0 for a constant one.

    Below 0 the critic is worse than none. Equal returns have no variance to explain: 0. Scalar, no unit.
    """
    variance = masking.masked_var(returns, response_mask)
    explained = 1.0 - masking.masked_var(returns - values, response_mask) / jnp.where(variance > 0, variance, 1.0)
    return jnp.where(variance > 0, explained, jnp.zeros_like(variance))
