"""Levels L4, L5 and L7 on shared inputs: the same numbers go into a function of `ppo_jax.ops`, into its twin and into
the oracle. Where both stacks are wrong alike, only the oracle tells. L6 is in `credit`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import or_
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from parity import oracle, oracle_losses, oracle_rewards
from parity.cases import ragged_answers
from parity.rows import BOUNDS, Named, Row, compare, numpy_of
from parity.stacks import in_both
from ppo_jax.ops import kl, logprobs, losses, rewards, sampling
from ppo_torch_ref import ops as torch_ops
from ppo_torch_ref import shaping as torch_shaping

CASE = "shared inputs"
TEMPERATURE = 0.7
CLIP_EPS = 0.2


class Functions:
    """The functions of some modules behind one name, looked up when they are called."""

    def __init__(self, *modules: ModuleType):
        self.modules = modules

    def __getattr__(self, name: str) -> Any:
        for module in self.modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(name)


TRAINER = Functions(rewards, losses)
TWIN = Functions(torch_ops, torch_shaping)
ORACLE = Functions(oracle, oracle_rewards, oracle_losses)


@dataclass(frozen=True)
class Results:
    """What the three make of the same inputs, by name."""

    jax: Named
    torch: Named
    oracle: Named

    def __or__(self, other: "Results") -> "Results":
        return Results(self.jax | other.jax, self.torch | other.torch, self.oracle | other.oracle)


def in_all(dtype: str, inputs: tuple[np.ndarray, ...]) -> tuple[list[Any], list[Any], list[np.ndarray]]:
    """The same arrays for both stacks, floats in `dtype`, and for the oracle: the same numbers as float64."""
    arrays, tensors = in_both(dtype, inputs)
    exact = [x.astype(dtype).astype(np.float64) if x.dtype.kind == "f" else x for x in inputs]
    return arrays, tensors, exact


def call_all(dtype: str, jax_function: Callable, *inputs: np.ndarray, also: str = "", **fixed: Any) -> Results:
    """Results of a function and of its namesakes; `also` tells apart two calls of one function.

    Arrays among the keyword arguments are inputs too.
    """
    name = jax_function.__name__
    functions = (jax_function, getattr(TWIN, name), getattr(ORACLE, name))
    by_name = {key: value for key, value in fixed.items() if isinstance(value, np.ndarray)}
    results = []
    for function, x in zip(functions, in_all(dtype, (*inputs, *by_name.values())), strict=True):
        keywords = fixed | dict(zip(by_name, x[len(inputs) :], strict=True))
        result = function(*x[: len(inputs)], **keywords)
        parts = result if isinstance(result, tuple) else (result,)
        results.append({f"{name}{also}{f'[{i}]' if i else ''}": numpy_of(part) for i, part in enumerate(parts)})
    return Results(*results)


def in_every_stack(dtype: str, composition: Callable[..., Named], *inputs: np.ndarray) -> Results:
    """Of `composition(functions, *inputs, **typed)`; `typed` is the dtype, where the functions take one."""
    arrays, tensors, exact = in_all(dtype, inputs)
    return Results(
        composition(TRAINER, *arrays, dtype=jnp.dtype(dtype)),
        composition(TWIN, *tensors, dtype=getattr(torch, dtype)),
        composition(ORACLE, *exact),
    )


def compare_all(level: str, dtype: str, compared: str, *calls: Results, scale: float = 1.0) -> Iterator[Row]:
    """A row of JAX against torch, and one of both against the oracle; float32 bounds are in units of `scale`."""
    found = reduce(or_, calls)
    bound = BOUNDS[level][dtype] * (scale if dtype == "float32" else 1.0)
    yield compare(level, dtype, CASE, compared, found.jax, found.torch, bound=bound)
    stacks = {"jax": found.jax, "torch": found.torch}
    both = {f"{name}, {stack}": x for stack, results in stacks.items() for name, x in results.items()}
    twice = {f"{name}, {stack}": x for stack in stacks for name, x in found.oracle.items()}
    yield compare(level, dtype, CASE, f"{compared}, oracle", both, twice, bound=bound)


def log_probs(dtype: str) -> Iterator[Row]:
    """L4: log-probs and entropy; what top-k and top-p leave over, and the token that a uniform draws from it."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (4, 50))
    logits[0, 7] = -np.inf  # a banned token
    tokens = np.arange(4, dtype=np.int32)
    yield from compare_all(
        "L4",
        dtype,
        "log-probs and entropy of logits",
        call_all(dtype, logprobs.token_logprobs, logits, tokens, temperature=TEMPERATURE),
        call_all(dtype, logprobs.entropy, logits, temperature=TEMPERATURE),
    )
    cuts = ((1.0, 0), (0.6, 0), (0.0, 0), (1.0, 5), (0.6, 5))
    yield from compare_all(
        "L4",
        dtype,
        "weights after top-k and top-p",
        *(
            call_all(
                dtype,
                sampling.truncated_weights,
                logits,
                temperature=TEMPERATURE,
                top_p=top_p,
                top_k=top_k,
                also=f" p={top_p} k={top_k}",
            )
            for top_p, top_k in cuts
        ),
    )
    # Dyadic numbers, whose sums and products are exact: also a uniform on an edge falls on the same side everywhere.
    weights = rng.integers(0, 5, (64, 50)) / 64.0
    weights[:, 0], weights[:32, -5:] = 1 / 64, 0.0
    uniforms = np.arange(64) / 64.0
    yield from compare_all("L4", dtype, "token of a uniform", call_all(dtype, sampling.inverse_cdf, uniforms, weights))


