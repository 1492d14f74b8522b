"""Level L11, whole: both stacks generate, score, and train on their own tokens, by the loops that users run.

Shared are the weights, the prompts, the uniforms and the shuffles; everything else each makes by itself. In float64, so
that after 20 iterations of it the parameters still agree.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.rows import Named, Row, bound_of, compare, dated, named
from parity.training import in_own_units
from ppo_jax import build, train
from ppo_jax.algorithm import make_objective
from ppo_jax.config import Config
from ppo_jax.config_file import load
from ppo_jax.models.decoder import cast
from ppo_jax.models.hf_io import export_tensors
from ppo_jax.monitor.clock import PhaseClock
from ppo_jax.ops.randomness import Purpose, purpose_key, rollout_uniforms
from ppo_torch_ref import build as torch_build
from ppo_torch_ref import train as torch_train

CASE = "embedded"
ITERATIONS = 20
PROMPTS = ("the film", "a very long story about", "this cast", "I watched it", "the end of the plot was")
FORMS = {"k1": "batch_mean", "exact": "leave_one_out_to_go"}


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


def config_of(form: str, directory: Path, iterations: int) -> Config:
    prompts = directory / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return load(
        overrides={
            "prompts.path": str(prompts),
            "run.dir": str(directory / form),
            "run.iterations": iterations,
            "reward.function": f"{__name__}:{share_of_e.__name__}",
            "rollout.batch_size": 8,
            "rollout.answers_per_prompt": 2,
            "rollout.max_new_tokens": 8,
            "rollout.temperature": 0.8,
            "rollout.top_p": 0.95,
            "kl.form": form,
            "kl.coef": 0.0625,
            "advantage.estimator": FORMS[form],
            "update.epochs": 2,
            "update.minibatch_size": 4,
            "update.learning_rate": 2e-4,
            "monitor.tensorboard": False,
        }
    )


def whole_runs(dtype: str, iterations: int = ITERATIONS) -> Iterator[Row]:
    """L11: metrics of every iteration and the parameters at the end, for each form of the KL; in float64 only."""
    if dtype != "float64":
        return
    for form in FORMS:
        with tempfile.TemporaryDirectory() as directory:
            config = config_of(form, Path(directory), iterations)
            ours, parameters = _jax_run(config)
            theirs, twin_parameters = _torch_run(Path(directory) / form / "config.yaml")
        bound = bound_of("L11", dtype, is_real=False)
        what = f"{form}: {iterations} iterations on own tokens"
        yield compare("L11", dtype, CASE, f"{what}, metrics", *in_own_units(ours, theirs), bound=bound)
        yield compare("L11", dtype, CASE, f"{what}, final parameters", parameters, twin_parameters, bound=bound)


def _jax_run(config: Config) -> tuple[Named, Named]:
    """(metrics, parameters) of `ppo_jax.train`; master weights and everything else in float64."""
    run, state = build.build(config)
    in_float64 = config.model_copy(update={"model": config.model.model_copy(update={"compute_dtype": "float64"})})
    run = replace(
        run,
        config=in_float64,
        objective=make_objective(in_float64, run.model.spec),
        ref_params=cast(run.ref_params, jnp.float64),
    )
    said: Named = {}
    with jax.set_mesh(run.mesh):
        params = cast(state.params, jnp.float64)
        state = build.first_state(params, optimizer=run.optimizer, kl_coef=config.kl.coef)
        for step in range(config.run.iterations):
            state, numbers = train.ppo_iteration(run, state, PhaseClock())
            said |= dated(step, _without_times(numbers))
    return said, export_tensors(run.model.config, run.model.spec, state.params, np.dtype("float64"))


def _torch_run(config_file: Path) -> tuple[Named, Named]:
    """The same of `ppo_torch_ref.train`, from the config.yaml that the run wrote."""
    config = torch_build.read_config(config_file)
    parts = torch_build.build(config, dtype=torch.float64, device="cpu", hf=False)
    parts.noise = JaxNoise(config.run.seed)
    said: Named = {}
    for step in range(config.run.iterations):
        said |= dated(step, _without_times(torch_train.ppo_iteration(config, parts, step)))
    return said, named(dict(parts.model.named_parameters()))


def _without_times(numbers: dict[str, float]) -> Named:
    timed = ("time/", "throughput/", "step")
    return {name: np.array(x) for name, x in numbers.items() if not name.startswith(timed)}
