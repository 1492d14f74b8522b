"""`python -m ppo_jax.reward_model`: a reward model from preference pairs, for `reward.model` of `ppo_jax.train`.

    1. pairs of answers become token rows; some prompts are held out
    2. the trunk of a language model gets a head that gives one number, 0 at first
    3. the layers that stay frozen read every text once, where their states are kept
    4. small steps: Bradley-Terry loss of each pair, gradient clipping, AdamW
    5. after every epoch the held-out pairs are scored: accuracy, calibration, mean score
    6. the model is written in Hugging Face format

Left out: resuming (what is lost is one training), and more than one device. What the steps call is in `pairs`,
`models.heads`, `reward_training`, `ops.preferences` and `monitor.preferences`.
"""

import importlib.util
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from ppo_jax import durable, jsonl
from ppo_jax.build import float32_means_float32, open_model
from ppo_jax.errors import UserError
from ppo_jax.models.decoder import Params
from ppo_jax.models.heads import critic_spec, load_scorer, pad_token_id, save_scorer
from ppo_jax.models.hf_io import ModelDirectory
from ppo_jax.monitor.console import plain_log
from ppo_jax.monitor.invariants import digest
from ppo_jax.monitor.metrics import to_host
from ppo_jax.monitor.not_finite import TOO_MANY_IN_A_ROW
from ppo_jax.monitor.preferences import calibration, plot_calibration, preference_metrics
from ppo_jax.monitor.sinks import MetricsWriter, check_sinks
from ppo_jax.optimizer import make_optimizer
from ppo_jax.pairs import Pairs, load_split
from ppo_jax.prompts import check_ids, shuffled_indices
from ppo_jax.reward_model_config import RewardModelConfig
from ppo_jax.reward_training import (
    RewardObjective,
    Texts,
    frozen_states,
    joined_scorer,
    pair_step,
    split_scorer,
    text_scores,
)
from ppo_jax.rewards.classifier import last_position
from ppo_jax.run_directory import check_unused, run_directory, write_description
from ppo_jax.run_lock import RunLock

log = logging.getLogger("ppo_jax")

LABEL = "score"
UNFINISHED, SKIPPED = "unfinished_reward_model", "skipped_pairs.jsonl"
LINES = 40  # of progress on the terminal


@dataclass(frozen=True)
class RewardModelRun:
    """Everything about a training that does not change while it goes on."""

    config: RewardModelConfig
    lock: RunLock
    model: ModelDirectory
    training: Pairs
    held_out: Pairs
    objective: RewardObjective
    trained: Params  # before the first step; given up by it
    frozen: Params

    @property
    def directory(self) -> Path:
        return self.lock.directory

    @property
    def steps_per_epoch(self) -> float:
        return len(self.training) / self.config.train.batch_size

    @property
    def steps(self) -> int:
        return step_count(self.config, self.training)

    def ends_an_epoch(self, step: int) -> bool:
        """Whether all pairs were seen once more after this step; of the last step always."""
        each = self.steps_per_epoch
        return int((step + 1) / each) > int(step / each) or step + 1 == self.steps


def step_count(config: RewardModelConfig, training: Pairs) -> int:
    """Whole batches in all epochs together; the last pairs of one fill up with the first of the next."""
    return max(1, int(config.train.epochs * len(training) / config.train.batch_size))


@dataclass(frozen=True)
class RewardModelResult:
    """What a training leaves behind."""

    directory: Path
    model_directory: Path  # Hugging Face format
    metrics: list[dict[str, Any]]  # one object per step, as in metrics.jsonl
    evaluation: dict[str, Any]  # as in evaluation.json


def build(config: RewardModelConfig) -> RewardModelRun:
    """Load and check everything, then make the run directory. Nothing is written before all checks have passed."""
    lock = RunLock(run_directory(config, resume=False))
    check_sinks(config.monitor)
    if config.monitor.calibration_plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("monitor.calibration_plot is set, but matplotlib is not installed; it is in the extra 'demo'")
    model = open_model(config)
    objective = _objective(config, model)
    with plain_log():
        training, held_out = load_split(config.data, model.tokenizer)
    _check_tokens(config, model, training, held_out)
    _check_warmup(config, training)
    float32_means_float32(config)
    scorer = load_scorer(model, key="model.path")
    described = {"model_digest": digest(scorer), "training_digest": training.digest()}
    described |= {"held_out_digest": held_out.digest(), "pairs": [len(training), len(held_out)]}
    trained, frozen = split_scorer(scorer, objective)
    lock.acquire()
    try:
        check_unused(lock.directory)
        write_description(lock.directory, config, described)
    except BaseException:
        lock.release()
        raise
    return RewardModelRun(config, lock, model, training, held_out, objective, trained, frozen)


