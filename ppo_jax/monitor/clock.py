"""Where an iteration's time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """Seconds of the named phases of an iteration; a phase ends when its numbers have reached the host."""

    def __init__(self) -> None:
        self._created = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Begin an iteration."""
        self._started = time.perf_counter()
        self._phases: dict[str, float] = {}
        self.last_phase = "start"  # the one under way, or the one that failed

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started, self.last_phase = time.perf_counter(), name
        yield
        self._phases[name] = time.perf_counter() - started

    def metrics(self, *, response_tokens: int) -> dict[str, float]:
        """`time/*_s` of the iteration so far, and response tokens per second of the whole of it."""
        elapsed = time.perf_counter() - self._started
        return {
            **{f"time/{name}_s": seconds for name, seconds in self._phases.items()},
            "time/iteration_s": elapsed,
            "throughput/response_tokens_per_s": response_tokens / elapsed,
        }

    def total_s(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._created
