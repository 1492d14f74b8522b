"""Where metrics and alarms are written: JSONL always, TensorBoard and Weights & Biases when asked for."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax import durable, jsonl
from ppo_jax.config import SinksConfig
from ppo_jax.errors import UserError
from ppo_jax.monitor.alarms import FILE as ALARMS_FILE
from ppo_jax.monitor.alarms import Alarm
from ppo_jax.monitor.metrics import scalars
from ppo_jax.monitor.signals import HISTOGRAM_EDGES
from ppo_jax.processes import is_lead


class MetricsWriter:
    """One object per iteration in `metrics.jsonl`, one per alarm in `alarms.jsonl`, on the disk at once, and the same
    to the other sinks.

    Of several processes only process 0 writes; the numbers are the same in all.
    """

    def __init__(self, directory: Path, *, first_step: int, monitor: SinksConfig):
        self._file, self._alarms, self._tensorboard, self._wandb = None, None, None, None
        if not is_lead():
            return
        self._file = open_from(directory / "metrics.jsonl", first_step)
        self._alarms = open_from(directory / ALARMS_FILE, first_step)
        if monitor.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)
        if monitor.wandb_project is not None:
            self._wandb = _start_wandb(monitor.wandb_project, directory)

    def write(self, step: int, numbers: dict[str, Any], alarms: Sequence[Alarm] = ()) -> None:
        """A row of `metrics.jsonl`, and what it raised to `alarms.jsonl`; histograms are for the other sinks alone."""
        row = scalars(numbers)
        histograms = {name: numbers[name] for name in numbers.keys() - row.keys()}
        # An alarm before its row, so that no row is without its alarm; and no row is lost whose checkpoint is not.
        for file, lines in ((self._alarms, [asdict(alarm) for alarm in alarms]), (self._file, [{"step": step} | row])):
            if file is not None and lines:
                with jsonl.writing(Path(file.name)):
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                    file.flush()
                    os.fsync(file.fileno())
        if self._tensorboard is not None:
            for name, value in row.items():
                self._tensorboard.add_scalar(name, value, step)
            for name, counts in histograms.items():
                self._tensorboard.add_histogram_raw(name, **_raw_histogram(name, counts), global_step=step)
            for alarm in alarms:
                self._tensorboard.add_text(f"alarm/{alarm.scene}", alarm.text(), step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(row | _wandb_histograms(histograms), step=step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._alarms):
            if file is not None:
                with contextlib.suppress(OSError):  # of a full disk, on which `write` has failed already
                    file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows with a step, none when there is no such file; a last line that a killed process left torn is dropped."""
    return jsonl.read(file, step=int)


def open_from(file: Path, first_step: int):
    """A JSONL file open for appending, holding only rows of earlier steps: a resumed run writes no step twice."""
    kept = [row for row in read_rows(file) if row["step"] < first_step]
    if file.is_file():
        durable.write_text(file, "".join(map(jsonl.line, kept)))
    return file.open("a", encoding="utf-8")


def check_sinks(monitor: SinksConfig) -> None:
    """Refuse a sink that is not installed."""
    if monitor.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("monitor.wandb_project is set, but wandb is not installed; it is the extra 'wandb'")


def _start_wandb(project: str, directory: Path):
    import wandb  # pyright: ignore[reportMissingImports], an optional extra

    return wandb.init(project=project, dir=str(directory), name=directory.name)


def _raw_histogram(name: str, counts: np.ndarray) -> dict[str, Any]:
    """What TensorBoard wants to know of counted bins; moments are those of the bins' middles."""
    edges = np.asarray(HISTOGRAM_EDGES[name])
    middles, used = (edges[:-1] + edges[1:]) / 2, np.flatnonzero(counts)
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
    return {
        "min": float(edges[first]),
        "max": float(edges[last + 1]),
        "num": int(counts.sum()),
        "sum": float(counts @ middles),
        "sum_squares": float(counts @ middles**2),
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }


def _wandb_histograms(histograms: dict[str, np.ndarray]) -> dict[str, Any]:
    import wandb  # pyright: ignore[reportMissingImports], an optional extra

    return {
        name: wandb.Histogram(np_histogram=(counts, np.asarray(HISTOGRAM_EDGES[name])))
        for name, counts in histograms.items()
    }
