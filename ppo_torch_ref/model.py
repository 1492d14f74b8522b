"""The decoder, and the families of Hugging Face models that it can be; the twin of `ppo_jax/models`.

Names in the state dict are those of Hugging Face, so a checkpoint loads without a mapping. A `transformers` model can
take the place of these: `token_logits` calls both alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from ppo_torch_ref.layers import ACTIVATIONS, Block, Conv1D, LayerSpec, RMSNorm, Spec, soft_cap
from ppo_torch_ref.rope import Rope, rope_of

# What a sequence-classification model has in place of a head.
CLASSIFIER = ("score.weight", "score.bias")
# Tensors that files of some families hold beside the weights.
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


class Decoder(nn.Module):
    """Called like a `transformers` model; returns logits [B, S, V], or of the last `logits_to_keep` positions."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        trunk = nn.ModuleDict({spec.embedding: nn.Embedding(spec.vocab_size, spec.width)})
        if spec.position_embedding is not None:
            trunk[spec.position_embedding] = nn.Embedding(spec.max_positions, spec.width)
        trunk[spec.blocks] = nn.ModuleList(Block(spec, layer) for layer in spec.layers)
        trunk[spec.final_norm] = spec.norm(spec.width)
        self.add_module(spec.trunk, trunk)
        if not spec.tied_head:
            self.add_module(spec.head, nn.Linear(spec.width, spec.vocab_size, bias=False))

    def forward(self, tokens: Tensor, *, attention_mask: Tensor, position_ids: Tensor, logits_to_keep: int) -> Tensor:
        hidden = self.hidden_states(tokens, attention_mask=attention_mask, position_ids=position_ids)
        return self.logits(hidden[:, -logits_to_keep:])

    def hidden_states(self, tokens: Tensor, *, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """[B, S, D], behind the final norm."""
        spec, visible = self.spec, causal_visibility(attention_mask)
        x = self.part(spec.embedding)(tokens)
        if spec.embedding_scale is not None:  # rounded to the weights' dtype first, as the models were trained
            x = x * x.new_tensor(spec.embedding_scale)
        if spec.position_embedding is not None:
            x = x + self.part(spec.position_embedding)(position_ids)
        for block in self.blocks():
            x = block(x, position_ids, within(visible, block.layer.window))
        return self.part(spec.final_norm)(x)

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.get_submodule(self.spec.head) if self.has_own_head else self.part(self.spec.embedding)
        return soft_cap(F.linear(hidden, head.get_parameter("weight")), self.spec.logit_softcap)

    @property
    def has_own_head(self) -> bool:
        """False where the head is tied, that is, where it is the embedding itself."""
        return not self.spec.tied_head

    def part(self, name: str) -> nn.Module:
        return self.get_submodule(f"{self.spec.trunk}.{name}")

    def blocks(self) -> list[Any]:
        return list(self.part(self.spec.blocks).children())

    def stages(self) -> dict[str, nn.Module]:
        """The modules whose outputs are the stages of the computation, in order; each returns one tensor."""
        found = {}
        for i, block in enumerate(self.blocks()):
            found[f"layer_{i}/attn"] = block.get_submodule(self.spec.attention)
            found[f"layer_{i}/mlp"] = block.mlp
            found[f"layer_{i}"] = block
        return found | {"final_norm": self.part(self.spec.final_norm)}


# ---------------------------------------------------------------------------- what a config says


def _spec(
    config: PretrainedConfig,
    *,
    activation: str = "hidden_act",
    mlp_width: int | None = None,
    norm: Callable[[int], nn.Module] | None = None,
    scales: Sequence[float] = (),
    windows: Sequence[int | None] = (),
    ropes: Sequence[Rope | None] = (),
    **own: Any,
) -> Spec:
    """Llama's reading of a config but for what is given: values for every layer, and fields of `Spec`."""
    heads, depth, function = config.num_attention_heads, config.num_hidden_layers, getattr(config, activation)
    if function not in ACTIVATIONS:
        raise ValueError(f"{activation} {function!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    per_layer = (
        scales or [_head_dim(config) ** -0.5] * depth,
        windows or [None] * depth,
        ropes or [_rope(config, config.rope_parameters)] * depth,
    )
    return Spec(
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        width=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=_head_dim(config),
        mlp_width=mlp_width or config.intermediate_size,
        layers=tuple(LayerSpec(*row) for row in zip(*per_layer, strict=True)),
        norm=norm or partial(RMSNorm, eps=config.rms_norm_eps),
        activation=ACTIVATIONS[function],
        tied_head=config.tie_word_embeddings,
        **own,
    )


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: PretrainedConfig, parameters: dict[str, Any]) -> Rope:
    return rope_of(parameters, _head_dim(config), config.max_position_embeddings)


