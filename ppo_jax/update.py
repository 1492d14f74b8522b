"""Step 6: a few small, clipped steps. One jitted optimizer step per minibatch, a plain loop around it.

The loss of a minibatch is Σ w_bt ℓ_bt with weights known beforehand (`ops.losses`), so that micro-batches inside the
step add up: sums of losses, sums of gradients, one clipping, one AdamW step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ppo_jax.config import Config, UpdateConfig
from ppo_jax.models.decoder import DecoderSpec, Params, cast, head_logits, response_hidden
from ppo_jax.ops import kl, losses, masking
from ppo_jax.ops.logprobs import token_logprobs
from ppo_jax.ops.randomness import Purpose, purpose_key
from ppo_jax.ops.streaming import map_row_blocks, micro_batches, rows_per_block
from ppo_jax.records import Experience, TrainState
from ppo_jax.sharding import by_rows, by_rules, device_count, gather_again
from ppo_jax.tracing import note_compilation

Stats = dict[str, Array]


@dataclass(frozen=True)
class Objective:
    """What the update minimises and how it is computed; fixed for a run, so compiled in."""

    spec: DecoderSpec
    temperature: float
    clip_eps: float
    loss_weights: Callable[..., Float[Array, "B T"]]  # one of ops.losses.*_weights: mask -> weights
    compute_dtype: str
    micro_batch_size: int
    remat: bool


def learning_rate(
    step: int | Int[Array, ""], *, peak: float, schedule: str, warmup_steps: int, total_steps: int
) -> Float[Array, ""]:
    """Learning rate of optimizer step 0, 1, ...: peak · min(1, (step + 1) / warmup) · decay.

    The warm-up begins above 0, so no step is wasted. With p the share of the steps behind the warm-up that are done,
    the decay is 1, 1 − p or (1 + cos πp) / 2.
    """
    count = jnp.asarray(step, jnp.result_type(float))
    warmup = jnp.minimum((count + 1.0) / max(warmup_steps, 1), 1.0)
    done = jnp.clip((count - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
    decay = {
        "constant": jnp.ones_like(done),
        "linear": 1.0 - done,
        "cosine": (1.0 + jnp.cos(jnp.pi * done)) / 2.0,
    }
    return peak * warmup * decay[schedule]


@cache
def make_optimizer(update: UpdateConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decay on matrices only.

    The same object for the same settings, so that a second run in a process compiles nothing again.
    """

    def schedule(count: Any) -> Array:
        return learning_rate(
            count,
            peak=update.learning_rate,
            schedule=update.schedule,
            warmup_steps=update.warmup_steps,
            total_steps=total_steps,
        )

    adamw = optax.adamw(
        schedule,
        b1=update.adam_b1,
        b2=update.adam_b2,
        eps=update.adam_eps,
        weight_decay=update.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
    )
    if update.max_grad_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(update.max_grad_norm), adamw)


def policy_terms(
    params: Params, ref_params: Params, experience: Experience, objective: Objective
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """What the loss needs of the parameters being trained, in nats per token, 0 at masked positions.

    Log-probs of the response tokens, and the exact KL to the reference where the experience carries the reference's
    hidden states (0 elsewhere): both heads are streamed together, as in scoring.
    """
    params, ref_params = cast(params, objective.compute_dtype), cast(ref_params, objective.compute_dtype)
    hidden = response_hidden(
        params,
        experience.prompt_tokens,
        experience.prompt_mask,
        experience.response_tokens,
        experience.response_mask,
        spec=objective.spec,
        remat=objective.remat,
    )
    spec, temperature = objective.spec, objective.temperature

    def rows(hidden, tokens, ref_hidden=None):
        logits = head_logits(params, hidden, spec=spec)
        logprobs = token_logprobs(logits, tokens, temperature=temperature)
        if ref_hidden is None:
            return logprobs, jnp.zeros_like(logprobs)
        ref_logits = head_logits(ref_params, ref_hidden, spec=spec)
        return logprobs, kl.exact_token_kl(logits, ref_logits, temperature=temperature)

    inputs = [hidden, experience.response_tokens] + ([] if experience.ref_hidden is None else [experience.ref_hidden])
    block_rows = rows_per_block(spec.vocab_size, devices=device_count())
    logprobs, token_kl = map_row_blocks(rows, *inputs, block_rows=block_rows)
    mask = experience.response_mask
    return masking.zero_masked(logprobs, mask), masking.zero_masked(token_kl, mask)


def policy_loss(
    params: Params,
    ref_params: Params,
    experience: Experience,
    weights: Float[Array, "B T"],
    kl_coef: Float[Array, ""],
    objective: Objective,
) -> tuple[Float[Array, ""], Stats]:
    """Σ w (ℓ + β KL) of some answers and the sums that the step's statistics are made of; KL is 0 in the `k1` form."""
    mask = experience.response_mask
    logprobs, token_kl = policy_terms(params, ref_params, experience, objective)
    old_logprobs = masking.zero_masked(experience.old_logprobs, mask)
    advantages = masking.zero_masked(experience.advantages, mask)
    token_losses = losses.clipped_policy_loss(logprobs, old_logprobs, advantages, clip_eps=objective.clip_eps)
    policy, penalty = losses.weighted_sum(token_losses, weights), kl_coef * losses.weighted_sum(token_kl, weights)
    clipped = losses.clipping_acts(logprobs, old_logprobs, advantages, clip_eps=objective.clip_eps)
    log_ratio = logprobs - old_logprobs
    return policy + penalty, {
        "loss_policy": policy,
        "loss_kl": penalty,
        "tokens": masking.masked_count(mask, dtype=logprobs.dtype),
        "clipped_tokens": masking.masked_count(clipped & mask, dtype=logprobs.dtype),
        "approx_kl_nats": masking.masked_sum(kl.k3(old_logprobs, logprobs), mask),
        "ratio_max": masking.masked_max(jnp.exp(log_ratio), mask),
        "log_ratio_abs_max": masking.masked_max(jnp.abs(log_ratio), mask),
    }


def _combine(first: Stats, second: Stats) -> Stats:
    """Statistics of two sets of answers: maxima of the maxima, sums of the rest; all 0 is the empty set."""
    return {
        name: jnp.maximum(value, second[name]) if name.endswith("_max") else value + second[name]
        for name, value in first.items()
    }


def loss_and_gradients(
    params: Params, ref_params: Params, minibatch: Experience, kl_coef: Float[Array, ""], objective: Objective
) -> tuple[Float[Array, ""], Stats, Params]:
    """Loss, statistics and gradients of a minibatch, accumulated over its micro-batches."""
    weights = objective.loss_weights(minibatch.response_mask, dtype=minibatch.old_logprobs.dtype)
    in_micro_batches = micro_batches((minibatch, weights), objective.micro_batch_size)

    def evaluate(micro_batch):
        (policy, reference), micro_batch = gather_again((params, ref_params), micro_batch)
        (loss, stats), gradients = jax.value_and_grad(policy_loss, has_aux=True)(
            policy, reference, *micro_batch, kl_coef, objective
        )
        return loss, stats, by_rules(gradients)

    def accumulate(total, micro_batch):
        loss, stats, gradients = evaluate(micro_batch)
        added_gradients = jax.tree.map(jnp.add, total[2], gradients)
        return (total[0] + loss, _combine(total[1], stats), added_gradients), None

    first = jax.tree.map(lambda x: x[0], in_micro_batches)
    if weights.shape[0] == objective.micro_batch_size:
        return evaluate(first)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(evaluate, first))
    return jax.lax.scan(accumulate, nothing, in_micro_batches)[0]


