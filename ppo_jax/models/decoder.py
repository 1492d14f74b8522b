"""The one decoder: a list of per-layer specs applied to hidden states, with an explicit key-value cache.

Every family is a `DecoderSpec` (see `families`), never a subclass. Parameters are a plain nested dict with weights
stored (in, out); the model computes in the dtype of the parameters it is given, norms and softmax in float32 at least.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.ops.logprobs import wide_dtype
from ppo_jax.sharding import by_heads, by_rows, by_width

Params = Any  # nested dictionaries of arrays
Cache = tuple[tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]], ...]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer."""

    attention_scale: float


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions: the inverse frequencies in radians per position, one per pair of a head's channels."""

    inverse_frequencies: tuple[float, ...]


@dataclass(frozen=True)
class DecoderSpec:
    """Everything about a decoder that is not a weight. Two specs that compare equal are the same function."""

    vocab_size: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    norm: str  # "rms" or "layer"
    norm_eps: float
    activation: str  # a key of ACTIVATIONS
    gated_mlp: bool
    rope: RopeSpec | None  # None: learned position embeddings
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied_head: bool


def rope_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """θ^(−2i/d) for i = 0 .. d/2 − 1, in float64."""
    return theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def at_least_float32(x: Array) -> Array:
    return x.astype(wide_dtype(x.dtype))


def rotate(x: Float[Array, "B S N H"], positions: Int[Array, "B S"], rope: RopeSpec) -> Float[Array, "B S N H"]:
    """Rotary embedding in the half-split layout: channel i is paired with channel i + H/2."""
    wide = at_least_float32(x)
    frequencies = jnp.asarray(rope.inverse_frequencies, wide.dtype)
    angles = (positions[..., None].astype(wide.dtype) * frequencies[None, None])[:, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    queries: Float[Array, "B L N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B L S"],
    *,
    scale: float,
) -> Float[Array, "B L N H"]:
    """Softmax attention, grouped queries: query heads n share key head n // (N / K).

    A query that sees nothing (a left pad) gets a uniform average; it is finite and nobody reads it.
    """
    batch, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    wide = wide_dtype(queries.dtype)
    grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = scale * jnp.einsum("blkgh,bksh->bkgls", grouped, keys, preferred_element_type=wide)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgls,bksh->blkgh", weights, values).reshape(queries.shape)


class Norm(nn.Module):
    """RMSNorm (gain) or LayerNorm (gain and bias), computed in float32 at least."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x):
        wide = at_least_float32(x)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        gain = self.param("scale", nn.initializers.ones, x.shape[-1:])
        out = normed.astype(x.dtype) * gain[None, None]
        if self.kind == "layer":
            out = out + self.param("bias", nn.initializers.zeros, x.shape[-1:])[None, None]
        return out


class Linear(nn.Module):
    """x W + b with W stored (in, out)."""

    features: int
    bias: bool

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        out = x @ kernel
        return out + self.param("bias", nn.initializers.zeros, (self.features,))[None, None] if self.bias else out


class Attention(nn.Module):
    """Attention over the given tokens, or over a cache into which they are written at `slot` first."""

    spec: DecoderSpec
    layer: LayerSpec

    @nn.compact
    def __call__(self, x, positions, visible, cache, slot):
        spec = self.spec

        def project(name, heads):
            out = Linear(heads * spec.head_dim, bias=spec.qkv_bias, name=name)(x)
            return out.reshape(*x.shape[:2], heads, spec.head_dim)

        queries, keys, values = (
            project("q", spec.heads),
            project("k", spec.kv_heads),
            project("v", spec.kv_heads),
        )
        if spec.rope is not None:
            queries, keys = rotate(queries, positions, spec.rope), rotate(keys, positions, spec.rope)
        queries, keys, values = by_rows((queries, keys.swapaxes(1, 2), values.swapaxes(1, 2)))
        if cache is not None:
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=2)
                for old, new in zip(cache, (keys, values), strict=True)
            )
        mixed = attend(queries, keys, values, visible, scale=self.layer.attention_scale)
        flat = mixed.reshape(*x.shape[:2], spec.heads * spec.head_dim)
        if cache is not None:
            flat = by_heads(flat)
        return Linear(spec.width, bias=spec.out_bias, name="o")(flat), (keys, values)


class Mlp(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) when gated."""

    spec: DecoderSpec

    @nn.compact
    def __call__(self, x):
        spec, activation = self.spec, ACTIVATIONS[self.spec.activation]
        up = Linear(spec.mlp_width, bias=spec.mlp_bias, name="up")(x)
        if spec.gated_mlp:
            hidden = activation(Linear(spec.mlp_width, bias=spec.mlp_bias, name="gate")(x)) * up
        else:
            hidden = activation(up)
        return Linear(spec.width, bias=spec.mlp_bias, name="down")(hidden)


