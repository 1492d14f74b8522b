"""A device that has no memory left: which phase, which shapes, and what to lower."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from ppo_jax.config import Config
from ppo_jax.errors import UserError

LOADING = "loading"  # what comes before the first iteration
# What the memory of a phase grows with.
TO_LOWER = {
    LOADING: "what is kept: weights, their moments and the reference; lora.rank trains an adapter beside one copy",
    "rollout": "rollout.batch_size or rollout.max_new_tokens, whose product is what the cache holds",
    "score": "update.micro_batch_size",
    "update": "update.micro_batch_size, or set update.remat true",
}


@contextmanager
def shortage_named(config: Config, phase_now: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that failed into a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        rollout, phase = config.rollout, phase_now()
        lower = TO_LOWER.get(phase, "rollout.batch_size or update.micro_batch_size")
        raise UserError(
            f"out of memory in the phase {phase}: {rollout.batch_size} answers of up to {rollout.max_new_tokens} "
            f"tokens, {config.micro_batch_size} of them in a forward pass ({str(error).splitlines()[0]}). Lower "
            f"{lower}; mesh.fsdp splits the model over devices, model.compute_dtype bfloat16 halves the activations, "
            f"and --dry_run estimates what a shape needs"
        ) from error