def _windows(config: PretrainedConfig) -> list[int | None]:
    """The window of the layers that slide by `layer_types`; of every layer where a family has no such list."""
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in types]


def _biases(attention: bool, mlp: bool) -> dict[str, Any]:
    return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": mlp}


def _smollm3(config: PretrainedConfig) -> Spec:
    rope, biases = _rope(config, config.rope_parameters), _biases(config.attention_bias, config.mlp_bias)
    ropes = [rope if rotates else None for rotates in config.no_rope_layers]
    return _spec(config, windows=_windows(config), ropes=ropes, **biases)


def _gemma(config: PretrainedConfig, **own: Any) -> Spec:
    return _spec(
        config,
        activation="hidden_activation",
        norm=partial(RMSNorm, eps=config.rms_norm_eps, offset=1.0),
        scales=[config.query_pre_attn_scalar**-0.5] * config.num_hidden_layers,
        windows=_windows(config),
        embedding_scale=config.hidden_size**0.5,
        logit_softcap=config.final_logit_softcapping,
        **_biases(config.attention_bias, mlp=False),
        **GEMMA,
        **own,
    )


def _gemma3(config: PretrainedConfig) -> Spec:
    return _gemma(config, qk_norm="head", ropes=[_rope(config, config.rope_parameters[t]) for t in config.layer_types])


def _starcoder2(config: PretrainedConfig) -> Spec:
    norm, biases = partial(nn.LayerNorm, eps=config.norm_epsilon), _biases(config.use_bias, config.use_bias)
    return _spec(config, norm=norm, windows=_windows(config), **biases, **STARCODER2)


def _gpt_neox(config: PretrainedConfig) -> Spec:
    norm, biases = partial(nn.LayerNorm, eps=config.layer_norm_eps), _biases(config.attention_bias, mlp=True)
    return _spec(config, norm=norm, parallel=config.use_parallel_residual, **biases, **GPT_NEOX)


def _gpt2(config: PretrainedConfig) -> Spec:
    scale, depth = _head_dim(config) ** -0.5 if config.scale_attn_weights else 1.0, config.n_layer
    return _spec(
        config,
        activation="activation_function",
        mlp_width=config.n_inner or 4 * config.n_embd,
        norm=partial(nn.LayerNorm, eps=config.layer_norm_epsilon),
        scales=[scale / (i + 1) for i in range(depth)] if config.scale_attn_by_inverse_layer_idx else [scale] * depth,
        ropes=[None] * depth,
        **_biases(attention=True, mlp=True),
        **GPT2,
    )


GEMMA: dict[str, Any] = {
    "norm_after_attention": "post_attention_layernorm", "norm_before_mlp": "pre_feedforward_layernorm",
    "norm_after_mlp": "post_feedforward_layernorm",
}  # fmt: skip
OLMO2: dict[str, Any] = GEMMA | {"qk_norm": "full", "norm_before_attention": None, "norm_before_mlp": None}
PHI3: dict[str, Any] = {"qkv": ("qkv_proj",), "mlp_in": ("gate_up_proj",)}
STARCODER2: dict[str, Any] = {"gated": False, "mlp_in": ("c_fc",), "mlp_out": "c_proj"}
GPT_NEOX: dict[str, Any] = {
    "gated": False, "qkv_by_head": True, "trunk": "gpt_neox", "embedding": "embed_in", "final_norm": "final_layer_norm",
    "head": "embed_out", "attention": "attention", "qkv": ("query_key_value",), "attention_out": "dense",
    "mlp_in": ("dense_h_to_4h",), "mlp_out": "dense_4h_to_h",
}  # fmt: skip
GPT2: dict[str, Any] = {
    "gated": False, "linear": Conv1D, "trunk": "transformer", "embedding": "wte", "position_embedding": "wpe",
    "blocks": "h", "final_norm": "ln_f", "attention": "attn", "qkv": ("c_attn",), "attention_out": "c_proj",
    "mlp_in": ("c_fc",), "mlp_out": "c_proj", "norm_before_attention": "ln_1", "norm_before_mlp": "ln_2",
}  # fmt: skip
FAMILIES: dict[str, Callable[[PretrainedConfig], Spec]] = {
    "gemma2": lambda config: _gemma(config, attention_softcap=config.attn_logit_softcapping),
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": lambda config: _spec(config, **_biases(config.attention_bias, config.mlp_bias)),
    "mistral": lambda config: _spec(config, windows=_windows(config)),
    "olmo2": lambda config: _spec(config, **_biases(config.attention_bias, mlp=False), **OLMO2),
    "phi3": lambda config: _spec(config, windows=_windows(config), **PHI3),
    "qwen2": lambda config: _spec(config, windows=_windows(config), qkv_bias=True),
    "qwen3": lambda config: _spec(
        config, windows=_windows(config), qk_norm="head", **_biases(config.attention_bias, mlp=False)
    ),
    "smollm3": _smollm3,
    "starcoder2": _starcoder2,
}


