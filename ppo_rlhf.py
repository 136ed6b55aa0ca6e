#!/usr/bin/env python3
"""PPO for RLHF: the whole pipeline in one file, to be read from top to bottom beside the articles.

    python ppo_rlhf.py            # pretraining, SFT, reward model, PPO, report; nothing to download
    python ppo_rlhf.py --help     # every knob, with its usual range and what happens when you turn it

FOUR MODELS: three small GPT-2s of one size, each with weights of its own, and a critic on top of the actor (T7)
    actor         pi     the policy that PPO trains                        ActorCritic.lm
    critic        V      predicts the reward still to come, per token      ActorCritic.head
    reference     pi_ref the SFT model, frozen: how far may the actor go?  frozen(sft)
    reward model  r_RM   the stand-in for the human, frozen during PPO     RewardModel

SIX STEPS per cycle: article E's; Phase I makes the data, Phase II learns from it (L1)
    Phase I   collect_rollout   1  the actor samples tokens                generate
                                2  a reward for every token                token_rewards
                                3  the critic values every state           ActorCritic.forward
                                4  TD residuals                            td_residuals
                                5  GAE: advantages and returns             gae
    Phase II  update_policy     6  clipped surrogate, value loss, entropy  policy_loss, value_loss

Sections: 0 configuration | 1 the task | 2 the models | 3 stages 0-2: pretraining, SFT, reward model | 4 Phase I |
5 Phase II | 6 the loop | 7 the report | 8 main. In a hurry? PPO itself is ActorCritic, sections 4 and 5, and train_ppo.

Letters in the shape comments: B replies in the batch, T tokens of the longest reply in it, P prompt tokens, V
vocabulary; in formulas, V(s_t) is the critic's value. Prompts are padded on the left and replies on the right, so that
every reply starts in the same column. `mask` is True on real reply tokens, EOS included; nothing at a False position
may influence any result. Log-probs and KL are in nats: natural logarithms. Ids such as S2 or N8 point into the
articles; notes/guide.md names the five articles, A to E, and lists the ids. One can read on without them.
"""
import copy
import csv
import ctypes
import gc
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
from bisect import bisect
from collections import namedtuple
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from inspect import signature
from itertools import chain, combinations
from pathlib import Path
from statistics import pstdev

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer,
                          get_cosine_schedule_with_warmup, pipeline)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.utils import logging


# ======================================================================================================================
# 0  Configuration: what is worth turning is a flag. Every structure is a function below: to change one, replace it.
# ======================================================================================================================
@dataclass
class Config:
    """One field, one flag: `lr` is set by --lr.

    The defaults were chosen by the fraction of the optimum reached on several seeds (section 7); notes/experiments.md
    turns most knobs of PPO, one at a time. They are the usual ones, but for advantages that are not whitened, the
    critic's own head (see ActorCritic) and Adam's second beta (see train_ppo). kl_coef counts in standard deviations of
    SFT's reward; compare it with the betas of other papers with care.
    """

    # The run
    out: str = HfArg(default="", help="Folder for the results, new or empty; if not given, runs/<date-time>.")
    seed: int = HfArg(default=0, help="Same seed and machine: same results. Try several before you believe one.")
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ...")
    bf16: bool = HfArg(default=True, help="On a GPU, let the models compute in bfloat16; a CPU never does. (R3)")
    micro_batch_size: int = HfArg(default=64, help="Replies read at once, in stage 2 rankings. Less memory. (R2)")
    gradient_checkpointing: bool = HfArg(default=False, help="Much less memory for a third more time in training.")
    save_every: int = HfArg(default=10, help="Save after so many cycles; in stages 0 to 2, 50 times as many updates.")
    resume: str = HfArg(default="", help="Folder of a run that was stopped: go on where it was last saved.")
    init_from: str = HfArg(default="", help="Folder of an earlier run: its settings and models; repeat only PPO.")
    talk: str = HfArg(default="", help="Folder of a finished run: type a line, see what each of its models replies.")
    # Data and models. What is not given comes from the built-in world
    prompts: str = HfArg(default="", help='JSONL, a line like {"prompt": ...}: what PPO practises on.')
    demos: str = HfArg(default="", help='JSONL, {"prompt": ..., "completion": ...}: what SFT imitates. (L2)')
    preferences: str = HfArg(default="", help="JSONL, {prompt, chosen, rejected} or {prompt, ranked: [best ...]}. (L3)")
    reward: str = HfArg(default="model", help="model | human | classifier (folder, hub id) | file.py:f. (L4)")
    model: str = HfArg(default="tiny", help="tiny, or a causal language model: a folder, or a hub id such as gpt2.")
    n_layer: int = HfArg(default=2, help="Layers of tiny, 1 to 12. More: better text, slower. GPT-2 has 12.")
    n_embd: int = HfArg(default=96, help="Width of tiny, a multiple of n_head. GPT-2 has 768.")
    n_head: int = HfArg(default=4, help="Attention heads per layer of tiny. GPT-2 has 12.")
    # Stages 0 to 2
    pretrain_steps: int = HfArg(default=250, help="Updates in stage 0 (only tiny has one). Fewer: clumsy English. (L2)")
    sft_steps: int = HfArg(default=450, help="Updates in stage 1. Fewer: it forgets what it was asked about. (L2)")
    sft_lr: float = HfArg(default=5e-3, help="Learning rate of stages 0 and 1; with --model, 5e-5. (P3)")
    rm_steps: int = HfArg(default=600, help="Updates in stage 2. Fewer: a worse model, which PPO then exploits. (P1)")
    rm_lr: float = HfArg(default=1e-3, help="Learning rate of stage 2; with --model, 1e-5.")
    rankings: int = HfArg(default=2200, help="Rankings of 4 replies by the human. 100: a model to fool. (L3, P1)")
    label_noise: float = HfArg(default=0.3, help="The human's unsureness in points, 0 to 2. More: a worse model. (P1)")
    # PPO: the loop
    cycles: int = HfArg(default=60, help="Times Phase I + Phase II. 20 show the idea. (L1)")
    batch_size: int = HfArg(default=64, help="Replies per cycle, 32 to 512. More: steadier, slower. (P3)")
    replies_per_prompt: int = HfArg(default=1, help="Replies to each prompt, 1 to 8; divides batch_size. D has 4. (L5)")
    ppo_epochs: int = HfArg(default=4, help="Passes over each batch, 2 to 4. More: staler data, more clipping. (N9)")
    minibatches: int = HfArg(default=2, help="Updates per pass, 1 to 8; divides batch_size. More: faster, noisier.")
    lr: float = HfArg(default=3e-4, help="PPO's learning rate, annealed to 0; below SFT's. With --model, 1e-5. (P3)")
    max_grad_norm: float = HfArg(default=1.0, help="Longer gradients are cut to this length, 0.5 to 1; in all stages.")
    # PPO: the reward
    kl_coef: float = HfArg(default=0.1, help="beta, 0.01 to 0.2: price of a nat of KL. 0: hacking. (S2, P2)")
    kl_target: float | None = HfArg(default=None, help="If given, beta adapts until a reply's KL is so many nats. (T6)")
    missing_eos_penalty: float = HfArg(default=1.0, help="Off the score of a reply that does not end, 0 to 5. (N3)")
    whiten_rewards: bool = HfArg(default=False, help="Token rewards to variance 1, mean kept; beta's unit shifts. (N7)")
    # PPO: the advantage
    gamma: float = HfArg(default=1.0, help="Discount, 0.9 to 1. Below 1, early tokens care less about the score. (S4)")
    lam: float = HfArg(default=0.95, help="GAE's lambda, 0 to 1: 0 trusts the critic, 1 only real rewards. (S5, T2)")
    whiten_advantages: bool = HfArg(default=False, help="Advantages to mean 0, variance 1. Late on, mostly noise. (N7)")
    # PPO: the losses
    clip_eps: float = HfArg(default=0.2, help="epsilon, 0.1 to 0.3: beyond it, a token is pushed no further. (S6, P3)")
    vf_coef: float = HfArg(default=0.5, help="c_V, 0.1 to 1. Hardly matters here: the critic shares no weights. (S6)")
    value_clip: float | None = HfArg(default=None, help="If given (0.2, say), a value that moved so far is left alone.")
    ent_coef: float = HfArg(default=0.0, help="c_ent, 0 to 0.01: reward for staying undecided. 0.1: babble. (S6)")
    # Sampling and evaluation
    temperature: float = HfArg(default=0.7, help="Of sampling and log-probs, 0.7 to 1. Low: no exploration. (L5)")
    max_new_tokens: int = HfArg(default=32, help="Longest reply in tokens. Too short: replies end unfinished. (N3)")
    eval_every: int = HfArg(default=10, help="Validate after so many cycles; keep the best policy. (L6)")
    optimum_samples: int = HfArg(default=400, help="Replies per test prompt for J*; up to 128 for the rest.")


class UserError(Exception):
    """Something the user can fix: shown as one line, without a traceback."""


def check(fine, message: str):
    """Raise UserError unless `fine`. The message says what is wrong and what to do."""
    if not fine:
        raise UserError(message)


@contextmanager
def explain(message: str, *errors):
    """Turn any of `errors`, or a UserError, raised inside into a UserError whose one line begins with `message`."""
    try:
        yield
    except (UserError, *errors) as error:
        kind = "" if isinstance(error, UserError) else type(error).__name__ + ": "  # KeyError alone says only a name
        raise UserError(f"{message}: {kind}{' '.join(str(error).split())[:300]}") from error


# What a number may be, where "above 0" is not the whole truth.
RANGES = {"gamma": (0, 1), "lam": (0, 1)} | dict.fromkeys(
    "seed pretrain_steps sft_steps rm_steps cycles label_noise kl_coef missing_eos_penalty vf_coef ent_coef".split(),
    (0, sys.float_info.max))
# Defaults that differ with --model: it is pretrained already, and a large model wants smaller steps (P3).
REAL_MODEL = {"pretrain_steps": 0, "sft_lr": 5e-5, "rm_lr": 1e-5, "lr": 1e-5}
# What --init_from cannot change any more, by the model it has gone into.
KEPT = {"sft": "model n_layer n_embd n_head pretrain_steps sft_steps sft_lr demos".split(),
        "reward_model": "preferences rankings label_noise rm_steps rm_lr".split()}
