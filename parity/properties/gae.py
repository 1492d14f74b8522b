"""Generalised advantage estimation."""

import numpy as np

from parity.properties.draws import answers, poisoned, size_of
from parity.properties.rows import Excess, Property, bug, differ, worst
from parity.properties.stack import Stack

FACTORS = {"discount": 0.9, "gae_lambda": 0.8}


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
    return differ(ours, expected, 4 * stack.eps * size_of(rewards, values))


def lambda_one_is_the_reward_to_go_minus_the_value(
    stack: Stack, *, rewards: np.ndarray, values: np.ndarray, mask: np.ndarray
) -> Excess:
    ours, returns = stack.gae_advantages(rewards, values, mask, discount=0.9, gae_lambda=1.0)
    to_go = np.where(mask, _to_go(np.where(mask, rewards, 0), 0.9), 0)
    bound = 8 * stack.eps * size_of(rewards, values)
    return worst(differ(returns, to_go, bound), differ(ours, to_go - np.where(mask, values, 0), bound))


def gae_is_its_recursion(
    stack: Stack, *, rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, poison: float
) -> Excess:
    """A scan in one stack, a loop in the other; what lies behind an answer's last token never reaches it."""
    dirty = (np.where(mask, x, np.float32(poison)) for x in (rewards, values))
    advantages, returns = stack.gae_advantages(*dirty, mask, **FACTORS)
    expected = np.where(mask, _to_go(_td_errors(rewards, values, mask, 0.9), 0.9 * 0.8), 0)
    bound = 8 * stack.eps * size_of(rewards, values)
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
    bound = 16 * stack.eps * size_of(rewards, values, more_rewards, more_values)
    return differ(combined, 2 * advantages(rewards, values) + advantages(more_rewards, more_values), bound)


GAE = answers("rewards", "values")

PROPERTIES = (
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
