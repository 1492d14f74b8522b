"""Alarms on made-up histories: each fires on its failure, none on a healthy run, and the same after a resume."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import pytest

from ppo_jax import checkpoint
from ppo_jax.config import AlarmScene, LooseScene
from ppo_jax.config_file import load
from ppo_jax.monitor import alarms
from ppo_jax.monitor.failure_scenes import BASELINE, DETECTORS, SETTLING
from ppo_jax.records import TrainState

START = 5  # the first iteration that looks wrong
CONFIG = load()
ONE_ANSWER = {"critic.kind": "value_head", "advantage.estimator": "gae"}


def healthy(step):
    """A row of a run that goes well: a rising score, a slowly growing KL, a little noise."""
    noise = 1 + 0.1 * math.sin(37 * step)
    done = min(step / 15, 1.0)
    return {
        "step": step,
        "kl/token_nats": 0.16 * done * noise,
        "kl/seq_nats": 4.0 * done * noise,
        "kl/coef": 0.05,
        "score/mean": 0.33 + 0.5 * done * noise,
        "score/std": 0.5 - 0.3 * done,
        "score/shaped_std": 0.5 - 0.3 * done,
        "score/at_min_frac": 1 / 64,
        "score/at_max_frac": 2 / 64,
        "score/len_correlation": 0.1,
        "reward/penalty_std": 0.15 * done,
        "response/len_mean_tokens": 23.0 * noise,
        "response/truncated_frac": 0.03 * noise,
        "response/empty_frac": 0.0,
        "policy/entropy_nats": 2.6 - 0.25 * done,
        "policy/approx_kl_nats": 0.001,
        "policy/ratio_max": 1.4,
        "logprob/q50": -1.6,
        "ref_logprob/mean": -2.6 + 0.1 * done,
        "text/distinct_2gram_frac": 0.65 - 0.15 * done,
        "text/repeated_3gram_frac": 0.01 * noise,
        "text/shared_3gram_frac": 0.01 + 0.02 * done,
        "text/same_start_frac": 0.01 + 0.05 * done,
        "text/zlib_ratio": 0.42 - 0.05 * done,
        "rollout/logprob_gap_max": 3e-6 * noise,
        "rollout/kept_mass": 1.0,
        "update/grad_norm": 0.1,
        "update/param_rel_change": 2.7e-3,
        "update/skipped_steps": 0.0,
        "reference/moved": 0.0,
    }


STILL = {"kl/token_nats": 0.0, "kl/seq_nats": 0.0, "score/mean": 0.33, "score/std": 0.5}
STANDING = STILL | {"update/param_rel_change": 1e-11}
# Scene, what its rows have of their own, and a word of the cause; of the causes of `not_moving` each.
FAILURES = {
    "score_up_text_decays": ({"ref_logprob/mean": -3.4, "score/mean": 0.8}, "gamed"),
    "score_up_text_decays: repetitive texts": ({"text/zlib_ratio": 0.2, "score/mean": 0.8}, "gamed"),
    "score_up_text_decays: few words": ({"text/distinct_2gram_frac": 0.3, "score/mean": 0.8}, "gamed"),
    "answers_shrink": ({"response/len_mean_tokens": 9.0}, "prefers short"),
    "answers_shrink: empty ones": ({"response/empty_frac": 0.4}, "prefers short"),
    "answers_at_limit": ({"response/truncated_frac": 0.7}, "prefers long"),
    "template_sentences: within": ({"text/repeated_3gram_frac": 0.4, "score/mean": 0.33}, "pattern"),
    "template_sentences: across": ({"text/shared_3gram_frac": 0.3, "score/mean": 0.33}, "pattern"),
    "template_sentences: starts": ({"text/same_start_frac": 0.5}, "pattern"),
    "not_moving: constant": (STILL | {"score/std": 0.0, "update/param_rel_change": 0.0}, "same score"),
    "not_moving: frozen": (STILL | {"update/param_rel_change": 0.0}, "frozen"),
    "not_moving: beta": ({"reward/penalty_std": 30.0, "score/mean": 0.4, "kl/seq_nats": 0.5}, "KL coefficient"),
    "not_moving: beta, all of it in the loss": (STILL, "KL coefficient"),
    "not_moving: rate": (STANDING, "learning rate"),
    "kl_runaway": ({"kl/token_nats": 1.5, "kl/seq_nats": 36.0}, "too large"),
    "entropy_collapse": ({"policy/entropy_nats": 0.5}, "one direction"),
    "degenerate_rewards": ({"score/at_max_frac": 0.97}, "constant, saturated"),
    "rollout_mismatch": ({"rollout/logprob_gap_max": 0.3}, "other weights"),
    "reference_moved": ({"reference/moved": 1.0}, "trains it"),
    "not_finite": ({"update/skipped_steps": 2.0}, "extreme"),
}


def history(changes, *, length=30, wrong=range(START, 30)):
    return [healthy(step) | (changes if step in wrong else {}) for step in range(length)]


def heard(rows, config=CONFIG, saved=None):
    """All alarms of a run, row by row as it goes on."""
    found = []
    for end in range(1, len(rows) + 1):
        found += alarms.raised(rows[:end], since(found), config, saved or {})
    return found


def since(found):
    """Of each scene the first wrong iteration of its latest alarm."""
    return {alarm.scene: alarm.since for alarm in found}


def scene_of(failure):
    return failure.partition(":")[0]


def test_a_healthy_run_raises_nothing():
    assert heard(history({}, length=60)) == []


def test_every_detector_has_a_failure_here_and_every_scene_of_the_configuration_a_detector():
    assert {scene_of(failure) for failure in FAILURES} == set(DETECTORS)
    assert set(get_args(AlarmScene)) | set(alarms.AT_ONCE) == set(DETECTORS)
    assert set(get_args(LooseScene)) < set(get_args(AlarmScene))


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_raises_its_own_alarm_after_the_patience_and_names_the_cause(failure):
    changes, cause = FAILURES[failure]
    scene, rows = scene_of(failure), history(changes)
    patience = 1 if scene in alarms.AT_ONCE else CONFIG.alarms.patience
    found = heard(rows)
    assert {alarm.scene for alarm in found} - {"degenerate_rewards"} <= {scene}
    own = [alarm for alarm in found if alarm.scene == scene]
    assert [alarm.step for alarm in own[:3]] == [START + patience * n - 1 for n in (1, 2, 4)]
    first = own[0]
    assert cause in first.cause
    assert first.advice
    assert patience == 1 or f"since iteration {START}" in first.message
    # It shows the numbers that made it.
    assert any(name in first.numbers and first.numbers[name] == value for name, value in changes.items())
    assert all(part in first.text() for part in (first.message, first.cause, first.advice))


@pytest.mark.parametrize("failure", FAILURES)
def test_what_does_not_last_for_the_patience_raises_nothing(failure):
    if scene_of(failure) in alarms.AT_ONCE:
        pytest.skip("waits for nothing")
    blinking = [step for step in range(START, 30) if step % 3]  # two of three rows, for ever
    assert heard(history(FAILURES[failure][0], wrong=blinking)) == []


def test_answers_that_were_cut_off_from_the_start_are_not_said_to_run_to_the_limit():
    """Of 16 answers 15 at first and 16 afterwards: all of those that ended, and yet only noise."""
    rows = [row | {"response/truncated_frac": 1.0 if row["step"] else 15 / 16} for row in history({})]
    assert heard(rows) == []


def test_patience_is_that_of_the_configuration():
    config = load(overrides={"alarms.patience": 7})
    found = heard(history(FAILURES["answers_shrink"][0]), config)
    assert [alarm.step for alarm in found] == [START + 6, START + 13]


def test_only_a_reference_that_moved_ends_a_run_that_allows_nothing():
    """Skipped steps are an alarm at once; that several in a row end the run is not the alarm's business."""
    for scene, level in (("reference_moved", "stop"), ("not_finite", "warn")):
        assert {x.level for x in heard(history(FAILURES[scene][0]))} == {level}


