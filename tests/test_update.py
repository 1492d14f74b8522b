from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import update
from ppo_jax.algorithm import LOSS_KL, pick_optimizer
from ppo_jax.config import UpdateConfig
from ppo_jax.config_file import load
from ppo_jax.models import hf_io
from ppo_jax.models.decoder import head_logits, response_hidden
from ppo_jax.ops import losses
from ppo_jax.ops.rewards import first_moments
from ppo_jax.ops.streaming import shortest_together
from ppo_jax.optimizer import make_optimizer
from ppo_jax.prompts import pad_left
from ppo_jax.records import Experience, TrainState
from ppo_jax.update import Objective
from tests.tiny import PROMPTS, make_model

LENGTHS = np.array([5, 1, 3, 5, 2, 4])
T, TEMPERATURE, CLIP_EPS = 5, 0.9, 0.2
KL_COEF = jnp.float32(0.3)


@pytest.fixture(scope="module")
def experience(tiny) -> Experience:
    return some_experience(tiny, LENGTHS, axis=T)


def some_experience(tiny, lengths, *, axis) -> Experience:
    """Answers whose old log-probs differ from the policy's, so that some tokens are clipped."""
    batch = pad_left(PROMPTS, [tiny.model.tokenizer(text)["input_ids"] for text in PROMPTS])
    rng = np.random.default_rng(3)
    mask = np.arange(axis)[None] < lengths[:, None]
    made = Experience(
        prompt_tokens=jnp.asarray(batch.tokens),
        prompt_mask=jnp.asarray(batch.mask),
        response_tokens=jnp.asarray(np.where(mask, rng.integers(2, 300, mask.shape), 0), jnp.int32),
        response_mask=jnp.asarray(mask),
        old_logprobs=jnp.zeros(mask.shape),
        advantages=jnp.asarray(np.where(mask, rng.normal(size=mask.shape), 0), jnp.float32),
    )
    current = dense_logprobs(tiny, tiny.params, made)
    return replace(
        made,
        old_logprobs=jnp.where(made.response_mask, current + 0.3 * rng.normal(size=mask.shape).astype(np.float32), 0.0),
    )


def dense_logprobs(tiny, params, experience):
    """The same log-probs written out: whole log-softmax, one row of numbers per token."""
    hidden = response_hidden(
        params,
        experience.prompt_tokens,
        experience.prompt_mask,
        experience.response_tokens,
        experience.response_mask,
        spec=tiny.model.spec,
    )
    log_probs = jax.nn.log_softmax(head_logits(params, hidden, spec=tiny.model.spec) / TEMPERATURE, axis=-1)
    return jnp.take_along_axis(log_probs, experience.response_tokens[..., None], axis=-1)[..., 0]


def make_objective(tiny, *, micro=6, remat=False, dtype="float32", **terms):
    return Objective(
        spec=tiny.model.spec,
        temperature=TEMPERATURE,
        policy_loss=partial(losses.clipped_policy_loss, clip_eps=CLIP_EPS),
        clipping_acts=partial(losses.clipping_acts, clip_eps=CLIP_EPS),
        loss_weights=partial(losses.constant_weights, max_response_tokens=T),
        compute_dtype=dtype,
        micro_batch_size=micro,
        remat=remat,
        **terms,
    )


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def step(tiny, experience, objective, optimizer, rows=range(6)):
    params = copy(tiny.params)
    return update.ppo_step(
        params,
        optimizer.init(params),
        tiny.params,
        experience,
        jnp.asarray(list(rows)),
        KL_COEF,
        jnp.asarray(0),
        optimizer=optimizer,
        objective=objective,
    )


def loss_and_gradients(tiny, experience, objective, ref_params=None):
    return update.loss_and_gradients(
        tiny.params, tiny.params if ref_params is None else ref_params, experience, KL_COEF, objective
    )


def logprobs_of(tiny, experience, objective):
    return update.loss_terms(tiny.params, tiny.params, experience, objective).logprobs


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), a, b)))


OPTIMIZER = make_optimizer(UpdateConfig(learning_rate=1e-3, max_grad_norm=None), 10)


