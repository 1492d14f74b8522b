"""Where metrics are written: `metrics.jsonl` always, TensorBoard and Weights & Biases when asked for."""

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

from ppo_jax import durable
from ppo_jax.config import SinksConfig
from ppo_jax.errors import UserError
from ppo_jax.processes import is_lead

log = logging.getLogger("ppo_jax")


class MetricsWriter:
    """One object per iteration in `metrics.jsonl`, on the disk at once, and the same numbers to the other sinks.

    Of several processes only process 0 writes; the numbers are the same in all.
    """

    def __init__(self, directory: Path, *, first_step: int, monitor: SinksConfig):
        self._file, self._tensorboard, self._wandb = None, None, None
        if not is_lead():
            return
        self._file = open_from(directory / "metrics.jsonl", first_step)
        if monitor.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)
        if monitor.wandb_project is not None:
            self._wandb = _start_wandb(monitor.wandb_project, directory)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step} | metrics) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # no row may be lost whose checkpoint is not
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file, none when it is not there; a last line that a killed process left torn is dropped."""
    if not file.is_file():
        return []
    *lines, last = file.read_bytes().split(b"\n")  # not splitlines of a text: an answer may hold U+2028
    if last:
        log.warning("warning: %s ends in a torn line, which is dropped", file)
    return [_row(file, number, line) for number, line in enumerate(lines, 1) if line]


def _row(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError("no object with a step")
        return row
    except ValueError as error:
        raise UserError(f"{file}:{number} is damaged ({error}); remove this line to continue without it") from error


def open_from(file: Path, first_step: int):
    """A JSONL file open for appending, holding only rows of earlier steps: a resumed run writes no step twice."""
    kept = [row for row in read_rows(file) if row["step"] < first_step]
    if file.is_file():
        durable.write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return file.open("a", encoding="utf-8")


def check_sinks(monitor: SinksConfig) -> None:
    """Refuse a sink that is not installed."""
    if monitor.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("monitor.wandb_project is set, but wandb is not installed; it is the extra 'wandb'")


def _start_wandb(project: str, directory: Path):
    import wandb  # pyright: ignore[reportMissingImports], an optional extra

    return wandb.init(project=project, dir=str(directory), name=directory.name)
