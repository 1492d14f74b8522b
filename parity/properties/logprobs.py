"""Log-probs of logits; what a model adds to them (padding, causality) is in `models`."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from parity.planting import Mutant
from parity.properties.draws import ROWS, TEMPERATURES, VOCAB, drawn, in_sixty_fourths, log_softmax, logits, matrices
from parity.properties.kl import UNSTABLE
from parity.properties.rows import Excess, Property, bug, differ, excess, forbid, worst
from parity.properties.stack import Stack, op


def _rounding(stack: Stack, logits: np.ndarray, temperature: float) -> np.ndarray:
    """What rounding does to the log-probs of every row, [rows, 1]."""
    return 4 * stack.eps * (2 + np.abs(logits).max(-1, keepdims=True) / temperature)


def probabilities_sum_to_one(stack: Stack, *, logits: np.ndarray, temperature: float) -> Excess:
    log_probs = stack.log_distribution(logits, temperature=temperature).astype(np.float64)
    return differ(np.exp(log_probs).sum(-1), 1.0, _rounding(stack, logits, temperature)[:, 0])


def log_probs_are_never_positive(stack: Stack, *, logits: np.ndarray, tokens: np.ndarray, temperature: float) -> Excess:
    """But for rounding: compiled, z / τ may be rounded in the maximum and not (fused) in what it is taken from."""
    ours = stack.token_logprobs(logits, tokens, temperature=temperature)
    return excess(ours, _rounding(stack, logits, temperature)[:, 0])


def every_token_gets_its_own_log_prob(
    stack: Stack, *, logits: np.ndarray, tokens: np.ndarray, temperature: float
) -> Excess:
    """Its gradient is that of a log-softmax: 1 at the token, minus the probabilities."""
    expected = log_softmax(logits, temperature)
    ours, (gradient,) = stack.differentiate(op("token_logprobs"), logits, tokens, temperature=temperature)
    expected_gradient = (np.eye(VOCAB)[tokens] - np.exp(expected)) / temperature
    rounding = _rounding(stack, logits, temperature)
    return worst(
        differ(ours, expected[np.arange(ROWS), tokens], rounding[:, 0]),
        differ(gradient, expected_gradient, rounding / temperature),
    )


def log_probs_ignore_a_constant_per_row(stack: Stack, *, logits: np.ndarray, shift: float) -> Excess:
    logits = in_sixty_fourths(logits)
    shifted = stack.log_distribution(logits + np.float32(shift), temperature=1.0)
    return differ(shifted, stack.log_distribution(logits, temperature=1.0), _rounding(stack, logits, 1.0))


def temperature_is_a_scaling_of_the_logits(
    stack: Stack, *, logits: np.ndarray, ref_logits: np.ndarray, tokens: np.ndarray
) -> Excess:
    """Of every function of logits; by powers of two, so exactly."""
    hot = stack.run(_functions_of_logits, logits, ref_logits, tokens, temperature=2.0)
    halved = stack.run(_functions_of_logits, logits / 2, ref_logits / 2, tokens, temperature=1.0)
    return worst(*(differ(x, y) for x, y in zip(hot, halved, strict=True)))


def _functions_of_logits(ops: Any, logits: Any, ref_logits: Any, tokens: Any, *, temperature: float) -> Any:
    return (
        ops.log_distribution(logits, temperature=temperature),
        ops.token_logprobs(logits, tokens, temperature=temperature),
        ops.entropy(logits, temperature=temperature),
        ops.exact_token_kl(logits, ref_logits, temperature=temperature),
        ops.truncated_weights(logits, temperature=temperature, top_p=0.9, top_k=5),
    )


def entropy_is_the_expected_surprise(stack: Stack, *, logits: np.ndarray, banned: np.ndarray) -> Excess:
    """A token of probability 0 adds nothing, to value or gradient."""
    logits = np.where(banned & (logits < logits.max(-1, keepdims=True)), np.float32(-np.inf), logits)
    log_p = log_softmax(logits, 0.7)
    p = np.exp(log_p)
    surprise = -np.where(p > 0, log_p, 0.0)
    expected = (p * surprise).sum(-1)
    rounding = 8 * stack.eps * (2 + surprise.max(-1) + np.abs(np.where(np.isinf(logits), 0, logits)).max(-1) / 0.7)
    ours, (gradient,) = stack.differentiate(op("entropy"), logits, temperature=0.7)
    return worst(
        differ(ours, expected, rounding * (1 + expected)),
        forbid(~np.isfinite(gradient)),
        excess(np.abs(gradient[np.isinf(logits)])),
    )


def streamed_equals_whole(
    stack: Stack, *, hidden: np.ndarray, head: np.ndarray, tokens: np.ndarray, block_rows: int
) -> Excess:
    """Log-probs of hidden states, block by block of the rows; nothing of the last block's padding in the gradient."""
    inputs = (hidden, head, tokens)
    ours, gradients = stack.differentiate(_streamed, *inputs, block_rows=block_rows)
    whole, whole_gradients = stack.differentiate(_whole, *inputs)
    largest = 1 + max(np.abs(hidden).max(), np.abs(head).max())
    rounding = 16 * stack.eps * largest**2 * hidden.shape[-1]
    found = [differ(x, y, rounding * tokens.size * largest) for x, y in zip(gradients, whole_gradients, strict=True)]
    return worst(differ(ours, whole, rounding), *found)


