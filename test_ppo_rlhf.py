"""What ppo_rlhf.py promises, one test per promise. Run: pytest"""
import copy
import csv
import json
import math
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import ppo_rlhf as ppo

NAN = float("nan")
TINY = ("--n_layer 1 --n_embd 32 --n_head 2 --pretrain_steps 6 --sft_steps 6 --rm_steps 6 --rankings 12 --cycles 3 "
        "--batch_size 8 --max_new_tokens 12 --eval_every 2 --optimum_samples 8").split()


def small_actor(vocab_size=23, seed=0, **changes):
    torch.manual_seed(seed)
    actor = ppo.ActorCritic(GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=64, n_layer=2, n_embd=32, n_head=2, initializer_range=0.3,
        bos_token_id=1, eos_token_id=1, pad_token_id=0, **changes)), None, ppo.Config())
    torch.nn.init.normal_(actor.head[-1].weight)
    return actor


def small_config(*flags):
    return ppo.parse_config([*TINY, *flags])


def pad(sequences, left):
    width = max(map(len, sequences))
    rows = [[0] * (width - len(s)) * left + s + [0] * (width - len(s)) * (not left) for s in sequences]
    masks = [[False] * (width - len(s)) * left + [True] * len(s) + [False] * (width - len(s)) * (not left) for s in sequences]
    return torch.tensor(rows), torch.tensor(masks)


def random_batch(rows=5, P=4, T=7, vocab_size=23, seed=0):
    """Prompts padded left, replies padded right, every length from 1 to T among the replies."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(2, vocab_size) for _ in range(rng.randint(1, P))] for _ in range(rows)]
    replies = [[rng.randrange(2, vocab_size) for _ in range(max(1, T - i))] for i in range(rows)]
    return *pad(prompts, left=True), *pad(replies, left=False)


def random_rollout_tensors(rows=6, T=9, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    lengths = torch.randint(1, T + 1, (rows, 1))
    lengths[0], lengths[1] = T, 1
    mask = torch.arange(T) < lengths
    return mask, *(torch.randn(rows, T, dtype=dtype) for _ in range(4))


def with_nan(x, mask):
    return torch.where(mask, x, NAN)


@pytest.fixture(scope="module")
def world():
    """A tokenizer, an SFT-like actor and a reward model, all untrained, and a few prompts."""
    cfg = small_config()
    prompts = ppo.split(ppo.WORLD_PROMPTS)["train"][:8]
    nothing = {"prompts": [], "demos": [], "preferences": []}
    tokenizer, lm = ppo.base_model(nothing, cfg)
    actor = ppo.ActorCritic(lm, tokenizer, cfg)
    reward_model = ppo.RewardModel(copy.deepcopy(lm), tokenizer, cfg)
    torch.nn.init.normal_(reward_model.head[-1].weight)
    return tokenizer, actor, reward_model, prompts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One complete run with tiny settings."""
    out = tmp_path_factory.mktemp("runs") / "run"
    ppo.main([*TINY, "--out", str(out)])
    return out