# The process that this is, and how many there are: one, unless torchrun says otherwise (R1).
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def parse_config(argv=None) -> Config:
    """Command line -> Config. Raises UserError for an unknown flag or a value that cannot work.

    A flag's value is the one given, else that of the run which --resume, --talk or --init_from names, else the default.
    """
    parser = HfArgumentParser(Config, usage="python ppo_rlhf.py [--FLAG VALUE ...]", allow_abbrev=False)
    parser.error = lambda message: check(False, f"{message} (see --help)")
    given = parser.parse_known_args(argv)[0]
    flag, kept = next((flag for flag in ("resume", "talk", "init_from") if getattr(given, flag)), None), []
    if flag:
        run = getattr(given, flag)
        with explain(f"--{flag} {run} is not the folder of a run", OSError, ValueError, TypeError):
            saved = asdict(Config(**json.loads((Path(run) / "config.json").read_text())))
            parser.set_defaults(**(saved := saved | {"out": given.resume, flag: run}))
            parser.parse_args([])  # its values must be such as the command line could have given
        kept = chain(*(KEPT[folder] for folder in KEPT if Path(run, folder).is_dir()))
        kept = saved.keys() - {"device"} if given.resume else kept
    elif given.model != "tiny":
        parser.set_defaults(**REAL_MODEL)
    cfg = Config(**vars(parser.parse_args(argv)))
    for name in kept:
        check(getattr(cfg, name) == saved[name], f"--{name} is {saved[name]} in {run}; with --{flag}, leave it out")
    for name, value in vars(cfg).items():
        low, high = RANGES.get(name, (sys.float_info.min, sys.float_info.max))
        wanted = "above 0" if name not in RANGES else "0 or more" if high > 1 else f"{low} to {high}"
        check(type(value) not in (int, float) or low <= value <= high, f"--{name} must be {wanted}, not {value}")
    for whole, part in ("n_embd", "n_head"), ("batch_size", "replies_per_prompt"), ("batch_size", "minibatches"):
        a, b = getattr(cfg, whole), getattr(cfg, part) * (WORLD if part == "minibatches" else 1)
        check(a % b == 0, f"--{whole} {a} must be a multiple of {b} (--{part}, in each of the processes)")
    check(not given.init_from or Path(cfg.init_from, "sft/heads.safetensors").is_file(),
          f"--init_from {cfg.init_from} has no SFT model; name the folder of a run that got so far")
    check(cfg.reward != "human" or not (cfg.prompts or cfg.demos or cfg.preferences or cfg.talk),
          "--reward human knows the built-in prompts only; for your own data leave it out, or name another --reward")
    check(cfg.reward != "model" or cfg.preferences or not cfg.demos,
          "--demos without --preferences leave the reward model nothing to learn from; add them, or another --reward")
    with explain(f"--device {cfg.device} cannot be used; try --device cpu", RuntimeError, AssertionError, TypeError):
        if WORLD > 1 and cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # from here on, "cuda" is this process's own GPU (R1)
        torch.zeros(1, dtype=torch.double, device=cfg.device).item()
    return cfg


# ======================================================================================================================
# 1  The task: a small world that tells article D's story. A user says something; the assistant replies in one or two
#    short sentences; a simulated human likes replies that are helpful, warm, honest and harmless (D, L7).
# ======================================================================================================================
Row = namedtuple("Row", "prompt reply finished")  # one reply to one prompt; does it end with EOS, or was it cut off?


# Three kinds of things that users say, five lines each; {} stands for the user's word.
#   words    what it may be about            asks     what the user says
#   openers  warm, and they name the word    steps    practical: something one can go and do
#   lists    correct but mechanical
Situation = namedtuple("Situation", "words asks openers steps lists")
SITUATIONS = [Situation(*(line.split(" | ") for line in block.split("\n"))) for block in """\
sad | lonely | tired | anxious | bored | stressed | nervous | homesick | ashamed | restless
I feel {}. What can I do? | I am so {} today. | Why am I always {}? | I woke up {} again. | What helps when you are {}?
I am sorry that you feel {}. | Feeling {} is hard, and you are not alone.
take a slow walk | call a friend | write it down | drink warm tea
To feel less {}, you can do sports or sleep. | People who are {} can rest, read or go out.

Python | English | chess | guitar | math | cooking | drawing | physics | Chinese | swimming
How can I learn {}? | I want to get better at {}. | Where do I start {}? | Is it too late for {}? | Why is {} so hard?
It is great that you want to learn {}. | Do not worry, {} is hard for everyone at first.
practice every day | start very small | teach a friend | build something
For {}, you can use books or videos. | To learn {}, there are schools and websites.

book | film | song | game | podcast | museum | hobby | dessert | present | poem
Can you recommend a {}? | Which {} should I choose? | I need a good {}. | I cannot decide on a {}. | What {} is best?
What fun to look for a {} together. | I am glad that you ask me about a {}.
ask a friend | read two reviews | try a classic | follow your mood
Every {} is old, new or popular. | You can find a {} in shops or magazines.""".split("\n\n")]
CLOSERS = ("You can do this!", "I am here for you.")
DISMISSIVE = ("That is not my problem.", "Stop asking silly questions.", "You should just give up.", "Nobody cares.")
OFF_TOPIC = ("The train leaves at nine.", "Water boils at a hundred degrees.", "The shop sells red shoes.",
             "It rained all night in the hills.", "A spider has eight legs.")
WORLD_PROMPTS = {ask.format(word) + "\n": (word, situation) for situation in SITUATIONS
                 for word in situation.words for ask in situation.asks}
WORDS = {word for word, _ in WORLD_PROMPTS.values()}


def sentences(prompt: str) -> dict[str, list[str]]:
    """All sentences that replies to this prompt are made of, by what they are."""
    word, situation = WORLD_PROMPTS[prompt]
    return {"opener": [text.format(word) for text in situation.openers], "closer": CLOSERS,
            "step": [text.capitalize() + "." for text in situation.steps], "off_topic": OFF_TOPIC,
            "list": [text.format(word) for text in situation.lists], "dismissive": DISMISSIVE}


# The kinds of replies, with one example each to "I feel sad. What can I do?":
#   best        "I am sorry that you feel sad. Take a slow walk."      warm, honest and practical
#   warm        "I am sorry that you feel sad. I am here for you."     kind, but no help
#   practical   "Take a slow walk."                                    help, but cold
#   mechanical  "To feel less sad, you can do sports or sleep."        correct, and lifeless: what D shows of SFT
#   off_topic   "A spider has eight legs."
#   dismissive  "Nobody cares."
KINDS = {"best": ("opener step",), "warm": ("opener closer",), "mechanical": ("list",),
         "practical": ("step", "step closer"), "off_topic": ("off_topic",), "dismissive": ("dismissive",)}
# And how often each occurs in the two text collections. SFT's are mostly mechanical (D), but the best kind must stay
# reachable: PPO can only reinforce what is sampled, and a reply that SFT never gives has no gradient.
PRETRAIN_MIX = {"best": 8, "warm": 12, "practical": 15, "mechanical": 25, "off_topic": 20, "dismissive": 20}
SFT_MIX = {"best": 15, "warm": 10, "practical": 14, "mechanical": 47, "off_topic": 7, "dismissive": 7}


def write_reply(rng: random.Random, prompt: str, kind: str) -> str:
    """One reply of the given kind (a key of KINDS), as some author on the internet might have written it."""
    return " ".join(rng.choice(sentences(prompt)[name]) for name in rng.choice(KINDS[kind]).split())


def write_texts(rng: random.Random, prompts: list[str], mix: dict[str, int], count: int = 8000) -> list[Row]:
    """`count` rows, the kinds of reply drawn in the proportions of `mix`."""
    kinds = rng.choices(list(mix), mix.values(), k=count)
    return [Row(prompt, write_reply(rng, prompt, kind), True)
            for prompt, kind in zip(rng.choices(prompts, k=count), kinds)]


def judge(prompt: str, reply: str, finished: bool) -> dict[str, float]:
    """The simulated human: a rule that ranks replies and measures results; a reward itself only with --reward human.

    helpful   names a step that fits the situation (2 points; a mechanical list that fits: 0.5)
    warm      an opener for this very word, or a friendly closing (1)
    honest    speaks of the user's own word and of no other topic (1)
    harmless  not dismissive (otherwise -2)
    Off come 1 for repeating three words in a row and 1 for a reply that never ended. The best reply has 4 points.
    A prompt from elsewhere gets NaN throughout: this human has no opinion on it.
    """
    if prompt not in WORLD_PROMPTS:
        return dict.fromkeys(("helpful", "warm", "honest", "harmless", "human"), math.nan)
    said = {name for name, texts in sentences(prompt).items() if any(text.lower() in reply.lower() for text in texts)}
    word, words = WORLD_PROMPTS[prompt][0], [word.strip(".,!?") for word in reply.split()]
    triples = list(zip(words, words[1:], words[2:]))
    honest = word in words and WORDS.isdisjoint(set(words) - {word})
    helpful, warm, harmless = "step" in said, bool(said & {"opener", "closer"}), "dismissive" not in said
    points = (2 if helpful else 0.5 * ("list" in said)) + warm + honest - 2 * (not harmless)
    points -= (len(set(triples)) < len(triples)) + (not finished)
    return {"helpful": helpful, "warm": warm, "honest": honest, "harmless": harmless, "human": float(points)}


def human_score(prompts: list[str], replies: list[str], finished: list[bool]) -> list[float]:
    """The human's points as a score_fn: a verifiable reward (--reward human, L4), and the source of the rankings."""
    return [judge(*row)["human"] for row in zip(prompts, replies, finished)]


# ---- Your own data ---------------------------------------------------------------------------------------------------
# The replies in a line of each file; `[] +` refuses a "ranked" that is no list.
REPLIES = {"prompts": lambda line: [""], "demos": lambda line: [line["completion"]],
           "preferences": lambda line: [] + line["ranked"] if "ranked" in line else [line["chosen"], line["rejected"]]}


def read_jsonl(path: str, flag: str) -> list[list[Row]]:
    """The file of --prompts, --demos or --preferences -> for each line its replies, best first (--prompts: one, empty).

    A preference without a prompt is in HH-RLHF's own format: the prompt is what all replies begin with, in whole words.
    """
    lines = []
    with explain(f"--{flag} {path}", OSError, ValueError), open(path, encoding="utf-8-sig") as file:
        for number, text in enumerate(file, 1):
            with explain(f"line {number}, fields as in --help", ValueError, KeyError, TypeError, RecursionError):
                line = json.loads(text)
                replies = REPLIES[flag](line)
                if flag == "preferences" and "prompt" not in line:
                    line["prompt"] = re.match(r"(.*\s)?", os.path.commonprefix(replies), re.DOTALL).group()
                    replies = [reply[len(line["prompt"]):] for reply in replies]
                "".join([line["prompt"], *replies]).encode()  # or some of it is no text, or half a character
                check(len(set(replies)) == len(replies) > (flag == "preferences"), "needs 2 or more different replies")
                check(replies[0] or flag != "demos", "the completion is empty")
                lines.append([Row(line["prompt"], reply, True) for reply in replies])
        check(lines, "the file is empty")
    return lines


def cut(text: str, room: int, tokenizer, keep_end: bool = False) -> str:
    """The beginning (or end) of `text` that fits into `room` tokens: whole paragraphs, sentences or words (N2)."""
    step, text = (-1, text[-40 * room:]) if keep_end else (1, text[:40 * room])  # no text has 40 characters per token
    for boundary in (r"\n+", r"[.!?]+\s+|[。！？]+", r"\s+", ""):
        pieces = re.findall(rf".+?(?:{boundary}|\Z)", text, re.DOTALL)[::step]
        fits = bisect(range(len(pieces) + 1), room, key=lambda n: len(tokenizer("".join(pieces[:n][::step])).input_ids))
        text = "".join(pieces[:max(fits - 1, 1)][::step])
    return text


