"""Rope kinds against transformers' own functions, and in float64 where the value can be written down."""

import numpy as np
import pytest
from transformers import LlamaConfig, Phi3Config

from parity.models import DYNAMIC_ROPE, LINEAR_ROPE, LLAMA, LLAMA3_ROPE, LONG_ROPE, YARN_ROPE, hf_config
from ppo_jax.errors import UserError
from ppo_jax.models.families import spec_of
from ppo_jax.models.rope import RopeSpec, served_positions


def llama(**changes):
    return LlamaConfig(**(LLAMA | changes))


def rope_of(config) -> RopeSpec:
    rope = spec_of(config).layers[0].rope
    assert rope is not None
    return rope


def test_frequencies_are_powers_of_theta_in_float64():
    expected = np.array([500.0 ** (-2 * i / 8) for i in range(4)])
    plain = rope_of(llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    np.testing.assert_allclose(plain.inverse_frequencies, expected, rtol=1e-15)
    assert plain.attention_factor == 1.0
    linear = rope_of(llama(rope_parameters=dict(LINEAR_ROPE)))
    np.testing.assert_allclose(linear.inverse_frequencies, expected / 4, rtol=1e-15)


LONG = LONG_ROPE | {"short_factor": np.linspace(1, 3, 32).tolist(), "long_factor": [9.0] * 32}
KINDS = {
    "linear": LINEAR_ROPE,
    "dynamic": DYNAMIC_ROPE,
    # Wavelengths from 6 to 60,000: short ones are kept, long ones divided, some lie on the ramp.
    "llama3": LLAMA3_ROPE | {"original_max_position_embeddings": 8192},
    "yarn": YARN_ROPE,
    "yarn-plain": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn-untruncated": YARN_ROPE | {"truncate": False, "attention_factor": 0.7},
    "yarn-mscale": YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-one-channel": YARN_ROPE | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    # Both ends of the ramp lie outside of the channels, and are moved to the first and to the last one.
    "yarn-wide-ramp": YARN_ROPE | {"beta_fast": 32.0, "beta_slow": 1e-5},
    "longrope": LONG,
    "longrope-factor": LONG | {"factor": 16.0},
    "longrope-attention-factor": LONG | {"attention_factor": 1.3},
    "longrope-not-longer": LONG | {"factor": 1.0},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_scaled_frequencies_and_factors_are_those_of_transformers(kind):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = llama(head_dim=64, max_position_embeddings=2048, rope_parameters=dict(KINDS[kind]))
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[KINDS[kind]["rope_type"]](config, "cpu")
    ours = rope_of(config)
    np.testing.assert_allclose(ours.inverse_frequencies, frequencies.numpy(), rtol=2e-6)
    assert ours.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_llama3_and_yarn_keep_some_frequencies_divide_others_and_blend_between():
    for kind, theta, factor in (("llama3", 10000.0, 8.0), ("yarn", 500.0, 8.0)):
        ours = rope_of(llama(head_dim=64, max_position_embeddings=512, rope_parameters=dict(KINDS[kind])))
        ratio = np.array(ours.inverse_frequencies) / theta ** (-np.arange(32) / 32)
        assert (ratio > 0.999).any()
        assert ((ratio > 1.1 / factor) & (ratio < 0.99)).any()
        assert (ratio < 1.001 / factor).any()


def test_a_share_of_each_head_is_rotated_where_the_family_can():
    for name, share, channels in (("phi3", 0.5, 4), ("pythia", 0.25, 2), ("gpt-neox-sequential", 0.5, 4)):
        rope = rope_of(hf_config(name))
        theta = hf_config(name).rope_parameters["rope_theta"]
        assert channels == share * spec_of(hf_config(name)).head_dim
        np.testing.assert_allclose(
            rope.inverse_frequencies, [theta ** (-2 * i / channels) for i in range(channels // 2)]
        )


def test_local_and_global_layers_have_ropes_of_their_own_and_some_have_none():
    local, whole = spec_of(hf_config("gemma3")).layers
    assert (local.window, whole.window) == (16, None)
    np.testing.assert_allclose(local.rope.inverse_frequencies, [1e4 ** (-i / 4) for i in range(4)])
    np.testing.assert_allclose(whole.rope.inverse_frequencies, [1e6 ** (-i / 4) for i in range(4)])
    assert [layer.rope is None for layer in spec_of(hf_config("smollm3")).layers] == [False, True]


def test_longrope_serves_the_positions_of_its_short_factors_only():
    assert spec_of(hf_config("phi3-longrope")).max_positions == 300
    assert spec_of(hf_config("llama-longrope")).max_positions == 300
    assert spec_of(hf_config("phi3")).max_positions == spec_of(hf_config("llama-dynamic")).max_positions == 512
    assert served_positions({"rope_type": "longrope", "original_max_position_embeddings": 900}, 512) == 512


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}, "need factor, a number above 0; got 0.0"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": "4"}, "need factor, a number above 0; got '4'"),
        (LONG_ROPE | {"short_factor": [1.0]}, "short_factor of rope_parameters has 1 numbers, but 4 pairs"),
        (YARN_ROPE | {"mrope_section": [1, 1, 1]}, "mrope_section"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_parameters_that_make_no_sense_are_refused_by_name(parameters, part):
    with pytest.raises(UserError, match=r"config\.json") as caught:
        spec_of(llama(rope_parameters=dict(parameters)))
    assert part in str(caught.value)


def test_the_old_spellings_are_understood():
    old = LlamaConfig.from_dict(LLAMA | {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = llama(rope_parameters={"rope_type": "linear", "rope_theta": 77.0, "factor": 2.0})
    assert spec_of(old) == spec_of(new) != spec_of(llama())
    scaling = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0] * 4}
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "max_position_embeddings": 512}
    phi = Phi3Config(**sizes, rope_scaling=scaling, original_max_position_embeddings=300)
    assert spec_of(phi).max_positions == 300
