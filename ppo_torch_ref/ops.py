"""The mathematics of PPO on tensors; the twin of `ppo_jax/ops`, in the order of its files.

Axes: B answers, T response tokens (right-padded), V vocabulary. Masks are True on what counts, masked positions hold 0.
Log-probs, entropies and KLs are in nats, of the full softmax at the sampling temperature, in float32 at least.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# --- masking: replaced before use, so that not even a masked NaN reaches a value or a gradient ---


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is True, 0 elsewhere."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(x: Tensor, mask: Tensor, *, axis: int | None = None) -> Tensor:
    """Sum of the unmasked elements, 0 where there are none."""
    return torch.sum(zero_masked(x, mask), dim=axis)


def masked_count(mask: Tensor, *, axis: int | None = None, dtype=torch.float32) -> Tensor:
    """Number of unmasked elements, as a float of `dtype` so that it can divide."""
    return torch.sum(mask, dim=axis, dtype=dtype)


def masked_mean(x: Tensor, mask: Tensor, *, axis: int | None = None) -> Tensor:
    """Mean of the unmasked elements, 0 where there are none."""
    return masked_sum(x, mask, axis=axis) / masked_count(mask, axis=axis, dtype=x.dtype).clamp(min=1)


def masked_center(x: Tensor, mask: Tensor, *, axis: int | None = None) -> Tensor:
    """`x` minus its masked mean; a reference element goes first, so that large equal numbers give exactly 0."""
    if axis is None:
        return masked_center(x.flatten(), mask.flatten(), axis=0).reshape(x.shape)
    first = x.gather(axis, torch.argmax(mask.int(), dim=axis, keepdim=True))
    shifted = zero_masked(x - first, mask)
    return zero_masked(shifted - masked_mean(shifted, mask, axis=axis).unsqueeze(axis), mask)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance (ddof 0) of the unmasked elements."""
    return masked_mean(masked_center(x, mask) ** 2, mask)


def masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """Largest unmasked element, -inf when there is none."""
    return torch.max(x.masked_fill(~mask, -torch.inf))


def masked_quantiles(x: Tensor, mask: Tensor, probabilities: Sequence[float]) -> Tensor:
    """Linearly interpolated quantiles of the unmasked elements, NaN when there are none."""
    return torch.nanquantile(
        x.masked_fill(~mask, torch.nan), torch.tensor(probabilities, dtype=x.dtype, device=x.device)
    )


def last_position(mask: Tensor) -> Tensor:
    """Index of the last True of every row (T - 1 for a row without one)."""
    return mask.shape[1] - 1 - torch.argmax(mask.flip(1).int(), dim=1)


# --- log-probs: `logits[..., t, :]` predicts `tokens[..., t]` ---


def log_distribution(logits: Tensor, *, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / temperature, dim=-1)


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """log π(a_t | s_t) of each given token."""
    log_probs = log_distribution(logits, temperature=temperature)
    return log_probs.gather(-1, tokens.long()[..., None])[..., 0]


def entropy(logits: Tensor, *, temperature: float) -> Tensor:
    """H(π) = −Σ_v π(v) log π(v); a token of probability 0 adds 0."""
    log_probs = log_distribution(logits, temperature=temperature)
    probs = torch.exp(log_probs)
    return -torch.sum(probs * log_probs.masked_fill(probs == 0, 0.0), dim=-1)


# --- KL: exact over the vocabulary, or estimated from the sampled token ---


def _expm1_minus(log_ratio: Tensor) -> Tensor:
    return torch.clamp(torch.expm1(-log_ratio) + log_ratio, min=0)


def exact_token_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(π ‖ ρ) = Σ_v π (exp(−d) − 1 + d), d = log π − log ρ: no summand is negative, unlike those of Σ π d."""
    log_p = log_distribution(logits, temperature=temperature)
    log_q = log_distribution(ref_logits, temperature=temperature)
    p, q = torch.exp(log_p), torch.exp(log_q)
    d = torch.where(p > 0, log_p - log_q, torch.zeros_like(p))
    near = d.abs() < 1  # expm1 overflows for ρ ≫ π; there the same summand is ρ − π + π d
    summand = torch.where(near, p * _expm1_minus(d.masked_fill(~near, 0.0)), q - p + p * d)
    return torch.sum(torch.where(p > 0, summand, q), dim=-1)


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π(a) − log ρ(a): the form that may be subtracted from a reward."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½ (log π(a) − log ρ(a))²."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ρ(a)/π(a) − 1 − log(ρ(a)/π(a)): never negative."""
    return _expm1_minus(logprobs - ref_logprobs)