def read_metrics(out):
    with open(out / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


# ---- Invariant 1 -----------------------------------------------------------------------------------------------------
def test_ratio_is_one_and_nothing_is_clipped_before_the_first_update(world):
    tokenizer, actor, _, prompts = world
    cfg = small_config("--minibatches", "2", "--ppo_epochs", "2", "--temperature", "0.7")
    actor, reference = copy.deepcopy(actor), ppo.frozen(actor)
    rollout = ppo.collect_rollout(actor, reference, ppo.human_score, prompts, cfg)
    still = torch.optim.SGD(actor.parameters(), lr=0.0)  # does not move: every update is a first one
    metrics = ppo.update_policy(actor, still, rollout, cfg)
    assert metrics["first_log_ratio"] < 1e-5 and metrics["clip_fraction"] == 0 and metrics["approx_kl"] < 1e-8
    moving = torch.optim.Adam(actor.parameters(), lr=0.01)
    metrics = ppo.update_policy(actor, moving, rollout, cfg)  # from the second minibatch on the ratio leaves 1
    assert metrics["first_log_ratio"] < 1e-5 and metrics["approx_kl"] > 1e-8 and metrics["clip_fraction"] > 0


# ---- Invariant 2 -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
def test_nan_in_padding_changes_nothing(seed):
    mask, rewards, values, log_probs, old = random_rollout_tensors(seed=seed)
    nan_rewards, nan_values, nan_log_probs, nan_old = (with_nan(x, mask) for x in (rewards, values, log_probs, old))
    scores = torch.randn(len(mask))

    def same(function, clean, dirty):
        clean, dirty = function(*clean), function(*dirty)
        for a, b in zip(clean, dirty) if isinstance(clean, tuple) else [(clean, dirty)]:
            assert torch.equal(a, b)
            assert a.shape != mask.shape or (a[~mask] == 0).all(), "results at masked positions are 0"

    same(lambda x: ppo.masked_mean(x, mask), [values], [nan_values])
    same(lambda x: ppo.whiten(x, mask), [values], [nan_values])
    same(lambda x: ppo.whiten(x, mask, shift_mean=False), [values], [nan_values])
    same(lambda a, b: ppo.token_rewards(a, b, scores, mask, 0.1), [log_probs, old], [nan_log_probs, nan_old])
    same(lambda r, v: ppo.td_residuals(r, v, mask, 0.9), [rewards, values], [nan_rewards, nan_values])
    same(lambda r, v: ppo.gae(r, v, mask, 0.9, 0.8), [rewards, values], [nan_rewards, nan_values])
    same(lambda a, b, c: ppo.policy_loss(a, b, c, mask, 0.2), [log_probs, old, rewards],
         [nan_log_probs, nan_old, nan_rewards])
    same(lambda a, b, c: ppo.value_loss(a, b, mask, c, 0.2), [values, rewards, old], [nan_values, nan_rewards, nan_old])


def test_nan_in_padding_changes_no_gradient():
    mask, advantages, returns, x, old = random_rollout_tensors()
    losses = {"policy": lambda x, a, r, o: ppo.policy_loss(x, o, a, mask, 0.2)[0],
              "value": lambda x, a, r, o: ppo.value_loss(x, r, mask),
              "clipped value": lambda x, a, r, o: ppo.value_loss(x, r, mask, o, 0.2)}
    for loss in losses.values():
        gradients = []
        for fill in (lambda t: t, lambda t: with_nan(t, mask)):
            leaf = fill(x).clone().requires_grad_()
            loss(leaf, fill(advantages), fill(returns), fill(old)).backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients) and (gradients[0][~mask] == 0).all() and (gradients[0][mask] != 0).any()


def test_tokens_in_the_padding_change_nothing():
    actor, reward_model = small_actor(), ppo.RewardModel(small_actor(seed=1).lm)
    prompt_ids, prompt_mask, reply_ids, mask = random_batch()
    other = torch.where(prompt_mask, prompt_ids, 9), prompt_mask, torch.where(mask, reply_ids, 9), mask
    with torch.no_grad():
        for a, b in zip(actor(prompt_ids, prompt_mask, reply_ids, mask), actor(*other)):
            assert torch.allclose(a[mask], b[mask], atol=1e-5)
        assert torch.allclose(reward_model(prompt_ids, prompt_mask, reply_ids, mask), reward_model(*other), atol=1e-5)


# ---- Invariant 3 -----------------------------------------------------------------------------------------------------
def test_a_reply_is_worth_the_same_alone_and_in_any_padded_batch():
    actor, reward_model = small_actor(), ppo.RewardModel(small_actor(seed=1).lm)
    torch.nn.init.normal_(reward_model.head[-1].weight)
    batch = random_batch(rows=6)
    prompt_ids, prompt_mask, reply_ids, mask = batch
    with torch.no_grad():
        logits, values = actor(*batch)
        scores = reward_model(*batch)
        log_probs = ppo.token_log_probs(logits, reply_ids)
        rewards = ppo.token_rewards(log_probs, log_probs - 1, scores, mask, 0.1)
        for i in range(len(mask)):
            T = int(mask[i].sum())
            alone = (prompt_ids[i:i + 1, prompt_mask[i]], prompt_mask[i:i + 1, prompt_mask[i]],
                     reply_ids[i:i + 1, :T], mask[i:i + 1, :T])
            logits1, values1 = actor(*alone)
            log_probs1 = ppo.token_log_probs(logits1, alone[2])
            rewards1 = ppo.token_rewards(log_probs1, log_probs1 - 1, reward_model(*alone), alone[3], 0.1)
            for a, b in ((log_probs[i, :T], log_probs1[0]), (values[i, :T], values1[0]), (rewards[i, :T], rewards1[0]),
                         (scores[i], reward_model(*alone)[0])):
                assert torch.allclose(a, b, atol=1e-4)


