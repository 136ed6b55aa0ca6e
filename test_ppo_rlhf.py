"""What ppo_rlhf.py promises, one test per promise. Run: pytest. Needs no network and no GPU.

    Tools       small models, small settings, random batches; the fixtures `world` and `run`
     1  The articles' numbers        worked examples of the articles, with a pocket calculator
     2  The formulas                 every formula against a slow one in plain Python
     3  Gradients                    the gradients of the losses against finite differences
     4  The invariants               thirteen sentences that must be true in any PPO for RLHF
     5  A world small enough to list every reply has a known probability; PPO finds the optimum
     6  The report                   from texts and models to each number that is printed
     7  The optimum                  J*, the fraction and their errors against exact ones
     8  Swap points                  GRPO, REINFORCE, KL in the loss, a price: from outside
     9  The sampler                  draws what the policy says
    10  The update                   epochs, minibatches, metrics, learning rates, optimizer
    11  The task                     prompts, texts, the simulated human, rankings, reward model
    12  One whole run                files, metrics, validation, same seed same numbers

notes/evidence/ has the tests of the workshop: wrong calls, your own data, other models, resuming,
several processes, bfloat16, and the pages in notes/.
"""
import copy
import csv
import inspect
import itertools
import json
import math
import os
import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import correlation, pvariance, stdev

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # no test uses the network

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel,
                          PreTrainedTokenizerFast)

import ppo_rlhf as ppo

HERE = Path(__file__).parent
slow = pytest.mark.skipif("SLOW" not in os.environ,
                          reason="more of the same; run all: SLOW=1 pytest")
torch.set_num_threads(1)  # the models are so small that threads would only wait for each other
NAN = float("nan")


# ==================================================================================================
# Tools that many tests use
# ==================================================================================================
NOTHING = {"prompts": [], "demos": [], "preferences": []}  # no data of one's own
TINY = ("--n_layer 1 --n_embd 32 --n_head 2 --pretrain_steps 6 --sft_steps 6 --rm_steps 6 "
        "--rankings 12 --cycles 3 --batch_size 8 --max_new_tokens 12 --eval_every 2 "
        "--report_batches 1").split()


def small_config(*flags):
    return ppo.parse_config([*TINY, *flags])


def small_actor(vocab_size=23, seed=0, **changes):
    """A GPT-2 with random weights and a critic with random weights. It has no tokenizer."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocab_size, n_positions=64, n_layer=2, n_embd=32, n_head=2,
                        initializer_range=0.3, bos_token_id=1, eos_token_id=1, pad_token_id=0,
                        **changes)
    actor = ppo.ActorCritic(GPT2LMHeadModel(config), None, ppo.Config())
    torch.nn.init.normal_(actor.head[-1].weight)
    return actor


def small_reward_model():
    model = ppo.RewardModel(small_actor(seed=1).lm)
    torch.nn.init.normal_(model.head[-1].weight)
    return model


def shifted(actor):
    """A frozen copy of the actor with another policy."""
    model = ppo.frozen(actor)
    head = model.lm.get_output_embeddings().weight
    with torch.no_grad():
        head += 0.1 * torch.randn_like(head)
    return model


def pad(sequences, left):
    """Lists of token ids -> ids and mask, padded with 0 on one side."""
    width = max(map(len, sequences))
    rows, masks = [], []
    for ids in sequences:
        gap = [0] * (width - len(ids))
        real = [1] * len(ids)
        rows.append(gap + ids if left else ids + gap)
        masks.append(gap + real if left else real + gap)
    return torch.tensor(rows), torch.tensor(masks).bool()


def random_batch(rows=5, P=4, T=7, vocab_size=23, seed=0):
    """Prompts padded left, replies padded right: prompt_ids, prompt_mask, reply_ids, mask."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(2, vocab_size) for _ in range(rng.randint(1, P))]
               for _ in range(rows)]
    replies = [[rng.randrange(2, vocab_size) for _ in range(max(1, T - i))] for i in range(rows)]
    return *pad(prompts, left=True), *pad(replies, left=False)


def random_rollout_tensors(rows=6, T=9, seed=0, dtype=torch.float32):
    """A mask with replies of all lengths, and four tensors [rows,T] of random numbers."""
    torch.manual_seed(seed)
    lengths = torch.randint(1, T + 1, (rows, 1))
    lengths[0], lengths[1] = T, 1
    mask = torch.arange(T) < lengths
    return mask, *(torch.randn(rows, T, dtype=dtype) for _ in range(4))


def with_nan(x, mask):
    """x with NaN in the padding."""
    return torch.where(mask, x, NAN)


def as_rollout(prompt_ids, prompt_mask, reply_ids, mask, **fields):
    """A rollout of token ids alone, without texts."""
    replies = [ppo.Reply(str(i), "", True) for i in range(len(mask))]
    return ppo.Rollout(replies, torch.arange(len(mask)), prompt_ids, prompt_mask, reply_ids, mask,
                       **fields)


@pytest.fixture(scope="module")
def world():
    """A tokenizer, an SFT-like actor and a reward model, all untrained, and a few prompts."""
    cfg = small_config()
    prompts = ppo.split(ppo.WORLD_PROMPTS)["train"][:8]
    actor = ppo.base_model(NOTHING, cfg)
    reward_model = ppo.RewardModel(copy.deepcopy(actor.lm), actor.tokenizer, cfg)
    torch.nn.init.normal_(reward_model.head[-1].weight)
    return actor.tokenizer, actor, reward_model, prompts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of one complete run with tiny settings."""
    out = tmp_path_factory.mktemp("runs") / "run"
    ppo.main([*TINY, "--out", str(out)])
    return out


def read_metrics(out):
    """The lines of metrics.csv, without the seconds."""
    with open(out / "metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        del line["seconds"]
    return lines


def read_report(out):
    return json.loads((out / "report.json").read_text())


# ==================================================================================================
# 1  The articles' numbers
# ==================================================================================================
def test_article_e_four_tokens_by_hand():
    """S2 to S5 on 天空 | 是 | 蔚蓝色 | 的, with the values of the article, worked out on paper."""
    mask = torch.tensor([[True, True, True, True, False]])  # the last column is padding
    values = torch.tensor([[-0.84, 0.88, 1.96, 3.48, 99.0]], dtype=torch.float64)
    log_ratio = torch.tensor([[0.5, -0.2, 0.0, 1.0, 99.0]], dtype=torch.float64)
    score = torch.tensor([4.0], dtype=torch.float64)
    rewards = ppo.token_rewards(log_ratio, 0 * log_ratio, score, mask, kl_coef=0.1)
    assert rewards[0].tolist() == pytest.approx([-0.05, 0.02, 0.0, 3.9, 0.0])
    deltas = ppo.td_residuals(rewards, values, mask, gamma=1.0)
    assert deltas[0].tolist() == pytest.approx([1.67, 1.10, 1.52, 0.42, 0.0])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([2.6525, 1.965, 1.73, 0.42, 0.0])
    assert returns[0].tolist() == pytest.approx([1.8125, 2.845, 3.69, 3.9, 0.0])


def test_article_b_value_loss():
    """L8: V = 0.34, then 1.23. The total reward turns out to be 1.87."""
    values, returns = torch.tensor([[0.34, 1.23]]), torch.tensor([[1.87, 1.87]])
    one, both = torch.tensor([[False, True]]), torch.tensor([[True, True]])
    assert ppo.value_loss(values, returns, one).item() == pytest.approx(0.2048)
    assert ppo.value_loss(values, returns, both).item() == pytest.approx((1.17045 + 0.2048) / 2)


def test_article_d_clipping_lets_a_probability_grow_by_a_fifth_per_batch():
    """L9: 5% -> 6% -> 7.2% -> 8.6%. Each batch climbs until the gradient is 0."""
    probability, stops, mask = 0.05, [], torch.tensor([[True]])
    for _ in range(3):
        old = torch.tensor([[math.log(probability)]])
        new = old.clone().requires_grad_()
        loss, clip_fraction = ppo.policy_loss(new, old, torch.ones(1, 1), mask, clip_eps=0.2)
        for _ in range(1000):  # enough; a wrong loss might never stop
            (gradient,) = torch.autograd.grad(loss, new)
            new = (new - 3e-4 * gradient).detach().requires_grad_()
            loss, clip_fraction = ppo.policy_loss(new, old, torch.ones(1, 1), mask, clip_eps=0.2)
            if clip_fraction > 0:
                break
        (gradient,) = torch.autograd.grad(loss, new)
        assert gradient.item() == 0
        probability = new.exp().item()
        stops.append(probability)
    assert stops == pytest.approx([0.06, 0.072, 0.0864], rel=2e-3)


# ==================================================================================================
# 2  The formulas
#
#    Every formula is worked out a second time, slowly, in plain Python: with loops over floats
#    (64 bits) instead of tensors, and with sums instead of recursions. Nothing here shares code
#    with ppo_rlhf.py. The padding holds zeros, sevens, or NaN and infinity (invariant 2).
# ==================================================================================================
JUNK = (math.nan, math.inf, -math.inf)
FILLS = [0.0, 7.0, JUNK]


def cases(count, seed):
    """(number, rng, lengths, T): batches with replies of all kinds of lengths."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        B, T = rng.randint(1, 6), rng.randint(1, 9)
        lengths = [rng.randint(1, T) for _ in range(B)]
        if number % 4 == 0:
            lengths[rng.randrange(B)] = 1  # an empty reply: EOS, and nothing else
        if number % 4 == 1:
            lengths = [rng.randint(1, T)] * B  # all of one length, often with padding behind all
        if number % 4 == 2:
            lengths[rng.randrange(B)] = T  # cut off at the limit
        yield number, rng, lengths, T


def numbers(rng, lengths, scale=1.0):
    """One random float for every real token, reply by reply."""
    return [[rng.gauss(0, scale) for _ in range(n)] for n in lengths]


