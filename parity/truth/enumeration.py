"""Every answer of a tiny language, and every batch of them.

Three tokens, one of them the EOS, at most three to an answer: 15 answers. They are padded to four columns, one more
than the longest of them fills, so that what should divide by a length and divides by a width is seen.

Nothing here calls the code under test: `Answers.one_hot`, by which `objectives` picks log-probabilities, counts the EOS
by itself, not by the mask that the stages are given.
"""

import itertools
from typing import NamedTuple

import numpy as np

VOCAB_SIZE, EOS = 3, 0
LENGTH, WIDTH = 3, 4
TEMPERATURE, CLIP_EPS = 0.8, 0.2


class Answers(NamedTuple):
    """All N answers; T = `WIDTH` columns."""

    tokens: np.ndarray  # int32 [N, T], 0 behind the end
    lengths: np.ndarray  # int [N], the EOS included
    ended: np.ndarray  # bool [N], by an EOS; the others were cut off
    mask: np.ndarray  # bool [N, T], what the code under test is told
    one_hot: np.ndarray  # float64 [N, T, V], 0 behind the end
    states: np.ndarray  # int [N, T], index of the tokens before a position among all unfinished beginnings


def all_answers(longest: int = LENGTH) -> Answers:
    """Tokens up to an EOS, or `longest` of them without one; 7 answers where that is two."""
    ends = {
        tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
        for tokens in itertools.product(range(VOCAB_SIZE), repeat=longest)
    }
    rows = sorted(ends)
    lengths = np.array([len(row) for row in rows])
    tokens = np.array([row + (0,) * (WIDTH - len(row)) for row in rows], np.int32)
    one_hot = np.eye(VOCAB_SIZE)[tokens] * (np.arange(WIDTH) < lengths[:, None])[..., None]
    beginnings = sorted({row[:t] for row in rows for t in range(len(row))})
    states = np.array([[beginnings.index(row[:t]) if t < len(row) else 0 for t in range(WIDTH)] for row in rows])
    ended = np.array([EOS in row for row in rows])
    return Answers(tokens, lengths, ended, response_mask(tokens, lengths), one_hot, states)


def response_mask(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """True on the tokens of an answer, its EOS included."""
    return np.arange(tokens.shape[1]) < lengths[:, None]


def all_batches(answers: int, count: int) -> np.ndarray:
    """Every batch of `answers` out of `count` answers, as indices [count ** answers, answers]."""
    return np.array(list(itertools.product(range(count), repeat=answers)))
