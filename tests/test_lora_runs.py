"""Whole runs that train an adapter: what moves, what is held in memory, where they begin, and what they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from jax.extend.core import jaxprs_in_params
from transformers import AutoModelForCausalLM

import ppo_jax
from ppo_jax import build, train, update
from ppo_jax.config_file import load
from ppo_jax.errors import UserError
from ppo_jax.evaluation import against_sft
from ppo_jax.initial_state import open_lora
from ppo_jax.models import lora
from ppo_jax.models.decoder import hidden_states
from ppo_jax.records import Experience
from tests.test_train import SMALL, rows_without_times, vowel_share
from tests.tiny import PROMPTS

LORA = {"lora.rank": 4, "lora.alpha": 8, "lora.targets": ["all-linear", "lm_head"]}
pytestmark = pytest.mark.filterwarnings(  # that the head is tied, and that peft asks transformers by an old name
    "ignore::UserWarning:peft", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def settings(tiny_model, directory, **changes):
    overrides = SMALL | {"model.path": str(tiny_model), "run.dir": str(directory), "monitor.sample_every": 0}
    return overrides | {key.replace("__", "."): value for key, value in changes.items()}


def fine_tune(tiny_model, directory, *, resume=None, **changes):
    config = changes if resume else settings(tiny_model, directory, **changes)
    return ppo_jax.fine_tune(config, reward=vowel_share, prompts=PROMPTS, resume=resume)


def built(tiny_model, directory, **changes):
    config = load(overrides=settings(tiny_model, directory, **changes))
    return build.build(config, reward=vowel_share, prompts=PROMPTS)


@pytest.fixture(scope="module")
def peft_adapter(tiny_model, tmp_path_factory):
    """An adapter of peft that is not inert, on the head of a tied model too."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    directory = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def new_run(tiny_model, tmp_path_factory):
    return fine_tune(tiny_model, tmp_path_factory.mktemp("new") / "run", **LORA)


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_new_adapter_begins_as_the_reference_and_learns(new_run):
    first, *_, last = new_run.metrics
    assert first["kl/token_max_nats"] < 1e-6
    assert last["kl/seq_nats"] > 0.05
    assert set(new_run.state.params) == {"lora"}


def test_the_export_is_the_trained_policy_in_peft_and_in_transformers(new_run, tiny, tiny_model):
    trained = jax.device_get(new_run.state.params)
    model, adapter = tiny.model, adapter_of(tiny)
    tokens = np.random.default_rng(0).integers(2, 300, (2, 12))
    policy = lora.policy_params(trained, tiny.params, adapter)
    hidden = hidden_states(policy, jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, bool), spec=model.spec)
    expected = np.asarray(lora_head_logits(policy, hidden, model.spec))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = base(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    assert np.abs(expected - before).max() > 0.05
    for loaded in (
        peft.PeftModel.from_pretrained(base, new_run.adapter_directory),
        AutoModelForCausalLM.from_pretrained(new_run.policy_directory),
    ):
        found = loaded(input_ids=torch.tensor(tokens)).logits.detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def adapter_of(tiny):
    return open_lora(load(overrides=LORA), tiny.model)[1]


def lora_head_logits(policy, hidden, spec):
    """Written out: the tied embedding, and beside it what the head's adapter adds."""
    return hidden @ policy["embed"].T + hidden @ policy["head_lora_a"] @ policy["head_lora_b"]


def test_a_resumed_adapter_ends_where_the_unbroken_one_ends_bit_for_bit(tiny_model, new_run, tmp_path):
    fine_tune(tiny_model, tmp_path / "parts", **LORA, run__iterations=2, checkpoint__save_every=1)
    resumed = fine_tune(tiny_model, None, resume=tmp_path / "parts", **{"run.iterations": 4})
    assert rows_without_times(resumed) == rows_without_times(new_run)[2:]
    assert_same(resumed.state, new_run.state)
    with pytest.raises(UserError, match=r"lora\.alpha: 8\.0 -> 4\.0"):
        fine_tune(tiny_model, None, resume=tmp_path / "parts", **{"lora.alpha": 4})


def buffers(*trees):
    """Bytes in memory of some trees, an array that is in several of them counted once."""
    leaves = {leaf.unsafe_buffer_pointer(): leaf.nbytes for tree in trees for leaf in jax.tree.leaves(tree)}
    return sum(leaves.values())


def test_one_copy_of_the_base_is_held_and_nothing_is_held_for_its_gradient(tiny_model, tiny, tmp_path):
    base, before = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny.params)), live_bytes()
    run, state = built(tiny_model, tmp_path / "lora", **LORA)
    adapter = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert adapter < base / 2
    rest = 1000  # counters, the coefficient, the moments of the scores, the table of stop strings
    assert base + 3 * adapter <= buffers(run.ref_params, state) < base + 3 * adapter + rest
    assert live_bytes() - before < base + 3 * adapter + 5 * rest  # nothing else was left over either
    whole_run, whole_state = built(tiny_model, tmp_path / "whole")
    assert 4 * base <= buffers(whole_run.ref_params, whole_state) < 4 * base + rest

    kernels = {leaf.shape for leaf in jax.tree.leaves(tiny.params) if leaf.ndim == 2}
    assert made_by_contraction(run, state) & kernels == set()
    assert made_by_contraction(whole_run, whole_state) >= kernels


