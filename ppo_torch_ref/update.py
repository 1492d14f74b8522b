"""Step 6: a few small, clipped steps, the optimizer written out; the twin of `ppo_jax/update.py`.

The loss of a minibatch is Σ w_bt ℓ_bt with weights known beforehand, so micro-batches add up: `backward` sums their
gradients, then comes one clipping and one AdamW step.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ppo_torch_ref import ops
from ppo_torch_ref.model import response_logits

Stats = dict[str, float]


@dataclass(frozen=True)
class Experience:
    """What the update trains on; fields as in `ppo_jax.records.Experience`."""

    prompt_tokens: Tensor  # int [B, P]
    prompt_mask: Tensor  # bool [B, P]
    response_tokens: Tensor  # int [B, T]
    response_mask: Tensor  # bool [B, T]
    old_logprobs: Tensor  # [B, T], nats per token, frozen
    advantages: Tensor  # [B, T], units of the reward

    def rows(self, index) -> "Experience":
        return Experience(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class Objective:
    """What the update minimises; `loss_weights` is one of `ops.*_weights`: mask -> weights.

    `kl_in_loss` is the `exact` form's half of the penalty.
    """

    temperature: float
    clip_eps: float
    loss_weights: Callable[..., Tensor]
    micro_batch_size: int
    kl_in_loss: bool


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of optimizer step 0, 1, ...: peak · min(1, (step + 1) / warmup) · decay."""
    warmup = min((step + 1) / max(warmup_steps, 1), 1.0)
    done = min(max((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0), 1.0)
    decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2.0}
    return peak * warmup * decay[schedule]


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """sqrt of the sum of all squares."""
    return torch.stack([torch.sum(x**2) for x in tensors]).sum().sqrt()


class AdamW:
    """Clipping by global norm, then AdamW with decay on matrices only, in the rules of optax.

        g ← g · c / max(‖g‖, c)
        m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²
        θ ← θ − lr (m̂ / (√v̂ + ε) + λ θ),   m̂ = m / (1 − β₁ᵏ),   v̂ = v / (1 − β₂ᵏ)

    torch's own differ: its clipping adds 1e-6 to the norm.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Callable[[int], float],
        max_grad_norm: float | None,
        b1: float,
        b2: float,
        eps: float,
        weight_decay: float,
    ):
        self.params = dict(model.named_parameters())
        self.schedule, self.max_grad_norm = schedule, max_grad_norm
        self.b1, self.b2, self.eps, self.weight_decay = b1, b2, eps, weight_decay
        self.mu = {name: torch.zeros_like(param) for name, param in self.params.items()}
        self.nu = {name: torch.zeros_like(param) for name, param in self.params.items()}
        self.step_count = 0

    def gradients(self) -> dict[str, Tensor]:
        return {name: param.grad for name, param in self.params.items() if param.grad is not None}

    @torch.no_grad()
    def step(self, grad_norm: Tensor) -> float:
        """Apply the accumulated gradients; returns ‖change‖ / ‖θ‖."""
        rate = self.schedule(self.step_count)
        self.step_count += 1
        change_sq, before_norm = 0.0, global_norm(self.params.values())
        for name, gradient in self.gradients().items():
            param, mu, nu = self.params[name], self.mu[name], self.nu[name]
            if self.max_grad_norm is not None and grad_norm >= self.max_grad_norm:
                gradient = gradient / grad_norm * self.max_grad_norm
            mu.mul_(self.b1).add_((1 - self.b1) * gradient)
            nu.mul_(self.b2).add_((1 - self.b2) * gradient**2)
            mu_hat, nu_hat = mu / (1 - self.b1**self.step_count), nu / (1 - self.b2**self.step_count)
            change = mu_hat / (nu_hat.sqrt() + self.eps)
            if param.ndim >= 2:
                change += self.weight_decay * param
            param.sub_(rate * change)
            change_sq += rate**2 * torch.sum(change**2)
        return float(change_sq**0.5 / before_norm)


def policy_loss(
    model: nn.Module,
    reference: nn.Module,
    experience: Experience,
    weights: Tensor,
    kl_coef: float,
    objective: Objective,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ w (ℓ + β KL) of some answers, β KL in the `exact` form only, and the sums that the statistics are made of."""
    mask = experience.response_mask
    sequences = (experience.prompt_tokens, experience.prompt_mask, experience.response_tokens, mask)
    logits = response_logits(model, *sequences)
    logprobs = ops.token_logprobs(logits, experience.response_tokens, temperature=objective.temperature)
    logprobs, old_logprobs, advantages = (
        ops.zero_masked(x, mask) for x in (logprobs, experience.old_logprobs, experience.advantages)
    )
    token_losses = ops.clipped_policy_loss(logprobs, old_logprobs, advantages, clip_eps=objective.clip_eps)
    policy = ops.weighted_sum(token_losses, weights)
    penalty = torch.zeros_like(policy)
    if objective.kl_in_loss:
        with torch.no_grad():  # the reference is asked again instead of stored
            ref_logits = response_logits(reference, *sequences)
        token_kl = ops.exact_token_kl(logits, ref_logits, temperature=objective.temperature)
        penalty = kl_coef * ops.weighted_sum(token_kl, weights)
    with torch.no_grad():
        clipped = ops.clipping_acts(logprobs, old_logprobs, advantages, clip_eps=objective.clip_eps)
        log_ratio = logprobs - old_logprobs
        stats = {
            "loss_policy": policy.detach(),
            "loss_kl": penalty.detach(),
            "tokens": ops.masked_count(mask),
            "clipped_tokens": ops.masked_count(clipped & mask),
            "approx_kl_nats": ops.masked_sum(ops.k3(old_logprobs, logprobs), mask),
            "ratio_max": ops.masked_max(torch.exp(log_ratio), mask),
            "log_ratio_abs_max": ops.masked_max(log_ratio.abs(), mask),
        }
    return policy + penalty, stats


