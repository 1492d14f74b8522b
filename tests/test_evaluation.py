"""Whole runs with columns, several scores and held-out prompts."""

import json
import threading

import numpy as np
import pytest

import ppo_jax
from ppo_jax import build, checkpoint, train
from ppo_jax.config_file import load
from ppo_jax.errors import UserError
from ppo_jax.monitor.sinks import read_rows
from tests.tiny import PROMPTS

SMALL = {
    "rollout.batch_size": 8,
    "rollout.answers_per_prompt": 2,
    "rollout.max_new_tokens": 8,
    "update.minibatch_size": 8,
    "update.epochs": 1,
    "update.learning_rate": 1e-2,
    "run.iterations": 4,
    "monitor.sample_every": 4,
    "monitor.tensorboard": False,
    "monitor.evaluate_every": 2,
    "prompts.evaluation_fraction": 0.5,
}
TEXTS = [f"{prompt} {number}" for number in range(3) for prompt in PROMPTS]  # 9 are held out, more than one batch


class Judge:
    """Two named scores, and what it was called with. The label of a prompt is its place in the file."""

    def __init__(self):
        self.calls = []

    async def __call__(self, prompts, answers, columns):
        assert [TEXTS[label] for label in columns["label"]] == prompts
        vowels = [sum(letter in "aeiou" for letter in answer) / max(len(answer), 1) for answer in answers]
        self.calls.append((prompts, answers, vowels))
        return {"vowels": vowels, "length": [float(len(answer)) for answer in answers]}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": text, "label": i}) + "\n" for i, text in enumerate(TEXTS)))
    return file


def run(tiny_model, file, directory, reward, **changes):
    settings = SMALL | {"model.path": str(tiny_model), "prompts.path": str(file), "run.dir": str(directory)}
    settings |= {"reward.weights": {"length": 0.01}}
    return ppo_jax.fine_tune(settings | changes, reward=reward)


@pytest.fixture(scope="module")
def judged(tiny_model, file, tmp_path_factory):
    judge = Judge()
    return run(tiny_model, file, tmp_path_factory.mktemp("judged") / "run", judge), judge


def evaluations(result):
    return [{name: v for name, v in row.items() if name.startswith("evaluation/")} for row in result.metrics]


def test_held_out_prompts_are_answered_every_k_iterations_and_compared_with_the_sft_model(judged):
    result, judge = judged
    held_out = [call for call in judge.calls if len(call[0]) == 9]
    assert len({tuple(prompts) for prompts, *_ in held_out}) == 1
    of_sft, *of_policy = [np.add(vowels, 0.01 * np.array([len(a) for a in answers])) for _, answers, vowels in held_out]
    rows = evaluations(result)
    assert [bool(row) for row in rows] == [False, True, False, True]
    for row, scores in zip(rows[1::2], of_policy, strict=True):
        assert row["evaluation/score_mean"] == pytest.approx(scores.mean(), rel=1e-5)
        better, equal = (np.float32(scores) > np.float32(of_sft)), np.float32(scores) == np.float32(of_sft)
        assert row["evaluation/win_rate"] == pytest.approx(better.mean() + equal.mean() / 2)
        assert 1 <= row["evaluation/len_mean_tokens"] <= 8
        assert row["evaluation/kl_seq_nats"] > 1e-3
    assert rows[3]["evaluation/win_rate"] != 0.5


def test_held_out_prompts_are_never_trained_on(judged):
    judge = judged[1]
    held_out = {prompt for prompts, *_ in judge.calls if len(prompts) == 9 for prompt in prompts}
    trained_on = {prompt for prompts, *_ in judge.calls if len(prompts) == 8 for prompt in prompts}
    assert len(held_out) == 9
    assert not held_out & trained_on


def test_named_scores_are_logged_before_their_weights(judged):
    for row in judged[0].metrics:
        total = row["score/vowels_mean"] + 0.01 * row["score/length_mean"]
        assert row["score/mean"] == pytest.approx(total, rel=1e-4)


