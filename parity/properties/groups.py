"""Advantages beside the other answers to the same prompt, and what else is made of whole answers."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from parity.planting import Mutant
from parity.properties.draws import SHAPES, answers, in_sixty_fourths, poisoned, size_of
from parity.properties.rows import Excess, Property, bug, differ, excess, worst
from parity.properties.stack import Stack

N = 2  # answers to a prompt
OF_A_BATCH = (
    "batch_mean_advantages",
    "whitened_batch_mean_advantages",
    "leave_one_out_advantages",
    "leave_one_out_to_go_advantages",
)
OF_A_GROUP = (
    "group_mean_advantages",
    "group_normalised_advantages",
    "group_leave_one_out_advantages",
    "group_leave_one_out_to_go_advantages",
)


def _of_groups(ops: Any, rewards: Any, mask: Any) -> tuple[Any, ...]:
    return tuple(getattr(ops, name)(rewards, mask, answers_per_prompt=N) for name in OF_A_GROUP)


def _of_the_batch(ops: Any, rewards: Any, mask: Any) -> tuple[Any, ...]:
    return tuple(getattr(ops, name)(rewards, mask) for name in OF_A_BATCH)


def _bounds(stack: Stack, rewards: np.ndarray, mask: np.ndarray) -> tuple[float, ...]:
    """Of the rounding of each estimator; one that divides by a deviation divides its rounding too."""
    size = 16 * stack.eps * size_of(rewards)
    totals = np.where(mask, rewards, 0).astype(np.float64).sum(1)
    deviations = [x.std() for x in (totals, *(totals[i : i + N] for i in range(0, len(totals), N))) if x.std() > 0]
    return size, 4 * size / min(deviations, default=1.0) + 4 * stack.eps, size, size


def groups_are_small_batches(stack: Stack, *, rewards: np.ndarray, mask: np.ndarray, poison: float) -> Excess:
    """The estimator of a group is that of a batch on its neighbouring rows."""
    dirty = np.where(mask, in_sixty_fourths(rewards), np.float32(poison))
    alone = [stack.run(_of_the_batch, dirty[i : i + N], mask[i : i + N]) for i in range(0, len(mask), N)]
    found = zip(stack.run(_of_groups, dirty, mask), zip(*alone, strict=True), strict=True)
    bounds = _bounds(stack, np.where(mask, in_sixty_fourths(rewards), 0), mask)
    return worst(
        *(differ(ours, np.concatenate(parts), bound) for (ours, parts), bound in zip(found, bounds, strict=True))
    )


def groups_do_not_see_each_other(stack: Stack, *, rewards: np.ndarray, others: np.ndarray, mask: np.ndarray) -> Excess:
    """Not one bit of what the answers to another prompt were rewarded with."""
    beside = np.concatenate([rewards[:N], others[N:]])
    pairs = zip(stack.run(_of_groups, rewards, mask), stack.run(_of_groups, beside, mask), strict=True)
    return worst(*(differ(x[:N], y[:N]) for x, y in pairs))


def a_group_of_equal_rewards_gives_exactly_zero(
    stack: Stack, *, rewards: np.ndarray, mask: np.ndarray, value: float
) -> Excess:
    """However large, and whatever the other group has; answers without a token too."""
    last = (np.arange(mask.shape[1])[None] == mask.sum(1, keepdims=True) - 1) & mask
    equal = np.where(last, np.float32(value), np.float32(0))
    ours = stack.run(_of_groups, np.concatenate([equal[:N], rewards[N:]]), mask)
    return worst(*(excess(np.abs(x[:N])) for x in ours))


def group_normalised_advantages_undo_an_affine_map(
    stack: Stack, *, rewards: np.ndarray, mask: np.ndarray, scale: float, shift: float
) -> Excess:
    """Of each group's scores, to within the epsilon beside the variance."""
    last = (np.arange(mask.shape[1])[None] == mask.sum(1, keepdims=True) - 1) & mask
    scores = in_sixty_fourths(rewards[:, 0])
    expected = np.zeros(mask.shape)
    for i in range(0, len(mask), N):
        rows = [b for b in range(i, i + N) if mask[b].any()]
        kept = scores[rows].astype(np.float64)
        for b, score in zip(rows, kept, strict=True):
            deviation = scale * (score - kept.mean()) / np.sqrt(scale**2 * kept.var() + 1e-8)
            expected[b] = np.where(mask[b], deviation, 0)
    mapped = np.where(last, np.float32(scale) * scores[:, None] + np.float32(shift), np.float32(0))
    ours = stack.group_normalised_advantages(mapped, mask, answers_per_prompt=N)
    return differ(ours, expected, 64 * stack.eps)


