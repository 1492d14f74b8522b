"""A reward source behind HTTP: batches of answers by POST, JSON both ways, bounded in time and in attempts.

The protocol is in docs/reward_functions.md.
"""

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from ppo_jax.errors import UserError
from ppo_jax.rewards.background import in_background

CONCURRENT_REQUESTS = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
LARGEST_REPLY = 2**26  # bytes
TRY_AGAIN = (408, 425, 429)  # of the 4xx; the others say that the request itself is wrong

Scores = list[float] | dict[str, list[float]]


class AttemptFailed(Exception):
    """One attempt failed in a way that the next may not."""


@dataclass(frozen=True)
class HttpReward:
    """A reward function of (prompts, answers, columns) that asks a service; all batches are answered or none counts."""

    url: str
    timeout_s: float  # of one attempt, to the last byte of the reply
    retries: int  # further attempts for a batch whose first one failed
    batch_size: int

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            if not parts.hostname or parts.port == 0:
                raise ValueError("it names no host, or port 0")
        except ValueError as error:
            raise UserError(f"reward.url: {self.url} cannot be used: {error}") from error

    def __call__(self, prompts: list[str], answers: list[str], columns: Mapping[str, Sequence[Any]]) -> Scores:
        batches = [
            slice(start, min(start + self.batch_size, len(answers)))
            for start in range(0, len(answers), self.batch_size)
        ]
        bodies = [self._body(rows, prompts, answers, columns) for rows in batches]
        stop, turn = threading.Event(), threading.Semaphore(CONCURRENT_REQUESTS)
        asked = [
            in_background(partial(self._scores, body, rows.stop - rows.start, stop, turn))
            for body, rows in zip(bodies, batches, strict=True)
        ]
        try:
            for batch in as_completed(asked):
                batch.result()
        finally:
            stop.set()  # what is not answered need not be asked again
        return self._joined([batch.result() for batch in asked])

    def _body(self, rows: slice, prompts: list[str], answers: list[str], columns: Mapping[str, Sequence[Any]]) -> bytes:
        batch = {
            "prompts": prompts[rows],
            "answers": answers[rows],
            "columns": {name: values[rows] for name, values in columns.items()},
        }
        try:
            return json.dumps(batch, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise UserError(f"reward.url: the columns of the prompts cannot be written as JSON: {error}") from error

    def _scores(self, body: bytes, count: int, stop: threading.Event, turn: threading.Semaphore) -> Scores:
        """The scores of one batch, after as many attempts as it takes and may take."""
        pause, failure = FIRST_PAUSE_S, "another batch failed first"
        for attempt in range(self.retries + 1):
            if attempt > 0:
                stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            with turn:
                if stop.is_set():
                    break
                try:
                    return read_scores(self._post(body), count)
                except AttemptFailed as error:
                    failure = str(error)
        raise UserError(
            f"reward.url: {self.url} gave no scores in {self.retries + 1} attempts (reward.retries); the last: "
            f"{failure}"
        )

    def _post(self, body: bytes) -> bytes:
        """The reply of status 200 to one attempt."""
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout_s)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            with _ended_after(self.timeout_s, connection):
                connection.request("POST", target, body, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                data = reply.read(LARGEST_REPLY + 1)
        except (OSError, HTTPException) as error:
            raise AttemptFailed(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if reply.length:  # what of the announced bytes is still to come
            raise AttemptFailed(f"the reply ended {reply.length} bytes early, or has more than {LARGEST_REPLY}")
        if reply.status != 200:
            said = f"status {reply.status} {reply.reason}, {data[:200]!r}"
            if 300 <= reply.status < 500 and reply.status not in TRY_AGAIN:
                raise UserError(f"reward.url: {self.url} does not take the request: {said}")
            raise AttemptFailed(said)
        return data

    def _joined(self, batches: list[Scores]) -> Scores:
        """One list, or one list for every name, of those of the batches."""
        lists = [batch for batch in batches if isinstance(batch, list)]
        named = [batch for batch in batches if isinstance(batch, dict)]
        if not named:
            return [score for batch in lists for score in batch]
        names = list(named[0])
        if lists or any(set(batch) != set(names) for batch in named):
            raise UserError(f"reward.url: {self.url} named other scores for one batch than for another")
        return {name: [score for batch in named for score in batch[name]] for name in names}


def read_scores(data: bytes, count: int) -> Scores:
    """`{"scores": [...]}` or `{"scores": {NAME: [...]}}`, each list of `count` finite numbers; else AttemptFailed."""
    try:
        scores = json.loads(data.decode())["scores"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise AttemptFailed(f'the reply is not {{"scores": ...}} in JSON: {data[:200]!r}') from error
    if isinstance(scores, dict):
        return {name: _read_floats(of_name, count) for name, of_name in scores.items()}
    return _read_floats(scores, count)


def _read_floats(scores: Any, count: int) -> list[float]:
    if not isinstance(scores, list) or len(scores) != count:
        found = f"{len(scores)}" if isinstance(scores, list) else f"{scores!r:.80}"
        raise AttemptFailed(f"got {found} scores for {count} answers")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
            raise AttemptFailed(f"got the score {score!r:.80}, expected a finite number")
    return [float(score) for score in scores]


@contextmanager
def _ended_after(seconds: float, connection: HTTPConnection) -> Iterator[None]:
    """Connect, and end the connection when the time is over.

    A timeout of a socket is one of silence, and would let a reply come drop by drop for ever.
    """
    deadline = time.monotonic() + seconds
    connection.connect()
    connected: socket.socket = connection.sock
    # That of the socket itself, also under TLS, which would want to say good-bye.
    timer = threading.Timer(deadline - time.monotonic(), socket.socket.shutdown, (connected, socket.SHUT_RDWR))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if time.monotonic() > deadline:
        raise TimeoutError(f"no whole reply within {seconds:g} s")
