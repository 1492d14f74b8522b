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
Positive = Annotated[int, Field(ge=1, lt=2**31), _Number]  # JAX counts in 32 bits
NonNegative = Annotated[int, Field(ge=0, lt=2**31), _Number]
Seed = Annotated[int, Field(ge=0, lt=2**32), _Number]  # jax.random keeps 32 bits of a seed
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), _Number]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), _Number]
Probability = Annotated[float, Field(ge=0, le=1), _Number]
Decay = Annotated[float, Field(ge=0, lt=1), _Number]  # at 1 the bias correction of Adam divides by 0
FiniteFloat = Annotated[float, Field(allow_inf_nan=False), _Number]
NonEmpty = Annotated[str, Field(min_length=1)]
FunctionName = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
ScoreName = Annotated[str, Field(pattern=r"^\w+$")]
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
    export_dtype: DType = Field(default="float32", description="dtype of the weights that the run leaves behind")
    ignored_config_fields: tuple[str, ...] = Field(
        default=(), description="fields of config.json, unknown to the decoder, that you know to change no logit"
    )


class LoraConfig(Section, frozen=True):
    rank: NonNegative = Field(
        default=0, description="rank of an adapter that is trained in place of the model; 0 trains the whole model"
    )
    alpha: PositiveFloat | None = Field(
        default=None, description="α: what the adapter adds is scaled by α / rank; null is the rank"
    )
    targets: Annotated[tuple[NonEmpty, ...], Field(min_length=1)] = Field(
        default=("all-linear",),
        description="modules of the Hugging Face model that the adapter is on, by the ends of their names (q_proj, "
        "lm_head); all-linear is all but the head",
    )
    path: NonEmpty | None = Field(
        default=None,
        description="PEFT adapter to start from, a directory or hub id, which has its own rank, α and targets; the "
        "reference is the model with it as it is",
    )


class PromptsConfig(Section, frozen=True):
    path: NonEmpty = Field(
        default=EMBEDDED, description="JSONL, JSON, CSV, parquet or text file, a datasets hub id, or 'embedded'"
    )
    form: Literal["text", "alpaca", "messages"] = Field(
        default="text",
        description="text: a column is the prompt; alpaca: instruction and input; messages: a conversation (also "
        "sharegpt's), whose last answer becomes the column reference",
    )
    field: NonEmpty = Field(
        default="prompt", description="column that holds the prompt; of messages also found as messages, conversations"
    )
    split: NonEmpty = Field(default="train", description="split of a hub data set")
    evaluation_path: NonEmpty | None = Field(
        default=None, description="held-out prompts for monitor.evaluate_every, in the same form; null is none"
    )
    evaluation_split: NonEmpty = Field(default="test", description="split of evaluation_path where that is a hub id")
    evaluation_fraction: Annotated[float, Field(ge=0, lt=1), _Number] = Field(
        default=0.0, description="share of the different prompts of prompts.path that is held out instead"
    )
    chat_template: bool = Field(
        default=False, description="wrap each prompt as a user's message in the tokenizer's chat template"
    )
    max_tokens: Positive = Field(default=256, description="longest prompt, in tokens")
    too_long: Literal["error", "skip", "truncate"] = Field(
        default="error", description="what to do with longer prompts; truncate keeps the end"
    )


