"""Every field of every family's config class, changed one by one: none may be passed over in silence.

A changed field changes the spec, or is refused by name, or provably changes no logit: then the model of transformers
that is built from the changed config gives the very same logits with the same weights.
"""

import copy
import functools

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError

from parity.models import MODELS, hf_config, hf_model
from ppo_jax.errors import UserError
from ppo_jax.models.config_fields import HARMLESS
from ppo_jax.models.families import spec_of

REFUSED_BY_TRANSFORMERS = (ValueError, KeyError, TypeError, StrictDataclassError)
# Fields that transformers reads although its classes do not declare them, and one that nobody knows.
UNDECLARED = {
    "head_dim": 10, "is_causal": False, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    "attention_chunk_size": 4, "partial_rotary_factor": 0.5, "per_layer_config": {"0": {"rms_norm_eps": 0.5}},
    "use_bidirectional_attention": True, "tie_last_hidden_states": True, "nobody_knows": 1, "torch_dtype": "bfloat16",
    "sliding_window_pattern": 1, "num_key_value_heads": 1, "max_window_layers": 0, "hidden_act": "relu",
    "sliding_window_size": 8, "norm_type": "rms_norm", "mlp_type": "gated",
}  # fmt: skip
# Asks for the same attention in another order of float32 operations: the logits agree to rounding, not to the bit.
ROUNDING = "reorder_and_upcast_attn"
# A type's usual change would not do for these.
CHANGES = {
    "dtype": "bfloat16", "architectures": ["Other"], "transformers_version": "4.0.0", "problem_type": "regression",
    "hidden_act": "relu", "hidden_activation": "relu", "activation_function": "silu", "pad_token_id": 5,
    "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0}, "layer_types": ["sliding_attention"] * 2,
    "_name_or_path": "elsewhere", "name_or_path": "elsewhere", "summary_type": "first", "summary_activation": "tanh",
    "no_rope_layers": [0, 1], "no_rope_layer_interval": 1, "max_window_layers": 0, "num_key_value_heads": 1,
    "eos_token_id": [2, 5], "n_inner": 44, "transformers.js_config": {"dtype": "q4"}, "task_specific_params": {"a": 1},
    "cache_implementation": "hybrid", "_sliding_window_pattern": 1, "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 3.0, "use_bidirectional_attention": True,
}  # fmt: skip


def changed(name, value):
    """Another value for a field, of the same type where it has one."""
    if name in CHANGES and CHANGES[name] != value:
        return CHANGES[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 if value else 1
    if isinstance(value, list):
        return [changed(name, one) for one in value]
    return {None: 3, "gelu": "relu"}.get(value, f"other {value}")


def changed_rope(parameters):
    """Every dictionary that differs from the given one in one entry, nested ones included, with the entry's name."""
    for key, value in parameters.items():
        if isinstance(value, dict):
            yield from ((name, parameters | {key: other}) for name, other in changed_rope(value))
        elif key == "rope_type":
            yield key, parameters | {key: "linear" if value == "default" else "default", "factor": 3.0}
        else:
            yield key, parameters | {key: changed(key, value)}
    if "rope_type" in parameters:
        yield "mrope_section", parameters | {"mrope_section": [1, 1, 1]}


def changes_of(name):
    """(field, change) for every field of the config of a name in `MODELS`, entry by entry for the rope parameters."""
    values = hf_config(name).to_dict()
    for field, value in values.items():
        if field == "rope_parameters":
            yield from ((key, {field: other}) for key, other in changed_rope(value))
        elif field != "model_type":
            yield field, {field: changed(field, value)}
    for field in (UNDECLARED.keys() | HARMLESS) - values.keys():
        yield field, {field: UNDECLARED[field] if field in UNDECLARED else changed(field, None)}


@functools.cache
def weights_and_logits(name):
    model = hf_model(name)
    return model.state_dict(), logits(model)


def logits(model):
    import torch

    tokens = torch.tensor(np.random.default_rng(0).integers(0, 37, (2, 24)))
    with torch.no_grad():
        return model(input_ids=tokens).logits.numpy()


def same_logits_in_transformers(name, changes, relative=0.0):
    """Whether the changed config takes the same weights and gives the same logits, to the last bit unless told."""
    import torch
    from transformers import AutoModelForCausalLM

    weights, expected = weights_and_logits(name)
    config = hf_config(name, **copy.deepcopy(changes))
    config.return_dict = True  # false gives a tuple of the same numbers, on which the models' own heads stumble
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    model.load_state_dict(weights)
    return np.abs(logits(model) - expected).max() <= relative * np.abs(expected).max()


def refusal_of(config):
    try:
        spec_of(config)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_no_field_of_a_config_is_passed_over_in_silence(name):
    plain, harmless = spec_of(hf_config(name)), {}
    for field, change in changes_of(name):
        try:
            config = hf_config(name, **copy.deepcopy(change))
        except REFUSED_BY_TRANSFORMERS as error:  # `load_config` refuses it with the reason that transformers gives
            if "TypeError" in str(error):
                raise  # a value of another type would test nothing
            continue
        refusal = refusal_of(config)
        if refusal:  # names the field, or the one that it contradicts
            names = (field.removeprefix("_"), *change, "short_factor")
            assert any(named in refusal for named in names), (field, refusal)
        elif spec_of(config) != plain:
            continue
        elif field == ROUNDING:
            assert same_logits_in_transformers(name, change, relative=1e-6)
        elif field in change:
            harmless |= change
        else:  # an entry of the rope parameters
            assert same_logits_in_transformers(name, change), field
    assert harmless.keys() > {"use_cache", "initializer_range", "pad_token_id"}
    assert same_logits_in_transformers(name, harmless), harmless
