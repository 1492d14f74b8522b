"""The few words that the two frameworks spell differently, so that an enumeration is written once for both."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ppo_jax.ops import advantages, kl, logprobs, losses, masking, rewards
from ppo_torch_ref import ops as torch_ops


@dataclass(frozen=True)
class Stack:
    """`gradient(f)` is (point, constants) -> ∂f/∂point, NumPy in and out; constants are a named tuple of arrays."""

    name: str
    ops: Any  # the functions under test: those of ppo_jax.ops, or their namesakes
    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]
    frozen: Callable[[Any], Any]  # the same number without a gradient
    array: Callable[[np.ndarray], Any]
    gradient: Callable[[Callable[..., Any]], Callable[..., np.ndarray]]


def both_stacks() -> tuple[Stack, Stack]:
    """Functions are looked up now: one that a test has replaced is used."""
    modules = (masking, logprobs, kl, rewards, advantages, losses)
    ops = SimpleNamespace(**{name: x for module in modules for name, x in vars(module).items() if callable(x)})
    return (
        Stack("JAX", ops, jnp.exp, jnp.log, jax.lax.stop_gradient, jnp.asarray, _jax_gradient),
        Stack("PyTorch", torch_ops, torch.exp, torch.log, torch.Tensor.detach, torch.from_numpy, _torch_gradient),
    )


def _jax_gradient(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    gradient = jax.jit(jax.grad(function))
    return lambda point, constants: np.asarray(gradient(point, constants))


def _torch_gradient(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    def gradient(point: np.ndarray, constants: Any) -> np.ndarray:
        leaf = torch.from_numpy(point).requires_grad_()
        value = function(leaf, constants._make(map(torch.from_numpy, constants)))
        return torch.autograd.grad(value, leaf)[0].numpy()

    return gradient
