"""Answers into a file: what they depend on, what a kill leaves, and whose file is never touched."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_jax import answer_file, cli, generate_config, rollout
from ppo_jax.config import Config
from ppo_jax.errors import UserError
from ppo_jax.generate import generate, sampling, uniforms
from ppo_jax.ops.sampling import sample_tokens
from tests.tiny import PROMPTS

NEW = 10


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture(scope="module")
def answers(tiny_model, prompts_file, tmp_path_factory):
    """A function that answers the tiny prompts and gives the file; by default 2 at a time, in a new file."""

    def run(out=None, *, scored=False, **changes):
        out = tmp_path_factory.mktemp("answers") / "answers.jsonl" if out is None else out
        settings = {"rollout__batch_size": 2, "rollout__max_new_tokens": NEW} | changes
        overrides = {"model.path": str(tiny_model), "prompts.path": str(prompts_file)}
        overrides |= {key.replace("__", "."): value for key, value in settings.items()}
        generate(generate_config.load(None, overrides, scored=scored), out, scored=scored)
        return out

    return run


@pytest.fixture(scope="module")
def whole(answers):
    """The file of an unbroken run."""
    return answers()


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def lengths(prompts, answers):
    return [float(len(answer)) for answer in answers]


def test_every_prompt_is_answered_in_order_and_the_answer_is_the_text_of_its_tokens(whole, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    written = rows(whole)
    assert [(row["index"], row["prompt"]) for row in written] == list(enumerate(PROMPTS))
    for row in written:
        assert row["answer"] == tokenizer.decode(row["tokens"], skip_special_tokens=True)
        ended = row["tokens"][-1] == tokenizer.eos_token_id
        assert row["finish_reason"] == ("eos" if ended else "truncated")
        assert ended or len(row["tokens"]) == NEW
        assert tokenizer.eos_token_id not in row["tokens"][:-1]


def log_distributions(tiny_model, row, temperature):
    """[T, V] of transformers, for the tokens of a row."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompt = tokenizer(row["prompt"])["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + row["tokens"]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1).numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_logprob_is_the_sum_over_the_answer_under_the_whole_scaled_policy(answers, whole, tiny_model, temperature):
    file = whole if temperature == 1.0 else answers(rollout__temperature=temperature, rollout__top_k=20)
    for row in rows(file):
        log_probs = log_distributions(tiny_model, row, temperature)
        expected = log_probs[np.arange(len(row["tokens"])), row["tokens"]].sum()
        assert row["logprob"] == pytest.approx(expected, abs=2e-4)


def test_temperature_zero_takes_the_tokens_that_transformers_takes(answers, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    written = rows(answers(rollout__temperature=0, run__seed=3, rollout__top_p=0.5))
    for row in written:
        inputs = tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)
        outputs = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
        assert row["tokens"] == outputs[0, inputs["input_ids"].shape[1] :].tolist()
        log_probs = log_distributions(tiny_model, row, 1.0)
        assert row["logprob"] == pytest.approx(log_probs.max(axis=-1).sum(), abs=2e-4)


def test_greedy_takes_the_first_of_equally_likely_tokens():
    config = generate_config.load(None, {"rollout.temperature": 0}, scored=False)
    cuts = {name: getattr(sampling(config), name) for name in ("temperature", "top_p", "top_k")}
    logits = jnp.asarray([[0.0, 2.0, 2.0, 1.0, 2.0]] * 64)
    noise = uniforms(config, jnp.arange(64))
    assert sample_tokens(noise[:, 0], logits, **cuts).tolist() == [1] * 64


def test_the_size_of_a_batch_never_changes_an_answer(answers, whole):
    expected = rows(whole)
    written = rows(answers(rollout__batch_size=4))  # 2 batches, the second one filled up
    # Batches of another shape add in another order.
    assert [row.pop("logprob") for row in written] == pytest.approx([row["logprob"] for row in expected], abs=1e-4)
    assert written == [{name: value for name, value in row.items() if name != "logprob"} for row in expected]


def test_a_seed_and_nothing_else_changes_the_noise(answers, whole):
    assert answers().read_bytes() == whole.read_bytes()
    other = rows(answers(run__seed=1))
    assert all(ours["tokens"] != theirs["tokens"] for ours, theirs in zip(other, rows(whole), strict=True))


