"""`--dry_run`: what a run would compile, hold in memory and roughly cost, from shapes alone; no weights are loaded."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from ppo_jax import build, rollout, scoring, sharding, update
from ppo_jax.algorithm import make_objective, pick_optimizer
from ppo_jax.config import Config
from ppo_jax.initial_state import abstract_critic, abstract_policy
from ppo_jax.models.decoder import DecoderSpec, Params, abstract_params, parameter_count
from ppo_jax.models.heads import zero_value_head
from ppo_jax.models.hf_io import ModelDirectory
from ppo_jax.processes import is_lead
from ppo_jax.prompts import load_split
from ppo_jax.records import Experience, Rollout
from ppo_jax.rewards.classifier import SMALLEST_BUCKET, last_token_values, open_reward_model
from ppo_jax.run_directory import run_directory
from ppo_jax.tracing import bucket

GIGABYTE = 1e9


def print_plan(config: Config, *, resume: bool) -> None:
    """Print the plan; what `build` checks of mesh, model, prompts and reward is checked here too."""
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh.shape)
    run_directory(config, resume=resume)
    build.open_reward(config.reward)
    reward_spec = spec_of_reward_model(config)
    model = build.open_model(config)
    prompts, held_out = load_split(config.prompts, model.tokenizer, seed=config.run.seed)
    fixed_prompts = build.pick_fixed_prompts(config, model, prompts)
    build.check_tokens(config, model, prompts, fixed_prompts, *([] if held_out is None else [held_out]))
    batch, length = config.rollout.batch_size, config.rollout.max_new_tokens
    longest = prompts.batch(0, len(prompts.texts)).tokens.shape[1]
    params = abstract_params(model.spec)
    trained, _, adapter = abstract_policy(config, model)
    size = f"{parameter_count(trained) / 1e6:.2f} M"
    of_adapter = "" if adapter is None else f", of which none is trained, but {size} of an adapter"
    console = Console(quiet=not is_lead())
    console.print(
        f"{model.path}: {parameter_count(params) / 1e6:.1f} M parameters{of_adapter}, {len(prompts.texts)} prompts of "
        f"up to {longest} tokens (padded). An iteration: {batch} answers of up to {length} tokens, "
        f"{config.optimizer_steps_per_iteration} optimizer steps of {config.update.minibatch_size} answers, "
        f"{config.micro_batch_size} at a time. {config.run.iterations} iterations. Mesh: {dict(mesh.shape)}."
    )
    compiled = compile_stages(config, model, mesh, prompt_length=longest)
    if reward_spec is not None:
        compiled["reward model"] = compile_reward_model(config, reward_spec, mesh, text_length=longest + length)
    console.print(_memory_table(held_bytes(config, model, mesh, reward_spec), compiled))
    console.print(_time_table(config, params, mesh, prompt_length=longest))


def compile_stages(
    config: Config, model: ModelDirectory, mesh: jax.sharding.Mesh, *, prompt_length: int
) -> dict[str, Any]:
    """The three jitted functions of an iteration, compiled for their largest shapes without any array."""
    batch, length = config.rollout.batch_size, config.rollout.max_new_tokens
    prompts = batch // config.rollout.answers_per_prompt
    optimizer, dtype = pick_optimizer(config), config.model.compute_dtype
    critic_spec, critic = abstract_critic(config, model)
    trained, reference, adapter = abstract_policy(config, model)
    params, reference = sharding.abstract(mesh, trained | critic), sharding.abstract(mesh, reference)
    objective = make_objective(config, model.spec, critic_spec, adapter)
    opt_state = sharding.abstract(mesh, jax.eval_shape(optimizer.init, params))

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(mesh, shape))

    answers = Rollout(
        prompt_tokens=array(jnp.int32, batch, prompt_length),
        prompt_mask=array(bool, batch, prompt_length),
        response_tokens=array(jnp.int32, batch, length),
        response_mask=array(bool, batch, length),
        behaviour_logprobs=array(jnp.float32, batch, length),
        kept_mass=array(jnp.float32, batch, length),
        finish_reason=array(jnp.int32, batch),
        group_id=array(jnp.int32, batch),
        policy_version=array(jnp.int32),
        hidden=array(dtype, batch, length, model.spec.width) if config.rollout.reuse_states else None,
    )
    experience = Experience(
        prompt_tokens=answers.prompt_tokens,
        prompt_mask=answers.prompt_mask,
        response_tokens=answers.response_tokens,
        response_mask=answers.response_mask,
        old_logprobs=answers.behaviour_logprobs,
        advantages=answers.behaviour_logprobs,
        ref_hidden=None if objective.loss_kl is None else array(dtype, batch, length, model.spec.width),
        old_values=None if objective.critic is None else answers.behaviour_logprobs,
        returns=None if objective.critic is None else answers.behaviour_logprobs,
    )
    with jax.set_mesh(mesh):
        return {
            "rollout": rollout.generate.lower(
                params,
                array(jnp.int32, prompts, prompt_length),
                array(bool, prompts, prompt_length),
                array(jnp.float32, batch, length),
                build.make_endings(config, model),
                array(jnp.int32),
                spec=model.spec,
                sampling=build.make_sampling(config),
                compute_dtype=dtype,
                keep_hidden=config.rollout.reuse_states,
                halvings=config.rollout.halvings,
                ref_params=reference,
                adapter=adapter,
            ).compile(),
            "score": scoring.score.lower(
                params,
                reference,
                answers,
                scoring=build.make_scoring(config, model.spec, adapter),
                keep_ref_hidden=objective.loss_kl is not None,
                values=objective.values,
                bootstrap=config.critic.bootstrap_truncated,
            ).compile(),
            "update": update.ppo_step.lower(
                params,
                opt_state,
                reference,
                experience,
                array(jnp.int32, config.update.minibatch_size),
                array(jnp.float32),
                array(jnp.int32),
                optimizer=optimizer,
                objective=objective,
            ).compile(),
        }


def device_bytes(mesh: jax.sharding.Mesh, params: Params) -> int:
    """What one device of the mesh holds of some parameters."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(sharding.abstract(mesh, params))
    )


