"""The decoder against transformers in float32, and against itself: padding, cache and masks change nothing."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity.models import MODELS
from ppo_jax.models import decoder, hf_io, layers
from ppo_jax.models.decoder import Decoder, head_logits, hidden_states, positions_from_mask, response_hidden
from ppo_jax.ops.logprobs import token_logprobs

LONG, SHORT = 270, 9


@pytest.fixture(scope="session")
def ours(hf_directory):
    """(spec, float32 parameters) of a name in `MODELS`, read from the directory that transformers wrote."""

    @functools.cache
    def load(name):
        _, directory = hf_directory(name)
        config = hf_io.load_config(directory)
        spec = hf_io.spec_of(config)
        return spec, hf_io.load_params(directory, config, spec)

    return load


@functools.partial(jax.jit, static_argnames="spec")
def logits_of(params, tokens, mask, spec):
    return head_logits(params, hidden_states(params, tokens, mask, spec=spec), spec=spec)


def left_padded(lengths, width, vocab=37, seed=0):
    """Random tokens, also under the padding, so that a leak of the padding shows."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (len(lengths), width)).astype(np.int32)
    return tokens, np.arange(width)[None] >= width - np.asarray(lengths)[:, None]


class Numbers(NamedTuple):
    """What a side makes of a batch: logits, log-probs of tokens 1 .., gradients of a loss under transformers' names."""

    logits: np.ndarray
    log_probs: np.ndarray
    gradients: dict[str, np.ndarray]


def loss_weights(mask):
    """Random weights on the log-probs of tokens that follow a real token; padding neither predicts nor is predicted."""
    weights = np.random.default_rng(5).normal(size=(len(mask), mask.shape[1] - 1)).astype(np.float32)
    return np.where(mask[:, :-1] & mask[:, 1:], weights, 0.0)


def numbers_of_transformers(model, tokens, mask) -> Numbers:
    import torch

    # torch gives the embedding of `pad_token_id` no gradient, as if that id could not be a real token.
    model.get_input_embeddings().padding_idx = None
    model.zero_grad()
    logits = model(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
    ).logits
    log_probs = torch.log_softmax(logits[:, :-1], dim=-1)
    chosen = log_probs.gather(-1, torch.tensor(tokens[:, 1:, None], dtype=torch.long))[..., 0]
    (torch.tensor(loss_weights(mask)) * chosen).sum().backward()
    gradients = {name: leaf.grad.numpy() for name, leaf in model.named_parameters() if leaf.grad is not None}
    return Numbers(logits.detach().numpy(), chosen.detach().numpy(), gradients)


@functools.partial(jax.jit, static_argnames="spec")
def loss_gradient(params, tokens, mask, weights, spec):
    def loss(params):
        logits = head_logits(params, hidden_states(params, tokens, mask, spec=spec), spec=spec)
        log_probs = token_logprobs(logits[:, :-1], tokens[:, 1:], temperature=1.0)
        return jnp.sum(weights * log_probs), (logits, log_probs)

    return jax.grad(loss, has_aux=True)(params)


@pytest.fixture(scope="session")
def both(hf_directory, ours):
    """(transformers' numbers, ours) of a name in `MODELS`: left padding, past the window, 270 positions, one token."""

    @functools.cache
    def compute(name):
        tokens, mask = left_padded([LONG, SHORT, 1], LONG)
        model, directory = hf_directory(name)
        spec, params = ours(name)
        gradients, outputs = loss_gradient(params, tokens, mask, loss_weights(mask), spec)
        exported = hf_io.export_tensors(hf_io.load_config(directory), spec, gradients, jnp.float32)
        mine = Numbers(np.asarray(outputs[0]), np.asarray(outputs[1]), exported)
        return numbers_of_transformers(model, tokens, mask), mine, mask

    return compute


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_log_probs_are_those_of_transformers(name, both):
    theirs, mine, mask = both(name)
    assert mine.logits.dtype == mine.log_probs.dtype == np.float32
    scale = np.abs(theirs.logits[mask]).max()
    assert scale > 1  # a dead model would prove nothing
    assert np.abs(mine.logits - theirs.logits)[mask].max() < 2e-5 * scale
    assert np.abs(mine.log_probs - theirs.log_probs)[mask[:, :-1]].max() < 2e-5 * scale


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_torch_autograd_for_every_tensor(name, both):
    theirs, mine, _ = both(name)
    # GPT-NeoX's head has one name in its files and, in some versions of transformers, another in its class.
    got, expected = (
        {name.replace("embed_out.", "lm_head."): leaf for name, leaf in side.gradients.items()}
        for side in (mine, theirs)
    )
    assert got.keys() == expected.keys()
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for tensor, leaf in expected.items():
        assert np.abs(got[tensor] - leaf).max() < 3e-5 * largest, tensor
        assert np.abs(leaf).max() > 1e-3 * largest or "k_proj.bias" in tensor, tensor  # no tensor is inert


