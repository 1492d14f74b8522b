"""Advantages whose baseline is the batch."""

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from parity.planting import Mutant
from parity.properties.draws import answers, drawn, floats, in_sixty_fourths, matrices, poisoned, size_of
from parity.properties.masking import DDOF_ONE
from parity.properties.rows import Excess, Property, bug, differ, excess, worst
from parity.properties.stack import Stack


def _baselined(ops: Any, rewards: Any, mask: Any) -> tuple[Any, ...]:
    """Everything whose baseline is the batch."""
    return (
        ops.batch_mean_advantages(rewards, mask),
        ops.whitened_batch_mean_advantages(rewards, mask),
        ops.leave_one_out_to_go_advantages(rewards, mask),
        ops.leave_one_out_advantages(rewards, mask),
    )


def batch_mean_advantages_are_centred(stack: Stack, *, rewards: np.ndarray, mask: np.ndarray) -> Excess:
    """Over the answers that there are, and the same on all tokens of one."""
    ours = stack.batch_mean_advantages(rewards, mask)
    answered = mask.any(1)
    bound = 8 * stack.eps * size_of(rewards)
    return worst(
        differ(ours[answered, 0].astype(np.float64).sum(), 0.0, bound * len(mask)),
        differ(ours, np.where(mask, ours[:, :1], 0)),
    )


def batch_mean_advantages_keep_the_differences_of_totals(
    stack: Stack, *, rewards: np.ndarray, mask: np.ndarray, poison: float
) -> Excess:
    ours = stack.batch_mean_advantages(np.where(mask, rewards, np.float32(poison)), mask)
    totals = np.where(mask, rewards, 0).astype(np.float64).sum(1)
    mean = totals[mask.any(1)].mean() if mask.any() else 0.0
    return differ(ours, np.where(mask, (totals - mean)[:, None], 0), 8 * stack.eps * size_of(rewards))


def a_constant_on_every_score_changes_no_advantage(
    stack: Stack, *, scores: np.ndarray, mask: np.ndarray, shift: float
) -> Excess:
    """On the last token, where scores are; of every estimator whose baseline is the batch."""
    scores = in_sixty_fourths(scores)
    last = (np.arange(mask.shape[1])[None] == mask.sum(1, keepdims=True) - 1) & mask
    plain, shifted = (np.where(last, scores[:, None] + np.float32(c), np.float32(0)) for c in (0, shift))
    # Multiples of 1/64 are exact up to the division of the mean; whitening divides what is left by 1e-4 at least.
    bounds = 8 * stack.eps * len(mask) * (1 + np.abs(scores).max()) * np.array([1.0, 1e5, 1.0, 1.0])
    pairs = zip(stack.run(_baselined, shifted, mask), stack.run(_baselined, plain, mask), bounds, strict=True)
    return worst(*(differ(x, y, bound) for x, y, bound in pairs))


def leave_one_out_is_the_reward_to_go_minus_that_of_the_others(
    stack: Stack, *, rewards: np.ndarray, mask: np.ndarray, poison: float
) -> Excess:
    """An answer that has ended keeps the reward of its last token."""
    ours = stack.leave_one_out_to_go_advantages(np.where(mask, rewards, np.float32(poison)), mask)
    to_go = np.where(mask, rewards, 0).astype(np.float64)[:, ::-1].cumsum(1)[:, ::-1]
    last = np.maximum(mask.sum(1) - 1, 0)
    held = np.where(mask, to_go, to_go[np.arange(len(mask)), last][:, None])
    expected = np.zeros(mask.shape)
    for b, t in np.argwhere(mask):
        others = [other for other in np.flatnonzero(mask.any(1)) if other != b]
        expected[b, t] = held[b, t] - held[others, t].mean() if others else 0.0
    return differ(ours, expected, 16 * stack.eps * size_of(rewards))


def equal_rewards_however_large_give_exactly_zero(stack: Stack, *, value: float, mask: np.ndarray) -> Excess:
    """The mean of n equal numbers is not that number; and whitening does not divide 0 by 0."""
    last = (np.arange(mask.shape[1])[None] == mask.sum(1, keepdims=True) - 1) & mask
    rewards = np.where(last, np.float32(value), np.float32(0))
    whitened = stack.whiten(np.full(len(mask), np.float32(value)), mask.any(1))
    return worst(excess(np.abs(whitened)), *(excess(np.abs(x)) for x in stack.run(_baselined, rewards, mask)))


def a_batch_of_one_gives_zero(stack: Stack, *, rewards: np.ndarray, length: int) -> Excess:
    mask = np.arange(rewards.shape[1])[None] < length
    return worst(
        excess(np.abs(stack.whiten(rewards[:, 0], mask[:, 0]))),
        *(excess(np.abs(x)) for x in stack.run(_baselined, rewards, mask)),
    )


def whitening_undoes_an_affine_map(
    stack: Stack, *, x: np.ndarray, mask: np.ndarray, scale: float, shift: float
) -> Excess:
    """To within its epsilon: x / sqrt(var + 1e-8) knows the scale when var is not far above 1e-8."""
    x = in_sixty_fourths(x)
    mapped = np.float32(scale) * x + np.float32(shift)
    kept = x[mask].astype(np.float64)
    variance = kept.var() if kept.size else 0.0
    if variance == 0:
        return excess(np.abs(stack.whiten(mapped, mask)))
    base = np.sign(scale) * stack.whiten(x, mask).astype(np.float64)
    epsilon = np.sqrt((variance + 1e-8) / (variance + 1e-8 / scale**2))
    rounding = 64 * stack.eps * (1 + np.abs(x).max() / variance**0.5)
    return differ(stack.whiten(mapped, mask), base * epsilon, rounding)


