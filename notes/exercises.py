"""The exercises of exercises.md, solved: each turns a flag or replaces a function of ppo_rlhf.py, and is then run.

    python notes/exercises.py 7 --init_from runs/first              # one of them, or several
    python notes/exercises.py all --init_from runs/first --write    # all, and their tables into exercises.md

Each repeats PPO alone, from the SFT and reward model of an earlier run with the built-in task, and measures the last
policy on the prompts of the final test. 10 seconds per line of a table on one thread of a quiet machine.
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import random
import re
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F

import ppo_rlhf as ppo

BASE = []  # flags of every run, from the command line
TEXT = Path(__file__).with_suffix(".md")
# The script's own, where a solution builds on them.
gae, generate, policy_loss, sample_tokens = ppo.gae, ppo.generate, ppo.policy_loss, ppo.sample_tokens


# ======================================================================================================================
# The laboratory
# ======================================================================================================================
def settings(flags=""):
    return ppo.parse_config([*BASE, *flags.split()])


def load(name, cfg):
    """A model of the run that everything starts from."""
    kind = ppo.RewardModel if name == "reward_model" else ppo.ActorCritic
    with contextlib.redirect_stderr(io.StringIO()):  # the library's progress bars
        return ppo.load_model(kind, Path(cfg.init_from) / name, cfg)


def measure(actor, cfg, score_fn):
    """What a policy does on the prompts of the final test, 32 replies to each."""
    ppo.reseed(cfg, "report")
    table = ppo.evaluate(actor, ppo.frozen(load("sft", cfg)), score_fn, ppo.split(ppo.WORLD_PROMPTS)["test"], 32, cfg)
    report = json.loads((Path(cfg.init_from) / "report.json").read_text())
    sft, best = report["sft"]["objective"], report["optimum"]["objective"]
    seen = ppo.means(table)
    return seen | {"way": 100 * (seen["objective"] - sft) / (best - sft), "replies": [line["reply"] for line in table]}


@cache
def train(flags="", score_fn=None, **functions):
    """PPO with these flags and functions -> `measure`, and means over all cycles of training."""
    cfg = settings(flags)
    actor, score_fn = load("sft", cfg), score_fn or load("reward_model", cfg).score
    with patch.dict(vars(ppo), functions), contextlib.redirect_stdout(io.StringIO()):
        log = ppo.train_ppo(actor, ppo.frozen(actor), score_fn, ppo.split(ppo.WORLD_PROMPTS), cfg)
    names = "policy_loss value_loss entropy clip_fraction approx_kl explained_variance".split()
    mean = {name: sum(row[name] for row in log) / len(log) for name in names}
    return measure(actor, cfg, score_fn) | mean


@cache
def sft_scores(N=256):
    """Scores of N replies of SFT to each test prompt: [prompts,N]."""
    cfg = settings()
    ppo.reseed(cfg, "samples")
    groups = ppo.sample_groups(load("sft", cfg), ppo.split(ppo.WORLD_PROMPTS)["test"], N, cfg)
    return torch.tensor([ppo.rate(load("reward_model", cfg).score, rows, cfg.missing_eos_penalty) for rows in groups])


# A column of a table: its title, and how many decimals.
COLUMNS = {"human": ("human", 2), "reward": ("reward", 2), "kl": ("KL", 2), "objective": ("objective", 2),
           "way": ("% of the way to the optimum", 0), "reply_length": ("tokens", 1), "entropy": ("entropy", 3),
           "clip_fraction": ("clip_fraction", 3), "approx_kl": ("approx_kl", 4), "value_loss": ("value_loss", 3),
           "explained_variance": ("explained_variance", 2), "policy_loss": ("policy_loss", 3)}


def table(columns, rows):
    """Markdown; rows: what it is -> what was measured."""
    columns = {name: COLUMNS.get(name, (name, 6 if "error" in name else 2)) for name in columns.split(", ")}
    lines = [["", *(title for title, _ in columns.values())], ["---"] * (len(columns) + 1)]
    for label, seen in rows.items():
        lines.append([label, *(f"{round(seen[name], digits) + 0.0:.{digits}f}".replace("nan", "") for name, (_, digits) in columns.items())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ======================================================================================================================
# Solutions: the functions as they stand in exercises.md, and what is run with them
# ======================================================================================================================
def exercise_1():
    return table("human, reward, kl, way", {f"`--seed {seed}`": train(f"--seed {seed}") for seed in (0, 1, 2)})


def by_hand(r, V, gamma, lam):
    """One reply's columns r_t and V(s_t), two lists -> its columns A_t and return."""
    A, G = [], []
    for t in reversed(range(len(r))):
        next_value, later = (V[t + 1], A[0]) if A else (0, 0)  # nothing comes after the last token
        A.insert(0, r[t] + gamma * next_value - V[t] + gamma * lam * later)
        G.insert(0, A[0] + V[t])
    return A, G