def train(run: RewardModelRun) -> RewardModelResult:
    """Train, evaluate and save the model of `run`, whose trained parameters are consumed."""
    with run.lock, plain_log(), MetricsWriter(run.directory, first_step=0, monitor=run.config.monitor) as writer:
        return _train(run, writer)


def _train(run: RewardModelRun, writer: MetricsWriter) -> RewardModelResult:
    config, count = run.config, len(run.training)
    optimizer = make_optimizer(config.train, run.steps)
    trained, opt_state = run.trained, optimizer.init(run.trained)
    texts, held_out, history = make_texts(run, run.training), make_texts(run, run.held_out), []
    chosen = rejected = np.zeros(0)  # scores of the held-out pairs
    skipped_in_a_row = 0
    print(f"{count} pairs to train on, {len(run.held_out)} held out, {run.steps} steps", flush=True)
    for step in range(run.steps):
        start = time.perf_counter()
        pairs = shuffled_indices(config.run.seed, count, step, config.train.batch_size)
        rows = texts.rows([*pairs, *(count + i for i in pairs)])  # chosen, then rejected
        margins = jnp.asarray([run.training.margins[i] for i in pairs], jnp.float32) + config.train.margin
        state = (trained, opt_state, run.frozen, rows, margins, jnp.asarray(step, jnp.int32))
        trained, opt_state, stats = pair_step(*state, optimizer=optimizer, objective=run.objective)
        numbers = to_host(stats) | {"time/step_s": time.perf_counter() - start}
        skipped_in_a_row = skipped_in_a_row + 1 if numbers["update/skipped_steps"] > 0 else 0
        if run.ends_an_epoch(step):
            chosen, rejected = pair_scores(run, trained, held_out)
            if not np.all(np.isfinite([chosen, rejected])):
                _give_up(run, trained, f"step {step}: the scores of the held-out pairs are not all finite")
            numbers |= preference_metrics(chosen, rejected)
        writer.write(step, numbers)
        history.append({"step": step} | numbers)
        _show(step, run.steps, numbers)
        if skipped_in_a_row:
            _keep_skipped(run, step, pairs)
        if skipped_in_a_row == TOO_MANY_IN_A_ROW:
            _give_up(run, trained, f"step {step}: no finite loss and update {TOO_MANY_IN_A_ROW} times in a row")
    evaluation = _write_evaluation(run, chosen, rejected)
    directory = run.directory / "reward_model"
    _save(run, trained, directory)
    return RewardModelResult(run.directory, directory, history, evaluation)


def _save(run: RewardModelRun, trained: Params, directory: Path) -> None:
    scorer, dtype = joined_scorer(trained, run.frozen), run.config.model.export_dtype
    save_scorer(directory, run.model, scorer, label=LABEL, dtype=dtype)


def _keep_skipped(run: RewardModelRun, step: int, pairs: Sequence[int]) -> None:
    """The texts of a step that was skipped, behind those of earlier ones."""
    decode, file = run.model.tokenizer.decode, run.directory / SKIPPED
    rows = [(run.training.chosen[i], run.training.rejected[i]) for i in pairs]
    lines = [jsonl.line({"step": step, "chosen": decode(one), "rejected": decode(other)}) for one, other in rows]
    log.warning("warning: step %d was skipped, its loss or update is not finite; its pairs are in %s", step, file)
    with file.open("a", encoding="utf-8") as opened:
        opened.writelines(lines)


def _give_up(run: RewardModelRun, trained: Params, why: str) -> NoReturn:
    """Save what was trained, which no skipped step has changed, under a name that is not a finished model's."""
    directory = run.directory / UNFINISHED
    _save(run, trained, directory)
    raise UserError(f"{why}; lower train.learning_rate. What was trained until then is in {directory}")


