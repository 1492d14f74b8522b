"""From YAML and dotted overrides to a `Config`: every problem reported at once."""

import difflib
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ppo_jax.config import Config, Settings, known_keys
from ppo_jax.errors import UserError
from ppo_jax.misfits import Misfit, misfits_of

AnyConfig = TypeVar("AnyConfig", bound=Settings)


def load(file: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Config from a YAML file (or the defaults) and dotted overrides such as {"update.epochs": 4}."""
    return load_kind(Config, misfits_of, file, overrides)


def load_kind(
    kind: type[AnyConfig],
    misfits: Callable[[AnyConfig], Iterator[Misfit]],
    file: str | Path | None,
    overrides: dict[str, Any] | None,
) -> AnyConfig:
    """The configuration of some command from a YAML file (or its defaults) and dotted overrides.

    Raises UserError with every problem at once: unknown keys with the nearest known name, types, ranges, and what does
    not fit together.
    """
    values, where = {}, "overrides" if overrides else "defaults"
    if file is not None:
        values, where = read_yaml(Path(file)), f"{file}{' and overrides' if overrides else ''}"
    override(values, overrides or {})
    return parse_kind(kind, misfits, values, where=where)


def override(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Put the values of dotted keys into nested dictionaries."""
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        if not key:
            values[section] = value
        elif isinstance(values.setdefault(section, {}), dict):  # else the file's section is reported as it is
            values[section][key] = value


def parse(values: dict[str, Any], *, where: str) -> Config:
    """Validated config of nested dictionaries; `where` is named in the error."""
    return parse_kind(Config, misfits_of, values, where=where)


def parse_kind(
    kind: type[AnyConfig], misfits: Callable[[AnyConfig], Iterator[Misfit]], values: dict[str, Any], *, where: str
) -> AnyConfig:
    """The same of the configuration of some command; `misfits` says what does not fit together."""
    problems, bad_keys = [], set()
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        for entry in error.errors():
            location = tuple(str(part) for part in entry["loc"][:2])
            bad_keys.add(".".join(location))
            problems.append(_describe(dict(entry), kind))
        config = kind.model_validate(_without(values, bad_keys))
    problems += [
        text
        for keys, text in misfits(config)
        if not bad_keys.intersection(keys) and not bad_keys.intersection(key.partition(".")[0] for key in keys)
    ]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} in the configuration [{where}]:\n" + "\n".join(f"  {text}" for text in problems))
    return config


class StrictLoader(yaml.SafeLoader):
    """SafeLoader, but a key given twice is an error, where YAML loaders silently keep the last, and so is a merge (<<),
    of which a few lines make 10⁹ keys."""

    def flatten_mapping(self, node):
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read", key.start_mark)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"--config: {file} (resolved: {file.absolute()}) is not a file")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise UserError(f"--config: {file} (resolved: {file.absolute()}) cannot be read: {error.strerror}") from error
    except Exception as error:  # PyYAML lets through whatever its constructors of numbers and dates stumble on
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split()):.500}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold sections of keys, got {type(values).__name__}")
    # An empty section ("update:" with nothing under it) is the defaults.
    return {str(section): {} if content is None else content for section, content in values.items()}


def _without(values: dict[str, Any], bad_keys: set[str]) -> dict[str, Any]:
    return {
        section: {key: value for key, value in content.items() if f"{section}.{key}" not in bad_keys}
        for section, content in values.items()
        if section not in bad_keys and isinstance(content, dict)
    }


class _Short(reprlib.Repr):
    """Of a value only as much as a message needs: aliases make a few lines of YAML a list of 10⁹ entries."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200


def _describe(entry: dict[str, Any], kind: type[Settings]) -> str:
    dotted = ".".join(str(part) for part in entry["loc"][:2])
    if entry["type"] == "extra_forbidden":
        # By the last part alone: the name of its section would make every key in it look near.
        section, _, name = dotted.rpartition(".")
        known = {key.rpartition(".")[2]: key for key, _ in known_keys(kind)}
        own = {key.rpartition(".")[2]: key for key, _ in known_keys(kind) if key.startswith(f"{section}.")}
        if not section:
            known |= {name: name for name in kind.model_fields}
        near = [
            candidates[match]
            for candidates in (own, known)
            for match in difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
        ]
        return f"{dotted}: unknown key" + (f"; did you mean {near[0]}?" if near else "; --help lists the known ones")
    return f"{dotted}: {entry['msg'][0].lower()}{entry['msg'][1:]}, got {_SHORT.repr(entry['input'])}"


# What may differ between a run and its continuation without changing what was computed so far.
RESUMABLE = (
    "run.iterations",
    "run.max_wall_clock_s",
    "run.max_seq_kl_nats",
    "monitor.sample_every",
    "monitor.live",
    "monitor.tensorboard",
    "monitor.wandb_project",
    "alarms.stop",
    "checkpoint.",
    "mesh.",
    "update.micro_batch_size",
)
