"""Whole runs on a model of a few thousand parameters, as a user starts them."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppo_jax
from ppo_jax import build, checkpoint, scoring, train, update
from ppo_jax.config_file import load
from ppo_jax.errors import UserError
from ppo_jax.monitor import answers as kept_answers
from ppo_jax.monitor import samples
from ppo_jax.monitor.sinks import read_rows
from ppo_jax.ops.randomness import Purpose
from ppo_jax.ops.streaming import at_shortest_axis
from ppo_jax.plan import compile_stages
from ppo_jax.prompts import Prompts
from ppo_jax.tracing import compilations
from ppo_jax.train import RunResult
from tests.tiny import PROMPTS, make_model

SMALL = {
    "rollout.batch_size": 16,
    "rollout.max_new_tokens": 10,
    "update.minibatch_size": 8,
    "update.epochs": 2,
    "update.learning_rate": 1e-2,
    "run.iterations": 4,
    "monitor.sample_every": 2,
    "monitor.tensorboard": False,
    "kl.coef": 0.01,
}


def vowel_share(prompts, answers):
    """Share of vowels, a reward that a random model can climb at once."""
    return [sum(letter in "aeiou" for letter in answer) / max(len(answer), 1) for answer in answers]


def run(tiny_model, directory, *, reward=vowel_share, resume=None, **changes):
    settings = SMALL | {"model.path": str(tiny_model), "run.dir": str(directory)}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    if resume is not None:
        return ppo_jax.fine_tune(changes, reward=reward, prompts=PROMPTS, resume=resume)
    return ppo_jax.fine_tune(settings, reward=reward, prompts=PROMPTS)


def rows_without_times(result, rows=None):
    timed = ("time/", "throughput/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in (rows or result.metrics)]


def broken_off(tiny_model, directory, *, call, **changes):
    """Begin a run and end it, saved, at a call of its reward."""
    calls = iter(range(1, 1000))

    def fails(prompts, answers):
        if next(calls) == call:
            raise TimeoutError("the service is gone")
        return vowel_share(prompts, answers)

    with pytest.raises(UserError, match="the service is gone"):
        run(tiny_model, directory, reward=fails, **changes)


def bits(state):
    """Type, shape and bytes of every array: 0 is not -0 here, and a NaN is itself."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = ((jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves)
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays}


def assert_ends_alike(result, whole):
    """Parameters, moments, controllers and counters, metrics but for times, samples and the policy, to the bit."""
    assert bits(result.state) == bits(whole.state)
    assert {".kl_coef", ".score_moments.mean", ".skipped_in_a_row", ".step"} < set(bits(whole.state))
    rows = [read_rows(run.directory / "metrics.jsonl") for run in (result, whole)]
    assert rows_without_times(result, rows[0]) == rows_without_times(whole, rows[1])
    for file in ("samples.jsonl", "policy/model.safetensors"):
        assert (result.directory / file).read_bytes() == (whole.directory / file).read_bytes()


class LongRun(NamedTuple):
    result: RunResult
    traced: dict[str, int]  # how often each of our functions was
    compiled_in: Counter[int]  # how many programs, of whatever function, by the number of finished iterations


