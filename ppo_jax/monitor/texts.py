"""What the answers of a batch look like as texts: repetition within them, likeness between them. NumPy, on the host.

N-grams are of tokens, not of words, so that they mean the same in every language. An n-gram lies within one answer; the
EOS, a token of the answer, is part of its last ones.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int


def text_metrics(
    texts: Sequence[str], response_tokens: Int[np.ndarray, "B T"], response_mask: Bool[np.ndarray, "B T"]
) -> dict[str, float]:
    """`text/...` of B answers, given as texts and as tokens; shares are between 0 and 1."""
    return {
        "text/distinct_1gram_frac": distinct_frac(response_tokens, response_mask, n=1),
        "text/distinct_2gram_frac": distinct_frac(response_tokens, response_mask, n=2),
        "text/repeated_3gram_frac": repeated_frac(response_tokens, response_mask, n=3),
        "text/shared_3gram_frac": shared_frac(response_tokens, response_mask, n=3),
        "text/same_start_frac": same_start_frac(response_tokens, response_mask, n=3),
        "text/zlib_ratio": zlib_ratio(texts),
    }


def ngrams(
    tokens: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], *, n: int
) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, " K"]]:
    """The answer and the identity, 0, 1, ..., of every n-gram of unmasked tokens."""
    starts = tokens.shape[1] - n + 1
    if starts < 1:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # One number for each n-gram: below 2^63 for 3-grams of any vocabulary below two million.
    base, grams = int(tokens.max(initial=0)) + 1, np.zeros((len(tokens), starts), np.int64)
    whole = np.ones(grams.shape, bool)
    for i in range(n):
        grams = grams * base + tokens[:, i : i + starts]
        whole &= mask[:, i : i + starts]
    rows = np.nonzero(whole)[0].astype(np.int64)
    return rows, np.unique(grams[whole], return_inverse=True)[1].astype(np.int64)


def distinct_frac(tokens: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], *, n: int) -> float:
    """Different n-grams over n-grams, of all answers together; 1 where there is none. It falls with the batch's size.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016 (distinct-n).
    """
    _, grams = ngrams(tokens, mask, n=n)
    return float(grams.max() + 1) / len(grams) if len(grams) else 1.0


def repeated_frac(tokens: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], *, n: int) -> float:
    """Share of an answer's n-grams that it has had before, mean over the answers that have any; 0 where none has."""
    rows, grams = ngrams(tokens, mask, n=n)
    answers, _ = _each_once(rows, grams)
    count, different = (np.bincount(x, minlength=len(tokens)) for x in (rows, answers))
    some = count > 0
    return float(np.mean(1 - different[some] / count[some])) if some.any() else 0.0


def shared_frac(tokens: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], *, n: int) -> float:
    """Share of one answer's different n-grams that another has too, mean over all ordered pairs of answers.

        1/(B(B−1)) Σ_{a≠b} |G_a ∩ G_b| / |G_a|

    Of the answers that have any n-gram; 0 with fewer than two. Counted by n-gram, so the cost is that of the tokens,
    not of the pairs.
    """
    answers, grams = _each_once(*ngrams(tokens, mask, n=n))
    different = np.bincount(answers, minlength=len(tokens))
    others = np.count_nonzero(different) - 1
    if others < 1:
        return 0.0
    elsewhere = np.bincount(grams)[grams] - 1
    return float(np.sum(elsewhere / different[answers]) / (others * (others + 1)))


def same_start_frac(tokens: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], *, n: int) -> float:
    """Share of the pairs of answers that begin with the same n tokens; shorter answers are left out."""
    _, counts = np.unique(tokens[mask[:, :n].sum(axis=1) == n, :n], axis=0, return_counts=True)
    total = int(counts.sum())
    return float(np.sum(counts * (counts - 1))) / (total * (total - 1)) if total > 1 else 0.0


def zlib_ratio(texts: Sequence[str]) -> float:
    """Compressed over plain size in UTF-8 of all answers, one a line; 1 where they are empty. Low is repetitive."""
    plain = "\n".join(texts).encode("utf-8", errors="replace")
    return len(zlib.compress(plain)) / len(plain) if plain.strip() else 1.0


def _each_once(
    answers: Int[np.ndarray, " K"], grams: Int[np.ndarray, " K"]
) -> tuple[Int[np.ndarray, " L"], Int[np.ndarray, " L"]]:
    """Every n-gram of an answer once: (answers, n-grams)."""
    size = int(grams.max(initial=0)) + 1
    return np.divmod(np.unique(answers * size + grams), size)
