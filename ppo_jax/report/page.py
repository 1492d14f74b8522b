"""All of a report together: what the template `page.html` shows, as one file that needs no other."""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ppo_jax import ratings
from ppo_jax.monitor.samples import steps_so_far
from ppo_jax.report import curves as charts
from ppo_jax.report.runs import Curve, ReadRun, Row, defaults
from ppo_jax.report.verdict import Verdict, verdict
from ppo_jax.shown_text import printable, word_changes

ITERATIONS_SHOWN = 6  # of those whose answers were kept
NOT_A_SETTING = ("run.dir",)

Pieces = list[tuple[str, bool]]


@dataclass(frozen=True)
class Answer:
    """An answer as shown: what is above it, its text in pieces of which some are marked, and its numbers."""

    title: str
    pieces: Pieces
    numbers: str
    prompt: str = ""


@dataclass(frozen=True)
class Prompt:
    text: str
    answers: list[Answer]  # SFT, previous, now
    between: list[Answer]  # the other steps


@dataclass(frozen=True)
class RunView:
    """A run as the page shows it."""

    run: ReadRun
    verdict: Verdict
    progress: str
    figures: list[tuple[str, str, str]]  # name, value, unit
    prompts: list[Prompt]
    iterations: list[tuple[int, list[Answer]]]
    win_rate: ratings.WinRate | None
    agreement: ratings.Agreement | None
    skipped: int


def page(curves: list[Curve]) -> str:
    """The page of some curves as HTML."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["printable"] = lambda value: printable(str(value))
    style, script = (Markup((here / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    runs = [run for curve in curves for run in curve.runs]
    views = [view(run) for run in runs]
    return environment.get_template("page.html").render(
        title=", ".join(curve.label for curve in curves),
        curves=curves,
        colors=charts.COLORS,
        runs=views,
        figure_names=list(dict.fromkeys(name for shown in views for name, _, _ in shown.figures)),
        main=charts.main_charts(curves),
        others=charts.other_charts(curves),
        changed=changed_settings(runs),
        style=style,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def view(run: ReadRun) -> RunView:
    return RunView(
        run=run,
        verdict=verdict(run),
        progress=_progress(run),
        figures=_figures(run),
        prompts=fixed_prompts(run.samples),
        iterations=kept_answers(run.answers),
        win_rate=ratings.win_rate(run.rated.choices),
        agreement=ratings.agreement(run.rated.choices),
        skipped=sum(choice == ratings.SKIP for said in run.rated.choices.values() for choice in said.values()),
    )


def _progress(run: ReadRun) -> str:
    planned = run.config.get("run.iterations")
    return f"{len(run.rows)} iterations" if planned is None else f"{len(run.rows)} of {planned} iterations"


def _figures(run: ReadRun) -> list[tuple[str, str, str]]:
    """First and last value of what matters; a run without a metric has no figure of it."""
    wanted = (
        ("KL to the SFT model", "kl/seq_nats", "{:.2f}", "nats per answer"),
        ("Score", "score/mean", "{:.2f}", "mean"),
        ("Length", "response/len_mean_tokens", "{:.1f}", "tokens"),
        ("Entropy", "policy/entropy_nats", "{:.2f}", "nats per token"),
    )
    figures = [
        (name, " → ".join(map(form.format, ends)), unit)
        for name, metric, form, unit in wanted
        if (ends := run.ends(metric)) is not None
    ]
    seconds = list(run.values("time/iteration_s").values())
    return [*figures, ("Iteration", f"{median(seconds):.1f}", "seconds, median")] if seconds else figures


def fixed_prompts(samples: list[Row]) -> list[Prompt]:
    """Every fixed prompt with its answers; marked is what is gone since SFT, and what is new since."""
    if not samples:
        return []
    by_step = steps_so_far(samples)
    found = []
    for prompt in dict.fromkeys(row["prompt"] for row in samples):
        rows = {row["step"]: row for row in samples if row["prompt"] == prompt}
        first, last = (_text(rows[step]) if step in rows else "" for step in (by_step["SFT"], max(by_step.values())))
        answers = {
            step: Answer(
                title=f"after {step} iterations" if step else "before any update",
                pieces=word_changes(first, last)[0] if step == by_step["SFT"] else word_changes(first, _text(row))[1],
                numbers=_numbers(row),
            )
            for step, row in sorted(rows.items())
        }
        shown = [
            Answer(f"{name}, {answers[step].title}", answers[step].pieces, answers[step].numbers)
            for name, step in by_step.items()
            if step in answers
        ]
        between = [answer for step, answer in answers.items() if step not in by_step.values()]
        found.append(Prompt(printable(prompt), shown, between))
    return found


def kept_answers(answers: list[Row]) -> list[tuple[int, list[Answer]]]:
    """Kept answers of the newest, the oldest and some iterations between, the newest first."""
    steps = sorted({row["step"] for row in answers}, reverse=True)
    most = min(len(steps), ITERATIONS_SHOWN)
    shown = [steps[round(i * (len(steps) - 1) / max(1, most - 1))] for i in range(most)]
    return [
        (
            step,
            [
                Answer(", ".join(map(str, row["why"])), [(_text(row), False)], _numbers(row), printable(row["prompt"]))
                for row in answers
                if row["step"] == step
            ],
        )
        for step in shown
    ]


def _text(row: Row) -> str:
    return printable(str(row["answer"]).strip())


def _numbers(row: Row) -> str:
    numbers = [f"score {row['score']:+.2f}"]
    if "kl_nats" in row:  # rows of runs before it was kept have none
        numbers += [f"KL {row['kl_nats']:.2f} nats", f"{row['tokens']} token{'' if row['tokens'] == 1 else 's'}"]
    return " · ".join(numbers)


def changed_settings(runs: list[ReadRun]) -> list[tuple[str, Any, list[Any]]]:
    """(key, default, value of each run) where one is not the default; those that differ between runs first."""
    default, absent = defaults(), "not in the file"
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in NOT_A_SETTING)
    rows = []
    for key in keys:
        values = [run.config.get(key, absent) for run in runs]
        if any(value != default.get(key, absent) for value in values):
            rows.append((key, default.get(key, "no such key"), values))
    return sorted(rows, key=lambda row: all(value == row[2][0] for value in row[2]))
