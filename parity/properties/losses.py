"""The value loss of a token, and the weights that reduce what tokens lose."""

import itertools
import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from parity.planting import Mutant
from parity.properties.draws import SHAPES, answers, drawn, matrices
from parity.properties.masking import MULTIPLIED
from parity.properties.policy_loss import EPS, minibatches, ratio_of, without
from parity.properties.rows import Excess, Property, bug, differ, excess, worst
from parity.properties.stack import Stack, op

MAX_TOKENS = 7
NORMALISERS = ("constant", "token_mean", "sequence_mean")


def minibatch_loss(ops: Any, policy: Any, old: Any, advantages: Any, mask: Any, *, normaliser: str) -> Any:
    """The loss as the update composes it: what is masked is zeroed first, then every token clipped, then weighted."""
    policy, old, advantages = (ops.zero_masked(x, mask) for x in (policy, old, advantages))
    token_losses = ops.clipped_policy_loss(policy, old, advantages, clip_eps=EPS)
    return ops.weighted_sum(token_losses, weights(ops, mask, dtype=policy.dtype, normaliser=normaliser))


def weights(ops: Any, mask: Any, *, dtype: Any, normaliser: str) -> Any:
    options = {"max_response_tokens": MAX_TOKENS} if normaliser == "constant" else {}
    return getattr(ops, f"{normaliser}_weights")(mask, dtype=dtype, **options)


def _normaliser_weights(ops: Any, x: Any, mask: Any, *, normaliser: str) -> Any:
    return weights(ops, mask, dtype=x.dtype, normaliser=normaliser)


def the_value_loss_is_pessimistic_and_stops_where_it_is_clipped(
    stack: Stack, *, values: np.ndarray, old: np.ndarray, returns: np.ndarray, mask: np.ndarray
) -> Excess:
    values, old, returns = (x.astype(np.float64) for x in (values, old, returns))
    clipped = old + (values - old).clip(-EPS, EPS)
    plain_square, clipped_square = (values - returns) ** 2, (clipped - returns) ** 2
    ours, (gradient, *_) = stack.differentiate(op("clipped_value_loss"), values, old, returns, clip_eps=EPS)
    size = 1 + np.abs(values) + np.abs(old) + np.abs(returns)
    decided = (np.abs(np.abs(values - old) - EPS) > 1e-3) & (
        (np.abs(plain_square - clipped_square) > 1e-2) | (np.abs(values - old) < EPS)
    )
    stopped = (clipped_square > plain_square) & (np.abs(values - old) > EPS)
    expected = np.where(stopped, 0.0, values - returns)
    return worst(
        differ(ours, np.maximum(plain_square, clipped_square) / 2, 8 * stack.eps * size**2),
        differ(gradient[decided], expected[decided], 8 * stack.eps * size[decided]),
    )


def without_a_limit_the_value_loss_is_half_the_squared_error(
    stack: Stack, *, values: np.ndarray, old: np.ndarray, returns: np.ndarray, mask: np.ndarray
) -> Excess:
    """And its gradient the error."""
    ours, (gradient, *_) = stack.differentiate(op("clipped_value_loss"), values, old, returns, clip_eps=math.inf)
    values, returns = values.astype(np.float64), returns.astype(np.float64)
    size = np.abs(values) + np.abs(old) + np.abs(returns)
    return worst(
        differ(ours, (values - returns) ** 2 / 2, 8 * stack.eps * size**2),
        differ(gradient, values - returns, 8 * stack.eps * size),
    )


# ---------------------------------------------------------------------------- reduced


def weights_add_up_to_what_they_name(stack: Stack, *, policy: np.ndarray, mask: np.ndarray) -> Excess:
    """Tokens over a constant; 1 in all; 1 in all, as much for every answer."""
    lengths, batch = mask.sum(1), len(mask)
    answers = max(1, np.count_nonzero(lengths))
    per_answer = {
        "constant": lengths / (batch * MAX_TOKENS),
        "token_mean": lengths / max(1, lengths.sum()),
        "sequence_mean": (lengths > 0) / answers,
    }
    found = []
    for name, expected in per_answer.items():
        ours = stack.run(_normaliser_weights, policy, mask, normaliser=name).astype(np.float64)
        found += [differ(ours.sum(1), expected, 8 * stack.eps), excess(np.abs(ours[~mask]))]
        found += [differ(ours, np.where(mask, ours.max(1, keepdims=True), 0))]
    return worst(*found)


def an_all_false_mask_gives_zero_and_zero_gradients(stack: Stack, *, policy: np.ndarray, poison: float) -> Excess:
    """Under every normaliser, whatever the values; also of `weighted_sum` alone."""
    nothing, dirty = np.zeros(policy.shape, bool), np.full_like(policy, poison)
    found = []
    for normaliser in NORMALISERS:
        loss, gradients = stack.differentiate(minibatch_loss, dirty, dirty, dirty, nothing, normaliser=normaliser)
        weights = stack.run(_normaliser_weights, policy, nothing, normaliser=normaliser)
        alone, (gradient, _) = stack.differentiate(op("weighted_sum"), dirty, weights)
        found += [excess(np.abs(x)) for x in (loss, *gradients, weights, alone, gradient)]
    return worst(*found)


def masked_values_change_neither_loss_nor_gradient(
    stack: Stack,
    *,
    policy: np.ndarray,
    old: np.ndarray,
    advantages: np.ndarray,
    mask: np.ndarray,
    normaliser: str,
    poison: float,
) -> Excess:
    """Whatever lies under the padding of log-probs, old log-probs and advantages, NaN and 1e30 too."""
    clean = (policy, old, advantages)
    dirty = tuple(np.where(mask, x, np.float32(poison)) for x in clean)
    (loss, gradients), (expected, expected_gradients) = (
        stack.differentiate(minibatch_loss, *x, mask, normaliser=normaliser) for x in (dirty, clean)
    )
    return worst(
        differ(loss, expected),
        *(differ(x, y) for x, y in zip(gradients, expected_gradients, strict=True)),
        *(excess(np.abs(x[~mask])) for x in gradients),
    )