def test_logits_at_t_predict_token_t_and_values_at_t_do_not_know_it():
    actor = small_actor()
    prompt_ids, prompt_mask, reply_ids, mask = random_batch(rows=1)
    changed = reply_ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 20 + 2
    with torch.no_grad():
        before, after = actor(prompt_ids, prompt_mask, reply_ids, mask), actor(prompt_ids, prompt_mask, changed, mask)
        plain = actor.lm(torch.cat([prompt_ids, reply_ids], 1)).logits  # one prompt: no padding
    for a, b in zip(before, after):
        assert torch.allclose(a[0, :4], b[0, :4], atol=1e-6) and not torch.allclose(a[0, 4:], b[0, 4:], atol=1e-3)
    assert prompt_mask.all() and torch.allclose(before[0][0], plain[0, prompt_ids.shape[1] - 1:-1], atol=1e-5)


# ---- Invariant 4 -----------------------------------------------------------------------------------------------------
def test_score_lands_on_the_last_real_token_and_rewards_add_up():
    mask, log_probs, ref, *_ = random_rollout_tensors(dtype=torch.float64)
    scores = torch.randn(len(mask), dtype=torch.float64)
    rewards = ppo.token_rewards(log_probs, ref, scores, mask, kl_coef=0.1)
    kl = torch.where(mask, log_probs - ref, 0)
    without = ppo.token_rewards(log_probs, ref, torch.zeros_like(scores), mask, kl_coef=0.1)
    for i, length in enumerate(mask.sum(1).tolist()):
        assert (rewards - without)[i].nonzero().flatten().tolist() == [length - 1]
    assert torch.allclose(rewards.sum(1), scores - 0.1 * kl.sum(1))


# ---- Invariant 5 -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (0.97, 1.0), (1.0, 1.0)])
def test_gae_equals_its_double_sum_and_its_limits_are_td_and_monte_carlo(gamma, lam):
    mask, rewards, values, *_ = random_rollout_tensors(dtype=torch.float64, seed=3)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for i, T in enumerate(mask.sum(1).tolist()):
        r, v = rewards[i, :T].tolist(), values[i, :T].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(T)]
        for t in range(T):
            expected = sum((gamma * lam) ** b * delta[t + b] for b in range(T - t))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[i, t].item() == pytest.approx(expected + v[t], abs=1e-12)
            if lam == 0:
                assert advantages[i, t].item() == pytest.approx(delta[t], abs=1e-12)
            if lam == 1:
                monte_carlo = sum(gamma ** b * r[t + b] for b in range(T - t))
                assert returns[i, t].item() == pytest.approx(monte_carlo, abs=1e-12)
    assert torch.allclose(ppo.td_residuals(rewards, values, mask, gamma), ppo.gae(rewards, values, mask, gamma, 0.0)[0])


# ---- Invariant 6 -----------------------------------------------------------------------------------------------------
def test_returns_use_unwhitened_advantages(world):
    tokenizer, actor, reward_model, prompts = world
    rollouts = []
    for flags in ([], ["--whiten_advantages"]):
        torch.manual_seed(1)
        rollouts.append(ppo.collect_rollout(actor, actor, ppo.human_score, prompts, small_config(*flags)))
    plain, white = rollouts
    assert torch.equal(plain.returns, white.returns)
    assert torch.allclose(plain.returns, torch.where(plain.mask, plain.advantages + plain.values, 0))
    assert not torch.allclose(plain.advantages, white.advantages)
    assert torch.allclose(white.advantages, ppo.whiten(plain.advantages, plain.mask))


def test_whitening_sets_mean_and_variance_over_real_tokens_only():
    mask, x, *_ = random_rollout_tensors()
    x = 3 * x + 5
    white, scaled = ppo.whiten(x, mask)[mask], ppo.whiten(x, mask, shift_mean=False)[mask]
    assert white.mean().abs() < 1e-5 and abs(white.var(unbiased=False) - 1) < 1e-4
    assert scaled.mean().item() == pytest.approx(x[mask].mean().item(), abs=1e-4)
    assert abs(scaled.var(unbiased=False) - 1) < 1e-4


# ---- Invariant 7 -----------------------------------------------------------------------------------------------------
def test_kl_is_exactly_zero_before_the_first_update(world):
    tokenizer, actor, _, prompts = world
    rollout = ppo.collect_rollout(actor, ppo.frozen(actor), ppo.human_score, prompts, small_config())
    assert (rollout.kl == 0).all() and torch.equal(rollout.log_probs, rollout.ref_log_probs)


