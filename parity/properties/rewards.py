"""Token rewards: score and penalty."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from parity.properties.draws import answers, matrices, poisoned, size_of
from parity.properties.rows import Excess, Property, bug, differ, excess, worst
from parity.properties.stack import Stack


def rewards_add_up_to_the_score_minus_the_penalty(
    stack: Stack, *, scores: np.ndarray, kl: np.ndarray, mask: np.ndarray, kl_coef: float, poison: float
) -> Excess:
    """The score sits on the last response token, and every later sum has it; the penalty on each token is its own."""
    ours = stack.token_rewards(scores, np.where(mask, kl, np.float32(poison)), mask, kl_coef=kl_coef)
    length = mask.sum(1)
    is_last = (np.arange(mask.shape[1])[None] == length[:, None] - 1) & mask
    expected = np.where(is_last, scores[:, None].astype(np.float64), 0) - kl_coef * np.where(mask, kl, 0)
    return differ(ours, expected, 4 * stack.eps * (1 + kl_coef) * size_of(scores, kl))


def exact_kl_rewards_to_go_are_the_score_minus_the_later_kl(
    stack: Stack, *, scores: np.ndarray, kl: np.ndarray, mask: np.ndarray, kl_coef: float, poison: float
) -> Excess:
    ours = stack.exact_kl_token_rewards(scores, np.where(mask, kl, np.float32(poison)), mask, kl_coef=kl_coef)
    to_go = ours.astype(np.float64)[:, ::-1].cumsum(1)[:, ::-1]
    kl_to_go = np.where(mask, kl, 0).astype(np.float64)[:, ::-1].cumsum(1)[:, ::-1]
    expected = np.where(mask, scores[:, None] - kl_coef * (kl_to_go - np.where(mask, kl, 0)), 0)
    bound = 8 * stack.eps * (1 + kl_coef) * size_of(scores, kl)
    return worst(differ(np.where(mask, to_go, 0), expected, bound), excess(np.abs(ours[~mask])))


@st.composite
def scored_answers(draw) -> dict[str, Any]:
    case = draw(answers("kl"))
    return case | {"scores": draw(matrices(case["mask"].shape[:1], 8.0)), "kl_coef": draw(st.sampled_from([0.0, 0.5]))}


LAST_COLUMN = bug(
    "score on the last column, a pad",
    "last_position",
    ("- jnp.argmax(mask[:, ::-1], axis=1)", "- 0 * jnp.argmax(mask[:, ::-1], axis=1)"),
    ("- torch.argmax(mask.flip(1).int(), dim=1)", "- 0 * torch.argmax(mask.flip(1).int(), dim=1)"),
)

PROPERTIES = (
    Property(
        rewards_add_up_to_the_score_minus_the_penalty,
        poisoned(scored_answers()),
        [
            *bug("penalty of the wrong sign", "token_rewards", ("- kl_coef", "+ kl_coef")),
            *LAST_COLUMN,
        ],
    ),
    Property(
        exact_kl_rewards_to_go_are_the_score_minus_the_later_kl,
        poisoned(scored_answers()),
        bug(
            "a token charged its own KL",
            "exact_kl_token_rewards",
            ("jnp.pad(masking.zero_masked(token_kl, response_mask)[:, 1:], ((0, 0), (0, 1)))", "token_kl"),
            (
                "zero_masked(token_kl, response_mask).roll(-1, dims=1)",
                "zero_masked(token_kl, response_mask).roll(0, 1)",
            ),
        ),
    ),
)