class RewardConfig(Section, frozen=True):
    model: NonEmpty | None = Field(
        default=None,
        description="sequence-classification model that gives the scores instead of the function: a Hugging Face "
        "directory or hub id",
    )
    model_label: NonNegative | NonEmpty | None = Field(
        default=None, description="index or name of the label whose logit is the score; null where it has one label"
    )
    model_batch_size: Positive = Field(default=16, description="texts that the reward model reads at a time")
    model_chat_template: bool = Field(
        default=False,
        description="prompt and answer are messages of user and assistant in the reward model's chat template, not one "
        "text after the other",
    )
    model_max_tokens: Positive | None = Field(
        default=None,
        description="longest text in the reward model's tokens, of longer ones the beginning is lost; null refuses "
        "texts longer than its positions",
    )
    function: FunctionName = Field(
        default="ppo_jax.rewards.sentiment:vader_compound",
        description="module:function of (prompts, answers), two lists of texts, or (prompts, answers, columns), that "
        "returns one float per answer; not used where another source of scores is set",
    )
    functions: dict[ScoreName, FunctionName] = Field(
        default={}, description="several such functions by name, whose scores are summed"
    )
    weights: dict[ScoreName, FiniteFloat] = Field(
        default={}, description="weight of each score by name in their sum; 1 where none is given"
    )
    time_limit_s: PositiveFloat | None = Field(
        default=None, description="seconds after which scoring a batch has failed, whatever scores it; null is never"
    )
    function_retries: NonNegative = Field(
        default=0, description="how often a function that raises is called again with the same answers"
    )
    max_dropped_frac: Annotated[float, Field(ge=0, lt=1), _Number] = Field(
        default=0.0,
        description="largest share of a batch that is left out of the iteration because a source has no finite number "
        "for it; more, with 0 any, end the run",
    )
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = Field(
        default=None, description="HTTP service that scores, JSON by POST; docs/reward_functions.md has the protocol"
    )
    http_batch_size: Positive = Field(default=64, description="answers in one request to reward.url")
    timeout_s: PositiveFloat = Field(default=60.0, description="seconds for one request to reward.url")
    retries: NonNegative = Field(default=3, description="how often a failed request to reward.url is sent again")
    normalise: Literal["none", "running", "batch"] = Field(
        default="none",
        description="scores minus their mean over their standard deviation: of the run so far, or of the batch",
    )
    clip: PositiveFloat | None = Field(default=None, description="largest |score| after normalisation; null is off")
    missing_eos_penalty: NonNegativeFloat = Field(
        default=0.0, description="taken from the score of an answer that was cut off, as are the next two"
    )
    min_tokens: NonNegative = Field(default=0, description="answers below this many tokens are too short")
    too_short_penalty: NonNegativeFloat = Field(
        default=0.0, description="penalty of an empty answer; falls linearly to 0 at reward.min_tokens"
    )
    soft_max_tokens: Positive | None = Field(default=None, description="answers beyond this many tokens are too long")
    too_long_penalty: NonNegativeFloat = Field(
        default=0.0, description="penalty at rollout.max_new_tokens; rises linearly from reward.soft_max_tokens"
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
    halvings: NonNegative = Field(
        default=0,
        description="how often, when half of the answers have ended, the other half is decoded on alone: for answers "
        "of very different length; each takes a compilation of the decode",
    )
    reuse_states: bool = Field(
        default=False,
        description="scoring reads the policy from the states that the answers were drawn from: one forward less, and "
        "the first ratios are 1 but for the rounding between decode and update (rollout/logprob_gap_max)",
    )


class KlConfig(Section, frozen=True):
    coef: NonNegativeFloat = Field(default=0.05, description="β, score units per nat of KL to the reference")
    form: Literal["k1", "exact", "biased_k3_in_loss"] = Field(
        default="k1",
        description="k1: the sampled log-ratio in the reward; exact: the exact KL of the coming tokens in the reward "
        "and that of the current one in the loss; biased_k3_in_loss: GRPO's term, whose gradient is not that of a KL",
    )
    per: Literal["answer", "token"] = Field(
        default="answer", description="token: the k1 penalty is divided by the length of its answer, which biases it"
    )
    target_nats: PositiveFloat | None = Field(
        default=None,
        description="KL per sequence that a proportional controller steers to by changing β; null keeps kl.coef",
    )
    horizon: Annotated[float, Field(ge=1, allow_inf_nan=False), _Number] = Field(
        default=10.0, description="iterations in which the controller changes β by at most 20%"
    )


Estimator = Literal[
    "batch_mean",
    "whitened_batch_mean",
    "leave_one_out",
    "leave_one_out_to_go",
    "group_mean",
    "group_normalised",
    "group_leave_one_out",
    "group_leave_one_out_to_go",
    "gae",
    "whitened_gae",
]


class AdvantageConfig(Section, frozen=True):
    estimator: Estimator = Field(
        default="batch_mean",
        description="what an answer's reward is compared with: the batch, the others of the batch (leave_one_out), the "
        "answers to the same prompt (group_), or a critic's values (gae); docs/choices.md has the table",
    )
    discount: Annotated[float, Field(gt=0, le=1), _Number] = Field(
        default=1.0, description="γ of gae; below 1 later rewards count less"
    )
    gae_lambda: Probability = Field(
        default=1.0, description="λ of gae: 1 trusts the rewards alone, 0 the critic's next value"
    )


class CriticConfig(Section, frozen=True):
    kind: Literal["none", "value_head", "model"] = Field(
        default="none", description="value_head: on the policy's own trunk; model: a second one, trained on its own"
    )
    path: NonEmpty | None = Field(
        default=None,
        description="where a critic model starts from: a language model or a reward model; null is model.path",
    )
    learning_rate: PositiveFloat | None = Field(
        default=None, description="peak learning rate of the critic; null is update.learning_rate"
    )
    coef: PositiveFloat = Field(default=0.5, description="weight of the value loss")
    clip_eps: PositiveFloat | None = Field(
        default=None, description="values move at most this far from those at rollout; null is off"
    )
    warmup_iterations: NonNegative = Field(
        default=0, description="iterations at the start in which only the critic learns"
    )
    bootstrap_truncated: bool = Field(
        default=False,
        description="a truncated answer goes on to earn the critic's value of its last state, as if it had been scored "
        "before its end",
    )


class OptimizerConfig(Section, frozen=True):
    """AdamW and its schedule, of every command that trains."""

    learning_rate: PositiveFloat = Field(default=2e-4, description="peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="after the warm-up: constant, or a decay that reaches 0 when the run ends"
    )
    warmup_steps: NonNegative = Field(default=0, description="optimizer steps of linear warm-up, from above 0")
    max_grad_norm: PositiveFloat | None = Field(
        default=1.0, description="global norm the gradient is clipped to; null is off"
    )
    adam_b1: Decay = Field(default=0.9, description="decay of AdamW's first moment")
    adam_b2: Decay = Field(default=0.95, description="decay of AdamW's second moment")
    adam_eps: PositiveFloat = Field(default=1e-8, description="AdamW's ε, outside the square root")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="decoupled weight decay, on matrices only")