@pytest.fixture(scope="module")
def long_run(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("long") / "run"
    before, compiled_in = dict(compilations), Counter()

    def compiled(event, _, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            written = directory / "metrics.jsonl"
            compiled_in[len(read_rows(written)) if written.exists() else 0] += 1

    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        result = run(tiny_model, directory, run__iterations=21, rollout__batch_size=32, update__minibatch_size=16)
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)
    return LongRun(result, {name: count - before.get(name, 0) for name, count in compilations.items()}, compiled_in)


def test_the_score_rises_clearly_while_the_kl_stays_bounded(long_run):
    rows = long_run.result.metrics
    scores = [row["score/mean"] for row in rows]
    assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.2
    assert rows[0]["kl/seq_nats"] < 1e-6
    assert 1 < rows[-1]["kl/seq_nats"] < 60
    assert all(row["update/optimizer_steps"] == 4 for row in rows)


def test_a_run_compiles_every_function_a_handful_of_times(long_run):
    counts = long_run.traced
    # The rollout for the batch and for the fixed prompts, as scoring; this once per bucket of the response, 8 and 10.
    assert counts["rollout"] <= 3
    assert counts["score"] <= 4
    assert counts["update"] <= 2


def test_nothing_is_compiled_once_every_bucket_was_met(long_run):
    lengths = {len(text.split()) for text in PROMPTS}
    assert len(lengths) > 1  # of the prompts; the answers are random
    assert long_run.compiled_in[0] > 0  # the listener hears
    # The middle of the run answers the fixed prompts, its end exports the policy.
    late = {iteration: count for iteration, count in long_run.compiled_in.items() if 3 <= iteration < 21}
    assert late == {}


def test_every_promised_metric_is_written_every_iteration(long_run):
    names = """
        score/mean score/std reward/mean kl/seq_nats kl/token_nats kl/k1_seq_nats kl/coef response/len_mean_tokens
        response/truncated_frac logprob/mean logprob/q05 logprob/q25 logprob/q50 logprob/q75 logprob/q95
        policy/entropy_nats policy/approx_kl_nats policy/clip_frac policy/ratio_max rollout/logprob_gap_max
        rollout/kept_mass loss/policy loss/kl update/grad_norm update/param_rel_change update/optimizer_steps
        time/rollout_s time/reward_s time/score_s time/update_s time/iteration_s throughput/response_tokens_per_s
        """.split()  # noqa: SIM905
    rows = [json.loads(line) for line in (long_run.result.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(21))
    for row in rows:
        assert set(names) <= set(row)
        assert all(np.isfinite(row[name]) for name in names)


def test_the_exported_policy_is_the_trained_one_in_transformers(long_run):
    result = long_run.result
    model = AutoModelForCausalLM.from_pretrained(result.policy_directory)
    embedding = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(embedding, np.asarray(result.state.params["embed"]))
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(result.policy_directory)
    inputs = tokenizer("the soup was", return_tensors="pt")
    torch.manual_seed(0)
    outputs = model.generate(**inputs, do_sample=True, max_new_tokens=10, num_return_sequences=32)
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert np.mean(vowel_share(None, texts)) > long_run.result.metrics[0]["score/mean"] + 0.1


def test_fixed_prompts_are_answered_at_the_start_half_way_and_at_the_end(long_run):
    rows = [json.loads(line) for line in (long_run.result.directory / "samples.jsonl").read_text().splitlines()]
    steps = sorted({row["step"] for row in rows})
    assert {0, 10, 21} <= set(steps)
    assert all(sum(row["step"] == step for row in rows) == 4 for step in steps)


def test_the_kl_and_the_length_of_a_fixed_prompt_are_those_of_its_answer_alone(long_run, tiny_model, tmp_path):
    result = long_run.result
    rows = {row["prompt"]: row for row in samples.read(result.directory) if row["step"] == 21}
    config = load(overrides=SMALL | {"model.path": str(tiny_model), "run.dir": str(tmp_path / "run")})
    made, _ = build.build(config, reward=vowel_share, prompts=PROMPTS)
    prompts = made.fixed_prompts.in_order()
    tokens, mask = jnp.asarray(prompts.tokens), jnp.asarray(prompts.mask)
    answers = train.answer(made, result.state, tokens, mask, Purpose.FIXED_PROMPTS, step=0)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (result.policy_directory, tiny_model)]
    for i, text in enumerate(prompts.texts):
        prompt = prompts.tokens[i][prompts.mask[i]].tolist()
        answer = np.asarray(answers.response_tokens[i])[np.asarray(answers.response_mask[i])].tolist()
        with torch.no_grad():
            logits = [
                model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double() for model in models
            ]
        policy, sft = (x.log_softmax(-1) for x in logits)
        assert rows[text]["kl_nats"] == pytest.approx((policy.exp() * (policy - sft)).sum().item(), rel=1e-3)
        assert rows[text]["kl_nats"] > 0.1
        assert rows[text]["tokens"] == len(answer)
    assert all(row["kl_nats"] < 1e-6 for row in samples.read(result.directory) if row["step"] == 0)


def test_some_answers_of_every_few_iterations_and_of_the_last_are_kept(long_run):
    rows = kept_answers.read(long_run.result.directory)
    assert [*dict.fromkeys(row["step"] for row in rows)] == list(range(0, 21, 2))
    metrics = long_run.result.metrics
    for step in (0, 20):
        of_step = {why: row for row in rows if row["step"] == step for why in row["why"]}
        assert of_step.keys() == {"best", "worst", "longest", "most divergent", "random"}
        for row in of_step.values():
            assert row["prompt"] in PROMPTS
            assert row["score"] == pytest.approx(vowel_share(None, [row["answer"]])[0], abs=1e-6)
            assert 1 <= row["tokens"] <= 10
        assert of_step["worst"]["score"] <= metrics[step]["score/mean"] <= of_step["best"]["score"]
        assert of_step["longest"]["tokens"] >= metrics[step]["response/len_mean_tokens"]
        assert of_step["most divergent"]["kl_nats"] >= metrics[step]["kl/seq_nats"] - 1e-6
    assert of_step["most divergent"]["kl_nats"] > 1


def test_two_runs_with_one_seed_write_the_same_numbers_and_another_seed_does_not(tiny_model, tmp_path):
    first, second, other = (
        run(tiny_model, tmp_path / name, run__seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert rows_without_times(first) == rows_without_times(second)
    jax.tree.map(np.testing.assert_array_equal, first.state.params, second.state.params)
    assert rows_without_times(first) != rows_without_times(other)


def test_the_exact_form_penalises_in_the_loss_and_holds_the_policy_near_its_reference(tiny_model, tmp_path):
    exact = {"kl__form": "exact", "advantage__estimator": "leave_one_out_to_go"}
    loose, tight = (run(tiny_model, tmp_path / str(coef), kl__coef=coef, **exact).metrics for coef in (1e-3, 1.0))
    assert loose[0]["kl/seq_nats"] < 1e-6
    assert tight[-1]["kl/seq_nats"] < 0.5 * loose[-1]["kl/seq_nats"]
    # The KL moves within an iteration, so the penalty is not exactly that of its start.
    assert tight[-1]["loss/kl"] == pytest.approx(tight[-1]["kl/seq_nats"] / SMALL["rollout.max_new_tokens"], rel=0.5)
    k1 = run(tiny_model, tmp_path / "k1", run__iterations=2).metrics
    assert all(row["loss/kl"] == 0.0 for row in k1)


def test_a_resumed_run_ends_where_the_unbroken_one_ends_bit_for_bit(tiny_model, tmp_path):
    whole = run(tiny_model, tmp_path / "whole")
    broken_off(tiny_model, tmp_path / "parts", call=5)  # after the fixed prompts, two iterations, and these again
    resumed = run(tiny_model, None, resume=tmp_path / "parts")
    assert [row["step"] for row in resumed.metrics] == [2, 3]
    assert_ends_alike(resumed, whole)
    written = (resumed.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [0, 1, 2, 3]


def test_resuming_refuses_what_would_change_the_meaning(tiny_model, tmp_path):
    run(tiny_model, tmp_path / "run", run__iterations=1, checkpoint__save_every=1)
    with pytest.raises(UserError, match=r"would change what .*run computes:\n  kl\.coef: 0\.01 -> 1\.0\n"):
        run(tiny_model, None, resume=tmp_path / "run", **{"kl.coef": 1.0})
    others = {"reward": vowel_share, "prompts": PROMPTS[:3], "resume": tmp_path / "run"}
    with pytest.raises(UserError, match=r"prompts: .* the coming iterations would be others"):
        ppo_jax.fine_tune(**others)
    assert ppo_jax.fine_tune(**others, allow_change=["prompts"]).metrics == []


def test_a_function_does_not_replace_the_configured_reward_of_a_resumed_run_unasked(tiny_model, tmp_path):
    settings = SMALL | {"model.path": str(tiny_model), "run.dir": str(tmp_path / "run"), "run.iterations": 1}
    ppo_jax.fine_tune(settings | {"checkpoint.save_every": 1}, prompts=PROMPTS)
    resumed = {"prompts": PROMPTS, "resume": tmp_path / "run"}
    with pytest.raises(UserError, match=r"reward of .* came from its configuration, not from Python"):
        ppo_jax.fine_tune(reward=vowel_share, **resumed)
    assert ppo_jax.fine_tune(reward=vowel_share, **resumed, allow_change=["reward"]).metrics == []


def test_a_coefficient_that_is_changed_at_a_resume_is_used_from_there_on(tiny_model, tmp_path):
    """Also when the run is killed before the next checkpoint, and not once more where a later one has its own."""
    directory = tmp_path / "run"
    run(tiny_model, directory, run__iterations=2, checkpoint__save_every=2)
    changed = {"run.iterations": 4, "kl.coef": 1.0}

    def killed(prompts, answers):
        raise KeyboardInterrupt

    resume = {"prompts": PROMPTS, "resume": directory}
    with pytest.raises(KeyboardInterrupt):
        ppo_jax.fine_tune(changed | {"checkpoint.save_every": 0}, reward=killed, allow_change=["kl.coef"], **resume)
    rows = run(tiny_model, None, resume=directory, **{"run.iterations": 3, "checkpoint.save_every": 1}).metrics
    assert [row["kl/coef"] for row in rows] == [1.0]
    steered = {"run.iterations": 4, "kl.target_nats": 1e-3, "kl.horizon": 1.0}
    allow = ["kl.target_nats", "kl.horizon", "run.iterations"]
    state = ppo_jax.fine_tune(steered, reward=vowel_share, allow_change=allow, **resume).state
    assert float(state.kl_coef) > 1.0
    again = run(tiny_model, None, resume=directory, **{"run.iterations": 5}).metrics
    assert [row["kl/coef"] for row in again] == [float(state.kl_coef)]


def test_a_resumed_run_keeps_its_reward_its_reference_and_its_schedule(tiny_model, tmp_path):
    model = make_model(tmp_path / "model")
    directory = tmp_path / "run"
    run(model, directory, run__iterations=2, checkpoint__save_every=1, update__schedule="linear")
    with pytest.raises(UserError, match=r"prompts and reward .* came from Python"):
        ppo_jax.fine_tune(resume=directory)
    with pytest.raises(UserError, match="linear schedule"):
        run(model, None, resume=directory, **{"run.iterations": 4})
    nothing_left = run(model, None, resume=directory)
    assert nothing_left.metrics == []
    make_model(model, seed=5)
    with pytest.raises(UserError, match="reference would change"):
        run(model, None, resume=directory)


@pytest.mark.parametrize(
    ("failing_call", "sample_every", "saved"),
    [(3, 0, 2), (4, 2, 2), (7, 2, 4)],
    ids=["in an iteration", "on the fixed prompts", "on the fixed prompts after the last iteration"],
)
def test_what_is_earned_is_saved_when_a_later_reward_fails(tiny_model, tmp_path, failing_call, sample_every, saved):
    calls = []

    def fails_later(prompts, answers):
        calls.append(len(answers))
        if len(calls) == failing_call:
            raise TimeoutError("the service is gone")
        return vowel_share(prompts, answers)

    with pytest.raises(UserError, match="the service is gone"):
        run(tiny_model, tmp_path / "run", reward=fails_later, monitor__sample_every=sample_every)
    assert list(checkpoint.saved_steps(tmp_path / "run" / "checkpoints")) == [saved]


def test_a_run_that_scores_from_the_states_of_its_rollout_is_the_same_run_to_rounding(tiny_model, tmp_path):
    """And says how far the two forwards of its policy are apart, in every iteration and not only the first."""
    one_step = {"update__epochs": 1, "update__minibatch_size": 16}
    reusing, plain = (
        run(tiny_model, tmp_path / str(reuse), run__iterations=2, rollout__reuse_states=reuse, **one_step).metrics
        for reuse in (True, False)
    )
    for name in ("score/mean", "kl/seq_nats", "policy/entropy_nats", "loss/policy", "update/grad_norm"):
        found, expected = ([row[name] for row in rows] for rows in (reusing, plain))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg=name)
    assert all(0 < row["rollout/logprob_gap_max"] < 1e-3 for row in reusing)
    assert all(row["rollout/logprob_gap_max"] == row["policy/log_ratio_abs_max"] for row in reusing)


def test_the_kl_budget_and_the_time_limit_end_a_run_cleanly(tiny_model, tmp_path):
    budget = run(tiny_model, tmp_path / "kl", run__max_seq_kl_nats=1e-4, run__iterations=10)
    assert "KL budget" in budget.stop_reason
    assert 1 < len(budget.metrics) < 10
    assert (budget.policy_directory / "model.safetensors").is_file()
    late = run(tiny_model, tmp_path / "time", run__max_wall_clock_s=1e-3)
    assert "time limit" in late.stop_reason
    assert len(late.metrics) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"model__compute_dtype": "bfloat16"},
        {"rollout__answers_per_prompt": 4, "advantage__estimator": "whitened_batch_mean"},
        {"rollout__temperature": 0.7, "rollout__top_p": 0.9, "rollout__top_k": 50, "rollout__min_new_tokens": 3},
        {"update__normaliser": "token_mean", "update__micro_batch_size": 2, "update__remat": True},
        {"update__normaliser": "sequence_mean", "update__schedule": "cosine", "update__warmup_steps": 2},
    ],
)
def test_the_checks_of_step_zero_hold_for_every_option(tiny_model, tmp_path, changes):
    result = run(tiny_model, tmp_path / "run", run__iterations=2, **changes)
    first, second = result.metrics
    assert first["kl/seq_nats"] < 1e-6
    assert second["kl/seq_nats"] > 1e-6
    if "rollout__min_new_tokens" in changes:
        assert first["response/len_mean_tokens"] > 3
        assert first["rollout/kept_mass"] < 0.999


