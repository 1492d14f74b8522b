"""What a comparison is: the largest absolute difference, elementwise over unmasked elements, against a bound."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from parity.stacks import Pair

Named = dict[str, np.ndarray]

BOUNDS = {
    "L0": {"float64": 0.0, "float32": 0.0},
    "L1": {"float64": 1e-13, "float32": 5e-6},
    "L2": {"float64": 1e-12, "float32": 1e-5},
    "L3": {"float64": 1e-11, "float32": 2e-5},
    "L4": {"float64": 1e-11, "float32": 2e-5},
    "L5": {"float64": 1e-12, "float32": 1e-5},
    "L6": {"float64": 1e-12, "float32": 1e-5},
    "L7": {"float64": 1e-12, "float32": 2e-6},
    "L8": {"float64": 1e-11, "float32": 1e-5},
    "L9": {"float64": 1e-12, "float32": 1e-5},
    "L10": {"float64": 1e-9, "float32": 1e-5},
    "L11": {"float64": 1e-9, "float32": 1e-4},
    "L12": {"float64": 1e-12, "float32": 2e-5},
}

# On a real checkpoint. float64: what a prototype's worst gradient, 3e-13, leaves room for. float32: 10 x the floor of a
# correct build, measured on SmolLM2-135M-Instruct (30 layers), where float64 confirms that the rest is rounding.
REAL_BOUNDS = {
    "float64": {"L0": 0.0} | dict.fromkeys(("L2", "L3", "L4", "L5", "L8", "L9", "L12"), 1e-10),
    "float32": {
        "L0": 0.0,
        "L2": 10 * 9.9e-6,
        "L3": 10 * 4.4e-6,
        "L4": 10 * 4.6e-5,
        "L5": 10 * 1.9e-5,
        "L8": 10 * 7.5e-5,
        "L9": 10 * 4.7e-5,
        "L12": 10 * 2.8e-4,
    },
}


def bound_of(level: str, dtype: str, *, is_real: bool) -> float:
    """Bound of a level, before the scale of what is compared."""
    return REAL_BOUNDS[dtype][level] if is_real else BOUNDS[level][dtype]


@dataclass(frozen=True)
class Row:
    """One line of the table: the worst of some tensors, and the first of them beyond the bound."""

    level: str
    dtype: str
    case: str
    compared: str
    worst: str
    error: float
    bound: float
    diverged: str | None


def compare(
    level: str,
    dtype: str,
    case: str,
    compared: str,
    ours: Named,
    theirs: Named,
    *,
    bound: float,
) -> Row:
    """Row of tensors by name, in the order of `ours`.

    NaN on either side, different shapes and a name that one side lacks are beyond any bound; so is everything where the
    bound itself, made from numbers of one side, is NaN or infinite.
    """
    errors = {name: max_difference(ours.get(name), theirs.get(name)) for name in ours | theirs}
    worst = max(errors, key=lambda name: errors[name])
    diverged = next((name for name, error in errors.items() if not error <= bound < np.inf), None)
    return Row(level, dtype, case, compared, worst, errors[worst], bound, diverged)


def max_difference(x: np.ndarray | None, y: np.ndarray | None) -> float:
    """Largest |x − y|; inf where they cannot be compared. Equal infinities are equal."""
    if x is None or y is None or x.shape != y.shape or x.size == 0:
        return np.inf
    x, y = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(x == y, 0.0, np.abs(x - y))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max())


def numpy_of(x: Any) -> np.ndarray:
    """A tensor of either stack, copied to the host."""
    return x.detach().numpy().copy() if isinstance(x, torch.Tensor) else np.array(x)


def named(tensors: dict[str, Any]) -> Named:
    return {name: numpy_of(x) for name, x in tensors.items()}


def row_of(
    pair: "Pair",
    level: str,
    compared: str,
    ours: Named,
    theirs: Named,
    *,
    scale: float = 1.0,
    bound: float | None = None,
) -> Row:
    """Row of a model; its bound is `scale` times that of the level, unless given."""
    if bound is None:
        bound = scale * bound_of(level, pair.dtype, is_real=pair.case.is_real)
    return compare(level, pair.dtype, pair.case.name, compared, ours, theirs, bound=bound)


def dated(step: int, values: Named) -> Named:
    """Names with the step they belong to, so that values of many steps can be compared in order."""
    return {f"{step}: {name}": x for name, x in values.items()}
