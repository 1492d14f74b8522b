"""The oracle of steps 4 and 5: what is made of scores, one reward per token, and what of these is an advantage."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from parity import oracle
from parity.oracle import Array

Moments = tuple[float, float, float]


# --- step 4, scores ---


def first_moments() -> Moments:
    """How many, their mean, and the sum of squared distances to it, of nothing."""
    return 0.0, 0.0, 0.0


def merged_moments(moments: Moments, seq_scores: Array, answered: Array) -> Moments:
    """Those of Σ s and Σ s² of what was seen and of what is new, in fractions, which do not round."""
    n, mean, m2 = (Fraction(float(x)) for x in moments)
    new = [Fraction(float(s)) for s, counts in zip(seq_scores, answered, strict=True) if counts]
    count, total = n + len(new), n * mean + sum(new)
    squares = m2 + n * mean**2 + sum(s**2 for s in new)
    return (float(count), float(total / count), float(squares - total**2 / count)) if count else first_moments()


def normalised_scores(seq_scores: Array, moments: Moments) -> Array:
    """(s − mean) / sqrt(m2 / n + 1e-8)."""
    n, mean, m2 = moments
    return np.array([(float(s) - mean) / math.sqrt(m2 / max(n, 1) + 1e-8) for s in seq_scores])


def clipped_scores(seq_scores: Array, *, bound: float) -> Array:
    """No score further from 0 than the bound."""
    return np.array([math.copysign(min(abs(s), bound), s) for s in seq_scores])


def missing_eos_penalty(ended: Array, *, penalty: float) -> Array:
    """All of it for an answer that was cut off."""
    return np.array([0.0 if has_ended else penalty for has_ended in ended])


def too_short_penalty(lengths: Array, *, min_tokens: int, penalty: float) -> Array:
    """penalty (1 − L / min) of an answer below it."""
    return np.array([penalty * (1 - length / min_tokens) if length < min_tokens else 0.0 for length in lengths])


def too_long_penalty(lengths: Array, *, soft_max_tokens: int, max_tokens: int, penalty: float) -> Array:
    """0 up to the soft bound, all of it from the hard one on, straight between.

    Source: Yu et al., "DAPO", 2025, equation 13.
    """
    out = []
    for length in lengths:
        over = (length - soft_max_tokens) / (max_tokens - soft_max_tokens)
        out.append(0.0 if length <= soft_max_tokens else penalty if length >= max_tokens else penalty * over)
    return np.array(out)


# --- step 4, one reward per token ---


def token_rewards(seq_scores: Array, token_k1: Array, response_mask: Array, *, kl_coef: float) -> Array:
    """r_t = −β k1_t, and the score more on the answer's last token (Ziegler et al., 2019, equation 2, per token)."""
    out = np.zeros(token_k1.shape)
    for b, score in enumerate(seq_scores):
        for t in oracle.positions(response_mask[b]):
            out[b, t] = -kl_coef * token_k1[b, t] + (score if t == oracle.positions(response_mask[b])[-1] else 0)
    return out


def kl_per_token(token_k1: Array, response_mask: Array) -> Array:
    """k1_t / L with the answer's length L."""
    out = np.zeros(token_k1.shape)
    for b, row in enumerate(token_k1):
        tokens = oracle.positions(response_mask[b])
        for t in tokens:
            out[b, t] = row[t] / len(tokens)
    return out


def exact_kl_token_rewards(seq_scores: Array, token_kl: Array, response_mask: Array, *, kl_coef: float) -> Array:
    """r_t = −β KL_{t+1}: the state it belongs to was reached by token t. The last token has the score alone."""
    out = np.zeros(token_kl.shape)
    for b, score in enumerate(seq_scores):
        for t in oracle.positions(response_mask[b]):
            out[b, t] = score if t == oracle.positions(response_mask[b])[-1] else -kl_coef * token_kl[b, t + 1]
    return out


# --- step 5, advantages; an answer without a token is in no mean ---


def answer_rewards(token_rewards: Array, response_mask: Array) -> list[float]:
    """R_b = Σ_t r_bt."""
    return [oracle.masked_sum(rewards, mask) for rewards, mask in zip(token_rewards, response_mask, strict=True)]


def batch_mean_advantages(token_rewards: Array, response_mask: Array) -> Array:
    """A_bt = R_b − (1/B) Σ_b' R_b'."""
    totals = answer_rewards(token_rewards, response_mask)
    mean = oracle.masked_mean(np.array(totals), oracle.answered(response_mask))
    return oracle.on_answers([total - mean for total in totals], response_mask)


def whitened_batch_mean_advantages(token_rewards: Array, response_mask: Array) -> Array:
    """A_bt = (R_b − mean R) / sqrt(var R + 1e-8), the variance over answers, ddof 0."""
    totals = np.array(answer_rewards(token_rewards, response_mask))
    return oracle.on_answers(list(whiten(totals, oracle.answered(response_mask))), response_mask)


def leave_one_out_advantages(token_rewards: Array, response_mask: Array) -> Array:
    """A_bt = R_b − 1/(B − 1) Σ_{b' ≠ b} R_b'.

    Source: Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019, equation 8.
    """
    totals, answers = answer_rewards(token_rewards, response_mask), oracle.positions(oracle.answered(response_mask))
    values = []
    for b, total in enumerate(totals):
        others = [totals[other] for other in answers if other != b]
        values.append(total - math.fsum(others) / len(others) if others else 0.0)
    return oracle.on_answers(values, response_mask)


