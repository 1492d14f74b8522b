"""SIGTERM and Ctrl-C: the first is noted, so that an iteration can be finished and saved; a second one ends at once."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger("ppo_jax")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Gives a function that says which signal has come, 0 for none.

    Python runs its handlers between two of its own instructions, but a training spends minutes inside of one: a
    compiled function. The interpreter writes the number of a signal to a pipe at once, and a thread that reads there
    answers it.

    Handlers can only be set by the main thread; in any other, signals do what they did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    received: list[int] = []

    def answer_signals() -> None:
        while number := os.read(reading, 1):
            if number[0] not in SIGNALS:
                continue
            if received:
                os._exit(128 + number[0])
            received.append(number[0])
            name = signal.Signals(number[0]).name
            log.warning("%s: the iteration is finished and saved first; a second signal stops at once", name)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=answer_signals, daemon=True)
    thread.start()
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    pipe_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield lambda: received[0] if received else 0
    finally:
        signal.set_wakeup_fd(pipe_before)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(writing)
        thread.join()
        os.close(reading)