PADDED = ["llama-biases", "gpt2-scaled", "gemma3"]
CACHED = [
    *PADDED,
    *("mistral", "qwen3", "smollm3-windows", "gemma2", "phi3", "pythia", "olmo2"),
]


@pytest.mark.parametrize("name", PADDED)
def test_amount_side_and_ids_of_padding_change_nothing(name, ours):
    spec, params = ours(name)
    tokens, _ = left_padded([SHORT, SHORT], SHORT)
    whole = logits_of(params, tokens, np.ones_like(tokens, bool), spec)
    for left, right, filler in ((5, 0, 0), (0, 5, 36), (2, 3, 17)):
        padding = ((0, 0), (left, right))
        padded = logits_of(
            params, np.pad(tokens, padding, constant_values=filler), np.pad(np.ones_like(tokens, bool), padding), spec
        )
        np.testing.assert_allclose(padded[:, left : left + SHORT], whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", PADDED)
def test_a_token_never_changes_what_comes_before_it(name, ours):
    spec, params = ours(name)
    tokens, mask = left_padded([SHORT, SHORT - 3], SHORT)
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 37
    before, after = (np.asarray(logits_of(params, x, mask, spec)) for x in (tokens, changed))
    earlier = mask & (np.arange(SHORT)[None] < 6)
    np.testing.assert_array_equal(before[earlier], after[earlier])
    assert (np.abs(before - after)[:, 6:].max(axis=(1, 2)) > 1e-2).all()


@pytest.mark.parametrize("name", CACHED)
def test_decoding_with_a_cache_equals_the_whole_forward_beyond_the_window_too(name, ours):
    spec, params = ours(name)
    prompt, new = 18, 6
    tokens, mask = left_padded([prompt + new, prompt + new - 3, new + 1], prompt + new, seed=1)
    whole = np.asarray(logits_of(params, tokens, mask, spec))
    apply = jax.jit(lambda *arguments: Decoder(spec).apply({"params": params}, *arguments))
    positions = np.asarray(positions_from_mask(jnp.asarray(mask)))

    hidden, cache = apply(
        tokens[:, :prompt], positions[:, :prompt], decoder.causal_visibility(jnp.asarray(mask[:, :prompt]))
    )
    hiddens = [hidden]
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, new), (0, 0)), constant_values=9.0), cache)
    for slot in range(prompt, prompt + new):
        visible = mask & (np.arange(prompt + new)[None] <= slot)
        hidden, cache = apply(
            tokens[:, slot : slot + 1], positions[:, slot : slot + 1], visible[:, None], cache, jnp.int32(slot)
        )
        hiddens.append(hidden)
    cached = np.asarray(head_logits(params, jnp.concatenate(hiddens, axis=1), spec=spec))
    assert np.abs(cached - whole)[mask].max() < 2e-5 * np.abs(whole[mask]).max()


