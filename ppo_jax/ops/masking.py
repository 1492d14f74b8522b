"""Every reduction over a masked array goes through this file.

One polarity everywhere: True is an element that counts. Masked elements never reach a result nor a gradient, not even
when they hold NaN, because they are replaced before they are used (`jnp.where` on the input, not on the output).
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def zero_masked(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` where the mask is True, 0 elsewhere; a masked NaN has no gradient."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def masked_sum(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, axis: int | None = None) -> Array:
    """Sum of the unmasked elements, 0 where there are none."""
    return jnp.sum(zero_masked(x, mask), axis=axis)


def masked_count(mask: Bool[Array, "*shape"], *, axis: int | None = None, dtype=jnp.float32) -> Array:
    """Number of unmasked elements, as a float of `dtype` so that it can divide."""
    return jnp.sum(mask, axis=axis, dtype=dtype)


def masked_mean(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, axis: int | None = None) -> Array:
    """Mean of the unmasked elements, 0 where there are none."""
    count = masked_count(mask, axis=axis, dtype=x.dtype)
    return masked_sum(x, mask, axis=axis) / jnp.maximum(count, jnp.ones((), x.dtype))


def masked_center(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, axis: int | None = None
) -> Float[Array, "*shape"]:
    """`x` minus its masked mean (of everything, or along an axis), 0 at masked positions.

    A reference element (the first unmasked one) is subtracted before the mean is taken: the mean of n equal float32
    numbers near 1e8 is not that number, their differences are exactly 0.
    """
    if axis is None:
        return masked_center(x.reshape(-1), mask.reshape(-1), axis=0).reshape(x.shape)
    first = jnp.take_along_axis(x, jnp.argmax(mask, axis=axis, keepdims=True), axis=axis)
    shifted = zero_masked(x - first, mask)
    return zero_masked(shifted - jnp.expand_dims(masked_mean(shifted, mask, axis=axis), axis), mask)


def masked_var(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Population variance (ddof 0) of the unmasked elements; exactly 0 when they are equal or there is only one."""
    return masked_mean(masked_center(x, mask) ** 2, mask)


def masked_max(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Largest unmasked element, -inf when there is none."""
    return jnp.max(jnp.where(mask, x, jnp.full((), -jnp.inf, x.dtype)))


def masked_correlation(
    x: Float[Array, "*shape"], y: Float[Array, "*shape"], mask: Bool[Array, "*shape"]
) -> Float[Array, ""]:
    """Pearson's correlation of the unmasked elements, 0 where one of the two is constant."""
    x, y = masked_center(x, mask), masked_center(y, mask)
    # Each by its largest element first: the squares of very large scores overflow.
    x, y = (v / jnp.maximum(masked_max(jnp.abs(v), mask), jnp.finfo(v.dtype).tiny) for v in (x, y))
    size = jnp.sqrt(masked_sum(x * x, mask) * masked_sum(y * y, mask))
    zero, one = jnp.zeros((), x.dtype), jnp.ones((), x.dtype)
    return jnp.where(size > 0, masked_sum(x * y, mask) / jnp.where(size > 0, size, one), zero)


def masked_histogram(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], edges: Sequence[float]
) -> Int[Array, " bins"]:
    """How many unmasked elements lie in [e_i, e_i+1); the first and the last bin also count what lies beyond them."""
    bins = jnp.searchsorted(jnp.asarray(edges[1:-1], x.dtype), x.reshape(-1), side="right")
    return jnp.zeros(len(edges) - 1, jnp.int32).at[bins].add(mask.reshape(-1).astype(jnp.int32))


def masked_quantiles(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], probabilities: Sequence[float]
) -> Float[Array, " Q"]:
    """Linearly interpolated quantiles of the unmasked elements, NaN when there are none."""
    unmasked_or_nan = jnp.where(mask, x, jnp.full((), jnp.nan, x.dtype))
    return jnp.nanquantile(unmasked_or_nan, jnp.asarray(probabilities, x.dtype))


def last_position(mask: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """Index of the last True of every row (T - 1 for a row without one)."""
    return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
