"""Every choice of algorithm is a function, picked here once from a config; the twin of `ppo_jax/algorithm.py`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppo_torch_ref import ops, shaping
from ppo_torch_ref.critic import Critic
from ppo_torch_ref.rollout import TRUNCATED, Rollout
from ppo_torch_ref.scoring import Scored
from ppo_torch_ref.update import AdamW, CriticObjective, Objective, learning_rate


@dataclass(frozen=True)
class Algorithm:
    """What steps 4 and 5 and the end of an iteration compute."""

    shape_scores: Callable[..., Any]  # (ScoreMoments, seq_scores [B], Rollout) -> (shaped scores [B], ScoreMoments)
    token_rewards: Callable[..., Tensor]  # (shaped scores [B], Scored, response_mask, kl_coef=) -> [B, T]
    advantages: Callable[..., Any]  # (token_rewards, Scored, Rollout) -> (advantages, returns or None), both [B, T]
    next_kl_coef: Callable[..., Tensor]  # (kl_coef, seq_kl) -> kl_coef of the next iteration


def pick_algorithm(config: Any) -> Algorithm:
    return Algorithm(
        shape_scores=partial(shaped_scores, config=config),
        token_rewards=pick_token_rewards(config),
        advantages=pick_advantages(config),
        next_kl_coef=pick_next_kl_coef(config),
    )


# --- step 4 ---


def shaped_scores(
    moments: shaping.ScoreMoments, seq_scores: Tensor, rollout: Rollout, *, config: Any
) -> tuple[Tensor, shaping.ScoreMoments]:
    """Scores are normalised, then clipped, then pay for a missing EOS and for a wrong length."""
    reward, answered = config.reward, rollout.response_mask.any(dim=1)
    moments = shaping.merged_moments(moments, seq_scores, answered)
    shaped = seq_scores
    if reward.normalise == "running":
        shaped = shaping.normalised_scores(shaped, moments)
    elif reward.normalise == "batch":
        own = shaping.merged_moments(shaping.first_moments(seq_scores.dtype), seq_scores, answered)
        shaped = shaping.normalised_scores(shaped, own)
    if reward.clip is not None:
        shaped = shaping.clipped_scores(shaped, bound=reward.clip)
    return shaped - penalties(rollout, config, seq_scores.dtype), moments


def penalties(rollout: Rollout, config: Any, dtype: torch.dtype) -> Tensor:
    """What an answer pays for its missing end and its length, [B]."""
    reward, longest = config.reward, config.rollout.max_new_tokens
    lengths = ops.masked_count(rollout.response_mask, axis=1, dtype=dtype)
    ended = rollout.finish_reason != TRUNCATED
    paid = shaping.missing_eos_penalty(ended, penalty=reward.missing_eos_penalty, dtype=dtype)
    paid += shaping.too_short_penalty(lengths, min_tokens=reward.min_tokens, penalty=reward.too_short_penalty)
    if reward.soft_max_tokens is not None:
        paid += shaping.too_long_penalty(
            lengths, soft_max_tokens=reward.soft_max_tokens, max_tokens=longest, penalty=reward.too_long_penalty
        )
    return paid


def pick_token_rewards(config: Any) -> Callable[..., Tensor]:
    return {
        ("k1", "answer"): k1_token_rewards,
        ("k1", "token"): k1_per_token_rewards,
        ("exact", "answer"): exact_kl_token_rewards,
        ("biased_k3_in_loss", "answer"): score_token_rewards,
    }[config.kl.form, config.kl.per]


def k1_token_rewards(seq_scores: Tensor, scored: Scored, mask: Tensor, *, kl_coef: Tensor) -> Tensor:
    return ops.token_rewards(seq_scores, ops.k1(scored.old_logprobs, scored.ref_logprobs), mask, kl_coef=kl_coef)


def k1_per_token_rewards(seq_scores: Tensor, scored: Scored, mask: Tensor, *, kl_coef: Tensor) -> Tensor:
    per_token = ops.kl_per_token(ops.k1(scored.old_logprobs, scored.ref_logprobs), mask)
    return ops.token_rewards(seq_scores, per_token, mask, kl_coef=kl_coef)


def exact_kl_token_rewards(seq_scores: Tensor, scored: Scored, mask: Tensor, *, kl_coef: Tensor) -> Tensor:
    return ops.exact_kl_token_rewards(seq_scores, scored.token_kl, mask, kl_coef=kl_coef)


def score_token_rewards(seq_scores: Tensor, scored: Scored, mask: Tensor, *, kl_coef: Tensor) -> Tensor:
    """The score alone: the whole penalty is in the loss."""
    return ops.score_on_last_token(seq_scores, mask)


def pick_next_kl_coef(config: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if config.kl.target_nats is None:
        return lambda kl_coef, seq_kl: kl_coef
    return partial(ops.next_kl_coef, target_nats=config.kl.target_nats, horizon=config.kl.horizon)


# --- step 5 ---


def pick_advantages(config: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    estimate, cap = pick_estimator(config), config.update.importance_cap
    if cap is None:
        return estimate

    def weighted(token_rewards: Tensor, scored: Scored, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        advantages, returns = estimate(token_rewards, scored, rollout)
        mask = rollout.response_mask
        weights = ops.importance_weights(scored.old_logprobs, rollout.behaviour_logprobs, mask, cap=cap)
        return weights * advantages, returns

    return weighted


def pick_estimator(config: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    name = config.advantage.estimator
    function = getattr(ops, f"{name}_advantages")
    if name in ("gae", "whitened_gae"):
        settings = {"discount": config.advantage.discount, "gae_lambda": config.advantage.gae_lambda}
        return lambda token_rewards, scored, rollout: function(
            token_rewards, scored.values, rollout.response_mask, bootstrap_values=scored.bootstrap_values, **settings
        )
    if name.startswith("group_"):
        function = partial(function, answers_per_prompt=config.rollout.answers_per_prompt)
    return lambda token_rewards, scored, rollout: (function(token_rewards, rollout.response_mask), None)


# --- step 6 ---


def make_objective(config: Any, critic: Critic | None = None) -> Objective:
    update = config.update
    policy_loss, clipping_acts = pick_policy_loss(update.clip_eps, update.clip_eps_high, update.dual_clip)
    return Objective(
        temperature=config.rollout.temperature,
        policy_loss=policy_loss,
        clipping_acts=clipping_acts,
        loss_weights={
            "constant": partial(ops.constant_weights, max_response_tokens=config.rollout.max_new_tokens),
            "token_mean": ops.token_mean_weights,
            "sequence_mean": ops.sequence_mean_weights,
        }[update.normaliser],
        micro_batch_size=update.micro_batch_size or update.minibatch_size,
        loss_kl=LOSS_KL[config.kl.form],
        entropy_coef=update.entropy_coef,
        critic=None if critic is None else make_critic_objective(config, critic),
    )


def pick_policy_loss(
    clip_eps: float, clip_eps_high: float | None = None, dual_clip: float | None = None
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The clipped loss per token, and where its clipping stops the gradient."""
    clipping: dict[str, Any] = {"clip_eps": clip_eps, "clip_eps_high": clip_eps_high}
    acts = partial(ops.clipping_acts, **clipping, dual_clip=dual_clip)
    if dual_clip is None:
        return partial(ops.clipped_policy_loss, **clipping), acts
    return partial(ops.dual_clipped_policy_loss, **clipping, dual_clip=dual_clip), acts


