"""Model families as data: how a Hugging Face `config.json` becomes a `DecoderSpec`, and how its tensors are named.

A field of the config that changes the mathematics is honoured or refused by name: `_Fields` remembers which ones a
family reads, and whatever it leaves over must be listed as harmless or be switched off.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from ppo_jax.errors import UserError
from ppo_jax.models.decoder import DecoderSpec, LayerSpec, RopeSpec, rope_frequencies

# Fields that name, describe, initialise or drive generation, but change no logit (dropout is off everywhere).
HARMLESS = frozenset(
    """
    model_type architectures transformers_version torch_dtype dtype _name_or_path name_or_path use_cache
    pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id unk_token_id
    initializer_range attention_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp
    id2label label2id problem_type return_dict output_attentions output_hidden_states is_encoder_decoder
    chunk_size_feed_forward n_ctx task_specific_params summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn gradient_checkpointing
    is_llama_config transformers.js_config
    """.split()  # noqa: SIM905, a list of this length reads better as a paragraph
)

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class _Fields:
    """A config's fields; what is asked for counts as honoured."""

    def __init__(self, config: PretrainedConfig):
        self._values = config.to_dict()
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._values.get(name)

    def activation(self, name: str) -> str:
        if self[name] not in ACTIVATION_NAMES:
            raise UserError(f"config.json: {name} is {self[name]!r}; supported are {', '.join(ACTIVATION_NAMES)}")
        return ACTIVATION_NAMES[self[name]]

    def refuse_leftovers(self, ignored: tuple[str, ...]) -> None:
        left = {
            name: value
            for name, value in self._values.items()
            if name not in self._read | HARMLESS | set(ignored) and value is not None and value is not False
        }
        if left:
            listing = ", ".join(f"{name}={value!r}" for name, value in sorted(left.items()))
            raise UserError(
                f"config.json has fields this decoder does not know for model_type "
                f"{self._values.get('model_type')!r}: {listing}. They may change the mathematics, so the model is "
                f"refused. If they do not, name them in model.ignored_config_fields."
            )


@dataclass(frozen=True)
class Tensor:
    """One tensor of the files and the parameters it holds; several are concatenated along their output axis."""

    name: str
    params: tuple[str, ...]
    transpose: bool = False


@dataclass(frozen=True)
class Family:
    """One row: reader of the config, prefix of the trunk's tensors, their names, and buffers that files may hold."""

    spec: Callable[[_Fields], DecoderSpec]
    prefix: str
    tensors: tuple[Tensor, ...]  # "{i}" stands for the layer
    buffers: tuple[str, ...] = ()


def _llama_spec(fields: _Fields) -> DecoderSpec:
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    head_dim = fields["head_dim"] or width // heads
    return DecoderSpec(
        vocab_size=fields["vocab_size"],
        width=width,
        heads=heads,
        kv_heads=fields["num_key_value_heads"] or heads,
        head_dim=head_dim,
        mlp_width=fields["intermediate_size"],
        max_positions=fields["max_position_embeddings"],
        layers=(LayerSpec(attention_scale=head_dim**-0.5),) * fields["num_hidden_layers"],
        norm="rms",
        norm_eps=fields["rms_norm_eps"],
        activation=fields.activation("hidden_act"),
        gated_mlp=True,
        rope=_rope(fields["rope_parameters"] or {}, head_dim),
        qkv_bias=bool(fields["attention_bias"]),
        out_bias=bool(fields["attention_bias"]),
        mlp_bias=bool(fields["mlp_bias"]),
        tied_head=bool(fields["tie_word_embeddings"]),
    )


# What each kind of rope reads beside its type and θ; anything else in `rope_parameters` is refused.
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def _rope(parameters: dict[str, Any], head_dim: int) -> RopeSpec:
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        raise UserError(f"config.json: rope_type {kind!r} is not supported; supported are {', '.join(ROPE_KEYS)}")
    unknown = set(parameters) - ROPE_KEYS[kind] - {"rope_type", "type", "rope_theta"}
    if unknown:
        raise UserError(
            f"config.json: rope_parameters of type {kind!r} with {', '.join(sorted(unknown))} are not supported; they "
            f"may change the mathematics, so the model is refused"
        )
    frequencies = rope_frequencies(head_dim, parameters.get("rope_theta", 10000.0))
    if kind == "linear":
        frequencies = frequencies / parameters["factor"]
    elif kind == "llama3":
        frequencies = _llama3_frequencies(frequencies, parameters)
    return RopeSpec(tuple(frequencies.tolist()))


