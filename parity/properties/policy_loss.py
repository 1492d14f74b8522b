"""The clipped policy loss of a token: one bound or two, and the dual one of bad tokens."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from parity.properties.draws import SHAPES, answers
from parity.properties.rows import Excess, Property, bug, differ, excess, forbid, worst
from parity.properties.stack import Stack, op

EPS = 0.2
DUAL_CLIP = 1.5
POLICY_LOSS, DUAL_LOSS = op("clipped_policy_loss"), op("dual_clipped_policy_loss")


def ratio_of(policy: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.exp(policy.astype(np.float64) - old)


def _rounding(stack: Stack, policy: np.ndarray, old: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """Of r A: log-probs of size x round the ratio by x roundings."""
    size = ratio_of(policy, old) * np.abs(advantages)
    return 8 * stack.eps * (1 + np.abs(policy) + np.abs(old)) * size + 1e-37


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
    return excess(-ratio_of(policy, old) * advantages - ours, _rounding(stack, policy, old, advantages))


def the_gradient_is_zero_exactly_where_clipping_must_act(
    stack: Stack,
    *,
    policy: np.ndarray,
    old: np.ndarray,
    advantages: np.ndarray,
    mask: np.ndarray,
    bounds: dict[str, float],
) -> Excess:
    """And −r A elsewhere; the clip fraction counts the same tokens. Of one bound, of two, of a dual one."""
    ratio = ratio_of(policy, old)
    high, dual = 1 + bounds.get("clip_eps_high", EPS), bounds.get("dual_clip", np.inf)
    too_low = (ratio < 1 - EPS) | (ratio > dual)
    must_act = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & too_low)
    on_an_edge = np.min([np.abs(ratio - edge) for edge in (1 - EPS, high, dual)], axis=0) < 1e-4  # either is right
    loss = DUAL_LOSS if "dual_clip" in bounds else POLICY_LOSS
    _, (gradient, *_) = stack.differentiate(loss, policy, old, advantages, clip_eps=EPS, **bounds)
    acts = stack.clipping_acts(policy, old, advantages, clip_eps=EPS, **bounds)
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
    return differ(ours, -ratio_of(policy, old) * advantages, _rounding(stack, policy, old, advantages))


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
    ratio = ratio_of(policy, distant)
    expected = -np.minimum(ratio * advantages, ratio.clip(1 - EPS, 1 + EPS) * advantages)
    # The difference of two log-probs is as exact as they are, and the ratio is exp of it.
    return worst(differ(loss, expected, 2000 * stack.eps * np.abs(expected)), forbid(~np.isfinite(gradient)))


def equal_bounds_are_one_bound(
    stack: Stack, *, policy: np.ndarray, old: np.ndarray, advantages: np.ndarray, mask: np.ndarray
) -> Excess:
    """The same bits, with and without naming the upper one; of the clip fraction and below a dual bound too."""
    one, two = (stack.run(_every_clip, policy, old, advantages, high=high) for high in (None, EPS))
    return worst(*(differ(x, y) for x, y in zip(one, two, strict=True)))


def _every_clip(ops: Any, *inputs: Any, high: float | None) -> tuple[Any, ...]:
    bounds = {"clip_eps": EPS, "clip_eps_high": high}
    return (
        ops.clipped_policy_loss(*inputs, **bounds),
        ops.dual_clipped_policy_loss(*inputs, **bounds, dual_clip=DUAL_CLIP),
        ops.clipping_acts(*inputs, **bounds, dual_clip=DUAL_CLIP),
    )


def a_bad_token_loses_at_most_its_advantage_times_the_dual_bound(
    stack: Stack, *, policy: np.ndarray, old: np.ndarray, advantages: np.ndarray, mask: np.ndarray
) -> Excess:
    """And a good one exactly what it loses without that bound."""
    plain = stack.clipped_policy_loss(policy, old, advantages, clip_eps=EPS)
    ours = stack.dual_clipped_policy_loss(policy, old, advantages, clip_eps=EPS, dual_clip=DUAL_CLIP)
    bound = (-DUAL_CLIP * advantages.astype(np.float64)).astype(stack.dtype)
    bad = advantages < 0
    return worst(
        differ(ours[~bad], plain[~bad]),
        excess(ours[bad] - bound[bad]),
        differ(ours, np.where(bad, np.minimum(plain, bound), plain)),
    )


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


UNCLIPPED = bug(
    "unclipped",
    "clipped_policy_loss",
    ("-jnp.minimum(ratio * advantages, clipped_ratio * advantages)", "-ratio * advantages"),
    (
        "-torch.minimum(ratio * advantages, clipped_ratio * advantages)",
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
        minibatches(bounds=st.sampled_from([{}, {"clip_eps_high": 0.4, "dual_clip": DUAL_CLIP}])),
        [
            *UNCLIPPED,
            *bug("counted on either side", "clipping_acts", ("(advantages < 0) & ", "")),
            *bug(
                "the dual bound is not counted",
                "clipping_acts",
                ("too_low = too_low | (ratio > dual_clip)", "pass"),
                (" | (ratio > dual_clip)", ""),
            ),
            *bug(
                "the dual clip forgets the upper bound",
                "dual_clipped_policy_loss",
                ("clip_eps_high=clip_eps_high", "clip_eps_high=None"),
            ),
        ],
    ),
    Property(
        without_a_limit_the_loss_is_the_unclipped_one,
        minibatches(),
        bug("a limit of its own", "clipped_policy_loss", ("(clip_eps if", "(0.2 if")),
    ),
    Property(
        the_loss_is_linear_in_the_scale_of_the_advantages,
        minibatches(scale=st.sampled_from([0.5, 8.0])),
        bug(
            "clipped ratio without its advantage",
            "clipped_policy_loss",
            ("clipped_ratio * advantages", "clipped_ratio"),
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
        equal_bounds_are_one_bound,
        minibatches(),
        [
            *bug(
                "the upper bound is added",
                "clipped_policy_loss",
                ("else clip_eps_high", "else clip_eps + clip_eps_high"),
            ),
            *bug(
                "no upper bound without a name",
                "clipping_acts",
                ("clip_eps if clip_eps_high is None else clip_eps_high", "clip_eps_high or 1e30"),
            ),
        ],
    ),
    Property(
        a_bad_token_loses_at_most_its_advantage_times_the_dual_bound,
        minibatches(),
        [
            *bug(
                "good tokens too",
                "dual_clipped_policy_loss",
                (
                    "jnp.where(advantages < 0, jnp.minimum(losses, -dual_clip * advantages), losses)",
                    "jnp.minimum(losses, -dual_clip * advantages)",
                ),
                (
                    "torch.where(advantages < 0, torch.minimum(token_losses, -dual_clip * advantages), token_losses)",
                    "torch.minimum(token_losses, -dual_clip * advantages)",
                ),
            ),
            *bug("the larger of both", "dual_clipped_policy_loss", ("minimum", "maximum")),
        ],
    ),
)
