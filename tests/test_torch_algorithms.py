"""The twin's choices of algorithm on cases small enough for paper: shaping, controller, critic, warm-up, early stop."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from ppo_jax.config_file import load
from ppo_torch_ref import algorithm, critic, model, ops, scoring, shaping, update
from ppo_torch_ref.rollout import EOS, TRUNCATED, Rollout

LENGTH = 6
LLAMA = LlamaConfig(
    vocab_size=11,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    initializer_range=0.3,
    num_labels=1,
    pad_token_id=0,
)
WITH_CRITIC = {"advantage.estimator": "gae", "critic.kind": "value_head"}
GROUPS = {"rollout.answers_per_prompt": 2, "advantage.estimator": "group_leave_one_out"}
SLOW = {"update.learning_rate": 1e-3, "update.micro_batch_size": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are faster alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(**overrides):
    sizes = {"rollout.batch_size": 4, "update.minibatch_size": 4, "rollout.max_new_tokens": LENGTH}
    return load(None, sizes | overrides)


def float64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def answers_of(lengths, *, truncated=()):
    """A rollout of random tokens; the answers at the places `truncated` have no end."""
    torch.manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(1, LLAMA.vocab_size, mask.shape) * mask
    ends = torch.tensor([TRUNCATED if b in truncated else EOS for b in range(len(lengths))])
    prompts = torch.randint(1, LLAMA.vocab_size, (len(lengths), 3))
    return Rollout(
        prompts, torch.ones_like(prompts, dtype=torch.bool), tokens, mask, mask.double(), mask.double(), ends
    )


def random_model(seed=0):
    torch.manual_seed(seed)
    network = model.new_model(LLAMA).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.3)
    return network


class Learner:
    """Policy, reference and critic of a recipe, and one batch of their own answers to learn from."""

    def __init__(self, rollout, **overrides):
        config = config_of(**SLOW, **overrides)
        self.model, self.reference, self.critic = random_model(), random_model(1), None
        if config.critic.kind != "none":
            self.critic = critic.Critic(LLAMA.hidden_size, random_model(2) if config.critic.kind == "model" else None)
            torch.nn.init.normal_(self.critic.double().head.kernel)
        self.rollout, self.algorithm = rollout, algorithm.pick_algorithm(config)
        self.objective = algorithm.make_objective(config, self.critic)
        self.optimizer, self.critic_optimizer = algorithm.make_optimizers(config, self.model, self.critic)
        bootstrap = config.critic.bootstrap_truncated
        self.scored = scoring.score(
            self.model,
            self.reference,
            rollout,
            temperature=1.0,
            micro_batch_size=2,
            critic=self.critic,
            bootstrap=bootstrap,
        )
        self.config, self.iterations = config, 0

    def experience(self, seq_scores):
        scored, rollout = self.scored, self.rollout
        rewards = self.algorithm.token_rewards(seq_scores, scored, rollout.response_mask, kl_coef=float64(0.1)[0])
        advantages, returns = self.algorithm.advantages(rewards, scored, rollout)
        return update.Experience(
            rollout.prompt_tokens,
            rollout.prompt_mask,
            rollout.response_tokens,
            rollout.response_mask,
            scored.old_logprobs,
            advantages,
            scored.values,
            returns,
        )

    def update(self, experience, *, epochs=1, **settings):
        self.iterations += 1
        return update.update(
            self.model,
            self.optimizer,
            self.reference,
            experience,
            0.1,
            objective=self.objective,
            iteration=self.iterations - 1,
            orders=[torch.arange(4)] * epochs,
            minibatch_size=4,
            critic_optimizer=self.critic_optimizer,
            **settings,
        )


def weights_of(module):
    return copy.deepcopy(module.state_dict())


def moved(module, before):
    return {name for name, x in module.state_dict().items() if not torch.equal(x, before[name])}


# --- step 4 ---


def shaped(seq_scores, rollout, moments=None, **overrides):
    moments = shaping.first_moments(torch.float64) if moments is None else moments
    return algorithm.pick_algorithm(config_of(**overrides)).shape_scores(moments, seq_scores, rollout)


def test_scores_are_normalised_then_clipped_then_penalised():
    """Normalised they are ∓1, clipped ∓0.5; the penalties keep their size."""
    rollout = answers_of([1, LENGTH, 3, 5], truncated=[1])
    settings = {
        "reward.normalise": "batch",
        "reward.clip": 0.5,
        "reward.missing_eos_penalty": 2.0,
        "reward.min_tokens": 4,
        "reward.too_short_penalty": 0.8,
        "reward.soft_max_tokens": 4,
        "reward.too_long_penalty": 3.0,
    }
    scores, _ = shaped(float64(10, 14, 10, 14), rollout, **settings)
    expected = float64(-0.5 - 0.8 * 3 / 4, 0.5 - 2.0 - 3.0, -0.5 - 0.8 / 4, 0.5 - 3.0 / 2)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-8)


def test_running_moments_are_those_of_all_scores_so_far_this_batch_included():
    rollout, batches = answers_of([1, 2, 3, 4]), (float64(1, 2, 3, 4), float64(5, 5, 7, 9))
    first, moments = shaped(batches[0], rollout, **{"reward.normalise": "running"})
    second, moments = shaped(batches[1], rollout, moments, **{"reward.normalise": "running"})
    seen = torch.cat(batches)
    for found, batch, so_far in ((first, batches[0], batches[0]), (second, batches[1], seen)):
        expected = (batch - so_far.mean()) / so_far.std(correction=0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert float(moments.count) == 8


def test_an_answer_without_a_token_is_in_no_moment():
    rollout = answers_of([1, 0, 3, 4])
    _, moments = shaped(float64(1, 1000, 2, 3), rollout, **{"reward.normalise": "running"})
    torch.testing.assert_close(torch.stack(moments), float64(3, 2, 2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", ["k1", "exact", "biased_k3_in_loss"])
def test_each_form_of_the_kl_has_its_own_part_in_the_reward(form):
    scored = scoring.Scored(float64(-1, -2)[None], float64(-1.5, -4)[None], float64(5, 7)[None], float64(0, 0)[None])
    pick = algorithm.pick_token_rewards(config_of(**{"kl.form": form, "advantage.estimator": "leave_one_out"}))
    found = pick(float64(1), scored, torch.ones(1, 2, dtype=torch.bool), kl_coef=float64(0.1)[0])
    parts = {"k1": (-0.05, 1 - 0.2), "exact": (-0.7, 1.0), "biased_k3_in_loss": (0.0, 1.0)}
    torch.testing.assert_close(found, float64(*parts[form])[None], rtol=0, atol=1e-14)


def test_a_k1_penalty_per_token_is_that_of_the_answer_over_its_length():
    scored = scoring.Scored(float64(-1, -2)[None], float64(-1.5, -4)[None], float64(5, 7)[None], float64(0, 0)[None])
    pick = algorithm.pick_token_rewards(config_of(**{"kl.per": "token"}))
    found = pick(float64(1), scored, torch.ones(1, 2, dtype=torch.bool), kl_coef=float64(0.1)[0])
    torch.testing.assert_close(found, float64(-0.025, 1 - 0.1)[None], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("seq_kl", "factor"), [(100.0, 1.04), (5.5, 1.02), (5.0, 1.0), (0.0, 0.96)])
def test_beta_rises_above_the_target_and_falls_below_it(seq_kl, factor):
    change = algorithm.pick_next_kl_coef(config_of(**{"kl.target_nats": 5.0, "kl.horizon": 5}))
    assert float(change(float64(0.5)[0], float64(seq_kl)[0])) == pytest.approx(0.5 * factor, abs=1e-15)


def test_beta_is_fixed_without_a_target():
    assert float(algorithm.pick_next_kl_coef(config_of())(float64(0.5)[0], float64(100)[0])) == 0.5


# --- step 5 ---


def test_answers_are_compared_within_their_group():
    learner = Learner(answers_of([1, 2, 3, 4]), **GROUPS, **{"kl.coef": 0.0})
    rewards = ops.score_on_last_token(float64(1, 3, 10, 20), learner.rollout.response_mask)
    advantages, returns = learner.algorithm.advantages(rewards, learner.scored, learner.rollout)
    torch.testing.assert_close(advantages[:, 0], float64(-2, 2, -10, 10), rtol=0, atol=1e-14)
    assert returns is None


def test_capped_importance_weights_multiply_the_advantages():
    learner = Learner(answers_of([1, 2, 3, 4]), **GROUPS, **{"update.importance_cap": 1.5})
    rewards = ops.score_on_last_token(float64(1, 3, 10, 20), learner.rollout.response_mask)
    weighted, _ = learner.algorithm.advantages(rewards, *rated(learner))
    torch.testing.assert_close(weighted[:, 0], float64(-2 * 1.5, 2 * 0.5, -10, 10), rtol=0, atol=1e-14)


def rated(learner):
    """Scored and rollout whose ratios are 4, 1/2, 1 and 1, on every token of an answer."""
    mask = learner.rollout.response_mask
    ratios = float64(4, 0.5, 1, 1)[:, None].expand(mask.shape)
    scored = replace(learner.scored, old_logprobs=ops.zero_masked(ratios.log(), mask))
    return scored, replace(learner.rollout, behaviour_logprobs=torch.zeros_like(ratios))


def test_only_a_truncated_answer_goes_on_to_earn_the_value_behind_it():
    """Of the middle of longer answers: the state behind an answer is the one its next token would be drawn from."""
    longer = answers_of([6, 6, 6, 6])
    lengths = torch.tensor([4, 2, 4, 3])
    mask = torch.arange(4) < lengths[:, None]
    ends = torch.tensor([TRUNCATED, TRUNCATED, EOS, EOS])
    shorter = replace(longer, response_tokens=longer.response_tokens[:, :4], response_mask=mask, finish_reason=ends)
    settings = WITH_CRITIC | {"critic.bootstrap_truncated": True}
    all_values, learner = Learner(longer, **settings).scored.values, Learner(shorter, **settings)
    expected = torch.stack([all_values[0, 4], all_values[1, 2], *float64(0, 0)])
    torch.testing.assert_close(learner.scored.bootstrap_values, expected, rtol=0, atol=1e-13)
    advantages, _ = learner.algorithm.advantages(torch.zeros(4, 4).double(), learner.scored, shorter)
    last = advantages.gather(1, lengths[:, None] - 1)[:, 0]
    values = all_values.gather(1, lengths[:, None] - 1)[:, 0]
    torch.testing.assert_close(last, expected - values, rtol=0, atol=1e-13)


# --- step 6 ---


def gradient_norms(learner, experience):
    update.loss_and_gradients(learner.model, learner.reference, experience, 0.1, learner.objective)
    trained = (learner.model, learner.critic)
    return [float(update.global_norm(p.grad for p in net.parameters() if p.grad is not None)) for net in trained]


@pytest.mark.parametrize(("kind", "reaches_the_policy"), [("value_head", True), ("model", False)])
def test_the_value_loss_reaches_the_policy_through_a_shared_trunk_only(kind, reaches_the_policy):
    learner = Learner(answers_of([6, 2, 3, 4]), **WITH_CRITIC | {"critic.kind": kind})
    experience = learner.experience(float64(1, 2, 3, 4))
    experience = replace(experience, advantages=torch.zeros_like(experience.advantages))
    of_policy, of_critic = gradient_norms(learner, experience)
    assert (of_policy > 1e-3) == reaches_the_policy
    assert of_critic > 1e-3


def test_the_value_loss_is_half_the_mean_squared_distance_to_the_returns():
    learner = Learner(answers_of([6, 2, 3, 4]), **WITH_CRITIC | {"critic.coef": 0.3, "update.normaliser": "token_mean"})
    experience, mask = learner.experience(float64(1, 2, 3, 4)), learner.rollout.response_mask
    stats = learner.update(experience)[0]
    squares = (learner.scored.values - experience.returns)[mask] ** 2
    assert stats["loss/value"] == pytest.approx(0.3 * 0.5 * float(squares.mean()), rel=1e-12)


@pytest.mark.parametrize(("bound", "wanted", "learns"), [(0.1, 5.0, False), (0.1, -0.5, True), (None, 5.0, True)])
def test_values_that_moved_beyond_their_bound_go_no_further_but_may_return(bound, wanted, learns):
    learner = Learner(answers_of([6, 2, 3, 4]), **WITH_CRITIC | {"critic.kind": "model", "critic.clip_eps": bound})
    experience, values = learner.experience(float64(1, 2, 3, 4)), learner.scored.values
    _, of_critic = gradient_norms(learner, replace(experience, old_values=values - 1.0, returns=values + wanted))
    assert (of_critic > 1e-3) if learns else (of_critic == 0.0)


def test_each_is_clipped_by_its_own_norm():
    learner = Learner(answers_of([6, 2, 3, 4]), **WITH_CRITIC | {"update.max_grad_norm": 1e-3})
    stats = learner.update(learner.experience(float64(100, -200, 300, 400)))[0]
    assert min(stats["update/grad_norm"], stats["critic/grad_norm"]) > 1e-3
    for optimizer in (learner.optimizer, learner.critic_optimizer):
        assert float(update.global_norm(optimizer.mu.values())) == pytest.approx(0.1 * 1e-3, rel=1e-12)


def test_while_the_critic_warms_up_it_alone_moves_and_the_policys_schedule_waits():
    settings = {"critic.warmup_iterations": 1, "update.epochs": 2, "run.iterations": 3, "update.schedule": "linear"}
    learner = Learner(answers_of([6, 2, 3, 4]), **WITH_CRITIC | settings | {"critic.learning_rate": 0.5})
    before, critic_before = weights_of(learner.model), weights_of(learner.critic)
    stats = learner.update(learner.experience(float64(1, 2, 3, 4)), epochs=2)
    assert moved(learner.model, before) == set()
    assert moved(learner.critic, critic_before) == {"head.kernel", "head.bias"}
    assert [step["update/param_rel_change"] for step in stats] == [0.0, 0.0]
    assert all(step["update/grad_norm"] > 0 for step in stats)
    assert any(mu.any() for mu in learner.optimizer.mu.values())
    rates = [[optimizer.schedule(k) for k in range(6)] for optimizer in (learner.optimizer, learner.critic_optimizer)]
    assert rates[0] == pytest.approx([0, 0, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert rates[1] == pytest.approx([0.5 * (1 - k / 6) for k in range(6)])
    learner.update(learner.experience(float64(1, 2, 3, 4)), epochs=2)
    assert moved(learner.model, before) == set(before)


def test_the_step_that_goes_too_far_is_the_last():
    learners = [Learner(answers_of([6, 2, 3, 4])) for _ in range(2)]
    first, second = (learner.experience(float64(1, 2, 3, 4)) for learner in learners)
    everything = [step["policy/approx_kl_nats"] for step in learners[0].update(first, epochs=5)]
    assert everything == sorted(everything)
    assert everything[0] < 1e-12 < everything[1]
    between = (everything[1] + everything[2]) / 2
    assert len(learners[1].update(second, epochs=5, max_approx_kl_nats=between)) == 3


def test_the_learning_rate_does_not_wait_for_steps_that_are_left_out():
    learner, asked = Learner(answers_of([6, 2, 3, 4])), []
    learner.optimizer.schedule = lambda planned_step: asked.append(planned_step) or 1e-3
    experience = learner.experience(float64(1, 2, 3, 4))
    for ceiling in (None, 0.0, None):
        learner.update(experience, epochs=2, max_approx_kl_nats=ceiling)
    assert asked == [0, 1, 2, 4, 5]


def test_an_entropy_bonus_is_subtracted_and_raises_the_entropy():
    learner = Learner(answers_of([6, 2, 3, 4]), **{"update.entropy_coef": 0.7, "update.normaliser": "token_mean"})
    experience = learner.experience(float64(1, 2, 3, 4))
    stats = learner.update(replace(experience, advantages=torch.zeros_like(experience.advantages)), epochs=4)
    mean = float(learner.scored.token_entropy[learner.rollout.response_mask].mean())
    assert stats[0]["loss/entropy"] == pytest.approx(-0.7 * mean, rel=1e-12)
    assert stats[-1]["loss/entropy"] < stats[0]["loss/entropy"]


def test_the_biased_form_puts_k3_into_the_loss():
    settings = {"kl.form": "biased_k3_in_loss", "update.normaliser": "token_mean"}
    learner = Learner(answers_of([6, 2, 3, 4]), **GROUPS, **settings)
    mask, scored = learner.rollout.response_mask, learner.scored
    stats = learner.update(learner.experience(float64(1, 2, 3, 4)))[0]
    expected = 0.1 * float(ops.k3(scored.old_logprobs, scored.ref_logprobs)[mask].mean())
    assert stats["loss/kl"] == pytest.approx(expected, rel=1e-12)


def test_the_bounds_of_the_ratio_may_differ_and_a_second_one_holds_bad_answers():
    loss, acts = algorithm.pick_policy_loss(0.2, 0.5, 3.0)
    ratios, advantages = float64(1.4, 1.6, 0.7, 2.5, 4.0), float64(1, 1, -1, -1, -1)
    log_ratios = ratios.log().requires_grad_()
    token_losses = loss(log_ratios, torch.zeros(5).double(), advantages)
    token_losses.sum().backward()
    torch.testing.assert_close(token_losses.detach(), float64(-1.4, -1.5, 0.8, 2.5, 3.0), rtol=0, atol=1e-14)
    clipped = acts(log_ratios.detach(), torch.zeros(5).double(), advantages)
    assert clipped.tolist() == [False, True, True, False, True]
    assert ((log_ratios.grad == 0) == clipped).all()


# --- where a critic comes from ---


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A causal and a sequence-classification model of one shape."""
    found = {}
    for name, auto in (("causal", AutoModelForCausalLM), ("classifier", AutoModelForSequenceClassification)):
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        auto.from_config(LLAMA).save_pretrained(found[name])
    return found


