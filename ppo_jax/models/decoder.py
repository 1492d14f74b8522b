"""The one decoder: a list of per-layer specs applied to hidden states, with an explicit key-value cache.

Every family is a `DecoderSpec` (see `families`), never a subclass. Parameters are a plain nested dict; the model
computes in their dtype. What a layer computes is in `layers`.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.layers import Block, DecoderSpec, Norm, soft_cap, wide_einsum, windowed
from ppo_jax.sharding import by_rows, by_width

Params = Any  # nested dictionaries of arrays
Cache = tuple[tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]], ...]


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
