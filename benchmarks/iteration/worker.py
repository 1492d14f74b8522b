"""One contestant in a process of its own, so that its memory is its own: an iteration for every line on stdin."""

import argparse
import importlib
import json
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.iteration.workloads import WORKLOADS

MODULES = {"ours": "ours", "ours_glibc": "ours", "article": "article", "trl": "trl_ppo"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=list(MODULES))
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--micro-batch", type=int)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    workload = replace(WORKLOADS[options.workload], model=options.model, epochs=options.epochs, batch=options.batch)
    if options.micro_batch is not None:
        workload = replace(workload, micro_batch=options.micro_batch)
    name = MODULES[options.contestant]
    if name == "ours":
        # `make train` installs no torch, and transformers imports it wherever it finds one: a quarter of a GB.
        sys.modules["torch"] = None
    module = importlib.import_module(f"benchmarks.iteration.{name}")
    iteration = module.start(workload)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        phases = iteration()
        phases["iteration"] = time.perf_counter() - started
        on_device = module.device_memory()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_device is None else on_device
        print(json.dumps(phases | {"peak_bytes": peak}), file=answers, flush=True)


if __name__ == "__main__":
    main()
