"""Levels L7 to L9 of a model: loss, gradient and optimizer step, through the update's own entry points."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from parity.cases import ragged_answers
from parity.forward import TEMPERATURE, scored_answers
from parity.rows import Named, Row, bound_of, named, row_of
from parity.stacks import Pair, in_both
from ppo_jax import algorithm, records, update
from ppo_jax.config import UpdateConfig
from ppo_jax.ops import losses
from ppo_torch_ref import ops as torch_ops
from ppo_torch_ref import update as torch_update

KL_COEF = 0.3
CLIP_EPS = 0.2
OPTIMIZER_STEPS = 20
OPTIMIZER = UpdateConfig(
    learning_rate=5e-5, schedule="cosine", warmup_steps=2, max_grad_norm=1.0, weight_decay=0.1, minibatch_size=6
)
# One object per normaliser: what is compiled for an objective is found again only by an equal one.
CONSTANT = {
    "ours": partial(losses.constant_weights, max_response_tokens=9),
    "theirs": partial(torch_ops.constant_weights, max_response_tokens=9),
}
TOKEN_MEAN = {"ours": losses.token_mean_weights, "theirs": torch_ops.token_mean_weights}


@dataclass(frozen=True)
class Update:
    """What one comparison of an update exercises: the ratio's clipping, the norm's clipping, the half of the KL in the
    loss."""

    name: str
    ratio_clipped: bool = True
    norm_clipped: bool = False
    kl_in_loss: bool = False


LOSSES = (
    Update("clipping inactive", ratio_clipped=False),
    Update("clipping active"),
    Update("exact KL in the loss", kl_in_loss=True),
)
STEPS = (
    Update("norm clipping inactive"),
    Update("norm clipping active", norm_clipped=True),
    Update("exact KL in the loss", norm_clipped=True, kl_in_loss=True),
)
# Models on which every case above is run; on the others it is the last one, which exercises all terms at once.
EVERY_CASE_ON = ("llama", "llama-tied", "gpt2")


def cases_for(pair: Pair, cases: tuple[Update, ...]) -> tuple[Update, ...]:
    return cases if pair.case.name in EVERY_CASE_ON else cases[-1:]


def experience(
    pair: Pair, case: Update, *, advantage_scale: float = 1.0
) -> tuple[records.Experience, torch_update.Experience]:
    """Ragged answers with random advantages; where ratios are to be clipped the old policy is far off."""
    scored, _, mask = scored_answers(pair)
    rng = np.random.default_rng(0)
    off_policy, advantages = (np.where(mask, rng.normal(0, scale, mask.shape), 0) for scale in (0.3, advantage_scale))
    old_logprobs = scored["old_logprobs"] + off_policy * case.ratio_clipped
    arrays, tensors = in_both(
        pair.dtype, (*vars(ragged_answers(pair.case.vocab_size)).values(), old_logprobs, advantages)
    )
    ref_hidden = jnp.asarray(scored["ref_hidden"], pair.dtype) if case.kl_in_loss else None
    return records.Experience(*arrays, ref_hidden=ref_hidden), torch_update.Experience(*tensors)


def objectives(
    pair: Pair, case: Update, loss_weights: dict[str, Callable], *, ours: int, theirs: int
) -> tuple[update.Objective, torch_update.Objective]:
    """The objective of both stacks, each with its own micro-batch size."""
    policy_loss, clipping_acts = algorithm.pick_policy_loss(CLIP_EPS)
    return (
        update.Objective(
            temperature=TEMPERATURE,
            policy_loss=policy_loss,
            clipping_acts=clipping_acts,
            loss_kl=algorithm.LOSS_KL["exact" if case.kl_in_loss else "k1"],
            spec=pair.spec,
            loss_weights=loss_weights["ours"],
            compute_dtype=pair.dtype,
            micro_batch_size=ours,
            remat=False,
        ),
        torch_update.Objective(
            temperature=TEMPERATURE,
            clip_eps=CLIP_EPS,
            loss_weights=loss_weights["theirs"],
            micro_batch_size=theirs,
            kl_in_loss=case.kl_in_loss,
        ),
    )


_loss_and_gradients = jax.jit(update.loss_and_gradients, static_argnames="objective")


@cache
def backward(pair: Pair, case: Update) -> tuple[tuple[Named, Named], tuple[Named, Named]]:
    """((statistics, gradients), those of the twin) of a minibatch: ours of the whole, the twin's over micro-batches."""
    batch, twin_batch = experience(pair, case)
    objective, twin_objective = objectives(pair, case, CONSTANT, ours=6, theirs=2)
    kl_coef = jnp.asarray(KL_COEF, pair.dtype)
    loss, sums, gradients = _loss_and_gradients(pair.params, pair.ref_params, batch, kl_coef, objective=objective)
    model = pair.new_model()
    twin_loss, twin_sums = torch_update.loss_and_gradients(model, pair.ref_model, twin_batch, KL_COEF, twin_objective)
    # A parameter that takes no part has none: it is missing, and so beyond any bound.
    twin_gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return (
        (_statistics(loss, sums), pair.jax_named(gradients)),
        (_statistics(twin_loss, twin_sums), named(twin_gradients)),
    )