def test_a_policy_that_does_not_move_ties_with_the_sft_model(tiny_model, file, tmp_path):
    still = run(tiny_model, file, tmp_path / "run", Judge(), **{"update.learning_rate": 1e-30, "run.iterations": 2})
    (row,) = filter(None, evaluations(still))
    assert row["evaluation/win_rate"] == 0.5
    assert row["evaluation/kl_seq_nats"] < 1e-5


def test_a_resumed_run_evaluates_against_the_same_sft_answers(judged, tiny_model, file, tmp_path):
    run(tiny_model, file, tmp_path / "run", Judge(), **{"run.iterations": 2, "checkpoint.save_every": 2})
    resumed = ppo_jax.fine_tune({"run.iterations": 4}, reward=Judge(), resume=tmp_path / "run")
    assert evaluations(resumed) == evaluations(judged[0])[2:]


def test_an_evaluation_that_fails_costs_neither_its_iteration_nor_its_row(judged, tiny_model, file, tmp_path):
    calls = []

    async def fails_on_the_second_evaluation(prompts, answers, columns):
        calls.append(len(prompts))
        if calls.count(9) == 3:  # of the SFT model, after two iterations, after four
            raise TimeoutError("the service is gone")
        return await Judge()(prompts, answers, columns)

    with pytest.raises(UserError, match="the service is gone"):
        run(tiny_model, file, tmp_path / "run", fails_on_the_second_evaluation)
    whole = judged[0].metrics
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    missing = {name for name in whole[3] if name.startswith("evaluation/")}
    assert missing
    assert rows[3].keys() == whole[3].keys() - missing
    assert list(checkpoint.saved_steps(tmp_path / "run" / "checkpoints")) == [4]


def test_answers_are_scored_while_the_device_computes_the_kl(tiny_model, file, tmp_path, monkeypatch):
    being_scored, device_is_done = threading.Event(), threading.Event()
    computed = train.scoring.score

    def score(*arguments, **keywords):
        assert being_scored.wait(60)
        result = computed(*arguments, **keywords)
        device_is_done.set()
        return result

    def reward(prompts, answers):
        being_scored.set()
        assert device_is_done.wait(60)  # comes only if the device did not wait for the scores
        return [float(len(answer)) for answer in answers]

    monkeypatch.setattr(train.scoring, "score", score)
    off = {"monitor.evaluate_every": 0, "monitor.sample_every": 0, "run.iterations": 1, "reward.weights": {}}
    result = run(tiny_model, file, tmp_path / "run", reward, **off)
    times = result.metrics[0]
    assert times["time/reward_s"] > 0
    assert times["time/reward_wait_s"] >= 0


def test_a_fixed_prompt_that_is_no_row_has_none_in_its_columns(tiny_model, file, tmp_path):
    keys = {"monitor.fixed_prompts": (TEXTS[3], "another"), "run.dir": str(tmp_path / "run")}
    config = load(overrides=SMALL | {"model.path": str(tiny_model), "prompts.path": str(file)} | keys)
    made, _ = build.build(config)
    assert made.fixed_prompts.texts == [TEXTS[3], "another"]
    expected = [3, None] if TEXTS[3] in made.prompts.texts else [None, None]
    assert made.fixed_prompts.columns == {"label": expected}
    assert made.held_out is not None
    assert len(made.held_out.texts) == 9


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"monitor.evaluate_every": 1}, "needs held-out prompts"),
        ({"prompts.evaluation_fraction": 0.1, "prompts.evaluation_path": "p.jsonl"}, "exclude each other"),
        ({"prompts.form": "messages"}, "needs prompts.chat_template"),
        ({"reward.url": "ftp://somewhere"}, "reward.url"),
        ({"reward.functions": {"a b": "m:f"}}, "reward.functions"),
        ({"reward.functions": {"a": "m"}}, "reward.functions"),
        ({"reward.weights": {"a": float("nan")}}, "reward.weights"),
    ],
)
def test_keys_that_do_not_fit_are_refused(overrides, reason):
    with pytest.raises(UserError, match=reason):
        load(overrides=overrides)
