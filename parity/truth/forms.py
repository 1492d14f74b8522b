"""The claims about baselines and critics (C, E), normalisers (D) and shaped scores (F), each with its recipe."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from parity.truth.enumeration import LENGTH
from parity.truth.recipes import EARLIER_MEAN, EARLIER_VARIANCE, Recipe, recipe
from parity.truth.training import Claim, Pair, of_scores, weighted_answers

LEAVE_ONE_OUT, TO_GO, WHITENED = "leave_one_out", "leave_one_out_to_go", "whitened_batch_mean"
OF_FORMS = (
    Claim("k1, batch mean, B = 2", recipe("k1", "batch_mean", 2), 1 / 2),
    Claim("k1, batch mean, B = 3", recipe("k1", "batch_mean", 3), 2 / 3),
    Claim("k1, leave one out, B = 2", recipe("k1", LEAVE_ONE_OUT, 2), 1.0),
    Claim("k1, leave one out, B = 3", recipe("k1", LEAVE_ONE_OUT, 3), 1.0),
    Claim("k1, leave one out to go, B = 2", recipe("k1", TO_GO, 2), 1.0),
    Claim("k1, leave one out to go, B = 3", recipe("k1", TO_GO, 3), 1.0),
    Claim("exact, leave one out, B = 2", recipe("exact", LEAVE_ONE_OUT, 2), 1.0),
    Claim("exact, leave one out, B = 3", recipe("exact", LEAVE_ONE_OUT, 3), 1.0),
    Claim("exact, leave one out to go, B = 2", recipe("exact", TO_GO, 2), 1.0),
    Claim("exact, leave one out to go, B = 3", recipe("exact", TO_GO, 3), 1.0),
    Claim("exact, batch mean, B = 2", recipe("exact", "batch_mean", 2)),
    Claim("exact, batch mean, B = 3", recipe("exact", "batch_mean", 3)),
    Claim("exact, its half in the reward alone", recipe("exact", TO_GO, 2, kl_in_loss=False)),
    Claim("exact, its half in the loss alone", recipe("exact", TO_GO, 2, kl_in_reward=False)),
    Claim("k1, whitened, B = 2", recipe("k1", WHITENED, 2)),
    Claim("k1, whitened, B = 3", recipe("k1", WHITENED, 3)),
    Claim("exact, whitened, B = 2", recipe("exact", WHITENED, 2)),
    Claim("k1, whitened, B = 2: the rate of winning", recipe("k1", WHITENED, 2), 1.0, weighted_answers),
)

CONSTANT, TOKEN_MEAN, SEQUENCE_MEAN = (
    recipe("k1", "batch_mean", 2, {"update.normaliser": name}) for name in ("constant", "token_mean", "sequence_mean")
)
OF_NORMALISERS = (
    Claim("constant: the objective", CONSTANT, 1 / 2),
    Claim("constant: weights 1 / longest", CONSTANT, 1.0, weighted_answers),
    Claim("sequence mean: the objective", SEQUENCE_MEAN),
    Claim("sequence mean: weights 1 / length", SEQUENCE_MEAN, 1.0, weighted_answers),
    Claim("token mean: the objective", TOKEN_MEAN),
    Claim("token mean: weights 1 / sum of lengths", TOKEN_MEAN, 1.0, weighted_answers),
    Claim("sequence mean, exact: the objective", recipe("exact", TO_GO, 2, {"update.normaliser": "sequence_mean"})),
    Claim("token mean, exact: the objective", recipe("exact", TO_GO, 2, {"update.normaliser": "token_mean"})),
)


# ---------------------------------------------------------------------------- E. groups and critics


def in_groups(
    name: str, kl_form: str, estimator: str, factor: Callable[[int], float | None]
) -> tuple[Claim, Claim, Claim]:
    """One prompt's two answers, and of at most two tokens: one prompt's three, and two prompts' two each."""

    def claim(sizes: str, n: int, answers: int, longest: int = LENGTH) -> Claim:
        groups = {"rollout.answers_per_prompt": n}
        return Claim(
            f"{kl_form}, {name}, {sizes}", recipe(kl_form, estimator, answers, groups, longest=longest), factor(n)
        )

    return claim("n = 2", 2, 2), claim("n = 3", 3, 3, longest=2), claim("2 x 2", 2, 4, longest=2)


def with_critic(kl_form: str, estimator: str = "gae", kind: str = "model", **choices: Any) -> Recipe:
    """GAE with λ = 1 and no discount where nothing else is said."""
    critic = {"critic.kind": kind} | {name.replace("_", ".", 1): x for name, x in choices.items()}
    return recipe(kl_form, estimator, 2, critic)


