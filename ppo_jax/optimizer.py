"""AdamW and its schedule, of every command that trains, and the step that is only taken where it is finite."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.config import OptimizerConfig, UpdateConfig


def learning_rate(
    step: int | Int[Array, ""], *, peak: float, schedule: str, warmup_steps: int, total_steps: int
) -> Float[Array, ""]:
    """Learning rate of planned optimizer step 0, 1, ...: peak · min(1, (step + 1) / warmup) · decay.

    The warm-up begins above 0, so no step is wasted. With p the share of the steps behind the warm-up that are done,
    the decay is 1, 1 − p or (1 + cos πp) / 2.
    """
    count = jnp.asarray(step, jnp.result_type(float))
    warmup = jnp.minimum((count + 1.0) / max(warmup_steps, 1), 1.0)
    done = jnp.clip((count - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
    decay = {
        "constant": jnp.ones_like(done),
        "linear": 1.0 - done,
        "cosine": (1.0 + jnp.cos(jnp.pi * done)) / 2.0,
    }
    return peak * warmup * decay[schedule]


def scale_by_planned_step(rate_of: Callable[[Any], Array]) -> optax.GradientTransformationExtraArgs:
    """Updates times −rate_of(planned_step), an argument of the update: optax would count the steps that were taken."""

    def scale(updates: Any, state: optax.OptState, params: Any = None, **arguments: Any):
        rate = rate_of(arguments["planned_step"])
        return jax.tree.map(lambda x: jnp.asarray(-rate, x.dtype) * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scale)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Gradients times min(1, max_norm / norm), as `optax.clip_by_global_norm` has it but for rounding.

    A product with one number is computed where it is read; its quotients XLA writes out, an array of the model's size.
    """

    def clip(updates: Any, state: optax.OptState, params: Any = None, **arguments: Any):
        factor = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda x: jnp.asarray(factor, x.dtype) * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), clip)


@cache
def make_optimizer(
    update: OptimizerConfig, total_steps: int, *, idle_steps: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW with decay on matrices only; it is told the number of the planned step.

    The learning rate is 0 in the first `idle_steps` of the steps; its schedule begins behind them. The same object for
    the same settings, so that a second run in a process compiles nothing again.
    """

    def rate_of(planned_step: Any) -> Array:
        rate = learning_rate(
            planned_step - idle_steps,
            peak=update.learning_rate,
            schedule=update.schedule,
            warmup_steps=update.warmup_steps,
            total_steps=total_steps - idle_steps,
        )
        return jnp.where(planned_step < idle_steps, jnp.zeros_like(rate), rate)

    clip = optax.identity() if update.max_grad_norm is None else clip_by_global_norm(update.max_grad_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=update.adam_b1, b2=update.adam_b2, eps=update.adam_eps),
        optax.add_decayed_weights(
            update.weight_decay, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
        ),
        scale_by_planned_step(rate_of),
    )


@cache
def make_optimizer_with_critic(
    update: UpdateConfig, total_steps: int, *, critic_learning_rate: float, idle_steps: int
) -> optax.GradientTransformationExtraArgs:
    """An optimizer each for policy and critic, each clipped by its own norm; the policy idles in the first steps."""
    of_critic = update.model_copy(update={"learning_rate": critic_learning_rate})
    return optax.partition(
        {
            "policy": make_optimizer(update, total_steps, idle_steps=idle_steps),
            "critic": make_optimizer(of_critic, total_steps),
        },
        lambda params: {name: "critic" if name == "critic" else "policy" for name in params},
    )


def step_if_finite(
    optimizer: optax.GradientTransformationExtraArgs,
    gradients: Any,
    opt_state: optax.OptState,
    params: Any,
    *watched: Float[Array, ""],
    planned_step: int | Int[Array, ""],
) -> tuple[Any, optax.OptState, Any, Bool[Array, ""]]:
    """Parameters and moments after a step, what the step would add to the parameters, and whether it was taken.

    It is where the `watched` numbers and the norms of update and parameters are finite; else both stay as they were.
    Moments are means of gradients, so they overflow only where a gradient's norm does, which the caller watches.
    """

    def step(opt_state: optax.OptState, params: Any):
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to an integer count: strict mode refuses
            return optimizer.update(gradients, opt_state, params, planned_step=planned_step)

    def take(params: Any, opt_state: optax.OptState, updates: Any):
        # Moments once more, in place: kept from before the check they would be a second copy, written and read again.
        return optax.apply_updates(params, updates), step(opt_state, params)[1]

    def leave(params: Any, opt_state: optax.OptState, updates: Any):
        return params, opt_state

    updates, _ = step(opt_state, params)
    finite = jnp.all(jnp.isfinite(jnp.stack([*watched, optax.tree.norm(updates), optax.tree.norm(params)])))
    return *jax.lax.cond(finite, take, leave, params, opt_state, updates), updates, finite
