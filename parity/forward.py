"""Levels L0 to L5 of a model: the same weights in both stacks, and what both make of the same tokens in one pass.

`operations` has the rows on shared inputs, where no error of the model can hide one of a formula.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from parity.cases import padded_sequences, ragged_answers
from parity.rows import Named, Row, named, numpy_of, row_of
from parity.stacks import Pair
from ppo_jax import scoring
from ppo_jax.models.decoder import Decoder, DecoderSpec, causal_visibility, positions_from_mask
from ppo_jax.ops import kl
from ppo_torch_ref import ops as torch_ops
from ppo_torch_ref import scoring as torch_scoring
from ppo_torch_ref.model import token_logits

TEMPERATURE = 0.7


def weights(pair: Pair) -> Iterator[Row]:
    """L0: every tensor after conversion is bitwise that of the file, none is left over, a tied head is one array."""
    files = pair.file_tensors()
    yield row_of(pair, "L0", "JAX weights and the file", pair.jax_named(pair.params), files)
    yield row_of(pair, "L0", "torch weights and the file", named(pair.model.state_dict()), files)
    one_array = {"head": np.array(["head" not in pair.params, not pair.model.has_own_head])}
    yield row_of(pair, "L0", "a tied head is the embedding", one_array, {"head": np.array([pair.spec.tied_head] * 2)})


def activations(pair: Pair) -> Iterator[Row]:
    """L2: what every attention and MLP adds, every layer's output and the final norm, at real tokens, in this order.

    The first name beyond the bound is where two models part ways.
    """
    for sequences in padded_sequences(pair.case.vocab_size):
        if sequences.layout not in ("left pad", "300 positions"):
            continue
        tokens, mask = jnp.asarray(sequences.tokens), jnp.asarray(sequences.mask)
        ours = named(_jax_stages(pair.params, tokens, mask, spec=pair.spec))
        theirs = _torch_stages(pair.model, torch.from_numpy(sequences.tokens), torch.from_numpy(sequences.mask))
        # In the order of the twin, which is that of computation; what comes out of a jit is sorted by name.
        kept = [{name: x[name][sequences.mask] for name in theirs} for x in (ours, theirs)]
        # Each in units of its own largest element, whose rounding is the largest.
        scale = {name: max(1.0, float(np.abs(x).max())) for name, x in kept[1].items()}
        ours, theirs = ({name: x / scale[name] for name, x in side.items()} for side in kept)
        yield row_of(pair, "L2", f"activations, {sequences.layout}", ours, theirs)


@partial(jax.jit, static_argnames="spec")
def _jax_stages(params: Any, tokens: jax.Array, mask: jax.Array, *, spec: DecoderSpec) -> dict[str, jax.Array]:
    """Outputs of the decoder's parts by name; "embedding" is what the first layer reads."""
    found: dict[str, jax.Array] = {}

    def keep(call, args, kwargs, context):
        name = "/".join(context.module.path)
        if name == "layer_0":
            found["embedding"] = args[0]
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and (name.endswith(("attn", "mlp", "final_norm")) or name.count("/") == 0):
            found[name] = result[0] if isinstance(result, tuple) else result
        return result

    with nn.intercept_methods(keep):
        Decoder(spec).apply({"params": params}, tokens, positions_from_mask(mask), causal_visibility(mask))
    found.pop("")  # the decoder itself, whose output is the final norm's
    return found


def _torch_stages(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> Named:
    """The same of the twin, by hooks on its `stages()`."""
    found: Named = {}
    stages = model.stages()

    def keep(name, module, inputs, output):
        found[name] = numpy_of(output)

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in stages.items()]
    hooks.append(
        stages["layer_0"].register_forward_pre_hook(lambda module, inputs: keep("embedding", module, (), inputs[0]))
    )
    with torch.no_grad():
        token_logits(model, tokens, mask)
    for hook in hooks:
        hook.remove()
    return found


def logits(pair: Pair) -> Iterator[Row]:
    """L3: logits at real tokens under every padding; in float32 also those of transformers."""
    models = {"twin": pair.model}
    if pair.dtype == "float32":
        models["transformers"] = AutoModelForCausalLM.from_pretrained(
            pair.case.directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    for name, model in models.items():
        ours, theirs = {}, {}
        for sequences in padded_sequences(pair.case.vocab_size):
            with torch.no_grad():
                twin = token_logits(model, torch.from_numpy(sequences.tokens), torch.from_numpy(sequences.mask))
            ours[sequences.layout] = numpy_of(pair.jax_logits(sequences.tokens, sequences.mask))[sequences.mask]
            theirs[sequences.layout] = numpy_of(twin)[sequences.mask]
        absolute = pair.dtype == "float64" and not pair.case.is_real
        scale = 1.0 if absolute else max(float(np.abs(x).max()) for x in ours.values())
        yield row_of(pair, "L3", f"logits, {name}", ours, theirs, scale=scale)


@cache
def scored_answers(pair: Pair) -> tuple[Named, Named, np.ndarray]:
    """What both stacks' scoring says of the same answers, [B, T] each, and the response mask; micro-batches differ."""
    answers = ragged_answers(pair.case.vocab_size)
    ours, theirs = pair.rollouts(answers)
    scored = scoring.score(
        pair.params,
        pair.ref_params,
        ours,
        scoring=scoring.Scoring(spec=pair.spec, temperature=TEMPERATURE, compute_dtype=pair.dtype, micro_batch_size=3),
        keep_ref_hidden=True,
    )
    twin = torch_scoring.score(pair.model, pair.ref_model, theirs, temperature=TEMPERATURE, micro_batch_size=2)
    return named(vars(scored)), named(vars(twin)), answers.response_mask


def log_probs(pair: Pair) -> Iterator[Row]:
    """L4: log-probs of both models and entropy, at temperature 0.7, as scoring (step 3) computes them."""
    *stacks, mask = scored_answers(pair)
    names = ("old_logprobs", "ref_logprobs", "token_entropy")
    ours, theirs = ({name: scored[name][mask] for name in names} for scored in stacks)
    yield row_of(pair, "L4", "log-probs and entropy of answers", ours, theirs)


def divergences(pair: Pair) -> Iterator[Row]:
    """L5: exact KL, k1, k2 and k3 of policy and reference, per token and per answer."""
    *stacks, mask = scored_answers(pair)
    per_token = []
    for scored, estimators, convert in zip(stacks, (kl, torch_ops), (jnp.asarray, torch.from_numpy), strict=True):
        sampled = (convert(scored["old_logprobs"]), convert(scored["ref_logprobs"]))
        estimates = {name: numpy_of(getattr(estimators, name)(*sampled)) for name in ("k1", "k2", "k3")}
        per_token.append({"exact": scored["token_kl"]} | estimates)
    for name, values in per_token[1].items():
        # Of two log-probs k1 has the errors whole, k2 and k3 have them times their own size.
        scale = 1.0 if name == "exact" else 4.0 * max(1.0, float(np.abs(values).max()) * (name != "k1"))
        ours, theirs = ({f"token {name}": stack[name][mask]} for stack in per_token)
        yield row_of(pair, "L5", f"{name} KL per token", ours, theirs, scale=scale)
        ours, theirs = ({f"answer {name}": stack[name].sum(axis=1)} for stack in per_token)
        yield row_of(pair, "L5", f"{name} KL per answer", ours, theirs, scale=scale * mask.shape[1])
