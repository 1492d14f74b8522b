"""PPO fine-tuning of language models that can be checked.

`fine_tune` does from Python what `python -m ppo_jax.train` does from the command line; `ppo_jax.ops` holds the pure
functions for loops of your own.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_jax.config import Config
    from ppo_jax.train import RunResult

# Without torch transformers prints that models will not be available; the one here needs none of them.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = ["fine_tune"]


def fine_tune(
    config: "Config | str | Path | dict[str, Any] | None" = None,
    *,
    reward: Callable[[list[str], list[str]], Sequence[float]] | None = None,
    prompts: Sequence[str] | None = None,
    resume: str | Path | None = None,
    allow_change: Sequence[str] = (),
) -> "RunResult":
    """Run PPO and return the run: its directory, metrics, final state and why it stopped.

    `config` is a Config, a YAML file, or a dictionary of dotted keys ({"run.iterations": 10}); by default the embedded
    model. `reward` and `prompts`, where given, replace the configured ones: a function of (prompts, answers) that
    returns one float per answer, and a list of texts. `resume` continues a run directory from its newest checkpoint;
    `config` may then only hold a dictionary, and `allow_change` names what may differ from its last start: keys, or
    "reference", "tokenizer", "prompts". Raises `ppo_jax.errors.UserError` for anything a user can mend.
    """
    # Imported here so that `import ppo_jax.ops` needs nothing but JAX.
    from ppo_jax.build import build
    from ppo_jax.config import Config
    from ppo_jax.config_file import load, parse
    from ppo_jax.errors import UserError
    from ppo_jax.processes import check_platform
    from ppo_jax.resumed import load_resumed
    from ppo_jax.train import train

    if isinstance(prompts, str):
        raise UserError("prompts: got one text, expected a list of texts")
    if resume is not None:
        if config is not None and not isinstance(config, dict):
            raise UserError("resume takes the configuration of the run; config may only be a dictionary of overrides")
        config = load_resumed(Path(resume), config or {}, allowed=allow_change)
    elif isinstance(config, Config):
        config = parse(config.model_dump(), where="Config")  # what a constructor cannot check: how fields fit together
    else:
        config = load(overrides=config) if isinstance(config, dict) else load(config)
    check_platform(config.mesh.platform)
    start = build(config, reward=reward, prompts=prompts, resume=resume is not None, allowed_changes=allow_change)
    return train(*start)
