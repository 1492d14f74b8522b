"""Levels L11 and L12 of a model: both stacks sample from the same uniforms, and the training forward agrees with what
sampling said of its tokens.

The twin has no cache: where both draw the same tokens, nothing in the cache of `ppo_jax` was stale or out of place.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import torch

from parity.cases import ragged_answers
from parity.forward import TEMPERATURE
from parity.rows import Row, bound_of, named, numpy_of, row_of
from parity.stacks import Pair
from ppo_jax import records, rollout, scoring
from ppo_torch_ref import ops as torch_ops
from ppo_torch_ref import rollout as torch_rollout
from ppo_torch_ref.model import response_logits

PROMPTS, ANSWERS_PER_PROMPT = 4, 2
SAMPLING = torch_rollout.Sampling(
    max_new_tokens=24,  # beyond the windows of the random models
    min_new_tokens=2,
    temperature=TEMPERATURE,
    top_p=0.9,
    top_k=20,
    eos_tokens=[0, 3, 5, 8, 13, 21],  # half of the answers have ended early
)


@cache
def jax_rollout(pair: Pair) -> records.Rollout:
    """Answers of `ppo_jax`, with its cache: several to a prompt, ragged prompts, a banned EOS, top-k and top-p.

    When half of them have ended, the other half is decoded on alone.
    """
    prompts = ragged_answers(pair.case.vocab_size, batch=PROMPTS)
    return rollout.generate(
        pair.params,
        jnp.asarray(prompts.prompt_tokens),
        jnp.asarray(prompts.prompt_mask),
        jnp.asarray(uniforms(pair)),
        rollout.Endings(
            eos_tokens=jnp.asarray(SAMPLING.eos_tokens, jnp.int32),
            stop_table=jnp.zeros((0, 1, pair.case.vocab_size), jnp.int32),
        ),
        jnp.zeros((), jnp.int32),
        spec=pair.spec,
        sampling=rollout.Sampling(
            min_new_tokens=SAMPLING.min_new_tokens,
            temperature=SAMPLING.temperature,
            top_p=SAMPLING.top_p,
            top_k=SAMPLING.top_k,
        ),
        compute_dtype=pair.dtype,
        keep_hidden=True,
        halvings=1,
    )


def torch_rollout_of(pair: Pair) -> torch_rollout.Rollout:
    """Answers of the twin to the same prompts, from the same uniforms."""
    prompts = ragged_answers(pair.case.vocab_size, batch=PROMPTS)
    tokens, mask = (
        torch.from_numpy(x).repeat_interleave(ANSWERS_PER_PROMPT, dim=0)
        for x in (prompts.prompt_tokens, prompts.prompt_mask)
    )
    return torch_rollout.generate(pair.model, tokens, mask, torch.from_numpy(uniforms(pair)), sampling=SAMPLING)


def uniforms(pair: Pair) -> np.ndarray:
    shape = (PROMPTS * ANSWERS_PER_PROMPT, SAMPLING.max_new_tokens)
    return np.random.default_rng(0).random(shape).astype(pair.dtype)


def same_tokens(pair: Pair) -> Iterator[Row]:
    """L11: both draw the same tokens, and say the same of them.

    A token that rounding may decide (its uniform lies within the margin of another token's interval) is excused and
    counted in the name; from there on an answer is another one and is not compared.
    """
    theirs = torch_rollout_of(pair)
    width = theirs.response_tokens.shape[1]
    cropped = rollout.crop(jax_rollout(pair), width)
    beyond_width = {"longest answer": np.array(numpy_of(jax_rollout(pair).response_mask)[:, width:].any())}
    yield row_of(
        pair, "L11", "length of the longest answer", beyond_width, {"longest answer": np.array(False)}, bound=0.0
    )
    ours, twin = (named({name: getattr(x, name) for name in vars(theirs)}) for x in (cropped, theirs))
    differs = (ours["response_tokens"] != twin["response_tokens"]) | (ours["response_mask"] != twin["response_mask"])
    parted = {row: int(np.argmax(differs[row])) for row in np.flatnonzero(differs.any(axis=1)).tolist()}
    tokens, twin_tokens = ours["response_tokens"], twin["response_tokens"]
    excused = sum(
        tokens[row, t] != twin_tokens[row, t] and _decided_by_rounding(pair, theirs, row, t, tokens[row, t])
        for row, t in parted.items()
    )
    shared = ours["response_mask"] & (np.cumsum(differs, axis=1) == 0)
    counted = f"{int(shared.sum())} tokens the same, {excused} excused"
    yield row_of(
        pair,
        "L11",
        "tokens from the same uniforms",
        {counted: np.array(len(parted) - excused)},
        {counted: np.array(0)},
        bound=0.0,
    )
    sides = ({name: x[name][shared] for name in ("behaviour_logprobs", "kept_mass")} for x in (ours, twin))
    limit = bound_of("L4", pair.dtype, is_real=pair.case.is_real)
    yield row_of(pair, "L11", "log-probs and kept mass of the tokens", *sides, bound=limit)
    ended = ({"finish_reason": np.delete(x["finish_reason"], list(parted))} for x in (ours, twin))
    yield row_of(pair, "L11", "how the answers ended", *ended, bound=0.0)


def _decided_by_rounding(pair: Pair, theirs: torch_rollout.Rollout, row: int, t: int, ours: int) -> bool:
    """Whether the twin too would have drawn this token, had the uniform or top-p been another one by the margin."""
    margin = bound_of("L11", pair.dtype, is_real=pair.case.is_real)
    names = ("prompt_tokens", "prompt_mask", "response_tokens", "response_mask")
    prompt_tokens, prompt_mask, tokens, mask = (getattr(theirs, name)[[row]] for name in names)
    with torch.no_grad():
        logits = response_logits(pair.model, prompt_tokens, prompt_mask, tokens[:, : t + 1], mask[:, : t + 1])[:, -1]
    if t < SAMPLING.min_new_tokens:
        logits[:, SAMPLING.eos_tokens] = -torch.inf
    noise = torch.from_numpy(uniforms(pair)[[row], t]).double()
    cuts = {"temperature": SAMPLING.temperature, "top_k": SAMPLING.top_k}
    drawn = set()
    for shift in (-margin, 0.0, margin):
        weights = torch_ops.truncated_weights(logits, top_p=SAMPLING.top_p + shift, **cuts)
        drawn |= {int(torch_ops.inverse_cdf(noise + other, weights)) for other in (-margin, 0.0, margin)}
    return int(ours) in drawn


def ratio_is_one(pair: Pair) -> Iterator[Row]:
    """L12: the rollout, by way of the cache, and scores from its states against the training forward."""
    answers = jax_rollout(pair)
    whole = replace(answers, hidden=None)  # which scoring must then compute
    from_states, scored = (
        scoring.score(
            pair.params,
            pair.params,
            given,
            scoring=scoring.Scoring(
                spec=pair.spec, temperature=TEMPERATURE, compute_dtype=pair.dtype, micro_batch_size=2
            ),
        )
        for given in (answers, whole)
    )
    mask = numpy_of(answers.response_mask)
    rolled, trained = (numpy_of(x)[mask] for x in (answers.behaviour_logprobs, scored.old_logprobs))
    yield row_of(pair, "L12", "rollout and training log-probs", {"log-prob": rolled}, {"log-prob": trained})
    names = ("old_logprobs", "ref_logprobs", "token_kl", "token_entropy")
    reused, computed = ({name: numpy_of(getattr(x, name)) for name in names} for x in (from_states, scored))
    yield row_of(pair, "L12", "scores from the rollout's states", reused, computed)
