"""The configuration of a run: frozen pydantic models with the meaning and the default of every field.

`Config` is the whole truth about a run: its resolved form is written to the run directory as `config.yaml`, and
`ppo_torch_ref` reads the same file. A field that nothing reads is a bug. `config_file` makes one from YAML.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

EMBEDDED = "embedded"


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):  # which Python, and so pydantic, counts among the integers
        raise PydanticCustomError("number_type", "Input should be a number, not a boolean")
    return value


_Number = BeforeValidator(_no_boolean)
Positive = Annotated[int, Field(ge=1), _Number]
NonNegative = Annotated[int, Field(ge=0), _Number]
Seed = Annotated[int, Field(ge=0, lt=2**32), _Number]  # jax.random keeps 32 bits of a seed
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), _Number]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), _Number]
Probability = Annotated[float, Field(ge=0, le=1), _Number]
Decay = Annotated[float, Field(ge=0, lt=1), _Number]  # at 1 the bias correction of Adam divides by 0
NonEmpty = Annotated[str, Field(min_length=1)]
DType = Literal["float32", "bfloat16"]


class Section(BaseModel, frozen=True):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class RunConfig(Section, frozen=True):
    dir: NonEmpty | None = Field(default=None, description="run directory; by default runs/ and the time of the start")
    seed: Seed = Field(default=0, description="every random draw is a function of this and the iteration")
    iterations: Positive = Field(default=30, description="PPO iterations: answer, score, update")
    max_wall_clock_s: PositiveFloat | None = Field(
        default=None, description="end cleanly after the first iteration that passes this many seconds of training"
    )
    max_seq_kl_nats: PositiveFloat | None = Field(
        default=None,
        description="KL budget: end cleanly after the first iteration whose answers have kl/seq_nats above this",
    )


class ModelConfig(Section, frozen=True):
    path: NonEmpty = Field(
        default=EMBEDDED, description="SFT model to start from: a Hugging Face directory or hub id, or 'embedded'"
    )
    compute_dtype: DType = Field(
        default="float32",
        description="dtype of forward and backward passes; master weights and log-probs stay float32",
    )
    export_dtype: DType = Field(default="float32", description="dtype of the weights written to policy/")
    ignored_config_fields: tuple[str, ...] = Field(
        default=(), description="fields of config.json, unknown to the decoder, that you know to change no logit"
    )


class PromptsConfig(Section, frozen=True):
    path: NonEmpty = Field(
        default=EMBEDDED, description="JSONL, CSV, parquet or text file, a datasets hub id, or 'embedded'"
    )
    field: NonEmpty = Field(default="prompt", description="column that holds the prompt")
    split: NonEmpty = Field(default="train", description="split of a hub data set")
    chat_template: bool = Field(
        default=False, description="wrap each prompt as a user's message in the tokenizer's chat template"
    )
    max_tokens: Positive = Field(default=256, description="longest prompt, in tokens")
    too_long: Literal["error", "skip", "truncate"] = Field(
        default="error", description="what to do with longer prompts; truncate keeps the end"
    )


class RewardConfig(Section, frozen=True):
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] = Field(
        default="ppo_jax.rewards.sentiment:vader_compound",
        description="module:function of (prompts, answers), two lists of texts, that returns one float per answer",
    )


class RolloutConfig(Section, frozen=True):
    batch_size: Positive = Field(default=64, description="answers per iteration")
    answers_per_prompt: Positive = Field(default=1, description="answers to each prompt; they share one prefill")
    max_new_tokens: Positive = Field(default=48, description="longest answer, in tokens, EOS included")
    min_new_tokens: NonNegative = Field(default=0, description="EOS is banned from sampling before this many tokens")
    temperature: PositiveFloat = Field(
        default=1.0, description="sampling temperature; log-probs and KL are those at it"
    )
    top_p: Probability = Field(default=1.0, description="nucleus sampling; 1.0 is off and the only unbiased setting")
    top_k: NonNegative = Field(default=0, description="sample among the k likeliest tokens; 0 is off")
    eos_tokens: Annotated[tuple[NonEmpty, ...], Field(min_length=1)] | None = Field(
        default=None, description="tokens that end an answer; by default those of the generation config and tokenizer"
    )
    stop_strings: tuple[NonEmpty, ...] = Field(default=(), description="texts that end an answer; they remain in it")


class KlConfig(Section, frozen=True):
    coef: NonNegativeFloat = Field(default=0.05, description="β, score units per nat of KL to the reference")
    form: Literal["k1", "exact"] = Field(
        default="k1",
        description="k1: the sampled log-ratio in the reward; exact: the exact KL of the coming tokens in the reward "
        "and that of the current one in the loss, for advantage.estimator leave_one_out_to_go",
    )


class AdvantageConfig(Section, frozen=True):
    estimator: Literal["batch_mean", "whitened_batch_mean", "leave_one_out_to_go"] = Field(
        default="batch_mean",
        description="reward minus the batch mean; whitened: divided by the standard deviation too; "
        "leave_one_out_to_go: reward still to come minus its mean over the other answers",
    )


class UpdateConfig(Section, frozen=True):
    epochs: Positive = Field(default=2, description="passes over the batch; more than 4 is warned of")
    minibatch_size: Positive = Field(default=32, description="answers per optimizer step")
    micro_batch_size: Positive | None = Field(
        default=None, description="answers per forward pass, in scoring too; by default the minibatch"
    )
    learning_rate: PositiveFloat = Field(default=2e-4, description="peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="after the warm-up: constant, or a decay that reaches 0 when the run ends"
    )
    warmup_steps: NonNegative = Field(default=0, description="optimizer steps of linear warm-up, from above 0")
    clip_eps: PositiveFloat = Field(default=0.2, description="ε: the ratio is clipped to [1 − ε, 1 + ε]")
    max_grad_norm: PositiveFloat | None = Field(
        default=1.0, description="global norm the gradient is clipped to; null is off"
    )
    adam_b1: Decay = Field(default=0.9, description="decay of AdamW's first moment")
    adam_b2: Decay = Field(default=0.95, description="decay of AdamW's second moment")
    adam_eps: PositiveFloat = Field(default=1e-8, description="AdamW's ε, outside the square root")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="decoupled weight decay, on matrices only")
    normaliser: Literal["constant", "token_mean", "sequence_mean"] = Field(
        default="constant",
        description="what divides the summed loss: answers x max_new_tokens (unbiased), or the tokens or the answers "
        "of the minibatch (weighted by length)",
    )
    remat: bool = Field(default=False, description="recompute each layer in the backward pass: less memory, more time")


class MonitorConfig(Section, frozen=True):
    fixed_prompts: Annotated[tuple[NonEmpty, ...], Field(min_length=1)] | None = Field(
        default=None, description="prompts answered with fixed noise over time; by default the first 4 of the prompts"
    )
    sample_every: NonNegative = Field(
        default=10, description="iterations between answers to the fixed prompts; 0 is off"
    )
    tensorboard: bool = Field(default=True, description="write TensorBoard event files")
    wandb_project: NonEmpty | None = Field(
        default=None, description="also log to this Weights & Biases project (extra: wandb)"
    )


class CheckpointConfig(Section, frozen=True):
    save_every: NonNegative = Field(default=0, description="iterations between checkpoints; 0 saves none")
    keep: Positive = Field(default=2, description="how many of the newest checkpoints stay")


class MeshConfig(Section, frozen=True):
    data: Positive | None = Field(
        default=None, description="devices along data: answers are split, weights repeated; by default all left over"
    )
    fsdp: Positive = Field(default=1, description="devices along fsdp: answers and weights are split")
    tensor: Positive = Field(default=1, description="devices along tensor: every layer is split; within one process")


class Config(Section, frozen=True):
    """All sections. `config_file.load` reads one from YAML and overrides."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    kl: KlConfig = KlConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    update: UpdateConfig = UpdateConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def micro_batch_size(self) -> int:
        size = self.update.micro_batch_size
        return self.update.minibatch_size if size is None else size

    @property
    def optimizer_steps_per_iteration(self) -> int:
        return self.update.epochs * (self.rollout.batch_size // self.update.minibatch_size)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Name and type of every section."""
    for name in Config.model_fields:
        yield name, type(getattr(Config(), name))


def known_keys() -> Iterator[tuple[str, Any]]:
    """Every dotted key and its pydantic field."""
    for name, section in sections():
        for key, field in section.model_fields.items():
            yield f"{name}.{key}", field
