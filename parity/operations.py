"""Levels L4 to L7 on shared inputs: the same numbers go into a function of `ppo_jax.ops`, into its twin and into the
oracle. Where both stacks are wrong alike, only the oracle tells.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from parity import oracle
from parity.cases import ragged_answers
from parity.rows import BOUNDS, Named, Row, compare, numpy_of
from parity.stacks import in_both
from ppo_jax.ops import advantages, kl, logprobs, losses, rewards, sampling
from ppo_torch_ref import ops as torch_ops

CASE = "shared inputs"
TEMPERATURE = 0.7
CLIP_EPS = 0.2


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
    """Results of a function and of its namesakes; `also` tells apart two calls of one function."""
    name = jax_function.__name__
    functions = (jax_function, getattr(torch_ops, name), getattr(oracle, name))
    results = []
    for function, x in zip(functions, in_all(dtype, inputs), strict=True):
        result = function(*x, **fixed)
        parts = result if isinstance(result, tuple) else (result,)
        results.append({f"{name}{also}{f'[{i}]' if i else ''}": numpy_of(part) for i, part in enumerate(parts)})
    return Results(*results)


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
    yield from compare_all(
        "L5", dtype, "exact KL of logits", call_all(dtype, kl.exact_token_kl, logits, ref_logits, temperature=1.3)
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


def advantage(dtype: str) -> Iterator[Row]:
    """L6: rewards and advantages of ragged, truncated and empty answers; large equal rewards; a single answer."""
    rng, mask = np.random.default_rng(0), ragged_answers(2).response_mask
    scores, token_k1, values = rng.normal(0, 1, len(mask)), rng.normal(0, 0.3, mask.shape), rng.normal(0, 1, mask.shape)
    token_rewards = np.where(mask, rng.normal(0, 1, mask.shape), 0.0)
    equal = np.full(mask.shape, 1e8 / 3)
    discounting: dict[str, Any] = {"discount": 0.9, "gae_lambda": 0.8}
    leave_one_out, batch_mean = advantages.leave_one_out_to_go_advantages, advantages.batch_mean_advantages
    for compared, *calls in (
        ("token rewards", call_all(dtype, rewards.token_rewards, scores, token_k1, mask, kl_coef=0.1)),
        (
            "exact KL token rewards",
            call_all(dtype, rewards.exact_kl_token_rewards, scores, token_k1, mask, kl_coef=0.1),
        ),
        ("leave one out to go", call_all(dtype, leave_one_out, token_rewards, mask)),
        ("batch mean", call_all(dtype, batch_mean, token_rewards, mask)),
        ("whitened batch mean", call_all(dtype, advantages.whitened_batch_mean_advantages, token_rewards, mask)),
        ("whitened", call_all(dtype, advantages.whiten, token_rewards, mask)),
        ("whitened large equal rewards", call_all(dtype, advantages.whiten, equal, mask)),
        (
            "a single answer",
            call_all(dtype, leave_one_out, token_rewards[:1], mask[:1]),
            call_all(dtype, batch_mean, token_rewards[:1], mask[:1]),
            call_all(dtype, advantages.whitened_batch_mean_advantages, token_rewards[:1], mask[:1]),
        ),
        ("GAE", call_all(dtype, advantages.gae_advantages, token_rewards, values, mask, **discounting)),
    ):
        yield from compare_all("L6", dtype, compared, *calls)


def loss(dtype: str) -> Iterator[Row]:
    """L7: per-token losses, and their sum under every normaliser."""
    rng, mask = np.random.default_rng(0), ragged_answers(2).response_mask
    x, old, weight = (rng.normal(0, 0.5, mask.shape) for _ in range(3))
    per_token = (losses.clipped_policy_loss, losses.clipping_acts, losses.clipped_value_loss)
    yield from compare_all(
        "L7", dtype, "per-token losses", *(call_all(dtype, f, x, old, weight, clip_eps=CLIP_EPS) for f in per_token)
    )
    yield from compare_all("L7", dtype, "loss under every normaliser", _normalised_losses(dtype, x, mask))


def _normalised_losses(dtype: str, token_losses: np.ndarray, mask: np.ndarray) -> Results:
    """Σ w ℓ by normaliser; the oracle's weights are float64 anyway."""
    normalisers: dict[str, Any] = {
        "constant": {"max_response_tokens": 9},
        "token_mean": {},
        "sequence_mean": {},
    }

    def reduced(stack: Any, x: Any, kept: Any, **typed: Any) -> Named:
        weights = {
            name: getattr(stack, f"{name}_weights")(kept, **fixed, **typed) for name, fixed in normalisers.items()
        }
        return {name: numpy_of(stack.weighted_sum(x, w)) for name, w in weights.items()}

    arrays, tensors, exact = in_all(dtype, (token_losses, mask))
    return Results(
        reduced(losses, *arrays, dtype=arrays[0].dtype),
        reduced(torch_ops, *tensors, dtype=tensors[0].dtype),
        reduced(oracle, *exact),
    )
