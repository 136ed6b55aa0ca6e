"""The homework: planted mistakes get the right hint, and right solutions of any kind pass.

The solutions and the mistakes below are written as a student would write them. They share nothing
with the formulas in homework_tests.py.
"""
import ast
import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

import ppo_rlhf as ppo
from helpers import ONE_THREAD
from ppo_rlhf import masked_mean
from test_ppo_rlhf import HERE, TINY, slow

sys.path.insert(0, str(HERE / "notes"))
import homework
import homework_tests as grader

td_residuals = grader.td_residuals_of_the_oracle  # the first gae below calls it
SOLUTIONS, PLANTED = [], []  # (name of the homework, [title of the hint,] function)


def solution(name):
    def keep(function):
        SOLUTIONS.append((name, function))
        return function
    return keep


def planted(name, title):
    def keep(function):
        PLANTED.append((name, title, function))
        return function
    return keep


def message_of(name, function):
    """What the student reads, or "" if the function passes."""
    try:
        grader.grade(name, function)
    except grader.Wrong as wrong:
        return str(wrong)
    return ""


# ==================================================================================================
# Solutions: at least two for each function
# ==================================================================================================
@solution("token_log_probs")
def by_log_softmax(logits, tokens):
    return torch.take_along_dim(logits.log_softmax(-1), tokens[..., None], 2)[..., 0]


@solution("token_log_probs")
def by_cross_entropy(logits, tokens):
    return -F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


@solution("token_log_probs")
def by_loops(logits, tokens):
    rows = []
    for reply, ids in zip(logits, tokens):
        rows.append(torch.stack([z[a] - torch.logsumexp(z, 0) for z, a in zip(reply, ids)]))
    return torch.stack(rows)


@solution("token_rewards")
def by_float_loops(log_probs, ref_log_probs, scores, mask, kl_coef):
    rewards = torch.zeros(mask.shape)
    for b in range(len(mask)):
        n = int(mask[b].sum())
        for t in range(n):
            rewards[b, t] = -kl_coef * float(log_probs[b, t] - ref_log_probs[b, t])
        rewards[b, n - 1] += float(scores[b])
    return rewards


@solution("token_rewards")
def by_numpy(log_probs, ref_log_probs, scores, mask, kl_coef):
    import numpy as np
    real = mask.numpy()
    rewards = np.where(real, kl_coef * (ref_log_probs.numpy() - log_probs.numpy()), 0.0)
    rewards[np.arange(len(real)), real.sum(1) - 1] += scores.numpy()
    return torch.from_numpy(rewards)


@solution("token_rewards")
def by_scatter(log_probs, ref_log_probs, scores, mask, kl_coef):
    rewards = (-kl_coef * (log_probs - ref_log_probs)).masked_fill(~mask, 0)
    return rewards.scatter_add(1, mask.sum(1, keepdim=True) - 1, scores[:, None])


@solution("td_residuals")
def td_by_float_loops(rewards, values, mask, gamma):
    deltas = [[0.0] * mask.shape[1] for _ in mask]
    for b, n in enumerate(mask.sum(1).tolist()):
        for t in range(n):
            after = values[b, t + 1].item() if t < n - 1 else 0.0
            deltas[b][t] = rewards[b, t].item() + gamma * after - values[b, t].item()
    return torch.tensor(deltas)


@solution("td_residuals")
def td_by_roll(rewards, values, mask, gamma):
    values = values.masked_fill(~mask, 0)
    after = values.roll(-1, dims=1)
    after[:, -1] = 0
    return (rewards + gamma * after - values).masked_fill(~mask, 0)


@solution("gae")
def gae_with_the_given_residuals(rewards, values, mask, gamma, lam):
    deltas = td_residuals(rewards, values, mask, gamma)
    T = deltas.shape[1]
    power = torch.arange(T)[:, None] - torch.arange(T)[None, :]  # k - t, as a matrix
    weights = torch.where(power >= 0, (gamma * lam) ** power.clamp(min=0).float(), 0)
    advantages = deltas @ weights
    return advantages, (advantages + values).masked_fill(~mask, 0)