def leave_one_out_to_go_advantages(token_rewards: Array, response_mask: Array) -> Array:
    """A_bt = G_bt − 1/(B − 1) Σ_{b' ≠ b} G_b't with G_bt = Σ_{t' >= t} r_bt', which stays where it was behind the end.

    Source: as above, at every position.
    """

    def to_go(b: int, t: int) -> float:
        tokens = oracle.positions(response_mask[b])
        return math.fsum(token_rewards[b, later] for later in tokens if later >= min(t, tokens[-1]))

    out = np.zeros(token_rewards.shape)
    answers = oracle.positions(oracle.answered(response_mask))
    for b in answers:
        for t in oracle.positions(response_mask[b]):
            others = [to_go(other, t) for other in answers if other != b]
            out[b, t] = to_go(b, t) - math.fsum(others) / len(others) if others else 0.0
    return out


def whiten(x: Array, mask: Array) -> Array:
    """(x − mean) / sqrt(var + 1e-8), ddof 0."""
    out, mean, variance = np.zeros(x.shape), oracle.masked_mean(x, mask), oracle.masked_var(x, mask)
    for i in np.ndindex(x.shape):
        out[i] = (x[i] - mean) / math.sqrt(variance + 1e-8) if mask[i] else 0.0
    return out


def in_groups(estimator: Callable, token_rewards: Array, response_mask: Array, answers_per_prompt: int) -> Array:
    """The estimator of a batch on the answers to each prompt, which are neighbours."""
    out = np.zeros(token_rewards.shape)
    for prompt in range(len(token_rewards) // answers_per_prompt):
        rows = [prompt * answers_per_prompt + i for i in range(answers_per_prompt)]
        out[rows] = estimator(token_rewards[rows], response_mask[rows])
    return out


def group_mean_advantages(token_rewards: Array, response_mask: Array, *, answers_per_prompt: int) -> Array:
    """R_b less the mean of its group."""
    return in_groups(batch_mean_advantages, token_rewards, response_mask, answers_per_prompt)


def group_normalised_advantages(token_rewards: Array, response_mask: Array, *, answers_per_prompt: int) -> Array:
    """That over the deviation of its group (Shao et al., "DeepSeekMath", 2024, section 4.1.2)."""
    return in_groups(whitened_batch_mean_advantages, token_rewards, response_mask, answers_per_prompt)


def group_leave_one_out_advantages(token_rewards: Array, response_mask: Array, *, answers_per_prompt: int) -> Array:
    """R_b less the mean of the others of its group (Ahmadian et al., "Back to Basics", 2024)."""
    return in_groups(leave_one_out_advantages, token_rewards, response_mask, answers_per_prompt)


def group_leave_one_out_to_go_advantages(
    token_rewards: Array, response_mask: Array, *, answers_per_prompt: int
) -> Array:
    """The same of what is still to come at every position."""
    return in_groups(leave_one_out_to_go_advantages, token_rewards, response_mask, answers_per_prompt)


def gae_advantages(
    token_rewards: Array,
    values: Array,
    response_mask: Array,
    *,
    discount: float,
    gae_lambda: float,
    bootstrap_values: Array | None = None,
) -> tuple[Array, Array]:
    """A_t = Σ_{l >= 0} (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t, and A + V.

    V behind the last token is the bootstrap. Source: Schulman et al., "High-Dimensional Continuous Control Using
    Generalized Advantage Estimation", 2016, equation 16: the sum itself, not its recursion.
    """
    advantages, returns = np.zeros(values.shape), np.zeros(values.shape)
    for b, rewards in enumerate(token_rewards):
        tokens = oracle.positions(response_mask[b])
        value = {t: float(values[b, t]) for t in tokens}
        behind = 0.0 if bootstrap_values is None else float(bootstrap_values[b])
        td_error = {t: rewards[t] + discount * value.get(t + 1, behind) - value[t] for t in tokens}
        for t in tokens:
            steps = (later for later in tokens if later >= t)
            advantages[b, t] = math.fsum((discount * gae_lambda) ** (later - t) * td_error[later] for later in steps)
            returns[b, t] = advantages[b, t] + value[t]
    return advantages, returns


def whitened_gae_advantages(
    token_rewards: Array,
    values: Array,
    response_mask: Array,
    *,
    discount: float,
    gae_lambda: float,
    bootstrap_values: Array | None = None,
) -> tuple[Array, Array]:
    """The advantages of all tokens whitened together; the returns as they were."""
    factors = {"discount": discount, "gae_lambda": gae_lambda, "bootstrap_values": bootstrap_values}
    advantages, returns = gae_advantages(token_rewards, values, response_mask, **factors)
    return whiten(advantages, response_mask), returns


def importance_weights(old_logprobs: Array, behaviour_logprobs: Array, response_mask: Array, *, cap: float) -> Array:
    """π_old / μ, at most the cap (Espeholt et al., "IMPALA", 2018, section 4.1)."""
    out = np.zeros(old_logprobs.shape)
    for b, t in np.argwhere(response_mask):
        out[b, t] = min(math.exp(old_logprobs[b, t] - behaviour_logprobs[b, t]), cap)
    return out


def explained_variance(values: Array, returns: Array, response_mask: Array) -> float:
    """1 − var(R − V) / var R, 0 where all returns are equal."""
    whole, rest = oracle.masked_var(returns, response_mask), oracle.masked_var(returns - values, response_mask)
    return 1 - rest / whole if whole > 0 else 0.0
