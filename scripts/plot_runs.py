"""`python -m scripts.plot_runs RUN [RUN ...] --out FILE.png`: KL, score, length and entropy over iterations."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "kl/seq_nats": "KL to the reference, nats per sequence",
    "score/mean": "score, mean of the batch",
    "response/len_mean_tokens": "length of the answers, tokens",
    "policy/entropy_nats": "entropy of the policy, nats per token",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", required=True, type=Path, help="PNG file to write")
    options = parser.parse_args()
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for run in options.runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]
        for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=run.name)
            axis.set_title(title, fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    if len(options.runs) > 1:
        axes[0, 0].legend(fontsize=8)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
