"""Whole batches through the stages of training: is the expected gradient that of the objective, or of what instead?

A claim is a recipe and the truth that it is held against; `forms` and `terms` have them all.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property

import numpy as np

from parity.truth import objectives
from parity.truth.claims import FLOOR, Row, direction_error, relative_error, row_of
from parity.truth.enumeration import LENGTH, Answers, all_answers, all_batches
from parity.truth.jax_stages import JaxStages
from parity.truth.objectives import KL_COEF, Objective
from parity.truth.recipes import Recipe, Stages
from parity.truth.torch_stages import TorchStages


@dataclass(frozen=True)
class Pair:
    """One pair of policy and reference in one stack, with random scores of all answers."""

    stages: Stages
    answers: Answers
    seq_scores: np.ndarray  # [N]

    @cached_property
    def objective_gradient(self) -> np.ndarray:
        return self.stages.true_gradient(objectives.minus_objective, self.seq_scores)


Truth = Callable[[Pair, Recipe], np.ndarray]  # the gradient that is claimed


def the_objective(pair: Pair, _: Recipe) -> np.ndarray:
    """−E[s] + β KL."""
    return pair.objective_gradient


def of(objective: Objective) -> Truth:
    """Another objective of the same scores."""
    return lambda pair, _: pair.stages.true_gradient(objective, pair.seq_scores)


def of_scores(scores_of: Callable[[Pair], np.ndarray]) -> Truth:
    """−E[s'] + β KL, of other scores."""
    return lambda pair, _: pair.stages.true_gradient(objectives.minus_objective, scores_of(pair))


def weighted_answers(pair: Pair, recipe: Recipe) -> np.ndarray:
    coefficients = answer_weights(recipe, pair.stages.log_p, pair.stages.log_q, pair.seq_scores, pair.answers.lengths)
    return pair.stages.true_gradient(objectives.minus_weighted_answers, coefficients)


@dataclass(frozen=True)
class Claim:
    """A recipe, and what its expected gradient is compared with.

    A `factor` is what the gradient is known to be multiplied by. Without one it is claimed to be biased, and compared
    after the factor that fits best, so that a bias is more than a learning rate.
    """

    name: str
    recipe: Recipe
    factor: float | None = None
    truth: Truth = the_objective

    @property
    def printed_factor(self) -> str:
        return "best" if self.factor is None else str(Fraction(self.factor).limit_denominator(10))


def rows_of(part: str, claims: Sequence[Claim], *, pairs: int, torch_pairs: int) -> Iterator[Row]:
    """One row per claim and stack."""
    for stack, stages, count in (("JAX", JaxStages, pairs), ("PyTorch", TorchStages, torch_pairs)):
        errors: dict[str, list[float]] = {claim.name: [] for claim in claims}
        for seed, claim in itertools.product(range(count), claims):
            errors[claim.name].append(_error(claim, random_pair(stages, claim.recipe.longest, seed)))
        for claim in claims:
            floor = FLOOR if claim.factor is None else None
            yield row_of(part, claim.name, stack, errors[claim.name], factor=claim.printed_factor, floor=floor)


@cache
def random_pair(stages: Callable[[Answers, int], Stages], longest: int, seed: int) -> Pair:
    answers = all_answers(longest)
    return Pair(stages(answers, seed), answers, np.random.default_rng(seed).normal(size=len(answers.tokens)))


def _error(claim: Claim, pair: Pair) -> float:
    batches = all_batches(claim.recipe.answers, len(pair.seq_scores))
    found, truth = (
        pair.stages.expected_gradient(claim.recipe, pair.seq_scores, batches),
        claim.truth(pair, claim.recipe),
    )
    return direction_error(found, truth) if claim.factor is None else relative_error(found / claim.factor, truth)


def answer_weights(
    recipe: Recipe, log_p: np.ndarray, log_q: np.ndarray, seq_scores: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """What the k1 form raises each answer by when B = 2, [N]: c_i = Σ_j π(y_j) 2 w_ij A_ij.

    Every token of y_i gets the advantage A_ij = (R_i − R_j) / 2, over its own size where it is whitened, beside another
    answer y_j; Σ_t ∇log π(y_it) is ∇log π(y_i), so what is left of a batch is its weight w_ij and A_ij. The constant
    weighs every answer alike, and R's mean drops out of the gradient. The others weigh by lengths, which are the
    answers' own doing, and no baseline drops out.
    """
    rewards = seq_scores - KL_COEF * (log_p - log_q)
    advantages = (rewards[:, None] - rewards) / 2
    if recipe.config.advantage.estimator in ("whitened_batch_mean", "group_normalised"):
        advantages = advantages / np.sqrt(advantages**2 + 1e-8)
    weights = {
        "constant": np.full(advantages.shape, 1 / (2 * LENGTH)),
        "sequence_mean": np.broadcast_to(1 / (2 * lengths[:, None]), advantages.shape),
        "token_mean": 1 / (lengths[:, None] + lengths),
    }[recipe.config.update.normaliser]
    return (2 * weights * advantages) @ np.exp(log_p)