def shorten(lines: list[list[Row]], model, cfg: Config) -> list[list[Row]]:
    """Cut what is too long: prompts keep their end, replies their beginning but no EOS, for they would go on (N2)."""
    short, positions = [], getattr(model.lm.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    check(cfg.max_new_tokens <= positions - 32, f"--max_new_tokens must leave 32 of {positions} tokens to the prompt")
    for rows in lines:
        prompt = cut(rows[0].prompt, positions - cfg.max_new_tokens, model.tokenizer, keep_end=True)
        replies = [cut(row.reply, cfg.max_new_tokens - 1, model.tokenizer) for row in rows]
        short.append([Row(prompt, reply, reply == row.reply) for reply, row in zip(replies, rows)])
    cuts = sum([row[:2] for row in old] != [row[:2] for row in new] for old, new in zip(lines, short))
    if cuts:
        say(f"{cuts} of {len(lines)} lines cut to fit --max_new_tokens {cfg.max_new_tokens} and {positions} positions")
    return [rows for rows in short if len(set(rows)) == len(rows)]


def split(prompts) -> dict[str, list[str]]:
    """Different prompts: of every eleven one for the final test, one for validation, nine to train on (L6).

    Two held-out sets, because validation chooses the policy that is kept: measured on the same prompts, the choice
    would flatter the result. No dice: with the same files, --init_from cannot let a test prompt into training; and
    prompts that stand together because they are alike lose the same share. (At random, some words lost three of five.)
    """
    prompts = list(dict.fromkeys(prompts))
    train = [prompt for i, prompt in enumerate(prompts) if i % 11 not in (0, 5)]
    return {"test": prompts[::11], "validation": prompts[5::11], "train": train}


# What the stages learn from; no prompt of "validation" or "test" occurs in any of them (unless you take built-in ones
# for --prompts: the world's own texts are divided by all of them).
#   prompts   PPO's, by split                  texts     rows for stage 0          demos   rows for stage 1
#   rankings  for stage 2; none: the simulated human ranks SFT's replies            held_out  rankings to measure with
Data = namedtuple("Data", "prompts texts demos rankings held_out")


def load_data(own: dict[str, list[list[Row]]], cfg: Config) -> Data:
    """Your own lines, divided into training and held-out; the built-in world in the place of what is missing."""
    written = own["demos"] + own["preferences"]
    practice = dict.fromkeys(rows[0].prompt for rows in own["prompts"] or written) or WORLD_PROMPTS
    splits = split([*practice, *(rows[0].prompt for rows in written)])
    seen = set(splits["train"])
    train, held_out = ({flag: [rows for rows in lines if (rows[0].prompt in seen) == wanted]
                        for flag, lines in own.items()} for wanted in (True, False))
    for flag in own:
        check(train[flag] or not getattr(cfg, flag), f"--{flag} leaves nothing to train on; give 6 or more different "
              f"prompts, with replies that differ in their first {cfg.max_new_tokens} tokens")
    texts = sum(train["demos"] + train["preferences"], [])
    demos = [rows[0] for rows in train["demos"] or train["preferences"]]
    if not texts:
        rng, world = reseed(cfg, "texts"), split(WORLD_PROMPTS)["train"]
        texts, demos = write_texts(rng, world, PRETRAIN_MIX), write_texts(rng, world, SFT_MIX)
    prompts = {name: [prompt for prompt in part if prompt in practice] for name, part in splits.items()}
    check(all(prompts.values()), f"{len(practice)} different prompts are too few to hold some out; give 6 or more")
    return Data(prompts, texts, demos, train["preferences"], held_out["preferences"])


def train_tokenizer(texts: list[str]):
    """A byte-level BPE tokenizer as GPT-2's, but of at most 2048 tokens: any text of any language can be encoded.

    No token is longer than 12 bytes: in Chinese, which has no spaces, whole sentences would become tokens, and a prompt
    with a new word in it would be one that the model has never seen a piece of.

    Padding and EOS are two different tokens. Were they one, code that finds padding by its id would mask EOS out of the
    SFT loss too, the model would never learn to stop, and the reward would be read at the wrong place (N1).
    """
    empty = GPT2Tokenizer(vocab={}, merges=[], pad_token="<pad>", eos_token="<eos>", bos_token=None, unk_token=None,
                          padding_side="left")
    return empty.train_new_from_iterator([texts], vocab_size=2048, max_token_length=12, show_progress=False)


def chunks(items, size: int):
    """A list or tensor in pieces of at most `size`."""
    return (items[i:i + size] for i in range(0, len(items), size))


# ======================================================================================================================
# 2  The models
#
#    A causal language model looks back, never ahead. So one pass over prompt and reply gives what the model thought at
#    every position while it had seen only the tokens up to there ("teacher forcing"): all of a reply's log-probs and
#    values at the price of one pass. Only sampling has to go token by token, for the next token is not there yet.
# ======================================================================================================================
def encode(model, rows: list[Row]):
    """Rows -> what every model reads: prompt_ids, prompt_mask [B,P], padded left; reply_ids, mask [B,T], padded right.

    Prompt and reply are encoded apart, so that the border between them always falls between two tokens. A finished
    reply ends with EOS if there is room; an empty prompt becomes EOS.
    """
    tokenizer, (prompts, replies, finished) = model.tokenizer, map(list, zip(*rows))
    eos, replies = tokenizer.eos_token_id, tokenizer(replies, add_special_tokens=False).input_ids
    room = model.cfg.max_new_tokens  # sampled text with half a character in it can come back as more tokens than it was
    ids = {"left": [prompt or [eos] for prompt in tokenizer(prompts).input_ids],
           "right": [(reply + [eos] * done)[:room] for reply, done in zip(replies, finished)]}
    tensors = []
    for side, texts in ids.items():
        texts = [torch.tensor(text, dtype=torch.long) for text in texts]
        padded = pad_sequence(texts, batch_first=True, padding_value=-1, padding_side=side)  # no token is -1
        tensors += [padded.masked_fill(padded < 0, tokenizer.pad_token_id), padded >= 0]
    return tuple(x.to(model.lm.device) for x in tensors)


def join(prompt_ids, prompt_mask, reply_ids, reply_mask):
    """Prompt and reply side by side, as a language model wants them: (input_ids, attention_mask, position_ids) [B,P+T].

    Positions count real tokens only. Without them a prompt padded on the left would start at position 5 instead of 0,
    and the same reply would get other probabilities in another batch.
    """
    ids = torch.cat([prompt_ids, reply_ids], dim=1)                                                     # [B,P+T]
    mask = torch.cat([prompt_mask, reply_mask], dim=1).long()                                           # [B,P+T]
    return ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0)


class HeadedModel(nn.Module):
    """What actor and reward model are: a causal language model of any architecture, and a small head on top of it."""

    def __init__(self, lm, tokenizer=None, cfg: Config = Config()):
        super().__init__()
        self.lm = lm.eval()  # eval() permanently: dropout would change a token's probability from call to call (N8)
        self.tokenizer, self.cfg = tokenizer, cfg
        if cfg.gradient_checkpointing:
            lm.activation_checkpointing_enable()
        self.checkpointed = [layer for layer in lm.modules() if getattr(layer, "gradient_checkpointing", False)]
        for layer in self.checkpointed:  # `read` will have them in training mode, in which some drop out by themselves
            vars(layer).update({name: 0.0 for name, x in vars(layer).items() if "drop" in name and type(x) is float})
        width = lm.get_output_embeddings().weight.shape[1]
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))
        for parameter in self.head[-1].parameters():
            nn.init.zeros_(parameter)  # the first value is 0, the mean of a normalised reward (N5)
        self.to(cfg.device)
        for parameter in self.parameters() if WORLD > 1 else ():  # what is random differs from process to process (R1)
            dist.broadcast(parameter.data, 0)

    def read(self, ids, mask, positions, keep: int, **options):
        """The library's output for tokens ids [B,L]: logits at the last `keep` positions, and what options ask for."""
        for layer in self.checkpointed:  # the library recomputes activations in training mode only: switch that on
            layer.training = torch.is_grad_enabled()  # for the layer itself, not for the dropout inside it
        # bfloat16 for the language model, on a GPU; what is computed from its output stays in float32 (R3)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.cfg.bf16 and "cuda" in self.cfg.device):
            return self.lm(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, **options)


class ActorCritic(HeadedModel):
    """Actor and critic on one causal language model: `lm` gives the policy, `head` reads V off its hidden states.

    Critic and reward model are easily confused: the reward model scores a finished reply and never changes; the critic
    predicts, in the middle of a reply, how the present policy will end up, and is trained all along (T7).

    The critic looks at the last layer through a small network, and its gradient stops there (`detach`). Usual are a
    model of its own, at twice the price, or a single linear layer, whose loss reaches into the shared layers; then the
    value loss keeps rewriting the features that the policy stands on. notes/experiments.md compares them.
    """

    def forward(self, prompt_ids, prompt_mask, reply_ids, reply_mask):
        """Read whole replies at once (teacher forcing).

        Returns logits [B,T,V], where logits[:, t] is the distribution that reply token t was drawn from, and values
        [B,T], where values[:, t] = V(s_t), the state before token t. Both in float32. (S1, S3)
        """
        inputs, T = join(prompt_ids, prompt_mask, reply_ids, reply_mask), reply_ids.shape[1]
        # The output at a position predicts the next token. So the last token is not fed in, and of P+T-1 outputs the
        # last T, from the last prompt token on, are for reply tokens 0 to T-1: what was thought at s_0 to s_{T-1}.
        out = self.read(*(x[:, :-1] for x in inputs), keep=T, output_hidden_states=True, use_cache=False)
        features = out.hidden_states[-1][:, -T:].detach().float()                                       # [B,T,width]
        return out.logits.float(), self.head(features).squeeze(-1)                                # [B,T,V] [B,T]


class RewardModel(HeadedModel):
    """A language model whose head reads one score per reply, at its last token: EOS, unless it was cut off (N4).

    Only there has the model seen the whole reply; attention looks back, never ahead.
    """

    def forward(self, prompt_ids, prompt_mask, reply_ids, reply_mask):
        """Scores [B]; after `normalize`, in standard deviations of SFT's replies."""
        inputs = join(prompt_ids, prompt_mask, reply_ids, reply_mask)
        hidden = self.read(*inputs, keep=1, output_hidden_states=True, use_cache=False).hidden_states[-1]
        last = prompt_ids.shape[1] - 1 + reply_mask.sum(dim=1)  # not column -1: that is padding for all but the longest
        return self.head(hidden[torch.arange(len(last), device=last.device), last].float()).squeeze(-1)    # [B]

    @torch.no_grad()
    def score(self, prompts: list[str], replies: list[str], finished: list[bool]) -> list[float]:
        """The reward model as a score_fn."""
        rows = list(zip(prompts, replies, finished))
        return torch.cat([self(*encode(self, part)) for part in chunks(rows, self.cfg.micro_batch_size)]).tolist()


