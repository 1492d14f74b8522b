"""Expected gradients over every answer and every batch are what is claimed; a planted bug breaks the claim."""

import json
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import torch

from parity.truth import __main__ as command
from parity.truth import enumeration, estimators, forms, jax_stages, terms, training
from parity.truth.claims import direction_error, relative_error, row_of
from parity.truth.enumeration import EOS, all_answers
from ppo_jax import algorithm, update
from ppo_jax.ops import advantages, kl, logprobs, losses, masking, rewards
from ppo_torch_ref import algorithm as torch_algorithm
from ppo_torch_ref import ops as torch_ops
from ppo_torch_ref import shaping


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


# Thousands of batches, and the same claims as with two answers: for `-m slow`, and for the command.
WIDE = ("B = 3", "n = 3", "2 x 2")


def narrow(part):
    """A part without the claims of wide batches."""
    name, claims = part.rows.args
    if not isinstance(claims, dict):
        claims = [claim for claim in claims if not claim.name.endswith(WIDE)]
    return replace(part, rows=partial(part.rows.func, name, claims))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(command, "PARTS", {name: narrow(part) for name, part in command.PARTS.items()})
        return run_command(monkeypatch, tmp_path_factory.mktemp("truth"), "--pairs", "1")


def test_every_claim_holds_in_both_stacks(outcome):
    assert_all_hold(*outcome, counts=(5, 6, 8, 4, 6, 5, 4, 4, 9, 7, 5, 4, 4, 2, 5, 8))


@pytest.mark.slow
def test_every_claim_holds_in_both_stacks_for_wide_batches_too(monkeypatch, tmp_path):
    outcome = run_command(monkeypatch, tmp_path, "--pairs", "2")
    assert_all_hold(*outcome, counts=(5, 6, 8, 4, 11, 7, 4, 4, 19, 9, 5, 5, 4, 2, 5, 8))


def assert_all_hold(code, rows, *, counts):
    assert [row for row in rows if not row["holds"]] == []
    assert code == 0
    assert max(row["largest"] for row in rows if row["claimed"] == "exact") < 1e-12
    assert min(row["smallest"] for row in rows if row["claimed"] == "biased") > 1e-3
    found = Counter((row["part"], row["claimed"]) for row in rows)
    assert tuple(found[part, claimed] / 2 for part in "ABCDEFGH" for claimed in ("exact", "biased")) == counts


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
    np.testing.assert_array_equal(answers.ended, ended.any(1))
    of_two = all_answers(2)
    assert (len(of_two.tokens), of_two.ended.sum(), of_two.lengths.max()) == (1 + 2 * 3, 1 + 2, 2)


# ---------------------------------------------------------------------------- planted bugs


def first_only(mask):
    return mask & (mask.cumsum(1) == 1)


def one_earlier(token_values):
    return token_values[:, np.array([1, 2, 3, 3])]


def without_the_eos(tokens, lengths):
    ended = tokens[np.arange(len(tokens)), lengths - 1] == EOS
    return np.arange(tokens.shape[1]) < (lengths - ended)[:, None]


def not_its_own(right):
    """Shrunk, as by a mean that includes the answer."""
    return lambda token_rewards, mask: right(token_rewards, mask) * (1 - 1 / mask.shape[0])


def of_all_tokens(right):
    return lambda mask, *, dtype: right(mask | ~mask, dtype=dtype)


