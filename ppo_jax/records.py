"""One frozen record per stage; they are all that the stages know of each other.

Axes: N prompts, B answers (B = N x answers per prompt), P prompt tokens (left-padded), T response tokens
(right-padded). Every [B, T] array is response-aligned: entry t belongs to response token t. Masks are True on what
counts, masked positions hold 0.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# Values of Rollout.finish_reason.
TRUNCATED, EOS, STOP_STRING = 0, 1, 2


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one iteration, on the host."""

    texts: list[str]  # N prompts as the reward source sees them
    tokens: np.ndarray  # int32 [N, P], left-padded
    mask: np.ndarray  # bool [N, P], True on real prompt tokens
    columns: dict[str, list[Any]] = field(default_factory=dict)  # what else the source says of each prompt, N entries


@struct.dataclass
class Rollout:
    """Sampled answers (step 1)."""

    prompt_tokens: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    response_tokens: Int[Array, "B T"]  # 0 behind the end of an answer
    response_mask: Bool[Array, "B T"]  # True on response tokens, the EOS included
    behaviour_logprobs: Float[Array, "B T"]  # nats; full temperature-scaled policy, as the sampler computed it
    kept_mass: Float[Array, "B T"]  # probability that top-k, top-p and a banned EOS left over
    finish_reason: Int[Array, " B"]  # TRUNCATED, EOS or STOP_STRING
    group_id: Int[Array, " B"]  # index of the prompt in its batch; answers to one prompt share it
    policy_version: Int[Array, ""]  # iteration whose parameters sampled the answers
    # With `rollout.reuse_states`: the policy's last hidden states, from which each token was drawn.
    hidden: Float[Array, "B T D"] | None = None


@struct.dataclass
class Scored:
    """What policy and reference say of the sampled tokens, before any update (step 3)."""

    old_logprobs: Float[Array, "B T"]  # nats per token, policy at rollout
    ref_logprobs: Float[Array, "B T"]  # nats per token, frozen reference
    token_kl: Float[Array, "B T"]  # exact KL(policy || reference) over the whole vocabulary, nats per token
    token_entropy: Float[Array, "B T"]  # of the policy, nats per token
    # Where a KL is in the loss: the reference's last hidden states, from which its head makes its distribution.
    ref_hidden: Float[Array, "B T D"] | None = None
    # Where there is a critic, in units of the reward: V of the state each token is drawn from, and of the one behind
    # the last token of a truncated answer, 0 of the others.
    values: Float[Array, "B T"] | None = None
    bootstrap_values: Float[Array, " B"] | None = None


@struct.dataclass
class Experience:
    """What the update trains on (step 6)."""

    prompt_tokens: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    response_tokens: Int[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    old_logprobs: Float[Array, "B T"]  # nats per token, frozen
    advantages: Float[Array, "B T"]  # units of the reward
    ref_hidden: Float[Array, "B T D"] | None = None  # as in `Scored`; None where the loss has no KL term
    old_values: Float[Array, "B T"] | None = None  # of the critic at rollout, frozen; None where there is none
    returns: Float[Array, "B T"] | None = None  # what the critic learns, units of the reward


@struct.dataclass
class TrainState:
    """All that changes from step to step. The reference is not in it, nor is a random key: draws depend on `step`."""

    step: Int[Array, ""]  # finished iterations
    params: Any  # float32 master weights of the policy and, under "critic", of the critic
    opt_state: optax.OptState
    kl_coef: Float[Array, ""]  # β of the next iteration
    score_moments: Any  # ops.rewards.ScoreMoments of all scores so far
    skipped_in_a_row: Int[Array, ""]  # optimizer steps up to here, over iterations, that were not finite