def _statistics(loss: Any, sums: dict[str, Any]) -> Named:
    tokens = sums["tokens"]
    return named(
        {
            "loss": loss,
            "loss_policy": sums["loss_policy"],
            "loss_kl": sums["loss_kl"],
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
        ours, theirs, what = dict(ours), dict(theirs), case.name
        ratio, twin_ratio = ({"ratio_max": stack.pop("ratio_max")} for stack in (ours, theirs))
        yield row_of(pair, "L7", f"loss and statistics, {what}", ours, theirs)
        # A ratio is as exact, relatively, as the log-probs it is made of.
        limit = float(twin_ratio["ratio_max"]) * bound_of("L4", pair.dtype, is_real=pair.case.is_real)
        yield row_of(pair, "L7", f"largest ratio, {what}", ratio, twin_ratio, bound=limit)
        yield from _is_active(pair, "L7", what, bool(ours["clip_frac"] > 0), case.ratio_clipped)
        yield from _is_active(pair, "L7", what, bool(ours["loss_kl"] > 0), case.kl_in_loss)


def _is_active(pair: Pair, level: str, what: str, found: bool, expected: bool) -> Iterator[Row]:
    """A row only where a case does not exercise what its name says."""
    if found != expected:
        yield row_of(pair, level, what, {what: np.array(found)}, {what: np.array(expected)}, bound=0.0)


def gradient(pair: Pair) -> Iterator[Row]:
    """L8: the gradient of every tensor, in units of the largest one of the model."""
    for case in cases_for(pair, LOSSES):
        (_, ours), (_, theirs) = backward(pair, case)
        largest = max(float(np.abs(x).max()) for x in theirs.values())
        (ours, ours_zero), (theirs, theirs_zero) = map(pair.split_zero_gradients, (ours, theirs))
        what = case.name
        yield row_of(pair, "L8", f"gradients, {what}", ours, theirs, scale=largest)
        if ours_zero:
            zeros = {name: np.zeros_like(x) for name, x in ours_zero.items()}
            for name, found in (("JAX", ours_zero), ("torch", theirs_zero)):
                yield row_of(pair, "L8", f"{name} key biases are 0, {what}", found, zeros, scale=largest)


def optimizer(pair: Pair) -> Iterator[Row]:
    """L9: parameters, moments and statistics after 1 and 20 steps (3 of a real model, where they take minutes); ours in
    micro-batches, the twin's whole.
    """
    last_step = 3 if pair.case.is_real else OPTIMIZER_STEPS
    jax_optimizer = update.make_optimizer(OPTIMIZER, OPTIMIZER_STEPS)
    kl_coef = jnp.asarray(KL_COEF, pair.dtype)
    for case in cases_for(pair, STEPS):
        objective, twin_objective = objectives(pair, case, TOKEN_MEAN, ours=2, theirs=6)
        batch, twin_batch = experience(pair, case, advantage_scale=10.0 if case.norm_clipped else 1e-2)
        params, model = jax.tree.map(jnp.copy, pair.params), pair.new_model()
        state, twin = jax_optimizer.init(params), torch_optimizer(model, OPTIMIZER, OPTIMIZER_STEPS)
        for step in range(1, last_step + 1):
            params, state, stats = update.ppo_step(
                params,
                state,
                pair.ref_params,
                batch,
                jnp.arange(6),
                kl_coef,
                optimizer=jax_optimizer,
                objective=objective,
            )
            twin_stats = torch_update.ppo_step(
                model, twin, pair.ref_model, twin_batch, KL_COEF, objective=twin_objective
            )
            if step not in (1, last_step):
                continue
            what = f"step {step}, {case.name}"
            clipped = bool(stats["update/grad_norm"] > OPTIMIZER.max_grad_norm)
            yield from _is_active(pair, "L9", what, clipped, case.norm_clipped)
            yield row_of(pair, "L9", f"statistics, {what}", *in_own_units(named(stats), named(twin_stats)))
            yield from _parameter_rows(pair, what, pair.jax_named(params), named(model.state_dict()), step)
            # A square doubles the relative error of what is squared.
            for moment, factor in (("mu", 1), ("nu", 2)):
                ours = pair.jax_named(optax.tree_utils.tree_get(state, moment))
                theirs = named(getattr(twin, moment))
                largest = max(float(np.abs(x).max()) for x in theirs.values())
                yield row_of(pair, "L9", f"{moment}, {what}", ours, theirs, scale=factor * largest)


def in_own_units(ours: Named, theirs: Named) -> tuple[Named, Named]:
    """Both divided by the size of what is compared where that is above 1: a gradient norm may be in the hundreds."""
    units = {name: np.maximum(1.0, np.abs(x)) for name, x in theirs.items()}
    return {name: x / units[name] for name, x in ours.items()}, {name: x / units[name] for name, x in theirs.items()}


def _parameter_rows(pair: Pair, what: str, ours: Named, theirs: Named, steps: int) -> Iterator[Row]:
    """Adam turns the rounding noise of a gradient that is 0 into steps of up to the learning rate: bounded by those."""
    (ours, ours_zero), (theirs, theirs_zero) = map(pair.split_zero_gradients, (ours, theirs))
    yield row_of(pair, "L9", f"parameters, {what}", ours, theirs)
    if ours_zero:
        limit = 2 * OPTIMIZER.learning_rate * steps
        yield row_of(pair, "L9", f"key biases, {what}", ours_zero, theirs_zero, bound=limit)


def torch_optimizer(model: torch.nn.Module, settings: UpdateConfig, total_steps: int) -> torch_update.AdamW:
    """The twin's optimizer of these settings."""
    return torch_update.AdamW(
        model,
        schedule=partial(
            torch_update.learning_rate,
            peak=settings.learning_rate,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            total_steps=total_steps,
        ),
        max_grad_norm=settings.max_grad_norm,
        b1=settings.adam_b1,
        b2=settings.adam_b2,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )
