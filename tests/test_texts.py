"""Statistics of the answers' texts against closed forms and counts by hand."""

import itertools
import zlib

import numpy as np
import pytest

from ppo_jax.monitor import texts

LENGTHS = np.array([7, 2, 0, 9, 5, 3])


def batch(rows, width=None, junk=0):
    """Answers of any length as tokens and mask; `junk` lies behind their ends."""
    width = max(map(len, rows)) if width is None else width
    tokens, mask = np.full((len(rows), width), junk, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask


def random_rows():
    rng = np.random.default_rng(3)
    return [rng.integers(0, 4, size=n).tolist() for n in LENGTHS]


def grams_of(row, n):
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_statistic_is_what_counting_by_hand_gives(n):
    rows = random_rows()
    tokens, mask = batch(rows)
    grams = [grams_of(row, n) for row in rows]
    together = [gram for of in grams for gram in of]
    assert texts.distinct_frac(tokens, mask, n=n) == pytest.approx(len(set(together)) / len(together))
    some = [of for of in grams if of]
    assert texts.repeated_frac(tokens, mask, n=n) == pytest.approx(np.mean([1 - len(set(x)) / len(x) for x in some]))
    pairs = [len(set(a) & set(b)) / len(set(a)) for a, b in itertools.permutations(some, 2)]
    assert texts.shared_frac(tokens, mask, n=n) == pytest.approx(np.mean(pairs))
    starts = [row[:n] for row in rows if len(row) >= n]
    alike = [a == b for a, b in itertools.permutations(starts, 2)]
    assert texts.same_start_frac(tokens, mask, n=n) == pytest.approx(np.mean(alike))


def test_one_word_for_ever_and_one_answer_for_all_have_their_closed_forms():
    tokens, mask = batch([[5] * 12] * 8)
    assert texts.repeated_frac(tokens, mask, n=3) == pytest.approx(1 - 1 / 10)
    assert texts.distinct_frac(tokens, mask, n=1) == pytest.approx(1 / 96)
    assert texts.shared_frac(tokens, mask, n=3) == texts.same_start_frac(tokens, mask, n=3) == 1.0
    different = batch([[10 * i + j for j in range(10)] for i in range(8)])
    assert texts.repeated_frac(*different, n=3) == texts.shared_frac(*different, n=3) == 0.0
    assert texts.distinct_frac(*different, n=2) == 1.0


def test_what_lies_behind_the_end_of_an_answer_changes_no_statistic():
    rows, said = random_rows(), ["a"] * len(LENGTHS)
    clean = texts.text_metrics(said, *batch(rows))
    assert texts.text_metrics(said, *batch(rows, width=14, junk=3)) == clean
    assert texts.text_metrics(said, *batch(rows, width=14, junk=100_000)) == clean


def test_a_large_vocabulary_merges_no_two_ngrams():
    """Ids near a million: 3-grams as one number need 60 bits."""
    big = 2**20 - 1
    tokens, mask = batch([[big, 0, 1, big, 0, 0], [0, big, 1, 1, big, big]])
    assert texts.distinct_frac(tokens, mask, n=3) == 1.0


@pytest.mark.parametrize("rows", [[[], []], [[1], [2]], [[1, 2], []], [[1, 2, 3]]])
def test_answers_too_short_for_an_ngram_give_neutral_numbers(rows):
    found = texts.text_metrics([""] * len(rows), *batch(rows, width=4))
    assert all(np.isfinite(value) for value in found.values())
    for name in ("repeated_3gram", "shared_3gram", "same_start"):
        assert found[f"text/{name}_frac"] == 0.0
    assert found["text/zlib_ratio"] == 1.0


def test_the_compression_ratio_is_that_of_the_answers_one_a_line_and_falls_with_repetition():
    said = ["the soup was good", "die Suppe war gut – très bon", "\ud800 lone"]
    plain = "\n".join([*said[:2], "? lone"]).encode()
    assert texts.zlib_ratio(said) == len(zlib.compress(plain)) / len(plain)
    assert texts.zlib_ratio(["the best place in town"] * 50) < 0.1 < texts.zlib_ratio(said)
