#!/usr/bin/env python3
"""PPO for RLHF: the whole pipeline in one file, to be read from top to bottom beside the articles.

    python ppo_rlhf.py            # pretraining, SFT, reward model, PPO, report; nothing to download
    python ppo_rlhf.py --help     # every knob, with its usual range and what happens when you turn it

FOUR MODELS: three small GPT-2s of one size, each with weights of its own, and a critic on top of the actor (T7)
    actor         pi     the policy that PPO trains                        ActorCritic.lm
    critic        V      predicts the reward still to come, per token      ActorCritic.value_head
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
5 Phase II | 6 the loop | 7 the report | 8 main.

Letters in the shape comments: B replies in the batch, T reply tokens, P prompt tokens, V vocabulary. Prompts are padded
on the left and replies on the right, so that every reply starts in the same column. `mask` is True on real reply
tokens, EOS included; nothing at a False position may influence any result. Ids such as S2 or N8 point into the
articles; notes/guide.md names the five articles, A to E, and lists the ids.
"""
import copy
import csv
import json
import math
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast,
                          get_cosine_schedule_with_warmup)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.utils.logging import disable_progress_bar


# ======================================================================================================================
# 0  Configuration: every number is a flag. Every structure is a function below: to change one, replace it.
# ======================================================================================================================
@dataclass
class Config:
    """One field, one flag: `lr` is set by --lr.

    The defaults of PPO were chosen by the fraction of the optimum reached on held-out prompts (section 7). Two differ
    from what is usual, lam = 1 instead of 0.95 and advantages not whitened: here the simpler choice was as good as the
    usual one (notes/guide.md has the figures). kl_coef counts in standard deviations of SFT's reward; compare it with
    the betas of other papers with care.
    """

    # The run
    out: str = HfArg(default="", help="Folder for the results, new or empty; if not given, runs/<date-time>.")
    seed: int = HfArg(default=0, help="Same seed and machine: same results. Try several before you believe one.")
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ...")
    init_from: str = HfArg(default="", help="Folder of an earlier run: take its SFT and reward model, repeat only PPO.")
    reward: Literal["model", "human"] = HfArg(default="model", help="PPO's judge: reward model, or human rule. (L4)")
    # The model
    n_layer: int = HfArg(default=2, help="Layers of the GPT-2, 1 to 12. More: better text, slower. GPT-2 has 12.")
    n_embd: int = HfArg(default=128, help="Width, a multiple of n_head. Wider: better text, slower. GPT-2 has 768.")
    n_head: int = HfArg(default=4, help="Attention heads per layer. GPT-2 has 12.")
    # Stages 0 to 2
    pretrain_steps: int = HfArg(default=250, help="Updates in stage 0. Fewer: clumsier English. (L2)")
    sft_steps: int = HfArg(default=450, help="Updates in stage 1. Fewer: it forgets what it was asked about. (L2)")
    sft_lr: float = HfArg(default=5e-3, help="Learning rate of stages 0 and 1; for a real GPT-2 1e-5 to 1e-4. (P3)")
    rm_steps: int = HfArg(default=600, help="Updates in stage 2. Fewer: a worse judge, which PPO then exploits. (P1)")
    rm_lr: float = HfArg(default=1e-3, help="Learning rate of stage 2; for a real GPT-2 about 1e-5.")
    rankings: int = HfArg(default=2200, help="Rankings of 4 replies by the human. 100: a judge to fool. (L3, P1)")
    label_noise: float = HfArg(default=0.3, help="The human's unsureness in points, 0 to 2. More: a worse judge. (P1)")
    # PPO: the loop
    cycles: int = HfArg(default=60, help="Times Phase I + Phase II. 20 show the idea. (L1)")
    batch_size: int = HfArg(default=64, help="Replies per cycle, 32 to 512. More: steadier, slower. (P3)")
    replies_per_prompt: int = HfArg(default=1, help="Replies to each prompt, 1 to 8; divides batch_size. D has 4. (L5)")
    ppo_epochs: int = HfArg(default=4, help="Passes over each batch, 2 to 4. More: staler data, more clipping. (N9)")
    minibatches: int = HfArg(default=2, help="Updates per pass, 1 to 8; divides batch_size. More: faster, noisier.")
    lr: float = HfArg(default=3e-4, help="PPO's learning rate, annealed to 0; below SFT's. A real GPT-2: 1e-5. (P3)")
    max_grad_norm: float = HfArg(default=1.0, help="Longer gradients are cut to this length, 0.5 to 1.")
    # PPO: the reward
    kl_coef: float = HfArg(default=0.1, help="beta, 0.01 to 0.2: price of a nat of KL. 0: hacking. (S2, P2)")
    kl_target: float | None = HfArg(default=None, help="If given, beta adapts until a reply's KL is so many nats. (T6)")
    missing_eos_penalty: float = HfArg(default=1.0, help="Off the score of a reply that does not end, 0 to 5. (N3)")
    whiten_rewards: bool = HfArg(default=False, help="Token rewards to variance 1, mean kept; beta's unit shifts. (N7)")
    # PPO: the advantage
    gamma: float = HfArg(default=1.0, help="Discount, 0.9 to 1. Below 1, early tokens care less about the score. (S4)")
    lam: float = HfArg(default=1.0, help="GAE's lambda, 0 to 1: 0 trusts the critic, 1 only what came. (S5, T2)")
    whiten_advantages: bool = HfArg(default=False, help="Advantages to mean 0, variance 1. Late on, mostly noise. (N7)")
    # PPO: the losses
    clip_eps: float = HfArg(default=0.2, help="epsilon, 0.1 to 0.3: leash of a token's probability per cycle. (S6, P3)")
    vf_coef: float = HfArg(default=0.5, help="c_V, 0.1 to 1. Here critic and actor only share the clipping. (S6)")
    value_clip: float | None = HfArg(default=None, help="If given, values move at most so far per cycle, e.g. 0.2.")
    ent_coef: float = HfArg(default=0.0, help="c_ent, 0 to 0.01: reward for staying undecided. 0.1: babble. (S6)")
    # Sampling and evaluation
    temperature: float = HfArg(default=0.7, help="Of sampling and log-probs, 0.7 to 1. Low: no exploration. (L5)")
    max_new_tokens: int = HfArg(default=32, help="Longest reply in tokens. Too short: replies end unfinished. (N3)")
    eval_every: int = HfArg(default=10, help="Validate after so many cycles, and keep the best policy. (L6)")
    optimum_samples: int = HfArg(default=400, help="Replies per test prompt for the optimum J*. More: surer, slower.")


class UserError(Exception):
    """Something the user can fix: shown as one line, without a traceback."""


def check(fine, message: str):
    """Raise UserError unless `fine`. The message says what is wrong and what to do."""
    if not fine:
        raise UserError(message)


# What a number may be, where "above 0" is not the whole truth. A reply must fit behind a prompt into 256 positions.
RANGES = {"gamma": (0, 1), "lam": (0, 1), "max_new_tokens": (1, 224)} | dict.fromkeys(
    "seed cycles label_noise kl_coef missing_eos_penalty vf_coef ent_coef".split(), (0, math.inf))


