"""Grades the homework: eight functions of ppo_rlhf.py, each one alone. Run: pytest FOLDER

Please solve before you read on: this file contains the answers. `python notes/homework.py FOLDER`
copies it to FOLDER/homework_test.py. There it grades FOLDER/ppo_rlhf.py. It needs only torch and
pytest.

For each function there are three things here:
    an oracle   the right answer, slowly: Python floats, and a loop over the tokens of one reply
    examples    small batches and what the oracle says about them. They begin with one reply without
                padding. Later the padding holds zeros, then other numbers, then NaN.
    mistakes    the usual wrong formulas, each with a hint
`grade` looks for the first example where the function is wrong. If one of the mistakes gives the
same wrong numbers there, the student reads its hint. If several do, the one counts that agrees with
the function on most examples. If none does, the student sees the numbers: expected and got.

A function is graded alone: `load` takes from the script only what this function needs. If `gae`
calls `td_residuals`, it gets the oracle's. So an unsolved or wrong function spoils no other one.

Some mistakes cannot be seen in these eight functions, so nothing here looks for them:
    no `detach` between critic and policy        it is in `state_values`, which is not homework
    log-probs at another temperature             it is in `read_replies`. The other side of this
                                                 mistake is here: a sampler without temperature
    the reference in the ratio's denominator     it is in `actor_loss`, which calls `policy_loss`
    rewards, returns or advantages with gradient Phase I works without gradient, so `detach` in
                                                 these functions is neither needed nor wrong
"""
import ast
import inspect
import math
import sys
import textwrap
import traceback
import types
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import torch
import torch.nn.functional as F

torch.set_num_threads(1)  # the tensors are so small that threads would only wait for each other
SCRIPT = Path(__file__).with_name("ppo_rlhf.py")  # the student's
NAN = math.nan
DRAWS = 2000  # how often the sampler draws from one distribution


class Wrong(Exception):
    """What the student reads. The first line is short: pytest repeats it at the end."""


class Example(NamedTuple):
    about: str
    arguments: dict       # name -> tensor or number, in the order of the function's arguments
    expected: list        # a tensor for each result


class Mistake(NamedTuple):
    name: str
    function: Callable    # a wrong solution; it gives the same wrong numbers as the student's
    hint: str


class Homework(NamedTuple):
    where: str            # the step and its id
    results: list         # what the function returns, by name
    examples: list
    mistakes: list
    learns: str = ""      # the argument that the gradient must reach, if there is one


# ==================================================================================================
# Examples: from replies of different lengths to padded tensors
# ==================================================================================================
REAL = "the mask of the real tokens"  # stands for the mask in the batches below

# What the padding of the first, second and third argument holds.
PADDINGS = {
    "no padding": None,
    "the padding holds zeros": [0.0, 0.0, 0.0, 0.0],
    "the padding holds other numbers": [7.0, 3.0, -5.0, 4.0],
    "the padding holds NaN": [NAN, NAN, NAN, NAN],
}


def pad(rows, columns, fill):
    """Lists of different lengths -> [B,T]."""
    full = []
    for row in rows:
        full.append(row + [fill] * (columns - len(row)))
    return torch.tensor(full)


def replies_of(lengths):
    """[3, 1] -> "replies of 3 and 1 tokens"."""
    if len(lengths) == 1:
        return f"one reply of {lengths[0]} tokens"
    return f"replies of {' and '.join(map(str, lengths))} tokens"


def rankings_of(lengths):
    if len(lengths) == 1:
        return f"one ranking of {lengths[0]} replies"
    return f"{len(lengths)} rankings of {lengths[0]} replies each"


def is_table(value):
    return isinstance(value, list) and isinstance(value[0], list)


def examples_of(oracle, batches):
    """Every batch without padding gives one example. Every other batch gives three.

    A batch is the number of columns and the arguments, with a list of floats for every reply.
    oracle(**arguments) -> a list of results, without padding.
    """
    examples = []
    for padding, fills in PADDINGS.items():
        for columns, batch in batches:
            table = next(value for value in batch.values() if is_table(value))
            lengths = [len(row) for row in table]
            if (min(lengths) == columns) != (fills is None):
                continue
            arguments = {}
            for number, (name, value) in enumerate(batch.items()):
                if is_table(value):
                    arguments[name] = pad(value, columns, fills[number % 4] if fills else 0.0)
                elif value is REAL:
                    arguments[name] = torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)
                elif isinstance(value, list):
                    arguments[name] = torch.tensor(value)
                else:
                    arguments[name] = value
            known = {name: value for name, value in batch.items() if value is not REAL}
            expected = []
            for result in oracle(**known):
                is_rows = isinstance(result, list)
                expected.append(pad(result, columns, 0.0) if is_rows else torch.tensor(result))
            if "mask" in batch:
                about = f"{replies_of(lengths)}; {padding}"
            else:
                about = f"scores of {rankings_of(lengths)}"
            examples.append(Example(about, arguments, expected))
    return examples


