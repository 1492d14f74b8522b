"""Step 6: a few small, clipped steps. One jitted optimizer step per minibatch, a plain loop around it.

The loss of a minibatch is Σ w_bt ℓ_bt with weights known beforehand (`ops.losses`), so that micro-batches inside the
step add up: sums of losses, sums of gradients, one clipping, one AdamW step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.config import Config
from ppo_jax.models.critic import cast_trunks, split_critic
from ppo_jax.models.decoder import DecoderSpec, Params, cast, head_logits, response_hidden
from ppo_jax.models.lora import Adapter, policy_params
from ppo_jax.ops import kl, losses, masking
from ppo_jax.ops.logprobs import entropy, token_logprobs
from ppo_jax.ops.randomness import Purpose, purpose_key
from ppo_jax.ops.streaming import (
    at_shortest_axis,
    map_row_blocks,
    micro_batches,
    rows_per_block,
    shortest_together,
    with_length,
)
from ppo_jax.optimizer import step_if_finite
from ppo_jax.records import Experience, TrainState
from ppo_jax.sharding import by_rows, by_rules, device_count, gather_again
from ppo_jax.tracing import note_compilation

Stats = dict[str, Array]


@dataclass(frozen=True)
class Objective:
    """What the update minimises and how it is computed; fixed for a run, so compiled in."""

    spec: DecoderSpec
    temperature: float
    policy_loss: Callable[..., Float[Array, "B T"]]  # (logprobs, old_logprobs, advantages) -> loss per token
    clipping_acts: Callable[..., Bool[Array, "B T"]]  # of the same arguments: where the clipping stops the gradient
    loss_weights: Callable[..., Float[Array, "B T"]]  # one of ops.losses.*_weights: mask -> weights
    compute_dtype: str
    micro_batch_size: int
    remat: bool
    min_new_tokens: int = 0  # nothing is compiled for shorter answers
    # (logits, ref_logits, tokens) -> KL per token; None where no KL is in the loss.
    loss_kl: Callable[..., Float[Array, " rows"]] | None = None
    entropy_coef: float = 0.0
    critic: "CriticObjective | None" = None
    adapter: Adapter | None = None  # where one is what is trained; it is laid over the reference

    @property
    def values(self) -> Callable[..., Float[Array, "B T"]] | None:
        return None if self.critic is None else self.critic.values


@dataclass(frozen=True)
class CriticObjective:
    """How a critic makes its values, and how it learns them."""

    values: Callable[..., Float[Array, "B T"]]  # (params, policy's hidden states, sequences) -> values
    loss: Callable[..., Float[Array, "B T"]]  # (values, old_values, returns) -> loss per token
    coef: float


class Terms(NamedTuple):
    """What the loss needs of the parameters being trained; masked positions hold 0, but in the values."""

    logprobs: Float[Array, "B T"]  # nats per token
    token_kl: Float[Array, "B T"]  # of `Objective.loss_kl`, nats per token; 0 without one
    token_entropy: Float[Array, "B T"]  # nats per token; 0 where there is no bonus
    values: Float[Array, "B T"] | None  # of the critic, units of the reward


def loss_terms(params: Params, ref_params: Params, experience: Experience, objective: Objective) -> Terms:
    """`Terms` of some answers; the heads of policy and reference are streamed together, as in scoring."""
    params, ref_params = cast_trunks(params, objective.compute_dtype), cast(ref_params, objective.compute_dtype)
    params = policy_params(params, ref_params, objective.adapter)
    mask, temperature, spec = experience.response_mask, objective.temperature, objective.spec
    sequences = (experience.prompt_tokens, experience.prompt_mask, experience.response_tokens, mask)
    hidden = response_hidden(params, *sequences, spec=spec, remat=objective.remat)

    def rows(hidden, tokens, ref_hidden: Any = None):
        logits = head_logits(params, hidden, spec=spec)
        logprobs = token_logprobs(logits, tokens, temperature=temperature)
        token_kl = token_entropy = jnp.zeros_like(logprobs)
        if objective.loss_kl is not None:
            ref_logits = head_logits(ref_params, ref_hidden, spec=spec)
            token_kl = objective.loss_kl(logits, ref_logits, tokens, temperature=temperature)
        if objective.entropy_coef:
            token_entropy = entropy(logits, temperature=temperature)
        return logprobs, token_kl, token_entropy

    inputs: list[Any] = [hidden, experience.response_tokens]
    if objective.loss_kl is not None:
        inputs.append(experience.ref_hidden)
    block_rows = rows_per_block(spec.vocab_size, devices=device_count())
    terms = [masking.zero_masked(x, mask) for x in map_row_blocks(rows, *inputs, block_rows=block_rows)]
    if objective.critic is None:
        return Terms(*terms, values=None)
    return Terms(*terms, values=objective.critic.values(params, hidden, sequences))


def policy_loss(
    params: Params,
    ref_params: Params,
    experience: Experience,
    weights: Float[Array, "B T"],
    kl_coef: Float[Array, ""],
    objective: Objective,
) -> tuple[Float[Array, ""], Stats]:
    """Σ w (ℓ + β KL − c_H H + c_V ℓ_V) of some answers, and the sums that the step's statistics are made of.

    A term that the objective does not have is 0; without a critic there is no statistic of one either.
    """
    mask = experience.response_mask
    terms = loss_terms(params, ref_params, experience, objective)
    old_logprobs = masking.zero_masked(experience.old_logprobs, mask)
    advantages = masking.zero_masked(experience.advantages, mask)
    policy = losses.weighted_sum(objective.policy_loss(terms.logprobs, old_logprobs, advantages), weights)
    penalty = kl_coef * losses.weighted_sum(terms.token_kl, weights)
    bonus = -objective.entropy_coef * losses.weighted_sum(terms.token_entropy, weights)
    clipped = objective.clipping_acts(terms.logprobs, old_logprobs, advantages)
    log_ratio = terms.logprobs - old_logprobs
    sums = {
        "loss_policy": policy,
        "loss_kl": penalty,
        "loss_entropy": bonus,
        "tokens": masking.masked_count(mask, dtype=log_ratio.dtype),
        "clipped_tokens": masking.masked_count(clipped & mask, dtype=log_ratio.dtype),
        "approx_kl_nats": masking.masked_sum(kl.k3(old_logprobs, terms.logprobs), mask),
        "ratio_max": masking.masked_max(jnp.exp(log_ratio), mask),
        "log_ratio_abs_max": masking.masked_max(jnp.abs(log_ratio), mask),
    }
    total = policy + penalty + bonus
    if objective.critic is None:
        return total, sums
    learned: tuple[Any, ...] = (terms.values, experience.old_values, experience.returns)
    values, old_values, returns = (masking.zero_masked(x, mask) for x in learned)
    value = objective.critic.coef * losses.weighted_sum(objective.critic.loss(values, old_values, returns), weights)
    return total + value, sums | {"loss_value": value}


def _combine(first: Stats, second: Stats) -> Stats:
    """Statistics of two sets of answers: maxima of the maxima, sums of the rest; all 0 is the empty set."""
    return {
        name: jnp.maximum(value, second[name]) if name.endswith("_max") else value + second[name]
        for name, value in first.items()
    }


def loss_and_gradients(
    params: Params, ref_params: Params, minibatch: Experience, kl_coef: Float[Array, ""], objective: Objective
) -> tuple[Float[Array, ""], Stats, Params]:
    """Loss, statistics and gradients of a minibatch, accumulated over its micro-batches, each as long as it must be."""
    weights = objective.loss_weights(minibatch.response_mask, dtype=minibatch.old_logprobs.dtype)
    in_micro_batches = micro_batches((minibatch, weights), objective.micro_batch_size)

    def evaluate(micro_batch):
        (policy, reference), micro_batch = gather_again((params, ref_params), micro_batch)
        (loss, stats), gradients = jax.value_and_grad(policy_loss, has_aux=True)(
            policy, reference, *micro_batch, kl_coef, objective
        )
        return loss, stats, by_rules(gradients)

    def evaluate_short(micro_batch):
        answers, weights = micro_batch
        return at_shortest_axis(
            lambda length: evaluate((_at_length(answers, length), with_length(weights, length))),
            answers.response_mask,
            min_new_tokens=objective.min_new_tokens,
        )

    def accumulate(total, micro_batch):
        loss, stats, gradients = evaluate_short(micro_batch)
        added_gradients = jax.tree.map(jnp.add, total[2], gradients)
        return (total[0] + loss, _combine(total[1], stats), added_gradients), None

    first = jax.tree.map(lambda x: x[0], in_micro_batches)
    if weights.shape[0] == objective.micro_batch_size:
        return evaluate(first)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(evaluate, first))
    return jax.lax.scan(accumulate, nothing, in_micro_batches)[0]


def _at_length(answers: Experience, length: int) -> Experience:
    """The answers with their responses cut to a length that holds them all."""
    names = [name for name, x in vars(answers).items() if x is not None and not name.startswith("prompt_")]
    return replace(answers, **{name: with_length(getattr(answers, name), length) for name in names})


@partial(jax.jit, static_argnames=("optimizer", "objective"), donate_argnames=("params", "opt_state"))
def ppo_step(
    params: Params,
    opt_state: optax.OptState,
    ref_params: Params,
    experience: Experience,
    rows: Int[Array, " minibatch"],
    kl_coef: Float[Array, ""],
    planned_step: Int[Array, ""],
    *,
    optimizer: optax.GradientTransformationExtraArgs,
    objective: Objective,
) -> tuple[Params, optax.OptState, Stats]:
    """One optimizer step on the answers `rows` of the batch; the old parameters' memory is reused.

    `planned_step` is its number in a run that leaves out none; the learning rate depends on it. A step whose loss,
    gradient or update is not finite leaves parameters and moments as they were and is counted as skipped.
    """
    note_compilation(
        "update", B=rows.shape[0], P=experience.prompt_tokens.shape[1], T=experience.response_tokens.shape[1]
    )
    rows = rows[shortest_together(experience.response_mask[rows], objective.micro_batch_size)]
    minibatch = by_rows(jax.tree.map(lambda x: x[rows], experience))
    loss, sums, gradients = loss_and_gradients(params, ref_params, minibatch, kl_coef, objective)
    (of_policy, of_critic), grad_norm = split_critic(gradients), optax.tree.norm(gradients)
    params_norm = optax.tree.norm(split_critic(params)[0])
    params, opt_state, updates, finite = step_if_finite(
        optimizer, gradients, opt_state, params, loss, grad_norm, planned_step=planned_step
    )
    change = optax.tree.norm(split_critic(updates)[0]) / params_norm
    tokens = jnp.maximum(sums["tokens"], 1)  # none where every answer of a minibatch was dropped
    stats = {
        "loss/policy": sums["loss_policy"],
        "loss/kl": sums["loss_kl"],
        "loss/entropy": sums["loss_entropy"],
        "policy/clip_frac": sums["clipped_tokens"] / tokens,
        "policy/approx_kl_nats": sums["approx_kl_nats"] / tokens,
        "policy/ratio_max": sums["ratio_max"],
        "policy/log_ratio_abs_max": sums["log_ratio_abs_max"],
        "update/grad_norm": optax.tree.norm(of_policy),
        "update/param_rel_change": jnp.where(finite, change, jnp.zeros_like(change)),
        "update/skipped_steps": ~finite,
    }
    if of_critic is not None:
        stats |= {"loss/value": sums["loss_value"], "critic/grad_norm": optax.tree.norm(of_critic)}
    # Held to their places: a moment that XLA left somewhere else would not fit the memory it came from.
    return by_rules(params), by_rules(opt_state), stats


def update(
    state: TrainState,
    ref_params: Params,
    experience: Experience,
    *,
    config: Config,
    optimizer: optax.GradientTransformationExtraArgs,
    objective: Objective,
) -> tuple[TrainState, list[Stats]]:
    """Epochs of shuffled minibatches over one batch; statistics of every optimizer step in order.

    `state` is consumed: its buffers are donated. A step that finds the policy further from the old one than
    `update.max_approx_kl_nats` is the last; the learning rate goes on as if all had been taken, so that a schedule ends
    when the run does.
    """
    ceiling, params, opt_state = config.update.max_approx_kl_nats, state.params, state.opt_state
    skipped_in_a_row, all_stats = state.skipped_in_a_row, []
    first_step = int(state.step) * config.optimizer_steps_per_iteration
    for planned_step, rows in enumerate(minibatches(config, state.step), first_step):
        params, opt_state, stats = ppo_step(
            params,
            opt_state,
            ref_params,
            experience,
            rows,
            state.kl_coef,
            np.int32(planned_step),
            optimizer=optimizer,
            objective=objective,
        )
        skipped_in_a_row = jnp.where(stats["update/skipped_steps"], skipped_in_a_row + 1, 0)
        all_stats.append(stats | {"update/skipped_in_a_row_max": skipped_in_a_row})
        if ceiling is not None and float(stats["policy/approx_kl_nats"]) > ceiling:
            break
    trained = replace(state, params=params, opt_state=opt_state, skipped_in_a_row=skipped_in_a_row)
    return replace(trained, step=state.step + 1), all_stats


def minibatches(config: Config, step: int | Int[Array, ""]) -> Iterator[np.ndarray]:
    """Which answers each optimizer step of an iteration is made of: a shuffle per epoch, by (seed, step, epoch)."""
    batch, size = config.rollout.batch_size, config.update.minibatch_size
    for epoch in range(config.update.epochs):
        key = jax.random.fold_in(purpose_key(config.run.seed, step, Purpose.SHUFFLE), epoch)
        order = np.asarray(jax.random.permutation(key, batch))
        yield from (order[start : start + size] for start in range(0, batch, size))


def summarise(steps: list[dict[str, float]]) -> dict[str, float]:
    """One iteration's numbers: means over its optimizer steps, maxima of maxima, sums of counts and of changes."""
    summary: dict[str, float] = {}
    for name in steps[0]:
        values = [step[name] for step in steps]
        if name.endswith("_max"):
            summary[name] = float(np.max(values))  # which does not hide a NaN, as max() may
        elif name in ("update/param_rel_change", "update/skipped_steps"):
            summary[name] = sum(values)
        else:
            summary[name] = sum(values) / len(values)
    return summary | {"update/optimizer_steps": len(steps)}
