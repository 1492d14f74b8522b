"""Step 3: what policy and reference say of the sampled tokens, over response tokens; twin of `ppo_jax/scoring.py`."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ppo_torch_ref import ops
from ppo_torch_ref.model import response_logits
from ppo_torch_ref.rollout import Rollout


@dataclass(frozen=True)
class Scored:
    """All [B, T], nats per token, before any update; fields as in `ppo_jax.records.Scored`."""

    old_logprobs: Tensor
    ref_logprobs: Tensor
    token_kl: Tensor  # exact KL(policy || reference) over the whole vocabulary
    token_entropy: Tensor  # of the policy


@torch.no_grad()
def score(
    model: nn.Module, reference: nn.Module, rollout: Rollout, *, temperature: float, micro_batch_size: int
) -> Scored:
    """Log-probs of both models, entropy of the policy and exact KL, `micro_batch_size` answers at a time."""
    sequences = (rollout.prompt_tokens, rollout.prompt_mask, rollout.response_tokens, rollout.response_mask)
    parts = []
    for micro_batch in zip(*(x.split(micro_batch_size) for x in sequences), strict=True):
        _, _, tokens, mask = micro_batch
        logits, ref_logits = response_logits(model, *micro_batch), response_logits(reference, *micro_batch)
        scored = Scored(
            old_logprobs=ops.token_logprobs(logits, tokens, temperature=temperature),
            ref_logprobs=ops.token_logprobs(ref_logits, tokens, temperature=temperature),
            token_kl=ops.exact_token_kl(logits, ref_logits, temperature=temperature),
            token_entropy=ops.entropy(logits, temperature=temperature),
        )
        parts.append([ops.zero_masked(getattr(scored, field.name), mask) for field in fields(scored)])
    return Scored(*(torch.cat(column) for column in zip(*parts, strict=True)))
