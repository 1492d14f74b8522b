"""Levels L7 to L9 of a model: loss, gradient and optimizer step, through the update's own entry points."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity.critics import CRITIC
from parity.learners import (
    ANSWERS,
    CRITIC_MODEL,
    EVERY_TERM,
    KL_COEF,
    OPTIMIZER_STEPS,
    Learners,
    Update,
    experience,
)
from parity.rows import Named, Row, bound_of, named, row_of
from parity.stacks import Pair
from ppo_jax import update
from ppo_torch_ref import update as torch_update

LOSSES = (Update("clipping inactive", ratio_clipped=False), Update("clipping active"), CRITIC_MODEL, EVERY_TERM)
STEPS = (Update("norm clipping inactive"), Update("norm clipping active", norm_clipped=True), EVERY_TERM)
# Models on which every case above is run; on the others it is the last one, which exercises all terms at once.
EVERY_CASE_ON = ("llama", "llama-tied", "gpt2")


def cases_for(pair: Pair, cases: tuple[Update, ...]) -> tuple[Update, ...]:
    return cases if pair.case.name in EVERY_CASE_ON else cases[-1:]


_loss_and_gradients = jax.jit(update.loss_and_gradients, static_argnames="objective")


@cache
def backward(pair: Pair, case: Update) -> tuple[tuple[Named, Named], tuple[Named, Named]]:
    """((statistics, gradients), those of the twin) of a minibatch: ours of the whole, the twin's over micro-batches."""
    batch, twin_batch = experience(pair, case)
    learners = Learners(pair, case.config("constant"), ours=ANSWERS, theirs=2)
    loss, sums, gradients = _loss_and_gradients(
        learners.params, pair.ref_params, batch, jnp.asarray(KL_COEF, pair.dtype), objective=learners.objective
    )
    twin_loss, twin_sums = torch_update.loss_and_gradients(
        learners.model, pair.ref_model, twin_batch, KL_COEF, learners.twin_objective
    )
    # A parameter that takes no part has no gradient: it is missing, and so beyond any bound.
    twin_gradients = {name: x.grad for name, x in learners.twin_parameters().items() if x.grad is not None}
    return (
        (_statistics(loss, sums), pair.jax_named(gradients)),
        (_statistics(twin_loss, twin_sums), named(twin_gradients)),
    )


def _statistics(loss: Any, sums: dict[str, Any]) -> Named:
    tokens = sums["tokens"]
    return named(
        {
            "loss": loss,
            **{name: x for name, x in sums.items() if name.startswith("loss_")},
            "tokens": tokens,
            "clip_frac": sums["clipped_tokens"] / tokens,
            "approx_kl": sums["approx_kl_nats"] / tokens,
            "ratio_max": sums["ratio_max"],
        }
    )


def loss(pair: Pair) -> Iterator[Row]:
    """L7: loss, clip fraction, approximate KL and largest ratio of the update's own forward pass."""
    for case in cases_for(pair, LOSSES):
        (ours, _), (theirs, _) = backward(pair, case)
        ours, theirs, what, config = dict(ours), dict(theirs), case.name, case.config("constant")
        ratio, twin_ratio = ({"ratio_max": stack.pop("ratio_max")} for stack in (ours, theirs))
        yield row_of(pair, "L7", f"loss and statistics, {what}", ours, theirs)
        # A ratio is as exact, relatively, as the log-probs it is made of.
        limit = float(twin_ratio["ratio_max"]) * bound_of("L4", pair.dtype, is_real=pair.case.is_real)
        yield row_of(pair, "L7", f"largest ratio, {what}", ratio, twin_ratio, bound=limit)
        yield from _is_active(pair, "L7", what, bool(ours["clip_frac"] > 0), case.ratio_clipped)
        yield from _is_active(pair, "L7", what, bool(ours["loss_kl"] > 0), config.kl.form != "k1")
        yield from _is_active(pair, "L7", what, bool(ours["loss_entropy"] < 0), config.update.entropy_coef > 0)
        yield from _is_active(pair, "L7", what, "loss_value" in ours, config.critic.kind != "none")


def _is_active(pair: Pair, level: str, what: str, found: bool, expected: bool) -> Iterator[Row]:
    """A row only where a case does not exercise what its name says."""
    if found != expected:
        yield row_of(pair, level, what, {what: np.array(found)}, {what: np.array(expected)}, bound=0.0)


