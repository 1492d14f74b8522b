"""Whole runs on a tiny model that go wrong on purpose: what they write, what alarms do to them, and what resumes."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import ppo_jax
from ppo_jax import checkpoint
from ppo_jax.monitor import failure_scenes
from tests.test_train import PROMPTS, SMALL, rows_without_times, run, vowel_share

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"


def always_one(prompts, answers):
    return [1.0] * len(answers)


def alarms_of(result):
    return [json.loads(line) for line in (result.directory / "alarms.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped_run(tiny_model, tmp_path_factory):
    """A constant reward, of which the run is told to stop."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    changes = {"alarms__stop": ["not_moving"], "checkpoint__save_every": 1, "run__iterations": 9}
    return run(tiny_model, directory, reward=always_one, **changes)


def test_a_constant_reward_is_named_as_the_cause_stops_the_run_and_leaves_the_last_good_checkpoint(stopped_run):
    assert stopped_run.stop_reason == "alarm not_moving: the model does not move, since iteration 2"
    assert [row["step"] for row in stopped_run.metrics] == [0, 1, 2, 3, 4]
    found = {alarm["scene"]: alarm for alarm in alarms_of(stopped_run)}
    assert found.keys() == {"not_moving", "degenerate_rewards"}
    moving = found["not_moving"]
    assert (moving["step"], moving["level"]) == (4, "stop")
    assert "every answer has the same score (1)" in moving["cause"]
    assert moving["numbers"]["score/std"] == 0.0
    # Older than the newest two that are kept anyway.
    assert moving["checkpoint"] == str(stopped_run.directory / "checkpoints" / "step_00000001")
    assert 1 in checkpoint.saved_steps(stopped_run.directory / "checkpoints")
    assert (stopped_run.policy_directory / "model.safetensors").is_file()


def test_a_run_whose_beta_was_raised_resumes_bit_for_bit_and_raises_the_same_alarms(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(failure_scenes, "KL_CAP_NATS_PER_TOKEN", 1e-9)  # so that it runs away from iteration 1 on
    acting = {"alarms__act": ["kl_runaway"], "alarms__patience": 1}
    whole = run(tiny_model, tmp_path / "whole", **acting)
    run(tiny_model, tmp_path / "parts", run__iterations=2, checkpoint__save_every=1, **acting)
    resumed = run(tiny_model, None, resume=tmp_path / "parts", **{"run.iterations": 4})
    assert rows_without_times(resumed) == rows_without_times(whole)[2:]
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    own = [[alarm for alarm in alarms_of(result) if alarm["scene"] == "kl_runaway"] for result in (whole, resumed)]
    for alarm in own[0] + own[1]:
        alarm["checkpoint"] = None
    assert own[0] == own[1]
    assert [(alarm["step"], alarm["level"]) for alarm in own[0]] == [(1, "act"), (2, "act")]
    # At least a twentieth of the scores' deviation, then twice that.
    coefs, std = [row["kl/coef"] for row in whole.metrics], whole.metrics[1]["score/std"]
    assert coefs[:2] == [np.float32(0.01)] * 2
    assert coefs[2] == pytest.approx(max(0.02, std / 20), rel=1e-6)
    assert coefs[3] == pytest.approx(max(2 * coefs[2], whole.metrics[2]["score/std"] / 20), rel=1e-6)


def documented():
    """(metrics of every run, metrics of some) of the table of docs/metrics.md."""
    always, sometimes = set(), set()
    for line in DOCS.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            (sometimes if cells[3] else always).update(re.findall(r"`([^`]+)`", cells[0]))
    return always, sometimes


def test_the_page_of_metrics_has_those_of_a_plain_run_and_no_other(stopped_run):
    assert documented()[0] == stopped_run.metrics[0].keys() - {"step"}


def test_the_page_of_metrics_has_those_that_only_some_runs_write(tiny_model, tmp_path):
    settings = SMALL | {
        "model.path": str(tiny_model),
        "run.dir": str(tmp_path / "run"),
        "run.iterations": 1,
        "advantage.estimator": "gae",
        "critic.kind": "value_head",
        "prompts.evaluation_fraction": 0.34,
        "monitor.evaluate_every": 1,
        "monitor.sample_every": 0,
    }

    def two_scores(prompts, answers):
        return {"vowels": vowel_share(prompts, answers), "length": [len(answer) / 10 for answer in answers]}

    rows = ppo_jax.fine_tune(settings, reward=two_scores, prompts=PROMPTS).metrics
    named = {re.sub("score/(vowels|length)_mean", "score/NAME_mean", name) for name in rows[0].keys() - {"step"}}
    assert set.union(*documented()) == named
