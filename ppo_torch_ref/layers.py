"""The parts of a decoder: norms, attention, MLP and the block of both; one class each serves every family.

What a family computes and what Hugging Face calls its modules is data, a `Spec`. Everything is computed in the dtype of
the parameters, norms, rotations and softmax in float32 at least; unlike `transformers`, float64 is float64 throughout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppo_torch_ref.rope import Rope, at_least_float32, rotate

ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer."""

    scale: float  # of the attention scores
    window: int | None  # how many tokens a query sees, itself included; None: all before it
    rope: Rope | None  # None: this layer does not rotate


@dataclass(frozen=True)
class Spec:
    """A decoder without its weights. The defaults are Llama's."""

    vocab_size: int
    max_positions: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    layers: tuple[LayerSpec, ...]
    norm: Callable[[int], nn.Module]  # makes a norm of a width
    activation: Callable[[Tensor], Tensor]
    tied_head: bool
    # The mathematics.
    linear: Callable[..., nn.Module] = nn.Linear
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    parallel: bool = False  # the MLP reads what the attention reads, not its outcome
    qk_norm: str | None = None  # queries and keys: "head" normalises each head, "full" all heads together
    qkv_by_head: bool = False  # the fused projection holds query, key and value of a head side by side
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    # Names of modules; projections of several names are applied side by side.
    trunk: str = "model"
    embedding: str = "embed_tokens"
    position_embedding: str | None = None
    blocks: str = "layers"
    final_norm: str = "norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention_out: str = "o_proj"
    mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_out: str = "down_proj"
    norm_before_attention: str | None = "input_layernorm"
    norm_after_attention: str | None = None
    norm_before_mlp: str | None = "post_attention_layernorm"
    norm_after_mlp: str | None = None


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap), or x where there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    """Softmax attention of queries [B, S, N, H] over keys and values [B, S, K, H]; N / K queries share a key head."""
    groups = queries.shape[2] // keys.shape[2]
    keys, values = keys.repeat_interleave(groups, dim=2), values.repeat_interleave(groups, dim=2)
    scores = soft_cap(at_least_float32(scale * torch.einsum("blnh,bsnh->bnls", queries, keys)), softcap)
    scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
    return torch.einsum("bnls,bsnh->blnh", weights, values).flatten(2)


class RMSNorm(nn.Module):
    """x / rms(x) times the gain, which is the weight, or 1 + weight in Gemma (`offset` 1)."""

    def __init__(self, width: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.full((width,), 1.0 - offset)), eps, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (at_least_float32(self.weight) + self.offset)).to(x.dtype)


class Conv1D(nn.Module):
    """GPT-2's linear layer, its weight stored (in, out)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    def __init__(self, spec: Spec, layer: LayerSpec):
        super().__init__()
        self.spec, self.layer = spec, layer
        self.widths = (spec.heads * spec.head_dim, *(spec.kv_heads * spec.head_dim,) * 2)
        for name, width in zip(spec.qkv, self.widths if len(spec.qkv) == 3 else (sum(self.widths),), strict=True):
            self.add_module(name, spec.linear(spec.width, width, bias=spec.qkv_bias))
        self.add_module(spec.attention_out, spec.linear(self.widths[0], spec.width, bias=spec.out_bias))
        if spec.qk_norm is not None:
            q_width, k_width = self.widths[:2] if spec.qk_norm == "full" else (spec.head_dim, spec.head_dim)
            self.q_norm, self.k_norm = spec.norm(q_width), spec.norm(k_width)

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        spec, layer = self.spec, self.layer
        queries, keys, values = self.queries_keys_values(x)
        if spec.qk_norm == "head":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        elif spec.qk_norm == "full":
            queries, keys = (norm(x.flatten(2)).view_as(x) for norm, x in ((self.q_norm, queries), (self.k_norm, keys)))
        if layer.rope is not None:
            queries, keys = (rotate(x, positions, layer.rope.frequencies, layer.rope.factor) for x in (queries, keys))
        mixed = attend(queries, keys, values, visible, scale=layer.scale, softcap=spec.attention_softcap)
        return self.get_submodule(spec.attention_out)(mixed)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, S, N, H], [B, S, K, H] and [B, S, K, H]."""
        projected = torch.cat([self.get_submodule(name)(x) for name in self.spec.qkv], dim=-1)
        if self.spec.qkv_by_head:
            return projected.unflatten(-1, (self.spec.heads, 3, -1)).unbind(dim=-2)
        return tuple(part.unflatten(-1, (-1, self.spec.head_dim)) for part in projected.split(self.widths, dim=-1))


class Mlp(nn.Module):
    """out(act(in x)), or out(act(gate x) * up x) where gated."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        inner = spec.mlp_width * (2 if spec.gated else 1)
        for name in spec.mlp_in:
            self.add_module(name, spec.linear(spec.width, inner // len(spec.mlp_in), bias=spec.mlp_bias))
        self.add_module(spec.mlp_out, spec.linear(spec.mlp_width, spec.width, bias=spec.mlp_bias))

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        hidden = torch.cat([self.get_submodule(name)(x) for name in spec.mlp_in], dim=-1)
        if spec.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = spec.activation(gate) * up
        else:
            hidden = spec.activation(hidden)
        return self.get_submodule(spec.mlp_out)(hidden)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream, with norms before them, after them, or both."""

    def __init__(self, spec: Spec, layer: LayerSpec):
        super().__init__()
        self.spec, self.layer = spec, layer
        self.add_module(spec.attention, Attention(spec, layer))
        self.mlp = Mlp(spec)
        norms = (spec.norm_before_attention, spec.norm_after_attention, spec.norm_before_mlp, spec.norm_after_mlp)
        for name in filter(None, norms):
            self.add_module(name, spec.norm(spec.width))

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        spec = self.spec
        attended = self.get_submodule(spec.attention)(self.normed(spec.norm_before_attention, x), positions, visible)
        summed = x + self.normed(spec.norm_after_attention, attended)
        read = x if spec.parallel else summed
        return summed + self.normed(spec.norm_after_mlp, self.mlp(self.normed(spec.norm_before_mlp, read)))

    def normed(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else self.get_submodule(name)(x)
