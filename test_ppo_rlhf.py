"""What ppo_rlhf.py promises, one test per promise. Run: pytest"""
import copy
import csv
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # no test may wait for a network

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification,
                          GPT2LMHeadModel, Lfm2Config, LlamaConfig, OPTConfig, PreTrainedTokenizerFast, Qwen2Config)
from transformers.modeling_layers import GradientCheckpointingLayer

import ppo_rlhf as ppo

HERE = Path(__file__).parent
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="more of the same; run all: SLOW=1 pytest")
torch.set_num_threads(1)  # the models are so small that threads would only wait for each other
NAN = float("nan")
NOTHING = {"prompts": [], "demos": [], "preferences": []}  # no data of one's own
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
    actor = ppo.base_model(NOTHING, cfg)
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


def test_the_sampler_cuts_no_tail_off_a_large_vocabulary():
    torch.manual_seed(0)
    logits = torch.linspace(0, -4, 500).repeat(20_000, 1)  # top-k or top-p would never draw the last ones
    expected = 20_000 * logits[0].softmax(dim=0)
    counts = torch.bincount(ppo.sample_tokens(logits), minlength=500)
    assert ((counts - expected) ** 2 / expected).sum() < 500 + 5 * 1000 ** 0.5  # chi squared: mean 499, variance 998


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


def test_a_reply_sampled_in_the_middle_of_characters_still_fits_into_the_model(world, monkeypatch):
    """Half a character becomes U+FFFD as text, three bytes: encoded again, the reply is longer than it was sampled."""
    tokenizer, actor, reward_model, prompts = world
    half = tokenizer("é").input_ids[0]
    reply = tokenizer.decode([half] * 32)
    assert len(tokenizer(reply).input_ids) > 32
    for finished in (True, False):
        reply_ids, mask = ppo.encode(reward_model, [ppo.Row(prompts[0], reply, finished)])[2:]
        assert mask.sum() == reward_model.cfg.max_new_tokens
        assert reply_ids[0, -1] != tokenizer.eos_token_id
    row = ppo.Row(prompts[0], "one two three four five six seven eight nine", True)
    for room in range(2, 30):
        monkeypatch.setattr(actor, "cfg", ppo.replace(actor.cfg, max_new_tokens=room))
        reply_ids, mask = ppo.encode(actor, [row])[2:]
        whole = len(tokenizer(row.reply).input_ids) < room
        assert (reply_ids[0, -1] == tokenizer.eos_token_id) == whole, "EOS in mid-sentence teaches to stop there"


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
    assert len(splits["train"]) >= 100 and len(splits["validation"]) == len(splits["test"]) == 14
    assert {ppo.WORLD_PROMPTS[prompt][0] for prompt in splits["train"]} == ppo.WORDS
    assert len(set(sum(splits.values(), []))) == sum(map(len, splits.values())) == 150  # no prompt is in two splits


def test_every_word_and_every_way_to_ask_keeps_most_of_its_prompts_for_training():
    splits = ppo.split(ppo.WORLD_PROMPTS)
    held_out = splits["test"] + splits["validation"]
    words = Counter(ppo.WORLD_PROMPTS[prompt][0] for prompt in held_out)
    asks = Counter(prompt.replace(ppo.WORLD_PROMPTS[prompt][0], "{}") for prompt in held_out)
    assert max(words.values()) == 1 and max(asks.values()) == 2 and len(asks) == 15  # of 5 and of 10


def test_split_counts_a_prompt_once_wherever_it_stands_and_needs_no_dice():
    prompts = [str(i) for i in range(30)]
    splits = ppo.split(prompts + prompts[::-1])
    assert splits == ppo.split(prompts)
    assert splits["test"] == ["0", "11", "22"] and splits["validation"] == ["5", "16", "27"]
    assert sorted(sum(splits.values(), []), key=int) == prompts


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
    ppo.minimize(model, ppo.reward_model_loss, rankings, 4, 40, 3e-3, "test", cfg)
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


# ---- Your own data ---------------------------------------------------------------------------------------------------
def jsonl(*lines):
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write_jsonl(path, lines):
    path.write_text(jsonl(*lines), encoding="utf-8")
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


# ---- Rewards ---------------------------------------------------------------------------------------------------------
REWARD = '''
def length(prompts, replies, finished):
    return [len(reply) / 10 for reply in replies]
'''


def test_a_function_in_a_file_is_a_reward(run, tmp_path):
    (tmp_path / "my.py").write_text(REWARD)
    ppo.main([*TINY, "--init_from", str(run), "--reward", f"{tmp_path}/my.py:length", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "reward_model").exists()
    assert all(math.isfinite(float(row["reward"])) for row in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_with_its_own_tokenizer_is_a_reward(world, labels, tmp_path):
    tokenizer, actor, *_ = world
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_layer=1, n_embd=16,
                                                     n_head=2, num_labels=labels, pad_token_id=tokenizer.pad_token_id))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 64
    model.save_pretrained(tmp_path / "judge"), tokenizer.save_pretrained(tmp_path / "judge")
    score_fn = ppo.load_reward(small_config("--reward", str(tmp_path / "judge")))
    prompts, replies = ["I feel sad.\n", "Hello\n", "Hello " * 99 + "\n"], ["Call a friend.", "No.", "No."]
    with torch.no_grad():  # of a text that is too long, the end: there is the reply
        expected = [model.eval()(torch.tensor([tokenizer(p + r).input_ids[-64:]])).logits[0, -1].item()
                    for p, r in zip(prompts, replies)]
    assert score_fn(prompts, replies, [True, True, True]) == pytest.approx(expected, abs=1e-4)


# ---- Real models -----------------------------------------------------------------------------------------------------
CONFIGS = {"gpt2": lambda **ids: GPT2Config(n_positions=128, n_layer=1, n_embd=32, n_head=2, **ids),
           "llama": lambda **ids: LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, **ids,
                                              num_attention_heads=2, max_position_embeddings=128),
           "qwen2": lambda **ids: Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, **ids,
                                              num_attention_heads=2, num_key_value_heads=1,
                                              max_position_embeddings=128),
           "opt": lambda **ids: OPTConfig(hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
                                          num_attention_heads=2, max_position_embeddings=128, dropout=0.5, **ids),
           "lfm2": lambda **ids: Lfm2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, **ids,
                                            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
                                            layer_types=["conv", "full_attention"])}


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


def test_a_tokenizer_that_ends_prompts_is_refused(world, tmp_path):
    tokenizer = save_foreign_model(tmp_path, "llama", world[0], "missing")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<eos>", pad_token="<pad>")
    for ends in (False, True):
        if ends:
            tokenizer._tokenizer.post_processor = TemplateProcessing(
                single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)])
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ppo.UserError, match="ends prompts") if ends else nullcontext():
            ppo.load_pretrained(tmp_path)


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
        layer = next(m for m in actor.lm.modules() if isinstance(m, GradientCheckpointingLayer))
        count = []
        list(layer.children())[0].register_forward_hook(lambda *_, count=count: count.append(1))
        ppo.masked_mean(ppo.token_log_probs(actor(*batch)[0], batch[2]), batch[3]).backward()
        gradients.append([p.grad for p in actor.lm.parameters()]), calls.append(len(count))
        with torch.no_grad():
            ids, mask = ppo.generate(actor, *batch[:2], 5, eos_id=-1, pad_id=0, temperature=1e-4)
            assert torch.equal(actor(*batch[:2], ids, mask)[0].argmax(-1), ids)  # the cache still works
    assert calls == [1, 2]  # recomputed once in the backward pass
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_fast_products_are_float32_and_leave_no_trace():
    def state():
        return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.flash_sdp_enabled()

    torch.manual_seed(0)
    a, b, before = torch.randn(300, 400), torch.randn(400, 200), state()
    with pytest.raises(KeyError), ppo.fast_products():
        error = (a @ b - a.double() @ b.double()).abs().max()
        raise KeyError
    assert error < 1e-3  # float32: 6e-5; rounded to bfloat16: 0.2
    assert state() == before


@pytest.mark.parametrize("cpu, gpu, wanted", [
    ({"cpu_name": "AMD EPYC", "avx512_f": True}, False, True),
    ({"cpu_name": "AMD EPYC", "avx512_f": True}, True, False),
    ({"cpu_name": "AMD EPYC", "avx512_f": False}, False, False),
    ({"architecture": "aarch64"}, False, False),
    ({"cpu_name": "Intel Xeon", "avx512_f": True}, False, False)])