def _streamed(ops: Any, hidden: Any, head: Any, tokens: Any, *, block_rows: int) -> Any:
    def rowwise(hidden: Any, tokens: Any) -> Any:
        return ops.token_logprobs(hidden @ head, tokens, temperature=0.7)

    return ops.map_row_blocks(rowwise, hidden, tokens, block_rows=block_rows)


def _whole(ops: Any, hidden: Any, head: Any, tokens: Any) -> Any:
    return ops.token_logprobs(hidden @ head, tokens, temperature=0.7)


TOKENS = arrays(np.int32, ROWS, elements=st.integers(0, VOCAB - 1))
BATCH, LENGTH, WIDTH = 3, 5, 4

PROPERTIES = (
    Property(
        probabilities_sum_to_one,
        drawn(logits=logits(), temperature=TEMPERATURES),
        bug(
            "log-softmax before the temperature",
            "log_distribution",
            ("log_softmax(wide / temperature, axis=-1)", "log_softmax(wide, axis=-1) / temperature"),
            ("log_softmax(wide / temperature, dim=-1)", "log_softmax(wide, dim=-1) / temperature"),
        ),
    ),
    Property(
        log_probs_are_never_positive,
        drawn(logits=logits(), tokens=TOKENS, temperature=TEMPERATURES),
        bug(
            "likelihood loss for log-prob",
            "token_logprobs",
            ("return _entries", "return -_entries"),
            ("return log_probs", "return -log_probs"),
        ),
    ),
    Property(
        every_token_gets_its_own_log_prob,
        drawn(logits=logits(), tokens=TOKENS, temperature=TEMPERATURES),
        bug(
            "the next token's",
            "token_logprobs",
            ("temperature), tokens", "temperature), jnp.roll(tokens, 1)"),
            ("tokens.long()[..., None]", "tokens.long().roll(1)[..., None]"),
        ),
    ),
    Property(
        log_probs_ignore_a_constant_per_row,
        drawn(logits=logits(1.0, 8.0), shift=st.sampled_from([-1024.0, 0.5, 8192.0])),
        UNSTABLE,
    ),
    Property(
        temperature_is_a_scaling_of_the_logits,
        drawn(logits=logits(), ref_logits=logits(), tokens=TOKENS),
        [
            *bug("no temperature", "log_distribution", ("wide / temperature", "wide")),
            *bug("entropy not at the temperature", "entropy", ("temperature=temperature", "temperature=1.0")),
            *bug("cuts not at the temperature", "truncated_weights", ("temperature=temperature", "temperature=1.0")),
        ],
    ),
    Property(
        entropy_is_the_expected_surprise,
        drawn(logits=logits(1.0, 8.0), banned=arrays(np.bool_, (ROWS, VOCAB))),
        bug(
            "0 · (−inf)",
            "entropy",
            ("jnp.where(probs > 0, log_probs, jnp.zeros((), log_probs.dtype))", "log_probs"),
            ("log_probs.masked_fill(probs == 0, 0.0)", "log_probs"),
        ),
    ),
    Property(
        streamed_equals_whole,
        drawn(
            hidden=matrices((BATCH, LENGTH, WIDTH), 3.0),
            head=matrices((WIDTH, VOCAB), 3.0),
            tokens=arrays(np.int32, (BATCH, LENGTH), elements=st.integers(0, VOCAB - 1)),
            block_rows=st.just(6),
        ),
        [
            Mutant(
                "rows of a block in the wrong order",
                "ppo_jax.ops.streaming:map_row_blocks",
                "jnp.moveaxis(x, 0, 1).reshape(",
                "x.reshape(",
            ),
        ],
        stacks=("JAX",),
    ),
)
