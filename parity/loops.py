"""Level L11, whole: both stacks generate, score, and train on their own tokens, by the loops that users run.

Shared are the weights, the prompts, the uniforms and the shuffles; everything else each makes by itself. In float64, so
that after 20 iterations of it the parameters still agree.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.critics import jax_critic_named, torch_critic_named
from parity.rows import Named, Row, bound_of, compare, dated, named
from parity.training import in_own_units
from ppo_jax import build, train
from ppo_jax.config import Config
from ppo_jax.config_file import load
from ppo_jax.initial_state import first_state
from ppo_jax.models.critic import split_critic
from ppo_jax.models.decoder import cast
from ppo_jax.models.hf_io import export_tensors
from ppo_jax.monitor.clock import PhaseClock
from ppo_jax.ops.randomness import Purpose, purpose_key, rollout_uniforms
from ppo_torch_ref import build as torch_build
from ppo_torch_ref import train as torch_train

CASE = "embedded"
ITERATIONS = {"k1": 20, "exact": 20}  # of the other recipes 3: what is their own acts in every one
PROMPTS = ("the film", "a very long story about", "this cast", "I watched it", "the end of the plot was")
# What each run has of its own: together, every choice of algorithm that takes part in a loop.
RECIPES: dict[str, dict[str, Any]] = {
    "k1": {},
    "exact": {"kl.form": "exact", "advantage.estimator": "group_leave_one_out_to_go"},
    "shaped": {
        "advantage.estimator": "group_leave_one_out",
        "kl.form": "biased_k3_in_loss",
        "kl.target_nats": 0.01,
        "kl.horizon": 3,
        "reward.normalise": "running",
        "reward.clip": 1.25,
        "reward.missing_eos_penalty": 0.5,
        "reward.min_tokens": 6,
        "reward.too_short_penalty": 0.25,
        "reward.soft_max_tokens": 5,
        "reward.too_long_penalty": 0.25,
        "update.clip_eps": 0.02,
        "update.clip_eps_high": 0.03,
        "update.dual_clip": 1.0625,
        "update.entropy_coef": 0.01,
        "update.importance_cap": 1.0,
        "update.max_approx_kl_nats": 0.05,
        "update.schedule": "linear",  # which does not wait for the steps that are left out
    },
    "value head": {
        "advantage.estimator": "gae",
        "advantage.discount": 0.99,
        "advantage.gae_lambda": 0.9,
        "critic.kind": "value_head",
        "critic.warmup_iterations": 1,
        "critic.clip_eps": 0.05,
        "critic.bootstrap_truncated": True,
        "critic.learning_rate": 0.01,
    },
    "critic model": {
        "reward.normalise": "batch",
        "advantage.estimator": "whitened_gae",
        "critic.kind": "model",
        "critic.warmup_iterations": 1,
        "update.schedule": "linear",
    },
}


def share_of_e(prompts: list[str], answers: list[str]) -> list[float]:
    """The reward: the share of the letter e in 64ths, a number that float32 holds exactly."""
    return [round(64 * answer.count("e") / max(len(answer), 1)) / 64 for answer in answers]


class JaxNoise(torch_build.Noise):
    """The draws of `ppo_jax`, for the twin."""

    def uniforms(self, step: int, answers: int, length: int) -> torch.Tensor:
        key = purpose_key(self.seed, step, Purpose.ROLLOUT)
        return torch.from_numpy(np.array(rollout_uniforms(key, jnp.arange(answers), length=length), np.float64))

    def orders(self, step: int, epochs: int, answers: int) -> list[torch.Tensor]:
        key = purpose_key(self.seed, step, Purpose.SHUFFLE)
        keys = (jax.random.fold_in(key, epoch) for epoch in range(epochs))
        return [torch.from_numpy(np.array(jax.random.permutation(key, answers))) for key in keys]


def config_of(recipe: str, directory: Path, iterations: int) -> Config:
    prompts = directory / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return load(
        overrides={
            "prompts.path": str(prompts),
            "run.dir": str(directory / "run"),
            "run.iterations": iterations,
            "reward.function": f"{__name__}:{share_of_e.__name__}",
            "rollout.batch_size": 8,
            "rollout.answers_per_prompt": 2,
            "rollout.max_new_tokens": 8,
            "rollout.temperature": 0.8,
            "rollout.top_p": 0.95,
            "kl.coef": 0.0625,
            "update.epochs": 2,
            "update.minibatch_size": 4,
            "update.learning_rate": 2e-4,
            "monitor.tensorboard": False,
            **RECIPES[recipe],
        }
    )


def whole_runs(dtype: str, *, at_most: int = 20, recipes: Sequence[str] = tuple(RECIPES)) -> Iterator[Row]:
    """L11: metrics of every iteration and the parameters at the end, for each recipe; in float64 only."""
    if dtype != "float64":
        return
    for recipe in recipes:
        iterations = min(at_most, ITERATIONS.get(recipe, 3))
        with tempfile.TemporaryDirectory() as directory:
            config = config_of(recipe, Path(directory), iterations)
            ours, parameters = _jax_run(config)
            theirs, twin_parameters = _torch_run(Path(directory) / "run" / "config.yaml")
        ours = {name: ours[name] for name in theirs}  # the twin has the metrics, not the signals beside them
        bound = bound_of("L11", dtype, is_real=False)
        what = f"{recipe}: {iterations} iterations on own tokens"
        yield compare("L11", dtype, CASE, f"{what}, metrics", *in_own_units(ours, theirs), bound=bound)
        yield compare("L11", dtype, CASE, f"{what}, final parameters", parameters, twin_parameters, bound=bound)


def _jax_run(config: Config) -> tuple[Named, Named]:
    """(metrics, parameters) of `ppo_jax.train`; master weights and everything else in float64."""
    run, state = build.build(config)
    in_float64 = config.model_copy(update={"model": config.model.model_copy(update={"compute_dtype": "float64"})})
    run = replace(
        run,
        config=in_float64,
        scoring=replace(run.scoring, compute_dtype="float64"),
        objective=replace(run.objective, compute_dtype="float64"),
        ref_params=cast(run.ref_params, jnp.float64),
    )
    said: Named = {}
    with jax.set_mesh(run.mesh):
        params = cast(state.params, jnp.float64)
        state = first_state(params, optimizer=run.optimizer, kl_coef=config.kl.coef)
        for step in range(config.run.iterations):
            state, numbers = train.ppo_iteration(run, state, PhaseClock())
            said |= dated(step, _without_times(numbers))
    (policy, critic), model = split_critic(state.params), run.model
    parameters = export_tensors(model.config, model.spec, policy, np.dtype("float64"))
    return said, parameters | jax_critic_named(model.config, model.spec, critic, "float64")


def _torch_run(config_file: Path) -> tuple[Named, Named]:
    """The same of `ppo_torch_ref.train`, from the config.yaml that the run wrote."""
    config = torch_build.read_config(config_file)
    parts = torch_build.build(config, dtype=torch.float64, device="cpu", hf=False)
    parts.noise = JaxNoise(config.run.seed)
    said: Named = {}
    for step in range(config.run.iterations):
        said |= dated(step, _without_times(torch_train.ppo_iteration(config, parts, step)))
    critic = None if parts.objective.critic is None else parts.objective.critic.values
    return said, named(dict(parts.model.named_parameters())) | torch_critic_named(critic)


def _without_times(numbers: dict[str, float]) -> Named:
    timed = ("time/", "throughput/", "step")
    return {name: np.array(x) for name, x in numbers.items() if not name.startswith(timed)}
