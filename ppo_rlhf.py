#!/usr/bin/env python3
"""PPO for RLHF in one file. Read it from top to bottom, beside the articles.

    python ppo_rlhf.py            # pretraining, SFT, reward model, PPO, report; downloads nothing
    python ppo_rlhf.py --help     # every flag: what it does, often what happens when you turn it

THE FOUR MODELS are made of small GPT-2s. The critic is a small network on top of the actor (T7).
    actor         pi      the policy that PPO trains                           ActorCritic.lm
    critic        V       predicts, before a token, the reward still to come   ActorCritic.head
    reference     pi_ref  a frozen copy of the SFT model                       frozen(sft)
    reward model  r_RM    scores a finished reply in place of a human; frozen  RewardModel

THE SIX STEPS of article E. Every cycle of PPO goes through all of them (L1).
    Phase I   collect_rollout   1  the actor samples tokens                    generate
                                2  every token gets a reward                   token_rewards
                                3  the critic values every state               state_values
                                4  TD residuals                                td_residuals
                                5  GAE: advantages and returns                 gae
    Phase II  update_policy     6  clipped surrogate, value loss, entropy      policy_loss ...

THE THREE PARTS
    I    The algorithm         1 six steps, 2 models, 3 Phase I, Phase II, loop, 4 stages before PPO
    II   What it is tried on   5 a small world with a simulated human, 6 the report
    III  The workshop          7 your own data, 8 command line, 9 training runs, 10 main
Read Part I once, from top to bottom. It leaves to the workshop what is not the algorithm: files,
resuming, several processes, bfloat16, small batches for little memory, checks of the user's input.
These are the workshop's functions that it calls:
    encode, encode_prompts    turn texts into padded token ids; decode is the way back
    optimizer_step            one update on a loss: backward pass, limit to the gradient, AdamW
                              step; returns the loss and the metrics as numbers
    ask_score_fn              calls the reward function and checks what it returns
    world_to_train_on         the prompts of the built-in world that may be trained on
    draw, draw_prompts        give a random batch of a list; the prompts of one cycle
    share, gather, moments    divide work among processes; collect it; mean and variance over all
    same_in_all_processes     copies a model's weights from the first process to the others
    steps_to_do               counts the steps of a stage, and gives each one its random numbers
    cycles_to_do              does the same for PPO's cycles; it also saves and resumes the run
    chunks, repeat_each       cut a list into pieces; repeat each of its items
    check_logits              stops the run if the model computes NaN
    reseed, say               set the random seed for one purpose; print
From Part II it uses judge (the human), mean, validate, worth_keeping, and functions that compute,
print and write metrics and X-rays. `cfg` holds all flags. PPO's own flags are in PPOConfig, at the
end of section 1. Config (section 8) adds the others. Data (section 7) holds all texts.

LETTERS in the shape comments: B replies in the batch, T tokens of the longest reply, P tokens of
the longest prompt, V words in the vocabulary. In formulas, V(s_t) is the value of a state. `mask`
[B,T] is True on the real tokens of a reply, EOS included. A position where it is False must not
influence any result. Log-probs and KL use natural logarithms. A to E are the five articles. An id
such as S2 is a point in one of them: notes/guide.md lists all. You can read on without them.
Article E writes A_t for the action and for the advantage. Here the action is a_t, small.
"""
from __future__ import annotations

import copy
import csv
import gc
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from statistics import pstdev
from typing import NamedTuple

# A thread of torch that waits for another one keeps its processor busy. Other programs then have to
# wait. So this waiting is made short. The variable must be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
import transformers
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, pipeline)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.utils import logging


# ==================================================================================================
# I  THE ALGORITHM
# ==================================================================================================

# ==================================================================================================
# 1  The six steps
#
#    A reply is a series of decisions. The state s_t is the prompt and the reply so far. The action
#    a_t is the next token. The policy pi(a_t | s_t) is the language model. There is only one score,
#    for the whole reply. Steps 2 to 5 turn it into a judgement of every token. Step 6 learns.
# ==================================================================================================

# ---- Step 1: the actor samples tokens (S1) -------------------------------------------------------
def sample_tokens(logits, temperature: float = 1.0):
    """Draw one token per row: logits [B,V] -> tokens [B].

    a_t ~ pi(. | s_t) = softmax(logits / temperature)

    The probabilities cut a line into pieces, and a random point falls into one. With 32 bits,
    rounding would shift the pieces. torch.multinomial is slower: V random numbers per token.
    """
    probabilities = (logits.double() / temperature).softmax(dim=-1)                     # [B,V]
    cumulative = probabilities.cumsum(dim=-1)                                           # [B,V]
    point = torch.rand(len(logits), 1, dtype=torch.double, device=logits.device)        # [B,1]
    point = point * cumulative[:, -1:]  # the line ends at 1, up to rounding: no point lies past it
    # Tokens count from 0: if 3 pieces end before the point, it lies in the piece of token 3.
    return (cumulative <= point).sum(dim=-1)                                            # [B]


@torch.no_grad()
def generate(actor, prompt_ids, prompt_mask, max_new_tokens: int, eos_id: int, pad_id: int,
             temperature: float = 1.0):
    """Sample one reply per prompt, token by token, until EOS or the limit (S1, L5).

    prompt_ids, prompt_mask: [B,P], padded on the left, so that all replies start in one column.
    Returns reply_ids and mask [B,T], padded on the right, because replies grow to the right and end
    at different times. T is the longest reply. The first pass reads the prompt. Every later pass
    reads only the newest token, because the cache stores what was computed before.
    """
    ids, cache = prompt_ids, None
    seen_mask = prompt_mask  # the real tokens of the prompt and the reply so far       # [B,P+t]
    running = torch.ones_like(prompt_mask[:, 0])  # True: the reply has no EOS yet      # [B]
    reply_columns, mask_columns = [], []
    for _ in range(max_new_tokens):
        logits, cache = actor.next_token(ids, seen_mask, cache)                         # [B,V]
        tokens = sample_tokens(logits, temperature)                                     # [B]
        tokens = torch.where(running, tokens, pad_id)
        reply_columns.append(tokens)
        mask_columns.append(running)  # before `running` changes: EOS itself is a real token
        seen_mask = torch.cat([seen_mask, running.unsqueeze(1)], dim=1)
        running = running & (tokens != eos_id)
        if not running.any():
            break
        ids = tokens.unsqueeze(1)                                                       # [B,1]
    return torch.stack(reply_columns, dim=1), torch.stack(mask_columns, dim=1)          # both [B,T]


def token_log_probs(logits, tokens):
    """log pi(a_t | s_t) of the tokens that were drawn: logits [B,T,V], tokens [B,T] -> [B,T] (T9).

    log softmax(z)_a = z_a - logsumexp(z), for the token a that was drawn. PPO has divided the
    logits z by the temperature before (`read_replies`). SFT takes them as they are.
    """
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)                        # [B,T]
    return chosen - logits.logsumexp(dim=-1)


# ---- Step 2: a reward for every token (S2) -------------------------------------------------------
def token_rewards(log_probs, ref_log_probs, scores, mask, kl_coef: float):
    """Token-level rewards [B,T], from log-probs [B,T] and the scores of whole replies [B].

    r_t = -beta * (log pi(a_t|s_t) - log pi_ref(a_t|s_t))        every token
    r_t = the same + r_RM                                        the last real token

    beta is E's k_kl, here `kl_coef`. pi is the policy that has just sampled the reply (step 6 calls
    it pi_old). Rewards are plain numbers; no gradient flows through them.
    E says that every deviation costs. This holds on average only: a token costs something if pi
    gives it more probability than the reference does, and earns something if pi gives it less.
    Add up log pi - log pi_ref over the tokens of a reply. Over many replies that pi samples, the
    mean of this sum is KL(pi || pi_ref), which is never negative: on average a reply pays.
    Why pay for distance? The reward model learned from replies of SFT. A policy that goes far away
    from SFT can find nonsense that scores high, as the "hahaha" of article D (P1, P2).

    The score belongs to the last token of the reply. The last column is padding for most replies.
    Step 4 ignores padding, so a score put there disappears, and no error is shown (N4).
    """
    kl = torch.where(mask, log_probs - ref_log_probs, 0)                                # [B,T]
    score_at_end = torch.zeros_like(kl)                                                 # [B,T]
    last = mask.sum(dim=1) - 1  # column of the last real token of each reply           # [B]
    score_at_end[torch.arange(len(mask)), last] = scores
    return -kl_coef * kl + score_at_end


# ---- Step 3: the critic values every state (S3) --------------------------------------------------
def value_head(width: int) -> nn.Module:
    """A small network: hidden state -> one number. Critic and reward model each have one."""
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                         nn.Linear(2 * width, 1))
    # V begins at 0, because the mean score of SFT's replies is 0: see `normalize`, section 4 (N5).
    nn.init.zeros_(head[-1].weight)
    nn.init.zeros_(head[-1].bias)
    return head


def state_values(head, hidden):
    """V(s_t) of every state: hidden states [B,T,width] -> [B,T].

    V(s_t) is the total reward that the critic still expects when it has read the prompt and the
    tokens before a_t. E's table prints it beside token t. The advantage will tell whether a_t was
    better than expected. So the expectation must be formed before a_t is known: hidden[:, t] comes
    from the position before a_t (`ActorCritic.forward`, section 2, cuts it so).

    `detach` stops the gradient. So the value loss trains the head, and it cannot spoil the layers
    that the policy uses. Often the critic has a language model of its own (notes/experiments.md).
    """
    return head(hidden.detach().float()).squeeze(-1)


# ---- Step 4: TD residuals (S4) -------------------------------------------------------------------
def td_residuals(rewards, values, mask, gamma: float):
    """delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)        all [B,T]

    It is what came, plus what the critic expects now, minus what the critic expected before.
    After the last token of a reply nothing more can come, so V(s_{t+1}) is 0 there. A reply that
    was cut off at the limit ends there, too: it gets its score and nothing afterwards. The critic's
    output on padding must not be used.
    """
    values = torch.where(mask, values, 0)  # so V(s_{t+1}) is 0 after the last token
    next_values = F.pad(values[:, 1:], (0, 1))  # shifted left by one column; the last one is 0
    return torch.where(mask, rewards + gamma * next_values - values, 0)


# ---- Step 5: generalised advantage estimation (S5; Schulman et al. 2015) -------------------------
def gae(rewards, values, mask, gamma: float, lam: float):
    """Advantages and returns, both [B,T].

    A_t = sum over k of (gamma*lambda)^k * delta_{t+k}
        = delta_t + gamma*lambda * A_{t+1}              computed backwards, from the last token
    G_t = A_t + V(s_t)                                  the return: what the critic should have said

    The advantage says how much better it went from token t on than the critic expected. Step 6
    makes a token with A_t > 0 more likely and a token with A_t < 0 less likely.

    lambda = 0   G_t = r_t + gamma * V(s_{t+1})      little noise, but as wrong as the critic (bias)
    lambda = 1   G_t = r_t + gamma * r_{t+1} + ...   the rewards that came; no bias, much noise
    With lambda = 1 a delta adds gamma * V(s_{t+1}), and the next one takes it away: it cancels.
    0.95 is usual (T2). E calls G_t the real return. If lambda < 1, the critic's guess is part of
    it. G_t is made before `whiten` (below) scales A_t: the critic learns in the rewards' unit.
    """
    deltas = td_residuals(rewards, values, mask, gamma)                                 # [B,T]
    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[:, 0])                                          # [B]
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage  # on padding, both terms are 0
        advantages[:, t] = advantage
    returns = torch.where(mask, advantages + values, 0)
    return advantages, returns


def whiten(x, mask):
    """Shift x [B,T] to mean 0 and scale it to variance 1, over the real tokens (N7)."""
    mean, variance = moments(x, mask)
    return torch.where(mask, (x - mean) / math.sqrt(variance + 1e-8), 0)


# ---- Step 6: three losses (S6) -------------------------------------------------------------------
# E's total loss L = C_clip + c_V * C_V + C_ent is, in the names of this file,
#     policy_loss + vf_coef * value_loss - ent_coef * entropy
# The entropy is subtracted: we minimise the loss, and we want the entropy to stay large.

def masked_mean(x, mask):
    """Mean of x [B,T] over the real tokens (T8). `x * mask` is not enough: 0 * NaN is NaN.
    policy_loss and value_loss mask their inputs, too: in a gradient, 0 * NaN is also NaN."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def policy_loss(log_probs, old_log_probs, advantages, mask, clip_eps: float):
    """E's C_clip, the clipped surrogate: tensors [B,T] -> (loss, clip_fraction), two scalars.

    rho_t  = pi(a_t|s_t) / pi_old(a_t|s_t) = exp(log pi - log pi_old)
    C_clip = -mean over t of min(rho_t * A_t, clip(rho_t, 1-eps, 1+eps) * A_t)   (PPO paper, eq. 7)

    pi_old is the policy that sampled this batch. It is not the reference: the reference never
    changes, and pi_old changes in every cycle (T5). There are four cases (T4):
        1. A > 0, rho <= 1+eps   the gradient makes the token more likely
        2. A > 0, rho >  1+eps   it is far enough: the gradient is 0
        3. A < 0, rho >= 1-eps   the gradient makes the token less likely
        4. A < 0, rho <  1-eps   it is far enough: the gradient is 0

    Why the min? Take eps = 0.2, A = 1, rho = 0.5: the token should get more likely, and it has
    become less likely. The clipped term is 0.8, a constant: its gradient is 0, and the mistake
    would stay. The min takes rho * A = 0.5, which brings the token back. Likewise, if A = -1 and
    rho = 1.5, the clipped term is -1.2, and the min takes rho * A = -1.5.

    clip_fraction is the share of tokens whose gradient the clip has set to 0. The clip is a brake
    and not a wall: other tokens share the same weights and can push rho further.
    """
    ratio = torch.exp(torch.where(mask, log_probs - old_log_probs, 0))                  # [B,T]
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    loss = -masked_mean(torch.min(unclipped, clipped), mask)
    braked = clipped < unclipped  # cases 2 and 4: min takes the clipped term, a constant
    return loss, masked_mean(braked.float(), mask)


def value_loss(values, returns, mask):
    """E's C_V = 1/2 * mean over t of (V(s_t) - G_t)^2: tensors [B,T] -> scalar (S6, L8)."""
    error = torch.where(mask, values - returns, 0)                                      # [B,T]
    return 0.5 * masked_mean(error ** 2, mask)


def entropy(logits):
    """H(pi(. | s_t)) = -sum over v of pi_v * log pi_v: logits [B,T,V] -> [B,T].

    It is large while the policy is undecided. E's C_ent keeps it from falling to 0 too early.
    """
    log_probs = logits.log_softmax(dim=-1).clamp(min=-1e9)  # 0 * -infinity would be NaN    [B,T,V]
    return -(log_probs.exp() * log_probs).sum(dim=-1)


# ---- The settings of these steps: each field is a flag, `lr` is --lr -----------------------------
@dataclass
class PPOConfig:
    """What can be changed in PPO, with usual ranges. HfArg describes a flag; cfg.lr is its value.
    Config (section 8) adds the other flags. A flag that may be 0 must be added to RANGES there."""
    cycles: int = HfArg(default=60, help=(
        "How often PPO runs Phase I and Phase II. 20 are enough to see the idea. (L1)"))
    batch_size: int = HfArg(default=64, help=(
        "Replies per cycle, 32 to 512. A larger batch gives a steadier gradient and is slow. (P3)"))
    replies_per_prompt: int = HfArg(default=1, help=(
        "Replies to each prompt that is drawn, 1 to 8. It must divide batch_size. (L5)"))
    max_new_tokens: int = HfArg(default=32, help=(
        "The longest reply, in tokens. If it is too short, replies end unfinished. (N3)"))
    temperature: float = HfArg(default=0.7, help=(
        "Divides PPO's logits, 0.7 to 1. If it is low, the policy tries little that is new. (L5)"))
    kl_coef: float = HfArg(default=0.1, help=(
        "beta, the price of KL, 0.01 to 0.2. With 0, PPO can cheat the reward model. (S2, P2)"))
    missing_eos_penalty: float = HfArg(default=1.0, help=(
        "Subtracted from the score of a reply that does not end, 0 to 5. (N3)"))
    gamma: float = HfArg(default=1.0, help=(
        "Discount of later rewards, 0.9 to 1. Below 1, early tokens feel less of the score. (S4)"))
    lam: float = HfArg(default=0.95, help=(
        "GAE's lambda, 0 to 1. 0 trusts the critic, 1 trusts only the rewards that came. (S5, T2)"))
    whiten_advantages: bool = HfArg(default=False, help=(
        "Scale the advantages of a batch to mean 0 and variance 1. (N7, P3)"))
    ppo_epochs: int = HfArg(default=4, help=(
        "How often Phase II goes through the batch, 2 to 4. More move pi far from pi_old. (N9)"))
    minibatches: int = HfArg(default=2, help=(
        "Updates per epoch, 1 to 8. It must divide batch_size. More are faster and noisier."))
    lr: float = HfArg(default=3e-4, help=(
        "Learning rate of the actor, below SFT's. It falls to 0. With --model: 1e-5. (P3)"))
    clip_eps: float = HfArg(default=0.2, help=(
        "epsilon, 0.1 to 0.3: how far A may move the ratio from 1. Then its gradient is 0. (S6)"))
    vf_coef: float = HfArg(default=0.5, help=(
        "c_V, the weight of the value loss, 0.1 to 1. Only the critic learns from it. (S6)"))
    ent_coef: float = HfArg(default=0.001, help=(
        "The weight of the entropy, 0 to 0.02. Too high: the policy talks at random. (S6)"))


