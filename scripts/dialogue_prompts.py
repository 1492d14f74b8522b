"""`python -m scripts.dialogue_prompts PAIRS --config RUN/config.yaml --out FILE`: prompts new to a reward model.

Of the dialogues of PAIRS everything before the last answer, where `ppo_jax.reward_model` with this configuration did
not train on it: among them are those that it was evaluated on.
"""

import argparse
import json
from pathlib import Path

from ppo_jax.build import open_model
from ppo_jax.pairs import group_of, load_split, read_pair
from ppo_jax.prompt_files import read_source
from ppo_jax.reward_model_config import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", metavar="PAIRS", help="the file of dialogues that the reward model was trained with")
    parser.add_argument("--config", required=True, help="config.yaml of the reward model's run")
    parser.add_argument("--out", required=True, type=Path, help="JSONL file to write")
    options = parser.parse_args()
    config = load(options.config, {"data.path": options.pairs})
    training, _ = load_split(config.data, open_model(config).tokenizer)
    trained_on, prompts = set(training.groups), {}
    for row in read_source(options.pairs, split=config.data.split, key="PAIRS"):
        try:
            pair = read_pair(row.values, config.data)
        except ValueError:  # unusable, and so not trained on either
            continue
        if pair.prompt and group_of(pair) not in trained_on:
            prompts[pair.prompt] = None
    options.out.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    print(f"{len(prompts)} prompts: {options.out}")


if __name__ == "__main__":
    main()
