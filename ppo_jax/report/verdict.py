"""The verdict on a run in plain sentences, from its numbers alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ppo_jax.report.runs import ReadRun

# How serious it is, in this order.
FINE, WATCH, ACT = "fine", "watch", "act"
LEVELS = (FINE, WATCH, ACT)
OF_ALARM = {"warn": WATCH, "act": ACT, "stop": ACT}

# Beyond these a sentence is written. They are rules of thumb for a look at a run, not tests.
FAR_NATS_PER_TOKEN = 0.3  # the answers' tokens are e^0.3 = 1.35 times as likely as under the reference, on average
LOST_NATS_PER_TOKEN = 1.0
STILL_NATS_PER_ANSWER = 0.02
RISING = 1.5  # KL of the last iterations over that of those in the middle
SHORTER, LONGER = 0.7, 1.5  # lengths of the last answers over those of the first
ENTROPY_LEFT = 0.5
CUT_OFF, CLIPPED = 0.5, 0.3  # shares
LEARNED_BY_HEART = 0.25  # of the rise of the score that the held-out prompts see


@dataclass(frozen=True)
class Verdict:
    level: str
    headline: str
    worries: list[str]


def verdict(run: ReadRun) -> Verdict:
    """What the score did, how far the KL went, and what to worry about."""
    if not run.rows:
        return Verdict(WATCH, "No iteration has finished yet.", [])
    found = [*_worries(run), *_of_alarms(run)]
    level = max((level for level, _ in found), key=LEVELS.index, default=FINE)
    return Verdict(level, f"{_of_score(run)} {_of_kl(run)}", [sentence for _, sentence in found])


def score_change(run: ReadRun) -> float | None:
    """Change of the score between both ends in standard errors; None where it is not known.

    Each end is a mean over its answers, whose deviation is `score/std`.
    """
    score, deviation = run.ends("score/mean"), run.ends("score/std")
    answers = run.averaged * int(run.config.get("rollout.batch_size") or 0)
    if score is None or deviation is None or answers == 0:
        return None
    error = math.hypot(*deviation) / math.sqrt(answers)
    return (score[1] - score[0]) / error if error else math.copysign(math.inf, score[1] - score[0])


def _of_score(run: ReadRun) -> str:
    score, change = run.ends("score/mean"), score_change(run)
    if score is None:
        return "No score was finite."
    first, last = score
    over = f"over {len(run.rows)} iterations" if len(run.rows) > 1 else "in its one iteration"
    if change is None or abs(change) > 2:
        verb = "rose" if last > first else "fell" if last < first else "stayed"
        return f"The score {verb} from {first:.2f} to {last:.2f} {over}."
    return f"The score did not clearly change {over}: {first:.2f} at the start, {last:.2f} at the end."


def _of_kl(run: ReadRun) -> str:
    kl, token = run.ends("kl/seq_nats"), run.ends("kl/token_nats")
    if kl is None:
        return "No KL was finite."
    largest = max(filter(math.isfinite, run.values("kl/seq_nats").values()))
    per_token = "" if token is None else f", {token[1]:.2f} per token"
    return (
        f"The answers are now {kl[1]:.1f} nats from the SFT model{per_token}; the farthest iteration was at "
        f"{largest:.1f}."
    )


def _worries(run: ReadRun) -> Iterator[tuple[str, str]]:
    broken = {step for row in run.rows for step in [row["step"]] if _is_broken(row)}
    if broken:
        yield ACT, f"Numbers of {_iterations(broken)} are not finite: look at the scores and the learning rate there."
    yield from _far(run)
    yield from _of_length(run)
    entropy = run.ends("policy/entropy_nats")
    if entropy and entropy[0] > 0 and entropy[1] < ENTROPY_LEFT * entropy[0]:
        yield (
            WATCH,
            f"Entropy fell from {entropy[0]:.2f} to {entropy[1]:.2f} nats per token: look for template sentences.",
        )
    clipped = run.ends("policy/clip_frac")
    if clipped and clipped[1] > CLIPPED:
        yield (
            WATCH,
            f"{clipped[1]:.0%} of the tokens are clipped: the steps are too large, lower the learning rate or the "
            f"number of epochs.",
        )
    score, held_out = run.ends("score/mean"), run.ends("evaluation/score_mean")
    if score and held_out and (score_change(run) or 0) > 2:
        rise, seen = score[1] - score[0], held_out[1] - held_out[0]
        if len(run.values("evaluation/score_mean")) > 1 and seen < LEARNED_BY_HEART * rise:
            yield (
                WATCH,
                f"The score rose by {rise:.2f} in training and by {seen:.2f} on held-out prompts: it may be learned by "
                f"heart.",
            )


def _is_broken(row: dict) -> bool:
    not_finite = any(isinstance(value, float) and not math.isfinite(value) for value in row.values())
    return not_finite or row.get("update/skipped_steps", 0) > 0


def _far(run: ReadRun) -> Iterator[tuple[str, str]]:
    kl, token = run.ends("kl/seq_nats"), run.ends("kl/token_nats")
    if kl is None:
        return
    finite = [value for value in run.values("kl/seq_nats").values() if math.isfinite(value)]
    budget = run.config.get("run.max_seq_kl_nats")
    if budget is not None and finite[-1] > budget:  # a run ends at the first iteration above it
        yield ACT, f"The KL is above its budget of {budget:g} nats (run.max_seq_kl_nats)."
    if token is not None and token[1] > FAR_NATS_PER_TOKEN:
        yield (
            ACT if token[1] > LOST_NATS_PER_TOKEN else WATCH,
            f"{token[1]:.2f} nats per token is far from the SFT model: read the samples, and raise kl.coef or lower "
            f"the learning rate if they are odd.",
        )
    count = run.averaged
    if len(finite) >= 4 * count:
        middle = sum(finite[len(finite) // 2 - count : len(finite) // 2]) / count
        if kl[1] > 1 and kl[1] > RISING * middle:
            yield WATCH, f"The KL still rises: {middle:.1f} nats half-way, {kl[1]:.1f} at the end."
    change = score_change(run)
    if len(run.rows) >= 10 and kl[1] < STILL_NATS_PER_ANSWER and change is not None and abs(change) <= 2:
        yield WATCH, "The model hardly moves: the learning rate is too low, or kl.coef too high."


def _of_length(run: ReadRun) -> Iterator[tuple[str, str]]:
    length, cut_off = run.ends("response/len_mean_tokens"), run.ends("response/truncated_frac")
    if length and length[1] < SHORTER * length[0]:
        yield (
            WATCH,
            f"Answers got shorter, from {length[0]:.0f} to {length[1]:.0f} tokens: does the reward prefer that?",
        )
    if length and length[1] > LONGER * length[0]:
        yield (
            WATCH,
            f"Answers got longer, from {length[0]:.0f} to {length[1]:.0f} tokens: does the reward prefer that?",
        )
    if cut_off and cut_off[1] > CUT_OFF:
        yield WATCH, f"{cut_off[1]:.0%} of the answers are cut off: raise rollout.max_new_tokens."


def _of_alarms(run: ReadRun) -> Iterator[tuple[str, str]]:
    scenes = dict.fromkeys(str(alarm.get("scene", "alarm")) for alarm in run.alarms)
    for scene in scenes:
        of_scene = [alarm for alarm in run.alarms if str(alarm.get("scene", "alarm")) == scene]
        level = max((OF_ALARM[alarm["level"]] for alarm in of_scene), key=LEVELS.index)
        yield level, f"Alarm, {scene}: {_iterations({alarm['step'] for alarm in of_scene})}."


def _iterations(steps: set[int]) -> str:
    """`iteration 3`, `iterations 3, 4 and 5`, `20 iterations from 3 to 30`."""
    ordered = sorted(steps)
    if len(ordered) == 1:
        return f"iteration {ordered[0]}"
    if len(ordered) > 5:
        return f"{len(ordered)} iterations from {ordered[0]} to {ordered[-1]}"
    return f"iterations {', '.join(map(str, ordered[:-1]))} and {ordered[-1]}"