# ==================================================================================================
# 2  The models
#
#    A language model never looks ahead. So one pass over prompt and reply tells what it thought
#    at every position when it knew only the tokens up to there ("teacher forcing"). It gives all
#    log-probs and values of a reply. Only sampling must go token by token.
# ==================================================================================================
class Reply(NamedTuple):
    """One reply to one prompt, as text."""
    prompt: str
    text: str
    finished: bool  # does it end with EOS? If not, it was cut off at the limit


def position_ids(mask):
    """0, 1, 2 ... for the real tokens of mask [B,L].

    The library would count padding too. Then GPT-2 would give a reply other probabilities in a
    batch with a longer prompt. (Models with rotary positions do not mind: only distances count.)
    """
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


class HeadedModel(nn.Module):
    """A causal language model with a small network on top: ActorCritic or RewardModel."""

    def __init__(self, lm, tokenizer=None, cfg: Config | None = None):
        super().__init__()
        # eval() always, also in training: with dropout, ratio and KL would be noise (N8).
        self.lm = lm.eval()
        hidden_width = lm.get_output_embeddings().weight.shape[1]  # a matrix, V x width
        self.head = value_head(hidden_width)
        self.tokenizer = tokenizer
        self.cfg = cfg or Config()  # all flags (section 8)
        self.to(self.cfg.device)


class ActorCritic(HeadedModel):
    """Actor and critic: `lm` is the policy, `head` reads V(s_t) from its hidden states.

    Do not confuse the critic with the reward model, which scores finished replies and is frozen.
    The critic predicts, in the middle of a reply, what is still to come. That depends on the
    policy, so the critic learns during PPO (T7).
    """

    def forward(self, prompt_ids, prompt_mask, reply_ids, reply_mask):
        """Read whole replies in one pass -> logits and values in float32 (S1, S3).

        logits [B,T,V]: reply token t was drawn from softmax(logits[:, t] / temperature).
        values [B,T]: values[:, t] = V(s_t), the value of the state before token t.
        """
        T = reply_ids.shape[1]
        ids = torch.cat([prompt_ids, reply_ids], dim=1)                                 # [B,P+T]
        mask = torch.cat([prompt_mask, reply_mask], dim=1)                              # [B,P+T]
        positions = position_ids(mask)                                                  # [B,P+T]
        # The output at a position predicts the next token. With P=2 and T=3:
        #     the model reads   p0 p1 a0 a1
        #     it predicts       p1 a0 a1 a2    and we keep the last T outputs
        #     with the values      V0 V1 V2    of the states before a0, a1, a2
        out = self.lm(input_ids=ids[:, :-1], attention_mask=mask[:, :-1].long(),
                      position_ids=positions[:, :-1], logits_to_keep=T,
                      output_hidden_states=True, use_cache=False)
        hidden = out.hidden_states[-1][:, -T:]                                      # [B,T,width]
        return out.logits.float(), state_values(self.head, hidden)                  # [B,T,V] [B,T]

    def next_token(self, ids, mask, cache):
        """Feed the newest tokens ids [B,L] -> logits [B,V] of the next one, and the longer cache.
        mask covers all tokens so far. cache is None in the first call."""
        positions = position_ids(mask)[:, -ids.shape[1]:]  # of the newest tokens
        out = self.lm(input_ids=ids, attention_mask=mask.long(), position_ids=positions,
                      past_key_values=cache, use_cache=True, logits_to_keep=1)
        check_logits(out.logits[:, -1])
        return out.logits[:, -1].float(), out.past_key_values


class RewardModel(HeadedModel):
    """Its head reads the score at the last token, because only there it has seen all (N4)."""

    def forward(self, prompt_ids, prompt_mask, reply_ids, reply_mask):
        """Scores [B]. `normalize` gives the scores of SFT's replies mean 0 and deviation 1."""
        ids = torch.cat([prompt_ids, reply_ids], dim=1)                                 # [B,P+T]
        mask = torch.cat([prompt_mask, reply_mask], dim=1)                              # [B,P+T]
        # No logits are needed. But logits_to_keep=0 would mean all of them, so it is 1.
        out = self.lm(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask),
                      output_hidden_states=True, use_cache=False, logits_to_keep=1)
        last = prompt_ids.shape[1] + reply_mask.sum(dim=1) - 1  # column -1 may be padding  # [B]
        rows = torch.arange(len(last), device=last.device)
        hidden = out.hidden_states[-1][rows, last]                                      # [B,width]
        return self.head(hidden.float()).squeeze(-1)

    @torch.no_grad()
    def score(self, prompts: list[str], completions: list[str], finished: list[bool]):
        """The reward model as any other reward function: texts -> a list of numbers."""
        replies = [Reply(*fields) for fields in zip(prompts, completions, finished)]
        scores = []
        for part in chunks(replies, self.cfg.micro_batch_size):
            scores += self(*encode(self, part)).tolist()
        return scores


def frozen(model: nn.Module) -> nn.Module:
    """A copy that learns nothing: the reference. pi_old needs no copy, only its log-probs (T5)."""
    return copy.deepcopy(model).requires_grad_(False)


# ==================================================================================================
# 3  PPO: Phase I, Phase II and the loop (L1)
# ==================================================================================================
@dataclass
class Rollout:
    """What Phase I collects and Phase II learns from. The float tensors are 0 on padding."""
    replies: list[Reply]         # B replies as text
    group: torch.Tensor          # [B]    equal numbers: replies to the same prompt
    prompt_ids: torch.Tensor     # [B,P]
    prompt_mask: torch.Tensor    # [B,P]
    reply_ids: torch.Tensor      # [B,T]
    mask: torch.Tensor           # [B,T]  True on real reply tokens, EOS included
    log_probs: torch.Tensor | None = None      # [B,T]  log pi_old(a_t|s_t), all we keep of pi_old
    values: torch.Tensor | None = None         # [B,T]  V(s_t)
    ref_log_probs: torch.Tensor | None = None  # [B,T]  log pi_ref(a_t|s_t)
    scores: torch.Tensor | None = None         # [B]    r_RM, minus the penalty if unfinished
    rewards: torch.Tensor | None = None        # [B,T]  r_t
    advantages: torch.Tensor | None = None     # [B,T]  A_t
    returns: torch.Tensor | None = None        # [B,T]  G_t

    def __len__(self):
        return len(self.mask)

    def __getitem__(self, index) -> Rollout:
        """Some rows as a smaller rollout. index: row numbers in a tensor, or a slice like 0:8."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(part, name, value[index])
        rows = torch.arange(len(self), device=self.mask.device)[index]  # a list needs row numbers
        part.replies = [self.replies[row] for row in rows.tolist()]
        return part


# ---- Phase I: collect data, steps 1 to 5 ---------------------------------------------------------
def sample_replies(actor, prompts: list[str], cfg) -> Rollout:
    """One reply to each prompt, as text and as tokens. The other fields stay empty."""
    tokenizer = actor.tokenizer
    prompt_ids, prompt_mask = encode_prompts(actor, prompts)
    reply_ids, mask = generate(actor, prompt_ids, prompt_mask, cfg.max_new_tokens,
                               tokenizer.eos_token_id, tokenizer.pad_token_id, cfg.temperature)
    ended = (reply_ids == tokenizer.eos_token_id) & mask                                # [B,T]
    finished = ended.any(dim=1).tolist()
    texts = decode(tokenizer, reply_ids)
    replies = [Reply(*fields) for fields in zip(prompts, texts, finished)]
    first_seen_at = [prompts.index(prompt) for prompt in prompts]  # equal for equal prompts
    group = torch.tensor(first_seen_at, device=mask.device)                             # [B]
    return Rollout(replies, group, prompt_ids, prompt_mask, reply_ids, mask)


def read_replies(actor, rollout: Rollout, temperature: float):
    """Teacher forcing: log pi(a_t|s_t) [B,T], V(s_t) [B,T] and the logits [B,T,V].

    Phase I takes the old log-probs from here, and Phase II takes the new ones from here. So the
    first ratio is 1: same weights, same code. Log-probs saved during sampling would have slightly
    different rounding errors. The temperature must be that of sampling. Otherwise the tokens would
    come from one distribution and the log-probs from another (L5).
    """
    logits, values = actor(rollout.prompt_ids, rollout.prompt_mask, rollout.reply_ids, rollout.mask)
    logits = logits / temperature
    return token_log_probs(logits, rollout.reply_ids), values, logits


@torch.no_grad()
def read_without_gradient(actor, rollout: Rollout, cfg):
    """log pi(a_t|s_t) and V(s_t), both [B,T], 0 where mask is False."""
    log_probs, values = [], []
    for part in chunks(rollout, cfg.micro_batch_size):
        part_log_probs, part_values, _ = read_replies(actor, part, cfg.temperature)
        log_probs.append(torch.where(part.mask, part_log_probs, 0))
        values.append(torch.where(part.mask, part_values, 0))
    return torch.cat(log_probs), torch.cat(values)


def score_replies(score_fn, replies: list[Reply], cfg):
    """r_RM of each reply -> [B], minus a penalty if it has no EOS and was cut off (N3)."""
    scores = torch.tensor(ask_score_fn(score_fn, replies))                              # [B]
    unfinished = torch.tensor([not reply.finished for reply in replies])                # [B]
    return scores - cfg.missing_eos_penalty * unfinished


def sample_and_score(actor, reference, score_fn, prompts: list[str], cfg) -> Rollout:
    """Step 1, and what step 2 needs: log-probs and scores. Training and evaluation both do this.
    The pass that gives the actor's log-probs gives the values, too. So step 3 is done here."""
    rollout = sample_replies(actor, prompts, cfg)
    rollout.log_probs, rollout.values = read_without_gradient(actor, rollout, cfg)
    rollout.ref_log_probs, _ = read_without_gradient(reference, rollout, cfg)
    rollout.scores = score_replies(score_fn, rollout.replies, cfg).to(rollout.mask.device)
    return rollout


def collect_rollout(actor, reference, score_fn, prompts: list[str], cfg) -> Rollout:
    """Phase I: one reply to each prompt, with an advantage and a return for each token (L1)."""
    rollout = sample_and_score(actor, reference, score_fn, prompts, cfg)                # Steps 1, 3
    rollout.rewards = assign_rewards(rollout, cfg)                                      # Step 2
    rollout.advantages, rollout.returns = estimate_advantages(rollout, cfg)             # Steps 4, 5
    if cfg.whiten_advantages:
        rollout.advantages = whiten(rollout.advantages, rollout.mask)
    return rollout


# ---- Four places where algorithms differ ---------------------------------------------------------
# To try another algorithm, change one of these functions, or assign your own to its name from
# outside: `ppo_rlhf.estimate_advantages = mine`. The first two get the whole rollout, the others a
# minibatch, or a piece of it that counts by its tokens: so a loss must be a mean over tokens.
# Report and validation use none of them. `A used` in xray.jsonl shows the advantages of the loss.

def assign_rewards(rollout: Rollout, cfg):
    """Step 2 of a rollout -> [B,T]. A price for every token would be subtracted here."""
    return token_rewards(rollout.log_probs, rollout.ref_log_probs, rollout.scores, rollout.mask,
                         cfg.kl_coef)


def estimate_advantages(rollout: Rollout, cfg):
    """Steps 4 and 5 of a rollout -> advantages and returns, both [B,T].

    GRPO's baseline would go here. It needs no critic: each token gets the sum of its reply's
    rewards, minus the mean of these sums over the group, the replies to the same prompt:

        sums = rollout.rewards.sum(dim=1)                                               # [B]
        same = (rollout.group[:, None] == rollout.group).float()                        # [B,B]
        better = sums - (same @ sums) / same.sum(dim=1)                                 # [B]
        deviation = ((same @ better.square()) / same.sum(dim=1)).sqrt()                 # [B]
        better = better / (deviation + 1e-4)  # only GRPO does this                     # [B]
        advantages = torch.where(rollout.mask, better[:, None], 0)                      # [B,T]
        return advantages, advantages  # without a critic, the returns are not used

    --replies_per_prompt 4 makes the groups (8, if a prompt is drawn twice). With --vf_coef 0 the
    critic learns nothing: ignore value_loss and explained_variance. GRPO has KL in the loss (see
    actor_loss). With KL in the rewards, as here, the deviation falls to 0 near the optimum.
    """
    return gae(rollout.rewards, rollout.values, rollout.mask, cfg.gamma, cfg.lam)


def actor_loss(log_probs, rollout: Rollout, cfg):
    """Step 6 for the policy: new log-probs [B,T] of a minibatch -> (loss, clip_fraction).

    KL in the loss would be added here: beta * masked_mean(0.5 * x ** 2, mask), with x = log_probs -
    rollout.ref_log_probs, set to 0 on padding. `assign_rewards` must then pass 0 in place of
    cfg.kl_coef, or KL is paid twice (T6). The gradient of 0.5 * x^2 is x * grad log pi, on average
    that of the KL at this token. (In the reward, a token pays for later ones, too.) The mean of x
    is the KL, but as a loss it does nothing: the gradient is sum(pi * grad log pi) = grad sum(pi)
    = 0 on average. GRPO's exp(-x) - 1 + x has the gradient of KL(pi_ref || pi).
    """
    return policy_loss(log_probs, rollout.log_probs, rollout.advantages, rollout.mask, cfg.clip_eps)


def critic_loss(values, rollout: Rollout, cfg):
    """Step 6 for the critic: new values [B,T] of a minibatch -> loss."""
    return value_loss(values, rollout.returns, rollout.mask)


# ---- Phase II: learn from the data, step 6 -------------------------------------------------------
def ppo_loss(actor, rollout: Rollout, cfg):
    """L = C_clip + c_V * C_V - c_ent * H of a minibatch -> loss, number of tokens, metrics."""
    log_probs, values, logits = read_replies(actor, rollout, cfg.temperature)
    pg_loss, clip_fraction = actor_loss(log_probs, rollout, cfg)                 # C_clip
    v_loss = critic_loss(values, rollout, cfg)                                   # C_V
    mean_entropy = masked_mean(entropy(logits), rollout.mask)                           # H
    loss = pg_loss + cfg.vf_coef * v_loss - cfg.ent_coef * mean_entropy
    metrics = {
        "policy_loss": pg_loss,
        "value_loss": v_loss,
        "entropy": mean_entropy,
        "clip_fraction": clip_fraction}
    metrics.update(distance_from_old(log_probs, rollout))  # approx_kl, first_log_ratio
    return loss, rollout.mask.sum(), metrics


def update_policy(actor, optimizer, rollout: Rollout, cfg) -> dict[str, float]:
    """Phase II: several epochs over the rollout, in shuffled minibatches, one update each (N9).

    The rollout was expensive, so it is used several times. But its tokens come from the old policy.
    The ratio corrects for that, and the clip keeps the new policy near the old one (T3).
    Returns metrics: means over all updates, except first_log_ratio, lr and explained_variance.
    first_log_ratio is the mean of |log rho| before any update: it is 0, apart from rounding.
    """
    history = []
    for epoch in range(cfg.ppo_epochs):
        order = torch.randperm(len(rollout), device=rollout.mask.device)
        for rows in order.chunk(cfg.minibatches):  # the shuffled row numbers, in equal parts
            # optimizer_step (section 9): backward pass, limit to the gradient, AdamW's step
            metrics = optimizer_step(actor, optimizer, ppo_loss, rollout[rows], cfg)
            history.append(metrics)
    metrics = column_means(history)
    metrics["first_log_ratio"] = history[0]["first_log_ratio"]
    metrics["lr"] = optimizer.param_groups[0]["lr"]
    metrics["explained_variance"] = explained_variance(rollout)  # of Phase I's values
    return metrics