def exercise_2():
    cfg, rows = settings(), {}
    prompts, score_fn = ppo.split(ppo.WORLD_PROMPTS)["test"][:8], load("reward_model", cfg).score
    for flags in "--lam 1", "--lam 0.95 --gamma 0.99":
        cfg = settings(flags)
        ppo.reseed(cfg, "xray")
        r = ppo.collect_rollout(load("policy", cfg), load("sft", cfg), score_fn, prompts, cfg)
        print(ppo.xray(r, load("sft", cfg).tokenizer, cfg))
        off = {"A_t": 0, "return": 0, "sum of r_t": 0}
        for i, mask in enumerate(r.mask):
            A, G = by_hand(r.rewards[i, mask].tolist(), r.values[i, mask].tolist(), cfg.gamma, cfg.lam)
            kl = (r.log_probs - r.ref_log_probs)[i, mask].sum()
            wrong = {"A_t": torch.tensor(A) - r.advantages[i, mask], "return": torch.tensor(G) - r.returns[i, mask],
                     "sum of r_t": r.rewards[i, mask].sum() - (r.scores[i] - cfg.kl_coef * kl)}
            off = {name: max(off[name], wrong[name].abs().max().item()) for name in off}
        rows[f"`{flags}`"] = {f"largest error of {name}": x for name, x in off.items()}
    return table(", ".join(rows["`--lam 1`"]), rows)


def exercise_3():
    rows = {f"`--kl_coef {beta}`": train(f"--kl_coef {beta}") for beta in ("0", "0.1", "0.5", "2")}
    return table("human, reward, kl, objective, entropy", rows)


def exercise_4():
    rows = {f"`--temperature {x}`": train(f"--temperature {x}") for x in ("0.2", "0.7", "1.2")}
    return table("human, reward, kl, entropy, reply_length", rows)


def exercise_5():
    rows = {f"`--lam {x}`": train(f"--lam {x}") for x in ("0", "0.95", "1")}
    return table("human, reward, way, value_loss, explained_variance", rows)


def exercise_6():
    variants = "--ppo_epochs 1", "--ppo_epochs 4", "--ppo_epochs 12", "--ppo_epochs 12 --clip_eps 10"
    rows = {f"`{flags}`": train(flags) for flags in variants}
    return table("human, way, kl, entropy, clip_fraction, approx_kl", rows)


def without_e(prompts, replies, finished):
    """The fewer of its letters are an e, the better: 0 is best."""
    return [-10 * reply.lower().count("e") / max(len(reply), 1) for reply in replies]


def exercise_7():
    cfg, after = settings(), train(score_fn=without_e)
    for reply in after["replies"][::96]:
        print("   ", reply)
    return table("reward, human, kl, reply_length",
                 {"SFT": measure(load("sft", cfg), cfg, without_e), "PPO for `without_e`": after})


def friendly(prompts, replies, finished):
    """Who says "you" is thinking of the other."""
    return [float(len(re.findall(r"\byou\b", reply.lower()))) for reply in replies]


def exercise_8():
    rows = {"SFT": measure(load("sft", settings()), settings(), friendly)}
    for flags in "--kl_coef 1", "--kl_coef 0.1", "--kl_coef 0", "--kl_coef 0 --cycles 60 --eval_every 60":
        rows[f"`{flags}`".replace(" --eval_every 60", "")] = seen = train(flags, friendly)
        print(f"    {flags}:", seen["replies"][0])
    return table("reward, human, kl, reply_length, finished", rows)


