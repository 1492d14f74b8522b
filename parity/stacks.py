"""One model case loaded by both stacks, and the same inputs for both.

Weights, gradients and moments are compared under the Hugging Face names of the tensors, in their layout.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.numpy import load_file

from parity.cases import Answers, ModelCase
from parity.critics import TRUNK, jax_critic_named
from parity.rows import Named
from ppo_jax import records
from ppo_jax.models import hf_io
from ppo_jax.models.critic import split_critic
from ppo_jax.models.decoder import DecoderSpec, abstract_params, head_logits, hidden_states
from ppo_jax.models.families import family_of, spec_of
from ppo_torch_ref import rollout as torch_rollout
from ppo_torch_ref.model import load_model


def in_both(dtype: str, inputs: Iterable[np.ndarray]) -> tuple[list[jax.Array], list[torch.Tensor]]:
    """The same arrays in both stacks: floats in `dtype`, integers and masks as they are."""
    arrays = [x.astype(dtype) if x.dtype.kind == "f" else x for x in inputs]
    return [jnp.asarray(x) for x in arrays], [torch.from_numpy(x) for x in arrays]


# Compared by identity: what is cached for a pair never serves another one.
@dataclass(eq=False)
class Pair:
    """Policy and reference of one case in both stacks, all parameters in one dtype."""

    case: ModelCase
    dtype: str

    @cached_property
    def config(self) -> Any:
        return hf_io.load_config(self.case.directory)

    @cached_property
    def spec(self) -> DecoderSpec:
        return spec_of(self.config)

    @cached_property
    def params(self) -> Any:
        return hf_io.load_params(self.case.directory, self.config, self.spec, dtype=jnp.dtype(self.dtype))

    @cached_property
    def ref_params(self) -> Any:
        return hf_io.load_params(self.case.ref_directory, self.config, self.spec, dtype=jnp.dtype(self.dtype))

    def new_model(self) -> torch.nn.Module:
        """A policy of the twin that may be trained."""
        return load_model(self.case.directory, dtype=getattr(torch, self.dtype))

    @cached_property
    def model(self) -> torch.nn.Module:
        return self.new_model()

    @cached_property
    def ref_model(self) -> torch.nn.Module:
        return load_model(self.case.ref_directory, dtype=getattr(torch, self.dtype))

    @cached_property
    def zero_gradients(self) -> Named:
        return zero_gradients(self.config, self.spec)

    def file_tensors(self) -> Named:
        """What the files of the case hold, cast; buffers and a second copy of a tied head are not weights.

        A bare trunk, as the hub's GPT-2, leaves out the prefix of its names.
        """
        stored: Named = {}
        for file in sorted(self.case.directory.glob("*.safetensors")):
            stored.update(load_file(file))
        if self.spec.tied_head:
            stored.pop("lm_head.weight", None)
        family = family_of(self.config)
        if not any(name.startswith(family.prefix) for name in stored):
            stored = {family.prefix + name: x for name, x in stored.items()}
        return {name: x.astype(self.dtype) for name, x in stored.items() if not name.endswith(family.buffers)}

    def jax_named(self, tree: Any) -> Named:
        """A tree shaped like the parameters (weights, gradients, moments) under its Hugging Face names."""
        policy, critic = split_critic(tree)
        tensors = hf_io.export_tensors(self.config, self.spec, policy, jnp.dtype(self.dtype))
        return tensors | jax_critic_named(self.config, self.spec, critic, self.dtype)

    def split_zero_gradients(self, tensors: Named) -> tuple[Named, Named]:
        """(elements with an ordinary gradient, those whose gradient is 0 in theory), flat where a tensor has both."""
        ordinary, zero_in_theory = {}, {}
        for name, x in tensors.items():
            zeros = self.zero_gradients.get(name.removeprefix(TRUNK), np.zeros(x.shape, bool))
            if not zeros.all():
                ordinary[name] = x[~zeros] if zeros.any() else x
            if zeros.any():
                zero_in_theory[name] = x[zeros]
        return ordinary, zero_in_theory

    def jax_logits(self, tokens: np.ndarray, mask: np.ndarray) -> jax.Array:
        return _logits(self.params, jnp.asarray(tokens), jnp.asarray(mask), spec=self.spec)

    def rollouts(self, answers: Answers) -> tuple[records.Rollout, torch_rollout.Rollout]:
        """The answers as rollouts; fields that scoring does not read are zeros."""
        sequences = (answers.prompt_tokens, answers.prompt_mask, answers.response_tokens, answers.response_mask)
        per_token = np.zeros(answers.response_mask.shape)
        per_answer = np.zeros(len(answers.response_mask), np.int32)
        arrays, tensors = in_both(self.dtype, (*sequences, per_token, per_token, per_answer))
        ours = records.Rollout(*arrays, group_id=arrays[-1], policy_version=jnp.zeros((), jnp.int32))
        return ours, torch_rollout.Rollout(*tensors)


@partial(jax.jit, static_argnames="spec")
def _logits(params: Any, tokens: jax.Array, mask: jax.Array, *, spec: DecoderSpec) -> jax.Array:
    return head_logits(params, hidden_states(params, tokens, mask, spec=spec), spec=spec)


def zero_gradients(config: Any, spec: DecoderSpec) -> Named:
    """Which elements of every tensor have a gradient that is 0 in theory, as booleans under the tensors' names.

    These are key biases where nothing tells the keys apart by position: they shift all scores of a query alike, which
    softmax does not see. A rotation turns a bias with its key's position, a norm of the keys or a cap of the scores
    makes its effect depend on the key; with any of these its gradient is an ordinary one.
    """
    is_zero = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(spec))
    if spec.qkv_bias and spec.qk_norm is None and spec.attention_softcap is None:
        for i, layer in enumerate(spec.layers):
            rotated = 0 if layer.rope is None else 2 * len(layer.rope.inverse_frequencies)
            by_head = np.broadcast_to(np.arange(spec.head_dim) >= rotated, (spec.kv_heads, spec.head_dim))
            is_zero[f"layer_{i}"]["attn"]["k"]["bias"] = by_head.reshape(-1).astype(np.float32)
    exported = hf_io.export_tensors(config, spec, is_zero, jnp.dtype("float32"))
    return {name: x.astype(bool) for name, x in exported.items()}