# ---- The loop ------------------------------------------------------------------------------------
def make_optimizer(actor, cfg):
    """AdamW for actor and critic. Their learning rates fall to 0 over the run.

    The critic starts from nothing and should be ahead of the actor, so it learns ten times as fast.
    There is no weight decay. beta_2 and eps are not Adam's usual 0.999 and 1e-8. Adam's step is
    lr * m / sqrt(v), from running means m of the gradients and v of their squares. Late in training
    both are near 0. Then a rare bad reply brings a large gradient g: m = (1 - beta_1) * g = 0.1 g,
    v = (1 - beta_2) * g^2. With beta_2 = 0.999 the step is 0.1 / sqrt(0.001) = 3.2 times lr, which
    harms other replies; with 0.95 it is 0.45 times lr. eps 1e-5 damps rounding noise.
    """
    groups = [{"params": actor.lm.parameters(), "lr": cfg.lr},
              {"params": actor.head.parameters(), "lr": 10 * cfg.lr}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)


def train_ppo(actor, reference, score_fn, prompts: dict[str, list[str]], cfg) -> list[dict]:
    """PPO's loop (L1). Each validation copies the policy to `kept`, unless an earlier policy was
    clearly better. In the end `actor` becomes the policy that was kept last (L6).

    PPO is on-policy: the next cycle uses nothing of this batch, because old replies are replies of
    another policy. Returns the metrics, one dict per cycle: the rows of metrics.csv.
    """
    optimizer = make_optimizer(actor, cfg)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.0, total_iters=max(cfg.cycles, 1))
    kept = frozen(actor)
    log = []
    training = {"actor": actor, "kept": kept, "optimizer": optimizer, "schedule": schedule}
    for cycle, rng in cycles_to_do(training, log, cfg):  # to resume, it loads training and log
        start = time.perf_counter()
        asked = draw_prompts(prompts["train"], rng, cfg)
        rollout = collect_rollout(actor, reference, score_fn, asked, cfg)    # Phase I: steps 1 to 5
        metrics = update_policy(actor, optimizer, rollout, cfg)              # Phase II: step 6
        schedule.step()
        if cycle == 0:
            show_first_update(rollout, kept, actor, cfg)  # `kept` is still the SFT policy
        record_xray(cycle + 1, actor, reference, score_fn, prompts["validation"], cfg, rollout)
        metrics["validation"] = math.nan
        if (cycle + 1) % cfg.eval_every == 0 or cycle + 1 == cfg.cycles:
            objectives = validate(actor, reference, score_fn, prompts["validation"], cfg)
            if worth_keeping(objectives, log):
                kept.load_state_dict(actor.state_dict())
            metrics["validation"] = mean(objectives)
        record_cycle(log, cycle, rollout, metrics, time.perf_counter() - start, cfg)
    actor.load_state_dict(kept.state_dict())
    return log


# ==================================================================================================
# 4  The stages before PPO: pretraining, supervised fine-tuning (SFT), reward model (L2)
#
#    Each stage begins with the weights of the one before. Stages 0 and 1 imitate texts. Stage 2
#    learns to order replies. PPO takes two things from here: the SFT model, where it starts and
#    from which it must not go far, and the reward model, which says what is good.
# ==================================================================================================
def rise_and_fall(step: int, steps: int) -> float:
    """The factor of the learning rate: it rises for a tenth of the steps, then falls like a cosine.
    `step` counts from 0. No step has the factor 0: nothing would be learned in it."""
    rise = steps // 10
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise + 1))


def train_supervised(model, loss_fn, examples: list, batch_size: int, steps: int, lr: float,
                     stage: str, cfg):
    """`steps` updates of AdamW on random batches. The learning rate rises for a tenth, then falls.

    loss_fn(model, batch, cfg) -> (mean loss, number of tokens or rankings in this mean, metrics).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rise_and_fall(step, steps))
    losses = []
    for rng in steps_to_do(stage, steps, cfg):
        batch = draw(examples, batch_size, rng)
        metrics = optimizer_step(model, optimizer, loss_fn, batch, cfg)
        losses.append(metrics["loss"])
        schedule.step()
    optimizer.zero_grad()  # the gradients would fill memory up to the end of the run
    if losses:
        say(f"{stage}: {steps} steps, loss {mean(losses[-50:]):.3f}")
    return model


# ---- Stages 0 and 1: imitate texts ---------------------------------------------------------------
def imitation_loss(actor, replies: list[Reply], cfg):
    """L = -mean over t of log pi(a_t | s_t), over the tokens of the reply, EOS included.

    Real pretraining predicts every token of its texts; here the prompt is only read.
    """
    prompt_ids, prompt_mask, reply_ids, mask = encode(actor, replies)
    logits, _ = actor(prompt_ids, prompt_mask, reply_ids, mask)                         # [B,T,V]
    loss = masked_mean(-token_log_probs(logits, reply_ids), mask)
    return loss, mask.sum(), {}


def pretrain(actor, texts: list[Reply], cfg) -> ActorCritic:
    """Stage 0 stands in for GPT-2's pretraining: the model learns to write, not to be polite."""
    return train_supervised(actor, imitation_loss, texts, 16, cfg.pretrain_steps, cfg.sft_lr,
                            "pretraining", cfg)


def finetune(pretrained, demos: list[Reply], cfg) -> ActorCritic:
    """Stage 1: imitate demonstrations. Most are correct, and nearly half are mechanical (D)."""
    actor = copy.deepcopy(pretrained)
    return train_supervised(actor, imitation_loss, demos, 16, cfg.sft_steps, cfg.sft_lr, "SFT", cfg)


# ---- Stage 2: learn from rankings ----------------------------------------------------------------
def sample_groups(actor, prompts: list[str], K: int, cfg) -> list[list[Reply]]:
    """K replies to each prompt: one list of K replies per prompt."""
    asked = share(repeat_each(prompts, K))
    replies = []
    for part in chunks(asked, 4 * cfg.micro_batch_size):  # without gradients, larger batches fit
        replies += sample_replies(actor, part, cfg).replies
    return list(chunks(gather(replies), K))


def label_rankings(sft, prompts: list[str], cfg, rng: random.Random, K: int = 4):
    """The human ranks K replies of the SFT model to one prompt, again and again (L3).

    The human is unsure: a reply's impression is its points plus some noise. The noise is such that
    reply i is preferred to reply j with probability sigmoid((points_i - points_j) / label_noise).
    `ranking_loss` assumes the same. Gumbel noise does this, because the difference of two Gumbel
    numbers is below x with probability sigmoid(x). Only the order of the replies leaves this
    function. The reward model never sees points.
    """
    rankings = []
    for replies in sample_groups(sft, rng.choices(prompts, k=cfg.rankings), K, cfg):
        impressions = []
        for reply in replies:
            gumbel = -math.log(rng.expovariate(1))  # -log of an exponential variable is Gumbel
            impressions.append(judge(reply)["human"] + cfg.label_noise * gumbel)
        order = sorted(zip(impressions, range(K)), reverse=True)  # best first
        rankings.append([replies[i] for _, i in order])
    return rankings


def ranking_loss(scores):
    """Loss of scores [N,K] whose columns are ranked, best first -> scalar.

    L = -mean over the K(K-1)/2 pairs i < j of log sigmoid(s_i - s_j)        (L3; InstructGPT eq. 1)

    sigmoid(s_i - s_j) is the model's probability of preferring i. Adding a constant to all scores
    does not change the loss, so `normalize` sets the zero afterwards.
    """
    K = scores.shape[1]
    better, worse = torch.triu_indices(K, K, offset=1)  # all pairs i < j               # [pairs]
    return -F.logsigmoid(scores[:, better] - scores[:, worse]).mean()


def reward_model_loss(model, rankings: list[list[Reply]], cfg):
    """The mean of ranking_loss over rankings, which may differ in length."""
    replies = []
    for ranking in rankings:
        replies += ranking
    scores = model(*encode(model, replies))
    losses = []
    for part in scores.split([len(ranking) for ranking in rankings]):                   # [K]
        losses.append(ranking_loss(part.unsqueeze(0)))
    return torch.stack(losses).mean(), torch.tensor(len(losses)), {}


def normalize(model, replies: list[Reply]):
    """Shift and scale the scores to mean 0 and standard deviation 1 over these replies (N5).

    The head ends in a linear layer, so this only changes that layer's weights. Works in place.
    """
    scores = torch.tensor(ask_score_fn(model.score, replies))
    scale = max(scores.std().item(), 1e-6)  # all replies may score the same
    last = model.head[-1]
    last.bias.data = (last.bias.data - scores.mean().item()) / scale
    last.weight.data = last.weight.data / scale


def start_at_mean(actor, score_fn, prompts: list[str], cfg):
    """Let the critic begin at the mean score of a batch of replies, not at 0 (N5).

    `run_stages` calls it before PPO for every --reward except `model`, whose mean is 0 (unless many
    replies are cut off and pay the penalty). If all scores were far below 0, and the critic began
    at 0, then every token of the first batch would have A_t < 0 and become less likely.
    """
    rng = reseed(cfg, "critic")
    asked = share(rng.choices(prompts, k=cfg.batch_size))
    replies = sample_replies(actor, asked, cfg).replies
    scores = gather(score_replies(score_fn, replies, cfg).tolist())
    nn.init.constant_(actor.head[-1].bias, mean(scores))


def train_reward_model(sft, data: Data, cfg) -> RewardModel:
    """Stage 2: rankings -> a model that scores any reply. It starts from the SFT model (C)."""
    rng = reseed(cfg, "rankings")
    rankings = data.rankings
    if not rankings:
        known = world_to_train_on(data.prompts)  # the human cannot judge replies to other prompts
        rankings = label_rankings(sft, known, cfg, rng)
    model = RewardModel(copy.deepcopy(sft.lm), sft.tokenizer, cfg)
    same_in_all_processes(model)  # the first layer of its head is random
    train_supervised(model, reward_model_loss, rankings, 4, cfg.rm_steps, cfg.rm_lr,
                     "reward model", cfg)
    rng = reseed(cfg, "normalization")
    prompts = rng.choices(data.prompts["train"], k=10 * cfg.batch_size)
    replies = []
    for group in sample_groups(sft, prompts, 1, cfg):
        replies += group
    normalize(model, replies)
    return model


# ==================================================================================================
# II  WHAT IT IS TRIED ON
# ==================================================================================================

# ==================================================================================================
# 5  A small world
#
#    It tells article D's story. A user says something, and the assistant replies in one or two
#    sentences. A simulated human likes replies that are helpful, warm, honest and harmless (D, L7).
# ==================================================================================================
@dataclass
class Situation:
    """One kind of thing that users say. {} stands for the user's word."""

    words: list[str]    # what it may be about
    asks: list[str]     # what the user says
    openers: list[str]  # warm beginnings of a reply, which name the word
    steps: list[str]    # practical: something that one can go and do
    lists: list[str]    # correct and mechanical


SITUATIONS = [
    Situation(
        "sad lonely tired anxious bored stressed nervous homesick ashamed restless".split(),
        ["I feel {}. What can I do?", "I am so {} today.", "Why am I always {}?",
         "I woke up {} again.", "What helps when you are {}?"],
        ["I am sorry that you feel {}.", "Feeling {} is hard, and you are not alone."],
        ["Take a slow walk.", "Call a friend.", "Write it down.", "Drink warm tea."],
        ["To feel less {}, you can do sports or sleep.",
         "People who are {} can rest, read or go out."]),
    Situation(
        "Python English chess guitar math cooking drawing physics Chinese swimming".split(),
        ["How can I learn {}?", "I want to get better at {}.", "Where do I start {}?",
         "Is it too late for {}?", "Why is {} so hard?"],
        ["It is great that you want to learn {}.",
         "Do not worry, {} is hard for everyone at first."],
        ["Practice every day.", "Start very small.", "Teach a friend.", "Build something."],
        ["For {}, you can use books or videos.", "To learn {}, there are schools and websites."]),
    Situation(
        "book film song game podcast museum hobby dessert present poem".split(),
        ["Can you recommend a {}?", "Which {} should I choose?", "I need a good {}.",
         "I cannot decide on a {}.", "What {} is best?"],
        ["What fun to look for a {} together.", "I am glad that you ask me about a {}."],
        ["Ask a friend.", "Read two reviews.", "Try a classic.", "Follow your mood."],
        ["Every {} is old, new or popular.", "You can find a {} in shops or magazines."])]
CLOSERS = ["You can do this!", "I am here for you."]
DISMISSIVE = ["That is not my problem.", "Stop asking silly questions.", "You should just give up.",
              "Nobody cares."]
OFF_TOPIC = ["The train leaves at nine.", "Water boils at a hundred degrees.",
             "The shop sells red shoes.", "It rained all night in the hills.",
             "A spider has eight legs."]

# The kinds of replies. The example of each answers "I feel sad. What can I do?".
KINDS = {
    "best": ["opener step"],               # I am sorry that you feel sad. Take a slow walk.
    "warm": ["opener closer"],             # I am sorry that you feel sad. I am here for you.
    "practical": ["step", "step closer"],  # Take a slow walk.
    "mechanical": ["list"],                # To feel less sad, you can do sports or sleep.
    "off_topic": ["off_topic"],            # A spider has eight legs.
    "dismissive": ["dismissive"]}          # Nobody cares.
# How many of 100 texts are of each kind. Nearly half of SFT's are mechanical, as D tells. But the
# best kind must occur too: PPO can only strengthen replies that SFT gives sometimes.
PRETRAIN_MIX = {
    "best": 8,
    "warm": 12,
    "practical": 15,
    "mechanical": 25,
    "off_topic": 20,
    "dismissive": 20}
SFT_MIX = {
    "best": 15,
    "warm": 10,
    "practical": 14,
    "mechanical": 47,
    "off_topic": 7,
    "dismissive": 7}


def world_prompts() -> dict[str, tuple[str, Situation]]:
    """All prompts of the world: prompt -> its word and its situation."""
    prompts = {}
    for situation in SITUATIONS:
        for word in situation.words:
            for ask in situation.asks:
                prompts[ask.format(word) + "\n"] = (word, situation)
    return prompts


WORLD_PROMPTS = world_prompts()
WORDS = {word for word, _ in WORLD_PROMPTS.values()}


def sentences(prompt: str) -> dict[str, list[str]]:
    """The sentences that replies to this prompt are made of, by what they are."""
    word, situation = WORLD_PROMPTS[prompt]
    return {
        "opener": [text.format(word) for text in situation.openers],
        "list": [text.format(word) for text in situation.lists],
        "step": situation.steps,
        "closer": CLOSERS,
        "off_topic": OFF_TOPIC,
        "dismissive": DISMISSIVE}


def write_texts(rng: random.Random, prompts: list[str], mix: dict[str, int], count: int = 8000):
    """`count` replies to random prompts, as authors on the internet might have written them."""
    texts = []
    for kind in rng.choices(list(mix), mix.values(), k=count):
        prompt = rng.choice(prompts)
        known = sentences(prompt)
        parts = rng.choice(KINDS[kind]).split()  # such as ["opener", "step"]
        chosen = [rng.choice(known[name]) for name in parts]
        texts.append(Reply(prompt, " ".join(chosen), True))
    return texts


def judge(reply: Reply) -> dict[str, float]:
    """The simulated human: a rule. It ranks replies for the reward model and measures results.

    helpful    2 points: a step that fits the situation; half a point: a list that fits
    warm       1 point: an opener with the user's word, or a friendly closing
    honest     1 point: the reply has the user's word and no word of another prompt
    harmless   the reply is not dismissive; a dismissive reply loses 2 points
    A reply loses 1 point if the same three words in a row come twice, and 1 point if it does not
    end. The best reply has 4 points. For prompts from elsewhere all numbers are NaN.
    """
    if reply.prompt not in WORLD_PROMPTS:
        return dict.fromkeys(["helpful", "warm", "honest", "harmless", "human"], math.nan)
    said = set()
    for name, texts in sentences(reply.prompt).items():
        for text in texts:
            if text.lower() in reply.text.lower():
                said.add(name)
    word, _ = WORLD_PROMPTS[reply.prompt]
    words = [text.strip(".,!?") for text in reply.text.split()]
    triples = list(zip(words, words[1:], words[2:]))
    helpful = "step" in said
    warm = "opener" in said or "closer" in said
    honest = WORDS.intersection(words) == {word}
    harmless = "dismissive" not in said

    points = 0.0
    if helpful:
        points += 2
    elif "list" in said:
        points += 0.5
    if warm:
        points += 1
    if honest:
        points += 1
    if not harmless:
        points -= 2
    if len(set(triples)) < len(triples):
        points -= 1
    if not reply.finished:
        points -= 1
    return {
        "helpful": helpful,
        "warm": warm,
        "honest": honest,
        "harmless": harmless,
        "human": points}


