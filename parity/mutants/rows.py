"""What a planted bug is, and how far the level that must see it stands above its bound."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from parity import loops
from parity.cases import ModelCase
from parity.ladder import model_rows, shared_rows
from parity.planting import planted
from parity.rows import Row
from parity.stacks import Pair
from ppo_jax import algorithm, optimizer


@dataclass(frozen=True)
class Planted:
    """One edit of one function, and what must turn red: a level of the ladder, or a test of the repository."""

    bug: str
    killer: str  # "L5", or "tests/test_x.py::test_y"
    target: str  # "module:function"
    old: str
    new: str
    on: str = "shared inputs"  # or a random model, or a recipe of `loops`: two whole iterations of it
    trap: int | None = None  # number in the list of what went wrong for others

    @property
    def is_seen_by_a_test(self) -> bool:
        return self.killer.startswith("tests/")

    @property
    def is_expensive(self) -> bool:
        return self.is_seen_by_a_test or self.on in loops.RECIPES or self.killer == "L10"


@dataclass(frozen=True)
class Found:
    """The comparison that stands furthest above its bound; of a test there is no number."""

    where: str
    error: float
    bound: float
    is_killed: bool


def found_by_level(mutant: Planted, cases: dict[str, ModelCase], dtype: str) -> Found:
    """What the level says while the bug is in."""
    # What these keep was made by functions that may be mutants now, or were mutants then.
    forget()
    try:
        with planted(mutant.target, mutant.old, mutant.new):
            rows = rows_of(mutant.killer, mutant.on, cases, dtype)
    finally:
        forget()
    worst = max(rows, key=lambda row: row.error / (row.bound or 1e-300))
    return Found(f"{worst.compared}: {worst.worst}", worst.error, worst.bound, worst.diverged is not None)


def forget() -> None:
    for kept in (optimizer.make_optimizer, optimizer.make_optimizer_with_critic, algorithm.pick_policy_loss):
        kept.cache_clear()


def rows_of(level: str, on: str, cases: dict[str, ModelCase], dtype: str) -> list[Row]:
    if on in loops.RECIPES:
        return list(loops.whole_runs(dtype, at_most=2, recipes=[on]))
    if on == "shared inputs":
        return list(shared_rows(level, dtype))
    # A pair of its own: it remembers what it has computed, and some bugs act when a model is loaded.
    return list(model_rows(level, Pair(cases[on], dtype)))


PLANT_AND_TEST = """
import sys, pytest
from parity.planting import planted
target, old, new, test = sys.argv[1:]
with planted(target, old, new):
    sys.exit(pytest.main(["-q", "-x", "-m", "", "-p", "no:cacheprovider", test]))
"""


def found_by_test(mutant: Planted) -> Found:
    """Whether the test fails, in a process of its own, while the bug is in. pytest exits with 1 when a test failed."""
    words = (mutant.target, mutant.old, mutant.new, mutant.killer)
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, "-c", PLANT_AND_TEST, *words],
        cwd=root,
        env=os.environ | {"JAX_ENABLE_X64": "0"},
        capture_output=True,
        text=True,
    )
    if finished.returncode not in (0, 1):
        raise SystemExit(f"{mutant.killer} did not run:\n{finished.stdout}{finished.stderr}")
    return Found("", float("nan"), float("nan"), finished.returncode == 1)
