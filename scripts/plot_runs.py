"""`python -m scripts.plot_runs [LABEL=]RUN[,RUN...] ... --out FILE.png`: KL, score, length and entropy over iterations.

Runs joined by commas (seeds of one recipe) become one curve, their mean, with a band from the smallest to the largest.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

PANELS = {
    "kl/seq_nats": "KL to the reference, nats per sequence",
    "score/mean": "score, mean of the batch",
    "response/len_mean_tokens": "length of the answers, tokens",
    "policy/entropy_nats": "entropy of the policy, nats per token",
}


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curves", nargs="+", help="run directories, those of one curve joined by commas")
    parser.add_argument("--out", required=True, type=Path, help="PNG file to write")
    options = parser.parse_args()
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for curve in options.curves:
        label, _, directories = curve.rpartition("=")
        runs = [rows_of(Path(directory)) for directory in directories.split(",")]
        length = min(len(rows) for rows in runs)
        for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
            values = np.array([[row[name] for row in rows[:length]] for rows in runs])
            (line,) = axis.plot(values.mean(axis=0), label=label or Path(directories).name)
            axis.fill_between(range(length), values.min(axis=0), values.max(axis=0), alpha=0.2, color=line.get_color())
            axis.set_title(title, fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    if len(options.curves) > 1:
        axes[0, 0].legend(fontsize=8)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