def masked_mean(x, mask):
    """For the mistakes below: the mean over the real tokens."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def shift(x, columns):
    """x [B,T] moved to the right by that many columns, with 0 at the free places."""
    if columns < 0:
        return F.pad(x[:, -columns:], (0, -columns))
    return F.pad(x[:, :-columns], (columns, 0))


# ==================================================================================================
# token_log_probs (T9)
# ==================================================================================================
def log_softmax(logits):
    """log pi(v) of every v, for the logits of one state."""
    top = max(logits)  # without it, exp(1000) would overflow
    total = 0.0
    for z in logits:
        total += math.exp(z - top)
    return [z - top - math.log(total) for z in logits]


def log_probs_example(about, logits, tokens):
    """logits: a list of replies, each a list of states, each a list of V logits."""
    log_probs, gradient = [], []
    for states, drawn in zip(logits, tokens):
        log_probs.append([])
        gradient.append([])
        for z, a in zip(states, drawn):
            log_pi = log_softmax(z)
            log_probs[-1].append(log_pi[a])
            slope = [-math.exp(x) for x in log_pi]  # d log pi(a) / d z_v = [v = a] - pi(v)
            slope[a] += 1.0
            gradient[-1].append(slope)
    arguments = {"logits": torch.tensor(logits), "tokens": torch.tensor(tokens)}
    return Example(about, arguments, [torch.tensor(log_probs), torch.tensor(gradient)])


LOG_PROBS_EXAMPLES = [
    log_probs_example("one reply of two tokens, a vocabulary of three",
                      [[[1.0, 2.0, 0.5], [0.0, -1.0, 1.5]]], [[1, 0]]),
    log_probs_example("two replies of three tokens, a vocabulary of four",
                      [[[0.3, -1.2, 2.0, 0.0], [1.1, 0.4, -0.6, 0.9], [-2.0, 0.5, 0.7, 1.3]],
                       [[0.0, 0.8, -0.3, 2.5], [1.7, -0.9, 0.2, 0.6], [0.4, 0.1, 1.9, -1.5]]],
                      [[3, 0, 2], [1, 1, 0]]),
    log_probs_example("large logits", [[[200.0, 0.0, -300.0], [900.0, 899.0, 0.0]]], [[1, 1]]),
]


def choose(x, tokens):
    return x.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


LOG_PROBS_MISTAKES = [
    Mistake("Probabilities, without the logarithm",
            lambda z, a: choose(z.softmax(-1), a),
            "Your numbers are pi(a_t|s_t). We need log pi(a_t|s_t), the logarithm."),
    Mistake("Logits that are not normalised",
            lambda z, a: choose(z, a),
            "You chose the right logit z_a, but a logit is not yet a log-probability. Subtract "
            "the logsumexp over the whole vocabulary of this state."),
    Mistake("The sign",
            lambda z, a: -choose(z.log_softmax(-1), a),
            "Your numbers are -log pi. A probability is at most 1, so its logarithm is never "
            "positive. The minus belongs to a loss, and this is no loss."),
    Mistake("Softmax over the wrong dimension",
            lambda z, a: choose(z.log_softmax(1), a),
            "It looks as if your softmax goes over the tokens of the reply (dim 1). It must go "
            "over the vocabulary, the last dimension."),
    Mistake("Softmax over the batch",
            lambda z, a: choose(z.log_softmax(0), a),
            "It looks as if your softmax goes over the replies (dim 0). It must go over the "
            "vocabulary, the last dimension."),
    Mistake("The most likely token",
            lambda z, a: z.log_softmax(-1).max(-1).values,
            "It looks as if you take the token with the largest logit. We need the token that was "
            "drawn: tokens[b, t] says which one it is."),
    Mistake("Off by one, to the left",
            lambda z, a: choose(z.log_softmax(-1).roll(1, 1), a),
            "It looks as if token t gets the logits of t-1. Here logits[:, t] already belong to "
            "token t, so you do not shift them."),
    Mistake("Off by one: a column is missing",
            lambda z, a: choose(z[:, :-1].log_softmax(-1), a[:, 1:]),
            "It looks as if you compare logits[:, :-1] with tokens[:, 1:], as many programs do. "
            "Here logits[:, t] already belong to token t, so you do not shift them."),
    Mistake("The logarithm of a rounded probability",
            lambda z, a: choose(z.softmax(-1).log(), a),
            "You take the softmax first and the logarithm afterwards. A very small probability is "
            "rounded to 0, and its logarithm is -infinity. Use the formula of the docstring, z_a - "
            "logsumexp(z), with torch.logsumexp. It never computes the small probability."),
    Mistake("exp without care",
            lambda z, a: choose(z, a) - z.exp().sum(-1).log(),
            "exp of a large logit is infinity. torch.logsumexp computes log(sum of exp(z)) without "
            "this problem."),
    Mistake("One number for the whole reply",
            lambda z, a: choose(z.log_softmax(-1), a).sum(1),
            "You add up the log-probs of a reply. We need one number for each token: [B,T]."),
    Mistake("Another logarithm",
            lambda z, a: choose(z.log_softmax(-1), a) / math.log(2),
            "Your logarithm has base 2. Log-probs use the natural logarithm."),
]


# ==================================================================================================
# token_rewards (S2)
# ==================================================================================================
def rewards_oracle(log_probs, ref_log_probs, scores, kl_coef):
    rewards = []
    for new, ref, score in zip(log_probs, ref_log_probs, scores):
        reply = []
        for t in range(len(new)):
            reply.append(-kl_coef * (new[t] - ref[t]))
        reply[-1] += score
        rewards.append(reply)
    return [rewards]


REWARDS_BATCHES = [
    (4, {"log_probs": [[-0.5, -1.2, -0.3, -1.0]], "ref_log_probs": [[-1.0, -1.0, -0.3, -2.0]],
         "scores": [4.0], "mask": REAL, "kl_coef": 0.1}),  # article E
    (3, {"log_probs": [[-0.4, -2.0, -0.7], [-1.5]], "ref_log_probs": [[-1.0, -0.6, -1.6], [-0.2]],
         "scores": [1.0, -2.0], "mask": REAL, "kl_coef": 0.5}),
    (4, {"log_probs": [[-0.9, -0.1], [-0.3], [-2.2, -0.8, -1.1]],
         "ref_log_probs": [[-0.5, -1.4], [-1.7], [-2.0, -0.3, -3.0]],
         "scores": [0.8, 1.5, -0.6], "mask": REAL, "kl_coef": 0.3}),
]


def score_at(mask, scores, column):
    """The score of each reply in that column: an int, or a tensor [B,1]."""
    return torch.where(torch.arange(mask.shape[1]) == column, scores.unsqueeze(1), 0)


def last(mask):
    return mask.sum(1, keepdim=True) - 1


def kl_of(lp, ref, mask):
    return torch.where(mask, lp - ref, 0)


def score_for_kl_at_the_end(lp, ref, s, mask, b):
    at_end = torch.arange(mask.shape[1]) == last(mask)
    return torch.where(at_end, s.unsqueeze(1), -b * kl_of(lp, ref, mask))


def all_columns_in_all_rows(lp, ref, s, mask, b):
    rewards = -b * kl_of(lp, ref, mask)
    rewards[:, last(mask).squeeze(1)] += s
    return rewards


def k3(lp, ref, mask):
    x = kl_of(lp, ref, mask)
    return torch.exp(-x) - 1 + x


REWARDS_MISTAKES = [
    Mistake("The score is on the last column",
            lambda lp, ref, s, mask, b: (-b * kl_of(lp, ref, mask)
                                         + score_at(mask, s, mask.shape[1] - 1)),
            "It looks as if you put the score on the last column. For a reply that is shorter than "
            "the longest one, this column is padding. The losses ignore padding, so this reply "
            "loses its score, and no error is shown. Find the last real token of each reply in "
            "`mask`."),
    Mistake("The score is on every token",
            lambda lp, ref, s, mask, b: torch.where(
                mask, -b * (lp - ref) + s.unsqueeze(1), 0),
            "It looks as if every token gets the score. Only the last real token gets it. "
            "Otherwise a long reply is paid many times."),
    Mistake("The score is on the first token",
            lambda lp, ref, s, mask, b: -b * kl_of(lp, ref, mask) + score_at(mask, s, 0),
            "It looks as if the first token gets the score. The score judges the finished reply, "
            "so it belongs to the last real token."),
    Mistake("The score comes one column too late",
            lambda lp, ref, s, mask, b: (-b * kl_of(lp, ref, mask)
                                         + score_at(mask, s, last(mask) + 1)),
            "It looks as if the score is one column behind the last real token. A reply of n "
            "tokens has the columns 0 to n - 1."),
    Mistake("The score comes one column too early",
            lambda lp, ref, s, mask, b: (-b * kl_of(lp, ref, mask)
                                         + score_at(mask, s, last(mask) - 1)),
            "It looks as if the score is one column before the last real token. EOS is a real "
            "token, too: `mask` is True there."),
    Mistake("Rows and columns are not indexed in pairs",
            all_columns_in_all_rows,
            "It looks as if every row gets a score in the last column of every reply. x[:, last] "
            "takes all these columns from all rows. To take one column from each row, index rows "
            "and columns in pairs: x[torch.arange(B), last]."),
    Mistake("The score is missing",
            lambda lp, ref, s, mask, b: -b * kl_of(lp, ref, mask),
            "It looks as if no token gets the score. Add it at the last real token."),
    Mistake("The score replaces the KL",
            score_for_kl_at_the_end,
            "It looks as if the last token gets the score alone. It pays for its KL as all other "
            "tokens do: its reward is the sum of both."),
    Mistake("The KL has the wrong sign",
            lambda lp, ref, s, mask, b: (b * kl_of(lp, ref, mask) + score_at(mask, s, last(mask))),
            "It looks as if the policy is paid for going away from the reference. A token must "
            "cost something where pi likes it more than the reference does. Look at the minus, and "
            "at which of the two log-probs you subtract."),
    Mistake("The absolute value of the KL",
            lambda lp, ref, s, mask, b: (-b * kl_of(lp, ref, mask).abs()
                                         + score_at(mask, s, last(mask))),
            "It looks as if every difference costs. Where pi likes a token less than the reference "
            "does, the token gets something back. Only the mean over many tokens is a cost."),
    Mistake("The KL is cut off at 0",
            lambda lp, ref, s, mask, b: (-b * kl_of(lp, ref, mask).clamp(min=0)
                                         + score_at(mask, s, last(mask))),
            "It looks as if you replace negative values of log pi - log pi_ref by 0. Keep them: "
            "such a token gets something back."),
    Mistake("beta is missing",
            lambda lp, ref, s, mask, b: -kl_of(lp, ref, mask) + score_at(mask, s, last(mask)),
            "It looks as if the KL is not multiplied by beta, here `kl_coef`."),
    Mistake("beta on the score, too",
            lambda lp, ref, s, mask, b: b * (score_at(mask, s, last(mask)) - kl_of(lp, ref, mask)),
            "It looks as if beta multiplies the score, too. It is the price of the KL only."),
    Mistake("The KL is subtracted once, at the end",
            lambda lp, ref, s, mask, b: score_at(
                mask, s - b * kl_of(lp, ref, mask).sum(1), last(mask)),
            "It looks as if the last token pays the KL of the whole reply. The sum is right, but "
            "every token must pay for itself. Then PPO knows which token was expensive."),
    Mistake("Probabilities in the place of log-probs",
            lambda lp, ref, s, mask, b: (-b * kl_of(lp.exp(), ref.exp(), mask)
                                         + score_at(mask, s, last(mask))),
            "It looks as if you subtract probabilities. Subtract the log-probs as they are."),
    Mistake("Another estimate of the KL",
            lambda lp, ref, s, mask, b: -b * k3(lp, ref, mask) + score_at(mask, s, last(mask)),
            "It looks as if you use exp(-x) - 1 + x, with x = log pi - log pi_ref. It is a good "
            "estimate of the KL for a loss, as in GRPO. Here the reward is -beta * x."),
]


# ==================================================================================================
# td_residuals (S4)
# ==================================================================================================
def td_of_reply(rewards, values, gamma):
    deltas = []
    for t in range(len(rewards)):
        next_value = 0.0  # nothing comes after the last token
        if t + 1 < len(values):
            next_value = values[t + 1]
        deltas.append(rewards[t] + gamma * next_value - values[t])
    return deltas


def td_oracle(rewards, values, gamma):
    return [[td_of_reply(r, v, gamma) for r, v in zip(rewards, values)]]


E_REWARDS, E_VALUES = [[-0.05, 0.02, 0.0, 3.9]], [[-0.84, 0.88, 1.96, 3.48]]  # article E
REWARDS, VALUES = [[0.1, -0.3, 2.0], [-1.0]], [[0.5, 1.2, 1.6], [-0.4]]
REWARDS_3, VALUES_3 = [[0.2, 1.1], [0.9], [-0.1, 0.3, -0.7]], [[0.6, -0.5], [1.4], [0.8, 0.3, -1.3]]

TD_BATCHES = [
    (4, {"rewards": E_REWARDS, "values": E_VALUES, "mask": REAL, "gamma": 1.0}),
    (4, {"rewards": E_REWARDS, "values": E_VALUES, "mask": REAL, "gamma": 0.9}),
    (3, {"rewards": REWARDS, "values": VALUES, "mask": REAL, "gamma": 0.9}),
    (4, {"rewards": REWARDS_3, "values": VALUES_3, "mask": REAL, "gamma": 0.7}),
]


def real_td(r, v, mask, g):
    """The right TD residuals, for mistakes that come later."""
    v = torch.where(mask, v, 0)
    return torch.where(mask, r + g * shift(v, -1) - v, 0)


def td_mistake(formula):
    """A wrong formula for rewards, values (0 on padding) and gamma; the padding is treated well."""
    def function(r, v, mask, g):
        r, v = torch.where(mask, r, 0), torch.where(mask, v, 0)
        return torch.where(mask, formula(r, v, g), 0)
    return function


TD_MISTAKES = [
    Mistake("Bootstrapping beyond the end",
            lambda r, v, mask, g: torch.where(mask, r + g * shift(v, -1) - v, 0),
            "It looks as if the last real token uses V of the padding behind it. After the last "
            "token of a reply nothing more can come, so V(s_{t+1}) is 0 there. Set the values of "
            "the padding to 0 before you shift them."),
    Mistake("The next value comes from the first column",
            td_mistake(lambda r, v, g: r + g * v.roll(-1, 1) - v),
            "It looks as if the last column takes V from the first column (torch.roll does this). "
            "After the last column nothing comes: V(s_{t+1}) is 0 there."),
    Mistake("The last column is its own successor",
            td_mistake(lambda r, v, g: r + g * torch.cat([v[:, 1:], v[:, -1:]], 1) - v),
            "It looks as if the last column uses its own value as V(s_{t+1}). Nothing comes after "
            "it, so V(s_{t+1}) is 0 there."),
    Mistake("- V(s_t) is missing",
            td_mistake(lambda r, v, g: r + g * shift(v, -1)),
            "Your numbers are r_t + gamma * V(s_{t+1}). The residual compares this with what the "
            "critic expected before: subtract V(s_t)."),
    Mistake("The sign",
            td_mistake(lambda r, v, g: v - r - g * shift(v, -1)),
            "Your numbers have the wrong sign. If more came than the critic expected, delta_t is "
            "positive."),
    Mistake("The value before, not the next one",
            td_mistake(lambda r, v, g: r + g * shift(v, 1) - v),
            "It looks as if you use V(s_{t-1}) in the place of V(s_{t+1}). The next value must "
            "move one column to the left."),
    Mistake("The two values are swapped",
            td_mistake(lambda r, v, g: r + g * v - shift(v, -1)),
            "It looks as if V(s_t) and V(s_{t+1}) are swapped. gamma belongs to the next value, "
            "and the present value is subtracted."),
    Mistake("gamma is missing",
            td_mistake(lambda r, v, g: r + shift(v, -1) - v),
            "It looks as if gamma is missing. It multiplies V(s_{t+1})."),
    Mistake("gamma on the reward, too",
            td_mistake(lambda r, v, g: g * (r + shift(v, -1)) - v),
            "It looks as if gamma multiplies the reward, too. It belongs to V(s_{t+1}) only."),
    Mistake("gamma on both values",
            td_mistake(lambda r, v, g: r + g * (shift(v, -1) - v)),
            "It looks as if gamma multiplies V(s_t), too. It belongs to V(s_{t+1}) only."),
    Mistake("The reward of the next token",
            td_mistake(lambda r, v, g: shift(r, -1) + g * shift(v, -1) - v),
            "It looks as if you use r_{t+1}. In this script r_t is the reward of token t itself."),
]


# ==================================================================================================
# gae (S5)
# ==================================================================================================
def gae_oracle(rewards, values, gamma, lam):
    """By the sum of the docstring, not by the loop."""
    all_advantages, all_returns = [], []
    for r, v in zip(rewards, values):
        deltas = td_of_reply(r, v, gamma)
        advantages, returns = [], []
        for t in range(len(deltas)):
            total = 0.0
            for k in range(len(deltas) - t):
                total += (gamma * lam) ** k * deltas[t + k]
            advantages.append(total)
            returns.append(total + v[t])
        all_advantages.append(advantages)
        all_returns.append(returns)
    return [all_advantages, all_returns]


GAE_BATCHES = [
    (4, {"rewards": E_REWARDS, "values": E_VALUES, "mask": REAL, "gamma": 1.0, "lam": 0.5}),
    (4, {"rewards": E_REWARDS, "values": E_VALUES, "mask": REAL, "gamma": 0.9, "lam": 0.7}),
    (3, {"rewards": REWARDS, "values": VALUES, "mask": REAL, "gamma": 0.9, "lam": 0.8}),
    (4, {"rewards": REWARDS_3, "values": VALUES_3, "mask": REAL, "gamma": 0.7, "lam": 0.9}),
]


def backwards(deltas, decay):
    """A_t = delta_t + decay * A_{t+1}."""
    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + decay * advantage
        advantages[:, t] = advantage
    return advantages


def forwards(deltas, decay):
    return backwards(deltas.flip(1), decay).flip(1)


def carried_over(r, v, mask, g, lam):
    """A loop over replies that does not set the running advantage to 0."""
    deltas, advantages, advantage = real_td(r, v, mask, g), torch.zeros_like(r), 0.0
    for b in range(len(deltas)):
        for t in reversed(range(int(mask[b].sum()))):
            advantage = deltas[b, t] + g * lam * advantage
            advantages[b, t] = advantage
    return advantages, torch.where(mask, advantages + v, 0)


def whitened(x, mask):
    real = x[mask]
    return torch.where(mask, (x - real.mean()) / (real.var(unbiased=False) + 1e-8).sqrt(), 0)


def gae_mistake(advantages_of, returns_of=lambda A, r, v, mask: A + v):
    """advantages_of(deltas, gamma, lam) and returns_of(A, r, v, mask), one of them wrong."""
    def function(r, v, mask, g, lam):
        r, v = torch.where(mask, r, 0), torch.where(mask, v, 0)
        A = torch.where(mask, advantages_of(real_td(r, v, mask, g), g, lam), 0)
        return A, torch.where(mask, returns_of(A, r, v, mask), 0)
    return function


def right_gae(deltas, g, lam):
    return backwards(deltas, g * lam)


def beyond_the_end(r, v, mask, g, lam):
    deltas = torch.where(mask, r + g * shift(v, -1) - v, 0)
    A = backwards(deltas, g * lam)
    return A, torch.where(mask, A + v, 0)


def loop_through_the_padding(r, v, mask, g, lam):
    A = backwards(r + g * shift(v, -1) - v, g * lam)
    return A, A + v


def whitened_advantages(r, v, mask, g, lam):
    A = right_gae(real_td(r, v, mask, g), g, lam)
    return whitened(A, mask), torch.where(mask, A + v, 0)


def whitened_returns(r, v, mask, g, lam):
    A = right_gae(real_td(r, v, mask, g), g, lam)
    return A, torch.where(mask, whitened(A, mask) + v, 0)


def all_whitened(r, v, mask, g, lam):
    A = whitened(right_gae(real_td(r, v, mask, g), g, lam), mask)
    return A, torch.where(mask, A + v, 0)


GAE_MISTAKES = [
    Mistake("GAE forwards",
            gae_mistake(lambda d, g, lam: forwards(d, g * lam)),
            "It looks as if your loop goes from the first token to the last. A_t collects what "
            "comes after token t, so A_{t+1} must be known first. Go from the last token to the "
            "first."),
    Mistake("Lambda is missing",
            gae_mistake(lambda d, g, lam: backwards(d, g)),
            "It looks as if lambda is missing. A_{t+1} is multiplied by gamma * lambda."),
    Mistake("gamma is missing in the loop",
            gae_mistake(lambda d, g, lam: backwards(d, lam)),
            "It looks as if you multiply A_{t+1} by lambda only. It is gamma * lambda. (The gamma "
            "in delta_t is another one.)"),
    Mistake("Nothing is carried back",
            gae_mistake(lambda d, g, lam: d),
            "Your advantages are the TD residuals. Every token also gets gamma * lambda times the "
            "advantage of the next token."),
    Mistake("The weights 1 - lambda",
            gae_mistake(lambda d, g, lam: (1 - lam) * backwards(d, g * lam)),
            "It looks as if you multiply by 1 - lambda. This factor belongs to another way to "
            "write GAE, the mean of n-step advantages. In the sum of deltas it is gone."),
    Mistake("The sum begins one token too late",
            gae_mistake(lambda d, g, lam: shift(backwards(d, g * lam), -1)),
            "It looks as if A_t does not contain delta_t itself. The sum begins with k = 0."),
    Mistake("The loop keeps only the last residual",
            gae_mistake(lambda d, g, lam: d + g * lam * shift(d, -1)),
            "It looks as if you add delta_{t+1} in the place of A_{t+1}. The loop must carry the "
            "whole advantage of the next token."),
    Mistake("One reply runs into the next",
            carried_over,
            "It looks as if the last advantage of one reply is carried into the next reply. Set "
            "the running advantage to 0 before each reply."),
    Mistake("The two results are swapped",
            lambda *a: gae_mistake(right_gae)(*a)[::-1],
            "It looks as if you return the returns first. The order is: advantages, returns."),
    Mistake("Bootstrapping beyond the end",
            beyond_the_end,
            "It looks as if the last real token uses V of the padding behind it. After the last "
            "token of a reply nothing more can come, so V(s_{t+1}) is 0 there."),
    Mistake("The loop runs through the padding",
            loop_through_the_padding,
            "It looks as if the residuals of the padding enter the sum. On padding delta_t must be "
            "0. `td_residuals` takes care of this: call it."),
    Mistake("Whitened advantages",
            whitened_advantages,
            "Your advantages have mean 0 and variance 1. `gae` must not whiten them. If it is "
            "wanted, `collect_rollout` does it afterwards."),
    Mistake("Returns from whitened advantages",
            whitened_returns,
            "Your advantages are right, but the returns use whitened ones. The critic must learn "
            "in the unit of the rewards: use the advantages as they are."),
    Mistake("Whitened advantages, and returns from them",
            all_whitened,
            "Your advantages have mean 0 and variance 1, and the returns use them. The critic must "
            "learn in the unit of the rewards. `gae` must not whiten at all: `collect_rollout` "
            "does it afterwards, if it is wanted."),
    Mistake("The returns lack V(s_t)",
            gae_mistake(right_gae, lambda A, r, v, mask: A),
            "Your returns are the advantages. The return is A_t + V(s_t)."),
    Mistake("The returns are advantages plus rewards",
            gae_mistake(right_gae, lambda A, r, v, mask: A + r),
            "It looks as if you add the reward to the advantage. The return is A_t + V(s_t)."),
    Mistake("The returns have the wrong sign of V(s_t)",
            gae_mistake(right_gae, lambda A, r, v, mask: A - v),
            "It looks as if you subtract V(s_t). The advantage is return minus value, so the "
            "return is advantage plus value."),
    Mistake("The returns are sums of rewards",
            gae_mistake(right_gae, lambda A, r, v, mask: backwards(r, 1.0)),
            "It looks as if your return is the sum of the rewards that came. This is so only for "
            "lambda = 1 and gamma = 1. Here the return is A_t + V(s_t)."),
]



# ==================================================================================================
# policy_loss (S6)
# ==================================================================================================
def policy_oracle(log_probs, old_log_probs, advantages, clip_eps):
    """Loss, clip_fraction, and the gradient of the loss for every log-prob."""
    tokens = sum(len(row) for row in log_probs)
    loss, braked, gradient = 0.0, 0, []
    for new, old, A in zip(log_probs, old_log_probs, advantages):
        gradient.append([])
        for t in range(len(new)):
            rho = math.exp(new[t] - old[t])
            if A[t] > 0 and rho > 1 + clip_eps:    # case 2
                loss -= (1 + clip_eps) * A[t] / tokens
                stopped = True
            elif A[t] < 0 and rho < 1 - clip_eps:  # case 4
                loss -= (1 - clip_eps) * A[t] / tokens
                stopped = True
            else:                                  # cases 1 and 3
                loss -= rho * A[t] / tokens
                stopped = False
            braked += stopped
            gradient[-1].append(0.0 if stopped else -rho * A[t] / tokens)
    return [loss, braked / tokens, gradient]


POLICY_BATCHES = [
    # Cases 1 and 3 near 1. Nothing is clipped.
    (3, {"log_probs": [[-1.0, -0.5, -2.0]], "old_log_probs": [[-1.1, -0.4, -2.1]],
         "advantages": [[1.0, 2.0, -1.5]], "mask": REAL, "clip_eps": 0.2}),
    # A > 0: rho is far above, far below. Then A < 0: far below, far above.
    (4, {"log_probs": [[-0.5, -2.0, -1.8, -0.3]], "old_log_probs": [[-1.2, -1.3, -0.7, -0.8]],
         "advantages": [[1.1, 0.7, -0.6, -0.9]], "mask": REAL, "clip_eps": 0.2}),
    (3, {"log_probs": [[-0.2, -1.6, -0.9], [-0.4]], "old_log_probs": [[-0.9, -1.5, -0.1], [-1.0]],
         "advantages": [[1.3, 0.4, -1.7], [-0.8]], "mask": REAL, "clip_eps": 0.3}),
    (4, {"log_probs": [[-1.3, -0.6], [-0.1], [-2.0, -0.7, -1.0]],
         "old_log_probs": [[-0.8, -1.1], [-0.3], [-2.1, -1.4, -0.2]],
         "advantages": [[0.5, 1.9], [-1.2], [0.9, -0.6, -1.4]], "mask": REAL, "clip_eps": 0.1}),
]


def ratio_of(new, old, mask):
    return torch.exp(torch.where(mask, new - old, 0))


def right_surrogate(rho, A, eps):
    return torch.min(rho * A, rho.clamp(1 - eps, 1 + eps) * A)


def right_braked(rho, A, eps):
    return (rho.clamp(1 - eps, 1 + eps) * A < rho * A).float()


def policy_mistake(surrogate=right_surrogate, braked=right_braked, ratio=ratio_of,
                   mean=masked_mean, mean_braked=masked_mean, sign=-1):
    """policy_loss with one of its parts replaced by a wrong one."""
    def function(new, old, A, mask, eps):
        A = torch.where(mask, A, 0)
        rho = ratio(new, old, mask)
        loss = sign * mean(surrogate(rho, A, eps), mask)
        return loss, mean_braked(braked(rho, A, eps), mask)
    return function


def mean_of_everything(x, mask):
    return torch.where(mask, x, 0).mean()


def mean_of_means(x, mask):
    return (torch.where(mask, x, 0).sum(1) / mask.sum(1)).mean()


def sum_of_tokens(x, mask):
    return torch.where(mask, x, 0).sum()


def sum_per_reply(x, mask):
    return torch.where(mask, x, 0).sum(1).mean()


def ratio_of_replies(new, old, mask):
    return torch.where(mask, new - old, 0).sum(1, keepdim=True).exp().expand(mask.shape)


def outside(rho, A, eps):
    return ((rho > 1 + eps) | (rho < 1 - eps)).float()


WRONG_MEANS = [
    ("The mean over the padding", mean_of_everything,
     "It looks as if you divide by the number of all columns. The padding counts there. Divide by "
     "the number of real tokens, mask.sum()."),
    ("The mean of means", mean_of_means,
     "It looks as if you take the mean of each reply, and then the mean of these. Then a token of "
     "a short reply counts more than one of a long reply. Take one mean over all real tokens of "
     "the batch."),
    ("The sum over the tokens", sum_of_tokens,
     "It looks as if you add up all tokens. The formula has the mean over the real tokens."),
    ("The sum over each reply", sum_per_reply,
     "It looks as if you add up the tokens of each reply and divide by the number of replies. The "
     "formula has the mean over the real tokens."),
]

POLICY_MISTAKES = [
    Mistake("max in the place of min",
            policy_mistake(lambda rho, A, eps: torch.max(rho * A, rho.clamp(1 - eps, 1 + eps) * A)),
            "It looks as if you take the larger one of the two terms. Inside the formula it is the "
            "smaller one. (If you moved the minus sign inside, min becomes max: do only one of "
            "both.)"),
    Mistake("The sign of the loss",
            policy_mistake(sign=1),
            "Your loss has the wrong sign. Training makes a loss small, and we want the surrogate "
            "to become large. So the loss is minus the mean."),
    Mistake("The ratio is upside down",
            policy_mistake(ratio=lambda new, old, mask: ratio_of(old, new, mask)),
            "It looks as if your ratio is pi_old / pi. It is pi / pi_old: the new policy is on "
            "top. With log-probs: exp(log pi - log pi_old)."),
    Mistake("exp is missing",
            policy_mistake(ratio=lambda new, old, mask: torch.where(mask, new - old, 0)),
            "It looks as if your ratio is log pi - log pi_old. This is the logarithm of the ratio. "
            "Take exp of it."),
    Mistake("The ratio of two log-probs",
            policy_mistake(ratio=lambda new, old, mask: torch.where(mask, new / old, 1)),
            "It looks as if you divide log pi by log pi_old. The ratio is pi / pi_old. With "
            "log-probs: exp(log pi - log pi_old)."),
    Mistake("One ratio for the whole reply",
            policy_mistake(ratio=ratio_of_replies),
            "It looks as if all tokens of a reply have the same ratio, that of the whole reply. "
            "Every token has its own ratio."),
    Mistake("Clip without min",
            policy_mistake(lambda rho, A, eps: rho.clamp(1 - eps, 1 + eps) * A),
            "It looks as if only the clipped term counts. A good token (A > 0) that has become "
            "less likely must be able to come back. So take the min of both terms."),
    Mistake("No clip",
            policy_mistake(lambda rho, A, eps: rho * A),
            "Your loss is minus the mean of rho * A. The clip is missing: nothing stops a token "
            "that has already moved far enough."),
    Mistake("The clip is on rho * A",
            policy_mistake(lambda rho, A, eps: torch.min(rho * A,
                                                         (rho * A).clamp(1 - eps, 1 + eps))),
            "It looks as if you clip the product rho * A. Clip rho alone, then multiply by A."),
    Mistake("min of the ratios",
            policy_mistake(lambda rho, A, eps: torch.min(rho, rho.clamp(1 - eps, 1 + eps)) * A),
            "It looks as if you take min of the ratios and multiply by A afterwards. For A < 0 "
            "this chooses the wrong one. Multiply first: min(rho * A, clip(rho) * A)."),
    Mistake("Only the upper limit",
            policy_mistake(lambda rho, A, eps: torch.min(rho * A, rho.clamp(max=1 + eps) * A)),
            "It looks as if you clip rho only at 1 + eps. The lower limit, 1 - eps, is needed for "
            "A < 0."),
    Mistake("The clip is around 0",
            policy_mistake(lambda rho, A, eps: torch.min(rho * A, rho.clamp(-eps, eps) * A)),
            "It looks as if you clip rho to the range from -eps to eps. The range is 1 - eps to 1 "
            "+ eps, because a ratio of 1 means no change."),
    Mistake("Only the sign of the advantage",
            policy_mistake(lambda rho, A, eps: right_surrogate(rho, A.sign(), eps)),
            "It looks as if you use only the sign of the advantages. Their size counts, too."),
    *[Mistake(name, policy_mistake(mean=mean), hint) for name, mean, hint in WRONG_MEANS],
    *[Mistake(name + ", in both results", policy_mistake(mean=mean, mean_braked=mean), hint)
      for name, mean, hint in WRONG_MEANS],
    *[Mistake(name + ", in clip_fraction", policy_mistake(mean_braked=mean),
              "The loss is right, but clip_fraction is not. " + hint)
      for name, mean, hint in WRONG_MEANS],
    Mistake("clip_fraction counts all that is outside",
            policy_mistake(braked=outside),
            "The loss is right. Your clip_fraction counts every ratio outside of 1 - eps to 1 + "
            "eps. It should count only tokens whose gradient is 0, cases 2 and 4: there the "
            "clipped term is smaller than the other one."),
    Mistake("clip_fraction counts what is not clipped",
            policy_mistake(braked=lambda rho, A, eps: 1 - right_braked(rho, A, eps)),
            "The loss is right. Your clip_fraction is the share of tokens that are not clipped. "
            "We need the share of those that are."),
    Mistake("clip_fraction counts the wrong side",
            policy_mistake(braked=lambda rho, A, eps: (
                rho.clamp(1 - eps, 1 + eps) * A > rho * A).float()),
            "The loss is right. Your clip_fraction counts tokens where the clipped term is the "
            "larger one. There min takes the other term, and the gradient is not 0."),
]


# ==================================================================================================
# value_loss (S6, L8)
# ==================================================================================================
def value_oracle(values, returns):
    """The loss, and its gradient for every value."""
    tokens = sum(len(row) for row in values)
    loss, gradient = 0.0, []
    for b in range(len(values)):
        gradient.append([])
        for t in range(len(values[b])):
            error = values[b][t] - returns[b][t]
            loss += 0.5 * error ** 2 / tokens
            gradient[-1].append(error / tokens)
    return [loss, gradient]


VALUE_BATCHES = [
    (2, {"values": [[0.34, 1.23]], "returns": [[1.87, 1.87]], "mask": REAL}),  # article B
    (3, {"values": [[0.5, -0.7, 1.0], [2.0]], "returns": [[1.5, 0.3, -0.2], [0.6]], "mask": REAL}),
    (5, {"values": [[0.1, 0.9], [-1.1], [0.4, 1.3, -0.6, 0.7]],
         "returns": [[0.8, 0.2], [0.5], [-0.3, 1.1, 1.2, 0.3]], "mask": REAL}),
]

VALUE_EXAMPLES = examples_of(value_oracle, VALUE_BATCHES)


def right_error(v, g, mask):
    return torch.where(mask, v - g, 0) ** 2


def value_mistake(error=right_error, mean=masked_mean, factor=0.5):
    def function(v, g, mask):
        return factor * mean(error(v, g, mask), mask)
    return function


VALUE_MISTAKES = [
    Mistake("1/2 is missing",
            value_mistake(factor=1.0),
            "Your loss is twice as large as it should be. The formula has the factor 1/2."),
    Mistake("The sign of the loss",
            value_mistake(factor=-0.5),
            "Your loss has the wrong sign. A squared error is never negative."),
    Mistake("The absolute error",
            value_mistake(lambda v, g, mask: right_error(v, g, mask).sqrt()),
            "It looks as if you take |V - G|. The formula has the square, (V - G)^2."),
    Mistake("The error is not squared",
            value_mistake(lambda v, g, mask: torch.where(mask, v - g, 0)),
            "It looks as if you forgot the square. Without it, errors of different signs cancel."),
    Mistake("The square of the mean",
            lambda v, g, mask: 0.5 * masked_mean(v - g, mask) ** 2,
            "It looks as if you take the mean first and the square afterwards. Square the error of "
            "each token, then take the mean."),
    *[Mistake(name, value_mistake(mean=mean), hint) for name, mean, hint in WRONG_MEANS],
]


# ==================================================================================================
# ranking_loss (L3)
# ==================================================================================================
def ranking_oracle(scores):
    """The loss, and its gradient for every score."""
    N, K = len(scores), len(scores[0])
    pairs = N * K * (K - 1) / 2
    loss = 0.0
    gradient = [[0.0] * K for _ in range(N)]
    for n in range(N):
        for i in range(K):
            for j in range(i + 1, K):
                gap = scores[n][i] - scores[n][j]
                # -log sigmoid(gap), without overflow for large gaps
                loss += (math.log1p(math.exp(-abs(gap))) + max(-gap, 0.0)) / pairs
                wrong = 1 / (1 + math.exp(gap))  # the model's probability of preferring j
                gradient[n][i] -= wrong / pairs
                gradient[n][j] += wrong / pairs
    return [loss, gradient]


RANKING_BATCHES = [
    (2, {"scores": [[1.5, 0.2]]}),
    (4, {"scores": [[2.0, 0.3, 0.9, -1.2]]}),
    (3, {"scores": [[0.7, 1.1, -0.4], [-0.2, -1.0, 0.5]]}),
    (3, {"scores": [[-150.0, 0.0, 20.0]]}),
]


def ranking_mistake(loss_of_gap=lambda gap: -F.logsigmoid(gap), pairs="all", mean=torch.mean):
    """pairs: which pairs (i, j) count. mean(losses [N,pairs]) -> scalar."""
    def function(scores):
        K = scores.shape[1]
        chosen = []
        for i in range(K):
            for j in range(K):
                if (pairs == "all" and i < j or pairs == "neighbours" and j == i + 1
                        or pairs == "first" and i == 0 < j or pairs == "both ways" and i != j
                        or pairs == "square" or pairs == "ends" and i == 0 and j == K - 1
                        or pairs == "with itself" and i <= j):
                    chosen.append((i, j))
        first, second = torch.tensor(chosen).T
        return mean(loss_of_gap(scores[:, first] - scores[:, second]))
    return function


def plackett_luce(scores):
    """-log of the probability of this order, if the best one is chosen again and again."""
    rest = scores.flip(1).logcumsumexp(1).flip(1)
    return (rest - scores)[:, :-1].mean()


RANKING_MISTAKES = [
    Mistake("The order is upside down",
            ranking_mistake(lambda gap: -F.logsigmoid(-gap)),
            "It looks as if you subtract the better reply from the worse one. The columns are "
            "ranked, best first: column i is better than column j if i < j. Use s_i - s_j."),
    Mistake("The sign of the loss",
            ranking_mistake(F.logsigmoid),
            "Your loss has the wrong sign. log sigmoid is never positive, so the loss is minus the "
            "mean."),
    Mistake("Sigmoid without log",
            ranking_mistake(lambda gap: -gap.sigmoid()),
            "It looks as if the logarithm is missing. The formula has log sigmoid."),
    Mistake("1 - sigmoid",
            ranking_mistake(lambda gap: 1 - gap.sigmoid()),
            "It looks as if your loss is 1 - sigmoid. The formula has -log sigmoid."),
    Mistake("The difference without sigmoid",
            ranking_mistake(lambda gap: -gap),
            "It looks as if your loss is minus the difference of the scores. It could fall for "
            "ever. The formula has log sigmoid of the difference."),
    Mistake("A hinge",
            ranking_mistake(lambda gap: (1 - gap).clamp(min=0)),
            "It looks as if your loss is max(0, 1 - gap). The formula has -log sigmoid."),
    Mistake("The squared difference",
            ranking_mistake(lambda gap: gap ** 2),
            "It looks as if you square the difference. Then the order does not matter. The formula "
            "has -log sigmoid."),
    Mistake("The logarithm of a rounded sigmoid",
            ranking_mistake(lambda gap: -gap.sigmoid().log()),
            "You take the sigmoid first and the logarithm afterwards. For a large difference the "
            "sigmoid is rounded to 0, and its logarithm is -infinity. F.logsigmoid computes both "
            "in one step."),
    Mistake("The sum over the pairs",
            ranking_mistake(mean=torch.sum),
            "It looks as if you add up all pairs. The formula has the mean over the pairs."),
    Mistake("The sum over the pairs of one ranking",
            ranking_mistake(mean=lambda x: x.sum(1).mean()),
            "It looks as if you add up the pairs of each ranking. The formula has the mean over "
            "the K(K-1)/2 pairs. Otherwise long rankings count more."),
    Mistake("Only neighbours",
            ranking_mistake(pairs="neighbours"),
            "It looks as if you compare only neighbours: first with second, second with third. All "
            "pairs i < j count."),
    Mistake("Only the best against the others",
            ranking_mistake(pairs="first"),
            "It looks as if you compare only the first reply with the others. All pairs i < j "
            "count."),
    Mistake("Only the best against the worst",
            ranking_mistake(pairs="ends"),
            "It looks as if you compare only the first reply with the last one. All pairs i < j "
            "count."),
    Mistake("Every pair in both directions",
            ranking_mistake(pairs="both ways"),
            "It looks as if every pair counts in both directions. Only i < j counts, where i is "
            "the better one. Both directions together teach that all scores should be equal."),
    Mistake("All K * K pairs",
            ranking_mistake(pairs="square"),
            "It looks as if all K * K pairs count, also a reply with itself. Only i < j counts."),
    Mistake("A reply against itself",
            ranking_mistake(pairs="with itself"),
            "It looks as if a reply is compared with itself, too (i <= j). Only i < j counts."),
    Mistake("The wrong divisor",
            ranking_mistake(mean=lambda x: x.sum() / len(x) / ((8 * x.shape[1] + 1) ** 0.5 + 1)
                            ** 2 * 4),
            "Your loss is the sum over the right pairs, divided by K * K. There are K(K-1)/2 "
            "pairs."),
    Mistake("The loss of the whole order",
            plackett_luce,
            "It looks as if you use a softmax over the replies that are left (Plackett-Luce). It "
            "is a good loss for rankings, but the formula here compares pairs."),
]


# ==================================================================================================
# sample_tokens (S1)
# ==================================================================================================
def sampler_example(first, second, temperature):
    """Half of the rows have the logits `first`, and half of them `second`."""
    about = (f"{DRAWS} rows of logits {first}, then {DRAWS} rows of {second}, "
             f"temperature {temperature}")
    logits = torch.tensor([first, second]).repeat_interleave(DRAWS, dim=0)
    shares = []
    for row in (first, second):
        shares.append([math.exp(x) for x in log_softmax([z / temperature for z in row])])
    return Example(about, {"logits": logits, "temperature": temperature}, [torch.tensor(shares)])


FIRST, SECOND = [0.0, 2.0, 1.0, -1.0], [1.5, -0.5, -2.0, 0.5]
SAMPLER_EXAMPLES = [
    sampler_example(FIRST, SECOND, 1.0),
    sampler_example(FIRST, SECOND, 2.0),
    sampler_example(FIRST, SECOND, 0.5),
    sampler_example([-1000.0, 999.0, 1000.0, 0.0], [0.0, 0.0, 500.0, 500.0], 0.7),
]


def draw_from(probabilities):
    return torch.multinomial(probabilities, 1).squeeze(-1)


def sampler_mistake(probabilities_of):
    def function(logits, temperature):
        return draw_from(probabilities_of(logits, temperature))
    return function


def without_the_tail(z, T):
    best = z.topk(2, dim=-1)
    kept = torch.full_like(z, -math.inf).scatter(-1, best.indices, best.values)
    return (kept / T).softmax(-1)


SAMPLER_MISTAKES = [
    Mistake("The most likely token, always",
            lambda z, T: z.argmax(-1),
            "It looks as if you take the most likely token. The token must be drawn at random: "
            "a token with probability 0.2 comes in 20% of all draws. PPO can learn only from "
            "tokens that it tries."),
    Mistake("The temperature is missing",
            sampler_mistake(lambda z, T: z.softmax(-1)),
            "It looks as if the temperature has no effect. The log-probs are computed at this "
            "temperature. If the sampler has another one, the tokens come from one policy and the "
            "log-probs from another."),
    Mistake("The temperature is upside down",
            sampler_mistake(lambda z, T: (z * T).softmax(-1)),
            "It looks as if you multiply the logits by the temperature. Divide them: a high "
            "temperature makes the probabilities more equal."),
    Mistake("All tokens are equally likely",
            sampler_mistake(lambda z, T: torch.ones_like(z)),
            "It looks as if all tokens come equally often. The logits must decide: use softmax."),
    Mistake("Softmax over the batch",
            sampler_mistake(lambda z, T: (z / T).softmax(0)),
            "It looks as if your softmax goes over the rows (dim 0). It must go over the "
            "vocabulary, the last dimension."),
    Mistake("The token before",
            sampler_mistake(lambda z, T: (z / T).softmax(-1).roll(-1, -1)),
            "It looks as if your token is one too small: token 0 comes as often as token 1 should. "
            "Look at how you find the piece of the line that the point falls into."),
    Mistake("The token after",
            sampler_mistake(lambda z, T: (z / T).softmax(-1).roll(1, -1)),
            "It looks as if your token is one too large: token 1 comes as often as token 0 should. "
            "Look at how you find the piece of the line that the point falls into."),
    Mistake("The unlikely tokens never come",
            sampler_mistake(without_the_tail),
            "It looks as if only the most likely tokens are drawn (top-k). Every token must come "
            "as often as its probability says."),
    Mistake("The least likely tokens come most often",
            sampler_mistake(lambda z, T: (-z / T).softmax(-1)),
            "It looks as if the logits have the wrong sign. A large logit is a likely token."),
]


# ==================================================================================================
# The homework: eight functions, in the order in which they are best solved
# ==================================================================================================
HOMEWORK = {
    "token_log_probs": Homework("T9", ["log_probs"], LOG_PROBS_EXAMPLES, LOG_PROBS_MISTAKES,
                                learns="logits"),
    "token_rewards": Homework("step 2, S2", ["rewards"],
                              examples_of(rewards_oracle, REWARDS_BATCHES), REWARDS_MISTAKES),
    "td_residuals": Homework("step 4, S4", ["deltas"],
                             examples_of(td_oracle, TD_BATCHES), TD_MISTAKES),
    "gae": Homework("step 5, S5", ["advantages", "returns"],
                    examples_of(gae_oracle, GAE_BATCHES), GAE_MISTAKES),
    "policy_loss": Homework("step 6, S6", ["loss", "clip_fraction"],
                            examples_of(policy_oracle, POLICY_BATCHES), POLICY_MISTAKES,
                            learns="log_probs"),
    "value_loss": Homework("step 6, S6", ["loss"],
                           VALUE_EXAMPLES, VALUE_MISTAKES,
                           learns="values"),
    "ranking_loss": Homework("L3", ["loss"],
                             examples_of(ranking_oracle, RANKING_BATCHES), RANKING_MISTAKES,
                             learns="scores"),
    "sample_tokens": Homework("step 1, S1", ["tokens"], SAMPLER_EXAMPLES, SAMPLER_MISTAKES),
}


# ==================================================================================================
# Calling a function
# ==================================================================================================
def call(function, homework, example):
    """What the function gives for one example: a float64 tensor for each result.

    If there is a gradient to check, it is the last one. For the sampler the result is the share of
    each token in its draws. Wrong, if the function gives no results of the right kind.
    """
    arguments = {}
    for name, value in example.arguments.items():
        arguments[name] = value.clone() if isinstance(value, torch.Tensor) else value
    if homework.learns:
        arguments[homework.learns].requires_grad_()
    if homework.results == ["tokens"]:
        torch.manual_seed(1)
    returned = function(*arguments.values())
    results = check_kind(returned, homework)
    check_that_arguments_stay(arguments, example)
    if homework.results == ["tokens"]:
        return [shares_of_tokens(results[0], example)]
    if homework.learns:
        results.append(gradient_of(results[0], arguments[homework.learns]))
    return [x.detach().double() if x is not None else None for x in results]


def check_kind(returned, homework):
    """What was returned, as a list of tensors."""
    names = homework.results
    if returned is None:
        raise Wrong("Nothing is returned\n\nYour function ends without `return`.")
    results = [returned]
    if len(names) > 1:
        if not isinstance(returned, (tuple, list)) or len(returned) != len(names):
            raise Wrong(f"{len(names)} results are needed\n\nReturn {' and '.join(names)}, in this "
                        f"order: return {', '.join(names)}")
        results = list(returned)
    for name, result in zip(names, results):
        if not isinstance(result, torch.Tensor):
            raise Wrong(f"{name} is no tensor\n\nIt is of type {type(result).__name__}. Return a "
                        f"tensor; torch.tensor(...) makes one of numbers or lists.")
        if name == "tokens":
            if result.dtype != torch.long:
                raise Wrong(f"The tokens are of type {result.dtype}\n\nToken ids are whole "
                            f"numbers, of type torch.int64.")
        elif not result.is_floating_point():
            raise Wrong(f"{name} is of type {result.dtype}\n\nThis type has no fractions, so "
                        f"numbers are cut off. Did you make the tensor from `mask` or from whole "
                        f"numbers? Make it with dtype=torch.float32, or from a tensor of floats.")
    return results


def check_that_arguments_stay(arguments, example):
    for name, before in example.arguments.items():
        if isinstance(before, torch.Tensor):
            same = torch.allclose(arguments[name].detach().double(), before.double(),
                                  equal_nan=True)
            if not same:
                raise Wrong(f"Your function changes its argument {name}\n\nOther functions still "
                            f"need these numbers. An assignment such as x[...] = 0 or x += 1 "
                            f"changes the tensor itself. Work on a new tensor: torch.where(...) "
                            f"or x.clone().")


def gradient_of(result, argument):
    """The gradient of the sum of a result, or None if autograd cannot find the way."""
    if not result.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(result.sum(), argument, allow_unused=True)
    return gradient


def shares_of_tokens(tokens, example):
    """Tokens of the 2 * DRAWS rows -> how often each token came, [2,V]."""
    logits = example.arguments["logits"]
    rows, V = logits.shape
    if tokens.shape != (rows,):
        raise Wrong(f"The shape is wrong\n\nYour function got {rows} rows of logits, so it should "
                    f"return {rows} tokens, of shape [{rows}]. The shape is {list(tokens.shape)}.")
    if tokens.min() < 0 or tokens.max() >= V:
        raise Wrong(f"There is no such token\n\nThe vocabulary has {V} tokens, 0 to {V - 1}. Your "
                    f"tokens go from {tokens.min()} to {tokens.max()}.")
    shares = []
    for half in tokens.split(DRAWS):
        shares.append(torch.bincount(half, minlength=V).double() / DRAWS)
    return torch.stack(shares)


def check_chance(function, example):
    """Are the random numbers of a sampler torch's, and is there one for each row?"""
    draws = []
    for seed in (1, 1, 2, 3, 4, 5):
        torch.manual_seed(seed)
        draws.append(function(*example.arguments.values()))
    if not torch.equal(draws[0], draws[1]):
        raise Wrong("The random numbers are not torch's\n\nAfter torch.manual_seed(1) your "
                    "function draws other tokens each time. The script sets only torch's seed. "
                    "With other random numbers, --seed would have no effect. Use torch.rand or "
                    "torch.multinomial.")
    first_rows = torch.stack(draws[1:])[:, :DRAWS]
    all_alike = (first_rows == first_rows[:, :1]).all()
    if all_alike and len(set(first_rows[:, 0].tolist())) > 1:
        raise Wrong(f"One random number for all rows\n\nThe first {DRAWS} rows have the same "
                    "logits, and all of them got the same token. With another seed all got another "
                    "one. Draw a random number for each row.")


