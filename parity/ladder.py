"""The ladder as a whole: which levels, on which models, in which order."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from parity import credit, finite_differences, forward, generation, loops, operations, primitives, training, trajectory
from parity.cases import RANDOM_MODELS, random_model, with_reference
from parity.models import MODELS
from parity.rows import Row
from parity.stacks import Pair

# On shared inputs, without a model.
SHARED_LEVELS: dict[str, tuple[Callable[[str], Iterator[Row]], ...]] = {
    "L1": (primitives.primitives,),
    "L4": (operations.log_probs,),
    "L5": (operations.divergences,),
    "L6": (credit.score, credit.advantage),
    "L7": (operations.loss,),
    "L11": (loops.whole_runs,),
}
MODEL_LEVELS: dict[str, tuple[Callable[[Pair], Iterator[Row]], ...]] = {
    "L0": (forward.weights,),
    "L2": (forward.activations,),
    "L3": (forward.logits,),
    "L4": (forward.log_probs,),
    "L5": (forward.divergences,),
    "L7": (training.loss,),
    "L8": (training.gradient, finite_differences.gradients),
    "L9": (training.optimizer,),
    "L10": (trajectory.iterations,),
    "L11": (generation.same_tokens,),
    "L12": (generation.ratio_is_one,),
}
LEVELS = sorted(SHARED_LEVELS | MODEL_LEVELS, key=lambda level: int(level[1:]))
# What these find does not depend on the family: of the random models they are run on few.
ON_FEW: dict[Callable[[Pair], Iterator[Row]], tuple[str, ...]] = {
    finite_differences.gradients: training.EVERY_CASE_ON,
    training.optimizer: training.EVERY_CASE_ON,
    trajectory.iterations: ("llama-tied",),
}
# On a checkpoint of the user.
OF_CHECKPOINT = ("L0", "L2", "L3", "L4", "L5", "L8", "L9", "L12")


def shared_rows(level: str, dtype: str) -> Iterator[Row]:
    """Rows of a level that need no model."""
    for compared in SHARED_LEVELS.get(level, ()):
        yield from compared(dtype)


def model_rows(level: str, pair: Pair, *, on_few: bool = True) -> Iterator[Row]:
    """Rows of a level on one model; with `on_few`, what need not be compared on every model is on those of `ON_FEW`."""
    for compared in MODEL_LEVELS.get(level, ()):
        if not on_few or pair.case.name in ON_FEW.get(compared, (pair.case.name,)):
            yield from compared(pair)


def climb(
    dtype: str, *, levels: Sequence[str] | None = None, cases: Sequence[str] | None = None, model: Path | None = None
) -> Iterator[Row]:
    """Rows of the asked-for levels, bottom up: a bug shows first where it sits."""
    known = LEVELS if model is None else OF_CHECKPOINT
    asked, names = known if levels is None else levels, RANDOM_MODELS if cases is None else cases
    if unknown := (set(asked) - set(known)) | (set(names) - set(MODELS)):
        raise SystemExit(
            f"unknown: {', '.join(sorted(unknown))}; levels {'' if model is None else 'of a checkpoint '}are "
            f"{', '.join(known)}, cases {', '.join(MODELS)}"
        )
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if model is None:
            pairs = [Pair(random_model(name, root), dtype) for name in names]
        else:
            pairs = [Pair(with_reference(model, root, is_real=True), dtype)]
        for level in [level for level in known if level in asked]:
            if model is None:
                yield from shared_rows(level, dtype)
            for pair in pairs:
                yield from model_rows(level, pair, on_few=model is None and cases is None)