def tensor(rows, T, fill=0.0):
    """Rows of different lengths -> float64 [B,T], with `fill` in the padding."""
    filler = itertools.cycle(fill if isinstance(fill, tuple) else (fill,))
    padded = [row + [next(filler) for _ in range(T - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.float64)


def real(lengths, T):
    """The mask [B,T] of replies with these lengths."""
    return torch.tensor([[t < n for t in range(T)] for n in lengths])


def flat(rows):
    return [x for row in rows for x in row]


def mean(xs):
    return math.fsum(xs) / len(xs)


def agree(result, rows, T, tolerance=1e-9):
    """result [B,T] holds the numbers of `rows`, and exactly 0 in the padding."""
    assert result.shape == (len(rows), T)
    for got, row in zip(result.tolist(), rows):
        assert got[:len(row)] == pytest.approx(row, rel=tolerance, abs=tolerance)
        assert got[len(row):] == [0.0] * (T - len(row))


# ---- The formulas once more ----------------------------------------------------------------------
def rewards_of_reply(log_probs, ref_log_probs, score, beta):
    """r_t = -beta (log pi - log ref), and the score on top at the last token."""
    rewards = [-beta * (a - b) for a, b in zip(log_probs, ref_log_probs)]
    rewards[-1] += score
    return rewards


def residuals_of_reply(rewards, values, gamma):
    """delta_t = r_t + gamma V(s_{t+1}) - V(s_t). V is 0 when the reply is over."""
    next_values = values[1:] + [0.0]
    return [r + gamma * w - v for r, v, w in zip(rewards, values, next_values)]


def n_step_advantage(rewards, values, gamma, t, n):
    """A_t^(n) = sum_{l<n} gamma^l r_{t+l} + gamma^n V(s_{t+n}) - V(s_t)   (GAE paper, eq. 14)"""
    T, total = len(rewards), -values[t]
    for step in range(n):
        total += gamma ** step * (rewards[t + step] if t + step < T else 0.0)
    return total + gamma ** n * (values[t + n] if t + n < T else 0.0)


def gae_as_mixture(rewards, values, gamma, lam):
    """A_t = (1-lam) sum_{n>=1} lam^(n-1) A_t^(n)   (eq. 16)

    From n = N = T-t on, all A_t^(n) are equal. Their weights add up to lam^(N-1).
    """
    T, advantages = len(rewards), []
    for t in range(T):
        N, terms = T - t, []
        for n in range(1, N + 1):
            weight = lam ** (n - 1) if n == N else (1 - lam) * lam ** (n - 1)
            terms.append(weight * n_step_advantage(rewards, values, gamma, t, n))
        advantages.append(math.fsum(terms))
    return advantages


def gae_as_double_sum(rewards, values, gamma, lam):
    """A_t = sum_{k>=t} (gamma lam)^(k-t) delta_k   (eq. 16, last line)"""
    delta = residuals_of_reply(rewards, values, gamma)
    T = len(delta)
    return [math.fsum((gamma * lam) ** (k - t) * delta[k] for k in range(t, T)) for t in range(T)]


def surrogate_of_token(ratio, advantage, eps):
    """min(rho A, g(eps, A)), g = (1+eps) A if A >= 0, else (1-eps) A: eq. 7 without a clip."""
    limit = (1 + eps) * advantage if advantage >= 0 else (1 - eps) * advantage
    return min(limit, ratio * advantage)


def log_softmax(logits):
    """log pi(v) for all v."""
    top = max(logits)
    total = math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - top - total for z in logits]


# ---- The script has to agree ---------------------------------------------------------------------
def test_score_lands_on_the_last_real_token_and_rewards_add_up():
    """Invariant 4. r_t = -beta (log pi - log ref) + [t = T] score; the sum is score - beta KL."""
    for number, rng, lengths, T in cases(150, "rewards"):
        log_probs, ref, mask = numbers(rng, lengths), numbers(rng, lengths), real(lengths, T)
        scores = [rng.gauss(0, 3) for _ in lengths]
        beta = 0.0 if number % 5 == 0 else rng.uniform(0, 2)
        expected = [rewards_of_reply(*reply, beta) for reply in zip(log_probs, ref, scores)]
        for fill in FILLS:
            rewards = ppo.token_rewards(tensor(log_probs, T, fill), tensor(ref, T, fill),
                                        torch.tensor(scores, dtype=torch.float64), mask, beta)
            agree(rewards, expected, T)
        sums = [score - beta * (math.fsum(a) - math.fsum(b))
                for score, a, b in zip(scores, log_probs, ref)]
        assert rewards.sum(dim=1).tolist() == pytest.approx(sums, abs=1e-9)


def test_gae_equals_its_double_sum_and_its_limits_are_td_and_monte_carlo():
    """Invariant 5. Also as a mixture of n-step advantages; the returns are A_t + V(s_t)."""
    for number, rng, lengths, T in cases(180, "gae"):
        rewards, values, mask = numbers(rng, lengths), numbers(rng, lengths, 2), real(lengths, T)
        gamma = [0.0, 1.0, rng.random()][number % 3]
        lam = [0.0, 1.0, rng.random()][number // 3 % 3]
        pairs = list(zip(rewards, values))
        deltas = [residuals_of_reply(r, v, gamma) for r, v in pairs]
        mixture = [gae_as_mixture(r, v, gamma, lam) for r, v in pairs]
        double_sum = [gae_as_double_sum(r, v, gamma, lam) for r, v in pairs]
        targets = [[a + v for a, v in zip(*rows)] for rows in zip(mixture, values)]
        for fill in FILLS:
            args = tensor(rewards, T, fill), tensor(values, T, fill), mask
            agree(ppo.td_residuals(*args, gamma), deltas, T)
            advantages, returns = ppo.gae(*args, gamma, lam)
            agree(advantages, mixture, T)
            agree(advantages, double_sum, T)
            agree(returns, targets, T)
        if lam == 0:
            agree(advantages, deltas, T)
        if lam == 1:  # the rewards that came, discounted; V plays no part
            for i, r in enumerate(rewards):
                for t in range(len(r)):
                    came = math.fsum(gamma ** (k - t) * r[k] for k in range(t, len(r)))
                    assert returns[i, t].item() == pytest.approx(came, abs=1e-9)


def test_whitening_sets_mean_and_variance_over_real_tokens_only():
    """(x - mean) / sqrt(variance), both over the real tokens."""
    for number, rng, lengths, T in cases(150, "whiten"):
        mask, center = real(lengths, T), rng.gauss(0, 5)
        x = [[center + z for z in row] for row in numbers(rng, lengths, rng.uniform(0.5, 3))]
        if number % 10 == 3:
            x = [[center] * n for n in lengths]  # no variance: no division by 0
        m = mean(flat(x))
        deviation = math.sqrt(mean([(z - m) ** 2 for z in flat(x)]))
        if 1e-9 < deviation < 0.05:
            continue  # tokens almost equal: here the 1e-8 in the denominator can be seen
        white = [[(z - m) / max(deviation, 1e-9) for z in row] for row in x]
        for fill in FILLS:
            assert ppo.masked_mean(tensor(x, T, fill), mask).item() == pytest.approx(m, abs=1e-9)
            agree(ppo.whiten(tensor(x, T, fill), mask), white, T, 1e-5)


def test_policy_loss_and_clip_fraction_agree_with_the_formula():
    """L = -mean of min(rho A, g(eps, A)) over all tokens. Clipped: where rho A is above g."""
    for number, rng, lengths, T in cases(150, "policy"):
        old, advantages, mask = numbers(rng, lengths), numbers(rng, lengths), real(lengths, T)
        new = [[z + rng.gauss(0, 0.4) for z in row] for row in old] if number % 6 else old
        if number % 5 == 0:
            advantages[0][0] = 0.0
        eps, losses, clipped = rng.uniform(0.05, 0.4), [], []
        for a, b, A in zip(flat(new), flat(old), flat(advantages)):
            rho = math.exp(a) / math.exp(b)
            losses.append(-surrogate_of_token(rho, A, eps))
            clipped.append((A > 0 and rho > 1 + eps) or (A < 0 and rho < 1 - eps))
        for fill in FILLS:
            loss, fraction = ppo.policy_loss(tensor(new, T, fill), tensor(old, T, fill),
                                             tensor(advantages, T, fill), mask, eps)
            assert loss.item() == pytest.approx(mean(losses), abs=1e-9)
            assert fraction.item() == pytest.approx(mean(clipped), abs=1e-6)


def test_value_loss_agrees_with_the_formula():
    """1/2 mean (V - G)^2, over the real tokens."""
    for number, rng, lengths, T in cases(150, "value"):
        values, returns, mask = numbers(rng, lengths), numbers(rng, lengths, 2), real(lengths, T)
        losses = [(V - G) ** 2 / 2 for V, G in zip(flat(values), flat(returns))]
        for fill in FILLS:
            loss = ppo.value_loss(tensor(values, T, fill), tensor(returns, T, fill), mask)
            assert loss.item() == pytest.approx(mean(losses))


def test_ranking_loss_is_the_mean_over_all_pairs():
    """-mean of log sigmoid(s_i - s_j) over the pairs with i before j   (InstructGPT, eq. 1)"""
    for number in range(100):
        rng = random.Random(number)
        N, K, scale = rng.randint(1, 6), rng.randint(2, 9), rng.choice([0.1, 1, 30])
        scores, losses = numbers(rng, [K] * N, scale), []
        for row in scores:
            for better, worse in combinations(row, 2):
                gap = better - worse  # log sigmoid without overflow, whichever sign
                losses.append(math.log1p(math.exp(-abs(gap))) + max(-gap, 0))
        assert len(losses) == N * K * (K - 1) // 2
        assert ppo.ranking_loss(tensor(scores, K)).item() == pytest.approx(mean(losses))


def test_token_log_probs_and_entropy_are_those_of_the_softmax():
    """log pi = z_a - log sum e^z and H = -sum pi log pi, and their gradients.

    d log pi_a / dz_v = [v = a] - pi_v and dH / dz_v = -pi_v (log pi_v + H). Large logits (a
    certain token, a shift of 1000 for all) must neither overflow nor cancel.
    """
    for number in range(120):
        rng = random.Random(number)
        T, V = rng.randint(1, 5), rng.randint(2, 12)
        scale, shift = rng.choice([0.0, 1.0, 4.0, 1000.0]), rng.choice([0.0, 1000.0, -1000.0])
        rows = [[rng.gauss(shift, scale) for _ in range(V)] for _ in range(T)]
        z = torch.tensor([rows], dtype=torch.float64, requires_grad=True)
        tokens = [rng.randrange(V) for _ in range(T)]
        log_probs, H = ppo.token_log_probs(z, torch.tensor([tokens])), ppo.entropy(z)
        (log_gradient,) = torch.autograd.grad(log_probs.sum(), z)
        (H_gradient,) = torch.autograd.grad(H.sum(), z)
        for t, a in enumerate(tokens):
            log_pi = log_softmax(rows[t])
            h = -math.fsum(math.exp(x) * x for x in log_pi)
            assert log_probs[0, t].item() == pytest.approx(log_pi[a], abs=1e-9)
            assert H[0, t].item() == pytest.approx(h, abs=1e-9)
            slope = [(v == a) - math.exp(x) for v, x in enumerate(log_pi)]
            assert log_gradient[0, t].tolist() == pytest.approx(slope, abs=1e-9)
            slope = [-math.exp(x) * (x + h) for x in log_pi]
            assert H_gradient[0, t].tolist() == pytest.approx(slope, abs=1e-9)


# ==================================================================================================
# 3  Gradients
# ==================================================================================================
def slopes(loss, x, h=1e-6):
    """d loss / d x_i = (loss(x_i + h) - loss(x_i - h)) / 2h, one entry after the other."""
    result = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[i] = h
        result.view(-1)[i] = (loss(x + step) - loss(x - step)) / (2 * h)
    return result


def check_gradient(loss, x, expected, T):
    """Autograd, finite differences and the formula agree. Where the formula says 0, it is 0."""
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    agree(gradient, expected, T)
    assert torch.allclose(gradient, slopes(loss, x), atol=1e-7)
    assert (gradient[tensor(expected, T) == 0] == 0).all()


def test_the_four_cases_of_clipping():
    """Invariant 11. In cases 2 and 4 the gradient is 0; in cases 1 and 3 it is -rho A / tokens."""
    seen = set()
    for number, rng, lengths, T in cases(50, "policy gradient"):
        eps, mask, old = rng.uniform(0.05, 0.4), real(lengths, T), numbers(rng, lengths)
        new, advantages, expected = [], [], []
        for row in old:
            new.append([]), advantages.append([]), expected.append([])
            for z in row:
                A = rng.choice([-1, 1]) * rng.uniform(0.1, 2)
                where = rng.choice(["below", "near", "above"])  # and not at the corners
                low, high = {"below": (0.2, 1 - eps - 0.01), "near": (1.01 - eps, 0.99 + eps),
                             "above": (1 + eps + 0.01, 3)}[where]
                rho = rng.uniform(low, high)
                stopped = where == ("above" if A > 0 else "below")
                seen.add((A > 0, where))
                new[-1].append(z + math.log(rho))
                advantages[-1].append(A)
                expected[-1].append(0.0 if stopped else -rho * A / sum(lengths))
        fill = JUNK if number % 2 else 0.0
        old, advantages = tensor(old, T, fill), tensor(advantages, T, fill)
        check_gradient(lambda x: ppo.policy_loss(x, old, advantages, mask, eps)[0],
                       tensor(new, T), expected, T)
    assert len(seen) == 6


def test_gradient_of_the_value_loss_agrees_with_finite_differences():
    """(V - G) / tokens."""
    for number, rng, lengths, T in cases(50, "value gradient"):
        values, returns, mask = numbers(rng, lengths), numbers(rng, lengths, 2), real(lengths, T)
        slopes = []
        for row, targets in zip(values, returns):
            slopes.append([(V - G) / sum(lengths) for V, G in zip(row, targets)])
        fill = JUNK if number % 2 else 0.0
        x, G = tensor(values, T, fill), tensor(returns, T, fill)
        check_gradient(lambda x: ppo.value_loss(x, G, mask), x, slopes, T)


# ==================================================================================================
# 4  The invariants
#
#     1  before the first update every ratio is 1              here
#     2  what stands in the padding influences nothing         here, and in parts 2, 3
#     3  a reply is worth the same alone and in a batch        here
#     4  the score is on the last real token                   part 2, token rewards
#     5  GAE is its double sum                                 part 2, gae
#     6  the returns come from advantages before whitening     here
#     7  KL is 0 before the first update, and then exact       here, and in part 5
#     8  samples follow the log-probs that are computed        part 5, and part 9
#     9  padding is not EOS, and EOS is learned                here
#    10  no model uses dropout                                 here
#    11  clipping has four cases                               part 3
#    12  PPO changes the policy and nothing else               here
#    13  the same seed gives the same run                      part 12
# ==================================================================================================
STILL = 0.0  # a learning rate with which no weight moves


def sgd(actor, lr):
    return torch.optim.SGD(actor.parameters(), lr=lr)


def weights_equal(model, before):
    """Are the weights of `model` those of the state_dict `before`?"""
    now = model.state_dict()
    return all(torch.equal(now[name], x) for name, x in before.items())


# ---- 1 -------------------------------------------------------------------------------------------
def test_ratio_is_one_and_nothing_is_clipped_before_the_first_update(world):
    _, actor, _, prompts = world
    cfg = small_config("--minibatches", "2", "--ppo_epochs", "2")
    actor, reference = copy.deepcopy(actor), shifted(actor)
    rollout = ppo.collect_rollout(actor, reference, ppo.human_score, prompts, cfg)
    assert not torch.allclose(rollout.log_probs, rollout.ref_log_probs)
    metrics = ppo.update_policy(actor, sgd(actor, STILL), rollout, cfg)
    assert metrics["first_log_ratio"] < 1e-5
    assert metrics["clip_fraction"] == 0 and metrics["approx_kl"] < 1e-8
    adam = torch.optim.Adam(actor.parameters(), lr=0.01)
    metrics = ppo.update_policy(actor, adam, rollout, cfg)  # the second minibatch leaves ratio 1
    assert metrics["first_log_ratio"] < 1e-5
    assert metrics["clip_fraction"] > 0 and metrics["approx_kl"] > 1e-8


# ---- 2 -------------------------------------------------------------------------------------------
def test_nan_in_padding_changes_nothing(world):
    """Phase II with NaN in the padding of every stored tensor: the same update and metrics."""
    _, actor, reward_model, prompts = world
    torch.manual_seed(0)
    cfg = small_config("--ent_coef", "0.1", "--minibatches", "1", "--max_new_tokens", "30")
    rollout = ppo.collect_rollout(actor, shifted(actor), reward_model.score, prompts * 2, cfg)
    dirty = copy.copy(rollout)
    for name, x in vars(rollout).items():
        if torch.is_tensor(x) and x.is_floating_point() and x.dim() == 2:
            assert (x[~rollout.mask] == 0).all(), f"{name} is 0 in the padding"
            setattr(dirty, name, with_nan(x, rollout.mask))
    assert dirty.returns.isnan().any() and dirty.log_probs.isnan().any()
    results = []
    for data in (rollout, dirty):
        torch.manual_seed(0)
        trained = copy.deepcopy(actor)
        metrics = ppo.update_policy(trained, sgd(trained, 0.1), data, cfg)
        results.append((metrics, trained.state_dict()))
    (metrics, weights), (dirty_metrics, dirty_weights) = results
    assert metrics == dirty_metrics and all(math.isfinite(x) for x in metrics.values())
    assert all(torch.equal(weights[name], dirty_weights[name]) for name in weights)
    assert not weights_equal(actor, weights)


def test_nan_in_padding_reaches_no_gradient_of_the_losses():
    """A loss can be right and its gradient NaN. Each tensor has NaN alone, and all together."""
    mask, *tensors = random_rollout_tensors(T=20)
    losses = {
        "policy": lambda x, old, weights: ppo.policy_loss(x, old, weights, mask, 0.2)[0],
        "value": lambda x, old, returns: ppo.value_loss(x, returns, mask)}
    for name, loss in losses.items():
        clean = None
        for dirty in [(), (0,), (1,), (2,), (0, 1, 2)]:
            x, *others = [with_nan(tensors[i], mask) if i in dirty else tensors[i]
                          for i in range(3)]
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(x, *others), x)
            clean = gradient if clean is None else clean
            assert torch.equal(gradient, clean), (name, dirty)
        assert clean[mask].abs().sum() > 0 and (clean[~mask] == 0).all()


def test_values_of_real_states_do_not_depend_on_the_hidden_states_of_the_padding():
    head = small_actor().head
    mask, *_ = random_rollout_tensors()
    hidden = torch.randn(*mask.shape, 32)
    dirty = torch.where(mask.unsqueeze(-1), hidden, NAN)
    assert torch.equal(ppo.state_values(head, hidden)[mask], ppo.state_values(head, dirty)[mask])


# ---- 3 -------------------------------------------------------------------------------------------
def test_a_reply_is_worth_the_same_alone_and_in_any_padded_batch():
    """Its log-probs and its values. Other token ids in the padding change nothing either."""
    actor = small_actor()
    prompt_ids, prompt_mask, reply_ids, mask = random_batch(rows=6)
    fill_prompts = torch.where(prompt_mask, prompt_ids, 9)
    fill_replies = torch.where(mask, reply_ids, 9)
    with torch.no_grad():
        logits, values = actor(prompt_ids, prompt_mask, reply_ids, mask)
        filled_logits, filled_values = actor(fill_prompts, prompt_mask, fill_replies, mask)
        for i in range(len(mask)):
            T = int(mask[i].sum())
            prompt, reply = prompt_ids[i:i + 1, prompt_mask[i]], reply_ids[i:i + 1, :T]
            alone, values_alone = actor(prompt, prompt > 0, reply, reply > 0)  # all tokens are real
            for batch in (logits, filled_logits):
                assert torch.allclose(batch[i, :T], alone[0], atol=1e-4)
            for batch in (values, filled_values):
                assert torch.allclose(batch[i, :T], values_alone[0], atol=1e-4)


def test_logits_at_t_predict_token_t_and_values_at_t_do_not_know_it():
    actor = small_actor()
    prompt_ids, prompt_mask, reply_ids, mask = random_batch(rows=1)
    changed = reply_ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 20 + 2
    with torch.no_grad():
        before = actor(prompt_ids, prompt_mask, reply_ids, mask)
        after = actor(prompt_ids, prompt_mask, changed, mask)
        plain = actor.lm(torch.cat([prompt_ids, reply_ids], dim=1)).logits  # one reply: no padding
    for a, b in zip(before, after):  # first logits, then values
        assert torch.allclose(a[0, :4], b[0, :4], atol=1e-6)
        assert not torch.allclose(a[0, 4:], b[0, 4:], atol=1e-3)
    assert torch.allclose(before[0][0], plain[0, prompt_ids.shape[1] - 1:-1], atol=1e-5)


# ---- 6 -------------------------------------------------------------------------------------------
def test_returns_use_unwhitened_advantages(world):
    _, actor, _, prompts = world
    rollouts = []
    for flags in ([], ["--whiten_advantages", "true"]):
        torch.manual_seed(1)
        cfg = small_config(*flags)
        rollouts.append(ppo.collect_rollout(actor, actor, ppo.human_score, prompts, cfg))
    plain, white = rollouts
    assert torch.equal(plain.returns, white.returns)
    assert torch.allclose(white.advantages, ppo.whiten(plain.advantages, plain.mask))
    assert not torch.allclose(plain.advantages, white.advantages)


# ---- 7 -------------------------------------------------------------------------------------------
def test_kl_is_exactly_zero_before_the_first_update(world):
    _, actor, _, prompts = world
    cfg = small_config()
    rollout = ppo.collect_rollout(actor, ppo.frozen(actor), ppo.human_score, prompts, cfg)
    assert torch.equal(rollout.log_probs, rollout.ref_log_probs)


# ---- 9 -------------------------------------------------------------------------------------------
def test_padding_is_not_eos_and_eos_is_learned(world):
    tokenizer, actor, *_ = world
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    actor, cfg = copy.deepcopy(actor), small_config("--max_new_tokens", "30")
    demo = ppo.Reply("I feel sad.\n", "Call a friend.", True)
    ppo.train_supervised(actor, ppo.imitation_loss, [demo], 16, 60, 1e-2, "test", cfg)
    assert ppo.sample_replies(actor, ["I feel sad.\n"] * 8, cfg).replies == [demo] * 8


def test_a_reply_is_finished_only_by_its_own_eos(world):
    tokenizer, actor, _, prompts = world
    torch.manual_seed(0)
    rollout = ppo.sample_replies(actor, prompts * 12, small_config("--max_new_tokens", "100"))
    for reply, ids, mask in zip(rollout.replies, rollout.reply_ids, rollout.mask):
        tokens = ids[mask].tolist()
        assert (tokens[-1] == tokenizer.eos_token_id) == reply.finished
        assert tokenizer.eos_token_id not in tokens[:-1]
        assert (ids[~mask] == tokenizer.pad_token_id).all()
        assert reply.finished or len(tokens) == 100
    assert 0 < sum(reply.finished for reply in rollout.replies) < 96


# ---- 10 ------------------------------------------------------------------------------------------
def test_dropout_is_off_in_all_models():
    lm = small_actor(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).lm.train()
    batch = random_batch()
    actor = ppo.ActorCritic(copy.deepcopy(lm))
    for model in (actor, ppo.frozen(actor)):
        assert torch.equal(model(*batch)[0], model(*batch)[0])
    reward_model = ppo.RewardModel(copy.deepcopy(lm))
    torch.nn.init.normal_(reward_model.head[-1].weight)
    assert torch.equal(reward_model(*batch), reward_model(*batch))


# ---- 12 ------------------------------------------------------------------------------------------
def test_only_the_policy_learns_during_ppo(world):
    _, actor, reward_model, prompts = world
    policy, reference = copy.deepcopy(actor), ppo.frozen(actor)
    before, scorer = copy.deepcopy(actor.state_dict()), copy.deepcopy(reward_model.state_dict())
    splits = {"train": prompts, "validation": prompts[:2]}
    cfg = small_config("--lr", "0.01", "--eval_every", "1")
    ppo.train_ppo(policy, reference, reward_model.score, splits, cfg)
    assert weights_equal(reference, before) and weights_equal(reward_model, scorer)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    for part in ("lm.", "head."):
        assert not weights_equal(policy, {n: x for n, x in before.items() if n.startswith(part)})


# ==================================================================================================
# 5  A world small enough to list
#
#    Two letters and EOS; the fourth token is the padding, and nothing keeps the policy from
#    choosing it: as text it is nothing, but it is a token with a probability. With at most two
#    steps there are 13 replies: EOS alone, and 3 * 4 others. So every probability, KL and objective
#    is known exactly. The bare language model gives the probabilities, without padding and mask.
# ==================================================================================================
PAD, EOS = 0, 1
PROMPTS = ["a", "b a b"]  # one token, and three: a batch has padding on the left
POINTS = {"": 0.2, "a": 1.0, "b": -0.6, "a a": 0.4, "a b": 1.6, "b a": -0.3, "b b": 1.2}


def letter_config(**changes):
    settings = dict(device="cpu", temperature=0.8, max_new_tokens=2, missing_eos_penalty=0.5)
    return ppo.Config(**{**settings, **changes})


def human(prompts, completions):
    """A reward function: POINTS for the first prompt, the opposite for the second."""
    scores = []
    for prompt, completion in zip(prompts, completions):
        sign = 1 if prompt == "a" else -1
        scores.append(sign * POINTS[" ".join(completion.split())])
    return scores


def letters():
    """A real tokenizer of four words."""
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS, "a": 2, "b": 3}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>",
                                   padding_side="left")


