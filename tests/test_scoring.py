from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import scoring_memory
from ppo_jax import scoring
from ppo_jax.models import hf_io
from ppo_jax.models.decoder import head_logits, response_hidden
from ppo_jax.ops.logprobs import token_logprobs
from ppo_jax.prompts import pad_left
from ppo_jax.records import Rollout
from tests.tiny import PROMPTS, make_model

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    model = hf_io.open_model(str(make_model(tmp_path_factory.mktemp("reference") / "model", seed=1)))
    return model, hf_io.load_params(model.path, model.config, model.spec)


def some_rollout(tiny, length=7, lengths=(7, 1, 4, 7, 2, 5)):
    batch = pad_left(PROMPTS, [tiny.model.tokenizer(text)["input_ids"] for text in PROMPTS])
    rng = np.random.default_rng(0)
    mask = np.arange(length)[None] < np.asarray(lengths)[:, None]
    zeros = jnp.zeros(mask.shape)
    return Rollout(
        prompt_tokens=jnp.asarray(batch.tokens),
        prompt_mask=jnp.asarray(batch.mask),
        response_tokens=jnp.asarray(np.where(mask, rng.integers(2, 300, mask.shape), 0), jnp.int32),
        response_mask=jnp.asarray(mask),
        behaviour_logprobs=zeros,
        kept_mass=zeros,
        finish_reason=jnp.zeros(len(lengths), jnp.int32),
        group_id=jnp.arange(len(lengths), dtype=jnp.int32),
        policy_version=jnp.zeros((), jnp.int32),
    )


def score(tiny, ref_params, rollout, micro_batch_size=6, *, keep_ref_hidden=False):
    return scoring.score(
        tiny.params,
        ref_params,
        rollout,
        scoring=scoring.Scoring(
            spec=tiny.model.spec, temperature=TEMPERATURE, compute_dtype="float32", micro_batch_size=micro_batch_size
        ),
        keep_ref_hidden=keep_ref_hidden,
    )


def hugging_face_log_softmax(directory, row, rollout):
    """float64 log-probs of one unpadded sequence at its response positions, [length, V]."""
    prompt = np.asarray(rollout.prompt_tokens)[row][np.asarray(rollout.prompt_mask)[row]]
    response = np.asarray(rollout.response_tokens)[row][np.asarray(rollout.response_mask)[row]]
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        logits = model(torch.tensor(np.concatenate([prompt, response]))[None].long()).logits[0].double()
    return torch.log_softmax(logits / TEMPERATURE, -1)[len(prompt) - 1 : -1].numpy(), response


def test_scores_equal_the_formulas_on_the_logits_of_transformers(tiny, reference):
    model, ref_params = reference
    rollout = some_rollout(tiny)
    scored = jax.device_get(score(tiny, ref_params, rollout))
    for row in range(len(PROMPTS)):
        log_p, tokens = hugging_face_log_softmax(tiny.model.path, row, rollout)
        log_q, _ = hugging_face_log_softmax(model.path, row, rollout)
        picked = np.arange(len(tokens)), tokens
        expected = {
            "old_logprobs": log_p[picked],
            "ref_logprobs": log_q[picked],
            "token_kl": (np.exp(log_p) * (log_p - log_q)).sum(-1),
            "token_entropy": -(np.exp(log_p) * log_p).sum(-1),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(scored, name)[row, : len(tokens)], values, rtol=0, atol=3e-5)
            assert not getattr(scored, name)[row, len(tokens) :].any()
    assert scored.token_kl[0].min() > 0.1


def test_a_model_has_no_kl_to_itself(tiny):
    scored = score(tiny, tiny.params, some_rollout(tiny))
    assert float(jnp.max(scored.token_kl)) == 0.0
    np.testing.assert_array_equal(scored.old_logprobs, scored.ref_logprobs)


def test_the_kept_hidden_states_of_the_reference_give_its_log_probs_again(tiny, reference):
    rollout, ref_params = some_rollout(tiny), reference[1]
    scored = score(tiny, ref_params, rollout, micro_batch_size=2, keep_ref_hidden=True)
    logits = head_logits(ref_params, scored.ref_hidden, spec=tiny.model.spec)
    again = token_logprobs(logits, rollout.response_tokens, temperature=TEMPERATURE)
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(np.asarray(again)[mask], np.asarray(scored.ref_logprobs)[mask], rtol=0, atol=1e-5)
    assert score(tiny, ref_params, rollout).ref_hidden is None


def test_micro_batches_change_no_score(tiny, reference):
    rollout = some_rollout(tiny)
    whole, parts = score(tiny, reference[1], rollout), score(tiny, reference[1], rollout, micro_batch_size=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), whole, parts)


def test_answers_of_one_length_are_scored_together_on_a_shorter_axis_and_change_no_score(tiny, reference, monkeypatch):
    axes = set()

    def seen(params, prompt_tokens, prompt_mask, response_tokens, *rest, **options):
        axes.add(response_tokens.shape[1])
        return response_hidden(params, prompt_tokens, prompt_mask, response_tokens, *rest, **options)

    monkeypatch.setattr(scoring, "response_hidden", seen)
    rollout = some_rollout(tiny, length=32, lengths=(20, 16, 1, 32, 9, 17))
    whole, parts = score(tiny, reference[1], rollout), score(tiny, reference[1], rollout, micro_batch_size=2)
    assert axes == {16, 32}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), whole, parts)


def test_states_kept_from_the_rollout_are_what_the_policy_says(tiny, reference, monkeypatch):
    """They are those of `response_hidden`; nothing of the policy but its head is read, on whatever axis."""
    monkeypatch.setattr("ppo_jax.ops.streaming.SHORTEST_AXIS", 1)
    rollout = some_rollout(tiny)
    sequences = (rollout.prompt_tokens, rollout.prompt_mask, rollout.response_tokens, rollout.response_mask)
    kept = replace(rollout, hidden=response_hidden(tiny.params, *sequences, spec=tiny.model.spec))
    of_head = {name: tree for name, tree in tiny.params.items() if not name.startswith("layer_")}
    of_nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tiny.params)
    expected = score(tiny, reference[1], rollout)
    for micro_batch_size in (6, 2):
        found = score(tiny._replace(params=of_nothing | of_head), reference[1], kept, micro_batch_size)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


def test_no_array_of_batch_by_length_by_vocabulary_is_ever_held():
    temporaries, one_array = scoring_memory.streamed_temporaries()
    assert temporaries < 0.5 * one_array