class UpdateConfig(OptimizerConfig, frozen=True):
    epochs: Positive = Field(default=2, description="passes over the batch; more than 4 is warned of")
    minibatch_size: Positive = Field(default=32, description="answers per optimizer step")
    micro_batch_size: Positive | None = Field(
        default=None, description="answers per forward pass, in scoring too; by default the minibatch"
    )
    clip_eps: PositiveFloat = Field(default=0.2, description="ε: the ratio is clipped to [1 − ε, 1 + ε]")
    clip_eps_high: PositiveFloat | None = Field(default=None, description="ε of the upper bound; null is clip_eps")
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False), _Number] | None = Field(
        default=None, description="bounds the loss of a negative advantage by this multiple of it; null is off"
    )
    entropy_coef: NonNegativeFloat = Field(default=0.0, description="weight of the entropy bonus in the loss")
    max_approx_kl_nats: PositiveFloat | None = Field(
        default=None,
        description="no further optimizer step in this iteration after one whose policy/approx_kl_nats is above this",
    )
    importance_cap: Annotated[float, Field(ge=1, allow_inf_nan=False), _Number] | None = Field(
        default=None,
        description="advantages are weighted by min(π_training / π_rollout, this) per token; null is off",
    )
    normaliser: Literal["constant", "token_mean", "sequence_mean"] = Field(
        default="constant",
        description="what divides the summed loss: answers x max_new_tokens (unbiased), or the tokens or the answers "
        "of the minibatch (weighted by length)",
    )
    remat: bool = Field(default=False, description="recompute each layer in the backward pass: less memory, more time")


