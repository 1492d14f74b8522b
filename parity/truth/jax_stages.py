"""The stages of `ppo_jax`, run on every possible batch (see `recipes`)."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity.truth.enumeration import TEMPERATURE, Answers
from parity.truth.objectives import KL_COEF, Listed, Objective, list_answers, token_logprobs
from parity.truth.recipes import (
    EARLIER_MEAN,
    EARLIER_VARIANCE,
    SPEC,
    Recipe,
    batch_probabilities,
    random_models,
)
from ppo_jax import algorithm, scoring, update
from ppo_jax.models.critic import split_critic
from ppo_jax.models.decoder import Params, head_logits, response_hidden
from ppo_jax.ops import losses
from ppo_jax.ops.rewards import ScoreMoments
from ppo_jax.records import EOS, TRUNCATED, Experience, Rollout


class JaxStages:
    def __init__(self, answers: Answers, pair: int):
        self.answers, self.models = answers, random_models(pair)
        self.token_log_p, self.token_log_q, of_another = (
            _token_log_probs(params, answers)
            for params in (self.models.policy, self.models.reference, self.models.another)
        )
        of_policy, of_another = self._list_answers(self.token_log_p), self._list_answers(of_another)
        self.log_p, self.log_q, self.log_another = map(np.asarray, (of_policy.log_p, of_policy.log_q, of_another.log_p))
        self.logprobs, self.logprobs_of_another = (token_logprobs(x, answers.one_hot) for x in (of_policy, of_another))
        self.cut_values = np.asarray(_cut_values(self.models.critic, answers))

    def _list_answers(self, token_log_p: jax.Array) -> Listed:
        return list_answers(jnp.exp, jax.lax.stop_gradient, token_log_p, self.token_log_q, self.answers.one_hot)

    def true_gradient(self, objective: Objective, constants: np.ndarray) -> np.ndarray:
        """By way of the log-probabilities: the model is compiled once for all objectives."""
        of_log_probs = jax.grad(lambda x: objective(self._list_answers(x), constants))(self.token_log_p)
        return _flat(_pull_back(self.models.policy, self.answers, of_log_probs))

    def expected_gradient(self, recipe: Recipe, seq_scores: np.ndarray, batches: np.ndarray) -> np.ndarray:
        another = recipe.drawn_by_another
        rollout = _rollout(self.answers, self.logprobs_of_another if another else self.logprobs)
        objective, critic = _objective(recipe), self._critic(recipe)
        params = self.models.policy | critic
        scored = scoring.score(
            params,
            self.models.reference,
            rollout,
            scoring=scoring.Scoring(
                spec=SPEC, temperature=TEMPERATURE, compute_dtype="float64", micro_batch_size=len(seq_scores)
            ),
            keep_ref_hidden=objective.loss_kl is not None,
            values=objective.values,
            bootstrap=recipe.config.critic.bootstrap_truncated,
        )
        of_batches = jax.tree.map(
            lambda x: x[batches], (jnp.asarray(seq_scores), replace(scored, ref_hidden=None), rollout)
        )
        advantages, returns, weights = batch_program(recipe)(*of_batches)
        weights = weights * batch_probabilities(self.log_another if another else self.log_p, batches)
        names = ("prompt_tokens", "prompt_mask", "response_tokens", "response_mask")
        everything = {name: getattr(rollout, name) for name in names}
        everything |= {name: getattr(scored, name) for name in ("old_logprobs", "ref_hidden")}
        everything["old_values"] = scored.values
        experience = Experience(
            **jax.tree.map(lambda x: x[batches.ravel()], everything),
            advantages=_rows(advantages),
            returns=None if returns is None else _rows(returns),
        )
        return _flat(_update_gradient(params, self.models.reference, experience, _rows(weights), objective=objective))

    def _critic(self, recipe: Recipe) -> Params:
        """What the recipe's critic adds to the parameters."""
        critic: dict[str, Any] = {
            "none": {},
            "value_head": {"critic": {"head": self.models.critic["head"]}},
            "model": {"critic": self.models.critic},
        }
        return critic[recipe.config.critic.kind]


