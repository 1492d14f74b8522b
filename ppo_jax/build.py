"""The only factory: a config becomes models, prompts, reward, optimizer, and the functions of the six steps.

Every choice of algorithm is a different function picked here, once. Nothing below this file asks which recipe it runs.
"""

import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import PreTrainedTokenizerBase

import ppo_jax
from ppo_jax import checkpoint, sharding
from ppo_jax.config import EMBEDDED, Config
from ppo_jax.errors import UserError
from ppo_jax.models import hf_io
from ppo_jax.models.decoder import Params
from ppo_jax.models.hf_io import ModelDirectory
from ppo_jax.monitor.invariants import digest
from ppo_jax.monitor.sinks import check_sinks
from ppo_jax.ops import advantages, kl, losses, rewards
from ppo_jax.processes import from_lead
from ppo_jax.prompts import Prompts, load_prompts
from ppo_jax.records import Scored, TrainState
from ppo_jax.rewards.source import RewardFunction, load_function
from ppo_jax.rollout import Endings, Sampling
from ppo_jax.stop_strings import stop_table
from ppo_jax.update import Objective, make_optimizer

DESCRIPTION = "versions.json"
WATCHED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers", "orbax-checkpoint")


@dataclass(frozen=True)
class Run:
    """Everything about a run that does not change while it goes on; what changes is in `TrainState`."""

    config: Config
    directory: Path
    mesh: jax.sharding.Mesh
    model: ModelDirectory
    ref_params: Params  # frozen, in the compute dtype
    prompts: Prompts
    fixed_prompts: Prompts
    reward: RewardFunction
    sampling: Sampling
    endings: Endings
    token_rewards: Callable[..., jax.Array]  # step 4: (seq_scores [B], Scored, response_mask, kl_coef=) -> [B, T]
    advantages: Callable[..., jax.Array]  # step 5: (token_rewards, response_mask) -> [B, T]
    objective: Objective  # step 6
    optimizer: optax.GradientTransformation

    @property
    def prompts_per_iteration(self) -> int:
        return self.config.rollout.batch_size // self.config.rollout.answers_per_prompt


def build(
    config: Config,
    *,
    reward: RewardFunction | None = None,
    prompts: Sequence[str] | None = None,
    resume: bool = False,
) -> tuple[Run, TrainState]:
    """Load and check everything, then make the run directory. Nothing is written before all checks have passed."""
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh.shape)
    directory = Path(from_lead(lambda: str(run_directory(config, resume=resume))))
    from_python = [name for name, given in (("reward", reward), ("prompts", prompts)) if given is not None]
    if resume:
        check_resumable(directory, from_python)
    check_sinks(config.monitor)
    reward = load_function(config.reward.function) if reward is None else reward
    model = open_model(config)
    loaded_prompts = load_prompts(config.prompts, model.tokenizer, seed=config.run.seed, texts=prompts)
    fixed_prompts = _fixed_prompts(config, model, loaded_prompts)
    check_tokens(config, model, loaded_prompts, fixed_prompts)
    _float32_means_float32(config)
    with jax.set_mesh(mesh):
        endings = make_endings(config, model)
        initial = hf_io.load_params(model.path, model.config, model.spec, place=partial(sharding.place_param, mesh))
        ref_params = copy_params(initial, config.model.compute_dtype)
        reference_digest = digest(ref_params)
    optimizer = make_optimizer(config.update, config.run.iterations * config.optimizer_steps_per_iteration)
    run = Run(
        config=config,
        directory=directory,
        mesh=mesh,
        model=model,
        ref_params=ref_params,
        prompts=loaded_prompts,
        fixed_prompts=fixed_prompts,
        reward=reward,
        sampling=make_sampling(config),
        endings=endings,
        token_rewards=jax.jit(pick_token_rewards(config)),
        advantages=jax.jit(pick_advantages(config)),
        objective=make_objective(config, model),
        optimizer=optimizer,
    )
    if resume:
        check_reference(directory, reference_digest)
        # In the places of this run's mesh, whichever mesh it was saved on.
        like = sharding.abstract(mesh, jax.eval_shape(partial(first_state, optimizer=optimizer), initial))
        state = checkpoint.restore_newest(directory / "checkpoints", like)
    else:
        with jax.set_mesh(mesh):
            state = first_state(initial, optimizer=optimizer)
    from_lead(partial(_write_description, directory, config, reference_digest, from_python))
    return run, state


