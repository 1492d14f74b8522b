"""`python -m ppo_jax.train`: the six steps of PPO fine-tuning, top to bottom.

    1. the current policy answers the prompts
    2. a reward source scores each answer
    3. the KL between the policy and a frozen reference, over response tokens only
    4. score and KL become the total reward
    5. the advantage: which answers were better than their batch
    6. a few small, clipped steps

`ppo_iteration` is one iteration; `train` repeats it, watches it, and ends it. What the steps call is in the file of
that name: `rollout`, `rewards`, `scoring`, `ops`, `update`; which functions they are is picked in `build`.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax import evaluation, rollout, scoring, sharding, update
from ppo_jax.build import Run, tokenizer_texts
from ppo_jax.checkpoint import Checkpoints, saved_steps
from ppo_jax.config import Config
from ppo_jax.ending import limit_reached, save_on_failure, stop_if_not_finite, stop_if_told
from ppo_jax.export import export_policy
from ppo_jax.interruption import noted_signals
from ppo_jax.misfits import warnings_of
from ppo_jax.models.critic import split_critic
from ppo_jax.monitor import alarms, invariants, metrics, not_finite, samples, signals
from ppo_jax.monitor import answers as kept_answers
from ppo_jax.monitor.clock import PhaseClock
from ppo_jax.monitor.console import View, print_samples
from ppo_jax.monitor.memory import shortage_named
from ppo_jax.monitor.sinks import MetricsWriter, read_rows
from ppo_jax.ops.randomness import Purpose, purpose_key, rollout_uniforms
from ppo_jax.processes import from_any, from_lead, together
from ppo_jax.prompts import for_each_answer
from ppo_jax.records import Experience, Rollout, TrainState
from ppo_jax.rewards.source import audit, score_answers, start_scoring
from ppo_jax.tracing import bucket, compilations

log = logging.getLogger("ppo_jax")


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    directory: Path
    policy_directory: Path  # Hugging Face format
    adapter_directory: Path | None  # PEFT format, where an adapter was trained
    metrics: list[dict[str, Any]]  # one object per iteration, as in metrics.jsonl
    state: TrainState
    stop_reason: str


def ppo_iteration(run: Run, state: TrainState, clock: PhaseClock) -> tuple[TrainState, dict[str, Any]]:
    """One PPO iteration; `state` is consumed. Returns the next state and the iteration's metrics."""
    config, step = run.config, int(state.step)
    compute_dtype = config.model.compute_dtype
    # Of several processes each has the texts, prompts and answers, of its own rows of the batch.
    prompts = run.prompts.batch(step, run.prompts_per_iteration, sharding.own_rows(run.prompts_per_iteration))

    # 1. The current policy answers the prompts.
    with clock.phase("rollout"):
        tokens, mask = (sharding.place_rows(run.mesh, x) for x in (prompts.tokens, prompts.mask))
        answers = answer(run, state, tokens, mask, Purpose.ROLLOUT, step=step)  # Rollout of [B, T]
        own = (sharding.read_own_rows(run.mesh, x) for x in (answers.response_tokens, answers.response_mask))
        texts = tokenizer_texts(run.model.tokenizer, *own)

    # 2. A reward source scores each answer: on the host, in the background, while the device computes step 3.
    questions, columns = for_each_answer(prompts, config.rollout.answers_per_prompt)
    scores_when_done = start_scoring(run.reward, questions, texts, columns, may_drop=True)

    # 3. The KL between the policy and the frozen reference, exact and sampled, over response tokens only.
    with clock.phase("score"):
        scored = scoring.score(  # Scored of [B, T]
            state.params,
            run.ref_params,
            answers,
            scoring=run.scoring,
            keep_ref_hidden=run.objective.loss_kl is not None,
            values=run.objective.values,
            bootstrap=config.critic.bootstrap_truncated,
        )
        jax.block_until_ready(scored)
    with clock.phase("reward_wait"), together("the reward"):
        scores = scores_when_done()
    with clock.phase("advantage"):
        dropped, dtype = sharding.place_rows(run.mesh, scores.dropped), answers.behaviour_logprobs.dtype
        answers = rollout.without(answers, dropped)
        seq_scores, named_scores = jax.tree.map(  # [B]
            lambda x: sharding.place_rows(run.mesh, x.astype(dtype)), (scores.total, scores.named)
        )

        # 4. Score and KL become the total reward, token by token.
        shaped_scores, score_moments = run.algorithm.shape_scores(state.score_moments, seq_scores, answers)  # [B]
        token_rewards = run.algorithm.token_rewards(shaped_scores, scored, answers.response_mask, kl_coef=state.kl_coef)

        # 5. The advantage: which answers were better than their batch.
        advantages, returns = run.algorithm.advantages(token_rewards, scored, answers)  # [B, T]

        measured = metrics.experience_metrics(
            answers, scored, seq_scores, state.kl_coef, shaped_scores=shaped_scores, returns=returns
        )
        observed = metrics.to_host(measured)
        observed |= signals.of_answers(run.mesh, answers, scored, seq_scores, shaped_scores, token_rewards, texts=texts)
        if len(named_scores) > 1:
            observed |= metrics.to_host(metrics.named_score_means(answers.response_mask, named_scores))
    if step == 0:
        invariants.assert_equals_reference(observed, compute_dtype=compute_dtype)
        lengths = jnp.sum(answers.response_mask, axis=1)
        warn(audit(sharding.read(run.mesh, seq_scores), sharding.read(run.mesh, lengths)))
    if keeps_answers(config, step):
        kept = {"prompts": questions, "texts": texts, "scores": scores.total}
        kept_answers.append(run.directory, step, answers, scored, **kept, mesh=run.mesh, seed=config.run.seed)

    # 6. A few small, clipped steps.
    with clock.phase("update"):
        experience = Experience(
            prompt_tokens=answers.prompt_tokens,
            prompt_mask=answers.prompt_mask,
            response_tokens=answers.response_tokens,
            response_mask=answers.response_mask,
            old_logprobs=scored.old_logprobs,
            advantages=advantages,
            ref_hidden=scored.ref_hidden,
            old_values=scored.values,
            returns=returns,
        )
        next_kl_coef = run.algorithm.next_kl_coef(state.kl_coef, measured["kl/seq_nats"])
        state, optimizer_steps = update.update(
            state, run.ref_params, experience, config=config, optimizer=run.optimizer, objective=run.objective
        )
        state = replace(state, kl_coef=next_kl_coef, score_moments=score_moments)
        stats = [metrics.to_host(stats) for stats in optimizer_steps]
    kept = vars(experience) | {"ref_hidden": None, "seq_scores": seq_scores, "ref_logprobs": scored.ref_logprobs}
    steps, decode = update.minibatches(config, step), partial(tokenizer_texts, run.model.tokenizer)
    not_finite.keep_batch(run.directory, step, stats, steps, kept, mesh=run.mesh, decode=decode)
    if step == 0:
        invariants.assert_ratio_is_one(stats[0], compute_dtype=compute_dtype)
    if config.rollout.reuse_states:  # scoring had the states of the decode: the first ratios are what they leave
        observed["rollout/logprob_gap_max"] = stats[0]["policy/log_ratio_abs_max"]
    observed |= {"time/reward_s": scores.seconds, "reward/dropped_frac": float(jnp.mean(dropped, dtype=dtype))}
    return state, observed | update.summarise(stats) | clock.metrics(response_tokens=int(answers.response_mask.sum()))