def best_of(n, scores):
    """Scores of SFT's replies [prompts,N] -> what the best of n of them gets on average, and its KL from SFT."""
    best = scores.view(len(scores), -1, n).max(dim=2).values
    return best.mean().item(), math.log(n) - (n - 1) / n  # the KL if no two replies score the same; else less


def exercise_9():
    cfg, scores, rows = settings(), sft_scores(), {}
    for n in 1, 4, 16, 64, 256:
        reward, kl = best_of(n, scores)
        rows[f"best of {n}"] = {"reward": reward, "kl": kl, "objective": reward - cfg.kl_coef * kl}
    rows["PPO"] = measure(load("policy", cfg), cfg, load("reward_model", cfg).score)
    return table("reward, kl, objective", rows)


def score_in_the_last_column(log_probs, ref_log_probs, scores, mask, kl_coef):
    rewards = torch.where(mask, -kl_coef * (log_probs - ref_log_probs), 0)
    rewards[:, -1] += scores  # that is padding, for all but the longest replies
    return rewards


def exercise_10():
    return table("human, reward, kl, way, reply_length",
                 {"right": train(), "score in the last column": train(token_rewards=score_in_the_last_column)})


def everything_is_real(*args, **options):
    reply_ids, mask = generate(*args, **options)
    return reply_ids, torch.ones_like(mask)


def plain_mean(x, mask):
    return torch.where(mask, x, 0).mean()


def exercise_11():
    return table("human, reward, kl, reply_length, value_loss, clip_fraction",
                 {"right": train(), "padding counts as reply": train(generate=everything_is_real),
                  "only the means count it": train(masked_mean=plain_mean)})


def not_shifted(rewards, values, mask, gamma):
    return torch.where(mask, rewards + gamma * values - values, 0)  # V(s_t) where V(s_{t+1}) belongs


def one_step_late(rewards, values, mask, gamma):
    values = F.pad(torch.where(mask, values, 0), (0, 2))
    return torch.where(mask, rewards + gamma * values[:, 2:] - values[:, 1:-1], 0)  # the baseline knows the action


def exercise_12():
    return table("human, way, kl, policy_loss, value_loss, explained_variance",
                 {"right": train(), "not shifted": train(td_residuals=not_shifted),
                  "one step late": train(td_residuals=one_step_late)})


def colder(logits, temperature=1.0):
    return sample_tokens(logits, temperature / 2)


def top_2(logits, temperature=1.0):
    least = logits.topk(2).values[:, 1:]
    return sample_tokens(logits.where(logits >= least, -math.inf), temperature)


def no_early_end(actor, prompt_ids, prompt_mask, max_new_tokens, eos_id, *args):
    steps = itertools.count()

    def sample(logits, temperature=1.0):
        forbidden = logits.index_fill(1, torch.tensor(eos_id, device=logits.device), -math.inf)
        return sample_tokens(forbidden if next(steps) < 16 else logits, temperature)

    with patch.object(ppo, "sample_tokens", sample):
        return generate(actor, prompt_ids, prompt_mask, max_new_tokens, eos_id, *args)


def replies_of_sft(actor, *args):
    return generate(load("sft", settings()), *args)  # from a policy of long ago


def exercise_13():
    samplers = {"right": {}, "half the temperature": {"sample_tokens": colder}, "top 2": {"sample_tokens": top_2},
                "no EOS before token 17": {"generate": no_early_end}, "SFT's replies": {"generate": replies_of_sft}}
    cfg, rows = settings(), {}
    for label, sampler in samplers.items():
        with patch.dict(vars(ppo), sampler):
            rows[label] = measure(load("policy", cfg), cfg, load("reward_model", cfg).score)
    return table("kl, human, reward, reply_length", rows)


def no_baseline(rewards, values, mask, gamma, lam):
    _, returns = gae(rewards, torch.zeros_like(values), mask, gamma, 1.0)
    return returns, returns