class Block(nn.Module):
    """Pre-norm attention and MLP with residual connections."""

    spec: DecoderSpec
    layer: LayerSpec

    @nn.compact
    def __call__(self, x, positions, visible, cache, slot):
        norm = partial(Norm, self.spec.norm, self.spec.norm_eps)
        attended, cache = Attention(self.spec, self.layer, name="attn")(
            norm(name="norm1")(x), positions, visible, cache, slot
        )
        x = x + attended
        return x + Mlp(self.spec, name="mlp")(norm(name="norm2")(x)), cache


class Decoder(nn.Module):
    """Tokens to final hidden states [B, L, D] (after the last norm) and the keys and values of every layer.

    Without a cache the given tokens attend to themselves (`visible` is [B, L, L]); with one they are written at `slot`
    and attend to all of it (`visible` is [B, L, S]). The head is apart (`head_logits`), so that callers can stream it.
    """

    spec: DecoderSpec
    remat: bool = False

    @nn.compact
    def __call__(self, tokens, positions, visible, cache: Cache | None = None, slot=None):
        spec = self.spec
        embedding = self.param("embed", nn.initializers.normal(0.02), (spec.vocab_size, spec.width))
        x = by_width(embedding[tokens])
        if spec.rope is None:
            table = self.param("positions", nn.initializers.normal(0.02), (spec.max_positions, spec.width))
            x = x + table[positions]
        # Whole sequences: a device gathers a layer and computes its own answers. Next tokens: the weights stay.
        place = by_rows if cache is None else by_width
        x = place(x)
        if not spec.tied_head:  # declared here so that it is initialised; used by `head_logits`
            self.param("head", nn.initializers.normal(0.02), (spec.width, spec.vocab_size))
        block_type = nn.remat(Block) if self.remat else Block
        layer_caches = []
        for i, layer in enumerate(spec.layers):
            block = block_type(spec, layer, name=f"layer_{i}")
            x, layer_cache = block(x, positions, visible, None if cache is None else cache[i], slot)
            x = place(x)
            layer_caches.append(layer_cache)
        return Norm(spec.norm, spec.norm_eps, name="final_norm")(x), tuple(layer_caches)


def init_params(spec: DecoderSpec, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters: normal(0, 0.02) weights, unit gains, zero biases."""
    one = jnp.zeros((1, 1), jnp.int32)
    params = Decoder(spec).init(key, one, one, jnp.ones((1, 1, 1), bool))["params"]
    return cast(params, dtype)


def abstract_params(spec: DecoderSpec, dtype=jnp.float32) -> Params:
    """Shapes and dtypes of the parameters; no memory is taken."""
    return jax.eval_shape(lambda: init_params(spec, jax.random.PRNGKey(0), dtype))


def cast(params: Params, dtype) -> Params:
    """Every parameter in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def positions_from_mask(token_mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """0, 1, 2 ... over the real tokens of a row, wherever its padding sits; 0 at padding."""
    return jnp.maximum(jnp.cumsum(token_mask, axis=1, dtype=jnp.int32) - 1, 0)


def causal_visibility(token_mask: Bool[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Query l sees key s where s <= l and s is a real token."""
    length = token_mask.shape[1]
    return jnp.tril(jnp.ones((length, length), bool))[None] & token_mask[:, None, :]


def hidden_states(
    params: Params,
    tokens: Int[Array, "B S"],
    token_mask: Bool[Array, "B S"],
    *,
    spec: DecoderSpec,
    remat: bool = False,
) -> Float[Array, "B S D"]:
    """Final hidden states of whole sequences, in the dtype of the parameters; `hidden[:, s]` predicts token s + 1."""
    hidden, _ = Decoder(spec, remat=remat).apply(
        {"params": params}, tokens, positions_from_mask(token_mask), causal_visibility(token_mask)
    )
    return hidden


def response_hidden(
    params: Params,
    prompt_tokens: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    response_tokens: Int[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    spec: DecoderSpec,
    remat: bool = False,
) -> Float[Array, "B T D"]:
    """Hidden states that predict the response: entry t predicts `response_tokens[:, t]`. The one shift by one."""
    hidden = hidden_states(
        params,
        jnp.concatenate([prompt_tokens, response_tokens], axis=1),
        jnp.concatenate([prompt_mask, response_mask], axis=1),
        spec=spec,
        remat=remat,
    )
    prompt_length = prompt_tokens.shape[1]
    return hidden[:, prompt_length - 1 : -1]


def head_logits(params: Params, hidden: Float[Array, "*rows D"], *, spec: DecoderSpec) -> Float[Array, "*rows V"]:
    """Logits of hidden states, accumulated in float32 at least. A tied head is the embedding itself, not a copy."""
    wide = wide_dtype(hidden.dtype)
    if spec.tied_head:
        return jnp.einsum("...d,vd->...v", hidden, params["embed"], preferred_element_type=wide)
    return jnp.einsum("...d,dv->...v", hidden, params["head"], preferred_element_type=wide)


def parameter_count(params: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