def test_loss_and_gradient_are_those_of_the_clipped_objective_written_out(tiny, experience):
    def written_out(params):
        ratio = jnp.exp(dense_logprobs(tiny, params, experience) - experience.old_logprobs)
        surrogate = jnp.minimum(
            ratio * experience.advantages, jnp.clip(ratio, 1 - CLIP_EPS, 1 + CLIP_EPS) * experience.advantages
        )
        return -jnp.sum(jnp.where(experience.response_mask, surrogate, 0.0)) / (6 * T)

    loss, expected = jax.value_and_grad(written_out)(tiny.params)
    found_loss, stats, found = loss_and_gradients(tiny, experience, make_objective(tiny))
    assert abs(float(found_loss - loss)) < 1e-6
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    assert largest_difference(found, expected) < 1e-5 * scale
    assert int(stats["tokens"]) == LENGTHS.sum()
    assert 0 < int(stats["clipped_tokens"]) < LENGTHS.sum()


@pytest.fixture(scope="module")
def with_reference(tiny, experience, tmp_path_factory):
    """The same answers with another model's hidden states, and that model's parameters."""
    model = hf_io.open_model(str(make_model(tmp_path_factory.mktemp("reference") / "model", seed=1)))
    ref_params = hf_io.load_params(model.path, model.config, model.spec)
    sequences = (
        experience.prompt_tokens,
        experience.prompt_mask,
        experience.response_tokens,
        experience.response_mask,
    )
    return replace(experience, ref_hidden=response_hidden(ref_params, *sequences, spec=model.spec)), ref_params


def test_the_exact_kl_in_the_loss_is_that_of_whole_distributions_with_the_weights_of_the_policy_loss(
    tiny, with_reference
):
    experience, ref_params = with_reference
    sequences = (
        experience.prompt_tokens,
        experience.prompt_mask,
        experience.response_tokens,
        experience.response_mask,
    )

    def log_softmax(params):
        hidden = response_hidden(params, *sequences, spec=tiny.model.spec)
        return jax.nn.log_softmax(head_logits(params, hidden, spec=tiny.model.spec) / TEMPERATURE)

    def written_out(params):
        log_p, log_q = log_softmax(params), log_softmax(ref_params)
        token_kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return KL_COEF * jnp.sum(jnp.where(experience.response_mask, token_kl, 0.0)) / (6 * T)

    objectives = (make_objective(tiny, loss_kl=LOSS_KL["exact"]), make_objective(tiny))
    penalty, expected = jax.value_and_grad(written_out)(tiny.params)
    (loss, stats, found), (policy, k1_stats, rest) = (
        loss_and_gradients(tiny, experience, objective, ref_params) for objective in objectives
    )
    assert float(penalty) > 0.1
    np.testing.assert_allclose([stats["loss_policy"], stats["loss_kl"]], [policy, penalty], rtol=1e-5)
    np.testing.assert_allclose(loss, policy + penalty, rtol=1e-5)
    assert float(k1_stats["loss_kl"]) == 0.0
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    assert scale > 1e-3
    assert largest_difference(jax.tree.map(jnp.subtract, found, rest), expected) < 2e-5 * scale


