"""`python -m scripts.summarise_runs RUN [RUN ...]`: the figures of some runs, as the README and docs quote them."""

import argparse
import json
from pathlib import Path
from statistics import mean

ENDS = 5  # iterations that are averaged at either end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--samples", action="store_true", help="also print the fixed prompts of the first run")
    options = parser.parse_args()
    print(
        "| run | iterations | score | KL nats/seq, last (largest) | length | entropy | seconds, median iteration | "
        "first, with compilation |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for run in options.runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]

        def ends(name: str, rows: list = rows) -> str:
            first, last = (mean(row[name] for row in part) for part in (rows[:ENDS], rows[-ENDS:]))
            return f"{first:.2f} -> {last:.2f}"

        kl = [row["kl/seq_nats"] for row in rows]
        seconds = sorted(row["time/iteration_s"] for row in rows)
        print(
            f"| {run.name} | {len(rows)} | {ends('score/mean')} | {mean(kl[-ENDS:]):.2f} ({max(kl):.2f}) | "
            f"{ends('response/len_mean_tokens')} | {ends('policy/entropy_nats')} | {seconds[len(seconds) // 2]:.2f} | "
            f"{rows[0]['time/iteration_s']:.1f} |"
        )
    if options.samples:
        print_samples(options.runs[0])


def print_samples(run: Path) -> None:
    """The fixed prompts as a table: SFT, half-way, now."""
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").split("\n") if line]
    steps = sorted({row["step"] for row in rows})
    shown = (steps[0], min(steps, key=lambda step: abs(step - steps[-1] // 2)), steps[-1])
    print("\n| prompt | " + " | ".join(f"after {step} iterations" for step in shown) + " |\n|---|---|---|---|")
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        cells = [next(row for row in rows if (row["step"], row["prompt"]) == (step, prompt)) for step in shown]
        texts = [" ".join(c["answer"].split()).replace("|", "/") + f" ({c['score']:+.2f})" for c in cells]
        print(f"| {prompt} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()
