"""`python -m benchmarks.iteration`: ours, the article's loop and TRL's PPOTrainer, in turn in one run on the same work.

Each is a process of its own that waits while another works, ours as if torch were not installed; they take turns, in
another order in every round. Prints the medians of the phases, tokens per second, peak memory, and the ratio of ours to
the faster peer with its spread over the rounds. The first iterations, which compile and warm up, are not counted.
Workloads: SmolLM2-135M (`make smollm2`) and a tiny Llama on a CPU; random weights of a 0.5 B and a 1 B shape in
bfloat16 on a GPU.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.iteration.worker import MODULES
from benchmarks.iteration.workloads import WORKLOADS, Workload, prepare

PHASES = ("rollout", "score", "update", "iteration")
WARM_UP = 2
OURS = "ours"
# What `ppo_jax.host_memory` is worth: as it is without it, since the user's word goes before ours. These are defaults.
AS_GLIBC_DOES = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}


class Contestant:
    """A worker process; `turn` runs one iteration in it."""

    def __init__(self, name: str, workload: Workload):
        command = [sys.executable, "-m", "benchmarks.iteration.worker", name, workload.name]
        command += ["--model", str(workload.model), "--epochs", str(workload.epochs), "--batch", str(workload.batch)]
        micro_batch = workload.micro_batch
        if workload.our_micro_batch is not None and name.startswith(OURS):
            micro_batch = workload.our_micro_batch
        if micro_batch is not None:
            command += ["--micro-batch", str(micro_batch)]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # peers live on the same GPU
        if name == "ours_glibc":
            environment |= AS_GLIBC_DOES
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise SystemExit(f"{self.name} ended: {self.process.stderr.read()[-2000:]}")
        return line

    def wait_until_loaded(self) -> None:
        self._line()

    def turn(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("next\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(workload: Workload, names: list[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Every counted iteration of every contestant."""
    contestants = [Contestant(name, workload) for name in names]  # they load side by side
    counted: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    try:
        for contestant in contestants:
            contestant.wait_until_loaded()
        for index in range(WARM_UP + rounds):
            first = index % len(contestants)
            for contestant in contestants[first:] + contestants[:first]:
                found = contestant.turn()
                if index >= WARM_UP:
                    counted[contestant.name].append(found)
    finally:
        for contestant in contestants:
            contestant.end()
    return counted


def summarise(workload: Workload, counted: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians by contestant and, of the rounds, the ratio of the faster peer's seconds to ours."""
    tokens = workload.batch * workload.new_tokens
    medians = {
        name: {phase: statistics.median(turn[phase] for turn in turns) for phase in PHASES}
        | {"peak_bytes": max(turn["peak_bytes"] for turn in turns)}
        for name, turns in counted.items()
    }
    for of in medians.values():
        of["tokens_per_s"] = tokens / of["iteration"]
    settings = ("epochs", "batch", "micro_batch", "our_micro_batch")
    summary: dict[str, Any] = {"workload": workload.name} | {name: getattr(workload, name) for name in settings}
    peers = [name for name in counted if not name.startswith(OURS)]
    if OURS in counted and peers:
        summary["ratios"] = {}
        for phase in PHASES:
            fastest = min(peers, key=lambda name: medians[name][phase])
            of_rounds = [
                theirs[phase] / ours[phase] for theirs, ours in zip(counted[fastest], counted[OURS], strict=True)
            ]
            summary["ratios"][phase] = {
                "peer": fastest,
                "of_medians": medians[fastest][phase] / medians[OURS][phase],
                "of_rounds": [min(of_rounds), max(of_rounds)],
            }
    return summary | {"medians": medians, "turns": counted}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    packages = ("jax", "torch", "transformers", "trl")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = first.get("flags", "").split()
    gpus = subprocess.run("nvidia-smi -L || true", shell=True, capture_output=True, text=True, check=False).stdout
    return {
        "cpu": first.get("model name", platform.processor()),
        "vectors": [name for name in ("avx2", "avx512f", "amx_tile") if name in flags],  # one name has several of these
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus.splitlines(),
        "load before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    table = Table(*("", *(f"{phase}, s" for phase in PHASES), "tokens/s", "peak GB"))
    for name, of in summary["medians"].items():
        seconds = (f"{of[phase]:.2f}" for phase in PHASES)
        table.add_row(name, *seconds, f"{of['tokens_per_s']:.0f}", f"{of['peak_bytes'] / 1e9:.2f}")
    if "ratios" in summary:
        ratios = [summary["ratios"][phase] for phase in PHASES]
        table.add_row(
            "faster peer / ours",
            *(f"{of['of_medians']:.2f} ({of['of_rounds'][0]:.2f} to {of['of_rounds'][1]:.2f})" for of in ratios),
            style="bold",
        )
    table.title = f"{summary['workload']}, batch {summary['batch']}, {summary['epochs']} epoch(s)"
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.iteration", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["smollm2", "tiny"])
    parser.add_argument("--epochs", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5, help="counted iterations of each")
    parser.add_argument("--batch-scale", type=int, default=1, help="multiplies the answers of an iteration")
    parser.add_argument("--micro-batch", type=int, help="answers in a forward pass of every contestant's update")
    parser.add_argument("--our-micro-batch", type=int, help="the same of ours alone, where memory is what is compared")
    parser.add_argument("--only", nargs="+", choices=list(MODULES), default=[OURS, "article", "trl"])
    parser.add_argument("--json", type=Path, help="write everything here too")
    options = parser.parse_args()
    console, found, before = Console(width=160), [], machine()
    with tempfile.TemporaryDirectory() as directory:
        for name in options.workloads:
            ready = prepare(WORKLOADS[name], Path(directory) / name)
            for epochs in options.epochs:
                workload = replace(ready, epochs=epochs, batch=ready.batch * options.batch_scale)
                if options.micro_batch is not None:
                    workload = replace(workload, micro_batch=options.micro_batch)
                workload = replace(workload, our_micro_batch=options.our_micro_batch)
                found.append(summarise(workload, measure(workload, options.only, options.rounds)))
                print_summary(found[-1], console)
                if options.json is not None:
                    options.json.write_text(json.dumps({"machine": before, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
