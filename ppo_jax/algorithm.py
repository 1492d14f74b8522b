"""Every choice of algorithm is a different function, and this is where each is picked, once: steps 4 to 6 of a run.

Nothing below this file asks which recipe it runs. A further choice is one function in `ops` and one line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppo_jax.config import Config, RewardConfig
from ppo_jax.models.critic import model_values, trunk_values
from ppo_jax.models.decoder import DecoderSpec
from ppo_jax.models.lora import Adapter
from ppo_jax.ops import advantages, kl, losses, masking, rewards
from ppo_jax.optimizer import make_optimizer, make_optimizer_with_critic
from ppo_jax.records import TRUNCATED, Rollout, Scored
from ppo_jax.update import CriticObjective, Objective


@dataclass(frozen=True)
class Algorithm:
    """What steps 4 and 5 and the end of an iteration compute."""

    shape_scores: Callable[..., Any]  # (ScoreMoments, seq_scores [B], Rollout) -> (shaped scores [B], ScoreMoments)
    token_rewards: Callable[..., jax.Array]  # (shaped scores [B], Scored, response_mask, kl_coef=) -> [B, T]
    advantages: Callable[..., Any]  # (token_rewards, Scored, Rollout) -> (advantages, returns or None), both [B, T]
    next_kl_coef: Callable[..., jax.Array]  # (kl_coef, seq_kl) -> kl_coef of the next iteration


def pick_algorithm(config: Config) -> Algorithm:
    return Algorithm(
        shape_scores=jax.jit(pick_score_shaping(config)),
        token_rewards=jax.jit(pick_token_rewards(config)),
        advantages=jax.jit(pick_advantages(config)),
        next_kl_coef=jax.jit(pick_next_kl_coef(config)),
    )


# ------------------------------------------------------------------------------------------ step 4: scores to rewards


def pick_score_shaping(config: Config) -> Callable[..., tuple[jax.Array, rewards.ScoreMoments]]:
    """Scores are normalised, then clipped, then pay for a missing EOS and for a wrong length."""
    normalise, clip, penalty = NORMALISATIONS[config.reward.normalise], config.reward.clip, pick_length_penalty(config)

    def shape_scores(moments: rewards.ScoreMoments, seq_scores: jax.Array, answers: Rollout):
        answered = jnp.any(answers.response_mask, axis=1)
        moments = rewards.merged_moments(moments, seq_scores, answered)
        shaped = normalise(seq_scores, moments, answered)
        shaped = shaped if clip is None else rewards.clipped_scores(shaped, bound=clip)
        return shaped - penalty(answers, seq_scores.dtype), moments

    return shape_scores


NORMALISATIONS = {
    "none": lambda seq_scores, moments, answered: seq_scores,
    "running": lambda seq_scores, moments, answered: rewards.normalised_scores(seq_scores, moments),
    "batch": lambda seq_scores, moments, answered: advantages.whiten(seq_scores, answered),
}


def pick_length_penalty(config: Config) -> Callable[[Rollout, Any], jax.Array]:
    """What an answer pays for its length and its missing end, [B]; an amount of 0 is nothing."""
    reward: RewardConfig = config.reward
    soft_max = config.rollout.max_new_tokens if reward.soft_max_tokens is None else reward.soft_max_tokens

    def length_penalty(answers: Rollout, dtype: Any) -> jax.Array:
        lengths = masking.masked_count(answers.response_mask, axis=1, dtype=dtype)
        paid = jnp.zeros_like(lengths)
        if reward.missing_eos_penalty:
            ended = answers.finish_reason != TRUNCATED
            paid += rewards.missing_eos_penalty(ended, penalty=reward.missing_eos_penalty, dtype=dtype)
        if reward.too_short_penalty:
            paid += rewards.too_short_penalty(lengths, min_tokens=reward.min_tokens, penalty=reward.too_short_penalty)
        if reward.too_long_penalty:
            paid += rewards.too_long_penalty(
                lengths,
                soft_max_tokens=soft_max,
                max_tokens=config.rollout.max_new_tokens,
                penalty=reward.too_long_penalty,
            )
        return paid

    return length_penalty


def pick_token_rewards(config: Config) -> Callable[..., jax.Array]:
    match config.kl.form, config.kl.per:
        case "k1", "answer":
            return k1_token_rewards
        case "k1", "token":
            return k1_per_token_rewards
        case "exact", _:
            return exact_kl_token_rewards
        case _:
            return score_token_rewards


def k1_token_rewards(seq_scores: jax.Array, scored: Scored, response_mask: jax.Array, *, kl_coef: Any) -> jax.Array:
    """The `k1` form of the KL: a penalty per token inside the reward."""
    token_k1 = kl.k1(scored.old_logprobs, scored.ref_logprobs)
    return rewards.token_rewards(seq_scores, token_k1, response_mask, kl_coef=kl_coef)


def k1_per_token_rewards(seq_scores: jax.Array, scored: Scored, response_mask: jax.Array, *, kl_coef: Any) -> jax.Array:
    """The same divided by the length of the answer."""
    token_k1 = rewards.kl_per_token(kl.k1(scored.old_logprobs, scored.ref_logprobs), response_mask)
    return rewards.token_rewards(seq_scores, token_k1, response_mask, kl_coef=kl_coef)


def exact_kl_token_rewards(
    seq_scores: jax.Array, scored: Scored, response_mask: jax.Array, *, kl_coef: Any
) -> jax.Array:
    """The `exact` form of the KL, its half in the reward; the objective's `loss_kl` is the half in the loss."""
    return rewards.exact_kl_token_rewards(seq_scores, scored.token_kl, response_mask, kl_coef=kl_coef)


