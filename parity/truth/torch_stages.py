"""The stages of `ppo_torch_ref`, run on every possible batch (see `recipes`)."""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import torch

from parity.truth.enumeration import CLIP_EPS, KL_COEF, LENGTH, TEMPERATURE, Answers, Objective
from parity.truth.recipes import CONFIG, SPEC, Recipe, batch_probabilities, random_params
from ppo_jax.models.decoder import Params
from ppo_jax.models.hf_io import export_tensors
from ppo_torch_ref import algorithm, ops, scoring, update
from ppo_torch_ref import model as torch_model
from ppo_torch_ref.rollout import Rollout


class TorchStages:
    def __init__(self, answers: Answers, pair: int):
        self.answers = answers
        self.tokens, self.mask = torch.from_numpy(answers.tokens).long(), torch.from_numpy(answers.mask)
        self.prompts = torch.ones(len(answers.tokens), 1, dtype=torch.long)
        self.model, self.reference = _new_model(random_params(2 * pair)), _new_model(random_params(2 * pair + 1))
        with torch.no_grad():
            self.log_p, self.log_q = (self._seq_logprobs(model).numpy() for model in (self.model, self.reference))

    def _seq_logprobs(self, model: torch.nn.Module) -> torch.Tensor:
        everything = torch.ones(self.mask.shape, dtype=torch.bool)
        logits = torch_model.response_logits(model, self.prompts, self.prompts.bool(), self.tokens, everything)
        log_probs = torch.log_softmax(logits / TEMPERATURE, dim=-1)
        return torch.sum(log_probs * torch.from_numpy(self.answers.one_hot), dim=(1, 2))

    def true_gradient(self, objective: Objective, constants: np.ndarray) -> np.ndarray:
        log_p, log_q = self._seq_logprobs(self.model), self._seq_logprobs(self.reference).detach()
        return self._gradient(objective(torch.exp, log_p, log_q, torch.from_numpy(constants)))

    def _gradient(self, loss: torch.Tensor) -> np.ndarray:
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        return np.concatenate([gradient.numpy().ravel() for gradient in gradients])

    def expected_gradient(self, recipe: Recipe, seq_scores: np.ndarray, batches: np.ndarray) -> np.ndarray:
        sequences = (self.prompts, self.prompts.bool(), self.tokens, self.mask)
        unread = (torch.zeros(self.mask.shape), torch.zeros(self.mask.shape), torch.zeros(len(seq_scores)))
        rollout = Rollout(*sequences, *unread)
        scored = scoring.score(
            self.model, self.reference, rollout, temperature=TEMPERATURE, micro_batch_size=len(seq_scores)
        )
        rows = torch.from_numpy(batches)
        of_batches = (
            torch.from_numpy(seq_scores),
            scored.old_logprobs,
            scored.ref_logprobs,
            scored.token_kl,
            self.mask,
        )
        advantages, weights = torch.vmap(partial(_advantages_and_weights, recipe))(*(x[rows] for x in of_batches))
        weights = weights * torch.from_numpy(batch_probabilities(self.log_p, batches))
        every_answer = update.Experience(*sequences, scored.old_logprobs, torch.zeros(self.mask.shape))
        experience = replace(every_answer.rows(rows.flatten()), advantages=advantages.flatten(0, 1))
        policy_loss, clipping_acts = algorithm.pick_policy_loss(CLIP_EPS)
        objective = update.Objective(
            temperature=TEMPERATURE,
            policy_loss=policy_loss,
            clipping_acts=clipping_acts,
            loss_weights=ops.constant_weights,
            micro_batch_size=rows.numel(),
            loss_kl=algorithm.LOSS_KL["exact" if recipe.keeps_kl_in_loss else "k1"],
        )
        loss, _ = update.policy_loss(self.model, self.reference, experience, weights.flatten(0, 1), KL_COEF, objective)
        return self._gradient(loss)


def _new_model(params: Params) -> torch.nn.Module:
    model = torch_model.new_model(CONFIG).double()
    tensors = export_tensors(CONFIG, SPEC, params, jnp.float64)
    model.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in tensors.items()})
    return model


def _advantages_and_weights(
    recipe: Recipe,
    seq_scores: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    token_kl: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps 4 and 5 of the twin's loop, and the weights of its normaliser, for one batch [B, T]."""
    kl_coef = recipe.reward_kl_coef
    if recipe.kl_form == "exact":
        rewards = ops.exact_kl_token_rewards(seq_scores, token_kl, mask, kl_coef=kl_coef)
    else:
        rewards = ops.token_rewards(seq_scores, ops.k1(old_logprobs, ref_logprobs), mask, kl_coef=kl_coef)
    loss_weights = getattr(ops, f"{recipe.normaliser}_weights")
    if recipe.normaliser == "constant":
        loss_weights = partial(loss_weights, max_response_tokens=LENGTH)
    advantages = getattr(ops, f"{recipe.estimator}_advantages")(rewards, mask)
    return advantages, loss_weights(mask, dtype=torch.float64)
