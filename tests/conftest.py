"""Strict numbers for every test: no silent dtype or rank promotion, shapes checked at run time, warnings are errors.

Expected values come from loops in float64 NumPy, from torch or from transformers; never from the code under test.
"""

import copy
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

SIZES = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
LLAMA = SIZES | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}
GPT2 = {
    "vocab_size": 37, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
GEMMA = LLAMA | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 10, "tie_word_embeddings": True}
# What a family's tiny models start from. A window of 16 is crossed by every long row of the tests.
FAMILY_SIZES = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "mistral": LLAMA | {"sliding_window": 16},
    "qwen2": LLAMA | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": LLAMA | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "head_dim": 10},
    "smollm3": LLAMA | {"no_rope_layer_interval": 2},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GEMMA | {"sliding_window_pattern": 2},
    "phi3": LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 1, "sliding_window": 16},
    "gpt_neox": SIZES | {"num_attention_heads": 3, "hidden_act": "gelu"},
    "olmo2": LLAMA,
    "starcoder2": SIZES | {"num_key_value_heads": 2, "sliding_window": 16},
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 6.0,
    "beta_slow": 0.5,
}  # fmt: skip
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 300,
    "short_factor": [1.0, 1.5, 3.0], "long_factor": [2.0, 4.0, 8.0],
}  # fmt: skip
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
# Every mathematical switch of every family is on somewhere, and off somewhere else.
MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama-head-dim": ("llama", {"head_dim": 10, "num_key_value_heads": 4, "hidden_act": "gelu"}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC_ROPE}),
    "llama-longrope": ("llama", {"rope_parameters": LONG_ROPE | {"factor": 4.0}}),
    "gpt2": ("gpt2", {}),
    "gpt2-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 40, "scale_attn_weights": False}),
    "mistral": ("mistral", {}),
    "mistral-whole": ("mistral", {"sliding_window": None, "head_dim": 10, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True, "rope_parameters": YARN_ROPE}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "qwen3-tied": ("qwen3", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}),
    "smollm3-windows": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 16, "attention_bias": True, "mlp_bias": True},
    ),
    "gemma2": ("gemma2", {}),
    "gemma2-uncapped": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}
        | {"tie_word_embeddings": False, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "gemma3": ("gemma3_text", {}),
    "gemma3-linear": (
        "gemma3_text",
        {"final_logit_softcapping": 10.0, "attention_bias": True, "tie_word_embeddings": False}
        | {
            "rope_parameters": {
                "full_attention": LINEAR_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            }
        },
    ),
    "phi3": ("phi3", {"rope_parameters": PARTIAL_ROPE}),
    "phi3-longrope": (
        "phi3",
        {
            "sliding_window": None,
            "rope_parameters": LONG_ROPE | {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0] * 4},
        }
        | {"original_max_position_embeddings": 300, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "pythia": ("gpt_neox", {}),
    "gpt-neox-sequential": (
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "relu"}
        | {"rope_parameters": PARTIAL_ROPE},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-biases": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2-whole": ("starcoder2", {"sliding_window": None, "use_bias": False, "tie_word_embeddings": True}),
}


def hf_config(name, **changes):
    """The transformers config of a name in `MODELS`, with changes."""
    from transformers import AutoConfig

    family, own = copy.deepcopy(MODELS[name])  # transformers fills in the rope parameters it is given
    return AutoConfig.for_model(family, **(FAMILY_SIZES[family] | own | changes))


def hf_model(name):
    """A transformers model of `MODELS`, every gain away from 1 and every bias away from 0, so that no term is inert."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(hf_config(name), attn_implementation="eager").eval()
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
