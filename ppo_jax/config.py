"""The configuration of a run: frozen pydantic models, YAML plus dotted overrides, every problem reported at once.

`Config` is the whole truth about a run: its resolved form is written to the run directory as `config.yaml`, and
`ppo_torch_ref` reads the same file. A field that nothing reads is a bug.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from ppo_jax.errors import UserError

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
    """All sections. `load` reads one from YAML and overrides."""

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


def load(file: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Config from a YAML file (or the defaults) and dotted overrides such as {"update.epochs": 4}.

    Raises UserError with every problem at once: unknown keys with the nearest known name, types, ranges, and what does
    not fit together.
    """
    values, where = {}, "overrides" if overrides else "defaults"
    if file is not None:
        values, where = _read_yaml(Path(file)), f"{file}{' and overrides' if overrides else ''}"
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        if not key:
            values[section] = value
        elif isinstance(values.setdefault(section, {}), dict):  # else the file's section is reported as it is
            values[section][key] = value
    return parse(values, where=where)


def parse(values: dict[str, Any], *, where: str) -> Config:
    """Validated config of nested dictionaries; `where` is named in the error."""
    problems, bad_keys = [], set()
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for entry in error.errors():
            location = tuple(str(part) for part in entry["loc"][:2])
            bad_keys.add(".".join(location))
            problems.append(_describe(dict(entry)))
        config = Config.model_validate(_without(values, bad_keys))
    problems += [
        text
        for keys, text in _misfits(config)
        if not bad_keys.intersection(keys) and not bad_keys.intersection(key.partition(".")[0] for key in keys)
    ]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} in the configuration [{where}]:\n" + "\n".join(f"  {text}" for text in problems))
    return config


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader, but a key given twice is an error; YAML loaders silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"--config: {file} (resolved: {file.absolute()}) is not a file")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise UserError(f"--config: {file} (resolved: {file.absolute()}) cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
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


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Name and type of every section."""
    for name in Config.model_fields:
        yield name, type(getattr(Config(), name))


def known_keys() -> Iterator[tuple[str, Any]]:
    """Every dotted key and its pydantic field."""
    for name, section in sections():
        for key, field in section.model_fields.items():
            yield f"{name}.{key}", field


def _describe(entry: dict[str, Any]) -> str:
    dotted = ".".join(str(part) for part in entry["loc"][:2])
    if entry["type"] == "extra_forbidden":
        # By the last part alone: the name of its section would make every key in it look near.
        section, _, name = dotted.rpartition(".")
        known = {key.rpartition(".")[2]: key for key, _ in known_keys()}
        own = {key.rpartition(".")[2]: key for key, _ in known_keys() if key.startswith(f"{section}.")}
        if not section:
            known |= {name: name for name in Config.model_fields}
        near = [
            candidates[match]
            for candidates in (own, known)
            for match in difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
        ]
        return f"{dotted}: unknown key" + (f"; did you mean {near[0]}?" if near else "; --help lists the known ones")
    return f"{dotted}: {entry['msg'][0].lower()}{entry['msg'][1:]}, got {entry['input']!r}"


def _misfits(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong between fields: (the keys involved, the message)."""
    rollout, update = config.rollout, config.update
    for (big_key, big), (small_key, small) in (
        (
            ("rollout.batch_size", rollout.batch_size),
            ("rollout.answers_per_prompt", rollout.answers_per_prompt),
        ),
        (("rollout.batch_size", rollout.batch_size), ("update.minibatch_size", update.minibatch_size)),
        (
            ("update.minibatch_size", update.minibatch_size),
            ("update.micro_batch_size", config.micro_batch_size),
        ),
    ):
        if big % small:
            lower, upper = big // small * small, -(-big // small) * small
            nearest = f"nearest are {lower} and {upper}" if lower else f"the nearest is {upper}"
            yield (
                (big_key, small_key),
                f"{big_key} ({big}) must be divisible by {small_key} ({small}); {nearest}",
            )
    if rollout.min_new_tokens > rollout.max_new_tokens:
        yield (
            ("rollout.min_new_tokens", "rollout.max_new_tokens"),
            f"rollout.min_new_tokens ({rollout.min_new_tokens}) must be at most rollout.max_new_tokens "
            f"({rollout.max_new_tokens})",
        )
    if config.kl.form == "exact" and config.advantage.estimator != "leave_one_out_to_go":
        yield (
            ("kl.form", "advantage.estimator"),
            f"advantage.estimator ({config.advantage.estimator}) must be leave_one_out_to_go with kl.form exact: the "
            f"KL in the loss is neither shrunk by a batch mean nor divided by a standard deviation",
        )
    if rollout.batch_size == 1:
        yield (
            ("rollout.batch_size",),
            "rollout.batch_size (1): the baseline is the mean of the batch, so a single answer has advantage 0",
        )
    steps = config.run.iterations * config.optimizer_steps_per_iteration
    if update.warmup_steps >= steps > 0:
        yield (
            (
                "update.warmup_steps",
                "run.iterations",
                "update.epochs",
                "update.minibatch_size",
                "rollout.batch_size",
            ),
            f"update.warmup_steps ({update.warmup_steps}) must be below the run's {steps} optimizer steps",
        )


def warnings_of(config: Config) -> list[str]:
    """What is allowed and probably not meant."""
    found = []
    if config.update.epochs > 4:
        found.append(f"update.epochs is {config.update.epochs}; more than 4 passes over one batch is aggressive")
    if config.update.max_grad_norm is None:
        found.append("update.max_grad_norm is null: gradients are not clipped")
    if config.update.clip_eps >= 1:
        found.append(f"update.clip_eps is {config.update.clip_eps}: the policy ratio is practically not clipped")
    if not 0.5 <= config.rollout.temperature <= 1.5:
        found.append(
            f"rollout.temperature is {config.rollout.temperature}: low ones stop exploration, high ones raise the "
            f"variance of the reward; 1.0 is the safe start"
        )
    if config.rollout.top_p < 1 or config.rollout.top_k > 0:
        found.append(
            "top-p or top-k sampling is on: log-probs describe the full distribution, so the gradient is slightly "
            "biased; watch rollout/kept_mass"
        )
    if config.kl.coef == 0:
        found.append("kl.coef is 0: nothing holds the policy near the reference; set run.max_seq_kl_nats at least")
    return found


# What may differ between a run and its continuation without changing what was computed so far.
RESUMABLE = (
    "run.iterations",
    "run.max_wall_clock_s",
    "run.max_seq_kl_nats",
    "monitor.sample_every",
    "monitor.tensorboard",
    "monitor.wandb_project",
    "checkpoint.",
    "mesh.",
    "update.micro_batch_size",
)


def load_resumed(directory: Path, overrides: dict[str, Any]) -> Config:
    """The configuration of a run directory, with overrides that do not alter the meaning of what it holds."""
    refused = [key for key in overrides if not key.startswith(RESUMABLE)]
    if refused:
        raise UserError(
            f"--resume: {', '.join(refused)} would change what {directory} computes; only "
            f"{', '.join(key + ('*' if key.endswith('.') else '') for key in RESUMABLE)} may change"
        )
    if not (directory / "config.yaml").is_file():
        raise UserError(f"--resume: {directory} (resolved: {directory.absolute()}) is not a run directory")
    config = load(directory / "config.yaml", {"run.dir": str(directory)} | overrides)
    if config.update.schedule != "constant" and "run.iterations" in overrides:
        raise UserError(
            f"--resume: run.iterations cannot change, the {config.update.schedule} schedule of {directory} ends there"
        )
    return config
