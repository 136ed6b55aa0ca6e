"""Seconds and memory of a PPO cycle: ours, bare calls of the same model, its matrix products alone, another program's.

    python notes/evidence/benchmark.py                              # everything; half an hour or more on two idle cores
    python notes/evidence/benchmark.py --sizes tiny --reply_tokens 24 96 384 --batch_sizes 64 --turns 3 --threads 2
    python notes/evidence/benchmark.py --peer "PYTHON PEER.py"      # beside another program

THE WORKLOAD: GPT-2 with random weights, B random prompts of 10 tokens, replies of exactly T tokens, a reward model of
the policy's size, 4 epochs of 2 minibatches, float32, no dropout, temperature 1.

    ours       ppo_rlhf.train_ppo as it is, bookkeeping included; the phases are timed around its own functions. Unlike
               a user's run, no reply ends early, nothing is validated or written to disk, the models have room for
               1,024 tokens, not 256, and the tokenizer is a list of words, so that random tokens become text for the
               reward model and the same tokens again. As always, 64 replies at a time are read (--micro_batch_size).
    bare       the same passes over random tokens: T cached forward calls in place of sampling, one forward call each
               of actor, reference and reward model, forward and backward of the cross entropy and a step of AdamW for
               each update. No mask, no critic, no choice of tokens, no PPO.
    products   the floating-point operations of the matrix products below, over the rate at which this machine
               multiplies large square matrices by torch: the best of many tries, with the same number of threads.
    peer       any program that takes --n_layer --n_embd --n_head --vocab --batch_size --reply_tokens --cycles --threads
               and prints "... seconds per cycle" for this workload, for example one that runs TRL 1.12's PPOTrainer.
               TRL's critic is a second model of the policy's size; ours is a small head on the actor.

THE OPERATIONS: a multiplication and an addition are two. One text of n tokens, through L layers of width d, with logits
over V tokens at its last k positions, costs

    read(n, k) = L * (24 d^2 n + 4 d n(n+1)/2) + 2 d V k        projections and MLP; attention, looking back; logits

    sampling   read(P+T-1, T)                                   P = 10; thanks to the cache, each token is read once
    reading    read(P+T-1, T) twice, + 4 d^2 T                  actor and reference; the critic's first layer
    scoring    read(P+T, 0)                                     the reward model
    update     4 * (3 read(P+T-1, T) + 8 d^2 T)                 backward costs two forwards; the critic's gradient stops

each times B. torch's own count of our cycle stands beside the formula: it is higher by what the script does though it
need not, such as logits that nobody uses, and by half of attention, which it takes for a full square.

Every measurement runs in a process of its own, the programs in turns. Seconds are medians: over the cycles after the
first, then over the turns. Ratios are taken within a turn. Memory is the peak of the process. Linux or macOS.
"""
import argparse
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ppo_rlhf as ppo  # noqa: E402

PROMPT = 10
SIZES = {"tiny": {"n_layer": 2, "n_embd": 128, "n_head": 4, "vocab": 80},
         "small": {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab": 2048},
         "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab": 50257}}
# What is measured in the script: function -> (phase, calls per cycle)
PHASES = {"sample_replies": ("sampling", 1), "read_without_gradient": ("reading", 2), "score_replies": ("scoring", 1),
          "update_policy": ("update", 1)}


# ---- The floor: operations over rate ---------------------------------------------------------------------------------
def operations(size: dict, B: int, T: int) -> dict[str, float]:
    """Floating-point operations of a cycle by phase, by the formula above."""
    L, d, V = size["n_layer"], size["n_embd"], size["vocab"]

    def read(n, k):
        return L * (24 * d ** 2 * n + 2 * d * n * (n + 1)) + 2 * d * V * k

    n = PROMPT + T - 1  # only the reward model reads the last token
    return {"sampling": B * read(n, T), "reading": B * (2 * read(n, T) + 4 * d ** 2 * T),
            "scoring": B * read(n + 1, 0), "update": B * 4 * (3 * read(n, T) + 8 * d ** 2 * T)}


def matrix_rate() -> float:
    """Operations per second in the product of two large square matrices: the best of several sizes and tries."""
    rates = []
    for n in [512, 1024, 2048] * 8:
        a, b = torch.randn(n, n), torch.randn(n, n)
        start = time.perf_counter()
        torch.mm(a, b)
        rates.append(2 * n ** 3 / (time.perf_counter() - start))
    return max(rates)


