import csv
import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from ppo_jax.config import PromptsConfig
from ppo_jax.errors import UserError
from ppo_jax.prompts import Prompts, for_each_answer, hold_out, load_prompts, load_split, pad_left
from tests.tiny import PROMPTS, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load(file, tokenizer=None, **keys):
    return load_prompts(PromptsConfig(path=str(file), **keys), tokenizer or make_tokenizer(), seed=0)


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def numbered(count, seed=0):
    return Prompts(texts=[str(i) for i in range(count)], encoded=[[i] for i in range(count)], seed=seed)


@pytest.mark.parametrize(("size", "count"), [(7, 3), (5, 5), (3, 8), (10, 1)])
def test_every_epoch_uses_every_prompt_once_over_any_batch_size(size, count):
    prompts = numbered(size)
    stream = [i for step in range(4 * size) for i in prompts.indices(step, count)]
    epochs = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_batch_is_a_function_of_seed_and_step_alone():
    prompts = numbered(9)
    late = prompts.indices(5, 4)
    for step in range(5):
        prompts.indices(step, 4)
    assert prompts.indices(5, 4) == late
    assert [numbered(9, seed=1).indices(s, 4) for s in range(4)] != [prompts.indices(s, 4) for s in range(4)]


def test_padding_is_on_the_left_and_the_mask_marks_the_real_tokens():
    batch = pad_left(["a", "b"], [[5, 0, 7], [8]])  # 0, which fills the padding, may be a real token too
    assert batch.tokens.shape == (2, 8)
    assert batch.tokens[0, -3:].tolist() == [5, 0, 7]
    assert batch.tokens[1, -1] == 8
    assert batch.mask.sum(1).tolist() == [3, 1]
    assert batch.mask[:, -1].all()


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "txt"])
def test_every_local_format_gives_the_same_prompts(tmp_path, ending):
    import pandas

    file = tmp_path / f"prompts.{ending}"
    frame = pandas.DataFrame({"question": PROMPTS, "other": range(len(PROMPTS))})
    if ending == "jsonl":
        write_rows(file, frame.to_dict("records"))
    elif ending == "json":
        file.write_text(json.dumps(frame.to_dict("records")))
    elif ending == "csv":
        frame.to_csv(file, index=False)
    elif ending == "parquet":
        frame.to_parquet(file)
    else:
        file.write_text("\n".join(PROMPTS) + "\n")
    loaded = load_prompts(PromptsConfig(path=str(file), field="question"), make_tokenizer(), seed=0)
    assert loaded.texts == PROMPTS
    assert loaded.encoded == [make_tokenizer()(text)["input_ids"] for text in PROMPTS]
    other = {"txt": {}, "csv": {"other": [str(i) for i in range(len(PROMPTS))]}}
    assert loaded.columns == other.get(ending, {"other": list(range(len(PROMPTS)))})


def refused(config, texts=None):
    with pytest.raises(UserError) as error:
        load_prompts(config, make_tokenizer(), seed=0, texts=texts)
    return str(error.value)