def test_the_response_is_predicted_from_one_token_earlier(ours):
    spec, params = ours("llama-biases")
    tokens, mask = left_padded([8, 5], 9, seed=2)
    response_mask = np.array([[True] * 4, [True, True, False, False]])
    mask[:, 5:] = response_mask
    of_response = jax.jit(response_hidden, static_argnames="spec")
    hidden = of_response(params, tokens[:, :5], mask[:, :5], tokens[:, 5:], response_mask, spec=spec)
    whole = jax.jit(hidden_states, static_argnames="spec")(params, tokens, mask, spec=spec)
    np.testing.assert_allclose(hidden, whole[:, 4:8], rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(whole[:, 4:8] - whole[:, 5:9])).max() > 0.1


def test_gradients_are_finite_equal_with_and_without_recomputation_and_nowhere_inert(ours):
    spec, params = ours("llama-biases")
    tokens, mask = (jnp.asarray(x) for x in left_padded([SHORT, 2], SHORT))

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, remat):
        def loss(params):
            logits = head_logits(params, hidden_states(params, tokens, mask, spec=spec, remat=remat), spec=spec)
            log_probs = jax.nn.log_softmax(logits)[..., 3]
            return jnp.sum(jnp.where(mask, log_probs, 0.0))

        return jax.grad(loss)(params)

    plain, recomputed = gradient(params, False), gradient(params, True)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(recomputed), strict=True
    ):
        assert np.isfinite(leaf).all(), path
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-4)
        # A bias on the keys shifts every score of a query alike: its gradient is 0 in theory, and rotation spoils that.
        assert np.abs(leaf).max() > 1e-4, path


