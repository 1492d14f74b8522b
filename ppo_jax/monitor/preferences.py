"""How well scores tell preferred answers from others: accuracy with its uncertainty, and calibration."""

from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.intervals import wilson_interval

BINS = 10


def calibration(leads: np.ndarray) -> list[dict[str, Any]]:
    """What the model claims against what is: pairs in `BINS` equal bins of the probability of the higher score.

    `leads` [N] are chosen minus rejected. σ(|lead|), from 1/2 to 1, is the probability that the model gives to its own
    favourite; `observed` is how often that was the chosen answer (a tie counts half). Which of the two answers is named
    first does not matter: the diagram over [0, 1] would be this one and its mirror image. Empty bins are left out.
    """
    claimed, right = 1 / (1 + np.exp(-np.abs(leads))), (np.sign(leads) + 1) / 2
    edges = np.linspace(0.5, 1, BINS + 1)
    bins = np.clip(np.searchsorted(edges, claimed, side="right") - 1, 0, BINS - 1)
    rows = []
    for index in range(BINS):
        inside = bins == index
        if count := int(inside.sum()):
            observed = float(right[inside].mean())
            row = {"from": float(edges[index]), "to": float(edges[index + 1]), "pairs": count}
            row |= {"predicted": float(claimed[inside].mean()), "observed": observed}
            rows.append(row | {"observed_interval": list(wilson_interval(observed, count))})
    return rows


def calibration_error(rows: list[dict[str, Any]]) -> float:
    """Expected calibration error: Σ over bins of (pairs in it / pairs) · |observed − predicted|.

    Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", 2015.
    """
    gaps = [row["pairs"] * abs(row["observed"] - row["predicted"]) for row in rows]
    return sum(gaps) / sum(row["pairs"] for row in rows)


def preference_metrics(chosen_scores: np.ndarray, rejected_scores: np.ndarray) -> dict[str, float]:
    """Numbers of N pairs: accuracy (a tie counts half) with its 95% Wilson interval, loss, calibration, and scores."""
    leads = chosen_scores - rejected_scores
    accuracy = float(np.mean((np.sign(leads) + 1) / 2))
    low, high = wilson_interval(accuracy, len(leads))
    scores = np.concatenate([chosen_scores, rejected_scores])
    return {
        "evaluation/accuracy": accuracy,
        "evaluation/accuracy_low": low,
        "evaluation/accuracy_high": high,
        "evaluation/preference_loss": float(np.mean(np.logaddexp(0, -leads))),
        "evaluation/calibration_error": calibration_error(calibration(leads)),
        "evaluation/score_mean": float(np.mean(scores)),
        "evaluation/score_std": float(np.std(scores)),
        "evaluation/lead_mean": float(np.mean(leads)),
    }


def plot_calibration(rows: list[dict[str, Any]], file: Path) -> None:
    """Predicted against observed, with the 95% interval of each bin and the number of its pairs."""
    import matplotlib  # an optional extra

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 4.5), layout="constrained")
    axis.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1, label="calibrated")
    for row in rows:
        low, high = row["observed_interval"]
        axis.plot([row["predicted"]] * 2, [low, high], color="C0", linewidth=1)
        axis.annotate(str(row["pairs"]), (row["predicted"], high), ha="center", va="bottom", fontsize=7)
    axis.plot([row["predicted"] for row in rows], [row["observed"] for row in rows], "o-", color="C0", label="held out")
    axis.set_xlabel("probability of the higher score")
    axis.set_ylabel("share in which it was the chosen answer")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)
