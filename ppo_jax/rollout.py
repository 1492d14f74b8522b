"""Step 1: the current policy answers the prompts. Prefill, then one token at a time, all of it on the device.

One compiled call per (batch, prompt bucket): it ends when every row has ended, and nothing returns to the host before
that. The log-probs kept here are those of the full temperature-scaled policy, whatever the sampler cut away.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.decoder import (
    Cache,
    Decoder,
    DecoderSpec,
    Params,
    cast,
    causal_visibility,
    head_logits,
    positions_from_mask,
)
from ppo_jax.models.lora import Adapter, policy_params
from ppo_jax.ops.logprobs import log_distribution, wide_dtype
from ppo_jax.ops.sampling import inverse_cdf, truncated_weights
from ppo_jax.records import EOS, STOP_STRING, TRUNCATED, Rollout
from ppo_jax.sharding import by_rows, by_width, row_shards
from ppo_jax.tracing import note_compilation


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; fixed for a run, so compiled in."""

    min_new_tokens: int
    temperature: float
    top_p: float
    top_k: int


@struct.dataclass
class Endings:
    """What ends an answer.

    `stop_table[s, q, v]` is how far stop string s is matched after token v, when it was matched as far as q before; the
    last q is complete. The table is over whole tokens, so a string may begin and end inside of tokens.
    """

    eos_tokens: Int[Array, " E"]
    stop_table: Int[Array, "strings states V"]


@struct.dataclass
class _Answers:
    """What is known of the answers before the first token."""

    prompt_mask: Bool[Array, "B P"]
    prompt_lengths: Int[Array, " B"]
    uniforms: Float[Array, "B T"]


@struct.dataclass
class _Progress:
    """Carry of the decode loop, with `t` tokens written."""

    t: Int[Array, ""]
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    kept_mass: Float[Array, "B T"]
    finish_reason: Int[Array, " B"]
    matched: Int[Array, "B strings"]
    running: Bool[Array, " B"]
    hidden: Float[Array, "B T D"] | None


