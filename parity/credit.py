"""Level L6 on shared inputs: scores, the rewards of tokens, and advantages of every kind."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from parity.cases import ragged_answers
from parity.operations import call_all, compare_all, in_every_stack
from parity.rows import Named, Row, numpy_of
from ppo_jax.ops import advantages, rewards

OF_A_BATCH = {
    "batch mean": advantages.batch_mean_advantages,
    "whitened batch mean": advantages.whitened_batch_mean_advantages,
    "leave one out": advantages.leave_one_out_advantages,
    "leave one out to go": advantages.leave_one_out_to_go_advantages,
}
OF_A_GROUP = {
    "mean": advantages.group_mean_advantages,
    "normalised": advantages.group_normalised_advantages,
    "leave one out": advantages.group_leave_one_out_advantages,
    "leave one out to go": advantages.group_leave_one_out_to_go_advantages,
}


def score(dtype: str) -> Iterator[Row]:
    """L6: scores of two batches, one of them with large equal ones; penalties of every length; rewards of tokens."""
    rng, mask = np.random.default_rng(0), ragged_answers(2).response_mask
    lengths = mask.sum(1).astype(float)
    answered, ended = lengths > 0, lengths < mask.shape[1]
    scores, token_k1 = rng.normal(0, 1, len(mask)), rng.normal(0, 0.3, mask.shape)
    later, equal = rng.normal(3, 0.5, len(mask)), np.full(len(mask), 1e8 / 3)
    unanswered = np.where(answered, later, np.nan)
    too_long: dict[str, Any] = {"soft_max_tokens": 2, "max_tokens": 6}
    for compared, *calls in (
        ("moments of scores", in_every_stack(dtype, _moments, scores, unanswered, answered)),
        ("normalised scores", in_every_stack(dtype, _normalised, scores, later, answered)),
        ("normalised large equal scores", in_every_stack(dtype, _normalised, equal, equal, answered)),
        ("a single score", in_every_stack(dtype, _normalised, scores[:1], scores[:1], np.array([True]))),
        ("clipped scores", call_all(dtype, rewards.clipped_scores, scores, bound=0.5)),
        (
            "penalties",
            call_all(dtype, rewards.too_short_penalty, lengths, min_tokens=4, penalty=0.7),
            call_all(dtype, rewards.too_long_penalty, lengths, penalty=0.7, **too_long),
            in_every_stack(dtype, _cut_off, ended),
        ),
        ("token rewards", call_all(dtype, rewards.token_rewards, scores, token_k1, mask, kl_coef=0.1)),
        (
            "exact KL token rewards",
            call_all(dtype, rewards.exact_kl_token_rewards, scores, token_k1, mask, kl_coef=0.1),
        ),
    ):
        yield from compare_all("L6", dtype, compared, *calls)


def _after_two_batches(functions: Any, first: Any, second: Any, answered: Any, **typed: Any) -> tuple[Any, Any]:
    """The moments after the first batch and after both."""
    moments = functions.merged_moments(functions.first_moments(*typed.values()), first, answered)
    return moments, functions.merged_moments(moments, second, answered)


def _moments(functions: Any, *batches: Any, **typed: Any) -> Named:
    one, two = _after_two_batches(functions, *batches, **typed)
    return {f"moments[{i}]": numpy_of(x) for i, x in enumerate((*one, *two))}


def _normalised(functions: Any, first: Any, second: Any, answered: Any, **typed: Any) -> Named:
    one, two = _after_two_batches(functions, first, second, answered, **typed)
    scores = {
        "of one batch": functions.normalised_scores(first, one),
        "of two": functions.normalised_scores(second, two),
    }
    return {name: numpy_of(x) for name, x in scores.items()}


def _cut_off(functions: Any, ended: Any, **typed: Any) -> Named:
    return {"missing_eos_penalty": numpy_of(functions.missing_eos_penalty(ended, penalty=0.7, **typed))}


def advantage(dtype: str) -> Iterator[Row]:
    """L6: advantages of ragged, truncated and empty answers, in groups too; large equal rewards; a single answer."""
    rng, mask = np.random.default_rng(0), ragged_answers(2).response_mask
    token_rewards = np.where(mask, rng.normal(0, 1, mask.shape), 0.0)
    equal = np.full(mask.shape, 1e8 / 3)
    equal_scores = np.where(np.arange(mask.shape[1]) == mask.sum(1, keepdims=True) - 1, equal, 0.0)
    for compared, *calls in (
        *((name, call_all(dtype, f, token_rewards, mask)) for name, f in OF_A_BATCH.items()),
        *(
            (f"{name}, groups of {n}", call_all(dtype, f, token_rewards, mask, answers_per_prompt=n))
            for name, f in OF_A_GROUP.items()
            for n in (2, 3)
        ),
        ("whitened", call_all(dtype, advantages.whiten, token_rewards, mask)),
        ("whitened large equal rewards", call_all(dtype, advantages.whiten, equal, mask)),
        (
            "large equal rewards",
            *(call_all(dtype, f, equal_scores, mask) for f in OF_A_BATCH.values()),
            *(call_all(dtype, f, equal_scores, mask, answers_per_prompt=3) for f in OF_A_GROUP.values()),
        ),
        ("a single answer", *(call_all(dtype, f, token_rewards[:1], mask[:1]) for f in OF_A_BATCH.values())),
    ):
        yield from compare_all("L6", dtype, compared, *calls)
    yield from _of_a_critic(dtype, token_rewards, mask)


def _of_a_critic(dtype: str, token_rewards: np.ndarray, mask: np.ndarray) -> Iterator[Row]:
    """Its advantages, with a value behind the answers that were cut off; what it explains; weights of behaviour."""
    rng = np.random.default_rng(1)
    values, behaviour = rng.normal(0, 1, mask.shape), rng.normal(-2, 1, mask.shape)
    behind = np.where(np.arange(len(mask)) == 1, 0.0, rng.normal(0, 1, len(mask)))  # one ended by itself
    inputs = (token_rewards, values, mask)
    discounting: dict[str, Any] = {"discount": 0.9, "gae_lambda": 0.8}
    for compared, *calls in (
        ("GAE", call_all(dtype, advantages.gae_advantages, *inputs, **discounting)),
        (
            "GAE, bootstrapped",
            call_all(dtype, advantages.gae_advantages, *inputs, **discounting, bootstrap_values=behind),
        ),
        (
            "whitened GAE",
            call_all(dtype, advantages.whitened_gae_advantages, *inputs, **discounting),
            call_all(
                dtype,
                advantages.whitened_gae_advantages,
                *inputs,
                **discounting,
                bootstrap_values=behind,
                also=", bootstrapped",
            ),
        ),
        (
            "explained variance",
            call_all(dtype, advantages.explained_variance, values, values + 0.5 * token_rewards, mask),
            call_all(
                dtype, advantages.explained_variance, values, np.full(mask.shape, 1e8 / 3), mask, also=" of nothing"
            ),
        ),
        (
            "importance weights",
            call_all(dtype, advantages.importance_weights, behaviour + 0.3 * values, behaviour, mask, cap=1.2),
        ),
    ):
        yield from compare_all("L6", dtype, compared, *calls)