# ==================================================================================================
# Grading
# ==================================================================================================
def grade(name, function):
    """Nothing happens if the function is right. If not, Wrong says what the student should read."""
    homework = HOMEWORK[name]
    for number, example in enumerate(homework.examples):
        try:
            results = call(function, homework, example)
            if name == "sample_tokens" and number == 0:
                check_chance(function, example)
        except Wrong as wrong:
            title, _, hint = str(wrong).partition("\n\n")
            lines = [title, "", *wrap(hint), "", place_of(function)]
            raise Wrong("\n".join(lines)) from None
        except NotImplementedError as error:
            raise Wrong(not_done(name, homework, function, error)) from None
        except Exception as error:
            raise Wrong(stopped(error, function, example)) from None
        wrong_one = first_wrong(results, example, homework)
        if wrong_one is not None:
            raise Wrong(explain(function, homework, example, results, wrong_one))


def agree(a, b, homework):
    """Two results are equal, up to rounding (for a sampler up to chance)."""
    if a is None or b is None:
        return a is b
    tolerance = 0.06 if homework.results == ["tokens"] else 1e-4
    return a.shape == b.shape and torch.allclose(
        a.double(), b.double(), rtol=1e-4, atol=tolerance, equal_nan=True)


def first_wrong(results, example, homework):
    """The number of the first result that is not as expected, or None."""
    for k, (got, expected) in enumerate(zip(results, example.expected)):
        if not agree(got, expected, homework):
            return k
    return None


