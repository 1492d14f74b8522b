"""One process writes a run directory: a lock that its holder cannot forget, because it dies with the process."""

import fcntl
import logging
import os
import socket
import weakref
from pathlib import Path

from ppo_jax.errors import UserError
from ppo_jax.processes import from_lead

FILE = "lock"

log = logging.getLogger("ppo_jax")

# A forked process, such as a worker of a reward's pool, must not keep the lock of a run that has died.
_held: "weakref.WeakSet[RunLock]" = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [lock.release() for lock in list(_held)])


class RunLock:
    """`flock` on the file `lock` of a run directory, held by process 0 of a run; a context manager.

    The file stays behind when the lock is released: removing it would let two processes lock two files of one name.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._close: weakref.finalize | None = None

    def acquire(self) -> None:
        """Take the lock, or refuse naming who has it; the directory is made where it is missing."""
        from_lead(self._acquire)

    def _acquire(self) -> None:
        if self._close is not None and self._close.alive:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.directory / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"run.dir: {self.directory} cannot be written: {error.strerror}") from error
        self._close = weakref.finalize(self, os.close, descriptor)  # closing it in every process releases the lock
        _held.add(self)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            self.release()
            raise UserError(
                f"run.dir: {self.directory} is in use by {holder}; wait for its end, stop it, or choose another"
            ) from error
        except OSError as error:  # a file system without locks
            log.warning("warning: %s cannot be locked (%s): start no second run in it", self.directory, error.strerror)
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        if self._close is not None:
            self._close()

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