def _llama3_frequencies(frequencies: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear ramp of the frequency between."""
    original = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = original * frequencies / (2 * math.pi)  # how often a channel turns within the original context
    kept_share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept_share + (1 - kept_share) / parameters["factor"])


def _gpt2_spec(fields: _Fields) -> DecoderSpec:
    heads, width, layers = fields["n_head"], fields["n_embd"], fields["n_layer"]
    head_dim = width // heads
    scale = head_dim**-0.5 if fields["scale_attn_weights"] else 1.0
    by_depth = fields["scale_attn_by_inverse_layer_idx"]
    return DecoderSpec(
        vocab_size=fields["vocab_size"],
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp_width=fields["n_inner"] or 4 * width,
        max_positions=fields["n_positions"],
        layers=tuple(LayerSpec(attention_scale=scale / (i + 1 if by_depth else 1)) for i in range(layers)),
        norm="layer",
        norm_eps=fields["layer_norm_epsilon"],
        activation=fields.activation("activation_function"),
        gated_mlp=False,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_head=bool(fields["tie_word_embeddings"]),
    )


def _linear(name: str, param: str) -> tuple[Tensor, Tensor]:
    """A torch Linear, stored (out, in), and its bias."""
    return Tensor(f"{name}.weight", (f"{param}/kernel",), transpose=True), Tensor(f"{name}.bias", (f"{param}/bias",))


def _conv1d(name: str, *params: str) -> tuple[Tensor, Tensor]:
    """GPT-2's Conv1D, stored (in, out) as ours, and its bias."""
    return (
        Tensor(f"{name}.weight", tuple(f"{p}/kernel" for p in params)),
        Tensor(f"{name}.bias", tuple(f"{p}/bias" for p in params)),
    )


def _layer_norm(name: str, param: str) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", (f"{param}/scale",)), Tensor(f"{name}.bias", (f"{param}/bias",))


HEAD = Tensor("lm_head.weight", ("head",), transpose=True)

LLAMA = Family(
    spec=_llama_spec,
    prefix="model.",
    tensors=(
        Tensor("model.embed_tokens.weight", ("embed",)),
        Tensor("model.layers.{i}.input_layernorm.weight", ("layer_{i}/norm1/scale",)),
        *_linear("model.layers.{i}.self_attn.q_proj", "layer_{i}/attn/q"),
        *_linear("model.layers.{i}.self_attn.k_proj", "layer_{i}/attn/k"),
        *_linear("model.layers.{i}.self_attn.v_proj", "layer_{i}/attn/v"),
        *_linear("model.layers.{i}.self_attn.o_proj", "layer_{i}/attn/o"),
        Tensor("model.layers.{i}.post_attention_layernorm.weight", ("layer_{i}/norm2/scale",)),
        *_linear("model.layers.{i}.mlp.gate_proj", "layer_{i}/mlp/gate"),
        *_linear("model.layers.{i}.mlp.up_proj", "layer_{i}/mlp/up"),
        *_linear("model.layers.{i}.mlp.down_proj", "layer_{i}/mlp/down"),
        Tensor("model.norm.weight", ("final_norm/scale",)),
        HEAD,
    ),
    buffers=("rotary_emb.inv_freq",),
)

GPT2 = Family(
    spec=_gpt2_spec,
    prefix="transformer.",
    tensors=(
        Tensor("transformer.wte.weight", ("embed",)),
        Tensor("transformer.wpe.weight", ("positions",)),
        *_layer_norm("transformer.h.{i}.ln_1", "layer_{i}/norm1"),
        *_conv1d("transformer.h.{i}.attn.c_attn", "layer_{i}/attn/q", "layer_{i}/attn/k", "layer_{i}/attn/v"),
        *_conv1d("transformer.h.{i}.attn.c_proj", "layer_{i}/attn/o"),
        *_layer_norm("transformer.h.{i}.ln_2", "layer_{i}/norm2"),
        *_conv1d("transformer.h.{i}.mlp.c_fc", "layer_{i}/mlp/up"),
        *_conv1d("transformer.h.{i}.mlp.c_proj", "layer_{i}/mlp/down"),
        *_layer_norm("transformer.ln_f", "final_norm"),
        HEAD,
    ),
    buffers=(".attn.bias", ".attn.masked_bias"),
)

FAMILIES = {"llama": LLAMA, "gpt2": GPT2}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a config; an unknown one is refused with the list of known ones."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type {config.model_type!r} (architectures {config.architectures}) is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[config.model_type]


def spec_of(config: PretrainedConfig, *, ignored_fields: tuple[str, ...] = ()) -> DecoderSpec:
    """The decoder of a Hugging Face config, every field honoured or refused by name."""
    fields = _Fields(config)
    spec = family_of(config).spec(fields)
    fields.refuse_leftovers(ignored_fields)
    return spec


def tensors_of(config: PretrainedConfig, spec: DecoderSpec, param_paths: set[str]) -> list[Tensor]:
    """The tensors a complete checkpoint of this model holds: the rows whose parameters the model has."""
    rows = []
    for template in family_of(config).tensors:
        per_layer = "{i}" in template.name
        for i in range(len(spec.layers)) if per_layer else (0,):
            row = replace(
                template,
                name=template.name.format(i=i),
                params=tuple(path.format(i=i) for path in template.params),
            )
            if param_paths.issuperset(row.params):
                rows.append(row)
    return rows