def answer(
    run: Run, state: TrainState, prompt_tokens: jax.Array, prompt_mask: jax.Array, purpose: Purpose, *, step: int
) -> Rollout:
    """Answers to a batch of prompts, cropped to the bucket of the longest; its noise depends on step and purpose."""
    config = run.config.rollout
    per_prompt = config.answers_per_prompt if purpose == Purpose.ROLLOUT else 1
    key = purpose_key(run.config.run.seed, step, purpose)
    rows = jnp.arange(prompt_tokens.shape[0] * per_prompt)
    answers = rollout.generate(
        state.params,
        prompt_tokens,
        prompt_mask,
        rollout_uniforms(key, rows, length=config.max_new_tokens),
        run.endings,
        state.step,
        spec=run.model.spec,
        sampling=run.sampling,
        compute_dtype=run.config.model.compute_dtype,
        keep_hidden=config.reuse_states and purpose == Purpose.ROLLOUT,
        halvings=config.halvings if purpose == Purpose.ROLLOUT else 0,  # a few fixed prompts are not worth compiling
        ref_params=run.ref_params,
        adapter=run.adapter,
    )
    longest = int(jnp.max(jnp.sum(answers.response_mask, axis=1)))
    return rollout.crop(answers, bucket(longest, smallest=8, largest=config.max_new_tokens))


def train(run: Run, state: TrainState) -> RunResult:
    """Run the remaining iterations and export the policy. `state` is consumed.

    On SIGTERM or Ctrl-C the iteration is finished and saved, and SystemExit raised with 128 + the signal's number.
    """
    keep, keep_best, clock = run.config.checkpoint.keep, run.config.checkpoint.keep_best, PhaseClock()
    with (
        run.lock,
        Checkpoints(run.directory / "checkpoints", keep=keep, keep_best=keep_best) as checkpoints,
        noted_signals() as signal_so_far,
        shortage_named(run.config, lambda: clock.last_phase),
    ):
        return _train(run, state, checkpoints, clock, signal_so_far)