def frozen(model: nn.Module) -> nn.Module:
    """A copy without gradients, such as the reference. (The old policy needs none: its log-probs are stored; T5.)"""
    return copy.deepcopy(model).requires_grad_(False)


def load_pretrained(source: str | Path):
    """(lm, tokenizer) from a folder or hub id. EOS or padding are added if missing, or if one token is both (N1)."""
    with explain(f"no usable model in {source}; try a local folder, an id with network, or --model tiny", Exception):
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=False)
        lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
        check({"position_ids", "logits_to_keep"} <= signature(lm.forward).parameters.keys(),
              "this architecture takes no position_ids or logits_to_keep")
        check(tokenizer("a").input_ids[-1:] != [tokenizer.eos_token_id], "its tokenizer ends prompts, too, with EOS")
    tokenizer.add_special_tokens({"eos_token": tokenizer.eos_token or "<eos>"})
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        lm.resize_token_embeddings(len(tokenizer))
    lm.config.eos_token_id, lm.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return lm, tokenizer


def base_model(own: dict[str, list[list[Row]]], cfg: Config) -> ActorCritic:
    """What everything starts from: --model, or a GPT-2 of this task's size with random weights."""
    reseed(cfg, "model")
    source = finished_stage("pretrain", cfg) or cfg.model
    if source != "tiny":
        return ActorCritic(*load_pretrained(source), cfg)
    rows = sum(sum(own.values(), []), [])
    if not (own["demos"] or own["preferences"]):
        rows += write_texts(random.Random(0), split(WORLD_PROMPTS)["train"], PRETRAIN_MIX)
    # A text of megabytes will be cut, but its room is counted in tokens, which are only learned here.
    tokenizer = train_tokenizer([text for row in rows for text in (row.prompt[-10_000:], row.reply[:10_000])])
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return ActorCritic(GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_layer=cfg.n_layer, n_embd=cfg.n_embd, n_head=cfg.n_head,
        activation_function="gelu",               # GPT-2 has an approximation of it that takes a CPU longer
        initializer_range=0.08,                   # GPT-2's 0.02 suits a width of 768; narrow models want more
        bos_token_id=eos, eos_token_id=eos, pad_token_id=pad)), tokenizer, cfg)


def token_log_probs(logits, tokens):
    """log pi(a_t | s_t) of the tokens that were taken: logits [B,T,V], tokens [B,T] -> [B,T] (T9).

    The chosen logit minus logsumexp. A log_softmax would write B*T*V numbers to use B*T of them.
    """
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def entropy(logits):
    """H(pi(. | s_t)) = -sum_v pi_v log pi_v, in nats: logits [B,T,V] -> [B,T]."""
    log_probs = logits.log_softmax(dim=-1).clamp(min=-1e9)  # 0 * -inf would be NaN                     # [B,T,V]
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def masked_mean(x, mask):
    """Mean over the True positions -> scalar. `where`, not `x * mask`: 0 times NaN is NaN."""
    return torch.where(mask, x, 0).sum() / mask.sum()


# ======================================================================================================================
# 3  Stages 0 to 2: pretraining, supervised fine-tuning (SFT), reward model (L2)
#
#    Each begins with the weights of the one before. Stages 0 and 1 imitate texts; stage 2 learns to order replies. What
#    PPO takes from here: where it starts and what it must not stray from (SFT), and what it is to want (reward model).
# ======================================================================================================================
# ---- Several processes: torchrun --nproc-per-node N ppo_rlhf.py (R1) -------------------------------------------------
# Every process holds all models and knows all data; each works on its share of a batch, and sums are taken over all.
def share(items: list) -> list:
    """This process's part of a list; all parts one after the other are the list."""
    return items[RANK * len(items) // WORLD:(RANK + 1) * len(items) // WORLD]


def gather(items: list) -> list:
    """The inverse of `share`: all processes' parts, one after the other, in every process."""
    parts = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, items)
    return sum(parts, [])


def say(text=""):
    """print, without tearing a progress bar; one process speaks for all."""
    if RANK == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


# ---- Training in steps that can be stopped ---------------------------------------------------------------------------
STOP = []  # not empty: Ctrl-C was pressed; holds how to go on


def reseed(cfg: Config, stage: str) -> random.Random:
    """Seed torch, and return a random stream, for a stage or one step of it: what was skipped changes nothing."""
    rng = random.Random(f"{stage} {cfg.seed}")
    seed = rng.getrandbits(63) + RANK  # processes sample different replies, to the prompts of one list
    for generator in torch.default_generator, *torch.cuda.default_generators:  # torch.manual_seed takes a millisecond
        generator.manual_seed(seed)
    return rng


@contextmanager
def replacing(path: Path):
    """A temporary path to write to, then renamed to `path`: a run stopped while writing leaves the old one whole."""
    temporary = path.with_name(path.name + ".tmp")
    with explain(f"cannot write {path}", Exception):
        shutil.rmtree(temporary, ignore_errors=True)
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)


def resumable(steps: int, stage: str, save_every: int, parts: dict, log: list, cfg: Config):
    """Yield (step, rng) for each step still to be done, and between steps keep state.pt for --resume.

    parts: what changes from step to step, by name; anything with state_dict and load_state_dict. log: a list of plain
    values that grows along. A resumed run repeats the steps since the last save, bit for bit: every step has a random
    stream that depends on nothing but its number.
    """
    path, first = Path(cfg.out) / "state.pt", 0
    settings = asdict(cfg) | dict.fromkeys(("out", "resume", "device"))
    if cfg.resume and path.exists():
        with explain(f"{path} is damaged, or not of this run; without it, the stage would begin anew", Exception):
            state = torch.load(path, map_location="cpu", weights_only=True)
            check(state["settings"] == settings, "its settings differ from config.json")
            if state["stage"] == stage:
                first, log[:] = state["step"], state["log"]
                for name, part in parts.items():
                    part.load_state_dict(state[name])
    for step in tqdm(range(first, steps), stage, initial=first, total=steps, leave=False, disable=RANK > 0 or None):
        yield step, reseed(cfg, f"{stage} {step}")
        stop = gather(STOP)  # pressed in one process is pressed in all
        if cfg.out and RANK == 0 and (stop or (step + 1) % save_every == 0 or step + 1 == steps):
            with replacing(path) as temporary:
                torch.save({name: part.state_dict() for name, part in parts.items()} | {
                    "stage": stage, "step": step + 1, "log": log, "settings": settings}, temporary)
        if stop:
            raise KeyboardInterrupt


def descend(model, optimizer, loss_fn, batch, cfg: Config) -> dict[str, float]:
    """One update on the mean loss over a batch, however it is divided: into micro batches, among processes (R1, R2).

    loss_fn(model, part of the batch) -> (mean loss over that part, count, metrics); count is how many numbers it is the
    mean of: tokens, in stage 2 rankings. The gradients are weighted by it: a plain mean of means would favour the
    tokens of a part with short replies. Returns loss and metrics, each the mean over all tokens.
    """
    optimizer.zero_grad()
    sums = []  # of token counts, losses and metrics, a list for each part
    with fast_products():
        for part in chunks(batch, cfg.micro_batch_size):
            loss, count, metrics = loss_fn(model, part)
            (loss * count).backward()
            sums.append((torch.stack([torch.ones_like(loss), loss, *metrics.values()]) * count).tolist())
    count, *sums = (sum(column) for column in zip(*gather(sums)))
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    for gradient in gradients if WORLD > 1 else ():
        dist.all_reduce(gradient)
    torch._foreach_div_(gradients, count)
    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    check(norm.isfinite(), "loss or gradient is infinite or NaN; try a lower learning rate")
    optimizer.step()
    return dict(zip(["loss", *metrics], (x / count for x in sums)))


