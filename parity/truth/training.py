"""Whole batches through the stages of training: which forms of the penalty, baselines and normalisers are exact.

Part C keeps the constant normaliser and asks for the gradient of −E[s] + β KL. Part D takes the others and asks what
they follow instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from parity.truth import enumeration
from parity.truth.claims import FLOOR, Row, direction_error, relative_error, row_of
from parity.truth.enumeration import KL_COEF, LENGTH, Answers, all_answers, all_batches
from parity.truth.jax_stages import JaxStages
from parity.truth.recipes import Recipe, Stages
from parity.truth.torch_stages import TorchStages


@dataclass(frozen=True)
class Claim:
    """A recipe, and what its expected gradient is compared with.

    A `factor` is what the gradient is known to be multiplied by. Without one it is claimed to be biased, and compared
    after the factor that fits best, so that a bias is more than a learning rate.
    """

    name: str
    recipe: Recipe
    factor: float | None = None
    with_weighted_answers: bool = False  # instead of −E[s] + β KL

    @property
    def printed_factor(self) -> str:
        return "best" if self.factor is None else str(Fraction(self.factor).limit_denominator(10))


LEAVE_ONE_OUT, WHITENED = "leave_one_out_to_go", "whitened_batch_mean"
OF_FORMS = (
    Claim("k1, batch mean, B = 2", Recipe("k1", "batch_mean", 2), 1 / 2),
    Claim("k1, batch mean, B = 3", Recipe("k1", "batch_mean", 3), 2 / 3),
    Claim("k1, leave one out to go, B = 2", Recipe("k1", LEAVE_ONE_OUT, 2), 1.0),
    Claim("k1, leave one out to go, B = 3", Recipe("k1", LEAVE_ONE_OUT, 3), 1.0),
    Claim("exact, leave one out to go, B = 2", Recipe("exact", LEAVE_ONE_OUT, 2), 1.0),
    Claim("exact, leave one out to go, B = 3", Recipe("exact", LEAVE_ONE_OUT, 3), 1.0),
    Claim("exact, batch mean, B = 2", Recipe("exact", "batch_mean", 2)),
    Claim("exact, batch mean, B = 3", Recipe("exact", "batch_mean", 3)),
    Claim("exact, its half in the reward alone", Recipe("exact", LEAVE_ONE_OUT, 2, kl_in_loss=False)),
    Claim("exact, its half in the loss alone", Recipe("exact", LEAVE_ONE_OUT, 2, kl_in_reward=False)),
    Claim("k1, whitened, B = 2", Recipe("k1", WHITENED, 2)),
    Claim("k1, whitened, B = 3", Recipe("k1", WHITENED, 3)),
    Claim("exact, whitened, B = 2", Recipe("exact", WHITENED, 2)),
    Claim("k1, whitened, B = 2: the rate of winning", Recipe("k1", WHITENED, 2), 1.0, with_weighted_answers=True),
)
SEQUENCE_MEAN, TOKEN_MEAN = (Recipe("k1", "batch_mean", 2, f"{unit}_mean") for unit in ("sequence", "token"))
OF_NORMALISERS = (
    Claim("constant: the objective", Recipe("k1", "batch_mean", 2), 1 / 2),
    Claim("constant: weights 1 / longest", Recipe("k1", "batch_mean", 2), 1.0, with_weighted_answers=True),
    Claim("sequence mean: the objective", SEQUENCE_MEAN),
    Claim("sequence mean: weights 1 / length", SEQUENCE_MEAN, 1.0, with_weighted_answers=True),
    Claim("token mean: the objective", TOKEN_MEAN),
    Claim("token mean: weights 1 / sum of lengths", TOKEN_MEAN, 1.0, with_weighted_answers=True),
    Claim("sequence mean, exact: the objective", Recipe("exact", LEAVE_ONE_OUT, 2, "sequence_mean")),
    Claim("token mean, exact: the objective", Recipe("exact", LEAVE_ONE_OUT, 2, "token_mean")),
)


def rows_of(part: str, claims: Sequence[Claim], *, pairs: int, torch_pairs: int) -> Iterator[Row]:
    """One row per claim and stack."""
    answers = all_answers()
    for stack, stages, count in (("JAX", JaxStages, pairs), ("PyTorch", TorchStages, torch_pairs)):
        errors: dict[str, list[float]] = {claim.name: [] for claim in claims}
        for pair in range(count):
            for name, error in _errors(stages(answers, pair), claims, answers, pair):
                errors[name].append(error)
        for claim in claims:
            floor = FLOOR if claim.factor is None else None
            yield row_of(part, claim.name, stack, errors[claim.name], factor=claim.printed_factor, floor=floor)


def _errors(stages: Stages, claims: Sequence[Claim], answers: Answers, pair: int) -> Iterator[tuple[str, float]]:
    seq_scores = np.random.default_rng(pair).normal(size=len(answers.tokens))
    objective_gradient = stages.true_gradient(enumeration.minus_objective, seq_scores)
    for claim in claims:
        batches = all_batches(claim.recipe.answers, len(seq_scores))
        found = stages.expected_gradient(claim.recipe, seq_scores, batches)
        truth = objective_gradient
        if claim.with_weighted_answers:
            coefficients = answer_weights(claim.recipe, stages.log_p, stages.log_q, seq_scores, answers.lengths)
            truth = stages.true_gradient(enumeration.minus_weighted_answers, coefficients)
        error = direction_error(found, truth) if claim.factor is None else relative_error(found / claim.factor, truth)
        yield claim.name, error


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
    if recipe.estimator == WHITENED:
        advantages = advantages / np.sqrt(advantages**2 + 1e-8)
    weights = {
        "constant": np.full(advantages.shape, 1 / (2 * LENGTH)),
        "sequence_mean": np.broadcast_to(1 / (2 * lengths[:, None]), advantages.shape),
        "token_mean": 1 / (lengths[:, None] + lengths),
    }[recipe.normaliser]
    return (2 * weights * advantages) @ np.exp(log_p)
