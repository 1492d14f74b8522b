"""Every answer of a tiny language, and the true objectives as sums over them.

Three tokens, one of them the EOS, at most three to an answer: 15 answers. They are padded to four columns, one more
than the longest of them fills, so that what should divide by a length and divides by a width is seen.

Nothing here calls the code under test: an answer's log-probability is picked by `Answers.one_hot`, which counts the EOS
by itself, not by the mask that the stages are given.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

VOCAB_SIZE, EOS = 3, 0
LENGTH, WIDTH = 3, 4
KL_COEF, TEMPERATURE, CLIP_EPS = 0.7, 0.8, 0.2


class Answers(NamedTuple):
    """All N answers; T = `WIDTH` columns."""

    tokens: np.ndarray  # int32 [N, T], 0 behind the end
    lengths: np.ndarray  # int [N], the EOS included
    mask: np.ndarray  # bool [N, T], what the code under test is told
    one_hot: np.ndarray  # float64 [N, T, V], 0 behind the end
    states: np.ndarray  # int [N, T], index of the tokens before a position among all unfinished beginnings


def all_answers() -> Answers:
    """Tokens up to an EOS, or `LENGTH` of them without one."""
    ends = {
        tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
        for tokens in itertools.product(range(VOCAB_SIZE), repeat=LENGTH)
    }
    rows = sorted(ends)
    lengths = np.array([len(row) for row in rows])
    tokens = np.array([row + (0,) * (WIDTH - len(row)) for row in rows], np.int32)
    one_hot = np.eye(VOCAB_SIZE)[tokens] * (np.arange(WIDTH) < lengths[:, None])[..., None]
    beginnings = sorted({row[:t] for row in rows for t in range(len(row))})
    states = np.array([[beginnings.index(row[:t]) if t < len(row) else 0 for t in range(WIDTH)] for row in rows])
    return Answers(tokens, lengths, response_mask(tokens, lengths), one_hot, states)


def response_mask(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """True on the tokens of an answer, its EOS included."""
    return np.arange(tokens.shape[1]) < lengths[:, None]


def all_batches(answers: int, count: int) -> np.ndarray:
    """Every batch of `answers` out of `count` answers, as indices [count ** answers, answers]."""
    return np.array(list(itertools.product(range(count), repeat=answers)))


# ---------------------------------------------------------------------------- objectives

# (exp of the stack, log π(y) [N], log ρ(y) [N], constants [N]) -> a number to be differentiated by the caller's stack.
Objective = Callable[[Callable[[Any], Any], Any, Any, Any], Any]


def seq_kl(exp, log_p, log_q, _) -> Any:
    """KL(π ‖ ρ) of whole answers, Σ_y π(y) log(π(y) / ρ(y)), in nats: E[Σ_t KL_t] by the chain rule."""
    return (exp(log_p) * (log_p - log_q)).sum()


def minus_expected_score(exp, log_p, _, seq_scores) -> Any:
    """−E[s] = −Σ_y π(y) s(y)."""
    return -(exp(log_p) * seq_scores).sum()


def minus_objective(exp, log_p, log_q, seq_scores) -> Any:
    """(−E[s] + β KL) / `LENGTH`: the constant normaliser divides by the longest length."""
    kl = seq_kl(exp, log_p, log_q, None)
    return (minus_expected_score(exp, log_p, None, seq_scores) + KL_COEF * kl) / LENGTH


def minus_weighted_answers(exp, log_p, _, coefficients) -> Any:
    """−Σ_y π(y) c(y) with c held constant: the gradient that raises answer y by its weight c(y)."""
    return -(exp(log_p) * coefficients).sum()
