"""From token rewards to advantages (step 5): which answers were better than their batch."""

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
    answers = masking.masked_count(answered[:, 0], dtype=held.dtype)
    return masking.zero_masked(centered, response_mask) * (answers / jnp.maximum(answers - 1.0, 1.0))


def _on_every_token(seq_values: Float[Array, " B"], response_mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    return masking.zero_masked(jnp.broadcast_to(seq_values[:, None], response_mask.shape), response_mask)


def whiten(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """(x − mean) / sqrt(var + 1e-8) over the unmasked elements, 0 at masked ones.

    Population variance (ddof 0). Equal elements, also large ones, and a batch of one give 0, not NaN.
    """
    return masking.masked_center(x, mask) / jnp.sqrt(masking.masked_var(x, mask) + 1e-8)


def gae_advantages(
    token_rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    discount: float,
    gae_lambda: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation; returns (advantages, returns), both [B, T].

        δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γ λ A_{t+1},   returns = A + V

    `values[:, t]` is read from the hidden state that predicts token t. After an answer's last token V and A are 0 (no
    bootstrap at truncation), so nothing behind the EOS reaches back. Source: Schulman et al., "High-Dimensional
    Continuous Control Using Generalized Advantage Estimation", 2016, equation 16.
    """
    rewards = masking.zero_masked(token_rewards, response_mask)
    values = masking.zero_masked(values, response_mask)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    td_errors = rewards + discount * next_values - values

    def step(next_advantage, td_error):
        advantage = td_error + discount * gae_lambda * next_advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros_like(values[:, 0]), td_errors.T, reverse=True)
    advantages = masking.zero_masked(advantages.T, response_mask)
    return advantages, masking.zero_masked(advantages + values, response_mask)
