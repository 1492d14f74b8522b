"""The cache of compiled programs: entries that a kill cut short, directories that cannot be used, who decides where."""

import os
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest

from ppo_jax import compilation_cache

PROGRAM = """
import resource, signal, sys, warnings
warnings.simplefilter("error")  # JAX complains of a damaged entry with a warning
import jax, jax.numpy as jnp
from ppo_jax import compilation_cache
compilation_cache.turn_on()
print(*compilation_cache.prepare(), sep="\\n", flush=True)
if sys.argv[1:]:  # die in the middle of a write, as soon as a file has this many bytes
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
print(jax.jit(lambda x: jnp.sin(x) * 2 + jnp.sum(x))(jnp.arange(8.0)).tolist())
"""


def start(home, *arguments, **environment):
    """The lines of a process whose user's caches are in `home`; one that dies is told by its signal."""
    settings = {"XDG_CACHE_HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | environment
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env=inherited | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or done.returncode == -signal.SIGXFSZ, done.stderr
    return done.returncode, done.stdout.splitlines()


def entries(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*-cache")}


def test_an_entry_that_a_death_in_the_middle_of_its_write_cut_short_is_said_and_written_anew(tmp_path):
    directory = tmp_path / "ppo_jax" / "xla"
    code, lines = start(tmp_path, 1000)
    assert code == -signal.SIGXFSZ
    [(name, torn)] = entries(directory).items()
    assert len(torn) == 1000
    _, lines = start(tmp_path)
    assert lines[0].startswith(f"compilation cache: {directory}, 0 programs")
    assert "1 damaged entries" in lines[1]
    assert name in lines[1]
    whole = entries(directory)
    assert len(whole[name]) > 1000
    assert not any(map(compilation_cache.is_cut_short, whole.values()))
    _, again = start(tmp_path)
    assert again[0].startswith(f"compilation cache: {directory}, {len(whole)} programs")
    assert again[1:] == lines[2:]  # the numbers of the program, and no complaint
    assert entries(directory) == whole


def test_the_users_own_directory_is_used_and_a_directory_that_cannot_be_is_passed_over(tmp_path):
    own = tmp_path / "own"
    _, lines = start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(own))
    assert lines[0].startswith(f"compilation cache: {own}, 0 programs")
    assert entries(own)
    _, off = start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert off == ["compilation cache: off", *lines[1:]]
    (tmp_path / "file").touch()
    _, unusable = start(tmp_path / "file")
    assert unusable == [
        f"compilation cache: off, {tmp_path / 'file' / 'ppo_jax' / 'xla'} cannot be used: Not a directory",
        *lines[1:],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "own"]


def test_an_entry_is_whole_at_its_end_and_nowhere_before():
    data = zlib.compress(np.random.default_rng(0).bytes(2000) + bytes(2000))
    assert not compilation_cache.is_cut_short(data)
    assert all(compilation_cache.is_cut_short(data[:end]) for end in range(len(data)))
    assert compilation_cache.is_cut_short(bytes(4096))  # what a loss of power can leave
    assert compilation_cache.is_cut_short(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    assert not compilation_cache.is_cut_short(b"of some later JAX")


@pytest.mark.parametrize("cut", [0, 1, 50, 99])
def test_only_what_was_cut_short_goes_whenever_it_was_written(tmp_path, cut):
    data = zlib.compress(np.random.default_rng(0).bytes(100))
    names = ["a-cache", "b-cache", "c-cache"]
    for name in names:
        (tmp_path / name).write_bytes(data)
    assert compilation_cache.drop_damaged(tmp_path) == []
    (tmp_path / "b-cache").write_bytes(data[:cut])
    assert compilation_cache.drop_damaged(tmp_path) == [tmp_path / "b-cache"]
    assert compilation_cache.drop_damaged(tmp_path) == []
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["a-cache", "c-cache"]


def test_what_was_looked_at_once_is_not_read_again(tmp_path, monkeypatch):
    (tmp_path / "a-cache").write_bytes(zlib.compress(b"program"))
    os.utime(tmp_path / "a-cache", (1, 1))
    compilation_cache.drop_damaged(tmp_path)
    monkeypatch.setattr(compilation_cache, "is_cut_short", lambda data: pytest.fail("it was read"))
    assert compilation_cache.drop_damaged(tmp_path) == []
