"""The critic: what its parameters are, and the values it gives to the states that tokens are drawn from.

Its parameters are trained beside the policy's, as `params["critic"]`: a head, and, where it is a model of its own, a
trunk. Policy, export and reference know nothing of it.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float

from ppo_jax.models.decoder import DecoderSpec, Params, cast, response_hidden
from ppo_jax.models.heads import head_values

Sequences = Sequence[Array]  # prompt tokens and mask [B, P], response tokens and mask [B, T]


def split_critic(params: Params) -> tuple[Params, Any]:
    """The policy's parameters, and the critic's or None; also of gradients and updates."""
    return {name: tree for name, tree in params.items() if name != "critic"}, params.get("critic")


def cast_trunks(params: Params, dtype) -> Params:
    """Policy and critic in the dtype that forward passes compute in. A value head stays as it is, in its masters', and
    so does an adapter: it is cast where it is laid over the base.
    """
    policy, critic = split_critic(params)
    policy = policy if "lora" in policy else cast(policy, dtype)
    if critic is None:
        return policy
    return policy | {"critic": {**cast(critic, dtype), "head": critic["head"]}}


def trunk_values(params: Params, hidden: Float[Array, "B T D"], _: Sequences) -> Float[Array, "B T"]:
    """Values read from the policy's own hidden states by a head on its trunk, in units of the reward."""
    return head_values(params["critic"]["head"], hidden)


def model_values(
    params: Params, _: Float[Array, "B T D"], sequences: Sequences, *, spec: DecoderSpec, remat: bool
) -> Float[Array, "B T"]:
    """Values of a model of its own, read from its hidden state that sees the same tokens as the policy's."""
    critic = params["critic"]
    return head_values(critic["head"], response_hidden(critic["trunk"], *sequences, spec=spec, remat=remat))
