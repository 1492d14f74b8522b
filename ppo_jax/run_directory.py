"""The directory of a run: which one it is, what describes the run in it, and whether it may be continued."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

import ppo_jax
from ppo_jax import checkpoint, durable
from ppo_jax.config import Config, Settings
from ppo_jax.errors import UserError
from ppo_jax.prompts import Prompts
from ppo_jax.resumed import DESCRIPTION, last_config
from ppo_jax.reward_model_config import RewardModelConfig
from ppo_jax.run_lock import FILE as LOCK_FILE

WATCHED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers", "orbax-checkpoint")


def run_directory(config: Config | RewardModelConfig, *, resume: bool) -> Path:
    """Where the run lives; one that holds another run is refused unless that run is resumed."""
    name = config.run.dir or f"runs/{datetime.now():%Y%m%d-%H%M%S}"
    directory = Path(name).expanduser().absolute()
    if not resume:
        check_unused(directory)
    # Before anything is loaded; that it can be written for certain is known when it is locked.
    home = next(path for path in (directory, *directory.parents) if path.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise UserError(
            f"run.dir: {name} (resolved: {directory}) cannot be written: {home} is no directory to write to"
        )
    return directory


def check_unused(directory: Path) -> None:
    """Refuse to write over what is there; a lock is all that a run that failed at its start leaves."""
    if directory.exists() and (not directory.is_dir() or any(path.name != LOCK_FILE for path in directory.iterdir())):
        raise UserError(
            f"run.dir: {directory} is there already and not empty; choose another"
            + (f", or continue it with --resume {directory}" if (directory / "checkpoints").exists() else "")
        )


def kl_coef_since(directory: Path, config: Config, step: int) -> int:
    """The iteration from which on a resumed run has the β of its configuration: `step`, where it is resumed, when that
    is another one than at its last start. Checkpoints up to there hold an older β."""
    if last_config(directory)["kl.coef"] != config.kl.coef:
        return step
    return _description(directory).get("kl_coef_since", 0)


def check_resumable(directory: Path, from_python: list[str], allowed: Collection[str]) -> None:
    """What can be refused before the model loads: no checkpoint; a reward or prompts that only Python can give, or that
    it gives in place of the configured ones."""
    checkpoint.check_saved(directory / "checkpoints")
    before = set(_description(directory).get("from_python", []))
    missing, new = sorted(before - set(from_python)), sorted(set(from_python) - before - set(allowed))
    if new:
        raise UserError(
            f"--resume: {' and '.join(new)} of {directory} came from its configuration, not from Python; "
            f"allow_change={new} replaces what it began with"
        )
    if missing:
        raise UserError(
            f"--resume: {' and '.join(missing)} of {directory} came from Python; continue it with "
            f"ppo_jax.fine_tune(resume=..., {', '.join(f'{name}=...' for name in missing)})"
        )


# What a continued run must find as it was, whatever its configuration says, and what another one would do.
CONSEQUENCES = {
    "reference": "the model at model.path is not the one it began with: the reference would change",
    "model": "its configuration is read differently: the same weights would compute something else, or end elsewhere",
    "tokenizer": "the tokenizer is not the one it began with: tokens would mean something else",
    "prompts": "the prompts are not those it began with: the coming iterations would be others",
    "held_out": "the held-out prompts are not those it began with: evaluations could not be compared",
}


def check_unchanged(directory: Path, digests: dict[str, str], allowed: Collection[str]) -> None:
    """Refuse another model, tokenizer or prompts than those of the last start, unless they are among the `allowed`."""
    described = _description(directory)
    changed = [
        f"  {name}: {CONSEQUENCES[name]} (digest {digest}, expected {described[f'{name}_digest']})\n"
        for name, digest in digests.items()
        if described.get(f"{name}_digest", digest) != digest and name not in allowed
    ]
    if changed:
        raise UserError(
            f"--resume: {directory} does not find what it needs:\n{''.join(changed)}Bring it back, or allow each by "
            f"its name (--allow_change {changed[0].split(':')[0].strip()})"
        )


def model_digest(*read: Any) -> str:
    """Of what was read of the configuration of a model: its spec, and which tokens end an answer.

    Numbers count to six digits: the last bits of a power, of which rope has many, depend on the machine.
    """
    return _digest(re.sub(r"\d+\.\d+(e-?\d+)?", lambda number: f"{float(number[0]):.6g}", repr(x)) for x in read)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that makes tokens of texts and texts of tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return _digest([rules, repr(tokenizer.chat_template), repr(tokenizer.all_special_tokens)])


def prompts_digest(prompts: Prompts) -> str:
    """Of the prompts in their order, as texts, as tokens, and with their columns."""
    columns = [f"{name} {values!r}" for name, values in sorted(prompts.columns.items())]
    return _digest([*prompts.texts, *map(str, prompts.encoded), *columns])


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


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