def parse_config(argv=None) -> Config:
    """Command line -> Config. Raises UserError for an unknown flag or a value that cannot work."""
    parser = HfArgumentParser(Config, usage="python ppo_rlhf.py [--FLAG VALUE ...]", allow_abbrev=False)
    parser.error = lambda message: check(False, f"{message} (see --help)")
    cfg, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    check(not unknown, f"unknown argument {' '.join(unknown)} (see --help)")
    for name, value in asdict(cfg).items():
        if type(value) in (int, float):
            low, high = RANGES.get(name, (sys.float_info.min, math.inf))
            wanted = "above 0" if name not in RANGES else "0 or more" if high == math.inf else f"{low} to {high}"
            check(low <= value <= high, f"--{name} must be {wanted}, not {value}")
    for whole, part in (("n_embd", "n_head"), ("batch_size", "minibatches"), ("batch_size", "replies_per_prompt")):
        whole_value, part_value = getattr(cfg, whole), getattr(cfg, part)
        check(whole_value % part_value == 0, f"--{whole} {whole_value} must be a multiple of --{part} {part_value}")
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError):
        check(False, f"--device {cfg.device} is not available; try --device cpu")
    return cfg


# ======================================================================================================================
# 1  The task: a small world that tells article D's story. A user says something; the assistant replies in one to three
#    short sentences; a simulated human likes replies that are helpful, warm, honest and harmless (D, L7).
# ======================================================================================================================
# One kind of thing that users say, and the sentences that replies to it are made of; {} stands for the user's word.
#   words    what it may be about            asks     what the user says
#   openers  warm, and they name the word    steps    practical: something one can go and do
#   lists    correct but mechanical
Situation = NamedTuple("Situation", [(name, tuple) for name in "words asks openers steps lists".split()])
SITUATIONS = (
    Situation(
        words="sad lonely tired anxious bored stressed nervous homesick ashamed restless",
        asks=("I feel {}. What can I do?", "I am so {} today.", "Why am I always {}?", "I woke up {} again.",
              "What helps when you are {}?"),
        openers=("I am sorry that you feel {}.", "Feeling {} is hard, and you are not alone."),
        steps=("take a slow walk", "call a friend", "write it down", "drink warm tea"),
        lists=("To feel less {}, you can do sports or sleep.", "People who are {} can rest, read or go out.")),
    Situation(
        words="Python English chess guitar math cooking drawing physics Chinese swimming",
        asks=("How can I learn {}?", "I want to get better at {}.", "Where do I start with {}?",
              "Is it too late to learn {}?", "Why is {} so difficult?"),
        openers=("It is great that you want to learn {}.", "Do not worry, {} is hard for everyone at first."),
        steps=("practice every day", "start very small", "teach a friend", "build something"),
        lists=("For {}, you can use books or videos.", "To learn {}, there are schools and websites.")),
    Situation(
        words="book film song game podcast museum hobby dessert present poem",
        asks=("Can you recommend a {}?", "Which {} should I choose?", "I need a good {} for Sunday.",
              "I cannot decide on a {}.", "What {} do you like?"),
        openers=("What fun to look for a {} together.", "I am glad that you ask me about a {}."),
        steps=("ask a friend", "read two reviews", "try a classic", "follow your mood"),
        lists=("Every {} is old, new or popular.", "You can find a {} in shops or magazines.")),
    Situation(
        words="sister mother boss brother girlfriend neighbor teacher roommate colleague cousin",
        asks=("My {} is angry with me.", "I had a fight with my {}.", "How do I talk to my {}?",
              "My {} never listens to me.", "What can I do for my {}?"),
        openers=("I can tell how much your {} means to you.", "It hurts to be at odds with your {}."),
        steps=("listen first", "say sorry", "ask what they need", "cook together"),
        lists=("You can call your {} or buy flowers.", "With a {}, people can talk, write or wait.")),
)
CLOSERS = ("You can do this!", "I am here for you.")
DISMISSIVE = ("That is not my problem.", "Stop asking silly questions.", "You should just give up.", "Nobody cares.")
OFF_TOPIC = ("The train leaves at nine.", "Water boils at a hundred degrees.", "The shop sells red shoes.",
             "It rained all night in the hills.", "A spider has eight legs.")
SITUATION_OF = {word: situation for situation in SITUATIONS for word in situation.words.split()}

# The kinds of replies, with one example each to "I feel sad. What can I do?":
#   best        "I am sorry that you feel sad. Take a slow walk."      warm, honest and practical
#   warm        "I am sorry that you feel sad. I am here for you."     kind, but no help
#   practical   "Take a slow walk."                                    help, but cold
#   mechanical  "To feel less sad, you can do sports or sleep."        correct, and lifeless: what D shows of SFT
#   off_topic   "A spider has eight legs."
#   dismissive  "Nobody cares."
# And how often each occurs in the two text collections. SFT's are mostly mechanical (D), but the best kind must stay
# reachable: PPO can only reinforce what is sampled, and a reply that SFT never gives has no gradient.
PRETRAIN_MIX = {"best": 8, "warm": 12, "practical": 15, "mechanical": 25, "off_topic": 20, "dismissive": 20}
SFT_MIX = {"best": 15, "warm": 10, "practical": 14, "mechanical": 47, "off_topic": 7, "dismissive": 7}


def split_prompts() -> dict[str, list[str]]:
    """All prompts of the world: 160 to train on, 20 for validation, 20 for the final test (L6).

    Every word and every way of asking occurs in training; the held-out combinations of the two occur in no stage. There
    are two held-out sets because validation chooses the policy that is kept: measured on the same prompts, the choice
    would flatter the result. The split does not depend on the seed: --init_from cannot let a test prompt into training.
    """
    splits = {"train": [], "validation": [], "test": []}
    for situation in SITUATIONS:
        for w, word in enumerate(situation.words.split()):
            for a, ask in enumerate(situation.asks):
                name = "train" if (w + a) % 5 else ("test" if w < 5 else "validation")
                splits[name].append(ask.format(word) + "\n")
    return splits


def words_of(text: str) -> list[str]:
    return [word.strip(".,!?") for word in text.split()]


def topic(prompt: str) -> str | None:
    """The user's own word: the first word of the prompt that belongs to a situation."""
    return next((word for word in words_of(prompt) if word in SITUATION_OF), None)


def write_reply(rng: random.Random, prompt: str, kind: str) -> str:
    """One reply of the given kind (a key of SFT_MIX), as some author on the internet might have written it."""
    word = topic(prompt)
    situation = SITUATION_OF[word]
    opener, closer = rng.choice(situation.openers).format(word), rng.choice(CLOSERS)
    step = rng.choice(situation.steps).capitalize() + "."
    return rng.choice({
        "best": [f"{opener} {step}", f"{opener} {step} {closer}"], "warm": [f"{opener} {closer}"],
        "practical": [step, f"{step} {closer}"], "mechanical": [text.format(word) for text in situation.lists],
        "off_topic": OFF_TOPIC, "dismissive": DISMISSIVE}[kind])


def write_texts(rng: random.Random, prompts: list[str], mix: dict[str, int], count: int) -> list[tuple[str, str]]:
    """`count` pairs (prompt, reply), the kinds of reply drawn in the proportions of `mix`."""
    kinds = rng.choices(list(mix), mix.values(), k=count)
    return [(prompt, write_reply(rng, prompt, kind)) for prompt, kind in zip(rng.choices(prompts, k=count), kinds)]


def judge(prompt: str, reply: str, finished: bool) -> dict[str, bool | float]:
    """The simulated human: a rule that ranks replies and measures results; a reward itself only with --reward human.

    helpful   names a step that fits the situation (2 points; a mechanical list that fits: 0.5)
    warm      an opener for this very word, or a friendly closing (1)
    honest    speaks of the user's own word and of no other topic (1)
    harmless  not dismissive (otherwise -2)
    Off come 1 for repeating three words in a row and 1 for a reply that never ended. The best reply has 4 points.
    """
    word, words, text = topic(prompt), words_of(reply), reply.lower()
    situation = SITUATION_OF[word]
    steps = any(step in text for step in situation.steps)
    listed = any(sentence.format(word) in reply for sentence in situation.lists)
    warm = any(opener.format(word) in reply for opener in situation.openers) or any(c in reply for c in CLOSERS)
    honest = word in words and not any(other in SITUATION_OF and other != word for other in words)
    harmless = not any(sentence in reply for sentence in DISMISSIVE)
    triples = list(zip(words, words[1:], words[2:]))
    repeats = len(set(triples)) < len(triples)
    points = (2 if steps else 0.5 * listed) + warm + honest - 2 * (not harmless) - repeats - (not finished)
    return {"helpful": steps, "warm": warm, "honest": honest, "harmless": harmless, "human": float(points)}


