"""Models that give numbers instead of tokens: the critic's value head, and sequence-classification models.

Both are a decoder without its language-model head, the trunk, and a linear map of its final hidden states.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ppo_jax.errors import UserError
from ppo_jax.models import hf_io
from ppo_jax.models.decoder import Params
from ppo_jax.models.families import family_of, tensors_of
from ppo_jax.models.hf_io import ModelDirectory, Place
from ppo_jax.models.layers import DecoderSpec, at_least_float32
from ppo_jax.models.tensor_names import Tensor, linear
from ppo_jax.sharding import by_rules

# Every family of transformers calls its classifier so; none of them has a bias, but a file may bring one.
SCORE_WEIGHT, SCORE_BIAS = SCORE = linear("score", "score")
OF_A_LANGUAGE_MODEL = re.compile("(ForCausalLM|LMHeadModel)$")


@dataclass(frozen=True)
class ClassifierDirectory:
    """A sequence-classification directory without its weights; `spec` is that of the trunk."""

    path: Path
    config: PretrainedConfig
    spec: DecoderSpec
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]


def zero_value_head(width: int) -> Params:
    """A value head that says 0 of every state, so that an untrained critic claims nothing."""
    return {"kernel": jnp.zeros((width,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def head_values(head: Params, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
    """hidden · kernel + bias, in float32 at least. What stands at a padding is for the caller to mask.

    A sum of products and no matrix product: GPUs would compute that in TF32, which keeps 10 bits.
    """
    wide = at_least_float32(hidden)
    kernel, bias = head["kernel"].astype(wide.dtype), head["bias"].astype(wide.dtype)
    return jnp.sum(wide * jnp.expand_dims(kernel, range(hidden.ndim - 1)), axis=-1) + bias


def label_head(score: Params, index: int) -> Params:
    """One label's column of a classifier's head {"kernel": [D, labels], "bias"?: [labels]}, as a value head."""
    kernel = score["kernel"][:, index]
    return {"kernel": kernel, "bias": score["bias"][index] if "bias" in score else jnp.zeros((), kernel.dtype)}


def critic_spec(spec: DecoderSpec) -> DecoderSpec:
    """The trunk of a decoder: a tied head is no parameter of its own, so none is declared."""
    return replace(spec, tied_head=True)


def trunk_params(params: Params) -> Params:
    """A policy's parameters without its language-model head."""
    return {name: value for name, value in params.items() if name != "head"}


# ------------------------------------------------------------------------------------------- Hugging Face directories


def open_classifier(path_or_id: str, *, key: str, ignored_config_fields: tuple[str, ...] = ()) -> ClassifierDirectory:
    """Everything about a sequence-classification directory or hub id but its weights; errors name the field `key`."""
    model = hf_io.open_model(path_or_id, key=key, ignored_config_fields=ignored_config_fields)
    if not _has_score(model):
        raise UserError(
            f"{key}: {model.path} is no sequence-classification model: its weights have no {SCORE_WEIGHT.name} "
            f"(architectures {model.config.architectures})"
        )
    return _as_classifier(model)


def load_classifier(
    model: ClassifierDirectory, *, dtype=jnp.float32, place: Place = hf_io.on_default_device
) -> tuple[Params, Params]:
    """(parameters of the trunk, head {"kernel": [D, labels], and "bias": [labels] where the files have one})."""
    shapes = {"score/kernel": (model.spec.width, len(model.labels)), "score/bias": (len(model.labels),)}
    files = hf_io.tensor_files(model.path)
    params = _load_trunk(model, [row for row in SCORE if row.name in files], shapes, dtype=dtype, place=place)
    return params, params.pop("score")


def save_scorer(directory: Path, model: ModelDirectory, scorer: Params, *, label: str, dtype=jnp.float32) -> None:
    """Write a directory that `transformers.AutoModelForSequenceClassification` loads: one label, the scorer's number.

    `model` is the directory that the trunk came from. No head of transformers has a bias, so none is written. Where
    the config names no pad, transformers reads no batches: the tokenizer's is put there.
    """
    tensors = hf_io.export_tensors(model.config, critic_spec(model.spec), scorer["trunk"], dtype)
    tensors[SCORE_WEIGHT.name] = np.asarray(scorer["head"]["kernel"].astype(dtype))[None]
    architectures = [OF_A_LANGUAGE_MODEL.sub("ForSequenceClassification", name) for name in _architectures(model)]
    changes = {"architectures": architectures, "id2label": {"0": label}, "label2id": {label: 0}}
    changes |= {"pad_token_id": pad_token_id(model)}
    hf_io.save_tensors(directory, model, tensors, dtype=dtype, config_changes=changes)


