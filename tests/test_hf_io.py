"""Model directories in and out: identical tensors both ways, and nothing foreign, broken or partial is accepted."""

import json
import shutil
import stat
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity.models import MODELS, hf_model
from ppo_jax.errors import UserError
from ppo_jax.models import hf_io
from ppo_jax.models.families import family_of

ROUND_TRIPS = [(name, "float32") for name in MODELS] + [
    (name, dtype) for name in ("llama-tied", "gpt2-untied", "phi3", "pythia") for dtype in ("bfloat16", "float16")
]


@pytest.fixture
def copy_of(hf_directory, tmp_path):
    """A private copy of the saved directory of a name in `MODELS`."""

    def copy(name):
        return shutil.copytree(hf_directory(name)[1], tmp_path / name)

    return copy


def load(directory, dtype=jnp.float32, ignored=()):
    model = hf_io.open_model(str(directory), ignored_config_fields=ignored)
    return model, hf_io.load_params(model.path, model.config, model.spec, dtype=dtype)


def edit_json(file, **changes):
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(directory, **changes):
    file = directory / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


def assert_same_tensors(model, other):
    import torch

    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def same_params(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    return all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


# ---------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(("name", "dtype"), ROUND_TRIPS)
def test_a_saved_model_is_loaded_by_transformers_with_identical_tensors(name, dtype, hf_directory, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    reference, tokenizer_from = hf_model(name).to(getattr(torch, dtype)), hf_directory(name)[1]
    source, target = tmp_path / "source", tmp_path / "deep" / "policy"
    reference.save_pretrained(source)
    for file in tokenizer_from.glob("tok*"):
        shutil.copy(file, source)
    model, params = load(source)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hf_io.save_model(target, model, params, dtype=dtype)
    loaded, notes = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(notes.values())
    assert_same_tensors(reference, loaded)
    tied = loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    assert tied == model.spec.tied_head
    assert (family_of(model.config).head in load_file(target / "model.safetensors")) != model.spec.tied_head
    assert same_params(load(target)[1], params)


@pytest.mark.parametrize("name", ["llama-biases", "gpt2"])
def test_shards_written_by_transformers_are_read(name, hf_directory, tmp_path):
    model, single = hf_directory(name)
    sharded = tmp_path / "sharded"
    shutil.copytree(single, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(sharded, max_shard_size="15KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert not (sharded / "model.safetensors").exists()
    assert same_params(load(sharded)[1], load(single)[1])


def test_shards_written_here_are_read_by_transformers_and_none_is_too_large(hf_directory, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    reference, directory = hf_directory("llama-biases")
    monkeypatch.setattr(hf_io, "MAX_SHARD_BYTES", 15_000)
    hf_io.save_model(tmp_path / "policy", *load(directory))
    shards = sorted((tmp_path / "policy").glob("*.safetensors"))
    assert len(shards) > 1
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= 15_000 for shard in shards)
    assert_same_tensors(reference, AutoModelForCausalLM.from_pretrained(tmp_path / "policy"))
    assert same_params(load(tmp_path / "policy")[1], load(directory)[1])


def test_gpt2_files_of_the_bare_trunk_are_read_with_their_buffers(hf_directory, copy_of):
    # As the hub's gpt2 is: no prefix, and a causal mask in the file.
    directory = copy_of("gpt2")
    tensors = load_file(directory / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    bare["h.0.attn.bias"] = np.ones((1, 1, 512, 512), np.float32)
    save_file(bare, directory / "model.safetensors")
    assert same_params(load(directory)[1], load(hf_directory("gpt2")[1])[1])


def test_a_save_replaces_what_was_there_keeps_its_companions_and_leaves_no_partial(hf_directory, copy_of, tmp_path):
    source = copy_of("llama")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    target = tmp_path / "policy"
    target.mkdir()
    (target / "stale.safetensors").write_text("old")
    (tmp_path / "policy.partial").mkdir()
    (tmp_path / "policy.partial" / "junk").write_text("of a killed save")
    model, params = load(source)
    hf_io.save_model(target, model, params)
    assert {file.name for file in tmp_path.iterdir()} == {"llama", "policy", "policy.kept_1"}
    assert (tmp_path / "policy.kept_1" / "stale.safetensors").read_text() == "old"
    names = {file.name for file in target.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert not names & {"stale.safetensors", "junk"}
    assert json.loads((target / "generation_config.json").read_text()) == {"eos_token_id": [2, 5]}
    assert load(target)[0].tokenizer("w0 w33")["input_ids"] == model.tokenizer("w0 w33")["input_ids"] == [3, 36]
    assert load(target)[0].tokenizer.chat_template == "{{ messages }}"


def test_whoever_may_read_the_config_may_read_the_weights(hf_directory, tmp_path):
    hf_io.save_model(tmp_path / "policy", *load(hf_directory("llama")[1]))
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "policy").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_parameters_come_in_the_dtype_that_is_asked_for(hf_directory):
    directory = hf_directory("llama")[1]
    half, full = load(directory, jnp.bfloat16)[1], load(directory)[1]
    assert same_params(half, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), full))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


# ---------------------------------------------------------------------------- refused: configs


def refusal(directory, **arguments):
    with pytest.raises(UserError) as caught:
        load(directory, **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "bloom"}, ["'bloom'", "supported are gemma2, gemma3_text, gpt2"]),
        ({"model_type": "gemma3"}, ["multimodal", "gemma3_text"]),
        ({"model_type": "no_such_model"}, ["'no_such_model'", "supported are gemma2, gemma3_text, gpt2"]),
        ({"model_type": ...}, ["None", "supported are gemma2, gemma3_text, gpt2"]),
        ({"model_type": ["llama"]}, ["['llama']", "supported are gemma2, gemma3_text, gpt2"]),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, ["remote code", "auto_map"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantised"]),
        ({"hidden_size": "wide"}, ["hidden_size"]),
        ({"num_attention_heads": 5}, ["multiple of the number of attention heads (5)"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["factor"]),
        ({"rope_parameters": {"rope_type": "axial", "factor": 2.0, "rope_theta": 1e4}}, ["'axial'", "llama3"]),
        ({"residual_multiplier": 0.5}, ["residual_multiplier=0.5", "model.ignored_config_fields"]),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_with_the_reason(copy_of, changes, parts):
    directory = copy_of("llama")
    edit_json(directory / "config.json", **changes)
    message = refusal(directory)
    for part in parts:
        assert part in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("text", ["{", "[]", '"llama"', "null", "\xff\xfe"])
def test_a_config_that_is_no_json_object_is_refused_by_name(copy_of, text):
    directory = copy_of("llama")
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(directory)


def test_unknown_fields_that_the_user_vouches_for_are_accepted(copy_of):
    directory = copy_of("llama")
    edit_json(directory / "config.json", residual_multiplier=0.5)
    load(directory, ignored=("residual_multiplier",))
    assert "residual_multiplier" in refusal(directory)


def test_code_of_a_model_that_transformers_knows_can_be_ignored_and_is_neither_run_nor_saved(copy_of, tmp_path):
    directory = copy_of("phi3")
    plain = load(directory)[0].spec
    edit_json(directory / "config.json", auto_map={"AutoConfig": "configuration_phi3.Phi3Config"})
    (directory / "configuration_phi3.py").write_text("raise SystemExit('remote code was run')")
    assert "model.ignored_config_fields" in refusal(directory)
    model, params = load(directory, ignored=("auto_map",))
    assert model.spec == plain
    hf_io.save_model(tmp_path / "policy", model, params)
    assert load(tmp_path / "policy")[0].spec == plain


def test_a_directory_without_config_or_tokenizer_is_refused(copy_of):
    directory = copy_of("llama")
    for file in directory.glob("tokenizer*"):
        file.unlink()
    assert "holds no tokenizer" in refusal(directory)
    (directory / "config.json").unlink()
    assert "has no config.json" in refusal(directory)


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "~/absent", "gone", "some/one/else"])
def test_a_path_that_is_no_directory_is_named_as_given_and_as_resolved(path):
    with pytest.raises(UserError) as caught:
        hf_io.resolve_directory(path)
    assert repr(path) in str(caught.value)
    assert "resolved: /" in str(caught.value)


def test_a_hub_id_that_cannot_be_fetched_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'nobody/no-such-model' is neither a local directory .* nor a hub id"):
        hf_io.resolve_directory("nobody/no-such-model")


# ---------------------------------------------------------------------------- refused: weights


def test_missing_and_unexpected_tensors_are_both_listed(copy_of):
    directory = copy_of("llama")
    tensor = np.ones((24, 24), np.float32)
    edit_tensors(directory, **{"model.layers.1.self_attn.q_proj.weight": None, "model.layers.7.extra.weight": tensor})
    message = refusal(directory)
    assert "Missing tensors: model.layers.1.self_attn.q_proj.weight." in message
    assert "Unexpected tensors: model.layers.7.extra.weight." in message


def test_a_tensor_that_nothing_would_read_is_refused_even_when_none_is_missing(copy_of):
    directory = copy_of("llama")
    edit_tensors(directory, **{"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)})
    assert "Missing tensors: none. Unexpected tensors: model.layers.0.self_attn.q_proj.bias." in refusal(directory)


def test_long_lists_of_tensors_are_cut_short_and_counted(copy_of):
    directory = copy_of("llama")
    edit_json(directory / "config.json", num_hidden_layers=6)
    assert "and 24 more" in refusal(directory)  # 4 layers x 9 tensors, 12 of them shown


@pytest.mark.parametrize(
    ("name", "tensor", "part"),
    [
        ("model.layers.0.self_attn.k_proj.weight", np.ones((24, 12), np.float32), "float32[24, 12]"),
        ("model.norm.weight", np.ones((1, 24), np.float32), "float32[1, 24]"),
        ("model.embed_tokens.weight", np.ones((38, 24), np.float32), "[37, 24]"),
        ("model.norm.weight", np.ones(24, np.int32), "int32[24]"),
    ],
)
def test_a_tensor_of_another_shape_or_of_integers_is_refused_by_name(copy_of, name, tensor, part):
    directory = copy_of("llama")
    edit_tensors(directory, **{name: tensor})
    message = refusal(directory)
    assert name in message
    assert part in message


def test_eight_bit_floats_are_refused(copy_of):
    import torch
    from safetensors.torch import load_file as torch_load
    from safetensors.torch import save_file as torch_save

    directory = copy_of("llama")
    tensors = torch_load(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    torch_save(tensors, directory / "model.safetensors")
    assert "model.norm.weight" in refusal(directory)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(copy_of):
    directory = copy_of("llama-tied")
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(directory, **{"lm_head.weight": embedding.copy()})
    load(directory)
    edit_tensors(directory, **{"lm_head.weight": embedding + 1})
    message = refusal(directory)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickle_weights_are_refused_and_never_opened(copy_of, name):
    directory = copy_of("llama")
    (directory / "model.safetensors").rename(directory / name)
    message = refusal(directory)
    assert name in message
    assert "pickle" in message


def test_a_directory_without_weights_is_refused(copy_of):
    directory = copy_of("llama")
    (directory / "model.safetensors").unlink()
    assert "holds no model.safetensors (none)" in refusal(directory)


def header(text):
    return struct.pack("<Q", len(text)) + text.encode()


HOSTILE = {
    "empty": b"",
    "garbage": b"not a safetensors file at all",
    "huge header": struct.pack("<Q", 2**62) + b"{}",
    "header is no json": header("{{{{"),
    "out of bounds": header('{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}') + b"\0" * 8,
    "overlapping": header(
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    + b"\0" * 12,
    "shape does not fit": header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,8]}}') + b"\0" * 8,
    "odd dtype": header('{"a":{"dtype":"OBJECT","shape":[2],"data_offsets":[0,8]}}') + b"\0" * 8,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_or_truncated_safetensors_file_is_refused_by_name(copy_of, kind):
    directory = copy_of("llama")
    (directory / "model.safetensors").write_bytes(HOSTILE[kind])
    assert "model.safetensors is not a valid safetensors file" in refusal(directory)


def test_a_truncated_download_is_refused(copy_of):
    directory = copy_of("llama")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors is not a valid safetensors file" in refusal(directory)


def sharded(directory, tmp_path, weight_map):
    """The directory with its weights in one shard, and an index that is the given one, or says something else."""
    (directory / "model.safetensors").rename(directory / "shard.safetensors")
    index = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


@pytest.mark.parametrize(
    "where", ["../stolen.safetensors", "/etc/passwd", "sub/../../x.safetensors", "absent.safetensors"]
)
def test_an_index_that_points_out_of_the_directory_is_refused(copy_of, tmp_path, where):
    (tmp_path / "stolen.safetensors").write_bytes(b"x")
    directory = sharded(copy_of("llama"), tmp_path, {"model.norm.weight": where})
    message = refusal(directory)
    assert where.rpartition("/")[2] in message
    assert "not files in it" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 5}}', "null"])
def test_a_broken_index_is_refused_by_name(copy_of, tmp_path, text):
    assert "model.safetensors.index.json is not an index" in refusal(sharded(copy_of("llama"), tmp_path, text))


def test_an_index_that_names_the_wrong_shard_or_a_broken_one_is_refused(copy_of, tmp_path):
    directory = copy_of("llama")
    names = list(load_file(directory / "model.safetensors"))
    sharded(directory, tmp_path, dict.fromkeys(names, "shard.safetensors"))
    load(directory)
    save_file({"other": np.ones(3, np.float32)}, directory / "second.safetensors")
    for wrong in ("second.safetensors", "third.safetensors"):
        (directory / "third.safetensors").write_bytes(b"garbage")
        index = {"weight_map": dict.fromkeys(names, "shard.safetensors") | {"model.norm.weight": wrong}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        message = refusal(directory)
        assert wrong in message
        assert "model.norm.weight" in message


def test_a_link_out_of_the_directory_is_refused_but_the_hubs_own_cache_is_read(copy_of, tmp_path):
    directory = copy_of("llama")
    outside = tmp_path / "elsewhere.safetensors"
    (directory / "model.safetensors").rename(outside)
    (directory / "model.safetensors").symlink_to(outside)
    assert "not files in it" in refusal(directory)

    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (directory / "model.safetensors").unlink()
    snapshot = directory.rename(repository / "snapshots" / "0123abc")
    outside.rename(repository / "blobs" / "sha")
    (snapshot / "model.safetensors").symlink_to("../../blobs/sha")
    load(snapshot)


def test_where_a_single_file_and_an_index_lie_side_by_side_the_single_file_is_read_as_transformers_does(copy_of):
    directory = copy_of("llama")
    expected = load(directory)[1]
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"stale": "gone.safetensors"}}')
    assert same_params(load(directory)[1], expected)