def letter_actor(cfg, seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=4, n_positions=16, n_layer=1, n_embd=16, n_head=2,
                        initializer_range=0.2, bos_token_id=EOS, eos_token_id=EOS,
                        pad_token_id=PAD)
    actor = ppo.ActorCritic(GPT2LMHeadModel(config), letters(), cfg)
    torch.nn.init.normal_(actor.head[-1].weight, std=0.5)  # the critic should say something
    return actor


def all_replies(steps):
    """Every list of tokens that ends with its first EOS, or is cut off after `steps` tokens."""
    if steps == 0:
        return [[]]
    replies = [[EOS]]
    for token in (PAD, 2, 3):
        replies += [[token] + rest for rest in all_replies(steps - 1)]
    return replies


def as_text(tokens):
    return " ".join("ab"[token - 2] for token in tokens if token >= 2)


def points_of(prompt, tokens, cfg):
    """The score of a reply, less the penalty if it does not end."""
    penalty = 0 if tokens[-1] == EOS else cfg.missing_eos_penalty
    return human([prompt], [as_text(tokens)])[0] - penalty


@torch.no_grad()
def bare_log_probs(actor, prompt, tokens, temperature):
    """log pi of each token of one reply: the language model reads it alone. -> list of floats"""
    before = actor.tokenizer(prompt).input_ids
    ids = torch.tensor([before + tokens])
    logits = actor.lm(ids, attention_mask=torch.ones_like(ids)).logits[0].double()
    log_pi = (logits / temperature).log_softmax(dim=-1)
    return [log_pi[len(before) + t - 1, token].item() for t, token in enumerate(tokens)]


def distribution(actor, prompt, cfg):
    """The exact probability of every reply, in the order of `all_replies`."""
    return [math.exp(math.fsum(bare_log_probs(actor, prompt, tokens, cfg.temperature)))
            for tokens in all_replies(cfg.max_new_tokens)]


@torch.no_grad()
def value_of_state(actor, prompt, prefix):
    """V(s): the critic's last value. Which token comes next must not matter."""
    ids = torch.tensor([actor.tokenizer(prompt).input_ids])
    values = []
    for token in (2, 3):
        reply = torch.tensor([[*prefix, token]])
        values.append(actor(ids, ids > 0, reply, reply >= 0)[1][0, -1].item())
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    return values[0]


def kl(p, q):
    return math.fsum(x * math.log(x / y) for x, y in zip(p, q) if x > 0)


def objective(p, reference, points, beta):
    """J = E[r] - beta KL(p || reference)."""
    return math.fsum(x * r for x, r in zip(p, points)) - beta * kl(p, reference)


def best_possible(reference, points, beta):
    """pi* = pi_ref exp(r / beta) / Z, and J* = beta log Z."""
    weights = [q * math.exp(r / beta) for q, r in zip(reference, points)]
    Z = math.fsum(weights)
    return [w / Z for w in weights], beta * math.log(Z)


def tokens_of(rollout):
    """The real tokens of each reply, as lists."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.reply_ids, rollout.mask)]


# ---- Sampling ------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampling_frequencies_match_the_log_probs_at_every_temperature(temperature):
    """Invariant 8. How often each reply comes: within 4 standard errors of its probability."""
    cfg, N = letter_config(temperature=temperature), 10_000
    actor, replies = letter_actor(cfg), all_replies(2)
    prompt_ids = torch.tensor([[PAD, PAD, 2], [3, 2, 3]]).repeat(N, 1)
    torch.manual_seed(0)
    ids, mask = ppo.generate(actor, prompt_ids, prompt_ids != PAD, 2, EOS, PAD, temperature)
    for row, prompt in enumerate(PROMPTS):
        pairs = zip(ids[row::2].numpy(), mask[row::2].numpy())
        drawn = Counter(tuple(reply[real].tolist()) for reply, real in pairs)
        probabilities = distribution(actor, prompt, cfg)
        assert math.fsum(probabilities) == pytest.approx(1) and max(probabilities) < 0.9
        assert set(drawn) <= set(map(tuple, replies))
        for reply, p in zip(replies, probabilities):
            error = math.sqrt(p * (1 - p) / N)
            assert abs(drawn[tuple(reply)] / N - p) < 4 * error + 1e-4, (prompt, reply)


# ---- Phase I -------------------------------------------------------------------------------------
def points_by_length(prompts, completions, finished):
    return [len(prompt) / 4 - len(text.split()) + text.count("a b") + 0.1 * end
            for prompt, text, end in zip(prompts, completions, finished)]


@pytest.mark.parametrize("seed", range(4))
def test_phase_one_agrees_with_the_formulas_reply_by_reply(seed):
    """Every tensor of a rollout: each reply is read alone, then come the formulas of part 2."""
    cfg = letter_config(max_new_tokens=3, kl_coef=0.3, gamma=0.9, lam=0.7,
                        missing_eos_penalty=0.4, micro_batch_size=5)
    actor, reference = letter_actor(cfg, seed), letter_actor(cfg, seed + 100)
    prompts = PROMPTS * 8 if seed else ["a"] * 16  # with seed 0, no padding on the left
    torch.manual_seed(seed)
    r = ppo.collect_rollout(actor, reference, points_by_length, prompts, cfg)
    replies, T = tokens_of(r), r.mask.shape[1]
    assert all(tokens in all_replies(3) for tokens in replies) and T == max(map(len, replies))
    assert torch.equal(r.mask, real([len(tokens) for tokens in replies], T))
    assert r.group.tolist() == [r.group[prompts.index(prompt)].item() for prompt in prompts]
    assert len(set(r.group.tolist())) == len(set(prompts))

    log_probs, ref, values, scores = [], [], [], []
    for prompt, tokens, reply in zip(prompts, replies, r.replies):
        ended = tokens[-1] == EOS
        assert reply == (prompt, as_text(tokens), ended)
        log_probs.append(bare_log_probs(actor, prompt, tokens, 0.8))
        ref.append(bare_log_probs(reference, prompt, tokens, 0.8))
        values.append([value_of_state(actor, prompt, tokens[:t]) for t in range(len(tokens))])
        points = points_by_length([prompt], [as_text(tokens)], [ended])[0]
        scores.append(points - 0.4 * (not ended))
    agree(r.log_probs, log_probs, T, 1e-5)
    agree(r.ref_log_probs, ref, T, 1e-5)
    agree(r.values, values, T, 1e-5)
    assert r.scores.tolist() == pytest.approx(scores, abs=1e-5)

    rewards = [rewards_of_reply(*reply, 0.3) for reply in zip(log_probs, ref, scores)]
    advantages = [gae_as_mixture(*reply, 0.9, 0.7) for reply in zip(rewards, values)]
    returns = [[a + v for a, v in zip(*rows)] for rows in zip(advantages, values)]
    agree(r.rewards, rewards, T, 1e-4)
    agree(r.advantages, advantages, T, 1e-4)
    agree(r.returns, returns, T, 1e-4)


def test_a_part_of_a_rollout_is_the_same_for_tensors_lists_and_slices():
    cfg = letter_config()
    actor = letter_actor(cfg)
    whole = ppo.collect_rollout(actor, actor, human, PROMPTS * 3, cfg)
    for index in (torch.tensor([1, 2, 3]), [1, 2, 3], slice(1, 4)):
        part = whole[index]
        assert len(part) == 3 and part.replies == whole.replies[1:4]
        for name, x in vars(whole).items():
            assert name == "replies" or torch.equal(getattr(part, name), x[1:4]), name
    assert whole[torch.tensor([5, 0, 0])].replies == [whole.replies[i] for i in (5, 0, 0)]
    only_sampled = ppo.sample_replies(actor, PROMPTS, cfg)[[1]]
    assert only_sampled.replies[0].prompt == "b a b" and only_sampled.advantages is None


# ---- Phase II ------------------------------------------------------------------------------------
def test_one_update_takes_the_step_of_the_formula_token_by_token():
    """theta - lr grad L, L = mean over all tokens of -surrogate + c_V/2 error^2 - c_ent H."""
    cfg = letter_config(max_new_tokens=3, kl_coef=0.3, gamma=0.9, lam=0.7, ppo_epochs=1,
                        minibatches=1, vf_coef=0.3, ent_coef=0.2, clip_eps=0.1, max_grad_norm=1e9)
    actor, reference = letter_actor(cfg, 1), letter_actor(cfg, 2)
    torch.manual_seed(0)
    r = ppo.collect_rollout(actor, reference, points_by_length, PROMPTS * 8, cfg)
    with torch.no_grad():  # some updates later, so that some ratios are clipped
        for parameter in actor.parameters():
            parameter += 0.05 * torch.randn_like(parameter)

    oracle, losses, clipped = copy.deepcopy(actor), [], 0
    for i, tokens in enumerate(tokens_of(r)):
        prompt, reply = r.prompt_ids[i:i + 1, r.prompt_mask[i]], torch.tensor([tokens])
        logits, values = oracle(prompt, prompt > 0, reply, reply >= 0)  # alone: no padding
        for t, token in enumerate(tokens):
            log_pi = (logits[0, t] / 0.8).log_softmax(-1)
            ratio, A = (log_pi[token] - r.log_probs[i, t]).exp(), r.advantages[i, t].item()
            limit = 1.1 * A if A >= 0 else 0.9 * A
            clipped += limit < ratio.item() * A
            surrogate = ratio * A if ratio.item() * A <= limit else limit
            error = values[0, t] - r.returns[i, t].item()
            negative_entropy = (log_pi.exp() * log_pi).sum()
            losses.append(-surrogate + 0.3 * 0.5 * error ** 2 + 0.2 * negative_entropy)
    (sum(losses) / len(losses)).backward()
    assert 0.1 < clipped / len(losses) < 0.9

    before = copy.deepcopy(actor)
    for parameter in actor.parameters():
        parameter.grad = torch.ones_like(parameter)  # left over from somewhere: must not count
    ppo.update_policy(actor, sgd(actor, 1.0), r, cfg)
    for old, new, p in zip(before.parameters(), actor.parameters(), oracle.parameters()):
        step = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(old - new, step, atol=1e-5)
    assert max(p.grad.abs().max() for p in oracle.parameters() if p.grad is not None) > 0.01


# ---- The exact KL and the exact optimum ----------------------------------------------------------
def test_the_sampled_kl_agrees_with_the_sum_over_the_vocabulary_along_all_replies():
    """KL(pi || ref) of whole replies: the mean of sampled log-ratios and of what the KL costs."""
    cfg, N = letter_config(temperature=0.7, max_new_tokens=4, missing_eos_penalty=0.0), 3000
    actor, reference = letter_actor(cfg, 3), letter_actor(cfg, 4)
    for prompt in PROMPTS:
        exact = kl(distribution(actor, prompt, cfg), distribution(reference, prompt, cfg))
        torch.manual_seed(0)
        r = ppo.collect_rollout(actor, reference, lambda prompts: [0.0] * len(prompts),
                                [prompt] * N, cfg)
        paid = -r.rewards.sum(dim=1) / cfg.kl_coef
        table = ppo.describe([r], cfg.kl_coef)
        reported = torch.tensor([line["kl"] for line in table])
        for sample in (paid, reported):
            assert abs(sample.mean().item() - exact) < 4 * sample.std().item() / math.sqrt(N)
        assert exact > 0.05


def train_in_the_small_world(cfg, seed):
    """The script's Phase I and Phase II, until nothing moves -> actor and reference."""
    actor, cycles, lr, batch_size = letter_actor(cfg, seed), 80, 7e-3, 384
    reference = ppo.frozen(actor)
    groups = [{"params": actor.lm.parameters()},
              {"params": actor.head.parameters(), "lr": 3 * lr}]
    optimizer = torch.optim.Adam(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda cycle: 1 - cycle / cycles)
    torch.manual_seed(seed)
    for _ in range(cycles):
        rollout = ppo.collect_rollout(actor, reference, human, PROMPTS * (batch_size // 2), cfg)
        ppo.update_policy(actor, optimizer, rollout, cfg)
        schedule.step()
    return actor, reference


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=slow), pytest.param(2, marks=slow)])
def test_ppo_converges_to_the_exact_optimum(seed):
    """pi -> pi* = pi_ref exp(r / beta) / Z, and J* - J = beta KL(pi || pi*)."""
    cfg = letter_config(kl_coef=0.5, ppo_epochs=2, minibatches=2, micro_batch_size=512)
    actor, reference = train_in_the_small_world(cfg, seed)
    for prompt in PROMPTS:
        points = [points_of(prompt, tokens, cfg) for tokens in all_replies(2)]
        before, after = distribution(reference, prompt, cfg), distribution(actor, prompt, cfg)
        star, j_star = best_possible(before, points, cfg.kl_coef)
        j_before = objective(before, before, points, cfg.kl_coef)
        j_after = objective(after, before, points, cfg.kl_coef)
        assert j_star - j_after == pytest.approx(cfg.kl_coef * kl(after, star), abs=1e-9)
        assert (j_after - j_before) / (j_star - j_before) > 0.97
        far = math.fsum(abs(a - b) for a, b in zip(before, star)) / 2  # total variation
        near = math.fsum(abs(a - b) for a, b in zip(after, star)) / 2
        assert far > 0.2 and near < 0.03


