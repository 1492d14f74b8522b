"""The runs of `benchmarks.scenes`: on the embedded model, each failure on purpose, and healthy recipes.

A run here is shorter and smaller than a recipe, with a learning rate that brings its failure within a dozen iterations.
"""

import contextlib
import io
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
from ppo_jax.rewards.sentiment import vader_compound

Row = dict[str, Any]
Score = Callable[[list[str], list[str]], Any]

SMALL = {
    "rollout.batch_size": 16,
    "rollout.max_new_tokens": 32,
    "update.minibatch_size": 16,
    "update.epochs": 1,
    "monitor.sample_every": 0,
    "monitor.tensorboard": False,
}
FAST = {"update.learning_rate": 2e-3, "kl.coef": 0.0}
FROZEN = optax.set_to_zero()  # one object, so that it is compiled once
RECIPES = ("adaptive_kl", "exact_kl", "group_leave_one_out", "critic_value_head")


@dataclass(frozen=True)
class Scene:
    """A failure on purpose: which alarm must see it, how it is provoked, and from which row on it has done harm."""

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


def exclamations_and_gold(prompts: list[str], answers: list[str]) -> dict[str, list[float]]:
    """The proxy that is trained on, and the score that is meant and only looked at (its weight is 0)."""
    return {"proxy": [answer.count("!") / 5 for answer in answers], "gold": vader_compound(prompts, answers)}


def always_one(prompts: list[str], answers: list[str]) -> list[float]:
    return [1.0] * len(answers)


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
        lambda row, first: row["score/gold_mean"] < first["score/gold_mean"] / 2,
        "the true score below half",
        FAST | {"reward.weights": {"proxy": 1.0, "gold": 0.0}},
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
        lambda row, first: row["score/mean"] < first["score/mean"] / 2,
        "the score below half",
        {"update.learning_rate": 0.2},
    ),
    "entropy collapse": Scene(
        "entropy_collapse",
        vader_compound,
        lambda row, first: row["policy/entropy_nats"] < first["policy/entropy_nats"] / 4,
        "entropy below a quarter",
        {"update.learning_rate": 4e-3, "kl.coef": 0.0},
    ),
    "stale rollout": Scene("rollout_mismatch", vader_compound, breaks="rollout"),
}


def healthy_of(seed: int) -> tuple[str, ...]:
    """Three recipes of a seed: the default, and two of the others in turn."""
    return ("default", RECIPES[seed % len(RECIPES)], RECIPES[(seed + 2) % len(RECIPES)])


def config_of(name: str, seed: int, iterations: int) -> Config:
    """Of a scene, or of a healthy recipe, which trains as it always does but in the small shapes."""
    settings = SMALL | {"run.seed": seed, "run.iterations": iterations}
    if name in SCENES:
        return load(overrides=settings | SCENES[name].overrides)
    file = None if name == "default" else f"configs/recipes/{name}.yaml"
    return load(file, settings | {"update.epochs": 2})


def run(name: str, seed: int, iterations: int) -> list[Row]:
    """The rows of `metrics.jsonl`, without its times, of a scene or a healthy recipe."""
    scene, config = SCENES.get(name), config_of(name, seed, iterations)
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
            return train.train(run, state).metrics


@contextmanager
def _broken(what: str) -> Iterator[None]:
    """`rollout`: from the fourth iteration on the answers are those of weights that are 2% off."""
    original = train.answer

    def stale(run: Any, state: Any, *arguments: Any, step: int, **keywords: Any) -> Any:
        if step >= 3:
            state = replace(state, params=jax.tree.map(lambda x: x * 1.02, state.params))
        return original(run, state, *arguments, step=step, **keywords)

    with mock.patch.object(train, "answer", stale if what == "rollout" else original):
        yield
