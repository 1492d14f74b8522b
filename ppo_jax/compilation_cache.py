"""JAX's cache of compiled programs on the disk: what one start has compiled, the next one reads.

JAX writes an entry straight to its name and never writes it again. One that a kill cut short stays, and is complained
about and compiled anew at every start, so it is looked for and dropped here.
"""

import contextlib
import importlib
import os
import zlib
from pathlib import Path
from typing import Any

import jax

# Of the default, every 1 s: a start compiles some 100 programs, most of them in less.
MIN_COMPILE_TIME_S = 0.1
ENTRIES, CHECKED = "*-cache", "checked"
ZLIB, ZSTD = b"\x78", b"\x28\xb5\x2f\xfd"
SETTINGS: Any = jax.config  # has its attributes from the start of JAX, which type checkers do not see
UNWRITTEN = b"\x00"


def turn_on() -> None:
    """Set JAX's cache directory where neither JAX_COMPILATION_CACHE_DIR nor the program has; before anything compiles.

    JAX_ENABLE_COMPILATION_CACHE=false keeps it off, as always.
    """
    if SETTINGS.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        SETTINGS.update("jax_compilation_cache_dir", str(home / "ppo_jax" / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        SETTINGS.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_TIME_S)


def prepare() -> list[str]:
    """Make the directory that is set, drop its damaged entries, and say so: lines to print.

    A directory that cannot be used costs compilations, never a start.
    """
    path = SETTINGS.jax_compilation_cache_dir
    if not SETTINGS.jax_enable_compilation_cache or path is None:
        return ["compilation cache: off"]
    if "://" in path:
        return [f"compilation cache: {path}"]
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        dropped = drop_damaged(directory)
        sizes = [entry.stat().st_size for entry in directory.glob(ENTRIES) if entry.exists()]
    except OSError as error:
        SETTINGS.update("jax_enable_compilation_cache", False)
        return [f"compilation cache: off, {directory} cannot be used: {error.strerror}"]
    lines = [f"compilation cache: {directory}, {len(sizes)} programs, {sum(sizes) / 1e6:.0f} MB"]
    if dropped:
        lines.append(
            f"warning: {len(dropped)} damaged entries of the compilation cache, as a kill leaves them, were dropped "
            f"and will be compiled again; the first is {dropped[0].name}"
        )
    return lines


def drop_damaged(directory: Path) -> list[Path]:
    """Remove the entries that were cut short since the last call; they are returned.

    An entry that another process is just writing counts as cut short: that process goes on, and the entry is lost.
    """
    stamp = directory / CHECKED
    since = stamp.stat().st_mtime_ns if stamp.exists() else 0
    stamp.touch()  # before any entry is read: what is written meanwhile is for the next call
    damaged = []
    for entry in sorted(directory.glob(ENTRIES)):
        with contextlib.suppress(FileNotFoundError):  # another start has dropped it
            if entry.stat().st_mtime_ns >= since and is_cut_short(entry.read_bytes()):
                entry.unlink()
                damaged.append(entry)
    return damaged


def is_cut_short(data: bytes) -> bool:
    """Whether an entry ends before its end; one that is not compressed as JAX does it is not judged."""
    if data.startswith(ZLIB):
        reader = zlib.decompressobj()
        try:
            reader.decompress(data)
        except zlib.error:
            return True
        return not reader.eof
    if data.startswith(ZSTD) and (zstd := _zstd()) is not None:
        try:
            zstd.decompress(data)
        except Exception:  # two modules with an error of their own each
            return True
    return len(data) < len(ZSTD) or data.startswith(UNWRITTEN)


def _zstd() -> Any:
    """What JAX compresses with where it is there: a module of Python 3.14, or a package."""
    for name in ("compression.zstd", "zstandard"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None
