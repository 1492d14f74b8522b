"""`python -m tests.checkpoint_writer`: a process that writes checkpoints and is killed, over and over, for test_faults.

It has everything imported and forks for every line of its input, a JSON object; a line of its output is what happened.
The child goes on from the newest checkpoint of the "directory" and saves step after step. It dies by SIGKILL, either
"after_s" seconds, or before the "at_event"th time that Python opens, makes, renames or removes something in the
directory. With "at_event" it saves once and ends, if it lives.

`python -m tests.checkpoint_writer DIRECTORY` is one of two processes that share the arrays and save when told to stop.
"""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ppo_jax import checkpoint, processes, sharding
from ppo_jax.config import MeshConfig
from ppo_jax.interruption import noted_signals
from ppo_jax.ops.rewards import first_moments
from ppo_jax.records import TrainState

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
KEEP = 2


def state_of(step: int) -> TrainState:
    """A state that only this step has, in arrays of several sizes."""
    rng = np.random.default_rng(step)
    params = {f"w{size}": jnp.asarray(rng.normal(size=(size, size)), jnp.float32) for size in (1, 30, 200)}
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state={"m": jnp.asarray(rng.normal(size=999), jnp.float32)},
        kl_coef=jnp.float32(step / 7),
        score_moments=first_moments("float32"),
        skipped_in_a_row=jnp.int32(step % 3),
    )


def kill_at(event: int, directory: str) -> None:
    left = itertools.count(event, -1)

    def hook(name: str, arguments: tuple) -> None:
        # Of what is removed inside of a directory that is walked, only the name is told.
        inside = name in ("os.remove", "os.rmdir") or directory in str(arguments[:1])
        if name in EVENTS and inside and next(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def write(directory: Path, acknowledge: int, at_event: int | None) -> None:
    """Save steps; the number of every step that is known to be on the disk goes to the file `acknowledge`."""
    first = max(checkpoint.saved_steps(directory), default=0) + 1
    state_of(first)  # JAX starts
    os.write(acknowledge, b"ready\n")
    if at_event is not None:
        kill_at(at_event, str(directory))
    with checkpoint.Checkpoints(directory, keep=KEEP) as checkpoints:
        for step in itertools.count(first):
            checkpoints.save(state_of(step))
            if at_event is not None:
                checkpoints.finish()
                return
            if step > first:  # a save waits for the one before it
                os.write(acknowledge, f"{step - 1}\n".encode())


def killed(directory: str, after_s: float = 0.0, at_event: int | None = None) -> dict:
    """Fork a writer, see it die, and say how it ended and what it had acknowledged."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write(Path(directory), writing, at_event)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as told:
        assert told.readline() == "ready\n"
        if at_event is None:
            time.sleep(after_s)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        steps = [int(line) for line in told if line.endswith("\n")]
    return {"code": os.waitstatus_to_exitcode(status), "acknowledged": max(steps, default=0)}


def share(leaf: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    """The same array, of which each process has its part of the first axis, or a copy where it does not divide."""
    whole, split = np.asarray(leaf), leaf.ndim > 0 and leaf.shape[0] % mesh.size == 0
    placed = NamedSharding(mesh, PartitionSpec("fsdp") if split else PartitionSpec())
    return jax.make_array_from_callback(leaf.shape, placed, lambda index: whole[index])


def until_told(directory: Path) -> None:
    """One of two processes: the signal that one of them gets stops both, after the same step."""
    processes.join()
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    with checkpoint.Checkpoints(directory, keep=KEEP) as checkpoints, noted_signals() as signal_so_far:
        for step in itertools.count(1):
            time.sleep(0.02)
            if told := processes.from_any(signal_so_far()):
                checkpoints.save(jax.tree.map(lambda leaf: share(leaf, mesh), state_of(step)))
                checkpoints.finish()
                print("saved", step, flush=True)
                raise SystemExit(128 + told)
            if step == 20:
                print("ready", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        until_told(Path(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(killed(**json.loads(line))), flush=True)
