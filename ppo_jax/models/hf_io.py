"""Hugging Face model directories in and out: safetensors only, no torch, no remote code, nothing loaded in part."""

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ppo_jax import durable
from ppo_jax.errors import UserError
from ppo_jax.models.decoder import DecoderSpec, Params, abstract_params
from ppo_jax.models.families import FAMILIES, Tensor, family_of, spec_of, tensors_of, unsupported

MAX_SHARD_BYTES = 5 * 10**9
GENERATION_CONFIG = "generation_config.json"
FLOATS = ("float32", "float16", "bfloat16", "float64")

log = logging.getLogger("ppo_jax")

Place = Callable[[str, np.ndarray], jax.Array]  # puts the array of a parameter's path where it belongs


def on_default_device(path: str, value: np.ndarray) -> jax.Array:
    return jnp.asarray(value)


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory without its weights: where it lies, what it is, and its tokenizer."""

    path: Path
    config: PretrainedConfig
    spec: DecoderSpec
    tokenizer: PreTrainedTokenizerBase


def resolve_directory(path_or_id: str, *, key: str = "model.path") -> Path:
    """A local model directory, or a hub id that is downloaded (configuration, tokenizer and safetensors only).

    `key` is the field of the configuration that errors name.
    """
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        return local
    looks_like_a_path = path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") != 1
    if looks_like_a_path or local.exists():
        raise UserError(f"{key}: {path_or_id!r} (resolved: {local.absolute()}) is not a directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(path_or_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{key}: {path_or_id!r} is neither a local directory ({local.absolute()} does not exist) nor a hub id "
            f"that could be fetched: {str(error).splitlines()[0]}"
        ) from error


def load_config(directory: Path, *, ignored_fields: tuple[str, ...] = ()) -> PretrainedConfig:
    """The directory's `config.json`; models that bring their own code are refused unless `auto_map` is ignored."""
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{directory} is not a Hugging Face model directory: it has no config.json")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("model_type") not in list(FAMILIES):
        found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"{file}: {unsupported(found)}")
    if raw.get("auto_map") and "auto_map" not in ignored_fields:
        raise UserError(
            f"{file} asks for remote code (auto_map); ppo_jax never runs code from a model directory. If that code "
            f"computes what transformers' own {raw['model_type']!r} does, as Microsoft's Phi-3 does, name auto_map in "
            f"model.ignored_config_fields"
        )
    if raw.get("quantization_config"):
        raise UserError(f"{file} describes a quantised model; PPO needs the full weights (bf16, fp16 or fp32)")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, StrictDataclassError) as error:
        raise UserError(f"{file} could not be read: {' '.join(str(error).split())}") from error


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{directory} holds no tokenizer that can be read: {str(error).splitlines()[0]}") from error


def open_model(
    path_or_id: str, *, key: str = "model.path", ignored_config_fields: tuple[str, ...] = ()
) -> ModelDirectory:
    """Everything about a model directory or hub id but its weights, which `load_params` reads."""
    path = resolve_directory(path_or_id, key=key)
    config = load_config(path, ignored_fields=ignored_config_fields)
    return ModelDirectory(path, config, spec_of(config, ignored_fields=ignored_config_fields), load_tokenizer(path))


def load_params(
    directory: Path,
    config: PretrainedConfig,
    spec: DecoderSpec,
    *,
    dtype=jnp.float32,
    place: Place = on_default_device,
) -> Params:
    """Weights of a causal language model, or an error that lists every missing, unexpected and misshapen tensor."""
    head = family_of(config).head
    shapes = param_shapes(spec)
    rows = tensors_of(config, spec, set(shapes))
    optional = (head,) if spec.tied_head else ()
    params = load_tensors(
        directory, config, rows, shapes, heads=spec.heads, optional=optional, dtype=dtype, place=place
    )
    files = tensor_files(directory)
    if spec.tied_head and head in files:
        row = next(row for row in rows if row.params == ("embed",))
        embedding = _names_in_files(config, [row], files)[row.name]
        if not np.array_equal(read_tensor(files[head], head), read_tensor(files[embedding], embedding)):
            raise UserError(
                f"{directory}: config.json ties the head to the embedding (tie_word_embeddings), but {head} differs "
                f"from {embedding}; set tie_word_embeddings to false to use it, or remove it from the file"
            )
    return params


def load_tensors(
    directory: Path,
    config: PretrainedConfig,
    rows: Sequence[Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    heads: int,
    optional: tuple[str, ...] = (),
    dtype=jnp.float32,
    place: Place = on_default_device,
) -> Params:
    """The parameters that `rows` hold, of the given shapes; `optional` names tensors that may lie there unread.

    `place` puts the array of a parameter's path (`layer_0/attn/q/kernel`) where it belongs, one after the other.
    """
    files = tensor_files(directory)
    names = _names_in_files(config, rows, files)
    _check_names(directory, set(names.values()), set(files), ignorable=family_of(config).buffers + optional)
    params = {}
    for row in rows:
        name = names[row.name]
        parts = _split_tensor(row, read_tensor(files[name], name), shapes, heads)
        params |= {path: place(path, part.astype(dtype)) for path, part in parts}
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in params.items()})


