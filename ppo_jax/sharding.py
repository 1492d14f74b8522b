"""Where every array lies: a mesh of devices with the axes data, fsdp and tensor, and the rules that place arrays on it.

Answers are split by rows over data and fsdp. Parameters, gradients and moments are split over fsdp and tensor by the
name of their weight; each device gathers a layer when it computes it. One device is the mesh (1, 1, 1). The mesh in use
is the one of `jax.set_mesh`: what is made under it is on all its devices, and without one the constraints here do
nothing, so that every stage also runs on plain arrays.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ppo_jax.config import Config, MeshConfig
from ppo_jax.errors import UserError
from ppo_jax.processes import is_lead

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# Weights are stored (in, out). First match decides; what matches nothing (gains, output biases) is on every device.
RULES = (
    (r"(^|/)embed$", ("tensor", "fsdp")),  # [V, D]
    (r"(^|/)positions$", (None, "fsdp")),  # [S, D]
    (r"(^|/)head$", ("fsdp", "tensor")),  # [D, V]
    (r"(^|/)(o|down)/kernel$", ("tensor", "fsdp")),  # their input is what tensor splits
    (r"(^|/)kernel$", ("fsdp", "tensor")),  # q, k, v, up, gate: their output is what tensor splits
    (r"(^|/)(q|k|v|up|gate)/bias$", ("tensor",)),
    (r"lora_a$", (("fsdp", "tensor"), None)),  # [in, rank]
    (r"lora_b$", (None, ("fsdp", "tensor"))),  # [rank, out]
)


def make_mesh(config: MeshConfig) -> Mesh:
    """The configured mesh over the devices of all processes, in their order, so that each process owns whole rows."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    each, local = config.fsdp * config.tensor, jax.local_device_count()
    data = len(devices) // each if config.data is None else config.data
    used, told = data * each, f"mesh.fsdp ({config.fsdp}) x mesh.tensor ({config.tensor})"
    if config.data is None and used != len(devices):
        raise UserError(f"{told} is {each}, which must divide the {len(devices)} devices")
    if used > len(devices) or (used < len(devices) and jax.process_count() > 1):
        raise UserError(
            f"mesh.data ({data}) x {told} is {used}, but there are {len(devices)} devices in {jax.process_count()} "
            f"process(es)"
        )
    if local * jax.process_count() != len(devices):
        raise UserError(
            f"every process must have as many devices; this one has {local} of {len(devices)} in "
            f"{jax.process_count()} processes"
        )
    if local % config.tensor:
        raise UserError(
            f"mesh.tensor ({config.tensor}) must divide the {local} devices of a process: a row of the batch belongs "
            f"to one process"
        )
    return Mesh(
        np.asarray(devices[:used]).reshape(data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * 3
    )


def own_mesh(mesh: Mesh) -> Mesh:
    """The devices of a mesh that are this process's, rows and weights split over them: for work of its own."""
    devices = np.asarray(mesh.local_devices).reshape(1, -1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def check_batch(config: Config, mesh_shape: Mapping[str, int]) -> None:
    """Every device gets the same number of answers, in every forward pass, and of prompts."""
    shards, rollout = math.prod(mesh_shape[axis] for axis in ROWS), config.rollout
    key = "update.minibatch_size" if config.update.micro_batch_size is None else "update.micro_batch_size"
    prompts = rollout.batch_size // rollout.answers_per_prompt
    # The micro-batch divides the minibatch, and that the batch: they need no check of their own.
    for name, value in (
        (key, config.micro_batch_size),
        ("rollout.batch_size / rollout.answers_per_prompt", prompts),
    ):
        if value % shards:
            lower, upper = value // shards * shards, -(-value // shards) * shards
            nearest = f"nearest are {lower} and {upper}" if lower else f"the nearest is {upper}"
            raise UserError(
                f"{name} ({value}) must be divisible by mesh.data ({mesh_shape['data']}) x mesh.fsdp "
                f"({mesh_shape['fsdp']}), which is {shards}; {nearest}, or set mesh.data to use fewer devices"
            )


def device_count() -> int:
    """Devices of the mesh in use, 1 where none is."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values())


def row_shards(rows: int) -> int:
    """In how many parts so many rows are split on the mesh in use; 1 where there is none."""
    shape = jax.sharding.get_abstract_mesh().shape
    parts = math.prod(shape.get(axis, 1) for axis in ROWS)
    return parts if rows % parts == 0 else 1


def _fitting(mesh_shape: Mapping[str, int], axes: tuple[Any, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The axes of each dimension, left out where they do not divide it."""

    def divides(axis: Any, size: int) -> bool:
        names = axis if isinstance(axis, tuple) else (axis,)
        return axis is not None and size % math.prod(mesh_shape[name] for name in names) == 0

    padded = (*axes, *(None,) * len(shape))
    return PartitionSpec(*(axis if divides(axis, size) else None for axis, size in zip(padded, shape, strict=False)))


def param_spec(mesh_shape: Mapping[str, int], path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """How the parameter at a path such as `layer_0/attn/q/kernel` is split."""
    axes = next((axes for pattern, axes in RULES if re.search(pattern, path)), ())
    return _fitting(mesh_shape, axes, shape)


def _specs(mesh_shape: Mapping[str, int], tree: Any) -> Any:
    """`param_spec` of every leaf; the moments of an optimizer lie under the names of their parameters."""

    def spec(path, leaf):
        names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return param_spec(mesh_shape, "/".join(names), leaf.shape)

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings of parameters, of a tree over them such as the optimizer's state, or of their shapes."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(mesh.shape, tree))


def abstract(mesh: Mesh, tree: Any) -> Any:
    """The tree as shapes and dtypes with their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(mesh, tree),
    )


def rows(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The first axis over data and fsdp."""
    return NamedSharding(mesh, _fitting(mesh.shape, (ROWS,), shape))


# ------------------------------------------------------------------------------------- inside of jitted functions


def by_rows(tree: Any) -> Any:
    """The arrays with their first axis held to data and fsdp; XLA would otherwise split a layer's width there."""
    return _hold(tree, (ROWS,))


def by_width(tree: Any) -> Any:
    """Activations [B, 1, D] with rows over data and width over fsdp: weights stay in place, sums travel.

    For one token of each answer, which is far smaller than the weights of a layer.
    """
    return _hold(tree, ("data", None, "fsdp"))


def by_heads(tree: Any) -> Any:
    """Activations [B, 1, F] inside of a layer, beside `by_width`: rows over data, F over tensor."""
    return _hold(tree, ("data", None, "tensor"))


def _hold(tree: Any, axes: tuple[Any, ...]) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _fitting(mesh.shape, axes, x.shape)), tree)


def gather_again(params: Any, micro_batch: Any) -> tuple[Any, Any]:
    """Both unchanged, but tied together inside of a loop over micro-batches.

    Weights that do not depend on the loop are gathered before it by XLA, those of all layers at once, and stay there.
    """
    return jax.lax.optimization_barrier((params, micro_batch))


def by_rules(tree: Any) -> Any:
    """Parameters, gradients or moments held to their rules."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, _specs(mesh.shape, tree))


# ------------------------------------------------------------------------------------------ between host and mesh


def place_param(mesh: Mesh, path: str, value: np.ndarray) -> jax.Array:
    """A parameter that every process has on its host, each device given its part alone."""
    sharding = NamedSharding(mesh, param_spec(mesh.shape, path, value.shape))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def own_rows(count: int) -> slice:
    """Which of `count` rows belong to this process."""
    each = count // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def place_rows(mesh: Mesh, own: np.ndarray) -> jax.Array:
    """One array by rows, of which every process gives its own."""
    shape = (len(own) * jax.process_count(), *own.shape[1:])
    return jax.make_array_from_process_local_data(rows(mesh, shape), own, shape)


def read_own_rows(mesh: Mesh, array: jax.Array) -> np.ndarray:
    """The rows of this process, in their order."""
    placed = jax.device_put(array, rows(mesh, array.shape))
    parts = {shard.index[0].start or 0: shard.data for shard in placed.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def read(mesh: Mesh, array: jax.Array) -> np.ndarray:
    """The whole array, on every process."""
    return np.asarray(jax.device_put(array, NamedSharding(mesh, PartitionSpec())))


def read_on_lead(mesh: Mesh, tree: Any) -> Any:
    """The arrays whole on process 0 and None on the others; one leaf at a time is whole on the devices."""

    def kept(leaf: jax.Array) -> np.ndarray | None:
        whole = read(mesh, leaf)  # takes all processes
        return whole if is_lead() else None

    return jax.tree.map(kept, tree)