def known_mistake(function, homework, example, results, wrong_one):
    """The mistake that gives the same wrong numbers, or None.

    It must give all of the example's results up to the wrong one. If several mistakes do, we take
    the one that agrees with the student's function most often, over all examples. Only the real
    tokens are compared: many students put the score on the padding, and set the padding to 0 later.
    """
    best, most = None, 0
    for mistake in homework.mistakes:
        same = attempt(mistake.function, homework, example)
        if same is None or not all(agreements(same, results, homework, example)[:wrong_one + 1]):
            continue
        count = 0
        for other in homework.examples:
            theirs = attempt(function, homework, other)
            ours = attempt(mistake.function, homework, other)
            if theirs is not None and ours is not None:
                count += sum(agreements(theirs, ours, homework, other))
                # Where the real tokens are the same, the padding decides.
                count += sum(agree(a, b, homework) for a, b in zip(theirs, ours))
        if count > most:
            best, most = mistake, count
    return best


def agreements(results, others, homework, example):
    """For each result, whether both agree on the real tokens."""
    answers = []
    for a, b in zip(results, others):
        mask = example.arguments.get("mask")
        if mask is not None and a is not None and b is not None:
            if a.shape == b.shape == mask.shape:
                a, b = a[mask], b[mask]
        answers.append(agree(a, b, homework))
    return answers