# ==================================================================================================
# 6  The report: from texts and models to each number that is printed
# ==================================================================================================
def line_of(prompt, tokens, actor, reference, score_fn, cfg):
    """What a table should say of one reply. Both models read it alone and bare."""
    text = actor.tokenizer.decode(tokens, skip_special_tokens=True)
    ended = tokens[-1] == actor.tokenizer.eos_token_id
    (score,) = score_fn(prompts=[prompt], completions=[text], finished=[ended])
    reward = score - (0 if ended else cfg.missing_eos_penalty)
    log_pi = math.fsum(bare_log_probs(actor, prompt, tokens, cfg.temperature))
    log_ref = math.fsum(bare_log_probs(reference, prompt, tokens, cfg.temperature))
    return {"reply": text, "reward": reward, "kl": log_pi - log_ref,
            "objective": reward - cfg.kl_coef * (log_pi - log_ref),
            "reply_length": len(tokens), "finished": ended,
            **ppo.judge(ppo.Reply(prompt, text, ended))}


def lines_of(rollouts, actor, reference, score_fn, cfg):
    lines = []
    for rollout in rollouts:
        for reply, tokens in zip(rollout.replies, tokens_of(rollout)):
            lines.append(line_of(reply.prompt, tokens, actor, reference, score_fn, cfg))
    return lines


def same_numbers(table, expected, tolerance=2e-4):
    for got, line in zip(table, expected, strict=True):
        assert got.keys() == line.keys()
        for name, x in line.items():
            if name == "reply":
                assert got[name] == x
            else:
                assert got[name] == pytest.approx(x, abs=tolerance, nan_ok=True), name


def of_letters():
    """Actor, reference, reward function, prompts and settings in the small world of part 5."""
    cfg = letter_config(max_new_tokens=3, kl_coef=0.3, micro_batch_size=1)
    return letter_actor(cfg, 3), letter_actor(cfg, 4), points_by_length, PROMPTS, cfg


def of_words(world):
    """The same in the world of part 11."""
    cfg = small_config("--max_new_tokens", "30", "--missing_eos_penalty", "0.7")
    return world[1], shifted(world[1]), ppo.human_score, world[3], cfg




def is_rounded(text, number):
    """Is `text` this number, with fewer digits?"""
    digits = len(text.partition(".")[2])
    return abs(float(text) - number) < 0.501 * 10 ** -digits


# ---- Tables --------------------------------------------------------------------------------------
@pytest.mark.parametrize("texts", ["letters", "words"])
def test_every_column_of_a_table_is_that_of_the_reply_and_the_bare_models(world, texts):
    """kl is the sum over the tokens of log pi - log ref, at the temperature of sampling."""
    setting = of_letters() if texts == "letters" else of_words(world)
    actor, reference, score_fn, prompts, cfg = setting
    torch.manual_seed(0)
    rollouts = ppo.sample_many(actor, reference, score_fn, prompts, 5, cfg)
    asked = [reply.prompt for rollout in rollouts for reply in rollout.replies]
    assert asked == [prompt for prompt in prompts for _ in range(5)]
    table = ppo.describe(rollouts, cfg.kl_coef)
    same_numbers(table, lines_of(rollouts, actor, reference, score_fn, cfg))
    if texts == "letters":
        assert {line["finished"] for line in table} == {False, True}
    assert max(abs(line["kl"]) for line in table) > 0.1
    torch.manual_seed(0)
    again = ppo.evaluate(actor, reference, score_fn, prompts, 5, cfg)
    same_numbers(again, table, tolerance=0)


def test_column_means_are_means_of_numbers_and_skip_texts():
    table = [{"reply": "a", "reward": 1.0, "finished": True, "human": NAN},
             {"reply": "b", "reward": 4.0, "finished": False, "human": NAN}]
    means = ppo.column_means(table)
    assert math.isnan(means.pop("human")) and means == {"reward": 2.5, "finished": 0.5}


def test_win_rate_compares_replies_to_the_same_prompt_and_a_tie_is_half():
    torch.manual_seed(0)
    human, sft = torch.randint(4, (6, 5)).double(), torch.randint(4, (6, 5)).double()
    wins = []
    for i in range(6):
        for a in human[i].tolist():
            for b in sft[i].tolist():
                wins.append(1 if a > b else 0.5 if a == b else 0)
    assert ppo.win_rate(human, sft) == pytest.approx(mean(wins))
    assert math.isnan(ppo.win_rate(human * NAN, sft * NAN))  # there is no human


# ---- metrics.csv ---------------------------------------------------------------------------------
def test_every_column_of_metrics_csv_is_that_of_its_cycle_from_scratch(tmp_path, monkeypatch,
                                                                       capsys):
    """One update per cycle, so that its metrics are those of the policy that sampled."""
    cfg = letter_config(out=str(tmp_path), max_new_tokens=3, kl_coef=0.3, gamma=0.9, lam=0.7,
                        cycles=3, batch_size=8, replies_per_prompt=2, ppo_epochs=1, minibatches=1,
                        vf_coef=0.3, ent_coef=0.2, lr=0.02)
    actor, reference, seen = letter_actor(cfg, 3), letter_actor(cfg, 4), []
    collect = ppo.collect_rollout

    def spy(actor, reference, score_fn, prompts, cfg):
        rollout = collect(actor, reference, score_fn, prompts, cfg)
        seen.append((copy.deepcopy(actor), rollout))
        return rollout

    monkeypatch.setattr(ppo, "collect_rollout", spy)
    splits = {"train": PROMPTS, "validation": PROMPTS}
    ppo.train_ppo(actor, reference, points_by_length, splits, cfg)
    rows = read_metrics(tmp_path)
    for cycle, (row, (old, rollout)) in enumerate(zip(rows, seen, strict=True)):
        lines = lines_of([rollout], old, reference, points_by_length, cfg)
        A, V, G, H = [], [], [], []
        for reply, tokens, line in zip(rollout.replies, tokens_of(rollout), lines):
            states = [tokens[:t] for t in range(len(tokens))]
            values = [value_of_state(old, reply.prompt, state) for state in states]
            rewards = rewards_of_reply(bare_log_probs(old, reply.prompt, tokens, 0.8),
                                       bare_log_probs(reference, reply.prompt, tokens, 0.8),
                                       line["reward"], 0.3)
            advantages = gae_as_mixture(rewards, values, 0.9, 0.7)
            A += advantages
            V += values
            G += [a + v for a, v in zip(advantages, values)]
            for state in states:
                log_pi = [bare_log_probs(old, reply.prompt, state + [v], 0.8)[-1] for v in range(4)]
                H.append(-math.fsum(math.exp(x) * x for x in log_pi))
        policy_loss, value_loss = -mean(A), mean([a ** 2 for a in A]) / 2
        errors = [g - v for g, v in zip(G, V)]
        expected = {
            "cycle": cycle + 1, "episodes": 8 * (cycle + 1), "kl_coef": 0.3,
            "lr": 0.02 * (1 - cycle / 3), "policy_loss": policy_loss, "value_loss": value_loss,
            "loss": policy_loss + 0.3 * value_loss - 0.2 * mean(H), "entropy": mean(H),
            "clip_fraction": 0, "approx_kl": 0, "first_log_ratio": 0,
            "explained_variance": 1 - pvariance(errors) / pvariance(G)}
        for name in ["reward", "kl", "objective", "reply_length", "finished"]:
            expected[name] = mean([line[name] for line in lines])
        empty = {"helpful", "warm", "honest", "harmless", "human"}  # no human knows these prompts
        for name, x in row.items():
            if name in expected:
                assert float(x) == pytest.approx(expected.pop(name), abs=5e-4), name
            elif name != "validation":
                assert name in empty and x == "", name
        assert not expected
    assert [bool(row["validation"]) for row in rows] == [False, False, True]
    ppo.reseed(cfg, "validation")  # the last policy was validated on the same replies
    rollouts = ppo.sample_many(actor, reference, points_by_length, PROMPTS,
                                ppo.replies_each(cfg.eval_batches, PROMPTS, cfg), cfg)
    lines = lines_of(rollouts, actor, reference, points_by_length, cfg)
    validated = mean([line["objective"] for line in lines])
    assert float(rows[-1]["validation"]) == pytest.approx(validated, abs=1e-4)

    shown = capsys.readouterr().out.splitlines()
    (head,) = [i for i, line in enumerate(shown) if line.split()[:2] == ["cycle", "reward"]]
    assert "human" not in shown[head]
    for line, row in zip(shown[head + 1:], rows, strict=True):
        for name, x in zip(shown[head].split(), line.split(), strict=True):
            assert name == "seconds" or is_rounded(x, float(row[name])), name


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant():
    mask, returns, *_ = random_rollout_tensors(seed=4)
    returns = 3 * returns

    def explained(values):
        rollout = as_rollout(None, None, None, mask, returns=with_nan(returns, mask),
                             values=with_nan(values, mask))
        return ppo.explained_variance(rollout)

    assert explained(returns) == pytest.approx(1)
    assert explained(torch.full_like(returns, 7.0)) == pytest.approx(0, abs=1e-5)
    assert explained(returns / 2 + 1) == pytest.approx(0.75, abs=1e-4)
    assert explained(-returns) == pytest.approx(-3, abs=1e-4)


# ---- The X-ray -----------------------------------------------------------------------------------
def parse_xrays(text):
    """Every X-ray in a text, as a list of lines: {"token": ..., name of column: number}."""
    tables, names = [], []
    for line in text.splitlines():
        cells = [line[i:i + 11] for i in range(12, len(line), 11)]
        if line.startswith("token    "):
            names = [cell.strip() for cell in cells]
            tables.append([])
        elif names and not line:
            names = []
        elif names:
            numbers = dict(zip(names, map(float, cells), strict=True))
            tables[-1].append({"token": line[:12].strip(), **numbers})
    return tables


