"""LoRA (Hu et al. 2021): x W + (x A) B · alpha / rank on the linear layers it is asked for; A and B alone are trained.

What is trained is `params["lora"]`: for every adapted module of the Hugging Face model its `lora_a` [in, rank] and
`lora_b` [rank, out]. A module that holds several layers of ours (GPT-2's c_attn) has one A for all and the columns of B
in the order of the files, as in peft. The base is never copied: `policy_params` lays the small arrays beside the
kernels of the reference, where the layers of `decoder` find them.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import PretrainedConfig

from ppo_jax.errors import UserError
from ppo_jax.models.decoder import DecoderSpec, Params
from ppo_jax.models.families import HEAD, Tensor, tensors_of
from ppo_jax.models.hf_io import param_shapes
from ppo_jax.ops.randomness import Purpose, purpose_key
from ppo_jax.sharding import by_rules

ALL_LINEAR = "all-linear"
HEAD_MODULE = "lm_head"  # in transformers, whatever the files of a family call it


@dataclass(frozen=True)
class Module:
    """A linear module of the Hugging Face model: its name, the kernels of ours it holds, and its widths."""

    name: str  # model.layers.0.self_attn.q_proj
    tensor: Tensor
    inputs: int
    outputs: tuple[int, ...]  # of each kernel

    @property
    def is_head(self) -> bool:
        return self.tensor.params == HEAD.params


@dataclass(frozen=True)
class Adapter:
    """Everything about an adapter that is not a weight; fixed for a run, so compiled in."""

    rank: int
    scale: float  # alpha / rank
    modules: tuple[Module, ...]
    heads: int  # of the model, for files that keep the channels of a head together
    targets: tuple[str, ...]  # what peft finds the same modules by


def linear_modules(config: PretrainedConfig, spec: DecoderSpec) -> list[Module]:
    """Every module that can have an adapter. A tied head is one too: what it adds does not touch the embedding."""
    shapes = param_shapes(replace(spec, tied_head=False))
    return [
        Module(
            name=HEAD_MODULE if tensor.params == HEAD.params else tensor.name.removesuffix(".weight"),
            tensor=tensor,
            inputs=shapes[tensor.params[0]][0],
            outputs=tuple(shapes[path][1] for path in tensor.params),
        )
        for tensor in tensors_of(config, spec, set(shapes))
        if all(path.endswith("/kernel") or path in HEAD.params for path in tensor.params)
    ]


def make_adapter(
    config: PretrainedConfig, spec: DecoderSpec, *, rank: int, scale: float, targets: Sequence[str] | str, where: str
) -> Adapter:
    """The adapter on the modules that are named as peft names them; errors begin with `where`.

    A target is a module's name or the end of one (`q_proj`, `attn.c_proj`), or `all-linear`: all but the head. A text
    instead of a list is `all-linear` or an expression that whole names must match.
    """
    modules = linear_modules(config, spec)
    in_layers = [module for module in modules if not module.is_head]
    endings = tuple(sorted({module.name.rpartition(".")[2] for module in in_layers}))
    if isinstance(targets, str) and targets != ALL_LINEAR:
        # Whole names: what such an expression means to another version of a library stays what it means here.
        targets = tuple(module.name for module in modules if _matches(targets, module.name, where))
    elif isinstance(targets, str):
        targets = (targets,)
    named = tuple(dict.fromkeys(name for target in targets for name in (endings if target == ALL_LINEAR else [target])))
    unknown = [name for name in named if not any(_is_named(module, name) for module in modules)]
    if unknown or not named:
        raise UserError(
            f"{where}: {', '.join(map(repr, unknown)) or 'nothing'} is no linear layer of this {config.model_type} "
            f"model; known are {', '.join(endings)}, {HEAD_MODULE}, and {ALL_LINEAR}, which is all of them but the last"
        )
    chosen = tuple(module for module in modules if any(_is_named(module, name) for name in named))
    return Adapter(rank=rank, scale=scale, modules=chosen, heads=spec.heads, targets=named)


def _is_named(module: Module, target: str) -> bool:
    return module.name == target or module.name.endswith(f".{target}")


def _matches(pattern: str, name: str, where: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression: {error}") from error


@partial(jax.jit, static_argnames=("adapter", "seed"))
def first_lora(adapter: Adapter, *, seed: int) -> Params:
    """A fresh adapter, float32: A uniform in ±1/sqrt(in), as in peft, and B = 0, so that the policy is its reference.

    Each A is a function of the seed and of its module's name: another target more or less changes none of them.
    """
    key = purpose_key(seed, 0, Purpose.ADAPTER)

    def first(module: Module) -> Params:
        own, bound = jax.random.fold_in(key, zlib.crc32(module.name.encode())), module.inputs**-0.5
        lora_a = jax.random.uniform(own, (module.inputs, adapter.rank), jnp.float32, -bound, bound)
        return {"lora_a": lora_a, "lora_b": jnp.zeros((adapter.rank, sum(module.outputs)), jnp.float32)}

    return by_rules({module.name: first(module) for module in adapter.modules})


def abstract_lora(adapter: Adapter) -> Params:
    """Shapes and dtypes of an adapter's weights; no memory is taken."""
    return jax.eval_shape(partial(first_lora, adapter, seed=0))


def laid_over(base: Params, lora: Params, adapter: Adapter) -> Params:
    """The base's own arrays, and beside each adapted kernel `lora_a` [in, rank] and `lora_b` [rank, out] times alpha /
    rank, in the dtype of the base; those that were there are replaced.

    Policy and reference both go through here, so that equal adapters give equal numbers in every dtype.
    """
    flat, dtype = flatten_dict(base, sep="/"), base["embed"].dtype
    for module in adapter.modules:
        weights = lora[module.name]
        parts = module.tensor.columns(adapter.scale * weights["lora_b"], module.outputs, adapter.heads)
        for path, lora_b in zip(module.tensor.params, parts, strict=True):
            name_a, name_b = _beside(path)
            flat[name_a], flat[name_b] = weights["lora_a"].astype(dtype), lora_b.astype(dtype)
    return unflatten_dict(flat, sep="/")


def policy_params(params: Params, ref_params: Params, adapter: Adapter | None) -> Params:
    """The whole parameters of what is trained: the adapter over the reference, or, without one, `params` themselves."""
    if adapter is None or "lora" not in params:
        return params
    others = {name: tree for name, tree in params.items() if name != "lora"}
    return laid_over(ref_params, params["lora"], adapter) | others


def merged(params: Params) -> Params:
    """Plain parameters that compute the same: W + A B in place of each adapted kernel; a tied head becomes its own."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    for path in [path.removesuffix("lora_a") for path in flat if path.endswith("lora_a")]:
        delta = flat.pop(f"{path}lora_a") @ flat.pop(f"{path}lora_b")
        kernel = "head" if path == "head_" else f"{path}kernel"
        flat[kernel] = (flat[kernel] if kernel in flat else flat["embed"].T) + delta
    return unflatten_dict(flat, sep="/")


def _beside(path: str) -> tuple[str, str]:
    """Where the adapter of a kernel lies: in the dictionary of its layer, that of the head beside it."""
    start = "head_" if path in HEAD.params else path.removesuffix("kernel")
    return f"{start}lora_a", f"{start}lora_b"
