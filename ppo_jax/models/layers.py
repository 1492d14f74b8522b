"""What the decoder is made of: its specification, attention, norms, linear layers, and the block of a layer.

Weights are stored (in, out); a layer computes in the dtype of the parameters it is given, norms and softmax in float32
at least.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppo_jax.models.rope import RopeSpec, rotate
from ppo_jax.ops.logprobs import wide_dtype
from ppo_jax.sharding import by_heads, by_rows

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


@jax.custom_vjp
def matmul(x: Float[Array, "*rows I"], kernel: Float[Array, "I O"]) -> Float[Array, "*rows O"]:
    """x W, with the narrower operand on the left in the gradient of W.

    XLA's matrix products on a CPU want the summed axis of the left operand last, and write one where it is not anew,
    transposed. JAX's own rule has the gradient of the outcome there, in a gated MLP the widest array of the model.
    """
    if x.size == x.shape[-1] and x.shape[-1] % 2 == 0:
        return jax.lax.platform_dependent(x, kernel, cpu=_in_halves, default=jnp.matmul)
    return x @ kernel


def _in_halves(row: Float[Array, "*ones I"], kernel: Float[Array, "I O"]) -> Float[Array, "*ones O"]:
    """x W of a single row as the sum of the products of its halves.

    XLA on a CPU computes one row's product on one core, which does not reach the memory's bandwidth, and two on two.
    """
    halves = kernel.reshape(2, -1, kernel.shape[1])
    parts = wide_einsum("bi,bio->bo", row.reshape(2, -1), halves)
    return jnp.sum(parts, axis=0).astype(row.dtype).reshape(*row.shape[:-1], -1)


def _matmul_forward(x, kernel):
    # A weight that is not trained, the base of an adapter, needs no gradient, and so no x to make it of.
    return matmul(x.value, kernel.value), (x.value if kernel.perturbed else None, kernel.value)


def _matmul_backward(operands, gradient):
    x, kernel = operands
    of_x = jax.lax.dot_general(gradient, kernel, (((gradient.ndim - 1,), (1,)), ((), ())))
    if x is None:
        return of_x, None
    rows = tuple(range(x.ndim - 1))
    if x.shape[-1] <= gradient.shape[-1]:
        return of_x, jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))
    return of_x, jax.lax.dot_general(gradient, x, ((rows, rows), ((), ()))).T


matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


class Linear(nn.Module):
    """x W + b with W stored (in, out), and (x A) B beside it where an adapter is laid over the layer (see `lora`)."""

    features: int
    bias: bool

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        out = matmul(x, kernel)
        if self.has_variable("params", "lora_a"):
            out = out + (x @ self.get_variable("params", "lora_a")) @ self.get_variable("params", "lora_b")
        return out + self.param("bias", nn.initializers.zeros, (self.features,))[None, None] if self.bias else out


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
