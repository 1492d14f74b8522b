"""`python -m parity.properties`: every property in both stacks, then with every bug planted that it must kill.

One table; exit code 1 where a property fails or a mutant survives.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging

from parity.properties import PROPERTIES
from parity.properties.rows import Excess, Property, killed_by, measure, worst
from parity.properties.stack import both_stacks


class Line(NamedTuple):
    """One property in one stack, or beside one of the bugs that it kills."""

    one: Property
    stack: str
    bug: str | None
    found: Excess

    @property
    def is_right(self) -> bool:
        return self.found.holds == (self.bug is None)


def hold_all(properties: tuple[Property, ...] = PROPERTIES) -> Iterator[Line]:
    """The worst of every property, over dtypes, in each stack."""
    for one in properties:
        for name in one.stacks:
            stacks = [stack for dtype in one.dtypes for stack in both_stacks(dtype) if stack.name == name]
            yield Line(one, name, None, worst(*(measure(one, stack) for stack in stacks)))


def kill_all(properties: tuple[Property, ...] = PROPERTIES) -> Iterator[Line]:
    """Every mutant of every property."""
    for one in properties:
        for mutant, found in killed_by(one):
            yield Line(one, "JAX" if mutant.package == "ppo_jax" else "torch", mutant.bug, found)


def table_of(lines: list[Line]) -> Table:
    table = Table(title="Properties: the worst error beside what rounding allows it, as it is and with a bug planted")
    for column in ("property", "stack", "bug", "error", "bound", "error / bound", "verdict"):
        table.add_column(column, justify="right" if column.startswith(("error", "bound")) else "left")
    for line in lines:
        one, stack, bug, found = line
        good, bad = ("holds", "FAILS") if bug is None else ("killed", "SURVIVES")
        numbers = (f"{number:.1e}" for number in (found.error, found.bound, found.ratio))
        verdict = f"[green]{good}[/]" if line.is_right else f"[bold red]{bad}[/]"
        table.add_row(one.name.replace("_", " "), stack, escape(bug or ""), *numbers, verdict)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m parity.properties", description=__doc__)
    parser.add_argument("--only", default="", help="properties whose name contains this")
    parser.add_argument("--without_mutants", action="store_true", help="only whether the properties hold")
    arguments = parser.parse_args()
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # A hundred small programs are compiled, each runs for milliseconds.
    jax.config.update("jax_disable_most_optimizations", True)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    chosen = tuple(one for one in PROPERTIES if arguments.only in one.name)
    lines = list(hold_all(chosen)) + ([] if arguments.without_mutants else list(kill_all(chosen)))
    lines.sort(key=lambda line: chosen.index(line.one))
    Console(width=None if sys.stdout.isatty() else 200).print(table_of(lines))
    wrong = [line for line in lines if not line.is_right]
    print(f"{len(chosen)} properties, {sum(line.bug is not None for line in lines)} mutants, {len(wrong)} wrong")
    return 1 if wrong or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
