"""What a run leaves for others: the policy as a Hugging Face directory and, where one was trained, its adapter."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp

from ppo_jax import sharding
from ppo_jax.build import Run
from ppo_jax.config import EMBEDDED
from ppo_jax.models.critic import split_critic
from ppo_jax.models.decoder import Params, cast
from ppo_jax.models.hf_io import ModelDirectory, save_model
from ppo_jax.models.lora import Adapter, merged, policy_params
from ppo_jax.models.peft_io import save_adapter
from ppo_jax.processes import from_lead
from ppo_jax.records import TrainState


def export_policy(run: Run, state: TrainState) -> tuple[Path, Path | None]:
    """Write `policy/`, with an adapter merged into its base, and `adapter/` in PEFT format beside it."""
    directory, dtype, adapter = run.directory / "policy", run.config.model.export_dtype, run.adapter
    trained = sharding.read_on_lead(run.mesh, split_critic(state.params)[0])
    if adapter is None:
        from_lead(lambda: save_model(directory, run.model, trained, dtype=dtype))
        return directory, None
    base = sharding.read_on_lead(run.mesh, run.ref_params)
    base_name = str(run.model.path) if run.config.model.path == EMBEDDED else run.config.model.path

    def save() -> None:
        save_adapter(run.directory / "adapter", adapter, trained["lora"], base=base_name)
        model, whole = merged_model(run.model, base, trained, adapter)
        save_model(directory, model, whole, dtype=dtype)

    from_lead(save)
    return directory, run.directory / "adapter"


def merged_model(
    model: ModelDirectory, base: Params, trained: Params, adapter: Adapter
) -> tuple[ModelDirectory, Params]:
    """A plain model that computes what base and adapter do, float32, on the host; its head may no longer be tied."""
    whole = merged(policy_params(trained, cast(base, jnp.float32), adapter))
    return replace(model, spec=replace(model.spec, tied_head="head" not in whole)), whole