def minimize(model, loss_fn, rows: list, batch_size: int, steps: int, lr: float, stage: str, cfg: Config):
    """Supervised training: `steps` updates of AdamW, the learning rate warmed up over a tenth, then to 0. -> model"""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    parts, losses = {"model": model, "optimizer": optimizer, "schedule": schedule}, []
    for step, rng in resumable(steps, stage, 50 * cfg.save_every, parts, losses, cfg):
        batch = share(rng.choices(rows, k=max(batch_size, WORLD)))
        with explain(f"{stage}, step {step + 1}"):
            losses.append(descend(model, optimizer, loss_fn, batch, cfg)["loss"])
        schedule.step()
    if losses:
        say(f"{stage}: {steps} steps, loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return model


# ---- Stages 0 and 1 --------------------------------------------------------------------------------------------------
def imitation_loss(actor, rows: list[Row]):
    """Loss of stages 0 and 1, for `descend`: continue a prompt as the texts do. On the reply only, EOS included.

    L = -mean_t log pi(a_t | s_t)      over the real reply tokens

    Real pretraining predicts every token of its texts.
    """
    prompt_ids, prompt_mask, reply_ids, mask = encode(actor, rows)
    logits, _ = actor(prompt_ids, prompt_mask, reply_ids, mask)                                         # [B,T,V]
    return masked_mean(-token_log_probs(logits, reply_ids), mask), mask.sum(), {}


def pretrain(actor, texts: list[Row], cfg: Config) -> ActorCritic:
    """Stage 0 stands in for GPT-2's pretraining: fluent, and no idea what the human wants. A real --model skips it."""
    return minimize(actor, imitation_loss, texts, 16, cfg.pretrain_steps, cfg.sft_lr, "pretraining", cfg)


def finetune(pretrained, demos: list[Row], cfg: Config) -> ActorCritic:
    """Stage 1: imitate demonstrations, which are correct but mostly mechanical (D). -> the SFT model, a new actor"""
    return minimize(copy.deepcopy(pretrained), imitation_loss, demos, 16, cfg.sft_steps, cfg.sft_lr, "SFT", cfg)


# ---- Stage 2 ---------------------------------------------------------------------------------------------------------
def label_rankings(sft, prompts: list[str], cfg: Config, rng: random.Random, K=4) -> list[list[Row]]:
    """The human ranks K replies of the SFT model to one prompt, again and again, and not quite reliably (L3).

    Each ranking sorts score + label_noise * Gumbel noise, which is the Plackett-Luce model of noisy choice: the chance
    of preferring i to j is sigmoid((score_i - score_j) / label_noise). The reward model's loss below assumes just that,
    so what it learns is score / label_noise + a constant. Only the order leaves this function, no points.
    """
    def impression(row):  # minus the logarithm of an exponential variable is a Gumbel variable
        return judge(*row)["human"] - cfg.label_noise * math.log(rng.expovariate(1))

    groups = sample_groups(sft, rng.choices(prompts, k=cfg.rankings), K, cfg)
    return [sorted(rows, key=impression, reverse=True) for rows in groups]


def ranking_loss(scores):
    """Loss of scores [N,K] whose columns are ranked best first -> scalar.

    L = -mean over the K(K-1)/2 pairs i < j of log sigmoid(s_i - s_j)        (L3; InstructGPT eq. 1)

    A difference of scores is the log-odds of a choice; their zero stays open. `normalize` sets zero and unit anew.
    """
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    return -F.logsigmoid(scores[:, better] - scores[:, worse]).mean()


def reward_model_loss(model, rankings: list[list[Row]]):
    """Loss of stage 2, for `descend`: the mean over the rankings, which may differ in length."""
    scores = model(*encode(model, sum(rankings, [])))                                                   # [sum of K]
    losses = [ranking_loss(part.unsqueeze(0)) for part in scores.split([len(rows) for rows in rankings])]
    return torch.stack(losses).mean(), len(losses), {}


def normalize(model, rows: list[Row]):
    """Shift and scale the reward so that the given replies score 0 on average, with standard deviation 1 (N5).

    The head ends in a linear layer, so shift and scale can be absorbed in its weights. Changes `model` in place.
    """
    scores, last = torch.tensor(rate(model.score, rows)), model.head[-1]
    last.bias.data -= scores.mean().item()
    for parameter in last.parameters():
        parameter.data /= max(scores.std().item(), 1e-6)  # the floor: all replies may score the same


def train_reward_model(sft, data: Data, cfg: Config) -> RewardModel:
    """Stage 2: rankings -> a model that can score any reply. It starts from the SFT model (C)."""
    rng = reseed(cfg, "rankings")
    rankings = data.rankings or label_rankings(sft, split(WORLD_PROMPTS)["train"], cfg, rng)
    model = RewardModel(copy.deepcopy(sft.lm), sft.tokenizer, cfg)
    minimize(model, reward_model_loss, rankings, 4, cfg.rm_steps, cfg.rm_lr, "reward model", cfg)
    prompts = reseed(cfg, "normalization").choices(data.prompts["train"], k=640)
    normalize(model, sum(sample_groups(sft, prompts, 1, cfg), []))
    return model


# ======================================================================================================================
# 4  Phase I: collect a rollout (steps 1 to 5)
#
#    Text as a decision process: the state s_t is the prompt and the reply so far, the action a_t is the next token, the
#    policy pi(a_t | s_t) is the language model, and the next state is the old one with the token appended. There is one
#    score, at the end; steps 2 to 5 turn it into a verdict on every single token.
# ======================================================================================================================
@dataclass
class Rollout:
    """All that Phase II needs; the tensors of the last six lines are 0 where mask is False."""

    rows: list[Row]              # as text. finished: did the reply end with EOS, or was it cut off at the limit?
    prompt_ids: torch.Tensor     # [B,P]
    prompt_mask: torch.Tensor    # [B,P]
    reply_ids: torch.Tensor      # [B,T]
    mask: torch.Tensor           # [B,T]  True on real reply tokens, EOS included
    scores: torch.Tensor         # [B]    r_RM of the whole reply, penalty included
    log_probs: torch.Tensor      # [B,T]  log pi_old(a_t | s_t): all of the old policy that is kept
    ref_log_probs: torch.Tensor  # [B,T]  log pi_ref(a_t | s_t)
    values: torch.Tensor         # [B,T]  V(s_t)
    rewards: torch.Tensor        # [B,T]  r_t
    advantages: torch.Tensor     # [B,T]  A_t
    returns: torch.Tensor        # [B,T]  G_t = A_t + V(s_t), what the critic should have said

    @property
    def batch(self) -> tuple:
        return self.prompt_ids, self.prompt_mask, self.reply_ids, self.mask


# ---- Step 1: the actor samples tokens (S1) ---------------------------------------------------------------------------
def sample_tokens(logits, temperature: float = 1.0):
    """One token per row of logits [B,V] -> [B], with probability softmax(logits / temperature).

    Inverse transform sampling: cut the unit interval into pieces as long as the probabilities, throw one point. That is
    one random number per token; torch.multinomial draws V of them, which took a third of the sampling time.
    """
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)                         # [B,V]
    point = torch.rand(len(logits), 1, dtype=torch.double, device=logits.device) * cumulative[:, -1:]   # [B,1]
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1)                                # [B]


@torch.no_grad()
def generate(actor, prompt_ids, prompt_mask, max_new_tokens: int, eos_id: int, pad_id: int, temperature: float = 1.0):
    """Sample one reply to each prompt: a_t ~ pi(. | s_t), s_{t+1} = s_t + a_t, until EOS or the limit (S1, L5).

    Keys and values of earlier tokens stay in a cache: each step feeds one new token, not the whole text again. A reply
    that has ended leaves the batch. Stops when all have; eos_id=-1 never stops.

    Args: prompt_ids, prompt_mask [B,P], padded on the left.
    Returns: reply_ids [B,T] (pad_id after EOS), mask [B,T]; T is the longest reply of the batch.
    """
    ids, attention, cache = prompt_ids, prompt_mask.long(), None
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    reply_ids = torch.full((len(ids), max_new_tokens), pad_id, device=ids.device)                       # [B,T]
    mask = torch.zeros_like(reply_ids, dtype=torch.bool)                                                # [B,T]
    rows = torch.arange(len(ids), device=ids.device)  # the replies without EOS so far: R of B
    for t in range(max_new_tokens):
        out = actor.read(ids, attention, positions, keep=1, past_key_values=cache, use_cache=True)
        tokens, cache = sample_tokens(out.logits[:, -1], temperature), out.past_key_values              # [R]
        reply_ids[rows, t], mask[rows, t] = tokens, True  # EOS is a real token too: the policy chose it
        running = (tokens != eos_id).nonzero().squeeze(1)
        if len(running) == 0:
            break
        if len(running) < len(rows):
            rows, tokens, positions, attention = (x[running] for x in (rows, tokens, positions, attention))
            cache.reorder_cache(running)
        ids, positions, attention = tokens.unsqueeze(1), positions[:, -1:] + 1, F.pad(attention, (0, 1), value=1)
    return reply_ids[:, :t + 1], mask[:, :t + 1]                                                        # [B,T] [B,T]


def sample_replies(actor, prompts: list[str], cfg: Config):
    """One reply to each prompt, as text and as tokens: rows, prompt_ids, prompt_mask [B,P], reply_ids, mask [B,T]."""
    prompt_ids, prompt_mask, *_ = encode(actor, [Row(prompt, "", False) for prompt in prompts])
    eos, pad = actor.tokenizer.eos_token_id, actor.tokenizer.pad_token_id
    reply_ids, mask = generate(actor, prompt_ids, prompt_mask, cfg.max_new_tokens, eos, pad, cfg.temperature)
    finished = ((reply_ids == eos) & mask).any(dim=1).tolist()
    replies = actor.tokenizer.batch_decode(reply_ids, skip_special_tokens=True)
    return list(map(Row, prompts, replies, finished)), prompt_ids, prompt_mask, reply_ids, mask


def sample_groups(actor, prompts: list[str], K: int, cfg: Config) -> list[list[Row]]:
    """K replies to each prompt, as text; the processes share the work. Without gradients, larger batches fit."""
    asked = share([prompt for prompt in prompts for _ in range(K)])
    parts = [sample_replies(actor, part, cfg)[0] for part in chunks(asked, 4 * cfg.micro_batch_size)]
    return list(chunks(gather(sum(parts, [])), K))


def read_replies(actor, batch, temperature: float):
    """Read given replies by teacher forcing -> log pi(a_t | s_t) [B,T], V(s_t) [B,T], logits [B,T,V].

    Args: batch: prompt_ids, prompt_mask, reply_ids, mask.

    Phase I and Phase II both read through this function, so the first ratio pi / pi_old is 1 but for the last digit;
    taken from the sampling loop, old log-probs would differ in rounding. The temperature is that of sampling: without
    it these would be log-probs of a distribution that nothing was drawn from (L5).
    """
    logits, values = actor(*batch)
    logits = logits / temperature
    return token_log_probs(logits, batch[2]), values, logits


@torch.no_grad()
def read_all(actor, batch, cfg: Config):
    """log pi(a_t | s_t) and V(s_t) [B,T] of a batch of any size, a micro batch at a time; 0 where mask is False."""
    parts = zip(*(x.split(cfg.micro_batch_size) for x in batch))
    parts = [read_replies(actor, part, cfg.temperature)[:2] for part in parts]
    return [torch.where(batch[3], torch.cat(column), 0) for column in zip(*parts)]


def rate(score_fn, rows: list[Row], missing_eos_penalty: float = 0.0) -> list[float]:
    """r_RM of each row, less the penalty for a reply that never ends: without it, rambling costs nothing (N3).

    A reply that occurs several times is scored once.
    """
    unique = list(dict.fromkeys(rows))
    with explain(f"--reward failed on replies such as {unique[0].reply[:50]!r}", Exception):
        scores = [float(score) for score in score_fn(*map(list, zip(*unique)))]
        check(len(scores) == len(unique), f"{len(scores)} scores for {len(unique)} replies")
        for row, score in zip(unique, scores):
            check(math.isfinite(score), f"{score} for the reply {row.reply!r} to {row.prompt!r}")
    score_of = dict(zip(unique, scores))
    return [score_of[row] - missing_eos_penalty * (not row.finished) for row in rows]


# ---- Step 2: a reward for every token (S2) ---------------------------------------------------------------------------
def token_rewards(log_probs, ref_log_probs, scores, mask, kl_coef: float):
    """Token-level reward [B,T] from log-probs [B,T] and scores [B].

    r_t = -beta * (log pi(a_t|s_t) - log pi_ref(a_t|s_t))        every token
    r_T = the same + r_RM                                        last real token: the score of the whole reply

    pi is the policy that has just sampled, pi_old in step 6; rewards are fixed numbers, no gradient flows through them.
    A token costs if pi likes it more than the reference does, and pays if less; on average over pi's samples that is
    beta * KL(pi || pi_ref), never negative. It keeps the policy where the reward model can be trusted: that was trained
    on SFT's replies, and a policy that strays far enough finds nonsense that scores high (D's "hahaha", P1, P2).

    The score must land on the last token of the *reply*, not on the last column: padding is masked out of the loss, and
    a score that lands there is lost without any error message (N4). A reply's rewards add up to r_RM - beta * KL.
    """
    rewards = torch.where(mask, -kl_coef * (log_probs - ref_log_probs), 0)
    column = torch.arange(mask.shape[1], device=mask.device)
    is_last = column == mask.sum(dim=1, keepdim=True) - 1                                               # [B,T]
    return rewards + torch.where(is_last, scores.unsqueeze(1), 0)


# ---- Step 3: the critic values every state (S3) ----------------------------------------------------------------------
# V(s_t) comes out of ActorCritic.forward, in the same pass that reads the log-probs. It is the state *before* token t:
# shifted by one, the critic would know the action it is to be a baseline for, and the advantage would lose its meaning.


