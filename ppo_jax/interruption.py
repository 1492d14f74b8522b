"""SIGTERM and Ctrl-C: the first is noted, so that an iteration can be finished and saved; a second one ends at once."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger("ppo_jax")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
THE_END = b"\0"  # no signal has this number

# What a forked process must do first, of all that is noted at the moment; until then no signal may reach it.
_in_children: list[Callable[[], None]] = []
_forking = threading.local()


def _hold_signals() -> None:
    _forking.mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_signals_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask_before)


def _begin_as_child() -> None:
    for forget in reversed(_in_children):
        forget()
    _let_signals_through()


os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals_through, after_in_child=_begin_as_child)


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Gives a function that says which signal has come, 0 for none.

    Python runs its handlers between two of its own instructions, but a training spends minutes inside of one: a
    compiled function. The interpreter writes the number of a signal to a pipe at once, and a thread that reads there
    answers it.

    Handlers can only be set by the main thread; in any other, signals do what they did. A process that is forked
    meanwhile, as the workers of a reward's pool are, has the handlers from before and no part in this.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    received: list[int] = []

    def answer_signals() -> None:
        while (number := os.read(reading, 1)) != THE_END:
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

    def hand_back(pipe: int) -> None:
        signal.set_wakeup_fd(pipe)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    _in_children.append(lambda: hand_back(-1))
    try:
        yield lambda: received[0] if received else 0
    finally:
        _in_children.pop()
        hand_back(pipe_before)
        os.set_blocking(writing, True)
        os.write(writing, THE_END)
        thread.join()
        os.close(writing)
        os.close(reading)
