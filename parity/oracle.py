"""The formulas once more, in NumPy float64 and plain loops: what neither stack's tricks can have changed.

Written from the equations of the papers named below, one answer and one token at a time; a function bears the name and
the arguments of that of `ppo_jax.ops`. Sums and means are correctly rounded (`math.fsum`, `statistics.mean`), so an
error against this file is that of the code under test. Answers are [B, T] with a mask of their tokens, log-probs and
divergences are in nats.
"""

import math
import statistics

import numpy as np

Array = np.ndarray


def positions(answer_mask: Array) -> list[int]:
    """Where the tokens of one answer are, in order."""
    return [t for t in range(len(answer_mask)) if answer_mask[t]]


def answered(response_mask: Array) -> Array:
    """[B], True where there is a token."""
    return np.array([len(positions(mask)) > 0 for mask in response_mask])


def on_answers(values: list[float], response_mask: Array) -> Array:
    """[B, T] with the value of answer b on each of its tokens."""
    out = np.zeros(response_mask.shape)
    for b, value in enumerate(values):
        for t in positions(response_mask[b]):
            out[b, t] = value
    return out


# --- masked reductions ---


def unmasked(x: Array, mask: Array) -> list[float]:
    return [float(x[i]) for i in np.ndindex(x.shape) if mask[i]]


def masked_sum(x: Array, mask: Array) -> float:
    """Σ x, 0 without an element."""
    return math.fsum(unmasked(x, mask))


def masked_mean(x: Array, mask: Array) -> float:
    """Σ x / n, 0 without an element."""
    values = unmasked(x, mask)
    return statistics.mean(values) if values else 0.0


def masked_var(x: Array, mask: Array) -> float:
    """Σ (x − mean)² / n: the population's, ddof 0."""
    values, mean = unmasked(x, mask), masked_mean(x, mask)
    return math.fsum((value - mean) ** 2 for value in values) / max(len(values), 1)


# --- step 1, sampling: temperature, then top-k, then top-p ---


def probabilities(row: Array, temperature: float) -> list[float]:
    """π_v = exp(z_v / τ) / Σ exp(z / τ), of logits less their largest, which cancels."""
    powers = [math.exp((float(z) - float(max(row))) / temperature) for z in row]
    return [power / math.fsum(powers) for power in powers]


def truncated_weights(logits: Array, *, temperature: float, top_p: float, top_k: int) -> Array:
    """π_v of the kept tokens, 0 of the others, one row of [B, V] at a time.

    top-k keeps the k most likely tokens. top-p then keeps the smallest set of the most likely ones that reaches the
    share p of what top-k has left (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1).
    Tokens as likely as the last one kept are kept too.
    """
    out = np.zeros(logits.shape)
    for b, row in enumerate(logits):
        weights = probabilities(row, temperature)
        if top_k > 0:
            least = sorted(weights, reverse=True)[min(top_k, len(weights)) - 1]
            weights = [w if w >= least else 0.0 for w in weights]
        if top_p < 1.0:
            kept: list[float] = []
            for w in sorted(weights, reverse=True):
                kept.append(w)
                if math.fsum(kept) >= top_p * math.fsum(weights):
                    break
            weights = [w if w >= kept[-1] else 0.0 for w in weights]
        out[b] = weights
    return out


def inverse_cdf(uniforms: Array, weights: Array) -> Array:
    """The first token v with w_0 + ... + w_v > u Σ w."""
    tokens = []
    for uniform, row in zip(uniforms, weights, strict=True):
        target = float(uniform) * math.fsum(row)
        tokens.append(next(v for v in range(len(row)) if math.fsum(row[: v + 1]) > target))
    return np.array(tokens)


# --- step 3, log-probs and divergences between the policy π and the reference ρ ---


def token_logprobs(logits: Array, tokens: Array, *, temperature: float) -> Array:
    """log π(a) = z_a / τ − log Σ_v exp(z_v / τ), [B] of logits [B, V]."""
    out = []
    for row, token in zip(logits, tokens, strict=True):
        largest = float(max(row)) / temperature
        log_total = largest + math.log(math.fsum(math.exp(float(z) / temperature - largest) for z in row))
        out.append(float(row[token]) / temperature - log_total)
    return np.array(out)


def entropy(logits: Array, *, temperature: float) -> Array:
    """H = −Σ_v π_v log π_v, [B] of logits [B, V]; a token of probability 0 adds 0 (Shannon, 1948, section 6)."""
    rows = [probabilities(row, temperature) for row in logits]
    return np.array([-math.fsum(p * math.log(p) for p in row if p > 0) for row in rows])


