"""The runs of `benchmarks.scenes`: on the embedded model, each failure on purpose, and healthy recipes.

A scene is shorter and smaller than a recipe, most with a learning rate that brings the failure within a dozen
iterations. A healthy run has its recipe's learning rate, epochs and answers' length, and half of the default's batch,
minibatch and iterations: 60 optimizer steps of the 120.
"""

import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import jax
import optax

from ppo_jax import build, train
from ppo_jax.config import Config
from ppo_jax.config_file import load
from ppo_jax.errors import UserError
from ppo_jax.monitor.sinks import read_rows
from ppo_jax.rewards.sentiment import vader_compound

Row = dict[str, Any]
Score = Callable[[list[str], list[str]], Any]

UNWATCHED = {"monitor.sample_every": 0, "monitor.tensorboard": False}
OF_SCENES = UNWATCHED | {
    "run.iterations": 12,
    "rollout.batch_size": 16,
    "rollout.max_new_tokens": 32,
    "update.minibatch_size": 16,
    "update.epochs": 1,
}
HEALTHY = UNWATCHED | {"run.iterations": 15, "rollout.batch_size": 32, "update.minibatch_size": 16}
FAST = {"update.learning_rate": 2e-3, "kl.coef": 0.0}
FROZEN = optax.with_extra_args_support(optax.set_to_zero())  # one object, so that it is compiled once
STALE_FROM = 3  # iteration
RECIPES = ("adaptive_kl", "exact_kl", "group_leave_one_out", "critic_value_head")


@dataclass(frozen=True)
class Scene:
    """A failure on purpose: which alarm must see it, how it is provoked, and what in a row is the harm it does."""

    expected: str  # the alarm's scene
    score: Score
    harm: Callable[[Row, Row], bool] | None = None  # of (row, first row); None: the run's time is lost, all of it
    harm_is: str = "the whole run is lost"
    overrides: dict[str, Any] = field(default_factory=dict)
    breaks: str = ""  # what of the program is broken for it, see `_broken`
    cause: str = ""  # what the alarm must name as the cause, where the scene has several


def words(answers: list[str]) -> list[list[str]]:
    return [answer.lower().split() for answer in answers]


def shorter_is_better(prompts: list[str], answers: list[str]) -> list[float]:
    return [-len(x) / 10 for x in words(answers)]


def longer_is_better(prompts: list[str], answers: list[str]) -> list[float]:
    return [len(x) / 10 for x in words(answers)]


def how_often_the_phrase(prompts: list[str], answers: list[str]) -> list[float]:
    return [float(answer.lower().count("the best")) for answer in answers]


def share_of_the(prompts: list[str], answers: list[str]) -> list[float]:
    return [x.count("the") / max(len(x), 1) for x in words(answers)]


def repeated_words(prompts: list[str], answers: list[str]) -> list[float]:
    """Share of the words that were there before; an answer without a word has the lowest score, 0, too."""
    return [1 - len(set(x)) / len(x) if x else 0.0 for x in words(answers)]


def exclamations_and_gold(prompts: list[str], answers: list[str]) -> dict[str, list[float]]:
    """The proxy that is trained on, and the score that is meant and only looked at (its weight is 0), with its square:
    rows have means alone, and its first deviation is wanted."""
    gold = vader_compound(prompts, answers)
    return {"proxy": [answer.count("!") / 5 for answer in answers], "gold": gold, "gold_squared": [x * x for x in gold]}


def always_one(prompts: list[str], answers: list[str]) -> list[float]:
    return [1.0] * len(answers)


def score_fell(row: Row, first: Row) -> bool:
    """By half of the first deviation: the means of 16 answers of a policy that never changes are so low for three rows
    in a row in one run of 18. A ruined policy's texts are scored 0, which is 0.7 deviations less than at first.
    """
    return row["score/mean"] < first["score/mean"] - 0.5 * first["score/std"]


def gold_fell(row: Row, first: Row) -> bool:
    """The same of the score that is only looked at."""
    mean, squared = first["score/gold_mean"], first["score/gold_squared_mean"]
    return row["score/gold_mean"] < mean - 0.5 * math.sqrt(max(squared - mean * mean, 0.0))