def leave_one_out_moves_with_its_own_reward_one_to_one(
    stack: Stack, *, rewards: np.ndarray, mask: np.ndarray, name: str
) -> Excess:
    """Its baseline does not know it: dA/dR is 1, and −1/(n − 1) of each other answer that there is."""
    mask = mask.copy()
    mask[0, 0] = True
    _, (gradient,) = stack.differentiate(_of_the_first_token, rewards, mask, name=name)
    others = max(np.count_nonzero(mask.any(1)) - 1, 1)
    expected = np.where(np.arange(len(mask)) == 0, float(mask[1:].any()), -1 / others)[:, None]
    return differ(gradient, np.where(mask, expected, 0), 8 * stack.eps)


def _of_the_first_token(ops: Any, rewards: Any, mask: Any, *, name: str) -> Any:
    return getattr(ops, name)(rewards, mask)[0, 0]


def permuting_the_answers_permutes_the_advantages(
    stack: Stack, *, rewards: np.ndarray, mask: np.ndarray, order: list[int]
) -> Excess:
    """Of a batch in any order, of a group in its own."""
    rewards = np.where(mask, in_sixty_fourths(rewards), 0)
    bounds = _bounds(stack, rewards, mask)
    found = []
    for estimators, rows in ((_of_the_batch, order), (_of_groups, [1, 0, 3, 2])):
        plain, permuted = (stack.run(estimators, rewards[i], mask[i]) for i in (range(len(mask)), rows))
        found += [differ(y, x[rows], bound) for x, y, bound in zip(plain, permuted, bounds, strict=True)]
    return worst(*found)


def padding_never_changes_an_advantage(stack: Stack, *, rewards: np.ndarray, mask: np.ndarray, poison: float) -> Excess:
    """Two columns more, and whatever lies in them."""
    rewards = np.where(mask, in_sixty_fourths(rewards), np.float32(0))
    more = ((0, 0), (0, 2))
    longer = np.pad(mask, more)
    dirty = np.where(longer, np.pad(rewards, more), np.float32(poison))
    found = []
    for estimators in (_of_the_batch, _of_groups):
        pairs = zip(stack.run(estimators, dirty, longer), stack.run(estimators, rewards, mask), strict=True)
        bounds = _bounds(stack, rewards, mask)
        found += [differ(x, np.pad(y, more), bound) for (x, y), bound in zip(pairs, bounds, strict=True)]
    return worst(*found)


def importance_weights_are_capped_ratios(
    stack: Stack, *, old: np.ndarray, behaviour: np.ndarray, mask: np.ndarray, poison: float, cap: float
) -> Excess:
    """In (0, cap] and, on the policy that drew the tokens, exactly 1."""
    dirty = tuple(np.where(mask, x, np.float32(poison)) for x in (old, behaviour))
    ours = stack.importance_weights(*dirty, mask, cap=cap)
    ratio = np.exp(old.astype(np.float64) - behaviour)
    rounding = 8 * stack.eps * (1 + np.abs(old) + np.abs(behaviour)) * np.minimum(ratio, cap)
    same = stack.importance_weights(dirty[0], dirty[0], mask, cap=cap)
    return worst(
        differ(ours, np.where(mask, np.minimum(ratio, cap), 0), rounding),
        excess(ours.astype(np.float64) - np.float64(np.float32(cap)), stack.eps),
        excess(np.count_nonzero(ours[mask] <= 0)),
        differ(same, mask),
    )


