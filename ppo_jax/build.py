"""The factory: a config becomes models, prompts, reward and optimizer; `algorithm` picks the functions of the steps."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import PreTrainedTokenizerBase

from ppo_jax import checkpoint, sharding
from ppo_jax.algorithm import Algorithm, make_objective, pick_algorithm, pick_optimizer
from ppo_jax.config import EMBEDDED, Config
from ppo_jax.errors import UserError
from ppo_jax.initial_state import abstract_critic, first_critic, first_policy, first_state, open_lora
from ppo_jax.models import hf_io
from ppo_jax.models.decoder import DecoderSpec, Params
from ppo_jax.models.hf_io import ModelDirectory
from ppo_jax.models.lora import Adapter
from ppo_jax.monitor.invariants import digest
from ppo_jax.monitor.memory import LOADING, shortage_named
from ppo_jax.monitor.sinks import check_sinks
from ppo_jax.processes import from_lead
from ppo_jax.prompts import Prompts, check_ids, load_prompts, load_split
from ppo_jax.records import TrainState
from ppo_jax.reward_model_config import RewardModelConfig
from ppo_jax.rewards.classifier import load_reward_model
from ppo_jax.rewards.source import MODEL, Reward, RewardFunction, open_reward
from ppo_jax.rollout import Endings, Sampling
from ppo_jax.run_directory import (
    check_resumable,
    check_unchanged,
    check_unused,
    kl_coef_since,
    model_digest,
    prompts_digest,
    run_directory,
    tokenizer_digest,
    write_description,
)
from ppo_jax.run_lock import RunLock
from ppo_jax.scoring import Scoring
from ppo_jax.stop_strings import stop_table
from ppo_jax.update import Objective


@dataclass(frozen=True)
class Run:
    """Everything about a run that does not change while it goes on; what changes is in `TrainState`."""

    config: Config
    directory: Path
    lock: RunLock  # on the directory, held since it was first written or read
    mesh: jax.sharding.Mesh
    model: ModelDirectory
    adapter: Adapter | None  # where one is what is trained of the policy; it is laid over the reference
    ref_params: Params  # frozen, in the compute dtype
    prompts: Prompts
    fixed_prompts: Prompts
    held_out: Prompts | None
    reward: Reward
    sampling: Sampling
    scoring: Scoring
    endings: Endings
    algorithm: Algorithm  # steps 4 and 5
    objective: Objective  # step 6
    optimizer: optax.GradientTransformationExtraArgs

    @property
    def prompts_per_iteration(self) -> int:
        return self.config.rollout.batch_size // self.config.rollout.answers_per_prompt


def build(
    config: Config,
    *,
    reward: RewardFunction | None = None,
    prompts: Sequence[str] | None = None,
    resume: bool = False,
    allowed_changes: Collection[str] = (),
) -> tuple[Run, TrainState]:
    """Load and check everything, then make the run directory. Nothing is written before all checks have passed."""
    lock = RunLock(Path(from_lead(lambda: str(run_directory(config, resume=resume)))))
    try:
        with shortage_named(config, lambda: LOADING):
            return _build(config, lock, reward=reward, prompts=prompts, resume=resume, allowed_changes=allowed_changes)
    except BaseException:
        lock.release()
        raise


def _build(
    config: Config,
    lock: RunLock,
    *,
    reward: RewardFunction | None,
    prompts: Sequence[str] | None,
    resume: bool,
    allowed_changes: Collection[str],
) -> tuple[Run, TrainState]:
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh.shape)
    directory = lock.directory
    from_python = [name for name, given in (("reward", reward), ("prompts", prompts)) if given is not None]
    if resume:
        lock.acquire()
        check_resumable(directory, from_python, allowed_changes)
    check_sinks(config.monitor)
    opened_reward = open_reward(config.reward, reward)  # the functions are found before anything large is loaded
    model = open_model(config)
    source, adapter = open_lora(config, model)
    loaded_prompts, held_out = load_split(config.prompts, model.tokenizer, seed=config.run.seed, texts=prompts)
    fixed_prompts = pick_fixed_prompts(config, model, loaded_prompts)
    check_tokens(config, model, loaded_prompts, fixed_prompts, *([] if held_out is None else [held_out]))
    float32_means_float32(config)
    with jax.set_mesh(mesh):
        endings = make_endings(config, model)
        initial, ref_params = first_policy(config, model, source, adapter, mesh)
        digests = {"reference": digest(ref_params)}
        spec_of_critic, critic = first_critic(config, model, initial, mesh)
    digests["model"] = model_digest(model.spec, spec_of_critic, sorted(eos_token_ids(config, model)))
    digests |= {"tokenizer": tokenizer_digest(model.tokenizer), "prompts": prompts_digest(loaded_prompts)}
    digests |= {} if held_out is None else {"held_out": prompts_digest(held_out)}
    optimizer = pick_optimizer(config)
    run = Run(
        config=config,
        directory=directory,
        lock=lock,
        mesh=mesh,
        model=model,
        adapter=adapter,
        ref_params=ref_params,
        prompts=loaded_prompts,
        fixed_prompts=fixed_prompts,
        held_out=held_out,
        reward=opened_reward if reward is not None else add_reward_model(opened_reward, config, mesh),
        sampling=make_sampling(config),
        scoring=make_scoring(config, model.spec, adapter),
        endings=endings,
        algorithm=pick_algorithm(config),
        objective=make_objective(config, model.spec, spec_of_critic, adapter),
        optimizer=optimizer,
    )
    start = partial(first_state, optimizer=optimizer, kl_coef=config.kl.coef)
    since = 0
    if resume:
        check_unchanged(directory, digests, allowed_changes)
        # In the places of this run's mesh, whichever mesh it was saved on.
        like = sharding.abstract(mesh, jax.eval_shape(start, initial | critic))
        state = checkpoint.restore_newest(directory / "checkpoints", like, strict=config.checkpoint.strict)
        since = from_lead(lambda: kl_coef_since(directory, config, int(state.step)))
        if int(state.step) <= since:
            state = replace(state, kl_coef=jnp.full_like(state.kl_coef, config.kl.coef))
    else:
        with jax.set_mesh(mesh):
            state = start(initial | critic)
    if not resume:
        lock.acquire()
        from_lead(partial(check_unused, directory))  # another may have begun there while the model was loaded
    described = {f"{name}_digest": digest for name, digest in digests.items()}
    described |= {"from_python": from_python, "kl_coef_since": since, "config": config.model_dump(mode="json")}
    from_lead(partial(write_description, directory, config, described))
    return run, state


def add_reward_model(reward: Reward, config: Config, mesh: jax.sharding.Mesh) -> Reward:
    """Step 2: the sources of `reward` and, where the config sets one, the reward model, whose weights are loaded."""
    if config.reward.model is None:
        return reward
    dtype, ignored = config.model.compute_dtype, config.model.ignored_config_fields
    model = load_reward_model(config.reward, mesh, dtype=dtype, ignored_config_fields=ignored)
    return replace(reward, sources=reward.sources | {MODEL: model})


def make_scoring(config: Config, spec: DecoderSpec, adapter: Adapter | None) -> Scoring:
    return Scoring(
        spec=spec,
        temperature=config.rollout.temperature,
        compute_dtype=config.model.compute_dtype,
        micro_batch_size=config.micro_batch_size,
        min_new_tokens=config.rollout.min_new_tokens,
        adapter=adapter,
    )


def make_sampling(config: Config) -> Sampling:
    rollout = config.rollout
    return Sampling(
        min_new_tokens=rollout.min_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
    )


def open_model(config: Config | RewardModelConfig) -> ModelDirectory:
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
    """Ids within the embedding and sequences within the model's positions."""
    spec = model.spec
    encoded = [tokens for prompts in prompt_sets for tokens in prompts.encoded]
    check_ids([*encoded, eos_token_ids(config, model)], vocab_size=spec.vocab_size, path=model.path)
    longest = max(len(tokens) for tokens in encoded)
    for whose, of in (("model", spec), ("critic", abstract_critic(config, model)[0])):
        if of is not None and longest + config.rollout.max_new_tokens > of.max_positions:
            raise UserError(
                f"the longest prompt ({longest} tokens) and rollout.max_new_tokens ({config.rollout.max_new_tokens}) "
                f"exceed the {whose}'s {of.max_positions} positions; lower prompts.max_tokens or rollout.max_new_tokens"
            )