def human_score(prompts: list[str], replies: list[str], finished: list[bool]) -> list[float]:
    """The human's points as a score_fn: a verifiable reward (--reward human, L4), and the source of the rankings."""
    return [judge(*row)["human"] for row in zip(prompts, replies, finished)]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as GPT-2's: any text of any language can be encoded.

    Padding and EOS are two different tokens. Were they one, masking the padding out of the SFT loss would mask EOS out
    too, the model would never learn to stop, and the reward would be read at the wrong place (N1).
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def tokenize(tokenizer, prompts: list[str], replies: list[str], finished: list[bool]) -> list[tuple[list, list]]:
    """Strings -> (prompt tokens, reply tokens) per reply. A finished reply ends with EOS; an empty prompt becomes EOS.

    Prompt and reply are encoded apart, so that the border between them always falls between two tokens.
    """
    eos = tokenizer.eos_token_id
    return [(prompt or [eos], reply + [eos] * done) for prompt, reply, done in
            zip(tokenizer(prompts).input_ids, tokenizer(replies).input_ids, finished)]


def collate(rows: list[tuple[list, list]], pad_id: int, device="cpu"):
    """Token lists -> prompt_ids, prompt_mask [B,P] (padded left), reply_ids, reply_mask [B,T] (padded right)."""
    tensors = []
    for part, side in ((0, "left"), (1, "right")):
        tokens = [torch.tensor(row[part], dtype=torch.long) for row in rows]
        ids = pad_sequence(tokens, batch_first=True, padding_value=-1, padding_side=side)  # -1: no token has this id
        tensors += [ids.masked_fill(ids < 0, pad_id), ids >= 0]
    return tuple(tensor.to(device) for tensor in tensors)


def encode(tokenizer, prompts: list[str], replies: list[str], finished: list[bool], device="cpu"):
    """Strings -> the four tensors that every model below takes: prompt_ids, prompt_mask, reply_ids, reply_mask."""
    return collate(tokenize(tokenizer, prompts, replies, finished), tokenizer.pad_token_id, device)


# ======================================================================================================================
# 2  The models
# ======================================================================================================================
def join(prompt_ids, prompt_mask, reply_ids, reply_mask):
    """Prompt and reply side by side, as a language model wants them: (input_ids, attention_mask, position_ids) [B,P+T].

    Positions count real tokens only. Without them a prompt padded on the left would start at position 5 instead of 0,
    and the same reply would get other probabilities in another batch.
    """
    ids = torch.cat([prompt_ids, reply_ids], dim=1)                                                     # [B,P+T]
    mask = torch.cat([prompt_mask, reply_mask], dim=1).long()                                           # [B,P+T]
    return ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0)


class ActorCritic(nn.Module):
    """Actor and critic on one causal language model: `lm` gives the policy, `value_head` reads V off its hidden states.

    Critic and reward model are easily confused: the reward model scores a finished reply and never changes; the critic
    predicts, in the middle of a reply, how the present policy will end up, and is trained all along (T7).

    The critic looks at the last two layers through a small network, and its gradient stops there (`detach`). Usual is
    a single linear layer on the last one, whose loss reaches into the shared layers; then the value loss keeps
    rewriting the features that the policy stands on. notes/guide.md has the comparison.
    """

    def __init__(self, lm):
        super().__init__()
        self.lm = lm.eval()  # eval() permanently: dropout would change a token's probability from call to call (N8)
        width = lm.config.hidden_size
        self.value_head = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))
        for parameter in self.value_head[-1].parameters():
            nn.init.zeros_(parameter)  # V = 0 at first: the mean of a normalised reward (N5)

    def forward(self, prompt_ids, prompt_mask, reply_ids, reply_mask):
        """Read whole replies at once (teacher forcing).

        Returns logits [B,T,V], where logits[:, t] is the distribution that reply token t was drawn from, and values
        [B,T], where values[:, t] = V(s_t), the state before token t. Both in float32. (S1, S3)
        """
        ids, mask, positions = join(prompt_ids, prompt_mask, reply_ids, reply_mask)
        T = reply_ids.shape[1]
        # The output at one position predicts the next token, so the last token itself is never fed in.
        out = self.lm(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1],
                      logits_to_keep=T, output_hidden_states=True, use_cache=False)
        features = torch.cat([hidden[:, -T:] for hidden in out.hidden_states[-2:]], dim=-1)             # [B,T,2*width]
        return out.logits.float(), self.value_head(features.detach().float()).squeeze(-1)               # [B,T,V] [B,T]


class RewardModel(nn.Module):
    """A language model whose reward head reads one score per reply, at its last token: EOS (N4).

    Only there has the model seen the whole reply; attention looks back, never ahead.
    """

    def __init__(self, lm):
        super().__init__()
        self.lm = lm.eval()
        width = lm.config.hidden_size
        self.reward_head = nn.Linear(width, 1)
        nn.init.normal_(self.reward_head.weight, std=1 / math.sqrt(width + 1))
        nn.init.zeros_(self.reward_head.bias)
        self.register_buffer("mean", torch.zeros(()))  # set by `normalize`: SFT's replies get mean 0 and
        self.register_buffer("std", torch.ones(()))    # standard deviation 1, so that beta has a known scale (N5)

    def forward(self, prompt_ids, prompt_mask, reply_ids, reply_mask):
        """Scores [B] in standard deviations of SFT's replies."""
        ids, mask, positions = join(prompt_ids, prompt_mask, reply_ids, reply_mask)
        hidden = self.lm.base_model(input_ids=ids, attention_mask=mask, position_ids=positions,
                                    use_cache=False).last_hidden_state                                  # [B,P+T,width]
        last = prompt_ids.shape[1] - 1 + reply_mask.sum(dim=1)  # not column -1: that is padding for all but the longest
        score = self.reward_head(hidden[torch.arange(len(ids), device=ids.device), last].float())       # [B,1]
        return (score.squeeze(-1) - self.mean) / self.std


def frozen(model: nn.Module) -> nn.Module:
    """A copy that never learns: the reference. It is not the old policy, which is refreshed in every cycle (T5)."""
    return copy.deepcopy(model).requires_grad_(False)


def new_gpt2(tokenizer, cfg: Config):
    """A GPT-2 with random weights, in this task's size and without dropout (N8)."""
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_layer=cfg.n_layer, n_embd=cfg.n_embd, n_head=cfg.n_head,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function, fused: a quarter faster than "gelu_new"
        initializer_range=0.08,                   # GPT-2's 0.02 suits a width of 768; narrow models want more
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id))


def token_log_probs(logits, tokens):
    """log pi(a_t | s_t) of the tokens that were taken: logits [B,T,V], tokens [B,T] -> [B,T] (T9).

    The chosen logit minus logsumexp. A log_softmax would write B*T*V numbers to use B*T of them.
    """
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def entropy(logits):
    """H(pi(. | s_t)) = log sum_v exp(z_v) - sum_v pi_v z_v, in nats: logits z [B,T,V] -> [B,T]."""
    return logits.logsumexp(dim=-1) - (logits.softmax(dim=-1) * logits).sum(dim=-1)


