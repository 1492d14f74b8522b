"""`ppo_jax`: its own iteration, `train.ppo_iteration`, as a run calls it."""

import tempfile
from collections.abc import Callable

import jax

from benchmarks.iteration.workloads import Workload, prompts
from ppo_jax import build, host_memory, train
from ppo_jax.build import Run
from ppo_jax.config_file import load
from ppo_jax.monitor.clock import PhaseClock
from ppo_jax.records import TrainState

PHASES = {"rollout": "time/rollout_s", "score": "time/score_s", "update": "time/update_s"}


def lengths(_: list[str], answers: list[str]) -> list[float]:
    return [float(len(answer)) for answer in answers]


def made(workload: Workload) -> tuple[Run, TrainState]:
    """A run of the workload, and its first state."""
    host_memory.keep_freed()
    settings = {
        "model.path": str(workload.model),
        "model.compute_dtype": workload.dtype,
        "run.dir": f"{tempfile.mkdtemp()}/run",
        "rollout.batch_size": workload.batch,
        "rollout.max_new_tokens": workload.new_tokens,
        "rollout.min_new_tokens": workload.new_tokens,
        "rollout.top_p": 0.9,
        "rollout.reuse_states": workload.dtype == "float32",  # as TRL takes its log-probs from the sampler
        "update.epochs": workload.epochs,
        "update.minibatch_size": workload.batch,
        "update.micro_batch_size": workload.micro_batch,
        "update.learning_rate": 1e-6,
        "monitor.tensorboard": False,
    }
    return build.build(load(overrides=settings), reward=lengths, prompts=prompts(workload))


def start(workload: Workload) -> Callable[[], dict[str, float]]:
    run, state = made(workload)

    def iteration() -> dict[str, float]:
        nonlocal state
        with jax.set_mesh(run.mesh):
            state, numbers = train.ppo_iteration(run, state, PhaseClock())
        return {phase: numbers[name] for phase, name in PHASES.items()}

    return iteration


def device_memory() -> int | None:
    """Largest bytes on the device so far; None on a CPU, where the process is measured instead."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if statistics is None else statistics["peak_bytes_in_use"]
