"""Every family of the twin: float32 logits against transformers; float64 logits and gradients against ppo_jax."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, LlamaConfig

from parity.models import LLAMA, MODELS, hf_config, hf_model
from parity.stacks import zero_gradients
from ppo_jax.models.families import FAMILIES as FAMILIES_OF_PPO_JAX
from ppo_jax.models.families import spec_of
from ppo_torch_ref.model import FAMILIES, Decoder, load_model, new_model, token_logits
from tests.float64_runs import ragged_batch
from tests.test_rope import KINDS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are faster alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def twin_of(name, dtype=torch.float32):
    """The twin with the weights of `hf_model`, without the way through a file; gpt_neox's head has two names."""
    weights = {name.replace("embed_out", "lm_head"): x.to(dtype) for name, x in hf_model(name).state_dict().items()}
    model = new_model(hf_config(name)).to(dtype)
    model.load_state_dict({own: weights[own.replace("embed_out", "lm_head")] for own in model.state_dict()})
    return model


def batch():
    """Tokens and mask of three left-padded sequences, of 270 tokens, 9 and 1."""
    tokens, mask, _ = ragged_batch()
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def test_the_families_are_those_of_ppo_jax():
    assert FAMILIES.keys() == FAMILIES_OF_PPO_JAX.keys()


@pytest.mark.parametrize("name", MODELS)
def test_float32_logits_are_those_of_transformers(name, hf_directory):
    tokens, mask = batch()
    theirs, directory = hf_directory(name)
    with torch.no_grad():
        expected, found = (token_logits(model, tokens, mask)[mask] for model in (theirs, load_model(directory)))
    scale = expected.abs().max()
    assert scale > 1  # a dead model would prove nothing
    assert (found - expected).abs().max() < 2e-5 * scale


@pytest.fixture(scope="module")
def float64_errors(tmp_path_factory):
    file = tmp_path_factory.mktemp("float64") / "errors.json"
    subprocess.run([sys.executable, "-m", "tests.float64_runs", str(file), *MODELS], check=True, timeout=900)
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", MODELS)
def test_float64_logits_and_gradients_are_those_of_ppo_jax(name, float64_errors):
    """A float32 cast in either leaves 1e-7; 6e-14 and 9e-15 are the largest that were seen."""
    assert float64_errors[name]["logits"] < 1e-12
    assert float64_errors[name]["gradients"] < 1e-13


