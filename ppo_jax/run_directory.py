"""The directory of a run: which one it is, what describes the run in it, and whether it may be continued."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

import ppo_jax
from ppo_jax import checkpoint, durable
from ppo_jax.config import Config, Settings
from ppo_jax.errors import UserError
from ppo_jax.reward_model_config import RewardModelConfig
from ppo_jax.run_lock import FILE as LOCK_FILE

DESCRIPTION = "versions.json"
WATCHED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers", "orbax-checkpoint")


def run_directory(config: Config | RewardModelConfig, *, resume: bool) -> Path:
    """Where the run lives; one that holds another run is refused unless that run is resumed."""
    name = config.run.dir or f"runs/{datetime.now():%Y%m%d-%H%M%S}"
    directory = Path(name).expanduser().absolute()
    if not resume:
        check_unused(directory)
    return directory


def check_unused(directory: Path) -> None:
    """Refuse to write over what is there; a lock is all that a run that failed at its start leaves."""
    if directory.exists() and (not directory.is_dir() or any(path.name != LOCK_FILE for path in directory.iterdir())):
        raise UserError(
            f"run.dir: {directory} is there already and not empty; choose another"
            + (f", or continue it with --resume {directory}" if (directory / "checkpoints").exists() else "")
        )


def check_resumable(directory: Path, from_python: list[str]) -> None:
    """What can be refused before the model loads: no checkpoint, or a reward or prompts that only Python can give."""
    checkpoint.check_saved(directory / "checkpoints")
    missing = sorted(set(_description(directory).get("from_python", [])) - set(from_python))
    if missing:
        raise UserError(
            f"--resume: {' and '.join(missing)} of {directory} came from Python; continue it with "
            f"ppo_jax.fine_tune(resume=..., {', '.join(f'{name}=...' for name in missing)})"
        )


def check_reference(directory: Path, reference_digest: str) -> None:
    """A continued run keeps its reference: another one would be a fresh KL budget."""
    expected = _description(directory).get("reference_digest", reference_digest)
    if expected != reference_digest:
        raise UserError(
            f"--resume: the model at model.path is not the one {directory} began with (digest {reference_digest}, "
            f"expected {expected}); the reference would change"
        )


def _description(directory: Path) -> dict[str, Any]:
    file = directory / DESCRIPTION
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_description(directory: Path, config: Settings, described: Mapping[str, Any]) -> None:
    """`config.yaml` as resolved, what it was run with, and what else describes the run."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        durable.write_text(directory / "config.yaml", config.to_yaml())
        durable.write_text(directory / DESCRIPTION, json.dumps(versions() | dict(described), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"run.dir: {directory} cannot be written: {error.strerror}") from error


def versions() -> dict[str, Any]:
    """Packages, interpreter and devices of this run."""
    return {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
        "ppo_jax": ppo_jax.__version__,
        **{package: importlib.metadata.version(package) for package in WATCHED_PACKAGES},
    }
