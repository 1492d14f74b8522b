"""A loss, gradient or update that is not finite: skipped, kept to be looked at, and the end of a run after three."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ppo_jax import algorithm, build, checkpoint, durable, train
from ppo_jax.config_file import load
from ppo_jax.errors import UserError
from ppo_jax.monitor import not_finite
from ppo_jax.resumed import load_resumed
from tests.test_train import SMALL, bits, rows_without_times, run, vowel_share
from tests.tiny import PROMPTS

# Two optimizer steps in an iteration.
SETTINGS = SMALL | {"update.epochs": 1, "monitor.sample_every": 0, "checkpoint.save_every": 1}


def poisoned_run(tiny_model, directory, poison, *, resume=False, until=None):
    """A run whose advantages in iteration i are NaN in the rows `poison[i]`; the reward of iteration `until` fails."""
    settings = SETTINGS | {"model.path": str(tiny_model), "run.dir": str(directory)}
    config = load_resumed(directory, {}) if resume else load(overrides=settings)
    seen = []

    def reward(prompts, answers):
        if len(seen) + start == until:
            raise TimeoutError("the service is gone")
        seen.append((prompts, answers))
        return vowel_share(prompts, answers)

    made, state = build.build(config, reward=reward, prompts=PROMPTS, resume=resume)
    start = int(state.step)
    step = iter(range(start, 100))

    def advantages(token_rewards, scored, answers):
        estimated, returns = made.algorithm.advantages(token_rewards, scored, answers)
        return estimated.at[np.array(poison.get(next(step), []), int)].set(jnp.nan), returns

    return train.train(replace(made, algorithm=replace(made.algorithm, advantages=advantages)), state), seen


@pytest.fixture(scope="module")
def one_bad_answer(tiny_model, tmp_path_factory):
    return poisoned_run(tiny_model, tmp_path_factory.mktemp("poisoned") / "run", {1: [3]})


def test_a_minibatch_with_a_bad_answer_is_skipped_and_the_run_goes_on(one_bad_answer):
    result, _ = one_bad_answer
    assert [row["update/skipped_steps"] for row in result.metrics] == [0, 1, 0, 0]
    assert [row["update/optimizer_steps"] for row in result.metrics] == [2, 2, 2, 2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state))
    assert int(result.state.skipped_in_a_row) == 0


def test_the_batch_of_a_skipped_step_is_kept_with_its_texts_and_the_cause(one_bad_answer):
    result, seen = one_bad_answer
    assert [path.name for path in (result.directory / "not_finite").iterdir()] == ["step_000001"]
    kept = result.directory / "not_finite" / "step_000001"
    described, arrays = json.loads((kept / "batch.json").read_text()), load_file(kept / "batch.safetensors")
    [skipped] = described["skipped"]
    assert skipped["not_finite"] == "loss"
    assert 3 in skipped["answers"]
    assert len(skipped["answers"]) == 8
    prompts, answers = seen[1]
    assert [row["prompt"] for row in described["answers"]] == prompts
    assert [row["answer"] for row in described["answers"]] == answers
    assert [row["score"] for row in described["answers"]] == pytest.approx(vowel_share(prompts, answers))
    assert np.flatnonzero(np.isnan(arrays["advantages"]).any(axis=1)).tolist() == [3]
    assert arrays["response_tokens"].shape == arrays["old_logprobs"].shape == arrays["response_mask"].shape


def test_a_run_with_a_skipped_step_resumes_to_the_same_bits(one_bad_answer, tiny_model, tmp_path):
    with pytest.raises(UserError, match="the service is gone"):
        poisoned_run(tiny_model, tmp_path / "run", {1: [3]}, until=2)
    resumed, _ = poisoned_run(tiny_model, tmp_path / "run", {1: [3]}, resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, one_bad_answer[0].state)


def test_an_answer_that_is_dropped_is_in_no_number_and_in_no_step(tiny_model, tmp_path):
    """Whatever stands for its missing score, the run is the same to the bit."""

    def scored(missing):
        def reward(prompts, answers):
            rated = [float(len(answer)) for answer in answers]
            return [missing if i in (2, 11) else score for i, score in enumerate(rated)]

        return reward

    changes = {"reward__max_dropped_frac": 0.125, "monitor__sample_every": 0}
    nan, none = (
        run(tiny_model, tmp_path / name, reward=scored(missing), **changes)
        for name, missing in (("nan", float("nan")), ("none", None))
    )
    assert rows_without_times(nan) == rows_without_times(none)
    assert bits(nan.state) == bits(none.state)
    assert {row["reward/dropped_frac"] for row in nan.metrics} == {2 / 16}
    assert all(row["score/q05"] > 0 for row in nan.metrics)  # a dropped score of 0 would be the smallest
    assert nan.metrics[0]["update/skipped_steps"] == 0
    with pytest.raises(UserError, match=r"expected a finite float of at most .* such answers may be left out"):
        run(tiny_model, tmp_path / "less", reward=scored(None), reward__max_dropped_frac=0.1, monitor__sample_every=0)


def test_a_minibatch_whose_answers_were_all_dropped_changes_no_number_to_nan(tiny_model, tmp_path):
    def reward(prompts, answers):
        return [None, *(float(len(answer)) for answer in answers[1:])]

    changes = {"rollout__batch_size": 4, "update__minibatch_size": 1, "run__iterations": 2, "monitor__sample_every": 0}
    rows = run(tiny_model, tmp_path / "run", reward=reward, reward__max_dropped_frac=0.25, **changes).metrics
    assert [row["reward/dropped_frac"] for row in rows] == [0.25, 0.25]
    assert all(np.isfinite(value) for row in rows for value in row.values())


def test_three_skipped_steps_in_a_row_end_the_run_also_over_iterations_and_a_resume(tiny_model, tmp_path):
    everyone, directory = range(16), tmp_path / "run"
    with pytest.raises(UserError, match="the service is gone"):
        poisoned_run(tiny_model, directory, {1: everyone}, until=2)
    like = state_like(tiny_model, tmp_path)
    before = checkpoint.restore_newest(directory / "checkpoints", like)
    assert int(before.skipped_in_a_row) == 2
    with pytest.raises(UserError, match=r"4 optimizer steps in a row .* by iteration 2: the loss was not finite"):
        poisoned_run(tiny_model, directory, {2: everyone}, resume=True)
    after = checkpoint.restore_newest(directory / "checkpoints", like)
    assert int(after.step) == 3
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert sorted(path.name for path in (directory / "not_finite").iterdir()) == ["step_000001", "step_000002"]


def state_like(tiny_model, tmp_path):
    settings = SETTINGS | {"model.path": str(tiny_model), "run.dir": str(tmp_path / "like")}
    return build.build(load(overrides=settings), reward=vowel_share, prompts=PROMPTS)[1]


def test_an_update_that_overflows_ends_the_run_with_the_policy_as_it_was(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"4 optimizer steps in a row .*the update was not finite.*step_00000001"):
        run(tiny_model, tmp_path / "run", update__learning_rate=1e38, monitor__sample_every=0)
    assert sorted(path.name for path in (tmp_path / "run" / "not_finite").iterdir()) == ["step_000000"]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"loss/policy": np.nan, "update/grad_norm": np.nan}, "loss"),
        ({"loss/value": np.inf}, "loss"),
        ({"update/grad_norm": np.inf}, "gradient"),
        ({"critic/grad_norm": np.nan}, "gradient"),
        ({"policy/ratio_max": np.inf}, "update"),
    ],
)
def test_the_cause_is_the_first_that_is_not_finite(bad, expected):
    stats = dict.fromkeys(("loss/policy", "loss/value", "update/grad_norm", "critic/grad_norm"), 1.0)
    assert not_finite.cause(stats | bad) == expected


def keep(directory, step):
    arrays = {f"{of}_{what}": jnp.ones((2, 3), int) for of in ("prompt", "response") for what in ("tokens", "mask")}
    not_finite.keep_batch(
        directory,
        step,
        [{"update/skipped_steps": 1.0, "loss/policy": np.nan}],
        [np.array([1, 0])],
        arrays | {"seq_scores": jnp.ones(2), "ref_hidden": None},
        mesh=jax.sharding.Mesh(np.array(jax.devices()), "data"),
        decode=lambda tokens, mask: ["text"] * len(tokens),
    )


def test_only_the_first_batches_are_kept_and_a_repeated_one_takes_no_place(tmp_path, caplog):
    for step in [*range(7), *range(20)]:
        keep(tmp_path, step)
    assert sorted(path.name for path in (tmp_path / "not_finite").iterdir()) == [f"step_{i:06d}" for i in range(8)]
    assert "iteration 19: 1 of 1 optimizer steps were skipped, not finite: loss; 8 batches are kept" in caplog.text


def test_a_batch_that_cannot_be_kept_ends_no_run_and_leaves_no_half_of_it(tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable, "publish", full)
        keep(tmp_path, 5)
    assert "the batch could not be kept: [Errno 28] No space left on device" in caplog.text
    assert not (tmp_path / "not_finite" / "step_000005").exists()
    keep(tmp_path, 6)
    assert [path.name for path in (tmp_path / "not_finite").iterdir()] == ["step_000006"]


def test_a_kl_that_is_no_number_leaves_the_coefficient_a_number():
    steer = algorithm.pick_next_kl_coef(load(overrides={"kl.target_nats": 1.0}))
    assert float(steer(jnp.float32(0.1), jnp.float32(np.nan))) == np.float32(0.1)
    assert float(steer(jnp.float32(0.1), jnp.float32(np.inf))) > 0.1
