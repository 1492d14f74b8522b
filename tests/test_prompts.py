import json

import numpy as np
import pytest

from ppo_jax.config import PromptsConfig
from ppo_jax.errors import UserError
from ppo_jax.prompts import Prompts, load_prompts, pad_left
from tests.tiny import PROMPTS, make_tokenizer


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


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt"])
def test_every_local_format_gives_the_same_prompts(tmp_path, ending):
    import pandas

    file = tmp_path / f"prompts.{ending}"
    frame = pandas.DataFrame({"question": PROMPTS, "other": range(len(PROMPTS))})
    if ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    elif ending == "csv":
        frame.to_csv(file, index=False)
    elif ending == "parquet":
        frame.to_parquet(file)
    else:
        file.write_text("\n".join(PROMPTS) + "\n")
    loaded = load_prompts(PromptsConfig(path=str(file), field="question"), make_tokenizer(), seed=0)
    assert loaded.texts == PROMPTS
    assert loaded.encoded == [make_tokenizer()(text)["input_ids"] for text in PROMPTS]


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
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    loaded = load_prompts(PromptsConfig(chat_template=True), tokenizer, seed=0, texts=["good food"])
    assert tokenizer.decode(loaded.encoded[0]) == "<user>good food:"
    assert loaded.texts == ["good food"]
    assert "no chat template" in refused(PromptsConfig(chat_template=True), texts=["a"])


def test_the_order_of_an_epoch_is_not_the_order_of_the_file():
    assert numbered(50).indices(0, 50) != list(np.arange(50))
