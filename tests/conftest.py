"""Strict numbers for every test: no silent dtype or rank promotion, shapes checked at run time, warnings are errors.

Expected values come from loops in float64 NumPy, from torch or from transformers; never from the code under test.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import flax.struct
import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile a hundred small programs and run each for milliseconds.
jax.config.update("jax_disable_most_optimizations", True)


def _pytree_dataclass(cls, *, _make=flax.struct.dataclass, **options):
    """A struct.dataclass whose constructor is not shape-checked: JAX rebuilds pytrees of specs, flags and rows."""
    made = _make(cls, **options)
    made.__no_type_check__ = True
    return made


flax.struct.dataclass = _pytree_dataclass
# Before the first import of ppo_jax: every annotated function of it checks its shapes and types in the tests.
jaxtyping.install_import_hook("ppo_jax", "beartype.beartype")

from ppo_jax.models import hf_io  # noqa: E402
from tests.tiny import make_model  # noqa: E402

_QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=25, derandomize=bool(os.environ.get("CI")), **_QUIET)
settings.register_profile("thorough", max_examples=400, **_QUIET)
settings.load_profile(os.environ.get("PPO_JAX_HYPOTHESIS", "default"))


class Tiny(NamedTuple):
    model: hf_io.ModelDirectory
    params: dict


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Directory of a random Llama, see `tiny`."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny(tiny_model) -> Tiny:
    """The same model, loaded."""
    model = hf_io.open_model(str(tiny_model))
    return Tiny(model, hf_io.load_params(model.path, model.config, model.spec))


# ---------------------------------------------------------------------------- small random Hugging Face models

LLAMA = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": 37, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Every mathematical switch of both families is on somewhere, and off somewhere else.
MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama-head-dim": ("llama", {"head_dim": 10, "num_key_value_heads": 4, "hidden_act": "gelu"}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True}),
    "gpt2": ("gpt2", {}),
    "gpt2-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 40, "scale_attn_weights": False}),
}


def hf_model(name, **changes):
    """A transformers model of `MODELS`, every gain away from 1 and every bias away from 0, so that no term is inert."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    family, own = MODELS[name]
    base, config_type = {"llama": (LLAMA, LlamaConfig), "gpt2": (GPT2, GPT2Config)}[family]
    config = config_type(**(base | own | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and parameter_name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.25 * noise)
    return model


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of 37 words with the special tokens of the models above."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(34))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory, tokenizer):
    """(transformers model, its saved directory) of a name in `MODELS`, made once."""

    @functools.cache
    def make(name):
        model, directory = hf_model(name), tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return model, directory

    return make