def attempt(function, homework, example):
    """The results, or None if there are none."""
    try:
        return call(function, homework, example)
    except Exception:  # whatever a student's function or a mistake does with this example
        return None


def explain(function, homework, example, results, wrong_one):
    """The message for a wrong result: a title, a hint and the numbers."""
    got, expected = results[wrong_one], example.expected[wrong_one]
    is_gradient = wrong_one == len(homework.results)
    name = f"the gradient for {homework.learns}" if is_gradient else homework.results[wrong_one]
    mistake = None
    is_nan = got is not None and has_nan(example) and got.isnan().any()
    only_padding = not is_gradient and only_padding_differs(homework, example, got, expected)
    if got is not None and not is_nan and not only_padding:
        mistake = known_mistake(function, homework, example, results, wrong_one)
    if mistake:
        title, hint = mistake.name, mistake.hint
    else:
        title, hint = general_hint(homework, example, got, wrong_one, name)
    lines = [title, "", *wrap(hint), "", *wrap(f"Example: {example.about}")]
    lines += show_arguments(example)
    lines += ["", *show_difference(name, got, expected, homework), ""]
    lines.append(place_of(function))
    return "\n".join(lines)


def has_nan(example):
    return any(isinstance(x, torch.Tensor) and x.isnan().any() for x in example.arguments.values())


