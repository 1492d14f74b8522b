"""A Hugging Face config, read field by field: what a family asks for counts as honoured, the rest is refused by name.

A field that is left over must be listed in `HARMLESS` or be switched off (absent, null or false). Fields whose absence
means on are therefore asked for explicitly, with `only`.
"""

from typing import Any

from transformers import PretrainedConfig

from ppo_jax.errors import UserError

# Fields that name, describe, initialise or drive generation, but change no logit (dropout is off everywhere).
HARMLESS = frozenset(
    """
    model_type architectures transformers_version torch_dtype dtype _name_or_path name_or_path use_cache
    pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id unk_token_id
    initializer_range attention_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp
    hidden_dropout residual_dropout embedding_dropout classifier_dropout is_decoder cache_implementation
    id2label label2id problem_type return_dict output_attentions output_hidden_states is_encoder_decoder
    chunk_size_feed_forward n_ctx task_specific_params summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn gradient_checkpointing
    is_llama_config transformers.js_config
    """.split()  # noqa: SIM905, a list of this length reads better as a paragraph
)

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class Fields:
    """A config's fields; what is asked for counts as honoured."""

    def __init__(self, config: PretrainedConfig):
        self._values = config.to_dict()
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._values.get(name)

    def derived(self, *names: str) -> None:
        """These were honoured by transformers' config class, which put their meaning into fields that are read."""
        self._read.update(names)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse the config unless the field is absent, null or one of the allowed values."""
        if self[name] is not None and self[name] not in allowed:
            raise self.refusal(name, f"this decoder only knows {' or '.join(map(repr, allowed)) or 'it absent'}")

    def activation(self, name: str) -> str:
        if self[name] not in ACTIVATION_NAMES:
            raise UserError(f"config.json: {name} is {self[name]!r}; supported are {', '.join(ACTIVATION_NAMES)}")
        return ACTIVATION_NAMES[self[name]]

    def refusal(self, name: str, reason: str) -> UserError:
        return UserError(
            f"config.json: {name}={self[name]!r} of model_type {self._values.get('model_type')!r} is refused: {reason}"
        )

    def refuse_leftovers(self, ignored: tuple[str, ...]) -> None:
        left = {
            name: value
            for name, value in self._values.items()
            if name not in self._read | HARMLESS | set(ignored) and value is not None and value is not False
        }
        if left:
            listing = ", ".join(f"{name}={value!r}" for name, value in sorted(left.items()))
            raise UserError(
                f"config.json has fields this decoder does not know for model_type "
                f"{self._values.get('model_type')!r}: {listing}. They may change the mathematics, so the model is "
                f"refused. If they do not, name them in model.ignored_config_fields."
            )