class SinksConfig(Section, frozen=True):
    """Where metrics go beside `metrics.jsonl`."""

    tensorboard: bool = Field(default=True, description="write TensorBoard event files")
    wandb_project: NonEmpty | None = Field(
        default=None, description="also log to this Weights & Biases project (extra: wandb)"
    )


class MonitorConfig(SinksConfig, frozen=True):
    fixed_prompts: Annotated[tuple[NonEmpty, ...], Field(min_length=1)] | None = Field(
        default=None, description="prompts answered with fixed noise over time; by default the first 4 of the prompts"
    )
    sample_every: NonNegative = Field(
        default=10, description="iterations between answers to the fixed prompts; 0 is off"
    )
    evaluate_every: NonNegative = Field(
        default=0, description="iterations between answers to the held-out prompts of the prompts section; 0 is off"
    )
    live: bool = Field(default=True, description="the live view, where there is a terminal; else one line an iteration")


# Scenes that a tighter hold on the policy can mend: only of these can an alarm act.
LooseScene = Literal[
    "score_up_text_decays", "answers_shrink", "answers_at_limit", "template_sentences", "kl_runaway", "entropy_collapse"
]
AlarmScene = Literal[LooseScene, "not_moving", "degenerate_rewards", "rollout_mismatch"]


class AlarmsConfig(Section, frozen=True):
    patience: Positive = Field(default=3, description="iterations in a row that must look wrong before an alarm")
    act: tuple[LooseScene, ...] = Field(
        default=(), description="scenes whose alarm doubles β, which is at least score/std / 20 afterwards"
    )
    stop: tuple[AlarmScene, ...] = Field(
        default=(), description="scenes whose alarm ends the run; of one that is also in act, only its second alarm"
    )


class CheckpointConfig(Section, frozen=True):
    save_every: NonNegative = Field(default=0, description="iterations between checkpoints; 0 saves none")
    keep: Positive = Field(default=2, description="how many of the newest checkpoints stay")
    keep_best: bool = Field(
        default=False, description="that of the policy whose answers had the highest reward/mean stays too"
    )
    strict: bool = Field(
        default=False, description="a damaged checkpoint stops --resume, which else falls back to the one before it"
    )


class MeshConfig(Section, frozen=True):
    platform: Literal["any", "cpu", "gpu", "tpu"] = Field(
        default="any", description="what the devices must be; any other than what JAX sees is refused"
    )
    data: Positive | None = Field(
        default=None, description="devices along data: answers are split, weights repeated; by default all left over"
    )
    fsdp: Positive = Field(default=1, description="devices along fsdp: answers and weights are split")
    tensor: Positive = Field(default=1, description="devices along tensor: every layer is split; within one process")


class Settings(Section, frozen=True):
    """The sections of one command."""

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class Config(Settings, frozen=True):
    """All sections. `config_file.load` reads one from YAML and overrides."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    prompts: PromptsConfig = PromptsConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    kl: KlConfig = KlConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    critic: CriticConfig = CriticConfig()
    update: UpdateConfig = UpdateConfig()
    monitor: MonitorConfig = MonitorConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def micro_batch_size(self) -> int:
        size = self.update.micro_batch_size
        return self.update.minibatch_size if size is None else size

    @property
    def optimizer_steps_per_iteration(self) -> int:
        return self.update.epochs * (self.rollout.batch_size // self.update.minibatch_size)


def sections(kind: type[Settings] = Config) -> Iterator[tuple[str, type[Section]]]:
    """Name and type of every section."""
    for name in kind.model_fields:
        yield name, type(getattr(kind(), name))


def known_keys(kind: type[Settings] = Config) -> Iterator[tuple[str, Any]]:
    """Every dotted key and its pydantic field."""
    for name, section in sections(kind):
        for key, field in section.model_fields.items():
            yield f"{name}.{key}", field