def exact_token_kl(logits: Array, ref_logits: Array, *, temperature: float) -> Array:
    """KL(π ‖ ρ) = Σ_v π_v (log π_v − log ρ_v), [B] of logits [B, V] (Kullback and Leibler, 1951)."""
    out = []
    for row, ref_row in zip(logits, ref_logits, strict=True):
        pairs = zip(probabilities(row, temperature), probabilities(ref_row, temperature), strict=True)
        out.append(math.fsum(p * (math.log(p) - math.log(q)) for p, q in pairs if p > 0))
    return np.array(out)


def k1(logprobs: Array, ref_logprobs: Array) -> Array:
    """log (π / ρ) of the sampled token (Schulman, "Approximating KL Divergence", 2020, as k2 and k3)."""
    return np.array([x - y for x, y in zip(logprobs.flat, ref_logprobs.flat, strict=True)]).reshape(logprobs.shape)


def k2(logprobs: Array, ref_logprobs: Array) -> Array:
    """½ (log (π / ρ))²."""
    return np.array([d**2 / 2 for d in k1(logprobs, ref_logprobs).flat]).reshape(logprobs.shape)


def k3(logprobs: Array, ref_logprobs: Array) -> Array:
    """ρ / π − 1 − log (ρ / π)."""
    return np.array([math.exp(-d) - 1 + d for d in k1(logprobs, ref_logprobs).flat]).reshape(logprobs.shape)


def future_kl(token_kl: Array, response_mask: Array) -> Array:
    """F_t = Σ_{t' > t} KL_t' over the answer's tokens."""
    out = np.zeros(token_kl.shape)
    for b, row in enumerate(token_kl):
        for t in positions(response_mask[b]):
            out[b, t] = math.fsum(row[later] for later in positions(response_mask[b]) if later > t)
    return out


def next_kl_coef(kl_coef: float, seq_kl: float, *, target_nats: float, horizon: float) -> float:
    """β (1 + e / horizon) with e = clip(KL / target − 1, −0.2, 0.2).

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, section 2.2; its gain of 0.1 is
    a horizon of 10.
    """
    return kl_coef * (1 + min(max(seq_kl / target_nats - 1, -0.2), 0.2) / horizon)


# --- step 4, one reward per token ---


def token_rewards(seq_scores: Array, token_k1: Array, response_mask: Array, *, kl_coef: float) -> Array:
    """r_t = −β k1_t, and the score more on the answer's last token (Ziegler et al., 2019, equation 2, per token)."""
    out = np.zeros(token_k1.shape)
    for b, score in enumerate(seq_scores):
        for t in positions(response_mask[b]):
            out[b, t] = -kl_coef * token_k1[b, t] + (score if t == positions(response_mask[b])[-1] else 0)
    return out


def exact_kl_token_rewards(seq_scores: Array, token_kl: Array, response_mask: Array, *, kl_coef: float) -> Array:
    """r_t = −β KL_{t+1}: the state it belongs to was reached by token t. The last token has the score alone."""
    out = np.zeros(token_kl.shape)
    for b, score in enumerate(seq_scores):
        for t in positions(response_mask[b]):
            out[b, t] = score if t == positions(response_mask[b])[-1] else -kl_coef * token_kl[b, t + 1]
    return out


# --- step 5, advantages; an answer without a token is in no mean ---


def answer_rewards(token_rewards: Array, response_mask: Array) -> list[float]:
    """R_b = Σ_t r_bt."""
    return [masked_sum(rewards, mask) for rewards, mask in zip(token_rewards, response_mask, strict=True)]


def batch_mean_advantages(token_rewards: Array, response_mask: Array) -> Array:
    """A_bt = R_b − (1/B) Σ_b' R_b'."""
    totals = answer_rewards(token_rewards, response_mask)
    mean = masked_mean(np.array(totals), answered(response_mask))
    return on_answers([total - mean for total in totals], response_mask)


def whitened_batch_mean_advantages(token_rewards: Array, response_mask: Array) -> Array:
    """A_bt = (R_b − mean R) / sqrt(var R + 1e-8), the variance over answers, ddof 0."""
    totals = np.array(answer_rewards(token_rewards, response_mask))
    return on_answers(list(whiten(totals, answered(response_mask))), response_mask)


