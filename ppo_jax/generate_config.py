"""The configuration of `python -m ppo_jax.generate`: those keys of a run's that answers depend on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from ppo_jax import config_file, misfits
from ppo_jax.config import Config, NonNegativeFloat, RolloutConfig, known_keys
from ppo_jax.errors import UserError

# Keys and beginnings of keys.
READ = (
    *("run.seed", "model.path", "model.compute_dtype", "model.ignored_config_fields", "mesh."),
    *(f"prompts.{key}" for key in ("path", "form", "field", "split", "chat_template", "max_tokens", "too_long")),
    "rollout.",
    *(f"reward.{key}" for key in ("model", "function", "weights", "time_limit_s", "url", "http_", "timeout_", "retr")),
)
# Those that a continued file may change: they say how the answers are computed, not which they are.
NOT_RECORDED = (
    *("model.path", "model.ignored_config_fields", "mesh.", "prompts."),
    *("rollout.batch_size", "rollout.halvings", "rollout.reuse_states"),
    *("reward.model_batch_size", "reward.time_limit_s", "reward.http_", "reward.timeout_", "reward.retr"),
)


class GenerateRollout(RolloutConfig, frozen=True):
    temperature: NonNegativeFloat = Field(
        default=1.0,
        description="sampling temperature, of the log-probs too; 0 takes the likeliest token, with its log-prob at 1",
    )


class GenerateConfig(Config, frozen=True):
    """A run's configuration, of which only `READ` has a meaning; temperature 0 is allowed."""

    rollout: GenerateRollout = GenerateRollout()


def load(file: str | Path | None, overrides: dict[str, Any], *, scored: bool) -> GenerateConfig:
    """From a YAML file, a run's `config.yaml` for instance, and dotted overrides; UserError as of `config_file.load`.

    Sections that only training reads are passed over in the file, and refused among the overrides.
    """
    if unread := [key for key in overrides if key.partition(".")[2] and is_known(key) and not key.startswith(READ)]:
        raise UserError(f"{', '.join(unread)}: only training reads this")
    if not scored and (unread := [key for key in overrides if key.startswith("reward.")]):
        raise UserError(f"{', '.join(unread)}: has no use without --reward")
    values = {} if file is None else config_file.read_yaml(Path(file))
    of_training = set(Config.model_fields) - {key.partition(".")[0] for key in READ}
    values = {section: content for section, content in values.items() if section not in of_training}
    where = f"{file} and overrides" if file is not None else "overrides"
    config_file.override(values, overrides)
    config = config_file.parse_kind(GenerateConfig, _misfits, values, where=where)
    rollout = config.rollout
    if rollout.temperature == 0 and rollout.answers_per_prompt > 1:
        raise UserError(
            f"rollout.answers_per_prompt ({rollout.answers_per_prompt}) at rollout.temperature 0 would be as many "
            f"times the same answer"
        )
    return config


def _misfits(config: GenerateConfig) -> Iterator[misfits.Misfit]:
    return (misfit for misfit in misfits.misfits_of(config) if all(key.startswith(READ) for key in misfit[0]))


def is_known(key: str) -> bool:
    return key in dict(known_keys())


def recorded(config: GenerateConfig, *, scored: bool) -> dict[str, Any]:
    """The settings that decide which answers (and, where `scored`, scores) are written, by dotted key."""
    values = config.model_dump(mode="json")
    keys = (key for key, _ in known_keys() if key.startswith(READ) and not key.startswith(NOT_RECORDED))
    found = {key: values[key.partition(".")[0]][key.partition(".")[2]] for key in keys}
    return {key: value for key, value in found.items() if scored or not key.startswith("reward.")}
