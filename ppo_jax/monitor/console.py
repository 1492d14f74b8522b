"""The terminal: a live view with KL first, plain lines where there is no terminal, and the tables at the end."""

import logging
import sys
from collections import deque
from collections.abc import Iterator, Sequence
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

from ppo_jax.monitor.alarms import Alarm
from ppo_jax.processes import is_lead
from ppo_jax.shown_text import printable, word_changes

log = logging.getLogger("ppo_jax")

# The few numbers that matter, KL first: column, metric, format.
COLUMNS = (
    ("KL nats/seq", "kl/seq_nats", "{:.3f}"),
    ("score", "score/mean", "{:+.3f}"),
    ("± std", "score/std", "{:.3f}"),
    ("tokens", "response/len_mean_tokens", "{:.1f}"),
    ("reward", "reward/mean", "{:+.3f}"),
    ("entropy", "policy/entropy_nats", "{:.2f}"),
    ("clipped", "policy/clip_frac", "{:.1%}"),
    ("grad norm", "update/grad_norm", "{:.3f}"),
    ("s/iter", "time/iteration_s", "{:.1f}"),
)
ROWS_SHOWN, ALARMS_SHOWN = 12, 4


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

    def __init__(self, iterations: int, first_step: int, *, live: bool = True):
        self._console = Console(stderr=False)
        self._rows: deque[list[str]] = deque(maxlen=ROWS_SHOWN)
        self._alarms: deque[str] = deque(maxlen=ALARMS_SHOWN)
        self._progress = Progress(
            TextColumn("iteration"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("iterations", total=iterations, completed=first_step)
        show = is_lead() and live and _interactive()
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

    def iteration(self, step: int, metrics: dict[str, Any], alarms: Sequence[Alarm] = ()) -> None:
        """Show a finished iteration and what it raised: in full once, and in short for as long as the view lasts."""
        for alarm in alarms:
            log.warning("alarm (%s) %s, iteration %d: %s", alarm.level, alarm.scene, step, alarm.text())
            self._alarms.append(f"{step:4d}  {alarm.level}  {alarm.message}")
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
        return Group(table, *(Text(line, style="bold red") for line in self._alarms), self._progress)


def _interactive() -> bool:
    return sys.stdout.isatty()


def print_samples(samples: list[dict[str, Any]], steps: dict[str, int]) -> None:
    """The answers to the fixed prompts side by side, at the steps given by title; marked is what the first has not."""
    if not samples:
        return
    table = Table(title="Same prompts, same noise", show_lines=True)
    table.add_column("prompt", ratio=1)
    for title, step in steps.items():
        table.add_column(f"{title} (after {step} iterations)", ratio=3)
    cells = {(sample["step"], sample["prompt"]): sample for sample in samples}
    for prompt in dict.fromkeys(sample["prompt"] for sample in samples):
        row = [cells.get((step, prompt)) for step in steps.values()]
        before = None if row[0] is None else printable(row[0]["answer"].strip())
        table.add_row(Text(printable(prompt)), *(_sample_cell(sample, before) for sample in row))
    Console(width=None if _interactive() else 160).print(table)


def _sample_cell(sample: dict[str, Any] | None, before: str | None) -> Text:
    """An answer and its numbers as text, not markup: an answer may hold square brackets."""
    if sample is None:
        return Text("")
    answer = printable(sample["answer"].strip())
    cell = Text()
    for piece, is_new in word_changes(answer if before is None else before, answer)[1]:
        cell.append(piece, style="green underline" if is_new else "")
    numbers = [f"score {sample['score']:+.2f}"]
    if "kl_nats" in sample:  # rows of runs before it was kept have none
        numbers += [f"KL {sample['kl_nats']:.2f} nats", f"{sample['tokens']} tokens"]
    return cell.append("\n" + ", ".join(numbers), style="dim")