@partial(jax.jit, static_argnames=("optimizer", "objective"), donate_argnames=("params", "opt_state"))
def ppo_step(
    params: Params,
    opt_state: optax.OptState,
    ref_params: Params,
    experience: Experience,
    rows: Int[Array, " minibatch"],
    kl_coef: Float[Array, ""],
    *,
    optimizer: optax.GradientTransformation,
    objective: Objective,
) -> tuple[Params, optax.OptState, Stats]:
    """One optimizer step on the answers `rows` of the batch; the old parameters' memory is reused.

    A step whose loss or gradient is not finite leaves parameters and moments as they were and is counted as skipped.
    """
    note_compilation(
        "update", B=rows.shape[0], P=experience.prompt_tokens.shape[1], T=experience.response_tokens.shape[1]
    )
    minibatch = by_rows(jax.tree.map(lambda x: x[rows], experience))
    loss, sums, gradients = loss_and_gradients(params, ref_params, minibatch, kl_coef, objective)
    grad_norm = optax.tree.norm(gradients)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to an integer count, which strict mode refuses
        updates, new_opt_state = optimizer.update(gradients, opt_state, params)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), updates)
    new_opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_opt_state, opt_state)
    stats = {
        "loss/policy": sums["loss_policy"],
        "loss/kl": sums["loss_kl"],
        "policy/clip_frac": sums["clipped_tokens"] / sums["tokens"],
        "policy/approx_kl_nats": sums["approx_kl_nats"] / sums["tokens"],
        "policy/ratio_max": sums["ratio_max"],
        "policy/log_ratio_abs_max": sums["log_ratio_abs_max"],
        "update/grad_norm": grad_norm,
        "update/param_rel_change": optax.tree.norm(updates) / optax.tree.norm(params),
        "update/skipped_steps": ~finite,
    }
    # Held to their places: a moment that XLA left somewhere else would not fit the memory it came from.
    return by_rules(optax.apply_updates(params, updates)), by_rules(new_opt_state), stats


def update(
    state: TrainState,
    ref_params: Params,
    experience: Experience,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    objective: Objective,
) -> tuple[TrainState, list[Stats]]:
    """Epochs of shuffled minibatches over one batch; statistics of every optimizer step in order.

    `state` is consumed: its buffers are donated. The shuffle is a function of (seed, step, epoch).
    """
    batch, size = config.rollout.batch_size, config.update.minibatch_size
    kl_coef = jnp.asarray(config.kl.coef, experience.old_logprobs.dtype)
    params, opt_state, all_stats = state.params, state.opt_state, []
    for epoch in range(config.update.epochs):
        key = jax.random.fold_in(purpose_key(config.run.seed, state.step, Purpose.SHUFFLE), epoch)
        order = np.asarray(jax.random.permutation(key, batch))
        for start in range(0, batch, size):
            params, opt_state, stats = ppo_step(
                params,
                opt_state,
                ref_params,
                experience,
                order[start : start + size],
                kl_coef,
                optimizer=optimizer,
                objective=objective,
            )
            all_stats.append(stats)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), all_stats


def summarise(steps: list[dict[str, float]]) -> dict[str, float]:
    """One iteration's numbers: means over its optimizer steps, maxima of maxima, sums of counts and of changes."""
    summary: dict[str, float] = {}
    for name in steps[0]:
        values = [step[name] for step in steps]
        if name.endswith("_max"):
            summary[name] = max(values)
        elif name in ("update/param_rel_change", "update/skipped_steps"):
            summary[name] = sum(values)
        else:
            summary[name] = sum(values) / len(values)
    return summary | {"update/optimizer_steps": len(steps)}
