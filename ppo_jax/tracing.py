"""Compilations, counted and logged.

The Python body of a jitted function runs exactly when it is traced, once per new shape: a call of `note_compilation`
in it is one line in the log, and one count, per compilation.
"""

import logging
from collections import Counter

log = logging.getLogger("ppo_jax")
log.propagate = False  # orbax configures the root logger; every line would come twice
compilations: Counter[str] = Counter()


def note_compilation(name: str, **shape: int) -> None:
    compilations[name] += 1
    log.info("compiling %s for %s", name, ", ".join(f"{axis}={size}" for axis, size in shape.items()))


def bucket(length: int, *, smallest: int, largest: int) -> int:
    """Smallest power of two that holds `length`, within [smallest, largest]: a run meets a handful of shapes."""
    size = smallest
    while size < length:
        size *= 2
    return min(size, largest)
