"""The critic: values of the states that tokens are drawn from; the twin of `ppo_jax/models/critic.py`."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ppo_torch_ref.model import CLASSIFIER, Decoder, Sequences, load_model, response_states, stored_tensors
from ppo_torch_ref.rope import at_least_float32


class ValueHead(nn.Module):
    """hidden · kernel + bias in float32 at least; 0 of every state at first."""

    def __init__(self, width: int):
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.sum(at_least_float32(hidden) * at_least_float32(self.kernel), dim=-1) + self.bias


class Critic(nn.Module):
    """A value head on the policy's trunk, or on a trunk of its own."""

    def __init__(self, width: int, trunk: Decoder | None = None):
        super().__init__()
        self.head, self.trunk = ValueHead(width), trunk

    def forward(self, policy_hidden: Tensor, sequences: Sequences) -> Tensor:
        """Values [B, T + 1] in units of the reward, of the states that `response_states` returns."""
        return self.head(policy_hidden if self.trunk is None else response_states(self.trunk, *sequences)[0])


def load_critic(directory: Path, *, dtype: torch.dtype) -> Critic:
    """A critic with the trunk of a Hugging Face directory; the score of a classification model is its first head."""
    trunk = load_model(directory, dtype=dtype, is_trunk=True)
    critic = Critic(trunk.spec.width, trunk).to(dtype)
    score = {name: x.to(dtype) for name, x in stored_tensors(directory).items() if name in CLASSIFIER}
    if any(len(x) != 1 for x in score.values()):
        raise SystemExit(f"critic.path: {directory} has several labels, and a value is one number")
    with torch.no_grad():
        for name, parameter in zip(CLASSIFIER, (critic.head.kernel, critic.head.bias), strict=True):
            if name in score:
                parameter.copy_(score[name][0])
    return critic