def _train(
    run: Run, state: TrainState, checkpoints: Checkpoints, clock: PhaseClock, signal_so_far: Callable[[], int]
) -> RunResult:
    config, first_step = run.config, int(state.step)
    stop_reason = f"all {config.run.iterations} iterations are done"
    with (
        jax.set_mesh(run.mesh),
        View(config.run.iterations, first_step, live=config.monitor.live) as view,
        MetricsWriter(run.directory, first_step=first_step, monitor=config.monitor) as writer,
    ):
        warn(warnings_of(config))
        log.info("mesh: %s; processes: %d", dict(run.mesh.shape), jax.process_count())
        kept_answers.cut_back(run.directory, first_step)
        samples.cut_back(run.directory, first_step)
        reference_digest = invariants.digest(run.ref_params)
        evaluate = evaluation.against_sft(run, state, answer)
        rows = [row for row in read_rows(run.directory / "metrics.jsonl") if row["step"] < first_step]
        checkpoints.rewards |= {row["step"]: row["reward/mean"] for row in rows}
        rows_before, heard = len(rows), alarms.read(run.directory, first_step)
        if first_step > 0 and not alarms.has_baseline(rows):
            warn(["alarms are off: metrics.jsonl does not begin with a row of iteration 0 that has all their numbers"])
        for step in range(first_step, config.run.iterations):
            with save_on_failure(run, state, checkpoints):
                if is_due(step, config.monitor.sample_every) or step == config.run.iterations // 2:
                    with clock.phase("fixed prompts"):
                        answer_fixed_prompts(run, state)
                clock.restart()
                next_state, numbers = ppo_iteration(run, state, clock)
            state = next_state
            found_digest = invariants.digest(run.ref_params)
            numbers["reference/moved"] = float(found_digest != reference_digest)
            failed = None
            if is_due(step + 1, config.monitor.evaluate_every):
                try:
                    with clock.phase("evaluation"):
                        numbers |= evaluate(state)
                except Exception as error:
                    failed = error  # the iteration is finished all the same: first its row is written
            rows.append({"step": step} | metrics.scalars(numbers))
            raised = alarms.raised(rows, heard, config, saved_steps(checkpoints.directory))
            heard |= {alarm.scene: alarm.since for alarm in raised}
            checkpoints.suspected_since = alarms.suspected_since(rows, heard, config)
            state = alarms.act(raised, state, score_std=max(row["score/shaped_std"] for row in (rows[0], rows[-1])))
            with save_on_failure(run, state, checkpoints):
                writer.write(step, numbers, raised)
                if failed is not None:
                    raise failed
            view.iteration(step, numbers, raised)
            invariants.assert_same_digest(found_digest, reference_digest)
            checkpoints.rewards[step] = numbers["reward/mean"]
            if is_due(step + 1, config.checkpoint.save_every):
                checkpoints.save(state)
            stop_if_not_finite(run, state, checkpoints, numbers)
            stop_if_told(run, state, checkpoints, from_any(signal_so_far()))
            if reason := alarms.reason_to_stop(raised) or limit_reached(run, numbers, clock):
                stop_reason = reason
                break
        with save_on_failure(run, state, checkpoints):
            answer_fixed_prompts(run, state)
        log.info("stopped: %s; compilations: %s", stop_reason, dict(compilations))
    if config.checkpoint.save_every:
        checkpoints.save(state)
    exported = export_policy(run, state)
    checkpoints.finish()
    from_lead(lambda: print_fixed_prompts(run, int(state.step)))
    return RunResult(run.directory, *exported, rows[rows_before:], state, stop_reason)


def warn(messages: list[str]) -> None:
    for message in messages:
        log.warning("warning: %s", message)


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def keeps_answers(config: Config, step: int) -> bool:
    every = config.monitor.sample_every
    return is_due(step, every) or (every > 0 and step == config.run.iterations - 1)


def answer_fixed_prompts(run: Run, state: TrainState) -> None:
    """Sample the fixed prompts with noise that never changes, score the answers, and append them to samples.jsonl."""
    config = run.config
    if config.monitor.sample_every == 0:
        return
    prompts, step = run.fixed_prompts.in_order(), int(state.step)
    tokens, mask = jnp.asarray(prompts.tokens), jnp.asarray(prompts.mask)  # on every device: any number will do
    answers = answer(run, state, tokens, mask, Purpose.FIXED_PROMPTS, step=0)
    # Their number is their own, and a micro-batch has to divide it.
    of_so_many = replace(run.scoring, micro_batch_size=math.gcd(len(prompts.texts), config.micro_batch_size))
    scored = scoring.score(split_critic(state.params)[0], run.ref_params, answers, scoring=of_so_many)
    tokens, mask, token_kl = (
        sharding.read(run.mesh, x) for x in (answers.response_tokens, answers.response_mask, scored.token_kl)
    )

    def score_and_write() -> None:
        texts = tokenizer_texts(run.model.tokenizer, tokens, mask)
        scores = score_answers(run.reward, prompts.texts, texts, prompts.columns).total
        numbers = {"scores": scores, "seq_kl": token_kl.sum(axis=1), "lengths": mask.sum(axis=1)}
        samples.append(run.directory, step, prompts.texts, texts, **numbers)

    from_lead(score_and_write)


def print_fixed_prompts(run: Run, total: int) -> None:
    if rows := samples.read(run.directory):
        print_samples(rows, samples.steps_at_end(rows, total))


if __name__ == "__main__":
    from ppo_jax.cli import main

    main()
