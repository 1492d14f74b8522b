"""The stages of `ppo_jax`, run on every possible batch (see `recipes`)."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity.truth.enumeration import CLIP_EPS, KL_COEF, LENGTH, TEMPERATURE, Answers, Objective
from parity.truth.recipes import SPEC, Recipe, batch_probabilities, random_params
from ppo_jax import algorithm, scoring, update
from ppo_jax.config import Config
from ppo_jax.config_file import load
from ppo_jax.models.decoder import Params, head_logits, response_hidden
from ppo_jax.records import Experience, Rollout


class JaxStages:
    def __init__(self, answers: Answers, pair: int):
        self.answers = answers
        self.params, self.ref_params = random_params(2 * pair), random_params(2 * pair + 1)
        self.log_p, self.log_q = (
            np.asarray(_seq_logprobs(params, answers)) for params in (self.params, self.ref_params)
        )

    def true_gradient(self, objective: Objective, constants: np.ndarray) -> np.ndarray:
        return _flat(_true_gradient(self.params, self.ref_params, self.answers, constants, objective=objective))

    def expected_gradient(self, recipe: Recipe, seq_scores: np.ndarray, batches: np.ndarray) -> np.ndarray:
        rollout = _rollout(self.answers)
        scored = scoring.score(
            self.params,
            self.ref_params,
            rollout,
            spec=SPEC,
            temperature=TEMPERATURE,
            compute_dtype="float64",
            micro_batch_size=len(seq_scores),
            keep_ref_hidden=recipe.keeps_kl_in_loss,
        )
        of_batches = jax.tree.map(lambda x: x[batches], (jnp.asarray(seq_scores), scored, rollout.response_mask))
        advantages, weights = jax.vmap(_advantages_and_weights(recipe))(*of_batches)
        weights = weights * batch_probabilities(self.log_p, batches)
        names = ("prompt_tokens", "prompt_mask", "response_tokens", "response_mask")
        everything = {name: getattr(rollout, name) for name in names}
        everything |= {"old_logprobs": scored.old_logprobs, "ref_hidden": scored.ref_hidden}
        experience = Experience(**jax.tree.map(lambda x: x[batches.ravel()], everything), advantages=_rows(advantages))
        return _flat(
            _update_gradient(
                self.params, self.ref_params, experience, _rows(weights), kl_in_loss=recipe.keeps_kl_in_loss
            )
        )


@jax.jit
def _seq_logprobs(params: Params, answers: Answers) -> jax.Array:
    rollout = _rollout(answers)
    hidden = response_hidden(
        params,
        rollout.prompt_tokens,
        rollout.prompt_mask,
        rollout.response_tokens,
        jnp.ones(answers.tokens.shape, bool),
        spec=SPEC,
    )
    log_probs = jax.nn.log_softmax(head_logits(params, hidden, spec=SPEC) / TEMPERATURE)
    return jnp.sum(log_probs * answers.one_hot, axis=(1, 2))


@partial(jax.jit, static_argnames="objective")
def _true_gradient(params: Params, ref_params: Params, answers: Answers, constants, *, objective: Objective):
    log_q = _seq_logprobs(ref_params, answers)
    return jax.grad(lambda params: objective(jnp.exp, _seq_logprobs(params, answers), log_q, constants))(params)


def _rollout(answers: Answers) -> Rollout:
    """Every answer to a prompt of one token; fields that no stage reads are zeros."""
    count = len(answers.tokens)
    per_token = jnp.zeros(answers.tokens.shape)
    return Rollout(
        prompt_tokens=jnp.ones((count, 1), jnp.int32),
        prompt_mask=jnp.ones((count, 1), bool),
        response_tokens=jnp.asarray(answers.tokens),
        response_mask=jnp.asarray(answers.mask),
        behaviour_logprobs=per_token,
        kept_mass=per_token,
        finish_reason=jnp.zeros(count, jnp.int32),
        group_id=jnp.zeros(count, jnp.int32),
        policy_version=jnp.zeros((), jnp.int32),
    )


def config_of(recipe: Recipe) -> Config:
    """The recipe as the factory reads it; `parse` would refuse the biased ones."""
    valid = load(overrides={"rollout.max_new_tokens": LENGTH, "update.normaliser": recipe.normaliser})
    return valid.model_copy(
        update={
            "kl": valid.kl.model_copy(update={"form": recipe.kl_form}),
            "advantage": valid.advantage.model_copy(update={"estimator": recipe.estimator}),
        }
    )


def _advantages_and_weights(recipe: Recipe) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(seq_scores, scored, mask) of a batch -> both [B, T]."""
    config = config_of(recipe)
    token_rewards, advantages = algorithm.pick_token_rewards(config), algorithm.pick_advantages(config)
    loss_weights = algorithm.pick_loss_weights(config)

    def of_batch(seq_scores, scored, mask):
        rewards = token_rewards(seq_scores, scored, mask, kl_coef=recipe.reward_kl_coef)
        of_answers, _ = advantages(rewards, scored, SimpleNamespace(response_mask=mask))
        return of_answers, loss_weights(mask, dtype=jnp.float64)

    return of_batch


@partial(jax.jit, static_argnames="kl_in_loss")
def _update_gradient(
    params: Params, ref_params: Params, experience: Experience, weights: jax.Array, *, kl_in_loss: bool
) -> Params:
    policy_loss, clipping_acts = algorithm.pick_policy_loss(CLIP_EPS)
    objective = update.Objective(
        spec=SPEC,
        temperature=TEMPERATURE,
        policy_loss=policy_loss,
        clipping_acts=clipping_acts,
        loss_weights=algorithm.pick_loss_weights(config_of(Recipe("k1", "batch_mean", 2))),
        loss_kl=algorithm.LOSS_KL["exact" if kl_in_loss else "k1"],
        compute_dtype="float64",
        micro_batch_size=weights.shape[0],
        remat=False,
    )
    kl_coef = jnp.asarray(KL_COEF)
    return jax.grad(lambda params: update.policy_loss(params, ref_params, experience, weights, kl_coef, objective)[0])(
        params
    )


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])