@solution("gae")
def gae_by_float_loops(rewards, values, mask, gamma, lam):
    advantages, returns = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for b in range(len(mask)):
        next_value, advantage = 0.0, 0.0
        for t in reversed(range(int(mask[b].sum()))):
            value = values[b, t].item()
            delta = rewards[b, t].item() + gamma * next_value - value
            advantage = delta + gamma * lam * advantage
            next_value = value
            advantages[b, t] = advantage
            returns[b, t] = advantage + value
    return advantages, returns


@solution("policy_loss")
def loss_of_the_real_tokens(log_probs, old_log_probs, advantages, mask, clip_eps):
    rho = (log_probs[mask] - old_log_probs[mask]).exp()
    A = advantages[mask]
    losses = torch.maximum(-rho * A, -rho.clip(1 - clip_eps, 1 + clip_eps) * A)
    braked = ((A > 0) & (rho > 1 + clip_eps)) | ((A < 0) & (rho < 1 - clip_eps))
    return losses.mean(), braked.double().mean()


@solution("policy_loss")
def loss_token_by_token(log_probs, old_log_probs, advantages, mask, clip_eps):
    losses, braked = [], 0
    for b, t in mask.nonzero().tolist():
        rho = torch.exp(log_probs[b, t] - old_log_probs[b, t])
        A = advantages[b, t].item()
        limit = (1 + clip_eps) * A if A >= 0 else (1 - clip_eps) * A
        if rho.item() * A > limit:
            braked += 1
            losses.append(-limit + 0 * rho)
        else:
            losses.append(-rho * A)
    return torch.stack(losses).mean(), torch.tensor(braked / len(losses))


@solution("value_loss")
def mse_of_the_real_tokens(values, returns, mask):
    return F.mse_loss(values[mask], returns[mask]) / 2


@solution("value_loss")
def value_loss_token_by_token(values, returns, mask):
    total, count = 0, 0
    for b in range(len(mask)):
        for t in range(mask.shape[1]):
            if mask[b, t]:
                count += 1
                total = total + (values[b, t] - returns[b, t]) ** 2
    return 0.5 * total / count


@solution("ranking_loss")
def softplus_of_pairs(scores):
    K = scores.shape[1]
    losses = []
    for i in range(K):
        for j in range(i + 1, K):
            losses.append(F.softplus(scores[:, j] - scores[:, i]))
    return torch.stack(losses).mean()


@solution("ranking_loss")
def a_matrix_of_gaps(scores):
    gaps = scores[:, :, None] - scores[:, None, :]
    upper = torch.ones_like(gaps[0]).triu(1).bool()
    return F.binary_cross_entropy_with_logits(gaps[:, upper], torch.ones_like(gaps[:, upper]))


@solution("sample_tokens")
def by_multinomial(logits, temperature=1.0):
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1)[:, 0]


@solution("sample_tokens")
def by_gumbel(logits, temperature=1.0):
    noise = -torch.log(-torch.log(torch.rand(logits.shape, dtype=torch.double)))
    return (logits / temperature + noise).argmax(-1)


@solution("sample_tokens")
def by_walking_along_the_line(logits, temperature=1.0):
    points = torch.rand(len(logits)).tolist()
    tokens = []
    for row, point in zip((logits / temperature).softmax(-1).tolist(), points):
        token = 0
        while point >= row[token] and token < len(row) - 1:
            point -= row[token]
            token += 1
        tokens.append(token)
    return torch.tensor(tokens)


@pytest.mark.parametrize("name", grader.HOMEWORK)
def test_the_script_and_other_right_solutions_pass(name):
    assert message_of(name, getattr(ppo, name)) == ""
    others = [function for homework_name, function in SOLUTIONS if homework_name == name]
    assert len(others) >= 2
    for function in others:
        assert message_of(name, function) == "", function.__name__


# ==================================================================================================
# Planted mistakes
# ==================================================================================================
@planted("token_log_probs", "Probabilities, without the logarithm")
def _(logits, tokens):
    return torch.softmax(logits, dim=-1).gather(2, tokens[:, :, None])[:, :, 0]


@planted("token_log_probs", "The logarithm of a rounded probability")
def _(logits, tokens):
    pi = torch.softmax(logits, dim=-1)
    return torch.log(pi.gather(2, tokens[:, :, None]).squeeze(2))


