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
    """Smallest of `smallest` · 1, 1.5, 2, 3, 4, 6, 8 ... that holds `length`, at most `largest`.

    A run meets a handful of shapes, and pads by a half at most.
    """
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, largest)
