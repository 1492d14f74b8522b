"""Step 3: what policy and reference say of the sampled tokens, over response tokens; twin of `ppo_jax/scoring.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppo_torch_ref import ops
from ppo_torch_ref.critic import Critic
from ppo_torch_ref.model import response_logits, response_states
from ppo_torch_ref.rollout import TRUNCATED, Rollout


@dataclass(frozen=True)
class Scored:
    """[B, T], nats per token, before any update; fields as in `ppo_jax.records.Scored`.

    The last two are a critic's, in units of the reward.
    """

    old_logprobs: Tensor
    ref_logprobs: Tensor
    token_kl: Tensor  # exact KL(policy || reference) over the whole vocabulary
    token_entropy: Tensor  # of the policy
    values: Tensor | None = None  # of the state each token is drawn from
    bootstrap_values: Tensor | None = None  # [B], of the state behind a truncated answer, 0 of the others


@torch.no_grad()
def score(
    model: nn.Module,
    reference: nn.Module,
    rollout: Rollout,
    *,
    temperature: float,
    micro_batch_size: int,
    critic: Critic | None = None,
    bootstrap: bool = False,
) -> Scored:
    """Log-probs of both models, entropy of the policy and exact KL, `micro_batch_size` answers at a time.

    With `bootstrap` the critic values the states behind truncated answers too.
    """
    sequences = (rollout.prompt_tokens, rollout.prompt_mask, rollout.response_tokens, rollout.response_mask)
    truncated, parts = rollout.finish_reason == TRUNCATED, []
    for *micro_batch, is_truncated in zip(*(x.split(micro_batch_size) for x in (*sequences, truncated)), strict=True):
        _, _, tokens, mask = micro_batch
        hidden, logits = response_states(model, *micro_batch)
        ref_logits = response_logits(reference, *micro_batch)
        part = {
            "old_logprobs": ops.token_logprobs(logits, tokens, temperature=temperature),
            "ref_logprobs": ops.token_logprobs(ref_logits, tokens, temperature=temperature),
            "token_kl": ops.exact_token_kl(logits, ref_logits, temperature=temperature),
            "token_entropy": ops.entropy(logits, temperature=temperature),
        }
        if critic is not None:
            values = critic(hidden, tuple(micro_batch))
            part["values"] = values[:, :-1]
        part = {name: ops.zero_masked(x, mask) for name, x in part.items()}
        if critic is not None and bootstrap:
            behind = values.gather(1, mask.sum(dim=1, keepdim=True))[:, 0]
            part["bootstrap_values"] = ops.zero_masked(behind, is_truncated)
        parts.append(part)
    return Scored(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
