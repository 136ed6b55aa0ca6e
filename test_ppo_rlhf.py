"""What ppo_rlhf.py promises, one test per promise. Run: pytest"""
import copy
import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # no test may wait for a network

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification,
                          GPT2LMHeadModel, LlamaConfig, Qwen2Config)

import ppo_rlhf as ppo

torch.set_num_threads(1)  # the models are so small that threads would only wait for each other
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
    gaps = [[0] * (width - len(s)) for s in sequences]
    rows = [gap * left + s + gap * (not left) for s, gap in zip(sequences, gaps)]
    masks = [gap * left + [1] * len(s) + gap * (not left) for s, gap in zip(sequences, gaps)]
    return torch.tensor(rows), torch.tensor(masks).bool()


def shifted(actor):
    """A frozen copy of the actor with another policy."""
    model = ppo.frozen(actor)
    head = model.lm.get_output_embeddings().weight
    with torch.no_grad():
        head += 0.1 * torch.randn_like(head)
    return model


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
    actor = ppo.base_model(nothing, cfg)
    reward_model = ppo.RewardModel(copy.deepcopy(actor.lm), actor.tokenizer, cfg)
    torch.nn.init.normal_(reward_model.head[-1].weight)
    return actor.tokenizer, actor, reward_model, prompts


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
    actor, reference = copy.deepcopy(actor), shifted(actor)  # were they equal, a ratio to the reference would be 1 too
    rollout = ppo.collect_rollout(actor, reference, ppo.human_score, prompts, cfg)
    assert not torch.allclose(rollout.log_probs, rollout.ref_log_probs)
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
    torch.nn.init.normal_(reward_model.head[-1].weight)
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
    assert torch.equal(rollout.log_probs, rollout.ref_log_probs)


def test_the_reported_kl_is_positive_towards_the_reference(world):
    """KL(pi || ref) = E_pi[log pi - log ref]: with the sign turned it would be negative on average."""
    tokenizer, actor, _, prompts = world
    rollout = ppo.collect_rollout(actor, shifted(actor), ppo.human_score, prompts * 8, small_config())
    metrics = ppo.means(ppo.describe([rollout], 0.1))
    assert metrics["kl"] > 0.1
    assert metrics["objective"] == pytest.approx(metrics["reward"] - 0.1 * metrics["kl"], abs=1e-5)


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
    rows = [ppo.Row("I feel sad.", "Oh.", True), ppo.Row("Hi", "Call a friend.", True)]
    *_, reply_ids, mask = ppo.encode(actor, rows)
    last = reply_ids[torch.arange(2), mask.sum(1) - 1]
    assert (last == tokenizer.eos_token_id).all(), "EOS is inside the mask, so the SFT loss and PPO see it"
    actor, cfg = copy.deepcopy(actor), small_config("--max_new_tokens", "30")
    row = ppo.Row("I feel sad.\n", "Call a friend.", True)
    ppo.minimize(actor, ppo.imitation_loss, [row], 16, 60, 1e-2, "test", cfg)
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
        for _ in range(9999):
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
    tables = [[{"human": x} for x in scores] for scores in ([1.0, 2.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0])]
    assert ppo.win_rate(*tables, 2) == (0.5 + 1) / 2


# ---- The task --------------------------------------------------------------------------------------------------------
def test_held_out_prompts_occur_in_no_training_stage_and_their_words_do():
    splits = ppo.split(ppo.WORLD_PROMPTS)
    assert len(splits["train"]) >= 100 and len(splits["validation"]) == len(splits["test"]) == 15
    assert {ppo.WORLD_PROMPTS[prompt][0] for prompt in splits["train"]} == ppo.WORDS
    assert len(set(sum(splits.values(), []))) == sum(map(len, splits.values())) == 150  # no prompt is in two splits


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
    ppo.minimize(model, ppo.rankings_loss, rankings, 4, 40, 3e-3, "test", cfg)
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
    assert model.head[-1].bias.item() != 0  # `normalize` changed it, and that was saved too


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