SCENES: dict[str, Scene] = {
    "reward is minus the length": Scene(
        "answers_shrink",
        shorter_is_better,
        lambda row, first: row["response/len_mean_tokens"] < first["response/len_mean_tokens"] / 2,
        "mean length below half",
        FAST,
    ),
    "reward is the length": Scene(
        "answers_at_limit",
        longer_is_better,
        lambda row, first: row["response/truncated_frac"] > 0.5,
        "half of the answers cut off",
        FAST,
    ),
    "a fixed phrase": Scene(
        "template_sentences",
        how_often_the_phrase,
        lambda row, first: row["score/mean"] > 2,
        "it comes more than twice an answer",
        FAST,
    ),
    "the the the": Scene(
        "template_sentences",
        share_of_the,
        lambda row, first: row["score/mean"] > 0.5,
        "half of the words are 'the'",
        FAST,
    ),
    "gameable proxy": Scene(
        "score_up_text_decays",
        exclamations_and_gold,
        gold_fell,
        "the true score down by half of its first deviation",
        FAST | {"reward.weights": {"proxy": 1.0, "gold": 0.0, "gold_squared": 0.0}},
    ),
    "learning rate 1e-12": Scene(
        "not_moving", vader_compound, overrides={"update.learning_rate": 1e-12}, cause="learning rate"
    ),
    "beta 1000": Scene("not_moving", vader_compound, overrides={"kl.coef": 1e3}, cause="KL coefficient"),
    "constant reward": Scene("not_moving", always_one, cause="same score"),
    "frozen parameters": Scene("not_moving", vader_compound, breaks="optimizer", cause="frozen"),
    "learning rate x 1000": Scene(
        "kl_runaway",
        vader_compound,
        score_fell,
        "the score down by half of its first deviation",
        {"update.learning_rate": 0.2},
    ),
    "entropy collapse": Scene(
        "entropy_collapse",
        repeated_words,
        lambda row, first: row["policy/entropy_nats"] < first["policy/entropy_nats"] / 4,
        "entropy below a quarter",
        {"update.learning_rate": 4e-3, "kl.coef": 0.0},
    ),
    "stale rollout": Scene(
        "rollout_mismatch",
        vader_compound,
        lambda row, first: row["step"] >= STALE_FROM,
        "answers are of other weights",
        breaks="rollout",
    ),
}


def healthy_of(seed: int) -> tuple[str, ...]:
    """Three recipes of a seed: the default, and two of the others in turn."""
    return ("default", RECIPES[seed % len(RECIPES)], RECIPES[(seed + 2) % len(RECIPES)])


def settings_of(name: str, seed: int) -> dict[str, Any]:
    """What a scene sets of the default, or a healthy run beside its recipe."""
    own = OF_SCENES | SCENES[name].overrides if name in SCENES else HEALTHY
    return own | {"run.seed": seed}


def config_of(name: str, seed: int, *, patience: int = 3) -> Config:
    """Of a run; the patience of its alarms changes nothing but what is made of its rows."""
    recipe = None if name in SCENES or name == "default" else f"configs/recipes/{name}.yaml"
    return load(recipe, settings_of(name, seed) | {"alarms.patience": patience})


def run(name: str, config: Config) -> list[Row]:
    """The rows of `metrics.jsonl`, without its times, of a scene or a healthy recipe.

    Those until then, where numbers that were not finite ended the run.
    """
    scene = SCENES.get(name)
    with _broken("" if scene is None else scene.breaks), contextlib.redirect_stdout(io.StringIO()):
        rows = _rows(config, scene)
    return [{key: x for key, x in row.items() if not key.startswith(("time/", "throughput/"))} for row in rows]


def _rows(config: Config, scene: Scene | None) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": f"{directory}/run"})})
        run, state = build.build(config, reward=None if scene is None else scene.score)
        if scene is not None and scene.breaks == "optimizer":
            run, state = replace(run, optimizer=FROZEN), replace(state, opt_state=FROZEN.init(state.params))
        # One shape for answers of any length: compiling would take longer than the runs.
        with mock.patch.object(train, "bucket", lambda length, *, smallest, largest: largest):
            try:
                train.train(run, state)
            except UserError as error:
                if "not finite" not in str(error):
                    raise
        return read_rows(run.directory / "metrics.jsonl")


@contextmanager
def _broken(what: str) -> Iterator[None]:
    """`rollout`: from iteration `STALE_FROM` on the answers are those of weights that are 2% off."""
    original = train.answer

    def stale(run: Any, state: Any, *arguments: Any, step: int, **keywords: Any) -> Any:
        if step >= STALE_FROM:
            state = replace(state, params=jax.tree.map(lambda x: x * 1.02, state.params))
        return original(run, state, *arguments, step=step, **keywords)

    with mock.patch.object(train, "answer", stale if what == "rollout" else original):
        yield
