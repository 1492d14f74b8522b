"""Model families as data: how a Hugging Face `config.json` becomes a `DecoderSpec`, and how its tensors are named.

A field of the config that changes the mathematics is honoured or refused by name, see `config_fields`. How to add a
family is described in `docs/families.md`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from ppo_jax.errors import UserError
from ppo_jax.models import tensor_names
from ppo_jax.models.config_fields import Fields
from ppo_jax.models.layers import DecoderSpec, LayerSpec
from ppo_jax.models.rope import rope_spec, served_positions
from ppo_jax.models.tensor_names import HEAD, Tensor

__all__ = ["FAMILIES", "HEAD", "Family", "Tensor", "family_of", "spec_of", "tensors_of", "unsupported"]


@dataclass(frozen=True)
class Family:
    """One row: reader of the config, prefix of the trunk's tensors, their names, and buffers that files may hold."""

    spec: Callable[[Fields], DecoderSpec]
    prefix: str = "model."
    tensors: tuple[Tensor, ...] = tensor_names.LLAMA
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)

    @property
    def head(self) -> str:
        """Name of the language-model head's tensor."""
        return next(row.name for row in self.tensors if row.params == HEAD.params)


# ---------------------------------------------------------------------------- what several families share


def _rotary_decoder(
    fields: Fields,
    *,
    activation: str = "hidden_act",
    scale: float | None = None,
    windows: Sequence[int | None] | None = None,
    ropes: Sequence[dict[str, Any] | None] | None = None,
    partial: bool = False,
    **own: Any,
) -> DecoderSpec:
    """A decoder with rotary positions whose sizes have the usual names.

    Every layer alike unless `windows` or `ropes` (rope parameters, None: no rotation) say otherwise; `own` are the
    fields of `DecoderSpec` in which the family differs from others.
    """
    heads, width, count = fields["num_attention_heads"], fields["hidden_size"], fields["num_hidden_layers"]
    head_dim, max_positions = fields["head_dim"] or width // heads, fields["max_position_embeddings"]
    fields.only("is_causal", True)
    layer_windows = windows or [None] * count
    layer_ropes = ropes or [fields["rope_parameters"] or {}] * count
    served = [served_positions(rope, max_positions) for rope in layer_ropes if rope is not None]
    return DecoderSpec(
        vocab_size=fields["vocab_size"],
        width=width,
        heads=heads,
        kv_heads=fields["num_key_value_heads"] or heads,
        head_dim=head_dim,
        mlp_width=fields["intermediate_size"],
        max_positions=min(served, default=max_positions),
        layers=tuple(
            LayerSpec(
                attention_scale=head_dim**-0.5 if scale is None else scale,
                window=window,
                rope=None if rope is None else rope_spec(rope, head_dim, max_positions, partial=partial),
            )
            for window, rope in zip(layer_windows, layer_ropes, strict=True)
        ),
        activation=fields.activation(activation),
        tied_head=bool(fields["tie_word_embeddings"]),
        **own,
    )


def _rms(fields: Fields) -> dict[str, Any]:
    return {"norm": "rms", "norm_eps": fields["rms_norm_eps"], "gated_mlp": True}


def _biases(*, qkv: Any = False, out: Any = False, mlp: Any = False) -> dict[str, Any]:
    return {"qkv_bias": bool(qkv), "out_bias": bool(out), "mlp_bias": bool(mlp)}


def _window(fields: Fields) -> int | None:
    window = fields["sliding_window"]
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise fields.refusal("sliding_window", "a window is a number of tokens, at least 1, or null")
    return window


def _layer_types(fields: Fields) -> list[str]:
    """`layer_types`, which transformers' config classes fill in from older fields where it is absent."""
    types, count, window = fields["layer_types"], fields["num_hidden_layers"], _window(fields)
    if len(types) != count or not set(types) <= {"full_attention", "sliding_attention"}:
        raise fields.refusal("layer_types", f"expected {count} of full_attention and sliding_attention")
    if "sliding_attention" in types and window is None:
        raise fields.refusal("layer_types", "layers slide, but there is no window (sliding_window, use_sliding_window)")
    return types


