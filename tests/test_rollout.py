import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import rollout, scoring
from ppo_jax.models.decoder import response_hidden
from ppo_jax.ops.randomness import Purpose, purpose_key, rollout_uniforms
from ppo_jax.prompts import pad_left
from ppo_jax.records import EOS, STOP_STRING, TRUNCATED
from ppo_jax.rollout import Endings, Sampling
from ppo_jax.stop_strings import stop_table
from tests.tiny import PROMPTS

LENGTH = 12
PLAIN = Sampling(min_new_tokens=0, temperature=1.0, top_p=1.0, top_k=0)


def prompt_batch(tiny, texts):
    return pad_left(texts, [tiny.model.tokenizer(text)["input_ids"] for text in texts])


def generate(tiny, texts=PROMPTS, *, uniforms=None, eos=(1,), stops=(), sampling=PLAIN, per_prompt=1, **options):
    batch = prompt_batch(tiny, list(texts))
    if uniforms is None:
        key = purpose_key(0, 0, Purpose.ROLLOUT)
        uniforms = rollout_uniforms(key, jnp.arange(len(texts) * per_prompt), length=LENGTH)
    table = stop_table(stops, tiny.model.tokenizer, tiny.model.spec.vocab_size)
    return rollout.generate(
        tiny.params,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.mask),
        uniforms,
        Endings(eos_tokens=jnp.asarray(eos, jnp.int32), stop_table=jnp.asarray(table)),
        jnp.zeros((), jnp.int32),
        spec=tiny.model.spec,
        sampling=sampling,
        compute_dtype="float32",
        **options,
    )


def decoded(tiny, answers):
    rows = zip(np.asarray(answers.response_tokens), np.asarray(answers.response_mask), strict=True)
    return [tiny.model.tokenizer.decode(tokens[mask]) for tokens, mask in rows]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_cached_decode_gives_the_log_probs_of_the_whole_forward(tiny, temperature):
    answers = generate(tiny, sampling=Sampling(min_new_tokens=0, temperature=temperature, top_p=0.8, top_k=0))
    scored = scoring.score(
        tiny.params,
        tiny.params,
        answers,
        scoring=scoring.Scoring(
            spec=tiny.model.spec, temperature=temperature, compute_dtype="float32", micro_batch_size=3
        ),
    )
    np.testing.assert_allclose(answers.behaviour_logprobs, scored.old_logprobs, rtol=0, atol=2e-5)


def test_the_states_that_come_along_are_those_of_the_whole_forward_up_to_the_end_of_an_answer(tiny):
    answers = generate(tiny, eos=range(1, 60), keep_hidden=True, per_prompt=2)
    mask = np.asarray(answers.response_mask)
    assert 0 < mask.sum() < mask.size
    sequences = (answers.prompt_tokens, answers.prompt_mask, answers.response_tokens, answers.response_mask)
    expected = response_hidden(tiny.params, *sequences, spec=tiny.model.spec)
    np.testing.assert_allclose(answers.hidden, np.where(mask[..., None], expected, 0), atol=2e-5)
    np.testing.assert_array_equal(rollout.crop(answers, 4).hidden, answers.hidden[:, :4])
    without = generate(tiny, eos=range(1, 60), per_prompt=2)
    assert without.hidden is None
    np.testing.assert_array_equal(answers.response_tokens, without.response_tokens)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_its_place(tiny):
    whole = generate(tiny)
    key = purpose_key(0, 0, Purpose.ROLLOUT)
    order = np.array([4, 2, 0, 5, 1, 3])
    shuffled = generate(
        tiny, [PROMPTS[i] for i in order], uniforms=rollout_uniforms(key, jnp.asarray(order), length=LENGTH)
    )
    np.testing.assert_array_equal(shuffled.response_tokens, np.asarray(whole.response_tokens)[order])
    alone = generate(tiny, PROMPTS[3:4], uniforms=rollout_uniforms(key, jnp.asarray([3]), length=LENGTH))
    np.testing.assert_array_equal(alone.response_tokens[0], whole.response_tokens[3])