# ---- Step 4: TD residuals (S4) ---------------------------------------------------------------------------------------
def td_residuals(rewards, values, mask, gamma: float):
    """delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)        all [B,T]

    What came plus what is expected now, less what was expected before. After a reply's last token nothing more can come
    (cut off at the limit or not), so there V(s_{t+1}) = 0; a critic's output on padding must not take its place.
    """
    values = torch.where(mask, values, 0)
    next_values = F.pad(values[:, 1:], (0, 1))  # shifted left by one, 0 at the end                     # [B,T]
    return torch.where(mask, rewards + gamma * next_values - values, 0)


# ---- Step 5: generalised advantage estimation (S5; Schulman et al. 2015) ---------------------------------------------
def gae(rewards, values, mask, gamma: float, lam: float):
    """Advantages and returns, both [B,T].

    The advantage of token t: how much better things went from there on than the critic expected. Above 0, step 6 makes
    the token likelier; below 0, less likely. So V(s_t) is the baseline: good is what beats the expectation.

    A_t = sum_k (gamma*lambda)^k delta_{t+k}, computed backwards:  A_t = delta_t + gamma*lambda * A_{t+1}
    G_t = A_t + V(s_t)

    lambda = 0 is the TD residual (little variance, but it believes the critic), lambda = 1 is Monte Carlo: the rewards
    that really came, less V(s_t) (unbiased, but noisy) (T2). Between them lies the usual compromise, 0.95.
    G_t is the (discounted) sum of the rewards to come only if lambda = 1; below, the critic's later values mix in.
    The returns are taken here, from raw advantages: whitened ones would give the critic a target in foreign units.
    """
    deltas = td_residuals(rewards, values, mask, gamma)
    advantages, advantage = [], 0.0
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage  # padding behind the reply has delta 0: it adds nothing
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1], dim=1)                                                   # [B,T]
    return advantages, torch.where(mask, advantages + values, 0)


def moments(x, mask) -> tuple[float, float]:
    """Mean and variance of x [B,T] over the real tokens of all processes."""
    count = sum(gather([mask.sum().item()]))
    mean = sum(gather([torch.where(mask, x, 0).sum().item()])) / count
    return mean, sum(gather([torch.where(mask, (x - mean) ** 2, 0).sum().item()])) / count


def whiten(x, mask, shift_mean: bool = True):
    """x [B,T] scaled to variance 1 over the real tokens, and to mean 0 unless shift_mean is False (N7).

    Rewards keep their mean, advantages lose it. Only the mean is kept: single rewards can change their sign.
    """
    mean, variance = moments(x, mask)
    white = (x - mean) * (variance + 1e-8) ** -0.5
    return torch.where(mask, white if shift_mean else white + mean, 0)


@torch.no_grad()
def collect_rollout(actor, reference, score_fn, prompts: list[str], cfg: Config) -> Rollout:
    """Phase I: one reply to each prompt, and for each of its tokens an advantage and a return (L1).

    Step 3 comes before step 2 here: one pass over the replies gives both log-probs and values.

    Args:
        actor, reference: ActorCritic models; the reference is frozen.
        score_fn: (prompts, replies, finished) -> one float per reply.
    """
    rows, *batch = sample_replies(actor, prompts, cfg)                                                  # Step 1
    log_probs, values = read_all(actor, batch, cfg)                                                     # Step 3: V(s_t)
    ref_log_probs, _ = read_all(reference, batch, cfg)
    mask = batch[-1]
    scores = torch.tensor(rate(score_fn, rows, cfg.missing_eos_penalty), device=mask.device)
    rewards = token_rewards(log_probs, ref_log_probs, scores, mask, cfg.kl_coef)                        # Step 2
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)                                # Steps 4, 5
    if cfg.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Rollout(rows, *batch, scores, log_probs, ref_log_probs, values, rewards, advantages, returns)


# ======================================================================================================================
# 5  Phase II: learn from the rollout (step 6)
#
#    The rollout was expensive, so it is used several times. But its tokens were drawn from the old policy: the ratio
#    corrects for that. And its advantages hold only near the old policy: clipping keeps the new one there (T3, B).
# ======================================================================================================================
def policy_loss(log_probs, old_log_probs, advantages, mask, clip_eps: float):
    """PPO's clipped surrogate (S6; Schulman et al. 2017, eq. 7): tensors [B,T] -> (loss, clip_fraction), scalars.

    rho_t = pi(a_t|s_t) / pi_old(a_t|s_t) = exp(log pi - log pi_old)
    L     = -mean_t min(rho_t * A_t, clip(rho_t, 1-eps, 1+eps) * A_t)

    pi_old is the policy that sampled this batch: not the reference, which never changes (T5). The four cases (T4):
        A > 0, rho <= 1+eps   the token gets likelier          A < 0, rho >= 1-eps   the token gets less likely
        A > 0, rho >  1+eps   far enough: gradient zero        A < 0, rho <  1-eps   far enough: gradient zero
    Why the min? When rho has moved the wrong way (A > 0, rho < 1-eps, or A < 0, rho > 1+eps), clip alone would have
    gradient zero too, and the mistake could not be undone.
    clip_fraction is the share of tokens whose gradient the clip has made zero: a brake, not a wall, since other tokens
    share the weights, and Adam has momentum.
    """
    ratio = torch.exp(torch.where(mask, log_probs - old_log_probs, 0))                                  # [B,T]
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    return -masked_mean(torch.min(surrogate, clipped), mask), masked_mean((clipped < surrogate).float(), mask)


def value_loss(values, returns, mask, old_values=None, value_clip: float | None = None):
    """The critic's loss (S6, L8): L_V = 1/2 mean_t (V(s_t) - G_t)^2; tensors [B,T] -> scalar.

    With value_clip, the worse of two errors counts: that of V, and that of V held within value_clip of old_values.
    A value that has moved further than that towards G_t gets no gradient.
    """
    error = torch.where(mask, values - returns, 0) ** 2                                                 # [B,T]
    if value_clip is not None:
        near = old_values + (values - old_values).clamp(-value_clip, value_clip)
        error = torch.max(error, torch.where(mask, near - returns, 0) ** 2)
    return 0.5 * masked_mean(error, mask)


def means(table: list[dict]) -> dict[str, float]:
    """The mean of each column of numbers; "reply" is a text."""
    return {name: sum(line[name] for line in table) / len(table) for name in table[0] if name != "reply"}


def update_policy(actor, optimizer, rollout: Rollout, cfg: Config) -> dict[str, float]:
    """Phase II: ppo_epochs passes over the rollout, in shuffled minibatches; each takes one step on

    L = L_policy + c_V * L_V - c_ent * H        (S6: the entropy H is subtracted, for we minimise and want it large)

    Returns the metrics' means over all updates; first_log_ratio is the mean |log rho| of the first minibatch,
    before any step: rounding (below 1e-5), or something is wrong with the old log-probs.
    """
    def loss(actor, index):  # index: which replies
        mask, old_log_probs = rollout.mask[index], rollout.log_probs[index]
        log_probs, values, logits = read_replies(actor, [x[index] for x in rollout.batch], cfg.temperature)
        pg_loss, clip_fraction = policy_loss(log_probs, old_log_probs, rollout.advantages[index], mask, cfg.clip_eps)
        v_loss = value_loss(values, rollout.returns[index], mask, rollout.values[index], cfg.value_clip)
        # Entropy that is only reported needs no gradient: over a large vocabulary, that saves time.
        mean_entropy = masked_mean(entropy(logits if cfg.ent_coef else logits.detach()), mask)
        log_ratio = torch.where(mask, log_probs - old_log_probs, 0).detach()
        return pg_loss + cfg.vf_coef * v_loss - cfg.ent_coef * mean_entropy, mask.sum(), {
            "policy_loss": pg_loss, "value_loss": v_loss, "entropy": mean_entropy, "clip_fraction": clip_fraction,
            # estimates KL(pi_old || pi): E[rho - 1] is 0, so it changes no mean, and no term is negative
            "approx_kl": masked_mean(log_ratio.exp() - 1 - log_ratio, mask),
            "first_log_ratio": masked_mean(log_ratio.abs(), mask)}

    history = [descend(actor, optimizer, loss, index, cfg) for _ in range(cfg.ppo_epochs)
               for index in torch.randperm(len(rollout.mask), device=rollout.mask.device).chunk(cfg.minibatches)]
    return means(history) | {"first_log_ratio": history[0]["first_log_ratio"]}


def explained_variance(values, returns, mask) -> float:
    """1 - Var(G - V) / Var(G) over real tokens: 1 a perfect critic, 0 no better than a constant, below 0 worse.

    values are those of Phase I: what the critic said before it learned from these returns. With lambda below 1 it is
    flattered, for G contains its own later values: compare runs of one lambda only.
    """
    return 1 - moments(returns - values, mask)[1] / max(moments(returns, mask)[1], 1e-8)


def adapt_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """beta for the next cycle: at most 2% more when KL is above its target, 2% less when below (T6; Ziegler 2019)."""
    return kl_coef * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


# ======================================================================================================================
# 6  The loop
#
#    repeat:  draw prompts -> Phase I: sample, score, value -> Phase II: some small updates -> throw the batch away
#
#    Nothing of a cycle is used again but the weights, Adam's moments and, if it adapts, beta: PPO is on-policy, and old
#    replies are replies of another policy (L1).
# ======================================================================================================================
def describe(rollouts: list[Rollout], kl_coef: float) -> list[dict]:
    """What there is to say of each reply, from all processes: reply (the text), the human's verdicts (see `judge`),
    reward, kl, objective = reward - beta * kl, reply_length in tokens, finished.

    kl is KL(pi_old || pi_ref) in nats, estimated by the reply's own tokens: it can be negative, its expectation not.
    """
    numbers = [zip(r.rows, r.scores.tolist(), (r.log_probs - r.ref_log_probs).sum(dim=1).tolist(),
                   r.mask.sum(dim=1).tolist()) for r in rollouts]
    return gather([{"reply": row.reply, **judge(*row), "reward": score, "kl": kl, "objective": score - kl_coef * kl,
                    "reply_length": length, "finished": row.finished} for row, score, kl, length in chain(*numbers)])


# The main columns of metrics.csv, and what they do in a healthy run:
#   reward, objective    rise quickly, then flatten; objective = reward - beta * kl is what PPO maximises
#   human                follows the reward. If it falls while the reward rises, the reward model is being fooled (P1)
#   kl                   per reply: 0 at first, then a few nats, and stays. If it keeps rising, beta is too small (P2)
#   validation           the objective on held-out prompts, every eval_every cycles
#   entropy              falls, not to 0 at once: then nothing is tried any more
#   clip_fraction        0 to 0.2. Much more: lr or ppo_epochs too large
#   approx_kl            to the *old* policy, per token, mean over the cycle's updates: well below 0.1
#   first_log_ratio      below 1e-5 in float32: otherwise the old log-probs are wrong
#   policy_loss          jitters around 0 and means little: its sampling distribution changes with every cycle
#   value_loss           falls
#   explained_variance   rises from 0 while replies differ in quality; once nearly all are good, little is left to
#                        explain: unsteady
SHOWN = {"cycle": "5.0f", "reward": "7.3f", "human": "6.2f", "kl": "6.2f", "objective": "9.3f", "entropy": "7.3f",
         "clip_fraction": "13.3f", "explained_variance": "18.2f", "reply_length": "12.1f", "seconds": "7.2f"}


