"""Step 1: the current policy answers the prompts, one token at a time; the twin of `ppo_jax/rollout.py`.

Every token costs a forward pass over the whole sequence. Without a cache there is nothing that could be stale, so this
is what a cached rollout is checked against.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppo_torch_ref import ops
from ppo_torch_ref.model import response_logits

# Values of Rollout.finish_reason.
TRUNCATED, EOS = 0, 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and which end an answer."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    eos_tokens: list[int]


@dataclass(frozen=True)
class Rollout:
    """Sampled answers; fields as in `ppo_jax.records.Rollout`."""

    prompt_tokens: Tensor  # int [B, P], left-padded
    prompt_mask: Tensor  # bool [B, P]
    response_tokens: Tensor  # int [B, T], 0 behind the end of an answer
    response_mask: Tensor  # bool [B, T], the EOS included
    behaviour_logprobs: Tensor  # [B, T], nats of the full temperature-scaled policy
    kept_mass: Tensor  # [B, T], probability that top-k, top-p and a banned EOS left over
    finish_reason: Tensor  # int [B], TRUNCATED or EOS


@torch.no_grad()
def generate(
    model: nn.Module, prompt_tokens: Tensor, prompt_mask: Tensor, uniforms: Tensor, *, sampling: Sampling
) -> Rollout:
    """One answer to each left-padded prompt; `uniforms[b, t]` in [0, 1) decides token t of row b and nothing else."""
    batch, max_new = uniforms.shape
    eos_tokens = torch.tensor(sampling.eos_tokens, dtype=torch.long, device=uniforms.device)
    tokens = torch.zeros(batch, max_new, dtype=torch.long, device=uniforms.device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    running = torch.ones(batch, dtype=torch.bool, device=uniforms.device)
    logprob_columns, kept_columns = [], []
    for t in range(max_new):
        so_far = slice(0, t + 1)  # column t is still empty; the logits that predict it are the last ones
        logits = response_logits(model, prompt_tokens, prompt_mask, tokens[:, so_far], mask[:, so_far])[:, -1]
        log_probs = ops.log_distribution(logits, temperature=sampling.temperature)
        if t < sampling.min_new_tokens:
            logits = logits.index_fill(-1, eos_tokens, -torch.inf)
        weights = ops.truncated_weights(
            logits, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
        )
        drawn = ops.inverse_cdf(uniforms[:, t], weights)
        mask[:, t] = running
        tokens[:, t] = torch.where(running, drawn, 0)
        logprob_columns.append(ops.zero_masked(log_probs.gather(1, drawn[:, None])[:, 0], running))
        kept_columns.append(ops.zero_masked(ops.masked_sum(log_probs.exp(), weights > 0, axis=1), running))
        running = running & ~torch.isin(drawn, eos_tokens)
        if not running.any():
            break
    width = len(kept_columns)  # that of the longest answer
    return Rollout(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        response_tokens=tokens[:, :width],
        response_mask=mask[:, :width],
        behaviour_logprobs=torch.stack(logprob_columns, dim=1),
        kept_mass=torch.stack(kept_columns, dim=1),
        finish_reason=torch.where(running, TRUNCATED, EOS),
    )