def test_a_broken_line_is_named_by_file_and_number(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n{"prompt": "broken\n{"prompt": "fine"}\n')
    assert f"{file}:2" in refused(PromptsConfig(path=str(file)))


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "a"}\n')
    message = refused(PromptsConfig(path=str(file)))
    assert "'prompt'" in message
    assert "question" in message


def test_a_missing_file_an_unknown_ending_and_no_prompt_at_all_are_refused(tmp_path):
    assert "not a file" in refused(PromptsConfig(path=str(tmp_path / "absent.jsonl")))
    (tmp_path / "p.xyz").write_text("a")
    assert ".xyz" in refused(PromptsConfig(path=str(tmp_path / "p.xyz")))
    assert "prompt 2" in refused(PromptsConfig(), texts=["fine", "  "])


def test_long_prompts_are_an_error_or_skipped_or_cut_at_the_front():
    texts = ["good", "the soup was good and the bread was good"]
    long = make_tokenizer()(texts[1])["input_ids"]
    assert "prompt 2 has" in refused(PromptsConfig(max_tokens=3), texts=texts)
    skipped = load_prompts(PromptsConfig(max_tokens=3, too_long="skip"), make_tokenizer(), seed=0, texts=texts)
    assert skipped.texts == texts[:1]
    cut = load_prompts(PromptsConfig(max_tokens=3, too_long="truncate"), make_tokenizer(), seed=0, texts=texts)
    assert cut.encoded[1] == long[-3:]
    assert "no prompt left" in refused(PromptsConfig(max_tokens=1, too_long="skip"), texts=texts[1:])


def test_the_chat_template_wraps_the_prompt_and_asks_for_an_answer():
    tokenizer = chat_tokenizer()
    loaded = load_prompts(PromptsConfig(chat_template=True), tokenizer, seed=0, texts=["good food"])
    assert tokenizer.decode(loaded.encoded[0]) == "<user>good food:"
    assert loaded.texts == ["good food"]
    assert "no chat template" in refused(PromptsConfig(chat_template=True), texts=["a"])


def test_the_order_of_an_epoch_is_not_the_order_of_the_file():
    assert numbered(50).indices(0, 50) != list(np.arange(50))


def test_the_texts_of_a_file_are_the_prompts_letter_for_letter(tmp_path):
    """Readers that guess types make None of "NA", a number of "1e5" and two lines of a U+2028."""
    texts = ["NA", "null", "1e5", "true", "a\u2028b", "c\x0bd", '"quoted", with a comma', "  spaces  ", "é漢🙂"]
    write_rows(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    assert load(tmp_path / "p.jsonl").texts == texts
    with (tmp_path / "p.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt"], *([text] for text in [*texts, "two\nlines"])])
    assert load(tmp_path / "p.csv").texts == [*texts, "two\nlines"]
    (tmp_path / "p.txt").write_text("\n".join(texts), encoding="utf-8")
    assert load(tmp_path / "p.txt").texts == texts


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, ending):
    lines = {
        "jsonl": ['{"prompt": "good"}', "", '{"prompt": "food"}', ""],
        "json": ['[{"prompt": "good"},', '{"prompt": "food"}]'],
        "csv": ["prompt", "good", "", "food", ""],
        "txt": ["good", "food", ""],
    }[ending]
    file = tmp_path / f"p.{ending}"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert load(file).texts == ["good", "food"]


ROWS_OF_JSON = b'{"prompt": 5}\n{"other": 1}\n{"prompt": "\\ud800"}\n{"prompt": " "}'


@pytest.mark.parametrize(
    ("ending", "content", "where"),
    [
        ("jsonl", b'{"prompt": "a"}\n\n{"prompt": "\xff"}\n[1]\n{"a"}', [":3 is not JSON", ":4 holds a list", ":5 is"]),
        ("jsonl", b"[" * 100_000, [":1 is not JSON"]),
        (
            "jsonl",
            ROWS_OF_JSON,
            [":1 prompt 'prompt' is 5", ":2 prompt 'prompt' is None", ":3 prompt 'prompt' is no U"],
        ),
        ("jsonl", ROWS_OF_JSON, [":4 prompt 'prompt' is ' ', expected a text that is not empty"]),
        ("jsonl", b"\n" * 3, ["no prompt"]),
        ("jsonl", b"", ["no prompt"]),
        ("json", b'{"prompt": "a"}', ["one list of objects"]),
        ("csv", b"prompt,other\na,1\nb\n\nc,1,2\n", [":3 has 1 cells, the header has 2", ":5 has 3 cells"]),
        ("csv", b'prompt\n"two\nlines"\n"open\n', [":4 is not CSV"]),
        ("csv", b'prompt,other\n"two\nlines"\nb,2', [":2 has 1 cells"]),
        ("csv", b"prompt,prompt\na,b\n", [":1 names 'prompt' twice"]),
        ("csv", b"prompt\na\n\xff\n", [":3 is not UTF-8"]),
        ("txt", b"a\n\nb\xff\n", [":3 is not UTF-8"]),
        ("txt", b"a\n \nb\n", [":2 prompt 'text' is ' '"]),
        ("parquet", b"PAR1", ["is not parquet"]),
    ],
)
def test_every_broken_place_is_named_with_its_line(tmp_path, ending, content, where):
    file = tmp_path / f"p.{ending}"
    file.write_bytes(content)
    message = refused(PromptsConfig(path=str(file)))
    assert str(file) in message
    for part in where:
        assert part in message