def pad_token_id(model: ModelDirectory) -> int | None:
    """The pad of a model's config, else that of its tokenizer: where it ends a text, the score is read before it."""
    stated: Any = getattr(model.config, "pad_token_id", None)
    own: Any = model.tokenizer.pad_token_id
    return own if stated is None else stated


def _architectures(model: ModelDirectory) -> list[str]:
    return list(model.config.architectures or [])


def _has_score(model: ModelDirectory) -> bool:
    return SCORE_WEIGHT.name in hf_io.tensor_files(model.path)


def _as_classifier(model: ModelDirectory) -> ClassifierDirectory:
    labels = tuple(str(name) for _, name in sorted((model.config.id2label or {}).items()))
    return ClassifierDirectory(model.path, model.config, critic_spec(model.spec), model.tokenizer, labels)


def _load_trunk(
    model: ModelDirectory | ClassifierDirectory,
    rows: Sequence[Tensor] = (),
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    *,
    dtype=jnp.float32,
    place: Place,
) -> Params:
    """The trunk of a directory and what further `rows` hold; a language-model head that lies there stays unread."""
    spec = critic_spec(model.spec)
    of_trunk = hf_io.param_shapes(spec)
    return hf_io.load_tensors(
        model.path,
        model.config,
        [*tensors_of(model.config, spec, set(of_trunk)), *rows],
        {**of_trunk, **shapes},
        heads=spec.heads,
        optional=(family_of(model.config).head,),
        dtype=dtype,
        place=place,
    )


# --------------------------------------------------------------------------------------------------------- the critic


def load_critic(
    path_or_id: str | None,
    policy: ModelDirectory,
    initial_params: Params,
    *,
    place: Place = hf_io.on_default_device,
    ignored_config_fields: tuple[str, ...] = (),
) -> tuple[DecoderSpec, Params]:
    """A critic that is a model of its own: (spec, {"trunk": ..., "head": {"kernel": [D], "bias": []}}), float32.

    None is a copy of the policy's trunk, in memory of its own, since the policy's buffers are donated; a causal
    language model gives its trunk. Both get a zero head. A sequence-classification model with one label brings its own.
    """
    if path_or_id is None:
        trunk = _copied(trunk_params(initial_params))
        return critic_spec(policy.spec), {"trunk": trunk, "head": zero_value_head(policy.spec.width)}
    model = hf_io.open_model(path_or_id, key="critic.path", ignored_config_fields=ignored_config_fields)
    _check_vocabulary(model, policy)
    return critic_spec(model.spec), load_scorer(model, key="critic.path", place=place)


def load_scorer(model: ModelDirectory, *, key: str, place: Place = hf_io.on_default_device) -> Params:
    """{"trunk": ..., "head": {"kernel": [D], "bias": []}}, float32, of any directory that can start to give one number.

    A causal language model gives its trunk, with a zero head; a sequence-classification model with one label its own.
    """
    if not _has_score(model):
        return {"trunk": _load_trunk(model, place=place), "head": zero_value_head(model.spec.width)}
    classifier = _as_classifier(model)
    if len(classifier.labels) != 1:
        raise UserError(
            f"{key}: {model.path} has {len(classifier.labels)} labels ({', '.join(classifier.labels)}), and a "
            f"value is one number; expected a model with one label"
        )
    trunk, score = load_classifier(classifier, place=place)
    return {"trunk": trunk, "head": label_head(score, 0)}


@jax.jit
def _copied(params: Params) -> Params:
    return by_rules(jax.tree.map(jnp.copy, params))


def _check_vocabulary(model: ModelDirectory, policy: ModelDirectory) -> None:
    """Values are read at the policy's token ids: each must be the same token in the critic, and have an embedding."""
    theirs = model.tokenizer.get_vocab()
    own = sorted(policy.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    moved = [f"{token!r} is {theirs.get(token)} and not {id_}" for token, id_ in own if theirs.get(token) != id_]
    if moved:
        raise UserError(
            f"critic.path: the critic reads the policy's token ids, but the tokenizers of {model.path} and "
            f"{policy.path} differ in {len(moved)} tokens ({', '.join(moved[:3])})"
        )
    if model.spec.vocab_size < policy.spec.vocab_size:
        raise UserError(
            f"critic.path: the critic reads the policy's token ids, but the embedding of {model.path} has "
            f"{model.spec.vocab_size} rows and that of {policy.path} {policy.spec.vocab_size}"
        )