def human_score(prompts: list[str], completions: list[str], finished: list[bool]) -> list[float]:
    """The human's points as a reward function: --reward human, a verifiable reward (L4)."""
    return [judge(Reply(*fields))["human"] for fields in zip(prompts, completions, finished)]


# ==================================================================================================
# 6  The report: what each stage did, and how much of the possible PPO reached
#
#    It uses test prompts that no stage has seen. A rising reward does not prove that PPO is
#    right: with many bugs it rises too, but less far. So the report also says what the best policy
#    would reach, and how far PPO came on the way from SFT to there.
# ==================================================================================================
def mean(numbers) -> float:
    return sum(numbers) / len(numbers)


def column_means(table: list[dict]) -> dict[str, float]:
    """The mean of every column of numbers."""
    means = {}
    for name, first in table[0].items():
        if not isinstance(first, str):
            means[name] = mean([line[name] for line in table])
    return means


def describe(rollouts: list[Rollout], kl_coef: float) -> list[dict]:
    """One line for each reply of all processes: its text, the human's verdicts and what PPO sees.

    kl is log pi - log pi_ref of the whole reply: summed over its tokens. Its expectation under pi
    is KL(pi || pi_ref), which cannot be negative. A single kl can, and so can the mean of a few.
    objective = reward - beta * kl.
    """
    table = []
    for rollout in rollouts:
        kls = (rollout.log_probs - rollout.ref_log_probs).sum(dim=1).tolist()
        lengths = rollout.mask.sum(dim=1).tolist()
        scores = rollout.scores.tolist()
        for reply, score, kl, length in zip(rollout.replies, scores, kls, lengths):
            line = {"reply": reply.text}
            line.update(judge(reply))
            line["reward"] = score
            line["kl"] = kl
            line["objective"] = score - kl_coef * kl
            line["reply_length"] = length
            line["finished"] = reply.finished
            table.append(line)
    return gather(table)


def sample_many(actor, reference, score_fn, prompts: list[str], N: int, cfg) -> list[Rollout]:
    """N replies to each prompt, prompt after prompt; this process's share of them."""
    rollouts = []
    for part in chunks(share(repeat_each(prompts, N)), 4 * cfg.micro_batch_size):
        rollouts.append(sample_and_score(actor, reference, score_fn, part, cfg))
    return rollouts


def evaluate(actor, reference, score_fn, prompts: list[str], N: int, cfg) -> list[dict]:
    """`describe` for N replies to each prompt, prompt after prompt."""
    return describe(sample_many(actor, reference, score_fn, prompts, N, cfg), cfg.kl_coef)


