"""What is done to scores before they are rewards: normalised, clipped, less penalties."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from parity.properties.draws import answers, drawn, floats, in_sixty_fourths, matrices, poisoned, size_of
from parity.properties.rows import Excess, Property, bug, differ, excess, forbid, worst
from parity.properties.stack import Stack

BATCH = 6
MIN_TOKENS, SOFT_MAX_TOKENS, MAX_TOKENS = 4, 5, 9
PENALTY = 0.7


def _seen(ops: Any, scores: Any, *batches: Any) -> Any:
    """The moments of the scores of some batches, each the rows of one mask."""
    moments = ops.first_moments(scores.dtype)
    for answered in batches:
        moments = ops.merged_moments(moments, scores, answered)
    return moments


def _normalised(ops: Any, scores: Any, *batches: Any) -> Any:
    return ops.normalised_scores(scores, _seen(ops, scores, *batches))


def merged_moments_are_those_of_the_union(
    stack: Stack, *, scores: np.ndarray, part: np.ndarray, poison: float
) -> Excess:
    """Of any split into three, empty parts too; part 3 is no answer at all."""
    dirty = np.where(part == 3, np.float32(poison), scores)
    count, mean, m2 = stack.run(_seen, dirty, *(part == i for i in range(3)))
    kept = scores[part < 3].astype(np.float64)
    size = np.abs(scores).max()
    return worst(
        differ(count, kept.size),
        differ(mean, kept.mean() if kept.size else 0.0, 16 * stack.eps * size),
        differ(m2, kept.var() * kept.size if kept.size else 0.0, 64 * stack.eps * kept.size * size**2),
    )


def equal_scores_however_large_are_normalised_to_zero(stack: Stack, *, value: float, n: int) -> Excess:
    """In one batch or in three; the mean of n equal numbers is not that number. A single one too."""
    scores, first = np.full(n, np.float32(value)), np.arange(n) == 0
    split = stack.run(_normalised, scores, *((np.arange(n) >= i * n // 3) | first for i in range(3)))
    single = stack.run(_normalised, scores, first, first & False, first & False)
    return worst(excess(np.abs(split)), excess(np.abs(single)))


def normalised_scores_undo_an_affine_map(
    stack: Stack, *, scores: np.ndarray, part: np.ndarray, scale: float, shift: float
) -> Excess:
    """To within the epsilon beside the variance; over the population (ddof 0)."""
    scores = in_sixty_fourths(scores)
    answered = part < 3
    kept = scores[answered].astype(np.float64)
    if not kept.size:
        return Excess(0.0, 0.0)
    mapped = np.float32(scale) * scores + np.float32(shift)
    batches = (answered, answered & False, answered & False)
    ours = stack.run(_normalised, mapped, *batches)[answered]
    expected = scale * (kept - kept.mean()) / np.sqrt(scale**2 * kept.var() + 1e-8)
    spread = max(kept.std() * abs(scale), 1e-4)
    return differ(ours, expected, 32 * stack.eps * (1 + np.abs(mapped).max() / spread))


def clipped_scores_are_bounded_and_stay_so(stack: Stack, *, scores: np.ndarray, bound: float) -> Excess:
    """Idempotent, odd, and the identity within the bound."""
    once = stack.clipped_scores(scores, bound=bound)
    within = np.abs(scores) <= bound
    return worst(
        excess(np.abs(once) - bound),
        differ(stack.clipped_scores(once, bound=bound), once),
        differ(stack.clipped_scores(-scores, bound=bound), -once),
        differ(once[within], scores[within]),
        differ(np.abs(once[~within]), np.float64(bound)),
    )


def _penalties(ops: Any, lengths: Any, ended: Any) -> tuple[Any, ...]:
    return (
        ops.too_short_penalty(lengths, min_tokens=MIN_TOKENS, penalty=PENALTY),
        ops.too_long_penalty(lengths, soft_max_tokens=SOFT_MAX_TOKENS, max_tokens=MAX_TOKENS, penalty=PENALTY),
        ops.missing_eos_penalty(ended, penalty=PENALTY, dtype=lengths.dtype),
    )


def penalties_are_nothing_to_all_and_monotone_in_the_length(
    stack: Stack, *, lengths: list[int], ended: np.ndarray
) -> Excess:
    """All of it at no token, or from the hard bound on; nothing where nothing is wrong; evenly between."""
    sorted_lengths = np.sort(np.array(lengths, np.float64))
    short, long, cut = (x.astype(np.float64) for x in stack.run(_penalties, sorted_lengths, ended))
    rounding = 4 * stack.eps
    return worst(
        *(excess(np.maximum(-x, x - PENALTY), rounding) for x in (short, long, cut)),
        excess(np.diff(short)),
        excess(-np.diff(long)),
        differ(short, PENALTY * np.maximum(0, 1 - sorted_lengths / MIN_TOKENS), rounding),
        differ(long[sorted_lengths >= MAX_TOKENS], PENALTY, rounding),
        differ(long[sorted_lengths == 7], PENALTY / 2, rounding),
        forbid(long[sorted_lengths <= SOFT_MAX_TOKENS]),
        differ(cut, np.where(ended, 0, PENALTY), rounding),
    )


def k1_per_token_adds_up_to_the_mean_of_the_answer(
    stack: Stack, *, kl: np.ndarray, mask: np.ndarray, poison: float
) -> Excess:
    ours = stack.kl_per_token(np.where(mask, kl, np.float32(poison)), mask)
    means = np.where(mask, kl, 0).astype(np.float64).sum(1) / np.maximum(mask.sum(1), 1)
    return worst(
        differ(ours.astype(np.float64).sum(1), means, 8 * stack.eps * size_of(kl)),
        excess(np.abs(ours[~mask])),
    )


# ---------------------------------------------------------------------------- cases and mutants

SCORES = matrices((BATCH,), 8.0)
PARTS = arrays(np.int32, BATCH, elements=st.integers(0, 3))

PROPERTIES = (
    Property(
        merged_moments_are_those_of_the_union,
        poisoned(drawn(scores=SCORES, part=PARTS)),
        [
            *bug(
                "what parts the means is no variance",
                "merged_moments",
                (" + delta**2 * moments.count * share", ""),
                (" + distance**2 * moments.count * share", ""),
            ),
            *bug(
                "a mean of means",
                "merged_moments",
                ("delta * share, m2", "delta / 2, m2"),
                ("distance * share", "distance / 2"),
            ),
        ],
    ),
    Property(
        equal_scores_however_large_are_normalised_to_zero,
        drawn(value=st.sampled_from([0.1, -3.3, 1e8 / 3, 7e14]) | floats(1e15), n=st.sampled_from([7, 48])),
        bug(
            "a sum of large numbers, divided",
            "merged_moments",
            ("scores[first] - centered[first]", "masking.masked_mean(scores, answered)"),
            ("seq_scores[first] - centered[first]", "ops.masked_mean(seq_scores, answered)"),
        ),
    ),
    Property(
        normalised_scores_undo_an_affine_map,
        drawn(scores=SCORES, part=PARTS, scale=st.sampled_from([0.5, 4.0, -2.0]), shift=st.sampled_from([-8.0, 32.0])),
        [
            *bug("not centred", "normalised_scores", ("(seq_scores - moments.mean)", "seq_scores")),
            *bug(
                "ddof 1",
                "normalised_scores",
                ("jnp.maximum(moments.count, 1.0)", "jnp.maximum(moments.count - 1.0, 1.0)"),
                ("moments.count.clamp(min=1)", "(moments.count - 1).clamp(min=1)"),
            ),
        ],
    ),
    Property(
        clipped_scores_are_bounded_and_stay_so,
        drawn(scores=SCORES, bound=st.sampled_from([0.5, 4.0])),
        bug(
            "one side only",
            "clipped_scores",
            ("jnp.clip(seq_scores, -bound, bound)", "jnp.minimum(seq_scores, bound)"),
            ("clamp(-bound, bound)", "clamp(max=bound)"),
        ),
    ),
    Property(
        penalties_are_nothing_to_all_and_monotone_in_the_length,
        drawn(
            lengths=st.lists(st.integers(0, 12), min_size=BATCH, max_size=BATCH),
            ended=arrays(np.bool_, BATCH),
        ),
        [
            *bug(
                "long answers are paid for",
                "too_short_penalty",
                ("jnp.maximum(min_tokens - lengths, 0.0)", "min_tokens - lengths"),
                (".clamp(min=0.0)", ""),
            ),
            *bug(
                "without an end",
                "too_long_penalty",
                (", 0.0, 1.0)", ", 0.0)"),
                (".clamp(0.0, 1.0)", ".clamp(min=0.0)"),
            ),
            *bug(
                "who ends pays",
                "missing_eos_penalty",
                ("jnp.where(ended,", "jnp.where(~ended,"),
                ("~ended", "ended"),
            ),
        ],
    ),
    Property(
        k1_per_token_adds_up_to_the_mean_of_the_answer,
        poisoned(answers("kl")),
        bug(
            "over the padded width",
            "kl_per_token",
            ("masking.masked_count(response_mask, axis=1", "masking.masked_count(response_mask | True, axis=1"),
            ("masked_count(response_mask, axis=1", "masked_count(response_mask | True, axis=1"),
        ),
    ),
)