def only_padding_differs(homework, example, got, expected):
    """The result is right on the real tokens."""
    mask = example.arguments.get("mask")
    if mask is None or got is None or got.shape != mask.shape:
        return False
    return agree(got[mask], expected[mask], homework)


def general_hint(homework, example, got, wrong_one, name):
    """Title and hint where the numbers fit no known mistake."""
    expected = example.expected[wrong_one]
    is_gradient = wrong_one == len(homework.results)
    if got is None:
        return "No gradient", (
            f"The numbers are right. But no gradient flows from your result to "
            f"{homework.learns}, so training would change nothing. float(x), x.item(), x.tolist(), "
            f"x.detach(), torch.tensor(x) and torch.no_grad() cut the way. Use tensor operations "
            f"from the beginning to the end.")
    if got.shape != expected.shape:
        return "The shape is wrong", (
            f"{name} should have the shape {list(expected.shape)}, and it has {list(got.shape)}.")
    if has_nan(example) and got.isnan().any():
        if is_gradient:
            return "NaN in the padding reaches the gradient", (
                "Your result is right, but its gradient is NaN. If you mask at the end, the "
                "backward pass still multiplies 0 by NaN, and this is NaN. Replace the padding "
                "early, before you square or take exp: torch.where(mask, difference, 0).")
        return "NaN in the padding reaches the result", (
            "With numbers in the padding your result is right. With NaN it is NaN, because 0 * NaN "
            "is NaN. So `x * mask` is not enough. torch.where(mask, x, 0) is, and so is x[mask].")
    if not is_gradient and only_padding_differs(homework, example, got, expected):
        return "The padding is not 0", (
            f"The real tokens are right, but {name} must be 0 where `mask` is False. Use `mask` "
            f"once more, at the end.")
    if is_gradient:
        return "The gradient is wrong", (
            f"The result is right, but its gradient for {homework.learns} is not. Does a part of "
            f"your formula go through detach(), round() or a comparison?")
    if "padding holds" in example.about:
        if "zeros" in example.about:
            return "Not right with padding", (
                "Without padding your result is right. With replies of different lengths it is "
                "not. Which positions does `mask` allow?")
        return "The padding changes the result", (
            "With zeros in the padding your result is right. With other numbers it is not. A "
            "position where `mask` is False must not influence any result.")
    if homework.results == ["tokens"]:
        return "The tokens do not come as often as they should", (
            "The table shows the share of each token in many draws. Each token should come as "
            "often as softmax(logits / temperature) says.")
    return f"{name} is wrong", (
        "This fits none of the mistakes that I know. Compute the first number by hand, with the "
        "formula in the docstring. Where do your function and the formula part?")