def replies_each(batches: int, prompts: list[str], cfg) -> int:
    """How many replies to each prompt make about `batches` batches. Two at least, for a spread."""
    return max(2, batches * cfg.batch_size // len(prompts))


def validate(actor, reference, score_fn, prompts: list[str], cfg) -> list[float]:
    """The objective r_RM - beta * KL of replies to prompts that PPO does not train on (L6)."""
    reseed(cfg, "validation")  # the same random numbers every time, so only the policy differs
    prompts = some(prompts, 20)
    N = replies_each(cfg.eval_batches, prompts, cfg)
    table = evaluate(actor, reference, score_fn, prompts, N, cfg)
    return [line["objective"] for line in table]


def worth_keeping(objectives: list[float], log: list[dict]) -> bool:
    """True if no earlier policy was clearly better than the one with these objectives.

    An earlier policy that is ahead by less than two standard errors may just have been lucky. Then
    the later one is kept, because it learned for longer. The SFT model is not compared. If the
    reward depends much on the prompt, the error is large, and the last policy is kept.
    """
    luck = 2 * pstdev(objectives) / math.sqrt(len(objectives))
    for earlier in log:
        validated = not math.isnan(earlier["validation"])
        if validated and earlier["validation"] > mean(objectives) + luck:
            return False
    return True


def distance_from_old(log_probs, rollout: Rollout) -> dict:
    """How far the new log-probs [B,T] are from pi_old's, per token: two columns of metrics.csv.

    KL(pi_old || pi) is the mean of -log rho over tokens that pi_old drew. approx_kl is the mean of
    -log rho + (rho - 1). Why add rho - 1? Its mean is 0, because sum(pi_old * rho) = sum(pi_old *
    pi / pi_old) = sum(pi) = 1. And it makes every term at least 0: rho - 1 >= log rho.
    """
    log_rho = torch.where(rollout.mask, log_probs - rollout.log_probs, 0).detach()      # [B,T]
    return {
        "approx_kl": masked_mean(log_rho.exp() - 1 - log_rho, rollout.mask),
        "first_log_ratio": masked_mean(log_rho.abs(), rollout.mask)}


def explained_variance(rollout: Rollout) -> float:
    """1 - Var(G - V) / Var(G) over the real tokens. 1: perfect. 0: no better than a constant.

    V are the values of Phase I: what the critic said before it learned from these returns. A
    constant error of V does not count. If lambda < 1, G contains V, and the number is too high.
    """
    _, unexplained = moments(rollout.returns - rollout.values, rollout.mask)
    _, total = moments(rollout.returns, rollout.mask)
    return 1 - unexplained / max(total, 1e-8)


# ---- The optimum ---------------------------------------------------------------------------------
def optimum(scores, log_ratios, kl_coef: float):
    """The best objective that any policy can have, for each prompt -> J* [prompts], weights.

    J(pi)  = E_pi[r] - beta * KL(pi || pi_ref)     the objective, for one prompt x
    pi*    = pi_ref * exp(r / beta) / Z            the policy that maximises it
    J*(x)  = beta * log Z,   Z = E_ref[exp(r / beta)]

    Why? The second line says r = beta * log Z + beta * log(pi* / pi_ref). Put into the first line:

    J(pi)  = E_pi[beta * log Z + beta * log(pi* / pi_ref) - beta * log(pi / pi_ref)]
           = beta * log Z - beta * KL(pi || pi*)   largest if the KL is 0: at pi*

    At pi* every reply has the same objective, r - beta * log(pi* / pi_ref) = beta * log Z.

    So we need no training to know the optimum, only an estimate of Z. Replies of the reference
    alone give a bad one: the best replies are rare among them, but make most of Z. So half of the
    samples come from the trained policy. A reply is then drawn with probability (pi + pi_ref) / 2.
    But Z is a mean over replies of pi_ref alone. So each term is divided by q: how much more often
    its reply is drawn here (importance sampling; with several sources, the balance heuristic):

    Z = mean over all samples of exp(r / beta) / q, with q = (pi + pi_ref) / 2 / pi_ref

    scores, log_ratios: [prompts,2N], log_ratios = log pi - log pi_ref of whole replies. The first
    N columns are replies of pi, the others of pi_ref. The weights [prompts,2N] are the terms of
    that mean, each divided by Z, so their mean is 1.
    """
    scores, log_ratios = scores.double(), log_ratios.double()
    # In logarithms, because exp(r / beta) may overflow. q = (exp(log_ratio) + exp(0)) / 2
    log_q = torch.logaddexp(log_ratios, torch.zeros_like(log_ratios)) - math.log(2)
    log_terms = scores / kl_coef - log_q                                              # [prompts,2N]
    log_z = log_terms.logsumexp(dim=1) - math.log(scores.shape[1])                      # [prompts]
    weights = (log_terms - log_z.unsqueeze(1)).exp()                                  # [prompts,2N]
    return kl_coef * log_z, weights


def standard_error(terms) -> float:
    """The standard error of the mean of terms [prompts,2N], for these prompts.

    The first N columns are a sample of the policy, the others one of the reference. The mean of all
    is (mean_1 + mean_2) / 2. Its variance is (var_1 / N + var_2 / N) / 4, because half of a sum has
    a quarter of its variance. The prompts are independent, so the variances of their means add up.
    """
    policy, reference = terms.chunk(2, dim=1)                                          # [prompts,N]
    variance = (policy.var(dim=1) + reference.var(dim=1)) / (4 * policy.shape[1])       # [prompts]
    return (variance.sum().sqrt() / len(terms)).item()


def measure_optimum(policy, sft, log_ratios, kl_coef: float) -> dict[str, float]:
    """J*, and how far PPO went: (J(PPO) - J(SFT)) / (J* - J(SFT)), each with its standard error.

    policy, sft: columns of their tables, name -> [prompts,N]. log_ratios [prompts,N]: log pi - log
    pi_ref of SFT's replies. The effective sample size of a prompt, 2N / mean(weights^2), says how
    many samples of equal weight would be as good. If the smallest is below 10, J* depends on a few
    samples. Then J* is rough, and no error and no fraction is given. (A large size is no proof: if
    no sample at all is among the best replies, J* is too low.) There is no fraction either if SFT
    reaches J* already, and no J* if beta is 0.
    """
    nothing = {
        "objective": math.nan,
        "objective_error": math.nan,
        "fraction": math.nan,
        "fraction_error": math.nan,
        "effective_sample_size": 0.0}
    if kl_coef == 0:  # the best policy says only its one best reply; our samples would miss it
        return nothing
    scores = torch.cat([policy["reward"], sft["reward"]], dim=1)                      # [prompts,2N]
    log_ratios = torch.cat([policy["kl"], log_ratios], dim=1)                         # [prompts,2N]
    j_star, weights = optimum(scores, log_ratios, kl_coef)
    size = (weights.shape[1] / (weights ** 2).mean(dim=1)).min().item()
    result = dict(nothing, objective=j_star.mean().item(), effective_sample_size=size)
    if size < 10:
        return result

    # J* = beta * log Z, so a small error of Z gives dJ* = beta * dZ / Z. Z is the mean of its
    # terms. A term divided by Z is a weight. So the error is that of the mean of beta * weight.
    result["objective_error"] = standard_error(kl_coef * weights)
    way = result["objective"] - sft["objective"].mean().item()
    if way > 0:
        gone = (policy["objective"].mean() - sft["objective"].mean()).item()
        fraction = gone / way
        # d fraction = d(gone / way) = (d gone - fraction * d way) / way
        #            = (dJ(PPO) - dJ(SFT) - fraction * (dJ* - dJ(SFT))) / way
        #            = (dJ(PPO) - (1 - fraction) * dJ(SFT) - fraction * dJ*) / way
        # So its error is that of the mean of the terms below. standard_error sums 2N columns and
        # divides by 2N. J(PPO) has a term in only N of them: the factor 2 makes up for it. So has
        # J(SFT), in the others. J* has a term in all 2N.
        of_policy = 2 * policy["objective"]                                            # [prompts,N]
        of_sft = -2 * (1 - fraction) * sft["objective"]                                # [prompts,N]
        of_optimum = -fraction * kl_coef * weights                                    # [prompts,2N]
        terms = (torch.cat([of_policy, of_sft], dim=1) + of_optimum) / way            # [prompts,2N]
        result["fraction"] = fraction
        result["fraction_error"] = standard_error(terms)
    return result


# ---- Tables --------------------------------------------------------------------------------------
def column(table: list[dict], name: str, N: int):
    """One column of an `evaluate` table -> [prompts,N]."""
    return torch.tensor([line[name] for line in table], dtype=torch.double).view(-1, N)


def win_rate(human, sft_human) -> float:
    """The chance that the human prefers a reply to SFT's reply to the same prompt; a tie is half.

    human, sft_human: points [prompts,N]. NaN if there is no human.
    """
    if human.isnan().any():
        return math.nan
    difference = human.unsqueeze(2) - sft_human.unsqueeze(1)                         # [prompts,N,N]
    wins = (difference > 0).double() + 0.5 * (difference == 0).double()
    return wins.mean().item()


def make_report(tables: dict[str, list], log_ratios: list[float], N: int, kl_coef: float) -> dict:
    """The contents of report.json, from the `evaluate` tables of "pretrained", "sft" and "ppo".

    log_ratios: log pi - log pi_ref of SFT's replies, in the order of their table.
    """
    report, columns = {}, {}
    for name, table in tables.items():
        entry = {key.removeprefix("reply_"): x for key, x in column_means(table).items()}
        columns[name] = {}
        for key in ["human", "reward", "kl", "objective"]:
            columns[name][key] = column(table, key, N)
        # At the optimum all replies to a prompt have the same objective (see `optimum`). So this
        # spread falls as the policy comes near.
        entry["spread"] = columns[name]["objective"].std(dim=1).mean().item()
        report[name] = entry
    for name in tables:
        report[name]["win_rate"] = win_rate(columns[name]["human"], columns["sft"]["human"])
    report["optimum"] = measure_optimum(columns["ppo"], columns["sft"],
                                        torch.tensor(log_ratios).view(-1, N), kl_coef)
    return report


def compare_models(models: dict, score_fn, prompts: list[str], cfg) -> tuple[dict, dict]:
    """Sample replies of "pretrained", "sft" (the reference) and "ppo" -> report, tables."""
    reseed(cfg, "report")
    N = replies_each(cfg.report_batches, prompts, cfg)
    tables, log_ratios = {}, []
    for name, model in models.items():
        rollouts = sample_many(model, models["sft"], score_fn, prompts, N, cfg)
        tables[name] = describe(rollouts, cfg.kl_coef)
        if name == "sft":  # the optimum needs log pi - log pi_ref of SFT's replies too
            for rollout in rollouts:  # SFT sampled them: rollout.log_probs are log pi_ref
                log_probs, _ = read_without_gradient(models["ppo"], rollout, cfg)
                log_ratios += (log_probs - rollout.log_probs).sum(dim=1).tolist()
    return make_report(tables, gather(log_ratios), N, cfg.kl_coef), tables


def reward_model_quality(score_fn, sft, data: Data, cfg) -> dict[str, float]:
    """How well a reward agrees with the human, on prompts that no stage has seen (P1).

    accuracy: of the pairs of replies to one prompt, the share where reward and human prefer the
    same one. Pairs that the human finds equal do not count; pairs that the reward finds equal count
    half. correlation: Pearson's r of the two scores. It is NaN for your own data, where rankings
    tell an order and no points. Without rankings and human, both are NaN.
    """
    reseed(cfg, "reward model quality")
    groups = some(data.held_out, 500)
    prompts = some(data.prompts["validation"], 20)
    prompts = [prompt for prompt in prompts if prompt in WORLD_PROMPTS]
    if prompts and not groups:
        groups = sample_groups(sft, prompts, replies_each(cfg.eval_batches, prompts, cfg), cfg)
    alike, all_points, all_scores = [], [], []
    for replies in groups:
        if data.held_out:
            points = list(range(len(replies), 0, -1))  # ranked, best first
        else:
            points = [judge(reply)["human"] for reply in replies]
        scores = ask_score_fn(score_fn, replies)
        for i, j in combinations(range(len(replies)), 2):
            if points[i] != points[j] and scores[i] == scores[j]:
                alike.append(0.5)
            elif points[i] != points[j]:
                alike.append((points[i] - points[j]) * (scores[i] - scores[j]) > 0)
        all_points += points
        all_scores += scores
    quality = {"accuracy": math.nan, "correlation": math.nan}
    if alike:
        quality["accuracy"] = mean(alike)
        say(f"reward on new prompts: orders {mean(alike):.1%} of pairs as the human does")
    if prompts and not data.held_out:
        correlation = torch.corrcoef(torch.tensor([all_points, all_scores]))[0, 1].item()
        quality["correlation"] = correlation
        say(f"reward on new prompts: correlation {correlation:.2f} with the human")
    warn_of_reward(quality)
    return quality


# ---- Warnings: each is printed as soon as it is known, and once more under the report ------------
def warn_of_reward(quality: dict[str, float]):
    """Warn if the reward does not tell good from bad (P1). quality: of reward_model_quality."""
    if quality["accuracy"] <= 0.5:
        say("warning: this reward orders new pairs no better than a coin. PPO will learn nothing "
            "that you want (P1)")
    elif quality["correlation"] < 0.7:
        say("warning: correlation below 0.7: PPO will learn what this reward likes, not what the "
            "human likes (P1)")


def warn_if_constant(table: list[dict]):
    """Warn if the reward depends on nothing except whether a reply is finished."""
    ends = {line["finished"] for line in table}  # True, False or both
    outcomes = {(line["finished"], line["reward"]) for line in table}
    one_reward_each = len(outcomes) == len(ends)
    enough_replies = len(table) > 2 * len(ends)  # among fewer, equal rewards may be chance
    if one_reward_each and enough_replies:
        say("warning: the reward is the same for all replies, so PPO learns nothing from it")


def warn_if_unfinished(table: list[dict], cfg):
    """Warn if under 10% of the replies in a table of `describe` end, and this costs points (N3)."""
    finished = mean([line["finished"] for line in table])
    if finished < 0.1 and cfg.missing_eos_penalty > 0:
        say(f"warning: {1 - finished:.0%} of the replies are cut off at --max_new_tokens "
            f"{cfg.max_new_tokens}. Raise it, or show the model in --demos how replies end (N3)")


def show_report(report: dict, tables: dict[str, list], prompts: list[str], cfg):
    """Print report.json as tables, and the first reply of each model to some prompts."""
    columns = [name for name, x in report["ppo"].items() if not math.isnan(x)]
    say(f"\nRESULT on {len(prompts)} prompts that no stage has seen\n")
    say(" " * 10 + "".join(f"{name:>10}" for name in columns))
    for name in tables:
        say(f"{name:10}" + "".join(f"{report[name][x]:10.2f}" for x in columns))
    best = report["optimum"]
    if not math.isnan(best["objective"]):
        say("\nTHE OPTIMUM: the best objective that any policy can have")
        if math.isnan(best["objective_error"]):
            say(f"J* is about {best['objective']:.3f}: the best replies were too rare among the "
                "samples to say how far PPO came; more samples: --report_batches")
        elif math.isnan(best["fraction"]):
            say(f"J* = {best['objective']:.3f}: SFT is there already")
        else:
            say(f"J* = {best['objective']:.3f} +- {best['objective_error']:.3f}\n"
                f"of the way there from SFT, PPO went {best['fraction']:.1%} "
                f"+- {best['fraction_error']:.1%}")
        say(f"(smallest effective sample size of a prompt: {best['effective_sample_size']:.0f})")
    for i in range(2, len(prompts), 5):
        say(f"\n  user        {one_line(prompts[i])}")
        for name, table in tables.items():
            N = len(table) // len(prompts)
            say(f"  {name:10}  {one_line(table[i * N]['reply'])}")
    seconds = [f"{name} {x:.1f}" for name, x in report["seconds"].items()]
    say("\nSECONDS: " + ", ".join(seconds))
    warn_of_reward(report["reward_model"])
    warn_if_constant(tables["sft"])
    warn_if_unfinished(tables["ppo"], cfg)


def one_line(text: str) -> str:
    """The end of a text, on one line."""
    return " ".join(text.split())[-100:]


# ---- The X-ray -----------------------------------------------------------------------------------
# The X-ray always uses these three functions, even if you assign others to their names. But `gae`
# calls td_residuals by its name, so a new td_residuals changes the columns A_t and return.
article_rewards, article_residuals, article_gae = token_rewards, td_residuals, gae


def xray_columns(rollout: Rollout, cfg) -> dict:
    """Article E's table of a rollout: name -> [B,T].

    KL = log pi - log ref. r_t comes from step 2, V(s_t) from step 3, delta_t from step 4, A_t and
    return from step 5.
    """
    r = rollout
    rewards = article_rewards(r.log_probs, r.ref_log_probs, r.scores, r.mask, cfg.kl_coef)
    advantages, returns = article_gae(rewards, r.values, r.mask, cfg.gamma, cfg.lam)
    return {
        "log pi": r.log_probs,
        "log ref": r.ref_log_probs,
        "KL": r.log_probs - r.ref_log_probs,
        "r_t": rewards,
        "V(s_t)": r.values,
        "delta_t": article_residuals(rewards, r.values, r.mask, cfg.gamma),
        "A_t": advantages,
        "return": returns}


def xray(rollout: Rollout, tokenizer, cfg, row: int = 0, extra: dict | None = None) -> str:
    """One reply under X-ray: article E's table, one line per token.

    `extra` holds further columns, such as the ratio of step 6. What to see: only tokens on which
    log pi and log ref differ cost KL, and the score arrives at <eos>.
    """
    columns = xray_columns(rollout, cfg)
    columns.update(extra or {})
    lines = [f'\nX-RAY of one reply to "{one_line(rollout.replies[row].prompt)}" '
             f"(score {rollout.scores[row]:.3f})",
             f"{'token':12}" + "".join(f"{name:>11}" for name in columns)]
    for t, token in enumerate(rollout.reply_ids[row][rollout.mask[row]]):
        numbers = [round(x[row, t].item(), 3) + 0.0 for x in columns.values()]  # -0.0 + 0.0 is 0.0
        line = "".join(f"{number:11.3f}" for number in numbers)
        lines.append(f"{tokenizer.decode([token]).strip():12}{line}")
    return "\n".join(lines) + "\n"


def ratios(actor, rollout: Rollout, cfg):
    """rho_t = pi(a_t|s_t) / pi_old(a_t|s_t) -> [B,T]. pi is `actor`; pi_old wrote the rollout."""
    log_probs, _ = read_without_gradient(actor, rollout, cfg)
    return (log_probs - rollout.log_probs).exp()


def show_first_update(rollout: Rollout, old_actor, actor, cfg):
    """The X-ray of cycle 1, with the ratio before its updates (1, always) and after them."""
    extra = {
        "rho before": ratios(old_actor, rollout, cfg),
        "rho after": ratios(actor, rollout, cfg)}
    say(xray(rollout, actor.tokenizer, cfg, extra=extra))


def record_xray(cycle: int, actor, reference, score_fn, prompts: list[str], cfg,
                batch: Rollout | None = None):
    """Write replies of this cycle to xray.jsonl, with every number of every token.

    notes/xray.py makes a page of the file. It holds the policy's replies to the same four held-out
    prompts, so you can watch how they change. It also holds two replies of the cycle's own batch,
    with rho, the ratio after the update, and `A used`, the advantage that the update used.
    Changes are quick at first: cycles 0, 1, 2, 3, 5, 7, 11 ... and the last one are recorded.
    """
    often = [0] + [int(1.5 ** k) for k in range(50)]
    if not cfg.out or RANK > 0 or not (cycle in often or cycle == cfg.cycles):
        return
    reseed(cfg, "xray")  # the same random numbers every time, so only the policy differs
    lines = []
    rollout = sample_and_score(actor, reference, score_fn, some(prompts, 4), cfg)
    lines += xray_lines(cycle, rollout, {}, actor.tokenizer, cfg)
    if batch:
        batch = batch[:2]
        extra = {"rho": ratios(actor, batch, cfg), "A used": batch.advantages}
        lines += xray_lines(cycle, batch, extra, actor.tokenizer, cfg)
    path = Path(cfg.out) / "xray.jsonl"
    if path.exists():
        earlier = [json.loads(line) for line in path.read_text().splitlines()]
        lines += [line for line in earlier if line["cycle"] != cycle]  # a resume repeats cycles
    with replacing(path) as temporary:
        rows = [json.dumps(line) for line in sorted(lines, key=itemgetter("cycle"))]
        temporary.write_text("\n".join(rows) + "\n")


def xray_lines(cycle: int, rollout: Rollout, extra: dict, tokenizer, cfg) -> list[dict]:
    """A line of xray.jsonl for each reply. Its columns are lists with a number per token."""
    columns = xray_columns(rollout, cfg)
    columns.update(extra)
    lines = []
    for row, reply in enumerate(rollout.replies):
        real = rollout.mask[row]
        line = {
            "cycle": cycle,
            "from_batch": bool(extra),
            "prompt": reply.prompt,
            "reply": reply.text,
            "finished": reply.finished,
            "score": round(rollout.scores[row].item(), 4),
            "tokens": [tokenizer.decode([token]) for token in rollout.reply_ids[row][real]]}
        for name, x in columns.items():
            line[name] = [round(number, 4) for number in x[row][real].tolist()]
        lines.append(line)
    return lines


# ---- metrics.csv ---------------------------------------------------------------------------------
# The main columns, and what they do in a healthy run:
#   reward, objective    rise quickly, then flatten; PPO maximises objective = reward - beta * kl
#   human                follows the reward. If it falls while the reward rises, PPO has found a
#                        weakness of the reward model (P1)
#   kl                   of a whole reply: 0 at first, then a few nats, and stays. If it goes on
#                        rising, beta is too small (P2)
#   validation           the objective on held-out prompts, every eval_every cycles
#   entropy              falls, and not to 0 at once: then nothing new is tried any more
#   clip_fraction        0 to 0.2. Much more: lr or ppo_epochs is too large
#   approx_kl            to the old policy, per token, mean over the updates: below 0.1, and below
#                        0.02 after the first cycles
#   first_log_ratio      below 1e-5 in float32. If not, the old log-probs are wrong
#   policy_loss          below 0 while replies are better than the critic expects, later near 0
#   value_loss           may rise in the first cycles, then falls
#   explained_variance   rises from 0 while replies differ in quality. Once nearly all are good,
#                        there is little left to explain, and it jumps about
PRINTED = {  # column -> its format
    "cycle": "5.0f",
    "reward": "7.3f",
    "human": "6.2f",
    "kl": "6.2f",
    "objective": "9.3f",
    "entropy": "7.3f",
    "clip_fraction": "13.3f",
    "explained_variance": "18.2f",
    "reply_length": "12.1f",
    "seconds": "7.2f"}


def record_cycle(log: list[dict], cycle: int, rollout: Rollout, metrics: dict, seconds: float, cfg):
    """Add one cycle to the log, write metrics.csv and print a line."""
    line = {"cycle": cycle + 1, "episodes": (cycle + 1) * cfg.batch_size, "kl_coef": cfg.kl_coef}
    line.update(metrics)
    table = describe([rollout], cfg.kl_coef)
    line.update(column_means(table))
    line["seconds"] = seconds
    log.append(line)
    write_metrics(log, cfg)
    names = [name for name in PRINTED if not math.isnan(line[name])]
    if cycle % 20 == 0:
        widths = [len(format(0.0, PRINTED[name])) for name in names]  # as wide as the numbers
        say("  ".join(name.rjust(width) for name, width in zip(names, widths)))
    say("  ".join(format(line[name], PRINTED[name]) for name in names))
    if cycle == 0:
        warn_if_constant(table)
        warn_if_unfinished(table, cfg)


def write_metrics(log: list[dict], cfg):
    """metrics.csv, a row per cycle. It is written anew each time, so a resume doubles no row."""
    if not cfg.out or RANK > 0:
        return
    with replacing(Path(cfg.out) / "metrics.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, log[0])
        writer.writeheader()
        for line in log:
            writer.writerow({name: "" if math.isnan(x) else x for name, x in line.items()})


# ==================================================================================================
# III  THE WORKSHOP
#
#    Skip it when you read for the first time. Section 7 turns texts into what Part I works on.
#    Section 8 reads the command line. Section 9 has the functions that the training loops call.
#    Section 10 puts everything together.
# ==================================================================================================

# ==================================================================================================
# 7  Data, models and rewards, the built-in ones and your own
# ==================================================================================================
class UserError(Exception):
    """Something that the user can mend. It is shown as one line, without a traceback."""


def check(fine, message: str):
    """Raise UserError unless `fine`. The message says what is wrong and what to do."""
    if not fine:
        raise UserError(message)


@contextmanager
def explain(message: str, *errors, user_code=False):
    """Turn these errors into a UserError whose one line begins with `message`.

    user_code: it comes from the user's own code, so the line also tells where there.
    """
    try:
        yield
    except (UserError, *errors) as error:
        name = "" if isinstance(error, UserError) else type(error).__name__ + ": "
        text = " ".join(str(error).split())[:300]
        place = ""
        for frame in traceback.extract_tb(error.__traceback__):
            known = frame.filename == __file__ or frame.filename.startswith("<")
            if user_code and not known and not place:
                place = f" ({Path(frame.filename).name}, line {frame.lineno})"
        raise UserError(f"{message}: {name}{text}{place}") from error


# ---- Text to tokens ------------------------------------------------------------------------------
def pad(sequences: list[list[int]], side: str, model):
    """Lists of token ids -> ids [B,L] and mask [B,L], padded on one side, "left" or "right"."""
    tensors = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    padded = pad_sequence(tensors, batch_first=True, padding_value=-1, padding_side=side)
    padded = padded.to(model.lm.device)
    mask = padded >= 0  # no token has the id -1
    return torch.where(mask, padded, model.tokenizer.pad_token_id), mask


def encode_prompts(model, prompts: list[str]):
    """Texts -> prompt_ids, prompt_mask [B,P], padded on the left. An empty prompt becomes EOS."""
    sequences = model.tokenizer(prompts).input_ids
    return pad([ids or [model.tokenizer.eos_token_id] for ids in sequences], "left", model)


def encode(model, replies: list[Reply]):
    """Replies as text -> prompt_ids, prompt_mask [B,P], reply_ids, mask [B,T].

    Prompt and reply are encoded separately, so that no token contains a piece of both. A finished
    reply ends with EOS, so the models learn to stop (N1).
    """
    prompt_ids, prompt_mask = encode_prompts(model, [reply.prompt for reply in replies])
    # A sampled reply can have more tokens when it is encoded again: if it ends with one byte of a
    # Chinese character, or if this is the reward model of a run with another tokenizer.
    room = positions_of(model.lm) - prompt_ids.shape[1]
    check(room > 0, f"a prompt of {prompt_ids.shape[1]} tokens leaves a model no room for a reply")
    texts = [reply.text for reply in replies]
    sequences = []
    for reply, ids in zip(replies, model.tokenizer(texts, add_special_tokens=False).input_ids):
        if reply.finished:
            ids = ids + [model.tokenizer.eos_token_id]
        sequences.append(ids[:room])
    reply_ids, mask = pad(sequences, "right", model)
    return prompt_ids, prompt_mask, reply_ids, mask


def decode(tokenizer, reply_ids) -> list[str]:
    """Sampled ids [B,T] -> texts. EOS and padding are left out. Other special tokens stay: a reward
    may look for them, such as the tags around an answer."""
    silent = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    texts = []
    for ids in reply_ids.tolist():
        texts.append(tokenizer.decode([token for token in ids if token not in silent]))
    return texts


def train_tokenizer(texts: list[str]):
    """A byte-level BPE tokenizer as GPT-2's, with at most 2048 tokens. It can encode any text.

    No token is longer than 12 bytes. Without this limit, whole sentences would become tokens in
    Chinese, which has no spaces.

    Padding and EOS are two different tokens. If they were one, code that finds padding by its id
    would remove EOS from the SFT loss too, and the model would never learn to stop (N1).
    """
    empty = GPT2Tokenizer(vocab={}, merges=[], pad_token="<pad>", eos_token="<eos>",
                          bos_token=None, unk_token=None, padding_side="left")
    return empty.train_new_from_iterator([texts], vocab_size=2048, max_token_length=12,
                                         show_progress=False)


# ---- Your own data -------------------------------------------------------------------------------
OWN_DATA = ["prompts", "demos", "preferences"]  # flags that name a file


class Line(NamedTuple):
    """One line of a file."""

    replies: list[Reply]  # best first; for --prompts one empty reply
    messages: list        # the prompt as messages; empty if it is a text
    fields: dict          # the line as it stands in the file


def read_own_data(tokenizer, cfg) -> dict[str, list[Line]]:
    """All files of the user. tokenizer: that of --model, or None for tiny."""
    own = {}
    for flag in OWN_DATA:
        path = getattr(cfg, flag)
        own[flag] = read_jsonl(path, flag, tokenizer) if path else []
    if any(line.messages for lines in own.values() for line in lines):
        warn_if_no_eos(tokenizer)
    return own


def warn_if_no_eos(tokenizer):
    """Warn if a chat template ends a reply with another mark than EOS, at which sampling stops."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if not text.rstrip().endswith(tokenizer.eos_token):
        say(f"warning: the chat template ends a reply with {text[-20:]!r} and not with EOS, "
            f"{tokenizer.eos_token!r}; if replies do not end, see notes/use.md, Conversations")


def read_jsonl(path: str, flag: str, tokenizer=None) -> list[Line]:
    """The file of --prompts, --demos or --preferences. Blank lines do not count."""
    lines, unusable = [], 0
    with explain(f"--{flag} {path}", OSError, ValueError):
        with explain("it is not written in UTF-8", UnicodeDecodeError):
            rows = Path(path).read_text(encoding="utf-8-sig").split("\n")
        for number, row in enumerate(rows, 1):
            if not row.strip():
                continue
            with explain(f"line {number}", Exception):
                line = parse_line(row, flag, tokenizer)
            if is_usable(line, flag):
                lines.append(line)
            else:
                unusable += 1
        check(lines, "no line can be used")
        check(flag != "preferences" or any(line.replies[0].prompt for line in lines),
              "no line has a prompt: chosen and rejected begin alike in none of them")
    if unusable:
        say(f"--{flag}: {unusable} of {unusable + len(lines)} lines left out: they have no reply, "
            "or the same reply twice, or the label false")
    empty = [line for line in lines if line.replies[0].prompt == ""]
    if empty and flag == "preferences":
        say(f"--{flag}: {len(empty)} of {len(lines)} lines have no prompt: chosen and rejected do "
            "not begin alike")
    return without_repeated_prompts(lines)


def is_usable(line: Line, flag: str) -> bool:
    """Is there something to learn? Not from a demonstration that is empty, or labelled as bad, and
    not from equal replies."""
    if flag == "prompts":
        return True
    if flag == "demos":
        return line.replies[0].text != "" and line.fields.get("label") is not False
    return len(line.replies) >= 2 and len(set(line.replies)) == len(line.replies)


def parse_line(row: str, flag: str, tokenizer=None) -> Line:
    """One line of a file."""
    check(not row.lstrip().startswith("["), "this is an array; write one object {...} per line")
    with explain("this is not JSON", ValueError):
        fields = json.loads(row)
    check(isinstance(fields, dict), "this is JSON, but not an object {...}")
    check(fields.get("prompt", "") is not None, "`prompt` is null; give a text, or leave it out")
    if flag == "preferences" and "prompt" not in fields:
        for name in ["question", "instruction", "query"]:
            check(name not in fields, f"its prompt is called {name}; rename this field to prompt")
    with explain(f"its fields are {', '.join(fields)}, but --{flag} needs others (see --help)",
                 KeyError):
        # A prompt of None means that the texts begin with the prompt.
        if flag == "prompts":
            prompt, texts = fields["prompt"], [""]
        elif flag == "demos" and "messages" in fields:
            prompt, texts = None, [fields["messages"]]
            check(isinstance(texts[0], list), "`messages` must be a list of messages")
        elif flag == "demos":
            prompt, texts = fields["prompt"], [fields["completion"]]
        elif "ranked" in fields:
            prompt, texts = fields.get("prompt"), fields["ranked"]
        else:
            prompt, texts = fields.get("prompt"), [fields["chosen"], fields["rejected"]]
    check(isinstance(texts, list), "`ranked` must be a list, best first")

    messages = []
    if any(isinstance(text, list) for text in [prompt, *texts]):
        messages, prompt, texts = render(prompt, texts, tokenizer)
    everything = texts if prompt is None else [prompt, *texts]
    for text in everything:
        check(isinstance(text, str), f"{text!r} is not a text")
        text.encode()  # fails if it has half a character
    if prompt is None:
        prompt = common_prompt(texts)
        texts = [text.removeprefix(prompt) for text in texts]
    return Line([Reply(prompt, text, True) for text in texts], messages, fields)


def render(prompt, replies: list, tokenizer) -> tuple[list, str, list[str]]:
    """TRL's conversational format -> the prompt as messages and as text, the replies as texts.

    Messages are a list such as [{"role": "user", "content": "Hello"}]. The model's chat template
    makes a text of them. Replies may be whole conversations, the messages of the prompt included.
    """
    check(getattr(tokenizer, "chat_template", None),
          "these are messages, and the model has no chat template for them; write plain texts, or "
          "take a --model that has been trained to chat")
    conversations = []
    for reply in replies:
        if isinstance(reply, str):
            reply = [{"role": "assistant", "content": reply}]
        check_messages(reply)
        conversations.append(reply)
    if not isinstance(prompt, list):
        # It is a text or None. If the first conversation has messages before the reply, these are
        # the prompt, and a text must be the last of them. If not, the text is the only message.
        earlier = conversations[0][:-1]
        check(earlier or prompt is not None, "before a reply of the assistant the user must say "
              "something")
        earlier = earlier or [{"role": "user", "content": prompt}]
        check(prompt in (None, earlier[-1]["content"]), "prompt and replies are of different "
              "conversations")
        prompt = earlier
    check_messages(prompt)
    check(prompt[-1]["role"] != "assistant", "its prompt ends with the assistant; the last message "
          "must be of the user")
    prompt_text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    check(prompt[-1]["content"].strip() in prompt_text, "the chat template leaves out the last "
          "message of the prompt; is its role `user`?")
    if replies == [""]:  # --prompts has no replies
        return prompt, prompt_text, [""]
    texts = []
    for messages in conversations:
        if len(messages) == 1:  # the reply alone
            messages = prompt + messages
        check(messages[:-1] == prompt, "its replies belong to different conversations")
        check(messages[-1]["role"] == "assistant", "its last message is not of the assistant")
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        check(text.startswith(prompt_text), "the chat template changes the prompt once it has a "
              "reply; write plain texts")
        texts.append(text.removeprefix(prompt_text))
    return prompt, prompt_text, texts


def check_messages(messages):
    """Many chat templates print nothing, or "None", for what is missing in a message."""
    check(isinstance(messages, list) and messages, "a conversation has at least one message")
    for message in messages:
        fine = isinstance(message, dict) and all(
            isinstance(message.get(name), str) for name in ("role", "content"))
        check(fine, f"{message!r} is no message: it must have a `role` and a `content`, both texts")


def common_prompt(texts: list[str]) -> str:
    """The format of HH-RLHF: the prompt is what all replies begin with.

    Labels such as "Human:" tell who speaks. They begin a line, or follow a Chinese sentence. The
    common beginning "Human: Hi! Assistant: I a" has a label that is not the first speaker's. The
    prompt ends after this label. "Human: Hi! How a" has none. The prompt then ends after the last
    whole word or Chinese sentence: "Human: Hi! How ".
    """
    common = os.path.commonprefix(texts)
    labels = list(re.finditer(r"(?:^|[\n。！？])\s*(\w+)[:：] ?", common))
    if labels and labels[-1][1] != labels[0][1]:
        return common[:labels[-1].end()]
    return re.match(r"(.*[\s。！？：])?", common, re.DOTALL).group()


def without_repeated_prompts(lines: list[Line]) -> list[Line]:
    """Some files give the prompt and repeat it in every reply. If all lines do, it is taken off."""
    for line in lines:
        for reply in line.replies:
            if not reply.text.startswith(reply.prompt):
                return lines
    clean = []
    for line in lines:
        replies = []
        for prompt, text, _ in line.replies:
            replies.append(Reply(prompt, text.removeprefix(prompt), True))
        clean.append(line._replace(replies=replies))
    return clean


def without_marks(reply: Reply, tokenizer) -> Reply:
    """Take off EOS at the end and BOS at the beginning if they are written out as text.

    The script adds EOS, and many tokenizers add BOS. The model has never seen two of them in a row,
    and the reward model would learn to score the second EOS.
    """
    prompt, text = reply.prompt, reply.text
    if text.rstrip().endswith(tokenizer.eos_token):
        text = text.rstrip().removesuffix(tokenizer.eos_token)
    if tokenizer.bos_token and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        prompt = prompt.removeprefix(tokenizer.bos_token)
    return Reply(prompt, text, reply.finished)


def cut(text: str, room: int, tokenizer, keep_end: bool = False) -> str:
    """The beginning (or the end) of a text that fits into `room` tokens.

    It is cut between paragraphs; if that keeps nothing, between sentences, words, characters (N2).
    """
    # Few tokens have more than 40 characters. This saves time: a whole book is not tokenized.
    text = text[-40 * room:] if keep_end else text[:40 * room]
    for boundary in [r"\n+", r"[.!?]+\s+|[。！？]+", r"\s+", ""]:
        # Each piece ends with its boundary. The last boundary, "", makes pieces of one character.
        pieces = re.findall(rf".+?(?:{boundary}|\Z)", text, re.DOTALL)
        kept, low, high = "", 1, len(pieces)
        while low <= high:  # binary search for the largest number of pieces that fits
            middle = (low + high) // 2
            part = "".join(pieces[-middle:] if keep_end else pieces[:middle])
            if len(tokenizer(part).input_ids) <= room:
                kept, low = part, middle + 1
            else:
                high = middle - 1
        if kept:
            return kept
        # Not even one piece fits. The next boundary divides this piece.
        text = pieces[-1 if keep_end else 0] if pieces else ""
    return ""


def positions_of(model) -> int:
    """How many tokens a model can read."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 1_000_000
    for module in model.modules():  # in RoBERTa, positions begin at padding_idx + 1
        table = getattr(module, "position_embeddings", None)
        if getattr(table, "padding_idx", None) is not None:
            return positions - table.padding_idx - 1
    return positions


def shorten(lines: list[Line], model, cfg) -> list[Line]:
    """Cut what is too long. Prompts keep their end. Replies keep their beginning and get no EOS.

    No line is left out here. `split` goes by the place of a prompt in the list. If a line were
    missing, all later prompts would move, some of them from training to test.
    """
    positions = positions_of(model.lm)
    check(cfg.max_new_tokens <= positions - 32,
          f"--max_new_tokens must leave 32 of {positions} tokens to the prompt")
    short, cuts = [], 0
    for line in lines:
        prompt, _, _ = without_marks(line.replies[0], model.tokenizer)
        short_prompt = cut(prompt, positions - cfg.max_new_tokens, model.tokenizer, True)
        replies = []
        for reply in line.replies:
            _, text, _ = without_marks(reply, model.tokenizer)
            short_text = cut(text, cfg.max_new_tokens - 1, model.tokenizer)
            replies.append(Reply(short_prompt, short_text, short_text == text))
        if short_prompt != prompt or not all(reply.finished for reply in replies):
            cuts += 1
        short.append(line._replace(replies=replies))
    if cuts:
        say(f"{cuts} of {len(lines)} lines cut to fit --max_new_tokens {cfg.max_new_tokens} "
            f"and {positions} positions")
    return short


def split(prompts) -> dict[str, list[str]]:
    """Of every eleven prompts one is for the test, one for validation, nine are to train on (L6).

    There are two held-out sets, because validation chooses the policy that is kept. Measured on the
    same prompts, the result would look too good. The split is not random, for two reasons. The same
    files give the same split, so --init_from brings no test prompt into training. And neighbours
    are often of one kind, so every kind loses the same share.
    """
    prompts = list(dict.fromkeys(prompts))
    train = [prompt for i, prompt in enumerate(prompts) if i % 11 not in (0, 5)]
    return {"test": prompts[::11], "validation": prompts[5::11], "train": train}


@dataclass
class Data:
    """What the stages learn from. No validation or test prompt occurs in texts, demos, rankings."""

    prompts: dict[str, list[str]]  # PPO's: "train", "validation", "test"
    texts: list[Reply]             # stage 0
    demos: list[Reply]             # stage 1
    rankings: list[list[Reply]]    # stage 2; empty: the simulated human ranks SFT's replies
    held_out: list[list[Reply]]    # rankings that measure the reward model


def world_to_train_on(prompts: dict[str, list[str]]) -> list[str]:
    """The world's training prompts, without those that a user's own split holds out."""
    held_out = prompts["validation"] + prompts["test"]
    return [prompt for prompt in split(WORLD_PROMPTS)["train"] if prompt not in held_out]


def load_data(own: dict[str, list[Line]], cfg) -> Data:
    """Divide your own lines into training and held-out. What you do not give, the world gives.

    PPO practises on the prompts of --prompts. Without that file, it takes the prompts of the other
    files; without any, those of the world. All prompts are divided together: a prompt that is held
    out in one file is held out in all.
    """
    written = [line.replies[0].prompt for line in own["demos"] + own["preferences"]]
    practice = [line.replies[0].prompt for line in own["prompts"]] or written or list(WORLD_PROMPTS)
    splits = split(practice + written)
    allowed, in_practice = set(splits["train"]), set(practice)
    train, held_out = {}, {}
    for flag, lines in own.items():
        all_replies = [line.replies for line in lines if is_usable(line, flag)]
        if len(all_replies) < len(lines):
            say(f"--{flag}: {len(lines) - len(all_replies)} of {len(lines)} lines left out: their "
                f"replies are equal or empty once they are cut to {cfg.max_new_tokens} tokens")
        train[flag] = [replies for replies in all_replies if replies[0].prompt in allowed]
        held_out[flag] = [replies for replies in all_replies if replies[0].prompt not in allowed]
        check(train[flag] or not getattr(cfg, flag), f"--{flag} leaves nothing to train on; give 6 "
              "or more different prompts, with replies that differ in their first "
              f"{cfg.max_new_tokens} tokens")
    prompts = {}
    for name, part in splits.items():
        prompts[name] = [prompt for prompt in part if prompt in in_practice]
        check(prompts[name], f"{len(in_practice)} different prompts are too few to hold some out; "
              "give 6 or more")
    if written:
        texts = [reply for replies in train["demos"] + train["preferences"] for reply in replies]
        demos = [replies[0] for replies in train["demos"] or train["preferences"]]
        demos = [reply for reply in demos if reply.text]
        check(demos, "all replies to imitate are empty")
    else:
        if cfg.reward == "model" and not in_practice <= WORLD_PROMPTS.keys():
            say("warning: the reward model learns from the built-in world, and knows nothing of "
                "your prompts; give --preferences, or another --reward")
        rng = reseed(cfg, "texts")
        world = world_to_train_on(prompts)
        texts = write_texts(rng, world, PRETRAIN_MIX)
        demos = write_texts(rng, world, SFT_MIX)
    return Data(prompts, texts, demos, train["preferences"], held_out["preferences"])


# ---- Models --------------------------------------------------------------------------------------
def base_source(cfg) -> str | Path:
    """Where the first model comes from: a folder, a hub id, or "tiny"."""
    return finished_model("pretrain", cfg) or cfg.model


def base_model(own: dict[str, list[Line]], cfg) -> ActorCritic:
    """What all stages start from: --model, or a small GPT-2 with random weights."""
    reseed(cfg, "model")
    source = base_source(cfg)
    if source != "tiny":
        return same_in_all_processes(ActorCritic(*load_pretrained(source, cfg), cfg))
    texts = []
    for lines in own.values():
        for line in lines:
            for reply in line.replies:  # long texts will be cut, but only the tokenizer knows where
                texts += [reply.prompt[-10_000:], reply.text[:10_000]]
    if not (own["demos"] or own["preferences"]):
        # Not cfg.seed: all runs in this world have the same tokenizer, and can be compared.
        for reply in write_texts(random.Random(0), split(WORLD_PROMPTS)["train"], PRETRAIN_MIX):
            texts += [reply.prompt, reply.text]
    tokenizer = train_tokenizer(texts)
    lm = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=256,
        n_layer=cfg.n_layer, n_embd=cfg.n_embd, n_head=cfg.n_head,
        activation_function="gelu",  # GPT-2 approximates it, which takes a CPU longer
        initializer_range=0.08,      # GPT-2's 0.02 suits its width of 768
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    if wants_bfloat16(cfg):
        compute_in_bfloat16(lm, "cuda")
    return same_in_all_processes(ActorCritic(lm, tokenizer, cfg))


NO_MODEL = "no usable model in {}; try a local folder, an id with network, or --model tiny"


def load_tokenizer(source: str | Path):
    """The tokenizer of a folder or a hub id. EOS and padding are made two tokens (N1)."""
    with explain(NO_MODEL.format(source), Exception):
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        check(tokenizer("a").input_ids, "its tokenizer knows no text; are files of it missing?")
        check(tokenizer("a").input_ids[-1:] != [tokenizer.eos_token_id],
              "its tokenizer ends prompts, too, with EOS")
    tokenizer.add_special_tokens({"eos_token": tokenizer.eos_token or "<eos>"})
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def load_pretrained(source: str | Path, cfg):
    """(lm, tokenizer) from a folder or a hub id."""
    tokenizer = load_tokenizer(source)
    with explain(NO_MODEL.format(source), Exception):
        lm, loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32,
                                                          output_loading_info=True)
        check(not loaded["missing_keys"], f"it has no {', '.join(sorted(loaded['missing_keys']))}")
        try_model(lm)
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        lm.resize_token_embeddings(len(tokenizer))
    lm.config.eos_token_id = tokenizer.eos_token_id
    lm.config.pad_token_id = tokenizer.pad_token_id
    # The library's `generate` must stop where this script stops, and not at another token.
    lm.generation_config = GenerationConfig.from_model_config(lm.config)
    if wants_bfloat16(cfg):
        compute_in_bfloat16(lm, "cuda")
    return lm, tokenizer


def try_model(lm):
    """Can PPO train this model? Read two texts that differ in their second token only."""
    check(any(parameter.requires_grad for parameter in lm.parameters()),
          "it has nothing to train; merge the adapter into its model first: merge_and_unload()")
    accepted = inspect.signature(lm.forward).parameters.keys()
    check({"position_ids", "logits_to_keep"} <= accepted,
          "this architecture takes no position_ids or logits_to_keep")
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([[0, 1], [0, 2]]),
                    attention_mask=torch.ones(2, 2, dtype=torch.long),
                    position_ids=torch.tensor([[0, 1], [0, 1]])).logits                 # [2,2,V]
    finite = logits.amax(dim=-1).isfinite().all()
    check(finite and all(parameter.isfinite().all() for parameter in lm.parameters()),
          "it computes NaN or infinity before any training; its weights are damaged")
    check(torch.allclose(logits[0, 0], logits[1, 0], rtol=1e-3, atol=1e-3),
          "it is no causal language model: its output depends on later tokens")