def test_sampled_kl_agrees_with_the_exact_kl():
    actor, reference, T = small_actor(6, seed=0), small_actor(6, seed=5), 3
    prompt = torch.tensor([[2, 3]])
    with torch.no_grad():
        replies = torch.cartesian_prod(*[torch.arange(6)] * T)  # all 216 replies of 3 tokens
        prompts = prompt.expand(len(replies), -1)
        every = prompts, torch.ones_like(prompts).bool(), replies, torch.ones_like(replies).bool()
        log_p, log_q = (ppo.token_log_probs(model(*every)[0], replies).sum(1) for model in (actor, reference))
        exact = (log_p.exp() * (log_p - log_q)).sum().item()
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)
        torch.manual_seed(0)
        many = prompt.expand(4000, -1)
        ids, mask = ppo.generate(actor, many, torch.ones_like(many).bool(), T, eos_id=-1, pad_id=0)
        batch = many, torch.ones_like(many).bool(), ids, mask
        kl = sum(sign * ppo.token_log_probs(model(*batch)[0], ids).sum(1)
                 for sign, model in ((1, actor), (-1, reference)))
    assert abs(kl.mean().item() - exact) < 4 * kl.std().item() / math.sqrt(len(kl))


# ---- Invariant 8 -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampling_frequencies_match_the_log_probs_at_every_temperature(temperature):
    actor = small_actor(8)
    prompt = torch.tensor([[2, 3, 4]]).expand(20000, -1)
    torch.manual_seed(0)
    everywhere = torch.ones_like(prompt).bool()
    ids, mask = ppo.generate(actor, prompt, everywhere, 1, eos_id=-1, pad_id=0, temperature=temperature)
    every = torch.arange(8).unsqueeze(1)
    batch = prompt[:8], torch.ones(8, 3).bool(), every, torch.ones(8, 1).bool()
    with torch.no_grad():
        probabilities = ppo.read_replies(actor, batch, temperature)[0].exp().squeeze(1)
    frequencies = torch.bincount(ids.squeeze(1), minlength=8) / len(ids)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    assert (frequencies - probabilities).abs().max() < 0.015 and probabilities.max() < 0.99


def test_a_token_of_probability_zero_is_never_sampled():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(5000, -1)
    assert set(ppo.sample_tokens(logits).tolist()) == {1, 3}


# ---- Invariant 9 -----------------------------------------------------------------------------------------------------
def test_padding_is_not_eos_and_eos_is_learned(world):
    tokenizer, actor, *_ = world
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    *_, reply_ids, mask = ppo.encode(actor, [ppo.Row("I feel sad.", "Oh.", True), ppo.Row("Hi", "Call a friend.", True)])
    last = reply_ids[torch.arange(2), mask.sum(1) - 1]
    assert (last == tokenizer.eos_token_id).all(), "EOS is inside the mask, so the SFT loss and PPO see it"
    actor, cfg = copy.deepcopy(actor), small_config("--max_new_tokens", "30")
    ppo.fit_language_model(actor, [ppo.Row("I feel sad.\n", "Call a friend.", True)], 60, 1e-2, "test", cfg)
    rows, *_ = ppo.sample_replies(actor, ["I feel sad.\n"] * 8, cfg)
    assert rows == [ppo.Row("I feel sad.\n", "Call a friend.", True)] * 8


def test_only_a_reply_that_was_cut_gets_the_penalty():
    rows = [ppo.Row("?", str(i), i % 2 == 0) for i in range(6)]
    assert ppo.rate(lambda prompts, replies, finished: [1.0] * len(prompts), rows, 3.0) == [1.0, -2.0] * 3


def test_a_reply_is_finished_only_by_its_own_eos(world):
    tokenizer, actor, _, prompts = world
    torch.manual_seed(0)
    rows, _, _, reply_ids, mask = ppo.sample_replies(actor, prompts * 20, small_config("--max_new_tokens", "150"))
    for i, row in enumerate(rows):
        tokens = reply_ids[i][mask[i]].tolist()
        assert (tokens[-1] == tokenizer.eos_token_id) == row.finished and tokenizer.eos_token_id not in tokens[:-1]
        assert (reply_ids[i][~mask[i]] == tokenizer.pad_token_id).all()
    assert 0 < sum(row.finished for row in rows) and mask.any(0).all()


# ---- Invariant 10 ----------------------------------------------------------------------------------------------------
def test_dropout_is_off_in_all_models():
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=64, n_layer=2, n_embd=32, n_head=2, resid_pdrop=0.5,
                                    embd_pdrop=0.5, attn_pdrop=0.5, bos_token_id=1, eos_token_id=1)).train()
    batch = random_batch()
    actor, reward_model = ppo.ActorCritic(copy.deepcopy(lm)), ppo.RewardModel(copy.deepcopy(lm))
    for model in (actor, ppo.frozen(actor), reward_model):
        once, twice = model(*batch), model(*batch)
        for a, b in zip(once, twice) if isinstance(once, tuple) else [(once, twice)]:
            assert torch.equal(a, b)