# ---- What runs in a process of its own -------------------------------------------------------------------------------
def make_lm(attention: str, vocab: int, **shape) -> GPT2LMHeadModel:
    """A GPT-2 as the script would have it: exact GELU for the small ones, for GPT-2's own size what GPT-2 has."""
    activation = "gelu_new" if vocab == 50257 else "gelu"
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=1024, activation_function=activation,
                                      attn_implementation=attention, **shape)).eval()


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word for each of the model's tokens. Padding and EOS lie beyond them: no reply can end, or lose a token."""
    words = [*map(str, range(vocab)), "<pad>", "<eos>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   padding_side="left")


def our_cycles(size: dict, B: int, T: int, cycles: int, count: bool = False) -> dict[str, float]:
    """Seconds of the script's cycle, whole and by phase; with `count`, the operations in it, as torch counts them."""
    cfg = ppo.Config(device="cpu", batch_size=B, max_new_tokens=T, temperature=1.0, lr=1e-5, cycles=cycles + 2,
                     eval_every=cycles + 2)
    attention = "eager" if count else "sdpa"  # the counter does not know the CPU's fused attention
    tokenizer = make_tokenizer(size["vocab"])
    actor = ppo.ActorCritic(make_lm(attention, **size), tokenizer, cfg)
    reward_model = ppo.frozen(ppo.RewardModel(make_lm(attention, **size), tokenizer, cfg))
    torch.nn.init.normal_(reward_model.head[-1].weight)  # it starts as zero: no score, no gradient
    prompts = [" ".join(str(random.randrange(size["vocab"])) for _ in range(PROMPT)) for _ in range(512)]
    measured = defaultdict(list)

    def watch(name, function):
        def watched(*args, **options):
            start = time.perf_counter()
            with FlopCounterMode(display=False) if count else nullcontext() as counter:
                result = function(*args, **options)
            measured[name].append(counter.get_total_flops() if count else time.perf_counter() - start)
            return result
        return watched

    for name in PHASES:
        setattr(ppo, name, watch(name, getattr(ppo, name)))
    ppo.say = lambda text="": None
    # The first cycle warms up and makes an X-ray, the last one validates: neither counts.
    splits = {"train": prompts, "validation": prompts[:1]}
    log = ppo.train_ppo(actor, ppo.frozen(actor), reward_model.score, splits, cfg)
    by_phase = {phase: calls * median(measured[name]) for name, (phase, calls) in PHASES.items()}
    return by_phase | {"whole": sum(by_phase.values()) if count else median(row["seconds"] for row in log[1:-1])}


def bare_cycles(size: dict, B: int, T: int, cycles: int) -> dict[str, float]:
    """Seconds of the same passes made of bare calls, whole and by phase; and this machine's rate of products."""
    actor, reference, reward_model = (make_lm("sdpa", **size) for _ in range(3))
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-5, fused=True)
    ids, micro, log = torch.randint(size["vocab"], (B, PROMPT + T)), ppo.Config().micro_batch_size, []
    for _ in range(1 + cycles):
        times, cache = [time.perf_counter()], None
        with torch.no_grad():
            for part in ids[:, :-1].split([PROMPT] + [1] * (T - 1), dim=1):
                cache = actor(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            times.append(time.perf_counter())
            for lm, part in product((actor, reference), ids[:, :-1].split(micro)):
                lm(part, use_cache=False, logits_to_keep=T)
            times.append(time.perf_counter())
            for part in ids.split(micro):
                reward_model.base_model(part, use_cache=False)
            times.append(time.perf_counter())
        for minibatch in ids.chunk(2) * 4:
            optimizer.zero_grad()
            for part in minibatch.split(micro):
                logits = actor(part[:, :-1], use_cache=False, logits_to_keep=T).logits
                F.cross_entropy(logits.flatten(0, 1), part[:, PROMPT:].flatten()).backward()
            optimizer.step()
        times.append(time.perf_counter())
        log.append([after - before for before, after in zip(times, times[1:])] + [times[-1] - times[0]])
    phases = [phase for phase, _ in PHASES.values()]
    return dict(zip([*phases, "whole"], map(median, zip(*log[1:])))) | {"rate": matrix_rate()}


KINDS = {"ours": our_cycles, "bare": bare_cycles, "count": partial(our_cycles, count=True)}


def measure(kind: str, size: dict, B: int, T: int, args) -> dict[str, float]:
    """What a process of its own finds out, and its peak memory in GB."""
    command = [sys.executable, __file__, "--worker", json.dumps([kind, size, B, T, args.cycles])]
    if kind == "peer":
        flags = size | {"batch_size": B, "reply_tokens": T, "cycles": 1 + args.cycles, "threads": args.threads}
        command = shlex.split(args.peer) + [f"--{name}={value}" for name, value in flags.items()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
    output = process.stdout.read()
    _, process.returncode, usage = os.wait4(process.pid, 0)  # a child inherits its parent's peak: here, only imports
    pattern = r"([\d.]+) seconds per cycle" if kind == "peer" else r"^RESULT (.*)$"
    found = re.findall(pattern, output, re.MULTILINE)
    if process.returncode or not found:
        sys.exit(f"{shlex.join(command)} failed:\n{output[-2000:]}")
    result = {"whole": float(found[-1])} if kind == "peer" else json.loads(found[-1])
    return result | {"memory": usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)}


# ---- The tables ------------------------------------------------------------------------------------------------------
def row(*cells):
    """One line of a markdown table; numbers with three digits."""
    texts = [str(x) if not isinstance(x, float) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in cells]
    print("| " + " | ".join(texts) + " |", flush=True)


def header(*names):
    row(*names)
    row(*["---:"] * len(names))


def over(above: list[float], below: list[float]) -> str:
    """Median of the turns' ratios, with the range if there are several."""
    ratios = sorted(a / b for a, b in zip(above, below))
    return f"{median(ratios):.2f}" + f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" * (len(ratios) > 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--reply_tokens", nargs="+", type=int, default=[24, 96, 384])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--limit", type=float, default=2.5, help="leave out what needs more TFLOP per cycle")
    parser.add_argument("--cycles", type=int, default=3, help="timed in each process, after the first")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer", default="", help="command of another program, see above")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, *what = json.loads(args.worker)
        return print("RESULT", json.dumps(KINDS[kind](*what)))

    kinds, details = ["ours", "bare"] + ["peer"] * bool(args.peer), []
    ratios = [("peer", "ours")] * bool(args.peer) + [("ours", "bare"), ("ours", "products")]
    print(f"torch {torch.__version__}, threads: {args.threads}, load at the start: {os.getloadavg()[0]:.1f} "
          "(above 0.5, do not trust the times). Seconds per cycle, and GB at the peak.\n")
    header("model", "T", "B", *kinds, "products", *(f"{a} / {b}" for a, b in ratios), *(f"GB {kind}" for kind in kinds),
           "GFLOP/s of products")
    for name, T, B in product(args.sizes, args.reply_tokens, args.batch_sizes):
        size, work = SIZES[name], operations(SIZES[name], B, T)
        work["whole"] = sum(work.values())
        if work["whole"] > args.limit * 1e12:
            continue
        turns = {kind: [] for kind in kinds}
        for _, kind in product(range(args.turns), kinds):
            turns[kind].append(measure(kind, size, B, T, args))
        seconds = {kind: [turn["whole"] for turn in turns[kind]] for kind in kinds}
        rate = max(turn["rate"] for turn in turns["bare"])
        seconds["products"] = [work["whole"] / rate] * args.turns
        row(name, T, B, *(median(x) for x in seconds.values()), *(over(seconds[a], seconds[b]) for a, b in ratios),
            *(max(turn["memory"] for turn in turns[kind]) for kind in kinds), rate / 1e9)
        counted = measure("count", size, 2, T, args)  # proportional to B
        for phase in work:
            ours, bare = (median(turn[phase] for turn in turns[kind]) for kind in ("ours", "bare"))
            details.append((name, T, B, phase, ours, bare, work[phase] / rate, ours / bare, ours / work[phase] * rate,
                            work[phase] / 1e9, counted[phase] * B / 2 / work[phase]))
    print("\nWhere the time goes, and the operations: by the formula, and torch's count over the formula's.\n")
    header("model", "T", "B", "phase", "ours", "bare", "products", "ours / bare", "ours / products", "GFLOP", "count")
    for detail in details:
        row(*detail)


if __name__ == "__main__":
    main()
