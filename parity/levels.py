"""The levels of the ladder: each compares the numbers that both stacks make of one model, through the entry points of
training. `operations` has the rows on shared inputs, where no error of the model can hide one of a formula.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from transformers import AutoModelForCausalLM

from parity.cases import padded_sequences, ragged_answers
from parity.rows import Named, Row, bound_of, compare, named, numpy_of
from parity.stacks import Pair, in_both, split_key_bias
from ppo_jax import records, scoring, update
from ppo_jax.config import UpdateConfig
from ppo_jax.ops import losses
from ppo_torch_ref import ops as torch_ops
from ppo_torch_ref import scoring as torch_scoring
from ppo_torch_ref import update as torch_update
from ppo_torch_ref.model import token_logits

TEMPERATURE = 0.7
KL_COEF = 0.3
CLIP_EPS = 0.2
OPTIMIZER_STEPS = 20
OPTIMIZER = UpdateConfig(
    learning_rate=5e-5, schedule="cosine", warmup_steps=2, max_grad_norm=1.0, weight_decay=0.1, minibatch_size=6
)
# One object per normaliser: what is compiled for an objective is found again only by an equal one.
CONSTANT = {
    "ours": partial(losses.constant_weights, max_response_tokens=9),
    "theirs": partial(torch_ops.constant_weights, max_response_tokens=9),
}
TOKEN_MEAN = {"ours": losses.token_mean_weights, "theirs": torch_ops.token_mean_weights}


@dataclass(frozen=True)
class Update:
    """What one comparison of an update exercises: the ratio's clipping, the norm's clipping, the half of the KL in the
    loss."""

    name: str
    ratio_clipped: bool = True
    norm_clipped: bool = False
    kl_in_loss: bool = False


LOSSES = (
    Update("clipping inactive", ratio_clipped=False),
    Update("clipping active"),
    Update("exact KL in the loss", kl_in_loss=True),
)
STEPS = (
    Update("norm clipping inactive"),
    Update("norm clipping active", norm_clipped=True),
    Update("exact KL in the loss", norm_clipped=True, kl_in_loss=True),
)


def bound_for(pair: Pair, level: str) -> float:
    return bound_of(level, pair.dtype, is_real=pair.case.is_real)


def row_of(
    pair: Pair,
    level: str,
    compared: str,
    ours: Named,
    theirs: Named,
    *,
    scale: float = 1.0,
    bound: float | None = None,
) -> Row:
    """Row of this pair; its bound is `scale` times that of the level, unless given."""
    bound = scale * bound_for(pair, level) if bound is None else bound
    return compare(level, pair.dtype, pair.case.name, compared, ours, theirs, bound=bound)


def weights(pair: Pair) -> Iterator[Row]:
    """L0: every tensor after conversion is bitwise that of the file, none is left over, a tied head is one array."""
    files = pair.file_tensors()
    yield row_of(pair, "L0", "JAX weights and the file", pair.jax_named(pair.params), files)
    yield row_of(pair, "L0", "torch weights and the file", named(pair.model.state_dict()), files)
    one_array = {"head": np.array(["head" not in pair.params, pair.model.lm_head is None])}
    yield row_of(pair, "L0", "a tied head is the embedding", one_array, {"head": np.array([pair.spec.tied_head] * 2)})


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
        scale = max(float(np.abs(x).max()) for x in ours.values()) if pair.dtype == "float32" else 1.0
        yield row_of(pair, "L3", f"logits, {name}", ours, theirs, scale=scale)


@lru_cache(maxsize=8)
def scored_answers(pair: Pair) -> tuple[Named, Named, np.ndarray]:
    """What both stacks' scoring says of the same answers, [B, T] each, and the response mask; micro-batches differ."""
    answers = ragged_answers(pair.case.vocab_size)
    ours, theirs = pair.rollouts(answers)
    scored = scoring.score(
        pair.params,
        pair.ref_params,
        ours,
        spec=pair.spec,
        temperature=TEMPERATURE,
        compute_dtype=pair.dtype,
        micro_batch_size=3,
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
    """L5: exact KL, k1 and k3 of policy and reference, per token and per answer."""
    *stacks, mask = scored_answers(pair)
    per_token = []
    for scored in stacks:
        sampled = (torch.from_numpy(scored["old_logprobs"]), torch.from_numpy(scored["ref_logprobs"]))
        k1, k3 = numpy_of(torch_ops.k1(*sampled)), numpy_of(torch_ops.k3(*sampled))
        per_token.append({"exact": scored["token_kl"], "k1": k1, "k3": k3})
    for name in ("exact", "k1", "k3"):
        # k1 keeps the errors of two log-probs whole; k3 is as exact as they are relative to its size.
        scale = {"exact": 1.0, "k1": 4.0, "k3": max(1.0, float(per_token[1]["k3"].max()))}[name]
        ours, theirs = ({f"token {name}": stack[name][mask]} for stack in per_token)
        yield row_of(pair, "L5", f"{name} KL per token", ours, theirs, scale=scale)
        ours, theirs = ({f"answer {name}": stack[name].sum(axis=1)} for stack in per_token)
        yield row_of(pair, "L5", f"{name} KL per answer", ours, theirs, scale=scale * mask.shape[1])


def experience(
    pair: Pair, case: Update, *, advantage_scale: float = 1.0
) -> tuple[records.Experience, torch_update.Experience]:
    """Ragged answers with random advantages; where ratios are to be clipped the old policy is far off."""
    scored, _, mask = scored_answers(pair)
    rng = np.random.default_rng(0)
    off_policy, advantages = (np.where(mask, rng.normal(0, scale, mask.shape), 0) for scale in (0.3, advantage_scale))
    old_logprobs = scored["old_logprobs"] + off_policy * case.ratio_clipped
    arrays, tensors = in_both(
        pair.dtype, (*vars(ragged_answers(pair.case.vocab_size)).values(), old_logprobs, advantages)
    )
    ref_hidden = jnp.asarray(scored["ref_hidden"], pair.dtype) if case.kl_in_loss else None
    return records.Experience(*arrays, ref_hidden=ref_hidden), torch_update.Experience(*tensors)


def objectives(
    pair: Pair, case: Update, loss_weights: dict[str, Callable], *, ours: int, theirs: int
) -> tuple[update.Objective, torch_update.Objective]:
    """The objective of both stacks, each with its own micro-batch size."""
    common: Any = {"temperature": TEMPERATURE, "clip_eps": CLIP_EPS}
    return (
        update.Objective(
            **common,
            spec=pair.spec,
            loss_weights=loss_weights["ours"],
            compute_dtype=pair.dtype,
            micro_batch_size=ours,
            remat=False,
        ),
        torch_update.Objective(
            **common, loss_weights=loss_weights["theirs"], micro_batch_size=theirs, kl_in_loss=case.kl_in_loss
        ),
    )


_loss_and_gradients = jax.jit(update.loss_and_gradients, static_argnames="objective")


@lru_cache(maxsize=8)
def backward(pair: Pair, case: Update) -> tuple[tuple[Named, Named], tuple[Named, Named]]:
    """((statistics, gradients), those of the twin) of a minibatch: ours of the whole, the twin's over micro-batches."""
    batch, twin_batch = experience(pair, case)
    objective, twin_objective = objectives(pair, case, CONSTANT, ours=6, theirs=2)
    kl_coef = jnp.asarray(KL_COEF, pair.dtype)
    loss, sums, gradients = _loss_and_gradients(pair.params, pair.ref_params, batch, kl_coef, objective=objective)
    model = pair.new_model()
    twin_loss, twin_sums = torch_update.loss_and_gradients(model, pair.ref_model, twin_batch, KL_COEF, twin_objective)
    twin_gradients = {name: param.grad for name, param in model.named_parameters()}
    return (
        (_statistics(loss, sums), pair.jax_named(gradients)),
        (_statistics(twin_loss, twin_sums), named(twin_gradients)),
    )


def _statistics(loss: Any, sums: dict[str, Any]) -> Named:
    tokens = sums["tokens"]
    return named(
        {
            "loss": loss,
            "loss_policy": sums["loss_policy"],
            "loss_kl": sums["loss_kl"],
            "tokens": tokens,
            "clip_frac": sums["clipped_tokens"] / tokens,
            "approx_kl": sums["approx_kl_nats"] / tokens,
            "ratio_max": sums["ratio_max"],
        }
    )


def loss(pair: Pair) -> Iterator[Row]:
    """L7: loss, clip fraction, approximate KL and largest ratio of the update's own forward pass."""
    for case in LOSSES:
        (ours, _), (theirs, _) = backward(pair, case)
        ours, theirs, what = dict(ours), dict(theirs), case.name
        ratio, twin_ratio = ({"ratio_max": stack.pop("ratio_max")} for stack in (ours, theirs))
        yield row_of(pair, "L7", f"loss and statistics, {what}", ours, theirs)
        # A ratio is as exact, relatively, as the log-probs it is made of.
        limit = float(twin_ratio["ratio_max"]) * bound_for(pair, "L4")
        yield row_of(pair, "L7", f"largest ratio, {what}", ratio, twin_ratio, bound=limit)
        yield from _is_active(pair, "L7", what, bool(ours["clip_frac"] > 0), case.ratio_clipped)
        yield from _is_active(pair, "L7", what, bool(ours["loss_kl"] > 0), case.kl_in_loss)


def _is_active(pair: Pair, level: str, what: str, found: bool, expected: bool) -> Iterator[Row]:
    """A row only where a case does not exercise what its name says."""
    if found != expected:
        yield row_of(pair, level, what, {what: np.array(found)}, {what: np.array(expected)}, bound=0.0)


def gradient(pair: Pair) -> Iterator[Row]:
    """L8: the gradient of every tensor, in units of the largest one of the model."""
    for case in LOSSES:
        (_, ours), (_, theirs) = backward(pair, case)
        largest = max(float(np.abs(x).max()) for x in theirs.values())
        (ours, ours_zero), (theirs, theirs_zero) = split_key_bias(ours), split_key_bias(theirs)
        what = case.name
        yield row_of(pair, "L8", f"gradients, {what}", ours, theirs, scale=largest)
        if ours_zero:
            zeros = {name: np.zeros_like(x) for name, x in ours_zero.items()}
            for name, found in (("JAX", ours_zero), ("torch", theirs_zero)):
                yield row_of(pair, "L8", f"{name} key biases are 0, {what}", found, zeros, scale=largest)


def optimizer(pair: Pair) -> Iterator[Row]:
    """L9: parameters, moments and statistics after 1 and 20 steps; ours in micro-batches, the twin's whole."""
    jax_optimizer = update.make_optimizer(OPTIMIZER, OPTIMIZER_STEPS)
    kl_coef = jnp.asarray(KL_COEF, pair.dtype)
    for case in STEPS:
        objective, twin_objective = objectives(pair, case, TOKEN_MEAN, ours=2, theirs=6)
        batch, twin_batch = experience(pair, case, advantage_scale=10.0 if case.norm_clipped else 1e-2)
        params, model = jax.tree.map(jnp.copy, pair.params), pair.new_model()
        state, twin = jax_optimizer.init(params), torch_optimizer(model)
        for step in range(1, OPTIMIZER_STEPS + 1):
            params, state, stats = update.ppo_step(
                params,
                state,
                pair.ref_params,
                batch,
                jnp.arange(6),
                kl_coef,
                optimizer=jax_optimizer,
                objective=objective,
            )
            twin_stats = torch_update.ppo_step(
                model, twin, pair.ref_model, twin_batch, KL_COEF, objective=twin_objective
            )
            if step not in (1, OPTIMIZER_STEPS):
                continue
            what = f"step {step}, {case.name}"
            clipped = bool(stats["update/grad_norm"] > OPTIMIZER.max_grad_norm)
            yield from _is_active(pair, "L9", what, clipped, case.norm_clipped)
            yield row_of(pair, "L9", f"statistics, {what}", *_in_own_units(named(stats), named(twin_stats)))
            yield from _parameter_rows(pair, what, pair.jax_named(params), named(model.state_dict()), step)
            # A square doubles the relative error of what is squared.
            for moment, factor in (("mu", 1), ("nu", 2)):
                ours = pair.jax_named(optax.tree_utils.tree_get(state, moment))
                theirs = named(getattr(twin, moment))
                largest = max(float(np.abs(x).max()) for x in theirs.values())
                yield row_of(pair, "L9", f"{moment}, {what}", ours, theirs, scale=factor * largest)


def _in_own_units(ours: Named, theirs: Named) -> tuple[Named, Named]:
    """Both divided by the size of what is compared where that is above 1: a gradient norm may be in the hundreds."""
    units = {name: np.maximum(1.0, np.abs(x)) for name, x in theirs.items()}
    return {name: x / units[name] for name, x in ours.items()}, {name: x / units[name] for name, x in theirs.items()}


def _parameter_rows(pair: Pair, what: str, ours: Named, theirs: Named, steps: int) -> Iterator[Row]:
    """Adam turns the rounding noise of a gradient that is 0 into steps of up to the learning rate: bounded by those."""
    (ours, ours_zero), (theirs, theirs_zero) = split_key_bias(ours), split_key_bias(theirs)
    yield row_of(pair, "L9", f"parameters, {what}", ours, theirs)
    if ours_zero:
        limit = 2 * OPTIMIZER.learning_rate * steps
        yield row_of(pair, "L9", f"key biases, {what}", ours_zero, theirs_zero, bound=limit)


def torch_optimizer(model: torch.nn.Module) -> torch_update.AdamW:
    """The twin's optimizer with the settings of `OPTIMIZER`."""
    return torch_update.AdamW(
        model,
        schedule=partial(
            torch_update.learning_rate,
            peak=OPTIMIZER.learning_rate,
            schedule=OPTIMIZER.schedule,
            warmup_steps=OPTIMIZER.warmup_steps,
            total_steps=OPTIMIZER_STEPS,
        ),
        max_grad_norm=OPTIMIZER.max_grad_norm,
        b1=OPTIMIZER.adam_b1,
        b2=OPTIMIZER.adam_b2,
        eps=OPTIMIZER.adam_eps,
        weight_decay=OPTIMIZER.weight_decay,
    )