# ---- Texts ---------------------------------------------------------------------------------------
def wrap(text):
    return textwrap.wrap(text, width=88, break_on_hyphens=False)


def code_of(function):
    return inspect.unwrap(function).__code__  # of the student's lines, not of a decorator


def place_of(function):
    code = code_of(function)
    return f"Your function: {Path(code.co_filename).name}, line {code.co_firstlineno}."


def not_done(name, homework, function, error):
    if "homework" not in str(error):
        return f"Your function raises NotImplementedError({error})\n\n{place_of(function)}"
    return f"Not done yet\nThis is {homework.where}. {place_of(function)}"


def stopped(error, function, example):
    """An error inside the student's function: what, in which line, and with which arguments."""
    first_line = str(error).partition("\n")[0]
    lines = [f"It stops with {type(error).__name__}: {first_line}"]
    file = code_of(function).co_filename
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == file:  # the innermost line that the student wrote
            lines += ["", f"{Path(file).name}, line {frame.lineno}:", f"    {frame.line}"]
            break
    lines += ["", *wrap(f"Example: {example.about}"), *show_arguments(example)]
    return "\n".join(lines)


def numbers(values):
    """A list of numbers as text, each in a column of its own."""
    cells = []
    for x in values:
        if isinstance(x, bool):
            cells.append(f"{'yes' if x else 'no':>9}")
        elif isinstance(x, int):
            cells.append(f"{x:>9}")
        else:
            x += 0.0  # -0.0 looks odd
            cells.append(f"{x:>9.4g}" if abs(x) >= 1000 else f"{x:>9.4f}")
    return "".join(cells)


