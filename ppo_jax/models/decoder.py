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
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.linear import Linear
from ppo_jax.models.rope import RopeSpec, rotate
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
    window: int | None = None  # how many tokens a query sees, itself included; None: all before it
    rope: RopeSpec | None = None  # None: this layer does not know positions


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
    norm: str  # "rms", "rms_offset" (its gain is 1 + weight) or "layer"
    norm_eps: float
    activation: str  # a key of ACTIVATIONS
    gated_mlp: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied_head: bool
    pre_norm: bool = True  # normalise what attention and MLP read
    post_norm: bool = False  # normalise what they add to the residual stream
    parallel_residual: bool = False  # the MLP reads what attention reads, not its outcome
    qk_norm: str | None = None  # queries and keys: "head" normalises each head, "full" all heads together
    learned_positions: bool = False
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None


def at_least_float32(x: Array) -> Array:
    return x.astype(wide_dtype(x.dtype))


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap · tanh(x / cap), or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def windowed(visible: Bool[Array, "B L S"], window: int | None, first_slot) -> Bool[Array, "B L S"]:
    """What is visible within the window: query l, at slot `first_slot + l`, sees the last `window` slots.

    Slots stand in for positions, since the real tokens of a row lie side by side.
    """
    if window is None:
        return visible
    queries, keys = (jnp.arange(length, dtype=jnp.int32) for length in visible.shape[1:])
    return visible & (first_slot + queries[:, None] - keys[None] < window)[None]


def _wide_einsum(equation: str, x: Array, y: Array) -> Array:
    """Einsum of two operands, each index of one in the other or in the outcome, which is float32 at least.

    The gradient is rounded to the operands' dtype before it is multiplied, as that of any product of theirs is. JAX's
    own rule widens the operand instead, and a GPU multiplies float32 at half of bfloat16's rate at best.
    """
    return jnp.einsum(equation, x, y, preferred_element_type=wide_dtype(x.dtype))


wide_einsum = jax.custom_vjp(_wide_einsum, nondiff_argnums=(0,))


def _wide_einsum_forward(equation, x, y):
    # As in `matmul`: an operand that is not trained, a frozen head, needs no gradient, and so not the other operand.
    kept = (x.value if y.perturbed else None, y.value if x.perturbed else None)
    return _wide_einsum(equation, x.value, y.value), kept


def _wide_einsum_backward(equation, operands, gradient):
    (x, y), (inputs, outcome) = operands, equation.split("->")
    of_x, of_y = inputs.split(",")
    gradient = gradient.astype((y if x is None else x).dtype)
    return (
        None if y is None else jnp.einsum(f"{outcome},{of_y}->{of_x}", gradient, y),
        None if x is None else jnp.einsum(f"{outcome},{of_x}->{of_y}", gradient, x),
    )


wide_einsum.defvjp(_wide_einsum_forward, _wide_einsum_backward, symbolic_zeros=True)


def attend(
    queries: Float[Array, "B L N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B L S"],
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B L N H"]:
    """Softmax attention, grouped queries: query heads n share key head n // (N / K).

    A query that sees nothing (a left pad) gets a uniform average; it is finite and nobody reads it.
    """
    batch, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    groups, wide = heads // kv_heads, wide_dtype(queries.dtype)
    # One row for every query that shares a key head: XLA's product on a CPU is slow with both axes apart.
    rows = queries.reshape(batch, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, groups * length, head_dim)
    scores = scale * wide_einsum("bkrh,bksh->bkrs", rows, keys)
    scores = soft_cap(scores, softcap).reshape(batch, kv_heads, groups, length, -1)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkrs,bksh->bkrh", weights.reshape(batch, kv_heads, groups * length, -1), values)
    return mixed.reshape(batch, kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4).reshape(queries.shape)


class Norm(nn.Module):
    """RMSNorm (gain, or 1 + gain) or LayerNorm (gain and bias), in float32 at least until the end.

    So do Gemma, OLMo 2 and torch's LayerNorm. Llama's kin in transformers round to the storage dtype before the gain,
    which in bfloat16 is one rounding more.
    """

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x):
        wide, shape = at_least_float32(x), x.shape[-1:]
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        zero_based = self.kind == "rms_offset"
        weight = self.param("scale", nn.initializers.zeros if zero_based else nn.initializers.ones, shape)
        gain = at_least_float32(weight) + (1.0 if zero_based else 0.0)
        out = normed * jnp.expand_dims(gain, range(x.ndim - 1))
        if self.kind == "layer":
            bias = at_least_float32(self.param("bias", nn.initializers.zeros, shape))
            out = out + jnp.expand_dims(bias, range(x.ndim - 1))
        return out.astype(x.dtype)


