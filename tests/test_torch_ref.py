"""The PyTorch twin on its own: its loop learns what it is told to, and its optimizer is AdamW."""

import copy
import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ppo_jax.config_file import load
from ppo_jax.monitor import metrics
from ppo_jax.records import Rollout, Scored
from ppo_torch_ref import build, model, ops, rollout, train, update

WORDS = ["<eos>", "the", "film", "was", "good", "bad", "long", "short", "and", "very", "plot", "cast"]
GOOD = WORDS.index("good")
CRITIC = {"advantage.estimator": "gae", "critic.kind": "value_head"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are faster alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A random Llama with a tokenizer of a dozen words."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(directory)
    return directory


@pytest.fixture
def config_file(model_directory, tmp_path, monkeypatch):
    """Writes a resolved config.yaml whose reward counts the word "good"; takes dotted overrides."""
    (tmp_path / "counts_good.py").write_text(
        "def score(prompts, answers):\n    return [float(answer.split().count('good')) for answer in answers]\n"
    )
    (tmp_path / "prompts.txt").write_text("the film was\nthe plot\nvery long and\nthe cast was very\n")
    monkeypatch.chdir(tmp_path)

    def write(**overrides):
        settings = {
            "model.path": str(model_directory),
            "prompts.path": str(tmp_path / "prompts.txt"),
            "reward.function": "counts_good:score",
            "run.iterations": 3,
            "rollout.batch_size": 16,
            "rollout.max_new_tokens": 8,
            "update.minibatch_size": 16,
            "update.epochs": 1,
            "update.learning_rate": 0.01,
        }
        file = tmp_path / "config.yaml"
        file.write_text(load(None, settings | overrides).to_yaml())
        return file

    return write


def parts_of(file, *, hf=False, dtype=torch.float32):
    config = build.read_config(file)
    return config, build.build(config, dtype=dtype, device="cpu", hf=hf)


def probability_of_good(parts):
    """Mean probability of the rewarded word after every token of the prompts."""
    _, tokens, mask = parts.prompts.batch(0, 4)
    with torch.no_grad():
        logits = model.token_logits(parts.model, tokens, mask)
    return float(torch.softmax(logits, dim=-1)[..., GOOD][mask].mean())


def test_a_rewarded_word_becomes_likelier(config_file):
    config, parts = parts_of(config_file(**{"update.epochs": 4, "update.minibatch_size": 8, "kl.coef": 0.01}))
    before = probability_of_good(parts)
    for step in range(3):
        numbers = train.ppo_iteration(config, parts, step)
        assert numbers["update/optimizer_steps"] == 8
    assert probability_of_good(parts) > 1.5 * before


def test_a_kl_penalty_alone_moves_nothing_at_first_and_pulls_back_later(config_file):
    """At step 0 policy and reference are one: k1 is 0, and without a reward so is the gradient."""
    settings = {"kl.coef": 1.0, "rollout.batch_size": 256, "update.minibatch_size": 256, "run.iterations": 10}
    config, parts = parts_of(config_file(**settings))
    parts.reward = lambda prompts, answers: [0.0] * len(answers)
    assert train.ppo_iteration(config, parts, 0)["update/grad_norm"] == 0.0
    with torch.no_grad():
        parts.model.model["embed_tokens"].weight.mul_(1.5)
    kl = [train.ppo_iteration(config, parts, step)["kl/seq_nats"] for step in range(10)]
    assert kl[-1] < 0.6 * kl[0]


def test_the_command_writes_metrics_that_start_from_the_reference(config_file, tmp_path):
    train.main(["--config", str(config_file()), "--dtype", "float64", "--out", str(tmp_path / "out")])
    first, _, last = (json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert [first["step"], last["step"]] == [0, 2]
    assert first["kl/token_max_nats"] == first["kl/k1_seq_nats"] == 0.0
    assert first["policy/log_ratio_abs_max"] < 1e-12
    assert first["rollout/logprob_gap_max"] < 1e-12
    assert first["policy/clip_frac"] == 0.0
    assert first["reward/mean"] == first["score/mean"]
    assert first["update/optimizer_steps"] == 1
    assert last["kl/seq_nats"] > 1e-4
    assert last["reward/mean"] == pytest.approx(last["score/mean"] - last["kl/coef"] * last["kl/seq_nats"])


def test_the_reference_never_moves(config_file):
    config, parts = parts_of(config_file())
    before = {name: x.clone() for name, x in parts.reference.state_dict().items()}
    train.ppo_iteration(config, parts, 0)
    after, moved = parts.reference.state_dict(), parts.model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert all(not torch.equal(x, moved[name]) for name, x in before.items())


def test_a_model_of_transformers_can_take_the_place_of_ours(config_file):
    own, other = (train.ppo_iteration(*parts_of(config_file(), hf=hf), 0) for hf in (False, True))
    for name in ("logprob/mean", "loss/policy", "update/grad_norm", "response/len_mean_tokens"):
        assert own[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)


def test_metric_names_are_those_of_ppo_jax(config_file):
    row, token = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    tokens, mask = jax.ShapeDtypeStruct((2, 3), jnp.int32), jax.ShapeDtypeStruct((2, 3), bool)
    count, scalar = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    answers = Rollout(tokens, mask, tokens, mask, token, token, count, count, scalar)
    coef = jax.ShapeDtypeStruct((), jnp.float32)
    scored = Scored(token, token, token, token, values=token)
    measure = partial(metrics.experience_metrics, shaped_scores=row, returns=token)
    expected = jax.eval_shape(measure, answers, scored, row, coef)
    numbers = train.ppo_iteration(*parts_of(config_file(**CRITIC)), 0)
    assert set(expected) <= set(numbers)


@pytest.mark.parametrize("hf", [False, True])
@pytest.mark.parametrize("kind", ["value_head", "model"])
def test_a_critic_learns_what_the_answers_earn(config_file, kind, hf):
    """On its own: the policy waits all the while."""
    settings = CRITIC | {"critic.kind": kind, "critic.warmup_iterations": 9, "run.iterations": 10}
    config, parts = parts_of(config_file(**settings, **{"rollout.batch_size": 64, "update.epochs": 8}), hf=hf)
    seen = [train.ppo_iteration(config, parts, step) for step in range(4)]
    assert seen[0]["critic/value_mean"] == seen[0]["critic/explained_variance"] == 0.0
    assert seen[-1]["critic/explained_variance"] > 0.1
    assert seen[-1]["loss/value"] < 0.9 * seen[0]["loss/value"]
    assert seen[-1]["kl/seq_nats"] == 0.0


def test_beta_and_moments_go_from_iteration_to_iteration(config_file):
    config, parts = parts_of(config_file(**{"kl.target_nats": 1.0, "kl.horizon": 4, "reward.normalise": "running"}))
    coefs = [train.ppo_iteration(config, parts, step)["kl/coef"] for step in range(2)]
    assert coefs == pytest.approx([0.05, 0.05 * (1 - 0.2 / 4)], rel=1e-6)
    assert float(parts.score_moments.count) == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rollout.stop_strings", ["good"]),
        ("model.compute_dtype", "bfloat16"),
        ("prompts.form", "alpaca"),
        ("prompts.evaluation_fraction", 0.5),
        ("reward.model", "path"),
        ("lora.rank", 4),
        ("lora.path", "adapter"),
        ("reward.functions", {"a": "module:function"}),
        ("reward.weights", {"function": 2.0}),
        ("reward.url", "http://127.0.0.1:1/"),
    ],
)
def test_what_the_reference_does_not_do_is_refused_by_name(config_file, key, value):
    with pytest.raises(SystemExit, match=f"{key} is .*; this reference has none"):
        build.read_config(config_file(**{key: value}))


