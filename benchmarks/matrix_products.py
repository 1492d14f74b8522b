"""`python -m benchmarks.matrix_products`: XLA's matrix products beside torch's, at the shapes of SmolLM2-135M.

For 1 and 8 rows (decode) and 512 (an update): x W with W stored (in, out) and (out, in), and, for 512 rows, the
product that gives the gradient of x. 30 weights of each shape are taken in turn, as layers are, and the head once.
Prints GFLOP/s, and for decode the GB/s of the weights.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from jax.lax import dot_general
from rich.console import Console
from rich.table import Table

SHAPES = {
    "q, o": (576, 576),
    "k, v": (576, 192),
    "q, k, v in one": (576, 960),
    "gate, up": (576, 1536),
    "gate and up in one": (576, 3072),
    "down": (1536, 576),
    "head": (576, 49_152),
}
ROWS, LAYERS, REPEATS = (1, 8, 512), 30, 15
LAST = (((1,), (1,)), ((), ()))  # both operands' last axes are summed


def seconds(call: Callable[[], Any]) -> float:
    call()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def of_jax(product: Callable[..., jax.Array], x: jax.Array, others: list[jax.Array]) -> float:
    compiled = jax.jit(lambda x, others: [product(x, other) for other in others])
    return seconds(lambda: jax.block_until_ready(compiled(x, others)))


def measure(rows: int, inner: int, outer: int) -> dict[str, float]:
    """Seconds of one product in each form."""
    layers = 1 if outer > 10_000 else LAYERS
    random = np.random.default_rng(0)
    x, gradient = (random.standard_normal((rows, width), np.float32) for width in (inner, outer))
    weights = [random.standard_normal((inner, outer), np.float32) for _ in range(layers)]
    transposed = [np.ascontiguousarray(weight.T) for weight in weights]
    on_device, on_device_transposed, x_, gradient_ = jax.device_put((weights, transposed, x, gradient))
    tensors, tx, tg = [torch.from_numpy(w) for w in transposed], torch.from_numpy(x), torch.from_numpy(gradient)
    found = {
        "(in, out)": of_jax(lambda x, w: x @ w, x_, on_device),
        "(out, in)": of_jax(lambda x, w: dot_general(x, w, LAST), x_, on_device_transposed),
        "torch": seconds(lambda: [tx @ w.T for w in tensors]),
    }
    if rows > 8:
        found |= {
            "gradient of x": of_jax(lambda g, w: dot_general(g, w, LAST), gradient_, on_device),
            "torch, of x": seconds(lambda: [tg @ w for w in tensors]),
        }
    return {form: of / layers for form, of in found.items()}


def main() -> None:
    console = Console(width=130)
    console.print(f"JAX {jax.__version__}, torch {torch.__version__}")
    for rows in ROWS:
        table = None
        for name, (inner, outer) in SHAPES.items():
            found = measure(rows, inner, outer)
            table = table or Table(f"{rows} rows", *found)
            operations, size = 2 * rows * inner * outer, 4 * inner * outer
            rates = (f"{operations / of / 1e9:.0f} GFLOP/s" for of in found.values())
            if rows <= 8:
                rates = (f"{of * 1e3:.3f} ms, {size / of / 1e9:.0f} GB/s" for of in found.values())
            table.add_row(f"{name} {inner} x {outer}", *rates)
        assert table is not None
        console.print(table)


if __name__ == "__main__":
    main()
