"""`python -m benchmarks.reward_overlap`: what scoring in the background gains, on the embedded model.

Iterations of one process in turn: the scores awaited before step 3 begins, and in the background of step 3, as `train`
does. Prints the median seconds of steps 2 to 5 and their ratio, for a reward that waits, as for a service, and for the
built-in one, which computes on the host.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from unittest import mock

import jax
from rich.console import Console
from rich.table import Table

from ppo_jax import build, train
from ppo_jax.config_file import load
from ppo_jax.monitor.clock import PhaseClock
from ppo_jax.records import TrainState
from ppo_jax.rewards.sentiment import vader_compound
from ppo_jax.rewards.source import RewardFunction, Scores, start_scoring

# A policy that stays where it is, so that all iterations have answers of the same lengths.
SETTINGS = {"update.learning_rate": 1e-30, "update.epochs": 1, "monitor.tensorboard": False}


def waits(seconds: float) -> RewardFunction:
    def reward(prompts: list[str], answers: list[str]) -> list[float]:
        time.sleep(seconds)
        return [float(len(answer)) for answer in answers]

    return reward


def awaited_at_once(*arguments) -> Callable[[], Scores]:
    scores = start_scoring(*arguments)()
    return lambda: scores


def iteration(run: build.Run, state: TrainState, *, overlap: bool) -> tuple[TrainState, float]:
    """The next state, and the seconds of steps 2 to 5."""
    start = start_scoring if overlap else awaited_at_once
    with mock.patch.object(train, "start_scoring", start), jax.set_mesh(run.mesh):
        state, numbers = train.ppo_iteration(run, state, PhaseClock())
    return state, numbers["time/iteration_s"] - numbers["time/rollout_s"] - numbers["time/update_s"]


def measure(reward: RewardFunction, pairs: int) -> tuple[float, float]:
    """Median seconds of steps 2 to 5, one after the other and at once."""
    with tempfile.TemporaryDirectory() as directory:
        run, state = build.build(load(overrides=SETTINGS | {"run.dir": f"{directory}/run"}), reward=reward)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for index in range(pairs + 1):
            for overlap in (False, True):
                state, taken = iteration(run, state, overlap=overlap)
                if index > 0:  # the first ones compile
                    seconds[overlap].append(taken)
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def main() -> None:
    parser = argparse.ArgumentParser(description="What scoring in the background gains.")
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs of iterations for each reward")
    pairs = parser.parse_args().pairs
    table = Table(title=f"Seconds of steps 2 to 5, medians of {pairs}")
    for column in ("reward", "one after the other", "at once", "ratio"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    rewards = {"vader_compound": vader_compound} | {f"waits {s:g} s": waits(s) for s in (0.1, 0.5, 2.0)}
    for name, reward in rewards.items():
        apart, at_once = measure(reward, pairs)
        table.add_row(name, f"{apart:.2f}", f"{at_once:.2f}", f"{apart / at_once:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