def score_token_rewards(seq_scores: jax.Array, scored: Scored, response_mask: jax.Array, *, kl_coef: Any) -> jax.Array:
    """The score alone, where the whole penalty is in the loss."""
    return rewards.token_rewards(seq_scores, jnp.zeros_like(scored.token_kl), response_mask, kl_coef=kl_coef)


def pick_next_kl_coef(config: Config) -> Callable[[jax.Array, jax.Array], jax.Array]:
    if config.kl.target_nats is None:
        return lambda kl_coef, seq_kl: kl_coef
    steer = partial(kl.next_kl_coef, target_nats=config.kl.target_nats, horizon=config.kl.horizon)
    # A KL that is no number steers nothing: its steps are skipped, and the coefficient would never be a number again.
    return lambda kl_coef, seq_kl: jnp.where(jnp.isnan(seq_kl), kl_coef, steer(kl_coef, seq_kl))


# ------------------------------------------------------------------------------------------------- step 5: advantages

# (token_rewards, response_mask) -> [B, T]
OF_THE_BATCH: dict[str, Callable[..., jax.Array]] = {
    "batch_mean": advantages.batch_mean_advantages,
    "whitened_batch_mean": advantages.whitened_batch_mean_advantages,
    "leave_one_out": advantages.leave_one_out_advantages,
    "leave_one_out_to_go": advantages.leave_one_out_to_go_advantages,
}
# The same with answers_per_prompt=
OF_THE_GROUP: dict[str, Callable[..., jax.Array]] = {
    "group_mean": advantages.group_mean_advantages,
    "group_normalised": advantages.group_normalised_advantages,
    "group_leave_one_out": advantages.group_leave_one_out_advantages,
    "group_leave_one_out_to_go": advantages.group_leave_one_out_to_go_advantages,
}
# (token_rewards, values, response_mask, discount=, gae_lambda=, bootstrap_values=) -> (advantages, returns)
OF_A_CRITIC: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "gae": advantages.gae_advantages,
    "whitened_gae": advantages.whitened_gae_advantages,
}


def pick_advantages(config: Config) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    estimate, cap = pick_estimator(config), config.update.importance_cap
    if cap is None:
        return estimate

    def weighted(token_rewards: jax.Array, scored: Scored, answers: Rollout):
        estimated, returns = estimate(token_rewards, scored, answers)
        weights = advantages.importance_weights(
            scored.old_logprobs, answers.behaviour_logprobs, answers.response_mask, cap=cap
        )
        return weights * estimated, returns

    return weighted


