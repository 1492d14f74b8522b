"""Level L10 of a model: whole PPO iterations on the same tokens with the same shuffles, every number of every step.

An error that one step hides (a moment that is not bias-corrected, a schedule one step late) has 80 steps to grow.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from parity.cases import Answers, ragged_answers
from parity.forward import TEMPERATURE
from parity.learners import Learners
from parity.rows import Named, Row, bound_of, dated, named, row_of
from parity.stacks import Pair
from parity.training import in_own_units
from ppo_jax import algorithm, records, scoring, update
from ppo_jax.config import Config
from ppo_jax.config_file import load
from ppo_jax.monitor import metrics
from ppo_jax.ops import rewards
from ppo_torch_ref import algorithm as torch_algorithm
from ppo_torch_ref import scoring as torch_scoring
from ppo_torch_ref import shaping
from ppo_torch_ref import train as torch_train
from ppo_torch_ref import update as torch_update

ITERATIONS, EPOCHS, BATCH, MINIBATCH, LENGTH = 20, 2, 8, 4, 7
STEPS = ITERATIONS * EPOCHS * BATCH // MINIBATCH


@dataclass(frozen=True)
class Recipe:
    """A name and what it sets."""

    name: str
    settings: dict[str, Any]

    def config(self) -> Config:
        return load(
            overrides={
                "kl.coef": 0.125,
                "rollout.max_new_tokens": LENGTH,
                "rollout.batch_size": BATCH,
                "rollout.temperature": TEMPERATURE,
                "run.iterations": ITERATIONS,
                "update.epochs": EPOCHS,
                "update.minibatch_size": MINIBATCH,
                "update.micro_batch_size": 2,
                "update.learning_rate": 3e-3,
                "update.schedule": "linear",
                "update.warmup_steps": 3,
                "update.weight_decay": 0.1,
                **self.settings,
            }
        )


RECIPES = (
    Recipe("k1, batch mean", {}),
    Recipe("exact, leave one out to go", {"kl.form": "exact", "advantage.estimator": "leave_one_out_to_go"}),
    Recipe(
        "whitened shaped scores, adaptive KL, every clip",
        {
            "kl.per": "token",
            "kl.target_nats": 0.5,
            "reward.normalise": "running",
            "reward.clip": 1.5,
            "reward.missing_eos_penalty": 0.5,
            "reward.min_tokens": 4,
            "reward.too_short_penalty": 0.5,
            "reward.soft_max_tokens": 4,
            "reward.too_long_penalty": 0.25,
            "advantage.estimator": "whitened_batch_mean",
            "update.normaliser": "token_mean",
            "update.clip_eps_high": 0.3,
            "update.dual_clip": 1.5,
            "update.entropy_coef": 0.01,
        },
    ),
    Recipe(
        "exact, gae, value head",
        {
            "kl.form": "exact",
            "advantage.estimator": "gae",
            "advantage.discount": 0.99,
            "advantage.gae_lambda": 0.9,
            "critic.kind": "value_head",
            "critic.clip_eps": 0.2,
            "critic.warmup_iterations": 2,
            "critic.bootstrap_truncated": True,
        },
    ),
)


class JaxSide:
    """`ppo_jax` on its way: its stages on given answers, one optimizer step at a time."""

    def __init__(self, both: Learners, config: Config):
        self.both, self.pair, self.config = both, both.pair, config
        self.algorithm = algorithm.pick_algorithm(config)
        self.kl_coef = self.next_kl_coef = jnp.asarray(config.kl.coef, self.pair.dtype)
        self.score_moments = rewards.first_moments(self.pair.dtype)

    def answer(self, answers: Answers, seq_scores: np.ndarray) -> Named:
        """Steps 3 to 5, and β of the next time; the metrics of the answers."""
        rollout, _ = self.pair.rollouts(answers)
        self.kl_coef, objective = self.next_kl_coef, self.both.objective
        scored = scoring.score(
            self.both.params,
            self.pair.ref_params,
            rollout,
            scoring=scoring.Scoring(
                spec=self.pair.spec,
                temperature=TEMPERATURE,
                compute_dtype=self.pair.dtype,
                micro_batch_size=self.config.micro_batch_size,
            ),
            keep_ref_hidden=objective.loss_kl is not None,
            values=objective.values,
            bootstrap=self.config.critic.bootstrap_truncated,
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
            old_values=scored.values,
            returns=returns,
        )
        measured = metrics.experience_metrics(
            rollout, scored, scores, self.kl_coef, shaped_scores=shaped, returns=returns
        )
        self.next_kl_coef = self.algorithm.next_kl_coef(self.kl_coef, measured["kl/seq_nats"])
        return named(measured)

    def step(self, rows: np.ndarray, planned_step: int) -> Named:
        """One optimizer step on these answers; its statistics."""
        self.both.params, self.both.opt_state, stats = update.ppo_step(
            self.both.params,
            self.both.opt_state,
            self.pair.ref_params,
            self.experience,
            rows,
            self.kl_coef,
            jnp.asarray(planned_step, jnp.int32),
            optimizer=self.both.optimizer,
            objective=self.both.objective,
        )
        return named(stats)

    def tensors(self) -> dict[str, Named]:
        moments = {name: self.both.jax_moments(name) for name in ("mu", "nu")}
        return {"parameters": self.pair.jax_named(self.both.params)} | moments


class TorchSide:
    """The twin on its way."""

    def __init__(self, both: Learners, config: Config):
        self.both, self.pair, self.config = both, both.pair, config
        dtype = getattr(torch, self.pair.dtype)
        self.algorithm = torch_algorithm.pick_algorithm(config)
        self.kl_coef = self.next_kl_coef = torch.tensor(config.kl.coef, dtype=dtype)
        self.score_moments = shaping.first_moments(dtype)

    def answer(self, answers: Answers, seq_scores: np.ndarray) -> Named:
        _, rollout = self.pair.rollouts(answers)
        self.kl_coef = self.next_kl_coef
        scored = torch_scoring.score(
            self.both.model,
            self.pair.ref_model,
            rollout,
            temperature=TEMPERATURE,
            micro_batch_size=MINIBATCH,
            critic=self.both.critic,
            bootstrap=self.config.critic.bootstrap_truncated,
        )
        scores, mask = torch.from_numpy(seq_scores.astype(self.pair.dtype)), rollout.response_mask
        shaped, self.score_moments = self.algorithm.shape_scores(self.score_moments, scores, rollout)
        token_rewards = self.algorithm.token_rewards(shaped, scored, mask, kl_coef=self.kl_coef)
        advantages, returns = self.algorithm.advantages(token_rewards, scored, rollout)
        self.experience = torch_update.Experience(
            prompt_tokens=rollout.prompt_tokens,
            prompt_mask=rollout.prompt_mask,
            response_tokens=rollout.response_tokens,
            response_mask=mask,
            old_logprobs=scored.old_logprobs,
            advantages=advantages,
            old_values=scored.values,
            returns=returns,
        )
        measured = torch_train.experience_metrics(
            rollout, scored, scores, self.kl_coef, shaped_scores=shaped, returns=returns
        )
        seq_kl = self.kl_coef.new_tensor(measured["kl/seq_nats"])
        self.next_kl_coef = self.algorithm.next_kl_coef(self.kl_coef, seq_kl)
        return {name: np.array(x) for name, x in measured.items()}

    def step(self, rows: np.ndarray, planned_step: int) -> Named:
        stats = torch_update.ppo_step(
            self.both.model,
            self.both.twin_optimizer,
            self.pair.ref_model,
            self.experience.rows(torch.from_numpy(rows)),
            self.kl_coef,
            planned_step,
            objective=self.both.twin_objective,
            critic_optimizer=self.both.twin_critic_optimizer,
        )
        return {name: np.array(x) for name, x in stats.items()}

    def tensors(self) -> dict[str, Named]:
        moments = {name: self.both.twin_moments(name) for name in ("mu", "nu")}
        return {"parameters": named(self.both.twin_parameters())} | moments


@dataclass
class Walk:
    """What one stack has said, by step and name, in order."""

    metrics: Named = field(default_factory=dict)  # of the answers of every iteration
    statistics: Named = field(default_factory=dict)  # of every optimizer step
    tensors: dict[str, Named] = field(default_factory=lambda: {"parameters": {}, "mu": {}, "nu": {}})


def walk(pair: Pair, recipe: Recipe) -> tuple[Walk, Walk]:
    """Both stacks through the same answers, scores and shuffles, each on numbers of its own throughout."""
    config, rng = recipe.config(), np.random.default_rng(0)
    both = Learners(pair, config, ours=config.micro_batch_size, theirs=config.micro_batch_size)
    sides, walks = (JaxSide(both, config), TorchSide(both, config)), (Walk(), Walk())
    for iteration in range(ITERATIONS):
        answers = ragged_answers(pair.case.vocab_size, batch=BATCH, response=LENGTH, seed=iteration)
        seq_scores = rng.normal(0, 1, BATCH)
        orders = np.concatenate([rng.permutation(BATCH).reshape(-1, MINIBATCH) for _ in range(EPOCHS)])
        for side, walked in zip(sides, walks, strict=True):
            walked.metrics |= dated(iteration, side.answer(answers, seq_scores))
            for i, rows in enumerate(orders):
                step = iteration * len(orders) + i
                walked.statistics |= dated(step, side.step(rows, step))
                for kind, tensors in side.tensors().items():
                    walked.tensors[kind] |= dated(step, tensors)
    return walks


def iterations(pair: Pair) -> Iterator[Row]:
    """L10: 20 iterations of 2 epochs of 2 minibatches for each recipe, ratio and norm clipped now and then.

    In float32 Adam turns roundings of small gradients into steps, so only the losses are compared there, of the first
    three recipes.
    """
    for recipe in RECIPES if pair.dtype == "float64" else RECIPES[:3]:
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