def test_the_xray_shows_the_numbers_of_the_formulas():
    actor, reference, score_fn, _, _ = of_letters()
    cfg = letter_config(max_new_tokens=3, kl_coef=0.3, gamma=0.9, lam=0.7)
    torch.manual_seed(3)
    rollout = ppo.sample_and_score(actor, reference, score_fn, PROMPTS * 3, cfg)
    ratio = torch.rand(rollout.mask.shape)
    for row, tokens in enumerate(tokens_of(rollout)):
        prompt = PROMPTS[row % 2]
        log_pi = bare_log_probs(actor, prompt, tokens, 0.8)
        log_ref = bare_log_probs(reference, prompt, tokens, 0.8)
        score = line_of(prompt, tokens, actor, reference, score_fn, cfg)["reward"]
        values = [value_of_state(actor, prompt, tokens[:t]) for t in range(len(tokens))]
        rewards = rewards_of_reply(log_pi, log_ref, score, 0.3)
        advantages = gae_as_mixture(rewards, values, 0.9, 0.7)
        text = ppo.xray(rollout, actor.tokenizer, cfg, row=row, extra={"rho": ratio})
        (lines,) = parse_xrays(text)
        assert f'"{prompt}" (score {score:.3f})' in text
        for t, line in enumerate(lines):
            assert line.pop("token") == ["<pad>", "<eos>", "a", "b"][tokens[t]]
            assert line == pytest.approx({
                "log pi": log_pi[t], "log ref": log_ref[t], "KL": log_pi[t] - log_ref[t],
                "r_t": rewards[t], "V(s_t)": values[t],
                "delta_t": residuals_of_reply(rewards, values, 0.9)[t], "A_t": advantages[t],
                "return": advantages[t] + values[t], "rho": ratio[row, t].item()}, abs=6e-4)
        assert len(lines) == len(tokens)


def test_the_ratio_of_the_xray_is_new_over_old():
    """The reference plays the policy that wrote the replies, and the actor the updated one."""
    actor, reference, score_fn, _, _ = of_letters()
    cfg = letter_config(max_new_tokens=3)
    torch.manual_seed(4)
    rollout = ppo.sample_and_score(reference, reference, score_fn, PROMPTS * 3, cfg)
    found = ppo.ratios(actor, rollout, cfg)
    for row, tokens in enumerate(tokens_of(rollout)):
        new = bare_log_probs(actor, PROMPTS[row % 2], tokens, cfg.temperature)
        old = bare_log_probs(reference, PROMPTS[row % 2], tokens, cfg.temperature)
        for t in range(len(tokens)):
            assert found[row, t].item() == pytest.approx(math.exp(new[t] - old[t]), rel=1e-4)


# ---- report.json and what is printed -------------------------------------------------------------
def test_every_number_of_the_report_is_that_of_the_saved_models(run, tmp_path, capsys):
    """The saved models answer the test prompts again, with the same random numbers."""
    out, N, beta = tmp_path / "run", 8, 6.0
    flags = ["--kl_coef", str(beta), "--report_batches", "14"]
    ppo.main([*TINY, "--init_from", str(run), *flags, "--out", str(out)])
    shown, report, cfg = capsys.readouterr().out, read_report(out), small_config(*flags)
    models = {"pretrained": ppo.load_model(ppo.ActorCritic, out / "pretrain", cfg),
              "sft": ppo.load_model(ppo.ActorCritic, out / "sft", cfg),
              "ppo": ppo.load_model(ppo.ActorCritic, out / "policy", cfg)}
    score_fn = ppo.load_model(ppo.RewardModel, out / "reward_model", cfg).score
    prompts = ppo.split(ppo.WORLD_PROMPTS)["test"]

    ppo.reseed(cfg, "report")
    tables, log_ratios = {}, []
    for name, model in models.items():
        rollouts = ppo.sample_many(model, models["sft"], score_fn, prompts, N, cfg)
        tables[name] = lines_of(rollouts, model, models["sft"], score_fn, cfg)
        if name == "sft":  # how much more likely PPO's policy finds SFT's replies
            lines = lines_of(rollouts, models["ppo"], models["sft"], score_fn, cfg)
            log_ratios = [line["kl"] for line in lines]

    def column(name, key):
        """[prompts][N]"""
        xs = [line[key] for line in tables[name]]
        return [xs[i:i + N] for i in range(0, len(xs), N)]

    for name, table in tables.items():
        expected = {key.removeprefix("reply_"): mean([line[key] for line in table])
                    for key in table[0] if key != "reply"}
        expected["spread"] = mean([stdev(xs) for xs in column(name, "objective")])
        wins = []
        for humans, sfts in zip(column(name, "human"), column("sft", "human")):
            wins += [(a > b) + 0.5 * (a == b) for a in humans for b in sfts]
        expected["win_rate"] = mean(wins)
        assert report[name] == pytest.approx(expected, abs=2e-3), name

    best, sizes = [], []
    sft_log_ratios = [log_ratios[i:i + N] for i in range(0, len(log_ratios), N)]
    for *scores, log_ratio, sft_log_ratio in zip(
            column("ppo", "reward"), column("sft", "reward"), column("ppo", "kl"), sft_log_ratios):
        terms = [math.exp(r / beta) / ((math.exp(x) + 1) / 2)
                 for r, x in zip(flat(scores), log_ratio + sft_log_ratio, strict=True)]
        best.append(beta * math.log(mean(terms)))
        sizes.append(sum(terms) ** 2 / sum(x ** 2 for x in terms))
    optimum = report["optimum"]
    assert optimum["objective"] == pytest.approx(mean(best), abs=2e-3)
    assert optimum["effective_sample_size"] == pytest.approx(min(sizes), rel=0.01)
    start, end = (mean(flat(column(name, "objective"))) for name in ("sft", "ppo"))
    assert optimum["fraction"] == pytest.approx((end - start) / (mean(best) - start), abs=0.02)

    result = shown[shown.index("RESULT on 14 prompts"):].splitlines()
    names = result[2].split()
    assert set(names) == set(report["ppo"])
    for line, name in zip(result[3:6], tables):
        assert line.split()[0] == name
        for key, x in zip(names, line.split()[1:], strict=True):
            assert is_rounded(x, report[name][key])
    assert (f"J* = {optimum['objective']:.3f} +- {optimum['objective_error']:.3f}\n"
            f"of the way there from SFT, PPO went {optimum['fraction']:.1%} "
            f"+- {optimum['fraction_error']:.1%}\n"
            "(smallest effective sample size of a prompt: "
            f"{optimum['effective_sample_size']:.0f})") in shown
    for name, table in tables.items():  # the first replies to some prompts
        texts = [" ".join(line["reply"].split())[-100:] for line in table[2 * N::5 * N]]
        assert len(texts) == 3 and all(f"  {name:10}  {text}\n" in shown for text in texts)


# ==================================================================================================
# 7  The optimum
#
#    The small world again, where the exact numbers are known. q is the reference: the probability
#    of each of the 13 replies to a prompt. p is a policy on the way from q to the optimum.
# ==================================================================================================
def exact_worlds():
    """For each prompt (q, points), as float64 tensors [13]."""
    cfg, worlds = letter_config(), []
    reference = letter_actor(cfg, 7)
    for prompt in PROMPTS:
        points = [points_of(prompt, tokens, cfg) for tokens in all_replies(2)]
        q = distribution(reference, prompt, cfg)
        worlds.append((torch.tensor(q).double(), torch.tensor(points).double()))
    return worlds


def on_the_way(world, beta, share):
    """p = q * exp(share * r / beta), normalised. share = 0 is SFT, share = 1 is the optimum."""
    q, points = world
    p = q * (share * points / beta).exp()
    return p / p.sum()


def sample_tables(worlds, policies, beta, N):
    """N replies to each prompt -> columns of the policy, columns of SFT, SFT's log-ratios."""
    policy, sft, log_ratios = {"reward": [], "kl": []}, {"reward": [], "kl": []}, []
    for (q, points), p in zip(worlds, policies):
        log_ratio = (p / q).log()
        mine, sfts = torch.multinomial(p, N, True), torch.multinomial(q, N, True)
        policy["reward"].append(points[mine])
        policy["kl"].append(log_ratio[mine])
        sft["reward"].append(points[sfts])
        sft["kl"].append(torch.zeros(N).double())
        log_ratios.append(log_ratio[sfts])
    for columns in (policy, sft):
        columns["reward"], columns["kl"] = map(torch.stack, (columns["reward"], columns["kl"]))
        columns["objective"] = columns["reward"] - beta * columns["kl"]
    return policy, sft, torch.stack(log_ratios)


def optimum_of(policy, sft, log_ratios, beta):
    """J* and weights from such columns."""
    scores = torch.cat([policy["reward"], sft["reward"]], dim=1)
    return ppo.optimum(scores, torch.cat([policy["kl"], log_ratios], dim=1), beta)


def exact_numbers(worlds, policies, beta):
    """J(SFT), J(policy) and J*, each the mean over the prompts."""
    starts, ends, bests = [], [], []
    for (q, points), p in zip(worlds, policies):
        q, points, p = q.tolist(), points.tolist(), p.tolist()
        starts.append(objective(q, q, points, beta))
        ends.append(objective(p, q, points, beta))
        bests.append(best_possible(q, points, beta)[1])
    return mean(starts), mean(ends), mean(bests)


# ---- J* ------------------------------------------------------------------------------------------
def test_the_optimum_is_exact_when_each_reply_comes_as_often_as_it_should():
    """Counts in proportion to p and q: nothing is left to chance, and Z = sum q exp(r / beta)."""
    rng = random.Random(0)
    for beta in (0.1, 0.5, 2.0):
        p = [rng.randint(1, 9) for _ in range(6)]
        q = [rng.randint(1, 9) for _ in range(6)]
        p[0], q[0] = p[0] + max(sum(q) - sum(p), 0), q[0] + max(sum(p) - sum(q), 0)  # equal sums
        points = [rng.gauss(0, 1) for _ in range(6)]
        scores, log_ratios = [], []
        for counts in (p, q):
            for i, count in enumerate(counts):
                scores += [points[i]] * count
                log_ratios += [math.log(p[i] / q[i])] * count
        j_star, weights = ppo.optimum(torch.tensor([scores]), torch.tensor([log_ratios]), beta)
        reference = [x / sum(q) for x in q]
        star, exact = best_possible(reference, points, beta)
        assert j_star.item() == pytest.approx(exact, abs=1e-6)
        assert weights.mean().item() == pytest.approx(1)
        for weight, reply in zip(weights[0, sum(p):], [i for i in range(6) for _ in range(q[i])]):
            mixture = (p[reply] / sum(p) + q[reply] / sum(q)) / 2
            assert weight.item() == pytest.approx(star[reply] / mixture, rel=1e-4)
        for _ in range(50):  # no policy has a better objective
            other = [rng.random() for _ in range(6)]
            other = [x / sum(other) for x in other]
            assert objective(other, reference, points, beta) <= j_star.item() + 1e-6


