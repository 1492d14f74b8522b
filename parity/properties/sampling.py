"""The kept sets of top-k and top-p, and the inverse CDF."""

import itertools

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from parity.planting import Mutant
from parity.properties.draws import drawn, log_softmax, logits
from parity.properties.rows import Excess, Property, bug, differ, excess, forbid, worst
from parity.properties.stack import Stack

BATCH, VOCAB = 3, 23
REAL_VOCAB = 151_936
TOP_P = (0.5, 0.9)


def _kept(
    stack: Stack, logits: np.ndarray, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> np.ndarray:
    return stack.truncated_weights(logits, temperature=temperature, top_p=top_p, top_k=top_k) > 0


def the_kept_set_reaches_p_and_loses_it_without_its_least_likely_token(
    stack: Stack, *, logits: np.ndarray, top_p: float
) -> Excess:
    """Of what top-k left, renormalised; equally likely tokens at the edge stay together."""
    found = []
    for top_k in (0, 5):
        kept = _kept(stack, logits, top_p=top_p, top_k=top_k)
        probs = np.exp(log_softmax(logits))
        left = probs * _kept(stack, logits, top_k=top_k)
        probs = left / left.sum(-1, keepdims=True)
        smallest = np.where(kept, probs, np.inf).min(-1, keepdims=True)
        without = np.where(kept & (probs > smallest * (1 + 1e-6)), probs, 0).sum(-1)
        found += [
            excess(top_p - np.where(kept, probs, 0).sum(-1), 1e-5),
            excess(without - top_p, 1e-5),
            forbid(~kept & (probs > smallest * (1 + 1e-6))),
        ]
    return worst(*found)


def the_likeliest_token_is_never_dropped(stack: Stack, *, logits: np.ndarray, top_k: int) -> Excess:
    """Not even at p = 0, which keeps nothing else (ties may stay)."""
    likeliest = logits == logits.max(-1, keepdims=True)
    only = _kept(stack, logits, top_p=0.0, top_k=top_k)
    close = np.exp(log_softmax(logits) - log_softmax(logits).max(-1, keepdims=True)) > 1 - 1e-5
    return worst(forbid(only & ~close), forbid(~(only & likeliest).any(-1)))


def p_of_one_and_k_of_zero_or_all_cut_nothing(stack: Stack, *, logits: np.ndarray) -> Excess:
    whole = np.exp(log_softmax(logits, 0.7))
    rounding = 8 * stack.eps * (2 + np.abs(logits).max() / 0.7)
    options = {"temperature": 0.7, "top_p": 1.0}
    none, every = (stack.truncated_weights(logits, **options, top_k=k) for k in (0, VOCAB))
    smallest = 1e-37  # a subnormal number may be 0
    return worst(differ(none, whole, rounding * whole + smallest), differ(every, none))


def a_larger_p_or_k_never_keeps_fewer_tokens(stack: Stack, *, logits: np.ndarray) -> Excess:
    by_p = [_kept(stack, logits, top_p=p) for p in (*TOP_P, 1.0)]
    by_k = [_kept(stack, logits, top_k=k) for k in (2, 7)]
    return worst(*(forbid(less & ~more) for kept in (by_p, by_k) for less, more in itertools.pairwise(kept)))


def top_k_keeps_k_tokens_and_their_ties(stack: Stack, *, logits: np.ndarray, top_k: int) -> Excess:
    kept = _kept(stack, logits, top_k=top_k)
    edge = np.sort(logits, axis=-1)[:, -top_k][:, None]
    # Two logits may round to one probability; further apart they do not.
    return worst(forbid(~kept & (logits >= edge)), forbid(kept & (logits < edge - 1e-5 * (1 + np.abs(edge)))))


def a_row_depends_on_its_own_uniform_and_logits_only(
    stack: Stack, *, logits: np.ndarray, others: np.ndarray, uniforms: np.ndarray, order: list[int]
) -> Excess:
    """Not on the other rows, nor on the layout of the batch."""
    options = {"temperature": 0.8, "top_p": 0.9, "top_k": 12}
    whole = stack.sample_tokens(uniforms, logits, **options)
    permuted = stack.sample_tokens(uniforms[order], logits[order], **options)
    beside = stack.sample_tokens(uniforms, np.concatenate([logits[:1], others[1:]]), **options)
    alone = stack.sample_tokens(uniforms[2:], logits[2:], **options)
    return worst(forbid(permuted != whole[order]), forbid(beside[0] != whole[0]), forbid(alone[0] != whole[2]))


def the_interval_of_the_token_holds_the_uniform(
    stack: Stack, *, weights: np.ndarray, uniforms: np.ndarray, size: int
) -> Excess:
    """And a token of weight 0 is never drawn."""
    weights = np.where(weights < 0.2, np.float32(0), weights)[:, :size]
    weights[:, size // 2] += np.float32(0.5)
    return _outside_of_its_interval(stack, weights, uniforms)


def the_inverse_cdf_holds_on_a_real_vocabulary(stack: Stack, *, kind: str, uniforms: np.ndarray, seed: int) -> Excess:
    """151,936 entries of float32, half of them 0, of very different sizes."""
    rng = np.random.default_rng(seed)
    weights = {
        "flat": lambda: np.ones(REAL_VOCAB),
        "steep": lambda: np.exp(rng.normal(scale=6.0, size=REAL_VOCAB)),
        "one huge": lambda: np.where(np.arange(REAL_VOCAB) == 77_777, 1.0, 1e-9),
        "sparse": lambda: (rng.random(REAL_VOCAB) < 1e-4).astype(float),
    }[kind]()
    weights[rng.random(REAL_VOCAB) < 0.5] = 0.0
    weights[[0, 1, 511, 512, REAL_VOCAB - 1]] = 0.0
    rows = np.repeat((weights / weights.sum()).astype(np.float32)[None], len(uniforms), axis=0)
    return _outside_of_its_interval(stack, rows, uniforms)


def _outside_of_its_interval(stack: Stack, weights: np.ndarray, uniforms: np.ndarray) -> Excess:
    tokens = stack.inverse_cdf(uniforms, weights)
    exact = weights.astype(np.float64)
    upper = exact.cumsum(-1) / exact.sum(-1, keepdims=True)
    row = np.arange(len(weights))
    below = upper[row, tokens] - exact[row, tokens] / exact.sum(-1)
    outside = np.maximum(below - uniforms, uniforms - upper[row, tokens])
    # The uniform times the whole sum is rounded in the dtype of the weights.
    return worst(forbid(exact[row, tokens] == 0), excess(outside, 8 * stack.eps))


def frequencies_follow_the_renormalised_probabilities(stack: Stack) -> Excess:
    """Chi-square of 20,000 draws after top-p; fixed, and below its 0.1% point for 4 degrees of freedom."""
    probs, n = np.array([0.4, 0.25, 0.04, 0.15, 0.1, 0.06]), 20_000
    uniforms = np.random.default_rng(1).random(n).astype(np.float32)
    logits = np.repeat(np.log(probs).astype(np.float32)[None], n, axis=0)
    tokens = stack.sample_tokens(uniforms, logits, temperature=1.0, top_p=0.95, top_k=0)
    counts, expected = np.bincount(tokens, minlength=6), n * np.where(probs > 0.05, probs / 0.96, 0)
    kept = expected > 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    return worst(forbid(counts[~kept]), excess(chi_square, 18.5))


# ---------------------------------------------------------------------------- cases and mutants

BELOW_ONE = float(np.float32(1 - 2**-24))
UNIFORMS = arrays(np.float32, BATCH, elements=st.floats(0, BELOW_ONE, width=32, allow_subnormal=False)) | st.just(
    np.array([0, 0.5, BELOW_ONE], np.float32)
)
LOGITS = logits(1.0, 8.0, shape=(BATCH, VOCAB))
TOP_P_KEEPS = "enough=enough)\n        probs = jnp.where(probs >= edge"
TWIN_KEEPS = (
    "edge = descending.gather(-1, reached.int().argmax(-1, keepdim=True))\n"
    "        probs = zero_masked(probs, probs >= edge"
)
STRICT_EDGE = bug(
    "edge of top-p left out",
    "truncated_weights",
    (TOP_P_KEEPS, TOP_P_KEEPS.replace(">=", ">")),
    (TWIN_KEEPS, TWIN_KEEPS.replace(">=", ">")),
)

PROPERTIES = (
    Property(
        the_kept_set_reaches_p_and_loses_it_without_its_least_likely_token,
        drawn(logits=LOGITS.map(np.round), top_p=st.sampled_from(TOP_P)),
        [
            *STRICT_EDGE,
            *bug(
                "top-p of the whole, not of what top-k left",
                "truncated_weights",
                ("top_p * total, enough", "jnp.minimum(top_p, total), enough"),
                ("top_p * probs.sum(-1, keepdim=True)", "top_p"),
            ),
        ],
    ),
    Property(
        the_likeliest_token_is_never_dropped,
        drawn(logits=LOGITS, top_k=st.sampled_from([0, 3])),
        [
            Mutant(
                "p = 0 reached by nothing",
                "ppo_jax.ops.sampling:_threshold",
                "jnp.max(probs, axis=-1)",
                "1.0 + jnp.max(probs, axis=-1)",
            ),
            STRICT_EDGE[1],
        ],
    ),
    Property(
        p_of_one_and_k_of_zero_or_all_cut_nothing,
        drawn(logits=logits(1.0, 8.0, 20.0, shape=(BATCH, VOCAB))),
        [
            *bug("top-p also at 1", "truncated_weights", ("top_p < 1.0", "top_p <= 1.0")),
            *bug("top-k also at 0", "truncated_weights", ("top_k > 0", "top_k >= 0")),
        ],
    ),
    Property(
        a_larger_p_or_k_never_keeps_fewer_tokens,
        drawn(logits=LOGITS),
        bug("mass to drop for mass to keep", "truncated_weights", ("top_p * ", "(1.0 - top_p) * ")),
    ),
    Property(
        top_k_keeps_k_tokens_and_their_ties,
        drawn(logits=LOGITS, top_k=st.sampled_from([1, 5, VOCAB])),
        bug("one token too many", "truncated_weights", ("min(top_k, ", "min(top_k + 1, ")),
    ),
    Property(
        a_row_depends_on_its_own_uniform_and_logits_only,
        drawn(logits=LOGITS, others=LOGITS, uniforms=UNIFORMS, order=st.permutations(range(BATCH))),
        bug(
            "noise of another row",
            "sample_tokens",
            ("inverse_cdf(uniforms, ", "inverse_cdf(jnp.roll(uniforms, 1), "),
            ("inverse_cdf(uniforms, ", "inverse_cdf(uniforms.roll(1), "),
        ),
    ),
    Property(
        the_interval_of_the_token_holds_the_uniform,
        drawn(
            weights=arrays(np.float32, (BATCH, VOCAB), elements=st.floats(0, 1, width=32, allow_subnormal=False)),
            uniforms=UNIFORMS,
            size=st.sampled_from([2, VOCAB]),
        ),
        [
            Mutant(
                "weights taken for normalised",
                "ppo_jax.ops.sampling:inverse_cdf",
                " * jnp.sum(block_sums, axis=-1)",
                "",
            ),
            Mutant("weights taken for normalised", "ppo_torch_ref.ops:inverse_cdf", " * cumulative[:, -1:]", ""),
            Mutant(
                "an edge belongs to the token before",
                "ppo_jax.ops.sampling:_first_exceeding",
                "prefix > target[:, None]",
                "prefix >= target[:, None]",
            ),
            Mutant(
                "an edge belongs to the token before", "ppo_torch_ref.ops:inverse_cdf", "cumulative <=", "cumulative <"
            ),
        ],
    ),
    Property(
        the_inverse_cdf_holds_on_a_real_vocabulary,
        drawn(
            kind=st.sampled_from(["flat", "steep", "one huge", "sparse"]),
            uniforms=UNIFORMS,
            seed=st.integers(0, 2**31),
        ),
        [
            Mutant(
                "a plain cumulative sum",
                "ppo_jax.ops.sampling:inverse_cdf",
                "    return jnp.minimum(block * width + _first_exceeding(chosen, rest)[0], vocab - 1)",
                "    plain = jnp.cumsum(weights, axis=-1)\n"
                "    return jnp.sum(plain <= (uniforms * plain[:, -1])[:, None], axis=-1)",
            ),
            Mutant(
                "a sum in half precision",
                "ppo_torch_ref.ops:inverse_cdf",
                "weights.double().cumsum(-1)",
                "weights.bfloat16().cumsum(-1).double()",
            ),
        ],
        dtypes=("float32",),
        max_examples=8,
    ),
    Property(
        frequencies_follow_the_renormalised_probabilities,
        drawn(),
        [
            Mutant(
                "weights taken for normalised",
                "ppo_jax.ops.sampling:inverse_cdf",
                " * jnp.sum(block_sums, axis=-1)",
                "",
            ),
            Mutant("weights taken for normalised", "ppo_torch_ref.ops:inverse_cdf", " * cumulative[:, -1:]", ""),
        ],
        dtypes=("float32",),
        max_examples=1,
    ),
)
