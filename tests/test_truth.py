"""Expected gradients over every answer and every batch are what is claimed; a planted bug breaks the claim."""

import json
import sys

import jax
import numpy as np
import pytest
import torch

from parity.truth import __main__ as command
from parity.truth import enumeration, estimators, training
from parity.truth.claims import direction_error, relative_error, row_of
from parity.truth.enumeration import EOS, all_answers
from ppo_jax import algorithm
from ppo_jax.ops import advantages, kl, losses, masking, rewards
from ppo_torch_ref import ops as torch_ops


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are faster alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_command(monkeypatch, tmp_path, *words):
    """(exit code, rows) of `python -m parity.truth`, in this process."""
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["truth", *words, "--json", str(file)])
    return command.main(), json.loads(file.read_text())


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_command(monkeypatch, tmp_path_factory.mktemp("truth"), "--pairs", "2")


def test_every_claim_holds_in_both_stacks(outcome):
    code, rows = outcome
    assert [row for row in rows if not row["holds"]] == []
    assert code == 0
    assert max(row["largest"] for row in rows if row["claimed"] == "exact") < 1e-12
    assert min(row["smallest"] for row in rows if row["claimed"] == "biased") > 1e-3
    counts = {(part, claimed): 0 for part in "ABCD" for claimed in ("exact", "biased")}
    for row in rows:
        counts[row["part"], row["claimed"]] += 1
    assert list(counts.values()) == [2 * n for n in (5, 6, 7, 2, 7, 7, 4, 4)]


def test_both_stacks_find_the_same_bias(outcome):
    _, rows = outcome
    ours, theirs = (
        [[row["smallest"], row["median"], row["largest"]] for row in rows if (row["stack"], row["claimed"]) == key]
        for key in (("JAX", "biased"), ("PyTorch", "biased"))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=0)


def test_k2_in_the_loss_is_biased_as_the_exact_kl_there_is(outcome):
    _, rows = outcome
    found = {row["name"]: row["median"] for row in rows if row["part"] == "A" and row["stack"] == "JAX"}
    assert found["k2 in the loss"] == pytest.approx(found["exact in the loss"], rel=1e-12)
    assert found["k1 in the loss"] == pytest.approx(1.0, abs=1e-12)


def test_the_answers_are_all_there_are():
    answers = all_answers()
    assert len(answers.tokens) == 1 + 2 + 4 * 3
    ended = (answers.tokens == EOS) & answers.mask
    np.testing.assert_array_equal(answers.mask.sum(1), answers.one_hot.sum((1, 2)))
    np.testing.assert_array_equal(answers.lengths[~ended.any(1)], 3)
    assert answers.states.max() + 1 == 1 + 2 + 4
    assert not answers.mask[:, -1].any()


# ---------------------------------------------------------------------------- planted bugs


def first_only(mask):
    return mask & (mask.cumsum(1) == 1)


def one_earlier(token_values):
    return token_values[:, np.array([1, 2, 3, 3])]


def without_the_eos(tokens, lengths):
    ended = tokens[np.arange(len(tokens)), lengths - 1] == EOS
    return np.arange(tokens.shape[1]) < (lengths - ended)[:, None]


