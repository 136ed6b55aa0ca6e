"""A reward for brief answers that end: a rule, and no model.

It is called as `GRPOTrainer` of TRL calls a reward function: by keyword, with lists, and it returns
one number per reply. --reward notes/examples/brief/reward.py:brief

The prompts are conversations, so each prompt and each completion is a list of messages.
"""
import re


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def points(question: str, answer: str, finished: bool) -> float:
    """-1 for an answer that was cut off, 0 to 2 for one that ends.

    "The shorter, the better" would be easy to cheat: with "", "Yes.", or the question once more. So
    shortness counts only in an answer that names what was asked (a word of the question) and says
    something new (a word that the question does not have), each of 3 letters or more.
    """
    if not finished:
        return -1.0
    asked, said = set(words_of(question)), words_of(answer)
    long_words = {word for word in said if len(word) >= 3}
    if not long_words & asked or not long_words - asked:
        return 0.0
    return max(2 - max(len(said) - 8, 0) / 10, 0.0)  # up to 8 words: 2 points; 18 words: 1 point


def brief(prompts, completions, finished, **kwargs):
    scores = []
    for prompt, completion, ended in zip(prompts, completions, finished):
        scores.append(points(prompt[-1]["content"], completion[-1]["content"], ended))
    return scores