def test_bfloat16_parameters_are_computed_in_bfloat16_with_float32_logits(ours):
    spec, params = ours("llama-biases")
    tokens, mask = left_padded([SHORT, SHORT - 4], SHORT)
    half = decoder.cast(params, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    hidden = jax.eval_shape(functools.partial(hidden_states, spec=spec), half, jnp.asarray(tokens), jnp.asarray(mask))
    assert hidden.dtype == jnp.bfloat16
    logits = logits_of(half, tokens, mask, spec)
    assert logits.dtype == jnp.float32
    full = np.asarray(logits_of(params, tokens, mask, spec))
    error = np.abs(np.asarray(logits) - full)[mask]
    assert error.mean() < 0.02 * np.abs(full[mask]).max()


@pytest.mark.parametrize("kind", ["rms", "rms_offset", "layer"])
def test_a_norm_in_bfloat16_rounds_once_at_the_end(kind):
    generator = np.random.default_rng(0)
    x, weight, bias = (jnp.asarray(generator.normal(size=shape), jnp.bfloat16) for shape in ((1, 40, 64), 64, 64))
    params = {"scale": weight} | ({"bias": bias} if kind == "layer" else {})
    got = np.asarray(layers.Norm(kind, 1e-5).apply({"params": params}, x), np.float64)
    wide, gain, shift = (np.asarray(leaf, np.float64) for leaf in (x, weight, bias))
    wide = wide - wide.mean(-1, keepdims=True) if kind == "layer" else wide
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    exact = normed * (gain + (kind == "rms_offset")) + (shift if kind == "layer" else 0.0)
    # Half a unit of the last of bfloat16's 8 bits, and what float32 adds to terms that may cancel.
    assert (np.abs(got - exact) <= 2.0**-8 * np.abs(exact) + 1e-5).all()


def test_a_tied_head_is_the_embedding_and_no_array_of_its_own(ours):
    spec, params = ours("llama-tied")
    assert spec.tied_head
    assert "head" not in params
    hidden = jnp.ones((1, 1, spec.width))
    np.testing.assert_allclose(
        head_logits(params, hidden, spec=spec)[0, 0],
        np.asarray(params["embed"], np.float64).sum(1),
        rtol=1e-5,
        atol=1e-5,
    )


def test_positions_count_real_tokens_wherever_the_padding_sits():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(
        positions_from_mask(mask), [[0, 0, 0, 1, 2], [0, 1, 1, 1, 1], [0, 0, 1, 1, 2], [0, 0, 0, 0, 0]]
    )


def test_a_query_sees_real_tokens_up_to_itself():
    visible = decoder.causal_visibility(jnp.array([[False, True, True]]))
    np.testing.assert_array_equal(visible[0], [[False, False, False], [False, True, False], [False, True, True]])


def test_initial_parameters_have_the_declared_shapes_unit_gains_and_zero_biases(ours):
    spec, params = ours("llama-biases")
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert jax.tree.map(lambda leaf: leaf.shape, decoder.abstract_params(spec)) == shapes
    assert decoder.parameter_count(params) == sum(leaf.size for leaf in jax.tree.leaves(params))
    one_layer = dataclasses.replace(spec, layers=spec.layers[:1])
    fresh = jax.jit(decoder.init_params, static_argnums=0)(one_layer, jax.random.PRNGKey(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
        kind = path[-1].key
        if kind in ("scale", "bias"):
            assert (leaf == (1.0 if kind == "scale" else 0.0)).all(), path
        else:
            assert 0.01 < float(leaf.std()) < 0.03, path


@pytest.mark.parametrize("rows", [(2, 4), (1, 1)])
@pytest.mark.parametrize(("narrow", "wide"), [(3, 7), (7, 3), (5, 5), (6, 4)])
def test_a_matrix_product_and_its_gradients_are_the_ones_of_jax(rows, narrow, wide):
    shapes = ((*rows, narrow), (narrow, wide), (*rows, wide))
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    with jax.enable_x64(True):
        x, kernel, weights = (jax.random.normal(*of, jnp.float64) for of in zip(keys, shapes, strict=True))
        ours, of_jax = (
            (
                product(x, kernel),
                *jax.grad(lambda x, kernel, of=product: jnp.sum(weights * jnp.sin(of(x, kernel))), (0, 1))(x, kernel),
            )
            for product in (layers.matmul, jnp.matmul)
        )
        for found, derived in zip(ours, of_jax, strict=True):
            np.testing.assert_allclose(found, derived, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", [(2, 4), (1, 1)])
def test_a_matrix_product_in_bfloat16_stays_in_it_and_is_off_by_one_rounding(rows):
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    x, kernel = (jax.random.normal(*of).astype(jnp.bfloat16) for of in zip(keys, ((*rows, 64), (64, 48)), strict=True))
    exact = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
    found = jax.jit(layers.matmul)(x, kernel)
    assert found.dtype == jnp.bfloat16
    # bfloat16 has 8 significant bits, so one rounding is off by at most 2^-8 of a number.
    assert bool(jnp.all(jnp.abs(found.astype(jnp.float32) - exact) <= 1.001 * 2.0**-8 * jnp.abs(exact) + 1e-6))


@pytest.mark.parametrize("equation", ["rd,vd->rv", "rd,dv->rv"])
def test_a_product_in_float32_has_its_gradients_multiplied_in_the_dtype_of_its_operands(equation):
    shapes = {"rd": (7, 16), "vd": (24, 16), "dv": (16, 24)}
    keys = jax.random.split(jax.random.key(0), 2)
    operands = [jax.random.normal(key, shapes[of]) for key, of in zip(keys, equation[:-4].split(","), strict=True)]

    def loss(x, y):
        return jnp.sum(jnp.sin(layers.wide_einsum(equation, x, y)))

    gradients = jax.grad(loss, argnums=(0, 1))
    narrow = [x.astype(jnp.bfloat16) for x in operands]
    products = [eqn for eqn in jax.make_jaxpr(gradients)(*narrow).eqns if eqn.primitive.name == "dot_general"]
    assert len(products) == 3
    assert {var.aval.dtype.name for eqn in products for var in eqn.invars} == {"bfloat16"}
    assert layers.wide_einsum(equation, *narrow).dtype == jnp.float32
    for found, expected in zip(gradients(*narrow), gradients(*(x.astype(jnp.float32) for x in narrow)), strict=True):
        np.testing.assert_allclose(
            found.astype(jnp.float32), expected, rtol=0, atol=0.02 * float(jnp.abs(expected).max())
        )
