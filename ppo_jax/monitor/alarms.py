"""Alarms: what has gone wrong for several iterations in a row, which failure it is, and what to do about it.

`raised` is a function of the rows of `metrics.jsonl` and `alarms.jsonl` and of the configuration, so that a resumed run
raises what the unbroken one raises. The failures themselves are in `failure_scenes`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from ppo_jax import jsonl
from ppo_jax.config import Config
from ppo_jax.monitor.failure_scenes import BASELINE, DETECTORS, Detector, Row
from ppo_jax.records import TrainState

log = logging.getLogger("ppo_jax")

FILE = "alarms.jsonl"
# What is not waited for: one row is enough.
AT_ONCE = ("not_finite", "reference_moved")


@dataclass(frozen=True)
class Alarm:
    """One line of `alarms.jsonl`."""

    step: int  # the iteration whose row raised it
    since: int  # the first iteration that looked wrong
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


def has_baseline(rows: Sequence[Row]) -> bool:
    """Whether the first row is the SFT model's own and has all that later ones are compared with."""
    return bool(rows) and rows[0]["step"] == 0 and rows[0].keys() >= BASELINE


def raised(rows: Sequence[Row], heard: Mapping[str, int], config: Config, saved: Mapping[int, Path]) -> list[Alarm]:
    """The alarms of the last of a run's rows, given from the first one on.

    `heard` are the scenes that raised an alarm before, see `read`; `saved` the checkpoints by their step. A scene
    raises its alarm when it has lasted for `alarms.patience` rows, and again at twice that, four times that and so on,
    for as long as it lasts. Without a baseline there is no alarm.
    """
    found = []
    if not has_baseline(rows):
        return found
    for scene, detector in DETECTORS.items():
        lasted, patience = streak(rows, detector, config), 1 if scene in AT_ONCE else config.alarms.patience
        repeats = lasted // patience
        if lasted == 0 or lasted % patience or repeats & (repeats - 1):
            continue
        finding = detector(rows[-1], rows[0], config)
        assert finding is not None
        began = rows[-lasted]["step"]
        lasting = "" if lasted == 1 else f", since iteration {began}"
        found.append(
            Alarm(
                step=rows[-1]["step"],
                since=began,
                scene=scene,
                level=level_of(scene, config, again=scene in heard),
                numbers=finding.numbers,
                message=finding.message + lasting,
                cause=finding.cause,
                advice=finding.advice,
                checkpoint=checkpoint_before(saved, began),
            )
        )
    return found


def level_of(scene: str, config: Config, *, again: bool) -> Literal["warn", "act", "stop"]:
    """What the configuration allows; a scene that may act stops the run only when acting has not helped.

    A reference that moved ends every run. Steps that are not finite are skipped, and end it only when several come in a
    row, by an error of their own (`ending.stop_if_not_finite`).
    """
    if scene == "reference_moved":
        return "stop"
    acts, stops = scene in config.alarms.act, scene in config.alarms.stop
    if stops and (again or not acts):
        return "stop"
    return "act" if acts else "warn"


def read(directory: Path, first_step: int) -> dict[str, int]:
    """Of each scene that has raised an alarm before `first_step`, the first wrong iteration of its latest alarm."""
    rows = jsonl.read(directory / FILE, step=int, since=int, scene=str)
    return {row["scene"]: row["since"] for row in rows if row["step"] < first_step}


def suspected_since(rows: Sequence[Row], heard: Mapping[str, int], config: Config) -> set[int]:
    """The first iterations of all that looks wrong now, whether it has raised an alarm yet or not, and of each scene's
    latest alarm, over or not: the checkpoint that it names is one to return to."""
    lasted = [streak(rows, detector, config) for detector in DETECTORS.values()] if has_baseline(rows) else []
    return {rows[-count]["step"] for count in lasted if count} | set(heard.values())


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
    after = jnp.maximum(2 * before, smallest)
    log.warning("alarm: kl/coef is raised from %g to %g", float(before), float(after))
    return replace(state, kl_coef=jax.device_put(after, before.sharding))


def reason_to_stop(raised: Sequence[Alarm]) -> str | None:
    """Why alarms end the run, or None."""
    reasons = [f"alarm {alarm.scene}: {alarm.message}" for alarm in raised if alarm.level == "stop"]
    return "; ".join(reasons) or None
