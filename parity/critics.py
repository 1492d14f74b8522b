"""The critic of both stacks under the same names: `critic.head.kernel`, `critic.trunk.` and a Hugging Face name."""

from typing import Any

import jax.numpy as jnp
from torch import nn
from transformers import PretrainedConfig

from parity.rows import Named, named
from ppo_jax.models.decoder import DecoderSpec
from ppo_jax.models.heads import critic_spec
from ppo_jax.models.hf_io import export_tensors

TRUNK = "critic.trunk."


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
    return {} if critic is None else {f"critic.{name}": x for name, x in named(dict(critic.named_parameters())).items()}