def live_bytes():
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if not x.is_deleted()}.values())


def made_by_contraction(run, state):
    """Shapes of all matrices that a gradient step makes by multiplying, gathering back or adding up."""
    tokens, mask, numbers = (jax.ShapeDtypeStruct((8, 6), dtype) for dtype in (jnp.int32, bool, jnp.float32))
    experience = Experience(tokens, mask, tokens, mask, numbers, numbers)
    jaxpr = jax.make_jaxpr(update.loss_and_gradients, static_argnums=4)(
        state.params, run.ref_params, experience, jnp.float32(0.1), run.objective
    )
    contractions = ("dot_general", "scatter-add", "add_any", "transpose")
    return {
        out.aval.shape for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name in contractions for out in eqn.outvars
    }


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_an_old_adapter_is_the_reference_as_it_was_and_the_base_stays_where_it_is(
    tiny_model, tiny, peft_adapter, tmp_path
):
    changes = {"lora.path": str(peft_adapter), "monitor.evaluate_every": 1, "prompts.evaluation_fraction": 0.3}
    run, state = built(tiny_model, tmp_path / "run", **changes, run__iterations=2)
    with_adapter = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), peft_adapter)
    tokens = np.random.default_rng(0).integers(2, 300, (2, 12))
    hidden = hidden_states(
        run.ref_params, jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, bool), spec=tiny.model.spec
    )
    expected = with_adapter(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(lora_head_logits(run.ref_params, hidden, tiny.model.spec), expected, rtol=0, atol=1e-4)
    reference, started = jax.device_get((run.ref_params, state.params))
    with jax.set_mesh(run.mesh):
        assert against_sft(run, state, train.answer)(state)["evaluation/win_rate"] == 0.5  # equal models, equal answers
    result = train.train(run, state)
    assert result.metrics[0]["kl/token_max_nats"] < 1e-6
    assert result.metrics[1]["kl/seq_nats"] > 1e-4
    assert_same(run.ref_params, reference)
    kernels, of_base = (
        {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(t) if "lora" not in str(p)}
        for t in (reference, tiny.params)
    )
    assert_same(kernels, of_base)
    moved = [
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(result.state.params), jax.tree.leaves(started), strict=True)
    ]
    assert all(moved)


@pytest.mark.parametrize(
    "changes",
    [
        {"kl.form": "exact", "advantage.estimator": "leave_one_out_to_go", "model.compute_dtype": "bfloat16"}
        | {"update.remat": True, "update.micro_batch_size": 4},
        {"critic.kind": "value_head", "advantage.estimator": "gae"},
        {"critic.kind": "model", "advantage.estimator": "gae"},
    ],
    ids=["exact KL in bfloat16", "value head", "critic model"],
)
def test_adapters_train_beside_every_kl_and_critic(tiny_model, peft_adapter, tmp_path, changes):
    run, state = built(tiny_model, tmp_path / "run", **changes, **{"lora.path": str(peft_adapter), "run.iterations": 2})
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.ref_params)} == {run.config.model.compute_dtype}
    assert set(state.params) == {"lora"} | ({"critic"} if "critic.kind" in changes else set())
    first, second = train.train(run, state).metrics
    assert first["kl/token_max_nats"] < 1e-6  # in bfloat16 too: both models round the same numbers
    assert second["kl/seq_nats"] > 1e-5
    if "kl.form" in changes:
        assert second["loss/kl"] > 0
    else:
        assert first["critic/grad_norm"] > 0


def test_a_critic_beside_an_adapter_starts_from_the_files_in_float32(tiny_model, tiny, tmp_path):
    changes = {"critic.kind": "model", "advantage.estimator": "gae", "model.compute_dtype": "bfloat16", "lora.rank": 1}
    _, state = built(tiny_model, tmp_path / "run", **changes)
    assert_same(state.params["critic"]["trunk"], tiny.params)