# The name in either stack, what becomes of the function, and the claims that break, by part.
MUTANTS = {
    "score on the first token": (
        [(rewards, "_score_on_last_token"), (torch_ops, "score_on_last_token")],
        lambda right: lambda seq_scores, mask: right(seq_scores, first_only(mask)),
        {"B": ["no baseline, to go"], "C": ["k1, leave one out to go, B = 2"]},
    ),
    # With the current token in it as well, F would only be noisier: a claim of part A.
    "F that skips the next token": (
        [(kl, "future_kl"), (torch_ops, "future_kl")],
        lambda right: lambda token_kl, mask: one_earlier(right(token_kl, mask)),
        {"A": ["exact in the loss, of the future in the reward"]},
    ),
    "exact KL charged one token too early": (
        [(rewards, "exact_kl_token_rewards"), (torch_ops, "exact_kl_token_rewards")],
        lambda right: (
            lambda scores, token_kl, mask, *, kl_coef: right(scores, one_earlier(token_kl), mask, kl_coef=kl_coef)
        ),
        {
            "A": ["the same, by the rewards of training"],
            "C": ["exact, leave one out, B = 2", "exact, leave one out to go, B = 2"],
            "E": ["exact, GAE, λ = 1, wrong values", "exact, group leave one out, n = 2"],
        },
    ),
    "the answer itself in the baseline to go": (
        [(advantages, "leave_one_out_to_go_advantages"), (torch_ops, "leave_one_out_to_go_advantages")],
        not_its_own,
        {
            "C": ["exact, leave one out to go, B = 2"],
            "E": [f"{form}, group leave one out to go, {n}" for form in ("k1", "exact") for n in ("n = 3", "2 x 2")],
        },
    ),
    "the answer itself in the baseline": (
        [(advantages, "leave_one_out_advantages"), (torch_ops, "leave_one_out_advantages")],
        not_its_own,
        {
            "C": [f"{form}, leave one out, B = 2" for form in ("k1", "exact")],
            "E": [f"{form}, group leave one out, {n}" for form in ("k1", "exact") for n in ("n = 3", "2 x 2")],
        },
    ),
    "the mean of the batch for that of the group": (
        [(advantages, "group_mean_advantages"), (torch_ops, "group_mean_advantages")],
        lambda right: (
            lambda token_rewards, mask, *, answers_per_prompt: right(
                token_rewards, mask, answers_per_prompt=mask.shape[0]
            )
        ),
        {"E": ["k1, group mean, 2 x 2"]},
    ),
    "a mean that shrinks twice": (
        [(advantages, "batch_mean_advantages"), (torch_ops, "batch_mean_advantages")],
        not_its_own,
        {"E": ["k1, group mean, n = 2", "k1, group mean, n = 3"]},
    ),
    "values that have seen the token": (
        [(advantages, "gae_advantages"), (torch_ops, "gae_advantages")],
        lambda right: (
            lambda token_rewards, values, mask, **settings: right(token_rewards, one_earlier(values), mask, **settings)
        ),
        {"B": ["GAE, λ = 1, wrong values"], "E": [f"{form}, GAE, λ = 1, wrong values" for form in ("k1", "exact")]},
    ),
    "nothing behind the cut": (
        [(advantages, "gae_advantages"), (torch_ops, "gae_advantages")],
        lambda right: lambda *arrays, bootstrap_values, **settings: right(*arrays, **settings),
        {"E": ["k1, GAE, bootstrapped: score plus V at the cut"]},
    ),
    "k1 of the wrong sign": (
        [(kl, "k1"), (torch_ops, "k1")],
        lambda right: lambda logprobs, ref_logprobs: right(ref_logprobs, logprobs),
        {"A": ["k1 in the reward, to go"], "C": ["k1, batch mean, B = 2"], "H": ["k1 per token: (KL − 1) / length"]},
    ),
    "KL the wrong way round": (
        [(kl, "exact_token_kl"), (torch_ops, "exact_token_kl")],
        lambda right: lambda logits, ref_logits, *, temperature: right(ref_logits, logits, temperature=temperature),
        {"A": ["exact in the loss, of the future in the reward"], "G": ["exact in the loss: KL(π ‖ ρ)"]},
    ),
    "k2 without its half": (
        [(kl, "k2"), (torch_ops, "k2")],
        lambda right: lambda logprobs, ref_logprobs: 2.0 * right(logprobs, ref_logprobs),
        {"G": ["k2 in the loss: KL(π ‖ ρ)"]},
    ),
    "k3 the wrong way round": (
        [(kl, "sampled_token_k3"), (torch_ops, "sampled_token_k3")],
        lambda right: (
            lambda logits, ref_logits, tokens, *, temperature: right(
                ref_logits, logits, tokens, temperature=temperature
            )
        ),
        {"G": ["k3 in the loss: KL(ρ ‖ π)"], "H": ["k3 in the loss: KL(ρ ‖ π) of visited states"]},
    ),
    "k1 over the padded width": (
        [(rewards, "kl_per_token"), (torch_ops, "kl_per_token")],
        lambda right: lambda token_k1, mask: right(token_k1, mask | ~mask),
        {"H": ["k1 per token: (KL − 1) / length"]},
    ),
    "a penalty on entropy": (
        [(update, "entropy"), (logprobs, "entropy"), (torch_ops, "entropy")],
        lambda right: lambda logits, *, temperature: -right(logits, temperature=temperature),
        {"G": ["entropy in the loss: H"], "H": ["entropy bonus: Σ H of visited states"]},
    ),
    "an upper bound below 1": (
        [(losses, "clipped_policy_loss"), (torch_ops, "clipped_policy_loss")],
        lambda right: lambda *arrays, clip_eps, clip_eps_high: right(*arrays, clip_eps=clip_eps, clip_eps_high=-0.1),
        {"H": ["two clip bounds and a dual clip"]},
    ),
    "a dual clip below 1": (
        [(losses, "dual_clipped_policy_loss"), (torch_ops, "dual_clipped_policy_loss")],
        lambda right: lambda *arrays, dual_clip, **bounds: right(*arrays, dual_clip=0.5, **bounds),
        {"H": ["two clip bounds and a dual clip"]},
    ),
    "weights that are cut at ratio 1": (
        [(advantages, "importance_weights"), (torch_ops, "importance_weights")],
        lambda right: lambda *arrays, cap: right(*arrays, cap=0.5 * cap),
        {"H": ["importance weights, drawn by itself"]},
    ),
    "a penalty on those that ended": (
        [(rewards, "missing_eos_penalty"), (shaping, "missing_eos_penalty")],
        lambda right: lambda ended, **settings: right(~ended, **settings),
        {"F": ["missing EOS: s − penalty"]},
    ),
    # One token less everywhere would be the same penalty on all, which no baseline lets through.
    "long enough a token early": (
        [(rewards, "too_short_penalty"), (shaping, "too_short_penalty")],
        lambda right: (
            lambda lengths, *, min_tokens, penalty: right(lengths, min_tokens=min_tokens - 1, penalty=penalty)
        ),
        {"F": ["too short: s − penalty"]},
    ),
    "too long without the EOS": (
        [(rewards, "too_long_penalty"), (shaping, "too_long_penalty")],
        lambda right: lambda lengths, **settings: right(lengths - 1.0, **settings),
        {"F": ["too long: s − penalty"]},
    ),
    "a wider clip": (
        [(rewards, "clipped_scores"), (shaping, "clipped_scores")],
        lambda right: lambda seq_scores, *, bound: right(seq_scores, bound=2.0 * bound),
        {"F": ["clipped: clip(s)"]},
    ),
    "twice the variance": (
        [(rewards, "normalised_scores"), (shaping, "normalised_scores")],
        lambda right: lambda seq_scores, moments: right(seq_scores, moments._replace(m2=2.0 * moments.m2)),
        {"F": ["running, moments at rest: (s − μ) / σ"]},
    ),
    "EOS outside of the mask": (
        [(enumeration, "response_mask")],
        lambda right: without_the_eos,
        {
            "A": ["k1 in the reward, whole answer"],
            "B": ["no baseline", "the same, the product of an answer's ratios"],
            "C": ["exact, leave one out, B = 2", "exact, leave one out to go, B = 2"],
        },
    ),
    "lengths of the padded width": (
        [(losses, "sequence_mean_weights"), (torch_ops, "sequence_mean_weights")],
        of_all_tokens,
        {"D": ["sequence mean: weights 1 / length"]},
    ),
    "constant of the padded width": (
        [(losses, "constant_weights"), (torch_ops, "constant_weights")],
        lambda right: (
            lambda mask, *, max_response_tokens, dtype: right(mask, max_response_tokens=mask.shape[1], dtype=dtype)
        ),
        {"D": ["constant: the objective"]},
    ),
    "tokens of the padded width": (
        [(losses, "token_mean_weights"), (torch_ops, "token_mean_weights")],
        of_all_tokens,
        {"D": ["token mean: weights 1 / sum of lengths"]},
    ),
    "ddof 1": (
        [(masking, "masked_var"), (torch_ops, "masked_var")],
        lambda right: lambda x, mask: 2.0 * right(x, mask),
        {
            "C": ["k1, whitened, B = 2: the rate of winning"],
            "E": ["k1, group normalised, n = 2: the rate of winning"],
        },
    ),
}
# Those that change what the compiled gradient of the update calls.
IN_THE_LOSS = ("a penalty on entropy", "an upper bound below 1", "a dual clip below 1")


