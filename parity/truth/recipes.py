"""What a recipe is, the tiny transformers that it trains, and what each stack must be able to say of it.

The loss of a minibatch is Σ w ℓ with weights known beforehand, so the expectation over batches is one minibatch too:
all answers of all batches, each token's weight times the probability of its batch. Scoring, shaping, rewards,
advantages, the normaliser's weights and the loss of the update are those that `algorithm` picks for a configuration;
all between scoring and the update sees one batch at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from transformers import LlamaConfig

from parity.truth.enumeration import CLIP_EPS, LENGTH, TEMPERATURE, VOCAB_SIZE
from parity.truth.objectives import KL_COEF, Objective
from ppo_jax.config import Config
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
SETTING = {
    "rollout.max_new_tokens": LENGTH,
    "rollout.temperature": TEMPERATURE,
    "kl.coef": KL_COEF,
    "update.clip_eps": CLIP_EPS,
}
EARLIER_MEAN, EARLIER_VARIANCE = 0.3, 1.7  # of the scores that a run has seen before


@dataclass(frozen=True)
class Recipe:
    """How a batch becomes a loss: choices of a configuration, and what no configuration says."""

    answers: int  # per batch
    choices: tuple[tuple[str, Any], ...]  # dotted keys and their values
    longest: int = LENGTH  # of all answers
    kl_in_reward: bool = True  # the halves of the exact form can be left out
    kl_in_loss: bool = True
    earlier_scores: float = 0.0  # how many the run has seen
    drawn_by_another: bool = False  # the policy that answers is not the one that is trained

    @cached_property
    def config(self) -> Config:
        """`config_file.parse` would refuse the biased ones."""
        sections: dict[str, dict[str, Any]] = {}
        for dotted, value in (SETTING | dict(self.choices)).items():
            section, key = dotted.split(".")
            sections.setdefault(section, {})[key] = value
        return Config.model_validate(sections)

    @property
    def reward_kl_coef(self) -> float:
        return KL_COEF if self.kl_in_reward else 0.0


def recipe(
    kl_form: str, estimator: str, answers: int, choices: Mapping[str, Any] | None = None, **others: Any
) -> Recipe:
    named = {"kl.form": kl_form, "advantage.estimator": estimator} | dict(choices or {})
    return Recipe(answers, tuple(named.items()), **others)


class Models(NamedTuple):
    """What belongs to one pair; four transformers of the same shape."""

    policy: Params
    reference: Params
    another: Params  # a policy that may have drawn the answers
    critic: dict[str, Params]  # trunk and head: a function of the tokens so far, and no good as their value


@cache
def random_models(pair: int) -> Models:
    rng = np.random.default_rng(pair)
    head = {"kernel": jnp.asarray(rng.normal(size=SPEC.width)), "bias": jnp.asarray(rng.normal())}
    policy, reference, another, trunk = (
        random_params(seed) for seed in (2 * pair, 2 * pair + 1, 1000 + pair, 2000 + pair)
    )
    return Models(policy, reference, another, {"trunk": trunk, "head": head})


def random_params(seed: int) -> Params:
    """Weights of standard deviation 0.5: no distribution is flat, and none so sharp that a bias could not be seen."""
    params = init_params(SPEC, jax.random.PRNGKey(seed), jnp.float64)
    return jax.tree.map(lambda x: x * 25 if x.ndim > 1 else x, params)


class Stages(Protocol):
    """One stack with the models of one pair."""

    log_p: np.ndarray  # log π(y) of every answer [N], written out
    log_q: np.ndarray  # the reference's
    cut_values: np.ndarray  # the critic's value of the state behind an answer that was cut off, 0 behind others [N]

    def true_gradient(self, objective: Objective, constants: np.ndarray) -> np.ndarray:
        """Autodiff of an objective over all answers, flattened."""
        ...

    def expected_gradient(self, recipe: Recipe, seq_scores: np.ndarray, batches: np.ndarray) -> np.ndarray:
        """Σ over batches of their probability times the gradient of their loss, flattened; the policy's alone."""
        ...


def batch_probabilities(log_p: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Probability of every batch, shaped to multiply weights [batches, B, T]."""
    return np.exp(log_p[batches].sum(axis=1))[:, None, None]
