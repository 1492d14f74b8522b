"""`python -m parity.truth`: expected gradients against true ones, every answer and every batch listed, in float64.

Eight tables, what each shows under it; exit code 1 if a claim fails. Forms that are known to be biased are run too:
that they are found to be so shows that the method sees it.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from parity.truth import estimators, forms, terms, training
from parity.truth.claims import BOUND, FLOOR, Row


@dataclass(frozen=True)
class Part:
    title: str
    meaning: str
    rows: Callable[..., Iterator[Row]]  # (pairs=, torch_pairs=)


PARTS = {
    "A": Part(
        "Estimators of the KL: expected gradient against that of the KL of whole answers",
        "k1 belongs in the reward, an exact KL in the reward and in the loss. k2, k3 and either half of the exact form"
        " are biased by an amount that depends on the policy; k1 in the loss has no expected gradient at all.",
        partial(estimators.rows_of, "A", estimators.OF_KL),
    ),
    "B": Part(
        "PPO's loss at ratio 1: expected gradient against that of −E[s]",
        "It is the policy gradient. What is subtracted from the score changes nothing as long as it does not look at"
        " the chosen token; looking at it is a bias, and so are wrong values where λ < 1.",
        partial(estimators.rows_of, "B", estimators.OF_SCORE),
    ),
    "C": Part(
        "Forms as trained, whole batches: expected gradient against that of −E[s] + β KL",
        "Both forms of the penalty are exact. A batch mean shrinks what it centres by 1 − 1/B, which is wrong beside a"
        " KL in the loss. Whitening follows another aim: for B = 2, the rate of winning against another answer.",
        partial(training.rows_of, "C", forms.OF_FORMS),
    ),
    "D": Part(
        "Normalisers, B = 2: expected gradient against that of −E[s] + β KL, and of weighted answers",
        "Only the constant follows the objective. The sequence mean weighs an answer by 1 / length, the token mean by"
        " 1 / tokens of its batch, so by its neighbour's length too; each is exactly the gradient with those weights.",
        partial(training.rows_of, "D", forms.OF_NORMALISERS),
    ),
    "E": Part(
        "Groups and critics: expected gradient against that of −E[s] + β KL",
        "The answers to one prompt are a batch of their own, with the factors of one. A critic may be wrong where λ and"
        " the discount are 1; else its errors are in the gradient, and so is its own loss where it shares the trunk.",
        partial(training.rows_of, "E", forms.OF_GROUPS + forms.OF_CRITICS),
    ),
    "F": Part(
        "Shaped scores: expected gradient against that of −E[s] + β KL, s shaped where the row says so",
        "Penalties and clipping are another score. So is dividing by the moments of earlier scores, once this batch"
        " does not move them; a batch that divides by its own moments follows no score.",
        partial(training.rows_of, "F", forms.OF_SHAPING),
    ),
    "G": Part(
        "Terms of a loss: expected gradient against that of a sum over the visited states, the visits held constant",
        "A term of the loss pulls where the policy has been; where that leads is not in it. GRPO's k3 pulls toward the"
        " KL the other way round.",
        partial(estimators.rows_of, "G", estimators.OF_STATES),
    ),
    "H": Part(
        "Further terms and weights, B = 2: expected gradient against what the row says, or that of −E[s] + β KL",
        "At ratio 1 every clipping is the same. A weight per token is not the ratio of whole answers, and does not make"
        " up for answers that another policy has drawn.",
        partial(training.rows_of, "H", terms.OF_TERMS),
    ),
}


def table_of(name: str, rows: list[Row]) -> Table:
    """One line per claim, both stacks beside each other."""
    table = Table(title=escape(f"{name}. {PARTS[name].title}"))
    for column in ("relative error of", "factor"):
        table.add_column(column)
    for column in ("JAX: smallest", "median", "largest", "PyTorch: smallest", "median", "largest"):
        table.add_column(column, justify="right")
    for column in ("claimed", "verdict"):
        table.add_column(column)
    for claim in dict.fromkeys(row.name for row in rows):
        in_stacks = [row for row in rows if row.name == claim]
        numbers = [f"{x:.1e}" for row in in_stacks for x in (row.smallest, row.median, row.largest)]
        verdict = "[green]ok[/]" if all(row.holds for row in in_stacks) else "[bold red]FAIL[/]"
        table.add_row(escape(claim), in_stacks[0].factor, *numbers, in_stacks[0].claimed, verdict)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m parity.truth", description="expected gradients against true ones")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help="for instance A,C")
    parser.add_argument("--pairs", type=int, default=20, help="random pairs of policy and reference")
    parser.add_argument("--torch_pairs", type=int, help="as many of them for the twin; by default all")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than these sums
    torch.set_num_threads(1)
    torch_pairs = arguments.pairs if arguments.torch_pairs is None else arguments.torch_pairs
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows: list[Row] = []
    for name in arguments.parts:
        with jax.enable_x64(True):
            of_part = list(PARTS[name].rows(pairs=arguments.pairs, torch_pairs=torch_pairs))
        console.print(table_of(name, of_part))
        console.print(PARTS[name].meaning, "\n", markup=False)
        rows += of_part
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    failed = [row for row in rows if not row.holds]
    for row in failed:
        console.print(f"{row.part}, {row.stack}, {row.name}: claimed to be {row.claimed} and is not", markup=False)
    if not failed:
        console.print(
            f"all {len(rows)} claims hold: exact is below {BOUND:.0e}, biased above {FLOOR:.0e} for every pair"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