def wants_bfloat16(cfg) -> bool:
    """Only GPUs that have bfloat16 in hardware. Others emulate it, which is slow."""
    return (cfg.bf16 and cfg.device.startswith("cuda")
            and torch.cuda.is_bf16_supported(including_emulation=False))


def compute_in_bfloat16(lm, device_type: str):
    """Let the language model compute in bfloat16. What uses its output stays in float32 (R3).

    The model becomes an object of a new class, which has the same name and another forward. A plain
    `lm.forward = wrapped` would be copied, too. Then the reference would use the actor's weights.
    """
    original = type(lm)
    forward = torch.autocast(device_type, torch.bfloat16)(original.forward)
    # The same as: class GPT2LMHeadModel(original): forward = forward
    lm.__class__ = type(original.__name__, (original,), {"forward": forward})


# ---- Rewards -------------------------------------------------------------------------------------
def load_reward(cfg, own: dict[str, list[Line]] | None = None):
    """--reward as a function: the human's rule, file.py:function, a run's reward model, or a
    classifier (L4). The function of a file gets the columns of `own`, the user's files."""
    if cfg.reward == "human":
        return human_score
    file, _, name = cfg.reward.rpartition(":")
    if file.endswith(".py"):
        with explain(f"--reward {cfg.reward} cannot be loaded", Exception, SystemExit,
                     user_code=True):
            score_fn = getattr(load_module(Path(file)), name)
        return with_columns(score_fn, own) if own else score_fn
    with explain(f"--reward {cfg.reward} is not model, human, file.py:function, the reward_model "
                 "folder of a run, or a classifier", Exception):
        if Path(cfg.reward, "heads.safetensors").is_file():
            return frozen(load_model(RewardModel, Path(cfg.reward), cfg)).score
        return load_classifier(cfg)


