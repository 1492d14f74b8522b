"""Sources of scores: find them, call them, add up, and refuse whatever is not one finite float per answer."""

import asyncio
import importlib
import inspect
import logging
import numbers
import sys
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from ppo_jax.config import RewardConfig
from ppo_jax.errors import UserError
from ppo_jax.rewards.background import in_background
from ppo_jax.rewards.http import HttpReward

log = logging.getLogger("ppo_jax")

# float32 keeps no larger number, and its square must not overflow either.
LARGEST_SCORE = 1e18
# What the scores of `reward.function`, `reward.url` and `reward.model` are called.
FUNCTION, URL, MODEL = "function", "url", "model"
RESERVED_NAMES = ("shaped",)  # `score/shaped_mean` is another metric

# One float per answer, or several scores by name.
Returned = Sequence[float] | Mapping[str, Sequence[float]]
RewardFunction = Callable[..., Returned | Awaitable[Returned]]
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Scores:
    """What the sources say of B answers."""

    total: np.ndarray  # float32 [B], the weighted sum: what the policy is trained on
    named: dict[str, np.ndarray]  # float32 [B] each, before their weights; one entry at least
    dropped: np.ndarray  # bool [B], answers that a source has no finite number for; their scores are 0 and say nothing
    seconds: float  # that the sources took