@planted("token_log_probs", "Softmax over the wrong dimension")
def _(logits, tokens):
    return F.log_softmax(logits, dim=1).gather(2, tokens[:, :, None]).squeeze(2)


@planted("token_log_probs", "Off by one: a column is missing")
def _(logits, tokens):
    logits, tokens = logits[:, :-1], tokens[:, 1:]
    return logits.log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2)


@planted("token_log_probs", "No gradient")
def _(logits, tokens):
    return by_log_softmax(logits.detach(), tokens)


@planted("token_log_probs", "Logits that are not normalised")
def _(logits, tokens):
    rows = []
    for b in range(len(tokens)):
        rows.append(logits[b, torch.arange(tokens.shape[1]), tokens[b]])
    return torch.stack(rows)


@planted("token_rewards", "The score is on the last column")
def _(log_probs, ref_log_probs, scores, mask, kl_coef):
    rewards = torch.where(mask, -kl_coef * (log_probs - ref_log_probs), 0)
    rewards[:, -1] += scores
    return rewards


@planted("token_rewards", "The score is on the last column")
def _(log_probs, ref_log_probs, scores, mask, kl_coef):
    rewards = -kl_coef * (log_probs - ref_log_probs)
    rewards[:, -1] += scores
    return rewards * mask


@planted("token_rewards", "Rows and columns are not indexed in pairs")
def _(log_probs, ref_log_probs, scores, mask, kl_coef):
    rewards = torch.where(mask, -kl_coef * (log_probs - ref_log_probs), 0)
    rewards[:, mask.sum(1) - 1] += scores
    return rewards


@planted("token_rewards", "The score is on every token")
def _(log_probs, ref_log_probs, scores, mask, kl_coef):
    rewards = scores[:, None] - kl_coef * (log_probs - ref_log_probs)
    return rewards.masked_fill(~mask, 0)


@planted("token_rewards", "The KL has the wrong sign")
def _(log_probs, ref_log_probs, scores, mask, kl_coef):
    return by_scatter(ref_log_probs, log_probs, scores, mask, kl_coef)


@planted("token_rewards", "The score replaces the KL")
def _(log_probs, ref_log_probs, scores, mask, kl_coef):
    rewards = torch.where(mask, -kl_coef * (log_probs - ref_log_probs), 0)
    for b in range(len(mask)):
        rewards[b, mask[b].sum() - 1] = scores[b]
    return rewards


@planted("token_rewards", "NaN in the padding reaches the result")
def _(log_probs, ref_log_probs, scores, mask, kl_coef):
    rewards = -kl_coef * (log_probs - ref_log_probs) * mask
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] += scores
    return rewards


@planted("token_rewards", "Your function changes its argument log_probs")
def _(log_probs, ref_log_probs, scores, mask, kl_coef):
    log_probs -= ref_log_probs
    return by_scatter(log_probs, torch.zeros_like(log_probs), scores, mask, kl_coef)


@planted("token_rewards", "rewards is of type torch.int64")
def _(log_probs, ref_log_probs, scores, mask, kl_coef):
    rewards = torch.zeros_like(mask).long()
    rewards[:, 0] = -1
    return rewards


@planted("td_residuals", "Bootstrapping beyond the end")
def _(rewards, values, mask, gamma):
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    return torch.where(mask, rewards + gamma * after - values, 0)


@planted("td_residuals", "The next value comes from the first column")
def _(rewards, values, mask, gamma):
    after = torch.roll(values, -1, dims=1)
    return torch.where(mask, rewards + gamma * after - values, 0)


@planted("td_residuals", "The value before, not the next one")
def _(rewards, values, mask, gamma):
    before = F.pad(values, (1, 0))[:, :-1]
    return torch.where(mask, rewards + gamma * before - values, 0)


@planted("td_residuals", "gamma is missing")
def _(rewards, values, mask, gamma):
    return td_by_roll(rewards, values, mask, 1.0)


@planted("td_residuals", "The padding is not 0")
def _(rewards, values, mask, gamma):
    values = values.masked_fill(~mask, 0)
    return rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values