def test_a_critic_from_a_language_model_has_its_trunk_and_says_nothing_yet(directories):
    fresh = critic.load_critic(directories["causal"], dtype=torch.float64)
    names = {name for name, _ in fresh.named_parameters()}
    assert {"head.kernel", "head.bias", "trunk.model.embed_tokens.weight"} <= names
    assert not any("lm_head" in name for name in names)
    assert fresh(torch.ones(4, 1), sequences()).abs().max() == 0


def test_a_critic_from_a_classifier_says_its_score(directories):
    fresh = critic.load_critic(directories["classifier"], dtype=torch.float32)
    classifier = AutoModelForSequenceClassification.from_pretrained(directories["classifier"]).eval()
    values = fresh(torch.ones(4, 1), sequences())
    with torch.no_grad():
        scores = classifier(torch.cat([sequences()[0], sequences()[2]], dim=1)).logits[:, 0]
    torch.testing.assert_close(values[:, -1].detach(), scores, rtol=0, atol=1e-5)
    assert scores.abs().max() > 0.01


def test_a_classifier_of_several_labels_is_no_critic(directories, tmp_path):
    weights = model.stored_tensors(directories["classifier"])
    (tmp_path / "config.json").write_text((directories["classifier"] / "config.json").read_text())
    save_file(weights | {"score.weight": torch.ones(2, LLAMA.hidden_size)}, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="several labels"):
        critic.load_critic(tmp_path, dtype=torch.float32)


def sequences():
    rollout = answers_of([4, 4, 4, 4])
    return rollout.prompt_tokens, rollout.prompt_mask, rollout.response_tokens, rollout.response_mask


def test_a_model_of_transformers_has_the_hidden_states_of_ours(directories):
    ours = model.load_model(directories["causal"])
    theirs = AutoModelForCausalLM.from_pretrained(directories["causal"], attn_implementation="eager").eval()
    with torch.no_grad():
        states, others = (model.response_states(network, *sequences()) for network in (ours, theirs))
    for x, y in zip(states, others, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
