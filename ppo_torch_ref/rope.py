"""Rotary positions: frequencies of every kind that `rope_parameters` of a Hugging Face config name, and the rotation.

The frequencies do not depend on the length of the batch, so that a token's log-prob does not depend on its neighbours:
`dynamic` is the default kind, right up to `max_position_embeddings`; `longrope` has its short factors, right up to
`original_max_position_embeddings`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")


@dataclass(frozen=True)
class Rope:
    """Radians per position, float64, one per pair of the rotated channels; cos and sin are multiplied by `factor`."""

    frequencies: np.ndarray
    factor: float = 1.0


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, positions: Tensor, frequencies: np.ndarray, factor: float = 1.0) -> Tensor:
    """Rotary embedding of x [B, S, N, H]: of F frequencies, channel i is paired with i + F; from 2F on none turns."""
    wide = at_least_float32(x)
    inverse = torch.as_tensor(frequencies, dtype=wide.dtype, device=x.device)
    angles = (positions[..., None].to(wide.dtype) * inverse)[:, :, None, :]
    cos, sin = factor * angles.cos(), factor * angles.sin()
    first, second, rest = wide.tensor_split((len(frequencies), 2 * len(frequencies)), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def rope_of(parameters: dict[str, Any], head_dim: int, max_positions: int) -> Rope:
    """The rotation of one head that `rope_parameters` describe."""
    given = {name: value for name, value in parameters.items() if value is not None}
    kind = given.get("rope_type", "default")
    if kind not in KINDS:
        raise ValueError(f"rope_type {kind!r} is not supported; supported are {', '.join(KINDS)}")
    rotated = int(head_dim * given.get("partial_rotary_factor", 1.0))
    plain = given["rope_theta"] ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if kind in ("default", "dynamic"):
        return Rope(plain)
    if kind == "linear":
        return Rope(plain / given["factor"])
    original = given["original_max_position_embeddings"]
    if kind == "llama3":
        return Rope(_llama3(plain, original, given))
    stretch = given.get("factor", max_positions / original)
    if kind == "yarn":
        return _yarn(plain, original, stretch, given)
    growth = 1 + math.log(max(stretch, 1.0)) / math.log(original)
    return Rope(plain / np.asarray(given["short_factor"]), given.get("attention_factor", math.sqrt(growth)))


def _llama3(plain: np.ndarray, original: float, given: dict[str, Any]) -> np.ndarray:
    """Llama 3.1: wavelengths above original/low are stretched by the factor, those under original/high are kept."""
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    wavelengths, stretched = 2 * math.pi / plain, plain / given["factor"]
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * stretched + blend * plain
    longer = np.where(wavelengths > original / low, stretched, blended)
    return np.where(wavelengths < original / high, plain, longer)


def _yarn(plain: np.ndarray, original: float, stretch: float, given: dict[str, Any]) -> Rope:
    """YaRN (arXiv 2309.00071): pairs of channels are kept up to `first`, stretched from `last` and blended between,
    where a pair makes `beta_fast` and `beta_slow` turns in the original context; the factor is 0.1 ln(stretch) + 1, or
    a quotient of two such terms where a config scales the logarithm."""

    def pair_of(turns: float) -> float:
        return len(plain) * math.log(original / (2 * math.pi * turns)) / math.log(given["rope_theta"])

    def mscale(scale: float) -> float:
        return 0.1 * scale * math.log(max(stretch, 1.0)) + 1.0

    first, last = pair_of(given.get("beta_fast") or 32.0), pair_of(given.get("beta_slow") or 1.0)
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(plain) - 1)
    stretched = ((np.arange(len(plain)) - first) / (last - first or 0.001)).clip(0.0, 1.0)
    above, below = given.get("mscale"), given.get("mscale_all_dim")
    factor = mscale(above) / mscale(below) if above and below else mscale(1.0)
    return Rope(plain * (1 - stretched + stretched / stretch), given.get("attention_factor", factor))