def masked_mean(x, mask):
    """Mean over the True positions -> scalar. `where`, not `x * mask`: 0 times NaN is NaN."""
    return torch.where(mask, x, 0).sum() / mask.sum()


# ======================================================================================================================
# 3  Stages 0 to 2: pretraining, supervised fine-tuning (SFT), reward model (L2)
# ======================================================================================================================
def stage_rng(cfg: Config, stage: str) -> random.Random:
    """A random stream of its own for every stage: skipping one (--init_from) then leaves the next as it was."""
    rng = random.Random(f"{stage} {cfg.seed}")
    torch.manual_seed(rng.getrandbits(63))
    return rng


def say(text=""):
    """print, without tearing a progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def minimize(model, loss_fn, steps: int, lr: float, stage: str):
    """Plain supervised training: `steps` updates of AdamW, the learning rate warmed up over a tenth, then to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for _ in tqdm(range(steps), desc=stage, leave=False, disable=None):  # a bar only on a terminal
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    say(f"{stage}: {steps} steps, final loss {loss.item():.3f}")


def fit_language_model(actor, tokenizer, texts, steps, lr, rng, stage, batch_size=16):
    """Stages 0 and 1: learn to continue a prompt as the texts do; the loss is on the reply only, EOS included.

    L = -mean_t log pi(a_t | s_t)      over the real reply tokens

    Args: texts: list of (prompt, reply). Changes `actor.lm` in place.
    """
    rows = tokenize(tokenizer, *map(list, zip(*texts)), [True] * len(texts))

    def loss():
        batch = collate(rng.sample(rows, min(batch_size, len(rows))), tokenizer.pad_token_id, actor.lm.device)
        logits, _ = actor(*batch)                                                                       # [B,T,V]
        return masked_mean(-token_log_probs(logits, batch[2]), batch[3])

    minimize(actor.lm, loss, steps, lr, stage)


def pretrain(prompts: list[str], cfg: Config):
    """Stage 0 stands in for GPT-2's pretraining: fluent, and no idea what the human wants. -> (tokenizer, actor)

    Real pretraining predicts every token of its texts; here, to save time, only those of the reply.
    """
    rng = stage_rng(cfg, "pretraining")
    texts = write_texts(rng, prompts, PRETRAIN_MIX, 8000)
    tokenizer = train_tokenizer([prompt + reply for prompt, reply in texts])
    actor = ActorCritic(new_gpt2(tokenizer, cfg)).to(cfg.device)
    fit_language_model(actor, tokenizer, texts, cfg.pretrain_steps, cfg.sft_lr, rng, "pretraining")
    return tokenizer, actor


def finetune(pretrained, tokenizer, prompts: list[str], cfg: Config):
    """Stage 1: imitate demonstrations, which are correct but mostly mechanical (D). -> the SFT model, a new actor"""
    rng = stage_rng(cfg, "SFT")
    actor = copy.deepcopy(pretrained)
    demonstrations = write_texts(rng, prompts, SFT_MIX, 8000)
    fit_language_model(actor, tokenizer, demonstrations, cfg.sft_steps, cfg.sft_lr, rng, "SFT")
    return actor


class Ranking(NamedTuple):
    """Replies to one prompt, ranked best first; `finished` tells which of them end with EOS."""

    prompt: str
    replies: list[str]
    finished: list[bool]


def label_rankings(sft, tokenizer, prompts: list[str], cfg: Config, rng: random.Random, K=4) -> list[Ranking]:
    """The human ranks K replies of the SFT model to one prompt, again and again, and not quite reliably (L3).

    Each ranking sorts score + label_noise * Gumbel noise, which is the Plackett-Luce model of noisy choice: the chance
    of preferring i to j is sigmoid((score_i - score_j) / label_noise). The reward model's loss below assumes just that,
    so what it learns is the human's score up to zero point and unit. Only the order leaves this function, no points.
    """
    prompts = [prompt for prompt in rng.choices(prompts, k=cfg.rankings) for _ in range(K)]
    batches = sample_batches(sft, tokenizer, prompts, cfg)
    replies, finished = ([x for batch in batches for x in getattr(batch, name)] for name in ("replies", "finished"))
    scores = torch.tensor(human_score(prompts, replies, finished))
    gumbel = -torch.log(-torch.log(torch.rand(len(scores)).clamp(1e-9, 1 - 1e-7)))
    order = (scores + cfg.label_noise * gumbel).view(-1, K).argsort(dim=1, descending=True)             # best first
    rows = (order + K * torch.arange(len(order)).unsqueeze(1)).tolist()
    return [Ranking(prompts[row[0]], [replies[i] for i in row], [finished[i] for i in row]) for row in rows]


def ranking_loss(scores):
    """Loss of scores [N,K] whose columns are ranked best first -> scalar.

    L = -mean over the K(K-1)/2 pairs i < j of log sigmoid(s_i - s_j)        (L3; InstructGPT eq. 1)

    Only differences enter, so the scores' zero and unit stay open: `normalize` sets them afterwards.
    """
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    return -F.logsigmoid(scores[:, better] - scores[:, worse]).mean()


def fit_reward_model(model, tokenizer, rankings: list[Ranking], steps, lr, rng, batch_size=4):
    """Minimise the ranking loss, ranking by ranking (they may differ in length). Changes `model` in place."""
    rows = [tokenize(tokenizer, [r.prompt] * len(r.replies), r.replies, r.finished) for r in rankings]

    def loss():
        batch = rng.sample(rows, min(batch_size, len(rows)))
        scores = model(*collate(sum(batch, []), tokenizer.pad_token_id, model.lm.device))               # [sum of K]
        return torch.stack([ranking_loss(s.unsqueeze(0)) for s in scores.split([len(row) for row in batch])]).mean()

    minimize(model, loss, steps, lr, "reward model")


def reward_model_scorer(model, tokenizer):
    """The reward model as a score_fn: (prompts, replies, finished) -> one float each."""
    @torch.no_grad()
    def score(prompts: list[str], replies: list[str], finished: list[bool]) -> list[float]:
        return model(*encode(tokenizer, prompts, replies, finished, model.lm.device)).tolist()
    return score


def normalize(model, tokenizer, batches):
    """Shift and scale the reward so that the given replies score 0 on average, with standard deviation 1 (N5)."""
    scores = torch.cat([score_samples(reward_model_scorer(model, tokenizer), batch) for batch in batches])
    model.mean += model.std * scores.mean()
    model.std *= scores.std()


def train_reward_model(sft, tokenizer, prompts: list[str], cfg: Config) -> RewardModel:
    """Stage 2: rankings -> a judge that can score any reply. It starts from the SFT model (C)."""
    rng = stage_rng(cfg, "reward model")
    rankings = label_rankings(sft, tokenizer, prompts, cfg, rng)
    model = RewardModel(copy.deepcopy(sft.lm)).to(cfg.device)
    fit_reward_model(model, tokenizer, rankings, cfg.rm_steps, cfg.rm_lr, rng)
    normalize(model, tokenizer, sample_batches(sft, tokenizer, prompts * 4, cfg))
    return model.requires_grad_(False)