def _windows(fields: Fields) -> list[int | None]:
    return [_window(fields) if kind == "sliding_attention" else None for kind in _layer_types(fields)]


# ---------------------------------------------------------------------------- one reader for each family


def _llama(fields: Fields) -> DecoderSpec:
    bias = fields["attention_bias"]
    return _rotary_decoder(fields, **_rms(fields), **_biases(qkv=bias, out=bias, mlp=fields["mlp_bias"]))


def _mistral(fields: Fields) -> DecoderSpec:
    windows = [_window(fields)] * fields["num_hidden_layers"]
    return _rotary_decoder(fields, windows=windows, **_rms(fields), **_biases())


def _qwen2(fields: Fields) -> DecoderSpec:
    fields.derived("use_sliding_window", "max_window_layers")
    return _rotary_decoder(fields, windows=_windows(fields), **_rms(fields), **_biases(qkv=True))


def _qwen3(fields: Fields) -> DecoderSpec:
    fields.derived("use_sliding_window", "max_window_layers")
    bias = fields["attention_bias"]
    own = _rms(fields) | _biases(qkv=bias, out=bias)
    return _rotary_decoder(fields, windows=_windows(fields), qk_norm="head", **own)


def _smollm3(fields: Fields) -> DecoderSpec:
    fields.derived("no_rope_layer_interval")
    fields.derived("max_window_layers")  # Qwen's field in SmolLM3's files, which its config class does not read
    bias, rope = fields["attention_bias"], fields["rope_parameters"]
    turned, count = fields["no_rope_layers"], fields["num_hidden_layers"]
    if len(turned) < count:
        raise fields.refusal("no_rope_layers", f"expected {count} entries, 1 for rotary positions and 0 for none")
    windows = _windows(fields)
    if any(windows):
        fields.only("use_sliding_window", True)  # false beside sliding layers: attention kernels disagree on it
    return _rotary_decoder(
        fields,
        windows=windows,
        ropes=[rope if turns else None for turns in turned[:count]],
        **_rms(fields),
        **_biases(qkv=bias, out=bias, mlp=fields["mlp_bias"]),
    )


def _gemma2(fields: Fields, **own: Any) -> DecoderSpec:
    fields.only("use_bidirectional_attention", False)
    fields.only("hidden_act", fields["hidden_activation"])  # older names that Gemma 2's files carry along
    fields.only("sliding_window_size", fields["sliding_window"])
    bias = fields["attention_bias"]
    return _rotary_decoder(
        fields,
        activation="hidden_activation",
        scale=fields["query_pre_attn_scalar"] ** -0.5,
        windows=_windows(fields),
        norm="rms_offset",
        norm_eps=fields["rms_norm_eps"],
        gated_mlp=True,
        post_norm=True,
        embedding_scale=fields["hidden_size"] ** 0.5,
        attention_softcap=fields["attn_logit_softcapping"],
        logit_softcap=fields["final_logit_softcapping"],
        **_biases(qkv=bias, out=bias),
        **own,
    )


def _gemma3(fields: Fields) -> DecoderSpec:
    fields.derived("sliding_window_pattern", "_sliding_window_pattern")
    parameters = fields["rope_parameters"]
    if set(parameters) != {"full_attention", "sliding_attention"} or not all(parameters.values()):
        raise fields.refusal("rope_parameters", "expected one entry for full_attention and one for sliding_attention")
    fields.only("attn_logit_softcapping")  # Gemma 3's attention takes no cap in transformers
    return _gemma2(fields, qk_norm="head", ropes=[parameters[kind] for kind in _layer_types(fields)])


def _phi3(fields: Fields) -> DecoderSpec:
    # Both ended up in `rope_parameters`; the second counts there for longrope only.
    fields.derived("partial_rotary_factor", "original_max_position_embeddings")
    windows = [_window(fields)] * fields["num_hidden_layers"]
    return _rotary_decoder(fields, windows=windows, partial=True, **_rms(fields), **_biases())


