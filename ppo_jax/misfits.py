"""What does not fit together in a configuration, and what is allowed and probably not meant."""

from collections.abc import Iterator

from ppo_jax.config import Config, LoraConfig, known_keys

Misfit = tuple[tuple[str, ...], str]  # the keys involved, the message


def misfits_of(config: Config) -> Iterator[Misfit]:
    """What is wrong between fields: (the keys involved, the message)."""
    rollout, update = config.rollout, config.update
    yield from _unread(config)
    for (big_key, big), (small_key, small) in (
        (
            ("rollout.batch_size", rollout.batch_size),
            ("rollout.answers_per_prompt", rollout.answers_per_prompt),
        ),
        (("rollout.batch_size", rollout.batch_size), ("update.minibatch_size", update.minibatch_size)),
        (
            ("update.minibatch_size", update.minibatch_size),
            ("update.micro_batch_size", config.micro_batch_size),
        ),
    ):
        if big % small:
            lower, upper = big // small * small, -(-big // small) * small
            nearest = f"nearest are {lower} and {upper}" if lower else f"the nearest is {upper}"
            yield (
                (big_key, small_key),
                f"{big_key} ({big}) must be divisible by {small_key} ({small}); {nearest}",
            )
    if rollout.min_new_tokens > rollout.max_new_tokens:
        yield (
            ("rollout.min_new_tokens", "rollout.max_new_tokens"),
            f"rollout.min_new_tokens ({rollout.min_new_tokens}) must be at most rollout.max_new_tokens "
            f"({rollout.max_new_tokens})",
        )
    yield from _adapter_misfits(config)
    yield from _algorithm_misfits(config)
    yield from _prompt_misfits(config)
    steps = config.run.iterations * config.optimizer_steps_per_iteration
    if update.warmup_steps >= steps > 0:
        yield (
            (
                "update.warmup_steps",
                "run.iterations",
                "update.epochs",
                "update.minibatch_size",
                "rollout.batch_size",
            ),
            f"update.warmup_steps ({update.warmup_steps}) must be below the run's {steps} optimizer steps",
        )


# Fields by the one without which nothing reads them.
NEEDED = {
    "reward.model": (
        "reward.model_label",
        "reward.model_batch_size",
        "reward.model_chat_template",
        "reward.model_max_tokens",
    ),
    "reward.url": ("reward.http_batch_size", "reward.timeout_s", "reward.retries"),
    "critic.kind": (
        "critic.learning_rate",
        "critic.coef",
        "critic.clip_eps",
        "critic.warmup_iterations",
        "critic.bootstrap_truncated",
        "advantage.discount",
        "advantage.gae_lambda",
    ),
    "kl.target_nats": ("kl.horizon",),
    "checkpoint.save_every": ("checkpoint.keep_best",),
}


def _unread(config: Config) -> Iterator[Misfit]:
    """Fields that were changed and that nothing will read, because another one is off."""
    fields = {key: field.default for key, field in known_keys()}
    values = {key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in fields}
    for switch, keys in NEEDED.items():
        if values[switch] in (None, "none", 0):
            for key in keys:
                if values[key] != fields[key]:
                    yield (key, switch), f"{key} ({values[key]}) has no use without {switch}"


def _adapter_misfits(config: Config) -> Iterator[Misfit]:
    """What says how an adapter begins needs a new one: an old one has its own rank, α and targets."""
    lora, fields = config.lora, LoraConfig.model_fields
    changed = [key for key in ("rank", "alpha", "targets") if getattr(lora, key) != fields[key].default]
    if lora.path is not None:
        for key in changed:
            yield (
                (f"lora.{key}", "lora.path"),
                f"lora.{key} ({getattr(lora, key)}) cannot be chosen with lora.path: that adapter has its own",
            )
    elif lora.rank == 0:
        for key in changed:
            yield (
                (f"lora.{key}", "lora.rank"),
                f"lora.{key} ({getattr(lora, key)}) has no use without lora.rank: the whole model is trained",
            )


