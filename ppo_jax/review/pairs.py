"""Pairs to rate: answers of the SFT model and of the exported policy to the same prompts, with the same noise."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import build, config_file, ratings, rollout, sharding
from ppo_jax.config import Config, MeshConfig
from ppo_jax.errors import UserError
from ppo_jax.initial_state import copy_params, first_policy, open_lora
from ppo_jax.models import hf_io
from ppo_jax.models.decoder import Params
from ppo_jax.models.hf_io import ModelDirectory
from ppo_jax.monitor.invariants import digest
from ppo_jax.ops.randomness import Purpose, purpose_key, rollout_uniforms
from ppo_jax.prompts import Prompts, load_prompts, load_split
from ppo_jax.ratings import Pair
from ppo_jax.run_directory import DESCRIPTION


def read_or_make(directory: Path, config: Config, count: int, prompts_path: str | None) -> list[Pair]:
    """`count` pairs of a run, or fewer where there are not as many prompts: those of its `pairs.json`, or new ones.

    They are made anew when the policy, or where the prompts come from, is no longer what they were made from. Raises
    UserError where there is nothing to make them from.
    """
    policy, (pairs, made_from) = directory / "policy", ratings.read_pairs(directory)
    source = {"prompts": prompts_path, "policy": _state_of(policy)}
    asked = made_from.get("asked", 0)
    if made_from and asked >= count and (source | {"asked": asked} == made_from or not policy.is_dir()):
        return pairs[:count]
    if not policy.is_dir():
        raise UserError(f"{policy} is not there; a run exports it at its end, and a stopped one after --resume")
    pairs = make_pairs(directory, config, count, prompts_path)
    ratings.write_pairs(directory, pairs, source | {"asked": count})
    return pairs


def _state_of(policy: Path) -> list[list[Any]]:
    """Names, sizes and times of the weights: an export replaces all of them."""
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(policy.glob("*.safetensors"))]


def read_config(directory: Path) -> Config:
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} (resolved: {directory.absolute()}) is not a run directory: it has no config.yaml")
    return config_file.load(directory / "config.yaml")


def make_pairs(directory: Path, config: Config, count: int, prompts_path: str | None) -> list[Pair]:
    """Both models answer; one of them is in memory at a time."""
    file = directory / DESCRIPTION
    versions = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if prompts_path is None and "prompts" in versions.get("from_python", []):
        raise UserError(f"the prompts of {directory} came from Python; say with --prompts FILE what is to be answered")
    # A run of many devices is rated on whatever is here.
    mesh, sft = sharding.make_mesh(MeshConfig()), build.open_model(config)
    policy = hf_io.open_model(
        str(directory / "policy"), key="RUN", ignored_config_fields=config.model.ignored_config_fields
    )
    prompts = prompts_to_rate(config, sft, count, prompts_path)
    build.check_tokens(config, sft, prompts)
    build.float32_means_float32(config)
    answers, place = [], partial(sharding.place_param, mesh)
    for whose, model in (("SFT model", sft), ("policy", policy)):
        print(f"{len(prompts.texts)} answers of the {whose} are made, once.", flush=True)
        with jax.set_mesh(mesh):
            if model is sft:
                params = _reference(config, sft, mesh)
                _check_is_reference(params, config, versions.get("reference_digest"), directory)
            else:
                params = hf_io.load_params(model.path, model.config, model.spec, place=place)
            answers.append(list(_answers(config, replace(model, tokenizer=sft.tokenizer), params, prompts, mesh)))
    return [Pair(*texts) for texts in zip(prompts.texts, *answers, strict=True)]


def _reference(config: Config, sft: ModelDirectory, mesh: jax.sharding.Mesh) -> Params:
    """What the run began with: the model at model.path, with the adapter at lora.path where there is one."""
    source, adapter = open_lora(config, sft)
    if source is not None:
        return first_policy(config, sft, source, adapter, mesh)[1]
    return hf_io.load_params(sft.path, sft.config, sft.spec, place=partial(sharding.place_param, mesh))


def prompts_to_rate(config: Config, model: ModelDirectory, count: int, prompts_path: str | None) -> Prompts:
    """At most `count` different prompts: of a file, or the fixed, then the held-out, then others of the run."""
    if prompts_path is not None:
        source = config.prompts.model_copy(update={"path": prompts_path})
        sets = [load_prompts(source, model.tokenizer, seed=config.run.seed)]
    else:
        training, held_out = load_split(config.prompts, model.tokenizer, seed=config.run.seed)
        shuffled = training.at(training.indices(0, len(training.texts)))
        fixed = build.pick_fixed_prompts(config, model, training)
        sets = [fixed, *([] if held_out is None else [held_out]), shuffled]
    different = {tuple(tokens): text for of in sets for text, tokens in zip(of.texts, of.encoded, strict=True)}
    chosen = list(different.items())[:count]
    return Prompts([text for _, text in chosen], [list(tokens) for tokens, _ in chosen], config.run.seed)


def _check_is_reference(params: Params, config: Config, expected: str | None, directory: Path) -> None:
    found = digest(copy_params(params, config.model.compute_dtype))
    if expected not in (None, found):
        raise UserError(
            f"the model at model.path ({config.model.path}) is not the one {directory} began with (digest {found}, "
            f"expected {expected}); put that one back, its answers are what the policy is compared with"
        )


def _answers(
    config: Config, model: ModelDirectory, params: Params, prompts: Prompts, mesh: jax.sharding.Mesh
) -> Iterator[str]:
    """One answer to every prompt, sampled as in training, with noise that depends on the prompt's place alone."""
    whole, count = prompts.in_order(), len(prompts.texts)
    size = min(config.rollout.batch_size, count)
    key = purpose_key(config.run.seed, 0, Purpose.EVALUATION)
    for start in range(0, count, size):
        rows = np.arange(start, start + size)  # the last batch is filled up with the first prompts
        answers = rollout.generate(
            params,
            jnp.asarray(whole.tokens[rows % count]),
            jnp.asarray(whole.mask[rows % count]),
            rollout_uniforms(key, jnp.asarray(rows), length=config.rollout.max_new_tokens),
            build.make_endings(config, model),
            jnp.zeros((), jnp.int32),
            spec=model.spec,
            sampling=build.make_sampling(config),
            compute_dtype=config.model.compute_dtype,
            halvings=config.rollout.halvings,
        )
        tokens, mask = (sharding.read(mesh, x) for x in (answers.response_tokens, answers.response_mask))
        yield from build.tokenizer_texts(model.tokenizer, tokens, mask)[: count - start]
