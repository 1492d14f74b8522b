"""A claim about an expected gradient, the relative errors found for it, and whether it holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOUND = 1e-12  # an expected gradient that is claimed to be exact errs by less
FLOOR = 1e-3  # one that is claimed to be biased errs by more, for every pair


@dataclass(frozen=True)
class Row:
    """One line of a table: relative errors over all pairs, in one stack."""

    part: str
    name: str
    stack: str
    factor: str  # what the expected gradient was divided by before it was compared
    smallest: float
    median: float
    largest: float
    claimed: str  # "exact" or "biased"
    holds: bool


def row_of(
    part: str, name: str, stack: str, errors: Sequence[float], *, factor: str = "1", floor: float | None = None
) -> Row:
    """A claim of exactness, or where a floor is given, of a bias above it. A NaN holds nothing."""
    smallest, median, largest = (float(of(errors)) for of in (np.min, np.median, np.max))
    claimed, holds = ("exact", largest < BOUND) if floor is None else ("biased", smallest > floor)
    return Row(part, name, stack, factor, smallest, median, largest, claimed, holds)


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
    """‖found − truth‖ / ‖truth‖."""
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def direction_error(found: np.ndarray, truth: np.ndarray) -> float:
    """The relative error that the best factor leaves, |sin| of the angle: no learning rate makes up for it."""
    return relative_error(found * (found @ truth) / (found @ found), truth)