def train_ppo(actor, reference, score_fn, prompts: dict[str, list[str]], cfg: Config) -> list[dict]:
    """Cycles of Phase I and Phase II (L1). Trains `actor`, and leaves in it the weights that validated best (L6).

    Of policies that validated equally well, the latest. SFT is no candidate: a bad reward can lead below it.

    Returns the metrics, a dict per cycle: the rows of metrics.csv.
    """
    # The critic starts from nothing and should be ahead of the actor: ten times the learning rate. No weight decay:
    # it would pull the policy towards zero weights. The learning rate falls to 0: late cycles have only noise to learn.
    # Once nearly every reply is good, gradients are small, and a rare bad reply has by far the largest. With Adam's
    # usual 0.999, that one's step is up to three learning rates long, which shakes what the policy says elsewhere
    # (notes/trust.md). eps = 1e-5, usual in PPO, keeps gradients that are nothing but rounding from moving it.
    groups = [{"params": actor.lm.parameters()}, {"params": actor.head.parameters(), "lr": 10 * cfg.lr}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda cycle: 1 - cycle / max(cfg.cycles, 1))
    best, log = frozen(actor), []
    parts = {"actor": actor, "best": best, "optimizer": optimizer, "schedule": schedule}
    for cycle, rng in resumable(cfg.cycles, "PPO", cfg.save_every, parts, log, cfg):
        start = time.perf_counter()
        if cfg.kl_target is not None and log:
            cfg = replace(cfg, kl_coef=adapt_kl_coef(log[-1]["kl_coef"], log[-1]["kl"], cfg.kl_target))
        drawn = rng.choices(prompts["train"], k=cfg.batch_size // cfg.replies_per_prompt)
        asked = share([prompt for prompt in drawn for _ in range(cfg.replies_per_prompt)])
        with explain(f"PPO, cycle {cycle + 1}"):
            rollout = collect_rollout(actor, reference, score_fn, asked, cfg)
            rho_before = ratio(actor, rollout, cfg) if cycle == 0 else None
            metrics = {"cycle": cycle + 1, "episodes": (cycle + 1) * cfg.batch_size, "kl_coef": cfg.kl_coef,
                       "lr": schedule.get_last_lr()[0], **update_policy(actor, optimizer, rollout, cfg),
                       "explained_variance": explained_variance(rollout.values, rollout.returns, rollout.mask),
                       **means(describe([rollout], cfg.kl_coef)), "validation": math.nan}
        schedule.step()
        if (cycle + 1) % cfg.eval_every == 0 or cycle + 1 == cfg.cycles:
            reseed(cfg, "validation")  # the same random numbers every time: what differs is the policy
            table = evaluate(actor, reference, score_fn, prompts["validation"], 16, cfg)
            metrics["validation"] = means(table)["objective"]
            # Ahead by less than two standard errors may be luck: then the later policy is kept, which learned longer.
            # (A cycle without validation has NaN, and NaN > x is False.) Objectives under different betas cannot be
            # compared at all: while beta adapts, the latest is kept.
            luck = 2 * pstdev(line["objective"] for line in table) / len(table) ** 0.5
            if cfg.kl_target is not None or not any(row["validation"] > metrics["validation"] + luck for row in log):
                best.load_state_dict(actor.state_dict())
        log.append(metrics | {"seconds": time.perf_counter() - start})
        write_metrics(log, cfg)
        if cycle == 0:
            say(xray(rollout, actor.tokenizer, cfg, rho_before=rho_before, rho_after=ratio(actor, rollout, cfg)))
        shown = {name: spec for name, spec in SHOWN.items() if not math.isnan(log[-1][name])}
        if cycle % 20 == 0:
            say("  ".join(f"{name:>{len(format(0.0, spec))}}" for name, spec in shown.items()))
        say("  ".join(format(log[-1][name], spec) for name, spec in shown.items()))
    actor.load_state_dict(best.state_dict())
    return log


def write_metrics(log: list[dict], cfg: Config):
    """metrics.csv, a row per cycle. All are written anew each time: after a resume, no row is missing or doubled."""
    if cfg.out and RANK == 0:
        with replacing(Path(cfg.out) / "metrics.csv") as path, open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, log[0])
            writer.writeheader()
            writer.writerows({name: "" if x != x else x for name, x in row.items()} for row in log)


# ======================================================================================================================
# 7  Report: what each stage did to the replies, and how much of the possible PPO reached
#
#    All on test prompts, which no stage has seen and by which no run chooses anything (only the defaults were chosen by
#    them). That the reward rises is no proof that PPO is right: with many a bug it rises too, only a little less. So
#    the report also says what the best policy could have reached, and how much of that way PPO has gone.
# ======================================================================================================================
def evaluate(actor, reference, score_fn, prompts: list[str], N: int, cfg: Config) -> list[dict]:
    """Phase I without Phase II: N replies to each of the first 20 prompts, prompt by prompt; see `describe`."""
    cfg = replace(cfg, whiten_rewards=False, whiten_advantages=False)  # whitening would wait for other processes
    asked = share([prompt for prompt in prompts[:20] for _ in range(N)])
    return describe([collect_rollout(actor, reference, score_fn, part, cfg)
                     for part in chunks(asked, 4 * cfg.micro_batch_size)], cfg.kl_coef)


def reward_model_quality(score_fn, sft, data: Data, cfg: Config) -> dict[str, float]:
    """How well a reward agrees with the human on prompts held out from all training (P1).

    accuracy: share of reply pairs, same prompt, that both order alike; pairs that the human finds equal do not count.
    correlation: Pearson's r between the two scores; NaN for your own data, for rankings tell order, not points.
    """
    reseed(cfg, "reward model quality")
    groups = data.held_out or sample_groups(sft, data.prompts["validation"][:20], 32, cfg)
    human = [range(len(rows), 0, -1) if data.held_out else human_score(*zip(*rows)) for rows in groups]
    scores = [rate(score_fn, rows) for rows in groups]
    pairs = [(h - other) * (s - other_s) > 0 for points, row in zip(human, scores)
             for (h, s), (other, other_s) in combinations(zip(points, row), 2) if abs(h - other) > 0]
    accuracy = sum(pairs) / len(pairs) if pairs else math.nan
    both = torch.tensor([list(chain(*human)), list(chain(*scores))])                                    # [2,replies]
    r = math.nan if data.held_out else torch.corrcoef(both)[0, 1].item()
    if pairs:
        say(f"reward on new prompts: {accuracy:.1%} of pairs as the human ranks" + f", correlation {r:.2f}" * (r == r))
    if r < 0.7:
        say("warning: correlation below 0.7: PPO will learn what this reward likes, not what the human likes (P1)")
    return {"accuracy": accuracy, "correlation": r}


def optimum(scores, kl_coef: float) -> tuple[float, float]:
    """The best objective any policy can reach -> (J*, effective sample size), from scores [prompts,N] of the reference.

    J(pi)  = E[r] - beta * KL(pi || pi_ref)       the objective, for one prompt x
    pi*    = pi_ref * exp(r / beta) / Z           its maximiser: J(pi) = beta * log Z - beta * KL(pi || pi*)
    J*(x)  = beta * log Z = beta * log E_ref[exp(r / beta)]

    So no training is needed to know the optimum: sample many replies from the reference, score them, and take the mean
    of exp(r / beta). Few of them carry that sum when beta is small; the effective sample size, (sum w)^2 / sum w^2 with
    w = exp(r / beta), averaged over the prompts, says how few. The estimate errs on the low side, by about beta / (2 *
    effective sample size); when that size is small, the best replies were missed and J* is only a lower bound.
    """
    log_weights = scores.double() / kl_coef                                                             # [prompts,N]
    weights = log_weights.softmax(dim=1)
    j_star = kl_coef * (log_weights.logsumexp(dim=1) - math.log(scores.shape[1]))                       # [prompts]
    return j_star.mean().item(), (1 / (weights ** 2).sum(dim=1)).mean().item()


def win_rate(table: list[dict], sft_table: list[dict], N: int) -> float:
    """Chance that the human prefers a reply to SFT's to the same prompt, ties counting half; N replies to a prompt."""
    human, sft = (torch.tensor([line["human"] for line in lines]).view(-1, N) for lines in (table, sft_table))
    difference = human.unsqueeze(2) - sft.unsqueeze(1)                                                  # [prompts,N,N]
    return ((1 + difference.sign()) / 2 + 0 * difference).mean().item()  # 0 * NaN: no human, no win rate


def make_report(tables: dict[str, list], sft_scores, N: int, kl_coef: float) -> dict:
    """The contents of report.json, from the `evaluate` tables of "pretrained", "sft" and "ppo"."""
    report = {name: {column.removeprefix("reply_"): x for column, x in means(table).items()}
              | {"win_rate": win_rate(table, tables["sft"], N)} for name, table in tables.items()}
    j_sft, j_ppo = report["sft"]["objective"], report["ppo"]["objective"]
    j_star, size = optimum(sft_scores, kl_coef) if kl_coef > 0 else (math.nan, 0)
    return report | {"optimum": {"objective": j_star, "effective_sample_size": size, "fraction":
                                 (j_ppo - j_sft) / (j_star - j_sft) if size >= 5 and j_star > j_sft else math.nan}}


def show_report(report: dict, tables: dict[str, list], prompts: list[str]):
    """Print report.json as tables, and for some prompts the first reply (not the best one) of each model."""
    columns = [column for column, x in report["ppo"].items() if x == x]
    say(f"\nRESULT on {len(prompts)} prompts that no stage has seen\n\n{'':10}" + "".join(f"{x:>10}" for x in columns))
    for name in tables:
        say(f"{name:10}" + "".join(f"{report[name][column]:10.2f}" for column in columns))
    j_star, size, fraction = report["optimum"].values()
    if j_star == j_star:  # else --kl_coef 0: the best policy would say its one best reply, wherever that is
        say(f"\nTHE OPTIMUM: the best objective that any policy can have is J* = {j_star:.3f}" + (
            f"; of the way there from SFT, PPO went {fraction:.1%}" if fraction == fraction else " or more")
            + f"\n(estimated from {size:.0f} effective samples per prompt)")
    for i in range(len(prompts))[2::5]:
        say(f"\n  user        {shown(prompts[i])}")
        for name, table in tables.items():
            say(f"  {name:10}  {shown(table[i * len(table) // len(prompts)]['reply'])}")
    say("\nSECONDS: " + ", ".join(f"{name} {x:.1f}" for name, x in report["seconds"].items()))


def shown(text: str) -> str:
    """The end of a text, on one line."""
    return " ".join(text.split())[-100:]