def make_texts(run: RewardModelRun, pairs: Pairs) -> Texts:
    """Both texts of every pair, all chosen ones first; with the frozen layers' states where they are kept."""
    tokens, pad = [*pairs.chosen, *pairs.rejected], pad_token_id(run.model)
    texts = Texts(tokens, [last_position(ids, pad) for ids in tokens], run.config.data.max_tokens)
    if not run.config.train.cache_states:
        return texts
    start, size = time.perf_counter(), 2 * run.config.train.batch_size
    states = frozen_states(run.frozen, texts, objective=run.objective, batch_size=size)
    megabytes = sum(state.nbytes for state in states) / 1e6
    print(f"frozen layers: {len(tokens)} texts, {megabytes:.0f} MB, {time.perf_counter() - start:.0f} s", flush=True)
    return replace(texts, states=states)


def pair_scores(run: RewardModelRun, trained: Params, texts: Texts) -> Sequence[np.ndarray]:
    """Scores of chosen and rejected texts of some pairs, float64 [N] each."""
    size = 2 * run.config.train.batch_size
    return np.split(text_scores(trained, run.frozen, texts, objective=run.objective, batch_size=size), 2)


def _write_evaluation(run: RewardModelRun, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """The held-out pairs at the end, as `evaluation.json` and, where asked for, as a diagram."""
    bins = calibration(chosen - rejected)
    evaluation = {"pairs": len(chosen)} | preference_metrics(chosen, rejected) | {"calibration": bins}
    durable.write_text(run.directory / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    if run.config.monitor.calibration_plot:
        plot_calibration(bins, run.directory / "calibration.png")
    return evaluation


def _objective(config: RewardModelConfig, model: ModelDirectory) -> RewardObjective:
    depth, layers = len(model.spec.layers), config.train.layers
    if layers is not None and layers > depth:
        raise UserError(
            f"train.layers ({layers}) must be at most the {depth} layers of {model.path}; null is everything"
        )
    return RewardObjective(
        spec=critic_spec(model.spec),
        first_trained=None if layers is None else depth - layers,
        center_coef=config.train.center_coef,
        compute_dtype=config.model.compute_dtype,
        remat=config.train.remat,
    )


def _check_tokens(config: RewardModelConfig, model: ModelDirectory, *pair_sets: Pairs) -> None:
    """Ids within the embedding and texts within the model's positions."""
    if config.data.max_tokens > model.spec.max_positions:
        raise UserError(
            f"data.max_tokens ({config.data.max_tokens}) must be at most the {model.spec.max_positions} positions of "
            f"{model.path}"
        )
    rows = [ids for pairs in pair_sets for ids in (*pairs.chosen, *pairs.rejected)]
    check_ids(rows, vocab_size=model.spec.vocab_size, path=model.path)


def _check_warmup(config: RewardModelConfig, training: Pairs) -> None:
    warmup, steps = config.train.warmup_steps, step_count(config, training)
    if warmup >= steps:
        raise UserError(
            f"train.warmup_steps ({warmup}) must be below the training's {steps} optimizer steps (train.epochs "
            f"{config.train.epochs}, train.batch_size {config.train.batch_size}, {len(training)} pairs)"
        )


def _show(step: int, steps: int, numbers: dict[str, Any]) -> None:
    evaluated = "evaluation/accuracy" in numbers
    if evaluated or step % max(1, steps // LINES) == 0:
        print(
            f"{step:5d}  loss {numbers['train/preference_loss']:.4f}  accuracy {numbers['train/accuracy']:.2f}  "
            f"mean score {numbers['train/score_mean']:+.3f}  grad norm {numbers['update/grad_norm']:.2f}  "
            f"s/step {numbers['time/step_s']:.2f}",
            flush=True,
        )
    if evaluated:
        print(
            f"       held out: accuracy {numbers['evaluation/accuracy']:.3f} (95%: "
            f"{numbers['evaluation/accuracy_low']:.3f} to {numbers['evaluation/accuracy_high']:.3f})  loss "
            f"{numbers['evaluation/preference_loss']:.4f}  calibration error "
            f"{numbers['evaluation/calibration_error']:.3f}  mean score {numbers['evaluation/score_mean']:+.3f}",
            flush=True,
        )


if __name__ == "__main__":
    from ppo_jax.cli import reward_model_main

    reward_model_main()
