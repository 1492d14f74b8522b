"""The built-in reward: how positive an answer sounds."""

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def vader_compound(prompts: list[str], answers: list[str]) -> list[float]:
    """VADER's compound score of each answer, in [-1, 1]; an empty answer scores 0.

    Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis", 2014.
    """
    return [_analyzer().polarity_scores(answer)["compound"] for answer in answers]