def load_module(path: Path):
    """Run a Python file as a module of its folder. So it can import other files of the folder. If
    it starts processes, they can import it by its name."""
    name, path = path.stem, path.resolve()
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program and Path(program).resolve() == path:
        return sys.modules["__main__"]  # the program that called main: it runs already
    if name in sys.modules:
        check(getattr(sys.modules[name], "__file__", "") == str(path),
              "Python has a module of that name; rename it")
        return sys.modules[name]
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_classifier(cfg):
    """A sequence-classification model as a reward function. Its last label counts."""
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        cfg.reward, dtype=torch.float32, output_loading_info=True)
    check(not loaded["missing_keys"],
          f"it has no weights for {', '.join(sorted(loaded['missing_keys']))}")
    tokenizer = AutoTokenizer.from_pretrained(cfg.reward)
    tokenizer.truncation_side = "left"  # of a long text, the reply must be seen
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions_of(model))
    model.to(cfg.device)  # with several processes, the pipeline would leave it on the CPU
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=cfg.device,
                        function_to_apply="none", truncation=True)
    last_label = model.config.id2label[model.config.num_labels - 1]

    def score(prompts, completions):
        texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
        scores = []
        for labels in classify(texts, top_k=None):
            for label in labels:
                if label["label"] == last_label:
                    scores.append(label["score"])
        return scores

    return score


def call_by_name(function, given: dict):
    """Call a function by keyword. It gets what its signature names, or all if it has **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        wanted = {parameter.name for parameter in parameters}
        given = {name: x for name, x in given.items() if name in wanted}
    return function(**given)


def with_columns(score_fn, own: dict[str, list[Line]]):
    """A reward function that is called as Part I does it, and calls score_fn as TRL does.

    score_fn gets each further column of the --prompts file as a list under its own name, such as
    the true answers. If the file has messages, score_fn gets prompts and completions as messages.
    `replies` are the completions as texts, in any case.
    """
    known = {}
    for line in own["prompts"] + own["preferences"] + own["demos"]:
        known.setdefault(line.replies[0].prompt, line)
    for line in own["prompts"]:
        prompt = line.replies[0].prompt
        # line.fields has the prompt as it stands in the file. It is not compared, because different
        # prompts may have become equal when they were cut.
        same = dict(line.fields, prompt="") == dict(known[prompt].fields, prompt="")
        check(same, f"--prompts {prompt[-60:]!r} stands there twice, and the further fields, such "
              "as the answer, differ")
    columns = list(dict.fromkeys(name for line in own["prompts"] for name in line.fields))
    nothing = Line([], [], {})

    def score(prompts, completions, finished):
        lines = [known.get(prompt, nothing) for prompt in prompts]
        given = {name: [line.fields.get(name) for line in lines] for name in columns}
        given.update(prompts=[], completions=[], replies=completions, finished=finished)
        for line, prompt, completion in zip(lines, prompts, completions):
            message = [{"role": "assistant", "content": completion}]
            given["prompts"].append(line.messages or prompt)
            given["completions"].append(message if line.messages else completion)
        return call_by_name(score_fn, copy.deepcopy(given))  # it may change the lists it gets

    return score


def random_numbers_of_its_own():
    """Within this, somebody else may seed torch or draw from it, and we notice nothing."""
    used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    return torch.random.fork_rng(used)  # without `used`: all GPUs, and memory on each


def ask_score_fn(score_fn, replies: list[Reply]) -> list[float]:
    """Call a reward function and check what it returns. A reply that occurs twice is scored once.

    It is called by keyword, as TRL calls reward functions: prompts, completions, finished, all
    lists. A function without **kwargs gets only those that it names. Returns a number per reply.
    """
    unique = list(dict.fromkeys(replies))
    prompts, completions, finished = zip(*unique)
    given = {
        "prompts": list(prompts),
        "completions": list(completions),
        "finished": list(finished)}
    example = unique[0].text[:50]
    with explain(f"--reward failed{WHERE[0]} on replies such as {example!r}", Exception, SystemExit,
                 user_code=True), torch.no_grad(), random_numbers_of_its_own():
        scores = call_by_name(score_fn, given)
        check(not isinstance(scores, (dict, set)),
              f"it returned a {type(scores).__name__}; give a list of numbers")
        scores = list(scores)
        check(len(scores) == len(unique), f"{len(scores)} scores for {len(unique)} replies")
        for reply, score in zip(unique, scores):
            check(score is not None and math.isfinite(score),
                  f"{score} for the reply {reply.text!r} to {reply.prompt!r}; give a number")
    score_of = {reply: float(score) for reply, score in zip(unique, scores)}
    return [score_of[reply] for reply in replies]


# ==================================================================================================
# 8  The command line
# ==================================================================================================
@dataclass
class Config(PPOConfig):
    """All flags: those of PPO (see PPOConfig), and these."""

    # The run
    out: str = HfArg(default="", help=(
        "Folder for the results. It must be new or empty. The default is runs/<date-time>."))
    seed: int = HfArg(default=0, help=(
        "Seed of all random numbers. The same seed on the same CPU gives the same results."))
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help=(
        "Where the models compute: cpu, cuda, cuda:1 ..."))
    bf16: bool = HfArg(default=True, help=(
        "Compute in bfloat16 on a GPU. A CPU always computes in float32. (R3)"))
    micro_batch_size: int = HfArg(default=64, help=(
        "Replies (in stage 2 rankings) in one pass of learning. Fewer need less memory and give "
        "the same update. Phase I samples its whole batch at once. (R2)"))
    max_grad_norm: float = HfArg(default=1.0, help=(
        "A gradient that is longer than this is shortened to it, 0.5 to 1. In all stages. Actor "
        "and critic have one limit together: a large value loss also shortens the actor's step."))
    eval_every: int = HfArg(default=10, help=(
        "Validate after this many cycles. The policy is kept, unless an earlier one was clearly "
        "better. (L6)"))
    eval_batches: int = HfArg(default=3, help=(
        "Replies for each validation, in batches of batch_size. More: a surer choice of policy."))
    report_batches: int = HfArg(default=28, help=(
        "Replies of each model for the report, in batches of batch_size. More: a more exact "
        "report. With --model the default is 3."))
    save_every: int = HfArg(default=10, help=(
        "Save after this many cycles of PPO, for --resume."))
    resume: str = HfArg(default="", help=(
        "Folder of a run that was stopped. It goes on where it was last saved. Of its other flags "
        "only device, micro_batch_size and save_every may be changed."))
    init_from: str = HfArg(default="", help=(
        "Folder of an earlier run. Its settings and models are taken; only PPO is repeated."))
    # Data and models
    prompts: str = HfArg(default="", help=(
        'JSONL file with lines {"prompt": ...}: what PPO practises on. A reward function gets all '
        "further fields. If no file is given, the built-in world is used."))
    demos: str = HfArg(default="", help=(
        'JSONL file with lines {"prompt": ..., "completion": ...}: what SFT imitates. In all '
        'files, texts may be messages, as [{"role": "user", "content": ...}]. (L2)'))
    preferences: str = HfArg(default="", help=(
        "JSONL file with lines {prompt, chosen, rejected} or {prompt, ranked: [best ... worst]}: "
        "what the reward model learns from. (L3)"))
    reward: str = HfArg(default="model", help=(
        "What gives the score: model (the trained reward model), human (the rule itself), "
        "file.py:function, the reward_model folder of another run, or a folder or hub id of a "
        "classifier. (L4)"))
    model: str = HfArg(default="tiny", help=(
        "The language model: tiny, or a folder or hub id (such as gpt2) of a causal one."))
    n_layer: int = HfArg(default=2, help="Layers of tiny, 1 to 12. GPT-2 has 12.")
    n_embd: int = HfArg(default=96, help="Width of tiny, a multiple of n_head. GPT-2 has 768.")
    n_head: int = HfArg(default=4, help="Attention heads in each layer of tiny. GPT-2 has 12.")
    # Stages 0 to 2
    pretrain_steps: int = HfArg(default=250, help=(
        "Updates in stage 0. With --model the default is 0. Fewer: clumsy English. (L2)"))
    sft_steps: int = HfArg(default=450, help=(
        "Updates in stage 1. Fewer: the model forgets what it was asked about. With --model, "
        "--prompts and --reward alone, the default is 0. (L2)"))
    sft_lr: float = HfArg(default=5e-3, help=(
        "Learning rate of stages 0 and 1. With --model the default is 5e-5. (P3)"))
    rm_steps: int = HfArg(default=600, help=(
        "Updates in stage 2. Fewer: a worse reward model, which PPO can cheat. (P1)"))
    rm_lr: float = HfArg(default=1e-3, help=(
        "Learning rate of stage 2. With --model the default is 1e-5."))
    rankings: int = HfArg(default=2200, help=(
        "Rankings of 4 replies that the human gives. 100 make a much worse model. (L3)"))
    label_noise: float = HfArg(default=0.3, help=(
        "How unsure the human is, in points, 0 to 2. More: a worse reward model. (P1)"))


# Most numbers must be above 0. These are the exceptions, with their lowest and highest value.
RANGES = {"gamma": (0, 1), "lam": (0, 1)}
for zero_is_fine in ["seed", "pretrain_steps", "sft_steps", "rm_steps", "cycles", "label_noise",
                     "kl_coef", "missing_eos_penalty", "vf_coef", "ent_coef"]:
    RANGES[zero_is_fine] = (0, sys.float_info.max)
# Defaults with --model: it is pretrained already, and a large model wants smaller steps (P3).
REAL_MODEL = {
    "pretrain_steps": 0,
    "sft_lr": 5e-5,
    "rm_lr": 1e-5,
    "lr": 1e-5,
    "report_batches": 3}
# What --init_from cannot change any more, because a model of that run was made with it.
FIXED = {
    "sft": ["model", "n_layer", "n_embd", "n_head",
            "pretrain_steps", "sft_steps", "sft_lr", "demos"],
    "reward_model": ["preferences", "rankings", "label_noise", "rm_steps", "rm_lr"]}
# What --resume may change, because the numbers stay the same, apart from rounding.
FREE = ["device", "micro_batch_size", "save_every"]


def refuse(message: str):
    """What the parser does with an unknown flag or a value of the wrong type."""
    raise UserError(f"{message} (see --help)")


def parse_config(argv=None) -> Config:
    """Command line -> Config. Raises UserError for an unknown flag or a value that cannot work.

    A flag has the value given, or that of the run in --resume or --init_from, or the default. The
    command line is parsed twice: first for the flags that change defaults, then with these.
    """
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    for before, word in zip(["", *argv], argv):
        check(word, f"{before} has an empty value; is a variable unset?")
        check(not re.fullmatch("--.*=", word), f"{word} has an empty value; is a variable unset?")
    parser = HfArgumentParser(Config, usage="python ppo_rlhf.py [--FLAG VALUE ...]",
                              allow_abbrev=False)
    parser.error = refuse
    given, _ = parser.parse_known_args(argv)
    fixed = {}  # flags that must keep their value
    if given.resume or given.init_from:
        flag = "resume" if given.resume else "init_from"
        run = Path(getattr(given, flag))
        with explain(f"--{flag} {run} is not the folder of a run", OSError, ValueError, TypeError):
            saved = asdict(Config(**json.loads((run / "config.json").read_text())))
            # A resumed run keeps its folder. With init_from `out` is empty: main makes a new one.
            saved.update({"out": given.resume, flag: getattr(given, flag)})
            parser.set_defaults(**saved)
            parser.parse_args([])  # converts the saved texts as if they were typed
        if given.resume:
            fixed = {name: x for name, x in saved.items() if name not in FREE}
        for folder, names in FIXED.items():
            if (run / folder).is_dir():
                fixed.update({name: saved[name] for name in names})
        if saved["preferences"] and not saved["demos"]:  # SFT imitated their best replies
            fixed["preferences"] = saved["preferences"]
    elif given.model != "tiny":
        parser.set_defaults(**REAL_MODEL)
        if given.prompts and given.reward != "model" and not (given.demos or given.preferences):
            parser.set_defaults(sft_steps=0)  # no texts: PPO starts from the model as it is
    cfg = Config(**vars(parser.parse_args(argv)))
    for name, value in fixed.items():
        check(getattr(cfg, name) == value,
              f"--{name} is {value} in {run}; with --{flag}, leave it out")
    check_config(cfg)
    check(not given.init_from or (Path(cfg.init_from) / "sft/heads.safetensors").is_file(),
          f"--init_from {cfg.init_from} has no SFT model; name the folder of a run that got so far")
    return cfg


def check_config(cfg: Config):
    """Raise UserError for values that cannot work, alone or together."""
    for name, value in vars(cfg).items():
        if type(value) in (int, float):
            low, high = RANGES.get(name, (sys.float_info.min, sys.float_info.max))
            if high == 1:
                wanted = "0 to 1"
            elif low == 0:
                wanted = "0 or more"
            else:
                wanted = "above 0"
            check(low <= value <= high, f"--{name} must be {wanted}, not {value}")
    for name, value, part, count in [
            ("n_embd", cfg.n_embd, "n_head", cfg.n_head),
            ("batch_size", cfg.batch_size, "replies_per_prompt", cfg.replies_per_prompt * WORLD),
            ("batch_size", cfg.batch_size, "minibatches", cfg.minibatches * WORLD)]:
        check(value % count == 0,
              f"--{name} {value} must be a multiple of {count} (--{part}, times the processes)")
    check(cfg.reward != "human" or not (cfg.prompts or cfg.demos or cfg.preferences),
          "--reward human knows the built-in prompts only; for your own data leave it out, or name "
          "another --reward")
    check(cfg.reward != "model" or cfg.preferences or not cfg.demos,
          "--demos without --preferences leave the reward model nothing to learn from; add them, "
          "or another --reward")
    check(WORLD == 1 or cfg.device in ("cpu", "cuda"),
          "with torchrun, leave --device out: every process takes a GPU of its own")
    with explain(f"--device {cfg.device} cannot be used; try --device cpu, or fewer processes",
                 RuntimeError, AssertionError, AttributeError, TypeError):
        if WORLD > 1 and cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # from now on "cuda" is this one
        elif cfg.device.startswith("cuda:"):
            torch.cuda.set_device(cfg.device)
        torch.zeros(1, dtype=torch.double, device=cfg.device).item()


# ==================================================================================================
# 9  Training runs: what the loops of Part I call
# ==================================================================================================
def chunks(items, size: int):
    """A list or a rollout in pieces of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start:start + size]


