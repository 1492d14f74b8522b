"""Training a reward model: what is learned, what stays frozen, and what transformers reads of what is saved."""

import importlib.util
import itertools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ppo_jax
from ppo_jax import reward_model, reward_training
from ppo_jax.cli import reward_model_main
from ppo_jax.config_file import load as load_run
from ppo_jax.errors import UserError
from ppo_jax.models.decoder import hidden_states
from ppo_jax.models.heads import critic_spec, load_scorer, save_scorer
from ppo_jax.models.hf_io import open_model
from ppo_jax.models.partial import lower_states, split_trunk, upper_hidden
from ppo_jax.monitor.preferences import preference_metrics
from ppo_jax.pairs import Pairs, load_split
from ppo_jax.reward_model_config import RewardModelConfig, load
from tests.test_examples import SMALL
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parent.parent
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny causal model whose tokenizer has a chat template, and a file of pairs that one word tells apart."""
    directory = tmp_path_factory.mktemp("base")
    model = make_model(directory / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    rng, rows = np.random.default_rng(0), []
    for i in range(48):
        things, again = rng.choice(["soup", "bread", "hotel", "night", "food"], 2), rng.choice(["the old", "a", "we"])
        texts = [f" {again} {things[0]} was {word}" for word in ("good", "bad")]
        rows.append({"prompt": f"the {things[1]} {i}:", "chosen": texts[0], "rejected": texts[1]})
    file = directory / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, file


def settings(base, directory, **changes):
    values = {
        "run.dir": str(directory), "model.path": str(base[0]), "data.path": str(base[1]), "data.evaluation_pairs": 16,
        "data.max_tokens": 32, "train.layers": 1, "train.cache_states": True, "train.batch_size": 8,
        "train.epochs": 6, "train.learning_rate": 5e-3, "monitor.tensorboard": False,
    }  # fmt: skip
    return load(overrides=values | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    config = settings(base, tmp_path_factory.mktemp("trained") / "run")
    return config, reward_model.train(reward_model.build(config))


def logits_of(directory, rows):
    """transformers' scores of token rows, one at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        return np.asarray([model(input_ids=torch.tensor([row])).logits[0].item() for row in rows])


# ------------------------------------------------------------------------------------------------------ what is learned