def pick_estimator(config: Config) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    name, n = config.advantage.estimator, config.rollout.answers_per_prompt
    if name in OF_A_CRITIC:
        of_critic = partial(
            OF_A_CRITIC[name], discount=config.advantage.discount, gae_lambda=config.advantage.gae_lambda
        )
        return lambda token_rewards, scored, answers: of_critic(
            token_rewards, scored.values, answers.response_mask, bootstrap_values=scored.bootstrap_values
        )
    of_answers = partial(OF_THE_GROUP[name], answers_per_prompt=n) if name in OF_THE_GROUP else OF_THE_BATCH[name]
    return lambda token_rewards, scored, answers: (of_answers(token_rewards, answers.response_mask), None)


# -------------------------------------------------------------------------------------------- step 6: loss, optimizer


def make_objective(
    config: Config, spec: DecoderSpec, critic_spec: DecoderSpec | None = None, adapter: Adapter | None = None
) -> Objective:
    """The objective of a run; `critic_spec` is that of a critic with a trunk of its own, `adapter` what is trained of
    the policy where that is not the whole of it."""
    policy_loss, clipping_acts = pick_policy_loss(
        config.update.clip_eps, config.update.clip_eps_high, config.update.dual_clip
    )
    return Objective(
        spec=spec,
        temperature=config.rollout.temperature,
        policy_loss=policy_loss,
        clipping_acts=clipping_acts,
        loss_weights=pick_loss_weights(config),
        loss_kl=LOSS_KL[config.kl.form],
        entropy_coef=config.update.entropy_coef,
        critic=pick_critic(config, critic_spec),
        adapter=adapter,
        compute_dtype=config.model.compute_dtype,
        micro_batch_size=config.micro_batch_size,
        remat=config.update.remat,
        min_new_tokens=config.rollout.min_new_tokens,
    )


def exact_loss_kl(logits: jax.Array, ref_logits: jax.Array, _: jax.Array, *, temperature: float) -> jax.Array:
    """The exact KL as a term of the loss; it does not look at the sampled tokens."""
    return kl.exact_token_kl(logits, ref_logits, temperature=temperature)


LOSS_KL = {"k1": None, "exact": exact_loss_kl, "biased_k3_in_loss": kl.sampled_token_k3}


# What is picked with arguments is cached: the same object for the same choice, so that a second run in a process
# compiles nothing again.


@cache
def pick_policy_loss(
    clip_eps: float, clip_eps_high: float | None = None, dual_clip: float | None = None
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The clipped loss per token, and where its clipping stops the gradient."""
    clipping: dict[str, Any] = {"clip_eps": clip_eps, "clip_eps_high": clip_eps_high}
    acts = partial(losses.clipping_acts, **clipping, dual_clip=dual_clip)
    if dual_clip is None:
        return partial(losses.clipped_policy_loss, **clipping), acts
    return partial(losses.dual_clipped_policy_loss, **clipping, dual_clip=dual_clip), acts


def pick_loss_weights(config: Config) -> Callable[..., jax.Array]:
    match config.update.normaliser:
        case "constant":
            return _constant_weights(config.rollout.max_new_tokens)
        case "token_mean":
            return losses.token_mean_weights
        case "sequence_mean":
            return losses.sequence_mean_weights


@cache
def _constant_weights(max_response_tokens: int) -> Callable[..., jax.Array]:
    return partial(losses.constant_weights, max_response_tokens=max_response_tokens)


def pick_critic(config: Config, spec: DecoderSpec | None) -> CriticObjective | None:
    if config.critic.kind == "none":
        return None
    values = trunk_values if spec is None else _model_values(spec, config.update.remat)
    return CriticObjective(values=values, loss=_value_loss(config.critic.clip_eps), coef=config.critic.coef)


@cache
def _model_values(spec: DecoderSpec, remat: bool) -> Callable[..., jax.Array]:
    return partial(model_values, spec=spec, remat=remat)


@cache
def _value_loss(clip_eps: float | None) -> Callable[..., jax.Array]:
    return partial(losses.clipped_value_loss, clip_eps=float("inf") if clip_eps is None else clip_eps)


def pick_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    steps = config.optimizer_steps_per_iteration
    total_steps = config.run.iterations * steps
    if config.critic.kind == "none":
        return make_optimizer(config.update, total_steps)
    own_rate = config.critic.learning_rate
    return make_optimizer_with_critic(
        config.update,
        total_steps,
        critic_learning_rate=config.update.learning_rate if own_rate is None else own_rate,
        idle_steps=config.critic.warmup_iterations * steps,
    )