def some(items: list, count: int) -> list:
    """At most `count` of the items. If there are twice as many or more, they are spread over the
    whole list, because a file may be sorted."""
    return items[::max(1, len(items) // count)][:count]


def repeat_each(items: list, count: int) -> list:
    """a, b -> a, a, b, b"""
    repeated = []
    for item in items:
        repeated += [item] * count
    return repeated


def say(text=""):
    """print without damage to a progress bar. One process speaks for all."""
    if RANK == 0 and sys.stdout:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)  # not all terminals know Chinese
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def reseed(cfg, purpose: str) -> random.Random:
    """Seed torch and return a random stream, both for one purpose only.

    These are random: the first weights, the texts, the human's noise, the batches and prompts that
    are drawn, the sampled tokens, the order in Phase II. All depend on the purpose (such as "PPO 7"
    for cycle 8) and the seed, not on what was drawn before. So a resumed run repeats a cycle
    exactly, and a skipped stage changes nothing. Processes get the same stream and another torch
    seed: they share their choices and sample different replies.
    """
    rng = random.Random(f"{purpose} {cfg.seed}")
    torch.manual_seed(rng.getrandbits(63) + RANK)
    return rng


# ---- Several processes: torchrun --nproc-per-node N ppo_rlhf.py (R1) -----------------------------
# Every process holds all models. In each cycle all processes draw the same prompts, and each
# samples, scores and values its share of them. What they exchange in a cycle:
#     moments           three sums a call, for explained_variance and, if it is on, for whiten
#     optimizer_step    in each update, sums: of gradients, tokens, loss and metrics
#     describe          a line for each reply, for metrics.csv; at validation likewise
#     cycles_to_do      whether Ctrl-C was pressed in one of them
# After an update all have the same weights, because they began with the same weights and added the
# same gradient. Only process 0 prints and writes.
RANK, WORLD = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def moments(x, mask) -> tuple[float, float]:
    """Mean and variance of x [B,T] over the real tokens of all processes."""
    count = add_up(mask.sum().item())
    mean = add_up(torch.where(mask, x, 0).sum().item()) / count
    variance = add_up(torch.where(mask, (x - mean) ** 2, 0).sum().item()) / count
    return mean, variance


def share(items: list) -> list:
    """This process's part of a list. All parts, one after the other, are the list."""
    return items[RANK * len(items) // WORLD:(RANK + 1) * len(items) // WORLD]


def gather(items: list) -> list:
    """The opposite of `share`: all processes get all parts, one after the other."""
    if WORLD == 1:
        return items
    parts = [None] * WORLD
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def add_up(number: float) -> float:
    """The sum of a number over all processes."""
    return sum(gather([number]))


def same_in_all_processes(model):
    """Give every process the weights of process 0. Random ones differ at first. -> the model"""
    if WORLD > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
    return model


# ---- Steps ---------------------------------------------------------------------------------------
WHERE = [""]  # what the run is doing now, for error messages
NO_BAR = True if RANK > 0 else None  # for tqdm. None: a bar is shown only in a terminal


def draw(examples: list, batch_size: int, rng: random.Random) -> list:
    """A random batch; this process's share of it."""
    return share(rng.choices(examples, k=max(batch_size, WORLD)))


def draw_prompts(prompts: list[str], rng: random.Random, cfg) -> list[str]:
    """The prompts of one cycle, each repeated replies_per_prompt times; this process's share.

    A prompt may be drawn twice. Then its replies make one larger group. With several processes the
    two draws may go to different processes. Then they make two groups. The replies of one draw
    always stay in one process.
    """
    drawn = rng.choices(prompts, k=cfg.batch_size // cfg.replies_per_prompt)
    return repeat_each(share(drawn), cfg.replies_per_prompt)


def optimizer_step(model, optimizer, loss_fn, batch, cfg) -> dict[str, float]:
    """One update on the mean loss over a batch. Returns the loss and the metrics as numbers.

    The batch may be divided into micro batches and among processes. The update is the same, up to
    rounding (R1, R2): loss_fn(model, part, cfg) -> (mean loss of the part, count, metrics), and the
    gradient of each part is weighted by its count, which is the number of its tokens (in stage 2 of
    its rankings). A plain mean of the parts would favour the tokens of a part with short replies.
    The limit holds for all gradients together: a large value loss also shortens the actor's.
    """
    optimizer.zero_grad()
    total, sums = 0.0, {}
    for part in chunks(batch, cfg.micro_batch_size):
        loss, count, metrics = loss_fn(model, part, cfg)
        (loss * count).backward()
        total += count.item()
        for name, x in [("loss", loss), *metrics.items()]:
            sums[name] = sums.get(name, 0.0) + x.item() * count.item()

    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters]
    if WORLD > 1:
        for gradient in gradients:
            dist.all_reduce(gradient)
        total = add_up(total)
        sums = {name: add_up(x) for name, x in sums.items()}
    torch._foreach_div_(gradients, total)  # divides each of them by total
    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    check(norm.isfinite(),
          f"loss or gradient is infinite or NaN{WHERE[0]}; try a lower learning rate")
    optimizer.step()
    return {name: x / total for name, x in sums.items()}


def check_logits(logits):
    """Stop the run if a model computes NaN [B,V]: the tokens sampled from it would mean nothing."""
    check(logits.amax(dim=-1).isfinite().all(),
          f"the model computes NaN or infinity{WHERE[0]}; try a lower learning rate")


def steps_to_do(stage: str, steps: int, cfg):
    """Count the steps of stages 0 to 2: a random stream for each."""
    for step in tqdm(range(steps), stage, leave=False, disable=NO_BAR):
        WHERE[0] = f" in {stage}, step {step + 1}"
        yield reseed(cfg, f"{stage} {step}")
    WHERE[0] = ""


def fingerprints(cfg) -> dict[str, str]:
    """A hash of each file of the user. A resumed run must find the same data and reward."""
    paths = [getattr(cfg, flag) for flag in OWN_DATA]
    paths.append(cfg.reward.rpartition(":")[0])
    hashes = {}
    for path in paths:
        if Path(path).is_file():
            hashes[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return hashes


def cycles_to_do(training: dict, log: list[dict], cfg):
    """Count PPO's cycles: yield (cycle, random stream) for each one that is still to be done.

    training: what changes from cycle to cycle, by name; each has state_dict and load_state_dict.
    It is kept in state.pt, together with the log, every save_every cycles. A resumed run repeats
    the cycles since the last save, bit for bit, because each has a random stream of its own.
    """
    path = Path(cfg.out) / "state.pt"
    settings = dict(asdict(cfg), out="", resume="", files=fingerprints(cfg))
    for name in FREE:
        del settings[name]
    first = 0
    if cfg.resume and path.exists():
        with explain(f"{path} is damaged or not of this run; without it, PPO would begin anew",
                     Exception):
            state = torch.load(path, map_location="cpu", weights_only=True)
            check(state["settings"] == settings,
                  "config.json, the data or the reward have changed since it was written")
            first = state["cycle"]
            log += state["log"]
            for name, part in training.items():
                part.load_state_dict(state[name])
    bar = tqdm(range(first, cfg.cycles), "PPO", initial=first, total=cfg.cycles, leave=False,
               disable=NO_BAR)
    with ctrl_c_waits() as pressed:
        for cycle in bar:
            WHERE[0] = f" in PPO, cycle {cycle + 1}"
            yield cycle, reseed(cfg, f"PPO {cycle}")  # here the loop does the cycle
            stop = len(gather(pressed)) > 0  # Ctrl-C in any of the processes
            due = (cycle + 1) % cfg.save_every == 0 or cycle + 1 == cfg.cycles
            if cfg.out and RANK == 0 and (stop or due):
                state = {name: part.state_dict() for name, part in training.items()}
                state.update(cycle=cycle + 1, log=log, settings=settings)
                with replacing(path) as temporary:
                    torch.save(state, temporary)
            if stop:
                raise KeyboardInterrupt
    WHERE[0] = ""


@contextmanager
def ctrl_c_waits():
    """The first Ctrl-C waits for the end of the cycle, the second one stops at once.

    Yields a list. It is empty as long as Ctrl-C was not pressed.
    """
    pressed = []

    def handler(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield pressed
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# ---- Files ---------------------------------------------------------------------------------------
@contextmanager
def replacing(path: Path):
    """A temporary path to write to. It becomes `path` at the end, so no file is half written."""
    temporary = path.with_name(path.name + ".tmp")
    with explain(f"cannot write {path}", Exception):
        shutil.rmtree(temporary, ignore_errors=True)
        yield temporary
        shutil.rmtree(path, ignore_errors=True)  # if it is a folder; os.replace needs it empty
        os.replace(temporary, path)


def write_json(path: Path, content: dict):
    """NaN is not JSON. It becomes null: json.loads asks parse_constant what NaN shall be."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def open_folder(cfg):
    """Make the run's folder and write config.json. An earlier run is never touched."""
    cfg.out = cfg.out or time.strftime("runs/%Y%m%d-%H%M%S")
    folder = Path(cfg.out)
    if RANK > 0 or cfg.resume:
        return
    with explain(f"--out {folder} cannot be used; choose another folder", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        killed_at_once = {"config.json.tmp"}  # a run that left only this did nothing yet
        check(set(os.listdir(folder)) <= killed_at_once, "it is not empty")
        write_json(folder / "config.json", asdict(cfg))


def save_model(model, folder: Path):
    """An ordinary transformers folder, and the weights of our head in heads.safetensors."""
    if RANK == 0:
        with replacing(folder) as temporary:
            model.lm.save_pretrained(temporary)
            model.tokenizer.save_pretrained(temporary)
            save_file(model.head.state_dict(), temporary / "heads.safetensors",
                      {"head_of": type(model).__name__})


def load_model(model_class, folder: Path, cfg):
    """What save_model wrote; model_class is ActorCritic or RewardModel."""
    with explain(f"{folder} is damaged or not of a run", Exception):
        with safe_open(folder / "heads.safetensors", "pt") as file:
            head_of = file.metadata()["head_of"]
            weights = {name: file.get_tensor(name) for name in file.keys()}
        check(head_of == model_class.__name__, f"its head is that of an {head_of}")
        model = model_class(*load_pretrained(folder, cfg), cfg)
        model.head.load_state_dict(weights)
        return model


def finished_model(name: str, cfg) -> Path | None:
    """The folder of a stage's model, if this run (--resume) or an earlier one has it already."""
    for run in [cfg.resume, cfg.init_from]:
        if run and (Path(run) / name).is_dir():
            return Path(run) / name
    return None


def run_stage(name: str, model_class, seconds: dict, cfg, train, *inputs):
    """The model of one stage: loaded if it is there already, otherwise train(*inputs, cfg)."""
    start = time.perf_counter()
    folder = finished_model(name, cfg)
    model = load_model(model_class, folder, cfg) if folder else train(*inputs, cfg)
    if folder != Path(cfg.out) / name:  # it is new, or of another run (--init_from)
        save_model(model, Path(cfg.out) / name)
    seconds[name] = time.perf_counter() - start
    return model


# ==================================================================================================
# 10  main
# ==================================================================================================
def main(argv=None):
    """Run everything. argv: a list of flags, or None for the command line's.

    It can be called again and again in one process, as a notebook does.
    """
    start = time.perf_counter()
    check(transformers.__version__.startswith("5."),
          f"this needs transformers 5, not {transformers.__version__}: "
          "pip install -r requirements.txt")
    check(WORLD == 1 or {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys(),
          "WORLD_SIZE is set, but torchrun did not start this program; unset it, or use torchrun")
    check(WORLD > 1 or RANK == 0,
          "RANK is set, but torchrun did not start this program; unset it, or use torchrun")
    cfg = parse_config(argv)
    with quiet_libraries(), modules_forgotten(), torch.enable_grad():
        if WORLD > 1:
            dist.init_process_group("nccl" if cfg.device.startswith("cuda") else "gloo")
        try:
            run_stages(argv, cfg, start)
            if WORLD > 1:
                dist.barrier()  # one process that leaves early can make another one crash
        except KeyboardInterrupt:
            if cfg.out and (Path(cfg.out) / "config.json").exists():
                say(f"\nstopped; to go on: {command(argv, '--resume', cfg.out)}")
            else:
                say("\nstopped, before anything was written")
            raise
        finally:
            if WORLD > 1:
                dist.destroy_process_group()


@contextmanager
def quiet_libraries():
    """Silence the libraries for a while. A notebook finds them as they were before."""
    hub = logging.get_logger("huggingface_hub")
    verbosity, hub_level = logging.get_verbosity(), hub.level
    progress_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.setLevel("ERROR")
    logging.disable_progress_bar()
    gc.freeze()  # otherwise garbage collection looks through all libraries, for a second
    try:
        yield
    finally:
        gc.unfreeze()
        logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if progress_bars:
            logging.enable_progress_bar()


@contextmanager
def modules_forgotten():
    """Afterwards Python forgets the reward's module, and what it imported from its folder.

    The next run in this process may have other files of the same names.
    """
    path, modules = sys.path[:], set(sys.modules)
    try:
        yield
    finally:
        added = Counter(sys.path) - Counter(path)  # what load_module has added, also twice
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None) or ""
            neighbour = any(file.startswith(folder + os.sep) for folder in added)
            if neighbour and "site-packages" not in file:
                del sys.modules[name]


def command(argv, *flags: str) -> str:
    """How to call this script with these flags, in the way in which it was called."""
    if argv is None:
        start = ["torchrun", "--nproc-per-node", str(WORLD)] if WORLD > 1 else ["python"]
        return shlex.join([*start, sys.argv[0], *flags])
    return f"main({list(flags)})"


def run_stages(argv, cfg, start: float):
    """Stages 0 to 2, PPO and the report."""
    WHERE[0] = ""
    # What can be wrong with the user's input fails here, before anything is written or takes long.
    source = base_source(cfg)
    own = read_own_data(None if source == "tiny" else load_tokenizer(source), cfg)
    base = base_model(own, cfg)
    own = {flag: shorten(lines, base, cfg) for flag, lines in own.items()}
    data = load_data(own, cfg)
    score_fn = None
    if cfg.reward != "model":
        score_fn = load_reward(cfg, own)
        longest = max(sum(data.prompts.values(), []), key=len)
        ask_score_fn(score_fn, [Reply(longest, "", True)])
    open_folder(cfg)

    seconds = {}
    pretrained = run_stage("pretrain", ActorCritic, seconds, cfg, pretrain, base, data.texts)
    sft = run_stage("sft", ActorCritic, seconds, cfg, finetune, pretrained, data.demos)
    if not score_fn:
        reward_model = run_stage("reward_model", RewardModel, seconds, cfg, train_reward_model,
                                 sft, data)
        score_fn = reward_model.requires_grad_(False).score
    reference, policy = frozen(sft), sft  # PPO trains sft in place; the reference is its copy
    quality = reward_model_quality(score_fn, reference, data, cfg)
    if cfg.reward != "model":  # the reward model's scores have mean 0 already
        start_at_mean(policy, score_fn, data.prompts["train"], cfg)
    record_xray(0, policy, reference, score_fn, data.prompts["validation"], cfg)
    log = train_ppo(policy, reference, score_fn, data.prompts, cfg)
    save_model(policy, Path(cfg.out) / "policy")

    test = some(data.prompts["test"], 20)
    models = {"pretrained": pretrained, "sft": reference, "ppo": policy}
    report, tables = compare_models(models, score_fn, test, cfg)
    say(xray(sample_and_score(policy, reference, score_fn, test[:1], cfg), policy.tokenizer, cfg))
    seconds["ppo"] = sum(line["seconds"] for line in log)
    seconds["total"] = time.perf_counter() - start
    report.update(reward_model=quality, seconds=seconds)
    if RANK == 0:
        write_json(Path(cfg.out) / "report.json", report)
    show_report(report, tables, test, cfg)
    say(f"\nAll is in {cfg.out}. PPO alone, with another flag: "
        f"{command(argv, '--init_from', cfg.out, '--kl_coef', '0.05')}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; lower --micro_batch_size (also with --resume) or, "
              "in a new run, --batch_size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
