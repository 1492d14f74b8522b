"""`python -m benchmarks.signal_cost`: what the signals and alarms of an iteration cost, as a share of the iteration.

What was not watched before there were signals is timed inside of the iterations that it is a part of: the difference
between iterations with and without it would drown in their noise.
"""

import argparse
import tempfile
import time
from typing import Any
from unittest import mock

import numpy as np

from ppo_jax import build, train
from ppo_jax.config_file import load
from ppo_jax.monitor import alarms, signals


def timed(function: Any, seconds: list[float]) -> Any:
    """The function, and the seconds of each call."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        returned = function(*arguments, **keywords)
        seconds.append(time.perf_counter() - started)
        return returned

    return call


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.signal_cost", description=__doc__)
    parser.add_argument("--config", help="a recipe, by default that of `make train`")
    parser.add_argument("--iterations", type=int, default=10)
    arguments = parser.parse_args()
    of_signals: list[float] = []
    of_alarms: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        own = {"run.iterations": arguments.iterations, "run.dir": f"{directory}/run", "monitor.sample_every": 0}
        run, state = build.build(load(arguments.config, own))
        with (
            mock.patch.object(signals, "of_answers", timed(signals.of_answers, of_signals)),
            mock.patch.object(alarms, "raised", timed(alarms.raised, of_alarms)),
        ):
            rows = train.train(run, state).metrics
    whole = np.array([row["time/iteration_s"] for row in rows])[2:]  # the first ones compile
    for name, seconds in (("signals", of_signals), ("alarms", of_alarms)):
        share = np.median(np.array(seconds)[2:] / whole)
        print(f"{name}: {share:.2%} of an iteration, median of {len(whole)} of {run.config.rollout.batch_size} answers")


if __name__ == "__main__":
    main()