def spec_of_reward_model(config: Config) -> DecoderSpec | None:
    """The trunk of `reward.model`, all but its weights checked; None where there is none."""
    if config.reward.model is None:
        return None
    return open_reward_model(config.reward, ignored_config_fields=config.model.ignored_config_fields)[0].spec


def compile_reward_model(config: Config, spec: DecoderSpec, mesh: jax.sharding.Mesh, *, text_length: int) -> Any:
    """What scores a batch of texts, compiled for texts of so many tokens, or of as many as the reward model reads."""
    own, size = sharding.own_mesh(mesh), config.reward.model_batch_size
    most = spec.max_positions if config.reward.model_max_tokens is None else config.reward.model_max_tokens
    length = bucket(min(text_length, most), smallest=SMALLEST_BUCKET, largest=spec.max_positions)
    head = jax.eval_shape(partial(zero_value_head, spec.width))
    with jax.set_mesh(own):
        return last_token_values.lower(
            sharding.abstract(own, abstract_params(spec, config.model.compute_dtype)),
            sharding.abstract(own, head),
            jax.ShapeDtypeStruct((size, length), jnp.int32),
            jax.ShapeDtypeStruct((size, length), bool),
            jax.ShapeDtypeStruct((size,), jnp.int32),
            spec=spec,
        ).compile()


def held_bytes(
    config: Config, model: ModelDirectory, mesh: jax.sharding.Mesh, reward_spec: DecoderSpec | None = None
) -> dict[str, int]:
    """What one device holds all along, in bytes."""
    (params, reference, adapter), (_, critic) = abstract_policy(config, model), abstract_critic(config, model)
    dtype = config.model.compute_dtype
    held = {f"{'policy' if adapter is None else 'adapter'}, float32 masters": device_bytes(mesh, params)}
    if critic:
        held["critic, float32 masters"] = device_bytes(mesh, critic)
    held |= {
        "two moments of AdamW, float32": 2 * device_bytes(mesh, params | critic),
        f"reference, {dtype}": device_bytes(mesh, reference),
    }
    if reward_spec is not None:
        own = sharding.own_mesh(mesh)
        held[f"reward model, {dtype}"] = device_bytes(own, abstract_params(reward_spec, dtype))
    if config.kl.form != "k1":
        shape = (config.rollout.batch_size, config.rollout.max_new_tokens, model.spec.width)
        rows = math.prod(sharding.rows(mesh, shape).shard_shape(shape))
        held["reference's last hidden states"] = rows * jnp.dtype(dtype).itemsize
    return held


def _memory_table(held: dict[str, int], compiled: dict[str, Any]) -> Table:
    table = Table(title=f"Memory of one device: {jax.devices()[0].device_kind}", title_justify="left")
    table.add_column("what")
    table.add_column("GB", justify="right")
    temporary = {f"while in {name}": stage.memory_analysis().temp_size_in_bytes for name, stage in compiled.items()}
    for what, size in (held | temporary).items():
        table.add_row(what, f"{size / GIGABYTE:.3f}")
    table.add_row("peak, about", f"{(sum(held.values()) + max(temporary.values())) / GIGABYTE:.3f}", style="bold")
    return table


def _time_table(config: Config, params: Params, mesh: jax.sharding.Mesh, *, prompt_length: int) -> Table:
    """Two floating-point operations per parameter and token, at the rate and bandwidth of one device, measured now."""
    rate, bandwidth = _matmul_rate(config.model.compute_dtype), _copy_bandwidth()
    count, batch, new = parameter_count(params), config.rollout.batch_size, config.rollout.max_new_tokens
    tokens = batch * (prompt_length + new)
    weights = count * jnp.dtype(config.model.compute_dtype).itemsize
    per_token = 2 * count / (rate * mesh.size)
    reading = weights / (bandwidth * mesh.shape["fsdp"] * mesh.shape["tensor"])  # every token needs all weights
    seconds = {
        "rollout": per_token * batch * prompt_length + new * max(reading, per_token * batch),
        "score": 2 * per_token * tokens,
        "update": 3 * per_token * tokens * config.update.epochs * (4 / 3 if config.update.remat else 1),
    }
    table = Table(
        title=f"Time, a lower bound at {rate / 1e9:.0f} GFLOP/s and {bandwidth / 1e9:.0f} GB/s for each device, "
        f"{mesh.size} in all",
        title_justify="left",
    )
    table.add_column("phase")
    table.add_column("s per iteration", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}")
    total = sum(seconds.values())
    table.add_row("iteration", f"{total:.2f}", style="bold")
    table.add_row("run", f"{total * config.run.iterations:.0f}", style="bold")
    return table


def _best_seconds(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    function(*arguments).block_until_ready()
    timings = []
    for _ in range(3):
        started = time.perf_counter()
        function(*arguments).block_until_ready()
        timings.append(time.perf_counter() - started)
    return min(timings)


def _matmul_rate(dtype: str) -> float:
    size = 2048
    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / _best_seconds(jax.jit(jnp.matmul), x, x)


def _copy_bandwidth() -> float:
    x = jnp.ones((2**26,), jnp.float32)
    return 2 * x.nbytes / _best_seconds(jax.jit(lambda x: x + 1), x)