@pytest.fixture
def fresh_programs(request):
    """Drop what is kept of the functions as they were, or as a mutant has made them."""

    def forget():
        algorithm._constant_weights.cache_clear()
        jax_stages.batch_program.cache_clear()
        if request.node.callspec.params["mutant"] == "EOS outside of the mask":
            training.random_pair.cache_clear()
        if request.node.callspec.params["mutant"] in IN_THE_LOSS:
            algorithm.pick_policy_loss.cache_clear()
            jax_stages._update_gradient.clear_cache()

    forget()
    yield
    forget()


def plant(monkeypatch, module, name, mutate):
    """The bug in the module, and wherever a table of choices has the function already."""
    right = getattr(module, name)
    wrong = mutate(right)
    monkeypatch.setattr(module, name, wrong)
    of_jax = (algorithm.OF_THE_BATCH, algorithm.OF_THE_GROUP, algorithm.OF_A_CRITIC, algorithm.LOSS_KL)
    for choices in (*of_jax, torch_algorithm.LOSS_KL):
        for choice, function in choices.items():
            if function is right:
                monkeypatch.setitem(choices, choice, wrong)


FORMULAS = {"A": estimators.OF_KL, "B": estimators.OF_SCORE, "G": estimators.OF_STATES}
CLAIMS = (*forms.OF_FORMS, *forms.OF_NORMALISERS, *forms.OF_GROUPS, *forms.OF_CRITICS, *forms.OF_SHAPING)


def rows_of(part, names):
    """These claims in both stacks, for one pair."""
    if part in FORMULAS:
        formulas = {name: FORMULAS[part][name] for name in names}
        rows = estimators.rows_of(part, formulas, pairs=1, torch_pairs=1)
    else:
        claims = [claim for claim in (*CLAIMS, *terms.OF_TERMS) if claim.name in names]
        rows = training.rows_of(part, claims, pairs=1, torch_pairs=1)
    with jax.enable_x64(True):
        return list(rows)


@pytest.mark.parametrize(
    ("mutant", "part"), [(name, part) for name, (_, _, claims) in MUTANTS.items() for part in claims]
)
def test_a_planted_bug_breaks_its_claims(monkeypatch, fresh_programs, mutant, part):
    targets, mutate, claims = MUTANTS[mutant]
    for module, name in targets:
        plant(monkeypatch, module, name, mutate)
    broken = rows_of(part, claims[part])
    assert [row.name for row in broken if row.holds] == []
    assert [row.stack for row in broken] == ["JAX"] * len(claims[part]) + ["PyTorch"] * len(claims[part])
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
