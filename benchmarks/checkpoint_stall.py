"""`python -m benchmarks.checkpoint_stall [--section.key VALUE ...]`: how long a save holds up the training.

The same run goes on through rounds of three ways: no checkpoint, one after every iteration that is waited for, and one
after every iteration that is written behind the next. The stall is the time of the call, in which nothing is trained.
What the writing threads take from the iteration they run beside shows in how much longer an iteration is all in all; on
a busy machine that difference of two medians is mostly noise.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax

from ppo_jax.build import build
from ppo_jax.checkpoint import Checkpoints
from ppo_jax.cli import parse_overrides
from ppo_jax.config_file import load
from ppo_jax.monitor.clock import PhaseClock
from ppo_jax.records import TrainState
from ppo_jax.train import ppo_iteration

WAYS = ("none", "waited for", "behind")
SETTINGS = {"rollout.batch_size": 32, "rollout.max_new_tokens": 16, "update.minibatch_size": 16}


def timed_iterations(run, state: TrainState, checkpoints: Checkpoints, way: str, count: int) -> tuple[TrainState, list]:
    """(seconds of an iteration with its save, of the save) for each; what is then still written is not waited for."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        state, _ = ppo_iteration(run, state, PhaseClock())
        saving = time.perf_counter()
        if way != "none":
            checkpoints.save(state)
        if way == "waited for":
            checkpoints.finish()
        ended = time.perf_counter()
        seconds.append((ended - started, ended - saving))
    checkpoints.finish()
    return state, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=4, help="of each way in a round")
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        config = load(overrides=SETTINGS | parse_overrides(rest) | {"run.dir": f"{directory}/run"})
        run, state = build(config)
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        with jax.set_mesh(run.mesh), Checkpoints(Path(directory), keep=1) as checkpoints:
            state, _ = timed_iterations(run, state, checkpoints, "behind", 2)  # compiles
            for _ in range(options.rounds):
                for way in WAYS:
                    state, measured = timed_iterations(run, state, checkpoints, way, options.iterations)
                    # The first save of a round waits for no other, and nothing is written beside its iteration.
                    seconds[way] += measured[1:]
    median = {way: statistics.median(whole for whole, _ in of_way) for way, of_way in seconds.items()}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"state {size / 1e6:.0f} MB, iteration {median['none']:.3f} s, {len(seconds['none'])} iterations of each way")
    stalls = {way: statistics.median(stall for _, stall in seconds[way]) for way in WAYS[1:]}
    for way, stall in stalls.items():
        print(
            f"{way}: stall {stall:.3f} s, {stall / median['none']:.1%} of an iteration; all in all an iteration takes "
            f"{median[way] / median['none'] - 1:+.1%}"
        )
    print(f"stall behind / waited for: {stalls['behind'] / stalls['waited for']:.2f}")


if __name__ == "__main__":
    main()
