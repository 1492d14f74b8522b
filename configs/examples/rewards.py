"""Reward functions of the example configs: every kind that `reward.function` and `reward.functions` take."""


def brevity(prompts: list[str], answers: list[str]) -> list[float]:
    """1 for an empty answer, 0 from 30 words on."""
    return [max(0.0, 1 - len(answer.split()) / 30) for answer in answers]


async def mentions(prompts: list[str], answers: list[str], columns: dict[str, list]) -> dict[str, list[float]]:
    """Two scores by name, from the columns `wanted` and `unwanted` of the prompts: the share of their words used.

    Asynchronous, as a function that asks a service would be.
    """
    return {
        "wanted": [_share(words, answer) for words, answer in zip(columns["wanted"], answers, strict=True)],
        "unwanted": [_share(words, answer) for words, answer in zip(columns["unwanted"], answers, strict=True)],
    }


def _share(words: list[str], answer: str) -> float:
    return sum(word in answer.lower() for word in words) / len(words)
