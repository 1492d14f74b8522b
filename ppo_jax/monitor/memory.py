"""A device that has no memory left: which phase, which shapes, and what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from ppo_jax.config import Config
from ppo_jax.errors import UserError
from ppo_jax.monitor.clock import PhaseClock

# What the memory of a phase grows with.
TO_LOWER = {
    "rollout": "rollout.batch_size or rollout.max_new_tokens, whose product is what the cache holds",
    "score": "update.micro_batch_size",
    "update": "update.micro_batch_size, or set update.remat true",
}


@contextmanager
def shortage_named(config: Config, clock: PhaseClock) -> Iterator[None]:
    """Turn an allocation that failed into a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        rollout, phase = config.rollout, clock.last_phase
        lower = TO_LOWER.get(phase, "rollout.batch_size or update.micro_batch_size")
        raise UserError(
            f"out of memory in the phase {phase}: {rollout.batch_size} answers of up to {rollout.max_new_tokens} "
            f"tokens, {config.micro_batch_size} of them in a forward pass ({str(error).splitlines()[0]}). Lower "
            f"{lower}; mesh.fsdp splits the model over devices, model.compute_dtype bfloat16 halves the activations, "
            f"and --dry_run estimates what a shape needs"
        ) from error
