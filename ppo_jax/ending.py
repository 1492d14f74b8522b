"""How a run ends before its last iteration: on numbers that are not finite, on a signal, at a limit, on a failure.

Whatever happens, the last finished iteration is saved first where that can be done, and the message says where.
"""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from ppo_jax.build import Run
from ppo_jax.checkpoint import Checkpoints
from ppo_jax.errors import UserError
from ppo_jax.monitor import not_finite
from ppo_jax.monitor.clock import PhaseClock
from ppo_jax.processes import from_lead
from ppo_jax.records import TrainState

log = logging.getLogger("ppo_jax")


def stop_if_not_finite(run: Run, state: TrainState, checkpoints: Checkpoints, numbers: dict[str, Any]) -> None:
    """Several optimizer steps in a row that were not finite end the run; what they left untouched is saved."""
    in_a_row = int(numbers["update/skipped_in_a_row_max"])
    if in_a_row >= not_finite.TOO_MANY_IN_A_ROW:
        saved = save_now(state, checkpoints)
        raise UserError(
            f"{in_a_row} optimizer steps in a row were skipped by iteration {int(state.step) - 1}: the "
            f"{not_finite.cause(numbers)} was not finite. Parameters and moments are as before them, the state is "
            f"{saved}. Look at the answers in {run.directory / not_finite.FOLDER} and for extreme scores or ratios in "
            f"{run.directory / 'metrics.jsonl'}; a new run may need a lower update.learning_rate"
        )


def stop_if_told(run: Run, state: TrainState, checkpoints: Checkpoints, signal_number: int) -> None:
    """A signal ends the run after the iteration that it came in, saved; the exit code is what schedulers expect."""
    if signal_number:
        name, saved = signal.Signals(signal_number).name, save_now(state, checkpoints)
        log.warning("%s: stopped; the finished iteration is %s; --resume %s continues", name, saved, run.directory)
        raise SystemExit(128 + signal_number)


@contextmanager
def save_on_failure(run: Run, state: TrainState, checkpoints: Checkpoints) -> Iterator[None]:
    """Checkpoint the last finished iteration when what follows fails, unless its buffers are already given up."""
    try:
        yield
    except BaseException as error:
        given_up = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        # Saving takes all processes, and only what a user can mend is known to have ended all of them.
        all_ended = isinstance(error, UserError) or jax.process_count() == 1
        if all_ended and not given_up and int(state.step) > 0:
            saved = save_now(state, checkpoints)
            log.warning("the last finished iteration is %s; --resume %s continues", saved, run.directory)
        raise


def save_now(state: TrainState, checkpoints: Checkpoints) -> str:
    """Save and wait: where the state is, or why it is not."""
    path = checkpoints.save(state)
    try:
        checkpoints.finish()
    except UserError as failure:
        return f"not saved: {failure}"
    return f"saved in {path}"


def limit_reached(run: Run, numbers: dict[str, Any], clock: PhaseClock) -> str | None:
    """Why the run should end after this iteration, or None."""
    limits = run.config.run
    if limits.max_seq_kl_nats is not None and numbers["kl/seq_nats"] > limits.max_seq_kl_nats:
        kl = numbers["kl/seq_nats"]
        return f"KL budget: {kl:.3f} nats per sequence, run.max_seq_kl_nats is {limits.max_seq_kl_nats}"
    if limits.max_wall_clock_s is not None and (seconds := from_lead(clock.total_s)) > limits.max_wall_clock_s:
        return f"time limit: {seconds:.0f} s, run.max_wall_clock_s is {limits.max_wall_clock_s}"
    return None