def test_a_prompt_that_the_tokenizer_makes_nothing_of_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(UserError, match=r"prompt 2 is 'x', which the tokenizer makes no token of"):
        load_prompts(PromptsConfig(), tokenizer, seed=0, texts=["good", "x"])


def test_twenty_problems_are_shown_and_the_others_counted(tmp_path):
    (tmp_path / "p.jsonl").write_text("broken\n" * 25)
    message = refused(PromptsConfig(path=str(tmp_path / "p.jsonl")))
    assert ":20 is not" in message
    assert ":21" not in message
    assert "and 5 more" in message


def test_a_directory_is_refused(tmp_path):
    (tmp_path / "p.jsonl").mkdir()
    assert "is not a file" in refused(PromptsConfig(path=str(tmp_path / "p.jsonl")))


def test_alpaca_is_laid_out_as_its_models_learned_it_or_wrapped_by_the_template(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Sing.", "source": "here"},
    ]
    file = write_rows(tmp_path / "p.jsonl", rows)
    plain = load(file, form="alpaca", max_tokens=400)
    assert plain.texts[0].endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:")
    assert plain.texts[1].endswith("the request.\n\n### Instruction:\nGreet.\n\n### Response:")
    assert plain.encoded[0] == make_tokenizer()(plain.texts[0])["input_ids"]
    assert plain.columns == {"output": ["5", "Hi", None], "source": [None, None, "here"]}
    tokenizer = chat_tokenizer()
    chat = load(file, tokenizer, form="alpaca", chat_template=True)
    assert chat.texts == ["Add.\n\n2 and 3", "Greet.", "Sing."]
    assert [tokenizer.decode(tokens) for tokens in chat.encoded] == [f"<user>{text}:" for text in chat.texts]
    write_rows(file, [{"instruction": "Add.", "input": 5}, {"input": "a"}, {"instruction": " "}])
    message = refused(PromptsConfig(path=str(file), form="alpaca"))
    for part in (":1 'input' is 5", ":2 'instruction' is None", ":3 'instruction' is ' '"):
        assert part in message


