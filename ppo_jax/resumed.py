"""The configuration of a run that goes on: what may differ from its last start, and what may not."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ppo_jax.config import Config
from ppo_jax.config_file import RESUMABLE, load
from ppo_jax.errors import UserError

# In a run directory: what it was last started with.
DESCRIPTION = "versions.json"


def load_resumed(directory: Path, overrides: dict[str, Any], *, allowed: Collection[str] = ()) -> Config:
    """The configuration of a run directory, with overrides that do not alter the meaning of what it holds.

    It is compared with that of the last start, so that an edited `config.yaml` is seen too; a change of any other key
    than those of `RESUMABLE` is refused unless it is among the `allowed` ones.
    """
    if not (directory / "config.yaml").is_file():
        raise UserError(f"--resume: {directory} (resolved: {directory.absolute()}) is not a run directory")
    config = load(directory / "config.yaml", {"run.dir": str(directory)} | overrides)
    before, after = last_config(directory), _dotted(config)
    changed = {key: f"{key}: {old!r} -> {after[key]!r}" for key, old in before.items() if after.get(key, old) != old}
    changed = {key: text for key, text in changed.items() if key != "run.dir" and key not in allowed}
    if refused := [text for key, text in changed.items() if not key.startswith(RESUMABLE)]:
        raise UserError(
            f"--resume: this would change what {directory} computes:\n"
            + "".join(f"  {text}\n" for text in refused)
            + f"Allow each by its name (--allow_change {refused[0].partition(':')[0]}), or begin a new run; freely may "
            f"change {', '.join(key + ('*' if key.endswith('.') else '') for key in RESUMABLE)}"
        )
    if config.update.schedule != "constant" and "run.iterations" in changed:
        raise UserError(
            f"--resume: run.iterations cannot change, the {config.update.schedule} schedule of {directory} ends there; "
            f"--allow_change run.iterations bends it"
        )
    return config


def last_config(directory: Path) -> dict[str, Any]:
    """Every dotted key of the configuration that a run directory was last started with."""
    try:
        described = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))["config"]
        return {f"{section}.{key}": value for section, content in described.items() for key, value in content.items()}
    except (FileNotFoundError, KeyError):  # killed while it began
        return _dotted(load(directory / "config.yaml"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--resume: {directory / DESCRIPTION} is damaged: {error!r}") from error


def _dotted(config: Config) -> dict[str, Any]:
    sections = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section, content in sections.items() for key, value in content.items()}