# ---- Invariant 11 ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case,advantage,ratio,moves", [
    (1, 1.0, 1.1, True), (1, 1.0, 0.5, True), (2, 1.0, 1.3, False), (3, -1.0, 0.9, True), (3, -1.0, 1.5, True),
    (4, -1.0, 0.7, False)])
def test_the_four_cases_of_clipping(case, advantage, ratio, moves):
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.ones(1, 1).bool()
    loss, clip_fraction = ppo.policy_loss(log_prob, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, clip_eps=0.2)
    loss.backward()
    assert log_prob.grad.item() == pytest.approx(-advantage * ratio if moves else 0.0, abs=1e-6)
    assert (log_prob.grad.item() != 0) == moves and clip_fraction.item() == float(not moves)


# ---- Invariant 12 ----------------------------------------------------------------------------------------------------
def test_only_the_policy_learns_during_ppo(world):
    tokenizer, actor, reward_model, prompts = world
    policy, reference = copy.deepcopy(actor), ppo.frozen(actor)
    before = [copy.deepcopy(model.state_dict()) for model in (policy, reference, reward_model)]
    splits = {"train": prompts, "validation": prompts[:2]}
    cfg = small_config("--lr", "0.01", "--eval_every", "1")
    ppo.train_ppo(policy, reference, reward_model.score, splits, cfg)
    for name, model, old in zip(("policy", "reference", "reward model"), (policy, reference, reward_model), before):
        same = all(torch.equal(a, b) for a, b in zip(old.values(), model.state_dict().values()))
        assert same == (name != "policy"), name
    assert not any(p.requires_grad for p in reference.parameters())


# ---- Invariant 13 ----------------------------------------------------------------------------------------------------
def test_same_seed_same_metrics_and_init_from_repeats_ppo_exactly(run, tmp_path):
    ppo.main([*TINY, "--out", str(tmp_path / "again")])
    ppo.main([*TINY, "--out", str(tmp_path / "init"), "--init_from", str(run)])
    ppo.main([*TINY, "--out", str(tmp_path / "other"), "--init_from", str(run), "--seed", "1"])
    assert read_metrics(run) == read_metrics(tmp_path / "again") == read_metrics(tmp_path / "init")
    assert read_metrics(run) != read_metrics(tmp_path / "other")
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, tmp_path / "init")]
    assert reports[0]["ppo"] == reports[1]["ppo"] and reports[0]["optimum"] == reports[1]["optimum"]


# ---- The articles' numbers -------------------------------------------------------------------------------------------
def test_article_e_four_tokens_by_hand():
    """S2 to S5 on 天空 | 是 | 蔚蓝色 | 的 with the article's values; the numbers were worked out on paper."""
    mask = torch.ones(1, 5, dtype=torch.float64).bool()
    mask[0, 4] = False  # one column of padding
    values = torch.tensor([[-0.84, 0.88, 1.96, 3.48, 99.0]], dtype=torch.float64)
    log_ratio = torch.tensor([[0.5, -0.2, 0.0, 1.0, 99.0]], dtype=torch.float64)
    score = torch.tensor([4.0], dtype=torch.float64)
    rewards = ppo.token_rewards(log_ratio, torch.zeros_like(log_ratio), score, mask, kl_coef=0.1)
    assert rewards[0].tolist() == pytest.approx([-0.05, 0.02, 0.0, 3.9, 0.0])
    deltas = ppo.td_residuals(rewards, values, mask, gamma=1.0)
    assert deltas[0].tolist() == pytest.approx([1.67, 1.10, 1.52, 0.42, 0.0])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([2.6525, 1.965, 1.73, 0.42, 0.0])
    assert returns[0].tolist() == pytest.approx([1.8125, 2.845, 3.69, 3.9, 0.0])


def test_article_b_value_loss():
    """L8: V = 0.34, then 1.23; the total reward turns out to be 1.87."""
    values, returns = torch.tensor([[0.34, 1.23]]), torch.tensor([[1.87, 1.87]])
    assert ppo.value_loss(values[:, 1:], returns[:, 1:], torch.ones(1, 1).bool()).item() == pytest.approx(0.2048)
    assert ppo.value_loss(values, returns, torch.ones(1, 2).bool()).item() == pytest.approx((1.17045 + 0.2048) / 2)