def test_micro_batches_and_recomputation_change_nothing_with_the_kl_in_the_loss(tiny, with_reference):
    experience, ref_params = with_reference
    whole, parts = (
        loss_and_gradients(tiny, experience, objective, ref_params)[2]
        for objective in (
            make_objective(tiny, loss_kl=LOSS_KL["exact"]),
            make_objective(tiny, loss_kl=LOSS_KL["exact"], micro=2, remat=True),
        )
    )
    assert largest_difference(whole, parts) < 1e-6


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_any_partition_into_micro_batches_takes_the_same_step(tiny, experience, micro):
    whole, _, whole_stats = step(tiny, experience, make_objective(tiny), OPTIMIZER)
    parts, _, parts_stats = step(tiny, experience, make_objective(tiny, micro=micro), OPTIMIZER)
    # Adam's first step is nearly a sign: only gradients clear of rounding are compared that way, so compare stats too.
    for name, value in whole_stats.items():
        np.testing.assert_allclose(parts_stats[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    gradients = [loss_and_gradients(tiny, experience, make_objective(tiny, micro=m))[2] for m in (6, micro)]
    assert largest_difference(*gradients) < 1e-6
    assert largest_difference(whole, parts) <= 2e-3


def test_a_ragged_minibatch_in_micro_batches_of_their_own_length_has_the_gradient_of_the_whole(tiny, monkeypatch):
    axes, lengths = set(), np.array([20, 16, 1, 32, 9, 17])
    ragged = some_experience(tiny, lengths, axis=32)

    def seen(params, prompt_tokens, prompt_mask, response_tokens, *rest, **options):
        axes.add(response_tokens.shape[1])
        return response_hidden(params, prompt_tokens, prompt_mask, response_tokens, *rest, **options)

    monkeypatch.setattr(update, "response_hidden", seen)
    order = shortest_together(ragged.response_mask, 2)  # 1 and 9, 16 and 17, 20 and 32 tokens
    in_order = jax.tree.map(lambda x: x[order], ragged)
    whole, parts = (loss_and_gradients(tiny, in_order, make_objective(tiny, micro=m)) for m in (6, 2))
    assert axes == {16, 32}
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(whole[2]))
    assert largest_difference(parts[2], whole[2]) < 1e-5 * scale
    assert int(parts[1]["tokens"]) == lengths.sum()


def test_rematerialisation_changes_no_gradient(tiny, experience):
    plain, remat = (loss_and_gradients(tiny, experience, make_objective(tiny, remat=flag))[2] for flag in (False, True))
    assert largest_difference(plain, remat) < 1e-6


def test_bfloat16_compute_keeps_float32_masters_and_log_probs(tiny, experience):
    params, _, _ = step(tiny, experience, make_objective(tiny, dtype="bfloat16"), OPTIMIZER)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logprobs = logprobs_of(tiny, experience, make_objective(tiny, dtype="bfloat16"))
    exact = logprobs_of(tiny, experience, make_objective(tiny))
    assert logprobs.dtype == jnp.float32
    assert 0 < float(jnp.max(jnp.abs(logprobs - exact))) < 0.5


@pytest.mark.parametrize("poison", [np.nan, 1e30])
def test_what_is_masked_changes_neither_loss_nor_gradient(tiny, experience, poison):
    mask = experience.response_mask
    poisoned = replace(
        experience,
        old_logprobs=jnp.where(mask, experience.old_logprobs, poison),
        advantages=jnp.where(mask, experience.advantages, poison),
        response_tokens=jnp.where(mask, experience.response_tokens, 7),
    )
    clean_loss, _, clean = loss_and_gradients(tiny, experience, make_objective(tiny))
    loss, _, gradients = loss_and_gradients(tiny, poisoned, make_objective(tiny))
    assert float(loss) == float(clean_loss)
    assert largest_difference(gradients, clean) < 1e-7


def test_a_step_that_is_not_finite_leaves_parameters_and_moments_untouched(tiny, experience):
    broken = replace(experience, advantages=experience.advantages.at[0, 0].set(jnp.nan))
    params, opt_state, stats = step(tiny, broken, make_objective(tiny), OPTIMIZER)
    assert float(stats["update/skipped_steps"]) == 1
    assert largest_difference(params, tiny.params) == 0
    jax.tree.map(np.testing.assert_array_equal, opt_state, OPTIMIZER.init(tiny.params))


def test_the_old_buffers_are_given_up_to_the_update(tiny, experience):
    params = copy(tiny.params)
    update.ppo_step(
        params,
        OPTIMIZER.init(params),
        tiny.params,
        experience,
        jnp.arange(6),
        KL_COEF,
        jnp.asarray(0),
        optimizer=OPTIMIZER,
        objective=make_objective(tiny),
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_only_the_rows_of_the_minibatch_are_trained_on(tiny, experience):
    rows = jnp.asarray([4, 1])
    objective = make_objective(tiny, micro=2)
    _, _, stats = step(tiny, experience, objective, OPTIMIZER, rows=[4, 1])
    expected, _, _ = loss_and_gradients(tiny, jax.tree.map(lambda x: x[rows], experience), objective)
    np.testing.assert_allclose(stats["loss/policy"], expected, rtol=1e-6)


def test_clipping_bounds_the_gradient_that_adam_sees(tiny, experience):
    clipped = make_optimizer(UpdateConfig(learning_rate=1e-3, max_grad_norm=0.01), 10)
    _, opt_state, stats = step(tiny, experience, make_objective(tiny), clipped)
    assert float(stats["update/grad_norm"]) > 0.05
    moments = [leaf for leaf in jax.tree.leaves(opt_state) if leaf.ndim > 0]
    first_moments = moments[: len(moments) // 2]
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in first_moments))
    np.testing.assert_allclose(norm, 0.1 * 0.01, rtol=1e-3)  # (1 − b1) times the clipped norm


def test_weight_decay_acts_on_matrices_only(tiny, experience):
    nothing_learned = replace(experience, advantages=jnp.zeros_like(experience.advantages))
    decaying = make_optimizer(UpdateConfig(learning_rate=0.1, weight_decay=0.5), 10)
    params, _, _ = step(tiny, nothing_learned, make_objective(tiny), decaying)
    for (path, after), before in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tiny.params), strict=True
    ):
        factor = 0.95 if before.ndim >= 2 else 1.0
        np.testing.assert_allclose(after, factor * before, rtol=1e-5, atol=1e-7, err_msg=str(path))