def test_the_optimum_from_replies_of_the_reference_alone_is_the_plain_estimate():
    scores = torch.randn(3, 40, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    j_star, weights = ppo.optimum(scores, torch.zeros_like(scores), 0.7)
    for i, row in enumerate(scores.tolist()):
        terms = [math.exp(r / 0.7) for r in row]
        assert j_star[i].item() == pytest.approx(0.7 * math.log(mean(terms)))
        assert weights[i].tolist() == pytest.approx([x / mean(terms) for x in terms])


def test_replies_of_a_policy_near_the_optimum_make_the_estimate_much_more_exact():
    """With as many replies, the error is less than a third of that of the plain estimate."""
    torch.manual_seed(0)
    beta, worlds, errors = 0.1, exact_worlds(), {}
    *_, exact = exact_numbers(worlds, [q for q, _ in worlds], beta)
    for share in (0.0, 0.9):  # 0: both halves are replies of the reference
        policies = [on_the_way(world, beta, share) for world in worlds]
        squares = []
        for _ in range(300):
            j_star, _ = optimum_of(*sample_tables(worlds, policies, beta, 50), beta)
            squares.append((j_star.mean().item() - exact) ** 2)
        errors[share] = math.sqrt(mean(squares))
    assert errors[0.9] < errors[0.0] / 3


def test_at_the_optimum_all_replies_to_a_prompt_have_the_same_objective():
    """It is J*. So the spread is 0 and the fraction is 1. No weight 2 pi* / (pi* + ref) is > 2."""
    torch.manual_seed(0)
    beta, worlds, N = 0.2, exact_worlds(), 100
    policies = [on_the_way(world, beta, 1.0) for world in worlds]
    policy, sft, log_ratios = sample_tables(worlds, policies, beta, N)
    for row, (q, points) in zip(policy["objective"], worlds):
        _, j_star = best_possible(q.tolist(), points.tolist(), beta)
        assert row.tolist() == pytest.approx([j_star] * N)
    _, weights = optimum_of(policy, sft, log_ratios, beta)
    assert weights.max() < 2.2  # 2, apart from the error of Z
    result = ppo.measure_optimum(policy, sft, log_ratios, beta)
    assert result["fraction"] == pytest.approx(1, abs=4 * result["fraction_error"])
    assert result["effective_sample_size"] > 0.9 * N  # of 2N


# ---- The fraction and the errors -----------------------------------------------------------------
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_errors_of_j_star_and_fraction_are_the_spread_of_many_estimates(share):
    torch.manual_seed(0)
    beta, worlds, repeats = 0.3, exact_worlds(), 400
    policies = [on_the_way(world, beta, share) for world in worlds]
    start, end, best = exact_numbers(worlds, policies, beta)
    exact = {"objective": best, "fraction": (end - start) / (best - start)}
    assert 0.5 < exact["fraction"] < 1
    results = [ppo.measure_optimum(*sample_tables(worlds, policies, beta, 100), beta)
               for _ in range(repeats)]
    for name, x in exact.items():
        estimates = [result[name] for result in results]
        assert abs(mean(estimates) - x) < 0.25 * stdev(estimates)  # hardly any bias
        claimed = mean([result[name + "_error"] for result in results])
        assert claimed == pytest.approx(stdev(estimates), rel=0.12)  # 3 errors of a stdev of 400


def test_the_effective_sample_size_is_that_of_the_worst_prompt_and_below_10_no_fraction_is_given():
    def measure(scores, beta):
        columns = {"reward": scores, "kl": 0 * scores, "objective": scores}
        better = dict(columns, objective=scores + 0.1)
        return ppo.measure_optimum(better, columns, 0 * scores, beta)

    easy, hard = torch.zeros(10).double(), torch.tensor([0.0] * 9 + [2.0]).double()
    terms = [math.exp(r) for r in hard.tolist()]
    size = 2 * sum(terms) ** 2 / sum(x ** 2 for x in terms)  # each score occurs in both halves
    both = measure(torch.stack([easy, hard]), 1.0)
    assert both["effective_sample_size"] == pytest.approx(size) and size < 10
    assert math.isnan(both["fraction"]) and math.isnan(both["fraction_error"])
    assert both["objective"] == pytest.approx(math.log(mean(terms)) / 2)
    few = measure(torch.stack([easy, hard / 3]), 1.0)
    assert few["effective_sample_size"] > 10 and few["fraction"] > 0
    flat_scores = measure(torch.stack([easy, easy]), 1.0)  # all score the same: no way to go
    assert flat_scores["effective_sample_size"] == pytest.approx(20)
    assert math.isnan(flat_scores["fraction"])
    free = measure(torch.stack([easy, hard]), 0)  # without a price of KL there is no optimum
    assert free["effective_sample_size"] == 0 and math.isnan(free["objective"])


def test_the_report_of_the_small_world_agrees_with_the_exact_numbers():
    """Sampled and read by the script's own models: J(SFT), J(PPO), J*, fraction within errors."""
    N = 2000
    cfg = letter_config(kl_coef=0.5, report_batches=N, batch_size=len(PROMPTS))
    actor, reference = letter_actor(cfg, 3), letter_actor(cfg, 4)
    models = {"pretrained": letter_actor(cfg, 5), "sft": reference, "ppo": actor}
    report, tables = ppo.compare_models(models, human, PROMPTS, cfg)

    worlds, policies = [], []
    for prompt in PROMPTS:
        points = [points_of(prompt, tokens, cfg) for tokens in all_replies(2)]
        worlds.append(tuple(map(torch.tensor, (distribution(reference, prompt, cfg), points))))
        policies.append(torch.tensor(distribution(actor, prompt, cfg)))
    start, end, best = exact_numbers(worlds, policies, 0.5)
    for name, exact in [("sft", start), ("ppo", end)]:
        error = stdev([line["objective"] for line in tables[name]]) / math.sqrt(2 * N)
        assert abs(report[name]["objective"] - exact) < 4 * error
    result = report["optimum"]
    assert abs(result["objective"] - best) < 4 * result["objective_error"]
    fraction = (end - start) / (best - start)
    assert abs(result["fraction"] - fraction) < 4 * result["fraction_error"]
    spreads = []
    for (q, points), p in zip(worlds, policies):
        objectives = points - 0.5 * (p / q).log()
        spreads.append(((p * objectives ** 2).sum() - (p * objectives).sum() ** 2).sqrt().item())
    assert report["ppo"]["spread"] == pytest.approx(mean(spreads), rel=0.1)


# ==================================================================================================
# 8  Swap points
#
#    Another algorithm is a function of a few lines, assigned to a name of ppo_rlhf from outside:
#    ppo_rlhf.estimate_advantages = mine. Each one goes through a whole run.
# ==================================================================================================
def run_with(swaps, run, out, monkeypatch, *flags):
    """PPO and the report with these functions -> the rollouts that Phase II learned from."""
    rollouts, update_policy = [], ppo.update_policy

    def spy(actor, optimizer, rollout, cfg):
        rollouts.append(rollout)
        return update_policy(actor, optimizer, rollout, cfg)

    monkeypatch.setattr(ppo, "update_policy", spy)
    for name, function in swaps.items():
        assert hasattr(ppo, name)
        monkeypatch.setattr(ppo, name, function)
    ppo.main([*TINY, "--init_from", str(run), *flags, "--out", str(out)])
    assert len(rollouts) == 3
    return rollouts


def mean_over_tokens(rows, mask):
    return mean(rows[mask].double().tolist())


ONE_UPDATE = ["--ppo_epochs", "1", "--minibatches", "1"]  # the ratio is 1, so losses are known


# ---- GRPO's baseline: the mean reward of the replies to the same prompt --------------------------
def group_baseline(rollout, cfg):
    same = (rollout.group[:, None] == rollout.group[None, :]).float()                   # [B,B]
    totals = rollout.rewards.sum(dim=1)                                                 # [B]
    better = totals - same @ totals / same.sum(dim=1)                                   # [B]
    advantages = torch.where(rollout.mask, better.unsqueeze(1), 0)                      # [B,T]
    return advantages, torch.where(rollout.mask, totals.unsqueeze(1), 0)


def no_critic(values, rollout, cfg):
    return torch.zeros(())


def test_the_code_for_grpo_in_the_docstring_gives_each_group_mean_0_and_deviation_1(rollout):
    rows = inspect.getdoc(ppo.estimate_advantages).splitlines()
    code = "\n".join(row for row in rows if row.startswith("    "))
    space = {"torch": torch}
    exec(f"def advantages_of(rollout):\n{code}", space)
    part = copy.copy(rollout)
    part.group = torch.arange(len(rollout)) // 4
    part.rewards = torch.randn(rollout.mask.shape) * rollout.mask
    advantages, _ = space["advantages_of"](part)
    assert (advantages[~rollout.mask] == 0).all()
    sums = [math.fsum(row.tolist()) for row in part.rewards]
    for i, row in enumerate(advantages):
        group = [sums[j] for j in range(len(sums)) if j // 4 == i // 4]
        expected = (sums[i] - mean(group)) / (math.sqrt(pvariance(group)) + 1e-4)
        for number in row[rollout.mask[i]].tolist():
            assert number == pytest.approx(expected, abs=1e-4)


def test_with_a_group_baseline_the_advantages_of_a_group_add_up_to_zero(run, tmp_path,
                                                                        monkeypatch):
    swaps = {"estimate_advantages": group_baseline, "critic_loss": no_critic}
    rollouts = run_with(swaps, run, tmp_path / "run", monkeypatch, *ONE_UPDATE,
                        "--replies_per_prompt", "4")
    for rollout, row in zip(rollouts, read_metrics(tmp_path / "run")):
        by_prompt = {}
        for i, reply in enumerate(rollout.replies):
            own = rollout.advantages[i][rollout.mask[i]]  # of one reply
            assert (own == own[0]).all()
            pair = own[0].item(), rollout.rewards[i].sum().item()
            by_prompt.setdefault(reply.prompt, []).append(pair)
        for pairs in by_prompt.values():
            advantages, totals = zip(*pairs)
            assert len(pairs) in (4, 8) and math.fsum(advantages) == pytest.approx(0, abs=1e-4)
            assert advantages[0] - advantages[1] == pytest.approx(totals[0] - totals[1], abs=1e-4)
        assert rollout.advantages.abs().max() > 0.1
        loss = -mean_over_tokens(rollout.advantages, rollout.mask)
        assert float(row["policy_loss"]) == pytest.approx(loss, abs=1e-4)
        assert float(row["value_loss"]) == 0 and (rollout.values == 0).all()


# ---- REINFORCE with a baseline: the mean of the batch, and no ratio ------------------------------
def batch_baseline(rollout, cfg):
    totals = rollout.rewards.sum(dim=1, keepdim=True)                                   # [B,1]
    advantages = torch.where(rollout.mask, totals - totals.mean(), 0)                   # [B,T]
    return advantages, torch.where(rollout.mask, totals, 0)


def reinforce_loss(log_probs, rollout, cfg):
    return -ppo.masked_mean(log_probs * rollout.advantages, rollout.mask), torch.zeros(())


def test_reinforce_with_a_baseline_needs_two_short_functions(run, tmp_path, monkeypatch):
    swaps = {"estimate_advantages": batch_baseline, "actor_loss": reinforce_loss}
    rollouts = run_with(swaps, run, tmp_path / "run", monkeypatch, *ONE_UPDATE)
    for rollout, row in zip(rollouts, read_metrics(tmp_path / "run")):
        first_tokens = rollout.advantages[:, 0].tolist()
        assert mean(first_tokens) == pytest.approx(0, abs=1e-5) and stdev(first_tokens) > 0.1
        loss = -mean_over_tokens(rollout.log_probs * rollout.advantages, rollout.mask)
        assert float(row["policy_loss"]) == pytest.approx(loss, abs=1e-4)
        assert float(row["clip_fraction"]) == 0


# ---- KL in the loss, and not in the reward (T6) --------------------------------------------------
def rewards_without_kl(rollout, cfg):
    return ppo.token_rewards(rollout.log_probs, rollout.ref_log_probs, rollout.scores,
                             rollout.mask, kl_coef=0.0)


def k1(log_ratio):
    return log_ratio


def k3(log_ratio):
    return torch.exp(-log_ratio) - 1 + log_ratio


def loss_with_kl(estimate):
    def loss_of_actor(log_probs, rollout, cfg):
        loss, clip_fraction = ppo.policy_loss(log_probs, rollout.log_probs, rollout.advantages,
                                              rollout.mask, cfg.clip_eps)
        k = estimate(log_probs - rollout.ref_log_probs)
        return loss + cfg.kl_coef * ppo.masked_mean(k, rollout.mask), clip_fraction
    return loss_of_actor


@pytest.mark.parametrize("estimate", [k1, k3])
def test_kl_can_be_in_the_loss_instead_of_the_reward(run, tmp_path, monkeypatch, estimate):
    swaps = {"assign_rewards": rewards_without_kl, "actor_loss": loss_with_kl(estimate)}
    rollouts = run_with(swaps, run, tmp_path / "run", monkeypatch, *ONE_UPDATE, "--kl_coef", "2",
                        "--lr", "0.01")
    kls = []
    for rollout, row in zip(rollouts, read_metrics(tmp_path / "run")):
        assert torch.allclose(rollout.rewards.sum(dim=1), rollout.scores)
        kls.append(mean_over_tokens(estimate(rollout.log_probs - rollout.ref_log_probs),
                                    rollout.mask))
        loss = 2 * kls[-1] - mean_over_tokens(rollout.advantages, rollout.mask)
        assert float(row["policy_loss"]) == pytest.approx(loss, abs=1e-4)
    assert kls[0] == 0 and abs(kls[2]) > 1e-3


# ---- A price for every token ---------------------------------------------------------------------
PRICE = 100.0  # no score is that large: wherever it gets to, one sees it


def rewards_less_price(rollout, cfg):
    rewards = ppo.token_rewards(rollout.log_probs, rollout.ref_log_probs, rollout.scores,
                                rollout.mask, cfg.kl_coef)
    return rewards - PRICE * rollout.mask


def test_a_price_per_token_lowers_the_reward_by_price_times_length(run, tmp_path, monkeypatch,
                                                                   capsys):
    """Training sees the price. Metrics, validation, report and X-ray do not."""
    swaps = {"assign_rewards": rewards_less_price}
    rollouts = run_with(swaps, run, tmp_path / "run", monkeypatch)
    for rollout, row in zip(rollouts, read_metrics(tmp_path / "run")):
        length = rollout.mask.sum(dim=1)
        kl = (rollout.log_probs - rollout.ref_log_probs).sum(dim=1)
        expected = rollout.scores - 0.1 * kl - PRICE * length
        assert torch.allclose(rollout.rewards.sum(dim=1), expected, atol=1e-2)
        assert rollout.returns[:, 0].mean() < -PRICE  # so the critic and the advantages see it
        for name in ["reward", "objective", "validation"]:
            assert row[name] == "" or abs(float(row[name])) < 10
    report = read_report(tmp_path / "run")
    for name in ["sft", "ppo"]:
        assert abs(report[name]["reward"]) < 10 and report[name]["spread"] < 10
        objective = report[name]["reward"] - 0.1 * report[name]["kl"]
        assert report[name]["objective"] == pytest.approx(objective, abs=1e-4)
    assert abs(report["optimum"]["objective"]) < 10
    xrays = parse_xrays(capsys.readouterr().out)
    assert len(xrays) == 2
    for line in flat(xrays):
        assert abs(line["r_t"]) < 10 and abs(line["delta_t"]) < 1000


# ---- The report uses none of them ----------------------------------------------------------------
def must_not_be_called(*args, **options):
    raise AssertionError("the report must not use this")


def test_evaluation_report_and_xray_do_not_use_the_swap_points(run, tmp_path, monkeypatch, world):
    for name in ["assign_rewards", "estimate_advantages", "actor_loss", "critic_loss", "whiten",
                 "token_rewards", "gae", "policy_loss", "value_loss"]:
        monkeypatch.setattr(ppo, name, must_not_be_called)
    flags = ["--whiten_advantages", "true", "--cycles", "0"]
    ppo.main([*TINY, "--init_from", str(run), *flags, "--out", str(tmp_path / "run")])
    assert math.isfinite(read_report(tmp_path / "run")["ppo"]["objective"])
    tokenizer, actor, _, prompts = world
    cfg = small_config(*flags)
    assert len(ppo.validate(actor, actor, ppo.human_score, prompts, cfg)) == 3 * cfg.batch_size
    rollout = ppo.sample_and_score(actor, actor, ppo.human_score, prompts, cfg)
    assert ppo.xray(rollout, tokenizer, cfg).count("\n") >= 3


# ==================================================================================================
# 9  The sampler
# ==================================================================================================
def test_the_sampler_cuts_no_tail_off_a_large_vocabulary():
    """Top-k or top-p would never draw the last tokens. Chi squared has mean 499, variance 998."""
    torch.manual_seed(0)
    logits = torch.linspace(0, -4, 500).repeat(20_000, 1)
    expected = 20_000 * logits[0].softmax(dim=0)
    counts = torch.bincount(ppo.sample_tokens(logits), minlength=500)
    assert ((counts - expected) ** 2 / expected).sum() < 499 + 5 * math.sqrt(998)


def test_a_token_of_probability_zero_is_never_sampled():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(5000, -1)
    assert set(ppo.sample_tokens(logits).tolist()) == {1, 3}


def test_the_cached_sampler_draws_from_the_distribution_that_teacher_forcing_reads():
    """Nearly greedy: token by token with the cache, and in one pass, the same tokens are best."""
    actor = small_actor()
    prompt_ids, prompt_mask, *_ = random_batch(rows=6)
    ids, mask = ppo.generate(actor, prompt_ids, prompt_mask, 10, eos_id=1, pad_id=0,
                             temperature=1e-4)
    with torch.no_grad():
        logits, _ = actor(prompt_ids, prompt_mask, ids, mask)
    assert torch.equal(logits.argmax(-1)[mask], ids[mask])


def test_without_eos_every_reply_has_the_full_length():
    prompt_ids, prompt_mask, *_ = random_batch(rows=6)
    ids, mask = ppo.generate(small_actor(), prompt_ids, prompt_mask, 10, eos_id=-1, pad_id=0)
    assert mask.all() and ids.shape == (6, 10)


# ==================================================================================================
# 10  The update
# ==================================================================================================
@pytest.fixture(scope="module")
def rollout(world):
    """Eight replies of very different lengths."""
    _, actor, reward_model, prompts = world
    torch.manual_seed(2)
    cfg = small_config("--max_new_tokens", "30")
    rollout = ppo.collect_rollout(actor, ppo.frozen(actor), reward_model.score, prompts, cfg)
    lengths = torch.tensor([30, 1, 2, 1, 20, 3, 1, 5])
    rollout.mask &= torch.arange(rollout.mask.shape[1]) < lengths.unsqueeze(1)
    return rollout


def spy_on_updates(monkeypatch):
    """What each update was given, in a list: (optimizer's learning rates, batch)."""
    seen, optimizer_step = [], ppo.optimizer_step

    def spy(model, optimizer, loss_fn, batch, cfg):
        seen.append(([group["lr"] for group in optimizer.param_groups], batch))
        return optimizer_step(model, optimizer, loss_fn, batch, cfg)

    monkeypatch.setattr(ppo, "optimizer_step", spy)
    return seen


def test_every_pass_uses_every_reply_once_in_a_new_order(world, rollout, monkeypatch):
    seen = spy_on_updates(monkeypatch)
    actor, numbered = copy.deepcopy(world[1]), copy.copy(rollout)
    numbered.group = torch.arange(8)  # tells which reply is which
    torch.manual_seed(0)
    cfg = small_config("--ppo_epochs", "3", "--minibatches", "4")
    ppo.update_policy(actor, sgd(actor, STILL), numbered, cfg)
    parts = [batch.group.tolist() for _, batch in seen]
    assert len(parts) == 12 and all(len(part) == 2 for part in parts)
    orders = [flat(parts[i:i + 4]) for i in (0, 4, 8)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({*map(tuple, orders), tuple(range(8))}) == 4


def test_the_gradient_is_clipped_to_its_length(world, rollout):
    lengths = []
    for limit in ("1e9", "0.05"):
        cfg = small_config("--minibatches", "1", "--ppo_epochs", "1", "--max_grad_norm", limit)
        actor = copy.deepcopy(world[1])
        ppo.update_policy(actor, sgd(actor, STILL), rollout, cfg)
        gradients = [p.grad.flatten() for p in actor.parameters() if p.grad is not None]
        lengths.append(torch.cat(gradients).norm().item())
    assert lengths[0] > 0.1 and lengths[1] == pytest.approx(0.05, rel=1e-3)


def test_metrics_of_an_update_are_those_of_its_formulas(world, rollout):
    """approx_kl = mean(rho - 1 - log rho); all means are over the real tokens."""
    actor = shifted(world[1]).requires_grad_(True)
    cfg = small_config("--minibatches", "1", "--ppo_epochs", "1", "--ent_coef", "0.1")
    with torch.no_grad():
        log_probs, values, logits = ppo.read_replies(actor, rollout, cfg.temperature)
    expected = {"policy_loss": [], "value_loss": [], "entropy": [], "clip_fraction": [],
                "approx_kl": [], "first_log_ratio": []}
    for i, t in rollout.mask.nonzero().tolist():
        x, A = (log_probs - rollout.log_probs)[i, t].item(), rollout.advantages[i, t].item()
        log_pi = log_softmax(logits[i, t].tolist())
        surrogate = surrogate_of_token(math.exp(x), A, 0.2)
        expected["policy_loss"].append(-surrogate)
        expected["value_loss"].append((values - rollout.returns)[i, t].item() ** 2 / 2)
        expected["entropy"].append(-math.fsum(math.exp(z) * z for z in log_pi))
        expected["clip_fraction"].append(surrogate < math.exp(x) * A)
        expected["approx_kl"].append(math.exp(x) - 1 - x)
        expected["first_log_ratio"].append(abs(x))
    expected = {name: mean(xs) for name, xs in expected.items()}
    expected["loss"] = (expected["policy_loss"] + 0.5 * expected["value_loss"]
                        - 0.1 * expected["entropy"])
    metrics = ppo.update_policy(actor, sgd(actor, STILL), rollout, cfg)
    for name, x in expected.items():
        assert metrics[name] == pytest.approx(x, rel=1e-3), name
    assert 0.05 < metrics["clip_fraction"] < 0.95 and metrics["approx_kl"] > 1e-3


def test_metrics_are_means_over_all_updates_and_the_first_log_ratio_is_that_of_the_first(
        world, rollout):
    both, one = (small_config("--minibatches", "1", "--ppo_epochs", n) for n in ("2", "1"))
    actor, again = copy.deepcopy(world[1]), copy.deepcopy(world[1])
    metrics = ppo.update_policy(actor, sgd(actor, 0.3), rollout, both)
    first = ppo.update_policy(again, sgd(again, 0.3), rollout, one)
    second = ppo.update_policy(again, sgd(again, 0.3), rollout, one)
    assert second["first_log_ratio"] > 1e-3
    for name in ["loss", "policy_loss", "value_loss", "entropy", "clip_fraction", "approx_kl"]:
        assert metrics[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-3), name
    assert metrics["first_log_ratio"] == pytest.approx(first["first_log_ratio"], abs=1e-6)


def test_a_token_of_probability_zero_adds_nothing_to_the_entropy_and_has_no_nan_gradient():
    """Logits of -infinity come from a mask over the vocabulary; 0 * log 0 counts as 0."""
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]], requires_grad=True)
    result = ppo.entropy(logits)
    assert result.item() == pytest.approx(math.log(2))
    result.sum().backward()
    assert not logits.grad.isnan().any()


