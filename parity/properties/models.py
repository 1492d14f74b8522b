"""What padding, the order of a batch and later tokens must not change in a model's log-probs; and where answers end.

Through scoring (step 3) and the rollout (step 1) of both stacks, on the random models of `cases`.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from parity.cases import Answers, random_model
from parity.models import SIZES
from parity.planting import Mutant
from parity.properties.draws import drawn
from parity.properties.rows import Excess, Property, differ, excess, forbid, worst
from parity.properties.stack import Stack
from parity.stacks import Pair
from ppo_jax import rollout, scoring
from ppo_torch_ref import rollout as torch_rollout
from ppo_torch_ref import scoring as torch_scoring
from ppo_torch_ref.model import token_logits

BATCH, PROMPT, RESPONSE = 4, 3, 5
VOCAB_SIZE = SIZES["vocab_size"]
EOS_TOKENS = list(range(0, VOCAB_SIZE, 6))  # many, so that answers end everywhere
SCORES = ("old_logprobs", "ref_logprobs", "token_kl", "token_entropy")
TEMPERATURE = 0.7
KEPT_FILES = tempfile.TemporaryDirectory()  # until the process ends


@cache
def pair(model: str, dtype: str) -> Pair:
    root = Path(KEPT_FILES.name) / dtype
    root.mkdir(exist_ok=True)
    return Pair(random_model(model, root), dtype)


def scores(stack: Stack, model: str, answers: Answers, *, micro_batch_size: int = BATCH) -> np.ndarray:
    """Log-probs of both models, exact KL and entropy, [4, B, T]."""
    of = pair(model, stack.dtype)
    with jax.enable_x64(stack.dtype == "float64"):
        ours, theirs = of.rollouts(answers)
        options: dict[str, Any] = {"temperature": TEMPERATURE, "micro_batch_size": micro_batch_size}
        if stack.name == "torch":
            scored = torch_scoring.score(of.model, of.ref_model, theirs, **options)
        else:
            how = scoring.Scoring(spec=of.spec, compute_dtype=stack.dtype, **options)
            scored = scoring.score(of.params, of.ref_params, ours, scoring=how)
        return np.stack([np.asarray(getattr(scored, name)) for name in SCORES])


def logits(stack: Stack, model: str, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    of = pair(model, stack.dtype)
    with jax.enable_x64(stack.dtype == "float64"), torch.no_grad():
        if stack.name == "torch":
            return token_logits(of.model, torch.from_numpy(tokens), torch.from_numpy(mask)).numpy()
        return np.asarray(of.jax_logits(tokens, mask))


def generated(stack: Stack, model: str, prompts: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, ...]:
    """(tokens, mask, log-probs) of answers to prompts without padding; [B, T], cropped to the longest."""
    of, mask = pair(model, stack.dtype), np.ones(prompts.shape, bool)
    uniforms = uniforms.astype(stack.dtype)
    options: dict[str, Any] = {"min_new_tokens": 0, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    with jax.enable_x64(stack.dtype == "float64"):
        if stack.name == "torch":
            sampling = torch_rollout.Sampling(max_new_tokens=RESPONSE, eos_tokens=EOS_TOKENS, **options)
            tensors = (torch.from_numpy(x) for x in (prompts, mask, uniforms))
            answers = torch_rollout.generate(of.model, *tensors, sampling=sampling)
        else:
            answers = rollout.generate(
                of.params,
                jnp.asarray(prompts),
                jnp.asarray(mask),
                jnp.asarray(uniforms),
                rollout.Endings(jnp.array(EOS_TOKENS, jnp.int32), jnp.zeros((0, 1, VOCAB_SIZE), jnp.int32)),
                jnp.zeros((), jnp.int32),
                spec=of.spec,
                sampling=rollout.Sampling(**options),
                compute_dtype=stack.dtype,
            )
        found = (answers.response_tokens, answers.response_mask, answers.behaviour_logprobs)
        longest = int(np.asarray(answers.response_mask).sum(1).max())
        return tuple(np.asarray(x)[:, :longest] for x in found)


def rounding(stack: Stack) -> float:
    """Of a log-prob: the width of the models times what a number of theirs is rounded by."""
    return 500 * stack.eps


# ---------------------------------------------------------------------------- properties


def later_tokens_change_no_earlier_log_prob(
    stack: Stack, *, model: str, answers: Answers, other: np.ndarray, position: int
) -> Excess:
    later = np.arange(RESPONSE)[None] > position
    changed = _with(answers, response_tokens=np.where(later, other, answers.response_tokens))
    # The token drawn at `position` is scored there; what comes after it is not seen.
    base, after = (scores(stack, model, x)[:, :, : position + 1] for x in (answers, changed))
    return differ(after, base, rounding(stack))


def what_lies_under_a_pad_changes_nothing(stack: Stack, *, model: str, answers: Answers, other: np.ndarray) -> Excess:
    """Whatever the id of the pad, the EOS too."""
    changed = _with(
        answers,
        prompt_tokens=np.where(answers.prompt_mask, answers.prompt_tokens, other[:, :PROMPT]),
        response_tokens=np.where(answers.response_mask, answers.response_tokens, other),
    )
    return differ(scores(stack, model, changed), scores(stack, model, answers), rounding(stack))


def more_padding_changes_nothing(stack: Stack, *, model: str, answers: Answers) -> Excess:
    """Two columns in front of the prompts, one behind the answers."""
    pads = {"prompt": ((0, 0), (2, 0)), "response": ((0, 0), (0, 1))}
    wider = Answers(**{name: np.pad(x, pads[name.partition("_")[0]]) for name, x in vars(answers).items()})
    padded, base = scores(stack, model, wider), scores(stack, model, answers)
    return worst(differ(padded[:, :, :RESPONSE], base, rounding(stack)), excess(np.abs(padded[:, :, RESPONSE:])))


def the_side_of_the_padding_changes_nothing(
    stack: Stack, *, model: str, tokens: np.ndarray, lengths: list[int]
) -> Excess:
    """Logits of the real tokens, padded on the left, on the right, and on both sides."""
    width = tokens.shape[1]
    found = []
    for starts in ([width - n for n in lengths], [(width - n) // 2 for n in lengths]):
        first = logits(stack, model, *_placed(tokens, lengths, [0] * len(lengths)))
        other = logits(stack, model, *_placed(tokens, lengths, starts))
        found += [
            differ(other[row, start : start + n], first[row, :n], rounding(stack))
            for row, (start, n) in enumerate(zip(starts, lengths, strict=True))
        ]
    return worst(*found)


def _placed(tokens: np.ndarray, lengths: list[int], starts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    placed, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        placed[row, start : start + n], mask[row, start : start + n] = tokens[row, :n], True
    return placed, mask


def a_batch_in_another_order_has_the_same_scores(
    stack: Stack, *, model: str, answers: Answers, order: list[int]
) -> Excess:
    """In micro-batches of any size."""
    shuffled = Answers(**{name: x[order] for name, x in vars(answers).items()})
    base = scores(stack, model, answers)[:, order]
    return differ(scores(stack, model, shuffled, micro_batch_size=2), base, rounding(stack))


def nothing_but_padding_follows_an_eos(
    stack: Stack, *, model: str, prompts: np.ndarray, uniforms: np.ndarray
) -> Excess:
    """The mask ends with the EOS, which is in it; behind it tokens and log-probs are 0."""
    tokens, mask, logprobs = generated(stack, model, prompts, uniforms)
    is_eos = np.isin(tokens, EOS_TOKENS) & mask
    ended_before = np.pad(is_eos.cumsum(1) > 0, ((0, 0), (1, 0)))[:, :-1]
    return worst(forbid(mask == ended_before), forbid(tokens[~mask]), excess(np.abs(logprobs[~mask])))


# ---------------------------------------------------------------------------- cases and mutants

MODELS = st.sampled_from(["llama-tied", "gpt2"])  # relative and absolute positions


def ids(*shape: int) -> Any:
    return arrays(np.int32, shape, elements=st.integers(0, VOCAB_SIZE - 1))


@st.composite
def ragged(draw) -> Answers:
    """Left-padded prompts of a token at least, right-padded answers."""
    prompt_lengths = np.array(draw(st.lists(st.integers(1, PROMPT), min_size=BATCH, max_size=BATCH)))
    lengths = np.array(draw(st.lists(st.integers(0, RESPONSE), min_size=BATCH, max_size=BATCH)))
    return Answers(
        prompt_tokens=draw(ids(BATCH, PROMPT)),
        prompt_mask=np.arange(PROMPT)[None] >= PROMPT - prompt_lengths[:, None],
        response_tokens=draw(ids(BATCH, RESPONSE)),
        response_mask=np.arange(RESPONSE)[None] < lengths[:, None],
    )


def _with(answers: Answers, **changes: np.ndarray) -> Answers:
    return Answers(**(vars(answers) | changes))


def model_property(check: Any, mutants: list[Mutant], *, dtype: str = "float64", **case: Any) -> Property:
    return Property(check, drawn(model=MODELS, **case), mutants, dtypes=(dtype,), max_examples=4)


DECODER, TWIN = "ppo_jax.models.decoder:", "ppo_torch_ref.model:"
POSITIONS_OF_COLUMNS = [
    Mutant(
        "positions count padding",
        DECODER + "positions_from_mask",
        "jnp.cumsum(token_mask",
        "jnp.cumsum(token_mask | True",
    ),
    Mutant("positions count padding", TWIN + "positions_from_mask", "token_mask.long()", "(token_mask | True).long()"),
]

PROPERTIES = (
    model_property(
        later_tokens_change_no_earlier_log_prob,
        [
            Mutant("every token sees all", DECODER + "causal_visibility", "jnp.tril(jnp.ones((length, length), bool))",
                   "jnp.ones((length, length), bool)"),
            Mutant("every token sees all", TWIN + "causal_visibility", ".tril()", ""),
        ],
        answers=ragged(), other=ids(BATCH, RESPONSE), position=st.integers(0, RESPONSE - 2),
    ),
    model_property(
        what_lies_under_a_pad_changes_nothing,
        [
            Mutant("padding is attended", DECODER + "causal_visibility", "& token_mask", "& (token_mask | True)"),
            Mutant("padding is attended", TWIN + "causal_visibility", "& token_mask", "& (token_mask | True)"),
        ],
        answers=ragged(), other=ids(BATCH, RESPONSE),
    ),
    model_property(more_padding_changes_nothing, POSITIONS_OF_COLUMNS, answers=ragged()),
    model_property(
        the_side_of_the_padding_changes_nothing,
        POSITIONS_OF_COLUMNS,
        tokens=ids(BATCH, PROMPT + RESPONSE),
        lengths=st.lists(st.integers(1, PROMPT + RESPONSE), min_size=BATCH, max_size=BATCH),
    ),
    model_property(
        a_batch_in_another_order_has_the_same_scores,
        [
            Mutant("micro-batches put together in another order", "ppo_jax.ops.streaming:merge_micro_batches",
                   "jnp.swapaxes(x, 0, 1).reshape", "x.reshape"),
            Mutant("micro-batches put together in another order", "ppo_torch_ref.scoring:score",
                   "for part in parts]) for name", "for part in parts[::-1]]) for name"),
        ],
        answers=ragged(), order=st.permutations(range(BATCH)),
    ),
    model_property(
        nothing_but_padding_follows_an_eos,
        [
            Mutant("goes on after the EOS", "ppo_jax.rollout:_write_token", "running & ~by_eos & ~by_string",
                   "running & ~by_string"),
            Mutant("goes on after the EOS", "ppo_torch_ref.rollout:generate",
                   "running & ~torch.isin(drawn, eos_tokens)", "running"),
        ],
        dtype="float32",
        prompts=ids(BATCH, PROMPT),
        uniforms=arrays(np.float32, (BATCH, RESPONSE), elements=st.floats(0, 0.875, width=32, allow_subnormal=False)),
    ),
)  # fmt: skip
