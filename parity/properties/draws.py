"""Cases: arrays over a handful of fixed shapes, so that JAX compiles once, with ties, zeros and extremes among them.

Numbers are of float32, so that the same case is exact in every dtype.
"""

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from hypothesis.strategies import SearchStrategy

ROWS, VOCAB = 4, 7
# Answers by tokens; a square, where a mixed-up axis broadcasts without an error, and none.
SHAPES = ((5, 5), (4, 6))
TEMPERATURES = st.sampled_from([0.5, 1.7])


def drawn(**cases: SearchStrategy) -> SearchStrategy[dict[str, Any]]:
    """A case of independent parts."""
    return st.fixed_dictionaries(cases)


def floats(limit: float) -> SearchStrategy[float]:
    """Numbers of float32 in ± limit; none so small that a product of two would underflow."""
    limit = float(np.float32(limit))
    return st.floats(-limit, limit, width=32, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-15 else 0.0)


def matrices(shape: tuple[int, ...], limit: float) -> SearchStrategy[np.ndarray]:
    return arrays(np.float32, shape, elements=floats(limit))


def logits(*limits: float, shape: tuple[int, ...] = (ROWS, VOCAB)) -> SearchStrategy[np.ndarray]:
    """Rows of logits, of one of the sizes."""
    return st.sampled_from(limits or (1.0, 8.0, 40.0)).flatmap(lambda limit: matrices(shape, limit))


def in_sixty_fourths(x: np.ndarray) -> np.ndarray:
    """Rounded so that adding a number of thousands is exact in float32."""
    return (np.round(x * 64) / 64).astype(np.float32)


@st.composite
def near_logits(draw) -> dict[str, Any]:
    """Rows of logits and others a distance of 1e-9 to 1e-2 away: where differences cancel."""
    rows = draw(logits(1.0, 8.0))
    noise = draw(matrices(rows.shape, 1.0))
    distance = np.float32(10.0 ** draw(st.integers(-9, -2)))
    return {"logits": rows, "ref_logits": (rows + distance * noise).astype(np.float32)}


def masks(shape: tuple[int, int], *, shortest: int = 0) -> SearchStrategy[np.ndarray]:
    """Right-padded answers, of every length from `shortest` to all of T."""
    batch, length = shape
    lengths = st.lists(st.integers(shortest, length), min_size=batch, max_size=batch)
    return lengths.map(lambda drawn: np.arange(length)[None] < np.array(drawn)[:, None])


@st.composite
def answers(draw, *names: str, limit: float = 8.0, shortest: int = 0, shapes=SHAPES) -> dict[str, Any]:
    """A `mask` and arrays [B, T] of these names; what lies under the padding is drawn like the rest."""
    shape = draw(st.sampled_from(shapes))
    drawn = {name: draw(matrices(shape, limit)) for name in names}
    return drawn | {"mask": draw(masks(shape, shortest=shortest))}


def log_softmax(rows: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """In float64, for expected values."""
    scaled = np.asarray(rows, np.float64) / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def poisoned(cases: SearchStrategy[dict[str, Any]]) -> SearchStrategy[dict[str, Any]]:
    """The same cases with what a check puts under their padding."""
    return st.builds(lambda case, poison: case | {"poison": poison}, cases, st.sampled_from([math.nan, 1e30]))


def size_of(*arrays: np.ndarray) -> float:
    """A bound on every sum of what is in the arrays."""
    return sum(float(np.abs(x).sum()) for x in arrays)
