"""`python -m scripts.dialogue_prompts PAIRS --config RUN/config.yaml --out FILE`: prompts new to a reward model.

Of the dialogues of PAIRS everything before the last answer, where it is the same on both sides and nothing that
`ppo_jax.reward_model` with this configuration trained on begins with it: among them are those that it was evaluated on.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ppo_jax.build import open_model
from ppo_jax.errors import UserError
from ppo_jax.pairs import keys_of, load_split, read_pair
from ppo_jax.prompt_files import read_source
from ppo_jax.reward_model_config import RewardModelConfig, load


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", metavar="PAIRS", help="the file of dialogues that the reward model was trained with")
    parser.add_argument("--config", required=True, help="config.yaml of the reward model's run")
    parser.add_argument("--out", required=True, type=Path, help="JSONL file to write; one that is there is refused")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"--out: {options.out} is there already; choose another")
    try:
        prompts = new_prompts(options.pairs, load(options.config, {"data.path": options.pairs}))
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        options.out.write_text(lines, encoding="utf-8")
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out: {options.out} cannot be written: {error.strerror}")
    print(f"{len(prompts)} prompts: {options.out}")


def new_prompts(pairs: str, config: RewardModelConfig) -> list[str]:
    """What both sides of a pair begin with, once each, in the order of the file."""
    training, _ = load_split(config.data, open_model(config).tokenizer)
    trained_on, prompts = {key for keys in training.keys for key in keys}, {}
    for row in read_source(pairs, split=config.data.split, key="PAIRS"):
        try:
            pair = read_pair(row.values, config.data)
        except ValueError:  # unusable, and so not trained on either
            continue
        if pair.prompt and trained_on.isdisjoint(keys_of(pair)):
            prompts[pair.prompt] = None
    return list(prompts)


if __name__ == "__main__":
    main()