def test_a_run_away_is_not_said_to_stand_still_and_neither_is_a_run_that_has_succeeded():
    away = {"kl/token_nats": 2.0, "kl/seq_nats": 50.0, "score/mean": 0.1, "reward/penalty_std": 2.0}
    assert {x.scene for x in heard(history(away))} == {"kl_runaway"}
    first = {"score/mean": 0.95, "score/std": 0.05, "score/shaped_std": 0.05}  # nothing more to win
    assert heard([row | first | {"score/at_max_frac": 0.1} for row in history({})]) == []


def test_a_goal_that_was_never_reached_at_first_can_be_gamed_too():
    rows = history({"ref_logprob/mean": -3.4, "score/mean": 0.9, "score/std": 0.3})
    rows[0] |= {"score/mean": 0.0, "score/std": 0.0, "score/shaped_std": 0.0}
    assert {x.scene for x in heard(rows)} == {"score_up_text_decays"}


def test_a_batch_of_one_answer_has_its_score_at_both_ends_and_that_says_nothing():
    rows = history({"score/at_max_frac": 1.0, "score/at_min_frac": 1.0})
    assert heard(rows, load(overrides={"rollout.batch_size": 1, "update.minibatch_size": 1, **ONE_ANSWER})) == []


def test_detectors_read_no_more_of_the_first_row_than_what_makes_a_baseline():
    names = set()

    class Recorded(dict):
        def __getitem__(self, name):
            names.add(name)
            return super().__getitem__(name)

    first = Recorded(healthy(0))
    for changes, _ in FAILURES.values():
        for detector in DETECTORS.values():
            detector(healthy(9) | changes, first, CONFIG)
    assert names == BASELINE


def test_without_the_first_models_own_row_there_are_no_alarms():
    rows = history(FAILURES["answers_shrink"][0])
    assert heard(rows[2:]) == []
    assert heard([{k: v for k, v in row.items() if k != "ref_logprob/mean"} for row in rows]) == []