@planted("td_residuals", "The shape is wrong")
def _(rewards, values, mask, gamma):
    return rewards[:, :-1] + gamma * values[:, 1:] - values[:, :-1]


@planted("td_residuals", "It stops with RuntimeError: The size of tensor a (4) must match the size "
                         "of tensor b (3) at non-singleton dimension 1")
def _(rewards, values, mask, gamma):
    return rewards + gamma * values[:, 1:] - values


@planted("gae", "GAE forwards")
def _(rewards, values, mask, gamma, lam):
    deltas = td_by_roll(rewards, values, mask, gamma)
    advantages, running = torch.zeros_like(deltas), 0
    for t in range(deltas.shape[1]):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    advantages = advantages.masked_fill(~mask, 0)
    return advantages, (advantages + values).masked_fill(~mask, 0)


@planted("gae", "Bootstrapping beyond the end")
def _(rewards, values, mask, gamma, lam):
    advantages, advantage = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0
        delta = (rewards[:, t] + gamma * next_value - values[:, t]) * mask[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t] = advantage
    return advantages, (advantages + values) * mask


@planted("gae", "The loop runs through the padding")
def _(rewards, values, mask, gamma, lam):
    advantages, advantage = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t] = advantage
    return advantages * mask, (advantages + values) * mask


@planted("gae", "Returns from whitened advantages")
def _(rewards, values, mask, gamma, lam):
    advantages, returns = gae_by_float_loops(rewards, values, mask, gamma, lam)
    white = (advantages - advantages[mask].mean()) / (advantages[mask].std(correction=0) + 1e-8)
    return advantages, (white + values).masked_fill(~mask, 0)


@planted("gae", "Whitened advantages, and returns from them")
def _(rewards, values, mask, gamma, lam):
    advantages, returns = gae_by_float_loops(rewards, values, mask, gamma, lam)
    white = ppo.whiten(advantages, mask)
    return white, (white + values).masked_fill(~mask, 0)


@planted("gae", "Lambda is missing")
def _(rewards, values, mask, gamma, lam):
    return gae_by_float_loops(rewards, values, mask, gamma, 1.0)


@planted("gae", "One reply runs into the next")
def _(rewards, values, mask, gamma, lam):
    deltas = td_by_roll(rewards, values, mask, gamma)
    advantages, advantage = torch.zeros_like(deltas), 0.0
    for b in range(len(mask)):
        for t in range(int(mask[b].sum()) - 1, -1, -1):
            advantage = deltas[b, t] + gamma * lam * advantage
            advantages[b, t] = advantage
    return advantages, (advantages + values).masked_fill(~mask, 0)


@planted("gae", "The two results are swapped")
def _(rewards, values, mask, gamma, lam):
    advantages, returns = gae_by_float_loops(rewards, values, mask, gamma, lam)
    return returns, advantages


@planted("gae", "2 results are needed")
def _(rewards, values, mask, gamma, lam):
    return gae_by_float_loops(rewards, values, mask, gamma, lam)[0]


@planted("gae", "The padding is not 0")
def _(rewards, values, mask, gamma, lam):
    advantages, _ = gae_by_float_loops(rewards, values, mask, gamma, lam)
    return advantages, advantages + values


def student_policy_loss(rho, A, mask, low, high, combine=torch.min):
    unclipped, clipped = rho * A, rho.clamp(low, high) * A
    return -masked_mean(combine(unclipped, clipped), mask), \
        masked_mean((clipped < unclipped).float(), mask)


@planted("policy_loss", "max in the place of min")
def _(log_probs, old_log_probs, advantages, mask, clip_eps):
    rho = (log_probs - old_log_probs).exp()
    return student_policy_loss(rho, advantages, mask, 1 - clip_eps, 1 + clip_eps, torch.max)


@planted("policy_loss", "The ratio is upside down")
def _(log_probs, old_log_probs, advantages, mask, clip_eps):
    rho = old_log_probs.exp() / log_probs.exp()
    return student_policy_loss(rho, advantages, mask, 1 - clip_eps, 1 + clip_eps)


