"""Apply a function of [rows] arrays block by block, so that its temporaries exist for one block only.

The head of a language model turns [B, T, D] into [B, T, V]: for 8 answers of 512 tokens and a vocabulary of 151,936
that is 2.5 GB, twice with a reference. Every per-token number we need (log-probability, entropy, KL) is a function of
one row of it, so the rows are taken a few hundred at a time, and the same functions are called on every block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Bytes of float32 logits that one block may hold; a head's block then fits a GPU's or CPU's fast memory comfortably.
BLOCK_BYTES = 128 * 2**20
# A response axis is not halved below this: the prompt, and reading the weights, then cost more than what is saved.
SHORTEST_AXIS = 16


def rows_per_block(vocab_size: int, *, devices: int = 1) -> int:
    """How many rows of float32 logits, spread over some devices, fit `BLOCK_BYTES` on each; at least 8."""
    return max(8, devices * BLOCK_BYTES // (4 * vocab_size))


def map_row_blocks(rowwise: Callable[..., Any], *arrays: Array, block_rows: int) -> Any:
    """`rowwise` of [n, ...] arrays, applied block by block to [B, T, ...] arrays; a pytree of [B, T].

    A block is all B answers at some neighbouring positions, about `block_rows` rows and one position at least: B may be
    spread over devices. Where there are several blocks, the function is rematerialised in the backward pass: a gradient
    does not keep their temporaries either.
    """
    batch, length = arrays[0].shape[:2]
    width = max(1, min(length, block_rows // batch))
    blocks = -(-length // width)

    def flatten(x):
        return x.reshape(-1, *x.shape[2:])

    def split(x):
        padded = jnp.pad(x, [(0, 0), (0, blocks * width - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, blocks, width, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(batch, blocks * width, *x.shape[3:])[:, :length]

    def over_rows(*block):
        return jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[1:]), rowwise(*map(flatten, block)))

    if blocks == 1:
        return over_rows(*arrays)
    in_blocks = jax.lax.map(lambda block: jax.checkpoint(over_rows)(*block), tuple(map(split, arrays)))
    return jax.tree.map(join, in_blocks)


def micro_batches(tree: Any, size: int) -> Any:
    """Arrays [B, ...] as [B / size, size, ...]: micro-batch i takes every (B / size)-th row from row i on.

    Where the rows of a batch are spread over devices, such a micro-batch has rows on all of them; a run of neighbours
    would have them on a few, and the others would wait.
    """
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(size, -1, *x.shape[1:]), 0, 1), tree)


def merge_micro_batches(tree: Any) -> Any:
    """The inverse of `micro_batches`: [n, size, ...] to [B, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def shortest_together(response_mask: Bool[Array, "B T"], size: int) -> Int[Array, " B"]:
    """The order of the rows for which `micro_batches` has the shortest answers first and the longest last.

    Answers of one length are computed without padding, however ragged the batch is; which rows share a micro-batch
    changes no number but for rounding.
    """
    by_length = jnp.argsort(jnp.sum(response_mask, axis=1), stable=True)
    return by_length.reshape(-1, size).T.reshape(-1)


def at_shortest_axis(
    function: Callable[[int], Any], response_mask: Bool[Array, "B T"], *, min_new_tokens: int = 0
) -> Any:
    """`function(length)` of the shortest of T / 4, T / 2 and T that holds every answer of these rows.

    All of them are compiled but those that answers of `min_new_tokens` do not fit, one is computed; what they return
    has one shape. The mask is right-padded.
    """
    whole = response_mask.shape[1]
    lengths = [length for length in (whole // 4, whole // 2) if length >= max(SHORTEST_AXIS, min_new_tokens)] + [whole]
    needed = jnp.max(jnp.sum(response_mask, axis=1))
    too_short = sum((needed > length).astype(jnp.int32) for length in lengths[:-1])
    return jax.lax.switch(too_short, [partial(function, length) for length in lengths])


def with_length(x: Array, length: int) -> Array:
    """[B, T, ...] as [B, length, ...]: cut, or followed by zeros."""
    kept = x[:, :length]
    return jnp.pad(kept, [(0, 0), (0, length - kept.shape[1])] + [(0, 0)] * (x.ndim - 2))