def test_training_starts_at_ln_2_and_ends_knowing_the_held_out_pairs(trained):
    _, result = trained
    rows = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.metrics
    assert len(rows) == 6 * 32 // 8
    assert rows[0]["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    evaluated = [row for row in rows if "evaluation/accuracy" in row]
    assert [row["step"] for row in evaluated] == [3, 7, 11, 15, 19, 23]
    assert evaluated[-1]["evaluation/preference_loss"] < 0.3 < evaluated[0]["evaluation/preference_loss"]
    assert evaluated[-1]["evaluation/accuracy"] == 1.0


def test_transformers_gives_the_saved_model_the_same_scores(trained):
    config, result = trained
    _, held_out = load_split(config.data, AutoTokenizer.from_pretrained(config.model.path))
    chosen, rejected = (logits_of(result.model_directory, rows) for rows in (held_out.chosen, held_out.rejected))
    assert np.ptp(np.concatenate([chosen, rejected])) > 1
    written = json.loads((result.directory / "evaluation.json").read_text())
    assert written == result.evaluation
    for name, value in preference_metrics(chosen, rejected).items():
        assert written[name] == pytest.approx(value, abs=1e-4), name
    assert sum(row["pairs"] for row in written["calibration"]) == written["pairs"] == len(held_out)


def test_what_is_saved_is_a_classifier_with_one_label_and_its_tokenizer(trained):
    config, result = trained
    saved = json.loads((result.model_directory / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForSequenceClassification"]
    assert saved["id2label"] == {"0": "score"}
    assert AutoModelForSequenceClassification.from_pretrained(result.model_directory).config.num_labels == 1
    before, after = (AutoTokenizer.from_pretrained(path) for path in (config.model.path, result.model_directory))
    assert after.chat_template == TEMPLATE
    assert before.get_vocab() == after.get_vocab()
    assert (result.directory / "config.yaml").read_text() == config.to_yaml()
    described = json.loads((result.directory / "versions.json").read_text())
    assert described["pairs"] == [32, 16]


def test_frozen_tensors_are_the_same_bits_and_the_others_moved(trained):
    config, result = trained
    before = load_file(Path(str(config.model.path)) / "model.safetensors")
    after = load_file(result.model_directory / "model.safetensors")
    assert after.pop("score.weight").shape == (1, 24)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        trains = name.startswith(("model.layers.1.", "model.norm."))
        assert np.array_equal(tensor, before[name]) != trains, name


# --------------------------------------------------------------------------------------------------- how it is computed


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_a_decoder_in_two_parts_is_the_decoder(name, hf_directory):
    model = open_model(str(hf_directory(name)[1]))
    trunk, spec = load_scorer(model, key="model.path")["trunk"], critic_spec(model.spec)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, 20)), jnp.int32)
    mask = jnp.arange(20)[None] < jnp.asarray([20, 11])[:, None]
    whole = hidden_states(trunk, tokens, mask, spec=spec)
    for first in (0, 1, len(spec.layers)):
        frozen, rest = split_trunk(trunk, first)
        assert frozen.keys() | rest.keys() == trunk.keys()
        assert not frozen.keys() & rest.keys()
        states = lower_states(frozen, tokens, mask, spec=spec, first=first)
        for remat in (False, True):
            found = upper_hidden(rest, states, mask, spec=spec, first=first, remat=remat)
            np.testing.assert_allclose(found, whole, rtol=0, atol=2e-6 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("name", ["gpt2", "pythia", "gemma2"])
def test_a_scorer_of_any_family_is_saved_with_the_scores_of_transformers(name, hf_directory, tmp_path):
    base = shutil.copytree(hf_directory(name)[1], tmp_path / "base")
    without_pad = json.loads((base / "config.json").read_text()) | {"pad_token_id": None}
    (base / "config.json").write_text(json.dumps(without_pad))
    model = open_model(str(base))
    scorer = load_scorer(model, key="model.path")
    scorer["head"]["kernel"] = jnp.asarray(np.random.default_rng(1).normal(size=model.spec.width), jnp.float32)
    save_scorer(tmp_path / "saved", model, scorer, label="score")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["pad_token_id"] == model.tokenizer.pad_token_id == 2  # else transformers reads no batches
    assert saved["id2label"] == {"0": "score"}
    rows = [np.random.default_rng(i).integers(3, 37, 5 + i).tolist() for i in range(3)]
    objective = objective_of(model, None)
    parts = reward_training.split_scorer(scorer, objective)
    texts = reward_training.Texts(rows, [len(row) - 1 for row in rows], 16)
    found = reward_training.text_scores(*parts, texts, objective=objective, batch_size=2)
    expected = logits_of(tmp_path / "saved", rows)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def objective_of(model, first, **changes):
    values = {"center_coef": 0.1, "compute_dtype": "float32", "remat": False} | changes
    return reward_training.RewardObjective(spec=critic_spec(model.spec), first_trained=first, **values)


def test_the_gradient_of_the_last_layers_is_that_of_training_everything_and_below_it_is_none(base):
    model = open_model(str(base[0]))
    scorer = load_scorer(model, key="model.path")
    scorer["head"]["kernel"] = jnp.linspace(-1.0, 1.0, model.spec.width)
    rows = [np.random.default_rng(i).integers(3, 200, 9 + i).tolist() for i in range(4)]
    texts = reward_training.Texts(rows, [len(row) - 1 for row in rows], 16).rows(range(4))
    margins = jnp.asarray([0.5, 2.0])

    def gradients(first):
        objective = objective_of(model, first)
        parts = reward_training.split_scorer(scorer, objective)
        (loss, stats), found = jax.value_and_grad(
            lambda *parts: reward_training.pair_loss(*parts, texts, margins, objective=objective),
            argnums=(0, 1),
            has_aux=True,
        )(*parts)
        return float(loss), stats, found, reward_training.row_scores(*parts, texts, objective=objective)

    whole_loss, _, (whole, nothing), _ = gradients(None)
    loss, stats, (upper, lower), scores = gradients(1)
    assert nothing == {}
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(lower))
    kept = {"trunk": {name: whole["trunk"][name] for name in upper["trunk"]}, "head": whole["head"]}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max())), upper, kept
    )
    chosen, rejected = np.asarray(scores, np.float64).reshape(2, 2)
    preference = np.mean(np.logaddexp(0, np.asarray(margins) - (chosen - rejected)))
    centring = 0.1 * np.mean((chosen + rejected) ** 2)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert loss == pytest.approx(preference + centring, rel=1e-5)
    assert float(stats["train/preference_loss"]) == pytest.approx(preference, rel=1e-5)
    assert float(stats["train/centring_loss"]) == pytest.approx(centring, rel=1e-5)


