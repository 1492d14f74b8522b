"""`python -m benchmarks.recipes`: every recipe of configs/recipes and the default, on the embedded model, by seeds.

Prints a table of what each did and writes it as JSON. Seconds are given as a ratio to the default of the same run.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import ppo_jax
from ppo_jax.config_file import load

DEFAULT = Path("configs/tiny_reviews.yaml")
RECIPES = (DEFAULT, *sorted(Path("configs/recipes").glob("*.yaml")))
SECONDS = "s per iteration"
LAST = 5  # iterations that an end value is the mean of


def measure(file: Path, seeds: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds of the first and the last iterations, and their range where it says how far seeds part."""
    runs = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as directory:
            own = {"run.seed": seed, "run.dir": f"{directory}/run", "monitor.tensorboard": False, **overrides}
            rows = ppo_jax.fine_tune(load(file, own)).metrics
        runs.append({name: np.array([row[name] for row in rows]) for name in rows[0]})

    def end(name: str) -> list[float]:
        return [float(run[name][-LAST:].mean()) for run in runs]

    return {
        "recipe": file.stem if file != DEFAULT else "default",
        "score, first": float(np.mean([run["score/mean"][:LAST].mean() for run in runs])),
        "score, last": float(np.mean(end("score/mean"))),
        "score, seeds": [min(end("score/mean")), max(end("score/mean"))],
        "KL nats/seq": float(np.mean(end("kl/seq_nats"))),
        "KL, largest": float(max(run["kl/seq_nats"].max() for run in runs)),
        "β, last": float(np.mean(end("kl/coef"))),
        "length": float(np.mean(end("response/len_mean_tokens"))),
        "entropy": float(np.mean(end("policy/entropy_nats"))),
        "clipped": float(np.mean(end("policy/clip_frac"))),
        "explained variance": float(np.mean(end("critic/explained_variance")))
        if "critic/explained_variance" in runs[0]
        else None,
        "steps": float(np.mean([run["update/optimizer_steps"].sum() for run in runs])),
        SECONDS: float(np.median(np.concatenate([run["time/iteration_s"][2:] for run in runs]))),
    }


def machine() -> dict[str, Any]:
    return {"platform": platform.platform(), "devices": [str(x) for x in jax.devices()], "jax": jax.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="names of recipes; the default is always run")
    parser.add_argument("--iterations", type=int, help="instead of those of the recipe")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    arguments = parser.parse_args()
    overrides = {} if arguments.iterations is None else {"run.iterations": arguments.iterations}
    chosen = [file for file in RECIPES if not arguments.only or file == DEFAULT or file.stem in arguments.only]
    rows = []
    for file in chosen:
        row = measure(file, arguments.seeds, overrides)
        rows.append(row | {"time / default's": row[SECONDS] / (rows[0] if rows else row)[SECONDS]})
        if arguments.json is not None:
            report = {"machine": machine(), "seeds": arguments.seeds, "rows": rows}
            arguments.json.write_text(json.dumps(report, indent=2))
    names = [name for name in rows[0] if name != SECONDS]
    table = Table(*names)
    for row in rows:
        table.add_row(*(_text(row[name]) for name in names))
    Console(width=220).print(table)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    return value if isinstance(value, str) else "" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