def by_network(tensors: Named) -> dict[str, Named]:
    """The tensors of the policy and, where there are any, those of the critic."""
    of_critic = {name: x for name, x in tensors.items() if name.startswith(CRITIC)}
    of_policy = {name: x for name, x in tensors.items() if name not in of_critic}
    return {"policy": of_policy} | ({"critic": of_critic} if of_critic else {})


def gradient(pair: Pair) -> Iterator[Row]:
    """L8: the gradient of every tensor, in units of the largest one of its network."""
    for case in cases_for(pair, LOSSES):
        (_, ours), (_, theirs) = backward(pair, case)
        ours, theirs = by_network(ours), by_network(theirs)
        for network in theirs:
            yield from _gradient_rows(pair, f"{network}, {case.name}", ours[network], theirs[network])


def _gradient_rows(pair: Pair, what: str, ours: Named, theirs: Named) -> Iterator[Row]:
    largest = max(float(np.abs(x).max()) for x in theirs.values())
    (ours, ours_zero), (theirs, theirs_zero) = map(pair.split_zero_gradients, (ours, theirs))
    yield row_of(pair, "L8", f"gradients of the {what}", ours, theirs, scale=largest)
    if ours_zero:
        zeros = {name: np.zeros_like(x) for name, x in ours_zero.items()}
        for name, found in (("JAX", ours_zero), ("torch", theirs_zero)):
            yield row_of(pair, "L8", f"{name} key biases are 0, {what}", found, zeros, scale=largest)


def optimizer(pair: Pair) -> Iterator[Row]:
    """L9: parameters, moments and statistics after 1 and 20 steps (3 of a real model, where they take minutes); ours in
    micro-batches, the twin's whole.
    """
    last_step = 3 if pair.case.is_real else OPTIMIZER_STEPS
    kl_coef = jnp.asarray(KL_COEF, pair.dtype)
    for case in cases_for(pair, STEPS):
        batch, twin_batch = experience(pair, case, advantage_scale=10.0 if case.norm_clipped else 1e-2)
        both = Learners(pair, case.config("token_mean"), ours=2, theirs=ANSWERS)
        for step in range(1, last_step + 1):
            both.params, both.opt_state, stats = update.ppo_step(
                both.params,
                both.opt_state,
                pair.ref_params,
                batch,
                jnp.arange(ANSWERS),
                kl_coef,
                jnp.asarray(step - 1, jnp.int32),
                optimizer=both.optimizer,
                objective=both.objective,
            )
            twin_stats = torch_update.ppo_step(
                both.model,
                both.twin_optimizer,
                pair.ref_model,
                twin_batch,
                KL_COEF,
                step - 1,
                objective=both.twin_objective,
                critic_optimizer=both.twin_critic_optimizer,
            )
            if step in (1, last_step):
                yield from _step_rows(both, case, step, named(stats), named(twin_stats))


def _step_rows(both: Learners, case: Update, step: int, stats: Named, twin_stats: Named) -> Iterator[Row]:
    """What both say of a step and what they have become."""
    pair, what, config = both.pair, f"step {step}, {case.name}", case.config("token_mean")
    yield from _is_active(pair, "L9", what, bool(stats["update/grad_norm"] > 1.0), case.norm_clipped)
    yield row_of(pair, "L9", f"statistics, {what}", *in_own_units(stats, twin_stats))
    ours, theirs = pair.jax_named(both.params), named(both.twin_parameters())
    (ours, ours_zero), (theirs, theirs_zero) = map(pair.split_zero_gradients, (ours, theirs))
    yield row_of(pair, "L9", f"parameters, {what}", ours, theirs)
    if ours_zero:
        # Adam turns the rounding noise of a gradient that is 0 into steps of up to the learning rate.
        limit = 2 * config.update.learning_rate * step
        yield row_of(pair, "L9", f"key biases, {what}", ours_zero, theirs_zero, bound=limit)
    # A square doubles the relative error of what is squared.
    for moment, factor in (("mu", 1), ("nu", 2)):
        ours, theirs = map(by_network, (both.jax_moments(moment), both.twin_moments(moment)))
        for network, tensors in theirs.items():
            largest = max(float(np.abs(x).max()) for x in tensors.values())
            name = f"{moment} of the {network}, {what}"
            yield row_of(pair, "L9", name, ours[network], tensors, scale=factor * largest)


def in_own_units(ours: Named, theirs: Named) -> tuple[Named, Named]:
    """Both divided by the size of what is compared where that is above 1: a gradient norm may be in the hundreds."""
    units = {name: np.maximum(1.0, np.abs(x)) for name, x in theirs.items()}
    return {name: x / units[name] for name, x in ours.items()}, {name: x / units[name] for name, x in theirs.items()}
