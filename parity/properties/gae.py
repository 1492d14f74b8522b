"""Generalised advantage estimation."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from parity.properties.draws import answers, matrices, poisoned, size_of
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
    stack: Stack, *, rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, discount: float
) -> Excess:
    ours, returns = stack.gae_advantages(rewards, values, mask, discount=discount, gae_lambda=1.0)
    to_go = np.where(mask, _to_go(np.where(mask, rewards, 0), discount), 0)
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


def a_bootstrap_moves_its_own_answer_alone(
    stack: Stack, *, rewards: np.ndarray, values: np.ndarray, behind: np.ndarray, mask: np.ndarray, poison: float
) -> Excess:
    """By γ (γλ)^k of it, k tokens before the last one; where it is 0, and in a row without an answer, by nothing."""
    dirty = tuple(np.where(mask, x, np.float32(poison)) for x in (rewards, values))
    behind = np.where(mask.any(1), behind, np.float32(poison))
    ours, returns = stack.run(_bootstrapped, *dirty, behind, mask, **FACTORS)
    plain, plain_returns = stack.gae_advantages(*dirty, mask, **FACTORS)
    before_the_last = mask.sum(1, keepdims=True) - 1 - np.arange(mask.shape[1])[None]
    with np.errstate(invalid="ignore", over="ignore"):
        moved = np.where(mask, 0.9 * (0.9 * 0.8) ** before_the_last * behind[:, None].astype(np.float64), 0)
    bound = 16 * stack.eps * size_of(rewards, values, behind[mask.any(1)])
    untouched = behind == 0
    return worst(
        differ(ours, plain + moved, bound),
        differ(returns, plain_returns + moved, bound),
        differ(ours[untouched], plain[untouched]),
    )


def _bootstrapped(ops: Any, rewards: Any, values: Any, behind: Any, mask: Any, **factors: float) -> Any:
    return ops.gae_advantages(rewards, values, mask, **factors, bootstrap_values=behind)


def whitened_gae_is_gae_whitened_and_keeps_its_returns(
    stack: Stack, *, rewards: np.ndarray, values: np.ndarray, behind: np.ndarray, mask: np.ndarray, poison: float
) -> Excess:
    dirty = tuple(np.where(mask, x, np.float32(poison)) for x in (rewards, values))
    behind = np.where(mask.any(1), behind, np.float32(poison))
    ours, returns, whitened, expected = stack.run(_whitened_both_ways, *dirty, behind, mask, **FACTORS)
    return worst(differ(ours, whitened, 8 * stack.eps * np.abs(whitened)), differ(returns, expected))


def _whitened_both_ways(ops: Any, rewards: Any, values: Any, behind: Any, mask: Any, **factors: float) -> Any:
    ours = ops.whitened_gae_advantages(rewards, values, mask, **factors, bootstrap_values=behind)
    advantages, returns = ops.gae_advantages(rewards, values, mask, **factors, bootstrap_values=behind)
    return *ours, ops.whiten(advantages, mask), returns


# ---------------------------------------------------------------------------- cases and mutants


@st.composite
def cut_off_answers(draw) -> dict[str, Any]:
    """Some end by themselves, and have nothing behind them."""
    case = draw(answers("rewards", "values"))
    behind = draw(matrices(case["mask"].shape[:1], 8.0))
    return case | {"behind": np.where(np.arange(len(behind)) % 2 == 1, behind, np.float32(0))}


GAE = answers("rewards", "values")

PROPERTIES = (
    Property(
        lambda_zero_is_the_td_error,
        GAE,
        bug("lambda forgotten", "gae_advantages", ("discount * gae_lambda", "discount")),
    ),
    Property(
        lambda_one_is_the_reward_to_go_minus_the_value,
        st.builds(lambda case, discount: case | {"discount": discount}, GAE, st.sampled_from([0.9, 1.0])),
        bug("discount forgotten", "gae_advantages", ("discount * gae_lambda", "gae_lambda")),
    ),
    Property(
        gae_is_its_recursion,
        poisoned(GAE),
        [
            *bug(
                "bootstrapped from what lies behind the end",
                "gae_advantages",
                (
                    "jnp.where(has_next, jnp.pad(values[:, 1:], ((0, 0), (0, 1))), behind[:, None])",
                    "jnp.pad(values[:, 1:], ((0, 0), (0, 1)))",
                ),
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
                "token_rewards + discount",
                "jnp.clip(token_rewards, -1, 1) + discount",
            ),
            ("zero_masked(token_rewards, response_mask)", "zero_masked(token_rewards, response_mask).clamp(-1, 1)"),
        ),
    ),
    Property(
        a_bootstrap_moves_its_own_answer_alone,
        poisoned(cut_off_answers()),
        [
            *bug(
                "bootstrap forgotten",
                "gae_advantages",
                ("if bootstrap_values is None else bootstrap_values", ""),
                ("if bootstrap_values is not None:", "if False:"),
            ),
            *bug(
                "not discounted",
                "gae_advantages",
                (
                    "token_rewards + discount * next_values",
                    "token_rewards + discount * jnp.where(has_next, next_values, 0) "
                    "+ jnp.where(has_next, 0, next_values)",
                ),
                ("next_values = next_values + score_on", "rewards = rewards + score_on"),
            ),
        ],
    ),
    Property(
        whitened_gae_is_gae_whitened_and_keeps_its_returns,
        poisoned(cut_off_answers()),
        [
            *bug(
                "returns of what is whitened",
                "whitened_gae_advantages",
                (
                    "return whiten(advantages, response_mask), returns",
                    "return (white := whiten(advantages, response_mask)), white + returns - advantages",
                ),
            ),
            *bug(
                "whitened over the padding",
                "whitened_gae_advantages",
                ("whiten(advantages, response_mask)", "whiten(advantages, jnp.ones_like(response_mask))"),
                ("whiten(advantages, response_mask)", "whiten(advantages, torch.ones_like(response_mask))"),
            ),
            *bug(
                "whitened without its bootstrap",
                "whitened_gae_advantages",
                ("response_mask, **settings)", 'response_mask, **settings | {"bootstrap_values": None})'),
                ("response_mask, **settings)", 'response_mask, **settings | {"bootstrap_values": None})'),
            ),
        ],
    ),
)