@dataclass(frozen=True)
class Reward:
    """The sources of a run by name, and the weight of each score in the sum, 1 where none is given."""

    sources: dict[str, RewardFunction]
    weights: dict[str, float] = field(default_factory=dict)
    time_limit_s: float | None = None
    function_retries: int = 0
    max_dropped_frac: float = 0.0

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The one event loop of all asynchronous sources: what they keep open belongs to it."""
        loop = asyncio.new_event_loop()
        weakref.finalize(self, loop.close)
        return loop


def open_reward(config: RewardConfig, given: RewardFunction | None = None) -> Reward:
    """All sources that are set but a reward model, or the given function alone; `reward.function` is that of a run that
    sets no other."""
    limits = {name: getattr(config, name) for name in ("time_limit_s", "function_retries", "max_dropped_frac")}
    if given is not None:
        return Reward({FUNCTION: given}, config.weights, **limits)
    sources: dict[str, RewardFunction] = {
        name: load_function(target, key=f"reward.functions: {name}") for name, target in config.functions.items()
    }
    for name, is_set in ((URL, config.url is not None), (MODEL, config.model is not None)):
        if is_set and name in sources:
            raise UserError(f"reward.functions: {name!r} is the name of the scores of reward.{name}; choose another")
    if config.url is not None:
        sources[URL] = HttpReward(
            config.url, timeout_s=config.timeout_s, retries=config.retries, batch_size=config.http_batch_size
        )
    if not sources and config.model is None:
        sources[FUNCTION] = load_function(config.function)
    return Reward(sources, config.weights, **limits)


def load_function(name: str, *, key: str = "reward.function") -> RewardFunction:
    """The function that `module:function` names; modules in the current directory are found too."""
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(f"{key}: got {name!r}, expected module:function, for instance my_rewards:score")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: anything may come
        raise UserError(
            f"{key}: module {module_name!r} could not be imported: {type(error).__name__}: {error}"
        ) from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{key}: {module_name!r} has no function {function_name!r}")
    return cast(RewardFunction, function)


def start_scoring(
    reward: Reward, prompts: list[str], answers: list[str], columns: Columns | None = None, *, may_drop: bool = False
) -> Callable[[], Scores]:
    """Begin to score B answers in a thread, so that the device need not wait; what is returned waits for the scores.

    Where the caller may drop answers, those without a finite number are marked, up to the share that the reward allows.
    `columns` holds B entries under each name. A thread knows nothing of the run's mesh: what a source computes with JAX
    stays on its own device and process. A source that says `on_devices` is waited for at once: it computes on several
    of the run's devices, and programs that two threads start there could wait for one another for ever.
    """
    limit = reward.time_limit_s
    end = None if limit is None else time.monotonic() + limit
    scoring = in_background(partial(_scores, reward, prompts, answers, columns or {}, may_drop=may_drop))

    def left() -> float | None:
        return None if end is None else max(0.0, end - time.monotonic())

    def finish() -> Scores:
        try:
            return scoring.result(left())
        except TimeoutError:
            raise UserError(f"the answers were not scored after reward.time_limit_s ({limit:g} s)") from None

    if any(getattr(source, "on_devices", False) for source in reward.sources.values()):
        wait([scoring], left())
    return finish


def score_answers(reward: Reward, prompts: list[str], answers: list[str], columns: Columns | None = None) -> Scores:
    """Scores of B answers; a source that raises or returns anything but B finite numbers ends the run."""
    return start_scoring(reward, prompts, answers, columns)()


def _scores(reward: Reward, prompts: list[str], answers: list[str], columns: Columns, *, may_drop: bool) -> Scores:
    started = time.perf_counter()
    named: dict[str, np.ndarray] = {}
    dropped = np.zeros(len(answers), bool)
    allowed = int(reward.max_dropped_frac * len(answers)) if may_drop else 0
    for source, returned in _returned(reward, prompts, answers, columns).items():
        for name, values in (returned if isinstance(returned, Mapping) else {source: returned}).items():
            if not isinstance(name, str) or name in named or name in RESERVED_NAMES:
                raise UserError(f"{_called(source)} returned a score named {name!r}: that is no text, or taken already")
            named[name], bad = checked_scores(values, prompts, answers, of=_called(source), allowed=allowed)
            dropped |= bad
    if dropped.sum() > allowed:
        raise UserError(f"{dropped.sum()} answers have no finite score; reward.max_dropped_frac allows {allowed}")
    if unknown := sorted(set(reward.weights) - set(named)):
        raise UserError(
            f"reward.weights: no score is called {', '.join(unknown)}; there are {', '.join(named) or 'none'}"
        )
    weighted = [reward.weights.get(name, 1.0) * scores.astype(np.float64) for name, scores in named.items()]
    total = np.sum(weighted, axis=0)
    if not named or not np.all(np.abs(total) <= LARGEST_SCORE):
        raise UserError(f"the sum of the scores {', '.join(named) or '(there are none)'} is beyond {LARGEST_SCORE:g}")
    return Scores(np.where(dropped, 0, total).astype(np.float32), named, dropped, time.perf_counter() - started)


def _returned(reward: Reward, prompts: list[str], answers: list[str], columns: Columns) -> dict[str, Any]:
    """What every source returned. Coroutines are awaited together, once all plain functions are done."""
    returned: dict[str, Any] = {}
    try:
        for source, function in reward.sources.items():
            with _failures_of(source):
                returned[source] = _tried(reward, source, partial(_call, function, prompts, answers, columns))
        waiting = {source: value for source, value in returned.items() if inspect.isawaitable(value)}
        if waiting:
            results = reward.loop.run_until_complete(_together(list(waiting.values())))
            for source, result in zip(waiting, results, strict=True):
                with _failures_of(source):
                    if isinstance(result, BaseException):
                        raise result
                returned[source] = result
    finally:
        for value in returned.values():
            if inspect.iscoroutine(value):  # never awaited, because another source failed first
                value.close()
    return returned


def _tried(reward: Reward, source: str, call: Callable[[], Any]) -> Any:
    """What a source returns, called again while it raises and `function_retries` are left; one behind HTTP has its own.

    An asynchronous function is called once here and awaited later: its retries are its own business too.
    """
    for left in reversed(range(reward.function_retries + 1)):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            if left == 0:
                raise
            log.warning("warning: %s raised %r; it is called again, %d times at most", _called(source), error, left)
    raise AssertionError("unreachable: the last try returns or raises")


async def _together(waiting: list[Awaitable[Returned]]) -> list[Returned | BaseException]:
    return await asyncio.gather(*waiting, return_exceptions=True)


@contextmanager
def _failures_of(source: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_called(source)} raised {type(error).__name__}: {error}") from error


def _called(source: str) -> str:
    return "the reward function" if source == FUNCTION else f"the reward {source!r}"


def _call(function: RewardFunction, prompts: list[str], answers: list[str], columns: Columns) -> Any:
    """With the columns where the function has a parameter of that name, or a third one without a default."""
    given = (list(prompts), list(answers))
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some functions written in C
        return function(*given)
    by_position = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    copied = {name: list(values) for name, values in columns.items()}
    if len(by_position) > 2 and by_position[2].default is inspect.Parameter.empty:
        return function(*given, copied)
    if "columns" in parameters:
        return function(*given, columns=copied)
    return function(*given)


def checked_scores(
    scores: Any, prompts: list[str], answers: list[str], *, of: str, allowed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(scores [B], float32, which of them are no finite numbers, bool [B]) of what a source returned.

    Anything but B finite numbers is refused with its answer, but for `allowed` of them, which are 0.
    """
    try:
        count = len(scores)
    except TypeError:
        raise UserError(f"{of} returned {type(scores).__name__}, expected {len(answers)} floats") from None
    if count != len(answers):
        raise UserError(f"{of} returned {count} scores for {len(answers)} answers")
    bad = np.zeros(count, bool)
    for i, score in enumerate(cast(Sequence[float], scores)):
        is_number = isinstance(score, numbers.Real | np.floating | np.integer) and not isinstance(
            score, bool | np.bool_
        )
        if not is_number or not abs(score) <= LARGEST_SCORE:
            bad[i] = True
            message = (
                f"{of} returned {score!r} for answer {i}, expected a finite float of at most {LARGEST_SCORE:g}. The "
                f"answer was {answers[i]!r} to {prompts[i]!r}"
            )
            if bad.sum() > allowed:
                raise UserError(message + (f"; {allowed} such answers may be left out" if allowed else ""))
            log.warning("warning: %s; it is left out of this iteration", message)
    finite = [0.0 if is_bad else float(score) for is_bad, score in zip(bad, scores, strict=True)]
    return np.asarray(finite, np.float32), bad


def audit(seq_scores: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Warnings when the scores of a batch cannot teach much, or teach something else: all equal, only two values, one
    answer that outweighs the rest, or scores that go with the length of the answer.

    Shapes: both [B]; scores in the units of the source, lengths in tokens. Answers of length 0 were left out.
    """
    seq_scores, lengths = seq_scores[lengths > 0], lengths[lengths > 0]
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