@planted("policy_loss", "The mean over the padding, in both results")
def _(log_probs, old_log_probs, advantages, mask, clip_eps):
    rho = torch.where(mask, log_probs - old_log_probs, 0).exp()
    A = torch.where(mask, advantages, 0)
    losses = -torch.min(rho * A, rho.clamp(1 - clip_eps, 1 + clip_eps) * A)
    return losses.mean(), (losses > -rho * A).float().mean()


@planted("policy_loss", "Clip without min")
def _(log_probs, old_log_probs, advantages, mask, clip_eps):
    rho = (log_probs - old_log_probs).exp().clamp(1 - clip_eps, 1 + clip_eps)
    loss = -(rho * advantages)[mask].mean()
    return loss, loss_of_the_real_tokens(log_probs, old_log_probs, advantages, mask, clip_eps)[1]


@planted("policy_loss", "clip_fraction counts all that is outside")
def _(log_probs, old_log_probs, advantages, mask, clip_eps):
    loss, _ = loss_of_the_real_tokens(log_probs, old_log_probs, advantages, mask, clip_eps)
    rho = (log_probs - old_log_probs)[mask].exp()
    return loss, ((rho - 1).abs() > clip_eps).float().mean()


@planted("policy_loss", "No gradient")
@torch.no_grad()
def _(log_probs, old_log_probs, advantages, mask, clip_eps):
    return loss_of_the_real_tokens(log_probs, old_log_probs, advantages, mask, clip_eps)


@planted("policy_loss", "clip_fraction is no tensor")
def _(log_probs, old_log_probs, advantages, mask, clip_eps):
    loss, share = loss_of_the_real_tokens(log_probs, old_log_probs, advantages, mask, clip_eps)
    return loss, share.item()


@planted("policy_loss", "The gradient is wrong")
def _(log_probs, old_log_probs, advantages, mask, clip_eps):
    loss, share = loss_of_the_real_tokens(log_probs, old_log_probs, advantages, mask, clip_eps)
    weight = torch.where(mask, log_probs, 0).sum()
    return loss + weight - weight.detach(), share


@planted("value_loss", "1/2 is missing")
def _(values, returns, mask):
    return F.mse_loss(values[mask], returns[mask])


@planted("value_loss", "The mean over the padding")
def _(values, returns, mask):
    return 0.5 * (torch.where(mask, values - returns, 0) ** 2).mean()


@planted("value_loss", "The mean of means")
def _(values, returns, mask):
    error = torch.where(mask, values - returns, 0) ** 2
    return 0.5 * (error.sum(1) / mask.sum(1)).mean()


@planted("value_loss", "NaN in the padding reaches the gradient")
def _(values, returns, mask):
    return 0.5 * masked_mean((values - returns) ** 2, mask)


@planted("value_loss", "Nothing is returned")
def _(values, returns, mask):
    F.mse_loss(values[mask], returns[mask])


@planted("ranking_loss", "The order is upside down")
def _(scores):
    return softplus_of_pairs(-scores)


@planted("ranking_loss", "Only neighbours")
def _(scores):
    return -F.logsigmoid(scores[:, :-1] - scores[:, 1:]).mean()


@planted("ranking_loss", "The sum over the pairs of one ranking")
def _(scores):
    K = scores.shape[1]
    return softplus_of_pairs(scores) * K * (K - 1) / 2


@planted("ranking_loss", "The logarithm of a rounded sigmoid")
def _(scores):
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    return -torch.log(torch.sigmoid(scores[:, i] - scores[:, j])).mean()


@planted("ranking_loss", "loss is wrong")
def _(scores):
    return softplus_of_pairs(scores) + 0.123


@planted("sample_tokens", "The temperature is missing")
def _(logits, temperature=1.0):
    return by_multinomial(logits)


@planted("sample_tokens", "The temperature is upside down")
def _(logits, temperature=1.0):
    return by_multinomial(logits * temperature)


@planted("sample_tokens", "The most likely token, always")
def _(logits, temperature=1.0):
    return (logits / temperature).softmax(-1).max(-1).indices


@planted("sample_tokens", "One random number for all rows")
def _(logits, temperature=1.0):
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    return (cumulative < torch.rand(1)).sum(-1)


