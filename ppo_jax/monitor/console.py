"""The terminal: a live view with KL first, plain lines where there is no terminal, and the tables at the end."""

import logging
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ppo_jax.monitor.samples import shown_steps
from ppo_jax.processes import is_lead

log = logging.getLogger("ppo_jax")

# The few numbers that matter, KL first: column, metric, format.
COLUMNS = (
    ("KL nats/seq", "kl/seq_nats", "{:.3f}"),
    ("score", "score/mean", "{:+.3f}"),
    ("± std", "score/std", "{:.3f}"),
    ("reward", "reward/mean", "{:+.3f}"),
    ("tokens", "response/len_mean_tokens", "{:.1f}"),
    ("entropy", "policy/entropy_nats", "{:.2f}"),
    ("clipped", "policy/clip_frac", "{:.1%}"),
    ("grad norm", "update/grad_norm", "{:.3f}"),
    ("s/iter", "time/iteration_s", "{:.1f}"),
)
ROWS_SHOWN = 12


def start_log(handler: logging.Handler) -> logging.Handler:
    """Show what the package logs, in process 0; the handler is for its owner to remove."""
    log.setLevel(logging.INFO if is_lead() else logging.ERROR)
    log.addHandler(handler)
    return handler


@contextmanager
def plain_log() -> Iterator[None]:
    """What the package logs as lines of standard output."""
    handler = start_log(logging.StreamHandler(sys.stdout))
    try:
        yield
    finally:
        log.removeHandler(handler)


class View:
    """Shows a run while it goes on, in process 0; used as a context manager."""

    def __init__(self, iterations: int, first_step: int):
        self._console = Console(stderr=False)
        self._rows: deque[list[str]] = deque(maxlen=ROWS_SHOWN)
        self._progress = Progress(
            TextColumn("iteration"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("iterations", total=iterations, completed=first_step)
        show = is_lead() and _interactive()
        self._live = Live(self._render(), console=self._console, refresh_per_second=4) if show else None

    def __enter__(self) -> "View":
        rich = RichHandler(console=self._console, show_path=False, show_level=False)
        self._handler = start_log(rich if self._live is not None else logging.StreamHandler(sys.stdout))
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        log.removeHandler(self._handler)

    def iteration(self, step: int, metrics: dict[str, Any]) -> None:
        """Show a finished iteration."""
        values = [form.format(metrics[name]) for _, name, form in COLUMNS]
        self._rows.append([str(step), *values])
        self._progress.update(self._task, completed=step + 1)
        if self._live is not None:
            self._live.update(self._render())
        elif is_lead():
            line = "  ".join(f"{title} {value}" for (title, _, _), value in zip(COLUMNS, values, strict=True))
            print(f"{step:4d}  {line}", flush=True)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        table.add_column("step", justify="right", style="dim")
        for title, _, _ in COLUMNS:
            table.add_column(title, justify="right", style="bold" if title.startswith("KL") else "")
        for row in self._rows:
            table.add_row(*row)
        return Group(table, self._progress)


def _interactive() -> bool:
    return sys.stdout.isatty()


def print_samples(samples: list[dict[str, Any]], *, total: int) -> None:
    """The answers to the fixed prompts side by side: SFT, half-way, now."""
    if not samples:
        return
    steps = shown_steps(samples, total)
    table = Table(title="Same prompts, same noise", show_lines=True)
    table.add_column("prompt", ratio=1)
    for title, step in steps.items():
        table.add_column(f"{title} (after {step} iterations)", ratio=3)
    cells = {(sample["step"], sample["prompt"]): sample for sample in samples}
    for prompt in dict.fromkeys(sample["prompt"] for sample in samples):
        # Text, not markup: an answer may hold square brackets.
        answers = [cells[step, prompt] for step in steps.values()]
        table.add_row(
            Text(prompt), *(Text(f"{cell['answer'].strip()}\nscore {cell['score']:+.2f}") for cell in answers)
        )
    Console(width=None if _interactive() else 160).print(table)
