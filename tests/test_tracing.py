"""Buckets: few shapes, none too small, none much too large."""

from ppo_jax.tracing import bucket


def test_a_thousand_lengths_meet_a_handful_of_buckets():
    found = {bucket(length, smallest=8, largest=1000) for length in range(1, 1001)}
    assert sorted(found) == [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000]


def test_a_bucket_holds_its_length_and_pads_it_by_half_at_most():
    for length in range(8, 1001):
        assert length <= bucket(length, smallest=8, largest=1000) <= 1.5 * length
