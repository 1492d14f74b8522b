"""Several processes that run one training: who writes, what process 0 decides, and how a failure reaches them all.

With a single process every function here is the same code and costs nothing. All of them must be called by every
process at the same place: they wait for one another.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ppo_jax.errors import UserError

Decision = TypeVar("Decision", bool, float, str, None)

# A process that is gone, or has failed and waits at its end, ends the others after this long, wherever they wait.
TIMEOUT_S = 60


def join() -> None:
    """Join the other processes, before any JAX computation.

    Slurm and Open MPI are recognised by JAX; elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who. JAX itself reads only the first of the three.
    """
    try:
        count, index = (
            None if text is None else int(text)
            for text in (os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID"))
        )
        jax.distributed.initialize(
            num_processes=count,
            process_id=index,
            heartbeat_timeout_seconds=TIMEOUT_S,
            shutdown_timeout_seconds=TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: {' '.join(str(error).split())} Outside of Slurm and Open MPI every process needs "
            f"JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def check_platform(asked: str) -> None:
    """Refuse to compute on anything else than what was asked for, by `mesh.platform` or by JAX_PLATFORMS."""
    install = "a GPU needs a driver and one of the extras cuda12 and cuda13: pip install 'ppo-jax[cuda13]'"
    try:
        devices, found = jax.devices(), jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # asserted, without a word, where no NVIDIA device is visible
        reason = (str(error).splitlines() or ["JAX finds no such device"])[0]
        raise UserError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {reason}; {install}") from error
    if asked not in ("any", found):
        shown = ", ".join(map(str, devices[:4])) + (", ..." if len(devices) > 4 else "")
        raise UserError(f"mesh.platform is {asked}, but JAX sees {len(devices)} of {found} ({shown}); {install}")


def is_lead() -> bool:
    """Whether this is process 0: the one that writes, prints and exports."""
    return jax.process_index() == 0


def from_lead(decide: Callable[[], Decision]) -> Decision:
    """What `decide` returns on process 0, where alone it is called; a UserError of it is raised everywhere."""
    outcome = {}
    if is_lead():
        try:
            outcome = {"decision": decide()}
        except UserError as error:
            outcome = {"error": str(error)}
    text = json.dumps(outcome).encode()
    length = multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32))
    padded = np.zeros(int(length), np.uint8)
    if is_lead():
        padded[:] = np.frombuffer(text, np.uint8)
    outcome = json.loads(bytes(multihost_utils.broadcast_one_to_all(padded).tolist()))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["decision"]


def from_any(number: int) -> int:
    """The largest of the numbers that the processes have: a signal reaches one of them first."""
    return int(np.max(multihost_utils.process_allgather(np.asarray(number, np.int32))))


def from_all(own: list[str]) -> list[str]:
    """The texts of all processes, in the order of the processes."""
    data = np.frombuffer(json.dumps(own).encode(), np.uint8)
    lengths = np.atleast_1d(multihost_utils.process_allgather(np.asarray(len(data), np.int32)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    parts = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [
        text for part, length in zip(parts, lengths, strict=True) for text in json.loads(bytes(part[:length].tolist()))
    ]


@contextmanager
def together(what: str) -> Iterator[None]:
    """Work of the host that every process does for itself: when it fails in one, it fails in all of them."""
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    flags = multihost_utils.process_allgather(np.asarray(failure is not None))
    failed = np.flatnonzero(flags).tolist()
    if failure is not None:
        raise failure
    if failed:
        raise UserError(f"{what} failed in process {', '.join(map(str, failed))}, whose own message says why")
