"""How Hugging Face files name and lay out the tensors of each family, as tables.

A row is used where the model has its parameters, so one table serves models with and without biases or extra norms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """One tensor of the files and the parameters it holds.

    Several parameters are concatenated along their output axis; `per_head` says that the channels of each head come
    together instead: the output axis is [heads, parameters, head_dim], flattened.
    """

    name: str  # "{i}" stands for the layer
    params: tuple[str, ...]
    transpose: bool = False
    per_head: bool = False

    def join(self, parts: Sequence[np.ndarray], heads: int) -> np.ndarray:
        """The tensor as the files hold it, from its parameters, each [.., out]."""
        if self.per_head:
            by_head = [part.reshape(*part.shape[:-1], heads, -1) for part in parts]
            value = np.stack(by_head, axis=-2).reshape(*parts[0].shape[:-1], -1)
        else:
            value = np.concatenate(parts, axis=-1)
        return np.ascontiguousarray(value.T if self.transpose else value)

    def split(self, stored: np.ndarray, widths: Sequence[int], heads: int) -> list[np.ndarray]:
        """The inverse of `join`, for parameters of the given output widths."""
        value = stored.T if self.transpose else stored
        return self.columns(value, widths, heads)

    def columns(self, value: Any, widths: Sequence[int], heads: int) -> list[Any]:
        """The columns of each parameter in an array [.., out] of NumPy or JAX that has the order of the files."""
        if self.per_head:
            by_head = value.reshape(*value.shape[:-1], heads, len(widths), -1)
            return [by_head[..., part, :].reshape(*value.shape[:-1], -1) for part in range(len(widths))]
        ends = np.cumsum(widths).tolist()
        return [value[..., end - width : end] for end, width in zip(ends, widths, strict=True)]


def linear(name: str, *params: str, per_head: bool = False) -> tuple[Tensor, ...]:
    """A torch Linear, stored (out, in), and its bias."""
    return (
        Tensor(f"{name}.weight", tuple(f"{p}/kernel" for p in params), transpose=True, per_head=per_head),
        Tensor(f"{name}.bias", tuple(f"{p}/bias" for p in params), per_head=per_head),
    )


def conv1d(name: str, *params: str) -> tuple[Tensor, ...]:
    """GPT-2's Conv1D, stored (in, out) as ours, and its bias."""
    return (
        Tensor(f"{name}.weight", tuple(f"{p}/kernel" for p in params)),
        Tensor(f"{name}.bias", tuple(f"{p}/bias" for p in params)),
    )


def norm(name: str, param: str) -> tuple[Tensor, ...]:
    return Tensor(f"{name}.weight", (f"{param}/scale",)), Tensor(f"{name}.bias", (f"{param}/bias",))


HEAD = Tensor("lm_head.weight", ("head",), transpose=True)
LAYER = "model.layers.{i}"
QKV = tuple("layer_{i}/attn/" + part for part in "qkv")

ENDS = (Tensor("model.embed_tokens.weight", ("embed",)), *norm("model.norm", "final_norm"), HEAD)
ATTENTION = (
    *linear(f"{LAYER}.self_attn.q_proj", "layer_{i}/attn/q"),
    *linear(f"{LAYER}.self_attn.k_proj", "layer_{i}/attn/k"),
    *linear(f"{LAYER}.self_attn.v_proj", "layer_{i}/attn/v"),
    *linear(f"{LAYER}.self_attn.o_proj", "layer_{i}/attn/o"),
    *norm(f"{LAYER}.self_attn.q_norm", "layer_{i}/attn/q_norm"),
    *norm(f"{LAYER}.self_attn.k_norm", "layer_{i}/attn/k_norm"),
)
GATED_MLP = (
    *linear(f"{LAYER}.mlp.gate_proj", "layer_{i}/mlp/gate"),
    *linear(f"{LAYER}.mlp.up_proj", "layer_{i}/mlp/up"),
    *linear(f"{LAYER}.mlp.down_proj", "layer_{i}/mlp/down"),
)
PRE_NORMS = (
    *norm(f"{LAYER}.input_layernorm", "layer_{i}/norm1"),
    *norm(f"{LAYER}.post_attention_layernorm", "layer_{i}/norm2"),
)
# The same two names mean the norms after attention and MLP here, and those before them have names of their own.
POST_NORMS = (
    *norm(f"{LAYER}.input_layernorm", "layer_{i}/norm1"),
    *norm(f"{LAYER}.post_attention_layernorm", "layer_{i}/post_norm1"),
    *norm(f"{LAYER}.pre_feedforward_layernorm", "layer_{i}/norm2"),
    *norm(f"{LAYER}.post_feedforward_layernorm", "layer_{i}/post_norm2"),
)

LLAMA = (*ENDS, *PRE_NORMS, *ATTENTION, *GATED_MLP)
GEMMA = (*ENDS, *POST_NORMS, *ATTENTION, *GATED_MLP)
PHI3 = (
    *ENDS,
    *PRE_NORMS,
    *linear(f"{LAYER}.self_attn.qkv_proj", *QKV),
    *linear(f"{LAYER}.self_attn.o_proj", "layer_{i}/attn/o"),
    *linear(f"{LAYER}.mlp.gate_up_proj", "layer_{i}/mlp/gate", "layer_{i}/mlp/up"),
    *linear(f"{LAYER}.mlp.down_proj", "layer_{i}/mlp/down"),
)
STARCODER2 = (
    *ENDS,
    *PRE_NORMS,
    *ATTENTION,
    *linear(f"{LAYER}.mlp.c_fc", "layer_{i}/mlp/up"),
    *linear(f"{LAYER}.mlp.c_proj", "layer_{i}/mlp/down"),
)
GPT2 = (
    Tensor("transformer.wte.weight", ("embed",)),
    Tensor("transformer.wpe.weight", ("positions",)),
    *norm("transformer.h.{i}.ln_1", "layer_{i}/norm1"),
    *conv1d("transformer.h.{i}.attn.c_attn", *QKV),
    *conv1d("transformer.h.{i}.attn.c_proj", "layer_{i}/attn/o"),
    *norm("transformer.h.{i}.ln_2", "layer_{i}/norm2"),
    *conv1d("transformer.h.{i}.mlp.c_fc", "layer_{i}/mlp/up"),
    *conv1d("transformer.h.{i}.mlp.c_proj", "layer_{i}/mlp/down"),
    *norm("transformer.ln_f", "final_norm"),
    HEAD,
)
GPT_NEOX = (
    Tensor("gpt_neox.embed_in.weight", ("embed",)),
    *norm("gpt_neox.layers.{i}.input_layernorm", "layer_{i}/norm1"),
    *linear("gpt_neox.layers.{i}.attention.query_key_value", *QKV, per_head=True),
    *linear("gpt_neox.layers.{i}.attention.dense", "layer_{i}/attn/o"),
    *norm("gpt_neox.layers.{i}.post_attention_layernorm", "layer_{i}/norm2"),
    *linear("gpt_neox.layers.{i}.mlp.dense_h_to_4h", "layer_{i}/mlp/up"),
    *linear("gpt_neox.layers.{i}.mlp.dense_4h_to_h", "layer_{i}/mlp/down"),
    *norm("gpt_neox.final_layer_norm", "final_norm"),
    Tensor("embed_out.weight", ("head",), transpose=True),
)
