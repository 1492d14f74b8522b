"""A JSONL file of answers, written in order: what a killed process left is continued, any other file is left alone."""

import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO

from ppo_jax import durable, jsonl
from ppo_jax.errors import UserError

log = logging.getLogger("ppo_jax")

MARK = "ppo_jax answers"  # the key by which a file of settings is known as one


class AnswerFile:
    """Rows in the order of their index; a context manager that holds a lock on the file.

    `FILE.settings.json` says what the rows depend on. A file without one, or with other settings, is refused, as is one
    that another process writes. `written` rows are there already; a torn line behind them is cut off.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self._settings_path = path, path.with_name(path.name + ".settings.json")
        self._settings = {MARK: 1} | settings
        self.written = 0

    def __enter__(self) -> "AnswerFile":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab+")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._lock()
            is_new = os.fstat(self._file.fileno()).st_size == 0
            self._check_settings(is_new)
            self.written, end = _whole_rows(self._file, self.path)
            self._file.truncate(end)
            if is_new:
                durable.write_text(self._settings_path, json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            self._file.close()
            raise self._unwritable(error) from error
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Rows of the next indices, on the disk when this returns."""
        numbered = ({"index": self.written + i} | row for i, row in enumerate(rows))
        lines = "".join(map(jsonl.line, numbered))
        try:
            self._file.write(lines.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self.written += len(rows)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--out: another process writes to {self.path}; wait for its end, or choose another"
            ) from error
        except OSError as error:  # a file system without locks
            log.warning("warning: %s cannot be locked (%s): let no second process write it", self.path, error.strerror)

    def _check_settings(self, is_new: bool) -> None:
        """Of a new file only that nothing of somebody else lies where its settings will be."""
        if is_new and not self._settings_path.exists():
            return
        try:
            found = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            found = None
        if not isinstance(found, dict) or MARK not in found:
            raise UserError(f"--out: {self.path} is there already, without settings of this command; choose another")
        differing = [key for key in self._settings | found if self._settings.get(key) != found.get(key)]
        if differing and not is_new:
            raise UserError(
                f"--out: {self.path} holds answers of other settings; choose another file, or remove it. Different are:"
                + "".join(f"\n  {key}: {found.get(key)!r} there, {self._settings.get(key)!r} now" for key in differing)
            )

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"--out: {self.path} (resolved: {self.path.absolute()}) cannot be written: {error.strerror}")


def _whole_rows(file: BinaryIO, path: Path) -> tuple[int, int]:
    """How many whole rows there are, and where they end in bytes."""
    file.seek(0)
    count, end = 0, 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        try:
            index = json.loads(line)["index"]
        except (ValueError, KeyError, TypeError):
            index = None
        if index != count:
            raise UserError(f"--out: {path}:{count + 1} is damaged; cut the file before that line to continue it")
        count, end = count + 1, end + len(line)
    return count, end
