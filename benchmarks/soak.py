"""`python -m benchmarks.soak [--kills N] [--cache_kills N] [--config FILE] [--section.key VALUE ...]`: kill it again.

A run is ended by SIGKILL at random moments behind its start-up and resumed each time; then it ends bit for bit
where the same run ends that nobody touched: parameters, moments, KL coefficient, running statistics, metrics but for
times, samples, and the exported policy. Every kill is told with the phase it fell into. Exit code 1 on any difference.

Each start is a process of its own, forked from one that has imported everything and run nothing. The two runs have a
compilation cache each, empty at first. Its entries are written as on a slow disk, in pieces, and the first kills, those
of `--cache_kills`, wait for such a write: they leave entries cut short, which the next start must find.
"""

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax._src.lru_cache import LRUCache

from ppo_jax import checkpoint, cli, compilation_cache, train
from ppo_jax.checkpoint import Checkpoints
from ppo_jax.monitor.clock import PhaseClock
from ppo_jax.monitor.sinks import MetricsWriter, read_rows

# A small one that uses all that a state holds: a steered coefficient and running statistics of the scores.
SETTINGS = {
    "run.iterations": 40,
    "rollout.batch_size": 8,
    "rollout.max_new_tokens": 8,
    "update.minibatch_size": 4,
    "kl.target_nats": 0.5,
    "reward.normalise": "running",
    "monitor.sample_every": 4,
    "monitor.tensorboard": False,
    "checkpoint.save_every": 1,
}
SLOT = 32
START, CACHE_WRITE = "start-up", "cache write"
PIECES, PIECE_S = 8, 0.005  # of an entry of the compilation cache


class Phases:
    """What the main thread of a child does, and the thread that saves, in memory that outlives the child."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2 * SLOT)

    def set(self, slot: int, name: str) -> None:
        self._memory[slot * SLOT : (slot + 1) * SLOT] = name.encode().ljust(SLOT)

    def get(self) -> tuple[str, str]:
        text = bytes(self._memory).decode()
        return text[:SLOT].strip(), text[SLOT:].strip()

    def watch(self) -> None:
        """In the child: what it calls says where it is."""

        @contextlib.contextmanager
        def inside(name, slot=0):
            before = self.get()[slot]
            self.set(slot, name)
            try:
                yield
            finally:
                self.set(slot, before)

        def watched(owner, attribute, name, slot=0):
            original = getattr(owner, attribute)

            def call(*arguments, **options):
                with inside(name, slot):
                    return original(*arguments, **options)

            setattr(owner, attribute, call)

        phase = PhaseClock.phase

        @contextlib.contextmanager
        def watched_phase(clock, name):
            with inside(name), phase(clock, name):
                yield

        PhaseClock.phase = watched_phase
        watched(train, "_train", "between")
        watched(train, "answer_fixed_prompts", "fixed prompts")
        watched(train, "export_policy", "export")
        watched(MetricsWriter, "write", "metrics")
        watched(Checkpoints, "save", "save")
        watched(Checkpoints, "_complete", "checkpoint", slot=1)
        LRUCache.put = put_slowly
        watched(LRUCache, "put", CACHE_WRITE)


def put_slowly(cache: LRUCache, key: str, value: bytes) -> None:
    """`LRUCache.put`: straight to the name of an entry that is not there, but slowly."""
    path = Path(str(cache.path)) / f"{key}-cache"
    if path.exists():
        return
    with path.open("wb", buffering=0) as file:
        for piece in np.array_split(np.frombuffer(value, np.uint8), PIECES):
            file.write(piece.tobytes())
            time.sleep(PIECE_S)


def start(arguments: list[str], phases: Phases, cache: Path, log: Path) -> int:
    """Fork a training process; its process id."""
    phases.set(0, START)
    phases.set(1, "")
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        jax.config.update("jax_compilation_cache_dir", str(cache))
        phases.watch()
        cli.main(arguments)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def rows_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


TOO_SHORT = "a run ended before it was killed: raise --run.iterations, or see the log (--keep)"


def wait(child: int, until: Callable[[], bool]) -> None:
    while not until():
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit(TOO_SHORT)
        time.sleep(0.001)


def kill(child: int, phases: Phases, *, seconds: float) -> tuple[str, str]:
    """SIGKILL after so long; the phases it fell into."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    if ended(child) != -signal.SIGKILL:
        raise SystemExit(TOO_SHORT)
    return phases.get()


def kill_in_cache_write(child: int, phases: Phases, rng: random.Random) -> tuple[str, str]:
    """SIGKILL at a random moment of one of the next three writes of the compilation cache."""
    for _ in range(rng.randint(0, 2)):
        wait(child, lambda: phases.get()[0] == CACHE_WRITE)
        wait(child, lambda: phases.get()[0] != CACHE_WRITE)
    wait(child, lambda: phases.get()[0] == CACHE_WRITE)
    return kill(child, phases, seconds=rng.uniform(0, 0.9 * PIECES * PIECE_S))


