"""A config's fields are honoured or refused by name; nothing that changes a logit is passed over."""

import dataclasses

import pytest
from transformers import BloomConfig, Gemma3Config, GPT2Config, LlamaConfig

from parity.models import GPT2, LLAMA, MODELS, hf_config
from ppo_jax.errors import UserError
from ppo_jax.models.families import FAMILIES, family_of, spec_of, tensors_of


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
    assert (spec.mlp_width, spec.kv_heads, spec.learned_positions, spec.tied_head) == (96, 4, True, True)
    assert spec_of(gpt2(scale_attn_weights=False)).layers[0].attention_scale == 1.0


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (lambda: BloomConfig(), ["model_type 'bloom'", "supported are gemma2, gemma3_text, gpt2"]),
        (lambda: Gemma3Config(), ["multimodal", "gemma3_text"]),
        (lambda: llama(hidden_act="quick_gelu"), ["hidden_act is 'quick_gelu'", "silu"]),
        (
            lambda: llama(rope_parameters={"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4}),
            ["rope_type 'proportional'", "default, linear, dynamic, llama3, yarn, longrope"],
        ),
        (
            lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            ["partial_rotary_factor=0.5"],
        ),
        (lambda: llama(is_causal=False), ["is_causal=False"]),
        (lambda: gpt2(is_causal=False), ["is_causal=False"]),
        (lambda: hf_config("mistral", sliding_window=0), ["sliding_window=0"]),
        (lambda: hf_config("qwen2", layer_types=["full_attention", "chunked_attention"]), ["layer_types"]),
        (
            lambda: hf_config("qwen2-yarn", layer_types=["full_attention", "sliding_attention"]),
            ["layer_types", "window"],
        ),
        (lambda: hf_config("smollm3", no_rope_layers=[1], layer_types=["full_attention"] * 2), ["no_rope_layers=[1]"]),
        (
            lambda: hf_config("smollm3-windows", use_sliding_window=False, layer_types=["sliding_attention"] * 2),
            ["use_sliding_window=False"],
        ),
        (lambda: hf_config("gemma3", use_bidirectional_attention=True), ["use_bidirectional_attention=True"]),
        (lambda: hf_config("gemma3", attn_logit_softcapping=5.0), ["attn_logit_softcapping=5.0"]),
        (lambda: hf_config("pythia", head_dim=10), ["head_dim=10"]),
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


def test_what_older_code_left_in_published_starcoder2_files_is_understood():
    leftovers = {
        "rms_norm_eps": 1e-6,
        "layer_norm_epsilon": 1e-6,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
    }
    assert spec_of(hf_config("starcoder2", **leftovers)) == spec_of(hf_config("starcoder2"))
    with pytest.raises(UserError, match="scale_attn_weights=False"):
        spec_of(hf_config("starcoder2", scale_attn_weights=False))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_exactly_one_tensor(name):
    import jax

    from ppo_jax.models.decoder import abstract_params

    config = hf_config(name)
    spec = spec_of(config)
    paths = {
        "/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(spec))
    }
    rows = tensors_of(config, spec, paths)
    held = [path for row in rows for path in row.params]
    assert sorted(held) == sorted(paths)
    assert len({row.name for row in rows}) == len(rows)
    assert any(row.name == family_of(config).head for row in rows) != spec.tied_head


def test_every_family_is_among_the_models_that_are_compared():
    assert {family for family, _ in MODELS.values()} == set(FAMILIES)


def test_specs_are_hashable_and_equal_by_value():
    assert hash(spec_of(llama())) == hash(spec_of(llama()))
    assert dataclasses.replace(spec_of(llama()), norm_eps=1.0) != spec_of(llama())
