"""Step 6: a few small, clipped steps, the optimizer written out; the twin of `ppo_jax/update.py`.

The loss of a minibatch is Σ w_bt ℓ_bt with weights known beforehand, so micro-batches add up: `backward` sums their
gradients, then comes one clipping and one AdamW step.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ppo_torch_ref import ops
from ppo_torch_ref.critic import Critic
from ppo_torch_ref.model import Sequences, response_logits, response_states

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
    old_values: Tensor | None = None  # [B, T], of the critic at rollout, frozen; None where there is none
    returns: Tensor | None = None  # [B, T], what the critic learns

    def rows(self, index) -> "Experience":
        return replace(self, **{name: x[index] for name, x in vars(self).items() if x is not None})


@dataclass(frozen=True)
class CriticObjective:
    """How a critic makes its values, and how it learns them."""

    values: Critic
    loss: Callable[..., Tensor]  # (values, old_values, returns) -> loss per token
    coef: float


@dataclass(frozen=True)
class Objective:
    """What the update minimises; `algorithm` makes one of a config."""

    temperature: float
    policy_loss: Callable[..., Tensor]  # (logprobs, old_logprobs, advantages) -> loss per token
    clipping_acts: Callable[..., Tensor]  # of the same arguments: where the clipping stops the gradient
    loss_weights: Callable[..., Tensor]  # one of `ops.*_weights`: mask -> weights
    micro_batch_size: int
    loss_kl: Callable[..., Tensor] | None = None  # (logits, ref_logits, tokens) -> KL per token, where β KL is added
    entropy_coef: float = 0.0
    critic: CriticObjective | None = None


def learning_rate(
    step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int, idle_steps: int = 0
) -> float:
    """Learning rate of planned optimizer step 0, 1, ...: peak · min(1, (step + 1) / warmup) · decay.

    It is 0 in the first `idle_steps` of the `total_steps`, and all else begins behind them.
    """
    if step < idle_steps:
        return 0.0
    step, total_steps = step - idle_steps, total_steps - idle_steps
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
    def step(self, grad_norm: Tensor, planned_step: int) -> float:
        """Apply the accumulated gradients at the learning rate of that step; returns ‖change‖ / ‖θ‖."""
        rate = self.schedule(planned_step)
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
    kl_coef: float | Tensor,
    objective: Objective,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ w (ℓ + β KL − c_H H + c_V ℓ_V) of some answers, and the sums that the statistics are made of.

    A term that the objective does not have is 0; without a critic there is no statistic of one either.
    """
    mask, tokens, temperature = experience.response_mask, experience.response_tokens, objective.temperature
    sequences = (experience.prompt_tokens, experience.prompt_mask, tokens, mask)
    hidden, logits = response_states(model, *sequences)
    logprobs = ops.zero_masked(ops.token_logprobs(logits, tokens, temperature=temperature), mask)
    old_logprobs, advantages = (ops.zero_masked(x, mask) for x in (experience.old_logprobs, experience.advantages))
    policy = ops.weighted_sum(objective.policy_loss(logprobs, old_logprobs, advantages), weights)
    terms = {"loss_policy": policy, "loss_kl": torch.zeros_like(policy), "loss_entropy": torch.zeros_like(policy)}
    if objective.loss_kl is not None:
        with torch.no_grad():  # the reference is asked again instead of stored
            ref_logits = response_logits(reference, *sequences)
        token_kl = objective.loss_kl(logits, ref_logits, tokens, temperature=temperature)
        terms["loss_kl"] = kl_coef * ops.weighted_sum(token_kl, weights)
    if objective.entropy_coef > 0:
        token_entropy = ops.entropy(logits, temperature=temperature)
        terms["loss_entropy"] = -objective.entropy_coef * ops.weighted_sum(token_entropy, weights)
    if objective.critic is not None:
        terms["loss_value"] = objective.critic.coef * value_loss(
            hidden, sequences, experience, weights, objective.critic
        )
    with torch.no_grad():
        clipped = objective.clipping_acts(logprobs, old_logprobs, advantages)
        log_ratio = logprobs - old_logprobs
        stats = {name: term.detach() for name, term in terms.items()} | {
            "tokens": ops.masked_count(mask),
            "clipped_tokens": ops.masked_count(clipped & mask),
            "approx_kl_nats": ops.masked_sum(ops.k3(old_logprobs, logprobs), mask),
            "ratio_max": ops.masked_max(torch.exp(log_ratio), mask),
            "log_ratio_abs_max": ops.masked_max(log_ratio.abs(), mask),
        }
    return sum(terms.values(), torch.zeros_like(policy)), stats


