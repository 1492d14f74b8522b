"""From a run's resolved `config.yaml` to its parts; the twin of `ppo_jax/build.py` and `ppo_jax/prompts.py`.

The package data of `ppo_jax` (the embedded model and prompts) is read, its code never is.
"""

import copy
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ppo_torch_ref.algorithm import Algorithm, make_objective, make_optimizers, pick_algorithm
from ppo_torch_ref.critic import Critic, load_critic
from ppo_torch_ref.model import Decoder, load_model
from ppo_torch_ref.rollout import Sampling
from ppo_torch_ref.shaping import ScoreMoments, first_moments
from ppo_torch_ref.update import AdamW, Objective

VADER = "ppo_jax.rewards.sentiment:vader_compound"

# Fields that this reference knows one value of.
ONLY = {
    "rollout.stop_strings": [],
    "model.compute_dtype": "float32",
    "lora.rank": 0,
    "lora.path": None,
    "prompts.form": "text",
    "prompts.evaluation_fraction": 0.0,
    "reward.model": None,
    "reward.functions": {},
    "reward.weights": {},
    "reward.url": None,
    "reward.function_retries": 0,
    "reward.max_dropped_frac": 0.0,
    "alarms.act": [],
    "alarms.stop": [],
}

# What a draw is for; distinct purposes never share noise.
ROLLOUT, SHUFFLE = 0, 1


@dataclass(frozen=True)
class Noise:
    """Every draw of a run, a function of (seed, step, purpose); a subclass may draw what `ppo_jax` draws."""

    seed: int

    def uniforms(self, step: int, answers: int, length: int) -> Tensor:
        """[answers, length] in [0, 1), float64: one for every token that may be sampled."""
        return torch.from_numpy(np.random.default_rng([self.seed, step, ROLLOUT]).random((answers, length)))

    def orders(self, step: int, epochs: int, answers: int) -> list[Tensor]:
        """The order of the answers in every epoch of the update."""
        rng = np.random.default_rng([self.seed, step, SHUFFLE])
        return [torch.from_numpy(rng.permutation(answers)) for _ in range(epochs)]


@dataclass
class Parts:
    """Everything a run needs; the reference is a frozen copy of the policy as it was loaded."""

    tokenizer: Any
    model: nn.Module
    reference: nn.Module
    reward: Callable[[list[str], list[str]], list[float]]
    prompts: "Prompts"
    noise: Noise
    sampling: Sampling
    algorithm: Algorithm
    objective: Objective  # the critic, where there is one, is in it
    optimizer: AdamW
    critic_optimizer: AdamW | None
    # What changes from iteration to iteration beside the weights.
    kl_coef: Tensor  # β of the next iteration
    score_moments: ScoreMoments  # of all scores so far


@dataclass(frozen=True)
class Prompts:
    """All prompts, encoded; iteration `step` uses the same ones in `ppo_jax`."""

    texts: list[str]
    encoded: list[list[int]]
    seed: int

    def batch(self, step: int, count: int) -> tuple[list[str], Tensor, Tensor]:
        """Texts, left-padded tokens [N, P] and their mask: successive windows over freshly shuffled epochs."""
        chosen = []
        for position in range(step * count, (step + 1) * count):
            epoch, offset = divmod(position, len(self.texts))
            chosen.append(int(np.random.default_rng([self.seed, epoch]).permutation(len(self.texts))[offset]))
        width = max(len(self.encoded[i]) for i in chosen)
        tokens = torch.zeros(count, width, dtype=torch.long)
        mask = torch.zeros(count, width, dtype=torch.bool)
        for row, i in enumerate(chosen):
            tokens[row, width - len(self.encoded[i]) :] = torch.tensor(self.encoded[i])
            mask[row, width - len(self.encoded[i]) :] = True
        return [self.texts[i] for i in chosen], tokens, mask


def read_config(file: Path) -> SimpleNamespace:
    """The sections of a resolved config.yaml as attributes; what this reference does not do is refused."""
    sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    config = SimpleNamespace(**{name: SimpleNamespace(**values) for name, values in sections.items()})
    for key, only in ONLY.items():
        section, _, name = key.partition(".")
        if (value := getattr(getattr(config, section), name)) != only:
            raise SystemExit(f"{file}: {key} is {value}; this reference has none")
    return config