def exact_loss_kl(logits: Tensor, ref_logits: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    return ops.exact_token_kl(logits, ref_logits, temperature=temperature)


LOSS_KL = {"k1": None, "exact": exact_loss_kl, "biased_k3_in_loss": ops.sampled_token_k3}


def make_critic_objective(config: Any, critic: Critic) -> CriticObjective:
    clip_eps = math.inf if config.critic.clip_eps is None else config.critic.clip_eps
    return CriticObjective(critic, loss=partial(ops.clipped_value_loss, clip_eps=clip_eps), coef=config.critic.coef)


def make_optimizers(config: Any, model: nn.Module, critic: Critic | None = None) -> tuple[AdamW, AdamW | None]:
    """Of the policy, which does not move while the critic warms up, and of the critic."""
    update = config.update
    steps = update.epochs * (config.rollout.batch_size // update.minibatch_size)

    def adamw(module: nn.Module, *, peak: float, idle_steps: int) -> AdamW:
        rate = partial(
            learning_rate,
            peak=peak,
            schedule=update.schedule,
            warmup_steps=update.warmup_steps,
            total_steps=config.run.iterations * steps,
            idle_steps=idle_steps,
        )
        return AdamW(
            module,
            schedule=rate,
            max_grad_norm=update.max_grad_norm,
            b1=update.adam_b1,
            b2=update.adam_b2,
            eps=update.adam_eps,
            weight_decay=update.weight_decay,
        )

    if critic is None:
        return adamw(model, peak=update.learning_rate, idle_steps=0), None
    peak = update.learning_rate if config.critic.learning_rate is None else config.critic.learning_rate
    of_policy = adamw(model, peak=update.learning_rate, idle_steps=config.critic.warmup_iterations * steps)
    return of_policy, adamw(critic, peak=peak, idle_steps=0)
