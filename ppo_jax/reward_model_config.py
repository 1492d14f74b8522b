"""The configuration of `python -m ppo_jax.reward_model`, made like that of `ppo_jax.train`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ppo_jax.config import (
    ModelConfig,
    NonEmpty,
    NonNegative,
    NonNegativeFloat,
    OptimizerConfig,
    Positive,
    Section,
    Seed,
    Settings,
    SinksConfig,
)
from ppo_jax.config_file import load_kind
from ppo_jax.misfits import Misfit


class RunConfig(Section, frozen=True):
    dir: NonEmpty | None = Field(default=None, description="run directory; by default runs/ and the time of the start")
    seed: Seed = Field(default=0, description="the order of the pairs is a function of this and the step")


class DataConfig(Section, frozen=True):
    path: NonEmpty | None = Field(
        default=None,
        description="preference pairs, which must be given: JSONL, JSON, CSV (each also .gz), parquet or a hub id, "
        "with columns chosen and rejected, and prompt where those two do not hold it themselves",
    )
    split: NonEmpty = Field(default="train", description="split of a hub data set")
    train_pairs: Positive | None = Field(default=None, description="how many pairs to train on; null is all")
    evaluation_path: NonEmpty | None = Field(
        default=None, description="held-out pairs in the same form; null takes them from data.path"
    )
    evaluation_split: NonEmpty = Field(default="test", description="split of evaluation_path where that is a hub id")
    evaluation_pairs: Positive = Field(
        default=500, description="how many pairs are held out of data.path, or read of evaluation_path at most"
    )
    unusable: Literal["error", "skip"] = Field(
        default="error", description="what to do with pairs that teach nothing: an empty side, two sides that are equal"
    )
    max_tokens: Positive = Field(
        default=512, description="longest text, in tokens; of longer ones the beginning is lost, on both sides alike"
    )
    chat_template: bool = Field(
        default=False,
        description="dialogues, or prompt and answer, are messages in the tokenizer's chat template; the run that uses "
        "the model then needs reward.model_chat_template",
    )
    margin_field: NonEmpty | None = Field(
        default=None, description="column with the margin of each pair, how much better chosen was found"
    )


class TrainConfig(OptimizerConfig, frozen=True):
    epochs: Positive = Field(default=2, description="passes over the pairs")
    batch_size: Positive = Field(default=16, description="pairs per optimizer step")
    layers: NonNegative | None = Field(
        default=None, description="how many of the last layers train, beside final norm and head; null is everything"
    )
    cache_states: bool = Field(
        default=False,
        description="keep in memory what the frozen layers make of every text, so that they run once and not once an "
        "epoch: tokens x width numbers",
    )
    margin: NonNegativeFloat = Field(
        default=0.0, description="score by which chosen must be ahead before its pair is at ln 2"
    )
    center_coef: NonNegativeFloat = Field(
        default=0.01, description="weight of the squared sum of a pair's scores, which centres all scores on 0"
    )
    remat: bool = Field(default=False, description="recompute each layer in the backward pass: less memory, more time")


class MonitorConfig(SinksConfig, frozen=True):
    calibration_plot: bool = Field(
        default=False, description="draw calibration.png (extra: demo); its numbers are in evaluation.json anyway"
    )


class RewardModelConfig(Settings, frozen=True):
    """All sections. `load` reads one from YAML and overrides."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    monitor: MonitorConfig = MonitorConfig()


def load(file: str | Path | None = None, overrides: dict[str, Any] | None = None) -> RewardModelConfig:
    """Config from a YAML file (or the defaults) and dotted overrides such as {"train.epochs": 4}."""
    return load_kind(RewardModelConfig, _misfits, file, overrides)


def _misfits(config: RewardModelConfig) -> Iterator[Misfit]:
    data, train = config.data, config.train
    if data.path is None:
        yield ("data.path",), "data.path: a file or data set of preference pairs must be given; docs/reward_models.md"
    if train.cache_states and train.layers is None:
        yield (
            ("train.cache_states", "train.layers"),
            "train.cache_states (True) needs train.layers: where everything trains, nothing stays as it was",
        )
    if data.margin_field is not None and train.margin > 0:
        yield (
            ("data.margin_field", "train.margin"),
            f"data.margin_field ({data.margin_field}) and train.margin ({train.margin:g}) exclude each other: one says "
            f"what the margin is",
        )
