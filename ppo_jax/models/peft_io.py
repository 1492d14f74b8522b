"""PEFT adapter directories in and out: `adapter_config.json` field by field, safetensors only, no peft, no torch."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ppo_jax import durable
from ppo_jax.errors import UserError
from ppo_jax.models import hf_io
from ppo_jax.models.decoder import Params
from ppo_jax.models.families import family_of
from ppo_jax.models.hf_io import ModelDirectory, Place
from ppo_jax.models.lora import HEAD_MODULE, Adapter, Module, make_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST = 1_000_000  # rank and α; no model is as wide, and their quotient stays far from the ends of float32
# Fields that name or describe, or whose value counts only beside another that is refused. Dropout is off everywhere.
HARMLESS = frozenset(
    """
    base_model_name_or_path revision auto_mapping peft_version inference_mode lora_dropout megatron_core
    qalora_group_size
    """.split()  # noqa: SIM905
)
# The only values of these that leave the base as it is and the forward pass x W + (x A) B · scale. The values that an
# adapter began with lie in its file, whatever they were drawn from; most other kinds of init change the base as well.
ONLY = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", None),
}


@dataclass(frozen=True)
class AdapterDirectory:
    """An adapter directory without its weights."""

    path: Path
    adapter: Adapter


def open_adapter(path_or_id: str, model: ModelDirectory) -> AdapterDirectory:
    """Everything about an adapter directory or hub id but its weights; what `lora` does not compute is refused."""
    directory = hf_io.resolve_directory(path_or_id, key="lora.path")
    file = directory / CONFIG
    if not file.is_file():
        raise UserError(f"lora.path: {directory} is no PEFT adapter: it has no {CONFIG}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(fields).__name__}")
    if problems := list(_refused(fields, model)):
        raise UserError(f"{file} asks for what is not offered here: {'; '.join(problems)}")
    rank, alpha = fields["r"], fields["lora_alpha"]
    adapter = make_adapter(
        model.config,
        model.spec,
        rank=rank,
        scale=alpha / rank**0.5 if fields.get("use_rslora") else alpha / rank,
        targets=fields["target_modules"],
        where=f"{file}: target_modules",
    )
    return AdapterDirectory(directory, adapter)


def _refused(fields: dict[str, Any], model: ModelDirectory) -> Iterator[str]:
    """What an `adapter_config.json` asks for beyond A, B, a rank, a scale and a list of modules."""
    rank, alpha, targets = fields.get("r"), fields.get("lora_alpha"), fields.get("target_modules")
    if type(rank) is not int or not 1 <= rank <= LARGEST:
        yield f"r={rank!r:.80}, expected a rank of 1 to {LARGEST}"
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= LARGEST:
        yield f"lora_alpha={alpha!r:.80}, expected a number above 0, of at most {LARGEST}"
    if not isinstance(targets, str | list) or not all(isinstance(target, str) for target in targets):
        yield f"target_modules={targets!r}, expected a list of names or one expression"
    for name, allowed in ONLY.items():
        if fields.get(name) not in allowed:
            yield f"{name}={fields.get(name)!r}, known is {' or '.join(map(repr, allowed))}"
    if fields.get("fan_in_fan_out") and model.config.model_type != "gpt2":
        yield "fan_in_fan_out=True, which is how GPT-2 alone stores its weights"
    read = {"r", "lora_alpha", "target_modules", "use_rslora", "fan_in_fan_out", *ONLY}
    for name in sorted(fields.keys() - read - HARMLESS):
        value = fields[name]
        is_off = value is None or value is False or (isinstance(value, str | list | dict) and not value)
        if not is_off:
            yield f"{name}={value!r}"


def load_lora(directory: AdapterDirectory, model: ModelDirectory, *, place: Place = hf_io.on_default_device) -> Params:
    """The weights of an adapter, float32; every missing, unexpected and misshapen tensor is listed."""
    file = directory.path / WEIGHTS
    if not file.is_file():
        pickled = " (adapter_model.bin is a pickle file, which can run code when loaded: convert it)"
        found = pickled if (directory.path / "adapter_model.bin").is_file() else ""
        raise UserError(f"lora.path: {directory.path} holds no {WEIGHTS}{found}")
    shapes = {
        f"{PREFIX}{module.name}.{half}.weight": shape
        for module in directory.adapter.modules
        for half, shape in _shapes(module, directory.adapter.rank).items()
    }
    found = set(hf_io.names_in(file))
    # peft writes a head that has an adapter, and the embedding it is tied to, beside it.
    missing = sorted(shapes.keys() - found)
    unexpected = sorted(name for name in found - shapes.keys() if not _is_of_the_base(file, name, model))
    if missing or unexpected:
        raise UserError(
            f"{file} does not fit {CONFIG} and the model. Missing tensors: {hf_io.listing(missing)}. "
            f"Unexpected tensors: {hf_io.listing(unexpected)}."
        )
    return {module.name: _load_module(file, module, shapes, place) for module in directory.adapter.modules}


def _shapes(module: Module, rank: int) -> dict[str, tuple[int, int]]:
    """Shapes of the two halves as torch stores them, (out, in)."""
    return {"lora_A": (rank, module.inputs), "lora_B": (sum(module.outputs), rank)}


def _load_module(file: Path, module: Module, shapes: dict[str, tuple[int, int]], place: Place) -> Params:
    weights = {}
    for ours, half in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
        name = f"{PREFIX}{module.name}.{half}.weight"
        stored = hf_io.read_tensor(file, name)
        if stored.shape != shapes[name] or stored.dtype.name not in hf_io.FLOATS:
            raise UserError(
                f"{file}: tensor {name} is {stored.dtype.name}{list(stored.shape)}, expected floating-point "
                f"{list(shapes[name])}"
            )
        weights[ours] = place(f"lora/{module.name}/{ours}", np.ascontiguousarray(stored.T.astype(np.float32)))
    return weights


def _is_of_the_base(file: Path, name: str, model: ModelDirectory) -> bool:
    """Whether a tensor is one of the base's own with the same numbers: then it says nothing new."""
    files, family = hf_io.tensor_files(model.path), family_of(model.config)
    base_name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    base_name = family.head if base_name == f"{HEAD_MODULE}.weight" else base_name
    if base_name == family.head and model.spec.tied_head:  # which has no tensor of its own
        base_name = next(row.name for row in family.tensors if row.params == ("embed",))
    found = next((x for x in (base_name, base_name.removeprefix(family.prefix)) if x in files), None)
    if found is None:
        return False
    own, of_base = hf_io.read_tensor(file, name), hf_io.read_tensor(files[found], found)
    return np.array_equal(own.astype(np.float32), of_base.astype(np.float32))


def save_adapter(directory: Path, adapter: Adapter, lora: Params, *, base: str) -> None:
    """Write a directory that `peft.PeftModel.from_pretrained` loads onto the model `base`, float32.

    It appears whole or not at all; an existing one is replaced, or kept aside as `hf_io.save_tensors` does it.
    """
    tensors = {}
    for module in adapter.modules:
        for ours, half in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            value = np.asarray(lora[module.name][ours], np.float32).T
            tensors[f"{PREFIX}{module.name}.{half}.weight"] = np.ascontiguousarray(value)
    alpha = adapter.scale * adapter.rank
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": list(adapter.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not all(module.tensor.transpose for module in adapter.modules),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod((partial / CONFIG).stat().st_mode)
        hf_io.set_aside_what_is_not_ours(directory, partial)
        durable.publish(partial, directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"the adapter could not be written to {directory}: {error}") from error