@jax.jit
def _token_log_probs(params: Params, answers: Answers) -> jax.Array:
    return jax.nn.log_softmax(head_logits(params, _hidden(params, answers), spec=SPEC) / TEMPERATURE)


@jax.jit
def _pull_back(params: Params, answers: Answers, of_log_probs: jax.Array) -> Params:
    """The gradient in the parameters of what has this one in the log-probabilities."""
    return jax.vjp(lambda params: _token_log_probs(params, answers), params)[1](of_log_probs)[0]


def _hidden(params: Params, answers: Answers) -> jax.Array:
    """Hidden states that see whatever comes before them, [N, T, D]."""
    prompts = jnp.ones((len(answers.tokens), 1), jnp.int32)
    everything = jnp.ones(answers.tokens.shape, bool)
    return response_hidden(params, prompts, prompts > 0, jnp.asarray(answers.tokens), everything, spec=SPEC)


@jax.jit
def _cut_values(critic: Params, answers: Answers) -> jax.Array:
    values = _hidden(critic["trunk"], answers) @ critic["head"]["kernel"] + critic["head"]["bias"]
    behind = jnp.take_along_axis(values, answers.lengths[:, None], axis=1)[:, 0]
    return jnp.where(answers.ended, 0.0, behind)


def _rollout(answers: Answers, behaviour_logprobs: jax.Array) -> Rollout:
    """Every answer to a prompt of one token; fields that no stage reads are zeros."""
    count = len(answers.tokens)
    return Rollout(
        prompt_tokens=jnp.ones((count, 1), jnp.int32),
        prompt_mask=jnp.ones((count, 1), bool),
        response_tokens=jnp.asarray(answers.tokens),
        response_mask=jnp.asarray(answers.mask),
        behaviour_logprobs=behaviour_logprobs,
        kept_mass=jnp.zeros(answers.tokens.shape),
        finish_reason=jnp.where(answers.ended, EOS, TRUNCATED),
        group_id=jnp.zeros(count, jnp.int32),
        policy_version=jnp.zeros(count, jnp.int32),
    )


@cache
def batch_program(recipe: Recipe) -> Callable[..., tuple[jax.Array, jax.Array | None, jax.Array]]:
    """(seq_scores, scored, rollout) of all batches -> (advantages, returns, weights), [batches, B, T]."""
    config = recipe.config
    shape_scores, token_rewards = algorithm.pick_score_shaping(config), algorithm.pick_token_rewards(config)
    advantages, loss_weights = algorithm.pick_advantages(config), algorithm.pick_loss_weights(config)
    count, variance = recipe.earlier_scores, EARLIER_VARIANCE
    moments = ScoreMoments(*map(jnp.asarray, (count, EARLIER_MEAN if count else 0.0, count * variance)))

    def of_batch(seq_scores, scored, rollout):
        shaped, _ = shape_scores(moments, seq_scores, rollout)
        rewards = token_rewards(shaped, scored, rollout.response_mask, kl_coef=recipe.reward_kl_coef)
        return *advantages(rewards, scored, rollout), loss_weights(rollout.response_mask, dtype=jnp.float64)

    return jax.jit(jax.vmap(of_batch))


def _objective(recipe: Recipe) -> update.Objective:
    """The recipe's; the weights are given, so that all normalisers may share a program."""
    config = recipe.config
    objective = algorithm.make_objective(config, SPEC, SPEC if config.critic.kind == "model" else None)
    objective = replace(objective, compute_dtype="float64", loss_weights=losses.constant_weights)
    return objective if recipe.kl_in_loss else replace(objective, loss_kl=None)


@partial(jax.jit, static_argnames="objective")
def _update_gradient(
    params: Params, ref_params: Params, experience: Experience, weights: jax.Array, *, objective: update.Objective
) -> Params:
    kl_coef = jnp.asarray(KL_COEF)
    of_all = jax.grad(lambda params: update.policy_loss(params, ref_params, experience, weights, kl_coef, objective)[0])
    return split_critic(of_all(params))[0]


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])