@pytest.mark.parametrize("halvings", [1, 2, 9])
def test_answers_are_the_same_when_the_unfinished_half_goes_on_alone(tiny, halvings):
    options = {"eos": range(1, 60), "keep_hidden": True, "per_prompt": 2}
    whole, halved = (generate(tiny, halvings=times, **options) for times in (0, halvings))
    lengths = np.sort(np.asarray(whole.response_mask).sum(1))
    assert lengths[5] < lengths[8] < LENGTH
    for name in ("response_tokens", "response_mask", "finish_reason", "group_id"):
        np.testing.assert_array_equal(getattr(halved, name), getattr(whole, name), err_msg=name)
    for name in ("behaviour_logprobs", "kept_mass", "hidden"):
        np.testing.assert_allclose(getattr(halved, name), getattr(whole, name), rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("halvings", "steps"),
    [
        (0, [8, 8, 8, 8, 8, 8, 8, 8]),
        (1, [4, 8, 4, 4, 8, 4, 8, 8]),
        (2, [4, 8, 4, 4, 6, 4, 8, 6]),
        (3, [4, 8, 4, 4, 6, 4, 7, 6]),
        (9, [4, 8, 4, 4, 6, 4, 7, 6]),
    ],
)
def test_answers_that_have_ended_are_decoded_on_until_they_are_half_of_those_that_are_left(halvings, steps):
    lengths = jnp.asarray([3, 9, 4, 2, 7, 5, 8, 6], jnp.int32)
    nothing = Endings(eos_tokens=jnp.zeros((1,), jnp.int32), stop_table=jnp.zeros((0, 1, 10), jnp.int32))
    start = rollout._empty_progress(8, LENGTH, nothing, jnp.float32, None)
    answers = rollout._Answers(jnp.ones((8, 2), bool), lengths, jnp.zeros((8, LENGTH)))

    def decode(answers, progress, cache):
        t, counted = progress.t + 1, progress.kept_mass.at[:, 0].add(1)
        return dataclasses.replace(progress, t=t, kept_mass=counted, running=t < answers.prompt_lengths), cache

    start = dataclasses.replace(start, t=jnp.ones((), jnp.int32))
    done = rollout._finish(decode, answers, start, (), halvings=halvings)
    assert done.kept_mass[:, 0].tolist() == steps
    assert done.t == 9
    assert not done.running.any()


