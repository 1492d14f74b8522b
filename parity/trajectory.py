"""Level L10 of a model: whole PPO iterations on the same tokens with the same shuffles, every number of every step.

An error that one step hides (a moment that is not bias-corrected, a schedule one step late) has 80 steps to grow.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from parity.cases import Answers, ragged_answers
from parity.forward import TEMPERATURE
from parity.rows import Named, Row, bound_of, dated, named, row_of
from parity.stacks import Pair
from parity.training import in_own_units, torch_optimizer
from ppo_jax import algorithm, records, scoring, update
from ppo_jax.config import Config
from ppo_jax.config_file import load
from ppo_jax.monitor import metrics
from ppo_jax.ops import rewards
from ppo_torch_ref import ops as torch_ops
from ppo_torch_ref import scoring as torch_scoring
from ppo_torch_ref import train as torch_train
from ppo_torch_ref import update as torch_update

ITERATIONS, EPOCHS, BATCH, MINIBATCH, LENGTH = 20, 2, 8, 4, 7
STEPS = ITERATIONS * EPOCHS * BATCH // MINIBATCH


@dataclass(frozen=True)
class Recipe:
    """A form of the KL, a baseline and a normaliser."""

    kl_form: str
    estimator: str
    normaliser: str

    @property
    def name(self) -> str:
        return f"{self.kl_form}, {self.estimator}, {self.normaliser}"

    def config(self) -> Config:
        return load(
            overrides={
                "kl.form": self.kl_form,
                "kl.coef": 0.125,
                "advantage.estimator": self.estimator,
                "rollout.max_new_tokens": LENGTH,
                "rollout.batch_size": BATCH,
                "rollout.temperature": TEMPERATURE,
                "run.iterations": ITERATIONS,
                "update.normaliser": self.normaliser,
                "update.epochs": EPOCHS,
                "update.minibatch_size": MINIBATCH,
                "update.micro_batch_size": 2,
                "update.learning_rate": 3e-3,
                "update.schedule": "linear",
                "update.warmup_steps": 3,
                "update.weight_decay": 0.1,
            }
        )


RECIPES = (
    Recipe("k1", "batch_mean", "constant"),
    Recipe("k1", "whitened_batch_mean", "token_mean"),
    Recipe("exact", "leave_one_out_to_go", "constant"),
)


class JaxSide:
    """`ppo_jax` on its way: its stages on given answers, one optimizer step at a time."""

    def __init__(self, pair: Pair, config: Config):
        self.pair, self.config = pair, config
        self.optimizer = update.make_optimizer(config.update, STEPS)
        self.params = jax.tree.map(jnp.copy, pair.params)
        self.opt_state = self.optimizer.init(self.params)
        self.algorithm = algorithm.pick_algorithm(config)
        in_dtype = config.model_copy(update={"model": config.model.model_copy(update={"compute_dtype": pair.dtype})})
        self.objective = algorithm.make_objective(in_dtype, pair.spec)
        self.kl_coef = jnp.asarray(config.kl.coef, pair.dtype)
        self.score_moments = rewards.first_moments(pair.dtype)

    def answer(self, answers: Answers, seq_scores: np.ndarray) -> Named:
        """Steps 3 to 5; the metrics of the answers."""
        rollout, _ = self.pair.rollouts(answers)
        scored = scoring.score(
            self.params,
            self.pair.ref_params,
            rollout,
            spec=self.pair.spec,
            temperature=TEMPERATURE,
            compute_dtype=self.pair.dtype,
            micro_batch_size=self.config.micro_batch_size,
            keep_ref_hidden=self.objective.loss_kl is not None,
        )
        scores = jnp.asarray(seq_scores, self.pair.dtype)
        shaped, self.score_moments = self.algorithm.shape_scores(self.score_moments, scores, rollout)
        token_rewards = self.algorithm.token_rewards(shaped, scored, rollout.response_mask, kl_coef=self.kl_coef)
        advantages, returns = self.algorithm.advantages(token_rewards, scored, rollout)
        self.experience = records.Experience(
            prompt_tokens=rollout.prompt_tokens,
            prompt_mask=rollout.prompt_mask,
            response_tokens=rollout.response_tokens,
            response_mask=rollout.response_mask,
            old_logprobs=scored.old_logprobs,
            advantages=advantages,
            ref_hidden=scored.ref_hidden,
        )
        measured = metrics.experience_metrics(
            rollout, scored, scores, self.kl_coef, shaped_scores=shaped, returns=returns
        )
        return named(measured)

    def step(self, rows: np.ndarray) -> Named:
        """One optimizer step on these answers; its statistics."""
        self.params, self.opt_state, stats = update.ppo_step(
            self.params,
            self.opt_state,
            self.pair.ref_params,
            self.experience,
            rows,
            self.kl_coef,
            optimizer=self.optimizer,
            objective=self.objective,
        )
        return named(stats)

    def tensors(self) -> dict[str, Named]:
        moments = {name: optax.tree_utils.tree_get(self.opt_state, name) for name in ("mu", "nu")}
        return {name: self.pair.jax_named(tree) for name, tree in ({"parameters": self.params} | moments).items()}


class TorchSide:
    """The twin on its way."""

    def __init__(self, pair: Pair, config: Config):
        self.pair, self.config, self.model = pair, config, pair.new_model()
        self.optimizer = torch_optimizer(self.model, config.update, STEPS)
        loss_weights: Any = getattr(torch_ops, f"{config.update.normaliser}_weights")
        if config.update.normaliser == "constant":
            loss_weights = partial(loss_weights, max_response_tokens=LENGTH)
        self.objective = torch_update.Objective(
            temperature=TEMPERATURE,
            clip_eps=config.update.clip_eps,
            loss_weights=loss_weights,
            micro_batch_size=config.micro_batch_size,
            kl_in_loss=config.kl.form == "exact",
        )

    def answer(self, answers: Answers, seq_scores: np.ndarray) -> Named:
        _, rollout = self.pair.rollouts(answers)
        scored = torch_scoring.score(
            self.model, self.pair.ref_model, rollout, temperature=TEMPERATURE, micro_batch_size=MINIBATCH
        )
        scores, mask, kl_coef = (
            torch.from_numpy(seq_scores.astype(self.pair.dtype)),
            rollout.response_mask,
            self.config.kl.coef,
        )
        if self.config.kl.form == "exact":
            token_rewards = torch_ops.exact_kl_token_rewards(scores, scored.token_kl, mask, kl_coef=kl_coef)
        else:
            token_k1 = torch_ops.k1(scored.old_logprobs, scored.ref_logprobs)
            token_rewards = torch_ops.token_rewards(scores, token_k1, mask, kl_coef=kl_coef)
        self.experience = torch_update.Experience(
            rollout.prompt_tokens,
            rollout.prompt_mask,
            rollout.response_tokens,
            mask,
            scored.old_logprobs,
            getattr(torch_ops, f"{self.config.advantage.estimator}_advantages")(token_rewards, mask),
        )
        return {
            name: np.array(x) for name, x in torch_train.experience_metrics(rollout, scored, scores, kl_coef).items()
        }

    def step(self, rows: np.ndarray) -> Named:
        minibatch = self.experience.rows(torch.from_numpy(rows))
        stats = torch_update.ppo_step(
            self.model, self.optimizer, self.pair.ref_model, minibatch, self.config.kl.coef, objective=self.objective
        )
        return {name: np.array(x) for name, x in stats.items()}

    def tensors(self) -> dict[str, Named]:
        return {
            "parameters": named(dict(self.model.named_parameters())),
            "mu": named(self.optimizer.mu),
            "nu": named(self.optimizer.nu),
        }


@dataclass
class Walk:
    """What one stack has said, by step and name, in order."""

    metrics: Named = field(default_factory=dict)  # of the answers of every iteration
    statistics: Named = field(default_factory=dict)  # of every optimizer step
    tensors: dict[str, Named] = field(default_factory=lambda: {"parameters": {}, "mu": {}, "nu": {}})


def walk(pair: Pair, recipe: Recipe) -> tuple[Walk, Walk]:
    """Both stacks through the same answers, scores and shuffles, each on numbers of its own throughout."""
    config, rng = recipe.config(), np.random.default_rng(0)
    sides, walks = (JaxSide(pair, config), TorchSide(pair, config)), (Walk(), Walk())
    for iteration in range(ITERATIONS):
        answers = ragged_answers(pair.case.vocab_size, batch=BATCH, response=LENGTH, seed=iteration)
        seq_scores = rng.normal(0, 1, BATCH)
        orders = np.concatenate([rng.permutation(BATCH).reshape(-1, MINIBATCH) for _ in range(EPOCHS)])
        for side, walked in zip(sides, walks, strict=True):
            walked.metrics |= dated(iteration, side.answer(answers, seq_scores))
            for i, rows in enumerate(orders):
                step = iteration * len(orders) + i
                walked.statistics |= dated(step, side.step(rows))
                for kind, tensors in side.tensors().items():
                    walked.tensors[kind] |= dated(step, tensors)
    return walks


def iterations(pair: Pair) -> Iterator[Row]:
    """L10: 20 iterations of 2 epochs of 2 minibatches for each form of the KL, ratio and norm clipped now and then.

    In float32 Adam turns roundings of small gradients into steps, so only the losses are compared there.
    """
    for recipe in RECIPES:
        ours, theirs = walk(pair, recipe)
        losses = [{name: x for name, x in side.statistics.items() if ": loss/" in name} for side in (ours, theirs)]
        pairs = {f"losses of {STEPS} steps": losses}
        if pair.dtype == "float64":
            pairs["metrics of the answers"] = [ours.metrics, theirs.metrics]
            pairs[f"statistics of {STEPS} steps"] = [ours.statistics, theirs.statistics]
            pairs |= {f"{kind} of {STEPS} steps": [ours.tensors[kind], theirs.tensors[kind]] for kind in ours.tensors}
        for what, (x, y) in pairs.items():
            yield row_of(pair, "L10", f"{recipe.name}: {what}", *in_own_units(x, y))
        drift = {f"{half} half": _mean_residual(losses, half) for half in ("first", "second")}
        # Rounding has either sign: the mean of 40 residuals is held to a tenth of what each may be.
        limit = bound_of("L10", pair.dtype, is_real=pair.case.is_real) / 10
        none = {name: np.zeros(()) for name in drift}
        yield row_of(pair, "L10", f"{recipe.name}: drift of the losses", drift, none, bound=limit)
        yield from _acts_in_part(pair, recipe, theirs.statistics)


def _mean_residual(losses: list[Named], half: str) -> np.ndarray:
    """Mean signed difference of the policy losses over half of the steps."""
    names = [name for name in losses[0] if name.endswith("loss/policy")]
    residuals = np.array([losses[0][name] - losses[1][name] for name in names])
    return residuals[: STEPS // 2].mean() if half == "first" else residuals[STEPS // 2 :].mean()


def _acts_in_part(pair: Pair, recipe: Recipe, statistics: Named) -> Iterator[Row]:
    """Rows that say in how many steps clipping acted; red unless in some and not in all."""
    acted = {
        "ratio": np.array([x > 0 for name, x in statistics.items() if name.endswith("policy/clip_frac")]),
        "norm": np.array([x > 1.0 for name, x in statistics.items() if name.endswith("update/grad_norm")]),
    }
    for kind, steps in acted.items():
        name = f"in {int(steps.sum())} steps"
        found = {name: np.array(bool(0 < steps.sum() < len(steps)))}
        yield row_of(pair, "L10", f"{recipe.name}: {kind} clipped in part", found, {name: np.array(True)}, bound=0.0)
