"""A config's fields are honoured or refused by name; nothing that changes a logit is passed over."""

import dataclasses

import numpy as np
import pytest
from transformers import GPT2Config, LlamaConfig, MistralConfig

from ppo_jax.errors import UserError
from ppo_jax.models.families import FAMILIES, spec_of, tensors_of
from tests.conftest import GPT2, LLAMA, LLAMA3_ROPE


def llama(**changes):
    return LlamaConfig(**(LLAMA | changes))


def gpt2(**changes):
    return GPT2Config(**(GPT2 | changes))


def test_fields_of_llama_become_the_spec():
    spec = spec_of(llama(head_dim=10, attention_bias=True, rms_norm_eps=1e-3, hidden_act="gelu_pytorch_tanh"))
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.width, spec.mlp_width) == (4, 2, 10, 24, 40)
    assert (spec.norm, spec.norm_eps, spec.activation, spec.gated_mlp) == ("rms", 1e-3, "gelu_tanh", True)
    assert (spec.qkv_bias, spec.out_bias, spec.mlp_bias, spec.tied_head) == (True, True, False, False)
    assert [layer.attention_scale for layer in spec.layers] == pytest.approx([10**-0.5] * 2)
    assert (spec.vocab_size, spec.max_positions) == (37, 512)


def test_fields_of_gpt2_become_the_spec():
    spec = spec_of(gpt2(n_layer=3, scale_attn_by_inverse_layer_idx=True, layer_norm_epsilon=1e-3))
    assert [layer.attention_scale for layer in spec.layers] == pytest.approx([6**-0.5 / i for i in (1, 2, 3)])
    assert (spec.norm, spec.norm_eps, spec.activation, spec.gated_mlp) == ("layer", 1e-3, "gelu_tanh", False)
    assert (spec.mlp_width, spec.kv_heads, spec.rope, spec.tied_head) == (96, 4, None, True)
    assert spec_of(gpt2(scale_attn_weights=False)).layers[0].attention_scale == 1.0


# Every field of a config, changed; those on the right change the mathematics.
CHANGES = [
    (llama, {"rms_norm_eps": 1e-2}),
    (llama, {"num_key_value_heads": 1}),
    (llama, {"head_dim": 10}),
    (llama, {"attention_bias": True}),
    (llama, {"mlp_bias": True}),
    (llama, {"tie_word_embeddings": True}),
    (llama, {"hidden_act": "relu"}),
    (llama, {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    (llama, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    (llama, {"rope_parameters": LLAMA3_ROPE}),
    (gpt2, {"layer_norm_epsilon": 1e-2}),
    (gpt2, {"activation_function": "gelu"}),
    (gpt2, {"scale_attn_weights": False}),
    (gpt2, {"scale_attn_by_inverse_layer_idx": True}),
    (gpt2, {"tie_word_embeddings": False}),
    (gpt2, {"n_inner": 40}),
]


@pytest.mark.parametrize(("make", "change"), CHANGES)
def test_every_field_that_changes_the_mathematics_changes_the_spec(make, change):
    assert spec_of(make(**change)) != spec_of(make())


def frequencies(**rope):
    return np.array(spec_of(llama(rope_parameters=rope)).rope.inverse_frequencies)


def test_rope_frequencies_are_powers_of_theta_in_float64():
    expected = [500.0 ** (-2 * i / 6) for i in range(3)]
    np.testing.assert_allclose(frequencies(rope_type="default", rope_theta=500.0), expected, rtol=1e-15)
    np.testing.assert_allclose(
        frequencies(rope_type="linear", rope_theta=500.0, factor=4.0), np.array(expected) / 4, rtol=1e-15
    )


def test_llama3_frequencies_are_those_of_transformers():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # Wavelengths from 6 to 60,000: short ones are kept, long ones divided, some lie on the ramp.
    config = llama(head_dim=64, rope_parameters=LLAMA3_ROPE | {"original_max_position_embeddings": 8192})
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert attention_factor == 1.0
    ours = np.array(spec_of(config).rope.inverse_frequencies)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)
    ratio = ours / 10000.0 ** (-np.arange(32) / 32)
    assert (ratio > 0.999).any()  # kept
    assert ((ratio > 0.13) & (ratio < 0.99)).any()  # on the ramp
    assert (ratio < 0.126).any()  # divided


def test_the_old_spelling_of_rope_scaling_is_understood():
    old = LlamaConfig.from_dict(LLAMA | {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = llama(rope_parameters={"rope_type": "linear", "rope_theta": 77.0, "factor": 2.0})
    assert spec_of(old) == spec_of(new) != spec_of(llama())


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (lambda: MistralConfig(), ["model_type 'mistral'", "supported are gpt2, llama"]),
        (lambda: llama(hidden_act="quick_gelu"), ["hidden_act is 'quick_gelu'", "silu"]),
        (
            lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            ["rope_type 'dynamic'", "default, linear, llama3"],
        ),
        (
            lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            ["partial_rotary_factor"],
        ),
        (lambda: llama(sliding_window=128), ["sliding_window=128", "model.ignored_config_fields"]),
        (lambda: llama(logit_scale=0.0), ["logit_scale=0.0"]),
        (lambda: llama(rope_interleaved=True), ["rope_interleaved=True"]),
        (lambda: gpt2(add_cross_attention=True), ["add_cross_attention=True"]),
        (lambda: llama(b_factor=2, a_factor=1), ["a_factor=1, b_factor=2"]),
    ],
)
def test_what_the_decoder_does_not_know_is_refused_by_name(config, parts):
    with pytest.raises(UserError) as caught:
        spec_of(config())
    for part in parts:
        assert part in str(caught.value)


def test_unknown_fields_that_are_off_or_that_the_user_vouches_for_are_accepted():
    plain = spec_of(llama())
    assert spec_of(llama(sliding_window=None, use_flash=False)) == plain
    assert spec_of(llama(my_note="x", other=3), ignored_fields=("my_note", "other")) == plain
    with pytest.raises(UserError, match="other=3"):
        spec_of(llama(my_note="x", other=3), ignored_fields=("my_note",))


def test_fields_that_change_no_logit_are_accepted():
    assert spec_of(llama(attention_dropout=0.3, initializer_range=0.5, use_cache=False)) == spec_of(llama())
    assert spec_of(gpt2(attn_pdrop=0.3, resid_pdrop=0.0, reorder_and_upcast_attn=True)) == spec_of(gpt2())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_parameter_is_in_exactly_one_tensor(make):
    import jax

    from ppo_jax.models.decoder import abstract_params

    for change in ({}, {"tie_word_embeddings": make is llama}, {"attention_bias": True} if make is llama else {}):
        config = make(**change)
        spec = spec_of(config)
        paths = {
            "/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(spec))
        }
        rows = tensors_of(config, spec, paths)
        held = [path for row in rows for path in row.params]
        assert sorted(held) == sorted(paths)
        assert len({row.name for row in rows}) == len(rows)
        assert any(row.name == "lm_head.weight" for row in rows) != spec.tied_head


def test_specs_are_hashable_and_equal_by_value():
    assert hash(spec_of(llama())) == hash(spec_of(llama()))
    assert dataclasses.replace(spec_of(llama()), norm_eps=1.0) != spec_of(llama())
    assert set(FAMILIES) == {"llama", "gpt2"}
