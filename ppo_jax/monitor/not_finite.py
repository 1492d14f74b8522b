"""Optimizer steps that were skipped because a number in them was not finite: what they were made of is kept."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ppo_jax import durable
from ppo_jax.processes import from_lead
from ppo_jax.sharding import read_on_lead

FOLDER, MOST_KEPT = "not_finite", 8
# Skipped optimizer steps in a row, over iterations, that end a run.
TOO_MANY_IN_A_ROW = 3

log = logging.getLogger("ppo_jax")


def cause(stats: Mapping[str, float]) -> str:
    """What was not finite in a skipped step, or in the means of several: the first in the order they are computed."""
    if not all(math.isfinite(value) for name, value in stats.items() if name.startswith("loss/")):
        return "loss"
    norms = (value for name, value in stats.items() if name.endswith("/grad_norm"))
    return "update" if all(math.isfinite(norm) for norm in norms) else "gradient"


def keep_batch(
    directory: Path,
    step: int,
    stats: list[dict[str, float]],
    minibatches: Iterable[np.ndarray],
    arrays: Mapping[str, Any],
    *,
    mesh: jax.sharding.Mesh,
    decode: Callable[[np.ndarray, np.ndarray], list[str]],
) -> None:
    """Write the batch of an iteration whose `stats` tell of skipped steps to `not_finite/step_XXXXXX`; else nothing.

    `arrays` are by answer, [B] or [B, T]; `minibatches` are the answers of each optimizer step. `batch.safetensors`
    holds the arrays, `batch.json` the causes and the texts. At most `MOST_KEPT` batches are kept, the first ones. Every
    process calls it; that it could not be written is a warning.
    """
    if not any(of_step["update/skipped_steps"] for of_step in stats):
        return
    skipped = [
        {"optimizer_step": i, "not_finite": cause(of_step), "answers": rows.tolist()}
        for i, (of_step, rows) in enumerate(zip(stats, minibatches, strict=False))
        if of_step["update/skipped_steps"]
    ]
    host = read_on_lead(mesh, {name: x for name, x in arrays.items() if x is not None})

    def write() -> None:
        causes = ", ".join(dict.fromkeys(entry["not_finite"] for entry in skipped))
        what = f"iteration {step}: {len(skipped)} of {len(stats)} optimizer steps were skipped, not finite: {causes}"
        path = directory / FOLDER / f"step_{step:06d}"
        if len(set(path.parent.glob("step_??????")) - {path}) >= MOST_KEPT:
            log.warning("warning: %s; %d batches are kept in %s already", what, MOST_KEPT, path.parent)
            return
        try:
            _write(path, skipped, host, decode)
        except (OSError, SafetensorError) as error:
            log.warning("warning: %s; the batch could not be kept: %s", what, error)
        else:
            log.warning("warning: %s; the batch is kept in %s", what, path)

    from_lead(write)


def _write(
    path: Path,
    skipped: list[dict[str, Any]],
    arrays: dict[str, np.ndarray],
    decode: Callable[[np.ndarray, np.ndarray], list[str]],
) -> None:
    prompts = decode(arrays["prompt_tokens"], arrays["prompt_mask"])
    answers = decode(arrays["response_tokens"], arrays["response_mask"])
    rows = [
        {"prompt": prompt, "answer": answer, "score": float(score)}
        for prompt, answer, score in zip(prompts, answers, arrays["seq_scores"], strict=True)
    ]
    text = json.dumps({"skipped": skipped, "answers": rows}, indent=1, ensure_ascii=False)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, partial / "batch.safetensors")
        (partial / "batch.json").write_text(text + "\n", encoding="utf-8")
        durable.publish(partial, path)
    except (OSError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
