"""Llama and GPT-2 decoders as small modules; the twin of `ppo_jax/models`.

Names in the state dict are those of Hugging Face, so a checkpoint loads without a mapping. Everything is computed in
the dtype of the parameters, norms and softmax in float32 at least; unlike `transformers`, float64 is float64
throughout. A `transformers` model can take the place of these: `token_logits` calls both alike.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope_frequencies(config: PretrainedConfig, head_dim: int) -> np.ndarray:
    """Inverse frequencies in radians per position, one per pair of a head's channels, float64."""
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    frequencies = rope.get("rope_theta", 10000.0) ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; supported are default, linear, llama3")
    # Llama 3.1: wavelengths above original/low are stretched by the factor, those under original/high are kept.
    original, low, high = (
        rope[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / rope["factor"] + blend * frequencies
    stretched = np.where(wavelengths > original / low, frequencies / rope["factor"], blended)
    return np.where(wavelengths < original / high, frequencies, stretched)


def rotate(x: Tensor, positions: Tensor, frequencies: np.ndarray) -> Tensor:
    """Rotary embedding of x [B, S, N, H]: channel i is paired with channel i + H/2."""
    wide = at_least_float32(x)
    inverse = torch.as_tensor(frequencies, dtype=wide.dtype, device=x.device)
    angles = (positions[..., None].to(wide.dtype) * inverse)[:, :, None, :]
    first, second = wide.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float) -> Tensor:
    """Softmax attention of queries [B, S, N, H] over keys and values [B, S, K, H]; N / K queries share a key head."""
    groups = queries.shape[2] // keys.shape[2]
    keys, values = keys.repeat_interleave(groups, dim=2), values.repeat_interleave(groups, dim=2)
    scores = at_least_float32(scale * torch.einsum("blnh,bsnh->bnls", queries, keys))
    scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
    return torch.einsum("bnls,bsnh->blnh", weights, values).flatten(2)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Conv1D(nn.Module):
    """GPT-2's linear layer, its weight stored (in, out)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class LlamaAttention(nn.Module):
    def __init__(self, config: PretrainedConfig):
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.frequencies = rope_frequencies(config, self.head_dim)
        linear = partial(nn.Linear, bias=config.attention_bias)
        self.q_proj = linear(config.hidden_size, heads * self.head_dim)
        self.k_proj = linear(config.hidden_size, kv_heads * self.head_dim)
        self.v_proj = linear(config.hidden_size, kv_heads * self.head_dim)
        self.o_proj = linear(heads * self.head_dim, config.hidden_size)

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        queries, keys, values = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = (rotate(heads, positions, self.frequencies) for heads in (queries, keys))
        return self.o_proj(attend(queries, keys, values, visible, scale=self.head_dim**-0.5))


class LlamaMlp(nn.Module):
    def __init__(self, config: PretrainedConfig):
        super().__init__()
        linear = partial(nn.Linear, bias=config.mlp_bias)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMlp(config)

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT2Attention(nn.Module):
    def __init__(self, config: PretrainedConfig, layer: int):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.scale = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        queries, keys, values = (part.unflatten(-1, (-1, self.head_dim)) for part in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(attend(queries, keys, values, visible, scale=self.scale))


class GPT2Mlp(nn.Module):
    def __init__(self, config: PretrainedConfig):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc, self.c_proj = Conv1D(config.n_embd, inner), Conv1D(inner, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class GPT2Block(nn.Module):
    def __init__(self, config: PretrainedConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2Mlp(config)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), visible)
        return x + self.mlp(self.ln_2(x))


class Llama(nn.Module):
    """Called like a `transformers` model; returns logits [B, S, V], or of the last `logits_to_keep` positions."""

    prefix, not_weights = "model.", ("rotary_emb.inv_freq",)

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = own_head(config)

    def forward(self, tokens: Tensor, *, attention_mask: Tensor, position_ids: Tensor, logits_to_keep: int) -> Tensor:
        visible = causal_visibility(attention_mask)
        x = self.model["embed_tokens"](tokens)
        for block in self.model["layers"].children():
            x = block(x, position_ids, visible)
        hidden = self.model["norm"](x)[:, -logits_to_keep:]
        return F.linear(
            hidden, self.get_parameter("model.embed_tokens.weight" if self.lm_head is None else "lm_head.weight")
        )


class GPT2(nn.Module):
    """As `Llama`, with learned positions."""

    prefix, not_weights = "transformer.", (".attn.bias", ".attn.masked_bias")

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.n_positions, config.n_embd),
                "h": nn.ModuleList(GPT2Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
            }
        )
        self.lm_head = own_head(config)

    def forward(self, tokens: Tensor, *, attention_mask: Tensor, position_ids: Tensor, logits_to_keep: int) -> Tensor:
        visible = causal_visibility(attention_mask)
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](position_ids)
        for block in self.transformer["h"].children():
            x = block(x, visible)
        hidden = self.transformer["ln_f"](x)[:, -logits_to_keep:]
        return F.linear(
            hidden, self.get_parameter("transformer.wte.weight" if self.lm_head is None else "lm_head.weight")
        )


FAMILIES = {"llama": Llama, "gpt2": GPT2}


def own_head(config: PretrainedConfig) -> nn.Linear | None:
    """The head's own weight; None where it is tied, that is, where it is the embedding itself."""
    return None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)


def positions_from_mask(token_mask: Tensor) -> Tensor:
    """0, 1, 2 ... over the real tokens of a row, wherever its padding sits; 0 at padding in front."""
    return (token_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def causal_visibility(token_mask: Tensor) -> Tensor:
    """[B, S, S]: query l sees key s where s <= l and s is a real token."""
    length = token_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=token_mask.device).tril()
    return causal & token_mask[:, None, :]


def token_logits(model: nn.Module, tokens: Tensor, token_mask: Tensor, *, last: int = 0) -> Tensor:
    """Logits [B, S, V] of padded sequences, or those of their `last` positions; entry s predicts token s + 1."""
    out = model(tokens, attention_mask=token_mask, position_ids=positions_from_mask(token_mask), logits_to_keep=last)
    return getattr(out, "logits", out)


def response_logits(
    model: nn.Module, prompt_tokens: Tensor, prompt_mask: Tensor, response_tokens: Tensor, response_mask: Tensor
) -> Tensor:
    """Logits [B, T, V] that predict the response: entry t predicts `response_tokens[:, t]`. The one shift by one."""
    tokens = torch.cat([prompt_tokens, response_tokens], dim=1)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    return token_logits(model, tokens, mask, last=response_tokens.shape[1] + 1)[:, :-1]


def load_model(directory: Path, *, dtype=torch.float32) -> nn.Module:
    """The model of a Hugging Face directory with every parameter in `dtype`; an error lists tensors that do not fit."""
    config = AutoConfig.from_pretrained(directory)
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type {config.model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    with torch.device("meta"):
        model = FAMILIES[config.model_type](config)
    stored = {name: x for file in sorted(directory.glob("*.safetensors")) for name, x in load_file(file).items()}
    if not any(name.startswith(model.prefix) for name in stored):  # a bare trunk, as the hub's gpt2
        stored = {model.prefix + name: x for name, x in stored.items()}
    unused = model.not_weights + (("lm_head.weight",) if config.tie_word_embeddings else ())
    weights = {name: x.to(dtype) for name, x in stored.items() if not name.endswith(unused)}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()
