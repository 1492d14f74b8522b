"""What a recipe is, the tiny transformer that it trains, and what each stack must be able to say of it.

The loss of a minibatch is Σ w ℓ with weights known beforehand, so the expectation over batches is one minibatch too:
all answers of all batches, each token's weight times the probability of its batch. Scoring, rewards, advantages, the
normaliser's weights and the loss of the update are those of training; rewards, advantages and weights see one batch at
a time.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from transformers import LlamaConfig

from parity.truth.enumeration import KL_COEF, VOCAB_SIZE, Objective
from ppo_jax.models.decoder import Params, init_params
from ppo_jax.models.families import spec_of

CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
    tie_word_embeddings=False,
)
SPEC = spec_of(CONFIG)


@dataclass(frozen=True)
class Recipe:
    """How a batch becomes a loss; the halves of the exact form can be left out."""

    kl_form: str
    estimator: str
    answers: int  # per batch
    normaliser: str = "constant"
    kl_in_reward: bool = True
    kl_in_loss: bool = True

    @property
    def keeps_kl_in_loss(self) -> bool:
        return self.kl_form == "exact" and self.kl_in_loss

    @property
    def reward_kl_coef(self) -> float:
        return KL_COEF if self.kl_in_reward else 0.0


class Stages(Protocol):
    """One stack with the models of one pair."""

    log_p: np.ndarray  # log π(y) of every answer [N], written out
    log_q: np.ndarray  # the reference's

    def true_gradient(self, objective: Objective, constants: np.ndarray) -> np.ndarray:
        """Autodiff of an objective over all answers, flattened."""
        ...

    def expected_gradient(self, recipe: Recipe, seq_scores: np.ndarray, batches: np.ndarray) -> np.ndarray:
        """Σ over batches of their probability times the gradient of their loss, flattened."""
        ...


def random_params(seed: int) -> Params:
    """Weights of standard deviation 0.5: no distribution is flat, and none so sharp that a bias could not be seen."""
    params = init_params(SPEC, jax.random.PRNGKey(seed), jnp.float64)
    return jax.tree.map(lambda x: x * 25 if x.ndim > 1 else x, params)


def batch_probabilities(log_p: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Probability of every batch, shaped to multiply weights [batches, B, T]."""
    return np.exp(log_p[batches].sum(axis=1))[:, None, None]
