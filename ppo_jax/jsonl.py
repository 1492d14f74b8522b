"""Files of one JSON object a line, which processes append to and may be killed at."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppo_jax.errors import UserError

log = logging.getLogger("ppo_jax")


def line(row: dict[str, Any]) -> str:
    """One line of such a file, its end included. What UTF-8 cannot hold (half of a surrogate pair) stays escaped."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn what a full or lost disk says while a file is written into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from error


def read(file: Path, **fields: type) -> list[dict[str, Any]]:
    """Objects of a file, none when it is not there; a last line that a killed process left torn is dropped.

    Every object must have the given fields, each of its type. Raises UserError that names a damaged line.
    """
    if not file.is_file():
        return []
    *lines, last = file.read_bytes().split(b"\n")  # not splitlines of a text: an answer may hold U+2028
    if last:
        log.warning("warning: %s ends in a torn line, which is dropped", file)
    return [_row(file, number, text, fields) for number, text in enumerate(lines, 1) if text]


def _row(file: Path, number: int, text: bytes, fields: dict[str, type]) -> dict[str, Any]:
    try:
        row = json.loads(text)
        missing = [
            name for name, kind in fields.items() if not isinstance(row, dict) or type(row.get(name)) is not kind
        ]
        if missing or not isinstance(row, dict):
            raise ValueError(f"no object with a {missing[0]}" if missing else "no object")
        return row
    except ValueError as error:
        raise UserError(f"{file}:{number} is damaged ({error}); remove this line to continue without it") from error