def reward_model_quality(score_fn, sft, tokenizer, prompts: list[str], cfg: Config) -> dict[str, float]:
    """How well a judge agrees with the human on new replies to prompts held out from all training (P1).

    accuracy: share of reply pairs, same prompt, that both order alike (pairs that the human finds equal do not count).
    correlation: Pearson's r between the two scores.
    """
    stage_rng(cfg, "reward model quality")
    N = 32
    batches = sample_batches(sft, tokenizer, [prompt for prompt in prompts for _ in range(N)], cfg)
    human, scores = (torch.cat([score_samples(fn, batch) for batch in batches]).view(-1, N)             # [prompts,N]
                     for fn in (human_score, score_fn))
    difference = human.unsqueeze(2) - human.unsqueeze(1)                                                # [prompts,N,N]
    agree = difference.sign() == (scores.unsqueeze(2) - scores.unsqueeze(1)).sign()
    quality = {"accuracy": masked_mean(agree.float(), difference != 0).item(),
               "correlation": torch.corrcoef(torch.stack([human.flatten(), scores.flatten()]))[0, 1].item()}
    say("reward model: {accuracy:.1%} of new pairs ordered as by the human, r = {correlation:.2f}".format(**quality))
    if not quality["correlation"] >= 0.7:
        say("warning: correlation below 0.7: PPO will learn what this judge likes, not what the human likes (P1)")
    return quality


# ======================================================================================================================
# 4  Phase I: collect a rollout (steps 1 to 5)
#
#    Text as a decision process: the state s_t is the prompt and the reply so far, the action a_t is the next token, the
#    policy pi(a_t | s_t) is the language model, and the next state is the old one with the token appended. There is one
#    score, at the end; steps 2 to 5 turn it into a verdict on every single token.
# ======================================================================================================================
@dataclass
class Samples:
    """A batch of replies, as text and as tokens."""

    prompts: list[str]
    replies: list[str]
    finished: list[bool]       # did the reply end with EOS, or was it cut off at the limit?
    prompt_ids: torch.Tensor   # [B,P]
    prompt_mask: torch.Tensor  # [B,P]
    reply_ids: torch.Tensor    # [B,T]
    mask: torch.Tensor         # [B,T]  True on real reply tokens, EOS included


@dataclass
class Rollout(Samples):
    """All that Phase II needs; the tensors below are [B,T] but for the scores, and 0 where mask is False."""

    log_probs: torch.Tensor      # log pi_old(a_t | s_t)
    ref_log_probs: torch.Tensor  # log pi_ref(a_t | s_t)
    values: torch.Tensor         # V(s_t)
    scores: torch.Tensor         # [B]  of the whole reply, penalty included
    rewards: torch.Tensor        # r_t
    advantages: torch.Tensor     # A_t
    returns: torch.Tensor        # G_t, what the critic should have said

    @property
    def kl(self) -> torch.Tensor:
        """KL(pi_old || pi_ref) of each reply, estimated by its own tokens, in nats [B]. One reply's can be negative."""
        return (self.log_probs - self.ref_log_probs).sum(dim=1)


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

    Keys and values of earlier tokens stay in a cache: each step feeds one new token, not the whole text again.
    Stops when every reply has ended; eos_id=-1 never stops.

    Args: prompt_ids, prompt_mask [B,P], padded on the left.
    Returns: reply_ids [B,T] (pad_id after EOS), mask [B,T]; T is the longest reply of the batch.
    """
    ids, attention = prompt_ids, prompt_mask.long()
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)  # replies without EOS so far
    cache, replies, masks = None, [], []
    for _ in range(max_new_tokens):
        out = actor.lm(input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache,
                       use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        tokens = torch.where(running, sample_tokens(out.logits[:, -1], temperature), pad_id)            # [B]
        replies.append(tokens)
        masks.append(running)  # before the next line: EOS itself is a real token, the policy chose it
        running = running & (tokens != eos_id)
        if not running.any():
            break
        ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
        attention = torch.cat([attention, masks[-1].long().unsqueeze(1)], dim=1)
    return torch.stack(replies, dim=1), torch.stack(masks, dim=1)                                       # [B,T] [B,T]


def sample_replies(actor, tokenizer, prompts: list[str], cfg: Config) -> Samples:
    """One reply to each prompt, as tokens and as text."""
    nothing = [""] * len(prompts), [False] * len(prompts)
    prompt_ids, prompt_mask, *_ = encode(tokenizer, prompts, *nothing, actor.lm.device)
    reply_ids, mask = generate(actor, prompt_ids, prompt_mask, cfg.max_new_tokens, tokenizer.eos_token_id,
                               tokenizer.pad_token_id, cfg.temperature)
    finished = ((reply_ids == tokenizer.eos_token_id) & mask).any(dim=1).tolist()
    replies = tokenizer.batch_decode(reply_ids, skip_special_tokens=True)
    return Samples(prompts, replies, finished, prompt_ids, prompt_mask, reply_ids, mask)


def sample_batches(actor, tokenizer, prompts: list[str], cfg: Config, size: int = 256) -> list[Samples]:
    """`sample_replies` for any number of prompts, in batches that fit into memory (and into the processor's cache)."""
    return [sample_replies(actor, tokenizer, prompts[i:i + size], cfg) for i in range(0, len(prompts), size)]


def read_replies(actor, samples: Samples, temperature: float, rows=slice(None)):
    """Read given replies by teacher forcing -> log pi(a_t | s_t) [B,T], V(s_t) [B,T], logits [B,T,V].

    Phase I and Phase II both read through this function, so the first ratio pi / pi_old is 1 but for the last digit;
    taken from the sampling loop, old log-probs would differ in rounding. The temperature is that of sampling: without
    it these would be log-probs of a distribution that nothing was drawn from (L5).
    """
    logits, values = actor(samples.prompt_ids[rows], samples.prompt_mask[rows], samples.reply_ids[rows],
                           samples.mask[rows])
    logits = logits / temperature
    return token_log_probs(logits, samples.reply_ids[rows]), values, logits


def score_samples(score_fn, samples: Samples, missing_eos_penalty: float = 0.0):
    """r_RM of each reply [B], less the penalty for one that never ends: without it, rambling costs nothing (N3).

    A reply that was sampled several times is scored once.
    """
    rows = list(zip(samples.prompts, samples.replies, samples.finished))
    unique = list(dict.fromkeys(rows))
    score = dict(zip(unique, score_fn(*map(list, zip(*unique)))))
    return torch.tensor([score[row] - missing_eos_penalty * (not row[-1]) for row in rows], device=samples.mask.device)


# ---- Step 2: a reward for every token (S2) ---------------------------------------------------------------------------
def token_rewards(log_probs, ref_log_probs, scores, mask, kl_coef: float):
    """Token-level reward [B,T] from log-probs [B,T] and scores [B].

    r_t = -beta * (log pi(a_t|s_t) - log pi_ref(a_t|s_t))        every token: each step away from the reference costs
    r_T = the same + r_RM                                        last real token: the score of the whole reply

    The KL term is what keeps the reward model honest: it was trained on SFT's replies and knows nothing about others,
    so a policy that strays far enough finds nonsense that scores high (D's "hahaha", P1, P2).

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

    What came plus what is expected now, less what was expected before. After the last token nothing more can come, so
    V(s_{T+1}) = 0; a critic's output on the padding behind a shorter reply must not take its place.
    """
    values = torch.where(mask, values, 0)
    next_values = F.pad(values[:, 1:], (0, 1))  # shifted left by one, 0 at the end                     # [B,T]
    return torch.where(mask, rewards + gamma * next_values - values, 0)


# ---- Step 5: generalised advantage estimation (S5; Schulman et al. 2015) ---------------------------------------------
def gae(rewards, values, mask, gamma: float, lam: float):
    """Advantages and returns, both [B,T].

    A_t = sum_b (gamma*lambda)^b delta_{t+b}, computed backwards:  A_t = delta_t + gamma*lambda * A_{t+1}
    G_t = A_t + V(s_t)

    lambda = 0 is the TD residual (little variance, but it believes the critic), lambda = 1 is Monte Carlo: the rewards
    that really came, less V(s_t) (unbiased, but noisy) (T2). Between them lies the usual compromise, 0.95.
    The returns are taken here, from raw advantages: whitened ones would give the critic a target in foreign units.
    """
    deltas = td_residuals(rewards, values, mask, gamma)
    advantages, advantage = [], 0.0
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage  # padding behind the reply has delta 0: it adds nothing
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1], dim=1)                                                   # [B,T]
    return advantages, torch.where(mask, advantages + values, 0)