def test_states_kept_in_memory_change_no_number_but_for_rounding(base, trained, tmp_path):
    changes = {"train__cache_states": False, "train__epochs": 1}
    result = reward_model.train(reward_model.build(settings(base, tmp_path / "run", **changes)))
    for row, kept in zip(result.metrics, trained[1].metrics, strict=False):
        for name in row.keys() - {"time/step_s"}:
            assert row[name] == pytest.approx(kept[name], abs=1e-4), name


def test_a_training_is_a_function_of_its_seed_and_pairs(base, tmp_path):
    lines = base[1].read_text().splitlines(keepends=True)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(lines[i] for i in np.random.default_rng(1).permutation(len(lines))))

    def weights(name, pairs=base[1], **changes):
        config = settings((base[0], pairs), tmp_path / name, train__epochs=1, **changes)
        result = reward_model.train(reward_model.build(config))
        return (result.model_directory / "model.safetensors").read_bytes()

    first = weights("first")
    assert weights("again", pairs=shuffled) == first
    assert weights("seed", run__seed=1) != first


def test_a_reward_model_can_be_trained_further(base, trained, tmp_path):
    _, result = trained
    config = settings((result.model_directory, base[1]), tmp_path / "run", train__epochs=1, train__learning_rate=1e-12)
    further = reward_model.train(reward_model.build(config))
    assert further.metrics[0]["train/preference_loss"] < 0.3
    assert further.evaluation["evaluation/score_mean"] == pytest.approx(
        result.evaluation["evaluation/score_mean"], abs=1e-5
    )


# ------------------------------------------------------------------------------------------------------ what is refused