def test_the_entropy_bonus_raises_entropy_and_nothing_else_moves_the_policy(world, rollout):
    """With advantages of 0. The value loss alone leaves the language model as it is."""
    actor, rollout = copy.deepcopy(world[1]), copy.copy(rollout)
    with torch.no_grad():
        actor.lm.get_output_embeddings().weight.mul_(5)  # a policy with some opinions
    rollout.advantages = torch.zeros_like(rollout.advantages)
    for ent_coef in ("0", "1"):
        cfg = small_config("--ent_coef", ent_coef, "--ppo_epochs", "8")
        policy = copy.deepcopy(actor)
        adam = torch.optim.Adam(policy.parameters(), lr=1e-3)
        entropies = [ppo.update_policy(policy, adam, rollout, cfg)["entropy"] for _ in range(2)]
        if ent_coef == "1":
            assert entropies[1] - entropies[0] > 0.05
        else:
            assert weights_equal(policy.lm, actor.lm.state_dict())


def test_the_critic_learns_the_returns_and_leaves_the_policy_alone(world, rollout):
    actor, rollout = copy.deepcopy(world[1]), copy.copy(rollout)
    rollout.advantages = torch.zeros_like(rollout.advantages)
    adam = torch.optim.Adam(actor.parameters(), lr=1e-2)
    cfg = small_config("--ppo_epochs", "10", "--ent_coef", "0")  # the entropy moves the policy
    losses = [ppo.update_policy(actor, adam, rollout, cfg)["value_loss"] for _ in range(3)]
    assert losses[2] < 0.5 * losses[0]
    assert weights_equal(actor.lm, world[1].lm.state_dict())


# ---- Optimizer and learning rates ----------------------------------------------------------------
@pytest.mark.parametrize("gradients, furthest", [
    ([1e-4] * 300 + [1.0], 1.0), ([1e-8] * 300, 0.01)], ids=["rare large", "rounding"])
def test_such_gradients_move_no_weight_of_the_policy_far(gradients, furthest, world):
    """The last step, in units of the learning rate, with the constants of make_optimizer."""
    optimizer = ppo.make_optimizer(world[1], small_config())
    for group in optimizer.param_groups:
        weight = torch.zeros(1, requires_grad=True)
        alone = type(optimizer)([{**group, "params": [weight], "lr": 0.1}])
        for gradient in gradients:
            before, weight.grad = weight.item(), torch.tensor([gradient])
            alone.step()
        assert 0 < before - weight.item() < furthest * 0.1


def test_ppo_has_no_weight_decay(world):
    actor = copy.deepcopy(world[1])
    optimizer = ppo.make_optimizer(actor, small_config())
    for parameter in actor.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert weights_equal(actor, world[1].state_dict())


def test_learning_rates_follow_their_schedules(world, monkeypatch):
    """Stages 0 to 2 rise for a tenth and fall to 0. PPO falls; its critic learns 10 times as fast.
    """
    seen = spy_on_updates(monkeypatch)
    _, actor, _, prompts = world
    replies = [ppo.Reply("I feel sad.\n", "Call a friend.", True)]
    ppo.train_supervised(copy.deepcopy(actor), ppo.imitation_loss, replies, 2, 20, 0.1, "test",
                         small_config())
    rates = [rates[0] for rates, _ in seen]
    assert rates[:3] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1]) and 0 < rates[-1] < 0.003
    assert rates[2:] == sorted(rates[2:], reverse=True)
    seen.clear()
    cfg = small_config("--lr", "0.01", "--cycles", "4", "--ppo_epochs", "1", "--minibatches", "1")
    splits = {"train": prompts, "validation": prompts[:1]}
    log = ppo.train_ppo(copy.deepcopy(actor), ppo.frozen(actor), ppo.human_score, splits, cfg)
    actor_rates, critic_rates = zip(*[rates for rates, _ in seen])
    assert [line["lr"] for line in log] == list(actor_rates)
    assert actor_rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert critic_rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_every_step_of_a_stage_and_every_cycle_of_ppo_draws_anew(world, monkeypatch):
    _, actor, _, prompts = world
    batches, drawn, sampled = [], [], []

    def loss(model, batch, cfg):
        batches.append(tuple(batch))
        return model.head[-1].bias.sum(), torch.tensor(1), {}

    def collect(*args):
        drawn.append(tuple(args[3]))
        rollout = original(*args)
        sampled.append(tuple(rollout.replies))
        return rollout

    ppo.train_supervised(copy.deepcopy(actor), loss, list(range(100)), 4, 6, 0.1, "test",
                         small_config())
    assert len(set(batches)) == 6
    original = ppo.collect_rollout
    monkeypatch.setattr(ppo, "collect_rollout", collect)
    splits = {"train": prompts, "validation": prompts[:1]}
    ppo.train_ppo(copy.deepcopy(actor), ppo.frozen(actor), ppo.human_score, splits,
                  small_config("--cycles", "4"))
    assert len(set(drawn)) == len(set(sampled)) == 4


# ---- Which policy is kept (L6) -------------------------------------------------------------------
@pytest.mark.parametrize("last, kept", [([2.0, 2.0], 1), ([2.4, 2.6], 1), ([1.0, 4.0], 2),
                                        ([3.0, 3.0], 2)])
def test_ppo_keeps_the_policy_that_validated_best_and_the_later_one_if_that_may_be_luck(
        world, monkeypatch, last, kept):
    _, actor, _, prompts = world
    actor, weights, asked = copy.deepcopy(actor), [], []
    objectives = iter([[1.0, 1.0], [3.0, 3.0], last])

    def validate(actor, reference, score_fn, prompts, cfg):
        weights.append(copy.deepcopy(actor.state_dict()))
        asked.append(prompts)
        return next(objectives)

    monkeypatch.setattr(ppo, "validate", validate)
    splits = {"train": prompts[:4], "validation": prompts[4:]}
    cfg = small_config("--eval_every", "1")
    log = ppo.train_ppo(actor, ppo.frozen(actor), ppo.human_score, splits, cfg)
    assert [weights_equal(actor, old) for old in weights] == [i == kept for i in range(3)]
    assert asked == [prompts[4:]] * 3
    assert [line["validation"] for line in log] == [1.0, 3.0, mean(last)]


# ---- Random numbers ------------------------------------------------------------------------------
def test_random_streams_differ_by_purpose_and_seed_and_repeat_otherwise():
    def numbers_of(purpose, seed):
        return ppo.reseed(small_config("--seed", seed), purpose).random(), torch.rand(1).item()

    assert numbers_of("a", "0") == numbers_of("a", "0")
    streams = [numbers_of("a", "0"), numbers_of("b", "0"), numbers_of("a", "1")]
    for values in zip(*streams):
        assert len(set(values)) == 3


# ==================================================================================================
# 11  The task
# ==================================================================================================
SPLITS = ppo.split(ppo.WORLD_PROMPTS)
HELD_OUT = {*SPLITS["validation"], *SPLITS["test"]}
SAD = "I feel sad. What can I do?\n"
GOOD = "I am sorry that you feel sad. Take a slow walk."


def points(prompt, text, finished=True):
    return ppo.judge(ppo.Reply(prompt, text, finished))["human"]


# ---- Prompts and texts ---------------------------------------------------------------------------
def test_held_out_prompts_occur_in_no_training_stage_and_their_words_do(monkeypatch):
    """Of 150 prompts 14 are for validation, 14 for the test. The tokenizer sees none of them."""
    seen, train_tokenizer = [], ppo.train_tokenizer

    def spy(texts):
        seen.extend(texts)
        return train_tokenizer(texts)

    monkeypatch.setattr(ppo, "train_tokenizer", spy)
    ppo.base_model(NOTHING, small_config())
    data = ppo.load_data(NOTHING, small_config())
    assert {name: len(part) for name, part in data.prompts.items()} == {
        "test": 14, "validation": 14, "train": 122}
    assert len(set(flat(data.prompts.values()))) == 150
    for texts in (seen, [reply.prompt for reply in data.texts],
                  [reply.prompt for reply in data.demos], data.prompts["train"]):
        assert len(texts) > 100 and HELD_OUT.isdisjoint(texts)
    assert {ppo.WORLD_PROMPTS[prompt][0] for prompt in data.prompts["train"]} == ppo.WORDS


def test_every_word_and_every_way_to_ask_keeps_most_of_its_prompts_for_training():
    words = Counter(ppo.WORLD_PROMPTS[prompt][0] for prompt in HELD_OUT)
    asks = Counter(prompt.replace(ppo.WORLD_PROMPTS[prompt][0], "{}") for prompt in HELD_OUT)
    assert max(words.values()) == 1  # of 5
    assert max(asks.values()) == 2 and len(asks) == 15  # of 10


def test_split_counts_a_prompt_once_wherever_it_stands_and_needs_no_dice():
    prompts = [str(i) for i in range(30)]
    splits = ppo.split(prompts + prompts[::-1])
    assert splits == ppo.split(prompts)
    assert splits["test"] == ["0", "11", "22"] and splits["validation"] == ["5", "16", "27"]
    assert sorted(flat(splits.values()), key=int) == prompts


def test_sft_texts_are_mostly_mechanical_and_rarely_rude():
    data = ppo.load_data(NOTHING, small_config())
    for replies, lists, rude in [(data.texts, 0.25, 0.20), (data.demos, 0.47, 0.07)]:
        for kind, wanted in [("list", lists), ("dismissive", rude)]:
            found = [any(text in reply.text for text in ppo.sentences(reply.prompt)[kind])
                     for reply in replies]
            assert mean(found) == pytest.approx(wanted, abs=0.02)


def test_encoded_text_ends_with_eos_only_if_it_is_finished_and_whole(world, monkeypatch):
    """An empty text can be read too. EOS in the middle of a sentence would teach to stop there."""
    tokenizer, actor, *_ = world
    eos = tokenizer.eos_token_id
    replies = [ppo.Reply("", "", True), ppo.Reply("Hi", "Call a friend.", True),
               ppo.Reply("Hi", "Call a friend.", False)]
    prompt_ids, prompt_mask, reply_ids, mask = ppo.encode(actor, replies)
    whole = tokenizer("Call a friend.").input_ids
    rows = [ids[real].tolist() for ids, real in zip(reply_ids, mask)]
    assert rows == [[eos], whole + [eos], whole] and prompt_ids[0][prompt_mask[0]].tolist() == [eos]
    logits, values = actor(prompt_ids, prompt_mask, reply_ids, mask)
    assert logits[mask].isfinite().all() and values[mask].isfinite().all()
    monkeypatch.setattr(actor, "cfg", small_config("--max_new_tokens", "2"))
    *_, reply_ids, mask = ppo.encode(actor, replies[1:2])  # that is a limit of sampling
    assert reply_ids[0].tolist() == whole + [eos]