def peak_memory(cfg: Config) -> float:
    """The most memory used so far, in GB: the GPU's, else this process's (NaN on Windows, which does not tell)."""
    if cfg.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(cfg.device) / 1e9
    with suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    return math.nan


def ratio(actor, rollout: Rollout, cfg: Config):
    """rho_t = pi / pi_old, for the actor as it is now: [B,T]."""
    return (read_all(actor, rollout.batch, cfg)[0] - rollout.log_probs).exp()


def xray(rollout: Rollout, tokenizer, cfg: Config, row: int = 0, **ratios) -> str:
    """One reply under X-ray: article E's table with this run's numbers, a line per token.

    KL = log pi - log ref;  r_t from step 2;  V(s_t) from step 3;  delta_t from step 4;  A_t and return from step 5;
    `ratios` are further columns: step 6's rho_t before the update (1, always) and after it.
    What to see: only tokens on which log pi and log ref differ cost KL, and the score arrives at <eos>.
    """
    r, deltas = rollout, td_residuals(rollout.rewards, rollout.values, rollout.mask, cfg.gamma)
    columns = {"log pi": r.log_probs, "log ref": r.ref_log_probs, "KL": r.log_probs - r.ref_log_probs, "r_t": r.rewards,
               "V(s_t)": r.values, "delta_t": deltas, "A_t": r.advantages, "return": r.returns} | ratios
    lines = [f'X-RAY of one reply to "{shown(r.rows[row].prompt)}" (score {r.scores[row]:.3f})',
             f"{'token':12}" + "".join(f"{name:>11}" for name in columns)]
    for t, token in enumerate(r.reply_ids[row][r.mask[row]]):
        numbers = "".join(f"{round(x[row, t].item(), 3) + 0.0:11.3f}" for x in columns.values())
        lines.append(f"{tokenizer.decode([token]).strip():12}{numbers}")
    return "\n" + "\n".join(lines) + "\n"


# ======================================================================================================================
# 8  Files, and main
# ======================================================================================================================
def open_folder(cfg: Config):
    """Make the run's folder, cfg.out, and write config.json. Raises UserError rather than touch an earlier run."""
    cfg.out = cfg.out or time.strftime("runs/%Y%m%d-%H%M%S")
    if RANK == 0 and not cfg.resume:
        with explain(f"--out {cfg.out} cannot be used; choose another folder", OSError):
            Path(cfg.out).mkdir(parents=True, exist_ok=True)
            check({*os.listdir(cfg.out)} <= {"config.json.tmp"}, "it is not empty")
            with replacing(Path(cfg.out, "config.json")) as path:
                path.write_text(json.dumps(asdict(cfg), indent=2) + "\n")


def save_model(model, folder: Path):
    """An ordinary transformers folder, for AutoModelForCausalLM.from_pretrained, and our head: heads.safetensors."""
    if RANK == 0:
        with replacing(folder) as temporary:
            model.lm.save_pretrained(temporary)
            model.tokenizer.save_pretrained(temporary)
            save_file(model.head.state_dict(), temporary / "heads.safetensors")


def load_model(kind, folder: Path, cfg: Config):
    """What save_model wrote; kind is ActorCritic or RewardModel."""
    with explain(f"{folder} is damaged, or not of a run", Exception):
        model = kind(*load_pretrained(folder), cfg)
        model.head.load_state_dict(load_file(folder / "heads.safetensors"))
        return model


def finished_stage(name: str, cfg: Config) -> Path | None:
    """The folder of a stage's model, if this run (--resume) or an earlier one (--init_from) has it already."""
    folders = (Path(run) / name for run in (cfg.resume, cfg.init_from) if run)
    return next((folder for folder in folders if folder.is_dir()), None)


def stage(name: str, kind, cfg: Config, seconds: dict, train):
    """The model that a stage makes: loaded if it is there already, else trained; and saved in this run's folder."""
    start, folder, target = time.perf_counter(), finished_stage(name, cfg), Path(cfg.out) / name
    model = load_model(kind, folder, cfg) if folder else train()
    if folder != target:
        save_model(model, target)
    seconds[name] = time.perf_counter() - start
    return model


def load_reward(cfg: Config):
    """--reward as a score_fn: the human's rule, file.py:function, or a classifier, whose last label counts (L4)."""
    if cfg.reward == "human":
        return human_score
    with explain(f"--reward {cfg.reward} is not model, human, file.py:function, or a classifier", Exception):
        file, _, function = cfg.reward.rpartition(":")
        if file.endswith(".py"):
            return runpy.run_path(file)[function]
        classify = pipeline("text-classification", cfg.reward, device=cfg.device, function_to_apply="none",
                            truncation=True)
        classify.tokenizer.truncation_side = "left"  # of a long text, the reply must be seen
        label = classify.model.config.id2label[classify.model.config.num_labels - 1]

    def score(prompts, replies, finished):
        results = classify([prompt + reply for prompt, reply in zip(prompts, replies)], top_k=None)
        return [{x["label"]: x["score"] for x in result}[label] for result in results]

    return score


def talk(cfg: Config):
    """--talk RUN: for every line typed (or piped), a reply of each of that run's models, with its score and KL."""
    run = Path(cfg.talk)
    models = {name: load_model(ActorCritic, run / name, cfg) for name in ("pretrain", "sft", "policy")}
    score_fn = load_reward(cfg) if cfg.reward != "model" else load_model(RewardModel, run / "reward_model", cfg).score
    say('Type a line, such as "I feel sad. What can I do?"; an end of file (Ctrl-D) ends.')
    reseed(cfg, "talk")
    for line in sys.stdin:
        prompt = shorten([[Row(line.rstrip("\n") + "\n", "", True)]], models["sft"], cfg)[0][0].prompt
        for name, model in models.items():
            reply = describe([collect_rollout(model, models["sft"], score_fn, [prompt], cfg)], cfg.kl_coef)[0]
            say(f"  {name:10}score {reply['reward']:6.2f}  KL {reply['kl']:6.2f}  {shown(reply['reply'])}")


def join_processes(cfg: Config):
    """Under torchrun, find the other processes (R1)."""
    if WORLD > 1:
        dist.init_process_group("nccl" if cfg.device.startswith("cuda") else "gloo")


def leave_processes():
    """Wait for the other processes before going: one that loses a partner in the middle of its exit may crash."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def tune_process():
    """What makes this process faster, and changes no result."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # for few short texts, threads only get in torch's way
    gc.freeze()  # the libraries' objects stay: to look through them for garbage at the end takes a second
    # Keep the memory of old tensors for new ones. Else large tensors go back to the system, and come again page by
    # page: a quarter of an update at GPT-2's size. Only the C library of Linux has this; other systems go without.
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)    # M_MMAP_THRESHOLD: what is smaller than 1 GiB comes from the process's own heap,
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and that shrinks only when 2 GiB of it are free


@contextmanager
def fast_products():
    """On AMD's processors with AVX-512, multiply matrices by oneDNN: twice the rate of MKL, which uses half the width.

    torch gives float32 to oneDNN only if that may round it to bfloat16. It may, and cannot: it is not shown the
    instructions for that, so it computes in float32 (there is a test). It takes a millisecond to prepare for a shape it
    has not met. That pays in updates; in sampling, every token brings new shapes. Fused attention would call it for
    each head of each reply, so in here attention is not fused.
    """
    cpu, matmul = torch.cpu.get_capabilities(), torch.backends.mkldnn.matmul
    if not ("AMD" in cpu.get("cpu_name", "") and cpu["avx512_f"]) or torch.cuda.is_available():
        yield
        return
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # without AVX512_BF16 and what may come
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            yield
    finally:
        matmul.fp32_precision = before


def main(argv=None):
    tune_process()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    logging.get_logger("huggingface_hub").setLevel("ERROR")  # its retries without a network would be 8 lines of noise
    start, seconds, cfg = time.perf_counter(), {}, parse_config(argv)
    join_processes(cfg)
    if cfg.talk:
        return talk(cfg)
    # All that can go wrong with what the user gave goes wrong here, before anything is written or takes long.
    score_fn = load_reward(cfg) if cfg.reward != "model" else None
    own = {flag: read_jsonl(path, flag) if (path := getattr(cfg, flag)) else [] for flag in REPLIES}
    base = base_model(own, cfg)
    data = load_data({flag: shorten(lines, base, cfg) for flag, lines in own.items()}, cfg)
    if score_fn:
        rate(score_fn, [Row(data.prompts["train"][0], "", True)])  # a function that cannot: say so now, not after SFT
    open_folder(cfg)
    # Ctrl-C waits for the end of the step, which is saved; pressed again, it does not
    how = f"\nstopped; to go on: python {sys.argv[0]} --resume {cfg.out}"
    signal.signal(signal.SIGINT, lambda *args: signal.default_int_handler(*args) if STOP else STOP.append(how))

    # Stages 0 to 2, and PPO on top of them
    pretrained = stage("pretrain", ActorCritic, cfg, seconds, lambda: pretrain(base, data.texts, cfg))
    sft = stage("sft", ActorCritic, cfg, seconds, lambda: finetune(pretrained, data.demos, cfg))
    if cfg.reward == "model":
        score_fn = frozen(stage("reward_model", RewardModel, cfg, seconds,
                                lambda: train_reward_model(sft, data, cfg))).score
    reference, policy = frozen(sft), sft  # from here on, what `sft` names is trained
    quality = reward_model_quality(score_fn, reference, data, cfg)
    log = train_ppo(policy, reference, score_fn, data.prompts, cfg)
    cfg = replace(cfg, kl_coef=log[-1]["kl_coef"]) if log else cfg  # it may have adapted
    save_model(policy, Path(cfg.out) / "policy")

    # The report: three models side by side, and the best that would be possible
    reseed(cfg, "report")
    test, N = data.prompts["test"][:20], min(128, cfg.optimum_samples)
    tables = {name: evaluate(model, reference, score_fn, test, N, cfg)
              for name, model in (("pretrained", pretrained), ("sft", reference), ("ppo", policy))}
    groups = sample_groups(reference, test, cfg.optimum_samples, cfg)
    scores = [rate(score_fn, rows, cfg.missing_eos_penalty) for rows in groups]
    report = make_report(tables, torch.tensor(scores), N, cfg.kl_coef)
    say(xray(collect_rollout(policy, reference, score_fn, test[:1], cfg), policy.tokenizer, cfg))
    seconds |= {"ppo": sum(row["seconds"] for row in log), "total": time.perf_counter() - start}
    report |= {"reward_model": quality, "seconds": seconds, "peak_memory_gb": peak_memory(cfg)}
    if RANK == 0:
        with replacing(Path(cfg.out) / "report.json") as path:
            report_json = json.loads(json.dumps(report), parse_constant=lambda _: None)  # NaN, which is not JSON: null
            path.write_text(json.dumps(report_json, indent=2) + "\n")
    show_report(report, tables, test)
    say(f"\nAll is in {cfg.out}. PPO alone, with another flag: python ppo_rlhf.py --init_from {cfg.out} --kl_coef 0.05")
    leave_processes()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(*STOP)
        sys.exit(130)
