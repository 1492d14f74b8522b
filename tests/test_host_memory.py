"""Freed memory is kept: a large array made anew costs no page faults, unless the user has told glibc otherwise."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from ppo_jax import host_memory
print(host_memory.keep_freed())
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**25)  # 256 MB
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def start(tunables):
    """(kept, page faults of the first array, and of the second) of a new process."""
    environment = os.environ | {"GLIBC_TUNABLES": tunables}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    kept, *faults = done.stdout.split()
    return kept == "True", *map(int, faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is told is glibc")
def test_a_large_array_is_made_of_memory_that_was_freed():
    kept, first, second = start("")
    assert kept
    assert first > 100  # pages of 2 MB at the most
    assert second < 50


def test_what_the_user_has_told_glibc_stays():
    kept, _, second = start("glibc.malloc.mmap_max=65536")
    assert not kept
    assert second > 100


AFTER_COMPILING = """
import re
from pathlib import Path
import jax
import numpy as np
from ppo_jax import host_memory

def resident_mb():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

host_memory.keep_freed()
names = []
jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **_: names.append(name))
jax.jit(lambda x: x + 1)(1)
assert names.count(host_memory.COMPILED) == 1, names
np.ones(2**25)
for event in ((host_memory.COMPILED, 0.5), ("another", 2.0), (host_memory.COMPILED, 2.0)):
    before = resident_mb()
    jax.monitoring.record_event_duration_secs(*event)
    print(before - resident_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is told is glibc")
def test_what_a_long_compilation_has_freed_is_given_back():
    environment = os.environ | {"GLIBC_TUNABLES": ""}
    program = [sys.executable, "-c", AFTER_COMPILING]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    after_short, after_another, after_long = map(int, done.stdout.split())
    assert max(after_short, after_another) < 50
    assert after_long > 200  # of 256
