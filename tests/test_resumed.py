"""What a run that goes on must find as it was, and how what differs is listed."""

import copy
import json
import re
from dataclasses import replace

import pytest
import yaml

from ppo_jax.config_file import load
from ppo_jax.errors import UserError
from ppo_jax.prompts import Prompts
from ppo_jax.resumed import load_resumed
from ppo_jax.run_directory import (
    check_unchanged,
    model_digest,
    prompts_digest,
    tokenizer_digest,
    write_description,
)

DIGESTS = {"reference": "aa", "tokenizer": "bb", "prompts": "cc"}


def describe(directory, config):
    digests = {f"{name}_digest": digest for name, digest in DIGESTS.items()}
    write_description(directory, config, digests | {"from_python": [], "config": config.model_dump(mode="json")})


@pytest.fixture
def begun(tmp_path):
    describe(tmp_path, load(overrides={"run.dir": str(tmp_path)}))
    return tmp_path


def edited(directory, section, key, value):
    file = directory / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config[section][key] = value
    file.write_text(yaml.safe_dump(config))


def test_what_was_edited_and_what_is_overridden_are_listed_together_and_allowed_one_by_one(begun):
    edited(begun, "kl", "coef", 0.3)
    overrides = {"update.learning_rate": 1e-5, "run.iterations": 99, "rollout.batch_size": 64}
    with pytest.raises(UserError, match=r"--allow_change") as refused:
        load_resumed(begun, overrides)
    assert [line for line in str(refused.value).splitlines() if line.startswith("  ")] == [
        "  kl.coef: 0.05 -> 0.3",
        "  update.learning_rate: 0.0002 -> 1e-05",
    ]
    with pytest.raises(UserError, match=r"computes:\n  update\.learning_rate: 0\.0002 -> 1e-05\nAllow"):
        load_resumed(begun, overrides, allowed=["kl.coef"])
    config = load_resumed(begun, overrides, allowed=["kl.coef", "update.learning_rate"])
    assert (config.kl.coef, config.update.learning_rate, config.run.iterations) == (0.3, 1e-5, 99)


def test_a_directory_may_move_and_what_does_not_alter_the_meaning_may_change(begun, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "run"
    begun.rename(elsewhere)
    config = load_resumed(elsewhere, {"checkpoint.keep": 9, "mesh.fsdp": 2, "run.max_wall_clock_s": 5.0})
    assert config.run.dir == str(elsewhere)
    assert config.checkpoint.keep == 9


def test_a_schedule_that_ends_with_the_run_is_bent_only_by_name(tmp_path):
    describe(tmp_path, load(overrides={"update.schedule": "linear"}))
    with pytest.raises(UserError, match="linear schedule"):
        load_resumed(tmp_path, {"run.iterations": 99})
    assert load_resumed(tmp_path, {"run.iterations": 30}).run.iterations == 30
    assert load_resumed(tmp_path, {"run.iterations": 99}, allowed=["run.iterations"]).run.iterations == 99


@pytest.mark.parametrize("text", ["{", "[]", '{"config": 3}', '{"config": {"run": 3}}'])
def test_a_damaged_description_is_named(begun, text):
    (begun / "versions.json").write_text(text)
    with pytest.raises(UserError, match=r"versions\.json is damaged"):
        load_resumed(begun, {})


def test_a_run_that_was_killed_while_it_began_is_compared_with_its_configuration(begun):
    (begun / "versions.json").unlink()
    assert load_resumed(begun, {}).kl.coef == 0.05
    with pytest.raises(UserError, match=r"kl\.coef: 0\.05 -> 1\.0"):
        load_resumed(begun, {"kl.coef": 1.0})


def test_another_model_tokenizer_or_other_prompts_are_all_named_and_allowed_by_name(begun):
    check_unchanged(begun, DIGESTS, ())
    check_unchanged(begun, DIGESTS | {"held_out": "not known of an older run"}, ())
    others = {"reference": "aa", "tokenizer": "xx", "prompts": "yy"}
    with pytest.raises(UserError, match=r"(?s)tokenizer: .*digest xx, expected bb.*prompts: .*yy, expected cc"):
        check_unchanged(begun, others, ())
    with pytest.raises(UserError, match=r"needs:\n  prompts: "):
        check_unchanged(begun, others, ["tokenizer"])
    check_unchanged(begun, others, ["tokenizer", "prompts"])
    with pytest.raises(UserError, match="the reference would change"):
        check_unchanged(begun, DIGESTS | {"reference": "xx"}, ["prompts"])


def test_what_is_read_of_a_models_configuration_changes_its_digest(tiny):
    """With the same weights another θ computes something else, and another EOS ends elsewhere."""
    spec = tiny.model.spec

    def scaled(by):
        return replace(spec, layers=tuple(replace(x, attention_scale=by * x.attention_scale) for x in spec.layers))

    other, same = scaled(1.01), scaled(1 + 2**-52)
    digests = [model_digest(*read) for read in ((spec, [1]), (spec, [1, 5]), (other, [1]), (same, [1]))]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]
    assert not re.search("0x|numpy|array", repr(spec))  # no address, and nothing that is printed in part


def test_every_difference_of_prompts_changes_their_digest():
    prompts = Prompts(["a b", "c"], [[1, 2], [3]], 0, {"answer": [1, None]})
    same = Prompts(["a b", "c"], [[1, 2], [3]], 7, {"answer": [1, None]})
    assert prompts_digest(prompts) == prompts_digest(same)
    others = [
        replace(prompts, texts=["a ", "bc"]),
        replace(prompts, encoded=[[1], [2, 3]]),
        replace(prompts, encoded=[[12], [3]]),
        replace(prompts, columns={"answer": [None, 1]}),
        replace(prompts, columns={"reference": [1, None]}),
        prompts.at([1, 0]),
        prompts.at([0]),
    ]
    assert len({prompts_digest(other) for other in [prompts, *others]}) == len(others) + 1


def test_every_difference_of_a_tokenizer_changes_its_digest(tiny):
    tokenizer = tiny.model.tokenizer
    templated, ended, larger = (copy.deepcopy(tokenizer) for _ in range(3))
    templated.chat_template = "{{ messages }}"
    ended.eos_token = "<pad>"
    larger.add_tokens(["<new>"])
    assert tokenizer_digest(copy.deepcopy(tokenizer)) == tokenizer_digest(tokenizer)
    assert len({tokenizer_digest(one) for one in (tokenizer, templated, ended, larger)}) == 4


def test_the_description_says_what_the_run_was_started_with(begun):
    described = json.loads((begun / "versions.json").read_text())
    assert described["config"]["kl"]["coef"] == 0.05
    assert {f"{name}_digest": digest for name, digest in DIGESTS.items()}.items() <= described.items()
