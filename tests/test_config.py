"""Every problem of a configuration is reported at once, by name, and nothing that was asked for is dropped."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ppo_jax import config as configuration
from ppo_jax import reward_model_config
from ppo_jax.cli import help_text, parse_overrides
from ppo_jax.config import Config, known_keys
from ppo_jax.config_file import load
from ppo_jax.errors import UserError
from ppo_jax.misfits import warnings_of


@pytest.fixture
def refused(tmp_path):
    """The message of the error that a YAML text, with overrides, is refused with."""

    def message(text, overrides=None):
        with pytest.raises(UserError) as caught:
            load(written(tmp_path, text), overrides)
        return str(caught.value)

    return message


def written(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


# ---------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("text", ["", "# nothing\n", "update:\n", "update: {}\n", "update:\nrun:\n"])
def test_an_empty_file_or_section_is_the_defaults(tmp_path, text):
    assert load(written(tmp_path, text)) == Config()


def test_a_file_sets_what_it_names_and_overrides_win(tmp_path):
    file = written(tmp_path, 'update:\n  epochs: 3\n  learning_rate: 1.0e-5\nrollout:\n  stop_strings: ["\\n\\n"]\n')
    config = load(file, {"update.epochs": 1, "kl.coef": 0.2})
    assert config.update.epochs == 1
    assert config.update.learning_rate == 1e-5
    assert config.rollout.stop_strings == ("\n\n",)
    assert config.kl.coef == 0.2
    assert config.update.minibatch_size == Config().update.minibatch_size


def test_a_whole_section_can_be_given_as_one_override():
    assert load(None, {"update": {"epochs": 3}}).update.epochs == 3


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "0.000001", "1.0e-6"])
def test_a_number_without_a_point_in_front_of_its_exponent_is_a_float(tmp_path, text):
    # YAML 1.1 reads 1e-6 as a string.
    assert load(written(tmp_path, f"update:\n  learning_rate: {text}\n")).update.learning_rate == 1e-6
    assert load(None, parse_overrides(["--update.learning_rate", text])).update.learning_rate == 1e-6


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {
            "update.max_grad_norm": None,
            "update.adam_eps": 1e-12,
            "rollout.stop_strings": ["\n", "é: [", "null", "1e3", " "],
            "monitor.fixed_prompts": ["yes", "'\""],
            "run.dir": "2024-01-01",
        },
    ],
)
def test_what_is_written_reads_back_as_the_same_config(tmp_path, overrides):
    config = load(None, overrides)
    assert load(written(tmp_path, config.to_yaml())) == config


def test_the_written_file_names_every_field():
    assert {f"{s}.{k}" for s, keys in yaml.safe_load(Config().to_yaml()).items() for k in keys} == {
        key for key, _ in known_keys()
    }


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        Config().update.epochs = 3
    with pytest.raises(ValidationError, match="frozen"):
        Config().update = None


def test_the_micro_batch_is_the_minibatch_unless_given():
    assert load(None, {"update.minibatch_size": 16}).micro_batch_size == 16
    assert load(None, {"update.minibatch_size": 16, "update.micro_batch_size": 4}).micro_batch_size == 4


def test_optimizer_steps_are_epochs_times_minibatches():
    config = load(None, {"rollout.batch_size": 24, "update.minibatch_size": 8, "update.epochs": 3})
    assert config.optimizer_steps_per_iteration == 9


# ---------------------------------------------------------------------------- what is refused


def test_every_problem_is_reported_at_once_types_unknown_keys_and_misfits(refused):
    message = refused(
        "rollout: {batch_size: 30, max_new_tokens: 0}\n"
        "update: {minibatch_size: 8, epochs: many, learning_rat: 1}\n"
        "optimiser: {}\n"
    )
    assert message.startswith("5 problems in the configuration")
    assert "config.yaml" in message
    for part in (
        "rollout.max_new_tokens: input should be greater than or equal to 1, got 0",
        "update.epochs: input should be a valid integer",
        "got 'many'",
        "update.learning_rat: unknown key; did you mean update.learning_rate?",
        "optimiser: unknown key",
        "rollout.batch_size (30) must be divisible by update.minibatch_size (8); nearest are 24 and 32",
    ):
        assert part in message
    assert len(message.splitlines()) == 6


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("update: {minibatch_siz: 8}", "update.minibatch_size"),
        ("minibatch_size: 8", "update.minibatch_size"),
        ("updates: {epochs: 8}", "update"),
        ("run: {top_p: 0.9}", "rollout.top_p"),
        ("model: {paht: x}", "model.path"),
        ("prompts: {paht: x}", "prompts.path"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(refused, text, nearest):
    assert f"did you mean {nearest}?" in refused(text)


def test_a_key_that_is_near_to_nothing_points_at_the_help(refused):
    message = refused("update: {zzz: 8}")
    assert "update.zzz: unknown key; --help lists the known ones" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("text", ["update: 5", "update: [1]", "update: epochs"])
def test_a_section_that_is_a_value_is_refused_and_no_override_hides_it(refused, text):
    assert "update: input should be a valid dictionary" in refused(text)
    assert "update: input should be a valid dictionary" in refused(text, {"update.epochs": 3})


def test_a_broken_section_causes_no_second_message_about_its_defaults(refused):
    assert refused("update: 5\nrollout: {batch_size: 30}").startswith("1 problem ")


@pytest.mark.parametrize("text", ["- update", "update", "3"])
def test_a_file_that_holds_no_sections_is_refused(refused, text):
    assert "must hold sections of keys" in refused(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("update: {epochs: [1, 2", "line 1"),
        ("\tupdate:", "line 1"),
        ("!!python/object/apply:os.getcwd []", "python/object"),
        ("update:\n  epochs: 3\nrun:\nupdate:\n  clip_eps: 0.1", "'update' is given twice"),
        ("update:\n  epochs: 3\n  epochs: 4", "'epochs' is given twice"),
    ],
)
def test_broken_yaml_says_where_and_keys_given_twice_are_broken(refused, text, part):
    message = refused(text)
    assert "config.yaml is not valid YAML" in message
    assert part in message


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"run: {dir: caf\xe9}")
    with pytest.raises(UserError, match=r"latin\.yaml is not valid YAML"):
        load(file)


def test_a_missing_file_or_a_directory_is_named_as_given_and_as_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load("absent.yaml")
    assert "absent.yaml" in str(caught.value)
    assert str(tmp_path / "absent.yaml") in str(caught.value)
    with pytest.raises(UserError, match="is not a file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("update.epochs", 0),
        ("update.epochs", 2.5),
        ("update.epochs", True),
        ("update.learning_rate", True),
        ("update.learning_rate", 0),
        ("update.learning_rate", float("nan")),
        ("update.learning_rate", float("inf")),
        ("update.adam_b1", 1.0),
        ("update.adam_b2", 1),
        ("update.adam_eps", 0),
        ("update.schedule", "warm"),
        ("rollout.temperature", 0),
        ("rollout.top_p", 1.01),
        ("rollout.top_p", float("nan")),
        ("rollout.top_k", -1),
        ("rollout.stop_strings", "abc"),
        ("rollout.stop_strings", [""]),
        ("rollout.stop_strings", [1]),
        ("kl.coef", -0.1),
        ("kl.form", "k3"),
        ("kl.horizon", 0.5),
        ("kl.target_nats", 0),
        ("advantage.gae_lambda", 1.1),
        ("advantage.discount", 0),
        ("update.dual_clip", 1.0),
        ("update.importance_cap", 0.9),
        ("update.max_approx_kl_nats", 0),
        ("reward.clip", 0),
        ("run.seed", -1),
        ("run.seed", 2**32),
        ("run.seed", False),
        ("model.path", ""),
        ("model.path", 5),
        ("model.compute_dtype", "float16"),
        ("monitor.tensorboard", "perhaps"),
    ],
)
def test_a_value_out_of_its_range_or_type_is_refused_with_key_and_value(key, value):
    with pytest.raises(UserError) as caught:
        load(None, {key: value})
    assert f"{key}: " in str(caught.value)
    assert repr(value[0] if isinstance(value, list) else value) in str(caught.value)
    assert "[overrides]" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"update.minibatch_size": 48},
            "rollout.batch_size (64) must be divisible by update.minibatch_size (48); nearest are 48 and 96",
        ),
        (
            {"update.minibatch_size": 128},
            "rollout.batch_size (64) must be divisible by update.minibatch_size (128); the nearest is 128",
        ),
        (
            {"update.micro_batch_size": 5},
            "update.minibatch_size (32) must be divisible by update.micro_batch_size (5); nearest are 30 and 35",
        ),
        (
            {"rollout.answers_per_prompt": 3},
            "rollout.batch_size (64) must be divisible by rollout.answers_per_prompt (3); nearest are 63 and 66",
        ),
        ({"lora.path": "adapter", "lora.rank": 8}, "lora.rank (8) cannot be chosen with lora.path"),
        ({"lora.path": "adapter", "lora.targets": ["q_proj"]}, "lora.targets (('q_proj',)) cannot be chosen with"),
        ({"lora.alpha": 16}, "lora.alpha (16.0) has no use without lora.rank"),
        ({"advantage.gae_lambda": 0.5}, "advantage.gae_lambda (0.5) has no use without critic.kind"),
        ({"advantage.discount": 0.9}, "advantage.discount (0.9) has no use without critic.kind"),
        ({"critic.warmup_iterations": 3}, "critic.warmup_iterations (3) has no use without critic.kind"),
        ({"critic.bootstrap_truncated": True}, "critic.bootstrap_truncated (True) has no use without critic.kind"),
        *(
            ({"rollout.reuse_states": True} | other, f"rollout.reuse_states does not go with {next(iter(other))}")
            for other in (
                {"model.compute_dtype": "bfloat16"},
                {"update.importance_cap": 2.0},
                {"critic.bootstrap_truncated": True, "critic.kind": "value_head", "advantage.estimator": "gae"},
            )
        ),
        ({"critic.clip_eps": 0.2}, "critic.clip_eps (0.2) has no use without critic.kind"),
        ({"kl.horizon": 7.0}, "kl.horizon (7.0) has no use without kl.target_nats"),
        ({"reward.retries": 7}, "reward.retries (7) has no use without reward.url"),
        ({"reward.timeout_s": 7.0}, "reward.timeout_s (7.0) has no use without reward.url"),
        ({"reward.model_batch_size": 7}, "reward.model_batch_size (7) has no use without reward.model"),
        ({"checkpoint.keep_best": True}, "checkpoint.keep_best (True) has no use without checkpoint.save_every"),
        ({"kl.target_nats": 6.0, "kl.coef": 0.0}, "a factor of 0 is 0"),
        ({"lora.targets": ["q_proj"]}, "lora.targets (('q_proj',)) has no use without lora.rank"),
        ({"rollout.min_new_tokens": 49}, "rollout.min_new_tokens (49) must be at most rollout.max_new_tokens (48)"),
        ({"rollout.batch_size": 1, "update.minibatch_size": 1}, "a single answer has advantage 0"),
        ({"kl.form": "exact"}, "advantage.estimator (batch_mean) must be one of leave_one_out, leave_one_out_to_go, "),
        *(
            (
                {"kl.form": "exact", "advantage.estimator": estimator, "rollout.answers_per_prompt": 4}
                | ({"critic.kind": "value_head"} if "gae" in estimator else {}),
                f"advantage.estimator ({estimator}) must be one of",
            )
            for estimator in ("whitened_batch_mean", "group_mean", "group_normalised", "whitened_gae")
        ),
        (
            {"kl.per": "token", "kl.form": "exact", "advantage.estimator": "leave_one_out"},
            "kl.per (token) is for kl.form",
        ),
        *(
            ({"advantage.estimator": estimator}, "rollout.answers_per_prompt is 1: every advantage would be 0")
            for estimator in (
                "group_mean",
                "group_normalised",
                "group_leave_one_out",
                "group_leave_one_out_to_go",
            )
        ),
        (
            {"kl.per": "token", "advantage.estimator": "leave_one_out_to_go"},
            "kl.per (token) needs an advantage of whole answers, not leave_one_out_to_go",
        ),
        ({"advantage.estimator": "gae"}, "advantage.estimator (gae) needs a critic: set critic.kind"),
        ({"critic.kind": "model"}, "advantage.estimator (batch_mean) reads no values"),
        ({"critic.path": "x"}, "critic.path is for critic.kind model, which is none"),
        (
            {"critic.kind": "model", "advantage.estimator": "gae", "critic.warmup_iterations": 5, "run.iterations": 5},
            "critic.warmup_iterations (5) must be below run.iterations (5)",
        ),
        ({"reward.min_tokens": 3}, "reward.too_short_penalty (0) and reward.min_tokens (3) need each other"),
        ({"reward.too_long_penalty": 1.5}, "reward.too_long_penalty (1.5) and reward.soft_max_tokens (None) need each"),
        (
            {"reward.too_long_penalty": 1, "reward.soft_max_tokens": 48},
            "reward.soft_max_tokens (48) must be below rollout.max_new_tokens (48)",
        ),
        (
            {"update.warmup_steps": 8, "run.iterations": 2},
            "update.warmup_steps (8) must be below the run's 8 optimizer steps",
        ),
    ],
)
def test_fields_that_do_not_fit_together_are_refused_with_both_numbers_and_both_names(overrides, expected):
    with pytest.raises(UserError) as caught:
        load(None, overrides)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("1 problem ")


# ---------------------------------------------------------------------------- warnings and help


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"update.epochs": 5}, "update.epochs is 5"),
        ({"update.max_grad_norm": None}, "not clipped"),
        ({"rollout.temperature": 0.2}, "rollout.temperature is 0.2"),
        ({"rollout.top_p": 0.9}, "rollout/kept_mass"),
        ({"rollout.top_k": 5}, "rollout/kept_mass"),
        ({"kl.coef": 0}, "kl.coef is 0"),
        ({"update.normaliser": "token_mean"}, "answers weigh by their length"),
        ({"update.clip_eps": 1.0}, "update.clip_eps is 1.0"),
    ],
)
def test_what_is_allowed_but_unwise_is_said_and_only_that(overrides, part):
    (warning,) = warnings_of(load(None, overrides))
    assert part in warning


def test_the_defaults_warn_of_nothing():
    assert warnings_of(Config()) == []


def test_the_help_lists_every_field_with_type_default_and_meaning():
    lines = help_text().splitlines()
    keys = list(known_keys())
    assert len(keys) == len({key for key, _ in keys}) > 30
    for key, field in keys:
        (at,) = [i for i, line in enumerate(lines) if line.strip().startswith(f"--{key} ")]
        assert field.description
        assert field.description in lines[at + 1]
    for line in (
        "--update.learning_rate float  [0.0002]",
        "--update.micro_batch_size int|null  [null]",
        "--update.schedule constant|linear|cosine  [constant]",
        "--rollout.stop_strings [TEXT, ...]  [[]]",
        "--run.dir str|null  [null]",
        "--update.remat bool  [false]",
    ):
        assert f"  {line}" in lines


# ---------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--a.b", "3"], {"a.b": 3}),
        (["--a.b=3"], {"a.b": 3}),
        (["--a.b", "-3"], {"a.b": -3}),
        (["--a.b", "null"], {"a.b": None}),
        (["--a.b", "true"], {"a.b": True}),
        (["--a.b", "[x, '1', 2]"], {"a.b": ["x", "1", 2]}),
        (["--a.b", "x=y"], {"a.b": "x=y"}),
        (["--a.b=x=y"], {"a.b": "x=y"}),
        (["--a.b", "[unclosed"], {"a.b": "[unclosed"}),
        (["--a.b", "module:function"], {"a.b": "module:function"}),
        (["--a.b", "1", "--c.d", "2"], {"a.b": 1, "c.d": 2}),
        ([], {}),
    ],
)
def test_overrides_are_yaml_values(words, expected):
    assert parse_overrides(words) == expected


@pytest.mark.parametrize(
    ("words", "named"),
    [(["a.b", "3"], "'a.b'"), (["--epochs", "3"], "'--epochs'"), (["--a.b"], "--a.b"), (["--a.b", "1", "2"], "'2'")],
)
def test_words_that_are_no_override_are_refused(words, named):
    with pytest.raises(UserError, match=named):
        parse_overrides(words)


def test_every_field_is_read_somewhere_outside_of_the_config():
    # A field that nothing reads is a bug.
    root = Path(configuration.__file__).parent
    text = "\n".join(file.read_text() for file in root.rglob("*.py") if not file.name.startswith("config"))
    own = (root / "config.py").read_text()
    unread = [
        key
        for key, _ in known_keys()
        if not any(f"{end}.{key.rpartition('.')[2]}" in text for end in (key.partition(".")[0], "config", "update"))
        and f"self.{key}" not in own
    ]
    assert unread == []


@pytest.mark.parametrize("file", sorted(Path("configs").rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config_is_valid_and_its_header_says_how_to_run_it(file):
    header = file.read_text(encoding="utf-8")
    trains_a_reward_model = f"Run:      .venv/bin/python -m ppo_jax.reward_model --config {file}" in header
    of_command = reward_model_config.load if trains_a_reward_model else load
    config = of_command(file, {"data.path": "FILE"} if trains_a_reward_model and "--data.path FILE" in header else {})
    assert of_command(overrides=yaml.safe_load(config.to_yaml())) == config
    assert all(f"\n# {word}:" in header for word in ("Hardware", "Run"))
    assert str(file) in header or file.stem == "tiny_reviews"