@planted("sample_tokens", "The random numbers are not torch's")
def _(logits, temperature=1.0):
    import random
    points = torch.tensor([[random.random()] for _ in logits])
    return ((logits / temperature).softmax(-1).cumsum(-1) < points).sum(-1)


@planted("sample_tokens", "The shape is wrong")
def _(logits, temperature=1.0):
    return torch.multinomial((logits / temperature).softmax(-1), 1)


@planted("sample_tokens", "The tokens are of type torch.float32")
def _(logits, temperature=1.0):
    return by_multinomial(logits, temperature).float()


@planted("sample_tokens", "There is no such token")
def _(logits, temperature=1.0):
    return by_multinomial(logits, temperature) + 1


def test_every_planted_mistake_gets_its_hint():
    assert len(PLANTED) >= 50
    assert {name for name, _, _ in PLANTED} == set(grader.HOMEWORK)
    for name, title, function in PLANTED:
        message = message_of(name, function)
        assert message.split("\n")[0] == title, (name, message)
        assert "test_homework.py, line" in message  # where the student should look


@pytest.mark.parametrize("name", grader.HOMEWORK)
def test_the_grader_tells_its_own_mistakes_apart(name):
    """No mistake passes, and no two of one function give the same numbers in all examples."""
    mistakes = grader.HOMEWORK[name].mistakes
    assert len({mistake.name for mistake in mistakes}) == len(mistakes)
    for mistake in mistakes:
        message = message_of(name, mistake.function)
        assert message.split("\n")[0] == mistake.name
        assert " ".join(mistake.hint.split()) in " ".join(message.split())


def test_two_mistakes_are_shown_one_after_the_other():
    """The examples without padding show the first one alone. When it is gone, the second comes."""
    def both(log_probs, old_log_probs, advantages, mask, clip_eps, combine=torch.max):
        rho = torch.where(mask, log_probs - old_log_probs, 0).exp()
        A = torch.where(mask, advantages, 0)
        clipped = rho.clamp(1 - clip_eps, 1 + clip_eps) * A
        return -combine(rho * A, clipped).mean(), (clipped < rho * A).float().sum() / mask.sum()

    def one(*arguments):
        return both(*arguments, combine=torch.min)

    assert message_of("policy_loss", both).startswith("max in the place of min\n")
    assert message_of("policy_loss", one).startswith("The mean over the padding\n")


def test_an_unknown_mistake_shows_the_numbers():
    def strange(rewards, values, mask, gamma):
        return td_by_roll(rewards, values, mask, gamma) + 0.5 * (mask.sum(1, keepdim=True) == 1)

    message = message_of("td_residuals", strange)
    assert message.startswith("Not right with padding\n")
    assert "Example: replies of 3 and 1 tokens; the padding holds zeros" in message
    assert re.search(r"mask +yes +yes +yes\n +yes +no +no\n", message)
    assert re.search(r"expected .*\n +-0.6000 +0.0000 +0.0000\n", message)
    assert re.search(r"yours .*\n +-0.1000 +0.5000 +0.5000\n", message)
    assert "The first difference is at [1, 0]: -0.6000 is expected, and yours is -0.1000" in message


def test_other_ways_not_to_be_done():
    def left(scores):
        raise NotImplementedError("homework: ranking_loss (L3)")

    def crashes(scores):
        return scores[:, 99].mean()

    assert message_of("ranking_loss", left).startswith("Not done yet\n")
    message = message_of("ranking_loss", crashes)
    assert message.startswith("It stops with IndexError: ")
    assert "return scores[:, 99].mean()" in message


# ==================================================================================================
# The folder
# ==================================================================================================
def write_homework(folder):
    return subprocess.run([sys.executable, HERE / "notes" / "homework.py", folder],
                          capture_output=True, encoding="utf-8", env=ONE_THREAD)


def run_pytest(folder, *arguments):
    done = subprocess.run([sys.executable, "-m", "pytest", folder, *arguments], encoding="utf-8",
                          capture_output=True, env=ONE_THREAD, cwd=HERE)
    return done.returncode, done.stdout + done.stderr


