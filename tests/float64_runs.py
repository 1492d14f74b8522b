"""`python -m tests.float64_runs OUT NAME ...`: the twin against ppo_jax in float64, for test_torch_models.

A process of its own, because JAX settles at its import whether there is a float64. Writes to OUT, by name of the model,
the largest error of the logits and of the gradients, these in units of the largest one.
"""

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_ENABLE_X64"], os.environ["JAX_PLATFORMS"] = "1", "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.cases import random_model
from parity.stacks import Pair
from ppo_jax.models.decoder import head_logits, hidden_states
from ppo_torch_ref.model import token_logits

LONG = 270


def ragged_batch():
    """Left-padded tokens, their mask, and random weights of the logits that predict a real token from a real one."""
    rng, mask = np.random.default_rng(0), np.arange(LONG)[None] >= LONG - np.array([[LONG], [9], [1]])
    weights = rng.normal(size=(3, LONG, 37)) * mask[..., None]
    return rng.integers(0, 37, mask.shape).astype(np.int32), mask, weights


@partial(jax.jit, static_argnames="spec")
def gradients_and_logits(params, tokens, mask, weights, spec):
    def loss(params):
        logits = head_logits(params, hidden_states(params, tokens, mask, spec=spec), spec=spec)
        return jnp.sum(weights * jax.nn.log_softmax(logits)), logits

    return jax.grad(loss, has_aux=True)(params)


def errors_of(name: str) -> dict[str, float]:
    tokens, mask, weights = ragged_batch()
    with tempfile.TemporaryDirectory() as directory:
        pair = Pair(random_model(name, Path(directory)), "float64")
        gradients, logits = gradients_and_logits(pair.params, tokens, mask, weights, spec=pair.spec)
        model = pair.model
    twin_logits = token_logits(model, torch.from_numpy(tokens), torch.from_numpy(mask))
    (torch.from_numpy(weights) * torch.log_softmax(twin_logits, dim=-1)).sum().backward()
    ours, theirs = pair.jax_named(gradients), {name: x.grad.numpy() for name, x in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(x).max() for x in theirs.values())
    return {
        "logits": float(np.abs(np.asarray(logits) - twin_logits.detach().numpy())[mask].max()),
        "gradients": float(max(np.abs(ours[name] - x).max() for name, x in theirs.items()) / largest),
    }


def main(file: str, *names: str) -> None:
    torch.set_num_threads(1)
    Path(file).write_text(json.dumps({name: errors_of(name) for name in names}), encoding="utf-8")


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    main(*sys.argv[1:])