def pick_fixed_prompts(config: Config, model: ModelDirectory, prompts: Prompts) -> Prompts:
    """The first prompts, or the given texts; a text that is one of the prompts has the columns of that."""
    if config.monitor.fixed_prompts is None:
        return prompts.at(range(min(4, len(prompts.texts))))
    given = load_prompts(config.prompts, model.tokenizer, seed=config.run.seed, texts=config.monitor.fixed_prompts)
    places = {tuple(tokens): i for i, tokens in enumerate(prompts.encoded)}
    rows = [places.get(tuple(tokens)) for tokens in given.encoded]
    columns = {name: [None if i is None else values[i] for i in rows] for name, values in prompts.columns.items()}
    return replace(given, columns=columns)


def float32_means_float32(config: Config | RewardModelConfig) -> None:
    """On a GPU JAX multiplies float32 matrices in TF32 (10 bits) unless told otherwise."""
    if config.model.compute_dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "float32")


def tokenizer_texts(
    tokenizer: PreTrainedTokenizerBase, response_tokens: np.ndarray, response_mask: np.ndarray
) -> list[str]:
    """Answers [B, T] as B texts, special tokens left out."""
    rows = zip(response_tokens, response_mask, strict=True)
    return [str(tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=True)) for tokens, mask in rows]