def test_a_reply_sampled_in_the_middle_of_characters_still_fits_into_the_model(world):
    """Half a character becomes U+FFFD as text: encoded again, it is longer than it was."""
    tokenizer, _, reward_model, prompts = world
    half = tokenizer("é").input_ids[0]
    text = tokenizer.decode([half] * 32)
    assert len(tokenizer(text).input_ids) > 32
    for finished in (True, False):
        reply = ppo.Reply(prompts[0], text, finished)
        prompt_ids, _, reply_ids, mask = ppo.encode(reward_model, [reply])
        assert mask.sum() == len(tokenizer(text).input_ids) + finished
        assert prompt_ids.shape[1] + reply_ids.shape[1] <= ppo.positions_of(reward_model.lm)
        assert ppo.ask_score_fn(reward_model.score, [reply])


# ---- The human -----------------------------------------------------------------------------------
def test_the_human_prefers_kinds_of_replies_in_the_storys_order():
    rng, means = random.Random(0), {}
    for kind in ppo.SFT_MIX:
        texts = ppo.write_texts(rng, SPLITS["train"], {kind: 1}, count=200)
        verdicts = [ppo.judge(reply) for reply in texts]
        means[kind] = mean([verdict["human"] for verdict in verdicts])
        if kind == "best":
            best = {"helpful": 1, "warm": 1, "honest": 1, "harmless": 1, "human": 4}
            assert all(verdict == best for verdict in verdicts)
    order = ["best", "practical", "mechanical", "off_topic", "dismissive"]
    assert sorted(order, key=means.get, reverse=True) == order
    assert means["best"] > means["warm"] > means["off_topic"]


@pytest.mark.parametrize("text, finished, wanted, why", [
    (GOOD, True, 4, "all is there"),
    (GOOD, False, 3, "it does not end"),
    (GOOD + " Take a slow walk.", True, 3, "it repeats three words in a row"),
    (GOOD.replace("feel sad", "feel tired"), True, 2, "another word: not honest, no opener"),
    (GOOD + " For chess, you can use books or videos.", True, 3, "not honest: also another topic"),
    ("I am sorry that you feel sad. Try a classic.", True, 2, "a step for another situation"),
    ("To feel less sad, you can do sports or sleep.", True, 1.5, "a list is half a point"),
    (GOOD + " Nobody cares.", True, 2, "dismissive")])
def test_the_human_counts_points_by_its_rule(text, finished, wanted, why):
    assert points(SAD, text, finished) == wanted, why


def test_the_human_has_no_opinion_of_prompts_from_elsewhere():
    assert math.isnan(points("Hello\n", GOOD))


# ---- Rankings ------------------------------------------------------------------------------------
def test_label_noise_zero_ranks_by_the_human_and_the_reward_model_never_sees_points(world):
    _, actor, _, prompts = world
    cfg = small_config("--label_noise", "0")
    for replies in ppo.label_rankings(actor, prompts, cfg, random.Random(0)):
        given = [ppo.judge(reply)["human"] for reply in replies]
        assert given == sorted(given, reverse=True) and len(given) == 4
    assert ppo.Reply._fields == ("prompt", "text", "finished")


def test_label_noise_makes_the_choices_of_plackett_and_luce(world, monkeypatch):
    """The chance to be ranked first is softmax(points / noise). Gumbel's sign matters."""
    replies = [ppo.Reply(SAD, text, True)
               for text in ("Call a friend.", "Nobody cares.", "Water boils.")]
    given = torch.tensor([ppo.judge(reply)["human"] for reply in replies])
    monkeypatch.setattr(ppo, "sample_groups", lambda actor, prompts, K, cfg: [replies] * 20_000)
    for noise in (1.0, 3.0):
        cfg = small_config("--label_noise", str(noise))
        rankings = ppo.label_rankings(None, [SAD], cfg, random.Random(0), K=3)
        first = Counter(ranking[0].text for ranking in rankings)
        share = torch.tensor([first[reply.text] / len(rankings) for reply in replies])
        assert (share - (given / noise).softmax(0)).abs().max() < 0.015


# ---- The reward model ----------------------------------------------------------------------------
def test_the_reward_is_read_at_the_last_real_token():
    """In a padded batch, as if the text were alone."""
    model = small_reward_model()
    prompt_ids, prompt_mask, reply_ids, mask = random_batch()
    with torch.no_grad():
        scores = model(prompt_ids, prompt_mask, reply_ids, mask)
        for i, score in enumerate(scores):
            ids = torch.cat([prompt_ids[i][prompt_mask[i]], reply_ids[i][mask[i]]]).unsqueeze(0)
            hidden = model.lm(ids, output_hidden_states=True).hidden_states[-1]
            assert score.item() == pytest.approx(model.head(hidden[0, -1]).item(), abs=1e-4)


def test_the_reward_model_learns_a_ranking_and_normalises_to_zero_and_one(world):
    _, actor, reward_model, prompts = world
    model, cfg = copy.deepcopy(reward_model), small_config()
    texts = ["Call a friend.", "A spider has eight legs.", "Nobody cares."]
    rankings = [[ppo.Reply(prompt, text, True) for text in texts[::2]] for prompt in prompts]
    rankings += [[ppo.Reply(prompts[0], text, True) for text in texts]]  # three among pairs
    ppo.train_supervised(model, ppo.reward_model_loss, rankings, 4, 40, 3e-3, "test", cfg)
    good, bad = model.score(prompts[:1] * 2, texts[::2], [True] * 2)
    assert good > bad + 1
    replies = flat(ppo.sample_groups(actor, prompts, 4, cfg))
    for _ in range(2):
        ppo.normalize(model, replies)
        scores = torch.tensor(ppo.ask_score_fn(model.score, replies))
        assert abs(scores.mean()) < 1e-4 and abs(scores.std() - 1) < 1e-4


def test_the_critic_begins_at_the_mean_of_a_reward_that_is_not_normalised(run, world, tmp_path):
    """Then not all advantages of the first batch have one sign. A trained reward model has mean 0.
    """
    _, actor, _, prompts = world
    actor, cfg = copy.deepcopy(actor), small_config("--batch_size", "16")

    def far_below_zero(completions):
        return [-5.0 - len(text) / 10 for text in completions]

    ppo.start_at_mean(actor, far_below_zero, prompts, cfg)
    rollout = ppo.sample_and_score(actor, actor, far_below_zero, prompts * 2, cfg)
    begin = rollout.values[rollout.mask]
    assert (begin == begin[0]).all()
    assert abs(begin[0] - rollout.scores.mean()) < 3 * rollout.scores.std() / math.sqrt(8)
    assert begin[0] < -5

    (tmp_path / "always.py").write_text("def five(replies): return [5.0] * len(replies)\n")
    own = ["--reward", f"{tmp_path}/always.py:five", "--missing_eos_penalty", "0"]
    for flags, expected in [([], 0.0), (own, 5.0)]:
        out = tmp_path / f"{expected:.0f}"
        ppo.main([*TINY, "--init_from", str(run), "--cycles", "1", *flags, "--out", str(out)])
        lines = [json.loads(line) for line in (out / "xray.jsonl").read_text().splitlines()]
        assert flat(line["V(s_t)"] for line in lines if line["cycle"] == 0)[0] == expected


def test_a_judge_is_measured_by_pairs_that_the_human_finds_different(world, monkeypatch):
    _, actor, _, prompts = world
    cfg = small_config()
    data = ppo.load_data(NOTHING, cfg)
    # Your own rankings: (best, good) is ordered wrongly, three other pairs are right.
    scores = {"best": 2.0, "good": 3.0, "bad": 1.0}
    ranked = [ppo.Reply(prompts[0], text, True) for text in scores]
    data.held_out = [ranked, ranked[1:]]
    quality = ppo.reward_model_quality(lambda completions: [scores[text] for text in completions],
                                       actor, data, cfg)
    assert quality["accuracy"] == pytest.approx(3 / 4) and math.isnan(quality["correlation"])
    # The human's points: two replies are equal to the human, and the judge may tell them apart.
    data.held_out = []
    texts = ["Call a friend.", "Nobody cares.", "You should just give up.", "Water boils."]
    given = [points(prompts[0], text) for text in texts]
    assert given[1] == given[2]
    judged = dict(zip(texts, [given[0], given[1], given[2] + 0.5, given[3]]))
    replies = [ppo.Reply(prompts[0], text, True) for text in texts]
    monkeypatch.setattr(ppo, "sample_groups", lambda actor, prompts, K, cfg: [replies])
    quality = ppo.reward_model_quality(lambda completions: [judged[text] for text in completions],
                                       actor, data, cfg)
    assert quality["accuracy"] == 1
    assert quality["correlation"] == pytest.approx(correlation(given, list(judged.values())))


# ---- The stages ----------------------------------------------------------------------------------
def test_every_stage_trains_a_model_of_its_own(world):
    _, actor, *_ = world
    before, cfg = copy.deepcopy(actor.state_dict()), small_config()
    data = ppo.load_data(NOTHING, cfg)
    sft = ppo.finetune(actor, data.demos, cfg)
    ppo.train_reward_model(actor, data, cfg)
    assert weights_equal(actor, before) and not weights_equal(sft, before)


def test_every_stage_samples_replies_to_its_own_prompts_only(tmp_path, monkeypatch):
    """32 prompts in 3 cycles: if PPO drew from all prompts, a held-out one would be among them."""
    asked, now = {}, []
    reseed, sample_replies = ppo.reseed, ppo.sample_replies

    def spy_on_purpose(cfg, purpose):
        now.append(purpose)
        return reseed(cfg, purpose)

    def spy_on_prompts(actor, prompts, cfg):
        asked.setdefault(now[-1], []).extend(prompts)
        return sample_replies(actor, prompts, cfg)

    monkeypatch.setattr(ppo, "reseed", spy_on_purpose)
    monkeypatch.setattr(ppo, "sample_replies", spy_on_prompts)
    flags = ["--batch_size", "32", "--replies_per_prompt", "2"]
    ppo.main([*TINY, *flags, "--out", str(tmp_path / "run")])
    wanted = {"rankings": "train", "normalization": "train", "PPO 0": "train", "PPO 1": "train",
              "PPO 2": "train", "reward model quality": "validation", "validation": "validation",
              "xray": "validation", "report": "test"}
    assert set(asked) == set(wanted)
    for purpose, name in wanted.items():
        assert set(asked[purpose]) <= set(SPLITS[name]), purpose
    first = asked["PPO 0"]
    assert len(first) == 32 and first[::2] == first[1::2] and len(set(first)) > 8
    assert asked["PPO 1"] != first
    assert set(asked["validation"]) == set(SPLITS["validation"])
    assert set(asked["report"]) == set(SPLITS["test"])


# ==================================================================================================
# 12  One whole run
# ==================================================================================================
def test_a_run_writes_every_file(run):
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json", "metrics.csv", "policy", "pretrain", "report.json", "reward_model", "sft",
        "state.pt", "xray.jsonl"]
    assert json.loads((run / "config.json").read_text())["cycles"] == 3
    report = read_report(run)
    entries = {"helpful", "warm", "honest", "harmless", "human", "reward", "kl", "objective",
               "length", "finished", "spread", "win_rate"}
    for name in ("pretrained", "sft", "ppo"):
        assert set(report[name]) == entries
        assert all(math.isfinite(x) for x in report[name].values())
    assert report["sft"]["kl"] == 0 and report["sft"]["win_rate"] == pytest.approx(0.5)
    assert set(report) - {"pretrained", "sft", "ppo"} == {"optimum", "reward_model", "seconds"}
    assert set(report["reward_model"]) == {"accuracy", "correlation"}
    assert set(report["seconds"]) == {"pretrain", "sft", "reward_model", "ppo", "total"}


def test_a_run_validates_every_so_many_cycles_and_at_the_end(run):
    rows = read_metrics(run)  # --eval_every 2
    assert [row["cycle"] for row in rows] == ["1", "2", "3"]
    assert [bool(row["validation"]) for row in rows] == [False, True, True]


def test_the_reference_of_a_run_stays_behind_when_the_policy_moves(run):
    kls = [float(row["kl"]) for row in read_metrics(run)]
    assert kls[0] == 0 and kls[1] != 0 and kls[2] != 0
    assert read_report(run)["ppo"]["kl"] != 0


def test_the_first_xray_of_a_run_shows_ratio_one_before_the_update(run, tmp_path, capsys):
    ppo.main([*TINY, "--init_from", str(run), "--out", str(tmp_path / "run")])
    first, last = parse_xrays(capsys.readouterr().out)
    assert all(line["rho before"] == 1 and line["KL"] == 0 for line in first)
    assert any(line["rho after"] != 1 for line in first)
    assert any(line["KL"] != 0 for line in last) and "rho after" not in last[0]


def test_the_saved_models_load_with_transformers_and_with_their_heads(run):
    for name, model_class in [("sft", ppo.ActorCritic), ("policy", ppo.ActorCritic),
                              ("reward_model", ppo.RewardModel)]:
        lm = AutoModelForCausalLM.from_pretrained(run / name)
        tokenizer = AutoTokenizer.from_pretrained(run / name)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id == lm.config.eos_token_id
        once, again = (ppo.load_model(model_class, run / name, ppo.Config()) for _ in range(2))
        assert weights_equal(once, again.state_dict())
        assert weights_equal(once.lm, lm.state_dict())
    assert once.head[-1].bias.item() != 0  # `normalize` changed it, and that was saved too


def test_human_reward_needs_no_reward_model(run, tmp_path):
    flags = ["--init_from", str(run), "--reward", "human"]
    ppo.main([*TINY, *flags, "--out", str(tmp_path / "rule")])
    report = read_report(tmp_path / "rule")
    assert report["reward_model"] == {"accuracy": 1, "correlation": pytest.approx(1)}
    assert not (tmp_path / "rule" / "reward_model").exists()
    for row in read_metrics(tmp_path / "rule"):
        cut_off = 1 - float(row["finished"])
        assert float(row["reward"]) == pytest.approx(float(row["human"]) - cut_off, abs=1e-4)


def test_same_seed_same_metrics_and_init_from_repeats_ppo_exactly(run, tmp_path):
    """Invariant 13."""
    ppo.main([*TINY, "--out", str(tmp_path / "again")])
    ppo.main([*TINY, "--out", str(tmp_path / "init"), "--init_from", str(run)])
    ppo.main([*TINY, "--out", str(tmp_path / "other"), "--init_from", str(run), "--seed", "1"])
    for name in ("again", "init"):
        assert read_metrics(tmp_path / name) == read_metrics(run)
        report = read_report(tmp_path / name)
        for part in ("pretrained", "sft", "ppo", "optimum", "reward_model"):
            assert report[part] == read_report(run)[part]
    assert read_metrics(tmp_path / "other") != read_metrics(run)