def whiten(x, mask, shift_mean: bool = True):
    """x [B,T] scaled to variance 1 over the real tokens, and to mean 0 unless shift_mean is False (N7).

    Rewards keep their mean (their sign means something); advantages lose it.
    """
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0)


@torch.no_grad()
def collect_rollout(actor, reference, score_fn, prompts: list[str], cfg: Config, tokenizer, kl_coef=None) -> Rollout:
    """Phase I: one reply to each prompt, and for each of its tokens an advantage and a return (L1).

    Step 3 comes before step 2 here: one pass over the replies gives both log-probs and values.

    Args:
        actor, reference: ActorCritic models; the reference is frozen.
        score_fn: (prompts, replies, finished) -> one float per reply.
        kl_coef: beta, if it is not cfg.kl_coef (it changes when it adapts).
    """
    samples = sample_replies(actor, tokenizer, prompts, cfg)                                            # Step 1
    mask = samples.mask
    log_probs, values, _ = read_replies(actor, samples, cfg.temperature)                                # Step 3: V(s_t)
    ref_log_probs, _, _ = read_replies(reference, samples, cfg.temperature)
    log_probs, ref_log_probs, values = (torch.where(mask, x, 0) for x in (log_probs, ref_log_probs, values))
    scores = score_samples(score_fn, samples, cfg.missing_eos_penalty)
    beta = cfg.kl_coef if kl_coef is None else kl_coef
    rewards = token_rewards(log_probs, ref_log_probs, scores, mask, beta)                               # Step 2
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)                                # Steps 4, 5
    if cfg.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Rollout(**vars(samples), log_probs=log_probs, ref_log_probs=ref_log_probs, values=values, scores=scores,
                   rewards=rewards, advantages=advantages, returns=returns)


# ======================================================================================================================
# 5  Phase II: learn from the rollout (step 6)
#
#    The rollout was expensive, so it is used several times. But it was drawn from the old policy, and the advantages
#    are estimates that hold near that policy: the ratio corrects for the first, clipping guards the second (T3, B).
# ======================================================================================================================
def policy_loss(log_probs, old_log_probs, advantages, mask, clip_eps: float):
    """PPO's clipped surrogate (S6; Schulman et al. 2017, eq. 7): tensors [B,T] -> (loss, clip_fraction), scalars.

    rho_t = pi(a_t|s_t) / pi_old(a_t|s_t) = exp(log pi - log pi_old)
    L     = -mean_t min(rho_t * A_t, clip(rho_t, 1-eps, 1+eps) * A_t)

    pi_old is the policy that sampled this batch: not the reference, which never changes (T5). The four cases (T4):
        A > 0, rho <= 1+eps   the token gets likelier          A < 0, rho >= 1-eps   the token gets less likely
        A > 0, rho >  1+eps   far enough: gradient zero        A < 0, rho <  1-eps   far enough: gradient zero
    With clip alone and no min, a step in the wrong direction could not be taken back either.
    clip_fraction is the share of tokens whose gradient is zero.
    """
    ratio = torch.exp(torch.where(mask, log_probs - old_log_probs, 0))                                  # [B,T]
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    return -masked_mean(torch.min(surrogate, clipped), mask), masked_mean((clipped < surrogate).float(), mask)


def value_loss(values, returns, mask, old_values=None, value_clip: float | None = None):
    """The critic's loss (S6, L8): L_V = 1/2 mean_t (V(s_t) - G_t)^2; tensors [B,T] -> scalar.

    With value_clip, V may move at most that far from old_values, and the worse of both errors counts.
    """
    error = torch.where(mask, values - returns, 0) ** 2                                                 # [B,T]
    if value_clip is not None:
        near = old_values + (values - old_values).clamp(-value_clip, value_clip)
        error = torch.max(error, torch.where(mask, near - returns, 0) ** 2)
    return 0.5 * masked_mean(error, mask)


def update_policy(actor, optimizer, rollout: Rollout, cfg: Config) -> dict[str, float]:
    """Phase II: ppo_epochs passes over the rollout, in shuffled minibatches; each takes one step on

    L = L_policy + c_V * L_V - c_ent * H        (S6: the entropy H is subtracted, for we minimise and want it large)

    Returns the metrics' means over all updates; first_log_ratio is the largest |log rho| of the first minibatch,
    before any step: rounding (below 1e-5), or something is wrong with the old log-probs.
    """
    history = []
    for _ in range(cfg.ppo_epochs):
        for rows in torch.randperm(len(rollout.mask), device=rollout.mask.device).chunk(cfg.minibatches):
            mask, old_log_probs = rollout.mask[rows], rollout.log_probs[rows]
            log_probs, values, logits = read_replies(actor, rollout, cfg.temperature, rows)
            pg_loss, clip_fraction = policy_loss(log_probs, old_log_probs, rollout.advantages[rows], mask, cfg.clip_eps)
            v_loss = value_loss(values, rollout.returns[rows], mask, rollout.values[rows], cfg.value_clip)
            mean_entropy = masked_mean(entropy(logits), mask)
            loss = pg_loss + cfg.vf_coef * v_loss - cfg.ent_coef * mean_entropy
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(actor.parameters(), cfg.max_grad_norm)
            optimizer.step()

            log_ratio = torch.where(mask, log_probs - old_log_probs, 0).detach()
            history.append({"policy_loss": pg_loss, "value_loss": v_loss, "entropy": mean_entropy,
                            "clip_fraction": clip_fraction, "first_log_ratio": log_ratio.abs().max(),
                            # KL(pi_old || pi) by the estimator that is never negative
                            "approx_kl": masked_mean(log_ratio.exp() - 1 - log_ratio, mask)})
    means = {name: torch.stack([update[name].detach() for update in history]).mean().item() for name in history[0]}
    return means | {"first_log_ratio": history[0]["first_log_ratio"].item()}


def explained_variance(values, returns, mask) -> float:
    """1 - Var(G - V) / Var(G) over real tokens: 1 a perfect critic, 0 no better than a constant, below 0 worse."""
    return 1 - ((returns - values)[mask].var() / returns[mask].var().clamp(min=1e-8)).item()