TURNS = [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Why?"), ("assistant", "Because.")]
SHAREGPT_NAMES = {"user": "human", "assistant": "gpt", "system": "system"}


def openai(turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def sharegpt(turns):
    return {"conversations": [{"from": SHAREGPT_NAMES[role], "value": content} for role, content in turns]}


@pytest.mark.parametrize("layout", [openai, sharegpt])
def test_a_conversation_ends_with_the_user_and_its_last_answer_is_the_reference(tmp_path, layout):
    rows = [layout(TURNS) | {"topic": "why"}, layout(TURNS[1:2]), layout(TURNS[1:3])]
    tokenizer = chat_tokenizer()
    file = write_rows(tmp_path / "p.jsonl", rows)
    loaded = load(file, tokenizer, form="messages", chat_template=True)
    assert tokenizer.decode(loaded.encoded[0]) == "<system>Be kind.<user>Hello<assistant>Hi<user>Why?:"
    assert [tokenizer.decode(tokens) for tokens in loaded.encoded[1:]] == ["<user>Hello:"] * 2
    assert loaded.texts == ["system: Be kind.\n\nuser: Hello\n\nassistant: Hi\n\nuser: Why?", "Hello", "Hello"]
    assert loaded.columns["reference"] == ["Because.", None, "Hi"]
    assert loaded.columns["topic"] == ["why", None, None]
    assert loaded.columns["messages"][0] == openai(TURNS[:4])["messages"]
    given_texts = PromptsConfig(form="messages", chat_template=True)
    assert load_prompts(given_texts, tokenizer, seed=0, texts=["Hello"]).encoded == loaded.encoded[1:2]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "is [], expected a list"),
        ({"messages": "hello"}, "is 'hello', expected a list"),
        ({"messages": [5]}, "message 1 is 5, expected an object"),
        (openai([("narrator", "x")]), "message 1 has 'role' 'narrator', expected one of system, user"),
        ({"messages": [{"from": ["human"], "value": "x"}]}, "message 1 has 'from' ['human']"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'content' of message 1 is [{"),
        (openai([("user", "x"), ("assistant", "")]), "'content' of message 2 is ''"),
        (openai([("assistant", "x")]), "no message of the user"),
        (openai([("user", "x"), ("assistant", "y"), ("assistant", "z")]), "no message of the user"),
        (openai([("user", "x")]) | {"reference": "y"}, "column 'reference', which is what"),
        (openai([("user", "x"), ("system", "y"), ("user", "z")]), "refused by the tokenizer's chat template: "),
    ],
)
def test_a_conversation_that_cannot_be_answered_is_refused_with_its_line(tmp_path, row, reason):
    file = write_rows(tmp_path / "p.jsonl", [openai(TURNS), row])
    with pytest.raises(UserError) as error:
        load(file, chat_tokenizer(), form="messages", chat_template=True)
    assert f"{file}:2 " in str(error.value)
    assert reason in str(error.value)


def test_a_missing_column_of_a_form_is_named(tmp_path):
    file = write_rows(tmp_path / "p.jsonl", [{"question": "a"}])
    assert "prompts.form alpaca" in refused(PromptsConfig(path=str(file), form="alpaca"))
    assert "'messages' or 'conversations'" in refused(PromptsConfig(path=str(file), form="messages"))
    assert "no column 'turns'; it has question" in refused(
        PromptsConfig(path=str(file), form="messages", field="turns")
    )


def test_a_hub_data_set_is_read_by_its_split_with_all_its_columns(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, *, split):
        asked.append((path, split))
        return datasets.Dataset.from_list([openai(TURNS) | {"id": i} for i in range(2)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load("someone/chats", chat_tokenizer(), split="train[:2]", form="messages", chat_template=True)
    assert asked == [("someone/chats", "train[:2]")]
    assert loaded.columns["id"] == [0, 1]
    assert loaded.columns["reference"] == ["Because."] * 2


def test_training_and_evaluation_can_be_two_splits_of_one_data_set(monkeypatch):
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, *, split: datasets.Dataset.from_list([{"prompt": f"{split} of {path}"}])
    )
    config = PromptsConfig(path="someone/prompts", evaluation_path="someone/prompts", evaluation_split="validation")
    training, held_out = load_split(config, make_tokenizer(), seed=0)
    assert training.texts == ["train of someone/prompts"]
    assert held_out is not None
    assert held_out.texts == ["validation of someone/prompts"]


def test_a_hub_data_set_that_cannot_be_reached_is_refused_with_the_reason(monkeypatch):
    import datasets

    def load_dataset(path, *, split):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refused(PromptsConfig(path="someone/prompts"))
    assert "someone/prompts is no file here" in message
    assert message.endswith("ConnectionError: no network")


def test_columns_stay_with_their_prompts_whatever_is_skipped_and_in_whatever_order(tmp_path):
    rows = [{"prompt": "good " * (1 if i % 3 else 50) + str(i), "label": i, "odd": [i]} for i in range(30)]
    prompts = load(write_rows(tmp_path / "p.jsonl", rows), max_tokens=20, too_long="skip")
    assert prompts.columns["label"] == [i for i in range(30) if i % 3]
    for own in (slice(None), slice(2, 4)):
        batch = prompts.batch(5, 6, own)
        assert batch.columns["label"] == [int(text.split()[-1]) for text in batch.texts]
        texts, columns = for_each_answer(batch, 3)
        assert columns["odd"] == [[int(text.split()[-1])] for text in texts]
        assert texts[:3] == [batch.texts[0]] * 3
        assert texts[::3] == batch.texts


def test_how_many_long_prompts_were_left_out_or_cut_is_said(caplog):
    from ppo_jax.prompts import log

    log.addHandler(caplog.handler)
    try:
        texts = ["good", "the soup was good and the bread was good", "food"]
        for policy in ("skip", "truncate"):
            config = PromptsConfig(max_tokens=3, too_long=policy)
            load_prompts(config, make_tokenizer(), seed=0, texts=texts)
    finally:
        log.removeHandler(caplog.handler)
    assert (
        "of the 3 prompts of given, 1 with more than prompts.max_tokens (3) are left out and 0 are cut" in caplog.text
    )
    assert "0 with more than prompts.max_tokens (3) are left out and 1 are cut" in caplog.text


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_held_out_prompts_are_never_trained_on_however_often_they_are_in_the_file(fraction):
    texts = [f"prompt {i % 40}" for i in range(100)]
    prompts = load_prompts(PromptsConfig(), make_tokenizer(), seed=0, texts=texts)
    training, held_out = hold_out(prompts, fraction)
    assert not set(training.texts) & set(held_out.texts)
    assert Counter(chain(training.texts, held_out.texts)) == Counter(texts)
    assert len(set(held_out.texts)) == round(fraction * 40)
    backwards = load_prompts(PromptsConfig(), make_tokenizer(), seed=1, texts=texts[::-1])
    assert set(hold_out(backwards, fraction)[1].texts) == set(held_out.texts)
    stream = chain.from_iterable(training.batch(step, 7).texts for step in range(50))
    assert not set(stream) & set(held_out.texts)


def test_more_prompts_move_few_from_one_side_to_the_other():
    def held(count):
        texts = [f"prompt {i}" for i in range(count)]
        return set(hold_out(load_prompts(PromptsConfig(), make_tokenizer(), seed=0, texts=texts), 0.2)[1].texts)

    assert len(held(110) & held(100)) >= 15


def test_held_out_prompts_come_from_a_file_of_their_own_or_are_a_share(tmp_path):
    training = write_rows(tmp_path / "train.jsonl", [{"prompt": text, "label": 1} for text in PROMPTS])
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": "something else", "label": 2}])

    def split(**keys):
        return load_split(PromptsConfig(path=str(training), **keys), make_tokenizer(), seed=0)

    assert split()[1] is None
    own, other = split(evaluation_path=str(held))
    assert (own.texts, other.texts, other.columns["label"]) == (PROMPTS, ["something else"], [2])
    own, share = split(evaluation_fraction=0.34)
    assert (len(own.texts), len(share.texts)) == (4, 2)
    write_rows(held, [{"prompt": "new"}, {"prompt": PROMPTS[2]}])
    with pytest.raises(UserError, match=r"1 of its 2 prompts are among those .*'good people, good'"):
        split(evaluation_path=str(held))
    with pytest.raises(UserError, match="holds out 0 of them"):
        split(evaluation_fraction=0.01)
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        split(evaluation_path=str(tmp_path / "absent.jsonl"))


# ---------------------------------------------------------------------------------------------------- arbitrary files

ROW = st.dictionaries(
    st.sampled_from(["prompt", "instruction", "input", "messages", "conversations", "reference", "x"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "user"]), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)
NEARLY_JSONL = st.lists(ROW.map(json.dumps) | st.text(max_size=8), max_size=5).map(
    lambda lines: "\n".join(lines).encode(errors="surrogatepass")
)
NEARLY_CSV = st.text(st.sampled_from('prompt,instruction"\n\r\x00 é'), max_size=40).map(
    lambda text: b"prompt,x\n" + text.encode()
)
CONTENTS = st.binary(max_size=60) | NEARLY_JSONL | NEARLY_CSV
FORMS = st.sampled_from(["text", "alpaca", "messages"])
ENDINGS = st.sampled_from(["jsonl", "json", "csv", "txt"])


def loads_or_says_why(file, content, form, tokenizer):
    file.write_bytes(content)
    try:
        prompts = load(file, tokenizer, form=form, chat_template=form == "messages", max_tokens=300)
    except UserError:
        return
    assert prompts.texts
    assert all(prompts.encoded)
    assert all(len(values) == len(prompts.texts) for values in prompts.columns.values())
    assert prompts.in_order().mask.any(axis=1).all()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz"), chat_tokenizer()


@given(content=CONTENTS, form=FORMS, ending=ENDINGS)
@settings(max_examples=200)
@example(content=b'{"prompt": "\\ud800"}', form="text", ending="jsonl")
@example(content=b'{"prompt": 1' + b"0" * 5000 + b"}", form="text", ending="jsonl")
@example(content=b"\xff\xfe{\x00", form="text", ending="json")
def test_any_bytes_are_prompts_or_a_message(fuzzed, content, form, ending):
    directory, tokenizer = fuzzed
    loads_or_says_why(directory / f"p.{ending}", content, form, tokenizer)


@pytest.mark.slow
@given(content=CONTENTS, form=FORMS, ending=ENDINGS)
@settings(max_examples=10_000)
def test_any_bytes_are_prompts_or_a_message_ten_thousand_times(fuzzed, content, form, ending):
    directory, tokenizer = fuzzed
    loads_or_says_why(directory / f"p.{ending}", content, form, tokenizer)