# ---------------------------------------------------------------------------- its use


def positions_from_mask(token_mask: Tensor) -> Tensor:
    """0, 1, 2 ... over the real tokens of a row, wherever its padding sits; 0 at padding in front."""
    return (token_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def causal_visibility(token_mask: Tensor) -> Tensor:
    """[B, S, S]: query l sees key s where s <= l and s is a real token."""
    length = token_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=token_mask.device).tril()
    return causal & token_mask[:, None, :]


def within(visible: Tensor, window: int | None) -> Tensor:
    """What is visible [B, S, S] of the last `window` tokens, the query's own included; all where there is no window."""
    return visible if window is None else visible & torch.ones_like(visible).triu(1 - window)


def token_logits(model: nn.Module, tokens: Tensor, token_mask: Tensor, *, last: int = 0) -> Tensor:
    """Logits [B, S, V] of padded sequences, or those of their `last` positions; entry s predicts token s + 1."""
    out = model(tokens, attention_mask=token_mask, position_ids=positions_from_mask(token_mask), logits_to_keep=last)
    return getattr(out, "logits", out)


Sequences = tuple[Tensor, Tensor, Tensor, Tensor]  # prompt tokens and mask [B, P], response tokens and mask [B, T]


def response_states(
    model: nn.Module, prompt_tokens: Tensor, prompt_mask: Tensor, response_tokens: Tensor, response_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T + 1, D] and logits [B, T, V] of the response. The one shift by one.

    Entry t of either predicts `response_tokens[:, t]`; the last hidden state has seen all of them.
    """
    tokens = torch.cat([prompt_tokens, response_tokens], dim=1)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    inputs = {"attention_mask": mask, "position_ids": positions_from_mask(mask)}
    count = response_tokens.shape[1] + 1
    if isinstance(model, Decoder):
        hidden = model.hidden_states(tokens, **inputs)[:, -count:]
        return hidden, model.logits(hidden[:, :-1])
    out = model(tokens, **inputs, logits_to_keep=count, output_hidden_states=True)
    return out.hidden_states[-1][:, -count:], out.logits[:, :-1]


def response_logits(model: nn.Module, *sequences: Tensor) -> Tensor:
    """Logits [B, T, V] that predict the response."""
    return response_states(model, *sequences)[1]


def new_model(config: PretrainedConfig, *, is_trunk: bool = False) -> Decoder:
    """The decoder of a config, a trunk without its head; its weights have the right shapes and mean nothing."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type {config.model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    spec = FAMILIES[config.model_type](config)
    return Decoder(replace(spec, tied_head=spec.tied_head or is_trunk))


def load_model(directory: Path, *, dtype=torch.float32, is_trunk: bool = False) -> Decoder:
    """The model of a Hugging Face directory with every parameter in `dtype`; an error lists tensors that do not fit."""
    with torch.device("meta"):
        model = new_model(AutoConfig.from_pretrained(directory), is_trunk=is_trunk)
    stored, prefix = stored_tensors(directory), f"{model.spec.trunk}."
    if not any(name.startswith(prefix) for name in stored):  # a bare trunk, as the hub's gpt2
        stored = {prefix + name: x for name, x in stored.items()}
    unused = BUFFERS if model.has_own_head else (*BUFFERS, f"{model.spec.head}.weight")
    unused = (*unused, *CLASSIFIER) if is_trunk else unused
    weights = {name: x.to(dtype) for name, x in stored.items() if not name.endswith(unused)}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: x for file in sorted(directory.glob("*.safetensors")) for name, x in load_file(file).items()}
