"""Whole runs of what `algorithm` picks beyond the default: critics, controllers, shaping, early ends."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import algorithm, build, scoring, update
from ppo_jax.config_file import load
from ppo_jax.initial_state import abstract_critic
from ppo_jax.misfits import warnings_of
from ppo_jax.models.critic import split_critic
from ppo_jax.ops import kl
from ppo_jax.records import EOS, TRUNCATED, Rollout, Scored
from ppo_jax.tracing import compilations
from tests.test_train import assert_ends_alike, broken_off, run, vowel_share
from tests.tiny import PROMPTS

VALUE_HEAD = {"critic.kind": "value_head", "advantage.estimator": "gae", "critic.learning_rate": 3e-2}
MODEL = VALUE_HEAD | {"critic.kind": "model"}
STEERED = {"kl.target_nats": 0.05, "kl.horizon": 2.0, "reward.normalise": "running", "update.epochs": 1}


ONE_BUCKET = {"rollout.max_new_tokens": 8}  # of answers, so that nothing is compiled twice


def run_of(tiny_model, directory, settings, **changes):
    settings = ONE_BUCKET | settings
    return run(tiny_model, directory, **{key.replace(".", "__"): value for key, value in settings.items()}, **changes)


def column(result, name):
    return [row[name] for row in result.metrics]


@pytest.fixture(scope="module")
def steered(tiny_model, tmp_path_factory):
    before = dict(compilations)
    result = run_of(tiny_model, tmp_path_factory.mktemp("steered") / "run", STEERED, run__iterations=6)
    return result, {name: count - before.get(name, 0) for name, count in compilations.items()}


def test_the_coefficient_follows_the_kl_of_each_iteration_and_starts_where_it_is_told(steered):
    coefs, nats = (np.array(column(steered[0], name), np.float32) for name in ("kl/coef", "kl/seq_nats"))
    assert coefs[0] == np.float32(0.01)
    expected = [
        kl.next_kl_coef(jnp.asarray(c), jnp.asarray(n), target_nats=0.05, horizon=2.0)
        for c, n in zip(coefs, nats, strict=True)
    ]
    np.testing.assert_allclose(coefs[1:], expected[:-1], rtol=1e-6)
    assert coefs[1] < coefs[0] < coefs[-1]  # there is no KL at first, and soon too much of it
    np.testing.assert_allclose(steered[0].state.kl_coef, expected[-1], rtol=1e-6)


def test_a_coefficient_that_changes_compiles_nothing_again(steered):
    assert steered[1]["update"] <= 2
    assert steered[1]["score"] <= 2


def test_running_normalisation_is_by_all_scores_so_far(steered):
    means, stds = (np.array(column(steered[0], f"score/{name}")) for name in ("mean", "std"))
    for i, shaped in enumerate(column(steered[0], "score/shaped_mean")):
        mean = means[: i + 1].mean()
        variance = (stds[: i + 1] ** 2 + (means[: i + 1] - mean) ** 2).mean()
        assert shaped == pytest.approx((means[i] - mean) / np.sqrt(variance + 1e-8), abs=1e-4)
    assert float(steered[0].state.score_moments.count) == 16 * 6


RECIPES = {name: x | {"critic.warmup_iterations": 1} for name, x in (("value_head", VALUE_HEAD), ("model", MODEL))}
RECIPES["steered"] = STEERED


@pytest.fixture(scope="module")
def whole_run(tiny_model, tmp_path_factory):
    """The unbroken run of a recipe, made once."""

    @cache
    def make(recipe):
        return run_of(tiny_model, tmp_path_factory.mktemp(recipe) / "run", RECIPES[recipe])

    return make


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_ends_where_the_unbroken_one_ends_bit_for_bit(tiny_model, tmp_path, whole_run, recipe):
    whole, settings = whole_run(recipe), RECIPES[recipe]
    settings = {key.replace(".", "__"): value for key, value in (ONE_BUCKET | settings).items()}
    broken_off(tiny_model, tmp_path / "parts", call=5, **settings)
    resumed = run(tiny_model, None, resume=tmp_path / "parts")
    assert [row["step"] for row in resumed.metrics] == [2, 3]
    assert_ends_alike(resumed, whole)


def test_no_step_follows_one_that_went_too_far(tiny_model, tmp_path):
    free = run_of(tiny_model, tmp_path / "free", {"update.epochs": 4})
    ceiling = 0.5 * max(column(free, "policy/approx_kl_nats"))
    held = run_of(tiny_model, tmp_path / "held", {"update.epochs": 4, "update.max_approx_kl_nats": ceiling})
    assert set(column(free, "update/optimizer_steps")) == {8}
    steps = column(held, "update/optimizer_steps")
    assert min(steps) < 8
    assert all(1 < count <= 8 for count in steps)
    assert int(held.state.step) == 4


@pytest.fixture(scope="module")
def without_a_critic(tiny_model, tmp_path_factory):
    return run_of(tiny_model, tmp_path_factory.mktemp("plain") / "run", {}, run__iterations=1)


@pytest.mark.parametrize("recipe", ["value_head", "model"])
def test_a_critic_learns_alone_at_first_and_leaves_the_policy_as_it_was(whole_run, without_a_critic, recipe):
    result = whole_run(recipe)
    assert column(result, "score/mean")[0] == column(without_a_critic, "score/mean")[0]  # the same answers
    assert column(result, "kl/token_max_nats")[:2] == [0.0, 0.0]
    assert column(result, "update/param_rel_change")[0] == 0.0
    assert column(result, "update/param_rel_change")[1] > 0
    assert column(result, "kl/seq_nats")[2] > 0
    assert column(result, "critic/value_mean")[0] == 0.0
    assert column(result, "critic/explained_variance")[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(column(result, "critic/value_mean")[1]) > 1e-3


def test_a_critic_comes_to_know_a_score_that_the_prompt_decides(tiny_model, tmp_path):
    def of_prompt(prompts, answers):
        return [len(prompt) / 10 for prompt in prompts]

    learning = MODEL | {"critic.warmup_iterations": 7, "update.epochs": 4, "critic.learning_rate": 1e-2}
    result = run_of(tiny_model, tmp_path / "run", learning, reward=of_prompt, run__iterations=8)
    assert column(result, "critic/explained_variance")[-1] > 0.8
    assert column(result, "loss/value")[-1] < 0.1 * column(result, "loss/value")[0]


@pytest.mark.parametrize(("kind", "reaches"), [("value_head", True), ("model", False)])
def test_the_value_loss_reaches_the_policy_through_a_shared_trunk_only(tiny_model, tmp_path, kind, reaches):
    settings = {"model.path": str(tiny_model), "run.dir": str(tmp_path / "run"), "rollout.batch_size": 8}
    settings |= {"update.minibatch_size": 8, "critic.kind": kind, "advantage.estimator": "gae"}
    made, state = build.build(load(overrides=settings), reward=vowel_share, prompts=PROMPTS)
    rng, mask = np.random.default_rng(0), np.arange(5) < np.array([[5], [3], [1], [5], [2], [4], [5], [5]])
    head = {"kernel": jnp.asarray(rng.normal(size=24), jnp.float32), "bias": jnp.float32(0.1)}
    params = state.params | {"critic": state.params["critic"] | {"head": head}}

    def random():
        return jnp.asarray(np.where(mask, rng.normal(size=mask.shape), 0), jnp.float32)

    experience = update.Experience(
        prompt_tokens=jnp.ones((8, 3), jnp.int32),
        prompt_mask=jnp.ones((8, 3), bool),
        response_tokens=jnp.asarray(np.where(mask, rng.integers(2, 300, mask.shape), 0), jnp.int32),
        response_mask=jnp.asarray(mask),
        old_logprobs=random(),
        advantages=jnp.zeros(mask.shape),
        old_values=random(),
        returns=random(),
    )
    objective = algorithm.make_objective(made.config, made.model.spec, trunk_of(made))
    _, _, gradients = update.loss_and_gradients(params, made.ref_params, experience, jnp.float32(0.0), objective)
    policy, critic = split_critic(gradients)
    assert any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(policy)) == reaches
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(critic["head"]))


def trunk_of(made):
    return abstract_critic(made.config, made.model)[0]


def test_a_missing_end_and_a_wrong_length_are_paid_for(tiny_model, tmp_path):
    settings = {"reward.missing_eos_penalty": 0.5, "run.iterations": 1, "critic.warmup_iterations": 0}
    row = run_of(tiny_model, tmp_path / "eos", settings).metrics[0]
    assert row["response/truncated_frac"] > 0
    paid = row["score/mean"] - row["score/shaped_mean"]
    assert paid == pytest.approx(0.5 * row["response/truncated_frac"], abs=1e-6)
    settings = {"reward.min_tokens": 10, "reward.too_short_penalty": 2.0, "run.iterations": 1}
    row = run_of(tiny_model, tmp_path / "short", settings).metrics[0]
    assert row["score/mean"] - row["score/shaped_mean"] == pytest.approx(
        2 * (1 - row["response/len_mean_tokens"] / 10), abs=1e-6
    )


def test_only_a_truncated_answer_is_given_the_value_of_what_was_cut_off(tiny_model, tmp_path):
    settings = {"model.path": str(tiny_model), "run.dir": str(tmp_path / "run"), "rollout.max_new_tokens": 8}
    settings |= VALUE_HEAD | {"critic.bootstrap_truncated": True}
    made, state = build.build(load(overrides=settings), reward=vowel_share, prompts=PROMPTS)
    rng = np.random.default_rng(0)
    head = {"kernel": jnp.asarray(rng.normal(size=24), jnp.float32), "bias": jnp.float32(0.1)}
    params = state.params | {"critic": {"head": head}}
    lengths = np.array([8, 3, 8])
    answers = some_answers(lengths, truncated=[True, False, False])

    def scored(answers, bootstrap):
        return build_score(made, params, answers, bootstrap=bootstrap)

    whole, plain = scored(answers, True), scored(answers, False)
    np.testing.assert_allclose(whole.values, plain.values, atol=2e-6)
    assert plain.bootstrap_values is None
    # The value behind the last token is the value at a token that would have come next.
    longer = some_answers(np.array([9, 9, 9]), truncated=[False] * 3, first=answers)
    assert whole.bootstrap_values[0] == pytest.approx(float(scored(longer, False).values[0, 8]), abs=2e-6)
    assert whole.bootstrap_values[1:].tolist() == [0.0, 0.0]
    assert abs(float(whole.bootstrap_values[0])) > 1e-3


def some_answers(lengths, *, truncated, first=None):
    width = int(lengths.max())
    mask = np.arange(width) < lengths[:, None]
    tokens = np.random.default_rng(1).integers(2, 300, mask.shape)
    if first is not None:
        shared = np.asarray(first.response_tokens)
        tokens[:, : shared.shape[1]] = shared
    numbers = jnp.zeros(mask.shape)
    return Rollout(
        prompt_tokens=jnp.full((len(lengths), 2), 5, jnp.int32),
        prompt_mask=jnp.ones((len(lengths), 2), bool),
        response_tokens=jnp.asarray(np.where(mask, tokens, 0), jnp.int32),
        response_mask=jnp.asarray(mask),
        behaviour_logprobs=numbers,
        kept_mass=numbers,
        finish_reason=jnp.where(jnp.asarray(truncated), TRUNCATED, EOS),
        group_id=jnp.arange(len(lengths)),
        policy_version=jnp.zeros((), jnp.int32),
    )


def build_score(made, params, answers, *, bootstrap):
    return scoring.score(
        params,
        made.ref_params,
        answers,
        scoring=scoring.Scoring(
            spec=made.model.spec, temperature=1.0, compute_dtype="float32", micro_batch_size=len(answers.response_mask)
        ),
        values=made.objective.values,
        bootstrap=bootstrap,
    )


def test_a_weight_for_the_rollout_gap_multiplies_the_advantage(tiny_model):
    settings = {"update.importance_cap": 1.5, "rollout.batch_size": 3, "update.minibatch_size": 3}
    plain, weighted = (algorithm.pick_advantages(load(overrides=x)) for x in ({}, settings))
    answers = some_answers(np.array([4, 2, 3]), truncated=[False] * 3)
    rng = np.random.default_rng(0)
    numbers = [jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(3)]
    mask = answers.response_mask
    answers = replace(answers, behaviour_logprobs=jnp.where(mask, numbers[0], 0))

    scored = Scored(
        old_logprobs=jnp.where(mask, numbers[1], 0),
        ref_logprobs=numbers[0],
        token_kl=numbers[0],
        token_entropy=numbers[0],
    )
    token_rewards = jnp.where(mask, numbers[2], 0)
    without, _ = plain(token_rewards, scored, answers)
    found, _ = weighted(token_rewards, scored, answers)
    ratio = np.exp(np.asarray(scored.old_logprobs - answers.behaviour_logprobs))
    assert (ratio[np.asarray(mask)] > 1.5).any()
    np.testing.assert_allclose(found, np.minimum(ratio, 1.5) * np.asarray(without), rtol=1e-5)


def test_what_is_biased_is_said_when_it_is_chosen():
    def told(**changes):
        return " ".join(warnings_of(load(overrides={key.replace("__", "."): x for key, x in changes.items()})))

    assert told() == ""
    biased = told(kl__form="biased_k3_in_loss", advantage__estimator="leave_one_out")
    assert "its gradient is not that of the KL" in biased
    assert "docs/truth.md" in biased
    assert "kl.per is token" in told(kl__per="token")
    critic = {"critic__kind": "model", "advantage__estimator": "gae"}
    assert "critic.warmup_iterations is 0" in told(**critic)
    assert told(**critic, critic__warmup_iterations=3) == ""
    assert "biased by the critic's errors" in told(**critic, critic__warmup_iterations=3, advantage__gae_lambda=0.95)
