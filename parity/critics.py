"""The critic in both stacks: the same random weights, and the same names for them.

`critic.head.kernel`, `critic.head.bias`, and of one with a trunk of its own `critic.trunk.` before a Hugging Face name.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from parity.rows import Named, named
from ppo_jax.models.decoder import DecoderSpec, Params
from ppo_jax.models.heads import critic_spec, trunk_params
from ppo_jax.models.hf_io import export_tensors
from ppo_torch_ref.critic import Critic, load_critic

CRITIC, TRUNK = "critic.", "critic.trunk."


def jax_critic(kind: str, ref_params: Params) -> Params:
    """What a critic of this kind adds to the parameters: a random head, on the reference's trunk if it has its own."""
    if kind == "none":
        return {}
    reference = jax.tree.leaves(ref_params)[0]
    head = {name: jnp.asarray(x, reference.dtype) for name, x in _random_head(_width(ref_params)).items()}
    if kind == "value_head":
        return {"critic": {"head": head}}
    return {"critic": {"head": head, "trunk": jax.tree.map(jnp.copy, trunk_params(ref_params))}}


def torch_critic(kind: str, ref_directory: Path, width: int, dtype: torch.dtype) -> Critic | None:
    """The same of the twin."""
    if kind == "none":
        return None
    critic = Critic(width).to(dtype) if kind == "value_head" else load_critic(ref_directory, dtype=dtype)
    with torch.no_grad():
        for name, x in _random_head(width).items():
            getattr(critic.head, name).copy_(torch.from_numpy(x))
    return critic


def _random_head(width: int) -> Named:
    """Values of size 1 from hidden states of size 1; float32 numbers, so that every dtype starts from the same."""
    kernel = np.random.default_rng(2).normal(0, width**-0.5, width).astype(np.float32)
    return {"kernel": kernel, "bias": np.array(0.125, np.float32)}


def _width(params: Params) -> int:
    return params["embed"].shape[1]


def jax_critic_named(config: PretrainedConfig, spec: DecoderSpec, critic: Any, dtype: str) -> Named:
    """A tree shaped like `params["critic"]` whose trunk, if any, is of the policy's config and spec; {} of None."""
    if critic is None:
        return {}
    found = {f"critic.head.{name}": x for name, x in named(critic["head"]).items()}
    if "trunk" in critic:
        trunk = export_tensors(config, critic_spec(spec), critic["trunk"], jnp.dtype(dtype))
        found |= {TRUNK + name: x for name, x in trunk.items()}
    return found


def torch_critic_named(critic: nn.Module | None) -> Named:
    """The parameters of the twin's critic; {} of None."""
    return {} if critic is None else named(of_critic(dict(critic.named_parameters())))


def of_critic(tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors of a critic's module under the names they have beside the policy's."""
    return {f"{CRITIC}{name}": x for name, x in tensors.items()}