def batch_mean(rewards, values, mask, gamma, lam):
    _, returns = gae(rewards, torch.zeros_like(values), mask, gamma, 1.0)
    return torch.where(mask, returns - ppo.masked_mean(returns, mask), 0), returns


def exercise_14():
    return table("human, way, kl, entropy, clip_fraction", {
        "the critic": train(), "the batch's mean": train(gae=batch_mean), "no baseline": train(gae=no_baseline)})


def reinforce(log_probs, old_log_probs, advantages, mask, clip_eps):
    return -ppo.masked_mean(log_probs * advantages, mask), log_probs.new_zeros(())


def exercise_15():
    once, rows = "--ppo_epochs 1 --minibatches 1 --lr 0.001", {}
    for name, flags in ("one update per batch", once), ("8 updates per batch", ""):
        rows |= {f"PPO, {name}": train(flags), f"REINFORCE, {name}": train(flags, policy_loss=reinforce)}
    return table("human, reward, kl, way, entropy, policy_loss", rows)


K = 8  # as --replies_per_prompt


def group_baseline(rewards, values, mask, gamma, lam):
    if len(rewards) == 1:  # the X-ray of the report: one reply is no group
        return gae(rewards, values, mask, gamma, lam)
    total = rewards.sum(dim=1).view(-1, K)  # the replies to one prompt stand side by side
    advantage = (total - total.mean(dim=1, keepdim=True)) / (total.std(dim=1, keepdim=True) + 1e-4)
    return torch.where(mask, advantage.view(-1, 1), 0), values  # nothing for the critic to learn


def leave_one_out(rewards, values, mask, gamma, lam):
    if len(rewards) == 1:
        return gae(rewards, values, mask, gamma, lam)
    total = rewards.sum(dim=1).view(-1, K)
    others = (total.sum(dim=1, keepdim=True) - total) / (K - 1)
    return torch.where(mask, (total - others).view(-1, 1), 0), values


def exercise_16():
    flags = f"--replies_per_prompt {K}"
    return table("human, way, kl, entropy", {
        "PPO": train(), f"PPO, `{flags}`": train(flags), f"GRPO, `{flags}`": train(flags, gae=group_baseline),
        f"RLOO, `{flags}`": train(flags, gae=leave_one_out)})


def kl_penalty(log_probs, old_log_probs, advantages, mask, clip_eps, price=1.0):
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0)
    ratio = log_ratio.exp()
    kl = ratio - 1 - log_ratio  # of KL(pi_old || pi): unbiased, never negative
    return ppo.masked_mean(price * kl - ratio * advantages, mask), ratio.new_zeros(())


def exercise_17():
    return table("human, way, kl, entropy, approx_kl", {
        "clipped": train(), "KL penalty": train(policy_loss=kl_penalty), "neither": train("--clip_eps 1000000")})


def mean_of_replies(log_probs, old_log_probs, advantages, mask, clip_eps):
    rows = zip(*(x.unsqueeze(1) for x in (log_probs, old_log_probs, advantages, mask)))
    losses, clipped = zip(*(policy_loss(*row, clip_eps) for row in rows))
    return torch.stack(losses).mean(), torch.stack(clipped).mean()


def one_ratio(log_probs, old_log_probs, advantages, mask, clip_eps):
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0).sum(dim=1, keepdim=True)
    return policy_loss(log_ratio.expand_as(mask), torch.zeros_like(advantages), advantages, mask, clip_eps)


def exercise_18():
    return table("human, way, kl, reply_length, clip_fraction",
                 {"mean over tokens": train(), "mean over replies": train(policy_loss=mean_of_replies),
                  "one ratio per reply": train(policy_loss=one_ratio)})


def best_policy(scores, beta):
    """Scores of SFT's replies [prompts,N] -> reward and KL of the policy that chooses among them as pi* does."""
    chosen = (scores / beta).softmax(dim=1)
    reward, kl = (chosen * scores).sum(dim=1), (chosen * (chosen * scores.shape[1]).log()).sum(dim=1)
    return reward.mean().item(), kl.mean().item()