class Attention(nn.Module):
    """Attention over the given tokens, or over a cache into which they are written at `slot` first."""

    spec: DecoderSpec
    layer: LayerSpec

    @nn.compact
    def __call__(self, x, positions, visible, cache, slot):
        spec, rope = self.spec, self.layer.rope

        def project(name, heads, normalised):
            out = Linear(heads * spec.head_dim, bias=spec.qkv_bias, name=name)(x)
            if normalised and spec.qk_norm == "full":
                out = Norm(spec.norm, spec.norm_eps, name=f"{name}_norm")(out)
            out = out.reshape(*x.shape[:2], heads, spec.head_dim)
            if normalised and spec.qk_norm == "head":
                out = Norm(spec.norm, spec.norm_eps, name=f"{name}_norm")(out)
            return out

        queries = project("q", spec.heads, normalised=True)
        keys = project("k", spec.kv_heads, normalised=True)
        values = project("v", spec.kv_heads, normalised=False)
        if rope is not None:
            queries, keys = rotate(queries, positions, rope), rotate(keys, positions, rope)
        queries, keys, values = by_rows((queries, keys.swapaxes(1, 2), values.swapaxes(1, 2)))
        if cache is not None:
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=2)
                for old, new in zip(cache, (keys, values), strict=True)
            )
        scale, softcap = self.layer.attention_scale, spec.attention_softcap
        mixed = attend(queries, keys, values, visible, scale=scale, softcap=softcap)
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
    """Attention and MLP, each added to the residual stream, with norms before them, after them, or both."""

    spec: DecoderSpec
    layer: LayerSpec

    @nn.compact
    def __call__(self, x, positions, visible, cache, slot):
        spec = self.spec

        def before(name, x):
            return Norm(spec.norm, spec.norm_eps, name=name)(x) if spec.pre_norm else x

        def after(name, x):
            return Norm(spec.norm, spec.norm_eps, name=name)(x) if spec.post_norm else x

        attention, mlp = Attention(spec, self.layer, name="attn"), Mlp(spec, name="mlp")
        attended, cache = attention(before("norm1", x), positions, visible, cache, slot)
        summed = x + after("post_norm1", attended)
        return summed + after("post_norm2", mlp(before("norm2", x if spec.parallel_residual else summed))), cache


class Decoder(nn.Module):
    """Tokens to final hidden states [B, L, D] (after the last norm) and the keys and values of every layer.

    Without a cache the given tokens attend to themselves (`visible` is [B, L, L]); with one they are written at `slot`
    and attend to all of it (`visible` is [B, L, S]). The head is apart (`head_logits`), so that callers can stream it.
    """

    spec: DecoderSpec
    remat: bool = False
    final_norm: bool = True

    @nn.compact
    def __call__(self, tokens, positions, visible, cache: Cache | None = None, slot=None):
        spec = self.spec
        embedding = self.param("embed", nn.initializers.normal(0.02), (spec.vocab_size, spec.width))
        x = by_width(embedding[tokens])
        if spec.embedding_scale is not None:  # rounded to the weights' dtype first, as the models were trained
            x = x * jnp.asarray(spec.embedding_scale, x.dtype)
        if spec.learned_positions:
            table = self.param("positions", nn.initializers.normal(0.02), (spec.max_positions, spec.width))
            x = x + table[positions]
        # Whole sequences: a device gathers a layer and computes its own answers. Next tokens: the weights stay.
        place = by_rows if cache is None else by_width
        x = place(x)
        if not spec.tied_head:  # declared here so that it is initialised; used by `head_logits`
            self.param("head", nn.initializers.normal(0.02), (spec.width, spec.vocab_size))
        block_type = nn.remat(Block) if self.remat else Block
        first_slot = 0 if cache is None else slot
        masks = {window: windowed(visible, window, first_slot) for window in {layer.window for layer in spec.layers}}
        layer_caches = []
        for i, layer in enumerate(spec.layers):
            block = block_type(spec, layer, name=f"layer_{i}")
            x, layer_cache = block(x, positions, masks[layer.window], None if cache is None else cache[i], slot)
            x = place(x)
            layer_caches.append(layer_cache)
        if not self.final_norm:
            return x, tuple(layer_caches)
        return Norm(spec.norm, spec.norm_eps, name="final_norm")(x), tuple(layer_caches)


def init_params(spec: DecoderSpec, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters: normal(0, 0.02) weights, gains of 1, zero biases."""
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
    """Logits of hidden states, accumulated in float32 at least. A tied head is the embedding itself, not a copy; an
    adapter on it adds to the logits alone."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = (
        wide_einsum("rd,vd->rv", rows, params["embed"])
        if spec.tied_head
        else wide_einsum("rd,dv->rv", rows, params["head"])
    )
    if "head_lora_a" in params:
        logits += wide_einsum("rl,lv->rv", rows @ params["head_lora_a"], params["head_lora_b"])
    logits = logits.reshape(*hidden.shape[:-1], -1)
    return soft_cap(logits, spec.logit_softcap)


def parameter_count(params: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