def loss_and_gradients(
    model: nn.Module, reference: nn.Module, minibatch: Experience, kl_coef: float, objective: Objective
) -> tuple[float, Stats]:
    """Loss and statistics of a minibatch; the gradients, summed over its micro-batches, are left in `.grad`."""
    weights = objective.loss_weights(minibatch.response_mask, dtype=minibatch.old_logprobs.dtype)
    model.zero_grad()
    total, sums = 0.0, {}
    for rows in torch.arange(len(weights)).split(objective.micro_batch_size):
        loss, stats = policy_loss(model, reference, minibatch.rows(rows), weights[rows], kl_coef, objective)
        loss.backward()
        total += float(loss.detach())
        for name, value in stats.items():
            combine = max if name.endswith("_max") else float.__add__
            sums[name] = combine(sums.get(name, 0.0), float(value))
    return total, sums


def ppo_step(
    model: nn.Module,
    optimizer: AdamW,
    reference: nn.Module,
    minibatch: Experience,
    kl_coef: float,
    *,
    objective: Objective,
) -> Stats:
    """One optimizer step; one whose loss or gradient is not finite changes nothing and is counted as skipped."""
    loss, sums = loss_and_gradients(model, reference, minibatch, kl_coef, objective)
    grad_norm = global_norm(optimizer.gradients().values())
    finite = math.isfinite(loss) and bool(torch.isfinite(grad_norm))
    return {
        "loss/policy": sums["loss_policy"],
        "loss/kl": sums["loss_kl"],
        "policy/clip_frac": sums["clipped_tokens"] / sums["tokens"],
        "policy/approx_kl_nats": sums["approx_kl_nats"] / sums["tokens"],
        "policy/ratio_max": sums["ratio_max"],
        "policy/log_ratio_abs_max": sums["log_ratio_abs_max"],
        "update/grad_norm": float(grad_norm),
        "update/param_rel_change": optimizer.step(grad_norm) if finite else 0.0,
        "update/skipped_steps": float(not finite),
    }


def update(
    model: nn.Module,
    optimizer: AdamW,
    reference: nn.Module,
    experience: Experience,
    kl_coef: float,
    *,
    objective: Objective,
    orders: list[Tensor],
    minibatch_size: int,
) -> list[Stats]:
    """An epoch of minibatches for each order of the answers; statistics of every optimizer step in order."""
    all_stats = []
    for order in orders:
        for rows in order.split(minibatch_size):
            minibatch = experience.rows(rows)
            all_stats.append(ppo_step(model, optimizer, reference, minibatch, kl_coef, objective=objective))
    return all_stats


def summarise(all_stats: list[Stats]) -> Stats:
    """One iteration's numbers: means over its optimizer steps, maxima of maxima, sums of counts and of changes."""
    summary: Stats = {}
    for name in all_stats[0]:
        values = [stats[name] for stats in all_stats]
        if name.endswith("_max"):
            summary[name] = max(values)
        elif name in ("update/param_rel_change", "update/skipped_steps"):
            summary[name] = sum(values)
        else:
            summary[name] = sum(values) / len(values)
    return summary | {"update/optimizer_steps": len(all_stats)}