# ---- Your own data ---------------------------------------------------------------------------------------------------
def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """Prompts, demonstrations and preferences in Chinese; pairs and rankings mixed, some without a prompt."""
    folder = tmp_path_factory.mktemp("data")
    prompts = [f"我今天很{word}，{ask}\n" for word in "难过 孤单 焦虑 沮丧 紧张".split() for ask in
               ("怎么办？", "你在吗？", "为什么？", "帮帮我。")]
    good, fair, bad = "听你这么说，我很心疼。出去走走吧。", "可以听音乐、运动或者聊天。", "这跟我有什么关系？"
    return {"--prompts": write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in prompts]),
            "--demos": write_jsonl(folder / "demos.jsonl", [{"prompt": p, "completion": fair} for p in prompts]),
            "--preferences": write_jsonl(folder / "preferences.jsonl", [
                {"prompt": p, "chosen": good, "rejected": bad} if i % 3 == 0 else
                {"prompt": p, "ranked": [good, fair, bad]} if i % 3 == 1 else
                {"chosen": p + good, "rejected": p + bad} for i, p in enumerate(prompts)])}


def flags_of(files, *names):
    return [x for name in names for x in (name, files[name])]


def test_own_data_runs_the_whole_pipeline_and_has_no_human(own_files, tmp_path, capsys):
    ppo.main([*TINY, *flags_of(own_files, "--prompts", "--demos", "--preferences"), "--out", str(tmp_path / "run")])
    report, shown = json.loads((tmp_path / "run" / "report.json").read_text()), capsys.readouterr().out
    for name in ("pretrained", "sft", "ppo"):
        assert all(report[name][x] is None for x in "helpful warm honest harmless human win_rate".split())
        assert all(math.isfinite(report[name][x]) for x in "reward kl objective length finished".split())
    assert 0 <= report["reward_model"]["accuracy"] <= 1 and report["reward_model"]["correlation"] is None
    assert {row["human"] for row in read_metrics(tmp_path / "run")} == {""}
    assert "human" not in shown.split("RESULT")[1].split("OPTIMUM")[0] and "nan" not in shown.lower()
    assert "�" not in AutoTokenizer.from_pretrained(tmp_path / "run" / "sft").decode(
        AutoTokenizer.from_pretrained(tmp_path / "run" / "sft")("我今天很难过").input_ids)


@pytest.mark.parametrize("names,stage_texts", [
    (("--prompts",), "world"), (("--preferences",), "own"), (("--demos", "--preferences"), "own")])
def test_each_file_replaces_its_source_and_held_out_prompts_occur_in_no_stage(own_files, names, stage_texts):
    cfg = small_config(*flags_of(own_files, *names))
    own = {flag: ppo.read_jsonl(getattr(cfg, flag), flag) if getattr(cfg, flag) else [] for flag in ppo.REPLIES}
    data = ppo.load_data(own, cfg)
    assert sorted(map(len, data.prompts.values())) == [2, 2, 16]  # of 20 prompts
    held_out = {*data.prompts["validation"], *data.prompts["test"]}
    rows = [*data.texts, *data.demos, *sum(data.rankings, [])]
    assert held_out.isdisjoint(row.prompt for row in rows) and held_out.isdisjoint(data.prompts["train"])
    assert (rows[0].prompt in ppo.WORLD_PROMPTS) == (stage_texts == "world")
    if "--preferences" in names:
        assert len(data.rankings) == 16 and len(data.held_out) == 4 and {len(rows) for rows in data.rankings} == {2, 3}
        assert {row.reply for row in data.demos} == {"可以听音乐、运动或者聊天。" if "--demos" in names else
                                                     "听你这么说，我很心疼。出去走走吧。"}


def test_a_preference_without_prompt_is_split_at_a_word(tmp_path):
    talk = "\n\nHuman: Hello there\n\nAssistant: I"
    path = write_jsonl(tmp_path / "hh.jsonl", [{"chosen": talk + " think so.", "rejected": talk + "t is late."}])
    (rows,) = ppo.read_jsonl(path, "preferences")
    assert rows[0].prompt == rows[1].prompt == "\n\nHuman: Hello there\n\nAssistant: "
    assert [row.reply for row in rows] == ["I think so.", "It is late."]