def final_state(run: Path) -> dict[str, bytes]:
    """Every array of the newest checkpoint, by its name."""
    path = checkpoint.newest_whole((run / "checkpoints").absolute(), strict=True)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path / checkpoint.STATE)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(name): np.asarray(leaf).tobytes() for name, leaf in leaves} | {
        "of": path.name.encode()
    }


def without_times(run: Path) -> list[dict]:
    rows = read_rows(run / "metrics.jsonl")
    return [{name: x for name, x in row.items() if not name.startswith(("time/", "throughput/"))} for row in rows]


def same(whole: Path, parts: Path) -> dict[str, bool]:
    """What is equal between two runs, to the bit."""
    states = [final_state(run) for run in (whole, parts)]
    files = [sorted(path.name for path in (run / "policy").iterdir()) for run in (whole, parts)]
    return {
        f"{len(states[0])} arrays of the state": states[0] == states[1],
        f"{len(without_times(whole))} rows of metrics": without_times(whole) == without_times(parts),
        "samples": (whole / "samples.jsonl").read_bytes() == (parts / "samples.jsonl").read_bytes(),
        "policy": files[0] == files[1]
        and all((whole / "policy" / x).read_bytes() == (parts / "policy" / x).read_bytes() for x in files[0]),
    }


def soak(arguments: list[str], directory: Path, *, kills: int, cache_kills: int, seed: int) -> bool:
    phases, rng, log = Phases(), random.Random(seed), directory / "log.txt"
    started = time.perf_counter()
    whole, parts = directory / "whole", directory / "parts"
    if ended(start([*arguments, f"--run.dir={whole}"], phases, directory / "cache_whole", log)) != 0:
        raise SystemExit(f"the unbroken run failed:\n{log.read_text()[-2000:]}")
    seconds = [row["time/iteration_s"] for row in read_rows(whole / "metrics.jsonl")]
    median = statistics.median(seconds)
    print(f"unbroken: {time.perf_counter() - started:.0f} s, an iteration takes {median:.2f} s", flush=True)
    fell, resumed, saved = Counter(), [*arguments, f"--run.dir={parts}"], 0
    cache = directory / "cache_parts"
    for number in range(1, cache_kills + kills + 1):
        child = start(resumed, phases, cache, log)
        if number <= cache_kills:
            main, saving = kill_in_cache_write(child, phases, rng)
        else:
            # In the first iteration of a start, which traces and compiles, or behind one or two finished ones.
            more = rng.choice([0, 1, 2])
            rows = saved + more if more else 0
            wait(child, lambda run=parts, rows=rows: phases.get()[0] != START and rows_of(run) >= rows)
            # Later starts find their programs in the cache: their first iteration is shorter than the very first.
            first = min(seconds[0], 6 * median)
            main, saving = kill(child, phases, seconds=rng.uniform(0, 2 * median if more else first))
        saved = max(checkpoint.saved_steps(parts / "checkpoints"), default=0)
        cut = sum(compilation_cache.is_cut_short(x.read_bytes()) for x in cache.glob(compilation_cache.ENTRIES))
        print(
            f"kill {number:2d}: {', '.join(filter(None, (main, saving)))}; {rows_of(parts)} rows, step {saved} saved"
            + (f", {cut} entries of the compilation cache cut short" if cut else ""),
            flush=True,
        )
        fell.update([main, *([saving] if saving else [])])
        if saved:
            resumed = ["--resume", str(parts)]
        else:  # nothing to go on from yet: the run begins again where it was told to
            resumed = [*arguments, f"--run.dir={directory / f'parts_{number}'}"]
            parts = directory / f"parts_{number}"
    if ended(start(resumed, phases, cache, log)) != 0:
        raise SystemExit(f"the last start failed:\n{log.read_text()[-2000:]}")
    compared = same(whole, parts)
    print("kills fell into:", ", ".join(f"{name} {count}" for name, count in sorted(fell.items())))
    print("bitwise equal:", ", ".join(f"{name}: {'yes' if equal else 'NO'}" for name, equal in compared.items()))
    print(f"{cache_kills + kills} kills, {time.perf_counter() - started:.0f} s", flush=True)
    return all(compared.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--cache_kills", type=int, default=5, help="before those, in writes of the compilation cache")
    parser.add_argument("--config", help="a recipe to start from")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--keep", help="directory to work in and leave; by default a temporary one")
    options, rest = parser.parse_known_args()
    overrides = SETTINGS | cli.parse_overrides(rest)
    arguments = [f"--{key}={json.dumps(value)}" for key, value in overrides.items()]
    if options.config is not None:
        arguments = ["--config", options.config, *arguments]
    with contextlib.ExitStack() as stack:
        directory = options.keep or stack.enter_context(tempfile.TemporaryDirectory())
        kills = {"kills": options.kills, "cache_kills": options.cache_kills}
        equal = soak(arguments, Path(directory).absolute(), **kills, seed=options.seed)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
