"""Host memory that was freed is kept for the next call, as JAX keeps a GPU's.

On a CPU, XLA asks for the temporaries of every call anew, gigabytes of them. glibc takes pieces of that size from the
operating system and gives them back when they are freed, so that each of their pages costs a page fault in every call.
What a compilation has freed is holes between what it leaves, which no such piece fits: that is given back
(docs/performance.md).
"""

import ctypes
import os
import platform
from functools import cache

from jax import monitoring

# <malloc.h>: trim the heap never, take nothing past it, and have one heap, whose pieces every thread can use again.
OPTIONS = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}
COMPILED = "/jax/core/compile/backend_compile_duration"  # of jax.monitoring: before what was compiled runs
LONG_S = 1.0  # a start compiles some 100 programs, most of them small


@cache
def keep_freed() -> bool:
    """Tell glibc so, before anything large is allocated and before torch, if at all, is imported: heaps that its
    threads have by then go on being used. False where it is another library, or where the user has told
    it otherwise in GLIBC_TUNABLES."""
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    libc = ctypes.CDLL(None)
    taken = [libc.mallopt(option, value) for option, value in OPTIONS.values()]

    def give_back(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILED and duration_secs > LONG_S:
            libc.malloc_trim(0)

    monitoring.register_event_duration_secs_listener(give_back)
    return all(taken)
