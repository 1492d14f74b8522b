"""Token rewards and advantages."""

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from parity.properties.draws import answers, drawn, floats, in_sixty_fourths, matrices
from parity.properties.masking import DDOF_ONE
from parity.properties.rows import Excess, Property, bug, differ, excess, worst
from parity.properties.stack import Stack

FACTORS = {"discount": 0.9, "gae_lambda": 0.8}


def _baselined(ops: Any, rewards: Any, mask: Any) -> tuple[Any, Any, Any]:
    """Everything whose baseline is the batch."""
    return (
        ops.batch_mean_advantages(rewards, mask),
        ops.whitened_batch_mean_advantages(rewards, mask),
        ops.leave_one_out_to_go_advantages(rewards, mask),
    )


def _size(*arrays: np.ndarray) -> float:
    """A bound on every sum of what is in the arrays."""
    return sum(float(np.abs(x).sum()) for x in arrays)


# ---------------------------------------------------------------------------- token rewards


def rewards_add_up_to_the_score_minus_the_penalty(
    stack: Stack, *, scores: np.ndarray, kl: np.ndarray, mask: np.ndarray, kl_coef: float, poison: float
) -> Excess:
    """The score sits on the last response token, and every later sum has it; the penalty on each token is its own."""
    ours = stack.token_rewards(scores, np.where(mask, kl, np.float32(poison)), mask, kl_coef=kl_coef)
    length = mask.sum(1)
    is_last = (np.arange(mask.shape[1])[None] == length[:, None] - 1) & mask
    expected = np.where(is_last, scores[:, None].astype(np.float64), 0) - kl_coef * np.where(mask, kl, 0)
    return differ(ours, expected, 4 * stack.eps * (1 + kl_coef) * _size(scores, kl))


def exact_kl_rewards_to_go_are_the_score_minus_the_later_kl(
    stack: Stack, *, scores: np.ndarray, kl: np.ndarray, mask: np.ndarray, kl_coef: float, poison: float
) -> Excess:
    ours = stack.exact_kl_token_rewards(scores, np.where(mask, kl, np.float32(poison)), mask, kl_coef=kl_coef)
    to_go = ours.astype(np.float64)[:, ::-1].cumsum(1)[:, ::-1]
    kl_to_go = np.where(mask, kl, 0).astype(np.float64)[:, ::-1].cumsum(1)[:, ::-1]
    expected = np.where(mask, scores[:, None] - kl_coef * (kl_to_go - np.where(mask, kl, 0)), 0)
    bound = 8 * stack.eps * (1 + kl_coef) * _size(scores, kl)
    return worst(differ(np.where(mask, to_go, 0), expected, bound), excess(np.abs(ours[~mask])))


# ---------------------------------------------------------------------------- baselines of the batch


def batch_mean_advantages_are_centred(stack: Stack, *, rewards: np.ndarray, mask: np.ndarray) -> Excess:
    """Over the answers that there are, and the same on all tokens of one."""
    ours = stack.batch_mean_advantages(rewards, mask)
    answered = mask.any(1)
    bound = 8 * stack.eps * _size(rewards)
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
    return differ(ours, np.where(mask, (totals - mean)[:, None], 0), 8 * stack.eps * _size(rewards))


def a_constant_on_every_score_changes_no_advantage(
    stack: Stack, *, scores: np.ndarray, mask: np.ndarray, shift: float
) -> Excess:
    """On the last token, where scores are; of every estimator whose baseline is the batch."""
    scores = in_sixty_fourths(scores)
    last = (np.arange(mask.shape[1])[None] == mask.sum(1, keepdims=True) - 1) & mask
    plain, shifted = (np.where(last, scores[:, None] + np.float32(c), np.float32(0)) for c in (0, shift))
    # Multiples of 1/64 are exact up to the division of the mean; whitening divides what is left by 1e-4 at least.
    bounds = 8 * stack.eps * len(mask) * (1 + np.abs(scores).max()) * np.array([1.0, 1e5, 1.0])
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
    return differ(ours, expected, 16 * stack.eps * _size(rewards))


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


# ---------------------------------------------------------------------------- GAE


def _to_go(x: np.ndarray, factor: float) -> np.ndarray:
    """Σ_{t' >= t} factor^(t' − t) x_t', in float64."""
    total, out = np.zeros(len(x)), np.zeros(x.shape)
    for t in reversed(range(x.shape[1])):
        total = out[:, t] = x[:, t] + factor * total
    return out


def _td_errors(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, discount: float) -> np.ndarray:
    rewards, values = (np.where(mask, x, 0).astype(np.float64) for x in (rewards, values))
    return rewards + discount * np.pad(values[:, 1:], ((0, 0), (0, 1))) - values


def lambda_zero_is_the_td_error(stack: Stack, *, rewards: np.ndarray, values: np.ndarray, mask: np.ndarray) -> Excess:
    ours, _ = stack.gae_advantages(rewards, values, mask, discount=0.9, gae_lambda=0.0)
    expected = np.where(mask, _td_errors(rewards, values, mask, 0.9), 0)
    return differ(ours, expected, 4 * stack.eps * _size(rewards, values))


def lambda_one_is_the_reward_to_go_minus_the_value(
    stack: Stack, *, rewards: np.ndarray, values: np.ndarray, mask: np.ndarray
) -> Excess:
    ours, returns = stack.gae_advantages(rewards, values, mask, discount=0.9, gae_lambda=1.0)
    to_go = np.where(mask, _to_go(np.where(mask, rewards, 0), 0.9), 0)
    bound = 8 * stack.eps * _size(rewards, values)
    return worst(differ(returns, to_go, bound), differ(ours, to_go - np.where(mask, values, 0), bound))


