"""A decoder in two parts: layers that stay as they are, and the last ones, which train."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.decoder import (
    Block,
    Decoder,
    DecoderSpec,
    Norm,
    Params,
    causal_visibility,
    positions_from_mask,
    windowed,
)
from ppo_jax.sharding import by_rows


def split_trunk(trunk: Params, first: int) -> tuple[Params, Params]:
    """(frozen, trained) parameters of a trunk whose layers from `first` on train, and the final norm."""

    def trains(name: str) -> bool:
        return name == "final_norm" or (name.startswith("layer_") and int(name.removeprefix("layer_")) >= first)

    frozen = {name: tree for name, tree in trunk.items() if not trains(name)}
    return frozen, {name: tree for name, tree in trunk.items() if trains(name)}


def lower_states(
    params: Params, tokens: Int[Array, "B S"], token_mask: Bool[Array, "B S"], *, spec: DecoderSpec, first: int
) -> Float[Array, "B S D"]:
    """The residual stream before layer `first`, in the dtype of the parameters."""
    lower = Decoder(replace(spec, layers=spec.layers[:first]), final_norm=False)
    positions, visible = positions_from_mask(token_mask), causal_visibility(token_mask)
    return lower.apply({"params": params}, tokens, positions, visible)[0]


def upper_hidden(
    params: Params,
    states: Float[Array, "B S D"],
    token_mask: Bool[Array, "B S"],
    *,
    spec: DecoderSpec,
    first: int,
    remat: bool = False,
) -> Float[Array, "B S D"]:
    """Final hidden states, made of those before layer `first`; with `lower_states` the same as `hidden_states`."""
    positions, visible = positions_from_mask(token_mask), causal_visibility(token_mask)
    block_type = nn.remat(Block) if remat else Block
    for i, layer in enumerate(spec.layers[first:], first):
        block, mask = block_type(spec, layer), windowed(visible, layer.window, 0)
        states = by_rows(block.apply({"params": params[f"layer_{i}"]}, states, positions, mask, None, None)[0])
    hidden: Any = Norm(spec.norm, spec.norm_eps).apply({"params": params["final_norm"]}, states)
    return hidden
