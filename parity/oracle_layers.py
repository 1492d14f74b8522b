"""The primitives of a decoder in NumPy float64, one vector, one pair of channels, one query at a time; like `oracle`,
written from the formulas alone."""

import cmath
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray


def rms_norm(x: Array, gain: Array, *, eps: float) -> Array:
    """x_i g_i / sqrt(Σ x² / D + ε) (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4)."""
    rms = math.sqrt(math.fsum(x**2) / len(x) + eps)
    return np.array([value * weight / rms for value, weight in zip(x, gain, strict=True)])


def layer_norm(x: Array, gain: Array, bias: Array, *, eps: float) -> Array:
    """(x_i − mean) g_i / sqrt(var + ε) + b_i, ddof 0 (Ba et al., "Layer Normalization", 2016)."""
    mean = statistics.mean(map(float, x))
    return rms_norm(np.array([value - mean for value in x]), gain, eps=eps) + bias


# GELU is x Φ(x), Φ the normal distribution function; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section
# 2, with its approximation. SiLU is x times the logistic function.
ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


def rotate(x: Array, position: int, frequencies: Sequence[float], factor: float) -> Array:
    """Of a head's channels [H] and F frequencies, x_i + j x_{i+F} is multiplied by factor · exp(j position f_i).

    Channels from 2F on stay. Source: Su et al., "RoFormer", 2021, section 3.2, its pairs laid out in two halves.
    """
    out, pairs = np.array(x), len(frequencies)
    for i, frequency in enumerate(frequencies):
        turned = complex(x[i], x[i + pairs]) * factor * cmath.exp(1j * position * frequency)
        out[i], out[i + pairs] = turned.real, turned.imag
    return out


def attend(query: Array, keys: Array, values: Array, *, scale: float, softcap: float | None) -> Array:
    """Σ_s w_s v_s of the keys and values [S, H] that a query [H] sees, w = softmax of the scores z.

    z_s = scale q·k_s, or c tanh(scale q·k_s / c) with a cap. Source: Vaswani et al., "Attention Is All You Need", 2017,
    equation 1.
    """
    scores = [scale * math.fsum(query * key) for key in keys]
    if softcap is not None:
        scores = [softcap * math.tanh(score / softcap) for score in scores]
    powers = [math.exp(score - max(scores)) for score in scores]
    weights = [power / math.fsum(powers) for power in powers]
    return np.array(
        [math.fsum(w * value[i] for w, value in zip(weights, values, strict=True)) for i in range(len(query))]
    )
