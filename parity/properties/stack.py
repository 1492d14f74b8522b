"""The pure functions of both stacks behind one interface: NumPy in, NumPy out, in a chosen dtype."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ppo_jax.ops import advantages, kl, logprobs, losses, masking, rewards, sampling, streaming
from ppo_torch_ref import ops as torch_ops
from ppo_torch_ref import shaping as torch_shaping

# A composition of functions of `ops`; its first argument is the namespace that has them, the rest are arrays.
Composition = Callable[..., Any]


@dataclass(frozen=True)
class Stack(ABC):
    """Either stack in one dtype. `stack.k1(x, y)` is its function k1, of and as NumPy arrays."""

    name: str
    dtype: str

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number; bounds are multiples of it."""
        return float(np.finfo(self.dtype).eps)

    @abstractmethod
    def run(self, composition: Composition, *arrays: Any, **fixed: Any) -> Any:
        """What the composition gives; floats in the dtype of the stack, masks and integers as they are."""

    @abstractmethod
    def differentiate(self, composition: Composition, *arrays: Any, **fixed: Any) -> tuple[Any, list[np.ndarray]]:
        """What it gives, and the gradient of the sum of that with respect to every array of floats, in their order."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self.run, op(name))

    def _cast(self, x: Any) -> np.ndarray:
        x = np.array(x)
        return x.astype(self.dtype) if x.dtype.kind == "f" else x


@cache
def op(name: str) -> Composition:
    """The function of `ops` of this name as a composition; one object, by which what was compiled is found again."""
    if name.startswith("_"):
        raise AttributeError(name)
    return lambda ops, *arrays, **fixed: getattr(ops, name)(*arrays, **fixed)


def _functions(*modules: ModuleType) -> SimpleNamespace:
    """What the modules define, by name; not what they import."""
    return SimpleNamespace(
        **{
            name: function
            for module in modules
            for name, function in vars(module).items()
            if getattr(function, "__module__", None) == module.__name__
        }
    )


JAX_OPS = _functions(masking, logprobs, kl, rewards, advantages, losses, sampling, streaming)
TORCH_OPS = _functions(torch_ops, torch_shaping)


class JaxStack(Stack):
    """`ppo_jax.ops`, compiled once per composition, shapes and keyword arguments."""

    def run(self, composition: Composition, *arrays: Any, **fixed: Any) -> Any:
        with jax.enable_x64(self.dtype == "float64"):
            result = _compiled(composition, tuple(fixed), ())(*map(jnp.asarray, map(self._cast, arrays)), **fixed)
            return jax.tree.map(np.asarray, result)

    def differentiate(self, composition: Composition, *arrays: Any, **fixed: Any) -> tuple[Any, list[np.ndarray]]:
        cast = [self._cast(x) for x in arrays]
        floats = tuple(i for i, x in enumerate(cast) if x.dtype.kind == "f")
        with jax.enable_x64(self.dtype == "float64"):
            gradients, value = _compiled(composition, tuple(fixed), floats)(*map(jnp.asarray, cast), **fixed)
            return np.asarray(value), [np.asarray(x) for x in gradients]


@cache
def _compiled(composition: Composition, fixed: tuple[str, ...], differentiated: tuple[int, ...]) -> Any:
    """The composition with JAX's functions; or its gradients with respect to some of its arrays, and what it gives."""

    def total(*arrays, **keywords):
        value = composition(JAX_OPS, *arrays, **keywords)
        return jnp.sum(value), value

    plain = partial(composition, JAX_OPS)
    function = jax.grad(total, argnums=differentiated, has_aux=True) if differentiated else plain
    return jax.jit(function, static_argnames=fixed)


class TorchStack(Stack):
    """`ppo_torch_ref.ops`."""

    def run(self, composition: Composition, *arrays: Any, **fixed: Any) -> Any:
        with torch.no_grad():
            result = composition(TORCH_OPS, *(torch.from_numpy(self._cast(x)) for x in arrays), **fixed)
        return tuple(x.numpy() for x in result) if isinstance(result, tuple) else result.numpy()

    def differentiate(self, composition: Composition, *arrays: Any, **fixed: Any) -> tuple[Any, list[np.ndarray]]:
        tensors = [torch.from_numpy(self._cast(x)) for x in arrays]
        floats = [x.requires_grad_() for x in tensors if x.is_floating_point()]
        value = composition(TORCH_OPS, *tensors, **fixed)
        value.sum().backward()
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in floats]
        return value.detach().numpy(), [x.numpy() for x in gradients]


DTYPES = ("float32", "float64")


def both_stacks(dtype: str) -> tuple[JaxStack, TorchStack]:
    return JaxStack("JAX", dtype), TorchStack("torch", dtype)