# The name in either stack, what becomes of the function, and the claims that break, by part.
MUTANTS = {
    "score on the first token": (
        [(rewards, "_score_on_last_token"), (torch_ops, "score_on_last_token")],
        lambda right: lambda seq_scores, mask: right(seq_scores, first_only(mask)),
        {"B": "no baseline, to go", "C": "k1, leave one out to go, B = 2"},
    ),
    # With the current token in it as well, F would only be noisier: a claim of part A.
    "F that skips the next token": (
        [(kl, "future_kl"), (torch_ops, "future_kl")],
        lambda right: lambda token_kl, mask: one_earlier(right(token_kl, mask)),
        {"A": "exact in the loss, of the future in the reward"},
    ),
    "exact KL charged one token too early": (
        [(rewards, "exact_kl_token_rewards"), (torch_ops, "exact_kl_token_rewards")],
        lambda right: (
            lambda scores, token_kl, mask, *, kl_coef: right(scores, one_earlier(token_kl), mask, kl_coef=kl_coef)
        ),
        {"A": "the same, by the rewards of training", "C": "exact, leave one out to go, B = 2"},
    ),
    "the answer itself in the baseline of the exact form": (
        [(advantages, "leave_one_out_to_go_advantages"), (torch_ops, "leave_one_out_to_go_advantages")],
        lambda right: lambda token_rewards, mask: right(token_rewards, mask) * (1 - 1 / mask.shape[0]),
        {"C": "exact, leave one out to go, B = 2"},
    ),
    "k1 of the wrong sign": (
        [(kl, "k1"), (torch_ops, "k1")],
        lambda right: lambda logprobs, ref_logprobs: right(ref_logprobs, logprobs),
        {"A": "k1 in the reward, to go", "C": "k1, batch mean, B = 2"},
    ),
    "KL the wrong way round": (
        [(kl, "exact_token_kl"), (torch_ops, "exact_token_kl")],
        lambda right: lambda logits, ref_logits, *, temperature: right(ref_logits, logits, temperature=temperature),
        {"A": "exact in the loss, of the future in the reward"},
    ),
    "EOS outside of the mask": (
        [(enumeration, "response_mask")],
        lambda right: without_the_eos,
        {"A": "k1 in the reward, whole answer", "B": "no baseline", "C": "exact, leave one out to go, B = 2"},
    ),
    "lengths of the padded width": (
        [(losses, "sequence_mean_weights"), (torch_ops, "sequence_mean_weights")],
        lambda right: lambda mask, *, dtype: right(mask | ~mask, dtype=dtype),
        {"D": "sequence mean: weights 1 / length"},
    ),
    "constant of the padded width": (
        [(losses, "constant_weights"), (torch_ops, "constant_weights")],
        lambda right: (
            lambda mask, *, max_response_tokens, dtype: right(mask, max_response_tokens=mask.shape[1], dtype=dtype)
        ),
        {"D": "constant: the objective"},
    ),
    "tokens of the padded width": (
        [(losses, "token_mean_weights"), (torch_ops, "token_mean_weights")],
        lambda right: lambda mask, *, dtype: right(mask | ~mask, dtype=dtype),
        {"D": "token mean: weights 1 / sum of lengths"},
    ),
    "ddof 1": (
        [(masking, "masked_var"), (torch_ops, "masked_var")],
        lambda right: lambda x, mask: 2.0 * right(x, mask),
        {"C": "k1, whitened, B = 2: the rate of winning"},
    ),
}


@pytest.fixture
def fresh_weights():
    """The factory keeps one function of the constant weights for each constant."""
    algorithm._constant_weights.cache_clear()
    yield
    algorithm._constant_weights.cache_clear()


def rows_of(part, name):
    """One claim in both stacks, for one pair."""
    if part in "AB":
        known, truth = {
            "A": (estimators.OF_KL, enumeration.seq_kl),
            "B": (estimators.OF_SCORE, enumeration.minus_expected_score),
        }[part]
        rows = estimators.rows_of(part, {name: known[name]}, truth, pairs=1, torch_pairs=1)
    else:
        claims = [claim for claim in training.OF_FORMS + training.OF_NORMALISERS if claim.name == name]
        rows = training.rows_of(part, claims, pairs=1, torch_pairs=1)
    with jax.enable_x64(True):
        return list(rows)


@pytest.mark.parametrize(
    ("mutant", "part"), [(name, part) for name, (_, _, claims) in MUTANTS.items() for part in claims]
)
def test_a_planted_bug_breaks_its_claim(monkeypatch, fresh_weights, mutant, part):
    targets, mutate, claims = MUTANTS[mutant]
    for module, name in targets:
        monkeypatch.setattr(module, name, mutate(getattr(module, name)))
    broken = rows_of(part, claims[part])
    assert [(row.stack, row.holds) for row in broken] == [("JAX", False), ("PyTorch", False)]
    assert min(row.smallest for row in broken) > 1e-3


def test_the_command_fails_when_a_claim_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch_ops, "k1", lambda logprobs, ref_logprobs: ref_logprobs - logprobs)
    code, rows = run_command(monkeypatch, tmp_path, "--parts", "A", "--pairs", "1")
    assert code == 1
    failed = [(row["stack"], row["name"]) for row in rows if not row["holds"]]
    assert failed == [("PyTorch", "k1 in the reward, whole answer"), ("PyTorch", "k1 in the reward, to go")]
    assert "A, PyTorch, k1 in the reward, to go: claimed to be exact and is not" in capsys.readouterr().out


@pytest.mark.parametrize("floor", [None, 1e-3])
def test_a_nan_holds_no_claim(floor):
    assert not row_of("A", "name", "JAX", [0.5 if floor else 0.0, np.nan], floor=floor).holds


def test_a_bias_of_scale_alone_is_no_bias_of_direction():
    truth = np.array([3.0, 4.0])
    assert direction_error(7 * truth, truth) < 1e-15
    assert direction_error(np.array([4.0, -3.0]) + truth, truth) == pytest.approx(2**-0.5)
    assert relative_error(3 * truth, truth) == pytest.approx(2.0)
