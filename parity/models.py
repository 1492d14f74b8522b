"""Small random models of every family, defined once for the tests and the parity ladder.

Weights have a standard deviation of 0.25, gains are away from 1 and biases from 0, so that no term is inert: a dropped
gain, bias, scale or transpose shows.
"""

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

SIZES = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
# All heads together (32 channels) are wider than the model (24), so that no matrix of the attention is square.
LLAMA = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5}
GPT2 = {
    "vocab_size": 37, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
GEMMA = LLAMA | {"sliding_window": 16, "query_pre_attn_scalar": 10, "tie_word_embeddings": True}
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
    "starcoder2": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
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
    "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 6.0, 8.0],
}  # fmt: skip
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
# Every mathematical switch of every family is on somewhere, and off somewhere else.
MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "head_dim": None}),
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
            "rope_parameters": LONG_ROPE,
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


def hf_config(name: str, **changes: Any) -> PretrainedConfig:
    """The transformers config of a name in `MODELS`, with changes."""
    family, own = copy.deepcopy(MODELS[name])  # transformers fills in the rope parameters it is given
    return AutoConfig.for_model(family, **(FAMILY_SIZES[family] | own | changes))


def hf_model(name: str) -> PreTrainedModel:
    """The transformers model of a name in `MODELS`; always the same weights."""
    model = AutoModelForCausalLM.from_config(hf_config(name), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and parameter_name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.25 * noise)
    return model