def solve(folder, name, function):
    """Write the body of `function` in the place of `raise NotImplementedError`."""
    source = textwrap.dedent(inspect.getsource(function))
    definition = ast.parse(source).body[0]
    body = "\n".join(source.splitlines()[definition.body[0].lineno - 1:]) + "\n"
    script = folder / "ppo_rlhf.py"
    text = script.read_text(encoding="utf-8")
    empty = re.search(rf'    raise NotImplementedError\("homework: {name} .*\n', text)[0]
    script.write_text(text.replace(empty, body), encoding="utf-8")


def test_the_copy_is_the_script_without_eight_bodies(tmp_path):
    assert list(homework.STEPS) == list(grader.HOMEWORK)
    done = write_homework(tmp_path / "new" / "hw")
    assert done.returncode == 0 and "pytest" in done.stdout
    folder = tmp_path / "new" / "hw"
    names = {"ppo_rlhf.py", "homework_test.py", "conftest.py", "pytest.ini", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    full = ast.parse((HERE / "ppo_rlhf.py").read_text(encoding="utf-8"))
    copy = ast.parse((folder / "ppo_rlhf.py").read_text(encoding="utf-8"))
    assert len(full.body) == len(copy.body)
    emptied = []
    for whole, left in zip(full.body, copy.body):
        if ast.dump(whole) != ast.dump(left):
            emptied.append(left.name)
            assert ast.get_docstring(whole) == ast.get_docstring(left)
            assert isinstance(left.body[1], ast.Raise) and len(left.body) == 2
            assert ast.dump(whole.args) == ast.dump(left.args)
    assert set(emptied) == set(grader.HOMEWORK)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "pytest -k gae" in readme and "作业" in readme
    for name in grader.HOMEWORK:
        assert readme.count(f"| `{name}` |") == 2


def test_only_a_new_or_empty_folder_is_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        done = write_homework(folder)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@slow
def test_a_student_who_has_begun_sees_green_hints_and_what_is_left(tmp_path):
    """gae is graded with the grader's td_residuals, so it passes although that one is empty."""
    write_homework(tmp_path)
    solve(tmp_path, "gae", gae_with_the_given_residuals)
    solve(tmp_path, "token_rewards", PLANTED[6][2])
    code, output = run_pytest(tmp_path)
    assert code == 1
    assert "test[gae] PASSED" in output
    assert output.count("PASSED") == 1 and output.count("Not done yet\n") == 12
    assert "It looks as if you put the score on the last column." in output
    assert "\n1 of 8 pass\n" in output
    assert re.search(r"^token_rewards +The score is on the last column$", output, re.MULTILINE)
    assert re.search(r"^gae +passes$", output, re.MULTILINE)
    assert "Traceback" not in output and "homework_test.py:" not in output.replace("test.py::", "")


@slow
def test_a_solved_folder_is_green_and_its_script_trains(tmp_path):
    write_homework(tmp_path)
    for name in grader.HOMEWORK:
        first = next(function for other, function in SOLUTIONS if other == name)
        solve(tmp_path, name, first)
    code, output = run_pytest(tmp_path)
    assert code == 0 and output.count("PASSED") == 8, output
    spec = importlib.util.spec_from_file_location("solved", tmp_path / "ppo_rlhf.py")
    solved = importlib.util.module_from_spec(spec)
    sys.modules["solved"] = solved
    spec.loader.exec_module(solved)
    short = "--pretrain_steps 2 --sft_steps 2 --rm_steps 2 --rankings 4 --cycles 1".split()
    solved.main([*TINY, *short, "--out", str(tmp_path / "run")])
    del sys.modules["solved"]
    assert (tmp_path / "run" / "report.json").exists()


def test_a_syntax_error_is_one_line(tmp_path):
    write_homework(tmp_path)
    script = tmp_path / "ppo_rlhf.py"
    text = script.read_text(encoding="utf-8")
    script.write_text(text.replace("def gae(", "def gae)", 1), encoding="utf-8")
    with pytest.raises(SyntaxError):
        grader.load(script, "gae")
    script.write_text(text.replace("def gae(", "def my_gae(", 1), encoding="utf-8")
    with pytest.raises(grader.Wrong, match="There is no function gae in ppo_rlhf.py"):
        grader.load(script, "gae")
