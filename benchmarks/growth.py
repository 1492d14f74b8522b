"""`python -m benchmarks.growth`: how an iteration of the tiny model grows with batch, answers and vocabulary.

One size is changed at a time; the others are 8 answers of 32 new tokens and a vocabulary of 4096. Prints seconds of
each phase and the exponent of the iteration: the slope of log seconds against log size over the upper half of the
sizes, where what is constant counts least. 1 is growth with the size; attention over longer answers is more work, too.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.iteration import ours
from benchmarks.iteration.__main__ import machine
from benchmarks.iteration.workloads import WORKLOADS, Workload, prepare
from ppo_jax import host_memory

TINY = replace(WORKLOADS["tiny"], batch=8, new_tokens=32)
SIZES = {
    "batch": (8, 16, 32, 64, 128, 256),
    "new_tokens": (32, 64, 128, 256, 512, 1024),
    "vocab_size": (4096, 16_384, 49_152, 98_304, 151_936),
}
WARM_UP, COUNTED = 2, 3
PHASES = ("rollout", "score", "update")


def sized(axis: str, size: int, directory: Path) -> Workload:
    if axis == "vocab_size":
        assert TINY.shape is not None
        return prepare(replace(TINY, shape=TINY.shape | {"vocab_size": size}), directory)
    return prepare(replace(TINY, **{axis: size}), directory)


def measure(workload: Workload) -> dict[str, float]:
    """Median seconds of the phases, and of their sum."""
    iteration = ours.start(workload)
    turns = [iteration() for _ in range(WARM_UP + COUNTED)][WARM_UP:]
    phases = {phase: statistics.median(turn[phase] for turn in turns) for phase in PHASES}
    return phases | {"iteration": statistics.median(sum(turn[phase] for phase in PHASES) for turn in turns)}


def exponent(rows: list[dict[str, Any]]) -> float:
    """Slope of log seconds against log size, over the upper half of the sizes."""
    upper = rows[len(rows) // 2 - 1 :]
    sizes, seconds = ([row[name] for row in upper] for name in ("size", "iteration"))
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.2), layout="constrained", squeeze=False)
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        for phase in (*PHASES, "iteration"):
            axis.loglog([row["size"] for row in rows], [row[phase] for row in rows], marker="o", label=phase)
        axis.set(xlabel=f"{name}, exponent {exponent(rows):.2f}", ylabel="seconds")
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--axes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--json", type=Path, help="write everything here too")
    parser.add_argument("--plot", type=Path, help="a PNG file")
    options = parser.parse_args()
    before = machine()
    host_memory.keep_freed()  # before torch, which makes the models, has threads with heaps of their own
    console, found = Console(width=100), {}
    for axis in options.axes:
        rows = found[axis] = []
        table = Table(axis, *(f"{phase}, s" for phase in (*PHASES, "iteration")))
        for size in SIZES[axis]:
            with tempfile.TemporaryDirectory() as directory:
                rows.append({"size": size} | measure(sized(axis, size, Path(directory) / "model")))
            table.add_row(str(size), *(f"{rows[-1][phase]:.3f}" for phase in (*PHASES, "iteration")))
        console.print(table, f"exponent of the upper half: {exponent(rows):.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": before, "sizes": found}, indent=1) + "\n")
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
