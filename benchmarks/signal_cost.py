"""`python -m benchmarks.signal_cost`: what signals and alarms of an iteration cost, beside the iteration's own seconds.

What was not watched before there were signals is timed where it happens: the difference between iterations with and
without it would drown in their noise. The files and TensorBoard are written again after the run, with all numbers and
without those of the signals. Signals are a part of `time/iteration_s`; alarms and writing come after it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from ppo_jax import build, train
from ppo_jax.config import Config
from ppo_jax.config_file import load
from ppo_jax.monitor import alarms, signals
from ppo_jax.monitor.sinks import MetricsWriter

Numbers = dict[str, Any]  # of an iteration, histograms included


def timed(function: Callable[..., Any], seconds: list[float], returned: list[Any]) -> Callable[..., Any]:
    """The function, which also notes the seconds of each call and what it returned."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        returned.append(function(*arguments, **keywords))
        seconds.append(time.perf_counter() - started)
        return returned[-1]

    return call


def measure(config: Config, directory: Path) -> dict[str, list[float]]:
    """Seconds of each part, and of the whole, iteration by iteration."""
    parts: dict[str, list[float]] = {"signals": [], "alarms raised": [], "alarms suspected": []}
    observed: list[Numbers] = []
    written: list[Numbers] = []
    write = MetricsWriter.write

    def kept(writer: MetricsWriter, step: int, numbers: Numbers, raised: Any) -> None:
        written.append(numbers)
        write(writer, step, numbers, raised)

    run, state = build.build(config)
    with (
        mock.patch.object(signals, "of_answers", timed(signals.of_answers, parts["signals"], observed)),
        mock.patch.object(alarms, "raised", timed(alarms.raised, parts["alarms raised"], [])),
        mock.patch.object(alarms, "suspected_since", timed(alarms.suspected_since, parts["alarms suspected"], [])),
        mock.patch.object(MetricsWriter, "write", kept),
    ):
        rows = train.train(run, state).metrics
    without = [{name: x for name, x in row.items() if name not in observed[0]} for row in written]
    writes = [seconds_to_write(config, directory / name, rows) for name, rows in (("all", written), ("few", without))]
    parts["written, signals"] = [whole - few for whole, few in zip(*writes, strict=True)]
    return parts | {"written, the rest": writes[1], "iteration": [row["time/iteration_s"] for row in rows]}


def seconds_to_write(config: Config, directory: Path, rows: list[Numbers]) -> list[float]:
    """To the files and TensorBoard of a directory of its own."""
    directory.mkdir()
    seconds: list[float] = []
    with MetricsWriter(directory, first_step=0, monitor=config.monitor) as writer:
        write = timed(writer.write, seconds, [])
        for step, numbers in enumerate(rows):
            write(step, numbers)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.signal_cost", description=__doc__)
    parser.add_argument("--config", help="a recipe, by default that of `make train`")
    parser.add_argument("--iterations", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        own = {"run.iterations": arguments.iterations, "run.dir": f"{directory}/run", "monitor.sample_every": 0}
        config = load(arguments.config, own)
        parts = measure(config, Path(directory))
    whole = np.array(parts.pop("iteration"))[2:]  # the first ones compile
    answers = config.rollout.batch_size
    print(f"medians of {len(whole)} iterations of {answers} answers, {np.median(whole):.3g} s each")
    for name, seconds in parts.items():
        kept = np.array(seconds)[2:]
        print(f"{name}: {1e3 * np.median(kept):.3g} ms, {100 * np.median(kept / whole):.2g}% of an iteration")


if __name__ == "__main__":
    main()
