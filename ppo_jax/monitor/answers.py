"""A few answers of ordinary iterations, kept for a person to read: the extremes and some at random."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppo_jax import jsonl, sharding
from ppo_jax.monitor.samples import numbers_of
from ppo_jax.monitor.sinks import open_from, read_rows
from ppo_jax.processes import is_lead
from ppo_jax.records import Rollout, Scored

FILE = "answers.jsonl"
AT_RANDOM = 2


def append(
    directory: Path,
    step: int,
    answers: Rollout,
    scored: Scored,
    *,
    prompts: list[str],
    texts: list[str],
    scores: np.ndarray,
    mesh: jax.sharding.Mesh,
    seed: int,
) -> None:
    """Add the picked answers of iteration `step` to `answers.jsonl`, on the disk at once.

    Prompts, texts and scores are those of this process's rows; of several processes the first picks among its own.
    """
    own = [sharding.read_own_rows(mesh, x) for x in (scored.token_kl, answers.response_mask)]  # takes all processes
    if not is_lead():
        return
    seq_kl, lengths = (x.sum(axis=1) for x in own)
    numbers = numbers_of(scores, seq_kl, lengths)
    rows = [
        {"step": step, "why": why, "prompt": prompts[i], "answer": texts[i]} | numbers[i]
        for i, why in pick(step, scores, seq_kl, lengths, seed=seed).items()
    ]
    with jsonl.writing(directory / FILE), (directory / FILE).open("a", encoding="utf-8") as file:
        file.write("".join(map(jsonl.line, rows)))
        file.flush()
        os.fsync(file.fileno())


def pick(step: int, scores: np.ndarray, seq_kl: np.ndarray, lengths: np.ndarray, *, seed: int) -> dict[int, list[str]]:
    """Which of B answers are kept, and why; an answer may be there for several reasons.

    Shapes: all [B]; scores in the units of the source, KL in nats, lengths in tokens. The random ones are a function of
    seed and step.
    """
    there = np.flatnonzero(lengths)  # an answer without a token was left out of the iteration
    if not len(there):
        return {}
    random = np.random.default_rng([seed, step]).permutation(there)[:AT_RANDOM]
    reasons = {
        "best": [there[np.argmax(scores[there])]],
        "worst": [there[np.argmin(scores[there])]],
        "longest": [there[np.argmax(lengths[there])]],
        "most divergent": [there[np.argmax(seq_kl[there])]],
        "random": random,
    }
    picked: dict[int, list[str]] = {}
    for why, indices in reasons.items():
        for i in indices:
            picked.setdefault(int(i), []).append(why)
    return picked


def cut_back(directory: Path, first_step: int) -> None:
    """Keep rows of iterations before `first_step` alone, as a resumed run begins."""
    if is_lead():
        open_from(directory / FILE, first_step).close()


def read(directory: Path) -> list[dict[str, Any]]:
    """All rows of `answers.jsonl`, none when there is no such file."""
    return read_rows(directory / FILE)
