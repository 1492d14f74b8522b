"""Preference pairs: what a row means, what is refused, what is held out, and where long ones are cut."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.config import PromptsConfig, RewardConfig
from ppo_jax.errors import UserError
from ppo_jax.pairs import Pair, cut_alike, encode, load_pairs, load_split, messages_of, read_pair
from ppo_jax.prompt_forms import read_prompt
from ppo_jax.reward_model_config import DataConfig
from ppo_jax.rewards.classifier import RewardModel
from scripts import dialogue_prompts
from tests.tiny import make_tokenizer

HEAD = "\n\nHuman: is it good?\n\nAssistant: what?\n\nHuman: the soup\n\nAssistant:"
DEFAULT = DataConfig()
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rows_of(count, **columns):
    return [{"prompt": f"soup {i}:", "chosen": f" good {i}", "rejected": f" bad {i}", **columns} for i in range(count)]


@pytest.fixture
def write(tmp_path):
    def written(rows, name="pairs.jsonl"):
        file = tmp_path / name
        data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
        file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(file)

    return written


def loaded(path, tokenizer, **settings):
    return load_pairs(DataConfig(**settings), tokenizer, path=path, split="train", key="data.path")


# ------------------------------------------------------------------------------------------------------ what a row is


def test_a_dialogue_is_its_prompt_up_to_the_last_answer():
    pair = read_pair({"chosen": HEAD + " yes", "rejected": HEAD + " no."}, DEFAULT)
    assert pair == Pair(HEAD, " yes", " no.", 0.0)
    assert pair == read_pair({"prompt": HEAD, "chosen": " yes", "rejected": " no."}, DEFAULT)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("it is good", "it is bad"), (HEAD + " yes", "\n\nHuman: other\n\nAssistant: no"), (HEAD + " yes", "no")],
)
def test_texts_without_a_common_prompt_stay_whole(chosen, rejected):
    assert read_pair({"chosen": chosen, "rejected": rejected}, DEFAULT) == Pair("", chosen, rejected, 0.0)


def test_a_dialogue_becomes_the_turns_of_a_chat_template():
    expected = [("user", "is it good?"), ("assistant", "what?"), ("user", "the soup"), ("assistant", "yes")]
    assert [(turn["role"], turn["content"]) for turn in messages_of(HEAD, " yes")] == expected
    asked = {"role": "user", "content": "hi"}
    assert messages_of("\n\nHuman: hi", "answer") == [asked, {"role": "assistant", "content": "answer"}]
    begun = messages_of("\n\nHuman: hi\n\nAssistant: Well,", " yes")
    assert begun == [asked, {"role": "assistant", "content": "Well, yes"}]
    plain = messages_of("Review of soup:", " good")
    assert plain == [{"role": "user", "content": "Review of soup:"}, {"role": "assistant", "content": " good"}]
    with pytest.raises(ValueError, match="no prompt that both sides share"):
        messages_of("", "yes")


def test_the_three_layouts_of_a_pair_are_the_same_tokens(write, tokenizer):
    whole = loaded(write([{"chosen": HEAD + " yes", "rejected": HEAD + " no"}]), tokenizer)
    parts = loaded(write([{"prompt": HEAD, "chosen": " yes", "rejected": " no"}]), tokenizer)
    zipped = loaded(write([{"chosen": HEAD + " yes", "rejected": HEAD + " no"}], "pairs.jsonl.gz"), tokenizer)
    assert whole == parts == zipped
    assert whole.chosen == [tokenizer(HEAD + " yes")["input_ids"]]
    templated = loaded(write([{"chosen": HEAD + " yes", "rejected": HEAD + " no"}]), tokenizer, chat_template=True)
    text = "[user]is it good?\n[assistant]what?\n[user]the soup\n[assistant]yes\n"
    assert templated.chosen == [tokenizer(text)["input_ids"]]


def test_the_margin_of_a_pair_is_that_of_its_column(write, tokenizer):
    rows = [row | {"lead": i / 2} for i, row in enumerate(rows_of(3))]
    assert loaded(write(rows), tokenizer, margin_field="lead").margins == [0.0, 0.5, 1.0]
    assert loaded(write(rows), tokenizer).margins == [0.0, 0.0, 0.0]


# ---------------------------------------------------------------------------------------------------- what is refused


BAD = [
    ({"prompt": "p", "chosen": " ", "rejected": "b"}, "'chosen' is ' ', expected a text that is not empty"),
    ({"prompt": "p", "chosen": "a"}, "'rejected' is None, expected a text"),
    ({"prompt": "p", "chosen": ["a"], "rejected": "b"}, "'chosen' is ['a'], expected a text"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is 3, expected a text"),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are the same text, 'a'"),
    ({"chosen": HEAD + " ", "rejected": HEAD + " no"}, "'chosen' ends in an empty answer"),
    ({"chosen": "\ud800", "rejected": "b"}, "'chosen' is no Unicode text"),
]


def test_every_bad_pair_is_named_with_its_line_and_its_reason(write, tokenizer):
    path = write([*rows_of(2), *(row for row, _ in BAD)])
    with pytest.raises(UserError) as caught:
        loaded(path, tokenizer)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("data.path: pairs cannot be used (data.unusable: skip")
    assert len(lines) == 1 + len(BAD)
    for number, (line, (_, reason)) in enumerate(zip(lines[1:], BAD, strict=True), 3):
        assert line.startswith(f"  {path}:{number} {reason}")
    kept = loaded(path, tokenizer, unusable="skip")
    assert kept == loaded(write(rows_of(2), "good.jsonl"), tokenizer)


def test_twenty_bad_pairs_are_shown_and_the_others_counted(write, tokenizer):
    with pytest.raises(UserError, match=r"and 5 more$") as caught:
        loaded(write([BAD[0][0]] * 25), tokenizer)
    assert len(str(caught.value).splitlines()) == 22


@pytest.mark.parametrize(
    "value",
    [None, "", "x", "nan", [1], True, float("nan"), float("inf"), -0.5, "-1", pytest.param(10**400, id="huge"), 1e30],
)
def test_a_margin_that_is_no_number_or_below_0_is_refused(value):
    row = {"chosen": "a", "rejected": "b", "lead": value}
    with pytest.raises(ValueError, match=r"'lead' is .*expected a number from 0 to 1e\+18"):
        read_pair(row, DataConfig(margin_field="lead"))


def test_a_margin_of_a_csv_file_is_the_number_that_its_text_names(tmp_path, tokenizer):
    file = tmp_path / "pairs.csv"
    file.write_text("prompt,chosen,rejected,lead\np: , a, b,1.5\np: , a, c,0\n")
    assert loaded(str(file), tokenizer, margin_field="lead").margins == [1.5, 0.0]
    assert read_pair({"chosen": "a", "rejected": "b", "lead": 2**59}, DataConfig(margin_field="lead")).margin == 2.0**59


def test_a_file_without_the_columns_says_which_it_has(write, tokenizer):
    with pytest.raises(UserError, match=r"data\.path: .* has no columns 'chosen' and 'rejected'; it has good, bad"):
        loaded(write([{"good": "a", "bad": "b"}]), tokenizer)


def test_a_damaged_or_missing_file_is_named(write, tokenizer, tmp_path):
    file = tmp_path / "cut.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(rows_of(1)[0]).encode())[:-12])
    for path, reason in ((str(file), "cannot be read"), (str(tmp_path / "none.jsonl.gz"), "is not a file")):
        with pytest.raises(UserError, match=rf"^data\.path: .*{reason}"):
            loaded(path, tokenizer)
    with pytest.raises(UserError, match=r"pairs\.jsonl:2 is not JSON"):
        loaded(write([*rows_of(1), "{"]), tokenizer)


def test_a_template_that_is_not_there_is_refused(write):
    with pytest.raises(UserError, match=r"data\.chat_template is true, but the tokenizer has no chat template"):
        loaded(write(rows_of(1)), make_tokenizer(), chat_template=True)


# ------------------------------------------------------------------------------------------------ where they are cut


tokens = st.lists(st.integers(0, 3), max_size=12)


@given(tokens, tokens, tokens, st.integers(1, 12))
def test_both_sides_are_cut_alike_as_far_as_they_are_the_same(shared, chosen, rejected, most):
    whole = [*shared, *chosen, 4], [*shared, *rejected, 5]
    cut = cut_alike(*whole, most=most)
    agree = next(i for i, (a, b) in enumerate(zip(*whole, strict=False)) if a != b)
    lost = [len(before) - len(after) for before, after in zip(whole, cut, strict=True)]
    for before, after in zip(whole, cut, strict=True):
        assert 1 <= len(after) <= most
        assert after == before[len(before) - len(after) :]
    excess = max(map(len, whole)) - most
    if excess <= agree:
        assert lost == [max(excess, 0)] * 2
    else:  # all that is shared is gone from both, and no more than that from one that fits
        assert min(lost) >= agree
        assert all(len(rest) == most or gone == agree for rest, gone in zip(cut, lost, strict=True))


def test_a_text_that_is_the_beginning_of_the_other_is_never_cut_to_nothing():
    assert cut_alike([1, 2, 3], [1, 2, 3, 4, 5, 6], most=2) == ([3], [5, 6])


def test_cut_pairs_begin_at_the_same_place_of_their_prompt(write, tokenizer):
    prompt = " ".join(f"w{i}" for i in range(20))
    (pair,) = [{"prompt": prompt, "chosen": " good good good", "rejected": " bad"}]
    found = loaded(write([pair]), tokenizer, max_tokens=30)
    whole = [tokenizer(prompt + answer)["input_ids"] for answer in (" good good good", " bad")]
    assert len(found.chosen[0]) == 30 < len(whole[0])
    assert len(whole[0]) - 30 == len(whole[1]) - len(found.rejected[0])


# ---------------------------------------------------------------------------------------------------- who is held out


def of_split(path, tokenizer, **settings):
    return load_split(DataConfig(path=path, **settings), tokenizer)


def test_no_prompt_is_on_both_sides_and_nothing_is_lost(write, tokenizer):
    rows = [row | {"chosen": f" good {i} {k}"} for i, row in enumerate(rows_of(30)) for k in range(3)]
    training, held_out = of_split(write(rows), tokenizer, evaluation_pairs=20)
    assert not set(training.groups) & set(held_out.groups)
    assert len(training) + len(held_out) == 90
    assert len(held_out) == 21  # whole prompts


def test_neither_the_order_of_the_file_nor_what_is_added_moves_a_pair(write, tokenizer):
    rows = rows_of(40)
    first = of_split(write(rows), tokenizer, evaluation_pairs=10, train_pairs=20)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(40)]
    again = of_split(write(shuffled, "shuffled.jsonl"), tokenizer, evaluation_pairs=10, train_pairs=20)
    assert [part.digest() for part in first] == [part.digest() for part in again]
    assert [len(part) for part in first] == [20, 10]
    more = of_split(write(rows_of(44), "more.jsonl"), tokenizer, evaluation_pairs=10)
    assert len(set(more[1].groups) & set(first[1].groups)) >= 6


def test_a_second_file_is_held_out_and_what_it_shares_is_not_trained_on(write, tokenizer):
    path, other = write(rows_of(20)), write([*rows_of(5), {"chosen": "new", "rejected": "old"}], "other.jsonl")
    training, held_out = of_split(path, tokenizer, evaluation_path=other)
    assert (len(training), len(held_out)) == (15, 6)
    assert not set(training.groups) & set(held_out.groups)


@pytest.mark.parametrize("second_file", [False, True])
def test_no_text_is_on_both_sides_whichever_pairs_share_it(write, tokenizer, second_file):
    """Mirror images, chains of pairs that share one text, and a dialogue whose own answers begin differently."""
    other = HEAD.replace("soup", "bread")
    texts = [(f"good {i}", f"bad {i}") for i in range(12)]
    texts += [(b, a) for a, b in texts] + [(f"bad {i}", f"good {i + 1}") for i in range(0, 10, 2)]
    texts += [(HEAD + " yes", other + " no"), (HEAD + " well", HEAD + " no"), (other + " well", other + " yes")]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in texts]
    where = {"evaluation_path": write(rows[1::3], "second.jsonl")} if second_file else {}
    path = write(rows)
    for count in range(1, 9):
        training, held_out = of_split(path, tokenizer, evaluation_pairs=count, **where)
        assert sides(training).isdisjoint(sides(held_out))
        dialogues = [group for part in (training, held_out) for group in dialogues_of(part)]
        assert len(dialogues) <= 1
        assert second_file or len(training) + len(held_out) == len(rows)


def dialogues_of(pairs):
    return {group for row, group in zip(pairs.chosen, pairs.groups, strict=True) if len(row) > 20}


def sides(pairs):
    return set(map(tuple, [*pairs.chosen, *pairs.rejected]))


def test_texts_that_are_the_same_once_they_are_cut_are_not_trained_on_and_counted(write, tokenizer, caplog):
    alike = [{"prompt": f"night {i}: the soup was", "chosen": " good", "rejected": " bad"} for i in range(8)]
    path = write([*alike, *rows_of(8)])
    training, held_out = of_split(path, tokenizer, evaluation_pairs=6, max_tokens=4)
    ending = tuple(tokenizer(" soup was good")["input_ids"][-3:])
    assert sum(tuple(row[-3:]) == ending for row in held_out.chosen) in range(1, 6)
    assert sides(training).isdisjoint(sides(held_out))
    assert len(training) > 0
    assert f"{16 - 6 - len(training)} pairs of {path}, once cut to 4 tokens, have a text that is held" in caplog.text


def test_a_file_of_which_nothing_is_left_to_train_on_is_refused(write, tokenizer):
    with pytest.raises(UserError, match=r"data\.evaluation_pairs \(10\): nothing is left to train on of the 5 pairs"):
        of_split(write(rows_of(5)), tokenizer, evaluation_pairs=10)


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize(
    "prompt", ["the soup:", "\n\nHuman: the soup\n\nAssistant:", HEAD, HEAD + " Well,", "\n\nHuman: the soup"]
)
def test_the_reward_of_a_run_reads_the_tokens_that_were_trained_on(tokenizer, prompt, template):
    reading = Reading(tokenizer, template)
    for answer in (" good", " good\n\nHuman:"):
        trained = encode(Pair(prompt, answer, "", 0.0), answer, tokenizer, chat_template=template)
        assert RewardModel.encode(reading, prompt, answer) == trained


class Reading:
    """What `RewardModel.encode` reads of itself."""

    def __init__(self, tokenizer, template):
        spec = SimpleNamespace(max_positions=1000, vocab_size=1000)
        self.model = SimpleNamespace(spec=spec, path="x", tokenizer=tokenizer)
        self.config = RewardConfig(model="x", model_chat_template=template)


def test_a_conversation_is_scored_by_its_own_messages_and_another_column_of_that_name_is_not_read(tokenizer):
    turns = [{"role": "system", "content": "be nice"}, {"role": "user", "content": "is it good?"}]
    prompt = read_prompt({"messages": turns}, PromptsConfig(form="messages"))
    reading = Reading(tokenizer, True)
    expected = tokenizer("[system]be nice\n[user]is it good?\n[assistant] yes\n")["input_ids"]
    assert RewardModel.encode(reading, prompt.text, " yes", prompt.columns["messages"]) == expected
    own = tokenizer("[user]the soup\n[assistant] yes\n")["input_ids"]
    for column in (None, "text", [], [3], turns, [*turns, {"role": "assistant"}]):
        assert RewardModel.encode(reading, "the soup", " yes", column) == own


# ------------------------------------------------------------------------------------------- prompts for the policy


def test_no_prompt_of_the_policy_was_trained_on_whichever_side_of_a_pair_it_came_from(write, tiny_model, tmp_path):
    heads = [HEAD.replace("soup", f"soup {i}") for i in range(12)]
    rows = [{"chosen": head + " yes", "rejected": head + " no"} for head in heads[:8]]
    rows += [{"chosen": a + " yes", "rejected": b + " no"} for a, b in zip(heads[:4], heads[8:], strict=True)]
    path, out, config = write(rows), tmp_path / "prompts.jsonl", tmp_path / "config.yaml"
    config.write_text(
        json.dumps({"model": {"path": str(tiny_model)}, "data": {"evaluation_pairs": 3, "train_pairs": 5}})
    )
    command = [path, "--config", str(config), "--out", str(out)]
    dialogue_prompts.main(command)
    prompts = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    training, held_out = of_split(path, make_tokenizer(), evaluation_pairs=3, train_pairs=5)
    texts = [make_tokenizer().decode(row) for row in (*training.chosen, *training.rejected)]
    assert any(len(keys) > 1 for keys in training.keys)
    assert not [prompt for prompt in prompts for text in texts if text.startswith(prompt)]
    assert prompts == [head for head in heads[:8] if not any(text.startswith(head) for text in texts)]
    assert len(prompts) >= len(set(held_out.groups)) > 0
    with pytest.raises(SystemExit, match="2"):  # and the file stays
        dialogue_prompts.main(command)
    assert len(out.read_text().splitlines()) == len(prompts)


def test_pairs_that_are_not_there_are_told_without_a_traceback(tiny_model, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"model": {"path": str(tiny_model)}}))
    with pytest.raises(SystemExit, match="2"):
        dialogue_prompts.main([str(tmp_path / "none.jsonl"), "--config", str(config), "--out", str(tmp_path / "x")])
    assert "data.path: " in (told := capsys.readouterr().err)
    assert told.endswith("none.jsonl) is not a file\n")