def describe(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """The cycle's metrics that Phase I knows: means over the batch."""
    reward, kl = rollout.scores.mean().item(), rollout.kl.mean().item()
    return {"reward": reward, "kl": kl, "objective": reward - kl_coef * kl,
            "human": score_samples(human_score, rollout).mean().item(),
            "explained_variance": explained_variance(rollout.values, rollout.returns, rollout.mask),
            "reply_length": rollout.mask.sum(dim=1).float().mean().item(),
            "finished": sum(rollout.finished) / len(rollout.finished)}


def adapt_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """beta for the next cycle: at most 2% more when KL is above its target, 2% less when below (T6; Ziegler 2019)."""
    return kl_coef * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


# ======================================================================================================================
# 6  The loop
# ======================================================================================================================
# The columns of metrics.csv, and what they do in a healthy run:
#   reward, objective    rise quickly, then flatten; objective = reward - beta * kl is what PPO maximises
#   human                follows the reward. If it falls while the reward rises, the reward model is being fooled (P1)
#   kl                   0 at first, rises to a few nats and stays. If it keeps rising, beta is too small (P2)
#   validation           the objective on held-out prompts, every eval_every cycles
#   entropy              falls, not to 0 at once: then nothing is tried any more
#   clip_fraction        0 to 0.2. Much more: lr or ppo_epochs too large
#   approx_kl            to the *old* policy, per token: how far one cycle moves, well below 0.1
#   first_log_ratio      below 1e-5, always: otherwise the old log-probs are wrong
#   policy_loss          jitters around 0 and means little: its sampling distribution changes with every cycle
#   value_loss           falls;  explained_variance: from 0 up; a good critic nears 1
METRICS = ("cycle episodes seconds reward human kl objective validation entropy clip_fraction approx_kl "
           "first_log_ratio policy_loss value_loss explained_variance reply_length finished lr kl_coef").split()
SHOWN = {"cycle": "4.0f", "reward": "7.3f", "human": "6.2f", "kl": "6.2f", "objective": "9.3f", "entropy": "7.3f",
         "clip_fraction": "13.3f", "explained_variance": "18.2f", "reply_length": "12.1f", "seconds": "7.2f"}


def train_ppo(actor, reference, score_fn, tokenizer, prompts: dict[str, list[str]], cfg: Config, out: Path) -> float:
    """Cycles of Phase I and Phase II (L1). Trains `actor`, and leaves in it the weights that validated best (L6).

    After every cycle a row is added to metrics.csv in `out`. Returns the last kl_coef.
    """
    rng = stage_rng(cfg, "PPO")
    # The critic starts from nothing and should be ahead of the actor, so it learns ten times faster. No weight decay:
    # it would pull the policy towards zero weights. The learning rate falls to 0: late cycles have only noise to learn.
    groups = [{"params": actor.lm.parameters()}, {"params": actor.value_head.parameters(), "lr": 10 * cfg.lr}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda cycle: 1 - cycle / max(cfg.cycles, 1))
    kl_coef, best, best_objective = cfg.kl_coef, copy.deepcopy(actor.state_dict()), -math.inf
    with open(out / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, METRICS)
        writer.writeheader()
        for cycle in tqdm(range(cfg.cycles), desc="PPO", leave=False, disable=None):
            start = time.perf_counter()
            drawn = rng.choices(prompts["train"], k=cfg.batch_size // cfg.replies_per_prompt)
            asked = [prompt for prompt in drawn for _ in range(cfg.replies_per_prompt)]
            rollout = collect_rollout(actor, reference, score_fn, asked, cfg, tokenizer, kl_coef)
            before = reply_ratio(actor, rollout, cfg) if cycle == 0 else None
            metrics = {"cycle": cycle + 1, "episodes": (cycle + 1) * cfg.batch_size, "kl_coef": kl_coef,
                       "lr": schedule.get_last_lr()[0], **update_policy(actor, optimizer, rollout, cfg),
                       **describe(rollout, kl_coef)}
            schedule.step()
            if cycle == 0:
                say(xray(rollout, tokenizer, cfg, rho_start=before, rho_end=reply_ratio(actor, rollout, cfg)))
                say("  ".join(f"{name:>{len(format(0.0, spec))}}" for name, spec in SHOWN.items()))
            if (cycle + 1) % cfg.eval_every == 0 or cycle + 1 == cfg.cycles:
                table, _ = evaluate(actor, reference, score_fn, tokenizer, prompts["validation"], 8, cfg, kl_coef)
                metrics["validation"] = table["objective"].mean().item()
                # Objectives under different betas cannot be compared: while beta adapts, the latest policy is kept.
                if metrics["validation"] > best_objective or cfg.kl_target is not None:
                    best, best_objective = copy.deepcopy(actor.state_dict()), metrics["validation"]
            if cfg.kl_target is not None:
                kl_coef = adapt_kl_coef(kl_coef, metrics["kl"], cfg.kl_target)
            metrics["seconds"] = time.perf_counter() - start
            writer.writerow({name: metrics.get(name, "") for name in METRICS})
            file.flush()
            say("  ".join(format(metrics[name], spec) for name, spec in SHOWN.items()))
    actor.load_state_dict(best)
    return kl_coef


# ======================================================================================================================
# 7  Report: what each stage did to the replies, and how much of the possible PPO reached
# ======================================================================================================================
@torch.no_grad()
def reply_kl(actor, reference, samples: Samples, cfg: Config):
    """log pi(reply) - log pi_ref(reply) in nats, for each reply [B].

    Over replies that the actor sampled, its mean is KL(pi || pi_ref). One reply's value may be negative, a KL may not.
    """
    if actor is reference:
        return torch.zeros(len(samples.mask), device=samples.mask.device)
    log_probs, ref_log_probs = (read_replies(model, samples, cfg.temperature)[0] for model in (actor, reference))
    return torch.where(samples.mask, log_probs - ref_log_probs, 0).sum(dim=1)


def evaluate(actor, reference, score_fn, tokenizer, prompts: list[str], N: int, cfg: Config, kl_coef: float):
    """Sample N replies to each prompt -> (table, replies).

    The table has a column [prompts,N] for each of: the human's verdicts (see `judge`), reward, kl, objective = reward -
    beta * kl, length in tokens, finished. `replies` are the texts, N after N.
    """
    batches = sample_batches(actor, tokenizer, [prompt for prompt in prompts for _ in range(N)], cfg)
    verdicts = [judge(*row) for batch in batches for row in zip(batch.prompts, batch.replies, batch.finished)]
    table = {name: torch.tensor([verdict[name] for verdict in verdicts]) for name in verdicts[0]}
    table["reward"] = torch.cat([score_samples(score_fn, batch, cfg.missing_eos_penalty) for batch in batches])
    table["kl"] = torch.cat([reply_kl(actor, reference, batch, cfg) for batch in batches])
    table["objective"] = table["reward"] - kl_coef * table["kl"]
    table["length"] = torch.cat([batch.mask.sum(dim=1) for batch in batches])
    table["finished"] = torch.tensor([done for batch in batches for done in batch.finished])
    return ({name: column.float().cpu().view(-1, N) for name, column in table.items()},
            [reply for batch in batches for reply in batch.replies])


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


def win_rate(human, sft_human) -> float:
    """Chance that the human prefers a reply to SFT's reply to the same prompt, ties counting half; [prompts,N] each."""
    difference = human.unsqueeze(2) - sft_human.unsqueeze(1)                                            # [prompts,N,N']
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()


def make_report(tables: dict[str, dict], kl_coef: float, quality: dict, seconds: dict) -> dict:
    """The contents of report.json, from the `evaluate` tables of "pretrained", "sft" and "ppo"."""
    report = {name: {column: x.mean().item() for column, x in table.items()}
              | {"win_rate": win_rate(table["human"], tables["sft"]["human"])} for name, table in tables.items()}
    j_sft, j_ppo = report["sft"]["objective"], report["ppo"]["objective"]
    j_star, size = optimum(tables["sft"]["reward"], kl_coef) if kl_coef > 0 else (None, None)
    fraction = (j_ppo - j_sft) / (j_star - j_sft) if size and size >= 5 else None
    report["optimum"] = {"objective": j_star, "fraction": fraction, "effective_sample_size": size}
    return report | {"reward_model": quality, "seconds": seconds}


def show_report(report: dict, replies: dict[str, list[str]], prompts: list[str]):
    """Print report.json as tables, and for some prompts the first reply (not the best one) of each model."""
    columns = "helpful warm honest harmless human reward kl objective length win_rate".split()
    say(f"\nRESULT on {len(prompts)} prompts that no stage has seen\n")
    say(" " * 10 + "".join(f"{column:>10}" for column in columns))
    for name in replies:
        say(f"{name:10}" + "".join(f"{report[name][column]:10.2f}" for column in columns))
    say("\nhelpful to harmless: share of replies; human: points, 4 at best; reward: PPO's judge (a model counts\n"
        "in standard deviations of SFT's replies); kl: nats from SFT; objective: reward - beta*kl; win_rate: over SFT")
    best, j_sft, j_ppo = report["optimum"], report["sft"]["objective"], report["ppo"]["objective"]
    if best["objective"] is not None:
        way = f"{best['fraction']:.1%} of the way" if best["fraction"] is not None else "or more: too few samples"
        say(f"\nTHE OPTIMUM: J(SFT) = {j_sft:.3f}, J(PPO) = {j_ppo:.3f}; the best that any policy can have is J* = "
            f"{best['objective']:.3f}: {way}\n(from {best['effective_sample_size']:.0f} effective samples per prompt)")
    say("\nREPLIES, the first sample of each model")
    for i in range(2, len(prompts), 5):
        say(f"\n  user        {prompts[i].strip()}")
        for name, texts in replies.items():
            say(f"  {name:10}  {texts[i * len(texts) // len(prompts)]}")
    say("\nSECONDS: " + ", ".join(f"{stage} {value:.1f}" for stage, value in report["seconds"].items()))


def reply_ratio(actor, rollout: Rollout, cfg: Config, row: int = 0):
    """rho_t = pi / pi_old of one reply, for the actor as it is now -> [tokens]."""
    with torch.no_grad():
        log_probs, _, _ = read_replies(actor, rollout, cfg.temperature, slice(row, row + 1))
    return (log_probs[0] - rollout.log_probs[row]).exp()


def xray(rollout: Rollout, tokenizer, cfg: Config, row: int = 0, **ratios) -> str:
    """One reply under X-ray: article E's table with this run's numbers, a line per token.

    KL = log pi - log ref;  r_t from step 2;  V(s_t) from step 3;  delta_t from step 4;  A_t and return from step 5;
    `ratios` are further columns: step 6's rho_t at the start of the update (1, always) and at its end.
    What to see: only tokens on which log pi and log ref differ cost KL, and the score arrives at <eos>.
    """
    r, deltas = rollout, td_residuals(rollout.rewards, rollout.values, rollout.mask, cfg.gamma)
    columns = {"log pi": r.log_probs, "log ref": r.ref_log_probs, "KL": r.log_probs - r.ref_log_probs, "r_t": r.rewards,
               "V(s_t)": r.values, "delta_t": deltas, "A_t": r.advantages, "return": r.returns}
    columns = {name: column[row] for name, column in columns.items()} | ratios
    lines = [f'X-RAY of one reply to "{r.prompts[row].strip()}" (score {r.scores[row]:.3f})',
             f"{'token':12}" + "".join(f"{name:>10}" for name in columns)]
    for t, token in enumerate(r.reply_ids[row][r.mask[row]]):
        word = tokenizer.decode([token]).strip()
        lines.append(f"{word:12}" + "".join(f"{round(x[t].item(), 3) + 0.0:10.3f}" for x in columns.values()))
    return "\n" + "\n".join(lines) + "\n"


# ======================================================================================================================
# 8  Files, and main
# ======================================================================================================================
def new_folder(cfg: Config) -> Path:
    """Make the run's folder and write config.json. Raises UserError rather than touch an earlier run."""
    out = Path(cfg.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        check(not any(out.iterdir()), f"--out {out} is not empty; choose a new name")
        (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2) + "\n")
    except OSError as error:
        check(False, f"cannot write to --out {out} ({error.strerror}); choose another folder")
    return out


def save_model(model, tokenizer, folder: Path):
    """An ordinary transformers folder, for AutoModelForCausalLM.from_pretrained, and our head: heads.safetensors."""
    model.lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({name: x.contiguous() for name, x in model.state_dict().items() if not name.startswith("lm.")},
              folder / "heads.safetensors")


def load_model(kind, folder: Path, device):
    """What save_model wrote; kind is ActorCritic or RewardModel."""
    model = kind(AutoModelForCausalLM.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "heads.safetensors"), strict=False)
    return model.to(device)


def load_run(cfg: Config):
    """--init_from: what train_stages returns, from the folder of an earlier run."""
    run, kinds = Path(cfg.init_from), {"pretrained": ActorCritic, "sft": ActorCritic}
    kinds |= {"reward_model": RewardModel} if cfg.reward == "model" else {}
    for name in kinds:
        check((run / name / "heads.safetensors").is_file(), f"--init_from {run}: there is no {name}/ of a run in it")
    models = {name: load_model(kind, run / name, cfg.device) for name, kind in kinds.items()}
    tokenizer = AutoTokenizer.from_pretrained(run / "sft", padding_side="left")
    return tokenizer, models["pretrained"], models["sft"], models.get("reward_model")


@contextmanager
def timed(seconds: dict, stage: str):
    """Note the time spent in a `with` block as seconds[stage]."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def train_stages(prompts: list[str], cfg: Config, seconds: dict):
    """Stages 0 to 2 -> tokenizer, pretrained model, SFT model, reward model (None for --reward human)."""
    with timed(seconds, "pretrain"):
        tokenizer, pretrained = pretrain(prompts, cfg)
    with timed(seconds, "sft"):
        sft = finetune(pretrained, tokenizer, prompts, cfg)
    with timed(seconds, "reward_model"):
        reward_model = train_reward_model(sft, tokenizer, prompts, cfg) if cfg.reward == "model" else None
    return tokenizer, pretrained, sft, reward_model


def main(argv=None):
    disable_progress_bar()  # transformers' own bars, for models that load in a blink
    cfg = parse_config(argv)
    earlier = load_run(cfg) if cfg.init_from else None
    out, prompts = new_folder(cfg), split_prompts()
    seconds = dict.fromkeys(("pretrain", "sft", "reward_model", "ppo", "total"), 0.0)
    with timed(seconds, "total"):
        tokenizer, pretrained, sft, reward_model = earlier or train_stages(prompts["train"], cfg, seconds)
        reference, policy = frozen(sft), copy.deepcopy(sft)
        score_fn, quality = human_score, {"accuracy": None, "correlation": None}
        if reward_model is not None:
            score_fn = reward_model_scorer(reward_model, tokenizer)
            quality = reward_model_quality(score_fn, reference, tokenizer, prompts["validation"], cfg)
            save_model(reward_model, tokenizer, out / "reward_model")
        save_model(pretrained, tokenizer, out / "pretrained")
        save_model(sft, tokenizer, out / "sft")
        with timed(seconds, "ppo"):
            kl_coef = train_ppo(policy, reference, score_fn, tokenizer, prompts, cfg, out)
        save_model(policy, tokenizer, out / "policy")

        stage_rng(cfg, "report")
        tables, replies, test = {}, {}, prompts["test"]
        for name, model, N in (("pretrained", pretrained, 32), ("sft", reference, cfg.optimum_samples),
                               ("ppo", policy, 64)):
            tables[name], replies[name] = evaluate(model, reference, score_fn, tokenizer, test, N, cfg, kl_coef)
        say(xray(collect_rollout(policy, reference, score_fn, test[:1], cfg, tokenizer, kl_coef), tokenizer, cfg))
    report = make_report(tables, kl_coef, quality, seconds)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show_report(report, replies, test)
    say(f"\nAll is in {out}. PPO alone, with another flag: python ppo_rlhf.py --init_from {out} --kl_coef 0.05")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