def whitened_elements_have_mean_zero_and_variance_one(
    stack: Stack, *, x: np.ndarray, mask: np.ndarray, scale: float
) -> Excess:
    """Population variance: ddof 0; var / (var + 1e-8), which is a half where the variance is the epsilon."""
    x = np.float32(scale) * x
    kept = x[mask].astype(np.float64)
    if kept.size == 0 or kept.var() < 1e-10:
        return Excess(0.0, 0.0)
    ours = stack.whiten(np.where(mask, x, np.float32(math.nan)), mask)[mask].astype(np.float64)
    rounding = 64 * stack.eps * (1 + np.abs(x).max() / kept.std())
    return worst(
        differ(ours.mean(), 0.0, rounding), differ((ours**2).mean(), kept.var() / (kept.var() + 1e-8), rounding)
    )


# ---------------------------------------------------------------------------- cases and mutants


@st.composite
def answers_with_scores(draw) -> dict[str, Any]:
    mask = draw(answers(shortest=1))["mask"]
    return {"mask": mask, "scores": draw(matrices(mask.shape[:1], 8.0))}


REWARDS = answers("rewards")
ANSWERED = "jnp.any(response_mask, axis=1)", "response_mask.any(dim=1)"

PROPERTIES = (
    Property(
        batch_mean_advantages_are_centred,
        REWARDS,
        bug(
            "empty rows in the mean",
            "batch_mean_advantages",
            (ANSWERED[0], "jnp.ones(response_mask.shape[0], bool)"),
            (ANSWERED[1], "torch.ones(len(response_mask), dtype=torch.bool)"),
        ),
    ),
    Property(
        batch_mean_advantages_keep_the_differences_of_totals,
        poisoned(REWARDS),
        bug(
            "totals over the padding",
            "batch_mean_advantages",
            ("masking.masked_sum(token_rewards, response_mask, axis=1)", "jnp.sum(token_rewards, axis=1)"),
            ("masked_sum(token_rewards, response_mask, axis=1)", "torch.sum(token_rewards, dim=1)"),
        ),
    ),
    Property(
        a_constant_on_every_score_changes_no_advantage,
        st.builds(lambda case, shift: case | {"shift": shift}, answers_with_scores(), st.sampled_from([-64.0, 1024.0])),
        bug(
            "no baseline",
            "batch_mean_advantages",
            (f"masking.masked_center(seq_rewards, {ANSWERED[0]})", "seq_rewards"),
            (f"masked_center(seq_rewards, {ANSWERED[1]})", "seq_rewards"),
        ),
    ),
    Property(
        leave_one_out_is_the_reward_to_go_minus_that_of_the_others,
        poisoned(REWARDS),
        [
            *bug(
                "itself in its baseline",
                "leave_one_out_to_go_advantages",
                (" * _without_itself(answered[:, 0], held.dtype)", ""),
                (" * count / (count - 1).clamp(min=1)", ""),
            ),
            *bug(
                "ended answers count as 0",
                "leave_one_out_to_go_advantages",
                (
                    "jnp.take_along_axis(to_go, jnp.minimum(jnp.arange(response_mask.shape[1])[None], last), axis=1)",
                    "to_go",
                ),
                ("torch.where(response_mask, to_go, last)", "to_go"),
            ),
        ],
    ),
    Property(
        equal_rewards_however_large_give_exactly_zero,
        st.builds(
            lambda case, value: case | {"value": value},
            answers(shortest=1, shapes=((7, 2), (48, 2))),
            st.sampled_from([0.1, -3.3, 1e8 / 3, 7e30]) | floats(1e30),
        ),
        bug(
            "mean taken of large numbers",
            "masked_center",
            ("zero_masked(x - first, mask)", "zero_masked(x, mask)"),
        ),
    ),
    Property(
        a_batch_of_one_gives_zero,
        drawn(rewards=matrices((1, 3), 8.0), length=st.integers(1, 3)),
        [
            Mutant(
                "others counted without a floor",
                "ppo_jax.ops.advantages:_without_itself",
                "jnp.maximum(answers - 1.0, 1.0)",
                "(answers - 1.0)",
            ),
            *(
                Mutant(
                    "others counted without a floor",
                    f"ppo_torch_ref.ops:{name}",
                    "(count - 1).clamp(min=1)",
                    "(count - 1)",
                )
                for name in ("leave_one_out_to_go_advantages", "leave_one_out_advantages")
            ),
        ],
    ),
    Property(
        whitening_undoes_an_affine_map,
        st.builds(
            lambda case, scale, shift: case | {"scale": scale, "shift": shift},
            answers("x"),
            st.sampled_from([0.5, 4.0, -2.0]),
            st.sampled_from([-8.0, 32.0]),
        ),
        bug("divided by the variance", "whiten", ("jnp.sqrt", ""), ("torch.sqrt", "")),
    ),
    Property(
        whitened_elements_have_mean_zero_and_variance_one,
        st.builds(lambda case, scale: case | {"scale": scale}, answers("x"), st.sampled_from([1.0, 1e-4])),
        [
            *DDOF_ONE,
            *bug(
                "epsilon outside of the root",
                "whiten",
                ("jnp.sqrt(masking.masked_var(x, mask) + 1e-8)", "(jnp.sqrt(masking.masked_var(x, mask)) + 1e-8)"),
                ("torch.sqrt(masked_var(x, mask) + 1e-8)", "(torch.sqrt(masked_var(x, mask)) + 1e-8)"),
            ),
        ],
    ),
)
