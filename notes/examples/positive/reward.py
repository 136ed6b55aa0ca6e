"""A reward for texts that sound positive: the lexicon of vaderSentiment (pip install vaderSentiment).

It is called as `GRPOTrainer` of TRL calls a reward function: by keyword, with lists, and it returns
one number per reply. --reward notes/examples/positive/reward.py:positive
"""
import re

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def without_repetition(text: str) -> str:
    """Keep every word once. So "good, good, good" earns no more than "good"."""
    seen, kept = set(), []
    for word in text.split():
        key = re.sub(r"\W", "", word.lower())
        if key not in seen:
            kept.append(word)
            seen.add(key)
    return " ".join(kept)


def positive(completions, **kwargs):
    """VADER's compound score of the reply, without the beginning: -1 (negative) to 1 (positive).

    The lexicon gives each word a number; "not" turns it around. The compound score squeezes the sum
    into -1 to 1, so a fifth happy word adds little. "!" and CAPITALS would count extra, and are
    removed: they are an easy way to cheat.
    """
    scores = []
    for text in completions:
        plain = without_repetition(text).lower().replace("!", ".")
        scores.append(analyzer.polarity_scores(plain)["compound"])
    return scores