def _olmo2(fields: Fields) -> DecoderSpec:
    bias = fields["attention_bias"]
    own = _rms(fields) | _biases(qkv=bias, out=bias)
    return _rotary_decoder(fields, pre_norm=False, post_norm=True, qk_norm="full", **own)


def _gpt_neox(fields: Fields) -> DecoderSpec:
    fields.only("head_dim")  # transformers' rope reads these, its attention does not
    fields.only("num_key_value_heads")
    bias = fields["attention_bias"]
    return _rotary_decoder(
        fields,
        partial=True,
        norm="layer",
        norm_eps=fields["layer_norm_eps"],
        gated_mlp=False,
        parallel_residual=bool(fields["use_parallel_residual"]),
        **_biases(qkv=bias, out=bias, mlp=True),
    )


def _starcoder2(fields: Fields) -> DecoderSpec:
    fields.only("norm_type", "layer_norm")
    fields.only("mlp_type", "default")
    fields.only("scale_attn_weights", True)
    # Published files carry these from older code; softmax is in float32 here anyway.
    fields.derived("rms_norm_eps", "layer_norm_epsilon")
    fields.derived("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    bias = fields["use_bias"]
    return _rotary_decoder(
        fields,
        windows=[_window(fields)] * fields["num_hidden_layers"],
        norm="layer",
        norm_eps=fields["norm_epsilon"],
        gated_mlp=False,
        **_biases(qkv=bias, out=bias, mlp=bias),
    )


def _gpt2(fields: Fields) -> DecoderSpec:
    heads, width, layers = fields["n_head"], fields["n_embd"], fields["n_layer"]
    head_dim = width // heads
    scale = head_dim**-0.5 if fields["scale_attn_weights"] else 1.0
    by_depth = fields["scale_attn_by_inverse_layer_idx"]
    fields.only("is_causal", True)
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
        learned_positions=True,
        tied_head=bool(fields["tie_word_embeddings"]),
        **_biases(qkv=True, out=True, mlp=True),
    )


FAMILIES = {
    "gemma2": Family(_gemma2, tensors=tensor_names.GEMMA),
    "gemma3_text": Family(_gemma3, tensors=tensor_names.GEMMA),
    "gpt2": Family(
        _gpt2, prefix="transformer.", tensors=tensor_names.GPT2, buffers=(".attn.bias", ".attn.masked_bias")
    ),
    "gpt_neox": Family(
        _gpt_neox,
        prefix="gpt_neox.",
        tensors=tensor_names.GPT_NEOX,
        buffers=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    ),
    "llama": Family(_llama),
    "mistral": Family(_mistral),
    "olmo2": Family(_olmo2, tensors=tensor_names.GEMMA),
    "phi3": Family(_phi3, tensors=tensor_names.PHI3),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3),
    "smollm3": Family(_smollm3),
    "starcoder2": Family(_starcoder2, tensors=tensor_names.STARCODER2),
}


def unsupported(model_type: Any) -> str:
    """Why there is no family of this name, and what to do."""
    if model_type == "gemma3":
        return (
            "model_type 'gemma3' is the multimodal Gemma 3, whose image tokens ppo_jax does not know; use its text "
            "model alone (model_type 'gemma3_text', such as Gemma 3 1B)"
        )
    return f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"


def family_of(config: PretrainedConfig) -> Family:
    """The family of a config; an unknown one is refused with the list of known ones."""
    if config.model_type not in FAMILIES:
        raise UserError(f"config.json (architectures {config.architectures}): {unsupported(config.model_type)}")
    return FAMILIES[config.model_type]


def spec_of(config: PretrainedConfig, *, ignored_fields: tuple[str, ...] = ()) -> DecoderSpec:
    """The decoder of a Hugging Face config, every field honoured or refused by name."""
    fields = Fields(config)
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