def param_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a decoder, under paths such as `layer_0/attn/q/kernel`."""
    return {path: leaf.shape for path, leaf in _by_path(abstract_params(spec)).items()}


def _names_in_files(config: PretrainedConfig, rows: Iterable[Tensor], files: Iterable[str]) -> dict[str, str]:
    """Under which name each row lies in the files: a checkpoint of the bare trunk (the hub's gpt2) has no prefix."""
    prefix = family_of(config).prefix
    bare = not any(name.startswith(prefix) for name in files)
    return {row.name: row.name.removeprefix(prefix) if bare else row.name for row in rows}


def tensor_files(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor: one `model.safetensors`, or shards with an index."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.is_file():  # where both lie, transformers reads this one too
        files = dict.fromkeys(names_in(single), single)
    elif index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: directory / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} is not an index of safetensors shards: {error!r}") from error
    else:
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern)]
        found = (
            f"found {', '.join(sorted(pickles))}, pickle files, which can run code when loaded" if pickles else "none"
        )
        raise UserError(f"{directory} holds no model.safetensors ({found}); convert the weights to safetensors first")
    outside = [str(f) for f in set(files.values()) if not _lies_in(directory, f)]
    if outside:
        raise UserError(f"{directory}: these weights are not files in it: {', '.join(sorted(outside))}")
    return files


def _lies_in(directory: Path, file: Path) -> bool:
    """Whether a file is in the directory itself, symlinks followed; the hub's cache links into its own `blobs`."""
    homes = (directory.resolve(), directory.resolve().parent.parent / "blobs")
    return file.parent == directory and file.is_file() and file.resolve().parent in homes


def names_in(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="np") as reader:
            return list(reader.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a valid safetensors file: {error}") from error


def read_tensor(file: Path, name: str) -> np.ndarray:
    try:
        with safe_open(file, framework="np") as reader:
            return reader.get_tensor(name)
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: tensor {name} cannot be read: {error}") from error


def _check_names(directory: Path, expected: set[str], found: set[str], *, ignorable: tuple[str, ...]) -> None:
    missing = sorted(expected - found)
    unexpected = sorted(name for name in found - expected if not name.endswith(ignorable))
    if missing or unexpected:
        raise UserError(
            f"{directory}: the weights do not fit config.json, nothing was loaded. "
            f"Missing tensors: {listing(missing)}. Unexpected tensors: {listing(unexpected)}."
        )


def listing(names: list[str], most: int = 12) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _split_tensor(
    row: Tensor, stored: np.ndarray, shapes: Mapping[str, tuple[int, ...]], heads: int
) -> Iterable[tuple[str, np.ndarray]]:
    widths = [shapes[path][-1] for path in row.params]
    expected = (*shapes[row.params[0]][:-1], sum(widths))
    expected = expected[::-1] if row.transpose else expected
    if stored.shape != expected or stored.dtype.name not in FLOATS:
        raise UserError(
            f"tensor {row.name} is {stored.dtype.name}{list(stored.shape)}; config.json asks for floating-point "
            f"{list(expected)}"
        )
    return zip(row.params, row.split(stored, widths, heads), strict=True)


def _by_path(params: Params) -> dict[str, Any]:
    """Leaves under paths such as `layer_0/attn/q/kernel`."""
    return {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}


def export_tensors(config: PretrainedConfig, spec: DecoderSpec, params: Params, dtype) -> dict[str, np.ndarray]:
    """Parameters under their Hugging Face names and layouts; a tied head is the embedding and is not written twice."""
    flat = _by_path(params)
    tensors = {}
    for row in tensors_of(config, spec, set(flat)):
        tensors[row.name] = row.join([np.asarray(flat[path].astype(dtype)) for path in row.params], spec.heads)
    return tensors


def save_model(directory: Path, model: ModelDirectory, params: Params, *, dtype=jnp.float32) -> None:
    """Write a directory that `transformers.AutoModelForCausalLM` loads with identical tensors."""
    tied, tensors = model.spec.tied_head, export_tensors(model.config, model.spec, params, dtype)
    # An adapter on a tied head was merged into it, which made it a tensor of its own.
    changes = {} if tied == bool(model.config.tie_word_embeddings) else {"tie_word_embeddings": tied}
    save_tensors(directory, model, tensors, dtype=dtype, config_changes=changes)


def save_tensors(
    directory: Path,
    model: ModelDirectory,
    tensors: dict[str, np.ndarray],
    *,
    dtype,
    config_changes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a model directory of tensors under their Hugging Face names, and the model's config with some changes.

    Tokenizer, chat template and generation config come along. The directory appears whole or not at all: everything is
    written beside it first. An existing one is replaced; one that holds files that the new one has not is kept under
    another name, which is said.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_model(partial, model, tensors, {**config_changes, "dtype": jnp.dtype(dtype).name})
        set_aside_what_is_not_ours(directory, partial)
        durable.publish(partial, directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"the model could not be written to {directory}: {error}") from error


def set_aside_what_is_not_ours(directory: Path, partial: Path) -> None:
    """Rename a directory with files that the new export has not: someone else put them there."""
    others = sorted({path.name for path in directory.glob("*")} - {path.name for path in partial.iterdir()})
    if others:
        names = (directory.with_name(f"{directory.name}.kept_{i}") for i in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        log.warning("warning: %s holds files of others (%s); it is now %s", directory, listing(others), aside.name)
        directory.rename(aside)


def _write_model(
    partial: Path, model: ModelDirectory, tensors: dict[str, np.ndarray], config_changes: Mapping[str, Any]
) -> None:
    _save_shards(partial, tensors)
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config.pop("auto_map", None)  # the code it points to stays behind
    config |= config_changes
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.tokenizer.save_pretrained(partial)
    if (model.path / GENERATION_CONFIG).is_file():
        shutil.copy(model.path / GENERATION_CONFIG, partial / GENERATION_CONFIG)
    mode = (partial / "config.json").stat().st_mode
    for weights in partial.glob("*.safetensors"):
        weights.chmod(mode)  # safetensors makes files that nobody else, such as a server, may read


def _save_shards(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
