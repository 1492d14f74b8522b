"""Level L8 once more, without autodiff: the gradients of both stacks against differences of the very loss that each of
them computes. A term that both forget to differentiate (a `detach` here, a `stop_gradient` there) shows only so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.learners import EVERY_TERM, KL_COEF, Learners, experience
from parity.rows import Named, Row, named, row_of
from parity.stacks import Pair
from parity.training import backward
from ppo_jax import update
from ppo_torch_ref import update as torch_update

# The difference errs by L's rounding over h, which is 1e-16 / 1e-5 = 1e-11 for a loss near 0.1, and by h² / 6 times the
# third derivative along u: on a random model 5e-10 at h = 1e-4, so 5e-12 here. The largest gradient of these models is
# 0.1 to 1.3 and the largest error 1e-10 of it; the bound leaves a factor of 100.
STEP = 1e-5
BOUND = 1e-8  # times the largest gradient of the model

LossAt = Callable[[Named], tuple[float, float]]  # tensors by name -> (loss, tokens whose clipping acts)


@dataclass(frozen=True)
class Slopes:
    """By tensor: the gradient's slope <g, u>, the measured one, and how many tokens more are clipped on either side."""

    predicted: Named
    measured: Named
    crossings: Named


def gradients(pair: Pair) -> Iterator[Row]:
    """L8, float64: <g, u> against (L(θ + hu) − L(θ − hu)) / 2h, one random direction u of length 1 for every tensor.

    A ratio that crosses the edge of the clip between θ − hu and θ + hu would bend the loss: a row says that none does.
    """
    if pair.dtype != "float64" or pair.case.is_real:  # two forward passes per tensor
        return
    (_, ours), (_, theirs) = backward(pair, EVERY_TERM)
    largest = max(float(np.abs(x).max()) for x in theirs.values())
    for stack, slopes in (("JAX", jax_slopes(pair, ours)), ("torch", torch_slopes(pair, theirs))):
        predicted, measured, crossings = vars(slopes).values()
        yield row_of(pair, "L8", f"{stack} gradients and differences", predicted, measured, bound=BOUND * largest)
        none = {name: np.zeros_like(x) for name, x in crossings.items()}
        yield row_of(pair, "L8", f"{stack} ratios that cross the clip", crossings, none, bound=0.0)


def slopes_of(tensors: Named, loss_at: LossAt, slope: Callable[[str, np.ndarray], float]) -> Slopes:
    """`slope(name, u)` is <g, u>; a tensor is moved alone."""
    rng, found, (_, clipped) = np.random.default_rng(0), Slopes({}, {}, {}), loss_at(tensors)
    for name, x in tensors.items():
        u = rng.normal(0, 1, x.shape)
        u /= np.linalg.norm(u)
        above, below = (loss_at(tensors | {name: x + side * STEP * u}) for side in (1, -1))
        found.predicted[name] = np.array(slope(name, u))
        found.measured[name] = np.array((above[0] - below[0]) / (2 * STEP))
        found.crossings[name] = np.array([above[1] - clipped, below[1] - clipped])
    return found


_policy_loss = jax.jit(update.policy_loss, static_argnames="objective")


def jax_slopes(pair: Pair, gradient: Named) -> Slopes:
    """Tensors are the leaves of the parameters; a direction is exported as a gradient is, to be multiplied with one."""
    batch, _ = experience(pair, EVERY_TERM)
    learners = Learners(pair, EVERY_TERM.config("constant"), ours=6, theirs=2)
    objective = learners.objective
    weights = objective.loss_weights(batch.response_mask, dtype=batch.old_logprobs.dtype)
    paths, structure = jax.tree.flatten_with_path(learners.params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    leaves = {name: np.asarray(leaf) for name, (_, leaf) in zip(names, paths, strict=True)}

    def tree(tensors: Named) -> Any:
        return structure.unflatten([jnp.asarray(x) for x in tensors.values()])

    def loss_at(tensors: Named) -> tuple[float, float]:
        kl_coef = jnp.asarray(KL_COEF, pair.dtype)
        loss, sums = _policy_loss(tree(tensors), pair.ref_params, batch, weights, kl_coef, objective=objective)
        return float(loss), float(sums["clipped_tokens"])

    nowhere = {name: np.zeros_like(leaf) for name, leaf in leaves.items()}

    def slope(name: str, u: np.ndarray) -> float:
        direction = pair.jax_named(tree(nowhere | {name: u}))
        return sum(float(np.sum(gradient[file_name] * x)) for file_name, x in direction.items())

    return slopes_of(leaves, loss_at, slope)


def torch_slopes(pair: Pair, gradient: Named) -> Slopes:
    """Tensors are the parameters of policy and critic."""
    _, batch = experience(pair, EVERY_TERM)
    learners = Learners(pair, EVERY_TERM.config("constant"), ours=6, theirs=2)
    objective, parameters = learners.twin_objective, learners.twin_parameters()
    weights = objective.loss_weights(batch.response_mask, dtype=batch.old_logprobs.dtype)

    @torch.no_grad()
    def loss_at(tensors: Named) -> tuple[float, float]:
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.asarray(tensors[name])))
        loss, sums = torch_update.policy_loss(learners.model, pair.ref_model, batch, weights, KL_COEF, objective)
        return float(loss), float(sums["clipped_tokens"])

    return slopes_of(named(parameters), loss_at, lambda name, u: float(np.sum(gradient.get(name, 0.0) * u)))
