"""Training a reward model: scores of token rows, and one jitted optimizer step on some pairs of them.

Parameters are in two parts, {"trunk", "head"} that trains and the frozen lower part of the trunk. What the frozen part
makes of a text never changes, so it may be computed once (`frozen_states`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.decoder import DecoderSpec, Params, cast, hidden_states
from ppo_jax.models.heads import head_values
from ppo_jax.models.partial import lower_states, split_trunk, upper_hidden
from ppo_jax.ops.preferences import bradley_terry_loss, centring_loss
from ppo_jax.optimizer import step_if_finite
from ppo_jax.tracing import bucket, note_compilation

SMALLEST_BUCKET = 16

Stats = dict[str, Array]


@dataclass(frozen=True)
class RewardObjective:
    """What a reward model's training minimises and how it is computed; fixed for a run, so compiled in."""

    spec: DecoderSpec
    first_trained: int | None  # the first layer that trains; None: everything does, the embedding too
    center_coef: float
    compute_dtype: str
    remat: bool


@struct.dataclass
class TextRows:
    """R texts, padded on the right to S tokens."""

    tokens: Int[Array, "R S"]
    mask: Bool[Array, "R S"]  # True on real tokens
    last: Int[Array, " R"]  # where each text is scored
    states: Float[Array, "R S D"] | None = None  # what the frozen layers make of them; None: not computed yet


def split_scorer(scorer: Params, objective: RewardObjective) -> tuple[Params, Params]:
    """(trained, frozen) parts of {"trunk", "head"}.

    A bias of the head is left behind: it is the same for every text, and no head of transformers can have it.
    """
    head = {"kernel": scorer["head"]["kernel"]}
    if objective.first_trained is None:
        return {"trunk": scorer["trunk"], "head": head}, {}
    frozen, trained = split_trunk(scorer["trunk"], objective.first_trained)
    return {"trunk": trained, "head": head}, frozen


def joined_scorer(trained: Params, frozen: Params) -> Params:
    """The inverse of `split_scorer`."""
    return {"trunk": {**frozen, **trained["trunk"]}, "head": trained["head"]}


def row_scores(trained: Params, frozen: Params, rows: TextRows, *, objective: RewardObjective) -> Float[Array, " R"]:
    """Scores of some texts, as `rewards.classifier` reads them; no gradient reaches what is frozen."""
    spec, first, remat = objective.spec, objective.first_trained, objective.remat
    trunk = cast(trained["trunk"], objective.compute_dtype)
    if first is None:
        hidden = hidden_states(trunk, rows.tokens, rows.mask, spec=spec, remat=remat)
    else:
        states = rows.states
        if states is None:
            states = lower_states(cast(frozen, objective.compute_dtype), rows.tokens, rows.mask, spec=spec, first=first)
        states = jax.lax.stop_gradient(states)
        hidden = upper_hidden(trunk, states, rows.mask, spec=spec, first=first, remat=remat)
    kernel = trained["head"]["kernel"]
    head = {"kernel": kernel, "bias": jnp.zeros((), kernel.dtype)}
    return head_values(head, jnp.take_along_axis(hidden, rows.last[:, None, None], axis=1)[:, 0])


def pair_loss(
    trained: Params, frozen: Params, rows: TextRows, margins: Float[Array, " B"], *, objective: RewardObjective
) -> tuple[Float[Array, ""], Stats]:
    """Mean loss of B pairs, whose rows are the B chosen texts and then the B rejected ones."""
    scores = row_scores(trained, frozen, rows, objective=objective)
    chosen, rejected = jnp.split(scores, 2)
    preference = jnp.mean(bradley_terry_loss(chosen, rejected, margins.astype(scores.dtype)))
    centring = objective.center_coef * jnp.mean(centring_loss(chosen, rejected))
    stats = {
        "train/preference_loss": preference,
        "train/centring_loss": centring,
        "train/accuracy": jnp.mean((chosen > rejected).astype(scores.dtype)),
        "train/score_mean": jnp.mean(scores),
    }
    return preference + centring, stats