@partial(jax.jit, static_argnames="dtype")
def copy_params(params: Params, dtype: str) -> Params:
    """Parameters in a dtype and in memory of their own: the policy's buffers are donated to every update."""
    return sharding.by_rules(jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params))


@partial(jax.jit, static_argnames="optimizer", donate_argnames="params")
def first_state(params: Params, *, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first iteration; the moments lie where their parameters lie."""
    return sharding.by_rules(TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)))


def k1_token_rewards(
    seq_scores: jax.Array, scored: Scored, response_mask: jax.Array, *, kl_coef: float | jax.Array
) -> jax.Array:
    """The `k1` form of the KL: a penalty per token inside the reward."""
    token_k1 = kl.k1(scored.old_logprobs, scored.ref_logprobs)
    return rewards.token_rewards(seq_scores, token_k1, response_mask, kl_coef=kl_coef)


def exact_kl_token_rewards(
    seq_scores: jax.Array, scored: Scored, response_mask: jax.Array, *, kl_coef: float | jax.Array
) -> jax.Array:
    """The `exact` form of the KL, its half in the reward; `Experience.ref_hidden` brings the half in the loss."""
    return rewards.exact_kl_token_rewards(seq_scores, scored.token_kl, response_mask, kl_coef=kl_coef)


def pick_token_rewards(config: Config) -> Callable[..., jax.Array]:
    match config.kl.form:
        case "k1":
            return k1_token_rewards
        case "exact":
            return exact_kl_token_rewards


def pick_advantages(config: Config) -> Callable[..., jax.Array]:
    match config.advantage.estimator:
        case "batch_mean":
            return advantages.batch_mean_advantages
        case "whitened_batch_mean":
            return advantages.whitened_batch_mean_advantages
        case "leave_one_out_to_go":
            return advantages.leave_one_out_to_go_advantages


def pick_loss_weights(config: Config) -> Callable[..., jax.Array]:
    match config.update.normaliser:
        case "constant":
            return _constant_weights(config.rollout.max_new_tokens)
        case "token_mean":
            return losses.token_mean_weights
        case "sequence_mean":
            return losses.sequence_mean_weights


@cache
def _constant_weights(max_response_tokens: int) -> Callable[..., jax.Array]:
    """The same object for the same constant, so that a second run in a process compiles nothing again."""
    return partial(losses.constant_weights, max_response_tokens=max_response_tokens)


def make_objective(config: Config, model: ModelDirectory) -> Objective:
    return Objective(
        spec=model.spec,
        temperature=config.rollout.temperature,
        clip_eps=config.update.clip_eps,
        loss_weights=pick_loss_weights(config),
        compute_dtype=config.model.compute_dtype,
        micro_batch_size=config.micro_batch_size,
        remat=config.update.remat,
    )


def make_sampling(config: Config) -> Sampling:
    rollout = config.rollout
    return Sampling(
        min_new_tokens=rollout.min_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
    )


def open_model(config: Config) -> ModelDirectory:
    """The configured model without its weights."""
    path = config.model.path
    if path == EMBEDDED:
        path = str(resources.files("ppo_jax") / "assets" / "tiny_reviews")
    return hf_io.open_model(path, ignored_config_fields=config.model.ignored_config_fields)


def make_endings(config: Config, model: ModelDirectory) -> Endings:
    """EOS tokens and stop strings of a run; a model without any EOS is refused."""
    return Endings(
        eos_tokens=jnp.asarray(eos_token_ids(config, model), jnp.int32),
        stop_table=jnp.asarray(stop_table(config.rollout.stop_strings, model.tokenizer, model.spec.vocab_size)),
    )


def eos_token_ids(config: Config, model: ModelDirectory) -> list[int]:
    tokenizer = model.tokenizer
    if config.rollout.eos_tokens is not None:
        vocabulary = tokenizer.get_vocab()
        unknown = [token for token in config.rollout.eos_tokens if token not in vocabulary]
        if unknown:
            raise UserError(f"rollout.eos_tokens: {', '.join(map(repr, unknown))} is not a token of {model.path}")
        return [vocabulary[token] for token in config.rollout.eos_tokens]
    found: set[Any] = set()
    found.add(tokenizer.eos_token_id)
    generation_config = model.path / hf_io.GENERATION_CONFIG
    if generation_config.is_file():
        try:
            stated = json.loads(generation_config.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{generation_config} is not a JSON object: {error}") from error
        found |= set(stated) if isinstance(stated, list) else {stated}
    found.discard(None)
    if not found:
        raise UserError(f"{model.path} names no EOS token, so no answer could end; set rollout.eos_tokens")
    return sorted(found)


def check_tokens(config: Config, model: ModelDirectory, *prompt_sets: Prompts) -> None:
    """Ids within the embedding (JAX would clamp others silently) and sequences within the model's positions."""
    spec = model.spec
    encoded = [tokens for prompts in prompt_sets for tokens in prompts.encoded]
    largest = max(max(tokens, default=0) for tokens in [*encoded, eos_token_ids(config, model)])
    if largest >= spec.vocab_size:
        raise UserError(
            f"the tokenizer of {model.path} gives token id {largest}, but the embedding has {spec.vocab_size} rows; "
            f"tokenizer and model do not belong together"
        )
    longest = max(len(tokens) for tokens in encoded)
    if longest + config.rollout.max_new_tokens > spec.max_positions:
        raise UserError(
            f"the longest prompt ({longest} tokens) and rollout.max_new_tokens ({config.rollout.max_new_tokens}) exceed"
            f" the model's {spec.max_positions} positions; lower prompts.max_tokens or rollout.max_new_tokens"
        )


def _fixed_prompts(config: Config, model: ModelDirectory, prompts: Prompts) -> Prompts:
    texts = config.monitor.fixed_prompts
    texts = prompts.texts[:4] if texts is None else list(texts)
    return load_prompts(config.prompts, model.tokenizer, seed=config.run.seed, texts=texts)


def _float32_means_float32(config: Config) -> None:
    """On a GPU JAX multiplies float32 matrices in TF32 (10 bits) unless told otherwise."""
    if config.model.compute_dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "float32")


def run_directory(config: Config, *, resume: bool) -> Path:
    """Where the run lives; one that holds another run is refused unless that run is resumed."""
    name = config.run.dir or f"runs/{datetime.now():%Y%m%d-%H%M%S}"
    directory = Path(name).expanduser().absolute()
    if not resume and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"run.dir: {directory} is there already and not empty; choose another, or continue it with --resume {name}"
        )
    return directory


def check_resumable(directory: Path, from_python: list[str]) -> None:
    """What can be refused before the model loads: no checkpoint, or a reward or prompts that only Python can give."""
    checkpoint.newest(directory / "checkpoints")
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


def _write_description(directory: Path, config: Config, reference_digest: str, from_python: list[str]) -> None:
    """`config.yaml` as resolved, and what it was run with."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        described = versions() | {"reference_digest": reference_digest, "from_python": from_python}
        (directory / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
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


def tokenizer_texts(
    tokenizer: PreTrainedTokenizerBase, response_tokens: np.ndarray, response_mask: np.ndarray
) -> list[str]:
    """Answers [B, T] as B texts, special tokens left out."""
    rows = zip(response_tokens, response_mask, strict=True)
    return [str(tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=True)) for tokens, mask in rows]
