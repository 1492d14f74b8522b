"""Files and data sets of prompts: rows of named values, each with the place it came from.

Local files are read here rather than by `datasets`, whose readers guess types (the text "NA" of a CSV becomes None) and
name no line of a broken file.
"""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ppo_jax.config import EMBEDDED, PromptsConfig
from ppo_jax.errors import UserError

TEXT_COLUMN = "text"  # what a line of a plain text file is called
REPORTED = 20
BOM = b"\xef\xbb\xbf"
GZIPPED = ".gz"
LARGEST_CELL = 2**31 - 1


@dataclass(frozen=True)
class Row:
    """One record of a source."""

    where: str  # as messages name it: file:line
    values: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What is wrong at one place of a source."""

    where: str
    reason: str


Reader = Callable[[Path, list[Problem]], Iterator[Row]]


def read_rows(config: PromptsConfig) -> list[Row]:
    """All rows of `prompts.path`; every broken place of a file is reported at once."""
    if config.path == EMBEDDED:
        with resources.as_file(resources.files("ppo_jax") / "assets" / "prompts.jsonl") as file:
            return list(_jsonl_rows(file, []))
    return read_source(config.path, split=config.split, key="prompts.path")


def read_source(path: str, *, split: str, key: str) -> list[Row]:
    """All rows of a file, also of one in gzip, or of a hub data set; `key` is the field that errors name."""
    file = Path(path).expanduser()
    suffix = Path(file.stem).suffix if file.suffix.lower() == GZIPPED else file.suffix
    reader = READERS.get(suffix.lower())
    if not file.is_file():
        if file.exists() or path.startswith((".", "/", "~")) or reader is not None:
            raise UserError(f"{key}: {path} (resolved: {file.absolute()}) is not a file")
        return _hub_rows(path, split, key)
    if reader is None:
        raise UserError(f"{key}: {file} ends in {suffix!r}; expected one of {', '.join(READERS)}")
    problems: list[Problem] = []
    try:
        rows = list(reader(file, problems))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{key}: {file} (resolved: {file.absolute()}) cannot be read: {error}") from error
    if problems:
        refuse(f"{key}: {path} could not be read", problems)
    return rows


def _content(file: Path) -> bytes:
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix.lower() == GZIPPED else data).removeprefix(BOM)


def refuse(what: str, problems: list[Problem]) -> None:
    """Raise the first problems, and say how many more there are."""
    more = f"\n  and {len(problems) - REPORTED} more" if len(problems) > REPORTED else ""
    raise UserError(f"{what}:" + "".join(f"\n  {p.where} {p.reason}" for p in problems[:REPORTED]) + more)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _jsonl_rows(file: Path, problems: list[Problem]) -> Iterator[Row]:
    # By newlines alone: a JSON text may hold U+2028 and other characters that `splitlines` splits at.
    for number, line in enumerate(_content(file).split(b"\n"), 1):
        if line.strip():
            yield from _row_of_json(line, f"{file}:{number}", problems)


def _row_of_json(line: bytes, where: str, problems: list[Problem]) -> Iterator[Row]:
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        problems.append(Problem(where, f"is not JSON in UTF-8: {error}"))
        return
    if isinstance(values, dict):
        yield Row(where, values)
    else:
        problems.append(Problem(where, f"holds a {type(values).__name__}, expected an object"))


def _json_rows(file: Path, problems: list[Problem]) -> Iterator[Row]:
    try:
        rows = json.loads(_content(file).decode())
    except (ValueError, RecursionError) as error:
        problems.append(Problem(str(file), f"is not JSON in UTF-8: {error}"))
        return
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        problems.append(Problem(str(file), "must be one list of objects; one object per line is a .jsonl file"))
        return
    yield from (Row(f"{file}: object {number}", row) for number, row in enumerate(rows, 1))


def _csv_rows(file: Path, problems: list[Problem]) -> Iterator[Row]:
    """Comma-separated, a header first, quotes as in RFC 4180; every value is a text."""
    data = _content(file)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.append(Problem(f"{file}:{line}", f"is not UTF-8: {error}"))
        return
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if repeated := {name for name, count in Counter(header).items() if count > 1}:
            problems.append(Problem(f"{file}:1", f"names {', '.join(map(repr, sorted(repeated)))} twice"))
            return
        last = reader.line_num
        for cells in reader:
            where, last = f"{file}:{last + 1}", reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                problems.append(Problem(where, f"has {len(cells)} cells, the header has {len(header)}"))
                continue
            yield Row(where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        problems.append(Problem(f"{file}:{reader.line_num}", f"is not CSV: {error}"))


def _text_rows(file: Path, problems: list[Problem]) -> Iterator[Row]:
    for number, line in enumerate(_content(file).splitlines(), 1):
        try:
            yield Row(f"{file}:{number}", {TEXT_COLUMN: line.decode()})
        except UnicodeDecodeError as error:
            problems.append(Problem(f"{file}:{number}", f"is not UTF-8: {error}"))


def _parquet_rows(file: Path, problems: list[Problem]) -> Iterator[Row]:
    import pyarrow.parquet  # takes a third of a second

    try:
        rows = pyarrow.parquet.read_table(str(file)).to_pylist()
    except Exception as error:  # pyarrow raises its own types and those of the standard library
        problems.append(Problem(str(file), f"is not parquet: {first_line(error)}"))
        return
    yield from (Row(f"{file}: row {number}", row) for number, row in enumerate(rows, 1))


def _hub_rows(path: str, split: str, key: str) -> list[Row]:
    import datasets  # takes a second

    datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(path, split=split)
        return [Row(f"{path}: row {number}", dict(row)) for number, row in enumerate(rows, 1)]
    except Exception as error:  # datasets raises its own types, those of pyarrow and of the hub's client
        raise UserError(
            f"{key}: {path} is no file here, and as a data set of the hub it could not be read: {first_line(error)}"
        ) from error


READERS: dict[str, Reader] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