@partial(jax.jit, static_argnames=("spec", "sampling", "compute_dtype", "keep_hidden", "halvings", "adapter"))
def generate(
    params: Params,
    prompt_tokens: Int[Array, "N P"],
    prompt_mask: Bool[Array, "N P"],
    uniforms: Float[Array, "B T"],
    endings: Endings,
    policy_version: Int[Array, ""],
    *,
    spec: DecoderSpec,
    sampling: Sampling,
    compute_dtype: str,
    keep_hidden: bool = False,
    halvings: int = 0,
    ref_params: Params = None,
    adapter: Adapter | None = None,
) -> Rollout:
    """B answers to N left-padded prompts, B / N to each, in prompt order; answers to one prompt share its prefill.

    `uniforms[b, t]` in [0, 1) decides token t of row b and nothing else, so a row does not depend on its neighbours.
    With `keep_hidden` the states that tokens were drawn from come along, in the compute dtype. Where answers end at
    different times, `halvings` spares the steps of those that have ended, each for another compiled loop. The reference
    is needed where an `adapter` is what `params` hold.
    """
    (prompts, length), (batch, max_new) = prompt_tokens.shape, uniforms.shape
    note_compilation("rollout", B=batch, P=length, T=max_new)
    params = cast(policy_params(params, ref_params, adapter), compute_dtype)  # once, not in every step of the loop
    prompt_tokens, prompt_mask, uniforms = by_rows((prompt_tokens, prompt_mask, uniforms))
    per_answer = partial(jnp.repeat, repeats=batch // prompts, axis=0)

    hidden, prompt_cache = Decoder(spec).apply(
        {"params": params}, prompt_tokens, positions_from_mask(prompt_mask), causal_visibility(prompt_mask)
    )
    room = ((0, 0), (0, 0), (0, max_new), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(per_answer(x), room), prompt_cache)
    first = by_width(per_answer(hidden[:, -1:]))[:, 0]
    prompt_tokens, prompt_mask = per_answer(prompt_tokens), per_answer(prompt_mask)
    answers = _Answers(prompt_mask, jnp.sum(prompt_mask, axis=1, dtype=jnp.int32), uniforms)

    def write(progress: _Progress, hidden, uniforms):
        if progress.hidden is not None:
            progress = replace(progress, hidden=_put(progress, progress.hidden, hidden))
        return _write_token(progress, head_logits(params, hidden, spec=spec), uniforms, endings, sampling)

    def decode(answers: _Answers, progress: _Progress, cache: Any) -> Any:
        last = progress.t - 1
        written = jnp.broadcast_to(jnp.arange(max_new, dtype=jnp.int32) <= last, answers.uniforms.shape)
        hidden, cache = Decoder(spec).apply(
            {"params": params},
            jax.lax.dynamic_slice_in_dim(progress.tokens, last, 1, axis=1),
            (answers.prompt_lengths + last)[:, None],
            jnp.concatenate([answers.prompt_mask, written], axis=1)[:, None],
            cache,
            length + last,
        )
        return write(progress, hidden[:, 0], answers.uniforms), cache

    kept = jnp.zeros((batch, max_new, spec.width), first.dtype) if keep_hidden else None
    start = write(_empty_progress(batch, max_new, endings, wide_dtype(first.dtype), kept), first, uniforms)
    done = _finish(decode, answers, start, cache, halvings=halvings)
    return Rollout(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        response_tokens=done.tokens,
        response_mask=done.mask,
        behaviour_logprobs=done.logprobs,
        kept_mass=done.kept_mass,
        finish_reason=done.finish_reason,
        group_id=per_answer(jnp.arange(prompts, dtype=jnp.int32)),
        policy_version=policy_version,
        hidden=done.hidden,
    )


def _finish(
    decode: Callable[[_Answers, _Progress, Cache], tuple[_Progress, Cache]],
    answers: _Answers,
    progress: _Progress,
    cache: Cache,
    *,
    halvings: int,
) -> _Progress:
    """The answers decoded to their ends; when half of them have ended, and that often, the other half goes on alone.

    On a mesh each device keeps half of its own: rows stay where they are.
    """
    parts = row_shards(progress.running.shape[0])

    def by_part(x: Array) -> Array:
        return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

    def half_of(x: Array) -> Array:
        if x.ndim == 0:
            return x
        kept = jax.vmap(lambda part, of: part[of])(by_part(x), rows)
        return by_rows(kept.reshape(parts * half, *x.shape[1:]))

    def put_back(x: Array, finished: Array) -> Array:
        if x.ndim == 0:
            return finished
        put = jax.vmap(lambda part, of, new: part.at[of].set(new))
        return put(by_part(x), rows, by_part(finished)).reshape(x.shape)

    half = by_part(progress.running).shape[1] // 2 if halvings else 0
    progress, cache = jax.lax.while_loop(
        lambda carry: (
            jnp.any(jnp.sum(by_part(carry[0].running), axis=1) > half) & (carry[0].t < answers.uniforms.shape[1])
        ),
        lambda carry: decode(answers, *carry),
        (progress, cache),
    )
    if not half:
        return progress
    rows = jnp.argsort(~by_part(progress.running), axis=1, stable=True)[:, :half]
    finished = _finish(decode, *jax.tree.map(half_of, (answers, progress, cache)), halvings=halvings - 1)
    return jax.tree.map(put_back, progress, finished)


def _empty_progress(batch: int, max_new: int, endings: Endings, dtype, hidden) -> _Progress:
    return _Progress(
        t=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((batch, max_new), jnp.int32),
        mask=jnp.zeros((batch, max_new), bool),
        logprobs=jnp.zeros((batch, max_new), dtype),
        kept_mass=jnp.zeros((batch, max_new), dtype),
        finish_reason=jnp.full((batch,), TRUNCATED, jnp.int32),
        matched=jnp.zeros((batch, endings.stop_table.shape[0]), jnp.int32),
        running=jnp.ones((batch,), bool),
        hidden=hidden,
    )


def _put(progress: _Progress, array: Array, value: Array) -> Array:
    """`array` with the value at token t of the running rows, and 0 of the others."""
    running = jnp.expand_dims(progress.running, range(1, value.ndim))
    column = jnp.where(running, value, jnp.zeros((), value.dtype)).astype(array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(array, column[:, None], progress.t, axis=1)


def _write_token(
    progress: _Progress,
    logits: Float[Array, "B V"],
    uniforms: Float[Array, "B T"],
    endings: Endings,
    sampling: Sampling,
) -> _Progress:
    """Draw token t of every running row, and see which rows end with it."""
    t, running = progress.t, progress.running
    may_end = t >= sampling.min_new_tokens
    is_eos = jnp.zeros(logits.shape[-1:], bool).at[endings.eos_tokens].set(True)
    weights = truncated_weights(
        jnp.where((is_eos & ~may_end)[None], -jnp.inf, logits),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
    )
    tokens = inverse_cdf(jax.lax.dynamic_index_in_dim(uniforms, t, axis=1, keepdims=False), weights).astype(jnp.int32)
    log_probs = log_distribution(logits, temperature=sampling.temperature)
    chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]
    kept = jnp.sum(jnp.where(weights > 0, jnp.exp(log_probs), jnp.zeros((), log_probs.dtype)), axis=1)

    complete = endings.stop_table.shape[1] - 1
    string = jnp.arange(endings.stop_table.shape[0])[None]
    matched = endings.stop_table[string, progress.matched, tokens[:, None]]
    # A stop string may end with the first token that reaches the minimum; an earlier one is forgotten.
    matched = jnp.where((matched == complete) & (t + 1 < sampling.min_new_tokens), 0, matched)
    by_eos, by_string = is_eos[tokens], jnp.any(matched == complete, axis=1)
    reason = jnp.where(by_eos, EOS, jnp.where(by_string, STOP_STRING, TRUNCATED))

    put = partial(_put, progress)
    return replace(
        progress,
        t=t + 1,
        tokens=put(progress.tokens, tokens),
        mask=put(progress.mask, running),
        logprobs=put(progress.logprobs, chosen),
        kept_mass=put(progress.kept_mass, kept),
        finish_reason=jnp.where(running, reason, progress.finish_reason).astype(jnp.int32),
        matched=matched,
        running=running & ~by_eos & ~by_string,
    )


def without(answers: Rollout, dropped: Bool[Array, " B"]) -> Rollout:
    """The answers with those masked whole that are dropped: rows without a response token are in no mean."""
    return replace(answers, response_mask=answers.response_mask & ~dropped[:, None])


def crop(rollout: Rollout, length: int) -> Rollout:
    """The same answers with the response axis cut to `length`, which no answer exceeds."""
    names = ("response_tokens", "response_mask", "behaviour_logprobs", "kept_mass", "hidden")
    return replace(rollout, **{name: x[:, :length] for name in names if (x := getattr(rollout, name)) is not None})