def explained_variance_is_the_share_of_the_variance(
    stack: Stack, *, values: np.ndarray, returns: np.ndarray, mask: np.ndarray, poison: float, bias: float
) -> Excess:
    """1 of the returns themselves, whatever the bias; 0 of a constant; 0 where there is nothing to explain."""
    values, returns = in_sixty_fourths(values), in_sixty_fourths(returns)
    dirty, clean = (np.where(mask, x, np.float32(poison)) for x in (values, returns))
    explained = stack.explained_variance
    kept, rest = returns[mask].astype(np.float64), (returns.astype(np.float64) - values)[mask]
    varies = kept.size > 0 and kept.var() > 0
    expected = 1 - rest.var() / kept.var() if varies else 0.0
    constant = np.full_like(returns, bias)
    rounding = 256 * stack.eps * (1 + abs(expected)) * (1 + (np.abs(kept).max() ** 2 / kept.var() if varies else 0))
    return worst(
        differ(explained(dirty, clean, mask), expected, rounding),
        differ(explained(clean + np.float32(bias), clean, mask), float(varies)),
        differ(explained(constant, clean, mask), 0.0, rounding),
        differ(explained(dirty, constant, mask), 0.0),
    )


# ---------------------------------------------------------------------------- cases and mutants

REWARDS = answers("rewards", shapes=SHAPES[1:])  # an even number of rows
WITH = {
    "value": st.sampled_from([0.1, 1e8 / 3, 7e30]),
    "scale": st.sampled_from([0.5, 4.0]),
    "shift": st.sampled_from([-8.0, 32.0]),
}


def rewards_and(*names: str, cases: Any = REWARDS, **strategies: Any) -> Any:
    return st.tuples(cases, st.fixed_dictionaries({name: WITH[name] for name in names} | strategies)).map(
        lambda pair: pair[0] | pair[1]
    )


ONE_GROUP = [
    Mutant(
        "groups are the whole batch",
        "ppo_jax.ops.advantages:_within_groups",
        "x.reshape(-1, answers_per_prompt, x.shape[1])",
        "x[None]",
    ),
    Mutant(
        "groups are the whole batch",
        "ppo_torch_ref.ops:_in_groups",
        "token_rewards.split(answers_per_prompt), response_mask.split(answers_per_prompt)",
        "[token_rewards], [response_mask]",
    ),
]
FAR_APART = [
    Mutant(
        "answers to one prompt lie far apart",
        "ppo_jax.ops.advantages:_within_groups",
        "x.reshape(-1, answers_per_prompt, x.shape[1])",
        "x.reshape(answers_per_prompt, -1, x.shape[1]).swapaxes(0, 1)",
    ),
    Mutant(
        "answers to one prompt lie far apart",
        "ppo_torch_ref.ops:_in_groups",
        "token_rewards.split(answers_per_prompt), response_mask.split(answers_per_prompt)",
        "[x[i::len(x) // answers_per_prompt] for i in range(len(x) // answers_per_prompt)] "
        "for x in (token_rewards, response_mask)",
    ),
]
ITSELF = bug(
    "itself in its baseline",
    "leave_one_out_advantages",
    ("centered * _without_itself(answered, centered.dtype)", "centered"),
    (" * count / (count - 1).clamp(min=1)", ""),
)