def test_article_d_clipping_lets_a_probability_grow_by_a_fifth_per_batch():
    """L9: 5% -> 6% -> 7.2% -> 8.6%: climb until the gradient vanishes, then start the next batch from there."""
    probability, stops, mask = 0.05, [], torch.ones(1, 1).bool()
    for _ in range(3):
        old, new = torch.tensor([[math.log(probability)]]), torch.tensor([[math.log(probability)]])
        while True:
            new = new.detach().requires_grad_()
            ppo.policy_loss(new, old, torch.ones(1, 1), mask, clip_eps=0.2)[0].backward()
            if new.grad.item() == 0:
                break
            new = new - 1e-4 * new.grad
        probability = new.exp().item()
        stops.append(probability)
    assert stops == pytest.approx([0.06, 0.072, 0.0864], rel=2e-3)


def test_ranking_loss_is_the_mean_over_all_pairs():
    scores = torch.tensor([[2.0, 0.5, 0.3, -1.0], [0.0, 1.0, 2.0, 3.0]])
    pairs = [math.log(1 + math.exp(row[j] - row[i])) for row in scores.tolist() for i, j in combinations(range(4), 2)]
    assert ppo.ranking_loss(scores).item() == pytest.approx(sum(pairs) / 12, rel=1e-6)
    assert ppo.ranking_loss(scores[:1]) < math.log(2) < ppo.ranking_loss(scores[1:])
    assert ppo.ranking_loss(scores + 7).item() == pytest.approx(ppo.ranking_loss(scores).item(), rel=1e-5)


# ---- Losses and small functions --------------------------------------------------------------------------------------
def test_token_log_probs_and_entropy_are_those_of_the_softmax():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, 5) * 4, torch.randint(5, (2, 3))
    distribution = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(ppo.token_log_probs(logits, tokens), distribution.log_prob(tokens), atol=1e-6)
    assert torch.allclose(ppo.entropy(logits), distribution.entropy(), atol=1e-6)


def test_value_clipping_takes_the_worse_error():
    mask, old = torch.ones(1, 2).bool(), torch.tensor([[0.0, 0.0]])
    values, returns = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
    assert ppo.value_loss(values, returns, mask).item() == pytest.approx(0.5 * (0 + 4) / 2)
    assert ppo.value_loss(values, returns, mask, old, 0.2).item() == pytest.approx(0.5 * (0.64 + 4) / 2)


def test_the_entropy_bonus_raises_entropy_and_nothing_else_moves_the_policy(world):
    tokenizer, actor, _, prompts = world
    actor = copy.deepcopy(actor)
    with torch.no_grad():
        actor.lm.get_output_embeddings().weight.mul_(5)  # a policy with some opinions
    torch.manual_seed(0)
    rollout = ppo.collect_rollout(actor, actor, ppo.human_score, prompts, small_config())
    rollout.advantages.zero_()
    change = {}
    for ent_coef in (0.0, 1.0):
        cfg, policy = small_config("--ent_coef", str(ent_coef), "--ppo_epochs", "5"), copy.deepcopy(actor)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
        entropies = [ppo.update_policy(policy, optimizer, rollout, cfg)["entropy"] for _ in range(3)]
        change[ent_coef] = entropies[2] - entropies[0]
    assert change[1.0] > 0.05 and abs(change[0.0]) < 1e-5


def test_the_critic_learns_the_returns_and_leaves_the_policy_alone(world):
    tokenizer, actor, _, prompts = world
    torch.manual_seed(0)
    rollout = ppo.collect_rollout(actor, actor, ppo.human_score, prompts, small_config())
    rollout.advantages.zero_()
    policy = copy.deepcopy(actor)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    cfg = small_config("--ppo_epochs", "10")
    losses = [ppo.update_policy(policy, optimizer, rollout, cfg)["value_loss"] for _ in range(3)]
    assert losses[2] < 0.5 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(actor.lm.parameters(), policy.lm.parameters()))


def test_the_cached_sampler_draws_from_the_distribution_that_teacher_forcing_reads():
    actor = small_actor()
    prompt_ids, prompt_mask, *_ = random_batch(rows=6)
    torch.manual_seed(0)
    ids, mask = ppo.generate(actor, prompt_ids, prompt_mask, 10, eos_id=1, pad_id=0, temperature=1e-4)  # greedy
    with torch.no_grad():
        logits, _ = actor(prompt_ids, prompt_mask, ids, mask)
    assert torch.equal(logits.argmax(-1)[mask], ids[mask])
    torch.manual_seed(0)
    ids, mask = ppo.generate(actor, prompt_ids, prompt_mask, 10, eos_id=-1, pad_id=0)
    assert mask.all() and ids.shape == (6, 10)