def test_scoring_and_update_compile_no_axis_shorter_than_the_shortest_answer(tiny_model, tmp_path, monkeypatch):
    least = {scoring: set(), update: set()}
    for module, seen in least.items():

        def spy(*arguments, min_new_tokens, seen=seen):
            seen.add(min_new_tokens)
            return at_shortest_axis(*arguments, min_new_tokens=min_new_tokens)

        monkeypatch.setattr(module, "at_shortest_axis", spy)
    changes = {"rollout__min_new_tokens": 5, "update__micro_batch_size": 2, "run__iterations": 1}
    run(tiny_model, tmp_path / "run", prompts__evaluation_fraction=0.25, monitor__evaluate_every=1, **changes)
    assert least == {scoring: {5}, update: {5}}


def test_the_plan_compiles_the_axes_that_the_run_will(tiny_model, tmp_path):
    changes = {"rollout.min_new_tokens": 6, "model.path": str(tiny_model), "run.dir": str(tmp_path / "run")}
    made, _ = build.build(load(overrides=SMALL | changes), reward=vowel_share, prompts=PROMPTS)
    with mock.patch.object(scoring, "at_shortest_axis", wraps=at_shortest_axis) as scored:
        compile_stages(made.config, made.model, made.mesh, prompt_length=9)
    assert [call.kwargs for call in scored.call_args_list] == [{"min_new_tokens": 6}]