def test_every_epoch_visits_every_answer_once_in_a_fresh_order(tiny, experience, monkeypatch):
    config = load(
        overrides={
            "rollout.batch_size": 6,
            "rollout.max_new_tokens": T,
            "update.minibatch_size": 2,
            "update.epochs": 3,
        }
    )
    visited, planned = [], []

    def record(params, opt_state, ref_params, experience, rows, kl_coef, planned_step, **_):
        visited.append(rows.tolist())
        planned.append(int(planned_step))
        return params, opt_state, {"policy/approx_kl_nats": jnp.zeros(()), "update/skipped_steps": jnp.asarray(False)}

    monkeypatch.setattr(update, "ppo_step", record)

    def visits(step):
        visited.clear()
        state = TrainState(
            step=jnp.asarray(step),
            params={},
            opt_state=(),
            kl_coef=KL_COEF,
            score_moments=first_moments(jnp.float32),
            skipped_in_a_row=jnp.int32(0),
        )
        after, stats = update.update(
            state, {}, experience, config=config, optimizer=OPTIMIZER, objective=make_objective(tiny)
        )
        assert int(after.step) == step + 1
        assert len(stats) == 9 == config.optimizer_steps_per_iteration
        return [[row for minibatch in visited[i : i + 3] for row in minibatch] for i in (0, 3, 6)]

    first, again, other = visits(0), visits(0), visits(1)
    assert planned == [*range(9), *range(9), *range(9, 18)]
    assert all(sorted(epoch) == list(range(6)) for epoch in first + other)
    assert first == again
    assert len({tuple(epoch) for epoch in first + other}) == 6


def test_a_decaying_learning_rate_ends_at_zero_where_steps_are_left_out(tiny, experience):
    """Of 4 iterations with 3 planned steps each one is taken: optax's own count would be at 4 of 12 when they end."""
    settings = {"update.max_approx_kl_nats": 1e-9, "update.schedule": "linear", "run.iterations": 4}
    settings |= {"update.weight_decay": 0.5}
    sizes = {"rollout.batch_size": 6, "rollout.max_new_tokens": T, "update.minibatch_size": 6, "update.epochs": 3}
    config = load(overrides=settings | sizes)
    optimizer = pick_optimizer(config)
    # Without a gradient a step is the decay of the weights, in proportion to the learning rate.
    experience = replace(experience, advantages=jnp.zeros_like(experience.advantages))
    state = TrainState(
        step=jnp.asarray(0),
        params=copy(tiny.params),
        opt_state=optimizer.init(tiny.params),
        kl_coef=KL_COEF,
        score_moments=first_moments(jnp.float32),
        skipped_in_a_row=jnp.int32(0),
    )
    changes = []
    for iteration in range(4):
        assert int(state.step) == iteration
        state, stats = update.update(
            state, tiny.params, experience, config=config, optimizer=optimizer, objective=make_objective(tiny)
        )
        changes.append([float(step["update/param_rel_change"]) for step in stats])
    assert [len(steps) for steps in changes] == [1, 1, 1, 1]
    rates = [steps[0] / changes[0][0] for steps in changes]
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25], rel=1e-3)


def test_a_maximum_over_steps_does_not_hide_the_step_that_was_no_number():
    """Python's own max() says 1.2 here, and the ratio is what a skipped step sends people to look for."""
    steps = [{"policy/ratio_max": 1.2}, {"policy/ratio_max": float("nan")}]
    assert np.isnan(update.summarise(steps)["policy/ratio_max"])
    assert update.summarise(steps[:1])["policy/ratio_max"] == 1.2
