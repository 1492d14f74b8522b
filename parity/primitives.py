"""Level L1: the primitives that every model is made of, on shared inputs, of both stacks and of the oracle."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from parity import oracle_layers
from parity.operations import Results, call_all, compare_all, in_all
from parity.rows import Row, numpy_of
from ppo_jax.models import config_fields, layers, rope
from ppo_jax.ops import logprobs, masking
from ppo_torch_ref import layers as torch_layers
from ppo_torch_ref import rope as torch_rope

NORM_EPS = 1e-3
NORMS: dict[str, Callable[[int], torch.nn.Module]] = {
    "rms": partial(torch_layers.RMSNorm, eps=NORM_EPS),
    "rms_offset": partial(torch_layers.RMSNorm, eps=NORM_EPS, offset=1.0),
    "layer": partial(torch.nn.LayerNorm, eps=NORM_EPS),
}


def primitives(dtype: str) -> Iterator[Row]:
    """L1: norms, activations, rotations, attention, log-softmax and gather, masked moments."""
    yield from compare_all("L1", dtype, "norms", *(_norm(dtype, kind) for kind in NORMS))
    yield from compare_all("L1", dtype, "activations", *(_activation(dtype, name) for name in torch_layers.ACTIVATIONS))
    yield from _rotations(dtype)
    yield from compare_all("L1", dtype, "attention", *(_attention(dtype, softcap) for softcap in (None, 1.5)))
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(0, 3, (6, 50)), np.arange(6, dtype=np.int32)
    yield from compare_all(
        "L1",
        dtype,
        "log-softmax and gather",
        call_all(dtype, logprobs.token_logprobs, logits, tokens, temperature=1.0),
    )
    x, mask = rng.normal(0.5, 1, (4, 9)), rng.random((4, 9)) < 0.6
    yield from compare_all(
        "L1",
        dtype,
        "masked sum, mean and variance",
        *(call_all(dtype, f, x, mask) for f in (masking.masked_sum, masking.masked_mean, masking.masked_var)),
        *(call_all(dtype, f, x, ~(x == x), also=" of nothing") for f in (masking.masked_mean, masking.masked_var)),
    )


def _norm(dtype: str, kind: str) -> Results:
    """A norm of the JAX kinds; vectors far above epsilon, near it, and one that is 0."""
    rng = np.random.default_rng(0)
    x = np.array([1.0, 0.03, 0.0])[None, :, None] * rng.normal(0.5, 1, (2, 3, 24))
    arrays, tensors, (vectors, gain, bias) = in_all(dtype, (x, rng.normal(1, 0.3, 24), rng.normal(0, 0.3, 24)))
    params: dict[str, Any] = {"scale": arrays[1]}
    state: dict[str, Any] = {"weight": tensors[1]}
    if kind == "layer":
        params["bias"], state["bias"] = arrays[2], tensors[2]
        exact = [oracle_layers.layer_norm(v, gain, bias, eps=NORM_EPS) for v in vectors.reshape(-1, 24)]
    else:
        gain = gain + (kind == "rms_offset")
        exact = [oracle_layers.rms_norm(v, gain, eps=NORM_EPS) for v in vectors.reshape(-1, 24)]
    return Results(
        {kind: numpy_of(layers.Norm(kind, NORM_EPS).apply({"params": params}, arrays[0]))},
        {kind: numpy_of(torch.func.functional_call(NORMS[kind](24), state, (tensors[0],)))},
        {kind: np.array(exact).reshape(x.shape)},
    )


def _activation(dtype: str, name: str) -> Results:
    """The activation that a Hugging Face config calls `name`."""
    kind = config_fields.ACTIVATION_NAMES[name]
    (array,), (tensor,), (exact,) = in_all(dtype, (np.linspace(-8, 8, 161),))
    return Results(
        {name: numpy_of(layers.ACTIVATIONS[kind](array))},
        {name: numpy_of(torch_layers.ACTIVATIONS[name](tensor))},
        {name: np.array([oracle_layers.ACTIVATIONS[kind](float(x)) for x in exact])},
    )


def _rotations(dtype: str) -> Iterator[Row]:
    """All channels of a head, and six of its ten, sharpened; up to an angle of 300 radians."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (2, 4, 3, 10))
    positions = np.array([[0, 1, 17, 300], [0, 0, 0, 1]], np.int32)
    (array, where), (tensor, there), (exact, _) = in_all(dtype, (x, positions))
    calls = []
    for name, pairs, factor in (("whole", 5, 1.0), ("partial", 3, 1.3)):
        frequencies = 500.0 ** -(np.arange(pairs) / pairs)
        turned = np.empty(x.shape)
        for b, s, n in np.ndindex(x.shape[:3]):
            turned[b, s, n] = oracle_layers.rotate(exact[b, s, n], int(positions[b, s]), list(frequencies), factor)
        calls.append(
            Results(
                {name: numpy_of(rope.rotate(array, where, rope.RopeSpec(tuple(frequencies.tolist()), factor)))},
                {name: numpy_of(torch_rope.rotate(tensor, there, frequencies, factor))},
                {name: turned},
            )
        )
    yield from compare_all("L1", dtype, "rotations", *calls, scale=float(np.abs(x).max()))


def _attention(dtype: str, softcap: float | None) -> Results:
    """Two queries to a key head; a causal mask with padding in front, whose queries see nothing and are left out."""
    rng = np.random.default_rng(0)
    queries, keys, values = (rng.normal(0, 1, (2, 5, heads, 6)) for heads in (4, 2, 2))
    visible = np.tril(np.ones((2, 5, 5), bool))
    visible[1, :, :2] = False
    arrays, tensors, exact = in_all(dtype, (queries, keys, values, visible))
    settings: dict[str, Any] = {"scale": 0.6, "softcap": softcap}
    q, k, v, seen = exact
    mixed = np.zeros(queries.shape)
    for b, s, n in np.ndindex(queries.shape[:3]):
        sees = seen[b, s]
        if sees.any():
            mixed[b, s, n] = oracle_layers.attend(q[b, s, n], k[b, sees, n // 2], v[b, sees, n // 2], **settings)
    by_head, by_head_too = (x.swapaxes(1, 2) for x in arrays[1:3])
    ours = layers.attend(arrays[0], by_head, by_head_too, arrays[3], **settings)
    theirs = torch_layers.attend(tensors[0], tensors[1], tensors[2], tensors[3], **settings)
    name, read = f"cap {softcap}", visible.any(axis=2)
    ours, theirs = (numpy_of(x).reshape(queries.shape) for x in (ours, theirs))
    return Results({name: ours[read]}, {name: theirs[read]}, {name: mixed[read]})