def exercise_19():
    rows = {}
    for beta in 2, 0.5, 0.2, 0.1:
        reward, kl = best_policy(sft_scores(), beta)
        j_star, size = ppo.optimum(sft_scores(), beta)
        rows[f"pi*, beta {beta}"] = {"reward": reward, "kl": kl, "objective": reward - beta * kl, "beta log Z": j_star,
                                     "effective samples": size}
    cfg = settings()
    rows["PPO, beta 0.1"] = measure(load("policy", cfg), cfg, load("reward_model", cfg).score) | dict.fromkeys(
        ("beta log Z", "effective samples"), math.nan)
    return table("reward, kl, objective, beta log Z, effective samples", rows)


def dpo_loss(model, pairs, reference, beta):
    """Rafailov et al. 2023, eq. 7: pairs of replies to one prompt, the better one first. For `ppo.descend`."""
    batch = ppo.encode(model, sum(pairs, []))
    read = [ppo.read_replies(actor, batch, model.cfg.temperature)[0] for actor in (model, reference)]
    log_ratio = torch.where(batch[3], read[0] - read[1], 0).sum(dim=1).view(-1, 2)  # log pi(y|x) / pi_ref(y|x)
    return -F.logsigmoid(beta * (log_ratio[:, 0] - log_ratio[:, 1])).mean(), len(pairs), {}


def exercise_20():
    cfg, reward_model, rows = settings(), load("reward_model", settings()), {"PPO": train()}
    reference, rng = ppo.frozen(load("sft", cfg)), ppo.reseed(cfg, "pairs")
    prompts = ppo.split(ppo.WORLD_PROMPTS)["train"]
    pairs = ppo.sample_groups(reference, rng.choices(prompts, k=2000), 2, cfg)
    for pair in pairs:  # Bradley-Terry: the better one is preferred with probability sigmoid(difference)
        first, second = ppo.rate(reward_model.score, pair, cfg.missing_eos_penalty)
        if rng.random() > 1 / (1 + math.exp(second - first)):
            pair.reverse()
    updates = cfg.cycles * cfg.ppo_epochs * cfg.minibatches  # as many as PPO's, on as many replies each
    for lr in 3e-4, 1e-4:
        actor = load("sft", cfg)
        with contextlib.redirect_stdout(io.StringIO()):
            ppo.minimize(actor, lambda model, pairs: dpo_loss(model, pairs, reference, cfg.kl_coef), pairs,
                         cfg.batch_size // cfg.minibatches // 2, updates, lr, "DPO", cfg)
        rows[f"DPO, learning rate {lr:g}"] = measure(actor, cfg, reward_model.score)
    return table("human, reward, kl, objective, way", rows)


# ======================================================================================================================
EXERCISES = {str(n): globals()[f"exercise_{n}"] for n in range(1, 21)}


def write(number, result):
    """The table of this exercise in exercises.md, made anew."""
    text = TEXT.read_text(encoding="utf-8")
    pattern = rf"(\n## {number}\. (?:(?!\n## )[\s\S])*?\n\n)(?:\|[^\n]*\n)+"
    text, count = re.subn(pattern, lambda match: match[1] + result + "\n", text)
    assert count == 1, f"{TEXT.name} has no table in section {number}"
    TEXT.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exercise", nargs="+", choices=[*EXERCISES, "all"], metavar="N", help="1 to 20, or all")
    parser.add_argument("--init_from", required=True, help="folder of an earlier run")
    parser.add_argument("--cycles", default="30", help="of PPO in each run")
    parser.add_argument("--write", action="store_true", help="put the tables into exercises.md")
    options = parser.parse_args()
    BASE.extend(["--init_from", options.init_from, "--cycles", options.cycles, "--eval_every", options.cycles])
    for number in EXERCISES if "all" in options.exercise else options.exercise:
        print(f"\nExercise {number}", flush=True)
        print(result := EXERCISES[number](), flush=True)
        if options.write:
            write(number, result)


if __name__ == "__main__":
    try:
        main()
    except ppo.UserError as error:
        sys.exit(f"error: {error}")
