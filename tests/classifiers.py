"""Small random sequence-classification models of every family, as `parity.models` makes causal ones."""

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from parity.models import hf_config

LABELS = ("bad", "fair", "good")


def hf_classifier(name: str, *, labels: tuple[str, ...] = LABELS, seed: int = 7, **changes) -> PreTrainedModel:
    """The classifier over the trunk of a name in `parity.models.MODELS`: no term is inert."""
    config = hf_config(name, num_labels=len(labels), id2label=dict(enumerate(labels)), **changes)
    config.label2id = {label: i for i, label in enumerate(labels)}
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and parameter_name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.25 * noise)
    return model