PROPERTIES = (
    Property(
        groups_are_small_batches,
        poisoned(REWARDS),
        [
            *bug(
                "itself in its baseline",
                "group_leave_one_out_advantages",
                ("_groups(leave_one_out_advantages", "_groups(batch_mean_advantages"),
            ),
            *bug(
                "whole answers for what is still to come",
                "group_leave_one_out_to_go_advantages",
                ("_groups(leave_one_out_to_go_advantages", "_groups(leave_one_out_advantages"),
            ),
        ],
    ),
    Property(groups_do_not_see_each_other, answers("rewards", "others", shapes=SHAPES[1:]), ONE_GROUP),
    Property(a_group_of_equal_rewards_gives_exactly_zero, rewards_and("value"), [*ONE_GROUP, FAR_APART[0]]),
    Property(
        group_normalised_advantages_undo_an_affine_map,
        rewards_and("scale", "shift"),
        bug(
            "not divided",
            "group_normalised_advantages",
            ("_groups(whitened_batch_mean_advantages", "_groups(batch_mean_advantages"),
        ),
    ),
    Property(
        leave_one_out_moves_with_its_own_reward_one_to_one,
        rewards_and(name=st.sampled_from(OF_A_BATCH[2:])),
        [
            *ITSELF,
            *bug(
                "itself in its baseline",
                "leave_one_out_to_go_advantages",
                (" * _without_itself(answered[:, 0], held.dtype)", ""),
                (" * count / (count - 1).clamp(min=1)", ""),
            ),
        ],
    ),
    Property(
        permuting_the_answers_permutes_the_advantages,
        rewards_and(order=st.permutations(range(4))),
        bug(
            "beside the first answer",
            "masked_center",
            ("zero_masked(shifted - jnp.expand_dims(masked_mean(shifted, mask, axis=axis), axis), mask)", "shifted"),
            ("zero_masked(shifted - masked_mean(shifted, mask, axis=axis).unsqueeze(axis), mask)", "shifted"),
        ),
    ),
    Property(
        padding_never_changes_an_advantage,
        poisoned(REWARDS),
        [
            Mutant(
                "totals over the padding",
                "ppo_jax.ops.advantages:leave_one_out_advantages",
                "masking.masked_sum(token_rewards, response_mask, axis=1)",
                "jnp.sum(token_rewards, axis=1)",
            ),
            Mutant(
                "totals over the padding",
                "ppo_torch_ref.ops:batch_mean_advantages",
                "masked_sum(token_rewards, response_mask, axis=1)",
                "torch.sum(token_rewards, dim=1)",
            ),
        ],
    ),
    Property(
        importance_weights_are_capped_ratios,
        rewards_and(
            cases=poisoned(answers("old", "behaviour", limit=4.0)),
            cap=st.sampled_from([1.0, 2.0]),
        ),
        [
            *bug(
                "no cap",
                "importance_weights",
                ("jnp.minimum(jnp.exp(log_ratio), cap)", "jnp.exp(log_ratio)"),
                (".clamp(max=cap)", ""),
            ),
            *bug(
                "the inverse ratio",
                "importance_weights",
                ("old_logprobs - behaviour_logprobs", "behaviour_logprobs - old_logprobs"),
            ),
        ],
    ),
    Property(
        explained_variance_is_the_share_of_the_variance,
        rewards_and(cases=poisoned(answers("values", "returns")), bias=st.sampled_from([0.0, -8.0, 1024.0])),
        [
            *bug(
                "a bias counts as unexplained",
                "explained_variance",
                (
                    "masking.masked_var(returns - values, response_mask)",
                    "masking.masked_mean((returns - values) ** 2, response_mask)",
                ),
                (
                    "masked_var(returns - values, response_mask)",
                    "masked_mean((returns - values) ** 2, response_mask)",
                ),
            ),
            *bug(
                "nothing to explain is not looked for",
                "explained_variance",
                ("return jnp.where(variance > 0, explained, jnp.zeros_like(variance))", "return explained"),
                (
                    "torch.where(variance > 0, 1.0 - unexplained / variance, torch.zeros_like(variance))",
                    "1.0 - unexplained / variance",
                ),
            ),
        ],
    ),
)
