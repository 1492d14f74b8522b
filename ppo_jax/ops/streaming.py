"""Apply a function of [rows] arrays block by block, so that its temporaries exist for one block only.

The head of a language model turns [B, T, D] into [B, T, V]: for 8 answers of 512 tokens and a vocabulary of 151,936
that is 2.5 GB, twice with a reference. Every per-token number we need (log-probability, entropy, KL) is a function of
one row of it, so the rows are taken a few hundred at a time, and the same functions are called on every block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

# Bytes of float32 logits that one block may hold; a head's block then fits a GPU's or CPU's fast memory comfortably.
BLOCK_BYTES = 128 * 2**20


def rows_per_block(vocab_size: int) -> int:
    """How many rows of float32 logits fit `BLOCK_BYTES`, at least 8."""
    return max(8, BLOCK_BYTES // (4 * vocab_size))


def map_row_blocks(rowwise: Callable[..., Any], *arrays: Array, block_rows: int) -> Any:
    """`rowwise` of [n, ...] arrays, applied to [B, T, ...] arrays in blocks of `block_rows` rows; a pytree of [B, T].

    Where there are several blocks, the function is rematerialised in the backward pass: a gradient does not keep their
    temporaries either.
    """
    batch, length = arrays[0].shape[:2]
    rows = batch * length
    blocks = -(-rows // block_rows)

    def split(x):
        flat = x.reshape(rows, *x.shape[2:])
        padded = jnp.pad(flat, [(0, blocks * block_rows - rows)] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(blocks, block_rows, *flat.shape[1:])

    if blocks <= 1:
        outputs = rowwise(*(x.reshape(rows, *x.shape[2:]) for x in arrays))
    else:
        in_blocks = jax.lax.map(lambda block: jax.checkpoint(rowwise)(*block), tuple(split(x) for x in arrays))
        outputs = jax.tree.map(lambda x: x.reshape(blocks * block_rows, *x.shape[2:])[:rows], in_blocks)
    return jax.tree.map(lambda x: x.reshape(batch, length, *x.shape[1:]), outputs)