def and_cut_values(pair: Pair) -> np.ndarray:
    return pair.seq_scores + pair.stages.cut_values


BOOTSTRAPPED = with_critic("k1", critic_bootstrap_truncated=True)
OF_GROUPS = (
    *in_groups("group mean", "k1", "group_mean", lambda n: 1 - 1 / n),
    *in_groups("group leave one out", "k1", "group_leave_one_out", lambda n: 1.0),
    *in_groups("group leave one out", "exact", "group_leave_one_out", lambda n: 1.0),
    *in_groups("group leave one out to go", "k1", "group_leave_one_out_to_go", lambda n: 1.0),
    *in_groups("group leave one out to go", "exact", "group_leave_one_out_to_go", lambda n: 1.0),
    *in_groups("group normalised", "k1", "group_normalised", lambda n: None),
    Claim(
        "k1, group normalised, n = 2: the rate of winning",
        recipe("k1", "group_normalised", 2, {"rollout.answers_per_prompt": 2}),
        1.0,
        weighted_answers,
    ),
)
OF_CRITICS = (
    Claim("k1, GAE, λ = 1, wrong values", with_critic("k1"), 1.0),
    Claim("exact, GAE, λ = 1, wrong values", with_critic("exact"), 1.0),
    Claim("k1, GAE, λ = 0.9, wrong values", with_critic("k1", advantage_gae_lambda=0.9)),
    Claim("k1, GAE, λ = 0, wrong values", with_critic("k1", advantage_gae_lambda=0.0)),
    Claim("k1, GAE, discount 0.9", with_critic("k1", advantage_discount=0.9)),
    Claim("k1, whitened GAE", with_critic("k1", "whitened_gae")),
    Claim("k1, GAE, value head on the policy's trunk", with_critic("k1", kind="value_head")),
    Claim("k1, GAE, bootstrapped: the objective", BOOTSTRAPPED),
    Claim("k1, GAE, bootstrapped: score plus V at the cut", BOOTSTRAPPED, 1.0, of_scores(and_cut_values)),
)


# ---------------------------------------------------------------------------- F. shaped scores


def less_penalty(pair: Pair, *, penalty: Callable[[Any, Any], Any]) -> np.ndarray:
    return pair.seq_scores - penalty(pair.answers.lengths, pair.answers.ended)


def clipped(pair: Pair) -> np.ndarray:
    return np.clip(pair.seq_scores, -0.5, 0.5)


def standardised(pair: Pair) -> np.ndarray:
    """By what the run has seen before; the 1e-8 under the root is the formula's own."""
    return (pair.seq_scores - EARLIER_MEAN) / np.sqrt(EARLIER_VARIANCE + 1e-8)


def shaped(choices: dict[str, Any], answers: int = 2, **others: Any) -> Recipe:
    return recipe("k1", LEAVE_ONE_OUT, answers, choices, **others)


def penalised(name: str, choices: dict[str, Any], penalty: Callable[[Any, Any], Any]) -> Claim:
    return Claim(f"{name}: s − penalty", shaped(choices), 1.0, of_scores(partial(less_penalty, penalty=penalty)))


RUNNING, OF_BATCH = {"reward.normalise": "running"}, {"reward.normalise": "batch"}
OF_SHAPING = (
    penalised("missing EOS", {"reward.missing_eos_penalty": 0.75}, lambda lengths, ended: 0.75 * ~ended),
    penalised(
        "too short",
        {"reward.min_tokens": 3, "reward.too_short_penalty": 0.9},
        lambda lengths, ended: 0.9 * (1 - lengths / 3),
    ),
    penalised(
        "too long",
        {"reward.soft_max_tokens": 1, "reward.too_long_penalty": 1.2},
        lambda lengths, ended: 1.2 * (lengths - 1) / 2,
    ),
    Claim("clipped: clip(s)", shaped({"reward.clip": 0.5}), 1.0, of_scores(clipped)),
    Claim("clipped: the objective", shaped({"reward.clip": 0.5})),
    Claim("normalised by the batch, B = 2", shaped(OF_BATCH)),
    Claim("normalised by the batch, B = 3", shaped(OF_BATCH, 3)),
    Claim("running, after no score: (s − μ) / σ", shaped(RUNNING), truth=of_scores(standardised)),
    Claim("running, after 4 scores: (s − μ) / σ", shaped(RUNNING, earlier_scores=4.0), truth=of_scores(standardised)),
    Claim("running, moments at rest: (s − μ) / σ", shaped(RUNNING, earlier_scores=1e18), 1.0, of_scores(standardised)),
)
