"""The ladder as a whole: which levels, on which models, in which order."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from parity import levels, operations
from parity.cases import random_configs, random_model, with_reference
from parity.rows import Row
from parity.stacks import Pair

MODEL_LEVELS: dict[str, Callable[[Pair], Iterator[Row]]] = {
    "L0": levels.weights,
    "L3": levels.logits,
    "L4": levels.log_probs,
    "L5": levels.divergences,
    "L7": levels.loss,
    "L8": levels.gradient,
    "L9": levels.optimizer,
}
SHARED_LEVELS: dict[str, Callable[[str], Iterator[Row]]] = {
    "L4": operations.log_probs,
    "L5": operations.divergences,
    "L6": operations.advantage,
    "L7": operations.loss,
}


def climb(
    dtype: str, *, levels: Sequence[str] | None = None, cases: Sequence[str] | None = None, model: Path | None = None
) -> list[Row]:
    """Rows of the asked-for levels, bottom up: a bug shows first where it sits."""
    known, models = sorted(MODEL_LEVELS | SHARED_LEVELS), list(random_configs())
    asked = known if levels is None else sorted(levels)
    names = models if cases is None else list(cases)
    if unknown := (set(asked) - set(known)) | (set(names) - set(models)):
        raise SystemExit(
            f"unknown: {', '.join(sorted(unknown))}; levels are {', '.join(known)}, cases {', '.join(models)}"
        )
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        found = (
            [random_model(name, root) for name in names]
            if model is None
            else [with_reference(model, root, is_real=True)]
        )
        pairs = [Pair(case, dtype) for case in found]
        rows: list[Row] = []
        for level in asked:
            if level in SHARED_LEVELS:
                rows += SHARED_LEVELS[level](dtype)
            if level in MODEL_LEVELS:
                rows += [row for pair in pairs for row in MODEL_LEVELS[level](pair)]
    return rows
