"""`python -m parity.truth`: is the expected gradient of the update the gradient of what PPO is meant to maximise?

On models so small that every answer can be listed (3 tokens, one of them the EOS, at most 3 of them to an answer), an
expectation is a sum. The stages of training themselves (scoring, rewards, advantages, the loss of the update) run on
every possible batch of B answers; their gradients, weighted by the probability of the batch, are compared with autodiff
of the true objective

    J = −E[s] + β E[Σ_t KL_t],

in float64, for random pairs of policy and reference, in both stacks. Forms that are known to be biased are run too:
that they are found to be so shows that the method sees it.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_ENABLE_X64"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from ppo_jax import build, scoring, update
from ppo_jax.config import Config
from ppo_jax.config_file import load
from ppo_jax.models.decoder import DecoderSpec, head_logits, init_params, response_hidden
from ppo_jax.models.families import spec_of
from ppo_jax.models.hf_io import export_tensors
from ppo_jax.records import Experience, Rollout
from ppo_torch_ref import model as torch_model
from ppo_torch_ref import ops as torch_ops
from ppo_torch_ref import scoring as torch_scoring
from ppo_torch_ref import update as torch_update
from ppo_torch_ref.rollout import Rollout as TorchRollout

VOCAB_SIZE, EOS, LENGTH = 3, 0, 3
KL_COEF, TEMPERATURE, CLIP_EPS = 0.7, 0.8, 0.2
PAIRS = 20
BOUND = 1e-12  # relative error of an expected gradient that is claimed to be exact
CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class Form:
    """A way to estimate the gradient. `shrinks` is what the baseline is known to multiply it by."""

    name: str
    kl_form: str
    estimator: str
    answers: int  # per batch
    is_exact: bool = True
    in_reward: bool = True  # half of the exact form: the KL of the coming tokens
    in_loss: bool = True  # the other half
    shrinks: float = 1.0


FORMS = (
    Form("k1, batch mean, B = 2", "k1", "batch_mean", 2, shrinks=1 / 2),
    Form("k1, batch mean, B = 3", "k1", "batch_mean", 3, shrinks=2 / 3),
    Form("k1, leave one out to go, B = 2", "k1", "leave_one_out_to_go", 2),
    Form("exact, leave one out to go, B = 2", "exact", "leave_one_out_to_go", 2),
    Form("exact, leave one out to go, B = 3", "exact", "leave_one_out_to_go", 3),
    Form("exact, batch mean, B = 2", "exact", "batch_mean", 2, is_exact=False),
    Form("exact, in the reward only", "exact", "leave_one_out_to_go", 2, is_exact=False, in_loss=False),
    Form("exact, in the loss only", "exact", "leave_one_out_to_go", 2, is_exact=False, in_reward=False),
)


def all_answers() -> tuple[np.ndarray, np.ndarray]:
    """Every answer and its mask, [N, T]: tokens up to an EOS, or `LENGTH` of them without one."""
    rows = set()
    for tokens in itertools.product(range(VOCAB_SIZE), repeat=LENGTH):
        length = tokens.index(EOS) + 1 if EOS in tokens else LENGTH
        rows.add((tokens[:length] + (0,) * (LENGTH - length), length))
    tokens, lengths = (np.array(column) for column in zip(*sorted(rows), strict=True))
    return tokens.astype(np.int32), np.arange(LENGTH)[None] < lengths[:, None]


def all_batches(answers: int, count: int) -> np.ndarray:
    """Every batch of `answers` out of `count` answers, as indices [count ** answers, answers]."""
    return np.array(list(itertools.product(range(count), repeat=answers)))


def random_params(spec: DecoderSpec, seed: int) -> Any:
    """Parameters far enough from zero that the distributions are not flat."""
    params = init_params(spec, jax.random.PRNGKey(seed), jnp.float64)
    return jax.tree.map(lambda x: x * 40 if x.ndim > 1 else x, params)


def config_of(form: Form) -> Config:
    """The recipe; `parse` would refuse the biased ones."""
    valid = load(overrides={"rollout.max_new_tokens": LENGTH})
    return valid.model_copy(
        update={
            "kl": valid.kl.model_copy(update={"form": form.kl_form}),
            "advantage": valid.advantage.model_copy(update={"estimator": form.estimator}),
        }
    )


# ---------------------------------------------------------------------------- JAX


def relative_errors_jax(forms: tuple[Form, ...], pairs: int) -> dict[str, list[float]]:
    """Relative error of every form's expected gradient, by pair."""
    spec = spec_of(CONFIG)
    tokens, mask = all_answers()
    scores = np.random.default_rng(0).normal(size=len(tokens))
    count = len(tokens)
    per_token = jnp.zeros(mask.shape)
    rollout = Rollout(
        prompt_tokens=jnp.ones((count, 1), jnp.int32),
        prompt_mask=jnp.ones((count, 1), bool),
        response_tokens=jnp.asarray(tokens),
        response_mask=jnp.asarray(mask),
        behaviour_logprobs=per_token,
        kept_mass=per_token,
        finish_reason=jnp.zeros(count, jnp.int32),
        group_id=jnp.zeros(count, jnp.int32),
        policy_version=jnp.zeros((), jnp.int32),
    )
    true_gradient = jax.jit(jax.grad(lambda params, ref: _true_objective(params, ref, rollout, scores, spec)))
    expected = {form: _expected_gradient(form, rollout, jnp.asarray(scores), spec) for form in forms}
    errors: dict[str, list[float]] = {form.name: [] for form in forms}
    for pair in range(pairs):
        params, ref_params = random_params(spec, 2 * pair), random_params(spec, 2 * pair + 1)
        truth = _flat(true_gradient(params, ref_params))
        for form in forms:
            found = _flat(expected[form](params, ref_params)) / form.shrinks
            errors[form.name].append(float(np.linalg.norm(found - truth) / np.linalg.norm(truth)))
    return errors