def test_all_problems_of_a_configuration_are_reported_at_once(capsys):
    with pytest.raises(SystemExit) as caught:
        reward_model_main(
            ["--train.epoch", "3", "--train.batch_size", "0", "--data.evaluation_pair=3", "--kl.coef", "1"]
        )
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "5 problems in the configuration" in message
    for part in (
        "train.epoch: unknown key; did you mean train.epochs?",
        "train.batch_size: input should be greater than or equal to 1, got 0",
        "data.evaluation_pair: unknown key; did you mean data.evaluation_pairs?",
        "kl: unknown key",
        "data.path: a file or data set of preference pairs must be given",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.cache_states": True}, r"train\.cache_states \(True\) needs train\.layers"),
        (
            {"data.margin_field": "lead", "train.margin": 1.0},
            r"data\.margin_field \(lead\) and train\.margin \(1\) exclude each other",
        ),
        ({"train.center_coef": -1}, r"train\.center_coef: .*greater than or equal to 0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load(overrides={"data.path": "x.jsonl"} | overrides)


def test_what_is_printed_reads_back_as_the_same_configuration(capsys, tmp_path):
    reward_model_main(["--data.path", "x.jsonl", "--train.layers", "2", "--print_config"])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    config = load(tmp_path / "config.yaml")
    assert config == load(overrides={"data.path": "x.jsonl", "train.layers": 2})
    with pytest.raises(SystemExit) as caught:
        reward_model_main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for section, fields in RewardModelConfig().model_dump().items():
        for key in fields:
            assert f"--{section}.{key} " in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__layers": 3}, r"train\.layers \(3\) must be at most the 2 layers"),
        ({"data__max_tokens": 129}, r"data\.max_tokens \(129\) must be at most the 128 positions"),
        ({"data__path": "absent.jsonl"}, r"data\.path: absent\.jsonl .*is not a file"),
        (
            {"train__warmup_steps": 24},
            r"train\.warmup_steps \(24\) must be below the training's 24 optimizer steps .* 32 pairs",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(base, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        reward_model.build(settings(base, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_a_run_is_refused(base, trained):
    config, result = trained
    with pytest.raises(UserError, match=r"not empty; choose another$"):
        reward_model.build(config)
    assert (result.model_directory / "model.safetensors").is_file()


def test_a_token_outside_of_the_embedding_is_refused(base, tmp_path):
    model = open_model(str(base[0]))
    pairs = Pairs([[3, model.spec.vocab_size]], [[4]], [0.0], [("a",)], ["a"])
    with pytest.raises(UserError, match=f"token id {model.spec.vocab_size}, but the embedding has"):
        reward_model._check_tokens(settings(base, tmp_path), model, pairs)


def without_numbers(monkeypatch, *steps):
    """Some steps get a margin that is no number; returns the heads after every step."""
    heads = []

    def planted(trained, opt_state, frozen, rows, margins, step, **fixed):
        margins = jnp.full_like(margins, jnp.nan) if int(step) in steps else margins
        trained, opt_state, stats = reward_training.pair_step(trained, opt_state, frozen, rows, margins, step, **fixed)
        heads.append(np.asarray(trained["head"]["kernel"]))
        return trained, opt_state, stats

    monkeypatch.setattr(reward_model, "pair_step", planted)
    return heads


def test_a_skipped_step_costs_its_own_batch_alone_and_its_texts_are_kept(base, tmp_path, monkeypatch):
    heads = without_numbers(monkeypatch, 2, 3, 5)
    run = reward_model.build(settings(base, tmp_path / "run", train__epochs=2))
    result = reward_model.train(run)
    assert [row["step"] for row in result.metrics if row["update/skipped_steps"]] == [2, 3, 5]
    assert [np.array_equal(a, b) for a, b in itertools.pairwise(heads)] == [
        False,
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert np.isfinite(load_file(result.model_directory / "model.safetensors")["score.weight"]).all()
    kept = [json.loads(line) for line in (tmp_path / "run" / "skipped_pairs.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [2] * 8 + [3] * 8 + [5] * 8
    texts = {run.model.tokenizer.decode(row) for row in run.training.chosen}
    assert len({row["chosen"] for row in kept[:16]} & texts) == 16
    assert all(" bad" in row["rejected"] for row in kept)
    assert not (tmp_path / "run" / "unfinished_reward_model").exists()


def test_three_skipped_steps_in_a_row_end_the_training_and_what_was_learned_is_kept(base, tmp_path, monkeypatch):
    heads = without_numbers(monkeypatch, 1, 3, 4, 5)
    with pytest.raises(
        UserError, match=r"^step 5: no finite .*lower train\.learning_rate.* in .*/unfinished_reward_model$"
    ):
        reward_model.train(reward_model.build(settings(base, tmp_path / "run", train__epochs=2)))
    assert not (tmp_path / "run" / "reward_model").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(heads) == 6
    saved = load_file(tmp_path / "run" / "unfinished_reward_model" / "model.safetensors")["score.weight"]
    np.testing.assert_array_equal(saved[0], heads[2])
    assert np.any(saved)


def test_a_model_whose_scores_are_no_numbers_is_not_saved_as_a_finished_one(base, tmp_path, monkeypatch):
    monkeypatch.setattr(reward_model, "pair_scores", lambda *_: (np.array([0.5, np.nan]), np.zeros(2)))
    settings_of_one_step = {"train__epochs": 1, "train__batch_size": 32}
    with pytest.raises(UserError, match="the scores of the held-out pairs are not all finite"):
        reward_model.train(reward_model.build(settings(base, tmp_path / "run", **settings_of_one_step)))
    assert not (tmp_path / "run" / "reward_model").exists()


def test_a_plot_without_matplotlib_is_refused_at_the_start(base, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    with pytest.raises(UserError, match=r"monitor\.calibration_plot is set, but matplotlib is not installed"):
        reward_model.build(settings(base, tmp_path / "run", monitor__calibration_plot=True))


# ----------------------------------------------------------------------------------------------------------- the chain


def test_pairs_become_a_reward_model_that_scores_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    short = {"data.train_pairs": 32, "data.evaluation_pairs": 16, "train.epochs": 1, "train.learning_rate": 3e-3}
    config = load(
        "configs/reward_model_tiny.yaml", short | {"run.dir": str(tmp_path / "rm"), "monitor.tensorboard": False}
    )
    scorer = reward_model.train(reward_model.build(config))
    changes = SMALL | {"monitor.sample_every": 2, "run.dir": str(tmp_path / "run")}
    run = load_run("configs/reward_model.yaml", changes | {"reward.model": str(scorer.model_directory)})
    result = ppo_jax.fine_tune(run)
    samples = [json.loads(line) for line in (result.directory / "samples.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(scorer.model_directory)
    rows = [tokenizer(sample["prompt"] + sample["answer"])["input_ids"] for sample in samples]
    expected = logits_of(scorer.model_directory, rows)
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose([sample["score"] for sample in samples], expected, rtol=0, atol=1e-4)
    for row in result.metrics:  # the sentiment is watched and not counted
        assert row["score/mean"] == pytest.approx(row["score/model_mean"], abs=1e-5)
        assert row["score/vader_mean"] != 0
