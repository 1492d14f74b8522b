"""What a run starts from: the policy, its frozen reference, the critic, and the first state; also as shapes alone."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from ppo_jax import sharding
from ppo_jax.config import Config
from ppo_jax.models import hf_io
from ppo_jax.models.decoder import DecoderSpec, Params, abstract_params
from ppo_jax.models.heads import critic_spec, load_critic, zero_value_head
from ppo_jax.models.hf_io import ModelDirectory
from ppo_jax.models.lora import Adapter, abstract_lora, first_lora, laid_over, make_adapter
from ppo_jax.models.peft_io import AdapterDirectory, load_lora, open_adapter
from ppo_jax.ops.rewards import first_moments
from ppo_jax.records import TrainState


def open_lora(config: Config, model: ModelDirectory) -> tuple[AdapterDirectory | None, Adapter | None]:
    """The directory that an adapter starts from, and the adapter, each where there is one; without weights."""
    lora = config.lora
    if lora.path is not None:
        source = open_adapter(lora.path, model)
        return source, source.adapter
    if lora.rank == 0:
        return None, None
    scale = 1.0 if lora.alpha is None else lora.alpha / lora.rank
    return None, make_adapter(
        model.config, model.spec, rank=lora.rank, scale=scale, targets=lora.targets, where="lora.targets"
    )


def first_policy(
    config: Config,
    model: ModelDirectory,
    source: AdapterDirectory | None,
    adapter: Adapter | None,
    mesh: jax.sharding.Mesh,
) -> tuple[Params, Params]:
    """(what is trained of the policy, float32; the reference in the compute dtype).

    The whole model and a copy of it; or an adapter, and the only copy of the base, with the adapter that the run starts
    from over it, frozen: without it the reference would not be the model that was fine-tuned so far.
    """
    dtype, place = config.model.compute_dtype, partial(sharding.place_param, mesh)
    load = partial(hf_io.load_params, model.path, model.config, model.spec, place=place)
    if adapter is None:
        initial = load()
        return initial, copy_params(initial, dtype)
    base = load(dtype=dtype)
    if source is None:
        return {"lora": first_lora(adapter, seed=config.run.seed)}, base
    lora = load_lora(source, model, place=place)
    return {"lora": lora}, laid_over(base, copy_params(lora, "float32"), adapter)


def abstract_policy(config: Config, model: ModelDirectory) -> tuple[Params, Params, Adapter | None]:
    """`first_policy` as shapes and dtypes, and the adapter; no weights are loaded."""
    source, adapter = open_lora(config, model)
    reference = abstract_params(model.spec, config.model.compute_dtype)
    if adapter is None:
        return abstract_params(model.spec), reference, None
    lora = abstract_lora(adapter)
    if source is not None:
        reference = jax.eval_shape(partial(laid_over, adapter=adapter), reference, lora)
    return {"lora": lora}, reference, adapter


@partial(jax.jit, static_argnames="dtype")
def copy_params(params: Params, dtype: str) -> Params:
    """Parameters in a dtype and in memory of their own: the policy's buffers are donated to every update."""
    return sharding.by_rules(jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params))


def first_critic(
    config: Config, model: ModelDirectory, initial: Params, mesh: jax.sharding.Mesh
) -> tuple[DecoderSpec | None, Params]:
    """The spec of a critic's own trunk, where it has one, and what the critic adds to the parameters."""
    if config.critic.kind == "none":
        return None, {}
    if config.critic.kind == "value_head":
        return None, {"critic": {"head": zero_value_head(model.spec.width)}}
    # Beside an adapter there is no float32 model in memory to copy: its critic is read from the files.
    path = str(model.path) if config.critic.path is None and "lora" in initial else config.critic.path
    spec, critic = load_critic(
        path,
        model,
        initial,
        place=partial(sharding.place_param, mesh),
        ignored_config_fields=config.model.ignored_config_fields,
    )
    return spec, {"critic": critic}


def abstract_critic(config: Config, model: ModelDirectory) -> tuple[DecoderSpec | None, Params]:
    """`first_critic` as shapes and dtypes; no weights are loaded."""
    if config.critic.kind == "none":
        return None, {}
    if config.critic.kind == "value_head":
        return None, {"critic": {"head": jax.eval_shape(partial(zero_value_head, model.spec.width))}}
    path, ignored = config.critic.path, config.model.ignored_config_fields
    own = model if path is None else hf_io.open_model(path, key="critic.path", ignored_config_fields=ignored)
    spec = critic_spec(own.spec)
    head = jax.eval_shape(partial(zero_value_head, spec.width))
    return spec, {"critic": {"trunk": abstract_params(spec), "head": head}}


@partial(jax.jit, static_argnames=("optimizer", "kl_coef"), donate_argnames="params")
def first_state(params: Params, *, optimizer: optax.GradientTransformation, kl_coef: float) -> TrainState:
    """The state before the first iteration; the moments lie where their parameters lie."""
    dtype = jax.tree.leaves(params)[0].dtype
    return sharding.by_rules(
        TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            kl_coef=jnp.asarray(kl_coef, dtype),
            score_moments=first_moments(dtype),
            skipped_in_a_row=jnp.zeros((), jnp.int32),
        )
    )
