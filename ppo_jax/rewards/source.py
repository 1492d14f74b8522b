"""Find a reward function, call it, and refuse whatever is not one finite float per answer."""

import importlib
import numbers
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from ppo_jax.errors import UserError

# float32 keeps no larger number, and its square must not overflow either.
LARGEST_SCORE = 1e18

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


def load_function(name: str) -> RewardFunction:
    """The function that `module:function` names; modules in the current directory are found too."""
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(f"reward.function: got {name!r}, expected module:function, for instance my_rewards:score")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: anything may come
        raise UserError(
            f"reward.function: module {module_name!r} could not be imported: {type(error).__name__}: {error}"
        ) from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"reward.function: {module_name!r} has no function {function_name!r}")
    return cast(RewardFunction, function)


def score_answers(function: RewardFunction, prompts: list[str], answers: list[str]) -> np.ndarray:
    """Scores [B], float32; a function that raises or returns anything but B finite numbers ends the run."""
    try:
        scores = function(prompts, answers)
    except Exception as error:
        raise UserError(f"the reward function raised {type(error).__name__}: {error}") from error
    try:
        count = len(scores)
    except TypeError:
        raise UserError(
            f"the reward function returned {type(scores).__name__}, expected {len(answers)} floats"
        ) from None
    if count != len(answers):
        raise UserError(f"the reward function returned {count} scores for {len(answers)} answers")
    for i, score in enumerate(scores):
        is_number = isinstance(score, numbers.Real | np.floating | np.integer) and not isinstance(
            score, bool | np.bool_
        )
        if not is_number or not abs(score) <= LARGEST_SCORE:
            raise UserError(
                f"the reward function returned {score!r} for answer {i}, expected a finite float of at most "
                f"{LARGEST_SCORE:g}. The answer was "
                f"{answers[i]!r} to {prompts[i]!r}"
            )
    return np.asarray([float(score) for score in scores], np.float32)


def audit(seq_scores: np.ndarray) -> list[str]:
    """Warnings when the scores of a batch cannot teach much: all equal, or only two values."""
    values = np.unique(seq_scores)
    if len(values) == 1:
        return [f"all {len(seq_scores)} scores are {values[0]:g}: no answer beats another, nothing can be learned"]
    if len(values) == 2 and len(seq_scores) > 4:
        return [f"the scores take only the values {values[0]:g} and {values[1]:g}: prefer a graded score"]
    return []
