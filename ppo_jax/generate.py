"""`python -m ppo_jax.generate`: a model answers prompts, into a JSONL file that a killed process continues.

The noise of an answer is a function of (seed, prompt, number of the answer) and nothing else, and batches begin at
fixed prompts: neither the size of a batch nor a kill changes an answer, and a continued file has the unbroken one's
bytes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import track

from ppo_jax import build, rollout, sharding
from ppo_jax.answer_file import AnswerFile
from ppo_jax.errors import UserError
from ppo_jax.generate_config import GenerateConfig, recorded
from ppo_jax.models import hf_io
from ppo_jax.models.decoder import Params
from ppo_jax.models.hf_io import ModelDirectory
from ppo_jax.ops.randomness import Purpose, purpose_key, rollout_uniforms
from ppo_jax.prompts import Prompts, for_each_answer, load_prompts
from ppo_jax.records import EOS, STOP_STRING, TRUNCATED, PromptBatch
from ppo_jax.rewards.source import Reward, open_reward, score_answers
from ppo_jax.rollout import Endings, Sampling
from ppo_jax.run_directory import prompts_digest, tokenizer_digest

FINISH_REASONS = {TRUNCATED: "truncated", EOS: "eos", STOP_STRING: "stop_string"}
# What of a model directory, beside its tokenizer, decides its answers.
DIGESTED = ("*.safetensors", "config.json", hf_io.GENERATION_CONFIG)


@dataclass(frozen=True)
class Answering:
    """What answers prompts: a model with its weights, and how it is sampled."""

    config: GenerateConfig
    mesh: jax.sharding.Mesh
    model: ModelDirectory
    params: Params  # in the compute dtype
    endings: Endings


def generate(config: GenerateConfig, out: Path, *, scored: bool) -> tuple[int, int]:
    """Answer all prompts into `out`; returns how many rows it holds, and how many it held before.

    A row is {"index", "prompt", "answer", "finish_reason", "tokens", "logprob"} and, where `scored`, "score". `tokens`
    are ids, the EOS among them; `logprob` is their sum in nats under the full temperature-scaled policy, whatever top-k
    and top-p cut away. Answers to one prompt are neighbours. Raises UserError for anything a user can mend.
    """
    mesh = sharding.make_mesh(config.mesh)
    reward = open_reward(config.reward) if scored else None
    model = build.open_model(config)
    prompts = load_prompts(config.prompts, model.tokenizer, seed=config.run.seed)
    build.check_tokens(config, model, prompts)
    build.float32_means_float32(config)
    digests = {"model": digest_of_weights(model), "tokenizer": tokenizer_digest(model.tokenizer)}
    digests |= {"prompts": prompts_digest(prompts)}
    total = len(prompts.texts) * config.rollout.answers_per_prompt
    with AnswerFile(out, recorded(config, scored=scored) | digests) as file, jax.set_mesh(mesh):
        before = file.written
        if before > total:
            raise UserError(f"--out: {out} holds {before} answers, of {total} that there are; choose another file")
        if before < total:
            dtype, place = jnp.dtype(config.model.compute_dtype), partial(sharding.place_param, mesh)
            params = hf_io.load_params(model.path, model.config, model.spec, dtype=dtype, place=place)
            answering = Answering(config, mesh, model, params, build.make_endings(config, model))
            if reward is not None:
                reward = build.add_reward_model(reward, config, mesh)
            write_missing(answering, prompts, reward, file)
    return total, before


def write_missing(answering: Answering, prompts: Prompts, reward: Reward | None, file: AnswerFile) -> None:
    """Answer, score and write batch after batch; one that was begun is computed whole again, in its old shape."""
    per_prompt, count = answering.config.rollout.answers_per_prompt, len(prompts.texts)
    size = min(answering.config.rollout.batch_size // per_prompt, count)
    console = Console(stderr=True)
    starts = range(file.written // per_prompt // size * size, count, size)
    for start in track(starts, "answering", console=console, disable=not console.is_terminal):
        wanted = prompts.at(range(start, min(start + size, count))).in_order()
        questions, columns = for_each_answer(wanted, per_prompt)
        # The last batch is filled up with the first prompts: it compiles nothing anew.
        indices = [i % count for i in range(start, start + size)]
        rows = answer_rows(answering, prompts.at(indices).in_order(), indices)[: len(questions)]
        rows = [{"prompt": question} | row for question, row in zip(questions, rows, strict=True)]
        if reward is not None:
            scores = score_answers(reward, questions, [row["answer"] for row in rows], columns).total
            rows = [row | {"score": float(score)} for row, score in zip(rows, scores, strict=True)]
        file.append(rows[file.written - start * per_prompt :])


def answer_rows(answering: Answering, batch: PromptBatch, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Answers to a batch of prompts, whose places among all prompts are `indices`, as rows without their prompts."""
    config, mesh, model = answering.config, answering.mesh, answering.model
    answers = rollout.generate(
        answering.params,
        sharding.place_rows(mesh, batch.tokens),
        sharding.place_rows(mesh, batch.mask),
        sharding.place_rows(mesh, np.asarray(uniforms(config, jnp.asarray(indices)))),
        answering.endings,
        jnp.zeros((), jnp.int32),
        spec=model.spec,
        sampling=sampling(config),
        compute_dtype=config.model.compute_dtype,
        halvings=config.rollout.halvings,
    )
    read = partial(sharding.read, mesh)
    tokens, mask, logprobs = map(read, (answers.response_tokens, answers.response_mask, answers.behaviour_logprobs))
    texts = build.tokenizer_texts(model.tokenizer, tokens, mask)
    return [
        {
            "answer": texts[i],
            "finish_reason": FINISH_REASONS[int(reason)],
            "tokens": tokens[i][mask[i]].tolist(),
            "logprob": float(logprobs[i].sum(dtype=np.float64)),
        }
        for i, reason in enumerate(read(answers.finish_reason))
    ]


def sampling(config: GenerateConfig) -> Sampling:
    """Greedy, at temperature 0, is the one likeliest token at temperature 1, and `uniforms` of 0 take the first of
    equally likely ones."""
    if config.rollout.temperature > 0:
        return build.make_sampling(config)
    return replace(build.make_sampling(config), temperature=1.0, top_p=1.0, top_k=1)


def uniforms(config: GenerateConfig, indices: jax.Array) -> Float[Array, "B T"]:
    """Noise of the answers to the prompts at `indices`; that of a prompt's first answer is the same however many."""
    length, per_prompt = config.rollout.max_new_tokens, config.rollout.answers_per_prompt
    if config.rollout.temperature == 0:
        return jnp.zeros((len(indices), length))
    keys = [purpose_key(config.run.seed, number, Purpose.GENERATE) for number in range(per_prompt)]
    drawn = [rollout_uniforms(key, indices, length=length) for key in keys]
    return jnp.stack(drawn, axis=1).reshape(-1, length)


def digest_of_weights(model: ModelDirectory) -> str:
    """SHA-256 of the names and contents of a model's files, its tokenizer's left out."""
    files = {file for pattern in DIGESTED for file in model.path.glob(pattern) if file.is_file()}
    whole = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as opened:
            whole.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


if __name__ == "__main__":
    from ppo_jax.cli import generate_main

    generate_main()