def leave_one_out_to_go_advantages(token_rewards: Array, response_mask: Array) -> Array:
    """A_bt = G_bt − 1/(B − 1) Σ_{b' ≠ b} G_b't with G_bt = Σ_{t' >= t} r_bt', which stays where it was behind the end.

    Source: Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019, equation 8, at every position.
    """

    def to_go(b: int, t: int) -> float:
        tokens = positions(response_mask[b])
        return math.fsum(token_rewards[b, later] for later in tokens if later >= min(t, tokens[-1]))

    out = np.zeros(token_rewards.shape)
    answers = positions(answered(response_mask))
    for b in answers:
        for t in positions(response_mask[b]):
            others = [to_go(other, t) for other in answers if other != b]
            out[b, t] = to_go(b, t) - math.fsum(others) / len(others) if others else 0.0
    return out


def whiten(x: Array, mask: Array) -> Array:
    """(x − mean) / sqrt(var + 1e-8), ddof 0."""
    out, mean, variance = np.zeros(x.shape), masked_mean(x, mask), masked_var(x, mask)
    for i in np.ndindex(x.shape):
        out[i] = (x[i] - mean) / math.sqrt(variance + 1e-8) if mask[i] else 0.0
    return out


def gae_advantages(
    token_rewards: Array, values: Array, response_mask: Array, *, discount: float, gae_lambda: float
) -> tuple[Array, Array]:
    """A_t = Σ_{l >= 0} (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t and V = 0 behind the last token; A + V.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", 2016,
    equation 16: the sum itself, not its recursion.
    """
    advantages, returns = np.zeros(values.shape), np.zeros(values.shape)
    for b, rewards in enumerate(token_rewards):
        tokens = positions(response_mask[b])
        value = {t: float(values[b, t]) for t in tokens}
        td_error = {t: rewards[t] + discount * value.get(t + 1, 0.0) - value[t] for t in tokens}
        for t in tokens:
            steps = (later for later in tokens if later >= t)
            advantages[b, t] = math.fsum((discount * gae_lambda) ** (later - t) * td_error[later] for later in steps)
            returns[b, t] = advantages[b, t] + value[t]
    return advantages, returns


# --- step 6, losses per token and the weights that reduce them ---


def clipped_policy_loss(policy_logprobs: Array, old_logprobs: Array, advantages: Array, *, clip_eps: float) -> Array:
    """−min(r A, clip(r, 1 − ε, 1 + ε) A), r = π / π_old.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, equation 7, its sign turned.
    """
    out = np.zeros(advantages.shape)
    for i in np.ndindex(advantages.shape):
        ratio, advantage = math.exp(policy_logprobs[i] - old_logprobs[i]), advantages[i]
        out[i] = -min(ratio * advantage, min(max(ratio, 1 - clip_eps), 1 + clip_eps) * advantage)
    return out


def clipping_acts(policy_logprobs: Array, old_logprobs: Array, advantages: Array, *, clip_eps: float) -> Array:
    """Where clip(r, 1 − ε, 1 + ε) A < r A, so that the ratio is not in the loss."""
    out = np.zeros(advantages.shape, bool)
    for i in np.ndindex(advantages.shape):
        ratio, advantage = math.exp(policy_logprobs[i] - old_logprobs[i]), advantages[i]
        out[i] = min(max(ratio, 1 - clip_eps), 1 + clip_eps) * advantage < ratio * advantage
    return out


def clipped_value_loss(values: Array, old_values: Array, returns: Array, *, clip_eps: float) -> Array:
    """½ max((V − R)², (V_clip − R)²), V_clip within ε of V_old.

    Source: Engstrom et al., "Implementation Matters in Deep Policy Gradients", 2020, section 3.
    """
    out = np.zeros(values.shape)
    for i in np.ndindex(values.shape):
        clipped = min(max(values[i], old_values[i] - clip_eps), old_values[i] + clip_eps)
        out[i] = max((values[i] - returns[i]) ** 2, (clipped - returns[i]) ** 2) / 2
    return out


def weighted_sum(token_losses: Array, weights: Array) -> float:
    """Σ_bt w_bt ℓ_bt."""
    return math.fsum(float(weights[i] * token_losses[i]) for i in np.ndindex(weights.shape) if weights[i] != 0)


def constant_weights(response_mask: Array, *, max_response_tokens: int) -> Array:
    """1 / (B · longest answer allowed)."""
    return on_answers([1 / (len(response_mask) * max_response_tokens)] * len(response_mask), response_mask)


def token_mean_weights(response_mask: Array) -> Array:
    """1 / all tokens."""
    return on_answers([1 / max(response_mask.sum(), 1)] * len(response_mask), response_mask)


def sequence_mean_weights(response_mask: Array) -> Array:
    """1 / (the answer's tokens · answers)."""
    lengths = [len(positions(mask)) for mask in response_mask]
    answers = sum(length > 0 for length in lengths)
    return on_answers([1 / (max(length, 1) * max(answers, 1)) for length in lengths], response_mask)
