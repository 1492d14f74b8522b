"""Alarms: what has gone wrong for several iterations in a row, which failure it is, and what to do about it.

`raised` is a function of the rows of `metrics.jsonl` and the configuration, so that a resumed run raises what the
unbroken one raises. The failures themselves are in `failure_scenes`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from ppo_jax.config import Config
from ppo_jax.monitor.failure_scenes import DETECTORS, Detector, Row
from ppo_jax.records import TrainState

log = logging.getLogger("ppo_jax")

FILE = "alarms.jsonl"
# What no iteration can be waited for, and what ends a run whatever the configuration says.
AT_ONCE = ("not_finite", "reference_moved")


@dataclass(frozen=True)
class Alarm:
    """One line of `alarms.jsonl`."""

    step: int  # the iteration whose row raised it
    scene: str  # name of a detector
    level: Literal["warn", "act", "stop"]
    numbers: dict[str, float]  # metrics that show it, with those of the first iteration
    message: str
    cause: str
    advice: str
    checkpoint: str | None  # the newest one from before it began, None where none was kept

    def text(self) -> str:
        """What the terminal and TensorBoard show."""
        back = "no checkpoint from before it is there" if self.checkpoint is None else f"return to {self.checkpoint}"
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.numbers.items())
        return f"{self.message} ({numbers}). Likely cause: {self.cause}. What to do: {self.advice}; {back}"


def streak(rows: Sequence[Row], detector: Detector, config: Config) -> int:
    """How many of the last rows, in a row, the detector finds something in."""
    count = 0
    for row in reversed(rows):
        if detector(row, rows[0], config) is None:
            break
        count += 1
    return count


def raised(rows: Sequence[Row], config: Config, saved: Mapping[int, Path]) -> list[Alarm]:
    """The alarms of the last of a run's rows, given from the first one on; `saved` are the checkpoints by their step.

    A scene raises its alarm when it has lasted for `alarms.patience` rows, and again at twice that, four times that and
    so on, for as long as it lasts.
    """
    found = []
    for scene, detector in DETECTORS.items():
        lasted, patience = streak(rows, detector, config), 1 if scene in AT_ONCE else config.alarms.patience
        repeats = lasted // patience
        if lasted == 0 or lasted % patience or repeats & (repeats - 1):
            continue
        finding = detector(rows[-1], rows[0], config)
        assert finding is not None
        began = rows[-lasted]["step"]
        since = "" if lasted == 1 else f", since iteration {began}"
        found.append(
            Alarm(
                step=rows[-1]["step"],
                scene=scene,
                level=level_of(scene, config, again=repeats > 1),
                numbers=finding.numbers,
                message=finding.message + since,
                cause=finding.cause,
                advice=finding.advice,
                checkpoint=checkpoint_before(saved, began),
            )
        )
    return found


def level_of(scene: str, config: Config, *, again: bool) -> Literal["warn", "act", "stop"]:
    """What the configuration allows; a scene that may act stops the run only when acting has not helped."""
    if scene in AT_ONCE:
        return "stop"
    acts, stops = scene in config.alarms.act, scene in config.alarms.stop
    if stops and (again or not acts):
        return "stop"
    return "act" if acts else "warn"


def suspected_since(rows: Sequence[Row], config: Config) -> set[int]:
    """The first iterations of all that looks wrong now, whether it has raised an alarm yet or not."""
    lasted = [streak(rows, detector, config) for detector in DETECTORS.values()]
    return {rows[-count]["step"] for count in lasted if count}


def checkpoint_before(saved: Mapping[int, Path], iteration: int) -> str | None:
    """The newest checkpoint whose own answers were still fine: that of step s has answered in iteration s."""
    good = [step for step in saved if step < iteration]
    return str(saved[max(good)]) if good else None


def act(raised: Sequence[Alarm], state: TrainState, *, score_std: float) -> TrainState:
    """The state with twice its β, and at least a twentieth of the scores' deviation per nat, where an alarm may act.

    β is part of the state, so what was done is in every later checkpoint.
    """
    if all(alarm.level != "act" for alarm in raised):
        return state
    before, smallest = state.kl_coef, jnp.asarray(score_std / 20, state.kl_coef.dtype)
    log.warning("alarm: kl/coef is raised from %g", float(before))
    return replace(state, kl_coef=jax.device_put(jnp.maximum(2 * before, smallest), before.sharding))


def reason_to_stop(raised: Sequence[Alarm]) -> str | None:
    """Why alarms end the run, or None; those `AT_ONCE` end it by an error of their own."""
    reasons = [f"alarm {alarm.scene}: {alarm.message}" for alarm in raised if alarm.level == "stop"]
    return "; ".join(reasons) or None