def test_kl_coefficient_follows_its_target():
    assert ppo.adapt_kl_coef(0.1, kl=6, target=3) == pytest.approx(0.102)
    assert ppo.adapt_kl_coef(0.1, kl=1, target=3) == pytest.approx(0.098)
    assert ppo.adapt_kl_coef(0.1, kl=3, target=3) == 0.1


def test_optimum_is_the_best_that_reweighting_the_replies_can_reach():
    scores, beta = torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64), 0.7
    j_star, size = ppo.optimum(scores, beta)
    best = (scores / beta).softmax(1)

    def objective(weights):  # the reference is uniform over the four replies
        return (weights * scores).sum().item() - beta * (weights * (weights * 4).log()).sum().item()

    assert j_star == pytest.approx(objective(best), rel=1e-6) and 1 < size < 4
    torch.manual_seed(0)
    for other in torch.rand(200, 4, dtype=torch.float64):
        assert objective((other / other.sum()).unsqueeze(0)) <= j_star
    assert ppo.optimum(torch.full((3, 9), 2.5), beta) == (pytest.approx(2.5), pytest.approx(9))


def test_win_rate_counts_ties_half():
    assert ppo.win_rate([1.0, 2.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0], 2) == (0.5 + 1) / 2


# ---- The task --------------------------------------------------------------------------------------------------------
def test_held_out_prompts_occur_in_no_training_stage_and_their_words_do():
    splits = ppo.split(ppo.WORLD_PROMPTS)
    assert len(splits["train"]) >= 100 and len(splits["validation"]) == len(splits["test"]) == 20
    assert {ppo.WORLD_PROMPTS[prompt][0] for prompt in splits["train"]} == ppo.WORDS
    assert len(set(sum(splits.values(), []))) == sum(map(len, splits.values())) == 200  # no prompt is in two splits


def test_the_human_prefers_kinds_of_replies_in_the_storys_order():
    rng, means = random.Random(0), {}
    for kind in ppo.SFT_MIX:
        verdicts = [ppo.judge(p, ppo.write_reply(rng, p, kind), True) for p in ppo.split(ppo.WORLD_PROMPTS)["train"]]
        means[kind] = sum(v["human"] for v in verdicts) / len(verdicts)
        if kind == "best":
            assert all(v == {"helpful": 1, "warm": 1, "honest": 1, "harmless": 1, "human": 4} for v in verdicts)
    assert means["best"] > means["practical"] > means["mechanical"] > means["off_topic"] > means["dismissive"]
    prompt, reply = "I feel sad. What can I do?\n", "I am sorry that you feel sad. Take a slow walk."
    assert ppo.judge(prompt, reply, False)["human"] == 3
    assert ppo.judge(prompt, reply.replace("feel sad", "feel tired"), True)["honest"] == 0
    assert ppo.judge(prompt, reply + " Take a slow walk.", True)["human"] == 3
    assert ppo.judge(prompt, "I am sorry that you feel sad. Try a classic.", True)["helpful"] == 0


def test_label_noise_zero_ranks_by_the_human_and_the_reward_model_never_sees_points(world):
    tokenizer, actor, _, prompts = world
    rankings = ppo.label_rankings(actor, prompts, small_config("--label_noise", "0"), random.Random(0))
    for rows in rankings:
        points = ppo.human_score(*zip(*rows))
        assert points == sorted(points, reverse=True)
    assert ppo.Row._fields == ("prompt", "reply", "finished")


def test_the_reward_model_learns_a_ranking_and_normalises_to_zero_and_one(world):
    tokenizer, actor, reward_model, prompts = world
    model, cfg = copy.deepcopy(reward_model).requires_grad_(True), small_config()
    replies = ["Call a friend.", "A spider has eight legs.", "Nobody cares."]
    rankings = [[ppo.Row(p, reply, True) for reply in replies[::2]] for p in prompts]
    rankings += [[ppo.Row(prompts[0], reply, True) for reply in replies]]  # pairs and rankings mixed
    ppo.fit_reward_model(model, rankings, 40, 3e-3, cfg)
    good, bad = model.score(prompts[:1] * 2, replies[::2], [True] * 2)
    assert good > bad + 1
    rows = sum(ppo.sample_groups(actor, prompts, 4, cfg), [])
    for _ in range(2):
        ppo.normalize(model, rows)
        scores = torch.tensor(ppo.rate(model.score, rows))
        assert abs(scores.mean()) < 1e-4 and abs(scores.std() - 1) < 1e-4


