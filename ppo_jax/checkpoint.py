"""TrainState to disk and back, by orbax: whole or not at all, bit for bit, and verified before it is trusted.

A checkpoint is a directory `step_XXXXXXXX`: `state/` is written by orbax, `manifest.json` names every file with its
size and SHA-256. It is written as `step_XXXXXXXX.partial`, flushed to the disk, and then renamed, so what bears the
name is complete; what has changed since, the manifest tells.

Every process writes and reads its own parts of the arrays, so the directory must be one that all of them see.

The state is all there is to save: prompts, noise and shuffles are functions of the seed and of `state.step`.
"""

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ppo_jax import durable
from ppo_jax.errors import UserError
from ppo_jax.processes import from_lead, is_lead, together
from ppo_jax.records import TrainState

NAME = re.compile(r"step_(\d{8})")
STALE = re.compile(r"step_\d{8}\.(partial|expired)")
STATE, MANIFEST = "state", "manifest.json"
# What orbax and tensorstore raise for a disk that is full, gone or too slow.
WRITE_ERRORS = (OSError, ValueError, RuntimeError)

log = logging.getLogger("ppo_jax")
# What orbax logs of a failed save, with tracebacks, it raises as well; it is told once, by `_failed`.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Damaged(Exception):
    """Which file of a checkpoint is not as it was written."""


class Checkpoints:
    """Writes the checkpoints of a run while the run goes on, one at a time, and keeps few; a context manager.

    Every process calls every method, at the same place.
    """

    def __init__(self, directory: Path, *, keep: int, keep_best: bool = False):
        self.directory = directory.absolute()
        self._keep, self._keep_best = keep, keep_best
        self.rewards: dict[int, float] = {}  # mean reward of each policy that has answered, by its step
        self.suspected_since: set[int] = set()  # the newest checkpoint from before each of these iterations stays
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        from_lead(lambda: remove_stale(self.directory))

    def save(self, state: TrainState) -> Path:
        """Begin to write `step_XXXXXXXX`; the state may be consumed when this returns, the files come behind it.

        That the save before this one has failed is a warning here; `finish` raises it.
        """
        if failure := self._settled():
            log.warning("warning: %s; the run goes on", failure)
        path = self.directory / f"step_{int(state.step):08d}"
        if from_lead(path.exists):  # a state is a function of its step: the one that is there is the same
            return path
        try:
            from_lead(lambda: _make_room(path, sum(leaf.nbytes for leaf in jax.tree.leaves(state))))
            with together("saving a checkpoint"):
                checkpointer = _begin(path, state)
        except UserError as error:
            self._writing = Future()
            self._writing.set_exception(error)
        else:
            rewards = dict(self.rewards) if self._keep_best else {}
            self._writing = self._executor.submit(
                self._complete, checkpointer, path, arrays_of(state), rewards, self.suspected_since
            )
        return path

    def finish(self) -> None:
        """Wait for the save that is under way; UserError when the last one failed."""
        if failure := self._settled():
            raise failure

    def _settled(self) -> UserError | None:
        """Why the last save failed, in any process, or None; afterwards none is under way."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                with together("saving a checkpoint"):
                    writing.result()
            except UserError as error:
                return error
        return None

    def _complete(
        self,
        checkpointer: ocp.StandardCheckpointer,
        path: Path,
        arrays: dict[str, str],
        rewards: dict[int, float],
        suspected_since: Collection[int],
    ) -> None:
        """In the background: wait for the files of all processes, describe and publish them, then drop the oldest."""
        try:
            checkpointer.close()
            if is_lead():
                _write_manifest(_partial(path), step_of(path), arrays)
                durable.publish(_partial(path), path)
        except WRITE_ERRORS as error:
            raise _failed(path, error) from error
        if is_lead():
            steps = saved_steps(self.directory)
            for step in expired(list(steps), keep=self._keep, rewards=rewards, suspected_since=suspected_since):
                _remove(steps[step])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True)


def saved_steps(directory: Path) -> dict[int, Path]:
    """Complete checkpoints, oldest first."""
    found = {int(match[1]): path for path in directory.glob("step_*") if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def check_saved(directory: Path) -> None:
    """Refuse a directory without any checkpoint."""
    if not saved_steps(directory):
        raise UserError(f"--resume: there is no checkpoint in {directory}; was checkpoint.save_every set?")


def expired(
    steps: list[int], *, keep: int, rewards: Mapping[int, float], suspected_since: Collection[int] = ()
) -> list[int]:
    """Which of the saved steps go: all but the newest `keep`, the one with the highest reward where rewards are known,
    and the newest from before each iteration in which the run began to look wrong."""
    known = [step for step in steps if math.isfinite(rewards.get(step, math.nan))]
    best = max(known, key=lambda step: (rewards[step], step), default=None)
    good = {max((step for step in steps if step < began), default=None) for began in suspected_since}
    return [step for step in sorted(steps)[:-keep] if step != best and step not in good]


def remove_stale(directory: Path) -> None:
    """Drop what a killed process left half written or half removed."""
    for path in sorted(directory.glob("step_*")):
        if STALE.fullmatch(path.name):
            log.warning("warning: %s is left over from a run that was killed, and is removed", path)
            shutil.rmtree(path, ignore_errors=True)


def restore_newest(directory: Path, like: TrainState, *, strict: bool = False) -> TrainState:
    """The newest state of a directory, in the shapes and dtypes of `like`, and on its devices where it names them.

    A damaged checkpoint is set aside, with one line, for the one before it; with `strict` it is refused.
    """
    path = Path(from_lead(lambda: str(newest_whole(directory.absolute(), strict=strict))))
    from_lead(lambda: _check_fits(path, like))
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path / STATE, shapes)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"--resume: {path} cannot be restored: {str(error).splitlines()[0]}") from error


def newest_whole(directory: Path, *, strict: bool) -> Path:
    """The newest checkpoint whose files are all as they were written; damaged ones after it are renamed `.damaged`."""
    check_saved(directory)
    damaged: dict[Path, Damaged] = {}
    for step, path in reversed(saved_steps(directory).items()):
        try:
            verified(path)
        except Damaged as damage:
            if strict:
                raise UserError(f"--resume: {damage}; checkpoint.strict forbids to fall back") from damage
            damaged[path] = damage
            continue
        for other, damage in damaged.items():
            aside = other.with_name(other.name + ".damaged")
            log.warning("warning: %s; set aside as %s, continuing from step %d", damage, aside.name, step)
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
        return path
    raise UserError("--resume: no checkpoint is whole:\n" + "\n".join(f"  {damage}" for damage in damaged.values()))


def verified(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as it says; else `Damaged`, naming the first that is not."""
    file = path / MANIFEST
    try:
        sealed = json.loads(file.read_text(encoding="utf-8"))
        manifest = sealed["manifest"]
        intact = sealed["sha256"] == _seal(manifest)
    except FileNotFoundError:
        raise Damaged(f"{path} is not a whole checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{file} is damaged: {error or type(error).__name__}") from error
    if not intact:
        raise Damaged(f"{file} is damaged: it is not the text that its SHA-256 was made of")
    if manifest["step"] != step_of(path):
        raise Damaged(f"{path} is the checkpoint of step {manifest['step']} under another name")
    with ThreadPoolExecutor() as executor:  # hashing runs outside of the interpreter's lock
        for problem in executor.map(lambda entry: _problem(path / entry[0], entry[1]), manifest["files"].items()):
            if problem is not None:
                raise Damaged(problem)
    return manifest


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_").partition(".")[0])


