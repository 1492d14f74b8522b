"""What an update is compared on: a case's settings, and the policy, critic, objective and optimizers of both stacks."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from parity.cases import ragged_answers
from parity.critics import jax_critic, of_critic, torch_critic
from parity.forward import TEMPERATURE, scored_answers
from parity.rows import Named, named
from parity.stacks import Pair, in_both
from ppo_jax import algorithm, records
from ppo_jax.config import Config
from ppo_jax.config_file import load
from ppo_jax.models.heads import critic_spec
from ppo_torch_ref import algorithm as torch_algorithm
from ppo_torch_ref import update as torch_update

KL_COEF = 0.3
ANSWERS, OPTIMIZER_STEPS = 6, 20


# Compared by identity: what is computed for a case is kept for it.
@dataclass(frozen=True, eq=False)
class Update:
    """What one comparison of an update exercises."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    ratio_clipped: bool = True
    norm_clipped: bool = False

    def config(self, normaliser: str) -> Config:
        return load(
            overrides={
                "run.iterations": OPTIMIZER_STEPS,
                "rollout.batch_size": ANSWERS,
                "rollout.max_new_tokens": 9,
                "rollout.temperature": TEMPERATURE,
                "update.epochs": 1,
                "update.minibatch_size": ANSWERS,
                "update.normaliser": normaliser,
                "update.learning_rate": 5e-5,
                "update.schedule": "cosine",
                "update.warmup_steps": 2,
                "update.max_grad_norm": 1.0,
                "update.weight_decay": 0.1,
                **self.settings,
            }
        )


EVERY_TERM = Update(
    "every term",
    {
        "kl.form": "exact",
        "advantage.estimator": "gae",
        "critic.kind": "value_head",
        "critic.coef": 0.25,
        "critic.clip_eps": 0.5,
        "critic.learning_rate": 1e-4,
        "critic.warmup_iterations": 2,
        "update.clip_eps_high": 0.3,
        "update.dual_clip": 1.0625,
        "update.entropy_coef": 0.05,
    },
    norm_clipped=True,
)
CRITIC_MODEL = Update(
    "k3 in the loss, critic model",
    {"kl.form": "biased_k3_in_loss", "advantage.estimator": "gae", "critic.kind": "model"},
)


class Learners:
    """What learns by a config, in both stacks, before any step; each has micro-batches of its own size."""

    def __init__(self, pair: Pair, config: Config, *, ours: int, theirs: int):
        kind, dtype = config.critic.kind, getattr(torch, pair.dtype)
        self.pair = pair
        # Copies, for a step consumes its parameters.
        self.params = jax.tree.map(jnp.copy, pair.params) | jax_critic(kind, pair.ref_params)
        self.model = pair.new_model()
        self.critic = torch_critic(kind, pair.case.ref_directory, pair.spec.width, dtype)
        objective = algorithm.make_objective(config, pair.spec, critic_spec(pair.spec) if kind == "model" else None)
        self.objective = replace(objective, compute_dtype=pair.dtype, micro_batch_size=ours)
        self.twin_objective = replace(torch_algorithm.make_objective(config, self.critic), micro_batch_size=theirs)
        self.optimizer = algorithm.pick_optimizer(config)
        self.opt_state = self.optimizer.init(self.params)
        self.twin_optimizer, self.twin_critic_optimizer = torch_algorithm.make_optimizers(
            config, self.model, self.critic
        )

    def twin_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The policy's and the critic's."""
        of_policy = dict(self.model.named_parameters())
        return of_policy if self.critic is None else of_policy | of_critic(dict(self.critic.named_parameters()))

    def jax_moments(self, name: str) -> Named:
        """Moments mu or nu; of a critic's optimizer and the policy's each has only its part of the parameters."""
        whole: dict[str, Any] = {}
        for _, part in optax.tree_utils.tree_get_all_with_path(self.opt_state, name):
            whole |= {key: x for key, x in part.items() if not isinstance(x, optax.MaskedNode)}
        return self.pair.jax_named(whole)

    def twin_moments(self, name: str) -> Named:
        of_policy = named(getattr(self.twin_optimizer, name))
        if self.twin_critic_optimizer is None:
            return of_policy
        return of_policy | of_critic(named(getattr(self.twin_critic_optimizer, name)))


def experience(
    pair: Pair, case: Update, *, advantage_scale: float = 1.0
) -> tuple[records.Experience, torch_update.Experience]:
    """Ragged answers with random advantages and returns; where ratios are to be clipped the old policy is far off."""
    scored, _, mask = scored_answers(pair)
    rng, config = np.random.default_rng(0), case.config("constant")
    off_policy, advantages, old_values, returns = (
        np.where(mask, rng.normal(0, scale, mask.shape), 0) for scale in (0.3, advantage_scale, 1.0, 1.0)
    )
    columns = vars(ragged_answers(pair.case.vocab_size)) | {
        "old_logprobs": scored["old_logprobs"] + off_policy * case.ratio_clipped,
        "advantages": advantages,
    }
    if config.critic.kind != "none":
        columns |= {"old_values": old_values, "returns": returns}
    arrays, tensors = in_both(pair.dtype, columns.values())
    ref_hidden = None if config.kl.form == "k1" else jnp.asarray(scored["ref_hidden"], pair.dtype)
    ours = records.Experience(**dict(zip(columns, arrays, strict=True)), ref_hidden=ref_hidden)
    return ours, torch_update.Experience(**dict(zip(columns, tensors, strict=True)))