def test_wherever_a_file_was_cut_off_it_is_continued_to_the_bytes_of_an_unbroken_one(answers, whole):
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    # Nothing, within the first line, at the end of a line that ends no batch, around the middle, the last byte.
    for cut in (0, 5, ends[0], ends[2] - 1, ends[2], ends[2] + 1, ends[3], len(data) - 1, len(data)):
        out = answers()
        out.write_bytes(data[:cut])
        answers(out)
        assert out.read_bytes() == data, cut


@pytest.mark.parametrize(
    "changes", [{"rollout__batch_size": 4}, {"rollout__halvings": 1}, {"rollout__reuse_states": True}]
)
def test_a_continued_file_may_be_computed_in_another_way(answers, whole, changes):
    data = whole.read_bytes()
    out = answers()
    out.write_bytes(data[: data.index(b"\n") + 1])
    with mock.patch.object(rollout, "generate", wraps=rollout.generate) as made:
        answers(out, **changes)
    assert made.call_args.kwargs["halvings"] == changes.get("rollout__halvings", 0)
    assert [row["tokens"] for row in rows(out)] == [row["tokens"] for row in rows(whole)]


def test_the_first_answer_to_a_prompt_is_the_same_however_many_are_asked_for(answers, whole):
    written = rows(answers(rollout__batch_size=6, rollout__answers_per_prompt=3))
    assert [row["prompt"] for row in written] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert [row["tokens"] for row in written[::3]] == [row["tokens"] for row in rows(whole)]
    assert all(len({str(row["tokens"]) for row in written[i : i + 3]}) == 3 for i in range(0, len(written), 3))


def test_a_score_is_that_of_the_reward_section_for_its_own_answer(answers, whole):
    written = rows(
        answers(scored=True, reward__function="tests.test_generate:lengths", reward__weights={"function": 2})
    )
    assert [row["score"] for row in written] == [2.0 * len(row["answer"]) for row in written]
    assert [row["tokens"] for row in written] == [row["tokens"] for row in rows(whole)]


DIES = """
import os, signal
batches = []
def score(prompts, answers):
    batches.append(prompts)
    if len(batches) == 3 and "DIES" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(answer)) for answer in answers]
"""


def test_a_killed_command_is_continued_by_the_same_command(tiny_model, prompts_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "dying_reward.py").write_text(DIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = [
        *("--rollout.batch_size", "2", str(tiny_model), "--prompts", str(prompts_file), "--out", "answers.jsonl"),
        *("--reward", "--reward.function", "dying_reward:score", "--rollout.max_new_tokens", str(NEW)),
    ]
    # Compiled as in this process: other optimisations add in another order.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    killed = subprocess.run(
        [sys.executable, "-m", "ppo_jax.generate", *command], env=environment | {"DIES": "yes"}, timeout=1800
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(rows(tmp_path / "answers.jsonl")) == 4
    cli.generate_main(command)
    assert capsys.readouterr().out == "6 answers are in answers.jsonl, 4 of them from before.\n"
    (tmp_path / "answers.jsonl").rename(tmp_path / "continued.jsonl")
    cli.generate_main(command)
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "continued.jsonl").read_bytes()


@pytest.mark.parametrize("content", ["", "mine\n"])
def test_a_file_of_somebody_else_is_refused_and_stays(answers, tmp_path, content):
    out, settings = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.settings.json"
    out.write_text(content)
    settings.write_text("{}") if not content else None
    with pytest.raises(UserError, match=r"answers\.jsonl is there already, without settings of this command"):
        answers(out)
    assert out.read_text() == content
    assert not settings.exists() or settings.read_text() == "{}"


def test_answers_of_other_settings_are_refused_by_name_and_stay(answers, whole, prompts_file):
    before, settings = whole.read_bytes(), whole.with_name("answers.jsonl.settings.json").read_bytes()
    with pytest.raises(UserError, match=r"rollout\.top_p: 1\.0 there, 0\.5 now\n  rollout\.top_k: 0 there, 7 now$"):
        answers(whole, rollout__top_p=0.5, rollout__top_k=7)
    with pytest.raises(UserError, match=r"reward\.function: None there, '.*vader_compound' now"):
        answers(whole, scored=True)
    text = prompts_file.read_text()
    prompts_file.write_text(text + "\nnight")
    try:
        with pytest.raises(UserError, match=r"prompts: '[0-9a-f]{16}' there"):
            answers(whole)
    finally:
        prompts_file.write_text(text)
    assert whole.read_bytes() == before
    assert whole.with_name("answers.jsonl.settings.json").read_bytes() == settings