OF_A_CRITIC = ("gae", "whitened_gae")
# An estimator that shrinks what it centres by 1 - 1/B, or divides it, leaves a KL in the loss with the wrong weight.
UNSCALED = ("leave_one_out", "leave_one_out_to_go", "group_leave_one_out", "group_leave_one_out_to_go", "gae")


def _algorithm_misfits(config: Config) -> Iterator[Misfit]:
    """Choices of algorithm whose combination has no right gradient, or no meaning."""
    rollout, reward, critic, estimator = config.rollout, config.reward, config.critic, config.advantage.estimator
    if config.kl.form == "exact" and estimator not in UNSCALED:
        yield (
            ("kl.form", "advantage.estimator"),
            f"advantage.estimator ({estimator}) must be one of {', '.join(UNSCALED)} with kl.form exact: "
            f"the KL in the loss is neither shrunk, as by a mean that includes the answer, nor divided by a deviation",
        )
    if config.kl.form != "k1" and config.kl.per == "token":
        yield (
            ("kl.form", "kl.per"),
            f"kl.per (token) is for kl.form k1; with {config.kl.form} the loss has a KL of every token anyway",
        )
    if config.kl.per == "token" and (estimator.endswith("_to_go") or estimator in OF_A_CRITIC):
        yield (
            ("kl.per", "advantage.estimator"),
            f"kl.per (token) needs an advantage of whole answers, not {estimator}: what is still to come of a mean "
            f"per token is the gradient of nothing",
        )
    if estimator.startswith("group_") and rollout.answers_per_prompt == 1:
        yield (
            ("advantage.estimator", "rollout.answers_per_prompt"),
            f"advantage.estimator ({estimator}) compares the answers to one prompt, and rollout.answers_per_prompt is "
            f"1: every advantage would be 0; ask for 4 or 8",
        )
    of_critic = estimator in OF_A_CRITIC
    if rollout.batch_size == 1 and not of_critic:
        yield (
            ("rollout.batch_size",),
            "rollout.batch_size (1): the baseline is made of the batch, so a single answer has advantage 0",
        )
    if of_critic != (critic.kind != "none"):
        yield (
            ("advantage.estimator", "critic.kind"),
            f"advantage.estimator ({estimator}) "
            + (
                "needs a critic: set critic.kind"
                if of_critic
                else f"reads no values: critic.kind {critic.kind} has no use"
            ),
        )
    if critic.path is not None and critic.kind != "model":
        yield (("critic.path", "critic.kind"), f"critic.path is for critic.kind model, which is {critic.kind}")
    if rollout.reuse_states:
        for key, value, why in (
            ("model.compute_dtype", config.model.compute_dtype != "float32", "only float32 rounds the decode alike"),
            ("critic.bootstrap_truncated", critic.bootstrap_truncated, "the state behind an answer was never computed"),
            ("update.importance_cap", config.update.importance_cap is not None, "it would weigh every token by 1"),
        ):
            if value:
                yield ("rollout.reuse_states", key), f"rollout.reuse_states does not go with {key}: {why}"
    if critic.warmup_iterations >= config.run.iterations:
        yield (
            ("critic.warmup_iterations", "run.iterations"),
            f"critic.warmup_iterations ({critic.warmup_iterations}) must be below run.iterations "
            f"({config.run.iterations}): the policy would never move",
        )
    if config.kl.target_nats is not None and config.kl.coef == 0:
        yield (
            ("kl.target_nats", "kl.coef"),
            "kl.target_nats steers kl.coef by factors, and a factor of 0 is 0: start it above",
        )
    for penalty, tokens, missing in (
        ("too_short_penalty", "min_tokens", reward.min_tokens == 0),
        ("too_long_penalty", "soft_max_tokens", reward.soft_max_tokens is None),
    ):
        if (getattr(reward, penalty) > 0) == missing:
            yield (
                (f"reward.{penalty}", f"reward.{tokens}"),
                f"reward.{penalty} ({getattr(reward, penalty):g}) and reward.{tokens} ({getattr(reward, tokens)}) need "
                f"each other",
            )
    if reward.soft_max_tokens is not None and reward.soft_max_tokens >= rollout.max_new_tokens:
        yield (
            ("reward.soft_max_tokens", "rollout.max_new_tokens"),
            f"reward.soft_max_tokens ({reward.soft_max_tokens}) must be below rollout.max_new_tokens "
            f"({rollout.max_new_tokens})",
        )