def duplicating_the_batch_changes_nothing(
    stack: Stack, *, policy: np.ndarray, old: np.ndarray, advantages: np.ndarray, mask: np.ndarray, normaliser: str
) -> Excess:
    inputs = (policy, old, advantages, mask)
    once = stack.run(minibatch_loss, *inputs, normaliser=normaliser)
    twice = stack.run(minibatch_loss, *(np.concatenate([x, x]) for x in inputs), normaliser=normaliser)
    return differ(twice, once, 8 * stack.eps * _loss_size(policy, old, advantages, mask))


def any_partition_adds_up_to_the_whole(
    stack: Stack,
    *,
    policy: np.ndarray,
    old: np.ndarray,
    advantages: np.ndarray,
    mask: np.ndarray,
    normaliser: str,
    cuts: set[int],
) -> Excess:
    """The weights are those of the minibatch; its micro-batches then add up, in value and gradient."""
    reduce = stack.run(_normaliser_weights, policy, mask, normaliser=normaliser)
    inputs = (*(np.where(mask, x, 0) for x in (policy, old, advantages)), reduce)
    whole, (gradient, *_) = stack.differentiate(_weighted, *inputs)
    edges = [0, *sorted(cuts), len(mask)]
    parts = [stack.differentiate(_weighted, *(x[a:b] for x in inputs)) for a, b in itertools.pairwise(edges)]
    gradients = np.concatenate([part_gradient for _, (part_gradient, *_) in parts])
    return worst(
        differ(sum(float(loss) for loss, _ in parts), whole, 8 * stack.eps * _loss_size(policy, old, advantages, mask)),
        differ(gradients, gradient, 4 * stack.eps * np.abs(gradient)),
    )


def _weighted(ops: Any, policy: Any, old: Any, advantages: Any, reduce: Any) -> Any:
    return ops.weighted_sum(ops.clipped_policy_loss(policy, old, advantages, clip_eps=EPS), reduce)


def _loss_size(policy: np.ndarray, old: np.ndarray, advantages: np.ndarray, mask: np.ndarray) -> float:
    return float(np.where(mask, np.maximum(1.2, ratio_of(policy, old)) * np.abs(advantages), 0).sum()) * mask.size


# ---------------------------------------------------------------------------- cases and mutants

NORMALISER = st.sampled_from(NORMALISERS)
POISON = st.sampled_from([math.nan, math.inf, 1e30, -1e30])

PROPERTIES = (
    Property(
        the_value_loss_is_pessimistic_and_stops_where_it_is_clipped,
        answers("values", "old", "returns", limit=2.0),
        bug("the smaller of both", "clipped_value_loss", ("maximum", "minimum")),
    ),
    Property(
        without_a_limit_the_value_loss_is_half_the_squared_error,
        answers("values", "old", "returns", limit=2.0),
        [
            *bug("no half", "clipped_value_loss", ("0.5 * ", "")),
            *bug(
                "a limit of its own",
                "clipped_value_loss",
                ("old_values + clip_eps", "old_values + 0.2"),
                ("(-clip_eps, clip_eps)", "(-clip_eps, 0.2)"),
            ),
        ],
    ),
    Property(
        weights_add_up_to_what_they_name,
        without(minibatches(), "old", "advantages"),
        [
            *bug(
                "divided by the padded width",
                "constant_weights",
                ("(response_mask.shape[0] * max_response_tokens)", "response_mask.size"),
                ("(response_mask.shape[0] * max_response_tokens)", "response_mask.numel()"),
            ),
            *bug(
                "empty rows among the answers",
                "sequence_mean_weights",
                ("jnp.sum(lengths > 0, dtype=dtype)", "jnp.sum(lengths >= 0, dtype=dtype)"),
                ("torch.sum(lengths > 0, dtype=dtype)", "torch.sum(lengths >= 0, dtype=dtype)"),
            ),
        ],
    ),
    Property(
        an_all_false_mask_gives_zero_and_zero_gradients,
        drawn(policy=matrices(SHAPES[0], 4.0), poison=POISON),
        [
            # Not in JAX: XLA makes mask / count a selection, which is 0 also where count is.
            Mutant("divided by no tokens", "ppo_torch_ref.ops:token_mean_weights", ".clamp(min=1)", ""),
            *bug(
                "0 · NaN",
                "weighted_sum",
                ("masking.zero_masked(token_losses, weights != 0), weights != 0", "token_losses, weights == weights"),
                ("zero_masked(token_losses, weights != 0)", "token_losses"),
            ),
        ],
    ),
    Property(
        masked_values_change_neither_loss_nor_gradient,
        minibatches(SHAPES[1:], normaliser=NORMALISER, poison=POISON),
        MULTIPLIED,
    ),
    Property(
        duplicating_the_batch_changes_nothing,
        minibatches(SHAPES[1:], normaliser=NORMALISER),
        bug(
            "not divided by the batch",
            "constant_weights",
            ("(response_mask.shape[0] * max_response_tokens)", "max_response_tokens"),
        ),
    ),
    Property(
        any_partition_adds_up_to_the_whole,
        minibatches(SHAPES[1:], normaliser=NORMALISER, cuts=st.sampled_from([{2}, {1, 3}])),
        bug(
            "a mean of micro-batches",
            "weighted_sum",
            ("masking.masked_sum(", "masking.masked_mean("),
            ("torch.sum(", "torch.mean("),
        ),
    ),
)