def test_another_model_in_the_same_place_is_refused(answers, tiny_model):
    out = answers()
    weights = tiny_model / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        with pytest.raises(UserError, match=r"model: '[0-9a-f]{64}' there"):
            answers(out)
    finally:
        weights.write_bytes(data)


def test_another_tokenizer_in_the_same_place_is_refused_whichever_of_its_files_changed(answers, whole, tiny_model):
    template = tiny_model / "chat_template.jinja"
    assert not template.exists()
    template.write_text("{{ messages }}")
    try:
        with pytest.raises(UserError, match=r"Different are:\n  tokenizer: '[0-9a-f]{16}' there, '[0-9a-f]{16}' now$"):
            answers(whole)
    finally:
        template.unlink()


def references(prompts, answers, columns):
    return [float(reference) for reference in columns["reference"]]


def test_a_scored_file_is_continued_with_the_columns_it_was_scored_with_alone(answers, tmp_path):
    """The prompts are the same texts: only what the reward is told of them is another."""
    file, scored = tmp_path / "prompts.jsonl", {"reward__function": "tests.test_generate:references", "scored": True}

    def write(reference):
        rows = [{"prompt": prompt, "reference": reference + i} for i, prompt in enumerate(PROMPTS)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(0)
    out = answers(prompts__path=str(file), **scored)
    assert [row["score"] for row in rows(out)] == list(range(len(PROMPTS)))
    out.write_bytes(out.read_bytes().split(b"\n")[0] + b"\n")
    write(7)
    with pytest.raises(UserError, match=r"Different are:\n  prompts: '[0-9a-f]{16}' there, '[0-9a-f]{16}' now$"):
        answers(out, prompts__path=str(file), **scored)


def test_two_writers_never_share_a_file(answers, whole):
    before = whole.read_bytes()
    with whole.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process writes to"):
            answers(whole)
    answers(whole)
    assert whole.read_bytes() == before


@pytest.mark.parametrize("damage", [b"{}\n", b'{"index": 7}\n', b"\x00\x00\n", b"[1]\n"])
def test_a_damaged_line_is_named_and_nothing_is_written_behind_it(answers, whole, damage):
    out = answers()
    first = whole.read_bytes().split(b"\n")[0] + b"\n"
    out.write_bytes(first + damage)
    with pytest.raises(UserError, match=r"answers\.jsonl:2 is damaged"):
        answers(out)
    assert out.read_bytes() == first + damage


def test_rows_are_on_the_disk_when_append_returns(tmp_path):
    with answer_file.AnswerFile(tmp_path / "rows.jsonl", {"a": 1}) as file:
        file.append([{"text": "ä\u2028"}])
        file.append([{"text": ""}, {"text": "\ud800"}])
        written = (tmp_path / "rows.jsonl").read_bytes()
    assert [json.loads(line) for line in written.split(b"\n")[:-1]] == [
        {"index": 0, "text": "ä\u2028"}, {"index": 1, "text": ""}, {"index": 2, "text": "\ud800"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "scored", "message"),
    [
        ({"update.epochs": 2, "kl.coef": 0.1}, False, "update.epochs, kl.coef: only training reads this"),
        ({"reward.clip": 2.0}, True, "reward.clip: only training reads this"),
        ({"reward.url": "http://x"}, False, "reward.url: has no use without --reward"),
        ({"rollout.temperature": 0, "rollout.answers_per_prompt": 4}, False, "times the same answer"),
        ({"rollout.temperature": -1}, False, "rollout.temperature: input should be greater than or equal to 0"),
        ({"rollout.batch_size": 10, "rollout.answers_per_prompt": 4}, False, "must be divisible by"),
        ({"rollout.temprature": 1}, False, "did you mean rollout.temperature"),
    ],
)
def test_what_generating_does_not_read_or_cannot_do_is_refused(overrides, scored, message):
    with pytest.raises(UserError, match=message):
        generate_config.load(None, overrides, scored=scored)


def test_the_configuration_of_a_run_answers_as_the_run_does(tmp_path):
    file = tmp_path / "config.yaml"
    settings = {"critic": {"kind": "model", "path": "gone"}, "rollout": {"top_k": 9}, "monitor": {"evaluate_every": 2}}
    file.write_text(yaml.safe_dump(Config().model_dump(mode="json") | settings))
    config = generate_config.load(file, {"rollout.batch_size": 10}, scored=False)
    assert (config.rollout.top_k, config.rollout.batch_size, config.critic.kind) == (9, 10, "none")