def test_a_reference_that_is_not_the_policy_stops_the_run_before_the_first_step(tiny_model, tmp_path):
    config = load(overrides=SMALL | {"model.path": str(tiny_model), "run.dir": str(tmp_path / "run")})
    made, state = build.build(config, reward=vowel_share, prompts=PROMPTS)
    moved = replace(made, ref_params=jax.tree.map(lambda x: x * 1.01, made.ref_params))
    with pytest.raises(UserError, match="step-0 check: KL"):
        train.train(moved, state)


def test_a_reference_that_moves_stops_the_run(tiny_model, tmp_path, monkeypatch):
    config = load(overrides=SMALL | {"model.path": str(tiny_model), "run.dir": str(tmp_path / "run")})
    made, state = build.build(config, reward=vowel_share, prompts=PROMPTS)
    original = train.ppo_iteration

    def trains_the_reference_along_the_way(run, state, clock):
        state, numbers = original(run, state, clock)
        run.ref_params["final_norm"]["scale"] = state.params["final_norm"]["scale"]
        return state, numbers

    monkeypatch.setattr(train, "ppo_iteration", trains_the_reference_along_the_way)
    with pytest.raises(UserError, match="reference model moved"):
        train.train(made, state)


def test_a_reward_that_becomes_infinite_stops_the_run_and_names_the_answer(tiny_model, tmp_path):
    with pytest.raises(UserError, match="inf for answer"):
        run(tiny_model, tmp_path / "run", reward=lambda prompts, answers: [float("inf")] * len(answers))


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "ppo_jax.train", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_trains_from_a_yaml_file_and_reports_the_run(tiny_model, tmp_path):
    (tmp_path / "rewards.py").write_text("def score(prompts, answers):\n    return [len(a) / 10 for a in answers]\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    sections: dict = {}
    settings = SMALL | {"model.path": str(tiny_model), "prompts.path": "p.jsonl", "reward.function": "rewards:score"}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    done = command("--config", "recipe.yaml", "--run.dir", "out", "--run.iterations", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Policy, in Hugging Face format" in done.stdout
    assert "compiling rollout for B=16" in done.stdout
    assert "compilation cache: " in done.stdout
    resolved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert resolved["run"]["iterations"] == 2
    assert resolved["reward"]["function"] == "rewards:score"
    assert {"jax", "python", "devices"} <= set(json.loads((tmp_path / "out" / "versions.json").read_text()))
    again = command("--config", "recipe.yaml", "--run.dir", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "not empty" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_wrong_configuration_is_refused_whole_before_any_model_loads(tmp_path):
    done = command(
        "--update.epoch", 4, "--kl.coef", -1, "--rollout.batch_size", 30, "--model.path", "absent", cwd=tmp_path
    )
    assert done.returncode == 2
    for part in ("did you mean update.epochs", "kl.coef", "rollout.batch_size (30)", "3 problems"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert "absent" not in done.stderr


def test_a_model_directory_that_is_not_there_is_named_as_given_and_as_resolved(tmp_path):
    done = command("--model.path", "./absent", cwd=tmp_path)
    assert done.returncode == 2
    assert "'./absent'" in done.stderr
    assert str(tmp_path / "absent") in done.stderr


def test_the_dry_run_prints_a_plan_and_writes_nothing(tiny_model, tmp_path):
    done = command("--model.path", tiny_model, "--dry_run", "--rollout.max_new_tokens", 16, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("reference, float32", "while in update", "s per iteration", "64 answers of up to 16 tokens"):
        assert part in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_a_token_outside_of_the_embedding_is_refused(tiny):
    """JAX would read the last row of the embedding in its place."""
    size = tiny.model.spec.vocab_size
    build.check_tokens(load(), tiny.model, Prompts(["a"], [[size - 1]], seed=0))
    with pytest.raises(UserError, match=f"token id {size}, but the embedding has {size} rows"):
        build.check_tokens(load(), tiny.model, Prompts(["a"], [[size]], seed=0))


def test_a_reward_that_is_not_there_is_told_before_a_model_is_opened(tmp_path):
    settings = {"reward.function": "absent_rewards:score", "model.path": str(tmp_path / "absent")}
    with pytest.raises(UserError, match=r"reward\.function: module 'absent_rewards' could not be imported"):
        build.build(load(overrides=settings | {"run.dir": str(tmp_path / "run")}))
    assert list(tmp_path.iterdir()) == []