@pytest.mark.parametrize("room,keep_end,expected", [
    (100, False, "One two three. Four five.\n\nSix seven. Eight nine"), (16, False, "One two three. Four five.\n\n"),
    (8, False, "One two three. "), (4, False, "One two "), (16, True, "Six seven. Eight nine"), (5, True, "Eight nine"),
    (2, True, "nine"), (1, False, "On")])
def test_long_text_is_cut_at_a_paragraph_else_a_sentence_else_a_word(room, keep_end, expected):
    class Words:  # a tokenizer of half words
        def __call__(self, text):
            return type("", (), {"input_ids": [x for word in text.split() for x in (word[:2], word[2:]) if x]})
    assert ppo.cut("One two three. Four five.\n\nSix seven. Eight nine", room, Words(), keep_end) == expected


def test_no_text_is_longer_than_its_room_and_a_cut_reply_has_no_eos(world):
    tokenizer, actor, *_ = world
    rng, cfg = random.Random(0), small_config("--max_new_tokens", "20")
    text = "".join(rng.choice("abc é 天空。\n.! ") for _ in range(4000))
    lines = [[ppo.Row(text[a:1500 + a % 700], text[b:b + rng.randrange(60)] + "x", True) for b in (a + 1, a + 2)]
             for a in range(0, 1500, 40)]
    for rows, old in zip(ppo.shorten(lines, actor, cfg), lines):
        for row, before in zip(rows, old):
            assert len(tokenizer(row.prompt).input_ids) <= 256 - 20 and len(tokenizer(row.reply).input_ids) <= 19
            assert before.prompt.endswith(row.prompt) and before.reply.startswith(row.reply)
            assert row.finished == (row.reply == before.reply)


