"""A reward model: a sequence-classification model that scores prompts and answers in JAX, beside the policy.

Texts are tokenised anew, by the reward model's own tokenizer. A score is the logit of one label at the last token that
is not `pad_token_id` of its config.json, as in transformers' `...ForSequenceClassification`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppo_jax import sharding
from ppo_jax.config import RewardConfig
from ppo_jax.errors import UserError
from ppo_jax.models.decoder import DecoderSpec, Params, hidden_states
from ppo_jax.models.heads import ClassifierDirectory, head_values, label_head, load_classifier, open_classifier
from ppo_jax.pairs import messages_of
from ppo_jax.prompt_forms import MESSAGES, is_conversation
from ppo_jax.tracing import bucket, note_compilation

SMALLEST_BUCKET = 16

Columns = Mapping[str, Sequence[Any]]
NO_COLUMNS: Columns = MappingProxyType({})


@dataclass(frozen=True)
class RewardModel:
    """A reward function, called with prompts and answers.

    Every process scores its own answers on its own devices (`mesh`), so that processes need not agree on how many texts
    there are or how long.
    """

    model: ClassifierDirectory
    config: RewardConfig
    mesh: jax.sharding.Mesh
    trunk: Params
    head: Params  # {"kernel": [D], "bias": []} of the chosen label
    on_devices: ClassVar[bool] = True  # it computes on the run's devices: nothing else may start there meanwhile

    def __call__(self, prompts: list[str], answers: list[str], columns: Columns = NO_COLUMNS) -> list[float]:
        conversations = columns.get(MESSAGES, [None] * len(prompts))
        encoded = [self.encode(*row) for row in zip(prompts, answers, conversations, strict=True)]
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores, size = np.zeros(len(encoded)), self.config.model_batch_size
        with jax.set_mesh(self.mesh):
            for start in range(0, len(encoded), size):
                rows = by_length[start : start + size]
                scores[rows] = self._scores([encoded[i] for i in rows])
        return scores.tolist()

    def encode(self, prompt: str, answer: str, conversation: Any = None) -> list[int]:
        """Token ids of one text, no more than the model can read; with `model_max_tokens` the last ones.

        In a chat template the messages are those of `conversation`, where the prompt is one, or of the text, as
        `ppo_jax.reward_model` makes them of a text.
        """
        tokenizer, most = self.model.tokenizer, self.config.model_max_tokens
        if self.config.model_chat_template:
            if is_conversation(conversation, prompt):
                messages = [*conversation, {"role": "assistant", "content": answer}]
            else:
                messages = messages_of(prompt, answer)
            tokens: Any = tokenizer.apply_chat_template(messages, return_dict=False)
        else:
            tokens = tokenizer(prompt + answer)["input_ids"]
        tokens = tokens if most is None else tokens[-most:]
        spec, path = self.model.spec, self.model.path
        if len(tokens) > spec.max_positions:
            raise UserError(
                f"a text has {len(tokens)} tokens, {path} has {spec.max_positions} positions; set "
                f"reward.model_max_tokens to score the end of such texts"
            )
        if not tokens or max(tokens) >= spec.vocab_size:  # JAX would clamp such an id silently
            raise UserError(f"{path} cannot score {answer!r}: its tokens are {tokens}, of {spec.vocab_size} known ones")
        return tokens

    def _scores(self, encoded: Sequence[list[int]]) -> np.ndarray:
        """Scores of at most `model_batch_size` texts; rows are added and padded on the right, to few shapes."""
        longest = max(map(len, encoded))
        length = bucket(longest, smallest=SMALLEST_BUCKET, largest=self.model.spec.max_positions)
        shape = (self.config.model_batch_size, length)
        tokens, mask, last = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape[0], np.int32)
        for row, ids in enumerate(encoded):
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
            last[row] = last_position(ids, self.model.config.pad_token_id)
        scores = last_token_values(self.trunk, self.head, tokens, mask, last, spec=self.model.spec)
        return np.asarray(scores)[: len(encoded)]


def last_position(tokens: Sequence[int], pad_token_id: int | None) -> int:
    """Where the score is read: at the last token that is no pad, or the first one if all are.

    Where the pad is the EOS, that is the token before an EOS that ends the text.
    """
    return max((i for i, token in enumerate(tokens) if token != pad_token_id), default=0)


@partial(jax.jit, static_argnames="spec")
def last_token_values(
    trunk: Params,
    head: Params,
    tokens: Int[Array, "B S"],
    token_mask: Bool[Array, "B S"],
    last: Int[Array, " B"],
    *,
    spec: DecoderSpec,
) -> Float[Array, " B"]:
    """The head's value of the hidden state at position `last` of every row, in float32 at least."""
    note_compilation("reward model", B=tokens.shape[0], S=tokens.shape[1])
    tokens, token_mask = sharding.by_rows((tokens, token_mask))
    hidden = hidden_states(trunk, tokens, token_mask, spec=spec)
    return head_values(head, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def open_reward_model(
    config: RewardConfig, *, ignored_config_fields: tuple[str, ...] = ()
) -> tuple[ClassifierDirectory, int]:
    """The directory of `reward.model` and the index of the label that is the score, all but the weights checked."""
    model = open_classifier(str(config.model), key="reward.model", ignored_config_fields=ignored_config_fields)
    if config.model_chat_template and not model.tokenizer.chat_template:
        raise UserError(f"reward.model_chat_template is true, but the tokenizer of {model.path} has no chat template")
    if config.model_max_tokens is not None and config.model_max_tokens > model.spec.max_positions:
        raise UserError(
            f"reward.model_max_tokens ({config.model_max_tokens}) must be at most the {model.spec.max_positions} "
            f"positions of {model.path}"
        )
    return model, _label_index(model, config.model_label)


def _label_index(model: ClassifierDirectory, label: int | str | None) -> int:
    if label is None and len(model.labels) == 1:
        return 0
    if isinstance(label, int) and label < len(model.labels):
        return label
    if label in model.labels:
        return model.labels.index(label)
    listing = ", ".join(f"{i} ({name})" for i, name in enumerate(model.labels))
    raise UserError(
        f"reward.model_label: got {label!r}, expected index or name of a label of {model.path}, which has {listing}"
    )


def load_reward_model(
    config: RewardConfig, mesh: jax.sharding.Mesh, *, dtype: Any, ignored_config_fields: tuple[str, ...] = ()
) -> RewardModel:
    """The reward model with its weights in `dtype`, on those devices of the run's mesh that are this process's."""
    model, index = open_reward_model(config, ignored_config_fields=ignored_config_fields)
    own = sharding.own_mesh(mesh)
    with jax.set_mesh(own):
        trunk, score = load_classifier(model, dtype=dtype, place=partial(sharding.place_param, own))
        return RewardModel(model, config, own, trunk, label_head(score, index))
