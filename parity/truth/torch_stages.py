"""The stages of `ppo_torch_ref`, run on every possible batch (see `recipes`)."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from parity.truth.enumeration import TEMPERATURE, Answers
from parity.truth.objectives import KL_COEF, Listed, Objective, list_answers, token_logprobs
from parity.truth.recipes import (
    CONFIG,
    EARLIER_MEAN,
    EARLIER_VARIANCE,
    SPEC,
    Recipe,
    batch_probabilities,
    random_models,
)
from ppo_jax.models.decoder import Params
from ppo_jax.models.hf_io import export_tensors
from ppo_torch_ref import algorithm, scoring, update
from ppo_torch_ref import model as torch_model
from ppo_torch_ref.critic import Critic
from ppo_torch_ref.rollout import EOS, TRUNCATED, Rollout
from ppo_torch_ref.shaping import ScoreMoments


class TorchStages:
    def __init__(self, answers: Answers, pair: int):
        self.answers = answers
        self.tokens, self.mask = torch.from_numpy(answers.tokens).long(), torch.from_numpy(answers.mask)
        self.prompts = torch.ones(len(answers.tokens), 1, dtype=torch.long)
        models = random_models(pair)
        self.model, self.reference, another = map(_new_model, models[:3])
        with torch.no_grad():
            of_policy, of_another = self._list_answers(self.model), self._list_answers(another)
            one_hot = torch.from_numpy(answers.one_hot)
            self.logprobs, self.logprobs_of_another = (token_logprobs(x, one_hot) for x in (of_policy, of_another))
            self.log_p, self.log_q = of_policy.log_p.numpy(), of_policy.log_q.numpy()
            self.log_another = of_another.log_p.numpy()
            self.value_head, self.critic = Critic(SPEC.width), Critic(SPEC.width, _new_model(models.critic["trunk"]))
            for critic in (self.value_head.double(), self.critic.double()):
                critic.head.kernel.copy_(torch.tensor(np.asarray(models.critic["head"]["kernel"])))
                critic.head.bias.copy_(torch.tensor(np.asarray(models.critic["head"]["bias"])))
            self.cut_values = self._cut_values()

    def _states(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and logits that see whatever comes before them."""
        everything = torch.ones(self.mask.shape, dtype=torch.bool)
        return torch_model.response_states(model, self.prompts, self.prompts.bool(), self.tokens, everything)

    def _list_answers(self, model: torch.nn.Module) -> Listed:
        token_log_p, token_log_q = (
            torch.log_softmax(self._states(x)[1] / TEMPERATURE, dim=-1) for x in (model, self.reference)
        )
        one_hot = torch.from_numpy(self.answers.one_hot)
        return list_answers(torch.exp, torch.Tensor.detach, token_log_p, token_log_q.detach(), one_hot)

    def _cut_values(self) -> np.ndarray:
        hidden, _ = self._states(self.critic.trunk)
        values = (hidden @ self.critic.head.kernel + self.critic.head.bias).numpy()
        behind = values[np.arange(len(values)), self.answers.lengths]
        return np.where(self.answers.ended, 0.0, behind)

    def true_gradient(self, objective: Objective, constants: np.ndarray) -> np.ndarray:
        return self._gradient(objective(self._list_answers(self.model), torch.from_numpy(constants)))

    def _gradient(self, loss: torch.Tensor) -> np.ndarray:
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        return np.concatenate([gradient.numpy().ravel() for gradient in gradients])

    def expected_gradient(self, recipe: Recipe, seq_scores: np.ndarray, batches: np.ndarray) -> np.ndarray:
        another, config, rows = recipe.drawn_by_another, recipe.config, torch.from_numpy(batches)
        rollout = self._rollout(self.logprobs_of_another if another else self.logprobs)
        critic = {"none": None, "value_head": self.value_head, "model": self.critic}[config.critic.kind]
        scored = scoring.score(
            self.model,
            self.reference,
            rollout,
            temperature=TEMPERATURE,
            micro_batch_size=len(seq_scores),
            critic=critic,
            bootstrap=config.critic.bootstrap_truncated,
        )
        of_answers = {name: x for name, x in vars(scored).items() if x is not None}
        every_batch = ({name: x[rows] for name, x in y.items()} for y in (of_answers, vars(rollout)))
        advantages, returns, weights = torch.vmap(partial(_of_batch, recipe))(
            torch.from_numpy(seq_scores)[rows], *every_batch
        )
        weights = weights * torch.from_numpy(batch_probabilities(self.log_another if another else self.log_p, batches))
        of_token = torch.zeros(self.mask.shape)
        every_answer = update.Experience(
            self.prompts, self.prompts.bool(), self.tokens, self.mask, scored.old_logprobs, of_token, scored.values
        )
        experience = replace(
            every_answer.rows(rows.flatten()), advantages=advantages.flatten(0, 1), returns=returns.flatten(0, 1)
        )
        objective = algorithm.make_objective(config, critic)
        objective = objective if recipe.kl_in_loss else replace(objective, loss_kl=None)
        loss, _ = update.policy_loss(self.model, self.reference, experience, weights.flatten(0, 1), KL_COEF, objective)
        return self._gradient(loss)

    def _rollout(self, behaviour_logprobs: torch.Tensor) -> Rollout:
        reasons = torch.where(torch.from_numpy(self.answers.ended), EOS, TRUNCATED)
        sequences = (self.prompts, self.prompts.bool(), self.tokens, self.mask)
        return Rollout(*sequences, behaviour_logprobs, torch.zeros(self.mask.shape), reasons)


def _new_model(params: Params) -> torch_model.Decoder:
    model = torch_model.new_model(CONFIG).double()
    tensors = export_tensors(CONFIG, SPEC, params, jnp.float64)
    model.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in tensors.items()})
    return model


def _of_batch(
    recipe: Recipe, seq_scores: torch.Tensor, of_answers: dict[str, torch.Tensor], sampled: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps 4 and 5 for one batch, and the weights of its normaliser: (advantages, returns or zeros, weights)."""
    config, count = recipe.config, recipe.earlier_scores
    steps, rollout, scored = algorithm.pick_algorithm(config), Rollout(**sampled), scoring.Scored(**of_answers)
    earlier = (count, EARLIER_MEAN if count else 0.0, count * EARLIER_VARIANCE)
    moments = ScoreMoments(*(torch.tensor(x, dtype=torch.float64) for x in earlier))
    shaped, _ = steps.shape_scores(moments, seq_scores, rollout)
    rewards = steps.token_rewards(shaped, scored, rollout.response_mask, kl_coef=recipe.reward_kl_coef)
    advantages, returns = steps.advantages(rewards, scored, rollout)
    weights = algorithm.make_objective(config).loss_weights(rollout.response_mask, dtype=torch.float64)
    return advantages, torch.zeros_like(advantages) if returns is None else returns, weights