def divergences(dtype: str) -> Iterator[Row]:
    """L5: exact KL of equal to far distributions, its estimators, the KL still to come, the next coefficient."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (5, 50))
    distance = np.array([[0.0], [1e-6], [0.1], [1.0], [3.0]])
    ref_logits = logits + distance * rng.normal(0, 1, logits.shape)
    tokens = np.array([3, 1, 4, 1, 5], np.int32)
    yield from compare_all(
        "L5", dtype, "exact KL of logits", call_all(dtype, kl.exact_token_kl, logits, ref_logits, temperature=1.3)
    )
    yield from compare_all(
        "L5", dtype, "k3 of logits", call_all(dtype, kl.sampled_token_k3, logits, ref_logits, tokens, temperature=1.3)
    )
    mask = ragged_answers(2).response_mask
    policy = rng.normal(-2, 1, mask.shape)
    reference = policy + rng.normal(0, 0.3, mask.shape)
    yield from compare_all(
        "L5",
        dtype,
        "k1, k2, k3, future KL",
        *(call_all(dtype, estimator, policy, reference) for estimator in (kl.k1, kl.k2, kl.k3)),
        call_all(dtype, kl.future_kl, (policy - reference) ** 2, mask),
    )
    yield from compare_all("L5", dtype, "k1 per token", call_all(dtype, rewards.kl_per_token, policy - reference, mask))
    controller: dict[str, Any] = {"target_nats": 6.0, "horizon": 10.0}
    yield from compare_all(
        "L5",
        dtype,
        "next KL coefficient",
        *(
            call_all(dtype, kl.next_kl_coef, np.array(0.1), np.array(nats), also=f" {nats} nats", **controller)
            for nats in (0.0, 4.5, 6.0, 6.5, 60.0)
        ),
    )


def loss(dtype: str) -> Iterator[Row]:
    """L7: per-token losses, and their sum under every normaliser."""
    rng, mask = np.random.default_rng(0), ragged_answers(2).response_mask
    inputs = tuple(rng.normal(0, 0.5, mask.shape) for _ in range(3))
    ratio_losses = (losses.clipped_policy_loss, losses.clipping_acts)
    equal: dict[str, Any] = {"clip_eps": CLIP_EPS}
    unequal: dict[str, Any] = equal | {"clip_eps_high": 0.4}
    for compared, *calls in (
        (
            "per-token losses",
            *(call_all(dtype, f, *inputs, **equal) for f in (*ratio_losses, losses.clipped_value_loss)),
        ),
        ("two clip bounds", *(call_all(dtype, f, *inputs, **unequal) for f in ratio_losses)),
        (
            "dual clip",
            *(
                call_all(dtype, f, *inputs, **bounds, dual_clip=1.5, also=also)
                for f in (losses.dual_clipped_policy_loss, losses.clipping_acts)
                for bounds, also in ((equal, ""), (unequal, ", two bounds"))
            ),
        ),
        ("unclipped value loss", call_all(dtype, losses.clipped_value_loss, *inputs, clip_eps=math.inf)),
        ("loss under every normaliser", _normalised_losses(dtype, inputs[0], mask)),
    ):
        yield from compare_all("L7", dtype, compared, *calls)


def _normalised_losses(dtype: str, token_losses: np.ndarray, mask: np.ndarray) -> Results:
    """Σ w ℓ by normaliser; the oracle's weights are float64 anyway."""
    normalisers: dict[str, Any] = {
        "constant": {"max_response_tokens": 9},
        "token_mean": {},
        "sequence_mean": {},
    }

    def reduced(functions: Any, x: Any, kept: Any, **typed: Any) -> Named:
        weights = {
            name: getattr(functions, f"{name}_weights")(kept, **fixed, **typed) for name, fixed in normalisers.items()
        }
        return {name: numpy_of(functions.weighted_sum(x, w)) for name, w in weights.items()}

    return in_every_stack(dtype, reduced, token_losses, mask)
