"""What a report reads of a run directory, whatever is missing there, and the runs that make one curve."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from ppo_jax import ratings
from ppo_jax.config import known_keys
from ppo_jax.errors import UserError
from ppo_jax.monitor import answers, samples
from ppo_jax.monitor.sinks import read_rows

METRICS, ALARMS, CONFIG, VERSIONS = "metrics.jsonl", "alarms.jsonl", "config.yaml", "versions.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class ReadRun:
    """A run directory as read; of a run that has only begun, or lacks a file, lists and dictionaries are empty."""

    name: str
    directory: Path
    rows: list[Row]  # of metrics.jsonl
    samples: list[Row]  # answers to the fixed prompts
    answers: list[Row]  # some answers of ordinary iterations
    alarms: list[Row]
    config: dict[str, Any]  # by dotted key
    versions: dict[str, Any]
    rated: ratings.Rated

    def values(self, name: str) -> dict[int, float]:
        """A metric by iteration, those that are not finite included; empty when the run does not have it."""
        return {row["step"]: float(row[name]) for row in self.rows if isinstance(row.get(name), int | float)}

    def ends(self, name: str) -> "tuple[float, float] | None":
        """Means of a metric over the first and the last iterations; None where nothing is finite."""
        values = [value for value in self.values(name).values() if math.isfinite(value)]
        count = _averaged(len(values))
        return (mean(values[:count]), mean(values[-count:])) if values else None

    @property
    def averaged(self) -> int:
        """How many iterations are averaged at either end."""
        return _averaged(len(self.rows))


@dataclass(frozen=True)
class Curve:
    """Runs that are drawn as one: a run, or several seeds of one recipe."""

    label: str
    runs: list[ReadRun]

    def points(self, name: str) -> list[tuple[int, float, float, float]]:
        """(iteration, mean, smallest, largest) of a metric, where all runs have that iteration."""
        values = [run.values(name) for run in self.runs]
        steps = sorted(set(values[0]).intersection(*values[1:]))
        at = [(step, [of_run[step] for of_run in values]) for step in steps]
        return [(step, mean(numbers), *_range(numbers)) for step, numbers in at]


def _averaged(count: int) -> int:
    """How many of so many values are averaged at either end: a third, at most 5; the ends have none in common."""
    return max(1, min(5, count // 3))


def _range(numbers: list[float]) -> tuple[float, float]:
    """Smallest and largest; NaN where one is NaN, which `min` and `max` would hide."""
    return (math.nan, math.nan) if any(map(math.isnan, numbers)) else (min(numbers), max(numbers))


def read_curves(arguments: list[str]) -> list[Curve]:
    """Curves of `[LABEL=]RUN[,RUN...]` each; a label that is not given is the name of the directory."""
    curves = []
    for argument in arguments:
        label, _, directories = ("", "", argument) if Path(argument).is_dir() else argument.rpartition("=")
        paths = [directories] if Path(directories).is_dir() else directories.split(",")
        runs = [read_run(Path(path)) for path in paths]
        curves.append(Curve(label or ", ".join(run.name for run in runs), runs))
    return curves


def read_run(directory: Path) -> ReadRun:
    """Raises UserError for what is no run directory, or for a damaged line of one of its files."""
    if not any((directory / name).is_file() for name in (METRICS, CONFIG)):
        raise UserError(
            f"{directory} (resolved: {directory.absolute()}) is not a run directory: it has neither {METRICS} nor "
            f"{CONFIG}"
        )
    return ReadRun(
        name=directory.absolute().name,
        directory=directory,
        rows=read_rows(directory / METRICS),
        samples=samples.read(directory),
        answers=answers.read(directory),
        alarms=[row | {"level": _level(row)} for row in read_rows(directory / ALARMS)],
        config=_flat(_described(directory / CONFIG, yaml.safe_load)),
        versions=_described(directory / VERSIONS, json.loads),
        rated=ratings.read(directory),
    )


def _level(alarm: Row) -> str:
    """One of those that the page has a style for."""
    return alarm["level"] if alarm.get("level") in ("warn", "act", "stop") else "warn"


def _described(file: Path, parse: Any) -> dict[str, Any]:
    try:
        content = parse(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {type(content).__name__}, expected keys and values")
    return content


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, content in sections.items()
        if isinstance(content, dict)
        for key, value in content.items()
    }


def defaults() -> dict[str, Any]:
    """Every default by dotted key, as YAML gives it back."""
    return {key: list(f.default) if isinstance(f.default, tuple) else f.default for key, f in known_keys()}