def _prompt_misfits(config: Config) -> Iterator[Misfit]:
    """Keys of prompts and their evaluation that need or exclude each other."""
    prompts = config.prompts
    if prompts.form == "messages" and not prompts.chat_template:
        yield (
            ("prompts.form", "prompts.chat_template"),
            "prompts.form (messages) needs prompts.chat_template true: a conversation is written as the tokenizer's "
            "template says",
        )
    if prompts.evaluation_path is not None and prompts.evaluation_fraction > 0:
        yield (
            ("prompts.evaluation_path", "prompts.evaluation_fraction"),
            f"prompts.evaluation_path ({prompts.evaluation_path}) and prompts.evaluation_fraction "
            f"({prompts.evaluation_fraction:g}) exclude each other: one says what is held out",
        )
    if config.monitor.evaluate_every > 0 and prompts.evaluation_path is None and prompts.evaluation_fraction == 0:
        yield (
            ("monitor.evaluate_every", "prompts.evaluation_path", "prompts.evaluation_fraction"),
            f"monitor.evaluate_every ({config.monitor.evaluate_every}) needs held-out prompts: set "
            f"prompts.evaluation_path or prompts.evaluation_fraction",
        )


def warnings_of(config: Config) -> list[str]:
    """What is allowed and probably not meant."""
    found = []
    if config.update.epochs > 4:
        found.append(f"update.epochs is {config.update.epochs}; more than 4 passes over one batch is aggressive")
    if config.update.max_grad_norm is None:
        found.append("update.max_grad_norm is null: gradients are not clipped")
    if config.update.clip_eps >= 1:
        found.append(f"update.clip_eps is {config.update.clip_eps}: the policy ratio is practically not clipped")
    if not 0.5 <= config.rollout.temperature <= 1.5:
        found.append(
            f"rollout.temperature is {config.rollout.temperature}: low ones stop exploration, high ones raise the "
            f"variance of the reward; 1.0 is the safe start"
        )
    if config.rollout.top_p < 1 or config.rollout.top_k > 0:
        found.append(
            "top-p or top-k sampling is on: log-probs describe the full distribution, so the gradient is slightly "
            "biased; watch rollout/kept_mass"
        )
    if config.update.normaliser != "constant":
        found.append(
            f"update.normaliser is {config.update.normaliser}: answers weigh by their length, so the gradient is not "
            f"that of the expected reward"
        )
    if config.kl.form == "biased_k3_in_loss":
        found.append(
            "kl.form is biased_k3_in_loss: its gradient is not that of the KL, by how much is in docs/truth.md; that "
            "of k1 and of exact is"
        )
    if config.kl.per == "token":
        found.append("kl.per is token: long answers are held less, and the gradient is not quite that of KL / length")
    if config.advantage.estimator in OF_A_CRITIC and (config.advantage.gae_lambda < 1 or config.advantage.discount < 1):
        found.append(
            "advantage.gae_lambda or discount is below 1: the gradient is biased by the critic's errors, which buys "
            "less noise; watch critic/explained_variance"
        )
    if config.critic.kind != "none" and config.critic.warmup_iterations == 0:
        found.append("critic.warmup_iterations is 0: the policy's first steps follow a critic that knows nothing yet")
    if config.kl.coef == 0:
        found.append("kl.coef is 0: nothing holds the policy near the reference; set run.max_seq_kl_nats at least")
    return found