# ---- The whole run ---------------------------------------------------------------------------------------------------
def test_a_run_writes_every_file(run):
    report = json.loads((run / "report.json").read_text())
    entries = "helpful warm honest harmless human reward kl objective length finished win_rate".split()
    for name in ("pretrained", "sft", "ppo"):
        assert set(report[name]) == set(entries) and all(math.isfinite(report[name][entry]) for entry in entries)
        rates = "helpful warm honest harmless finished win_rate".split()
        assert all(0 <= report[name][entry] <= 1 for entry in rates)
    assert report["sft"]["kl"] == 0 and report["sft"]["win_rate"] == pytest.approx(0.5)
    assert set(report["optimum"]) == {"objective", "fraction", "effective_sample_size"}
    assert set(report["reward_model"]) == {"accuracy", "correlation"}
    assert set(report["seconds"]) == {"pretrain", "sft", "reward_model", "ppo", "total"}
    rows = read_metrics(run)
    assert [row["cycle"] for row in rows] == ["1", "2", "3"] and [row["episodes"] for row in rows] == ["8", "16", "24"]
    needed = ("reward human kl objective entropy clip_fraction approx_kl policy_loss value_loss explained_variance "
              "reply_length finished lr kl_coef").split()
    assert all(math.isfinite(float(row[name])) for row in rows for name in needed)
    assert float(rows[0]["kl"]) == 0 and float(rows[0]["first_log_ratio"]) < 1e-5
    assert [bool(row["validation"]) for row in rows] == [False, True, True]
    assert json.loads((run / "config.json").read_text())["cycles"] == 3
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json", "metrics.csv", "policy", "pretrain", "report.json", "reward_model", "sft", "state.pt"]


def test_the_saved_models_load_with_transformers_and_with_their_heads(run):
    for name, kind in (("sft", ppo.ActorCritic), ("policy", ppo.ActorCritic), ("reward_model", ppo.RewardModel)):
        lm, tokenizer = AutoModelForCausalLM.from_pretrained(run / name), AutoTokenizer.from_pretrained(run / name)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id == lm.config.eos_token_id
        model, again = (ppo.load_model(kind, run / name, ppo.Config()) for _ in range(2))
        batch = ppo.encode(model, [ppo.Row("I feel sad.\n", "Call a friend.", True)])
        once, twice = model(*batch), again(*batch)
        assert torch.equal(once[0], twice[0])
    assert model.std != 1  # the normalisation was saved too


def test_human_reward_needs_no_reward_model(run, tmp_path):
    ppo.main([*TINY, "--reward", "human", "--init_from", str(run), "--out", str(tmp_path / "rule")])
    report = json.loads((tmp_path / "rule" / "report.json").read_text())
    assert report["reward_model"] == {"accuracy": 1, "correlation": pytest.approx(1)}  # the judge is the human
    assert not (tmp_path / "rule" / "reward_model").exists()
    for row in read_metrics(tmp_path / "rule"):
        cut = 1 - float(row["finished"])
        assert float(row["reward"]) == pytest.approx(float(row["human"]) - cut, abs=1e-4)  # less the EOS penalty


@pytest.mark.parametrize("flags", [
    ["--cycle", "3"], ["--lr", "0"], ["--lr", "fast"], ["--lam", "1.5"], ["--temperature", "0"], ["--clip_eps", "-0.2"],
    ["--batch_size", "10", "--minibatches", "4"], ["--batch_size", "10", "--replies_per_prompt", "3"],
    ["--reward", "nobody"], ["--max_new_tokens", "1000"],
    ["--n_embd", "30", "--n_head", "4"], ["--init_from", "no/such/run"], ["--out", "."], ["--out", "test_ppo_rlhf.py"],
    ["--device", "abacus"], ["--seed", "-1"], ["--lr", "nan"]])
def test_a_wrong_call_says_so_in_one_line(flags, tmp_path):
    here = Path(__file__).parent
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    with pytest.raises(ppo.UserError) as error:
        ppo.main([*TINY, *flags, *out])
    assert "\n" not in str(error.value) and len(str(error.value)) > 10
    assert not (tmp_path / "out").exists() and (here / "test_ppo_rlhf.py").is_file()


def test_the_command_line_exits_with_2_and_one_line():
    script = Path(__file__).with_name("ppo_rlhf.py")
    done = subprocess.run([sys.executable, script, "--gamma", "2"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
