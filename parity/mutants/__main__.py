"""`python -m parity.mutants`: plant every bug, and see the level of the ladder that must turn red do so, in float64.

One table; exit code 1 where a bug survives. Properties plant bugs of their own: `python -m parity.properties`.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging

from parity.__main__ import is_json
from parity.cases import RANDOM_MODELS, ModelCase, random_model
from parity.mutants import MUTANTS
from parity.mutants.rows import Found, Planted, found_by_level, found_by_test, rows_of

DTYPE = "float64"


def kill_all(mutants: list[Planted], cases: dict[str, ModelCase]) -> Iterator[tuple[Planted, Found]]:
    """Every mutant and what its killer finds. Those of the twin come first: what JAX compiled for them stays valid."""
    for mutant in sorted(mutants, key=lambda mutant: mutant.target.startswith("ppo_jax")):
        seen = found_by_test(mutant) if mutant.is_seen_by_a_test else found_by_level(mutant, cases, DTYPE)
        print("killed" if seen.is_killed else "SURVIVES", mutant.killer, mutant.bug, file=sys.stderr, flush=True)
        yield mutant, seen


def check_that_levels_are_green(mutants: list[Planted], cases: dict[str, ModelCase]) -> None:
    """Without a bug the same levels hold: red is the bug's."""
    for level, name in sorted({(mutant.killer, mutant.on) for mutant in mutants if not mutant.is_seen_by_a_test}):
        red = [row for row in rows_of(level, name, cases, DTYPE) if row.diverged is not None]
        if red:
            raise SystemExit(f"without any bug, {level} is red on {name}: {red[0]}")


def table_of(found: list[tuple[Planted, Found]]) -> Table:
    table = Table(title="Planted bugs, and what kills them (float64)")
    for column in ("bug", "trap", "planted in", "killed by", "where", "error", "above the bound", "verdict"):
        table.add_column(column, justify="right" if column in ("trap", "error", "above the bound") else "left")
    for mutant, seen in sorted(found, key=lambda pair: MUTANTS.index(pair[0])):
        killer = mutant.killer.replace("tests/", "") if mutant.is_seen_by_a_test else mutant.killer
        numbers = ("", "") if mutant.is_seen_by_a_test else (f"{seen.error:.1e}", above(seen))
        where = seen.where if mutant.is_seen_by_a_test else f"{mutant.on}, {seen.where}"
        verdict = "[green]killed[/]" if seen.is_killed else "[bold red]SURVIVES[/]"
        cells = (mutant.bug, str(mutant.trap or ""), mutant.target, killer, where, *numbers)
        table.add_row(*map(escape, cells), verdict)
    return table


def above(seen: Found) -> str:
    return f"{seen.error / seen.bound:.0e} x" if seen.bound else "any"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m parity.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose target or bug contains this, such as ppo_torch_ref")
    parser.add_argument("--all", action="store_true", help="those too that only whole iterations or tests can see")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    mutants = [mutant for mutant in MUTANTS if arguments.only in f"{mutant.target} {mutant.bug}"]
    mutants = [mutant for mutant in mutants if arguments.all or not mutant.is_expensive]
    with tempfile.TemporaryDirectory() as directory:
        names = sorted({mutant.on for mutant in mutants} & set(RANDOM_MODELS))
        cases = {name: random_model(name, Path(directory)) for name in names}
        check_that_levels_are_green(mutants, cases)
        found = list(kill_all(mutants, cases))
    if arguments.json is not None:
        rows = [asdict(mutant) | asdict(seen) for mutant, seen in found]
        finite = [{key: x if is_json(x) else str(x) for key, x in row.items()} for row in rows]
        arguments.json.write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 220).print(table_of(found))
    survivors = [mutant for mutant, seen in found if not seen.is_killed]
    print(f"{len(found)} mutants, {len(survivors)} survive")
    return 1 if survivors or not found else 0


if __name__ == "__main__":
    sys.exit(main())
