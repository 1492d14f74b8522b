"""TrainState to disk and back, by orbax: written beside its place, then renamed, the newest few kept.

Every process writes and reads its own parts of the arrays, so the directory must be one that all of them see.

The state is all there is to save: prompts, noise and shuffles are functions of the seed and of `state.step`.
"""

import re
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from ppo_jax.errors import UserError
from ppo_jax.processes import from_lead, is_lead
from ppo_jax.records import TrainState

NAME = re.compile(r"step_(\d{8})")


def saved_steps(directory: Path) -> dict[int, Path]:
    """Complete checkpoints, oldest first."""
    found = {int(match[1]): path for path in directory.glob("step_*") if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def save(directory: Path, state: TrainState, *, keep: int) -> Path:
    """Write the state as `step_XXXXXXXX` and drop all but the newest `keep`."""
    path = directory.absolute() / f"step_{int(state.step):08d}"
    if not from_lead(path.exists):  # a state is a function of its step: the one that is there is the same
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, state)
    if is_lead():
        for old in list(saved_steps(directory).values())[:-keep]:
            shutil.rmtree(old)
    return path


def newest(directory: Path) -> Path:
    """The newest complete checkpoint."""
    steps = saved_steps(directory)
    if not steps:
        raise UserError(f"--resume: there is no checkpoint in {directory}; was checkpoint.save_every set?")
    return list(steps.values())[-1].absolute()


def restore_newest(directory: Path, like: TrainState) -> TrainState:
    """The newest state of a directory, in the shapes and dtypes of `like`, and on its devices where it names them."""
    path = Path(from_lead(lambda: str(newest(directory))))
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, shapes)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(
            f"--resume: {path} does not fit this model and optimizer, or is damaged: {str(error).splitlines()[0]}"
        ) from error
