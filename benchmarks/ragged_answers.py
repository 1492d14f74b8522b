"""`python -m benchmarks.ragged_answers`: what putting answers of like length together saves, in scoring and update.

Times one call of each on the embedded model, in turn: with answers whose lengths vary as sampled ones do, and with
answers that all fill the axis, which is what padding costs. Prints the medians and their ratio.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from ppo_jax import build, scoring, update
from ppo_jax.config_file import load
from ppo_jax.records import Experience, Rollout, Scored

BATCH, PROMPT, AXIS, MICRO = 32, 24, 128, 8
MEAN_LENGTH = 33  # of SmolLM2's answers under configs/article.yaml, docs/smollm2.md
SETTINGS = {
    "rollout.batch_size": BATCH,
    "rollout.max_new_tokens": AXIS,
    "update.minibatch_size": BATCH,
    "update.micro_batch_size": MICRO,
    "monitor.tensorboard": False,
}


def some_answers(lengths: np.ndarray) -> Rollout:
    rng = np.random.default_rng(0)
    mask = np.arange(AXIS)[None] < lengths[:, None]
    zeros = jnp.zeros((BATCH, AXIS))
    return Rollout(
        prompt_tokens=jnp.asarray(rng.integers(2, 1000, (BATCH, PROMPT)), jnp.int32),
        prompt_mask=jnp.ones((BATCH, PROMPT), bool),
        response_tokens=jnp.asarray(np.where(mask, rng.integers(2, 1000, mask.shape), 0), jnp.int32),
        response_mask=jnp.asarray(mask),
        behaviour_logprobs=zeros,
        kept_mass=zeros,
        finish_reason=jnp.zeros(BATCH, jnp.int32),
        group_id=jnp.arange(BATCH, dtype=jnp.int32),
        policy_version=jnp.zeros((), jnp.int32),
    )


def experience_of(answers: Rollout, scored: Scored) -> Experience:
    return Experience(
        prompt_tokens=answers.prompt_tokens,
        prompt_mask=answers.prompt_mask,
        response_tokens=answers.response_tokens,
        response_mask=answers.response_mask,
        old_logprobs=scored.old_logprobs,
        advantages=jnp.where(answers.response_mask, 1e-3, 0.0),
    )


def seconds_of(function: Callable[[Any], Any], argument: Any) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(argument))
    return time.perf_counter() - started


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a call by phase, of ragged and of full answers."""
    with tempfile.TemporaryDirectory() as directory:
        run, state = build.build(load(overrides=SETTINGS | {"run.dir": f"{directory}/run"}))
        run.lock.release()
    params, opt_state = state.params, state.opt_state

    def score(answers: Rollout) -> Scored:
        return scoring.score(params, run.ref_params, answers, scoring=run.scoring)

    def step(experience: Experience) -> Any:
        nonlocal params, opt_state
        rows, functions = jnp.arange(BATCH), {"optimizer": run.optimizer, "objective": run.objective}
        params, opt_state, stats = update.ppo_step(
            params, opt_state, run.ref_params, experience, rows, state.kl_coef, state.step, **functions
        )
        return stats

    lengths = np.clip(np.random.default_rng(1).geometric(1 / MEAN_LENGTH, BATCH), 1, AXIS)
    batches = {"ragged": some_answers(lengths), "full": some_answers(np.full(BATCH, AXIS))}
    experiences = {name: experience_of(answers, score(answers)) for name, answers in batches.items()}
    taken: dict[str, dict[str, list[float]]] = {phase: {name: [] for name in batches} for phase in ("score", "update")}
    for index in range(rounds + 1):
        for name in batches:
            seconds = seconds_of(score, batches[name]), seconds_of(step, experiences[name])
            if index > 0:  # the first round compiles
                for phase, of_phase in zip(taken, seconds, strict=True):
                    taken[phase][name].append(of_phase)
    return {phase: {name: statistics.median(all_) for name, all_ in of.items()} for phase, of in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ragged_answers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    table = Table("phase", "ragged, s", "full, s", "full / ragged")
    for phase, seconds in measure(parser.parse_args().rounds).items():
        ratio = seconds["full"] / seconds["ragged"]
        table.add_row(phase, f"{seconds['ragged']:.2f}", f"{seconds['full']:.2f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