def test_an_answer_ends_with_its_eos_and_not_before_the_minimum(config_file):
    _, parts = parts_of(config_file(**{"rollout.min_new_tokens": 2, "rollout.max_new_tokens": 6}))
    _, tokens, mask = parts.prompts.batch(0, 4)
    # A uniform of 0 draws the first token of positive weight, which is the EOS unless it is banned.
    answers = rollout.generate(parts.model, tokens, mask, torch.zeros(4, 6), sampling=parts.sampling)
    np.testing.assert_array_equal(answers.response_tokens, [[1, 1, 0]] * 4)
    assert answers.response_mask.all()
    assert (answers.finish_reason == rollout.EOS).all()
    assert (answers.kept_mass[:, :2] < 1).all()
    torch.testing.assert_close(answers.kept_mass[:, 2], torch.ones(4))


def test_a_row_of_uniforms_decides_its_answer_alone(config_file):
    _, parts = parts_of(config_file())
    _, tokens, mask = parts.prompts.batch(0, 4)
    uniforms = torch.from_numpy(np.random.default_rng(0).random((4, 8)))
    together = rollout.generate(parts.model, tokens, mask, uniforms, sampling=parts.sampling)
    for row in range(4):
        one = slice(row, row + 1)
        alone = rollout.generate(parts.model, tokens[one], mask[one], uniforms[one], sampling=parts.sampling)
        length = int(alone.response_mask.sum())
        np.testing.assert_array_equal(alone.response_tokens[0, :length], together.response_tokens[row, :length])
        assert int(together.response_mask[row].sum()) == length


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_optimizer_is_adamw_with_decay_on_matrices_only(weight_decay):
    """Against torch's own AdamW, which has the same rule where nothing is clipped."""
    torch.manual_seed(0)
    ours = torch.nn.Linear(3, 2).double()
    theirs = torch.nn.Linear(3, 2).double()
    theirs.load_state_dict(ours.state_dict())
    optimizer = adamw(ours, max_grad_norm=None, weight_decay=weight_decay)
    groups = [{"params": [theirs.weight], "weight_decay": weight_decay}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        for net, stepper in ((ours, None), (theirs, reference)):
            net.zero_grad()
            net(torch.arange(3.0, dtype=torch.float64) + step).square().sum().backward()
            if stepper is None:
                optimizer.step(update.global_norm(optimizer.gradients().values()), step)
            else:
                stepper.step()
    for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 1.0), (1e6, None)])
