"""Levels L4 to L7 on shared inputs: the same numbers go into a function of `ppo_jax.ops` and into its twin."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity.cases import ragged_answers
from parity.rows import BOUNDS, Named, Row, compare, numpy_of
from parity.stacks import in_both
from ppo_jax.ops import advantages, kl, logprobs, losses, rewards, sampling
from ppo_torch_ref import ops as torch_ops

CASE = "shared inputs"
TEMPERATURE = 0.7
CLIP_EPS = 0.2


def call_both(
    dtype: str, jax_function: Callable, *inputs: np.ndarray, also: str = "", **fixed: Any
) -> tuple[Named, Named]:
    """Results, by name, of a function and of its namesake in the twin; `also` tells apart two calls of one function."""
    name, twin = jax_function.__name__, getattr(torch_ops, jax_function.__name__)
    arrays, tensors = in_both(dtype, inputs)
    results = []
    for function, x in ((jax_function, arrays), (twin, tensors)):
        result = function(*x, **fixed)
        parts = result if isinstance(result, tuple) else (result,)
        results.append({f"{name}{also}{f'[{i}]' if i else ''}": numpy_of(part) for i, part in enumerate(parts)})
    return results[0], results[1]


def compare_calls(level: str, dtype: str, compared: str, *calls: tuple[Named, Named]) -> Row:
    ours, theirs = ({name: x for call in calls for name, x in call[side].items()} for side in (0, 1))
    return compare(level, dtype, CASE, compared, ours, theirs, bound=BOUNDS[level][dtype])


def log_probs(dtype: str) -> Iterator[Row]:
    """L4: log-probs and entropy; what top-k and top-p leave over."""
    logits = np.random.default_rng(0).normal(0, 3, (4, 50))
    logits[0, 7] = -np.inf  # a banned token
    tokens = np.arange(4, dtype=np.int32)
    yield compare_calls(
        "L4",
        dtype,
        "log-probs and entropy of logits",
        call_both(dtype, logprobs.token_logprobs, logits, tokens, temperature=TEMPERATURE),
        call_both(dtype, logprobs.entropy, logits, temperature=TEMPERATURE),
    )
    cuts = ((1.0, 0), (0.6, 0), (0.0, 0), (1.0, 5), (0.6, 5))
    yield compare_calls(
        "L4",
        dtype,
        "weights after top-k and top-p",
        *(
            call_both(
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


def divergences(dtype: str) -> Iterator[Row]:
    """L5: exact KL of equal to far distributions, its estimators, the KL still to come."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (5, 50))
    distance = np.array([[0.0], [1e-6], [0.1], [1.0], [3.0]])
    ref_logits = logits + distance * rng.normal(0, 1, logits.shape)
    yield compare_calls(
        "L5", dtype, "exact KL of logits", call_both(dtype, kl.exact_token_kl, logits, ref_logits, temperature=1.3)
    )
    mask = ragged_answers(2).response_mask
    policy = rng.normal(-2, 1, mask.shape)
    reference = policy + rng.normal(0, 0.3, mask.shape)
    yield compare_calls(
        "L5",
        dtype,
        "k1, k2, k3, future KL",
        *(call_both(dtype, estimator, policy, reference) for estimator in (kl.k1, kl.k2, kl.k3)),
        call_both(dtype, kl.future_kl, (policy - reference) ** 2, mask),
    )


def advantage(dtype: str) -> Iterator[Row]:
    """L6: rewards and advantages of ragged, truncated and empty answers; large equal rewards."""
    rng, mask = np.random.default_rng(0), ragged_answers(2).response_mask
    scores, token_k1, values = rng.normal(0, 1, len(mask)), rng.normal(0, 0.3, mask.shape), rng.normal(0, 1, mask.shape)
    token_rewards = np.where(mask, rng.normal(0, 1, mask.shape), 0.0)
    equal = np.full(mask.shape, 1e8 / 3)
    discounting: dict[str, Any] = {"discount": 0.9, "gae_lambda": 0.8}
    for compared, call in (
        ("token rewards", call_both(dtype, rewards.token_rewards, scores, token_k1, mask, kl_coef=0.1)),
        (
            "exact KL token rewards",
            call_both(dtype, rewards.exact_kl_token_rewards, scores, token_k1, mask, kl_coef=0.1),
        ),
        ("leave one out to go", call_both(dtype, advantages.leave_one_out_to_go_advantages, token_rewards, mask)),
        ("batch mean", call_both(dtype, advantages.batch_mean_advantages, token_rewards, mask)),
        ("whitened batch mean", call_both(dtype, advantages.whitened_batch_mean_advantages, token_rewards, mask)),
        ("whitened", call_both(dtype, advantages.whiten, token_rewards, mask)),
        ("whitened large equal rewards", call_both(dtype, advantages.whiten, equal, mask)),
        ("GAE", call_both(dtype, advantages.gae_advantages, token_rewards, values, mask, **discounting)),
    ):
        yield compare_calls("L6", dtype, compared, call)


def loss(dtype: str) -> Iterator[Row]:
    """L7: per-token losses, and their sum under every normaliser."""
    rng, mask = np.random.default_rng(0), ragged_answers(2).response_mask
    x, old, weight = (rng.normal(0, 0.5, mask.shape) for _ in range(3))
    per_token = (losses.clipped_policy_loss, losses.clipping_acts, losses.clipped_value_loss)
    yield compare_calls(
        "L7", dtype, "per-token losses", *(call_both(dtype, f, x, old, weight, clip_eps=CLIP_EPS) for f in per_token)
    )
    yield compare_calls("L7", dtype, "loss under every normaliser", _normalised_losses(dtype, x, mask))


def _normalised_losses(dtype: str, token_losses: np.ndarray, mask: np.ndarray) -> tuple[Named, Named]:
    """Σ w ℓ of both stacks, by normaliser."""
    normalisers: dict[str, Any] = {
        "constant": {"max_response_tokens": 9},
        "token_mean": {},
        "sequence_mean": {},
    }

    def reduced(stack: Any, x: Any, kept: Any) -> Named:
        weights = {
            name: getattr(stack, f"{name}_weights")(kept, dtype=x.dtype, **fixed) for name, fixed in normalisers.items()
        }
        return {name: numpy_of(stack.weighted_sum(x, w)) for name, w in weights.items()}

    arrays, tensors = in_both(dtype, (token_losses, mask))
    return reduced(losses, *arrays), reduced(torch_ops, *tensors)
