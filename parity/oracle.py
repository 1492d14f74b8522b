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


def sampled_token_k3(logits: Array, ref_logits: Array, tokens: Array, *, temperature: float) -> Array:
    """ρ / π − 1 − log (ρ / π) of the given tokens, [B] of logits [B, V].

    Source: Shao et al., "DeepSeekMath", 2024, equation 4.
    """
    out = []
    for row, ref_row, token in zip(logits, ref_logits, tokens, strict=True):
        quotient = probabilities(ref_row, temperature)[token] / probabilities(row, temperature)[token]
        out.append(quotient - 1 - math.log(quotient))
    return np.array(out)


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
