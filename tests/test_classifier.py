"""Reward models: the scores are those of transformers, text by text, however texts are batched, padded or spread."""

import json
from unittest import mock

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

import ppo_jax
from ppo_jax import plan, sharding
from ppo_jax.config import MeshConfig, RewardConfig
from ppo_jax.config_file import load
from ppo_jax.errors import UserError
from ppo_jax.initial_state import first_critic
from ppo_jax.plan import print_plan
from ppo_jax.prompt_forms import text_of
from ppo_jax.rewards import classifier
from ppo_jax.rewards.classifier import last_position, load_reward_model
from ppo_jax.rewards.source import Reward, score_answers
from ppo_jax.tracing import compilations
from ppo_torch_ref.model import load_model, token_logits
from tests.classifiers import LABELS, hf_classifier
from tests.reward_runs import texts_of
from tests.test_sharding import finish, start_two
from tests.tiny import PROMPTS, make_tokenizer

TEMPLATE = "{% for m in messages %}{{ 'w1 ' if m['role'] == 'user' else 'w2 ' }}{{ m['content'] }} w3 {% endfor %}"


def words(rng, count):
    return " ".join(f"w{i}" for i in rng.integers(0, 34, count))


@pytest.fixture(scope="module")
def texts():
    """Prompts and answers of 1 to 45 tokens together, in no order; an EOS, which is the pad, inside and at the end."""
    rng = np.random.default_rng(0)
    pairs = [(words(rng, n), " " + words(rng, m)) for n, m in ((20, 25), (1, 0), (3, 4), (16, 1), (5, 30), (2, 2))]
    pairs += [("w4 </s> w5", " w6"), ("w4 w5", " w6 </s>"), ("w7", " w8 </s> </s>"), ("</s>", " </s>")]
    return [prompt for prompt, _ in pairs], [answer for _, answer in pairs]


@pytest.fixture
def save(tokenizer, tmp_path):
    """Save a transformers model with a tokenizer; returns its directory."""

    def saved(model, tokenizer=tokenizer):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return saved


def made(save, name, labels=("score",), **changes):
    """A classifier and its directory. Whatever tokenizer lies beside a Qwen2, transformers reads byte-level BPE."""
    if name == "qwen2":
        model = hf_classifier(name, labels=labels, vocab_size=301, **changes)
        return model, save(model, make_tokenizer())
    model = hf_classifier(name, labels=labels, **changes)
    return model, save(model)


def reward_model(directory, *, dtype="float32", **settings):
    config = RewardConfig(**{"model": str(directory), "model_batch_size": 3} | settings)
    return load_reward_model(config, sharding.make_mesh(MeshConfig()), dtype=dtype)


def logits_of(model, rows):
    """transformers' logits [B, labels] of token rows, one at a time: nothing is padded."""
    with torch.no_grad():
        return np.stack([model(input_ids=torch.tensor([row])).logits[0].double().numpy() for row in rows])


def token_rows(directory, prompts, answers):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer(prompt + answer)["input_ids"] for prompt, answer in zip(prompts, answers, strict=True)]


def assert_scores(found, expected, *, bound=2e-5):
    scale = np.abs(expected).max()
    assert scale > 0.1  # a dead model would prove nothing
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * scale)


# ------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("labels", [("score",), LABELS], ids=["one", "several"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_scores_are_those_of_transformers(name, labels, save, texts):
    reference, directory = made(save, name, labels)
    expected = logits_of(reference, token_rows(directory, *texts))[:, -1]
    label = None if len(labels) == 1 else len(labels) - 1
    assert_scores(reward_model(directory, model_label=label)(*texts), expected)