def value_loss(
    policy_hidden: Tensor, sequences: Sequences, experience: Experience, weights: Tensor, critic: CriticObjective
) -> Tensor:
    """Σ w ℓ_V of some answers."""
    values = critic.values(policy_hidden, sequences)[:, :-1]
    inputs: Any = (values, experience.old_values, experience.returns)
    return ops.weighted_sum(critic.loss(*(ops.zero_masked(x, experience.response_mask) for x in inputs)), weights)


def loss_and_gradients(
    model: nn.Module, reference: nn.Module, minibatch: Experience, kl_coef: float | Tensor, objective: Objective
) -> tuple[float, Stats]:
    """Loss and statistics of a minibatch; the gradients, summed over its micro-batches, are left in `.grad`."""
    weights = objective.loss_weights(minibatch.response_mask, dtype=minibatch.old_logprobs.dtype)
    model.zero_grad()
    if objective.critic is not None:
        objective.critic.values.zero_grad()
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
    kl_coef: float | Tensor,
    planned_step: int,
    *,
    objective: Objective,
    critic_optimizer: AdamW | None = None,
) -> Stats:
    """One optimizer step; one whose loss or gradient is not finite changes nothing and is counted as skipped.

    Policy and critic are clipped and moved each by itself. `planned_step` is the number of the step in a run that
    leaves out none; the learning rate depends on it.
    """
    loss, sums = loss_and_gradients(model, reference, minibatch, kl_coef, objective)
    grad_norm = global_norm(optimizer.gradients().values())
    finite, of_critic = math.isfinite(loss) and bool(torch.isfinite(grad_norm)), {}
    if critic_optimizer is not None:
        critic_norm = global_norm(critic_optimizer.gradients().values())
        finite = finite and bool(torch.isfinite(critic_norm))
        of_critic = {"loss/value": sums["loss_value"], "critic/grad_norm": float(critic_norm)}
        if finite:
            critic_optimizer.step(critic_norm, planned_step)
    return {
        "loss/policy": sums["loss_policy"],
        "loss/kl": sums["loss_kl"],
        "loss/entropy": sums["loss_entropy"],
        "policy/clip_frac": sums["clipped_tokens"] / sums["tokens"],
        "policy/approx_kl_nats": sums["approx_kl_nats"] / sums["tokens"],
        "policy/ratio_max": sums["ratio_max"],
        "policy/log_ratio_abs_max": sums["log_ratio_abs_max"],
        "update/grad_norm": float(grad_norm),
        "update/param_rel_change": optimizer.step(grad_norm, planned_step) if finite else 0.0,
        "update/skipped_steps": float(not finite),
        **of_critic,
    }


def update(
    model: nn.Module,
    optimizer: AdamW,
    reference: nn.Module,
    experience: Experience,
    kl_coef: float | Tensor,
    *,
    objective: Objective,
    iteration: int,
    orders: list[Tensor],
    minibatch_size: int,
    critic_optimizer: AdamW | None = None,
    max_approx_kl_nats: float | None = None,
) -> list[Stats]:
    """An epoch of minibatches for each order of the answers; statistics of every optimizer step in order.

    A step that finds the policy further from the old one than `max_approx_kl_nats` is the last; the learning rate goes
    on as if all had been taken.
    """
    all_stats, both = [], {"objective": objective, "critic_optimizer": critic_optimizer}
    minibatches = [rows for order in orders for rows in order.split(minibatch_size)]
    for planned_step, rows in enumerate(minibatches, iteration * len(minibatches)):
        minibatch = experience.rows(rows)
        all_stats.append(ppo_step(model, optimizer, reference, minibatch, kl_coef, planned_step, **both))
        if max_approx_kl_nats is not None and all_stats[-1]["policy/approx_kl_nats"] > max_approx_kl_nats:
            break
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