@pytest.mark.parametrize("failure", FAILURES)
def test_a_resumed_run_raises_what_the_unbroken_one_raises(failure):
    rows = history(FAILURES[failure][0], length=20)
    read = [json.loads(line) for line in "\n".join(json.dumps(row) for row in rows).splitlines()]
    whole = heard(rows)
    for stop in (START, START + 1, START + 2, START + 4):
        found = heard(rows[:stop])
        for end in range(stop + 1, 21):
            found += alarms.raised(read[:stop] + rows[stop:end], since(found), CONFIG, {})
        assert found == whole


def test_a_policy_that_waits_for_its_critic_or_its_warm_up_is_not_said_to_stand_still():
    rows = history(FAILURES["not_moving: rate"][0], length=12, wrong=range(12))
    critic = {"critic.kind": "value_head", "advantage.estimator": "gae", "critic.warmup_iterations": 6}
    for waiting in (critic, {"update.warmup_steps": 6 * 4}):
        found = heard(rows, load(overrides=waiting))
        assert [alarm.step for alarm in found] == [6 + SETTLING + 2]
    assert [alarm.step for alarm in heard(rows)] == [SETTLING + 2, SETTLING + 5]


def test_levels_are_those_that_the_configuration_allows_and_acting_comes_before_stopping():
    rows = history(FAILURES["answers_shrink"][0], length=START + 6)

    def levels(**allowed):
        return [x.level for x in heard(rows, load(overrides={f"alarms.{k}": v for k, v in allowed.items()}))]

    scene = ["answers_shrink"]
    assert levels() == ["warn", "warn"]
    assert levels(act=scene) == ["act", "act"]
    assert levels(stop=scene) == ["stop", "stop"]
    assert levels(act=scene, stop=scene) == ["act", "stop"]
    assert levels(stop=["kl_runaway"]) == ["warn", "warn"]
    # Where it blinks, the second streak is the second alarm.
    blinking = history(FAILURES["answers_shrink"][0], length=13, wrong=(5, 6, 7, 10, 11, 12))
    both = load(overrides={"alarms.act": scene, "alarms.stop": scene})
    assert [(x.step, x.level) for x in heard(blinking, both)] == [(7, "act"), (12, "stop")]
    assert alarms.reason_to_stop(heard(rows)) is None
    stopped = heard(rows, load(overrides={"alarms.stop": scene}))
    assert "answers_shrink: answers get shorter and shorter, since iteration 5" in str(alarms.reason_to_stop(stopped))


@pytest.mark.parametrize(("before", "after"), [(0.05, 0.1), (0.0, 0.025), (0.01, 0.025)])
def test_acting_doubles_beta_in_the_state_and_gives_it_one_where_there_is_none(before, after):
    state = TrainState(jnp.int32(7), {}, (), jnp.float32(before), (), jnp.int32(0))
    rows = history(FAILURES["kl_runaway"][0], length=START + 3)
    (acting,) = heard(rows, load(overrides={"alarms.act": ["kl_runaway"]}))
    acted = alarms.act([acting], state, score_std=0.5)
    assert acted.kl_coef.dtype == jnp.float32
    assert float(acted.kl_coef) == pytest.approx(after)
    assert alarms.act(heard(rows), state, score_std=0.5) is state


def test_an_alarm_names_the_newest_checkpoint_from_before_it_began_and_that_one_is_kept():
    rows = history(FAILURES["answers_shrink"][0], length=START + 3)
    saved = {step: Path(f"step_{step}") for step in (2, 4, 5, 6, 7)}
    (found,) = heard(rows, saved=saved)
    assert found.checkpoint == "step_4"  # that of step 5 has given the first short answers
    (without,) = heard(rows, saved={5: Path("step_5")})
    assert without.checkpoint is None
    assert "no checkpoint from before" in without.text()
    suspected = [alarms.suspected_since(rows[:end], {}, CONFIG) for end in range(1, len(rows) + 1)]
    assert suspected == [set()] * START + [{START}] * 3
    over = [*rows, healthy(START + 3)]  # and then it is over: what was named is there to return to
    assert alarms.suspected_since(over, {}, CONFIG) == set()
    assert alarms.suspected_since(over, since([found]), CONFIG) == {START}
    assert checkpoint.expired([2, 4, 5, 6, 7], keep=2, rewards={}, suspected_since={START}) == [2, 5]
    assert checkpoint.expired([2, 4, 5, 6, 7], keep=2, rewards={}, suspected_since={0, 3, START}) == [5]
    assert checkpoint.expired([2, 4, 5, 6, 7], keep=2, rewards={}) == [2, 4, 5]


def test_a_row_of_the_alarm_file_has_the_fields_that_its_readers_know():
    (found,) = heard(history(FAILURES["kl_runaway"][0], length=START + 3), saved={3: Path("step_3")})
    row = json.loads(json.dumps(asdict(found)))
    assert list(row) == ["step", "since", "scene", "level", "numbers", "message", "cause", "advice", "checkpoint"]
    assert all(isinstance(value, float) for value in row["numbers"].values())
    assert (row["step"], row["scene"], row["level"], row["checkpoint"]) == (START + 2, "kl_runaway", "warn", "step_3")