@pytest.mark.parametrize(("name", "depth"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_scores_of_thirty_layers_are_those_of_transformers(name, depth, save, texts):
    reference, directory = made(save, name, **{depth: 30})
    prompts, answers = texts[0][:3], texts[1][:3]
    expected = logits_of(reference, token_rows(directory, prompts, answers))[:, 0]
    assert_scores(reward_model(directory)(prompts, answers), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_agrees_whichever_side_it_pads(side, save, texts):
    reference = hf_classifier("llama", labels=("score",))
    directory = save(reference)
    rows = token_rows(directory, *texts)[:6]  # the others hold the pad themselves: their mask is not that of their ids
    width = max(map(len, rows))
    padded = [[2] * (width - len(row)) + row if side == "left" else row + [2] * (width - len(row)) for row in rows]
    tokens = torch.tensor(padded)
    with torch.no_grad():
        expected = reference(input_ids=tokens, attention_mask=(tokens != 2).long()).logits[:, 0].numpy()
    assert_scores(reward_model(directory)(texts[0][:6], texts[1][:6]), expected)


@pytest.mark.parametrize("pad_token", [None, "</s>"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_a_pad_in_the_config_the_last_token_is_scored(name, pad_token, save, texts, tokenizer):
    # Whatever the tokenizer pads with.
    reference = hf_classifier(name, labels=("score",), pad_token_id=None)
    raw = tokenizer.backend_tokenizer
    other = type(tokenizer)(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", pad_token=pad_token)
    directory = save(reference, other)
    expected = logits_of(reference, token_rows(directory, *texts))[:, 0]
    reward = reward_model(directory)
    assert reward.model.tokenizer.pad_token == pad_token
    assert_scores(reward(*texts), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2-untied"])
def test_float64_scores_are_those_of_the_twin(name, save, texts, tmp_path):
    # transformers' Llama and its kin are float32 inside; the twin reads the labels as the first tokens of its head.
    _, directory = made(save, name, LABELS)
    twin = tmp_path / "twin"
    twin.mkdir()
    tensors = load_file(directory / "model.safetensors")
    score = tensors.pop("score.weight")
    embedding = next(tensor for tensor in tensors.values() if tensor.shape in ((37, 24), (301, 24)))
    head = np.zeros_like(embedding)
    head[:3] = score
    save_file(tensors | {"lm_head.weight": head}, twin / "model.safetensors", {"format": "pt"})
    (twin / "config.json").write_bytes((directory / "config.json").read_bytes())
    model, expected = load_model(twin, dtype=torch.float64), []
    for row in token_rows(directory, *texts):
        tokens = torch.tensor([row])
        with torch.no_grad():
            logits = token_logits(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
        expected.append(logits[0, last_position(row, 2), 1].item())
    with jax.enable_x64(True):
        found = reward_model(directory, dtype="float64", model_label="fair")(*texts)
    assert_scores(found, np.asarray(expected), bound=1e-12)


def test_bfloat16_weights_give_float32_scores_near_those_of_float32(save, texts):
    _, directory = made(save, "llama")
    exact, rough = (np.asarray(reward_model(directory, dtype=dtype)(*texts)) for dtype in ("float32", "bfloat16"))
    assert jax.tree.leaves(reward_model(directory, dtype="bfloat16").trunk)[0].dtype == "bfloat16"
    assert 1e-3 < np.abs(rough - exact).max() / np.abs(exact).max() < 0.15  # 0.054 is measured
    assert (rough != rough.astype("bfloat16").astype(float)).any()


def test_the_last_position_is_that_of_the_last_token_that_is_no_pad():
    assert last_position([5, 2, 6], 2) == 2
    assert last_position([5, 6, 2, 2], 2) == 1
    assert last_position([2, 2], 2) == 0
    assert last_position([5, 6, 2], None) == 2
    assert last_position([5, 6, 0], None) == 2


# -------------------------------------------------------------------------------------------------- batches and texts


def test_texts_are_read_by_length_in_batches_of_one_size_and_few_lengths(save):
    reward = reward_model(save(hf_classifier("llama", labels=("score",))), model_batch_size=4)
    rng = np.random.default_rng(1)
    answers = [words(rng, n) for n in rng.permutation(np.arange(1, 60))]
    shapes, compute = [], classifier.last_token_values

    def watched(trunk, head, tokens, *rest, **keywords):
        shapes.append(tokens.shape)
        return compute(trunk, head, tokens, *rest, **keywords)

    before = compilations["reward model"]
    with mock.patch.object(classifier, "last_token_values", watched):
        together = reward([""] * len(answers), answers)
        alone = [reward([""], [answer])[0] for answer in answers[:9]]
    assert {rows for rows, _ in shapes} == {4}
    assert [length for _, length in shapes[:15]] == [16] * 4 + [24] * 2 + [32] * 2 + [48] * 4 + [64] * 3
    assert compilations["reward model"] - before == 5
    np.testing.assert_allclose(together[:9], alone, rtol=0, atol=1e-5)
    assert reward([], []) == []


def test_a_chat_template_makes_prompt_and_answer_messages(save, tokenizer):
    reference = hf_classifier("llama", labels=("score",))
    chatting = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>", eos_token="</s>", chat_template=TEMPLATE
    )
    reward = reward_model(save(reference, chatting), model_chat_template=True)
    ids = {word: i + 3 for i, word in enumerate(f"w{k}" for k in range(34))}
    row = [ids[word] for word in ("w1", "w10", "w11", "w3", "w2", "w20", "w3")]
    assert reward.encode("w10 w11", "w20") == row
    assert_scores(reward(["w10 w11"], ["w20"]), logits_of(reference, [row])[:, 0])
    # A prompt that is a conversation keeps its turns, which come with the columns of a run.
    turns = [{"role": role, "content": said} for role, said in (("user", "w4"), ("assistant", "w5"), ("user", "w6"))]
    columns, prompts = {"messages": [None, turns]}, ["w10 w11", text_of(turns)]
    scores = score_answers(Reward({"model": reward}), prompts, ["w20", "w7"], columns).total
    talk = [ids[word] for word in ("w1", "w4", "w3", "w2", "w5", "w3", "w1", "w6", "w3", "w2", "w7", "w3")]
    assert_scores(scores, [logits_of(reference, [tokens])[0, 0] for tokens in (row, talk)])


def test_a_text_that_is_too_long_is_refused_or_loses_its_beginning_if_that_is_asked_for(save):
    reference = hf_classifier("gpt2", labels=("score",), n_positions=20)
    directory, rng = save(reference), np.random.default_rng(2)
    prompt, answer = words(rng, 15), " " + words(rng, 6)
    with pytest.raises(UserError, match=r"21 tokens.*20 positions.*model_max_tokens"):
        reward_model(directory)([prompt], [answer])
    (row,) = token_rows(directory, [prompt], [answer])
    for most in (8, 20):
        expected = logits_of(reference, [row[-most:]])[:, 0]
        assert_scores(reward_model(directory, model_max_tokens=most)([prompt], [answer]), expected)
    with pytest.raises(UserError, match=r"reward\.model_max_tokens \(21\).*20 positions"):
        reward_model(directory, model_max_tokens=21)


def test_texts_without_tokens_and_tokens_without_a_row_are_refused(save):
    directory = save(hf_classifier("llama", labels=("score",), vocab_size=20))
    reward = reward_model(directory)
    assert np.isfinite(reward(["w1"], [" w16"])).all()
    for answer, named in (("", r"cannot score '': its tokens are \[\]"), (" w17", r"' w17'.*\[20\], of 20 known")):
        with pytest.raises(UserError, match=named):
            reward([""], [answer])


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(("label", "index"), [(0, 0), (2, 2), ("fair", 1), ("good", 2)])
def test_a_label_is_chosen_by_index_or_name(label, index, save, texts):
    reference = hf_classifier("llama")
    directory = save(reference)
    expected = logits_of(reference, token_rows(directory, *texts))[:, index]
    assert_scores(reward_model(directory, model_label=label)(*texts), expected)


@pytest.mark.parametrize("label", [None, 3, "splendid", "1"])
def test_a_label_that_is_missing_or_unknown_is_refused_with_those_there_are(label, save):
    with pytest.raises(UserError) as error:
        reward_model(save(hf_classifier("llama")), model_label=label)
    assert f"reward.model_label: got {label!r}" in str(error.value)
    assert "0 (bad), 1 (fair), 2 (good)" in str(error.value)


def test_a_chat_template_that_is_not_there_is_refused(save):
    with pytest.raises(UserError, match=r"reward\.model_chat_template.*no chat template"):
        reward_model(save(hf_classifier("llama", labels=("score",))), model_chat_template=True)


@pytest.mark.parametrize(
    ("key", "value"), [("label", 0), ("label", "good"), ("batch_size", 8), ("chat_template", True), ("max_tokens", 9)]
)
def test_settings_of_a_reward_model_are_refused_where_there_is_none(key, value):
    with pytest.raises(UserError, match=rf"1 problem .*\n  reward\.model_{key} \({value}\) has no use without"):
        load(overrides={f"reward.model_{key}": value})
    assert load(overrides={f"reward.model_{key}": value, "reward.model": "x"}).reward.model == "x"


@pytest.mark.parametrize("value", [-1, True, "", 1.5])
def test_a_label_of_another_type_is_refused(value):
    with pytest.raises(UserError, match=r"reward\.model_label: "):
        load(overrides={"reward.model": "x", "reward.model_label": value})


def test_the_dry_run_opens_the_reward_model(tmp_path):
    with pytest.raises(UserError, match=r"^reward\.model: .*absent"):
        print_plan(load(overrides={"reward.model": str(tmp_path / "absent")}), resume=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dry_run_counts_the_memory_of_a_reward_model_and_of_a_critic(tiny, tiny_model, save, dtype):
    directory = str(save(hf_classifier("qwen3")))
    config = load(
        overrides={
            "model.path": str(tiny_model), "model.compute_dtype": dtype, "reward.model": directory,
            "reward.model_label": "good", "critic.kind": "model", "advantage.estimator": "gae",
        }
    )  # fmt: skip
    mesh, spec = sharding.make_mesh(config.mesh), plan.spec_of_reward_model(config)
    held = plan.held_bytes(config, tiny.model, mesh, spec)
    reward = load_reward_model(config.reward, mesh, dtype=dtype)
    _, critic = first_critic(config, tiny.model, tiny.params, mesh)
    of_policy, of_critic, of_reward = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(params)) for params in (tiny.params, critic, reward.trunk)
    )
    assert held[f"reward model, {dtype}"] == of_reward > 1000
    assert held["critic, float32 masters"] == of_critic
    assert held["two moments of AdamW, float32"] == 2 * (of_policy + of_critic)
    compiled = plan.compile_reward_model(config, spec, mesh, text_length=20)
    # Hidden states of as many texts as are scored at a time, padded to 24 tokens.
    assert compiled.memory_analysis().temp_size_in_bytes > 16 * 24 * spec.width * (2 if dtype == "bfloat16" else 4)


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_is_scored_by_a_reward_model_with_a_tokenizer_of_its_own(tiny_model, save, tmp_path):
    reference = hf_classifier("qwen3")
    directory = save(reference)
    settings = {
        "model.path": str(tiny_model), "run.dir": str(tmp_path / "run"), "run.iterations": 1, "rollout.batch_size": 8,
        "rollout.max_new_tokens": 8, "update.minibatch_size": 8, "monitor.tensorboard": False,
        "monitor.sample_every": 1, "reward.model": str(directory), "reward.model_label": "good",
    }  # fmt: skip
    # Words of the reward model's own vocabulary; to the policy they are letters.
    prompts = [f"w{i} w{i + 3} {text} " for i, text in enumerate(PROMPTS)]
    result = ppo_jax.fine_tune(settings, prompts=prompts)
    samples = [json.loads(line) for line in (result.directory / "samples.jsonl").read_text().splitlines()]
    rows = token_rows(directory, [s["prompt"] for s in samples], [s["answer"] for s in samples])
    expected = logits_of(reference, rows)[:, 2]
    assert_scores([s["score"] for s in samples], expected)
    assert np.ptp(expected) > 0.1
    assert np.isfinite(result.metrics[0]["score/mean"])


def test_processes_score_their_own_texts_on_their_own_devices(save, tmp_path):
    directory = save(hf_classifier("llama", labels=("score",)))
    finish(*start_two("tests.reward_runs", directory, tmp_path))
    reward = reward_model(directory)
    for index in range(2):
        found = json.loads((tmp_path / f"scores_{index}.json").read_text())
        prompts, answers = texts_of(index)
        assert len(found["scores"]) == 3 + 8 * index
        np.testing.assert_allclose(found["scores"], reward(prompts, answers), rtol=0, atol=2e-5)
        assert found["devices"] == [index]
        assert found["kernel"] == [12, 32]  # of [24, 32]: split over the two devices