def test_a_float32_cast_inside_the_norms_is_seen(tmp_path):
    plant = "from ppo_torch_ref import layers; layers.at_least_float32 = layers.Tensor.float"
    run = "import sys; from tests import float64_runs; float64_runs.main(*sys.argv[1:])"
    file, x64 = tmp_path / "errors.json", {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", f"{plant}; {run}", str(file), "llama"], check=True, env=os.environ | x64)
    errors = json.loads(file.read_text())["llama"]
    assert errors["logits"] > 1e-8
    assert errors["gradients"] > 1e-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_rotations_are_those_of_ppo_jax_to_float64(kind):
    """On heads of 64 channels, where every branch of every kind is taken; ppo_jax's are those of transformers."""
    config = LlamaConfig(
        **(LLAMA | {"head_dim": 64, "max_position_embeddings": 2048, "rope_parameters": dict(KINDS[kind])})
    )
    expected, found = spec_of(config).layers[0].rope, new_model(config).spec.layers[0].rope
    np.testing.assert_allclose(found.frequencies, expected.inverse_frequencies, rtol=1e-14)
    assert found.factor == pytest.approx(expected.attention_factor, rel=1e-15)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (lambda: BloomConfig(), ["model_type 'bloom'", "supported are gemma2, gemma3_text, gpt2"]),
        (lambda: LlamaConfig(**(LLAMA | {"hidden_act": "quick_gelu"})), ["hidden_act 'quick_gelu'", "silu"]),
        (
            lambda: LlamaConfig(
                **(LLAMA | {"rope_parameters": {"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4}})
            ),
            ["rope_type 'proportional'", "default, dynamic, linear, llama3, longrope, yarn"],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_the_twin_does_not_know_is_refused_by_name(config, parts):
    with pytest.raises(ValueError, match="is not supported") as caught:
        new_model(config())
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_stages_are_what_attention_mlp_and_block_give(name):
    """Where nothing is normalised after them, a block adds what its attention and its MLP give to what it reads."""
    model, outputs, reads = twin_of(name, torch.float64), {}, {}

    def keep(stage):
        def hook(_, inputs, output):
            reads[stage], outputs[stage] = inputs[0], output

        return hook

    for stage, module in model.stages().items():
        module.register_forward_hook(keep(stage))
    tokens, mask = batch()
    with torch.no_grad():
        logits = token_logits(model, tokens, mask)
        head = model.get_parameter(f"{model.spec.head}.weight" if model.has_own_head else embedding_of(model))
        bare = outputs["final_norm"] @ head.T
    assert list(outputs) == [
        *(stage for i in range(2) for stage in (f"layer_{i}/attn", f"layer_{i}/mlp", f"layer_{i}")),
        "final_norm",
    ]
    torch.testing.assert_close(reads["layer_1"], outputs["layer_0"], rtol=0, atol=0)
    torch.testing.assert_close(reads["final_norm"], outputs["layer_1"], rtol=0, atol=0)
    for i in range(2):
        added = outputs[f"layer_{i}/attn"] + outputs[f"layer_{i}/mlp"]
        if model.spec.norm_after_mlp is None:
            torch.testing.assert_close(outputs[f"layer_{i}"], reads[f"layer_{i}"] + added, rtol=0, atol=1e-12)
    cap = model.spec.logit_softcap
    torch.testing.assert_close(logits, bare if cap is None else cap * torch.tanh(bare / cap), rtol=0, atol=1e-12)


def embedding_of(model):
    return f"{model.spec.trunk}.{model.spec.embedding}.weight"


@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama-tied"])
def test_a_bare_trunk_with_buffers_and_a_second_tied_head_is_understood(name, hf_directory, tmp_path):
    _, directory = hf_directory(name)
    expected = load_model(directory)
    prefix, buffers = f"{expected.spec.trunk}.", {"h.0.attn.masked_bias": torch.zeros(1)}
    if expected.has_own_head:  # its weight lies beside the trunk, so that the trunk keeps its prefix
        stored = load_file(directory / "model.safetensors") | {
            "gpt_neox.layers.0.attention.bias": torch.zeros(1),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.zeros(1),
        }
    else:
        weights = load_file(directory / "model.safetensors")
        stored = {key.removeprefix(prefix): x for key, x in weights.items()} | buffers
        stored |= {"lm_head.weight": weights[embedding_of(expected)].clone()}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    found = load_model(tmp_path, dtype=torch.float64)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, x in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], x.double())


def test_a_tensor_that_does_not_fit_is_an_error(hf_directory, tmp_path):
    _, directory = hf_directory("qwen3")
    stored = load_file(directory / "model.safetensors")
    stored["model.layers.0.self_attn.q_norm.bias"] = torch.zeros(10)
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(RuntimeError, match=r"q_norm\.bias"):
        load_model(tmp_path)


QKV_BIASES = ("c_attn.bias", "query_key_value.bias", "q_proj.bias", "k_proj.bias", "v_proj.bias")
WITH_BIASES = [
    *("gpt2", "gpt2-scaled", "gpt2-untied", "pythia", "smollm3-windows", "starcoder2", "llama-biases", "qwen2-yarn"),
    *("gemma2-uncapped", "gemma3-linear", "olmo2-biases", "qwen3", "gpt-neox-sequential"),
]


@pytest.mark.parametrize("name", WITH_BIASES)
def test_gradients_that_are_zero_in_theory_are_and_no_other_bias_is(name):
    config, model = hf_config(name), twin_of(name, torch.float64)
    tokens, mask, weights = (torch.from_numpy(x) for x in ragged_batch())
    (weights * torch.log_softmax(token_logits(model, tokens, mask), dim=-1)).sum().backward()
    is_zero = zero_gradients(config, spec_of(config))
    gradients = {tensor: param.grad.numpy() for tensor, param in model.named_parameters()}
    assert is_zero.keys() == gradients.keys()
    largest = max(np.abs(x).max() for x in gradients.values())
    zeros = np.concatenate([x[is_zero[tensor]] for tensor, x in gradients.items()])
    assert np.abs(zeros).max(initial=0.0) < 1e-14 * largest
    others = [x[~is_zero[tensor]] for tensor, x in gradients.items() if tensor.endswith(QKV_BIASES)]
    if others:
        assert min(np.abs(x).min(initial=np.inf) for x in others) > 1e-10 * largest
    # GPT-2's keys know no positions, nor do those of SmolLM3's second layer; Pythia turns a quarter of their channels.
    counts = {"gpt2": 48, "gpt2-scaled": 48, "gpt2-untied": 48, "smollm3-windows": 16, "pythia": 36}
    assert zeros.size == counts.get(name, 0)


@pytest.mark.parametrize(
    "change", [{}, {"attention_softcap": 2.0}, {"qk_norm": "head"}], ids=["as it is", "cap", "norm"]
)
def test_a_cap_of_the_scores_and_a_norm_of_the_keys_give_every_key_bias_a_gradient(change):
    """No family has these where keys know no positions, but SmolLM3 could."""
    config, plain = hf_config("smollm3-windows"), twin_of("smollm3-windows", torch.float64)
    model = Decoder(replace(plain.spec, **change)).double()
    model.load_state_dict(plain.state_dict(), strict=False)
    tokens, mask, weights = (torch.from_numpy(x) for x in ragged_batch())
    (weights * torch.log_softmax(token_logits(model, tokens, mask), dim=-1)).sum().backward()
    bias = "model.layers.1.self_attn.k_proj.bias"
    is_zero = zero_gradients(config, replace(spec_of(config), **change))[bias]
    np.testing.assert_array_equal(is_zero, model.get_parameter(bias).grad.abs().numpy() < 1e-10)
    assert is_zero.all() == (not change)