def gae_is_its_recursion(
    stack: Stack, *, rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, poison: float
) -> Excess:
    """A scan in one stack, a loop in the other; what lies behind an answer's last token never reaches it."""
    dirty = (np.where(mask, x, np.float32(poison)) for x in (rewards, values))
    advantages, returns = stack.gae_advantages(*dirty, mask, **FACTORS)
    expected = np.where(mask, _to_go(_td_errors(rewards, values, mask, 0.9), 0.9 * 0.8), 0)
    bound = 8 * stack.eps * _size(rewards, values)
    return worst(differ(advantages, expected, bound), differ(returns, np.where(mask, expected + values, 0), bound))


def gae_is_linear(
    stack: Stack,
    *,
    rewards: np.ndarray,
    values: np.ndarray,
    more_rewards: np.ndarray,
    more_values: np.ndarray,
    mask: np.ndarray,
) -> Excess:
    """In rewards and values together."""

    def advantages(rewards, values):
        return stack.gae_advantages(rewards, values, mask, **FACTORS)[0].astype(np.float64)

    double = np.float64(2)
    combined = advantages(double * rewards + more_rewards, double * values + more_values)
    bound = 16 * stack.eps * _size(rewards, values, more_rewards, more_values)
    return differ(combined, 2 * advantages(rewards, values) + advantages(more_rewards, more_values), bound)


# ---------------------------------------------------------------------------- cases and mutants

POISON = st.sampled_from([math.nan, 1e30])


def poisoned(cases: Any) -> Any:
    return st.builds(lambda case, poison: case | {"poison": poison}, cases, POISON)


@st.composite
def scored_answers(draw) -> dict[str, Any]:
    case = draw(answers("kl"))
    return case | {"scores": draw(matrices(case["mask"].shape[:1], 8.0)), "kl_coef": draw(st.sampled_from([0.0, 0.5]))}


@st.composite
def answers_with_scores(draw) -> dict[str, Any]:
    mask = draw(answers(shortest=1))["mask"]
    return {"mask": mask, "scores": draw(matrices(mask.shape[:1], 8.0))}


REWARDS, GAE = answers("rewards"), answers("rewards", "values")
NO_MASK = ("masking.zero_masked(values, response_mask)", "values"), ("zero_masked(values, response_mask)", "values")
ANSWERED = "jnp.any(response_mask, axis=1)", "response_mask.any(dim=1)"
LAST_COLUMN = bug(
    "score on the last column, a pad",
    "last_position",
    ("- jnp.argmax(mask[:, ::-1], axis=1)", "- 0 * jnp.argmax(mask[:, ::-1], axis=1)"),
    ("- torch.argmax(mask.flip(1).int(), dim=1)", "- 0 * torch.argmax(mask.flip(1).int(), dim=1)"),
)

PROPERTIES = (
    Property(
        rewards_add_up_to_the_score_minus_the_penalty,
        poisoned(scored_answers()),
        [
            *bug("penalty of the wrong sign", "token_rewards", ("- kl_coef", "+ kl_coef")),
            *LAST_COLUMN,
        ],
    ),
    Property(
        exact_kl_rewards_to_go_are_the_score_minus_the_later_kl,
        poisoned(scored_answers()),
        bug(
            "a token charged its own KL",
            "exact_kl_token_rewards",
            ("jnp.pad(masking.zero_masked(token_kl, response_mask)[:, 1:], ((0, 0), (0, 1)))", "token_kl"),
            (
                "zero_masked(token_kl, response_mask).roll(-1, dims=1)",
                "zero_masked(token_kl, response_mask).roll(0, 1)",
            ),
        ),
    ),
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
                (" * (answers / jnp.maximum(answers - 1.0, 1.0))", ""),
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
        bug(
            "others counted without a floor",
            "leave_one_out_to_go_advantages",
            ("jnp.maximum(answers - 1.0, 1.0)", "(answers - 1.0)"),
            ("(count - 1).clamp(min=1)", "(count - 1)"),
        ),
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
    Property(
        lambda_zero_is_the_td_error,
        GAE,
        bug("lambda forgotten", "gae_advantages", ("discount * gae_lambda", "discount")),
    ),
    Property(
        lambda_one_is_the_reward_to_go_minus_the_value,
        GAE,
        bug("discount forgotten", "gae_advantages", ("discount * gae_lambda", "gae_lambda")),
    ),
    Property(
        gae_is_its_recursion,
        poisoned(GAE),
        [
            *bug(
                "bootstrapped from what lies behind the end",
                "gae_advantages",
                ("values = masking.zero_masked(values, response_mask)", "values = values"),
                ("zero_masked(values, response_mask)", "values"),
            ),
            *bug(
                "forwards",
                "gae_advantages",
                (", reverse=True", ""),
                ("reversed(range(values.shape[1]))", "range(values.shape[1])"),
            ),
        ],
    ),
    Property(
        gae_is_linear,
        answers("rewards", "values", "more_rewards", "more_values"),
        bug(
            "clipped rewards",
            "gae_advantages",
            (
                "masking.zero_masked(token_rewards, response_mask)",
                "jnp.clip(masking.zero_masked(token_rewards, response_mask), -1, 1)",
            ),
            ("zero_masked(token_rewards, response_mask)", "zero_masked(token_rewards, response_mask).clamp(-1, 1)"),
        ),
    ),
)