def test_gradients_are_clipped_to_the_global_norm_and_not_a_bit_below_it(limit, expected):
    net = torch.nn.Linear(3, 2).double()
    net(torch.full((3,), 10.0, dtype=torch.float64)).square().sum().backward()
    optimizer = adamw(net, max_grad_norm=limit, weight_decay=0.0)
    norm = update.global_norm(optimizer.gradients().values())
    optimizer.step(norm, 0)
    first_moment = update.global_norm(optimizer.mu.values())
    assert float(first_moment) == pytest.approx(0.1 * (float(norm) if expected is None else expected), rel=1e-14)


def adamw(net, *, max_grad_norm, weight_decay):
    constant = partial(update.learning_rate, peak=0.01, schedule="constant", warmup_steps=0, total_steps=5)
    return update.AdamW(
        net, schedule=constant, max_grad_norm=max_grad_norm, b1=0.9, b2=0.95, eps=1e-8, weight_decay=weight_decay
    )


def ragged_batch():
    rng = np.random.default_rng(0)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2]])
    return update.Experience(
        torch.ones(4, 2, dtype=torch.long),
        torch.ones(4, 2, dtype=torch.bool),
        torch.from_numpy(rng.integers(0, len(WORDS), (4, 5))),
        mask,
        ops.zero_masked(torch.from_numpy(rng.normal(-2, 1, (4, 5))), mask),
        torch.from_numpy(rng.normal(0, 1, (4, 5))),
    )


def test_micro_batches_add_up_to_the_minibatch(config_file):
    _, parts = parts_of(config_file(), dtype=torch.float64)
    batch, results = ragged_batch(), []
    for size in (4, 2, 1):
        objective = replace(parts.objective, loss_weights=ops.token_mean_weights, micro_batch_size=size)
        loss, _ = update.loss_and_gradients(parts.model, parts.reference, batch, 0.1, objective)
        results.append((loss, [param.grad.clone() for param in parts.model.parameters()]))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-14)
        torch.testing.assert_close(gradients, results[0][1], rtol=0, atol=1e-13)


def test_a_step_that_is_not_finite_leaves_parameters_and_moments_untouched(config_file):
    _, parts = parts_of(config_file(), dtype=torch.float64)
    batch, before = ragged_batch(), copy.deepcopy(parts.model.state_dict())
    batch.advantages[0, 0] = torch.nan
    stats = update.ppo_step(parts.model, parts.optimizer, parts.reference, batch, 0.1, 0, objective=parts.objective)
    assert stats["update/skipped_steps"] == 1
    torch.testing.assert_close(parts.model.state_dict(), before, rtol=0, atol=0)
    assert all(not mu.any() for mu in parts.optimizer.mu.values())


def test_no_two_draws_share_noise():
    noise = build.Noise(seed=3)
    uniforms = [noise.uniforms(step, 4, 5) for step in (0, 1)] + [build.Noise(seed=4).uniforms(0, 4, 5)]
    assert len(np.unique(torch.stack(uniforms))) == 3 * 20
    assert torch.equal(noise.uniforms(1, 4, 5), uniforms[1])


def test_every_epoch_visits_every_answer_once_in_a_fresh_order():
    orders = [order for step in (0, 1) for order in build.Noise(seed=3).orders(step, 3, 16)]
    assert len(orders) == 6
    assert all(sorted(order.tolist()) == list(range(16)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 6
