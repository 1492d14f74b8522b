"""Adapters against `peft`: the same modules, the same logits, the same gradients, and directories both ways."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from parity.models import MODELS, hf_model
from ppo_jax.errors import UserError
from ppo_jax.export import merged_model
from ppo_jax.models import hf_io, lora, peft_io
from ppo_jax.models.decoder import cast, head_logits, hidden_states

# Modules with several layers of ours (c_attn, qkv_proj, gate_up_proj, and query_key_value head by head), stored (in,
# out) and (out, in), heads that are tied and that are not. GPT-2 of transformers alone is float64 throughout.
CASES = {
    "llama": ("float32", ["q_proj", "v_proj", "down_proj", "lm_head"]),
    "llama-tied": ("float32", ["k_proj", "o_proj", "gate_proj", "up_proj", "lm_head"]),
    "gpt2": ("float64", ["c_attn", "attn.c_proj", "mlp.c_fc", "lm_head"]),
    "phi3": ("float32", ["qkv_proj", "gate_up_proj"]),
    "pythia": ("float32", ["query_key_value", "lm_head"]),
}
# In units of the largest number: a few hundred roundings of either type. What is missing is off by far more.
BOUNDS = {"float32": 5e-5, "float64": 1e-12}
# That heads are tied, that Conv1D stores (in, out), and that peft asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def relative_error(found, expected):
    return float(np.max(np.abs(np.asarray(found) - np.asarray(expected))) / np.max(np.abs(np.asarray(expected))))


@pytest.fixture(scope="module")
def adapted(hf_directory, tmp_path_factory):
    """(model of peft with a random adapter, its directory, the base as ModelDirectory) of a name in CASES."""

    @functools.cache
    def make(name):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=CASES[name][1], init_lora_weights=False)
        model = peft.get_peft_model(hf_model(name), config)
        directory = tmp_path_factory.mktemp(f"{name}-adapter")
        model.save_pretrained(directory)
        return model.eval(), directory, hf_io.open_model(str(hf_directory(name)[1]))

    return make


def weighted_logits(model, tokens, weights):
    """Logits of a torch model, and the gradient of their weighted sum with respect to every half of the adapter."""
    logits = model(input_ids=torch.tensor(tokens)).logits
    model.zero_grad()
    (logits * torch.tensor(weights).to(logits.dtype)).sum().backward()
    return logits.detach().numpy(), {n: p.grad.numpy() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_peft(name, adapted):
    dtype, _ = CASES[name]
    reference, directory, model = adapted(name)
    rng = np.random.default_rng(0)
    tokens, weights = rng.integers(0, 37, (2, 9)).astype(np.int32), rng.normal(size=(2, 9, 37))
    logits, gradients = weighted_logits(reference.to(getattr(torch, dtype)), tokens, weights)
    with jax.enable_x64(dtype == "float64"):
        opened = peft_io.open_adapter(str(directory), model)
        weights_of_lora = cast(peft_io.load_lora(opened, model), dtype)
        base = cast(hf_io.load_params(model.path, model.config, model.spec), dtype)

        def ours(adapter_weights):
            params = lora.policy_params({"lora": adapter_weights}, base, opened.adapter)
            hidden = hidden_states(params, jnp.asarray(tokens), jnp.ones(tokens.shape, bool), spec=model.spec)
            found = head_logits(params, hidden, spec=model.spec)
            return jnp.sum(found * jnp.asarray(weights, dtype)), found

        found_gradients, found = jax.jit(jax.grad(ours, has_aux=True))(weights_of_lora)
    reference.to(torch.float32)
    assert found.dtype == dtype
    assert relative_error(found, logits) < BOUNDS[dtype]
    assert len(gradients) == 2 * len(opened.adapter.modules)
    for module, halves in found_gradients.items():
        for ours_name, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            expected = gradients[f"base_model.model.{module}.{theirs}.default.weight"].T
            assert relative_error(halves[ours_name], expected) < BOUNDS[dtype], (module, theirs)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_that_is_exported_gives_its_logits_in_peft_and_merged_in_transformers(name, adapted, tmp_path):
    reference, directory, model = adapted(name)
    opened = peft_io.open_adapter(str(directory), model)
    weights = jax.device_get(peft_io.load_lora(opened, model))
    peft_io.save_adapter(tmp_path / "adapter", opened.adapter, weights, base=str(model.path))
    base = jax.device_get(hf_io.load_params(model.path, model.config, model.spec))
    hf_io.save_model(tmp_path / "policy", *merged_model(model, base, {"lora": weights}, opened.adapter))

    tokens = torch.tensor(np.random.default_rng(1).integers(0, 37, (2, 9)))
    plain, again, merged = (
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
        for path in (model.path, model.path, tmp_path / "policy")
    )
    embedding = plain.get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected, unadapted = reference(input_ids=tokens).logits, plain(input_ids=tokens).logits
        assert (expected - unadapted).abs().max() > 0.1
        assert torch.equal(loaded(input_ids=tokens).logits, expected)
        assert relative_error(merged(input_ids=tokens).logits, expected) < BOUNDS["float32"]


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "qwen3", "gemma2", "phi3", "pythia", "olmo2", "starcoder2"])
@pytest.mark.parametrize("targets", ["all-linear", r".*\.(0|1)\..*(q_proj|c_attn|query_key_value|qkv_proj)"])
def test_targets_are_the_modules_that_peft_finds(name, targets, hf_directory):
    model = hf_io.open_model(str(hf_directory(name)[1]))
    torch_model = peft.get_peft_model(hf_model(name), peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    theirs = {n.removeprefix("base_model.model.") for n, m in torch_model.named_modules() if hasattr(m, "lora_A")}
    found = lora.make_adapter(model.config, model.spec, rank=1, scale=1.0, targets=targets, where="targets")
    assert {module.name for module in found.modules} == theirs
    # What is written for peft means the same modules again.
    again = peft.LoraConfig(target_modules=list(found.targets))
    torch_model = peft.get_peft_model(hf_model(name), again)
    assert {
        n.removeprefix("base_model.model.") for n, m in torch_model.named_modules() if hasattr(m, "lora_A")
    } == theirs


def test_every_linear_module_of_every_family_can_have_an_adapter(hf_directory):
    for name in MODELS:
        directory = hf_directory(name)[1]
        model = hf_io.open_model(str(directory))
        linear = torch.nn.Linear
        theirs = {n for n, m in hf_model(name).named_modules() if isinstance(m, linear) or type(m).__name__ == "Conv1D"}
        assert {module.name for module in lora.linear_modules(model.config, model.spec)} == theirs, name


def adapter_on(tiny, *targets, rank=2, scale=0.5):
    model = tiny.model
    return lora.make_adapter(model.config, model.spec, rank=rank, scale=scale, targets=targets, where="lora.targets")


def test_the_base_is_laid_under_and_not_copied(tiny):
    adapter = adapter_on(tiny, "all-linear", "lm_head")
    laid = lora.laid_over(tiny.params, lora.first_lora(adapter, seed=0), adapter)
    kept = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(laid) if "lora" not in str(path)}
    of_base = dict(jax.tree_util.tree_leaves_with_path(tiny.params))
    assert kept.keys() == of_base.keys()
    assert all(leaf is of_base[path] for path, leaf in kept.items())
    assert len(jax.tree.leaves(laid)) == len(kept) + 2 * len(adapter.modules)


def test_a_fresh_adapter_adds_nothing_and_its_draws_depend_on_seed_and_module_alone(tiny):
    few, all_of_them = adapter_on(tiny, "q_proj"), adapter_on(tiny, "all-linear", "lm_head")
    first, more, other = (lora.first_lora(x, seed=s) for x, s in ((few, 0), (all_of_them, 0), (few, 1)))
    assert set(first) < set(more)
    drawn = [module["lora_a"] for module in more.values()]
    for name, halves in first.items():
        np.testing.assert_array_equal(halves["lora_a"], more[name]["lora_a"])
        assert not np.array_equal(halves["lora_a"], other[name]["lora_a"])
    assert all(not np.any(module["lora_b"]) for module in more.values())
    # torch's Linear and peft: uniform in ±1/sqrt(in).
    for a in drawn:
        assert 0.8 * a.shape[0] ** -0.5 < float(jnp.max(jnp.abs(a))) < a.shape[0] ** -0.5
    same_shape = [a for a in drawn if a.shape == drawn[0].shape]
    assert len(same_shape) > 2
    assert all(not np.array_equal(same_shape[0], a) for a in same_shape[1:])


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        (["q_porj"], "'q_porj' is no linear layer of this llama model; known are down_proj, gate_proj, k_proj"),
        (["embed_tokens", "q_proj"], "'embed_tokens' is no"),
        (["proj"], "'proj' is no"),  # the end of a name begins at a dot
        (".*nothing.*", "nothing is no linear layer"),
        ("(", "no regular expression"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused_with_the_known_ones(tiny, targets, part):
    with pytest.raises(UserError) as caught:
        lora.make_adapter(tiny.model.config, tiny.model.spec, rank=1, scale=1.0, targets=targets, where="lora.targets")
    assert str(caught.value).startswith("lora.targets: ")
    assert part in str(caught.value)


@pytest.fixture
def directory_with(adapted, tmp_path):
    """An adapter directory of the model "llama" whose config or tensors are changed; ... removes."""
    from safetensors.numpy import load_file, save_file

    def make(tensors=None, **fields):
        _, source, _ = adapted("llama")
        values = json.loads((source / "adapter_config.json").read_text()) | fields
        values = {key: value for key, value in values.items() if value is not ...}
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        changed = load_file(source / "adapter_model.safetensors") | (tensors or {})
        kept = {key: value for key, value in changed.items() if value is not ...}
        save_file(kept, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


@pytest.mark.parametrize(
    "field",
    [
        {"use_dora": True}, {"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}, {"modules_to_save": ["w"]},
        {"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 4}}, {"fan_in_fan_out": True},
        {"layers_to_transform": [1]}, {"layers_to_transform": 0}, {"layers_pattern": "layers"},
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"}, {"init_lora_weights": "mica"}, {"loftq_config": {"loftq_bits": 4}},
        {"corda_config": {"cache_file": None}}, {"layer_replication": [[0, 2]]}, {"exclude_modules": ["v_proj"]},
        {"trainable_token_indices": [3]}, {"target_parameters": ["w"]}, {"use_qalora": True},
        {"alora_invocation_tokens": [1]}, {"ensure_weight_tying": True}, {"task_type": "SEQ_CLS"},
        {"peft_type": "LOHA"}, {"peft_type": ...}, {"r": 0}, {"r": True}, {"r": ...}, {"lora_alpha": -1},
        {"lora_alpha": "16"}, {"lora_alpha": 10**400}, {"lora_alpha": 1e30}, {"r": 10**400}, {"target_modules": None},
        {"target_modules": [1]}, {"nobody_knows": 1},
    ],
    ids="{!s:.60}".format,
)  # fmt: skip
def test_what_an_adapter_asks_for_beyond_two_matrices_is_refused_by_name(field, directory_with, adapted):
    with pytest.raises(UserError, match=f"adapter_config.json asks for what is not offered here: {next(iter(field))}="):
        peft_io.open_adapter(str(directory_with(**field)), adapted("llama")[2])


def test_every_field_that_peft_knows_is_read_listed_or_off():
    """A new field of peft that is on by default would stop every adapter; one that is off is refused when it is on."""
    fields = peft.LoraConfig(task_type="CAUSAL_LM").to_dict() | {"target_modules": ["q_proj"]}
    on = {name for name, value in fields.items() if value not in (None, False, "") and value not in ({}, [])}
    known = {"r", "lora_alpha", "target_modules", *peft_io.ONLY} | peft_io.HARMLESS
    assert on <= known


def test_the_scale_is_alpha_over_the_rank_or_its_root_as_the_adapter_says(directory_with, adapted):
    model = adapted("llama")[2]
    scales = [
        peft_io.open_adapter(str(directory_with(**fields)), model).adapter.scale
        for fields in ({}, {"use_rslora": True}, {"lora_alpha": 1.5, "init_lora_weights": "gaussian"})
    ]
    assert scales == pytest.approx([5 / 3, 5 / 3**0.5, 0.5], rel=1e-12)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.lm_head.base_layer.weight"


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({Q: ...}, f"Missing tensors: {Q}. Unexpected tensors: none"),
        ({Q: np.zeros((4, 24), np.float32)}, r"float32\[4, 24\], expected floating-point \[3, 24\]"),
        ({Q: np.zeros((3, 24), np.int32)}, r"int32\[3, 24\]"),
        ({Q.replace("lora_A", "lora_magnitude_vector"): np.zeros(3, np.float32)}, "Unexpected tensors: .*magnitude"),
        ({HEAD: np.zeros((37, 24), np.float32)}, "Unexpected tensors: .*base_layer"),  # a base that is another
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tensors, part, directory_with, adapted):
    model = adapted("llama")[2]
    with pytest.raises(UserError, match=part):
        peft_io.load_lora(peft_io.open_adapter(str(directory_with(tensors)), model), model)


def test_a_directory_that_holds_no_adapter_or_a_pickle_is_refused(directory_with, adapted, tmp_path):
    model = adapted("llama")[2]
    with pytest.raises(UserError, match="no PEFT adapter"):
        peft_io.open_adapter(str(model.path), model)
    directory = directory_with()
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        peft_io.load_lora(peft_io.open_adapter(str(directory), model), model)


@pytest.mark.parametrize("text", ["{", '{"a":' * 100_000, '{"r": %s}' % ("9" * 5000), "\ud800"], ids=len)
def test_an_adapter_config_that_cannot_be_read_is_no_traceback(text, directory_with, adapted):
    directory = directory_with()
    (directory / "adapter_config.json").write_text(text, errors="surrogatepass")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read as JSON: "):
        peft_io.open_adapter(str(directory), adapted("llama")[2])


def test_an_adapter_config_without_permission_is_no_traceback(directory_with, adapted, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    directory, model = directory_with(), adapted("llama")[2]
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read as JSON: .*Permission denied"):
        peft_io.open_adapter(str(directory), model)


def test_what_a_user_put_beside_an_adapter_is_kept_under_another_name(adapted, tmp_path, caplog):
    model = adapted("llama")[2]
    made = lora.make_adapter(model.config, model.spec, rank=1, scale=1.0, targets=["q_proj"], where="targets")
    weights = lora.first_lora(made, seed=0)
    for _ in range(2):
        peft_io.save_adapter(tmp_path / "adapter", made, weights, base="b")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    peft_io.save_adapter(tmp_path / "adapter", made, weights, base="b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter.kept_1"]
    assert (tmp_path / "adapter.kept_1" / "notes.txt").read_text() == "mine"
    assert peft_io.open_adapter(str(tmp_path / "adapter"), model).adapter == made
    assert "adapter holds files of others (notes.txt); it is now adapter.kept_1" in caplog.text