def test_only_amd_processors_with_avx512_get_fast_products(cpu, gpu, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    with ppo.fast_products():
        assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == wanted
        assert torch.backends.cuda.flash_sdp_enabled() != wanted
        assert (os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE") == wanted


@pytest.mark.parametrize("architecture", CONFIGS)
def test_fast_products_give_the_same_gradient(architecture):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIGS[architecture](vocab_size=23, bos_token_id=1, eos_token_id=1,
                                                                pad_token_id=0))
    batch, gradients = random_batch(), []
    for context in nullcontext(), ppo.fast_products():
        actor = ppo.ActorCritic(copy.deepcopy(lm))
        with context:
            ppo.masked_mean(ppo.token_log_probs(actor(*batch)[0], batch[2]), batch[3]).backward()
        gradients.append([p.grad for p in actor.lm.parameters()])
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
fresh = ppo.base_model({flag: [] for flag in ppo.REPLIES}, cfg)
judge = ppo.RewardModel(ppo.frozen(fresh).lm, fresh.tokenizer, cfg)
fresh = [x.clone() for x in (*fresh.parameters(), *judge.parameters())]
actor = ppo.load_model(ppo.ActorCritic, folder / "actor", cfg)
part = ppo.Rollout(**{name: ppo.share(x) for name, x in vars(rollout).items()})
ppo.update_policy(actor, torch.optim.SGD(actor.parameters(), lr=0.0), part, cfg)
white = ppo.whiten(part.advantages, part.mask)
texts = ppo.gather([row.reply for row in part.rows])
grads = [p.grad for p in actor.parameters() if p.grad is not None]
rows = [ppo.Row("I feel sad.\\n", "Call a friend" + "!" * n, True) for n in range(9)]
ppo.minimize(actor, ppo.imitation_loss, rows, 16, 3, 1e-2, "test", cfg)
torch.save({"fresh": fresh, "grads": grads, "white": white, "texts": texts, "weights": [*actor.parameters()],
            "variance": ppo.moments(part.returns, part.mask)[1]}, f"{sys.argv[3]}-{ppo.RANK}.pt")
ppo.leave_processes()
'''


def launch(processes, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0",
                "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"] * (processes > 1)
    return subprocess.run([sys.executable, *torchrun, *map(str, command)], capture_output=True, text=True,
                          env=environment, timeout=120)


@pytest.fixture(scope="module")
def workers(world, rollout, tmp_path_factory):
    """What WORKER saves: alone, and in each of two processes."""
    folder, results = tmp_path_factory.mktemp("workers"), {}
    cfg = small_config("--minibatches", "1", "--ppo_epochs", "1", "--max_grad_norm", "1e9")
    torch.save((cfg, rollout), folder / "rollout.pt"), ppo.save_model(world[1], folder / "actor")
    (folder / "worker.py").write_text(WORKER)
    for processes in (1, 2):
        done = launch(processes, folder / "worker.py", HERE, folder, folder / f"out{processes}")
        assert done.returncode == 0, done.stderr[-2000:]
        results[processes] = [torch.load(folder / f"out{processes}-{rank}.pt") for rank in range(processes)]
    return results[1][0], results[2]


def test_two_processes_compute_what_one_computes(world, workers, rollout):
    one, two = workers
    assert one["texts"] == two[0]["texts"] == two[1]["texts"] == [row.reply for row in rollout.rows]
    assert torch.allclose(one["white"], torch.cat([x["white"] for x in two]), atol=1e-5)
    for other in two:
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(one["grads"], other["grads"]))
        for (name, _), *weights in zip(world[1].named_parameters(), one["weights"], other["weights"]):
            if name.endswith("c_attn.bias"):  # the keys' has no gradient but rounding, and Adam blows that up
                weights = [torch.cat(x.chunk(3)[::2]) for x in weights]  # queries and values
            assert (weights[0] - weights[1]).abs().mean() < 1e-6, name
        assert other["variance"] == pytest.approx(one["variance"], rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(two[0]["weights"], two[1]["weights"]))


def test_all_processes_begin_with_the_same_weights(workers):
    assert all(map(torch.equal, *(worker["fresh"] for worker in workers[1])))


def test_a_run_with_two_processes_writes_one_folder_and_speaks_once(tmp_path):
    script = HERE / "ppo_rlhf.py"
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


@pytest.mark.parametrize("save,half_written", [(3, True), (8, True), (10, False), *(
    pytest.param(*case, marks=slow) for case in ((2, False), (5, False), (12, True)))])
def test_a_run_killed_while_saving_and_resumed_ends_as_if_not(run, save, half_written, tmp_path, monkeypatch):
    """With --save_every 1, after config.json come each stage's state and folder, and the cycles' metrics and states."""
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


def test_a_resumed_run_remembers_the_best_policy_from_before_the_stop(run, tmp_path, monkeypatch):
    objectives, evaluate = iter([2.0, 1.0]), ppo.evaluate

    def worse_and_worse(actor, reference, score_fn, prompts, *rest):
        table = evaluate(actor, reference, score_fn, prompts, *rest)
        if set(prompts) == set(ppo.split(ppo.WORLD_PROMPTS)["validation"]):
            table = [line | {"objective": value} for value in [next(objectives)] for line in table]
            ppo.STOP.append("after the first validation")
        return table

    monkeypatch.setattr(ppo, "evaluate", worse_and_worse)
    with pytest.raises(KeyboardInterrupt):
        ppo.main([*TINY, "--init_from", str(run), "--out", str(tmp_path / "run")])
    best = torch.load(tmp_path / "run/state.pt", weights_only=True)["actor"]
    ppo.STOP.clear()
    with pytest.raises(KeyboardInterrupt):  # after the second validation, that of the last cycle
        ppo.main(["--resume", str(tmp_path / "run")])
    ppo.STOP.clear()
    ppo.main(["--resume", str(tmp_path / "run")])
    kept = ppo.load_model(ppo.ActorCritic, tmp_path / "run/policy", small_config())
    assert all(torch.equal(best[name], tensor) for name, tensor in kept.state_dict().items())


@pytest.mark.parametrize("stage,step", [pytest.param("pretraining", 2, marks=slow), ("reward model", 4), ("PPO", 1)])
def test_ctrl_c_saves_and_the_resumed_run_ends_like_one_never_stopped(run, stage, step, tmp_path, monkeypatch):
    rng_of = ppo.reseed

    def press(cfg, name):
        if name == f"{stage} {step}":
            signal.raise_signal(signal.SIGINT)
        return rng_of(cfg, name)

    monkeypatch.setattr(ppo, "reseed", press)
    with pytest.raises(KeyboardInterrupt):
        ppo.main([*TINY, "--out", str(tmp_path / "run")])
    monkeypatch.setattr(ppo, "reseed", rng_of)
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
    with pytest.raises(ppo.UserError, match="leave it out"):
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
    script, out = HERE / "ppo_rlhf.py", tmp_path / "run"
    process = subprocess.Popen([sys.executable, script, *TINY, "--cycles", "1000", "--init_from", run, "--out", out],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume {out}" in shown and errors == ""
    assert len(read_metrics(out)) == torch.load(out / "state.pt", weights_only=True)["step"] > 0


HELD_OUT = {*ppo.split(ppo.WORLD_PROMPTS)["validation"], *ppo.split(ppo.WORLD_PROMPTS)["test"]}


def test_no_text_of_the_built_in_stages_has_a_held_out_prompt(monkeypatch):
    seen, train = [], ppo.train_tokenizer
    monkeypatch.setattr(ppo, "train_tokenizer", lambda texts: seen.extend(texts) or train(texts))
    ppo.base_model(NOTHING, small_config())
    data = ppo.load_data(NOTHING, small_config())
    assert len(seen) > 1000 and HELD_OUT.isdisjoint(seen)
    for rows in (data.texts, data.demos):
        assert len(rows) > 1000 and HELD_OUT.isdisjoint(row.prompt for row in rows)


def test_a_reply_that_also_speaks_of_another_topic_is_not_honest():
    prompt, reply = "I feel sad. What can I do?\n", "I am sorry that you feel sad. Take a slow walk."
    assert ppo.judge(prompt, reply, True)["honest"] == 1
    assert ppo.judge(prompt, reply + " For chess, you can use books or videos.", True)["honest"] == 0


def test_sft_texts_are_mostly_mechanical_and_rarely_rude():
    data, share = ppo.load_data(NOTHING, small_config()), {}
    for name in ("texts", "demos"):
        rows = getattr(data, name)
        share[name] = [sum(any(x in row.reply for x in ppo.sentences(row.prompt)[kind]) for row in rows) / len(rows)
                       for kind in ("list", "dismissive")]
    assert share["texts"] == pytest.approx([0.25, 0.20], abs=0.02)
    assert share["demos"] == pytest.approx([0.47, 0.07], abs=0.02)


def test_every_stage_trains_a_model_of_its_own(world):
    tokenizer, actor, *_ = world
    before, cfg, data = copy.deepcopy(actor.state_dict()), small_config(), ppo.load_data(NOTHING, small_config())
    sft = ppo.finetune(actor, data.demos, cfg)
    ppo.train_reward_model(actor, data, cfg)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), actor.state_dict().values()))
    assert not all(torch.equal(a, b) for a, b in zip(before.values(), sft.state_dict().values()))


def test_stage_two_does_not_depend_on_what_was_drawn_before(world):
    """A run that resumes in stage 2 has loaded the SFT model, not trained it: other random numbers came before."""
    rankings = [[ppo.Row(prompt, reply, True) for reply in ("Call a friend.", "No.")] for prompt in world[3]]
    data, weights = ppo.load_data(NOTHING, small_config())._replace(rankings=rankings), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights.append(ppo.train_reward_model(world[1], data, small_config()).state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_every_stage_samples_replies_to_its_own_prompts_only(tmp_path, monkeypatch):
    seen, now, reseed, sample = {}, [], ppo.reseed, ppo.sample_replies
    monkeypatch.setattr(ppo, "reseed", lambda cfg, stage: now.append(stage) or reseed(cfg, stage))
    monkeypatch.setattr(ppo, "sample_replies", lambda actor, prompts, cfg:
                        seen.setdefault(now[-1], []).extend(prompts) or sample(actor, prompts, cfg))
    # 32 prompts in 2 cycles: were they drawn from all, the chance that none is held out would be 1 in 700
    ppo.main([*TINY, "--batch_size", "32", "--replies_per_prompt", "2", "--out", str(tmp_path / "run")])
    splits = {name: set(prompts) for name, prompts in ppo.split(ppo.WORLD_PROMPTS).items()}
    wanted = {"rankings": "train", "normalization": "train", "reward model quality": "validation", "PPO 0": "train",
              "PPO 1": "train", "validation": "validation", "report": "test"}
    for stage, name in wanted.items():
        assert set(seen[stage]) <= splits[name], stage
    first = seen["PPO 0"]
    assert len(first) == 32 and first[::2] == first[1::2] and len(set(first)) > 1 and seen["PPO 1"] != first
    assert set(seen["validation"]) == splits["validation"] and now.count("validation") == 2 and len(seen) == 8


def test_the_reference_of_a_run_stays_behind_when_the_policy_moves(run):
    assert all(float(row["kl"]) != 0 for row in read_metrics(run)[1:])
    assert json.loads((run / "report.json").read_text())["ppo"]["kl"] != 0


@pytest.mark.parametrize("last, kept", [([2.0, 2.0], 1), ([2.4, 2.6], 1), ([1.0, 4.0], 2), ([3.0, 3.0], 2)])
def test_ppo_keeps_the_policy_that_validated_best_and_the_later_one_if_that_may_be_luck(world, monkeypatch, last, kept):
    tokenizer, actor, _, prompts = world
    actor, weights, given = copy.deepcopy(actor), [], []

    def evaluate(actor, reference, score_fn, prompts, *_):
        weights.append(copy.deepcopy(actor.state_dict())), given.append(prompts)
        return [{"objective": x} for x in ([1.0, 1.0], [3.0, 3.0], last)[len(weights) - 1]]

    monkeypatch.setattr(ppo, "evaluate", evaluate)
    splits = {"train": prompts[:4], "validation": prompts[4:]}
    log = ppo.train_ppo(actor, ppo.frozen(actor), ppo.human_score, splits, small_config("--eval_every", "1"))
    same = [all(torch.equal(a, b) for a, b in zip(old.values(), actor.state_dict().values())) for old in weights]
    assert same == [i == kept for i in range(3)] and given == [prompts[4:]] * 3
    assert [row["validation"] for row in log] == [1.0, 3.0, sum(last) / 2]


def test_ppo_validates_every_so_many_cycles_and_at_the_end(world):
    tokenizer, actor, _, prompts = world
    splits, cfg = {"train": prompts[:4], "validation": prompts[4:]}, small_config("--eval_every", "2")
    log = ppo.train_ppo(copy.deepcopy(actor), ppo.frozen(actor), ppo.human_score, splits, cfg)
    assert [row["validation"] == row["validation"] for row in log] == [False, True, True]


@pytest.mark.parametrize("gradients, furthest", [([1e-4] * 300 + [1.0], 1.0), ([1e-8] * 300, 0.01)],
                         ids=["rare large", "rounding"])
def test_such_gradients_move_no_weight_of_the_policy_far(gradients, furthest, world, monkeypatch):
    optimizers, descend = [], ppo.descend
    monkeypatch.setattr(ppo, "descend", lambda model, optimizer, *args:
                        optimizers.append(optimizer) or descend(model, optimizer, *args))
    splits = {"train": world[3][:4], "validation": world[3][4:]}
    ppo.train_ppo(copy.deepcopy(world[1]), ppo.frozen(world[1]), ppo.human_score, splits, small_config("--cycles", "1"))
    for group in optimizers[0].param_groups:
        weight = torch.zeros(1, requires_grad=True)
        optimizer = type(optimizers[0])([group | {"params": [weight], "lr": 0.1}])
        for gradient in gradients:
            before, weight.grad = weight.item(), torch.tensor([gradient])
            optimizer.step()
        assert 0 < before - weight.item() < furthest * 0.1


def test_learning_rates_follow_their_schedules(world, monkeypatch):
    rates, descend = [], ppo.descend
    monkeypatch.setattr(ppo, "descend", lambda model, optimizer, *args:
                        rates.append([g["lr"] for g in optimizer.param_groups]) or descend(model, optimizer, *args))
    tokenizer, actor, _, prompts = world
    rows = [ppo.Row("I feel sad.\n", "Call a friend.", True)]
    ppo.minimize(copy.deepcopy(actor), ppo.imitation_loss, rows, 2, 20, 0.1, "test", small_config())
    (first, *_), (second, *_), (third, *_), *_, (last, *_) = rates
    assert (first, second, third) == pytest.approx((0, 0.05, 0.1)) and 0 < last < 0.001
    rates.clear()
    cfg = small_config("--lr", "0.01", "--cycles", "4", "--ppo_epochs", "1", "--minibatches", "1")
    log = ppo.train_ppo(copy.deepcopy(actor), ppo.frozen(actor), ppo.human_score,
                        {"train": prompts, "validation": prompts[:1]}, cfg)
    assert [row["lr"] for row in log] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert rates == [pytest.approx([row["lr"], 10 * row["lr"]]) for row in log]  # the critic learns faster


def test_beta_adapts_step_by_step_and_phase_one_uses_it(world, monkeypatch):
    tokenizer, actor, _, prompts = world
    betas, rewards_of = [], ppo.token_rewards
    monkeypatch.setattr(ppo, "token_rewards", lambda *args: betas.append(args[4]) or rewards_of(*args))
    splits = {"train": prompts, "validation": prompts[:1]}
    cfg = small_config("--kl_coef", "0.3", "--kl_target", "1e-6", "--cycles", "4", "--eval_every", "9", "--lr", "0.01")
    log = ppo.train_ppo(copy.deepcopy(actor), shifted(actor), ppo.human_score, splits, cfg)
    kls, expected = [row["kl"] for row in log], [0.3]
    for kl in kls[:-1]:
        expected.append(expected[-1] * (1.02 if kl > 0 else 0.98))
    assert [row["kl_coef"] for row in log] == pytest.approx(expected) and betas[:4] == pytest.approx(expected)
    cfg = small_config("--kl_coef", "0.7")
    rollout = ppo.collect_rollout(actor, shifted(actor), ppo.human_score, prompts, cfg)
    kl = (rollout.log_probs - rollout.ref_log_probs).sum(1)
    assert torch.allclose(rollout.rewards.sum(1), rollout.scores - 0.7 * kl, atol=1e-4) and kl.abs().max() > 0.01


def test_every_pass_uses_every_reply_once_in_a_new_order(world, rollout, monkeypatch):
    passes, descend = [], ppo.descend
    monkeypatch.setattr(ppo, "descend", lambda model, optimizer, loss, rows, cfg:
                        passes.append(rows.tolist()) or descend(model, optimizer, loss, rows, cfg))
    actor = copy.deepcopy(world[1])
    torch.manual_seed(0)
    ppo.update_policy(actor, torch.optim.SGD(actor.parameters(), lr=0.0), rollout,
                      small_config("--ppo_epochs", "3", "--minibatches", "4"))
    orders = [sum(passes[i:i + 4], []) for i in (0, 4, 8)]
    assert len(passes) == 12 and all(len(rows) == 2 for rows in passes)
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({*map(tuple, orders), tuple(range(8))}) == 4


def test_the_gradient_is_clipped_to_its_length(world, rollout):
    flags = ["--minibatches", "1", "--ppo_epochs", "1", "--max_grad_norm"]
    gradients = [gradients_of_one_update(world[1], rollout, small_config(*flags, x)) for x in ("1e9", "0.05")]
    lengths = [torch.cat([g.flatten() for g in gs]).norm().item() for gs in gradients]
    assert lengths[0] > 0.1 and lengths[1] == pytest.approx(0.05, rel=1e-3)


def test_metrics_of_an_update_are_those_of_its_formulas(world, rollout):
    """approx_kl = mean(rho - 1 - log rho), all metrics over real tokens only, whatever stands in the padding."""
    actor, cfg = shifted(world[1]).requires_grad_(True), small_config("--minibatches", "1", "--ppo_epochs", "1")
    with torch.no_grad():
        log_probs, _, logits = ppo.read_replies(actor, rollout.batch, cfg.temperature)
    log_rho = (log_probs - rollout.log_probs)[rollout.mask]
    metrics = ppo.update_policy(actor, torch.optim.SGD(actor.parameters(), lr=0.0), rollout, cfg)
    assert metrics["approx_kl"] == pytest.approx((log_rho.exp() - 1 - log_rho).mean().item(), rel=1e-3)
    assert metrics["first_log_ratio"] == pytest.approx(log_rho.abs().mean().item(), rel=1e-3)
    expected = torch.distributions.Categorical(logits=logits).entropy()[rollout.mask].mean().item()
    assert metrics["entropy"] == pytest.approx(expected, rel=1e-4)


def test_nan_in_the_padding_of_the_returns_alone_changes_no_gradient_of_the_clipped_value_loss():
    mask, values, returns, old, _ = random_rollout_tensors()
    gradients = []
    for G in (returns, with_nan(returns, mask)):
        leaf = values.clone().requires_grad_()
        ppo.value_loss(leaf, G, mask, old, 5.0).backward()  # wide: the clip hides no gradient
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant():
    mask, returns, noise, *_ = random_rollout_tensors(seed=4)
    returns = with_nan(3 * returns, mask)
    assert ppo.explained_variance(returns, returns, mask) == pytest.approx(1)
    assert ppo.explained_variance(torch.full_like(returns, 7.0), returns, mask) == pytest.approx(0, abs=1e-5)
    assert ppo.explained_variance(returns / 2 + 1, returns, mask) == pytest.approx(0.75, abs=1e-4)
    assert ppo.explained_variance(-returns, returns, mask) == pytest.approx(-3, abs=1e-4)


def test_label_noise_makes_the_choices_of_plackett_and_luce(world, monkeypatch):
    """The chance to be ranked first is softmax(points / noise); with Gumbel's sign turned it would be another."""
    prompt, replies = "I feel sad. What can I do?\n", ["Call a friend.", "Nobody cares.", "Water boils."]
    rows = [ppo.Row(prompt, reply, True) for reply in replies]
    points = torch.tensor(ppo.human_score(*zip(*rows)))
    monkeypatch.setattr(ppo, "sample_groups", lambda actor, prompts, K, cfg: [rows] * 20000)
    for noise in (1.0, 3.0):
        rankings = ppo.label_rankings(None, [prompt], small_config("--label_noise", str(noise)), random.Random(0))
        first = torch.tensor([sum(r[0] is row for r in rankings) / len(rankings) for row in rows])
        assert (first - (points / noise).softmax(0)).abs().max() < 0.015


def test_random_streams_differ_by_stage_seed_and_process(monkeypatch):
    def numbers(stage, seed="0", rank=0):
        monkeypatch.setattr(ppo, "RANK", rank)
        return ppo.reseed(small_config("--seed", seed), stage).random(), torch.rand(1).item()

    first, again, stage, seed, rank = (numbers(*a) for a in (("a",), ("a",), ("b",), ("a", "1"), ("a", "0", 1)))
    assert first == again and len({first, stage, seed}) == len({first[0], stage[0], seed[0]}) == 3
    assert len({first[1], stage[1], seed[1], rank[1]}) == 4
    assert rank[0] == first[0]  # processes share their choices (which prompts), and nothing else


def test_empty_texts_can_be_read_and_a_cut_reply_has_no_eos(world):
    tokenizer, actor, reward_model, _ = world
    prompt_ids, prompt_mask, reply_ids, mask = ppo.encode(actor, [ppo.Row("", "", True), ppo.Row("Hi", "", True)])
    assert prompt_ids[0][prompt_mask[0]].tolist() == [tokenizer.eos_token_id]
    assert reply_ids[mask].tolist() == [tokenizer.eos_token_id] * 2
    logits, values = actor(prompt_ids, prompt_mask, reply_ids, mask)
    assert logits[mask].isfinite().all() and values[mask].isfinite().all()
    *_, reply_ids, mask = ppo.encode(actor, [ppo.Row("Hi", "Call a friend.", False)])  # cut off: it has no EOS
    assert reply_ids[mask].tolist() == tokenizer("Call a friend.").input_ids
    alone = reward_model.score([""], [""], [True])
    assert reward_model.score(["", "Hi there"], ["", "Yes."], [True] * 2)[0] == pytest.approx(alone[0], abs=1e-4)


def test_the_reward_is_read_at_the_last_real_token():
    model = ppo.RewardModel(small_actor(seed=1).lm)
    torch.nn.init.normal_(model.head[-1].weight)
    prompt_ids, prompt_mask, reply_ids, mask = random_batch()
    with torch.no_grad():
        scores = model(prompt_ids, prompt_mask, reply_ids, mask)
        for i, score in enumerate(scores):
            ids = torch.cat([prompt_ids[i][prompt_mask[i]], reply_ids[i][mask[i]]]).unsqueeze(0)
            hidden = model.lm(ids, output_hidden_states=True).hidden_states[-1]  # one text: no padding
            assert score.item() == pytest.approx(model.head(hidden[0, -1]).item(), abs=1e-4)


def test_the_penalty_counts_in_the_optimum_too(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ppo, "optimum", lambda scores, kl_coef: seen.append(scores) or (1.0, 9.0))
    (tmp_path / "zero.py").write_text("def score(prompts, replies, finished):\n    return [0.0] * len(replies)\n")
    ppo.main([*TINY, "--init_from", str(run), "--reward", f"{tmp_path}/zero.py:score", "--cycles", "0",
              "--missing_eos_penalty", "3", "--out", str(tmp_path / "run")])
    assert seen[0].shape == (14, 8) and set(seen[0].flatten().tolist()) == {0.0, -3.0}


def test_evaluation_gives_n_replies_to_each_prompt_one_prompt_after_the_other(world):
    tokenizer, actor, _, prompts = world
    points = {prompt: float(i) for i, prompt in enumerate(prompts)}
    table = ppo.evaluate(actor, ppo.frozen(actor), lambda prompts, *_: [points[p] for p in prompts], prompts, 3,
                         small_config("--missing_eos_penalty", "0", "--micro_batch_size", "1"))
    assert [line["reward"] for line in table] == [float(i // 3) for i in range(24)]


def test_whitening_does_not_reach_into_the_evaluation(world, monkeypatch):
    tokenizer, actor, _, prompts = world  # the processes evaluate different numbers of parts: a common mean would hang
    monkeypatch.setattr(ppo, "whiten", lambda *args, **options: pytest.fail("whitened"))
    cfg = small_config("--whiten_rewards", "true", "--whiten_advantages", "true")
    assert len(ppo.evaluate(actor, ppo.frozen(actor), ppo.human_score, prompts, 3, cfg)) == 24


def test_talk_shows_a_reply_of_each_model_to_every_line_of_a_pipe(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("I feel sad. What can I do?\nhello " + 99 * "you " + "\n\nthe end"))
    before = snapshot(run)
    ppo.main(["--talk", str(run)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [line[0] for line in lines] == ["pretrain", "sft", "policy"] * 4 and snapshot(run) == before
    assert all(line[1::2][:2] == ["score", "KL"] and math.isfinite(float(line[2])) for line in lines)
    kl = [float(line[4]) for line in lines]
    assert kl[1::3] == [0.0] * 4 and all(x != 0 for x in kl[0::3])


def test_a_judge_is_measured_by_pairs_that_the_human_finds_different(world, monkeypatch):
    tokenizer, actor, _, prompts = world
    rows = [ppo.Row(prompts[0], reply, True) for reply in ("best", "good", "bad")]
    scores = {"best": 2.0, "good": 3.0, "bad": 1.0}
    data = ppo.load_data(NOTHING, small_config())._replace(held_out=[rows, rows[1:]])
    quality = ppo.reward_model_quality(lambda p, replies, f: [scores[r] for r in replies], actor, data, small_config())
    assert quality["accuracy"] == pytest.approx(3 / 4) and math.isnan(quality["correlation"])
    kinds = ["Call a friend.", "Nobody cares.", "You should just give up.", "Water boils."]
    points = {reply: ppo.judge(prompts[0], reply, True)["human"] for reply in kinds}
    assert len(set(points.values())) < len(points)  # some are equal to the human; a judge may tell them apart
    monkeypatch.setattr(ppo, "sample_groups", lambda *_: [[ppo.Row(prompts[0], reply, True) for reply in kinds]])
    quality = ppo.reward_model_quality(lambda p, replies, f: [points[r] + 0.01 * len(r) for r in replies],
                                       actor, data._replace(held_out=[]), small_config())
    assert quality["accuracy"] == 1 and 0.9 < quality["correlation"] < 1


def test_the_fraction_of_the_optimum_counts_from_sft():
    def table(objective):
        return [{"reply": "", "human": 1.0, "objective": objective}] * 2

    scores, beta = torch.tensor([[0.0, 0.5, 1.0, 0.25, 0.75, 0.5, 0.5, 0.5]]), 1.0
    j_star, size = ppo.optimum(scores, beta)
    report = ppo.make_report({"pretrained": table(-9.0), "sft": table(0.25), "ppo": table(0.5)}, scores, 2, beta)
    assert size > 5 and report["optimum"]["fraction"] == pytest.approx(0.25 / (j_star - 0.25))
    few = ppo.make_report({name: table(0.0) for name in ("pretrained", "sft", "ppo")}, scores[:, :4], 2, beta)
    assert math.isnan(few["optimum"]["fraction"])  # fewer than 5 effective samples: only a lower bound
    flat = ppo.make_report({name: table(0.0) for name in ("pretrained", "sft", "ppo")}, 0 * scores, 2, beta)
    assert math.isnan(flat["optimum"]["fraction"])  # every reply scores the same: there is no way to go


def test_win_rate_compares_replies_to_the_same_prompt():
    tables = [[{"human": x} for x in scores] for scores in ([2.0, 2.0, 6.0, 6.0], [1.0, 1.0, 9.0, 9.0])]
    assert ppo.win_rate(*tables, 2) == 0.5 and ppo.win_rate(tables[0], [{"human": 0.0}] * 4, 2) == 1


# ---- Wrong calls -----------------------------------------------------------------------------------------------------
TEN = [{"prompt": f"Question {i}?\n", "completion": "Yes.", "chosen": "Good.", "rejected": "Bad."} for i in range(10)]
WRONG_FILES = {
    "ten.jsonl": jsonl(*TEN), "five.jsonl": jsonl(*TEN[:5]), "same.jsonl": jsonl(*[TEN[0]] * 20),
    "one.jsonl": jsonl(TEN[0]),
    "empty.jsonl": "", "blank.jsonl": "\n\n\n", "text.jsonl": "Hello.\n", "half.jsonl": jsonl(*TEN) + '{"prompt": "a',
    "list.jsonl": "[1]\n", "number.jsonl": "3\n", "string.jsonl": '"prompt ranked"\n', "null.jsonl": "null\n",
    "deep.jsonl": "[" * 100_000 + "\n", "latin.jsonl": b'{"prompt": "caf\xe9"}\n',
    "utf16.jsonl": jsonl(*TEN).encode("utf-16"),
    "half_character.jsonl": '{"prompt": "\\ud83d", "completion": "b"}\n',
    "other_field.jsonl": '{"text": "a"}\n', "number_field.jsonl": '{"prompt": 3}\n',
    "no_completion.jsonl": '{"prompt": "a"}\n',
    "empty_completion.jsonl": '{"prompt": "a", "completion": ""}\n',
    "two.jsonl": '{"prompt": "a", "completion": ["b"]}\n',
    "one_reply.jsonl": '{"prompt": "a", "chosen": "b"}\n',
    "equal.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "b"}\n',
    "equal_in_three.jsonl": '{"prompt": "a", "ranked": ["b", "b", "c"]}\n',
    "ranked_one.jsonl": '{"prompt": "a", "ranked": ["b"]}\n',
    "ranked_word.jsonl": '{"prompt": "a", "ranked": "bc"}\n',
    "ranked_object.jsonl": '{"prompt": "a", "ranked": {"b": 1, "c": 2}}\n',
    "ranked_number.jsonl": '{"ranked": 3}\n', "ranked_numbers.jsonl": '{"prompt": "a", "ranked": [1, 2]}\n',
    "equal_when_cut.jsonl": jsonl(*[line | {"chosen": "very " * 40 + "good", "rejected": "very " * 40 + "bad"}
                                    for line in TEN]),
    "syntax.py": "def score(:\n", "raises.py": "1 / 0\n", "rewards.py": """
number = 3
def two(prompts, replies): return [0.0] * len(replies)
def fails(prompts, replies, finished): return [1 / len(reply) for reply in replies]
def asserts(prompts, replies, finished): assert False
def nan(prompts, replies, finished): return [float("nan")] * len(replies)
def none(prompts, replies, finished): pass
def short(prompts, replies, finished): return []
def words(prompts, replies, finished): return ["good"] * len(replies)
""",
    "half_model/config.json": '{"model_type": "gpt2"}', "no_json/config.json": "{", "no_run/a": "", "not_empty/a": "",
    "later/config.json": '{"of_a_later_version": 1}', "strange/config.json": "[]", "wrong/config.json": '{"lam": 3}',
    "types/config.json": '{"lr": "fast"}', "no_sft/config.json": "{}", "empty_sft/config.json": "{}",
    "empty_sft/sft/a": ""}

# The message must name the last flag, or what stands after =>. F is the folder of the files above, R a finished run.
WRONG_CALLS = """
--cycle 3 | --out | --lr | --lr fast | --lr 0 | --lr -1 | --lr nan | --lr inf | --sft_lr 0 | --rm_lr inf | --lr 1e999
--n_layer 2.5 | --n_layer 0 | --n_layer -1 | --n_embd 0 | --n_head 0 | --n_head 7 | --seed -1 | --seed one | --seed 1e3
--pretrain_steps -1 | --sft_steps -1 | --rm_steps -1 | --rm_steps 1.5 | --cycles -1 | --cycles nan | --rankings 0
--label_noise -1 | --label_noise inf | --save_every 0 | --eval_every 0 | --optimum_samples 0 | --micro_batch_size 0
--batch_size 0 | --batch_size -8 | --replies_per_prompt 0 | --replies_per_prompt 3 | --minibatches 0 | --minibatches 3
--minibatches 16 | --ppo_epochs 0 | --temperature 0 | --temperature -1 | --temperature nan | --temperature inf
--lam 1.5 | --lam -0.1 | --lam nan | --gamma 1.01 | --gamma -1 | --clip_eps -0.2 | --clip_eps 0 | --clip_eps inf
--vf_coef -1 | --value_clip 0 | --value_clip -0.2 | --value_clip none | --ent_coef -0.01 | --kl_coef -0.1
--kl_coef inf | --kl_target 0 | --kl_target nan | --missing_eos_penalty -1 | --missing_eos_penalty inf
--max_grad_norm 0 | --bf16 maybe | --max_new_tokens 0 | --max_new_tokens 225 | --max_new_tokens 1000 | --device abacus
--device cuda:99 | --device meta

--out F/ten.jsonl | --out F/not_empty | --out R | --out F/ten.jsonl/below | --out /proc/nobody/may
--out F/NAME_TOO_LONG | --model F/nothing | --model F/no_run | --model F/half_model | --model F/no_json
--model F/ten.jsonl | --model no/such-model | --model= => --model | --reward= => --reward | --reward nobody
--reward F/no_run | --reward F/half_model | --reward F/nothing.py:f | --reward F/rewards.py
--reward F/rewards.py:missing | --reward F/rewards.py:number | --reward F/rewards.py:two | --reward F/rewards.py:fails
--reward F/rewards.py:asserts | --reward F/rewards.py:nan | --reward F/rewards.py:none | --reward F/rewards.py:short
--reward F/rewards.py:words | --reward F/syntax.py:score | --reward F/raises.py:score

--resume F/nothing | --resume F/no_run | --resume F/ten.jsonl | --resume F/no_json | --resume F/later
--resume F/strange | --resume F/wrong => --lam | --resume F/types | --resume R --cycles 9 | --resume R --cycles 60
--resume R --out F/new | --resume R --lam 0.5 | --init_from F/nothing | --init_from F/no_run | --init_from F/ten.jsonl
--init_from F/no_sft | --init_from F/empty_sft | --init_from R --n_layer 3 | --init_from R --n_layer 2
--init_from R --n_embd 64 | --init_from R --n_head 1 | --init_from R --sft_steps 7 | --init_from R --demos F/ten.jsonl
--init_from R --model F/half_model | --init_from R --rankings 13 | --init_from R --rm_steps 7 | --talk F/nothing
--talk F/no_run | --talk F/ten.jsonl | --talk R --reward human | --talk R --n_layer 3

--prompts F/nothing.jsonl | --prompts F/no_run | --prompts F/empty.jsonl | --prompts F/blank.jsonl
--prompts F/text.jsonl | --prompts F/half.jsonl | --prompts F/list.jsonl | --prompts F/number.jsonl
--prompts F/string.jsonl | --prompts F/null.jsonl | --prompts F/deep.jsonl | --prompts F/latin.jsonl
--prompts F/utf16.jsonl | --prompts F/half_character.jsonl | --prompts F/other_field.jsonl
--prompts F/number_field.jsonl | --prompts F/five.jsonl => 6 or more | --prompts F/same.jsonl => 6 or more
--prompts F/ten.jsonl --reward human | --demos F/ten.jsonl | --demos F/ten.jsonl --reward human
--preferences F/ten.jsonl --demos F/nothing.jsonl | --preferences F/ten.jsonl --demos F/no_completion.jsonl
--preferences F/ten.jsonl --demos F/empty_completion.jsonl | --preferences F/ten.jsonl --demos F/two.jsonl
--preferences F/ten.jsonl --demos F/number.jsonl | --preferences F/five.jsonl => 6 or more
--preferences F/one_reply.jsonl | --preferences F/equal.jsonl | --preferences F/ranked_one.jsonl
--preferences F/equal_in_three.jsonl | --preferences F/ranked_word.jsonl | --preferences F/ranked_object.jsonl
--preferences F/ranked_number.jsonl | --preferences F/ranked_numbers.jsonl | --preferences F/number.jsonl
--preferences F/string.jsonl | --preferences F/null.jsonl | --preferences F/equal_when_cut.jsonl
--prompts F/ten.jsonl --preferences F/one_held_out.jsonl
""".replace("\n", "|").split("|")
WRONG_CALLS = [call.strip() for call in WRONG_CALLS if call.strip()]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """The folder of WRONG_FILES."""
    folder = tmp_path_factory.mktemp("wrong")
    held_out = ppo.split(line["prompt"] for line in TEN)["test"][0]
    files = WRONG_FILES | {"one_held_out.jsonl": jsonl(*[line for line in TEN if line["prompt"] == held_out])}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def snapshot(*folders):
    return {path: path.is_file() and path.read_bytes() for folder in folders for path in sorted(folder.rglob("*"))
            if path.suffix != ".pyc"}


def flags_of_call(call, wrong, run, tmp_path):
    known = {"F": str(wrong), "R": str(run), "NAME_TOO_LONG": "x" * 300}
    flags = ["/".join(known.get(part, part) for part in word.split("/")) for word in call.split(" => ")[0].split()]
    out = [] if {"--out", "--resume"} & {*flags} else ["--out", str(tmp_path / "out")]
    return [*([] if "--resume" in flags else TINY), *out, *flags]  # the wrong flag comes last


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_wrong_call_says_so_in_one_line_and_writes_nothing(call, wrong, run, tmp_path, capsys):
    before, start = snapshot(wrong, run), time.process_time()
    with pytest.raises(ppo.UserError) as error:
        ppo.main(flags_of_call(call, wrong, run, tmp_path))
    message, flag = str(error.value), [word for word in call.split() if word.startswith("--")][-1]
    named = call.split(" => ")[1] if " => " in call else flag
    assert named in message and "\n" not in message and len(named) + 10 < len(message) < 1000, message
    assert not list(tmp_path.iterdir()) and snapshot(wrong, run) == before
    assert "pretraining:" not in capsys.readouterr().out and time.process_time() - start < 10


@pytest.mark.parametrize("call", ["--reward F/rewards.py:fails", *(pytest.param(call, marks=slow) for call in (
    "--gamma 2", "--cycle 3", "--prompts F/half.jsonl", "--resume F/no_run"))])
def test_a_wrong_command_exits_with_2_and_one_line(call, wrong, run, tmp_path):
    script, flags = HERE / "ppo_rlhf.py", flags_of_call(call, wrong, run, tmp_path)
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and call.split()[0] in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_names_the_cpu():
    with pytest.raises(ppo.UserError, match="--device cuda .*--device cpu"):
        ppo.parse_config(["--device", "cuda"])


@pytest.mark.parametrize("word", [
    "one two.\n", "天", *(pytest.param(word, marks=slow) for word in ("word ", "w", " "))])
def test_a_line_of_ten_megabytes_is_cut_within_seconds(word, tmp_path, monkeypatch):
    text = word * (10_000_000 // len(word.encode()))
    line = {"prompt": text + "?", "completion": text, "chosen": "Good. " + text, "rejected": "Bad. " + text}
    (tmp_path / "long.jsonl").write_text(jsonl(line, *TEN), encoding="utf-8")
    monkeypatch.setattr(ppo, "open_folder", lambda cfg: ppo.check(False, "until here"))
    start = time.process_time()
    with pytest.raises(ppo.UserError, match="until here"):
        ppo.main([*TINY, "--demos", f"{tmp_path}/long.jsonl", "--preferences", f"{tmp_path}/long.jsonl"])
    assert time.process_time() - start < 5


def test_prompts_longer_than_the_model_and_a_byte_order_mark_are_no_mistake(tmp_path):
    lines = jsonl(*[line | {"prompt": f"{i} and so on. " * 999} for i, line in enumerate(TEN)])
    (tmp_path / "long.jsonl").write_text(lines, encoding="utf-8-sig")
    ppo.main([*TINY, "--preferences", f"{tmp_path}/long.jsonl", "--out", f"{tmp_path}/run"])
    assert len(read_metrics(tmp_path / "run")) == 3


def test_init_from_takes_the_settings_along_and_flags_change_them(run, tmp_path):
    ppo.main(["--init_from", str(run), "--out", str(tmp_path / "run"), "--kl_coef", "0.05"])
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (run, tmp_path / "run"))
    assert new == old | {"init_from": str(run), "out": str(tmp_path / "run"), "kl_coef": 0.05}


# ---- Notes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [HERE / "README.md", *sorted(HERE.glob("notes/**/*.md"))], ids=str)
def test_the_texts_name_only_tests_functions_and_flags_that_exist(path):
    spans = re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8"))
    assert all(name in globals() for span in spans for name in re.findall(r"^test_\w+$", span))
    flags = {flag for span in spans for flag in re.findall(r"--(\w+)", span)} - {"help", "nproc"}
    assert flags <= {name for field in vars(ppo.Config()) for name in (field, f"no_{field}")}
    for span in spans:
        if name := re.match(r"(ActorCritic|HeadedModel|RewardModel)\.(\w+)$", span):
            assert hasattr(getattr(ppo, name[1]), name[2]), span
    if path.name in ("README.md", "guide.md"):  # the errata quote other people's code
        words = set(re.findall(r"\w+", "".join(file.read_text(encoding="utf-8") for file in HERE.glob("*.py"))))
        assert {span for span in spans if re.match(r"[a-z_]+$", span)} <= words


GUIDES = HERE / "notes/guide.md", HERE / "notes/guide.zh.md"
IDS = ("S1 S2 S3 S4 S5 S6 L1 L2 L3 L4 L5 L6 L7 L8 L9 T1 T2 T3 T4 T5 T6 T7 T8 T9 N1 N2 N3 N4 N5 N6 N7 N8 N9 N10 "
       "P1 P2 P3 R1 R2 R3 R4").split()
FILES = {"ppo_rlhf.py", "my_gradient.py", "metrics.csv", "report.json"}
# Columns of the output, and words of the code, that the guides name: neither a function nor a setting.
COLUMNS = set("A_t KL actor all_reduce approx_kl clamp clip_fraction delta_t effective_sample_size finished human "
              "is_last first_log_ratio kl loss objective peak_memory_gb ppo pretrained r_t reference reply_length "
              "return rho_after rho_before score sft token validation".split())


def blocks(text, language):
    """The code blocks of a Markdown text that are marked with this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text):
    """A Markdown text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def rows_under(header, text):
    """The rows of the table whose first column has this header, as lists of cells."""
    table = re.search(rf"^\| {header} \|.*\n\|[-|]+\|\n((\|.*\n)+)", text, re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.fixture(scope="module")
def walkthrough():
    """What notes/walkthrough.py prints, and the processor seconds that it took."""
    before = os.times()
    result = subprocess.run([sys.executable, "notes/walkthrough.py"], cwd=HERE, capture_output=True, encoding="utf-8",
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}, timeout=300)
    after = os.times()
    assert result.returncode == 0, result.stderr
    return result.stdout, sum(after[2:4]) - sum(before[2:4])


def test_the_walkthrough_takes_less_than_ten_seconds_and_gives_the_articles_numbers(walkthrough):
    output, seconds = walkthrough
    assert seconds < 10
    for column in ("-0.84 0.88 1.96 3.48", "1.67 1.10 1.52 0.42", "2.6525 1.9650 1.7300 0.4200",  # E
                   "0.34 1.23", "1.17045 0.20480"):                                               # B
        lines = iter(output.splitlines())
        assert all(any(number in line.split() for line in lines) for number in column.split()), column  # in this order
    assert "5.0% -> 6.0% -> 7.2% -> 8.6%\n" in output and "5.0% -> 6.0% -> 6.0% -> 6.0%\n" in output   # D


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_the_guide_shows_all_that_the_walkthrough_prints(guide, walkthrough):
    text = guide.read_text(encoding="utf-8")
    shown = "\n".join(blocks(text, "text"))
    assert [line for line in shown.splitlines() if line] == [line for line in walkthrough[0].splitlines() if line]
    assert all(number in prose(text) and number in shown for number in ("3.87", "-0.13", "-1.24", "0.315", "5.99%"))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_the_guide_covers_every_id_of_the_articles_once(guide):
    rows = rows_under("(?:id|编号)", guide.read_text(encoding="utf-8"))
    assert [row[0] for row in rows] == IDS
    for name, _, where, proof in rows:
        assert "`" in where and re.search(r"`test_\w+`|\d", proof), name  # a place, and a test, part or experiment


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_every_name_in_the_guide_exists_in_the_script(guide):
    source, tests = ((HERE / name).read_text(encoding="utf-8") for name in ("ppo_rlhf.py", "test_ppo_rlhf.py"))
    spans = re.findall(r"`([^`\n]+)`", prose(guide.read_text(encoding="utf-8")))
    names = {span for span in spans if re.fullmatch(r"[A-Za-z_]\w*(\.[a-z_]\w*)?", span)}
    defined = {*vars(ppo), *ppo.Config.__dataclass_fields__, *ppo.Rollout.__dataclass_fields__}
    for name in names - FILES:
        owner, _, attribute = name.partition(".")
        if name.startswith(("test_", "n_step_")):
            assert f"def {name}(" in tests, name
        else:
            assert owner in defined or (name in COLUMNS and re.search(rf"\b{name}\b", source)), name
            assert not attribute or hasattr(getattr(ppo, owner), attribute), name
    for function in ("pretrain finetune train_reward_model ranking_loss generate token_rewards td_residuals gae whiten "
                     "collect_rollout policy_loss value_loss entropy update_policy train_ppo optimum frozen").split():
        assert function in names and callable(getattr(ppo, function)), function


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_every_command_in_the_guide_is_one(guide, tmp_path, monkeypatch):
    text = guide.read_text(encoding="utf-8")
    commands = re.findall(r"(?:`|^ +)(python ppo_rlhf\.py [^`\n]+)", text, re.MULTILINE)
    assert len(commands) > 30
    (tmp_path / "runs/first/sft").mkdir(parents=True)  # a run to go on from, as far as the command line can tell
    (tmp_path / "runs/first/sft/heads.safetensors").touch()
    (tmp_path / "runs/first/config.json").write_text(json.dumps(asdict(ppo.Config())))
    monkeypatch.chdir(tmp_path)
    for command in commands:
        cfg = ppo.parse_config(shlex.split(command)[2:])
        assert cfg != ppo.Config(init_from=cfg.init_from), f"{command} changes nothing"


def test_both_guides_have_the_same_parts_code_commands_and_terms():
    english, chinese = (guide.read_text(encoding="utf-8") for guide in GUIDES)
    levels = [re.findall(r"^#+ ", prose(text), re.MULTILINE) for text in (english, chinese)]
    assert levels[0] == levels[1] and blocks(english, "python")[0] == blocks(chinese, "python")[0]
    commands = [set(re.findall(r"`(python [^`\n]+)`", text)) for text in (english, chinese)]
    assert commands[0] == commands[1]
    terms = [[row[:2] for row in rows_under("中文", text)] for text in (english, chinese)]
    assert terms[0] == terms[1] and len(terms[0]) >= 40


def test_the_code_in_the_guide_runs(tmp_path, monkeypatch):
    for name in ("gae", "policy_loss"):
        monkeypatch.setattr(ppo, name, getattr(ppo, name))  # to be put back afterwards
    file = tmp_path / "variant.py"
    file.write_text(blocks(GUIDES[0].read_text(encoding="utf-8"), "python")[0], encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(file), *TINY, "--ppo_epochs", "1", "--out", str(tmp_path / "run")])
    runpy.run_path(str(file), run_name="__main__")
    assert (tmp_path / "run/report.json").is_file()


def solutions():
    """exercises.py as a dict of its names, and its text."""
    path = HERE / "notes/exercises.py"
    return runpy.run_path(str(path)), path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["faq.md", "exercises.md"])
def test_every_command_of_the_questions_and_exercises_parses(name, run):
    text, exercises = (HERE / "notes" / name).read_text(encoding="utf-8"), solutions()[0]["EXERCISES"]
    text = re.sub(r"<!-- run: (.*?)(?: \|.*?)? -->", r"`\1`", text)  # where a number comes from | and what it is there
    commands = re.findall(r"python (ppo_rlhf|notes/exercises|notes/plot)\.py([^`\n#]*)", text)
    assert len(commands) >= 10
    for script, flags in commands:
        words = [str(run) if word == "runs/first" else word for word in flags.split()]
        if script == "ppo_rlhf":
            cfg = ppo.parse_config(words)
            if cfg.reward.startswith("notes/"):
                assert callable(ppo.load_reward(ppo.Config(reward=str(HERE / cfg.reward))))
        elif script == "notes/exercises":
            assert words[-2:] == ["--init_from", str(run)] and {*words[:-2]} <= {*exercises}


def test_the_solutions_in_the_text_are_those_that_were_run():
    text, (names, source) = (HERE / "notes/exercises.md").read_text(encoding="utf-8"), solutions()
    code = blocks(text, "python")
    assert all(f"\n\n\n{block.strip()}\n" in source for block in code)
    written = re.findall(r"\ndef (\w+)\(", source.split("# Solutions")[1].split("EXERCISES =")[0])
    assert {name for name in written if not name.startswith("exercise_")} == {
        name for block in code for name in re.findall(r"^def (\w+)\(", block, re.MULTILINE)}


def test_every_exercise_has_its_text_and_one_table():
    sections = (HERE / "notes/exercises.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert [section.split(".")[0] for section in sections] == [*solutions()[0]["EXERCISES"]]
    for section in sections:
        for part in "中文：", "**Predict**", "**Hint.**", "<details>", "</details>":
            assert section.count(part) == 1, section[:30]
        assert len(re.findall(r"\n\n\|", section)) == 1 and "| --- |" in section, section[:30]


@slow
def test_every_exercise_runs(run):
    script = [sys.executable, HERE / "notes/exercises.py", "all", "--init_from", run, "--cycles", "1"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n| --- |") == 20, done.stderr[-2000:]


def test_the_experiments_page_holds_every_topic_prediction_and_variant():
    script, text = runpy.run_path(str(HERE / "notes/experiments.py")), (HERE / "notes/experiments.md").read_text("utf-8")
    sections = {section.split("\n")[0]: section for section in text.split("\n## ")}
    for key, topic in script["TOPICS"].items():
        section = sections[f"{topic.title} ({topic.ids})"]
        assert f"python notes/experiments.py run {key}\n" in section and topic.claim in section
        rows = {*topic.beside.split(), *topic.variants} - {"gradients"}  # whose rows are the estimates it compares
        assert all(f"\n| {name} | " in section for name in rows)
        for name, measure, sign, other in map(str.split, topic.expect.split(";")):
            row = f"| {measure} of {name} {script['SIGNS'][sign]} {other} | "
            assert row in section and row in sections["All verdicts"].replace(f"| {topic.ids} ", "")
    assert all((HERE / "notes" / figure).is_file() for figure in re.findall(r"\]\((figures/\w+\.png)\)", text))


def test_the_curves_are_drawn(run, tmp_path):
    pytest.importorskip("matplotlib", reason="only notes/plot.py needs it")
    for flags in [run], [run, run, "--healthy"]:
        picture = tmp_path / "new" / "curves.png"
        subprocess.run([sys.executable, HERE / "notes" / "plot.py", *flags, "--out", picture], check=True)
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000


@pytest.mark.parametrize("missing, says", [("matplotlib", "pip install matplotlib"), ("nothing", "no metrics.csv")])
def test_a_curve_that_cannot_be_drawn_says_why_in_one_line(missing, says, tmp_path):
    if missing == "nothing":
        pytest.importorskip("matplotlib", reason="only notes/plot.py needs it")
    code = (f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv[1:] = [{str(tmp_path)!r}]; "
            f"runpy.run_path({str(HERE / 'notes' / 'plot.py')!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr


# ======================================================================================================================
# The papers' formulas, worked out once more in slow and plain ways: every function of the script has to agree.
#
# Nothing here shares code or tricks with ppo_rlhf.py: loops over floats (Python's are float64) in place of tensors,
# sums in place of recursions, and all replies of a world small enough to list in place of samples.
# ======================================================================================================================
JUNK = (math.nan, math.inf, -math.inf)
PAD, EOS = 0, 1


# ---- All that these tests need of the script besides the functions of the contract -----------------------------------
def make_config(**changes):
    return ppo.Config(device="cpu", **changes)


def make_actor(lm, tokenizer, cfg):
    return ppo.ActorCritic(lm, tokenizer, cfg)


def make_critic_random(actor):
    """The critic starts as zero; here it should say something."""
    torch.nn.init.normal_([*actor.head.parameters()][-2], std=0.5)


def critic_parameters(actor):
    return actor.head.parameters()


def language_model(actor):
    return actor.lm


# ---- Random cases ----------------------------------------------------------------------------------------------------
def cases(count, seed=0):
    """(number, rng, lengths, T): batches with replies of every kind of length, the edge cases again and again."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        B, T = (1 if number % 7 == 0 else rng.randint(1, 6)), (1 if number % 11 == 0 else rng.randint(1, 9))
        lengths = [rng.randint(1, T) for _ in range(B)]
        if number % 4 == 0:
            lengths[rng.randrange(B)] = 1  # an empty reply: EOS, and nothing else
        if number % 4 == 1:
            lengths = [rng.randint(1, T)] * B  # all of one length; often there is padding behind all of them
        if number % 4 == 2:
            lengths[rng.randrange(B)] = T  # cut off at the limit
        yield number, rng, lengths, T


def numbers(rng, lengths, scale=1.0):
    """One float for every real token, reply by reply."""
    return [[rng.gauss(0, scale) for _ in range(n)] for n in lengths]


def tensor(rows, T, fill=0.0):
    """Rows of different lengths -> float64 [B,T], `fill` (a number, or many to go round) at the masked positions."""
    fill = itertools.cycle(fill if isinstance(fill, tuple) else (fill,))
    return torch.tensor([row + [next(fill) for _ in range(T - len(row))] for row in rows], dtype=torch.float64)


def real(lengths, T):
    return torch.tensor([[t < n for t in range(T)] for n in lengths])


def flat(rows):
    return [x for row in rows for x in row]


def mean(xs):
    return math.fsum(xs) / len(xs)


def agree(result, rows, T, tolerance=1e-9):
    """result [B,T] holds the numbers of `rows`, and exactly 0 behind each of them."""
    assert result.shape == (len(rows), T)
    for got, row in zip(result.tolist(), rows):
        assert got[:len(row)] == pytest.approx(row, rel=tolerance, abs=tolerance)
        assert got[len(row):] == [0.0] * (T - len(row))


# ---- The formulas ----------------------------------------------------------------------------------------------------
def rewards_of_reply(log_probs, ref_log_probs, score, beta):
    """Ziegler et al. 2019, eq. 2 by tokens: r_t = -beta log(pi / ref), and the score on top at the last token."""
    T = len(log_probs)
    return [-beta * (log_probs[t] - ref_log_probs[t]) + (score if t == T - 1 else 0.0) for t in range(T)]


def residuals_of_reply(rewards, values, gamma):
    """delta_t = r_t + gamma V(s_{t+1}) - V(s_t), where V is 0 once the reply is over."""
    T = len(rewards)
    return [rewards[t] + (gamma * values[t + 1] if t + 1 < T else 0.0) - values[t] for t in range(T)]


def n_step_advantage(rewards, values, gamma, t, n):
    """A_t^(n) = sum_{l<n} gamma^l r_{t+l} + gamma^n V(s_{t+n}) - V(s_t)      (Schulman et al. 2015, eq. 14)"""
    T, total = len(rewards), -values[t]
    for b in range(n):
        total += gamma ** b * (rewards[t + b] if t + b < T else 0.0)
    return total + gamma ** n * (values[t + n] if t + n < T else 0.0)


def gae_as_mixture(rewards, values, gamma, lam):
    """A_t = (1-lam) sum_{n>=1} lam^(n-1) A_t^(n)  (eq. 16); from n = N = T-t on all are equal: weight lam^(N-1)"""
    T, advantages = len(rewards), []
    for t in range(T):
        N = T - t
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, N)] + [lam ** (N - 1)]
        assert math.fsum(weights) == pytest.approx(1)
        advantages.append(math.fsum(weights[n - 1] * n_step_advantage(rewards, values, gamma, t, n)
                                    for n in range(1, N + 1)))
    return advantages


def gae_as_double_sum(rewards, values, gamma, lam):
    """A_t = sum_{k>=t} (gamma lam)^(k-t) delta_k      (eq. 16, last line)"""
    delta, T = residuals_of_reply(rewards, values, gamma), len(rewards)
    return [math.fsum((gamma * lam) ** (k - t) * delta[k] for k in range(t, T)) for t in range(T)]


def surrogate_of_token(ratio, advantage, eps):
    """min(rho A, g(eps, A)), g = (1+eps) A if A >= 0, else (1-eps) A: eq. 7 without a clip, as in Spinning Up."""
    limit = (1 + eps) * advantage if advantage >= 0 else (1 - eps) * advantage
    return limit if limit < ratio * advantage else ratio * advantage


def log_softmax(logits):
    """log pi(v) for all v, in float64."""
    top = max(logits)
    total = math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - top - total for z in logits]


# ---- 1: oracles on random cases --------------------------------------------------------------------------------------
def test_token_rewards_agree_with_the_formula():
    """r_t = -beta (log pi - log ref) + [t = T] score; beta = 0 leaves the score alone."""
    for number, rng, lengths, T in cases(250, seed="rewards"):
        log_probs, ref, mask = numbers(rng, lengths), numbers(rng, lengths), real(lengths, T)
        scores, beta = [rng.gauss(0, 3) for _ in lengths], 0.0 if number % 5 == 0 else rng.uniform(0, 2)
        expected = [rewards_of_reply(*reply, beta) for reply in zip(log_probs, ref, scores)]
        for fill in (0.0, 7.0, JUNK):
            args = tensor(log_probs, T, fill), tensor(ref, T, fill), torch.tensor(scores, dtype=torch.float64)
            agree(ppo.token_rewards(*args, mask, beta), expected, T)


def test_residuals_advantages_and_returns_agree_with_the_formulas():
    """GAE three times: as a mixture of n-step advantages, as a double sum, and by its limits."""
    for number, rng, lengths, T in cases(300, seed="gae"):
        rewards, values, mask = numbers(rng, lengths), numbers(rng, lengths, 2), real(lengths, T)
        gamma, lam = (0.0, 1.0, rng.random())[number % 3], (0.0, 1.0, rng.random())[number // 3 % 3]
        pairs = list(zip(rewards, values))
        deltas = [residuals_of_reply(r, v, gamma) for r, v in pairs]
        mixture = [gae_as_mixture(r, v, gamma, lam) for r, v in pairs]
        returns = [[a + x for a, x in zip(advantages, v)] for advantages, (_, v) in zip(mixture, pairs)]
        for fill in (0.0, 7.0, JUNK):
            args = tensor(rewards, T, fill), tensor(values, T, fill), mask
            agree(ppo.td_residuals(*args, gamma), deltas, T)
            advantages, targets = ppo.gae(*args, gamma, lam)
            agree(advantages, mixture, T)
            agree(advantages, [gae_as_double_sum(r, v, gamma, lam) for r, v in pairs], T)
            agree(targets, returns, T)
            if lam == 1:  # the rewards that came, discounted: V has no part in it
                agree(targets, [[math.fsum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]
                                for r in rewards], T)
            if lam == 0:
                agree(advantages, deltas, T)


def test_masked_mean_and_whitening_agree_with_the_formulas():
    """(x - mean) / sqrt(var) over real tokens, var = mean (x - mean)^2; shift_mean=False puts the mean back."""
    for number, rng, lengths, T in cases(250, seed="whiten"):
        offset, scale, mask = rng.gauss(0, 5), rng.uniform(0.5, 3), real(lengths, T)
        x = [[offset + scale * z for z in row] for row in numbers(rng, lengths)]
        if number % 10 == 3:
            x = [[offset] * n for n in lengths]  # no variance: nothing to scale, and no division by zero
        center = mean(flat(x))
        deviation = math.sqrt(mean([(z - center) ** 2 for z in flat(x)]))
        white = [[(z - center) / deviation if deviation > 1e-9 else 0.0 for z in row] for row in x]
        for fill in (0.0, 7.0, JUNK):
            assert ppo.masked_mean(tensor(x, T, fill), mask).item() == pytest.approx(center, abs=1e-9)
            if 1e-9 < deviation < 0.05:
                continue  # two tokens that are almost equal: the small constant in the denominator may be seen
            agree(ppo.whiten(tensor(x, T, fill), mask), white, T, 1e-5)
            kept = [[z + center for z in row] for row in white]
            agree(ppo.whiten(tensor(x, T, fill), mask, shift_mean=False), kept, T, 1e-5)


def test_policy_loss_and_clip_fraction_agree_with_the_formula():
    """L = -mean min(rho A, g(eps, A)) over all tokens of the batch; clipped: the limit is what counts."""
    for number, rng, lengths, T in cases(250, seed="policy"):
        old, advantages, mask = numbers(rng, lengths), numbers(rng, lengths), real(lengths, T)
        new = [[z + rng.gauss(0, 0.4) for z in row] for row in old] if number % 6 else old
        if number % 5 == 0:
            advantages[0][0] = 0.0
        eps, tokens = rng.uniform(0.05, 0.4), list(zip(flat(new), flat(old), flat(advantages)))
        ratios = [math.exp(a) / math.exp(b) for a, b, _ in tokens]
        loss = -mean([surrogate_of_token(rho, A, eps) for rho, (_, _, A) in zip(ratios, tokens)])
        clipped = mean([(A > 0 and rho > 1 + eps) or (A < 0 and rho < 1 - eps)
                        for rho, (_, _, A) in zip(ratios, tokens)])
        for fill in (0.0, 7.0, JUNK):
            args = tensor(new, T, fill), tensor(old, T, 0.0 if fill == 7.0 else fill), tensor(advantages, T, fill)
            result, fraction = ppo.policy_loss(*args, mask, eps)
            assert result.item() == pytest.approx(loss, abs=1e-9)
            assert fraction.item() == pytest.approx(clipped, abs=1e-6)


def test_value_loss_agrees_with_the_formula():
    """1/2 mean (V - G)^2; with clipping 1/2 mean max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2)."""
    for number, rng, lengths, T in cases(250, seed="value"):
        returns, old, mask = numbers(rng, lengths, 2), numbers(rng, lengths), real(lengths, T)
        values, c = [[z + rng.gauss(0, 0.5) for z in row] for row in old], rng.uniform(0.05, 1)
        plain, clipped = [], []
        for V, G, V_old in zip(flat(values), flat(returns), flat(old)):
            near = V_old + c if V > V_old + c else V_old - c if V < V_old - c else V
            plain.append((V - G) ** 2 / 2), clipped.append(max((V - G) ** 2, (near - G) ** 2) / 2)
        for fill in (0.0, 7.0, JUNK):
            V, G, V_old = tensor(values, T, fill), tensor(returns, T, fill), tensor(old, T, fill)
            for args in ((V, G, mask), (V, G, mask, V_old), (V, G, mask, V_old, None)):
                assert ppo.value_loss(*args).item() == pytest.approx(mean(plain), abs=1e-9)
            assert ppo.value_loss(V, G, mask, V_old, c).item() == pytest.approx(mean(clipped), abs=1e-9)
            assert ppo.value_loss(V, G, mask, old_values=V_old, value_clip=1e6).item() == pytest.approx(mean(plain))


def test_ranking_loss_agrees_with_the_formula():
    """-1/(N K(K-1)/2) sum over pairs, better i before worse j, of log sigmoid(s_i - s_j)  (InstructGPT, eq. 1)."""
    for number in range(200):
        rng = random.Random(number)
        N, K, scale = rng.randint(1, 6), 2 if number % 5 == 0 else rng.randint(2, 9), rng.choice((0.1, 1, 30))
        scores, losses = [[rng.gauss(0, scale) for _ in range(K)] for _ in range(N)], []
        for row in scores:
            for i in range(K):
                for j in range(i + 1, K):
                    gap = row[i] - row[j]  # log sigmoid without overflow, whichever sign
                    losses.append(math.log1p(math.exp(-gap)) if gap > 0 else -gap + math.log1p(math.exp(gap)))
        assert len(losses) == N * K * (K - 1) // 2
        assert ppo.ranking_loss(torch.tensor(scores, dtype=torch.float64)).item() == pytest.approx(mean(losses))


def test_log_probs_and_entropy_and_their_gradients_agree_with_the_softmax():
    """log pi = z_a - log sum e^z, H = -sum pi log pi, d log pi_a / dz = [v=a] - pi_v, dH / dz_v = -pi_v (log pi_v + H).

    Large logits (a certain token, a shift of 1000 for all) must neither overflow nor cancel.
    """
    for number in range(200):
        rng = random.Random(number)
        B, T, V = rng.randint(1, 3), rng.randint(1, 4), 2 if number % 4 == 0 else rng.randint(2, 12)
        scale, shift = rng.choice((0.0, 1.0, 4.0, 50.0, 1000.0)), rng.choice((0.0, 0.0, 1000.0, -1000.0))
        z = torch.tensor([[[rng.gauss(shift, scale) for _ in range(V)] for _ in range(T)] for _ in range(B)],
                         dtype=torch.float64, requires_grad=True)
        tokens = torch.tensor([[rng.randrange(V) for _ in range(T)] for _ in range(B)])
        log_probs, H = ppo.token_log_probs(z, tokens), ppo.entropy(z)
        (log_gradient,), (H_gradient,) = (torch.autograd.grad(x.sum(), z) for x in (log_probs, H))
        assert log_probs.shape == H.shape == (B, T)
        for i, t in itertools.product(range(B), range(T)):
            a, log_pi = tokens[i, t].item(), log_softmax(z[i, t].tolist())
            expected = -math.fsum(math.exp(x) * x for x in log_pi)
            assert log_probs[i, t].item() == pytest.approx(log_pi[a], abs=1e-9)
            assert H[i, t].item() == pytest.approx(expected, abs=1e-9) and -1e-9 <= H[i, t] <= math.log(V) + 1e-9
            assert log_gradient[i, t].tolist() == pytest.approx([(v == a) - math.exp(x) for v, x in enumerate(log_pi)])
            wanted = [-math.exp(x) * (x + expected) for x in log_pi]
            assert H_gradient[i, t].tolist() == pytest.approx(wanted, abs=1e-9)


# ---- 2: gradients against finite differences -------------------------------------------------------------------------
def slopes(loss, x, h=1e-6):
    """d loss / d x_i = (loss(x_i + h) - loss(x_i - h)) / 2h, one entry at a time."""
    result = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[i] = h
        result.view(-1)[i] = (loss(x + step) - loss(x - step)) / (2 * h)
    return result


def gradient(loss, x):
    return torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)[0]


def test_gradient_of_the_policy_loss_agrees_with_finite_differences():
    """The four cases of clipping: in cases 2 and 4 the gradient is 0, and not nearly 0; else it is -rho A / tokens."""
    seen = set()
    for number, rng, lengths, T in cases(60, seed="policy gradient"):
        eps, mask, old = rng.uniform(0.05, 0.4), real(lengths, T), numbers(rng, lengths)
        advantages = [[rng.choice((-1, 1)) * rng.uniform(0.1, 2) for _ in row] for row in old]
        ratios = [[rng.choice((rng.uniform(0.2, 1 - eps - 0.01), rng.uniform(1 - eps + 0.01, 1 + eps - 0.01),
                               rng.uniform(1 + eps + 0.01, 3))) for _ in row] for row in old]  # away from the kinks
        new = [[z + math.log(rho) for z, rho in zip(*rows)] for rows in zip(old, ratios)]
        expected = []
        for A_row, rho_row in zip(advantages, ratios):
            expected.append([])
            for A, rho in zip(A_row, rho_row):
                case = (1 if rho <= 1 + eps else 2) if A > 0 else (3 if rho >= 1 - eps else 4)
                seen.add((case, 1 - eps < rho < 1 + eps))
                expected[-1].append(0.0 if case in (2, 4) else -rho * A / sum(lengths))
        x, fill = tensor(new, T), JUNK if number % 2 else 0.0

        def loss(x):
            return ppo.policy_loss(x, tensor(old, T, fill), tensor(advantages, T, fill), mask, eps)[0]

        result = gradient(loss, x)
        agree(result, expected, T)
        assert torch.allclose(result, slopes(loss, x), atol=1e-7)
        assert all(g == 0.0 for g, e in zip(result.view(-1), tensor(expected, T).view(-1)) if e == 0)
    assert seen == {(1, False), (1, True), (2, False), (3, False), (3, True), (4, False)}


def test_gradient_of_the_value_loss_agrees_with_finite_differences():
    """(V - G) / tokens; with clipping 0 exactly where V has left the leash and the clipped error is the larger one."""
    held, free = 0, 0
    for number, rng, lengths, T in cases(60, seed="value gradient"):
        c, mask, old = rng.uniform(0.2, 1), real(lengths, T), numbers(rng, lengths)
        moves = [[rng.choice((rng.uniform(-2, -c - 0.01), rng.uniform(0.01 - c, c - 0.01), rng.uniform(c + 0.01, 2)))
                  for _ in row] if c < 0.99 else row for row in old]
        values = [[z + d for z, d in zip(*rows)] for rows in zip(old, moves)]
        returns, expected = [], []
        for V_row, old_row in zip(values, old):
            returns.append([]), expected.append([])
            for V, V_old in zip(V_row, old_row):
                near = min(max(V, V_old - c), V_old + c)
                G = rng.gauss(0, 2)
                while abs(abs(V - G) - abs(near - G)) < 0.01 and V != near:  # the kink of max
                    G = rng.gauss(0, 2)
                clipped = V != near and abs(near - G) > abs(V - G)
                held, free = held + clipped, free + (V != near and not clipped)
                returns[-1].append(G), expected[-1].append(0.0 if clipped else (V - G) / sum(lengths))
        x, fill = tensor(values, T), JUNK if number % 2 else 0.0
        for args, wanted in [((tensor(old, T, fill), c), expected), ((), [
                [(V - G) / sum(lengths) for V, G in zip(*rows)] for rows in zip(values, returns)])]:

            def loss(x):
                return ppo.value_loss(x, tensor(returns, T, fill), mask, *args)

            result = gradient(loss, x)
            agree(result, wanted, T)
            assert torch.allclose(result, slopes(loss, x), atol=1e-7)
            assert all(g == 0.0 for g, e in zip(result.view(-1), tensor(wanted, T).view(-1)) if e == 0)
    assert held > 10 and free > 10


# ---- A world small enough to list ------------------------------------------------------------------------------------
# Two letters and EOS; the padding token is the fourth of the vocabulary, and nothing keeps the policy from choosing it:
# as text it is nothing, yet a token with a probability. With at most two steps there are 13 replies: EOS, and 3 * 4.
PROMPTS = ["a", "b a b"]  # one token, and three: a batch has padding on the left
POINTS = {"": 0.2, "a": 1.0, "b": -0.6, "a a": 0.4, "a b": 1.6, "b a": -0.3, "b b": 1.2}


def human(prompts, replies, finished):
    """A score_fn: a reply's points, the opposite with the second prompt."""
    return [POINTS[" ".join(r.split())] * (1 if " ".join(p.split()) == "a" else -1) for p, r in zip(prompts, replies)]


def letters():
    """A real tokenizer of four words."""
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS, "a": 2, "b": 3}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def letter_actor(cfg, seed=0):
    torch.manual_seed(seed)
    actor = make_actor(GPT2LMHeadModel(GPT2Config(
        vocab_size=4, n_positions=16, n_layer=1, n_embd=16, n_head=2, initializer_range=0.2,
        bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD)), letters(), cfg)
    make_critic_random(actor)
    return actor


def all_replies(steps):
    """Every list of tokens that ends with its first EOS, or is cut off after `steps` tokens."""
    if steps == 0:
        return [[]]
    return [[EOS]] + [[v] + rest for v in (PAD, 2, 3) for rest in all_replies(steps - 1)]


def as_text(reply):
    return " ".join("ab"[v - 2] for v in reply if v >= 2)


def points_of(prompt, reply, cfg):
    """The score of a reply, less the penalty if it does not end."""
    return human([prompt], [as_text(reply)], None)[0] - (cfg.missing_eos_penalty if reply[-1] != EOS else 0)


@torch.no_grad()
def next_token(actor, prompt, prefix, cfg):
    """log pi(. | prompt, prefix) at cfg.temperature: one call of the bare language model, no padding and no mask."""
    ids = [{"a": 2, "b": 3}[word] for word in prompt.split()] + prefix
    logits = language_model(actor)(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, -1].tolist()
    return log_softmax([z / cfg.temperature for z in logits])


def every_state(actor, prompt, cfg):
    """prefix -> log pi(. | prompt, prefix), for all prefixes that a reply may have."""
    prefixes = {tuple(reply[:t]) for reply in all_replies(cfg.max_new_tokens) for t in range(len(reply))}
    return {prefix: next_token(actor, prompt, list(prefix), cfg) for prefix in prefixes}


@torch.no_grad()
def value_of_state(actor, prompt, prefix):
    """V(s): the critic's last value, before the next token is chosen; whichever that is must not matter."""
    ids = torch.tensor([[{"a": 2, "b": 3}[word] for word in prompt.split()]])
    values = [actor(ids, ids > 0, reply, reply >= 0)[1][0, -1].item()
              for reply in (torch.tensor([[*prefix, token]]) for token in (2, 3))]
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    return values[0]


def distribution(actor, prompt, cfg):
    """The exact probability of every reply, in the order of `all_replies`."""
    table = every_state(actor, prompt, cfg)
    return [math.exp(math.fsum(table[tuple(reply[:t])][reply[t]] for t in range(len(reply))))
            for reply in all_replies(cfg.max_new_tokens)]


def kl(p, q):
    return math.fsum(x * math.log(x / y) for x, y in zip(p, q) if x > 0)


def objective(p, reference, points, beta):
    """J = E[r] - beta KL(p || reference), exactly."""
    return math.fsum(x * r for x, r in zip(p, points)) - beta * kl(p, reference)


def best_possible(reference, points, beta):
    """pi* = pi_ref exp(r / beta) / Z, and J* = beta log Z."""
    weights = [q * math.exp(r / beta) for q, r in zip(reference, points)]
    return [w / math.fsum(weights) for w in weights], beta * math.log(math.fsum(weights))


def real_tokens(rollout, i):
    return rollout.reply_ids[i][rollout.mask[i]].tolist()


def test_samples_follow_the_exact_distribution_of_all_replies():
    """N_reply ~ Binomial(N, p_reply): 4 standard errors for each; every reply is one of the list, padded and masked."""
    cfg, N = make_config(temperature=0.8, max_new_tokens=2), 10000
    actor, replies = letter_actor(cfg), all_replies(2)
    prompt_ids = torch.tensor([[PAD, PAD, 2], [3, 2, 3]]).repeat(N, 1)
    torch.manual_seed(0)
    ids, mask = ppo.generate(actor, prompt_ids, prompt_ids != PAD, 2, EOS, PAD, cfg.temperature)
    assert ids.shape == mask.shape == (2 * N, 2) and (ids[~mask] == PAD).all() and mask[:, 0].all()
    for row, prompt in enumerate(PROMPTS):
        drawn = [tuple(r[m]) for r, m in zip(ids[row::2].numpy(), mask[row::2].numpy())]
        p = distribution(actor, prompt, cfg)
        assert math.fsum(p) == pytest.approx(1, abs=1e-9) and set(drawn) <= set(map(tuple, replies))
        for reply, x in zip(replies, p):
            assert abs(drawn.count(tuple(reply)) / N - x) < 4 * math.sqrt(x * (1 - x) / N) + 1e-4, (prompt, reply)


@pytest.mark.parametrize("whiten", [False, True])
def test_phase_one_agrees_with_the_formulas_reply_by_reply(whiten):
    """Every tensor of a rollout from scratch: each reply alone, log-probs state by state, then the formulas above."""
    cfg = make_config(temperature=0.8, max_new_tokens=3, kl_coef=0.3, gamma=0.9, lam=0.7, missing_eos_penalty=0.4,
                      whiten_rewards=whiten, whiten_advantages=whiten, micro_batch_size=5)
    points = lambda prompts, replies, finished: [len(p) - 0.3 * len(r) + 0.1 * f  # noqa: E731
                                                 for p, r, f in zip(prompts, replies, finished)]
    for seed in range(6):
        actor, reference = letter_actor(cfg, seed), letter_actor(cfg, seed + 100)
        prompts = (PROMPTS if seed else PROMPTS[:1]) * 8  # the first time, prompts of one token only
        torch.manual_seed(seed)
        r = ppo.collect_rollout(actor, reference, points, prompts, cfg)
        T = r.mask.shape[1]
        replies = [real_tokens(r, i) for i in range(len(prompts))]
        assert all(reply in all_replies(3) for reply in replies) and T == max(map(len, replies))
        assert torch.equal(r.mask, real([len(reply) for reply in replies], T)) and (r.reply_ids[~r.mask] == PAD).all()
        states = {(model, p): every_state(model, p, cfg) for model in (actor, reference) for p in set(prompts)}
        log_probs, ref = ([[states[model, p][tuple(reply[:t])][reply[t]] for t in range(len(reply))]
                           for p, reply in zip(prompts, replies)] for model in (actor, reference))
        ended = [reply[-1] == EOS for reply in replies]
        scores = [points([p], [as_text(reply)], [end])[0] - 0.4 * (not end)
                  for p, reply, end in zip(prompts, replies, ended)]
        V = {(p, state): value_of_state(actor, p, state) for p in set(prompts) for state in states[actor, p]}
        values = [[V[p, tuple(reply[:t])] for t in range(len(reply))] for p, reply in zip(prompts, replies)]
        agree(r.log_probs, log_probs, T, 1e-5), agree(r.ref_log_probs, ref, T, 1e-5), agree(r.values, values, T, 1e-5)
        assert r.scores.tolist() == pytest.approx(scores, abs=1e-5)
        rewards = [rewards_of_reply(*reply, 0.3) for reply in zip(log_probs, ref, scores)]
        if whiten:
            center = mean(flat(rewards))
            deviation = math.sqrt(mean([(x - center) ** 2 for x in flat(rewards)]))
            rewards = [[(x - center) / deviation + center for x in row] for row in rewards]
        agree(r.rewards, rewards, T, 1e-4)
        advantages = [gae_as_mixture(*reply, 0.9, 0.7) for reply in zip(rewards, values)]
        agree(r.returns, [[a + v for a, v in zip(*rows)] for rows in zip(advantages, values)], T, 1e-4)
        if whiten:
            center = mean(flat(advantages))
            deviation = math.sqrt(mean([(x - center) ** 2 for x in flat(advantages)]))
            advantages = [[(x - center) / deviation for x in row] for row in advantages]
        agree(r.advantages, advantages, T, 1e-3)


@pytest.mark.parametrize("value_clip,micro_batch_size", [(None, 64), (0.1, 3)])
def test_one_update_takes_the_step_of_the_formula_token_by_token(value_clip, micro_batch_size):
    """theta - lr grad(L), L = mean over all tokens of -surrogate + c_V/2 error^2 - c_ent H; each reply alone."""
    cfg = make_config(temperature=0.8, max_new_tokens=3, kl_coef=0.3, gamma=0.9, lam=0.7, ppo_epochs=1, minibatches=1,
                      vf_coef=0.3, ent_coef=0.2, clip_eps=0.1, value_clip=value_clip, max_grad_norm=1e9,
                      micro_batch_size=micro_batch_size)
    actor, reference = letter_actor(cfg, 1), letter_actor(cfg, 2)
    torch.manual_seed(0)
    r = ppo.collect_rollout(actor, reference, human_of_any_length, PROMPTS * 8, cfg)
    with torch.no_grad():  # some steps later: ratios left and right of the leash
        for p in actor.parameters():
            p += 0.05 * torch.randn_like(p)
    oracle, losses, clipped = copy.deepcopy(actor), [], 0
    for i in range(len(r.mask)):
        prompt, reply = r.prompt_ids[i:i + 1, r.prompt_mask[i]], r.reply_ids[i:i + 1, r.mask[i]]
        logits, values = oracle(prompt, torch.ones_like(prompt).bool(), reply, torch.ones_like(reply).bool())
        for t, token in enumerate(reply[0].tolist()):
            log_pi = (logits[0, t] / 0.8).log_softmax(-1)
            ratio, A = (log_pi[token] - r.log_probs[i, t]).exp(), r.advantages[i, t].item()
            V, V_old, G = values[0, t], r.values[i, t].item(), r.returns[i, t].item()
            error = (V - G) ** 2
            if value_clip is not None and abs(V.item() - V_old) > value_clip:
                error = max(error, (V_old + math.copysign(value_clip, V.item() - V_old) - G) ** 2)
            limit = 1.1 * A if A >= 0 else 0.9 * A
            clipped += limit < ratio.item() * A
            surrogate = ratio * A if ratio.item() * A <= limit else limit
            losses.append(-surrogate + 0.3 * 0.5 * error + 0.2 * (log_pi.exp() * log_pi).sum())
    (sum(losses) / len(losses)).backward()
    assert 0.1 < clipped / len(losses) < 0.9
    before = [p.detach().clone() for p in actor.parameters()]
    for p in actor.parameters():
        p.grad = torch.ones_like(p)  # left over from somewhere: must not count
    ppo.update_policy(actor, torch.optim.SGD(actor.parameters(), lr=1.0), r, cfg)
    size = max(p.grad.abs().max() for p in oracle.parameters() if p.grad is not None)
    assert size > 0.01
    for old, new, p in zip(before, actor.parameters(), oracle.parameters()):
        step = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(old - new, step, atol=2e-5 * size.item() + 1e-6)


def human_of_any_length(prompts, replies, finished):
    return [len(p) / 4 - len(r.split()) + r.count("a b") for p, r in zip(prompts, replies)]


# ---- 3: the exact KL -------------------------------------------------------------------------------------------------
def test_the_sampled_kl_agrees_with_the_sum_over_the_vocabulary_along_all_replies():
    """KL = sum over states of P(s) sum_v pi(v|s) log(pi(v|s) / ref(v|s)); samples within 4 standard errors."""
    cfg, N = make_config(temperature=0.7, max_new_tokens=4, missing_eos_penalty=0.0), 3000
    actor, reference = letter_actor(cfg, 3), letter_actor(cfg, 4)
    no_score = lambda prompts, replies, finished: [0.0] * len(prompts)  # noqa: E731
    for prompt in PROMPTS:
        pi, ref = every_state(actor, prompt, cfg), every_state(reference, prompt, cfg)
        exact = 0.0
        for s in pi:  # P(s): the chance to come by this state
            chance = math.exp(math.fsum(pi[s[:t]][s[t]] for t in range(len(s))))
            exact += chance * math.fsum(math.exp(a) * (a - b) for a, b in zip(pi[s], ref[s]))
        assert exact == pytest.approx(kl(distribution(actor, prompt, cfg), distribution(reference, prompt, cfg)))
        torch.manual_seed(0)
        r = ppo.collect_rollout(actor, reference, no_score, [prompt] * N, cfg)
        log_ratios = (r.log_probs - r.ref_log_probs).sum(dim=1)
        with torch.no_grad():
            batch = r.prompt_ids, r.prompt_mask, r.reply_ids, r.mask
            a, b = ((model(*batch)[0].double() / cfg.temperature).log_softmax(-1) for model in (actor, reference))
        along = torch.where(r.mask, (a.exp() * (a - b)).sum(-1), 0).sum(dim=1)
        spent = -(r.rewards.sum(dim=1)) / cfg.kl_coef
        for estimate in (log_ratios, along, spent):
            assert abs(estimate.mean().item() - exact) < 4 * estimate.std().item() / math.sqrt(N), prompt
        assert exact > 0.05 and along.std() < log_ratios.std()


# ---- 4: the optimum, exactly -----------------------------------------------------------------------------------------
def test_the_sampled_optimum_agrees_with_the_listed_one():
    """J* = beta log sum_y ref(y) exp(r(y) / beta), mean over prompts; effective size N (E w)^2 / E w^2."""
    cfg, N, worlds, samples = make_config(temperature=0.8, max_new_tokens=2, missing_eos_penalty=0.5), 4000, [], []
    reference = letter_actor(cfg, 7)
    torch.manual_seed(0)
    for prompt in PROMPTS:
        p = distribution(reference, prompt, cfg)
        worlds.append((p, [points_of(prompt, reply, cfg) for reply in all_replies(2)]))
        samples.append(ppo.collect_rollout(reference, reference, human, [prompt] * N, cfg).scores)
    for beta in (0.2, 0.5, 2.0):
        exact, sizes, variance = [], [], 0.0
        for p, points in worlds:
            star, j_star = best_possible(p, points, beta)
            assert objective(star, p, points, beta) == pytest.approx(j_star)
            ratio = math.fsum(s * s / q for s, q in zip(star, p))  # E w^2 / (E w)^2
            exact.append(j_star), sizes.append(N / ratio)
            variance += (beta * math.sqrt((ratio - 1) / N) / len(PROMPTS)) ** 2  # of a logarithm, to first order
        j_star, size = ppo.optimum(torch.stack(samples), beta)
        assert abs(j_star - mean(exact)) < 4 * math.sqrt(variance) and size == pytest.approx(mean(sizes), rel=0.1)


def train_in_the_small_world(seed):
    """The script's own Phase I and II until nothing moves -> for each prompt pi_ref, pi_PPO, the points; and cfg."""
    cfg = make_config(temperature=0.8, max_new_tokens=2, kl_coef=0.5, missing_eos_penalty=0.5, ppo_epochs=2,
                      minibatches=2, lam=0.95, clip_eps=0.2, micro_batch_size=512)
    actor, cycles, lr, batch_size = letter_actor(cfg, seed), 80, 7e-3, 384
    reference = copy.deepcopy(actor).requires_grad_(False)
    optimizer = torch.optim.Adam([{"params": language_model(actor).parameters()},
                                  {"params": critic_parameters(actor), "lr": 3 * lr}], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda cycle: 1 - cycle / cycles)
    torch.manual_seed(seed)
    for _ in range(cycles):
        rollout = ppo.collect_rollout(actor, reference, human, PROMPTS * (batch_size // 2), cfg)
        ppo.update_policy(actor, optimizer, rollout, cfg)
        schedule.step()
    return cfg, [(distribution(reference, prompt, cfg), distribution(actor, prompt, cfg),
                  [points_of(prompt, reply, cfg) for reply in all_replies(2)]) for prompt in PROMPTS]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=slow), pytest.param(2, marks=slow)])
def test_ppo_converges_to_the_exact_optimum(seed):
    """pi_PPO -> pi* = pi_ref exp(r / beta) / Z: total variation below 0.03, and J* - J = beta KL(pi_PPO || pi*)."""
    cfg, worlds = train_in_the_small_world(seed)
    for prompt, (reference, trained, points) in zip(PROMPTS, worlds):
        star, j_star = best_possible(reference, points, cfg.kl_coef)
        distance, start = (0.5 * math.fsum(abs(a - b) for a, b in zip(p, star)) for p in (trained, reference))
        j, j_start = (objective(p, reference, points, cfg.kl_coef) for p in (trained, reference))
        print(f"seed {seed}, prompt {prompt!r}: total variation {start:.3f} -> {distance:.4f}, "
              f"J {j_start:.4f} -> {j:.4f}, J* {j_star:.4f}: {(j - j_start) / (j_star - j_start):.2%} of the way")
        assert j_star - j == pytest.approx(cfg.kl_coef * kl(trained, star), abs=1e-9) and start > 0.2
        assert distance < 0.03 and (j - j_start) / (j_star - j_start) > 0.97
