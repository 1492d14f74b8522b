"""Masked reductions: what is masked reaches neither a value nor a gradient."""

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from parity.properties.draws import drawn, matrices
from parity.properties.rows import Excess, Property, bug, differ, excess, worst
from parity.properties.stack import Stack, op

SHAPE = (3, 5)
REDUCTIONS = {"masked_sum": np.sum, "masked_mean": np.mean, "masked_var": np.var, "masked_max": np.max}
PROBABILITIES = (0.05, 0.25, 0.5, 0.95)


def _size(x: np.ndarray, power: int = 1) -> float:
    return x.size * (float(np.abs(x).max(initial=0.0)) + 1e-30) ** power


def masked_reductions_are_those_of_the_compacted_array(
    stack: Stack, *, x: np.ndarray, mask: np.ndarray, poison: float
) -> Excess:
    """0 where nothing is left (−inf for the largest)."""
    dirty, kept = np.where(mask, x, np.float32(poison)), x[mask].astype(np.float64)
    found = []
    for name, reduction in REDUCTIONS.items():
        nothing = -math.inf if name == "masked_max" else 0.0
        expected = reduction(kept) if kept.size else nothing
        found.append(
            differ(getattr(stack, name)(dirty, mask), expected, 8 * stack.eps * _size(x, 1 + (name == "masked_var")))
        )
    rows = [row[m].astype(np.float64).mean() if m.any() else 0.0 for row, m in zip(x, mask, strict=True)]
    return worst(*found, differ(stack.masked_mean(dirty, mask, axis=1), np.array(rows), 8 * stack.eps * _size(x)))


def masked_elements_have_no_gradient_and_change_no_other(
    stack: Stack, *, x: np.ndarray, mask: np.ndarray, poison: float
) -> Excess:
    dirty = np.where(mask, x, np.float32(poison))
    found = []
    for name in REDUCTIONS:
        (clean,), (gradient,) = (stack.differentiate(op(name), values, mask)[1] for values in (x, dirty))
        found += [excess(np.abs(gradient[~mask]))] * (name != "masked_max" or bool(mask.any()))
        found += [differ(gradient, clean)] * bool(mask.any())
    return worst(*found)


def centring_keeps_differences_and_sums_to_zero(
    stack: Stack, *, x: np.ndarray, mask: np.ndarray, poison: float
) -> Excess:
    kept = x[mask].astype(np.float64)
    expected = np.zeros(SHAPE)
    expected[mask] = kept - kept.mean() if kept.size else 0.0
    return differ(stack.masked_center(np.where(mask, x, np.float32(poison)), mask), expected, 8 * stack.eps * _size(x))


def variance_has_its_digits_on_a_large_offset(stack: Stack, *, x: np.ndarray, offset: float) -> Excess:
    """The square of the mean never meets the mean of the squares."""
    x = np.round(x) + np.float32(offset)
    ours = stack.masked_var(x, np.ones(SHAPE, bool))
    return differ(ours, x.astype(np.float64).var(), 64 * stack.eps * (1 + np.ptp(x).astype(np.float64) ** 2))


def quantiles_are_those_of_the_compacted_array(stack: Stack, *, x: np.ndarray, mask: np.ndarray) -> Excess:
    if not mask.any():
        return Excess(0.0, 0.0)
    ours = stack.run(_quantiles, np.where(mask, x, np.float32(1e30)), mask)
    return differ(ours, np.quantile(x[mask].astype(np.float64), PROBABILITIES), 8 * stack.eps * _size(x))


def _quantiles(ops: Any, x: Any, mask: Any) -> Any:
    return ops.masked_quantiles(x, mask, PROBABILITIES)


MASKED = {"x": matrices(SHAPE, 8.0), "mask": arrays(np.bool_, SHAPE)}
POISON = st.sampled_from([math.nan, math.inf, -math.inf, 1e30])
MULTIPLIED = bug(
    "masked by multiplication",
    "zero_masked",
    # Not x · mask: XLA makes a selection of it again.
    ("jnp.zeros((), x.dtype)", "0 * x"),
    ("torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))", "x * mask.to(x.dtype)"),
)
MEAN_OF_SQUARES = "masked_mean(masked_center(x, mask) ** 2, mask)"
SUM_OF_SQUARES = "masked_sum(masked_center(x, mask) ** 2, mask)"
DDOF_ONE = bug(
    "ddof 1",
    "masked_var",
    (MEAN_OF_SQUARES, f"{SUM_OF_SQUARES} / jnp.maximum(masked_count(mask, dtype=x.dtype) - 1, 1)"),
    (MEAN_OF_SQUARES, f"{SUM_OF_SQUARES} / (masked_count(mask, dtype=x.dtype) - 1).clamp(min=1)"),
)

PROPERTIES = (
    Property(
        masked_reductions_are_those_of_the_compacted_array,
        drawn(**MASKED, poison=POISON),
        [
            *bug(
                "divided by all elements",
                "masked_mean",
                ("masked_count(mask, axis=axis", "masked_count(jnp.ones_like(mask), axis=axis"),
                ("masked_count(mask, axis=axis", "masked_count(torch.ones_like(mask), axis=axis"),
            ),
            *DDOF_ONE,
        ],
    ),
    Property(masked_elements_have_no_gradient_and_change_no_other, drawn(**MASKED, poison=POISON), MULTIPLIED),
    Property(
        centring_keeps_differences_and_sums_to_zero,
        drawn(**MASKED, poison=POISON),
        bug(
            "not centred",
            "masked_center",
            ("jnp.expand_dims(masked_mean(shifted, mask, axis=axis), axis)", "0.0"),
            ("masked_mean(shifted, mask, axis=axis).unsqueeze(axis)", "0.0"),
        ),
    ),
    Property(
        variance_has_its_digits_on_a_large_offset,
        drawn(x=matrices(SHAPE, 8.0), offset=st.sampled_from([0.0, 2.0**20])),
        bug(
            "mean of squares minus square of the mean",
            "masked_var",
            (MEAN_OF_SQUARES, "masked_mean(x**2, mask) - masked_mean(x, mask) ** 2"),
        ),
    ),
    Property(
        quantiles_are_those_of_the_compacted_array,
        drawn(**MASKED),
        bug(
            "quantiles over the padding",
            "masked_quantiles",
            ("jnp.where(mask, x, jnp.full((), jnp.nan, x.dtype))", "jnp.where(mask, x, jnp.zeros((), x.dtype))"),
            ("x.masked_fill(~mask, torch.nan)", "x.masked_fill(~mask, 0.0)"),
        ),
    ),
)
