"""`python -m benchmarks.startup [--warm N] [--section.key VALUE ...]`: from the command to its first iteration.

The command `python -m ppo_jax.train` is started with an empty compilation cache, then N times with what that start has
left there, and ended when it has printed iteration 0. The ratio of warm to cold, taken in one go, says more than the
seconds where other programs run.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds_to_first_iteration(arguments: list[str], directory: Path) -> tuple[float, float]:
    """(of the wall clock, of processors)"""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(directory / "cache")}
    command = [sys.executable, "-m", "ppo_jax.train", "--run.iterations", "2", *arguments]
    run = directory / f"run_{time.monotonic_ns()}"
    before, started = os.times(), time.perf_counter()
    with subprocess.Popen(
        [*command, "--run.dir", str(run)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if re.match(r" +0  KL nats/seq", line):
                break
        else:
            raise SystemExit("the run ended without an iteration:\n" + "".join(said))
        seconds = time.perf_counter() - started
        process.kill()
    after = os.times()
    return seconds, after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=int, default=3, help="starts with a warm cache")
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        cold = seconds_to_first_iteration(rest, Path(directory))
        print(f"cold: {cold[0]:.1f} s, {cold[1]:.1f} s of processors", flush=True)
        warm = [seconds_to_first_iteration(rest, Path(directory)) for _ in range(options.warm)]
        entries = list((Path(directory) / "cache").glob("*-cache"))
        size = sum(entry.stat().st_size for entry in entries)
    wall, processors = (statistics.median(seconds) for seconds in zip(*warm, strict=True))
    print(f"warm: {', '.join(f'{seconds:.1f}' for seconds, _ in warm)} s; median {processors:.1f} s of processors")
    print(f"warm / cold: {wall / cold[0]:.2f} of the time, {processors / cold[1]:.2f} of the processors' time")
    print(f"{len(entries)} programs, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
