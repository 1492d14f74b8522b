"""`python -m benchmarks.roofline`: how near decode, scoring and update come to what this machine can do.

A decode step has to read every weight and the cache, so its limit is their bytes over the measured bandwidth of a copy.
Scoring and update are matrix products; their limit is the time that XLA takes for each of the same shape when it is
computed by itself. Attention, norms, the softmax over the vocabulary and AdamW are measured, but not in the limit. The
update's rate is also put beside that of one large square product, the dense rate.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.iteration import ours
from benchmarks.iteration.__main__ import machine
from benchmarks.iteration.workloads import WORKLOADS, Workload, prepare
from ppo_jax import host_memory, train
from ppo_jax.models.decoder import DecoderSpec
from ppo_jax.models.layers import matmul
from ppo_jax.monitor.clock import PhaseClock
from ppo_jax.ops.randomness import Purpose

REPEATS, COPIES, COPIED_BYTES = 7, 20, 2**30
SHORT = 8  # new tokens of the shorter of two rollouts, whose difference is decode steps alone


def all_seconds(function: Callable[..., Any], *arguments: Any, repeats: int, calls: int = 1) -> list[float]:
    """Of a call: `repeats` means of `calls` in a row; the first call of all, which compiles, is not counted."""
    jax.block_until_ready(function(*arguments))
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        outcome = None
        for _ in range(calls):  # one outcome is held, not all
            outcome = function(*arguments)
        jax.block_until_ready(outcome)
        taken.append((time.perf_counter() - started) / calls)
    return taken


def seconds(function: Callable[..., Any], *arguments: Any, calls: int = 1) -> float:
    """Median of some calls."""
    return statistics.median(all_seconds(function, *arguments, repeats=REPEATS, calls=calls))


def calls_in_a_row() -> int:
    """Of a single product: a GPU is told the next one while it computes, and waits for the host between two."""
    return 1 if jax.default_backend() == "cpu" else 20


def dense_rate(dtype: str) -> float:
    """Floating-point operations in a second of a square product, as large as a device needs for its best rate."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return 2 * size**3 / min(all_seconds(jax.jit(jnp.matmul), x, x, repeats=REPEATS, calls=calls_in_a_row()))


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a copy of an array that fits no cache. The quickest of many: the first ones
    go into memory that the system has yet to give."""
    array = jnp.ones(COPIED_BYTES // 4, jnp.float32)
    return 2 * COPIED_BYTES / min(all_seconds(jax.jit(lambda x: x + 1), array, repeats=COPIES))


def matrix_products(spec: DecoderSpec) -> dict[tuple[int, int], int]:
    """How often a token is multiplied by a weight [in, out] in a forward pass, without the head."""
    layers, into_mlp = len(spec.layers), 2 if spec.gated_mlp else 1
    shapes: dict[tuple[int, int], int] = {}
    for shape, times in (
        ((spec.width, spec.heads * spec.head_dim), layers),
        ((spec.width, spec.kv_heads * spec.head_dim), 2 * layers),
        ((spec.heads * spec.head_dim, spec.width), layers),
        ((spec.width, spec.mlp_width), into_mlp * layers),
        ((spec.mlp_width, spec.width), layers),
    ):
        shapes[shape] = shapes.get(shape, 0) + times
    return shapes


def products_seconds(spec: DecoderSpec, tokens: int, of_head: int, dtype: str, *, gradients: bool) -> tuple[float, int]:
    """(seconds of all matrix products of a pass, each timed by itself; their floating-point operations)."""
    total, operations = 0.0, 0
    shapes = [(tokens, shape, times) for shape, times in matrix_products(spec).items()]
    for rows, (inner, outer), times in [*filter(itemgetter(2), shapes), (of_head, (spec.width, spec.vocab_size), 1)]:
        x, kernel, gradient = (
            jax.random.normal(jax.random.key(0), shape, dtype)  # what is all alike can be quicker
            for shape in ((rows, inner), (inner, outer), (rows, outer))
        )
        products = [(jax.jit(matmul), (x, kernel))]
        if gradients:
            products.append((jax.jit(lambda g, x, w: jax.vjp(lambda x: matmul(x, w), x)[1](g)), (gradient, x, kernel)))
            products.append((jax.jit(lambda g, x, w: jax.vjp(lambda w: matmul(x, w), w)[1](g)), (gradient, x, kernel)))
        for product, operands in products:
            total += times * seconds(product, *operands, calls=calls_in_a_row())
            operations += times * 2 * rows * inner * outer
    return total, operations


def distances(workload: Workload, bandwidth: float, decode_batches: list[int]) -> dict[str, dict[str, float]]:
    """Of each phase: seconds, the limit in seconds, and the share of the limit.

    A decode step is measured for each of the numbers of answers, which the batch must hold.
    """
    run, state = ours.made(workload)
    found: dict[str, tuple[float, float]] = {}
    spec, config = run.model.spec, run.config
    batch, prompt, new = workload.batch, workload.prompt_tokens, workload.new_tokens
    with jax.set_mesh(run.mesh):
        prompts = run.prompts.batch(0, batch)
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
        width = jnp.dtype(workload.dtype).itemsize
        cache = 2 * spec.kv_heads * spec.head_dim * (prompt + (SHORT + new) / 2) * width * len(spec.layers)
        for answers in decode_batches:
            tokens, mask = jnp.asarray(prompts.tokens[:answers]), jnp.asarray(prompts.mask[:answers])

            def answer(length: int, tokens=tokens, mask=mask) -> Any:
                lengths = {"max_new_tokens": length, "min_new_tokens": length}
                settings = config.model_copy(update={"rollout": config.rollout.model_copy(update=lengths)})
                shorter = replace(run, config=settings, sampling=replace(run.sampling, min_new_tokens=length))
                return train.answer(shorter, state, tokens, mask, Purpose.ROLLOUT, step=0)

            step = (seconds(answer, new) - seconds(answer, SHORT)) / (new - SHORT)
            found[f"decode step, batch {answers}"] = (step, (weights * width / 4 + answers * cache) / bandwidth)

        clock, rows = PhaseClock(), (batch * (prompt + new), batch * new)
        taken: dict[str, list[float]] = {"score": [], "update": []}
        for index in range(2 + REPEATS):
            state, numbers = train.ppo_iteration(run, state, clock)
            if index >= 2:
                for phase in taken:
                    taken[phase].append(numbers[f"time/{phase}_s"])
    forward, _ = products_seconds(spec, *rows, workload.dtype, gradients=False)
    whole, operations = products_seconds(spec, *rows, workload.dtype, gradients=True)
    head, _ = products_seconds(replace(spec, layers=()), *rows, workload.dtype, gradients=False)
    of_policy = head if config.rollout.reuse_states else forward
    found["score"] = (statistics.median(taken["score"]), forward + of_policy)
    found["update"] = (statistics.median(taken["update"]), workload.epochs * whole)
    distance = {phase: {"s": of, "limit_s": limit, "share": limit / of} for phase, (of, limit) in found.items()}
    distance["update"]["flops_per_s"] = workload.epochs * operations / found["update"][0]
    distance["update"]["share_of_dense_rate"] = distance["update"]["flops_per_s"] / dense_rate(workload.dtype)
    return distance


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["smollm2", "tiny"])
    parser.add_argument("--decode-batches", nargs="+", type=int, default=[1, 8], help="answers of a decode step")
    parser.add_argument("--json", type=Path, help="write everything here too")
    options = parser.parse_args()
    before = machine()
    host_memory.keep_freed()
    console, bandwidth, found = Console(width=120), copy_bandwidth(), []
    console.print(f"copy: {bandwidth / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory() as directory:
        for name in options.workloads:
            ready = prepare(WORKLOADS[name], Path(directory) / name)
            phases = distances(ready, bandwidth, [of for of in options.decode_batches if of <= ready.batch])
            found.append({"workload": name, "batch": ready.batch, "phases": phases})
            table = Table("", "measured, s", "limit, s", "share of the limit", title=f"{name}, batch {ready.batch}")
            for phase, of in phases.items():
                table.add_row(phase, f"{of['s']:.4f}", f"{of['limit_s']:.4f}", f"{of['share']:.0%}")
            console.print(table)
            rate, share = phases["update"]["flops_per_s"], phases["update"]["share_of_dense_rate"]
            console.print(f"update: {rate / 1e9:.0f} GFLOP/s of matrix products, {share:.0%} of the dense rate")
    if options.json is not None:
        report = {"machine": before, "copy_bytes_per_s": bandwidth, "results": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
