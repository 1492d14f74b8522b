"""Held-out prompts: the policy's answers to prompts it never trains on, against those of the SFT model it came from."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from ppo_jax import scoring, sharding
from ppo_jax.build import Run, tokenizer_texts
from ppo_jax.models.critic import split_critic
from ppo_jax.ops.randomness import Purpose
from ppo_jax.processes import from_lead
from ppo_jax.prompts import Prompts
from ppo_jax.records import Rollout, TrainState
from ppo_jax.rewards.source import score_answers

Answer = Callable[..., Rollout]  # train.answer


def against_sft(run: Run, state: TrainState, answer: Answer) -> Callable[[TrainState], dict[str, float]]:
    """A function from a state to the metrics `evaluation/...`; the SFT model's answers are made and scored here, once.

    Both models meet the same noise, which depends on the prompt's place alone, so that equal models give equal answers.
    """
    held_out = run.held_out
    if run.config.monitor.evaluate_every == 0 or held_out is None:
        return lambda state: {}
    # The reference is the SFT model, that of a resumed run too, whose policy is no longer it.
    sft_scores, _, _ = _answered(run, replace(state, params=run.ref_params), answer, held_out)

    def evaluate(state: TrainState) -> dict[str, float]:
        policy = replace(state, params=split_critic(state.params)[0])
        scores, lengths, seq_kl = _answered(run, policy, answer, held_out)
        return {
            "evaluation/score_mean": float(np.mean(scores)),
            "evaluation/win_rate": float(np.mean(scores > sft_scores) + np.mean(scores == sft_scores) / 2),
            "evaluation/kl_seq_nats": float(np.mean(seq_kl)),
            "evaluation/len_mean_tokens": float(np.mean(lengths)),
        }

    return evaluate


def _answered(
    run: Run, state: TrainState, answer: Answer, prompts: Prompts
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, lengths in tokens and exact KL to the reference in nats, each [N], of one answer to every prompt."""
    config, count = run.config, len(prompts.texts)
    size = config.rollout.batch_size  # the batch of training, for which everything fits and most is compiled
    whole, own = prompts.in_order(), sharding.own_rows(size)
    tokens, masks, seq_kl = [], [], []
    for batch, start in enumerate(range(0, count, size)):
        rows = np.arange(start, start + size)[own] % count  # the last batch is filled up with the first prompts
        placed = (sharding.place_rows(run.mesh, x[rows]) for x in (whole.tokens, whole.mask))
        answers = answer(run, state, *placed, Purpose.EVALUATION, step=batch)
        scored = scoring.score(state.params, run.ref_params, answers, scoring=run.scoring)
        read = partial(sharding.read, run.mesh)
        tokens += list(read(answers.response_tokens))
        masks += list(read(answers.response_mask))
        seq_kl += read(scored.token_kl).sum(axis=1).tolist()

    def score() -> str:
        texts = [tokenizer_texts(run.model.tokenizer, t[None], m[None])[0] for t, m in zip(tokens, masks, strict=True)]
        scores = score_answers(run.reward, prompts.texts, texts[:count], prompts.columns)
        return json.dumps(scores.total.tolist())

    lengths = [int(mask.sum()) for mask in masks]
    return np.asarray(json.loads(from_lead(score))), np.asarray(lengths[:count]), np.asarray(seq_kl[:count])
