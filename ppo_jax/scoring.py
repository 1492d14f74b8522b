"""Step 3: what policy and reference say of the sampled tokens, over response tokens only.

Both models give hidden states [B, T, D]; their heads are streamed together over blocks of rows, so that log-probs,
entropy and the exact KL of the whole vocabulary are computed without a [B, T, V] array of either.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppo_jax.models.critic import cast_trunks
from ppo_jax.models.decoder import DecoderSpec, Params, cast, head_logits, response_hidden
from ppo_jax.models.lora import Adapter, policy_params
from ppo_jax.ops.kl import exact_token_kl
from ppo_jax.ops.logprobs import entropy, token_logprobs
from ppo_jax.ops.masking import zero_masked
from ppo_jax.ops.streaming import (
    at_shortest_axis,
    map_row_blocks,
    merge_micro_batches,
    micro_batches,
    rows_per_block,
    shortest_together,
    with_length,
)
from ppo_jax.records import TRUNCATED, Rollout, Scored
from ppo_jax.sharding import by_rows, device_count, gather_again
from ppo_jax.tracing import note_compilation


@dataclass(frozen=True)
class Scoring:
    """How answers are scored; fixed for a run, so compiled in."""

    spec: DecoderSpec
    temperature: float
    compute_dtype: str
    micro_batch_size: int  # answers that go through the models at a time; it divides B and changes no number
    min_new_tokens: int = 0  # no answer is shorter but those of none: nothing is compiled for shorter ones
    adapter: Adapter | None = None  # where one is what is trained: `params` hold it, and it is laid over the reference


@partial(jax.jit, static_argnames=("scoring", "keep_ref_hidden", "values", "bootstrap"))
def score(
    params: Params,
    ref_params: Params,
    rollout: Rollout,
    *,
    scoring: Scoring,
    keep_ref_hidden: bool = False,
    values: Callable[..., Float[Array, "B T"]] | None = None,
    bootstrap: bool = False,
) -> Scored:
    """Log-probs [B, T] of both models, entropy of the policy and exact KL(policy || reference), in nats per token.

    The forward is the one of the update, not the rollout's, so that the ratio of the first optimizer step is 1; a
    rollout that brings its `hidden` states spares the policy's, and leaves that ratio to rounding. With
    `keep_ref_hidden` the reference's hidden states come along, in the compute dtype: its distribution, B x T x V
    numbers, is never stored. `values` is a critic's function of (params, policy's hidden states, sequences); with
    `bootstrap` the states behind truncated answers are valued too.
    """
    spec, temperature, compute_dtype = scoring.spec, scoring.temperature, scoring.compute_dtype
    batch, length = rollout.response_tokens.shape
    note_compilation("score", B=batch, P=rollout.prompt_tokens.shape[1], T=length)
    params, ref_params = cast_trunks(params, compute_dtype), cast(ref_params, compute_dtype)

    def score_answers(answers):
        (trained, reference), answers = gather_again((params, ref_params), answers)
        policy = policy_params(trained, reference, scoring.adapter)
        sequences, kept_hidden, truncated = answers

        def at_length(short):
            kept = None if kept_hidden is None else with_length(kept_hidden, short)
            scored = score_models(policy, reference, _at_length(sequences, short), kept, truncated)
            return jax.tree.map(lambda x: with_length(x, length) if x.ndim > 1 else x, scored)

        return at_shortest_axis(at_length, sequences[-1], min_new_tokens=scoring.min_new_tokens)

    def score_models(policy, reference, sequences, kept_hidden, truncated):
        _, _, response_tokens, response_mask = sequences
        short = response_mask.shape[1]

        def score_rows(hidden, ref_hidden, tokens):
            logits = head_logits(policy, hidden, spec=spec)
            ref_logits = head_logits(reference, ref_hidden, spec=spec)
            return Scored(
                old_logprobs=token_logprobs(logits, tokens, temperature=temperature),
                ref_logprobs=token_logprobs(ref_logits, tokens, temperature=temperature),
                token_kl=exact_token_kl(logits, ref_logits, temperature=temperature),
                token_entropy=entropy(logits, temperature=temperature),
            )

        ref_hidden = response_hidden(reference, *sequences, spec=spec)
        # The state behind an answer is seen by giving every answer one more column, which nothing else looks at.
        seen = _at_length(sequences, short + 1) if bootstrap else sequences
        hidden = response_hidden(policy, *seen, spec=spec) if kept_hidden is None else kept_hidden
        scored = map_row_blocks(
            score_rows,
            hidden[:, :short],
            ref_hidden,
            response_tokens,
            block_rows=rows_per_block(spec.vocab_size, devices=device_count()),
        )
        scored = jax.tree.map(lambda x: zero_masked(x, response_mask), scored)
        if keep_ref_hidden:
            scored = replace(scored, ref_hidden=ref_hidden)
        if values is not None:
            of_states = values(policy, hidden, seen)
            scored = replace(scored, values=zero_masked(of_states[:, :short], response_mask))
            if bootstrap:
                behind = jnp.take_along_axis(of_states, jnp.sum(response_mask, axis=1, keepdims=True), axis=1)
                scored = replace(scored, bootstrap_values=zero_masked(behind[:, 0], truncated))
        return scored

    sequences = (rollout.prompt_tokens, rollout.prompt_mask, rollout.response_tokens, rollout.response_mask)
    order = shortest_together(rollout.response_mask, scoring.micro_batch_size)
    answers = (sequences, rollout.hidden, rollout.finish_reason == TRUNCATED)
    answers = by_rows(jax.tree.map(lambda x: x[order], answers))
    scored = merge_micro_batches(jax.lax.map(score_answers, micro_batches(answers, scoring.micro_batch_size)))
    return by_rows(jax.tree.map(lambda x: x[jnp.argsort(order)], scored))


def _at_length(sequences: Any, length: int) -> Any:
    """Sequences with their responses cut, or given masked columns, to a length."""
    *prompts, tokens, mask = sequences
    return (*prompts, with_length(tokens, length), with_length(mask, length))