@pytest.mark.parametrize("flag,text", [
    ("prompts", ""), ("prompts", "hello\n"), ("prompts", "[1]\n"), ("prompts", '{"text": "x"}\n'),
    ("prompts", '{"prompt": 3}\n'), ("prompts", '{"prompt": "a"}\n'), ("prompts", b'{"prompt": "\xff"}\n'),
    ("demos", '{"prompt": "a"}\n'), ("demos", '{"prompt": "a", "completion": ["b"]}\n'),
    ("preferences", '{"prompt": "a", "chosen": "b"}\n'), ("preferences", '{"prompt": "a", "ranked": ["b"]}\n'),
    ("preferences", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n'), ("preferences", '{"ranked": 3}\n'),
    ("preferences", '{"prompt": "a", "ranked": ["b", "b", "c"]}\n')])
def test_a_wrong_data_file_is_named_with_its_line(flag, text, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ppo.UserError, match="data.jsonl|too few"):
        ppo.main([*TINY, f"--{flag}", str(path), "--reward", "human" if flag == "none" else "model",
                  *(["--preferences", str(path)] if flag == "demos" else []), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ---- Rewards ---------------------------------------------------------------------------------------------------------
REWARD = '''
def length(prompts, replies, finished):
    return [len(reply) / 10 for reply in replies]
def nan(prompts, replies, finished):
    return [float("nan")] * len(replies)
def short(prompts, replies, finished):
    return [1.0]
'''


def test_a_function_in_a_file_is_a_reward(run, tmp_path):
    (tmp_path / "my.py").write_text(REWARD)
    ppo.main([*TINY, "--init_from", str(run), "--reward", f"{tmp_path}/my.py:length", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "reward_model").exists()
    assert all(math.isfinite(float(row["reward"])) for row in read_metrics(tmp_path / "run"))
    for function in ("nan", "short", "missing"):
        with pytest.raises(ppo.UserError, match="for the reply '|1 scores for|cannot|is not") as error:
            ppo.main([*TINY, "--init_from", str(run), "--reward", f"{tmp_path}/my.py:{function}",
                      "--out", str(tmp_path / function)])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_with_its_own_tokenizer_is_a_reward(world, labels, tmp_path):
    tokenizer, actor, *_ = world
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_layer=1, n_embd=16,
                                                     n_head=2, num_labels=labels, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(tmp_path / "judge"), tokenizer.save_pretrained(tmp_path / "judge")
    score_fn = ppo.load_reward(small_config("--reward", str(tmp_path / "judge")))
    prompts, replies = ["I feel sad.\n", "Hello\n"], ["Call a friend.", "No."]
    with torch.no_grad():
        expected = [model.eval()(torch.tensor([tokenizer(p + r).input_ids])).logits[0, -1].item()
                    for p, r in zip(prompts, replies)]
    assert score_fn(prompts, replies, [True, True]) == pytest.approx(expected, abs=1e-4)


# ---- Real models -----------------------------------------------------------------------------------------------------
CONFIGS = {"gpt2": lambda **ids: GPT2Config(n_positions=128, n_layer=1, n_embd=32, n_head=2, **ids),
           "llama": lambda **ids: LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, **ids,
                                              num_attention_heads=2, max_position_embeddings=128),
           "qwen2": lambda **ids: Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, **ids,
                                              num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=99)}


def save_foreign_model(folder, architecture, tokenizer, pad):
    """A model as it may come from a hub: padding missing, or the same token as EOS, or neither token there."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else None
    tokenizer.eos_token = None if pad == "neither" else tokenizer.eos_token
    torch.manual_seed(0)
    config = CONFIGS[architecture](vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder), tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("architecture,pad", [("gpt2", "missing"), ("llama", "eos"), ("qwen2", "neither")])
def test_any_causal_language_model_runs_the_whole_pipeline(world, architecture, pad, tmp_path):
    eos = save_foreign_model(tmp_path / "base", architecture, world[0], pad).eos_token
    ppo.main([*TINY, "--model", str(tmp_path / "base"), "--out", str(tmp_path / "run"), "--max_new_tokens", "8"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "policy")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert lm.config.model_type == architecture and lm.config.max_position_embeddings == 128
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.eos_token == (eos or "<eos>")
    assert max(tokenizer.pad_token_id, tokenizer.eos_token_id) < lm.get_input_embeddings().num_embeddings
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == ppo.REAL_MODEL["lr"]
    assert all(float(row["first_log_ratio"]) < 1e-5 for row in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_invariants_of_reading_hold_for_every_architecture(architecture):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIGS[architecture](vocab_size=23, bos_token_id=1, eos_token_id=1,
                                                                pad_token_id=0, initializer_range=0.3))
    actor, (prompt_ids, prompt_mask, reply_ids, mask) = ppo.ActorCritic(lm), random_batch()
    torch.nn.init.normal_(actor.head[-1].weight)
    with torch.no_grad():
        logits, values = actor(prompt_ids, prompt_mask, reply_ids, mask)
        for i, T in enumerate(mask.sum(1).tolist()):  # alone as in the batch
            logits1, values1 = actor(prompt_ids[i:i + 1, prompt_mask[i]], prompt_mask[i:i + 1, prompt_mask[i]],
                                     reply_ids[i:i + 1, :T], mask[i:i + 1, :T])
            assert torch.allclose(logits[i, :T], logits1[0], atol=1e-4)
            assert torch.allclose(values[i, :T], values1[0], atol=1e-4)
        ids, mask = ppo.generate(actor, prompt_ids, prompt_mask, 9, eos_id=1, pad_id=0, temperature=1e-4)  # greedy
        logits, _ = actor(prompt_ids, prompt_mask, ids, mask)  # the cache gives what one pass gives
    assert torch.equal(logits.argmax(-1)[mask], ids[mask])


def test_a_model_that_cannot_be_had_is_one_line_that_says_how_to_go_on(tmp_path):
    for name in ("no-such-org/no-such-model", str(tmp_path)):
        with pytest.raises(ppo.UserError, match="--model tiny") as error:
            ppo.main([*TINY, "--model", name, "--out", str(tmp_path / "out")])
        assert "\n" not in str(error.value) and "local folder" in str(error.value)
    assert not (tmp_path / "out").exists()


# ---- Precision and memory --------------------------------------------------------------------------------------------
def gradients_of_one_update(actor, rollout, cfg):
    actor = copy.deepcopy(actor)
    ppo.update_policy(actor, torch.optim.SGD(actor.parameters(), lr=0.0), rollout, cfg)
    return [p.grad for p in actor.parameters() if p.grad is not None]


@pytest.fixture(scope="module")
def rollout(world):
    """Replies of very different lengths: a mean of means would not be the mean."""
    tokenizer, actor, reward_model, prompts = world
    torch.manual_seed(2)
    cfg = small_config("--max_new_tokens", "30")
    rollout = ppo.collect_rollout(actor, ppo.frozen(actor), reward_model.score, prompts, cfg)
    column = torch.arange(rollout.mask.shape[1])
    rollout.mask &= column < torch.tensor([30, 1, 2, 1, 20, 3, 1, 5]).unsqueeze(1)
    return rollout


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_give_the_gradient_of_the_whole_minibatch(world, rollout, size):
    flags = ["--minibatches", "1", "--ppo_epochs", "1", "--ent_coef", "0.1", "--max_grad_norm", "1e9"]
    whole = gradients_of_one_update(world[1], rollout, small_config(*flags))
    parts = gradients_of_one_update(world[1], rollout, small_config(*flags, "--micro_batch_size", str(size)))
    assert len(whole) == len(parts) and any(x.abs().max() > 1e-3 for x in whole)
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(whole, parts))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_gradient_checkpointing_gives_the_same_gradient_and_dropout_stays_off(architecture):
    torch.manual_seed(0)
    config = CONFIGS[architecture](vocab_size=23, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.5)
    lm, batch, gradients, calls = AutoModelForCausalLM.from_config(config), random_batch(), [], []
    for flags in ([], ["--gradient_checkpointing"]):
        actor = ppo.ActorCritic(copy.deepcopy(lm), cfg=small_config(*flags))
        actor.lm.base_model.register_forward_hook(lambda *_: None)
        layer = next(m for m in actor.lm.modules() if hasattr(m, "gradient_checkpointing") and type(m) is not type(lm)
                     and type(m) is not type(lm.base_model))
        count = []
        list(layer.children())[0].register_forward_hook(lambda *_, count=count: count.append(1))
        ppo.masked_mean(ppo.token_log_probs(actor(*batch)[0], batch[2]), batch[3]).backward()
        gradients.append([p.grad for p in actor.lm.parameters()]), calls.append(len(count))
        with torch.no_grad():
            ids, mask = ppo.generate(actor, *batch[:2], 5, eos_id=-1, pad_id=0, temperature=1e-4)
            assert torch.equal(actor(*batch[:2], ids, mask)[0].argmax(-1), ids)  # the cache still works
    assert calls == [1, 2]  # recomputed once in the backward pass
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_bfloat16_reaches_the_language_model_only(world, rollout):
    actor = copy.deepcopy(world[1])
    actor.cfg = small_config()
    exact = ppo.read_replies(world[1], rollout.batch, 0.7)[0]
    assert torch.equal(ppo.read_replies(actor, rollout.batch, 0.7)[0], exact)
    actor.cfg.device = "cuda"  # the tensors are on the CPU: it does what a GPU would do
    seen = []
    last_layer = list(actor.lm.base_model.children())[-1]
    last_layer.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].dtype))
    actor.lm.get_output_embeddings().register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    log_probs, values, logits = ppo.read_replies(actor, rollout.batch, 0.7)
    assert torch.bfloat16 in seen and {log_probs.dtype, values.dtype, logits.dtype} == {torch.float32}
    difference = (log_probs - exact)[rollout.mask].abs().max()
    assert 0 < difference < 0.1


# ---- Several processes -----------------------------------------------------------------------------------------------
WORKER = '''
import pathlib, sys, torch
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
import ppo_rlhf as ppo
folder = pathlib.Path(sys.argv[2])
cfg, rollout = torch.load(folder / "rollout.pt", weights_only=False)
ppo.join_processes(cfg)
actor = ppo.load_model(ppo.ActorCritic, folder / "actor", cfg)
part = ppo.Rollout(**{name: ppo.share(x) for name, x in vars(rollout).items()})
ppo.update_policy(actor, torch.optim.SGD(actor.parameters(), lr=0.0), part, cfg)
white = ppo.whiten(part.advantages, part.mask)
texts = ppo.gather([row.reply for row in part.rows])
grads = [p.grad for p in actor.parameters() if p.grad is not None]
rows = [ppo.Row("I feel sad.\\n", "Call a friend" + "!" * n, True) for n in range(9)]
ppo.minimize(actor, ppo.imitation_loss, rows, 16, 3, 1e-2, "test", cfg)
torch.save({"grads": grads, "white": white, "texts": texts, "weights": [*actor.parameters()],
            "variance": ppo.moments(part.returns, part.mask)[1]}, f"{sys.argv[3]}-{ppo.RANK}.pt")
ppo.leave_processes()
'''


def launch(processes, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
                           "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *map(str, command)],
                          capture_output=True, text=True, env=environment, timeout=120)


def test_two_processes_compute_what_one_computes(world, rollout, tmp_path):
    cfg = small_config("--minibatches", "1", "--ppo_epochs", "1", "--max_grad_norm", "1e9")
    torch.save((cfg, rollout), tmp_path / "rollout.pt"), ppo.save_model(world[1], tmp_path / "actor")
    (tmp_path / "worker.py").write_text(WORKER)
    results = {}
    for processes in (1, 2):
        done = launch(processes, tmp_path / "worker.py", Path(__file__).parent, tmp_path,
                      tmp_path / f"out{processes}")
        assert done.returncode == 0, done.stderr[-2000:]
        results[processes] = [torch.load(tmp_path / f"out{processes}-{rank}.pt") for rank in range(processes)]
    (one,), two = results[1], results[2]
    assert one["texts"] == two[0]["texts"] == two[1]["texts"] == [row.reply for row in rollout.rows]
    assert torch.allclose(one["white"], torch.cat([x["white"] for x in two]), atol=1e-5)
    for other in two:
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(one["grads"], other["grads"]))
        # Adam blows up rounding
        assert all((a - b).abs().mean() < 1e-4 for a, b in zip(one["weights"], other["weights"]))
        assert other["variance"] == pytest.approx(one["variance"], rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(two[0]["weights"], two[1]["weights"]))


def test_a_run_with_two_processes_writes_one_folder_and_speaks_once(tmp_path):
    script = Path(__file__).with_name("ppo_rlhf.py")
    done = launch(2, script, *TINY, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("RESULT on") == 1 and len(read_metrics(tmp_path / "run")) == 3
    assert {row["episodes"] for row in read_metrics(tmp_path / "run")} == {"8", "16", "24"}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["sft"]["win_rate"] == pytest.approx(0.5)


# ---- Stop and go on --------------------------------------------------------------------------------------------------
class Killed(BaseException):
    """Nobody can catch this by accident."""


def same_results(a, b):
    assert read_metrics(a) == read_metrics(b)
    for name in ("pretrain", "sft", "reward_model", "policy"):
        for file in ("model.safetensors", "heads.safetensors"):
            assert (a / name / file).read_bytes() == (b / name / file).read_bytes(), (name, file)


@pytest.mark.parametrize("save,half_written", [(1, False), (2, True), (4, False), (7, True), (9, False), (11, True)])
def test_a_run_killed_while_saving_and_resumed_ends_as_if_not(run, save, half_written, tmp_path, monkeypatch):
    """With --save_every 1, the six saves are three stages' folders and states, and the cycles' states and metrics."""
    replace, count = os.replace, [0]

    def die(source, target):
        count[0] += 1
        if count[0] == save:
            if half_written and Path(source).is_file():
                Path(source).write_bytes(Path(source).read_bytes()[:100])
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Killed):
        ppo.main([*TINY, "--save_every", "1", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(os, "replace", replace)
    ppo.main(["--resume", str(tmp_path / "run")])
    same_results(run, tmp_path / "run")


@pytest.mark.parametrize("stage,step", [("pretraining", 2), ("reward model", 4), ("PPO", 1)])
def test_ctrl_c_saves_and_the_resumed_run_ends_like_one_never_stopped(run, stage, step, tmp_path, monkeypatch):
    rng_of = ppo.stage_rng

    def press(cfg, name):
        if name == f"{stage} {step}":
            signal.raise_signal(signal.SIGINT)
        return rng_of(cfg, name)

    monkeypatch.setattr(ppo, "stage_rng", press)
    with pytest.raises(KeyboardInterrupt):
        ppo.main([*TINY, "--out", str(tmp_path / "run")])
    monkeypatch.setattr(ppo, "stage_rng", rng_of)
    assert f"--resume {tmp_path / 'run'}" in ppo.STOP[0]
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert (state["stage"], state["step"]) == (stage, step + 1)
    ppo.STOP.clear()
    ppo.main(["--resume", str(tmp_path / "run")])
    same_results(run, tmp_path / "run")


def test_a_damaged_or_foreign_state_is_one_line_and_nothing_is_overwritten(run, tmp_path):
    def copy_of_run(name):
        shutil.copytree(run, tmp_path / name)
        return tmp_path / name

    def snapshot(folder):
        return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    cut, foreign, model, settings = (copy_of_run(name) for name in ("cut", "foreign", "model", "settings"))
    (cut / "state.pt").write_bytes((cut / "state.pt").read_bytes()[:1000])
    torch.save({"stage": "PPO", "weights": [1]}, foreign / "state.pt")
    (model / "sft" / "model.safetensors").write_bytes(b"junk")
    (settings / "config.json").write_text("{}")
    for folder in (cut, foreign, model, settings, tmp_path):
        before = snapshot(folder)
        with pytest.raises(ppo.UserError) as error:
            ppo.main(["--resume", str(folder)])
        assert "\n" not in str(error.value) and snapshot(folder) == before
    with pytest.raises(ppo.UserError, match="own settings"):
        ppo.main(["--resume", str(run), "--cycles", "9"])


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_cycle(run, tmp_path, monkeypatch):
    loss, calls = ppo.policy_loss, []

    def explode(*args):
        calls.append(1)
        value, clipped = loss(*args)
        return (value * NAN if len(calls) == 12 else value), clipped  # 8 updates per cycle: in the second

    monkeypatch.setattr(ppo, "policy_loss", explode)
    with pytest.raises(ppo.UserError, match="cycle 2"):
        ppo.main([*TINY, "--init_from", str(run), "--save_every", "1", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(ppo, "policy_loss", loss)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == 1 and all(x.isfinite().all() for x in state["actor"].values())
    ppo.main(["--resume", str(tmp_path / "run")])
    same_results(run, tmp_path / "run")


def test_a_full_disk_is_one_line_and_the_last_save_stays(run, tmp_path, monkeypatch):
    save = torch.save

    def full(state, path):
        if state["step"] == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ppo.UserError, match="No space left"):
        ppo.main([*TINY, "--init_from", str(run), "--save_every", "1", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(torch, "save", save)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 1
    ppo.main(["--resume", str(tmp_path / "run")])
    same_results(run, tmp_path / "run")


def test_ctrl_c_on_the_command_line_exits_with_130_and_the_command_to_go_on(run, tmp_path):
    script, out = Path(__file__).with_name("ppo_rlhf.py"), tmp_path / "run"
    process = subprocess.Popen([sys.executable, script, *TINY, "--cycles", "1000", "--init_from", run, "--out", out],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume {out}" in shown and errors == ""
    assert len(read_metrics(out)) == torch.load(out / "state.pt", weights_only=True)["step"] > 0