def test_answers_that_share_a_prefill_equal_answers_to_repeated_prompts(tiny):
    shared = generate(tiny, PROMPTS[:2], per_prompt=3)
    repeated = generate(tiny, [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3)
    np.testing.assert_array_equal(shared.response_tokens, repeated.response_tokens)
    assert shared.group_id.tolist() == [0, 0, 0, 1, 1, 1]
    assert len({tuple(row) for row in np.asarray(shared.response_tokens)[:3].tolist()}) == 3


def test_an_answer_is_a_run_of_tokens_that_ends_with_its_first_eos(tiny):
    eos = list(range(0, 300, 10))
    answers = generate(tiny, PROMPTS * 4, eos=eos)
    tokens, mask = np.asarray(answers.response_tokens), np.asarray(answers.response_mask)
    lengths = mask.sum(1)
    for row, length, reason in zip(tokens, lengths, answers.finish_reason.tolist(), strict=True):
        assert not set(row[: length - 1]) & set(eos)
        assert reason == (EOS if row[length - 1] in eos else TRUNCATED)
        assert reason == EOS or length == LENGTH
        assert not row[length:].any()
    np.testing.assert_array_equal(mask, np.arange(LENGTH)[None] < lengths[:, None])
    assert 1 <= lengths.min() < lengths.max()
    assert not np.asarray(answers.behaviour_logprobs)[~mask].any()


def test_no_answer_ends_before_the_minimum_length(tiny):
    everything_but_two = [token for token in range(300) if token not in (65, 66)]
    sampling = Sampling(min_new_tokens=5, temperature=1.0, top_p=1.0, top_k=0)
    answers = generate(tiny, eos=everything_but_two, sampling=sampling)
    lengths = np.asarray(answers.response_mask).sum(1)
    assert lengths.min() == 6  # five tokens, then the EOS
    early = np.asarray(answers.response_tokens)[:, :5]
    assert set(early.ravel()) <= {65, 66}
    kept = np.asarray(answers.kept_mass)
    assert kept[:, :5].max() < 0.5
    np.testing.assert_allclose(kept[:, 5], 1.0, atol=1e-5)


def test_kept_mass_reaches_top_p_and_is_one_without_it(tiny):
    sampling = Sampling(min_new_tokens=0, temperature=1.0, top_p=0.6, top_k=0)
    cut = generate(tiny, sampling=sampling)
    kept = np.asarray(cut.kept_mass)[np.asarray(cut.response_mask)]
    assert kept.min() >= 0.6 - 1e-6
    assert kept.mean() < 0.95
    plain = generate(tiny)
    np.testing.assert_allclose(np.asarray(plain.kept_mass)[np.asarray(plain.response_mask)], 1.0, atol=1e-5)


def test_an_answer_ends_with_the_token_that_completes_a_stop_string(tiny):
    free = decoded(tiny, generate(tiny, PROMPTS * 4))
    stops = (free[0][2:5], free[1][4:6], "never seen, never said")
    answers = generate(tiny, PROMPTS * 4, stops=stops)
    reasons = answers.finish_reason.tolist()
    for before, after, reason in zip(free, decoded(tiny, answers), reasons, strict=True):
        found = [before.find(stop) + len(stop) for stop in stops if stop in before]
        assert before.startswith(after)
        assert (reason == STOP_STRING) == bool(found)
        if found:
            assert len(after) >= min(found)
            assert any(stop in after for stop in stops)
            last = tiny.model.tokenizer.encode(after)[-1:]
            assert not any(stop in after[: -len(tiny.model.tokenizer.decode(last))] for stop in stops)
        else:
            assert after == before
    assert reasons.count(STOP_STRING) >= 2


def test_the_stop_table_agrees_with_searching_the_text(tiny):
    tokenizer, rng = tiny.model.tokenizer, np.random.default_rng(0)
    stops = ("oo", "ab", "aab", "d and", "e")
    table = stop_table(stops, tokenizer, tiny.model.spec.vocab_size)
    complete = table.shape[1] - 1
    alphabet = [token for token in range(2, 300) if tokenizer.decode([token]).strip(" aobdne") == ""]
    for _ in range(200):
        tokens = rng.choice(alphabet, size=8)
        for s, stop in enumerate(stops):
            state = 0
            for n, token in enumerate(tokens, 1):
                state = table[s, state, token]
                assert (state == complete) == (stop in tokenizer.decode(tokens[:n]))
                if state == complete:
                    break


def test_the_loop_ends_when_every_row_has_ended(tiny, monkeypatch):
    written = []
    original = rollout._write_token

    def counted(progress, *rest):
        jax.debug.callback(lambda t: written.append(int(t)), progress.t)
        return original(progress, *rest)

    monkeypatch.setattr(rollout, "_write_token", counted)
    sampling = Sampling(min_new_tokens=2, temperature=1.0, top_p=1.0, top_k=0)
    everything = list(range(2, 300))
    answers = generate(tiny, PROMPTS[:2], eos=everything, sampling=sampling)
    jax.effects_barrier()
    longest = int(np.asarray(answers.response_mask).sum(1).max())
    assert longest == 3 < LENGTH
    assert sorted(written) == [0, 1, 2]


def test_cropping_keeps_every_answer(tiny):
    answers = generate(tiny, eos=list(range(0, 300, 3)))
    longest = int(np.asarray(answers.response_mask).sum(1).max())
    cropped = rollout.crop(answers, longest)
    assert decoded(tiny, cropped) == decoded(tiny, answers)
    assert cropped.response_tokens.shape[1] == longest < LENGTH
