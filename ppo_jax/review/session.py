"""What a rater is shown and what becomes of the answer, whatever carries it: no HTTP here."""

import hashlib
from typing import Any

from ppo_jax.ratings import NOW, SFT, SKIP, TIE, UNDO, Pair, RatingsFile
from ppo_jax.shown_text import printable

LONGEST_NAME = 40
FIRST, SECOND = "first", "second"  # the answers as shown


class Refused(Exception):
    """A request that cannot be done; the text is for the rater."""


def policy_is_first(seed: int, rater: str, pair: str) -> bool:
    """Whether this rater sees the policy's answer to this pair first: as good as random, and the same every time."""
    return bool(hashlib.sha256(f"{seed}\n{rater}\n{pair}".encode()).digest()[0] & 1)


class Session:
    """The pairs of a run in their order, and what raters said of them so far."""

    def __init__(self, pairs: list[Pair], file: RatingsFile, *, seed: int):
        self._pairs = {pair.id: pair for pair in pairs if not pair.is_same}
        self._file = file
        self._seed = seed

    def view(self, rater: str) -> dict[str, Any]:
        """The next pair that this rater has not seen, None behind the last, and how far the rater is."""
        said = self._said(checked_name(rater))
        pair = next((pair for pair in self._pairs.values() if pair.id not in said), None)
        return {
            "done": len(said),
            "total": len(self._pairs),
            "pair": None if pair is None else self._shown(rater, pair),
        }

    def rate(self, rater: str, pair: str, choice: str) -> None:
        """Store a choice: `first`, `second`, `tie` or `skip`. It is on the disk when this returns."""
        said = self._said(checked_name(rater))
        if pair not in self._pairs or pair in said:
            raise Refused("this pair is not open: it was rated already, perhaps in another window")
        first, second = (NOW, SFT) if policy_is_first(self._seed, rater, pair) else (SFT, NOW)
        meanings = {FIRST: first, SECOND: second, TIE: TIE, SKIP: SKIP}
        if choice not in meanings:
            raise Refused(f"got the choice {choice!r}, expected {', '.join(meanings)}")
        self._file.append(rater, pair, meanings[choice], first=first)

    def undo(self, rater: str) -> None:
        """Take back this rater's last choice, so that its pair comes again."""
        said = self._said(checked_name(rater))
        if not said:
            raise Refused("there is nothing to undo")
        self._file.append(rater, list(said)[-1], UNDO)

    def _said(self, rater: str) -> dict[str, str]:
        of_rater = self._file.choices.get(rater, {})
        return {pair: choice for pair, choice in of_rater.items() if pair in self._pairs}

    def _shown(self, rater: str, pair: Pair) -> dict[str, str]:
        texts = (pair.sft, pair.now)
        first, second = reversed(texts) if policy_is_first(self._seed, rater, pair.id) else texts
        return {
            "id": pair.id,
            "prompt": printable(pair.prompt),
            "first": printable(first.strip()),
            "second": printable(second.strip()),
        }


def checked_name(rater: Any) -> str:
    """A rater's name as it is stored, or Refused."""
    if not isinstance(rater, str) or not 1 <= len(rater) <= LONGEST_NAME or rater != rater.strip():
        raise Refused(f"a name has 1 to {LONGEST_NAME} characters and begins and ends with none that is blank")
    if not rater.isprintable():
        raise Refused("a name has no control characters")
    return rater