def _true_objective(params: Any, ref_params: Any, rollout: Rollout, scores: np.ndarray, spec: DecoderSpec) -> jax.Array:
    """J / LENGTH over all answers, written out: the constant normaliser divides by the longest length."""

    def log_softmax(parameters):
        hidden = response_hidden(
            parameters,
            rollout.prompt_tokens,
            rollout.prompt_mask,
            rollout.response_tokens,
            rollout.response_mask,
            spec=spec,
        )
        return jax.nn.log_softmax(head_logits(parameters, hidden, spec=spec) / TEMPERATURE)

    log_p, log_q = log_softmax(params), log_softmax(ref_params)
    of_token = jnp.take_along_axis(log_p, rollout.response_tokens[..., None], axis=-1)[..., 0]
    probability = jnp.exp(jnp.sum(jnp.where(rollout.response_mask, of_token, 0.0), axis=1))
    token_kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    seq_kl = jnp.sum(jnp.where(rollout.response_mask, token_kl, 0.0), axis=1)
    return jnp.sum(probability * (KL_COEF * seq_kl - scores)) / LENGTH


def _expected_gradient(form: Form, rollout: Rollout, scores: jax.Array, spec: DecoderSpec) -> Callable[..., Any]:
    """(params, ref_params) -> Σ over all batches of their probability times the gradient of the update's loss."""
    config = config_of(form)
    token_rewards, advantages = build.pick_token_rewards(config), build.pick_advantages(config)
    loss_weights = build.pick_loss_weights(config)
    objective = update.Objective(
        spec=spec,
        temperature=TEMPERATURE,
        clip_eps=CLIP_EPS,
        loss_weights=loss_weights,
        compute_dtype="float64",
        micro_batch_size=form.answers,
        remat=False,
    )

    def expected_loss(params, ref_params, scored, responses, batches):
        seq_logprobs = jnp.sum(scored.old_logprobs, axis=1)

        def loss_of(batch):
            answers, said = (jax.tree.map(lambda x: x[batch], x) for x in (responses, scored))
            rewards = token_rewards(
                scores[batch], said, answers["response_mask"], kl_coef=KL_COEF if form.in_reward else 0.0
            )
            experience = Experience(
                **answers,
                old_logprobs=said.old_logprobs,
                advantages=advantages(rewards, answers["response_mask"]),
                ref_hidden=said.ref_hidden,
            )
            weights = loss_weights(answers["response_mask"], dtype=jnp.float64)
            loss, _ = update.policy_loss(params, ref_params, experience, weights, jnp.asarray(KL_COEF), objective)
            return jnp.exp(jnp.sum(seq_logprobs[batch])) * loss

        return jnp.sum(jax.vmap(loss_of)(batches))

    @jax.jit
    def gradient(params, ref_params, rollout, batches):
        scored = scoring.score(
            params,
            ref_params,
            rollout,
            spec=spec,
            temperature=TEMPERATURE,
            compute_dtype="float64",
            micro_batch_size=len(scores),
            keep_ref_hidden=form.kl_form == "exact" and form.in_loss,
        )
        names = ("prompt_tokens", "prompt_mask", "response_tokens", "response_mask")
        responses = {name: getattr(rollout, name) for name in names}
        return jax.grad(expected_loss)(params, ref_params, scored, responses, batches)

    return partial(gradient, rollout=rollout, batches=jnp.asarray(all_batches(form.answers, len(scores))))


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


# ---------------------------------------------------------------------------- PyTorch


