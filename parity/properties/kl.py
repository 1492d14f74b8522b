"""Divergences: exact, estimated, still to come."""

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from parity.properties.draws import (
    ROWS,
    TEMPERATURES,
    VOCAB,
    answers,
    drawn,
    in_sixty_fourths,
    log_softmax,
    logits,
    matrices,
    near_logits,
)
from parity.properties.rows import Excess, Property, bug, differ, excess, forbid, worst
from parity.properties.stack import Stack, op

EXACT_KL = op("exact_token_kl")


def kl_is_never_negative(stack: Stack, *, logits: np.ndarray, ref_logits: np.ndarray) -> Excess:
    return excess(-stack.exact_token_kl(logits, ref_logits, temperature=1.0))


def kl_is_its_definition(stack: Stack, *, logits: np.ndarray, ref_logits: np.ndarray, temperature: float) -> Excess:
    ours = stack.exact_token_kl(logits, ref_logits, temperature=temperature)
    return differ(ours, *_kl_and_its_rounding(stack, logits, ref_logits, temperature))


def _kl_and_its_rounding(
    stack: Stack, logits: np.ndarray, ref_logits: np.ndarray, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Σ π (log π − log ρ) in float64, with Σ (ρ − π) = 0 added, which rows this close need even there."""
    log_p, log_q = log_softmax(logits, temperature), log_softmax(ref_logits, temperature)
    p, q, d = np.exp(log_p), np.exp(log_q), log_p - log_q
    kl = np.where(p > 0, p * np.expm1(-d.clip(-700)) + p * d, q).sum(-1)
    # Each log-prob is off by some roundings of the logits; the KL moves by Σ (π − ρ) of that, and by its square.
    log_prob_rounding = 8 * stack.eps * (1 + np.maximum(np.abs(logits), np.abs(ref_logits)).max(-1) / temperature)
    far = np.where(np.abs(d) > 0.5, p * np.abs(d), 0.0).sum(-1)
    return kl, log_prob_rounding * (np.abs(p - q).sum(-1) + kl + far) + log_prob_rounding**2


def kl_of_equal_rows_is_exactly_zero(stack: Stack, *, logits: np.ndarray) -> Excess:
    """Of its gradient with respect to the policy too."""
    kl, (gradient, _) = stack.differentiate(EXACT_KL, logits, logits, temperature=0.7)
    return worst(excess(np.abs(kl)), excess(np.abs(gradient)))


def kl_ignores_a_constant_per_row(stack: Stack, *, logits: np.ndarray, ref_logits: np.ndarray, shift: float) -> Excess:
    logits, ref_logits = in_sixty_fourths(logits), in_sixty_fourths(ref_logits)
    base = stack.exact_token_kl(logits, ref_logits, temperature=1.0)
    bound = _kl_and_its_rounding(stack, logits, ref_logits)[1]
    return worst(
        differ(stack.exact_token_kl(logits + np.float32(shift), ref_logits, temperature=1.0), base, bound),
        differ(stack.exact_token_kl(logits, ref_logits + np.float32(shift), temperature=1.0), base, bound),
    )


def kl_ignores_the_order_of_the_vocabulary(
    stack: Stack, *, logits: np.ndarray, ref_logits: np.ndarray, order: list[int]
) -> Excess:
    base = stack.exact_token_kl(logits, ref_logits, temperature=1.0)
    permuted = stack.exact_token_kl(logits[:, order], ref_logits[:, order], temperature=1.0)
    return differ(permuted, base, _kl_and_its_rounding(stack, logits, ref_logits)[1])


def kl_is_finite_for_logits_of_ten_thousand(stack: Stack, *, logits: np.ndarray, ref_logits: np.ndarray) -> Excess:
    ours, gradients = stack.differentiate(EXACT_KL, logits, ref_logits, temperature=1.0)
    return worst(
        differ(ours, *_kl_and_its_rounding(stack, logits, ref_logits)), *(forbid(~np.isfinite(x)) for x in gradients)
    )


def kl_of_an_impossible_token_is_defined(
    stack: Stack, *, logits: np.ndarray, ref_logits: np.ndarray, floor: float
) -> Excess:
    """For both it adds nothing, to value or gradient; for the reference alone it is huge or infinite, not NaN."""
    banned = np.arange(VOCAB) == 2
    both = np.where(banned, np.float32(floor), logits), np.where(banned, np.float32(floor), ref_logits)
    kept = logits[:, ~banned], ref_logits[:, ~banned]
    kl, (gradient, _) = stack.differentiate(EXACT_KL, *both, temperature=1.0)
    alone = stack.exact_token_kl(logits, both[1], temperature=1.0)
    return worst(
        differ(kl, *_kl_and_its_rounding(stack, *kept)),
        excess(np.abs(gradient[:, banned])),
        forbid(~np.isfinite(gradient)),
        forbid(~(alone > 1e30)),
    )


def k3_is_never_negative(stack: Stack, *, logprobs: np.ndarray, ref_logprobs: np.ndarray) -> Excess:
    return excess(-stack.k3(logprobs, ref_logprobs))


def k3_keeps_its_digits_near_zero(stack: Stack, *, logprobs: np.ndarray, ref_logprobs: np.ndarray) -> Excess:
    d = logprobs.astype(np.float64) - ref_logprobs
    return differ(
        stack.k3(logprobs, ref_logprobs), np.expm1(-d) + d, 4 * stack.eps * (np.abs(d) + np.abs(np.expm1(-d)))
    )


def k3_of_logits_is_that_of_their_log_probs(
    stack: Stack, *, logits: np.ndarray, ref_logits: np.ndarray, tokens: np.ndarray, temperature: float
) -> Excess:
    """Never negative; its gradient is (1 − ρ/π) ∇ log π of the token, which is none at the reference."""
    ours, (gradient, _) = stack.differentiate(
        op("sampled_token_k3"), logits, ref_logits, tokens, temperature=temperature
    )
    log_p, log_q = log_softmax(logits, temperature), log_softmax(ref_logits, temperature)
    d = np.take_along_axis(log_p - log_q, tokens[:, None], axis=-1)
    score = ((np.arange(VOCAB) == tokens[:, None]) - np.exp(log_p)) / temperature
    # Each log-prob is off by some roundings of the logits, which k3 multiplies by 1 − ρ/π.
    rounding = 16 * stack.eps * (1 + np.abs(logits).max() + np.abs(ref_logits).max()) / temperature
    slope = 1 + np.exp(-d)
    return worst(
        excess(-ours),
        differ(ours, (np.expm1(-d) + d)[:, 0], rounding * (np.abs(d) + np.abs(np.expm1(-d)))[:, 0] + rounding**2),
        differ(gradient, -np.expm1(-d) * score, rounding * slope / temperature),
        excess(np.abs(stack.sampled_token_k3(logits, logits, tokens, temperature=temperature))),
    )


def expectations_of_k1_and_k3_are_the_exact_kl(stack: Stack, *, logits: np.ndarray, ref_logits: np.ndarray) -> Excess:
    """Every token of the vocabulary weighted by its probability: an expectation by enumeration."""
    log_p, log_q = log_softmax(logits), log_softmax(ref_logits)
    exact = stack.exact_token_kl(log_p, log_q, temperature=1.0)
    size = (np.exp(log_p) * (1 + np.abs(log_p - log_q)) + np.exp(log_q)).sum(-1) + np.abs(log_p).max(-1)
    means = [(np.exp(log_p) * getattr(stack, name)(log_p, log_q)).sum(-1) for name in ("k1", "k3")]
    return worst(*(differ(mean, exact, 16 * stack.eps * size) for mean in means))


def k2_is_half_a_square(stack: Stack, *, logprobs: np.ndarray, ref_logprobs: np.ndarray) -> Excess:
    d = logprobs.astype(np.float64) - ref_logprobs
    return differ(stack.k2(logprobs, ref_logprobs), d**2 / 2, 4 * stack.eps * d**2)


def future_kl_is_that_of_later_tokens(stack: Stack, *, kl: np.ndarray, mask: np.ndarray, poison: float) -> Excess:
    later = np.where(mask, kl, 0).astype(np.float64)[:, ::-1].cumsum(axis=1)[:, ::-1]
    expected = np.where(mask, np.pad(later[:, 1:], ((0, 0), (0, 1))), 0)
    dirty = np.where(mask, kl, np.float32(poison))
    return differ(stack.future_kl(dirty, mask), expected, 4 * stack.eps * kl.shape[1] * np.abs(kl).sum())


# ---------------------------------------------------------------------------- cases and mutants

FLOOR = float(np.finfo(np.float32).min)
PAIRS = {"logits": logits(), "ref_logits": logits()}
MODERATE = {"logits": logits(1.0, 8.0), "ref_logits": logits(1.0, 8.0)}


@st.composite
def near_logprobs(draw) -> dict[str, Any]:
    """Log-probs a distance of 1e-12 to 1 from those of the reference."""
    ref_logprobs = -np.abs(draw(matrices((ROWS, VOCAB), 20.0)))
    distance = np.float32(10.0 ** draw(st.integers(-12, 0)))
    logprobs = (ref_logprobs + distance * draw(matrices((ROWS, VOCAB), 1.0))).astype(np.float32)
    return {"logprobs": logprobs, "ref_logprobs": ref_logprobs}


SIGN = ("logprobs - ref_logprobs", "ref_logprobs - logprobs")
NO_MAXIMUM = (
    "{}.log_softmax(wide / temperature, {}=-1)",
    "wide / temperature - {0}.log({0}.sum({0}.exp(wide / temperature), -1, {1}=True))",
)
UNSTABLE = bug(
    "softmax without its maximum taken off",
    "log_distribution",
    (NO_MAXIMUM[0].format("jax.nn", "axis"), NO_MAXIMUM[1].format("jnp", "keepdims")),
    (NO_MAXIMUM[0].format("torch", "dim"), NO_MAXIMUM[1].format("torch", "keepdim")),
)

PROPERTIES = (
    Property(
        kl_is_never_negative,
        near_logits(),
        bug(
            "the plain sum",
            "exact_token_kl",
            ("p * _expm1_minus(jnp.where(near, d, zero))", "p * d"),
            (
                "summand = torch.where(near, p * _expm1_minus(d.masked_fill(~near, 0.0)), q - p + p * d)",
                "summand = p * d",
            ),
        ),
    ),
    Property(
        kl_is_its_definition,
        st.one_of(
            drawn(**PAIRS, temperature=TEMPERATURES), near_logits().map(lambda case: case | {"temperature": 1.0})
        ),
        [
            *bug(
                "reversed",
                "exact_token_kl",
                ("p, q = jnp.exp(log_p), jnp.exp(log_q)", "p, q = jnp.exp(log_q), jnp.exp(log_p)"),
                ("p, q = torch.exp(log_p), torch.exp(log_q)", "p, q = torch.exp(log_q), torch.exp(log_p)"),
            ),
            *bug("what was added taken away in part", "exact_token_kl", ("q - p + p * d", "p * d")),
        ],
    ),
    Property(
        kl_of_equal_rows_is_exactly_zero,
        drawn(logits=logits()),
        bug(
            "reference not at the temperature",
            "exact_token_kl",
            ("log_distribution(ref_logits, temperature=temperature)", "log_distribution(ref_logits, temperature=1.0)"),
        ),
    ),
    Property(
        kl_ignores_a_constant_per_row,
        drawn(**MODERATE, shift=st.sampled_from([-512.0, 3.0, 4096.0])),
        bug(
            "reference not normalised",
            "exact_token_kl",
            ("log_distribution(ref_logits, temperature=temperature)", "ref_logits / temperature"),
        ),
    ),
    Property(
        kl_ignores_the_order_of_the_vocabulary,
        drawn(**PAIRS, order=st.permutations(range(VOCAB))),
        bug(
            "last token left out",
            "exact_token_kl",
            ("jnp.where(p > 0, summand, q), axis", "jnp.where(p > 0, summand, q)[..., :-1], axis"),
            ("torch.where(p > 0, summand, q), dim", "torch.where(p > 0, summand, q)[..., :-1], dim"),
        ),
    ),
    Property(
        kl_is_finite_for_logits_of_ten_thousand,
        drawn(logits=logits(1e2, 1e4), ref_logits=logits(1e2, 1e4)),
        UNSTABLE,
    ),
    Property(
        kl_of_an_impossible_token_is_defined,
        drawn(**MODERATE, floor=st.sampled_from([FLOOR, -math.inf])),
        bug(
            "−inf − (−inf)",
            "exact_token_kl",
            ("jnp.where(p > 0, log_p - log_q, zero)", "log_p - log_q"),
            ("torch.where(p > 0, log_p - log_q, torch.zeros_like(p))", "log_p - log_q"),
        ),
    ),
    Property(
        k3_is_never_negative,
        near_logprobs(),
        bug(
            "exp(−d) − 1 + d",
            "k3",
            ("_expm1_minus(logprobs - ref_logprobs)", "jnp.exp(ref_logprobs - logprobs) - 1 + logprobs - ref_logprobs"),
            (
                "_expm1_minus(logprobs - ref_logprobs)",
                "torch.exp(ref_logprobs - logprobs) - 1 + logprobs - ref_logprobs",
            ),
        ),
    ),
    Property(
        k3_keeps_its_digits_near_zero,
        near_logprobs(),
        bug(
            "exp(−d) − 1 + d, kept positive",
            "_expm1_minus",
            ("jnp.expm1(-log_ratio)", "jnp.exp(-log_ratio) - 1.0"),
            ("torch.expm1(-log_ratio)", "torch.exp(-log_ratio) - 1.0"),
        ),
    ),
    Property(
        k3_of_logits_is_that_of_their_log_probs,
        st.one_of(drawn(**MODERATE), near_logits()).flatmap(
            lambda case: drawn(
                **{name: st.just(x) for name, x in case.items()},
                tokens=arrays(np.int32, ROWS, elements=st.integers(0, VOCAB - 1)),
                temperature=TEMPERATURES,
            )
        ),
        [
            *bug(
                "reference not at the temperature",
                "sampled_token_k3",
                (
                    "token_logprobs(ref_logits, tokens, temperature=temperature)",
                    "token_logprobs(ref_logits, tokens, temperature=1.0)",
                ),
            ),
            *bug("k2 for k3", "sampled_token_k3", ("return k3(", "return k2(")),
        ],
    ),
    Property(
        expectations_of_k1_and_k3_are_the_exact_kl,
        drawn(**MODERATE),
        [*bug("k1 of the wrong sign", "k1", SIGN), *bug("k3 of the inverse ratio", "k3", SIGN)],
    ),
    Property(k2_is_half_a_square, near_logprobs(), bug("no half", "k2", ("0.5 * ", ""))),
    Property(
        future_kl_is_that_of_later_tokens,
        st.builds(lambda case, poison: case | {"poison": poison}, answers("kl"), st.sampled_from([math.nan, 1e30])),
        [
            *bug(
                "its own KL too",
                "future_kl",
                ("jnp.cumsum(backwards, axis=1)[:, :-1], ((0, 0), (1, 0))", "jnp.cumsum(backwards, axis=1), 0"),
                ("return zero_masked(later, ", "return zero_masked(later + zero_masked(token_kl, response_mask), "),
            ),
            *bug(
                "what lies under the padding",
                "future_kl",
                ("masking.zero_masked(token_kl, response_mask)", "token_kl"),
                ("zero_masked(token_kl, response_mask)[:, t + 1]", "token_kl[:, t + 1]"),
            ),
        ],
    ),
)
