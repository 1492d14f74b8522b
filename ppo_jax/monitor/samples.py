"""Fixed prompts answered with fixed noise: what changed between two tables is the model, not the dice."""

from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax import jsonl
from ppo_jax.monitor.sinks import open_from, read_rows
from ppo_jax.processes import is_lead

FILE = "samples.jsonl"


def append(
    directory: Path,
    step: int,
    prompts: list[str],
    answers: list[str],
    *,
    scores: np.ndarray,
    seq_kl: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Add the answers after `step` iterations to `samples.jsonl`; rows of this step or later are replaced.

    One of each per prompt: scores as the reward source gives them, the exact KL to the reference in nats, and lengths
    in tokens.
    """
    with jsonl.writing(directory / FILE), open_from(directory / FILE, step) as file:
        file.writelines(
            jsonl.line({"step": step, "prompt": prompt, "answer": answer} | numbers)
            for prompt, answer, numbers in zip(prompts, answers, numbers_of(scores, seq_kl, lengths), strict=True)
        )


def cut_back(directory: Path, first_step: int) -> None:
    """Keep what policies of up to `first_step` iterations answered, as a resumed run begins."""
    if is_lead():
        open_from(directory / FILE, first_step + 1).close()


def numbers_of(scores: np.ndarray, seq_kl: np.ndarray, lengths: np.ndarray) -> list[dict[str, float | int]]:
    """What a row of an answer says of it beside its text."""
    return [
        {"score": float(score), "kl_nats": float(kl), "tokens": int(length)}
        for score, kl, length in zip(scores, seq_kl, lengths, strict=True)
    ]


def read(directory: Path) -> list[dict[str, Any]]:
    """All rows of `samples.jsonl`, none when there is no such file."""
    return read_rows(directory / FILE)


def steps_at_end(samples: list[dict[str, Any]], total: int) -> dict[str, int]:
    """Which sampled iterations the table at the end of a run shows: SFT, the one nearest half-way, now."""
    steps = _steps(samples)
    return {
        "SFT": steps[0],
        "half-way": min(steps, key=lambda step: abs(step - total // 2)),
        "now": steps[-1],
    }


def steps_so_far(samples: list[dict[str, Any]]) -> dict[str, int]:
    """Which sampled iterations a look at a run shows: SFT, the last but one, now; fewer where there are fewer."""
    first, *later = _steps(samples)
    titles = ("previous", "now")[-len(later) :] if later else ()
    return {"SFT": first} | dict(zip(titles, later[-2:], strict=True))


def _steps(samples: list[dict[str, Any]]) -> list[int]:
    return sorted({sample["step"] for sample in samples})
