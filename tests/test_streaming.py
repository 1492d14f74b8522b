"""Block by block equals all at once, in value and gradient, whatever the block size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ppo_jax.ops import kl
from ppo_jax.ops.logprobs import entropy, token_logprobs
from ppo_jax.ops.streaming import (
    BLOCK_BYTES,
    at_shortest_axis,
    map_row_blocks,
    micro_batches,
    rows_per_block,
    shortest_together,
)

B, T, D, V = 3, 5, 4, 11


def inputs():
    rng = np.random.default_rng(0)
    hidden, ref_hidden = rng.normal(size=(2, B, T, D)).astype(np.float32)
    return {
        "hidden": jnp.asarray(hidden),
        "ref_hidden": jnp.asarray(ref_hidden),
        "tokens": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "head": jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
    }


def per_row(head, hidden, ref_hidden, tokens):
    logits, ref_logits = hidden @ head, ref_hidden @ head
    return {
        "logprobs": token_logprobs(logits, tokens, temperature=0.7),
        "entropy": entropy(logits, temperature=0.7),
        "kl": kl.exact_token_kl(logits, ref_logits, temperature=0.7),
    }


def streamed(head, hidden, ref_hidden, tokens, block_rows):
    return map_row_blocks(lambda *rows: per_row(head, *rows), hidden, ref_hidden, tokens, block_rows=block_rows)


@pytest.mark.parametrize("block_rows", [1, 4, 15, 16, 1000])  # of 15 rows: even, ragged, whole, larger
def test_streaming_equals_the_whole_in_value_and_gradient(block_rows):
    x = inputs()

    def total(outputs):
        # Different weights per position, so that rows that change places are noticed.
        weights = jnp.arange(1.0, B * T + 1, dtype=jnp.float32).reshape(B, T)
        return sum(jnp.sum(weights * value) for value in outputs.values())

    def whole(head, hidden, ref_hidden):
        outputs = per_row(head, hidden, ref_hidden, x["tokens"])
        return total(outputs), outputs

    def in_blocks(head, hidden, ref_hidden):
        outputs = streamed(head, hidden, ref_hidden, x["tokens"], block_rows)
        return total(outputs), outputs

    arguments = x["head"], x["hidden"], x["ref_hidden"]
    expected_gradients, expected = jax.grad(whole, argnums=(0, 1, 2), has_aux=True)(*arguments)
    gradients, outputs = jax.jit(jax.grad(in_blocks, argnums=(0, 1, 2), has_aux=True))(*arguments)
    for name in expected:
        assert outputs[name].shape == (B, T)
        np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-5, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        scale = float(np.abs(expected_gradient).max())
        np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=2e-6 * scale)


def test_outputs_and_inputs_may_have_further_axes():
    x = jnp.arange(float(B * T * 2)).reshape(B, T, 2)
    doubled = map_row_blocks(lambda rows: 2 * rows, x, block_rows=4)
    np.testing.assert_array_equal(doubled, 2 * np.asarray(x))


def test_the_padding_of_the_last_block_cannot_poison_the_gradient():
    x = 1.0 + jnp.arange(float(B * T)).reshape(B, T)
    gradient = jax.grad(lambda x: jnp.sum(map_row_blocks(lambda rows: rows**2 / 2, x, block_rows=4)))(x)
    np.testing.assert_allclose(gradient, x, rtol=1e-6)


def test_no_array_of_all_logits_is_made_not_even_for_the_gradient():
    x = inputs()

    def loss(head):
        return jnp.sum(streamed(head, x["hidden"], x["ref_hidden"], x["tokens"], 2)["kl"])

    def arrays(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from arrays(inner)

    sizes = [int(np.prod(aval.shape)) for aval in arrays(jax.make_jaxpr(jax.grad(loss))(x["head"]).jaxpr)]
    assert max(sizes) >= 2 * V  # the walk does reach the blocks
    assert max(sizes) < B * T * V


def test_a_block_of_logits_fits_its_budget():
    for vocab in (1, 49_152, 151_936):
        assert rows_per_block(vocab) * vocab * 4 <= BLOCK_BYTES
        assert (rows_per_block(vocab) + 1) * vocab * 4 > BLOCK_BYTES
    assert rows_per_block(10**9) == 8


def right_padded(lengths, axis):
    return jnp.arange(axis)[None] < jnp.asarray(lengths)[:, None]


def test_micro_batches_hold_the_shortest_answers_first_and_every_answer_once():
    lengths = np.array([40, 3, 9, 1, 64, 8])
    order = shortest_together(right_padded(lengths, 64), 2)
    assert micro_batches(jnp.asarray(lengths)[order], 2).tolist() == [[1, 3], [8, 9], [40, 64]]


@pytest.mark.parametrize(
    ("longest", "axis", "expected"),
    [(0, 64, 16), (16, 64, 16), (17, 64, 32), (32, 64, 32), (33, 64, 64), (64, 64, 64), (1, 31, 31), (1, 32, 16)],
)
def test_the_axis_is_the_shortest_that_holds_every_answer(longest, axis, expected):
    assert int(at_shortest_axis(jnp.int32, right_padded([1, longest], axis))) == expected


@pytest.mark.parametrize(("least", "expected"), [(0, [16, 32, 64]), (16, [16, 32, 64]), (17, [32, 64]), (33, [64])])
def test_no_axis_is_compiled_that_the_shortest_answer_does_not_fit(least, expected):
    lengths = []

    def at_length(length):
        lengths.append(length)
        return jnp.int32(length)

    # An answer that was dropped has no token; it goes with the shortest axis there is.
    for longest, used in ((0, expected[0]), (64, 64)):
        lengths.clear()
        assert int(at_shortest_axis(at_length, right_padded([longest], 64), min_new_tokens=least)) == used
        assert lengths == expected