def build(config: SimpleNamespace, *, dtype: torch.dtype, device: str, hf: bool) -> Parts:
    """Tokenizer, models, reward, prompts and optimizers of a run; with `hf` the policy is that of `transformers`."""
    directory, sampling = model_directory(config.model.path), config.rollout
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = (load_hf_model if hf else load_model)(directory, dtype=dtype).to(device)
    critic = first_critic(config, model, directory, dtype=dtype)
    critic = None if critic is None else critic.to(device)
    optimizer, critic_optimizer = make_optimizers(config, model, critic)
    return Parts(
        tokenizer=tokenizer,
        model=model,
        reference=copy.deepcopy(model).requires_grad_(False),
        reward=reward_function(config.reward.function),
        prompts=load_prompts(config, tokenizer),
        noise=Noise(config.run.seed),
        sampling=Sampling(
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            eos_tokens=eos_tokens(sampling.eos_tokens, directory, tokenizer),
        ),
        algorithm=pick_algorithm(config),
        objective=make_objective(config, critic),
        optimizer=optimizer,
        critic_optimizer=critic_optimizer,
        kl_coef=torch.tensor(config.kl.coef, dtype=dtype, device=device),
        score_moments=ScoreMoments(*(x.to(device) for x in first_moments(dtype))),
    )


def first_critic(config: SimpleNamespace, model: nn.Module, directory: Path, *, dtype: torch.dtype) -> Critic | None:
    """The critic that a run starts with: a head on the policy's trunk, or a model, by default the policy's own."""
    if config.critic.kind == "none":
        return None
    if config.critic.kind == "value_head":
        return Critic(width_of(model)).to(dtype)
    path = config.critic.path
    return load_critic(directory if path is None else model_directory(path), dtype=dtype)


def width_of(model: Any) -> int:
    return model.spec.width if isinstance(model, Decoder) else model.config.hidden_size


def load_hf_model(directory: Path, *, dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def assets() -> Path:
    """The package data of `ppo_jax`, found without importing it."""
    spec = importlib.util.find_spec("ppo_jax")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("'embedded' is package data of ppo_jax, which is not installed here")
    return Path(spec.submodule_search_locations[0]) / "assets"


def model_directory(path: str) -> Path:
    if path == "embedded":
        return assets() / "tiny_reviews"
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))


def reward_function(name: str) -> Callable[[list[str], list[str]], list[float]]:
    """The function that `module:function` names; the default one of ppo_jax is made here from its source."""
    if name == VADER:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        analyzer = SentimentIntensityAnalyzer()
        return lambda prompts, answers: [analyzer.polarity_scores(answer)["compound"] for answer in answers]
    module_name, _, function_name = name.partition(":")
    if module_name.split(".")[0] == "ppo_jax":
        raise SystemExit(f"reward.function: {name} is code of ppo_jax, which this reference never imports")
    sys.path.append(str(Path.cwd()))
    return getattr(importlib.import_module(module_name), function_name)


def eos_tokens(names: list[str] | None, directory: Path, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer: the given ones, or those of the generation config and the tokenizer."""
    if names is not None:
        return [tokenizer.convert_tokens_to_ids(name) for name in names]
    found = {tokenizer.eos_token_id}
    if (directory / "generation_config.json").is_file():
        declared = GenerationConfig.from_pretrained(directory).eos_token_id
        found.update(declared if isinstance(declared, list) else [declared])
    return sorted(found - {None})


def load_prompts(config: SimpleNamespace, tokenizer: Any) -> Prompts:
    """Prompts of a JSONL or text file, or the embedded ones."""
    path, section = config.prompts.path, config.prompts
    file = assets() / "prompts.jsonl" if path == "embedded" else Path(path).expanduser()
    if file.suffix not in (".jsonl", ".txt") or not file.is_file():
        raise SystemExit(f"prompts.path: {path} is not a .jsonl or .txt file, all that this reference reads")
    lines = file.read_text(encoding="utf-8").splitlines()
    field = "prompt" if path == "embedded" else section.field
    texts = lines if file.suffix == ".txt" else [json.loads(line)[field] for line in lines]
    encoded = [encode(text, tokenizer, chat_template=section.chat_template) for text in texts]
    long = [i for i, tokens in enumerate(encoded) if len(tokens) > section.max_tokens]
    if long and section.too_long == "error":
        raise SystemExit(f"prompts.path: {len(long)} prompts have more than {section.max_tokens} tokens")
    kept = [i for i in range(len(texts)) if section.too_long != "skip" or i not in long]
    return Prompts([texts[i] for i in kept], [encoded[i][-section.max_tokens :] for i in kept], config.run.seed)


def encode(text: str, tokenizer: Any, *, chat_template: bool) -> list[int]:
    if not chat_template:
        return tokenizer(text)["input_ids"]
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