@partial(jax.jit, static_argnames=("optimizer", "objective"), donate_argnames=("trained", "opt_state"))
def pair_step(
    trained: Params,
    opt_state: optax.OptState,
    frozen: Params,
    rows: TextRows,
    margins: Float[Array, " B"],
    step: Int[Array, ""],
    *,
    optimizer: optax.GradientTransformationExtraArgs,
    objective: RewardObjective,
) -> tuple[Params, optax.OptState, Stats]:
    """One optimizer step, of that number, on B pairs; the old parameters' memory is reused.

    A step whose loss, gradient or update is not finite leaves parameters and moments as they were, and is counted.
    """
    note_compilation("reward training", R=rows.mask.shape[0], S=rows.mask.shape[1])
    loss_of = jax.value_and_grad(partial(pair_loss, objective=objective), has_aux=True)
    (loss, stats), gradients = loss_of(trained, frozen, rows, margins)
    grad_norm = optax.tree.norm(gradients)
    trained, opt_state, _, finite = step_if_finite(
        optimizer, gradients, opt_state, trained, loss, grad_norm, planned_step=step
    )
    stats |= {"update/grad_norm": grad_norm, "update/skipped_steps": ~finite}
    return trained, opt_state, stats


# ------------------------------------------------------------------------------------------------------ texts as rows


@dataclass(frozen=True)
class Texts:
    """Token rows, and what the frozen layers make of them where that is kept: `states[i]` is [length, D]."""

    tokens: Sequence[list[int]]
    last: Sequence[int]  # where each is scored
    max_tokens: int
    states: Sequence[np.ndarray] | None = None

    def rows(self, indices: Sequence[int]) -> TextRows:
        """Some of the texts, padded on the right to one of few lengths: a text never sees what comes after it."""
        longest = max(len(self.tokens[i]) for i in indices)
        shape = (len(indices), bucket(longest, smallest=SMALLEST_BUCKET, largest=max(self.max_tokens, longest)))
        tokens, mask, states = np.zeros(shape, np.int32), np.zeros(shape, bool), None
        if self.states is not None:
            states = np.zeros((*shape, self.states[0].shape[1]), self.states[0].dtype)
        for row, i in enumerate(indices):
            length = len(self.tokens[i])
            tokens[row, :length], mask[row, :length] = self.tokens[i], True
            if states is not None and self.states is not None:
                states[row, :length] = self.states[i]
        last = np.asarray([self.last[i] for i in indices], np.int32)
        return TextRows(*jax.tree.map(jnp.asarray, (tokens, mask, last, states)))

    def batches(self, size: int):
        """(indices, rows) of all texts by length; the last batch is filled up with its first text."""
        by_length = sorted(range(len(self.tokens)), key=lambda i: len(self.tokens[i]))
        for start in range(0, len(by_length), size):
            indices = by_length[start : start + size]
            yield indices, self.rows(indices + [indices[0]] * (size - len(indices)))


@partial(jax.jit, static_argnames="objective")
def _scores(trained: Params, frozen: Params, rows: TextRows, *, objective: RewardObjective) -> Float[Array, " R"]:
    note_compilation("reward scores", R=rows.mask.shape[0], S=rows.mask.shape[1])
    return row_scores(trained, frozen, rows, objective=objective)


@partial(jax.jit, static_argnames="objective")
def _states(
    frozen: Params, tokens: Int[Array, "R S"], mask: Bool[Array, "R S"], *, objective: RewardObjective
) -> Float[Array, "R S D"]:
    note_compilation("frozen layers", R=mask.shape[0], S=mask.shape[1])
    params = cast(frozen, objective.compute_dtype)
    return lower_states(params, tokens, mask, spec=objective.spec, first=objective.first_trained or 0)


def text_scores(
    trained: Params, frozen: Params, texts: Texts, *, objective: RewardObjective, batch_size: int
) -> np.ndarray:
    """The score of every text, float64 [N]."""
    scores = np.zeros(len(texts.tokens))
    for indices, rows in texts.batches(batch_size):
        scores[indices] = np.asarray(_scores(trained, frozen, rows, objective=objective))[: len(indices)]
    return scores


def frozen_states(frozen: Params, texts: Texts, *, objective: RewardObjective, batch_size: int) -> list[np.ndarray]:
    """What the frozen layers make of every text, [length, D] each, in the compute dtype and in the host's memory."""
    states: list[np.ndarray] = [np.zeros(0)] * len(texts.tokens)
    for indices, rows in texts.batches(batch_size):
        made = np.asarray(_states(frozen, rows.tokens, rows.mask, objective=objective))
        for row, i in enumerate(indices):
            states[i] = made[row, : len(texts.tokens[i])].copy()
    return states
