"""How each failure shows in the numbers: a detector compares a row of `metrics.jsonl` with the run's first one.

The first row is the SFT model's own, before any update, so no number is compared with one that a failure has made. A
detector looks at one row; that it must be so for several in a row is the business of `alarms`. Absolute bounds are
those of the KL and of the rollout's gap alone; docs/failure-scenes.md says where each number comes from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ppo_jax.config import Config
from ppo_jax.monitor.invariants import LOGPROB_BOUND

Row = dict[str, Any]

# What detectors read of the first row.
BASELINE = frozenset(
    """
    score/mean score/std score/shaped_std score/len_correlation kl/seq_nats logprob/q50 policy/entropy_nats
    response/len_mean_tokens response/truncated_frac response/empty_frac ref_logprob/mean
    text/distinct_2gram_frac text/repeated_3gram_frac text/shared_3gram_frac text/same_start_frac text/zlib_ratio
    rollout/logprob_gap_max rollout/kept_mass
    """.split()  # noqa: SIM905, a list of this length reads better as a paragraph
)
# A mean of this many nats per token is no fine-tuning any more: half of the probability of a token lies elsewhere.
KL_CAP_NATS_PER_TOKEN = 0.75
# A policy that after `SETTLING` iterations is still this near to its reference has not moved.
STILL_NATS_PER_TOKEN = 1e-5
# The same where a penalty that outweighs the score holds it, in nats per answer: as little as its noise moves it.
HELD_NATS_PER_ANSWER = 1.0
# Parameters that change by this share of their norm in an iteration are not standing for want of a learning rate.
STEPPING = 1e-5
SETTLING = 2


@dataclass(frozen=True)
class Finding:
    """What a detector says of one row."""

    message: str  # the scene, and what shows it
    cause: str
    advice: str
    numbers: dict[str, float]


Detector = Callable[[Row, Row, Config], Finding | None]


def compared(row: Row, first: Row, *names: str) -> dict[str, float]:
    """Numbers of a row beside those of the first."""
    return {key: of[name] for name in names for key, of in ((name, row), (f"{name}, first", first))}


def score_rise(row: Row, first: Row) -> float:
    """By how many of its first standard deviations over answers the mean score has risen.

    Where all first scores were equal, as those of a goal that is rarely reached are, any rise is more than any number.
    """
    rise = row["score/mean"] - first["score/mean"]
    if first["score/std"] > 0:
        return rise / first["score/std"]
    return math.inf if rise > 0 else 0.0


def signs_of_decay(row: Row, first: Row) -> dict[str, tuple[str, ...]]:
    """What says that the texts are worse than at first: sign to the metrics that show it."""
    found = {}
    if first["ref_logprob/mean"] - row["ref_logprob/mean"] > 0.5:
        found["the reference finds the answers much less likely"] = ("ref_logprob/mean",)
    if row["text/repeated_3gram_frac"] - first["text/repeated_3gram_frac"] > 0.15:
        found["answers repeat themselves"] = ("text/repeated_3gram_frac",)
    if row["text/shared_3gram_frac"] - first["text/shared_3gram_frac"] > 0.1:
        found["answers share their sentences"] = ("text/shared_3gram_frac",)
    if row["text/zlib_ratio"] < 0.65 * first["text/zlib_ratio"]:
        found["the texts say little"] = ("text/zlib_ratio",)
    if row["text/distinct_2gram_frac"] < 0.5 * first["text/distinct_2gram_frac"]:
        found["few different words are left"] = ("text/distinct_2gram_frac",)
    return found


def score_up_text_decays(row: Row, first: Row, config: Config) -> Finding | None:
    signs = signs_of_decay(row, first)
    if not signs or score_rise(row, first) < 0.5:
        return None
    return Finding(
        f"the score rises and the text decays: {'; '.join(signs)}",
        "the reward is gamed: β is too small for it, or it looks at one thing alone",
        "raise kl.coef, add a second score (reward.functions), and read samples.jsonl before you trust the score",
        compared(row, first, "score/mean", "kl/seq_nats", *(name for names in signs.values() for name in names)),
    )


def answers_shrink(row: Row, first: Row, config: Config) -> Finding | None:
    shorter = row["response/len_mean_tokens"] < 0.75 * first["response/len_mean_tokens"]
    if not shorter and row["response/empty_frac"] - first["response/empty_frac"] < 0.2:
        return None
    return Finding(
        "answers get shorter and shorter",
        f"the reward prefers short answers (its correlation with the length is {row['score/len_correlation']:+.2f}), "
        f"or long ones pay more KL",
        "look for a penalty on length in the reward; reward.min_tokens with reward.too_short_penalty holds against it",
        compared(row, first, "response/len_mean_tokens", "response/empty_frac", "score/len_correlation"),
    )


def answers_at_limit(row: Row, first: Row, config: Config) -> Finding | None:
    was, now = first["response/truncated_frac"], row["response/truncated_frac"]
    if now - was < max(0.2, 0.35 * (1 - was)):
        return None
    return Finding(
        f"answers run to the limit of {config.rollout.max_new_tokens} tokens",
        f"the reward prefers long answers (its correlation with the length is {row['score/len_correlation']:+.2f}), or "
        f"the policy has forgotten how to end",
        "set reward.missing_eos_penalty or reward.soft_max_tokens with reward.too_long_penalty, or raise kl.coef",
        compared(row, first, "response/truncated_frac", "response/len_mean_tokens", "score/len_correlation"),
    )


def template_sentences(row: Row, first: Row, config: Config) -> Finding | None:
    def risen(name: str, by: float) -> bool:
        return row[name] - first[name] > by

    within = risen("text/repeated_3gram_frac", 0.15)
    across = risen("text/shared_3gram_frac", 0.1) or risen("text/same_start_frac", 0.25)
    if not within and not across:
        return None
    where = " and ".join(part for part, there in (("within answers", within), ("across answers", across)) if there)
    return Finding(
        f"template sentences repeat {where}",
        "the reward favours a pattern, and the policy has found it",
        "find the pattern in samples.jsonl, and let the reward not pay for it; raise kl.coef or update.entropy_coef",
        compared(
            row, first, "text/repeated_3gram_frac", "text/shared_3gram_frac", "text/same_start_frac", "score/mean"
        ),
    )


def not_moving(row: Row, first: Row, config: Config) -> Finding | None:
    began = config.critic.warmup_iterations + config.update.warmup_steps // config.optimizer_steps_per_iteration
    # Of the score's first deviation: where a run has succeeded, all scores are high and nearly alike.
    outweighed = row["reward/penalty_std"] > 2 * first["score/shaped_std"] > 0
    held = outweighed and row["kl/seq_nats"] < HELD_NATS_PER_ANSWER
    if row["step"] < began + SETTLING or not (held or row["kl/token_nats"] < STILL_NATS_PER_TOKEN):
        return None
    cause, advice = _why_it_stands(row, held)
    names = "kl/token_nats", "score/mean", "score/std", "score/shaped_std", "reward/penalty_std", "kl/coef"
    return Finding(
        "the model does not move",
        cause,
        advice,
        {name: row[name] for name in (*names, "update/grad_norm", "update/param_rel_change")},
    )


def _why_it_stands(row: Row, held: bool) -> tuple[str, str]:
    if row["score/std"] == 0:
        return (
            f"every answer has the same score ({row['score/mean']:g})",
            "no answer beats another, so nothing can be learned: make the reward graded",
        )
    if row["update/param_rel_change"] == 0:
        return (
            "the parameters are frozen: they have a gradient, and no step changes them",
            "check what the optimizer is given (update.learning_rate, its schedule, adapters)",
        )
    if held or row["update/param_rel_change"] > STEPPING:
        return (
            f"the KL coefficient is too large: steps are made, and the penalty undoes them (over the answers it varies "
            f"by {row['reward/penalty_std']:.3g}, the score by {row['score/shaped_std']:.3g})",
            f"lower kl.coef, which is {row['kl/coef']:g}",
        )
    return (
        f"the learning rate is too small: an iteration changes the parameters by {row['update/param_rel_change']:.1e} "
        f"of their norm",
        "raise update.learning_rate; changes of about 1e-4 to 1e-2 are usual",
    )


def kl_runaway(row: Row, first: Row, config: Config) -> Finding | None:
    if row["kl/token_nats"] < KL_CAP_NATS_PER_TOKEN:
        return None
    return Finding(
        f"the KL runs away: {row['kl/seq_nats']:.3g} nats per answer, {row['kl/token_nats']:.3g} per token",
        "steps are too large or β is too small: the policy is no fine-tuned reference any more",
        "lower update.learning_rate, raise kl.coef or steer it (kl.target_nats), and set run.max_seq_kl_nats",
        {name: row[name] for name in ("kl/seq_nats", "kl/token_nats", "kl/coef", "policy/approx_kl_nats")},
    )


def entropy_collapse(row: Row, first: Row, config: Config) -> Finding | None:
    if row["policy/entropy_nats"] > 0.4 * first["policy/entropy_nats"]:
        return None
    return Finding(
        "the entropy collapses: the policy hardly explores any more",
        "too many steps in one direction: too high a learning rate, too many epochs, too small a β",
        "lower update.learning_rate or update.epochs, raise kl.coef, or set update.entropy_coef",
        compared(row, first, "policy/entropy_nats", "logprob/q50", "kl/seq_nats"),
    )


def degenerate_rewards(row: Row, first: Row, config: Config) -> Finding | None:
    at_one_end = max(row["score/at_min_frac"], row["score/at_max_frac"])
    if at_one_end < 0.9 or config.rollout.batch_size == 1:
        return None
    return Finding(
        f"the reward says nothing: {at_one_end:.0%} of the answers have one and the same score",
        "the reward is constant, saturated, or almost never given",
        "make it graded, or choose prompts that are neither solved nor hopeless",
        {name: row[name] for name in ("score/mean", "score/std", "score/at_min_frac", "score/at_max_frac")},
    )


def rollout_mismatch(row: Row, first: Row, config: Config) -> Finding | None:
    gap, bound = row["rollout/logprob_gap_max"], LOGPROB_BOUND[config.model.compute_dtype]
    if gap <= max(bound, 10 * first["rollout/logprob_gap_max"]):
        return None
    return Finding(
        f"rollout and training disagree on a token by {gap:.3g} nats, expected at most {bound:g}",
        "the answers were sampled by other weights or in a lower precision than those that are trained",
        "check that the rollout has the current weights; in bfloat16 set update.importance_cap or use float32",
        compared(row, first, "rollout/logprob_gap_max", "rollout/kept_mass"),
    )


def reference_moved(row: Row, first: Row, config: Config) -> Finding | None:
    if row["reference/moved"] == 0:
        return None
    return Finding(
        "the reference model moved",
        "something trains it or writes to its memory; every KL since then is wrong",
        "what is not in the policy must not be in the optimizer; the iterations since the checkpoint are lost",
        {"reference/moved": row["reference/moved"]},
    )


def not_finite(row: Row, first: Row, config: Config) -> Finding | None:
    if row["update/skipped_steps"] == 0:
        return None
    return Finding(
        f"{row['update/skipped_steps']:.0f} optimizer steps had a loss, gradient or update that is not finite",
        "extreme scores or ratios, or a learning rate that is too high",
        "look for extreme scores; lower update.learning_rate or clip the scores (reward.clip)",
        {"update/skipped_steps": row["update/skipped_steps"], "policy/ratio_max": row["policy/ratio_max"]},
    )


DETECTORS: dict[str, Detector] = {
    detector.__name__: detector
    for detector in (
        not_finite,
        reference_moved,
        kl_runaway,
        score_up_text_decays,
        answers_shrink,
        answers_at_limit,
        template_sentences,
        entropy_collapse,
        not_moving,
        degenerate_rewards,
        rollout_mismatch,
    )
}
