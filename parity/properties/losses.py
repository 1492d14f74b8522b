"""The clipped losses, and the weights that reduce them."""

import itertools
import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from parity.planting import Mutant
from parity.properties.draws import SHAPES, answers, drawn, matrices
from parity.properties.masking import MULTIPLIED
from parity.properties.rows import Excess, Property, bug, differ, excess, forbid, worst
from parity.properties.stack import Stack, op

EPS = 0.2
MAX_TOKENS = 7
NORMALISERS = ("constant", "token_mean", "sequence_mean")
POLICY_LOSS = op("clipped_policy_loss")


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


def _ratio(policy: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.exp(policy.astype(np.float64) - old)


def _rounding(stack: Stack, policy: np.ndarray, old: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """Of r A: log-probs of size x round the ratio by x roundings."""
    size = _ratio(policy, old) * np.abs(advantages)
    return 8 * stack.eps * (1 + np.abs(policy) + np.abs(old)) * size + 1e-37


# ---------------------------------------------------------------------------- per token


def at_ratio_one_the_gradient_is_the_policy_gradient(
    stack: Stack, *, policy: np.ndarray, advantages: np.ndarray, mask: np.ndarray
) -> Excess:
    """Exactly: d(−r A)/d log π = −A."""
    loss, (gradient, *_) = stack.differentiate(POLICY_LOSS, policy, policy, advantages, clip_eps=EPS)
    return worst(differ(gradient, -advantages), differ(loss, -advantages))


def clipping_is_pessimistic(
    stack: Stack, *, policy: np.ndarray, old: np.ndarray, advantages: np.ndarray, mask: np.ndarray
) -> Excess:
    """At every token the clipped loss is the larger one."""
    ours = stack.clipped_policy_loss(policy, old, advantages, clip_eps=EPS)
    return excess(-_ratio(policy, old) * advantages - ours, _rounding(stack, policy, old, advantages))


def the_gradient_is_zero_exactly_where_clipping_must_act(
    stack: Stack, *, policy: np.ndarray, old: np.ndarray, advantages: np.ndarray, mask: np.ndarray
) -> Excess:
    """And −r A elsewhere; the clip fraction counts the same tokens."""
    ratio = _ratio(policy, old)
    must_act = ((advantages > 0) & (ratio > 1 + EPS)) | ((advantages < 0) & (ratio < 1 - EPS))
    on_an_edge = np.minimum(np.abs(ratio - 1 - EPS), np.abs(ratio - 1 + EPS)) < 1e-4  # either side is right
    _, (gradient, *_) = stack.differentiate(POLICY_LOSS, policy, old, advantages, clip_eps=EPS)
    acts = stack.clipping_acts(policy, old, advantages, clip_eps=EPS)
    expected = np.where(must_act, 0.0, -ratio * advantages)
    rounding = np.where(must_act, 0.0, _rounding(stack, policy, old, advantages))
    return worst(
        differ(gradient[~on_an_edge], expected[~on_an_edge], rounding[~on_an_edge]),
        forbid((acts != must_act)[~on_an_edge]),
    )


def without_a_limit_the_loss_is_the_unclipped_one(
    stack: Stack, *, policy: np.ndarray, old: np.ndarray, advantages: np.ndarray, mask: np.ndarray
) -> Excess:
    ours = stack.clipped_policy_loss(policy, old, advantages, clip_eps=1e30)
    return differ(ours, -_ratio(policy, old) * advantages, _rounding(stack, policy, old, advantages))


def the_loss_is_linear_in_the_scale_of_the_advantages(
    stack: Stack, *, policy: np.ndarray, old: np.ndarray, advantages: np.ndarray, mask: np.ndarray, scale: float
) -> Excess:
    """By powers of two, so exactly; its gradient too."""
    (loss, (gradient, *_)), (base, (base_gradient, *_)) = (
        stack.differentiate(POLICY_LOSS, policy, old, x, clip_eps=EPS)
        for x in (np.float32(scale) * advantages, advantages)
    )
    return worst(differ(loss, scale * base), differ(gradient, scale * base_gradient))


def extreme_log_ratios_stay_finite(stack: Stack, *, old: np.ndarray, signs: np.ndarray, mask: np.ndarray) -> Excess:
    """80 nats in float32, 700 in float64, between log-probs that are far from 0 themselves."""
    extreme = {"float32": 80.0, "float64": 700.0}[stack.dtype]
    advantages = np.sign(signs)
    distant = old - 200
    policy = distant + np.where(np.abs(signs) > 4, extreme, -extreme)
    loss, (gradient, *_) = stack.differentiate(POLICY_LOSS, policy, distant, advantages, clip_eps=EPS)
    ratio = _ratio(policy, distant)
    expected = -np.minimum(ratio * advantages, ratio.clip(1 - EPS, 1 + EPS) * advantages)
    # The difference of two log-probs is as exact as they are, and the ratio is exp of it.
    return worst(differ(loss, expected, 2000 * stack.eps * np.abs(expected)), forbid(~np.isfinite(gradient)))


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
    return float(np.where(mask, np.maximum(1.2, _ratio(policy, old)) * np.abs(advantages), 0).sum()) * mask.size


# ---------------------------------------------------------------------------- cases and mutants


@st.composite
def minibatches(draw, shapes=SHAPES, **more: Any) -> dict[str, Any]:
    """Log-probs with those of an old policy a ratio of exp(± 0.1), exp(± 1) or exp(± 4) away."""
    case = draw(answers("old", "drift", "advantages", limit=4.0, shapes=shapes))
    old = -np.abs(case["old"])
    drift = np.float32(draw(st.sampled_from([0.025, 0.25, 1.0]))) * case.pop("drift")
    case |= {"old": old, "policy": (old + drift).astype(np.float32)}
    return case | {name: draw(strategy) for name, strategy in more.items()}


def without(cases: Any, *names: str) -> Any:
    return cases.map(lambda case: {name: x for name, x in case.items() if name not in names})


NORMALISER = st.sampled_from(NORMALISERS)
POISON = st.sampled_from([math.nan, math.inf, 1e30, -1e30])
UNCLIPPED = bug(
    "unclipped",
    "clipped_policy_loss",
    ("-jnp.minimum(ratio * advantages, clipped_ratio * advantages)", "-ratio * advantages"),
    (
        "-torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_eps, 1.0 + clip_eps) * advantages)",
        "-ratio * advantages",
    ),
)

PROPERTIES = (
    Property(
        at_ratio_one_the_gradient_is_the_policy_gradient,
        without(minibatches(), "old"),
        bug(
            "inverse ratio",
            "clipped_policy_loss",
            ("policy_logprobs - old_logprobs", "old_logprobs - policy_logprobs"),
        ),
    ),
    Property(
        clipping_is_pessimistic,
        minibatches(),
        bug("the larger of both", "clipped_policy_loss", ("minimum", "maximum")),
    ),
    Property(
        the_gradient_is_zero_exactly_where_clipping_must_act,
        minibatches(),
        [
            *UNCLIPPED,
            *bug("counted on either side", "clipping_acts", ("(advantages < 0) & ", "")),
        ],
    ),
    Property(
        without_a_limit_the_loss_is_the_unclipped_one,
        minibatches(),
        bug("a limit of its own", "clipped_policy_loss", ("1.0 + clip_eps", "1.2")),
    ),
    Property(
        the_loss_is_linear_in_the_scale_of_the_advantages,
        minibatches(scale=st.sampled_from([0.5, 8.0])),
        bug(
            "clipped ratio without its advantage",
            "clipped_policy_loss",
            ("clipped_ratio * advantages", "clipped_ratio"),
            ("1.0 + clip_eps) * advantages", "1.0 + clip_eps)"),
        ),
    ),
    Property(
        extreme_log_ratios_stay_finite,
        without(answers("old", "signs"), ""),
        bug(
            "a quotient of probabilities",
            "clipped_policy_loss",
            ("jnp.exp(policy_logprobs - old_logprobs)", "jnp.exp(policy_logprobs) / jnp.exp(old_logprobs)"),
            ("torch.exp(policy_logprobs - old_logprobs)", "torch.exp(policy_logprobs) / torch.exp(old_logprobs)"),
        ),
    ),
    Property(
        the_value_loss_is_pessimistic_and_stops_where_it_is_clipped,
        answers("values", "old", "returns", limit=2.0),
        bug("the smaller of both", "clipped_value_loss", ("maximum", "minimum")),
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