def sampled_token_k3(logits: Tensor, ref_logits: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """k3 of the sampled tokens, to be differentiated: the KL term of GRPO's loss, whose gradient is biased."""
    logprobs = token_logprobs(logits, tokens, temperature=temperature)
    return k3(logprobs, token_logprobs(ref_logits, tokens, temperature=temperature))


def kl_per_token(token_k1: Tensor, response_mask: Tensor) -> Tensor:
    """k1 divided by the length of its answer."""
    lengths = masked_count(response_mask, axis=1, dtype=token_k1.dtype).clamp(min=1)
    return zero_masked(token_k1, response_mask) / lengths[:, None]


def future_kl(token_kl: Tensor, response_mask: Tensor) -> Tensor:
    """F_t = Σ_{t' > t} m_t' KL_t'."""
    later = torch.zeros_like(token_kl)
    for t in range(token_kl.shape[1] - 2, -1, -1):
        later[:, t] = later[:, t + 1] + zero_masked(token_kl, response_mask)[:, t + 1]
    return zero_masked(later, response_mask)


def next_kl_coef(kl_coef: Tensor, seq_kl: Tensor, *, target_nats: float, horizon: float) -> Tensor:
    """β (1 + clip(KL / target − 1, ±0.2) / horizon), of scalars; KL and target in nats per sequence."""
    error = torch.clamp(seq_kl / target_nats - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error / horizon)


# --- rewards ---


def token_rewards(seq_scores: Tensor, token_k1: Tensor, response_mask: Tensor, *, kl_coef: float | Tensor) -> Tensor:
    """r_t = −β k1_t on every response token, plus the score on the last one."""
    return score_on_last_token(seq_scores, response_mask) - kl_coef * zero_masked(token_k1, response_mask)


def exact_kl_token_rewards(
    seq_scores: Tensor, token_kl: Tensor, response_mask: Tensor, *, kl_coef: float | Tensor
) -> Tensor:
    """r_t = −β m_{t+1} KL_{t+1}, plus the score on the last response token; β KL_t is in the loss."""
    kl_of_next = zero_masked(token_kl, response_mask).roll(-1, dims=1)
    kl_of_next[:, -1] = 0
    return score_on_last_token(seq_scores, response_mask) - kl_coef * zero_masked(kl_of_next, response_mask)


def score_on_last_token(seq_scores: Tensor, response_mask: Tensor) -> Tensor:
    position = torch.arange(response_mask.shape[1], device=response_mask.device)
    is_last = (position == last_position(response_mask)[:, None]) & response_mask
    return zero_masked(seq_scores[:, None], is_last)


# --- advantages: token rewards [B, T] to [B, T], rows without a response token left out of every mean ---


def batch_mean_advantages(token_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """A_bt = R_b − (1/B) Σ_b' R_b' with R_b = Σ_t r_bt."""
    seq_rewards = masked_sum(token_rewards, response_mask, axis=1)
    return zero_masked(masked_center(seq_rewards, response_mask.any(dim=1))[:, None], response_mask)


def whitened_batch_mean_advantages(token_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """A_bt = (R_b − mean R) / sqrt(var R + 1e-8), mean and variance over answers."""
    seq_rewards = masked_sum(token_rewards, response_mask, axis=1)
    return zero_masked(whiten(seq_rewards, response_mask.any(dim=1))[:, None], response_mask)


def leave_one_out_advantages(token_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """A_bt = R_b − mean of the other answers' R_b'; 0 for a single answer."""
    count = masked_count(response_mask.any(dim=1), dtype=token_rewards.dtype)
    return batch_mean_advantages(token_rewards, response_mask) * count / (count - 1).clamp(min=1)


def leave_one_out_to_go_advantages(token_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """A_bt = G_bt − mean over the other answers of G_b't, G_bt = Σ_{t' >= t} r_bt'; ended answers keep their last G."""
    rewards, answered = zero_masked(token_rewards, response_mask), response_mask.any(dim=1)
    to_go = torch.stack([rewards[:, t:].sum(dim=1) for t in range(rewards.shape[1])], dim=1)
    last = to_go.gather(1, last_position(response_mask)[:, None])
    held = torch.where(response_mask, to_go, last)
    count = masked_count(answered, dtype=held.dtype)
    centered = masked_center(held, answered[:, None].expand_as(held), axis=0)
    return zero_masked(centered * count / (count - 1).clamp(min=1), response_mask)


def _in_groups(
    advantages: Callable[[Tensor, Tensor], Tensor],
    token_rewards: Tensor,
    response_mask: Tensor,
    answers_per_prompt: int,
) -> Tensor:
    """`advantages` of every prompt's answers, which are neighbouring rows, by themselves."""
    groups = zip(token_rewards.split(answers_per_prompt), response_mask.split(answers_per_prompt), strict=True)
    return torch.cat([advantages(rewards, mask) for rewards, mask in groups])


def group_mean_advantages(token_rewards: Tensor, response_mask: Tensor, *, answers_per_prompt: int) -> Tensor:
    """`batch_mean_advantages` within each group."""
    return _in_groups(batch_mean_advantages, token_rewards, response_mask, answers_per_prompt)


def group_normalised_advantages(token_rewards: Tensor, response_mask: Tensor, *, answers_per_prompt: int) -> Tensor:
    """`whitened_batch_mean_advantages` within each group."""
    return _in_groups(whitened_batch_mean_advantages, token_rewards, response_mask, answers_per_prompt)


def group_leave_one_out_advantages(token_rewards: Tensor, response_mask: Tensor, *, answers_per_prompt: int) -> Tensor:
    """`leave_one_out_advantages` within each group."""
    return _in_groups(leave_one_out_advantages, token_rewards, response_mask, answers_per_prompt)


def group_leave_one_out_to_go_advantages(
    token_rewards: Tensor, response_mask: Tensor, *, answers_per_prompt: int
) -> Tensor:
    """`leave_one_out_to_go_advantages` within each group."""
    return _in_groups(leave_one_out_to_go_advantages, token_rewards, response_mask, answers_per_prompt)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x − mean) / sqrt(var + 1e-8) over the unmasked elements, population variance."""
    return masked_center(x, mask) / torch.sqrt(masked_var(x, mask) + 1e-8)


def gae_advantages(
    token_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    discount: float,
    gae_lambda: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) with δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γ λ A_{t+1}.

    Behind the answer A is 0, and V is `bootstrap_values` [B], or 0 without them.
    """
    rewards, values = zero_masked(token_rewards, response_mask), zero_masked(values, response_mask)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    if bootstrap_values is not None:
        next_values = next_values + score_on_last_token(bootstrap_values, response_mask)
    td_errors = rewards + discount * next_values - values
    advantages, next_advantage = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_advantage = td_errors[:, t] + discount * gae_lambda * next_advantage
        advantages[:, t] = next_advantage
    return zero_masked(advantages, response_mask), zero_masked(advantages + values, response_mask)


def whitened_gae_advantages(
    token_rewards: Tensor, values: Tensor, response_mask: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    """`gae_advantages` of the same settings, whitened over tokens; the returns are those of the unwhitened ones."""
    advantages, returns = gae_advantages(token_rewards, values, response_mask, **settings)
    return whiten(advantages, response_mask), returns


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
    """1 − var(R − V) / var R over tokens, 0 where all returns are equal."""
    variance, unexplained = masked_var(returns, response_mask), masked_var(returns - values, response_mask)
    return torch.where(variance > 0, 1.0 - unexplained / variance, torch.zeros_like(variance))


def importance_weights(
    old_logprobs: Tensor, behaviour_logprobs: Tensor, response_mask: Tensor, *, cap: float
) -> Tensor:
    """min(π_old / π_behaviour, cap) of every response token; advantages are multiplied by it."""
    log_ratio = zero_masked(old_logprobs - behaviour_logprobs, response_mask)
    return zero_masked(torch.exp(log_ratio).clamp(max=cap), response_mask)


# --- losses: per token and unreduced; weights of the whole minibatch reduce them ---


def clipped_policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Tensor:
    """ℓ_t = −min(r_t A_t, clip(r_t, 1 − ε, 1 + ε_high) A_t), r_t = exp(log π_θ − log π_old); ε_high is ε by default."""
    ratio = torch.exp(policy_logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1.0 - clip_eps, 1.0 + (clip_eps if clip_eps_high is None else clip_eps_high))
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


def dual_clipped_policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float,
) -> Tensor:
    """`clipped_policy_loss`, but at most −c A_t where A_t < 0, however large the ratio has become."""
    token_losses = clipped_policy_loss(
        policy_logprobs, old_logprobs, advantages, clip_eps=clip_eps, clip_eps_high=clip_eps_high
    )
    return torch.where(advantages < 0, torch.minimum(token_losses, -dual_clip * advantages), token_losses)


def clipping_acts(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Where one of the clippings has won, so that the token's gradient is 0."""
    ratio = torch.exp(policy_logprobs - old_logprobs)
    highest = 1.0 + (clip_eps if clip_eps_high is None else clip_eps_high)
    too_low = (ratio < 1.0 - clip_eps) if dual_clip is None else (ratio < 1.0 - clip_eps) | (ratio > dual_clip)
    return ((advantages > 0) & (ratio > highest)) | ((advantages < 0) & too_low)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_eps: float) -> Tensor:
    """ℓ_t = ½ max((V − R)², (clip(V, V_old ± ε) − R)²)."""
    clipped_values = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2)


def weighted_sum(token_losses: Tensor, weights: Tensor) -> Tensor:
    """Σ_bt w_bt ℓ_bt; tokens of weight 0 touch neither the value nor the gradient."""
    return torch.sum(weights * zero_masked(token_losses, weights != 0))


def constant_weights(response_mask: Tensor, *, max_response_tokens: int, dtype=torch.float32) -> Tensor:
    """w = m / (B · max_response_tokens)."""
    return response_mask.to(dtype) / (response_mask.shape[0] * max_response_tokens)


def token_mean_weights(response_mask: Tensor, *, dtype=torch.float32) -> Tensor:
    """w = m / Σ m."""
    return response_mask.to(dtype) / masked_count(response_mask, dtype=dtype).clamp(min=1)


def sequence_mean_weights(response_mask: Tensor, *, dtype=torch.float32) -> Tensor:
    """w = m / (length_b · number of answers)."""
    lengths = masked_count(response_mask, axis=1, dtype=dtype)
    answers = torch.sum(lengths > 0, dtype=dtype)
    return response_mask.to(dtype) / lengths.clamp(min=1)[:, None] / answers.clamp(min=1)


# --- sampling: temperature, then top-k, then top-p, each renormalised ---


def truncated_weights(logits: Tensor, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """softmax(logits / τ) with everything outside top-k and then top-p set to 0; a row's sum is its kept mass."""
    probs = torch.exp(log_distribution(logits, temperature=temperature))
    if top_k > 0:
        edge = probs.topk(min(top_k, probs.shape[-1]), dim=-1).values[:, -1:]
        probs = zero_masked(probs, probs >= edge)
    if top_p < 1.0:
        descending = probs.sort(dim=-1, descending=True).values
        reached = descending.cumsum(-1) >= top_p * probs.sum(-1, keepdim=True)
        reached[:, -1] = True  # rounding may leave the whole sum a hair under the target
        edge = descending.gather(-1, reached.int().argmax(-1, keepdim=True))
        probs = zero_masked(probs, probs >= edge)
    return probs


def inverse_cdf(uniforms: Tensor, weights: Tensor) -> Tensor:
    """Token whose interval of the cumulative weights holds `uniform * Σ weights`; never one of weight 0.

    Summed in float64: a float32 cumulative sum over a large vocabulary is not even monotone.
    """
    cumulative = weights.double().cumsum(-1)
    index = torch.sum(cumulative <= uniforms.double()[:, None] * cumulative[:, -1:], dim=-1)
    last_positive = weights.shape[1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last_positive)


def sample_tokens(
    uniforms: Tensor, logits: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> Tensor:
    """One token per row, a deterministic function of the row's own uniform in [0, 1) and its own logits."""
    return inverse_cdf(uniforms, truncated_weights(logits, temperature=temperature, top_p=top_p, top_k=top_k))