def relative_errors_torch(forms: tuple[Form, ...], pairs: int) -> dict[str, list[float]]:
    """The same of the twin, one batch after the other."""
    spec = spec_of(CONFIG)
    tokens, mask = (torch.from_numpy(x) for x in all_answers())
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=len(tokens)))
    prompts = torch.ones(len(tokens), 1, dtype=torch.long)
    sequences = (prompts, prompts.bool(), tokens.long(), mask)
    errors: dict[str, list[float]] = {form.name: [] for form in forms}
    for pair in range(pairs):
        model, reference = (_torch_model(random_params(spec, 2 * pair + i), spec) for i in (0, 1))
        log_p, log_q = (
            torch.log_softmax(torch_model.response_logits(m, *sequences) / TEMPERATURE, -1) for m in (model, reference)
        )
        of_token = log_p.gather(-1, sequences[2][..., None])[..., 0].masked_fill(~mask, 0.0)
        seq_kl = torch.sum(log_p.exp() * (log_p - log_q), -1).masked_fill(~mask, 0.0).sum(1)
        true_objective = torch.sum(of_token.sum(1).exp() * (KL_COEF * seq_kl - scores)) / LENGTH
        truth = _torch_gradient(model, true_objective)
        for form in forms:
            found = _torch_gradient(model, _torch_expected_loss(form, model, reference, sequences, scores))
            error = torch.linalg.norm(found / form.shrinks - truth) / torch.linalg.norm(truth)
            errors[form.name].append(float(error))
    return errors


def _torch_model(params: Any, spec: DecoderSpec) -> torch.nn.Module:
    model = torch_model.new_model(CONFIG).double()
    tensors = export_tensors(CONFIG, spec, params, jnp.float64)
    model.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in tensors.items()})
    return model


def _torch_gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def _torch_expected_loss(
    form: Form,
    model: torch.nn.Module,
    reference: torch.nn.Module,
    sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scores: torch.Tensor,
) -> torch.Tensor:
    mask, zeros = sequences[3], torch.zeros(sequences[3].shape)
    rollout = TorchRollout(*sequences, zeros, zeros, torch.zeros(len(scores)))
    scored = torch_scoring.score(model, reference, rollout, temperature=TEMPERATURE, micro_batch_size=len(scores))
    probabilities = scored.old_logprobs.sum(1).exp()
    objective = torch_update.Objective(
        temperature=TEMPERATURE,
        clip_eps=CLIP_EPS,
        loss_weights=torch_ops.constant_weights,
        micro_batch_size=form.answers,
        kl_in_loss=form.kl_form == "exact" and form.in_loss,
    )
    kl_coef = KL_COEF if form.in_reward else 0.0
    every_answer = torch_update.Experience(*sequences, scored.old_logprobs, zeros)
    total = torch.zeros((), dtype=torch.float64)
    for batch in torch.from_numpy(all_batches(form.answers, len(scores))):
        if form.kl_form == "exact":
            rewards = torch_ops.exact_kl_token_rewards(
                scores[batch], scored.token_kl[batch], mask[batch], kl_coef=kl_coef
            )
        else:
            token_k1 = torch_ops.k1(scored.old_logprobs[batch], scored.ref_logprobs[batch])
            rewards = torch_ops.token_rewards(scores[batch], token_k1, mask[batch], kl_coef=kl_coef)
        advantages = getattr(torch_ops, f"{form.estimator}_advantages")(rewards, mask[batch])
        experience = replace(every_answer.rows(batch), advantages=advantages)
        weights = torch_ops.constant_weights(mask[batch], max_response_tokens=LENGTH, dtype=torch.float64)
        loss, _ = torch_update.policy_loss(model, reference, experience, weights, KL_COEF, objective)
        total = total + probabilities[batch].prod() * loss
    return total


# ---------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Verdict:
    stack: str
    form: str
    smallest: float
    median: float
    largest: float
    claimed: str  # "exact" or "biased"
    holds: bool


def verdicts(*, pairs: int, torch_pairs: int) -> Iterator[Verdict]:
    """A row per stack and form. The twin runs batches one by one, so fewer pairs and no B = 3."""
    of_two = tuple(form for form in FORMS if form.answers == 2)
    for stack, errors in (
        ("JAX", relative_errors_jax(FORMS, pairs)),
        ("PyTorch", relative_errors_torch(of_two, torch_pairs)),
    ):
        for form in FORMS:
            if form.name not in errors:
                continue
            found = errors[form.name]
            holds = max(found) < BOUND if form.is_exact else min(found) > 1e-3
            yield Verdict(
                stack,
                form.name,
                min(found),
                float(np.median(found)),
                max(found),
                "exact" if form.is_exact else "biased",
                holds,
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m parity.truth", description="the table of expected gradients")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="random pairs of policy and reference")
    parser.add_argument("--torch_pairs", type=int, default=3, help="as many of them for the twin, which is slower")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(verdicts(pairs=arguments.pairs, torch_pairs=arguments.torch_pairs))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    table = Table(title="Relative error of the expected gradient, against that of −E\\[s] + β E\\[Σ KL]")
    for column in ("stack", "form", "smallest", "median", "largest", "claimed", "verdict"):
        table.add_column(column, justify="left" if column in ("stack", "form", "claimed", "verdict") else "right")
    for row in rows:
        numbers = (f"{x:.1e}" for x in (row.smallest, row.median, row.largest))
        verdict = "[green]ok[/]" if row.holds else "[bold red]FAIL[/]"
        table.add_row(row.stack, row.form, *numbers, row.claimed, verdict)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
