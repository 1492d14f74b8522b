"""`python -m benchmarks.halved_batch`: what `rollout.halvings` saves where answers end at different times.

Draws the answers of SmolLM2 (`make smollm2`) to its prompts, sampled as configs/article.yaml has it, with 0, 1, 2 ...
halvings in turn. Prints how long the answers are, and the medians; the first call of each compiles and is not counted.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.iteration.__main__ import machine
from ppo_jax import build, host_memory, train
from ppo_jax.config_file import load
from ppo_jax.ops.randomness import Purpose
from ppo_jax.records import Rollout


def drawn(options: argparse.Namespace) -> dict[str, Any]:
    """Lengths of the answers, and by halvings the seconds of every call and whether its tokens are those without."""
    prompts = {"prompts.path": "configs/smollm2_prompts.jsonl", "prompts.chat_template": True}
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        overrides = prompts | {"model.path": options.model, "run.dir": f"{directory}/run"}
        run, state = build.build(load("configs/article.yaml", overrides=overrides))
        run.lock.release()
    batch = run.prompts.batch(0, run.prompts_per_iteration)
    tokens, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.mask)

    def answer(halvings: int) -> tuple[float, Rollout]:
        settings = run.config.rollout.model_copy(update={"halvings": halvings})
        of = replace(run, config=run.config.model_copy(update={"rollout": settings}))
        started = time.perf_counter()
        made = jax.block_until_ready(train.answer(of, state, tokens, mask, Purpose.ROLLOUT, step=0))
        return time.perf_counter() - started, made

    with jax.set_mesh(run.mesh):
        plain = answer(0)[1]
        for index in range(1 + options.rounds):
            for halvings in range(1 + options.most):
                seconds, made = answer(halvings)
                if index == 0:
                    same = np.array_equal(made.response_tokens, plain.response_tokens)
                    found[halvings] = {"same_tokens": same, "seconds": []}
                else:
                    found[halvings]["seconds"].append(seconds)
    return {"lengths": np.sort(np.sum(plain.response_mask, axis=1)).tolist(), "halvings": found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.halved_batch", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--most", type=int, default=4, help="the largest number of halvings")
    parser.add_argument("--rounds", type=int, default=5, help="counted calls of each")
    parser.add_argument("--json", type=Path, help="write everything here too")
    options = parser.parse_args()
    before = machine()
    host_memory.keep_freed()
    found, console = drawn(options), Console()
    console.print(f"{len(found['lengths'])} answers, tokens: {found['lengths']}")
    table = Table("halvings", "rollout, s", "0 / this", "tokens as with 0")
    plain = statistics.median(found["halvings"][0]["seconds"])
    for halvings, of in found["halvings"].items():
        seconds = statistics.median(of["seconds"])
        table.add_row(str(halvings), f"{seconds:.2f}", f"{plain / seconds:.2f}", "yes" if of["same_tokens"] else "no")
    console.print(table)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": before} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
