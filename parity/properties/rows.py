"""What a property is: a check of one stack on one generated case, and the bugs that must break it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis.strategies import SearchStrategy

from parity.planting import Mutant, planted
from parity.properties.stack import DTYPES, JAX_OPS, TORCH_OPS, Stack, both_stacks


class Excess(NamedTuple):
    """How far an invariant is violated, and how far rounding may violate it."""

    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound < math.inf

    @property
    def ratio(self) -> float:
        """Error in units of the bound; where none is allowed, 0 or infinity; NaN is infinitely far."""
        if not (math.isfinite(self.error) and math.isfinite(self.bound)):
            return math.inf
        if self.bound == 0:
            return math.inf if self.error else 0.0
        return self.error / self.bound


KEPT = Excess(0.0, 0.0)


def excess(error: Any, bound: Any = 0.0) -> Excess:
    """The element that is worst beside its own bound; NaN is beyond any bound, less than nothing is nothing.

    So is what float32 could only hold as a denormal number, which XLA takes for 0.
    """
    error = np.nan_to_num(np.maximum(np.asarray(error, np.float64), 0.0), nan=np.inf, posinf=np.inf)
    error = np.where(error < np.finfo(np.float32).tiny, 0.0, error)
    error, bound = np.broadcast_arrays(error, np.asarray(bound, np.float64))
    return worst(*map(Excess, error.ravel().tolist(), bound.ravel().tolist()))


def differ(x: Any, y: Any, bound: Any = 0.0) -> Excess:
    """|x − y| against the bound; equal infinities do not differ, shapes that do are an error of the property."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != np.broadcast_shapes(x.shape, y.shape):
        raise ValueError(f"compared {x.shape} with {y.shape}")
    with np.errstate(invalid="ignore", over="ignore"):
        return excess(np.where(x == y, 0.0, np.abs(x - y)), bound)


def forbid(violations: Any) -> Excess:
    """How many of the flags are set; none may be."""
    return Excess(float(np.count_nonzero(violations)), 0.0)


def worst(*found: Excess) -> Excess:
    return max(found, key=lambda one: one.ratio, default=KEPT)


def bug(name: str, function: str, edit: tuple[str, str], twin_edit: tuple[str, str] | None = None) -> list[Mutant]:
    """The same bug in a function of `ppo_jax.ops` and in its namesake of the twin, whose text may differ."""
    module, twin = (getattr(ops, function).__module__ for ops in (JAX_OPS, TORCH_OPS))
    return [
        Mutant(name, f"{module}:{function}", *edit),
        Mutant(name, f"{twin}:{function}", *(twin_edit or edit)),
    ]


@dataclass(frozen=True)
class Property:
    """An invariant of the pure functions.

    `check(stack, **case)` is called with a case that `cases` draws: a dictionary of NumPy arrays and numbers.
    """

    check: Callable[..., Excess]
    cases: SearchStrategy[dict[str, Any]]
    mutants: list[Mutant]
    dtypes: tuple[str, ...] = DTYPES
    stacks: tuple[str, ...] = ("JAX", "torch")
    max_examples: int | None = None  # where a case is expensive

    @property
    def name(self) -> str:
        return self.check.__name__


EXAMPLES = 25
STACK_OF = {"ppo_jax": 0, "ppo_torch_ref": 1}


def measure(one: Property, stack: Stack) -> Excess:
    """The worst of some cases, the same ones in every run."""
    found = KEPT
    examples = min(EXAMPLES, one.max_examples or EXAMPLES)

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(case=one.cases)
    def look(case):
        nonlocal found
        found = worst(found, one.check(stack, **case))

    look()
    return found


def killed_by(one: Property) -> Iterator[tuple[Mutant, Excess]]:
    """Every mutant of a property and what the property finds in its stack, in the first dtype that shows it.

    A mutant that raises is beyond any bound.
    """
    for mutant in one.mutants:
        with planted(mutant.target, mutant.old, mutant.new):
            found = KEPT
            for dtype in reversed(one.dtypes):
                try:
                    found = worst(found, measure(one, both_stacks(dtype)[STACK_OF[mutant.package]]))
                except Exception:
                    found = Excess(np.inf, 0.0)
                if not found.holds:
                    break
        yield mutant, found
