"""The loss of preference pairs and the numbers that judge a reward model, against closed forms, torch and loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.intervals import wilson_interval
from ppo_jax.monitor.preferences import calibration, calibration_error, plot_calibration, preference_metrics
from ppo_jax.ops.preferences import bradley_terry_loss, centring_loss

LENGTH = 4
scores = st.lists(st.floats(-30, 30, width=32), min_size=LENGTH, max_size=LENGTH).map(np.float32)
margins = st.lists(st.floats(0, 4, width=32), min_size=LENGTH, max_size=LENGTH).map(np.float32)
NONE = np.zeros(LENGTH, np.float32)


def loss(chosen, rejected, margin=NONE):
    return np.asarray(bradley_terry_loss(*map(jnp.asarray, (chosen, rejected, margin))))


@jax.jit
def gradients(chosen, rejected, margin):
    return jax.grad(lambda c, r: jnp.sum(bradley_terry_loss(c, r, margin)), argnums=(0, 1))(chosen, rejected)


# ------------------------------------------------------------------------------------------------------------ the loss


@given(scores, scores, margins)
def test_the_loss_and_its_gradient_are_those_of_torch(chosen, rejected, margin):
    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
    expected = -torch.nn.functional.logsigmoid(inputs[0] - inputs[1] - torch.tensor(margin, dtype=torch.float64))
    expected.sum().backward()
    np.testing.assert_allclose(loss(chosen, rejected, margin), expected.detach().numpy(), rtol=2e-6, atol=1e-6)
    for found, given_input in zip(gradients(chosen, rejected, margin), inputs, strict=True):
        np.testing.assert_allclose(found, given_input.grad, rtol=1e-5, atol=2e-6)


def test_equal_scores_cost_ln_2_and_a_certain_preference_nothing():
    found = loss(np.float32([1.5, 50, 0, 3]), np.float32([1.5, -50, 0, 1]), np.float32([0, 0, 0, 2]))
    np.testing.assert_allclose(found, [math.log(2), 0, math.log(2), math.log(2)], atol=1e-6)


@given(scores, scores)
def test_the_probabilities_of_both_orders_sum_to_one(chosen, rejected):
    np.testing.assert_allclose(np.exp(-loss(chosen, rejected)) + np.exp(-loss(rejected, chosen)), 1, atol=1e-5)


@given(scores, scores, st.integers(-8, 8))
def test_a_constant_on_both_scores_changes_only_the_centring(chosen, rejected, constant):
    chosen, rejected, moved = (np.round(x * 4) / 4 for x in (chosen, rejected, np.float32(constant)))  # exact sums
    np.testing.assert_array_equal(loss(chosen + moved, rejected + moved), loss(chosen, rejected))
    found = centring_loss(jnp.asarray(chosen + moved), jnp.asarray(rejected + moved))
    np.testing.assert_allclose(found, (chosen + rejected + 2 * moved) ** 2, rtol=1e-6)


@given(scores, scores, margins)
def test_a_margin_is_a_lead_that_is_taken_away(chosen, rejected, margin):
    np.testing.assert_allclose(loss(chosen, rejected, margin), loss(chosen - margin, rejected), rtol=1e-5, atol=1e-5)


def test_a_pair_that_is_wrong_by_far_has_a_finite_loss_and_a_gradient_of_one():
    chosen, rejected = np.float32([-1e4, 1e4, 0, 0]), np.float32([1e4, -1e4, 0, 0])
    np.testing.assert_array_equal(loss(chosen, rejected)[:2], [2e4, 0])
    of_chosen, of_rejected = gradients(chosen, rejected, NONE)
    np.testing.assert_allclose(of_chosen, [-1, 0, -0.5, -0.5])
    np.testing.assert_allclose(of_rejected, [1, 0, 0.5, 0.5])


def test_centring_pulls_both_scores_of_a_pair_alike_and_not_where_they_are_opposite():
    chosen, rejected = jnp.asarray([2.0, 1.0]), jnp.asarray([1.0, -1.0])
    found = jax.grad(lambda c, r: jnp.sum(centring_loss(c, r)), argnums=(0, 1))(chosen, rejected)
    np.testing.assert_allclose(found, [[6, 0], [6, 0]])


# --------------------------------------------------------------------------------------------------------- the numbers


def test_bins_hold_what_is_claimed_and_what_is_seen():
    leads = np.asarray([0.0, 0.1, -0.1, 1.0, 0.95, -1.05, 30.0, 40.0])
    rows = calibration(leads)
    inside = [[0.0, 0.1, -0.1], [1.0, 0.95, -1.05], [30.0, 40.0]]
    assert [row["pairs"] for row in rows] == [3, 3, 2]
    for row, members in zip(rows, inside, strict=True):
        claims = [1 / (1 + math.exp(-abs(lead))) for lead in members]
        assert row["from"] <= min(claims) <= max(claims) <= row["to"]
        assert row["predicted"] == pytest.approx(sum(claims) / len(claims))
        seen = sum(1.0 if lead > 0 else 0.5 if lead == 0 else 0.0 for lead in members) / len(members)
        assert row["observed"] == pytest.approx(seen)
        assert row["observed_interval"] == pytest.approx(wilson_interval(seen, len(members)))
    expected = sum(row["pairs"] / 8 * abs(row["observed"] - row["predicted"]) for row in rows)
    assert calibration_error(rows) == pytest.approx(expected)


def test_scores_that_are_log_odds_are_calibrated_and_louder_ones_are_not():
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 1.5, 40_000)
    leads = np.where(rng.random(40_000) < 1 / (1 + np.exp(-log_odds)), log_odds, -log_odds)
    assert calibration_error(calibration(leads)) < 0.01
    assert calibration_error(calibration(3 * leads)) > 0.1


def test_the_numbers_of_some_pairs_are_those_of_a_loop():
    chosen, rejected = np.asarray([1.0, 0.5, 2.0, 0.0]), np.asarray([0.0, 0.5, 3.0, -1.0])
    found = preference_metrics(chosen, rejected)
    assert found["evaluation/accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert (found["evaluation/accuracy_low"], found["evaluation/accuracy_high"]) == wilson_interval(0.625, 4)
    losses = [-math.log(1 / (1 + math.exp(r - c))) for c, r in zip(chosen, rejected, strict=True)]
    assert found["evaluation/preference_loss"] == pytest.approx(sum(losses) / 4)
    assert found["evaluation/score_mean"] == 6 / 8
    assert found["evaluation/lead_mean"] == 0.25


def test_the_plot_has_a_point_for_every_bin_and_counts_its_pairs(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    rows = calibration(np.array([0.1, -0.1, 3.0, 4.0, 4.5]))
    plot_calibration(rows, tmp_path / "calibration.png")
    monkeypatch.undo()
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    (points,) = (line for line in axis.lines if line.get_label() == "held out")
    expected = [(row["predicted"], row["observed"]) for row in rows]
    np.testing.assert_allclose(points.get_xydata(), expected)
    assert [text.get_text() for text in axis.texts] == [str(row["pairs"]) for row in rows]
    plt.close(drawn[0])
