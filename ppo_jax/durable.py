"""Files and directories that are there whole or not at all, after a kill and after a loss of power."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

# What file systems without a flush of directories (SMB, some in user space) answer to one.
NO_DIRECTORY_FLUSH = (errno.EINVAL, errno.ENOTSUP)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """Every file below, then the names of every directory, then those of this one."""
    for path in sorted(directory.rglob("*"), key=lambda path: (path.is_dir(), -len(path.parts))):
        flush(path)
    flush(directory)


def publish(partial: Path, final: Path) -> None:
    """Give a finished directory its name: flush all of it, rename it, flush the name.

    One that has this name already steps aside for the moment of the rename and goes when the new one is in its place.
    """
    flush_tree(partial)
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            old.rename(final)
        raise
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Replace a file's content in one step: written beside it, flushed, renamed."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    flush(file.parent)