def arrays_of(tree: Any) -> dict[str, str]:
    """Name, dtype and shape of every leaf."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _make_room(path: Path, nbytes: int) -> None:
    """An empty directory to write to, on a disk that has the space."""
    try:
        for left_over in path.parent.glob("step_*.partial"):  # no other save is under way
            shutil.rmtree(left_over, ignore_errors=True)
        _partial(path).mkdir(parents=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise _failed(path, error) from error
    if free < nbytes:
        raise _failed(path, f"it may take {nbytes / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free")


def _begin(path: Path, state: TrainState) -> ocp.StandardCheckpointer:
    """Copy the arrays to the host, from where the checkpointer's threads write them."""
    checkpointer = ocp.StandardCheckpointer()
    try:
        checkpointer.save(_partial(path) / STATE, state)
    except WRITE_ERRORS as error:
        raise _failed(path, error) from error
    return checkpointer


def _failed(path: Path, reason: Exception | str) -> UserError:
    """What is said of a save that failed; what it had written is dropped, here or, where threads of it were still
    writing, before the next save."""
    if is_lead():
        shutil.rmtree(_partial(path), ignore_errors=True)
    newest = max(saved_steps(path.parent), default=None)
    kept = "there is none before it" if newest is None else f"the newest is that of step {newest}"
    text = str(reason).rpartition('": ')[2] or type(reason).__name__  # behind the paths that tensorstore names first
    return UserError(f"the checkpoint of step {step_of(path)} was not written to {path.parent} ({text}); {kept}")


def _write_manifest(directory: Path, step: int, arrays: dict[str, str]) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as executor:
        described = dict(
            zip((str(file.relative_to(directory)) for file in files), executor.map(_described, files), strict=True)
        )
    manifest = {"step": step, "arrays": arrays, "files": described}
    text = json.dumps({"sha256": _seal(manifest), "manifest": manifest}, indent=1)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _problem(file: Path, expected: dict[str, Any]) -> str | None:
    try:
        found = _described(file)
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    if found["bytes"] != expected["bytes"]:
        return f"{file} is damaged: it has {found['bytes']} bytes, {expected['bytes']} were written"
    return None if found == expected else f"{file} is damaged: its SHA-256 is not that of what was written"


def _check_fits(path: Path, like: TrainState) -> None:
    """Refuse a checkpoint of another model or optimizer, naming some of the arrays that differ."""
    saved = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["manifest"]["arrays"]
    expected = arrays_of(like)
    wrong = [
        f"{name} is {saved.get(name, 'missing')}, expected {expected.get(name, 'none of that name')}"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"--resume: {path} does not fit this model and optimizer: {'; '.join(wrong[:4])}{more}")


def _remove(path: Path) -> None:
    """Take the name away first: what is half removed must not look like a checkpoint."""
    going = path.with_name(path.name + ".expired")
    try:
        path.rename(going)
        shutil.rmtree(going)
    except OSError as error:
        log.warning("warning: %s, no longer needed, was not removed: %s", path, error)