def show(name, value):
    """A tensor or a number as lines of text, with its name at the left."""
    if not isinstance(value, torch.Tensor):
        return [f"    {name:<15}{value:>9}"]
    shape = "x".join(map(str, value.shape))
    if value.numel() > 100:
        return [f"    {name:<15}   a tensor of shape {shape}"]
    rows = value.reshape(-1, value.shape[-1]).tolist() if value.dim() else [[value.item()]]
    lines = []
    for i, row in enumerate(rows):
        starts_reply = value.dim() == 3 and i > 0 and i % value.shape[1] == 0
        if starts_reply:
            lines.append("")  # an empty line between two replies
        lines.append(f"    {name if i == 0 else '':<15}{numbers(row)}")
    return lines


def show_arguments(example):
    lines = []
    for name, value in example.arguments.items():
        lines += show(name, value)
    return lines


def show_difference(name, got, expected, homework):
    lines = [f"{name[0].upper()}{name[1:]}:" if name.startswith("the ") else f"{name}:"]
    lines += show("expected", expected)
    lines += show("yours", got) if got is not None else ["    yours              none"]
    if got is None or got.shape != expected.shape or not expected.dim():
        return lines
    for index in torch.cartesian_prod(*map(torch.arange, expected.shape)).reshape(
            -1, expected.dim()).tolist():
        want, have = expected[tuple(index)], got[tuple(index)]
        if not agree(want, have, homework):
            lines.append(f"The first difference is at {index}: {want.item():.4f} is expected, and "
                         f"yours is {have.item():.4f}.")
            break
    return lines


# ==================================================================================================
# Loading one function from the student's script
# ==================================================================================================
def load(script, name):
    """The function `name` of the script, and what it uses; none of the other seven functions.

    The whole script would import a large library, and this takes seconds. So we run only the
    statements that the function needs: imports, constants, small functions such as masked_mean.
    """
    tree = ast.parse(script.read_text(encoding="utf-8"), filename=str(script))
    makers = {}  # a name -> the statement that defines it
    for statement in tree.body:
        for made in names_made_by(statement):
            makers[made] = statement
    if name not in makers:
        raise Wrong(f"There is no function {name} in {script.name}\n\nDid you rename or delete it?")
    wanted, needed = [name], {}
    while wanted:
        statement = makers.get(wanted.pop())
        if statement is not None and statement.lineno not in needed:
            needed[statement.lineno] = statement
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and not (node.id in HOMEWORK and node.id != name):
                    wanted.append(node.id)
    statements = [needed[line] for line in sorted(needed)]
    future = ast.parse("from __future__ import annotations").body
    module = types.ModuleType("student")
    sys.modules["student"] = module  # dataclasses look for the module of their class
    for other in HOMEWORK:
        setattr(module, other, replacement(other, name))
    exec(compile(ast.Module(future + statements, []), str(script), "exec"), module.__dict__)
    return getattr(module, name)


def names_made_by(statement):
    """The names that a statement at the top level of a file defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        return [node.id for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return []


def td_residuals_of_the_oracle(rewards, values, mask, gamma):
    """What `gae` gets when it calls td_residuals while it is graded."""
    deltas = torch.zeros_like(rewards)
    for b in range(len(mask)):
        n = int(mask[b].sum())
        row = td_of_reply(rewards[b, :n].tolist(), values[b, :n].tolist(), gamma)
        deltas[b, :n] = torch.tensor(row)
    return deltas


def replacement(other, name):
    """What stands for another function of the homework while `name` is graded."""
    if other == "td_residuals":
        return td_residuals_of_the_oracle

    def not_here(*arguments, **named):
        raise RuntimeError(f"{name} does not need {other}. Please write it without.")
    return not_here


# ==================================================================================================
# What pytest runs
# ==================================================================================================
@pytest.mark.parametrize("name", HOMEWORK)
def test(name):
    message = ""
    try:
        grade(name, load(SCRIPT, name))
    except Wrong as wrong:
        message = str(wrong)
    except SyntaxError as error:
        message = f"line {error.lineno}: {error.msg}: {(error.text or '').strip()}"
        pytest.exit(f"Python cannot read {SCRIPT.name}, {message}", returncode=1)
    if message:
        pytest.fail(message, pytrace=False)  # without the lines of this file
