"""PPO fine-tuning in plain PyTorch: `python -m ppo_torch_ref.train --config RUN/config.yaml`.

The twin of `ppo_jax/train.py`. Left out: cache, mesh, mixed precision, checkpoints, alarms, samples. It reads the
resolved config.yaml of a run and writes the same metrics, one JSON object per iteration.
"""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from ppo_torch_ref import ops
from ppo_torch_ref.build import Parts, build, read_config
from ppo_torch_ref.rollout import TRUNCATED, Rollout, generate
from ppo_torch_ref.scoring import Scored, score
from ppo_torch_ref.update import Experience, Stats, summarise, update

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


def ppo_iteration(config: SimpleNamespace, parts: Parts, step: int) -> Stats:
    """One PPO iteration; returns its metrics."""
    device = next(parts.model.parameters()).device
    clock, objective = [time.perf_counter()], parts.objective
    batch_size, repeats = config.rollout.batch_size, config.rollout.answers_per_prompt

    # 1. The current policy answers the prompts.
    texts, *prompts = parts.prompts.batch(step, batch_size // repeats)
    prompt_tokens, prompt_mask = (x.repeat_interleave(repeats, dim=0).to(device) for x in prompts)
    uniforms = parts.noise.uniforms(step, batch_size, parts.sampling.max_new_tokens).to(device)
    rollout = generate(parts.model, prompt_tokens, prompt_mask, uniforms, sampling=parts.sampling)
    clock.append(time.perf_counter())

    # 2. A reward source scores each answer.
    answers = [
        parts.tokenizer.decode(tokens[mask], skip_special_tokens=True)
        for tokens, mask in zip(rollout.response_tokens, rollout.response_mask, strict=True)
    ]
    scores = parts.reward([text for text in texts for _ in range(repeats)], answers)
    seq_scores = torch.tensor(scores, dtype=rollout.behaviour_logprobs.dtype, device=device)
    clock.append(time.perf_counter())

    # 3. The KL between the policy and the frozen reference, exact and sampled, over response tokens only.
    scored = score(
        parts.model,
        parts.reference,
        rollout,
        temperature=parts.sampling.temperature,
        micro_batch_size=objective.micro_batch_size,
        critic=None if objective.critic is None else objective.critic.values,
        bootstrap=config.critic.bootstrap_truncated,
    )
    clock.append(time.perf_counter())

    # 4. Score and KL become the total reward, token by token.
    shaped_scores, parts.score_moments = parts.algorithm.shape_scores(parts.score_moments, seq_scores, rollout)
    token_rewards = parts.algorithm.token_rewards(shaped_scores, scored, rollout.response_mask, kl_coef=parts.kl_coef)

    # 5. The advantage: which answers were better than their batch.
    advantages, returns = parts.algorithm.advantages(token_rewards, scored, rollout)
    observed = experience_metrics(
        rollout, scored, seq_scores, parts.kl_coef, shaped_scores=shaped_scores, returns=returns
    )

    # 6. A few small, clipped steps.
    experience = Experience(
        prompt_tokens=rollout.prompt_tokens,
        prompt_mask=rollout.prompt_mask,
        response_tokens=rollout.response_tokens,
        response_mask=rollout.response_mask,
        old_logprobs=scored.old_logprobs,
        advantages=advantages,
        old_values=scored.values,
        returns=returns,
    )
    all_stats = update(
        parts.model,
        parts.optimizer,
        parts.reference,
        experience,
        parts.kl_coef,
        objective=objective,
        iteration=step,
        orders=parts.noise.orders(step, config.update.epochs, batch_size),
        minibatch_size=config.update.minibatch_size,
        critic_optimizer=parts.critic_optimizer,
        max_approx_kl_nats=config.update.max_approx_kl_nats,
    )
    parts.kl_coef = parts.algorithm.next_kl_coef(parts.kl_coef, parts.kl_coef.new_tensor(observed["kl/seq_nats"]))
    clock.append(time.perf_counter())

    seconds = dict(zip(("rollout", "reward", "score", "update"), np.diff(clock).tolist(), strict=True))
    return {
        "step": step,
        **observed,
        **summarise(all_stats),
        **{f"time/{name}_s": value for name, value in seconds.items()},
        "time/iteration_s": clock[-1] - clock[0],
        "throughput/response_tokens_per_s": float(rollout.response_mask.sum()) / (clock[-1] - clock[0]),
    }


def experience_metrics(
    rollout: Rollout,
    scored: Scored,
    seq_scores: Tensor,
    kl_coef: Tensor,
    *,
    shaped_scores: Tensor,
    returns: Tensor | None,
) -> Stats:
    """Scores, KL, lengths, log-probs and values of one batch of answers, before it is trained on."""
    mask = rollout.response_mask
    answered, lengths = mask.any(dim=1), ops.masked_count(mask, axis=1)

    def mean_over_answers(token_values: Tensor) -> Tensor:
        return ops.masked_mean(ops.masked_sum(token_values, mask, axis=1), answered)

    score, seq_kl = ops.masked_mean(seq_scores, answered), mean_over_answers(scored.token_kl)
    quantiles = ops.masked_quantiles(scored.old_logprobs, mask, tuple(QUANTILES.values()))
    metrics = {
        "kl/seq_nats": seq_kl,
        "kl/token_nats": ops.masked_mean(scored.token_kl, mask),
        "kl/token_max_nats": ops.masked_max(scored.token_kl, mask),
        "kl/k1_seq_nats": mean_over_answers(ops.k1(scored.old_logprobs, scored.ref_logprobs)),
        "kl/k2_seq_nats": mean_over_answers(ops.k2(scored.old_logprobs, scored.ref_logprobs)),
        "kl/k3_seq_nats": mean_over_answers(ops.k3(scored.old_logprobs, scored.ref_logprobs)),
        "kl/coef": kl_coef,
        "score/mean": score,
        "score/std": ops.masked_var(seq_scores, answered).sqrt(),
        "score/shaped_mean": ops.masked_mean(shaped_scores, answered),
        "score/shaped_std": ops.masked_var(shaped_scores, answered).sqrt(),
        "reward/mean": score - kl_coef * seq_kl,
        "response/len_mean_tokens": ops.masked_mean(lengths, answered),
        "response/truncated_frac": (rollout.finish_reason == TRUNCATED).float().mean(),
        "logprob/mean": ops.masked_mean(scored.old_logprobs, mask),
        **{f"logprob/{name}": quantiles[i] for i, name in enumerate(QUANTILES)},
        "policy/entropy_nats": ops.masked_mean(scored.token_entropy, mask),
        "rollout/logprob_gap_max": ops.masked_max((rollout.behaviour_logprobs - scored.old_logprobs).abs(), mask),
        "rollout/kept_mass": ops.masked_mean(rollout.kept_mass, mask),
    }
    if scored.values is not None and returns is not None:
        metrics["critic/explained_variance"] = ops.explained_variance(scored.values, returns, mask)
        metrics["critic/value_mean"] = ops.masked_mean(scored.values, mask)
    return {name: float(value) for name, value in metrics.items()}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ppo_torch_ref.train", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="resolved config.yaml of a run")
    parser.add_argument("--iterations", type=int, help="stop after this many; the schedule stays that of the config")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of parameters and all else")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--hf", action="store_true", help="run the model of transformers in place of our own")
    parser.add_argument("--out", type=Path, help="write metrics.jsonl into this directory instead of printing it")
    arguments = parser.parse_args(words)
    config = read_config(arguments.config)
    parts = build(config, dtype=getattr(torch, arguments.dtype), device=arguments.device, hf=arguments.hf)
    iterations = config.run.iterations if arguments.iterations is None else arguments.iterations
    for step in range(iterations):
        line = json.dumps(ppo_iteration(config, parts, step))
        if arguments.out is None:
            print(line, flush=True)
        else:
            arguments.out.mkdir(parents=True, exist_ok=True)
            with (arguments.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
