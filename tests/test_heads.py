"""Value heads, classifiers and critics: what is read from a directory is what transformers computes with it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from ppo_jax import sharding
from ppo_jax.errors import UserError
from ppo_jax.models import heads, hf_io
from ppo_jax.models.decoder import hidden_states
from tests.classifiers import LABELS, hf_classifier

# One of each family, with what differs in its files: biases, fused or transposed tensors, a tied embedding.
ONE_OF_EACH = (
    "llama-biases", "llama-tied", "gpt2", "gpt2-untied", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3",
    "phi3", "pythia", "olmo2", "starcoder2",
)  # fmt: skip


@pytest.fixture
def save(tokenizer, tmp_path):
    """Save a transformers model with a tokenizer; returns its directory."""

    def saved(model, name="model", tokenizer=tokenizer):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return saved


def edit_tensors(directory, **changes):
    file = directory / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    return all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def ours(directory, tokens):
    """Logits [B, S, labels] of a classification directory at every token."""
    model = heads.open_classifier(str(directory), key="reward.model")
    trunk, score = heads.load_classifier(model)
    hidden = hidden_states(trunk, jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, bool), spec=model.spec)
    values = [heads.head_values(heads.label_head(score, i), hidden) for i in range(len(model.labels))]
    return np.stack(values, axis=-1)


def theirs(model, tokens):
    """The same of transformers: its pooled logits of every beginning of a row, none of which ends in a pad."""
    import torch

    model.config.pad_token_id = None
    with torch.no_grad():
        rows = [
            [model(input_ids=torch.tensor(row[None, : n + 1])).logits[0] for n in range(len(row))] for row in tokens
        ]
    return np.asarray([[logits.numpy() for logits in row] for row in rows])


# ----------------------------------------------------------------------------------------------------------- the head


def test_a_zero_head_says_zero_and_values_are_the_affine_map_of_each_row():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 4, 6)).astype(np.float32)
    assert np.array_equal(heads.head_values(heads.zero_value_head(6), jnp.asarray(hidden)), np.zeros((3, 4)))
    head = {"kernel": jnp.asarray(rng.normal(size=6), jnp.float32), "bias": jnp.asarray(0.7, jnp.float32)}
    expected = hidden.astype(np.float64) @ np.asarray(head["kernel"], np.float64) + 0.7
    for rows in (hidden, hidden[0], hidden[0, 0]):
        values = heads.head_values(head, jnp.asarray(rows))
        assert values.shape == rows.shape[:-1]
        np.testing.assert_allclose(values, expected[(0,) * (3 - rows.ndim)], rtol=0, atol=2e-6)


def test_values_of_bfloat16_states_are_summed_in_float32():
    # 1 + 2^-9 is no bfloat16: a sum that is kept in bfloat16 loses it.
    hidden = jnp.asarray([[1.0, 2.0**-9]], jnp.bfloat16)
    head = {"kernel": jnp.ones(2, jnp.float32), "bias": jnp.zeros((), jnp.float32)}
    values = heads.head_values(head, hidden)
    assert values.dtype == jnp.float32
    assert values.tolist() == [1 + 2.0**-9]


def test_values_of_float64_states_are_float64():
    with jax.enable_x64(True):
        head = jax.tree.map(lambda x: x + 0.1, heads.zero_value_head(2))
        values = heads.head_values(head, jnp.asarray([[1.0, 2.0**-40]], jnp.float64))
        weight = float(np.float32(0.1))
        assert values.dtype == jnp.float64
        assert values.tolist() == [weight * (1 + 2.0**-40) + weight]


def test_a_label_head_is_the_column_of_the_label_and_its_bias():
    kernel = jnp.arange(6.0, dtype=jnp.float32).reshape(2, 3)
    assert heads.label_head({"kernel": kernel}, 1)["kernel"].tolist() == [1, 4]
    assert heads.label_head({"kernel": kernel}, 1)["bias"].item() == 0
    bias = jnp.asarray([5.0, 6.0, 7.0], jnp.float32)
    assert heads.label_head({"kernel": kernel, "bias": bias}, 1)["bias"].item() == 6


# -------------------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_classifier_of_every_family_gives_the_logits_of_transformers(name, save):
    reference = hf_classifier(name)
    tokens = np.random.default_rng(0).integers(3, 37, (2, 7))
    directory = save(reference)
    assert heads.open_classifier(str(directory), key="reward.model").labels == LABELS
    expected = theirs(reference, tokens)
    np.testing.assert_allclose(ours(directory, tokens), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_bias_of_the_score_is_read_and_a_language_model_head_beside_it_is_not(save):
    directory = save(hf_classifier("llama"))
    tokens = np.arange(3, 9)[None]
    plain = ours(directory, tokens)
    bias = np.asarray([1, 2, 3], np.float32)
    edit_tensors(directory, **{"score.bias": bias, "lm_head.weight": np.ones((37, 24), np.float32)})
    np.testing.assert_allclose(ours(directory, tokens), plain + bias, rtol=0, atol=1e-5)


def test_a_classifier_over_a_trunk_without_prefix_is_read(save):
    directory = save(hf_classifier("llama"))
    tokens = np.arange(3, 9)[None]
    plain, file = ours(directory, tokens), directory / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    assert np.array_equal(ours(directory, tokens), plain)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"score.weight": np.ones((2, 24), np.float32)}, ["score.weight", "[2, 24]", "[3, 24]"]),
        ({"score.weight": np.ones((24, 3), np.float32)}, ["score.weight", "[24, 3]", "[3, 24]"]),
        ({"score.weight": np.ones((3, 24), np.int32)}, ["score.weight", "int32"]),
        ({"model.norm.weight": None}, ["Missing tensors: model.norm.weight"]),
        ({"dense.weight": np.ones(3, np.float32)}, ["Unexpected tensors: dense.weight"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(save, changes, named):
    directory = save(hf_classifier("llama"))
    edit_tensors(directory, **changes)
    with pytest.raises(UserError) as error:
        ours(directory, np.ones((1, 2), np.int32))
    assert all(word in str(error.value) for word in named), error.value


def test_a_causal_model_is_no_classifier_and_the_field_of_the_config_is_named(hf_directory, tmp_path):
    with pytest.raises(UserError, match=r"reward\.model: .*score\.weight.*LlamaForCausalLM"):
        heads.open_classifier(str(hf_directory("llama")[1]), key="reward.model")
    with pytest.raises(UserError, match=r"^reward\.model: .*absent"):
        heads.open_classifier(str(tmp_path / "absent"), key="reward.model")


# ------------------------------------------------------------------------------------------------------------- critics


def policy_of(directory):
    model = hf_io.open_model(str(directory))
    return model, hf_io.load_params(model.path, model.config, model.spec)


def test_by_default_the_critic_is_a_copy_of_the_policys_trunk_with_a_zero_head(hf_directory):
    policy, params = policy_of(hf_directory("llama")[1])
    spec, critic = heads.load_critic(None, policy, params)
    expected = {name: leaf for name, leaf in params.items() if name != "head"}
    assert spec == heads.critic_spec(policy.spec)
    assert set(critic) == {"trunk", "head"}
    assert same(critic["trunk"], expected)
    assert same(critic["head"], heads.zero_value_head(24))
    # The policy's buffers are donated to every update: the copy must outlive them.
    expected = jax.tree.map(np.array, expected)
    jax.tree.map(lambda leaf: leaf.delete(), params)
    assert same(critic["trunk"], expected)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_a_causal_model_gives_its_trunk_and_a_zero_head(name, hf_directory, save):
    policy, params = policy_of(hf_directory("llama")[1])
    directory = hf_directory(name)[1]
    other, other_params = policy_of(directory)
    spec, critic = heads.load_critic(str(directory), policy, params)
    assert spec == heads.critic_spec(other.spec)
    assert same(critic["trunk"], {key: leaf for key, leaf in other_params.items() if key != "head"})
    assert same(critic["head"], heads.zero_value_head(24))


def test_a_classifier_gives_its_trunk_and_its_score_row_so_values_are_its_scores(hf_directory, save):
    policy, params = policy_of(hf_directory("llama")[1])
    reference = hf_classifier("qwen3", labels=("score",))
    spec, critic = heads.load_critic(str(save(reference)), policy, params)
    tokens = np.random.default_rng(1).integers(3, 37, (2, 5))
    hidden = hidden_states(critic["trunk"], jnp.asarray(tokens, jnp.int32), jnp.ones((2, 5), bool), spec=spec)
    expected = theirs(reference, tokens)[..., 0]
    values = heads.head_values(critic["head"], hidden)
    np.testing.assert_allclose(values, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert jax.tree.map(jnp.shape, critic["head"]) == {"kernel": (24,), "bias": ()}


def test_a_critic_with_several_labels_is_refused_with_them(hf_directory, save):
    policy, params = policy_of(hf_directory("llama")[1])
    with pytest.raises(UserError, match=r"critic\.path.*3 labels \(bad, fair, good\).*one label"):
        heads.load_critic(str(save(hf_classifier("llama"))), policy, params)


def test_a_critic_that_reads_other_token_ids_is_refused(hf_directory, save, tiny_model):
    policy, params = policy_of(hf_directory("llama")[1])
    with pytest.raises(UserError, match=r"critic\.path.*tokenizers.*differ in 37 tokens \('<unk>' is None and not 0"):
        heads.load_critic(str(tiny_model), policy, params)


def test_a_critic_may_know_further_tokens_but_needs_a_row_for_each_of_the_policys(hf_directory, save, tokenizer):
    policy, params = policy_of(hf_directory("llama")[1])
    more = type(tokenizer).from_pretrained(hf_directory("llama")[1])
    more.add_special_tokens({"pad_token": "<pad>"})
    wide = hf_classifier("llama", labels=("score",), vocab_size=38)
    assert heads.load_critic(str(save(wide, "wide", more)), policy, params)[0].vocab_size == 38
    with pytest.raises(UserError, match=r"critic\.path.*36 rows.* 37"):
        heads.load_critic(str(save(hf_classifier("llama", vocab_size=36), "narrow")), policy, params)


def test_critics_are_split_as_policies_are():
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}

    def axes(path, *shape):
        return sharding.param_spec(mesh, path, shape)

    assert axes("critic/head/kernel", 24) == PartitionSpec("fsdp")
    assert axes("critic/head/kernel", 23) == PartitionSpec(None)
    assert axes("critic/head/bias") == PartitionSpec()
    assert axes("score/kernel", 24, 1) == PartitionSpec("fsdp", None)
    for path in ("layer_0/attn/q/kernel", "layer_0/mlp/down/kernel", "layer_0/attn/q/bias", "embed"):
        shape = (24,) if path.endswith("bias") else (24, 32)
        assert axes(f"critic/trunk/{path}", *shape) == axes(path, *shape) != PartitionSpec(*(None,) * len(shape))
