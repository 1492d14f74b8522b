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


def audit(seq_scores: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Warnings when the scores of a batch cannot teach much, or teach something else: all equal, only two values, one
    answer that outweighs the rest, or scores that go with the length of the answer.

    Shapes: both [B]; scores in the units of the source, lengths in tokens.
    """
    values, count = np.unique(seq_scores), len(seq_scores)
    if len(values) == 1:
        return [f"all {count} scores are {values[0]:g}: no answer beats another, nothing can be learned"]
    if len(values) == 2 and count > 4:
        return [f"the scores take only the values {values[0]:g} and {values[1]:g}: prefer a graded score"]
    found = []
    distances = (seq_scores.astype(np.float64) - np.median(seq_scores)) ** 2
    if count >= 8 and distances.max() > distances.sum() / 2:
        farthest = seq_scores[np.argmax(distances)]
        found.append(
            f"one score of {count}, {farthest:g}, makes more than half of their variance: heavy tails let single "
            f"answers steer the update; see reward.clip and reward.normalise"
        )
    if np.ptp(lengths) > 0:
        correlation = float(np.corrcoef(seq_scores.astype(np.float64), lengths)[0, 1])
        # Of unrelated numbers one batch in a thousand would pass the second bound, which is 3.3 standard errors.
        if abs(correlation) > max(0.5, 3.3 / np.sqrt(count)):
            found.append(
                f"scores and lengths of the answers are correlated ({correlation:+.2f}): the policy may learn to write "
                f"{'longer' if correlation > 0 else 'shorter'} answers instead of better ones; watch "
                f"response/len_mean_tokens"
            )
    return found
