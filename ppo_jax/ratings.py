"""What people said of pairs of answers: the files of it in a run directory, the win rate, and how far raters agree.

`pairs.json` holds the pairs, `ratings.jsonl` one object for every decision, in order; an undone one is followed by
another that says so, and nothing is ever removed.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from ppo_jax import durable, jsonl
from ppo_jax.errors import UserError
from ppo_jax.intervals import wilson_interval

log = logging.getLogger("ppo_jax")

FILE, PAIRS_FILE = "ratings.jsonl", "pairs.json"
NOW, SFT, TIE, SKIP, UNDO = "now", "sft", "tie", "skip", "undo"
DECIDED = (NOW, SFT, TIE)
Choices = dict[str, dict[str, str]]  # rater -> pair -> choice, in the order of rating


@dataclass(frozen=True)
class Pair:
    """Answers of both models to a prompt, sampled with the same noise."""

    prompt: str
    sft: str
    now: str

    @property
    def id(self) -> str:
        """A digest of the texts: a rating stays with what was read."""
        texts = json.dumps([self.prompt, self.sft, self.now])
        return hashlib.sha256(texts.encode()).hexdigest()[:16]

    @property
    def is_same(self) -> bool:
        return self.sft.strip() == self.now.strip()


@dataclass(frozen=True)
class Rated:
    """The pairs of a run and the standing choices of all raters among them."""

    pairs: list[Pair]
    choices: Choices


def read(directory: Path) -> Rated:
    """What `directory` holds of pairs and ratings; choices of pairs that are no longer there are left out."""
    pairs, _ = read_pairs(directory)
    known = {pair.id for pair in pairs}
    standing = standing_choices(read_ratings(directory))
    choices = {
        rater: {pair: c for pair, c in of_rater.items() if pair in known} for rater, of_rater in standing.items()
    }
    return Rated(pairs, {rater: of_rater for rater, of_rater in choices.items() if of_rater})


def read_pairs(directory: Path) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs, and what they were made from; none where there is no file."""
    file = directory / PAIRS_FILE
    if not file.is_file():
        return [], {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [Pair(**pair) for pair in content["pairs"]], content["made_from"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it, and the pairs are made again") from error


def write_pairs(directory: Path, pairs: list[Pair], made_from: dict[str, Any]) -> None:
    content = {"made_from": made_from, "pairs": [asdict(pair) for pair in pairs]}
    durable.write_text(directory / PAIRS_FILE, json.dumps(content, indent=1) + "\n")


def read_ratings(directory: Path) -> list[dict[str, Any]]:
    return jsonl.read(directory / FILE, pair=str, rater=str, choice=str)


def standing_choices(rows: list[dict[str, Any]]) -> Choices:
    """What counts once undone ratings are gone."""
    choices: Choices = {}
    for row in rows:
        of_rater = choices.setdefault(row["rater"], {})
        of_rater.pop(row["pair"], None)
        if row["choice"] != UNDO:
            of_rater[row["pair"]] = row["choice"]
    return choices


class RatingsFile:
    """`ratings.jsonl` open for appending by one process; a context manager."""

    def __init__(self, directory: Path):
        self.path = directory / FILE
        rows = read_ratings(directory)  # a damaged line is named before anything is written
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise UserError(f"{self.path} is in use by another rating page; stop that one first") from error
        except OSError as error:  # a file system without locks
            log.warning("warning: %s cannot be locked (%s): start no second rating page", self.path, error.strerror)
        self._drop_torn_line()
        durable.flush(directory)
        self.choices = standing_choices(rows)

    def _drop_torn_line(self) -> None:
        """A next line must not be glued to what a killed process left of its last."""
        content = self.path.read_bytes()
        os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)

    def append(self, rater: str, pair: str, choice: str, **more: Any) -> None:
        """Write a choice, wait until it is on the disk, and only then count it."""
        row = {"pair": pair, "rater": rater, "choice": choice, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        line = jsonl.line(row | more).encode()
        if os.write(self._descriptor, line) != len(line):
            self._drop_torn_line()
            raise OSError(f"{self.path}: the disk is full")
        os.fsync(self._descriptor)
        of_rater = self.choices.setdefault(rater, {})
        of_rater.pop(pair, None)
        if choice != UNDO:
            of_rater[pair] = choice

    def __enter__(self) -> "RatingsFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class WinRate:
    """How often the policy's answer was preferred, ties half, and a 95 % interval of it."""

    wins: int  # ratings
    losses: int
    ties: int
    pairs: int  # that anyone decided
    rate: float
    low: float
    high: float


def win_rate(choices: Choices) -> WinRate | None:
    """None before the first decision. Skipped pairs are left out.

    The interval is Wilson's for as many trials as there are pairs: raters of one pair are averaged first, since what
    they say of the same texts is not independent. A tie is half a win, which makes the interval wider than it need be.
    """
    by_pair: dict[str, list[str]] = {}
    for of_rater in choices.values():
        for pair, choice in of_rater.items():
            if choice in DECIDED:
                by_pair.setdefault(pair, []).append(choice)
    if not by_pair:
        return None
    worth = {NOW: 1.0, SFT: 0.0, TIE: 0.5}
    count = len(by_pair)
    rate = sum(sum(map(worth.__getitem__, said)) / len(said) for said in by_pair.values()) / count
    said = Counter(choice for choices in by_pair.values() for choice in choices)
    return WinRate(said[NOW], said[SFT], said[TIE], count, rate, *wilson_interval(rate, count))


@dataclass(frozen=True)
class Agreement:
    """Of the pairs that two raters both decided, in how many they said the same."""

    raters: int
    pairs: int  # compared, summed over pairs of raters
    share: float
    kappa: float | None  # Cohen's, of two raters; None for more, or where chance alone would always agree


def agreement(choices: Choices) -> Agreement | None:
    """None where no two raters decided a common pair."""
    decided = [{p: c for p, c in of_rater.items() if c in DECIDED} for of_rater in choices.values()]
    compared = [
        (one[pair], other[pair]) for one, other in combinations(decided, 2) for pair in one.keys() & other.keys()
    ]
    if not compared:
        return None
    share = sum(a == b for a, b in compared) / len(compared)
    raters = sum(1 for of_rater in decided if of_rater)
    return Agreement(raters, len(compared), share, cohens_kappa(compared) if raters == 2 else None)


def cohens_kappa(said: list[tuple[str, str]]) -> float | None:
    """(p_o − p_e) / (1 − p_e): agreement beyond that of raters who choose at random as often as these did.

    `said` holds both choices of every pair. None where p_e is 1.

    Source: Cohen, "A coefficient of agreement for nominal scales", 1960.
    """
    count = len(said)
    first, second = Counter(a for a, _ in said), Counter(b for _, b in said)
    expected = sum(first[choice] * second[choice] for choice in first) / count**2
    observed = sum(a == b for a, b in said) / count
    return None if expected == 1 else (observed - expected) / (1 - expected)
