"""Wilson's interval against scipy, against what defines it, and at its ends."""

import math

import pytest
from scipy.stats import binomtest

from ppo_jax.intervals import wilson_interval


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (3, 5), (5, 5), (13, 40), (1, 1)])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_of_a_share_is_that_of_scipy(wins, count, confidence):
    expected = binomtest(wins, count).proportion_ci(confidence, method="wilson")
    found = wilson_interval(wins / count, count, confidence=confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (0.632, 500), (0.97, 33), (0.25, 10)])
def test_the_ends_of_the_interval_are_the_shares_that_the_observed_one_just_does_not_contradict(share, count):
    z = 1.959963984540054
    low, high = wilson_interval(share, count)
    assert 0 < low < share < high < 1
    for end in (low, high):
        assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / count), rel=1e-9)


def test_no_end_is_outside_of_0_and_1_and_no_trial_says_nothing():
    for count in range(1, 2000):
        for share in (0.0, 1.0):
            low, high = wilson_interval(share, count)
            assert 0 <= low < high <= 1
            assert (low, high)[int(share)] == pytest.approx(share)
    assert wilson_interval(0.3, 0) == (0.0, 1.0)
