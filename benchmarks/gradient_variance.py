"""`python -m benchmarks.gradient_variance --policy DIR --reference DIR`: how noisy is the gradient of each KL form?

On the same answers of one policy (one that has moved away from its reference, else every KL is 0) the gradient of the
update at ratio 1 is taken for each form, batch after batch. With g the gradient of one batch, E‖g‖² − ‖E g‖² (the trace
of its covariance) is the variance of an estimate from that many answers; forms that are unbiased share E g. Variance
times seconds per batch says which form gets further per second. At ratio 1 a gradient is linear in the advantages, so
that of score and penalty together is the sum of theirs.
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ppo_jax import build, rollout, scoring, update
from ppo_jax.algorithm import LOSS_KL, make_objective
from ppo_jax.config import Config
from ppo_jax.config_file import load
from ppo_jax.models import hf_io
from ppo_jax.ops import advantages, kl, rewards
from ppo_jax.ops.randomness import Purpose, purpose_key, rollout_uniforms
from ppo_jax.prompts import load_prompts
from ppo_jax.records import Experience, Rollout, Scored
from ppo_jax.rewards.source import open_reward, score_answers

to_go = advantages.leave_one_out_to_go_advantages


def whole_answer(token_rewards: jax.Array, mask: jax.Array) -> jax.Array:
    """The batch mean of the default recipe, its factor 1 − 1/B undone so that all forms have one expectation."""
    batch = mask.shape[0]
    return advantages.batch_mean_advantages(token_rewards, mask) * (batch / (batch - 1))


class Moments:
    """Sums over batches of gradients, and of their squared norms, of an unbiased estimator."""

    def __init__(self) -> None:
        self.total: Any = None
        self.squares: list[float] = []
        self.seconds: list[float] = []

    def add(self, gradient: Any, seconds: float) -> None:
        self.squares.append(float(squared_norm(gradient)))
        self.seconds.append(seconds)
        self.total = gradient if self.total is None else plus(self.total, gradient)

    @property
    def signal(self) -> float:
        """‖E g‖², unbiased: the squared norm of the mean, less the variance that is left in it."""
        n = len(self.squares)
        return (float(squared_norm(self.total)) / n - float(np.mean(self.squares))) / (n - 1)

    @property
    def variance(self) -> float:
        """tr Cov(g), unbiased."""
        n = len(self.squares)
        return (n * float(np.mean(self.squares)) - float(squared_norm(self.total)) / n) / (n - 1)


@jax.jit
def squared_norm(tree: Any) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda x: jnp.sum(x * x), tree))


plus = jax.jit(partial(jax.tree.map, jnp.add))
gradients_of = jax.jit(
    lambda *arguments, objective: update.loss_and_gradients(*arguments, objective)[2], static_argnames="objective"
)


def answers_of(config: Config, run: Any, params: Any, step: int) -> tuple[Rollout, list[str], list[str]]:
    """One batch of answers as training samples them, not cropped, so that every batch has one shape."""
    prompts = run["prompts"].batch(step, config.rollout.batch_size)
    answers = rollout.generate(
        params,
        jnp.asarray(prompts.tokens),
        jnp.asarray(prompts.mask),
        rollout_uniforms(
            purpose_key(config.run.seed, step, Purpose.ROLLOUT),
            jnp.arange(config.rollout.batch_size),
            length=config.rollout.max_new_tokens,
        ),
        run["endings"],
        jnp.zeros((), jnp.int32),
        spec=run["model"].spec,
        sampling=build.make_sampling(config),
        compute_dtype="float32",
    )
    return (
        answers,
        prompts.texts,
        build.tokenizer_texts(
            run["model"].tokenizer, np.asarray(answers.response_tokens), np.asarray(answers.response_mask)
        ),
    )


def estimators(
    answers: Rollout, scored: Scored, scores: jax.Array, kl_coef: float
) -> dict[str, tuple[jax.Array, bool]]:
    """Advantages of each form, and whether its loss has the KL term."""
    mask = answers.response_mask
    token_k1 = kl.k1(scored.old_logprobs, scored.ref_logprobs)
    nothing = jnp.zeros_like(scores)
    k1 = rewards.token_rewards(nothing, token_k1, mask, kl_coef=kl_coef)
    exact = rewards.exact_kl_token_rewards(nothing, scored.token_kl, mask, kl_coef=kl_coef)
    score = rewards.token_rewards(scores, token_k1, mask, kl_coef=0.0)
    return {
        "score": (whole_answer(score, mask), False),
        "k1 whole answer": (whole_answer(k1, mask), False),
        "k1 to go": (to_go(k1, mask), False),
        "exact": (to_go(exact, mask), True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient_variance", description=__doc__)
    parser.add_argument(
        "--config", default="configs/smollm2_sentiment.yaml", help="recipe: prompts, reward, rollout, β"
    )
    parser.add_argument("--policy", required=True, help="a tuned model directory")
    parser.add_argument("--reference", required=True, help="the SFT model it was tuned from")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=16, help="answers per batch")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    size = arguments.batch_size
    config = load(
        arguments.config,
        {"model.path": arguments.policy, "rollout.batch_size": size, "update.minibatch_size": min(size, 8)},
    )
    rows = measure(config, arguments.reference, arguments.batches)
    if arguments.json is not None:
        about = {"machine": platform.platform(), "jax": jax.__version__, "batches": arguments.batches}
        about |= {"answers_per_batch": size, "kl_coef": config.kl.coef}
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"Gradient of one batch of {size} answers, {arguments.batches} batches, β = {config.kl.coef}")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in rows:
        table.add_row(*(x if isinstance(x, str) else f"{x:.4g}" for x in row.values()))
    Console(width=150).print(table)


def measure(config: Config, reference: str, batches: int) -> list[dict[str, Any]]:
    model = build.open_model(config)
    params = hf_io.load_params(model.path, model.config, model.spec)
    ref_params = hf_io.load_params(hf_io.resolve_directory(reference), model.config, model.spec)
    prompts = load_prompts(config.prompts, model.tokenizer, seed=config.run.seed)
    run = {"model": model, "prompts": prompts, "endings": build.make_endings(config, model)}
    reward = open_reward(config.reward)
    objective = replace(make_objective(config, model.spec), micro_batch_size=config.update.minibatch_size)
    moments: dict[str, Moments] = {}
    for step in track(range(batches), description="batches"):
        answers, asked, texts = answers_of(config, run, params, step)
        scores = jnp.asarray(score_answers(reward, asked, texts).total)
        scored = scoring.score(
            params,
            ref_params,
            answers,
            scoring=scoring.Scoring(
                spec=model.spec,
                temperature=config.rollout.temperature,
                compute_dtype="float32",
                micro_batch_size=objective.micro_batch_size,
            ),
            keep_ref_hidden=True,
        )
        gradient_of_score = None
        for name, (advantage, kl_in_loss) in estimators(answers, scored, scores, config.kl.coef).items():
            experience = Experience(
                prompt_tokens=answers.prompt_tokens,
                prompt_mask=answers.prompt_mask,
                response_tokens=answers.response_tokens,
                response_mask=answers.response_mask,
                old_logprobs=scored.old_logprobs,
                advantages=advantage,
                ref_hidden=scored.ref_hidden if kl_in_loss else None,
            )
            started = time.perf_counter()
            gradient = gradients_of(
                params,
                ref_params,
                experience,
                jnp.float32(config.kl.coef),
                objective=replace(objective, loss_kl=LOSS_KL["exact" if kl_in_loss else "k1"]),
            )
            jax.block_until_ready(gradient)
            seconds = time.perf_counter() - started
            moments.setdefault(name, Moments()).add(gradient, seconds)
            if gradient_of_score is None:
                gradient_of_score = gradient
            else:
                together = moments.setdefault(f"{name}, with the score", Moments())
                together.add(plus(gradient, gradient_of_score), seconds)
    return [
        {
            "form": name,
            "variance": found.variance,
            "signal ‖E g‖²": found.signal,
            "s per gradient": float(np.median(found.seconds)),
            "variance x s": found.variance * float(np.median(found.seconds)),
        }
        for name, found in moments.items()
    ]


if __name__ == "__main__":
    main()
