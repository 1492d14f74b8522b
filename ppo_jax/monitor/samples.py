"""Fixed prompts answered with fixed noise: what changed between two tables is the model, not the dice."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.monitor.sinks import open_from, read_rows

FILE = "samples.jsonl"


def append(directory: Path, step: int, prompts: list[str], answers: list[str], scores: np.ndarray) -> None:
    """Add the answers after `step` iterations to `samples.jsonl`; rows of this step or later are replaced."""
    rows = [
        {"step": step, "prompt": prompt, "answer": text, "score": float(score)}
        for prompt, text, score in zip(prompts, answers, scores, strict=True)
    ]
    with open_from(directory / FILE, step) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(directory: Path) -> list[dict[str, Any]]:
    """All rows of `samples.jsonl`, none when there is no such file."""
    return read_rows(directory / FILE)


def shown_steps(samples: list[dict[str, Any]], total: int) -> dict[str, int]:
    """Which sampled iterations a closing table shows: SFT, the one nearest half-way, now."""
    steps = sorted({sample["step"] for sample in samples})
    return {
        "SFT": steps[0],
        "half-way": min(steps, key=lambda step: abs(step - total // 2)),
        "now": steps[-1],
    }
