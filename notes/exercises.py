"""The exercises of exercises.md, solved. Each turns a flag or replaces a function, and runs PPO.

    python notes/exercises.py 7 --init_from runs/first              # one of them, or several
    python notes/exercises.py all --init_from runs/first --write    # all; writes the tables

Each solution repeats PPO alone. It starts from the SFT model and the reward model of an earlier run
of the built-in world. It measures the last policy on the prompts of the final test. --write puts
the tables into exercises.md.
"""
import argparse
import contextlib
import io
import json
import math
import re
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where ppo_rlhf.py is
import torch
import torch.nn.functional as F

import ppo_rlhf as ppo

BASE = []  # flags of every run, from the command line
TEXT = Path(__file__).with_suffix(".md")
# The script's own functions, for solutions that take their place and call them.
generate, sample_tokens, assign_rewards = ppo.generate, ppo.sample_tokens, ppo.assign_rewards


# ==================================================================================================
# The laboratory
# ==================================================================================================
def settings(flags=""):
    return ppo.parse_config([*BASE, *flags.split()])


def load(name, cfg):
    """A model of the run that everything starts from."""
    model_class = ppo.RewardModel if name == "reward_model" else ppo.ActorCritic
    return ppo.load_model(model_class, Path(cfg.init_from) / name, cfg)


def measure(actor, cfg, score_fn):
    """What a policy does on the prompts of the final test, 32 replies to each."""
    ppo.reseed(cfg, "report")
    prompts = ppo.split(ppo.WORLD_PROMPTS)["test"]
    lines = ppo.evaluate(actor, load("sft", cfg), score_fn, prompts, 32, cfg)
    report = json.loads((Path(cfg.init_from) / "report.json").read_text())
    sft = report["sft"]["objective"]
    best = report["optimum"]["objective"]
    seen = ppo.column_means(lines)
    seen["way"] = 100 * (seen["objective"] - sft) / (best - sft)
    seen["replies"] = [line["reply"] for line in lines]
    return seen


@cache
def train(flags="", score_fn=None, **functions):
    """PPO with these flags and functions -> what `measure` sees, and means over the training."""
    cfg = settings(flags)
    actor = load("sft", cfg)
    score_fn = score_fn or load("reward_model", cfg).score
    prompts = ppo.split(ppo.WORLD_PROMPTS)
    with patch.dict(vars(ppo), functions), contextlib.redirect_stdout(io.StringIO()):
        log = ppo.train_ppo(actor, ppo.frozen(actor), score_fn, prompts, cfg)
    seen = measure(actor, cfg, score_fn)
    for name in ["policy_loss", "value_loss", "entropy", "clip_fraction", "approx_kl",
                 "explained_variance"]:
        seen[name] = ppo.mean([line[name] for line in log])
    return seen


@cache
def sft_scores(N=256):
    """Scores of N replies of SFT to each test prompt: [prompts,N]."""
    cfg = settings()
    ppo.reseed(cfg, "samples")
    score_fn = load("reward_model", cfg).score
    prompts = ppo.split(ppo.WORLD_PROMPTS)["test"]
    scores = []
    for replies in ppo.sample_groups(load("sft", cfg), prompts, N, cfg):
        scores.append(ppo.score_replies(score_fn, replies, cfg))
    return torch.stack(scores)


# A column of a table: its title, and how many decimals.
COLUMNS = {
    "human": ("human", 2),
    "reward": ("reward", 2),
    "kl": ("KL", 2),
    "objective": ("objective", 2),
    "way": ("% of the way to the optimum", 0),
    "reply_length": ("tokens", 1),
    "entropy": ("entropy", 3),
    "clip_fraction": ("clip_fraction", 3),
    "approx_kl": ("approx_kl", 4),
    "value_loss": ("value_loss", 3),
    "explained_variance": ("explained_variance", 2),
    "policy_loss": ("policy_loss", 3),
    "train": ("reward, sums of the training", 2),
    "test": ("reward, new sums", 2)}


def table(columns, rows):
    """A table in Markdown. rows: the name of a row -> what was measured."""
    columns = columns.split(", ")
    titles, digits = [], {}
    for name in columns:
        title, digits[name] = COLUMNS.get(name, (name, 6 if "error" in name else 2))
        titles.append(title)
    lines = [["", *titles], ["---"] * (len(columns) + 1)]
    for label, seen in rows.items():
        cells = [label]
        for name in columns:
            number = round(seen.get(name, math.nan), digits[name]) + 0.0  # no "-0.00"
            cells.append("" if math.isnan(number) else f"{number:.{digits[name]}f}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compare_flags(columns, *variants):
    """The table of an exercise that only turns flags."""
    return table(columns, {f"`{flags}`": train(flags) for flags in variants})


# ==================================================================================================
# Solutions: the functions as they stand in exercises.md, and what is run with them
# ==================================================================================================
def exercise_1():
    return compare_flags("human, reward, kl, way", "--seed 0", "--seed 1", "--seed 2")


def by_hand(r, V, gamma, lam):
    """One reply's columns r_t and V(s_t), two lists -> its columns A_t and return."""
    A, G = [], []
    next_value, next_advantage = 0, 0  # nothing comes after the last token
    for t in reversed(range(len(r))):
        delta = r[t] + gamma * next_value - V[t]
        advantage = delta + gamma * lam * next_advantage
        A.insert(0, advantage)
        G.insert(0, advantage + V[t])
        next_value, next_advantage = V[t], advantage
    return A, G


def exercise_2():
    rows = {}
    for flags in ["--lam 1", "--lam 0.95 --gamma 0.99"]:
        cfg = settings(flags)
        ppo.reseed(cfg, "xray")
        sft, score_fn = load("sft", cfg), load("reward_model", cfg).score
        prompts = ppo.split(ppo.WORLD_PROMPTS)["test"][:8]
        r = ppo.collect_rollout(load("policy", cfg), sft, score_fn, prompts, cfg)
        print(ppo.xray(r, sft.tokenizer, cfg))
        errors = {"A_t": 0.0, "return": 0.0, "sum of r_t": 0.0}
        for i, mask in enumerate(r.mask):
            rewards, values = r.rewards[i, mask], r.values[i, mask]
            A, G = by_hand(rewards.tolist(), values.tolist(), cfg.gamma, cfg.lam)
            kl = (r.log_probs - r.ref_log_probs)[i].sum()
            differences = {
                "A_t": torch.tensor(A) - r.advantages[i, mask].cpu(),
                "return": torch.tensor(G) - r.returns[i, mask].cpu(),
                "sum of r_t": rewards.sum() - (r.scores[i] - cfg.kl_coef * kl)}
            for name, difference in differences.items():
                errors[name] = max(errors[name], difference.abs().max().item())
        rows[f"`{flags}`"] = {f"largest error of {name}": x for name, x in errors.items()}
    return table(", ".join(rows["`--lam 1`"]), rows)


def exercise_3():
    return compare_flags("human, reward, kl, objective, entropy",
                         "--kl_coef 0", "--kl_coef 0.1", "--kl_coef 0.5", "--kl_coef 2")


def exercise_4():
    return compare_flags("human, reward, kl, entropy, reply_length",
                         "--temperature 0.2", "--temperature 0.7", "--temperature 1.2")


def exercise_5():
    return compare_flags("human, reward, way, value_loss, explained_variance",
                         "--lam 0", "--lam 0.95", "--lam 1")


def exercise_6():
    return compare_flags("human, way, kl, entropy, clip_fraction, approx_kl",
                         "--ppo_epochs 1", "--ppo_epochs 4", "--ppo_epochs 12",
                         "--ppo_epochs 12 --clip_eps 10")


def without_e(completions):
    """The fewer of its letters are an e, the better: 0 is best."""
    scores = []
    for text in completions:
        scores.append(-10 * text.lower().count("e") / max(len(text), 1))
    return scores


def exercise_7():
    cfg = settings()
    after = train(score_fn=without_e)
    for reply in after["replies"][::96]:
        print("   ", reply)
    rows = {
        "SFT": measure(load("sft", cfg), cfg, without_e),
        "PPO for `without_e`": after}
    return table("reward, human, kl, reply_length", rows)


def friendly(completions):
    """Who says "you" is thinking of the other."""
    return [float(len(re.findall(r"\byou\b", text.lower()))) for text in completions]


def exercise_8():
    cfg = settings()
    rows = {"SFT": measure(load("sft", cfg), cfg, friendly)}
    for flags in ["--kl_coef 1", "--kl_coef 0.1", "--kl_coef 0", "--kl_coef 0 --cycles 60"]:
        rows[f"`{flags}`"] = train(flags + " --eval_every 60", friendly)
        print(f"    {flags}:", rows[f"`{flags}`"]["replies"][0])
    return table("reward, human, kl, reply_length, finished", rows)


def best_of(n, scores):
    """Scores of SFT's replies [prompts,N] -> mean score of the best of n of them, and its KL."""
    best = scores.view(len(scores), -1, n).max(dim=2).values
    return best.mean().item(), math.log(n) - (n - 1) / n  # this KL holds if no two scores are equal


def exercise_9():
    cfg, rows = settings(), {}
    for n in [1, 4, 16, 64, 256]:
        reward, kl = best_of(n, sft_scores())
        rows[f"best of {n}"] = {"reward": reward, "kl": kl, "objective": reward - cfg.kl_coef * kl}
    rows["PPO"] = measure(load("policy", cfg), cfg, load("reward_model", cfg).score)
    return table("reward, kl, objective", rows)


def score_in_the_last_column(rollout, cfg):
    rewards = -cfg.kl_coef * (rollout.log_probs - rollout.ref_log_probs)
    rewards[:, -1] += rollout.scores  # this is padding, except for the longest replies
    return rewards


def exercise_10():
    rows = {
        "right": train(),
        "score in the last column": train(assign_rewards=score_in_the_last_column)}
    return table("human, reward, kl, way, reply_length", rows)


def everything_is_real(*args, **options):
    reply_ids, mask = generate(*args, **options)
    return reply_ids, torch.ones_like(mask)


def plain_mean(x, mask):
    return torch.where(mask, x, 0).mean()


def exercise_11():
    rows = {
        "right": train(),
        "padding counts as reply": train(generate=everything_is_real),
        "only the means count it": train(masked_mean=plain_mean)}
    return table("human, reward, kl, reply_length, value_loss, clip_fraction", rows)


def not_shifted(rewards, values, mask, gamma):
    next_values = values  # V(s_t) where V(s_{t+1}) belongs
    return torch.where(mask, rewards + gamma * next_values - values, 0)


def one_step_late(rewards, values, mask, gamma):
    values = F.pad(torch.where(mask, values, 0), (0, 2))
    baseline, next_values = values[:, 1:-1], values[:, 2:]  # the baseline knows the action
    return torch.where(mask, rewards + gamma * next_values - baseline, 0)


def exercise_12():
    rows = {
        "right": train(),
        "not shifted": train(td_residuals=not_shifted),
        "one step late": train(td_residuals=one_step_late)}
    return table("human, way, kl, policy_loss, value_loss, explained_variance", rows)


def colder(logits, temperature=1.0):
    return sample_tokens(logits, temperature / 2)


def top_2(logits, temperature=1.0):
    second = logits.topk(2).values[:, 1:]
    return sample_tokens(logits.where(logits >= second, -math.inf), temperature)


def no_early_end(actor, prompt_ids, prompt_mask, max_new_tokens, eos_id, *args):
    def next_token(ids, mask, cache):
        logits, cache = actor.next_token(ids, mask, cache)
        if mask.shape[1] < prompt_mask.shape[1] + 16:
            logits[:, eos_id] = -math.inf
        return logits, cache

    late = SimpleNamespace(next_token=next_token)  # all that `generate` needs of an actor
    return generate(late, prompt_ids, prompt_mask, max_new_tokens, eos_id, *args)


def replies_of_sft(actor, *args):
    sft = load("sft", settings())  # an old policy
    return generate(sft, *args)


def exercise_13():
    samplers = {
        "right": {},
        "half the temperature": {"sample_tokens": colder},
        "top 2": {"sample_tokens": top_2},
        "no EOS before token 17": {"generate": no_early_end},
        "SFT's replies": {"generate": replies_of_sft}}
    cfg, rows = settings(), {}
    for label, sampler in samplers.items():
        with patch.dict(vars(ppo), sampler):
            rows[label] = measure(load("policy", cfg), cfg, load("reward_model", cfg).score)
    return table("kl, human, reward, reply_length", rows)


def no_baseline(rollout, cfg):
    values = torch.zeros_like(rollout.values)
    _, to_come = ppo.gae(rollout.rewards, values, rollout.mask, cfg.gamma, 1.0)
    return to_come, to_come


def batch_mean(rollout, cfg):
    to_come, _ = no_baseline(rollout, cfg)
    baseline = ppo.masked_mean(to_come, rollout.mask)
    return torch.where(rollout.mask, to_come - baseline, 0), to_come


def exercise_14():
    rows = {
        "the critic": train(),
        "the batch's mean": train(estimate_advantages=batch_mean),
        "no baseline": train(estimate_advantages=no_baseline)}
    return table("human, way, kl, entropy, clip_fraction", rows)


def reinforce(log_probs, rollout, cfg):
    loss = -ppo.masked_mean(log_probs * rollout.advantages, rollout.mask)
    return loss, torch.zeros_like(loss)  # no token is clipped


def exercise_15():
    rows = {}
    for name, flags in [("one update per batch", "--ppo_epochs 1 --minibatches 1 --lr 0.001"),
                        ("8 updates per batch", "")]:
        rows[f"PPO, {name}"] = train(flags)
        rows[f"REINFORCE, {name}"] = train(flags, actor_loss=reinforce)
    return table("human, reward, kl, way, entropy, policy_loss", rows)


def group_baseline(rollout, cfg):
    total = rollout.rewards.sum(dim=1)  # score - beta * KL of the reply                      [B]
    advantages = torch.zeros_like(total)
    for number in rollout.group.unique():
        members = rollout.group == number  # the replies to one prompt
        group = total[members]
        advantages[members] = (group - group.mean()) / (group.std() + 1e-4)
    advantages = torch.where(rollout.mask, advantages.unsqueeze(1), 0)                      # [B,T]
    return advantages, rollout.values  # the critic has nothing to learn


def leave_one_out(rollout, cfg):
    total = rollout.rewards.sum(dim=1)                                                      # [B]
    advantages = torch.zeros_like(total)
    for number in rollout.group.unique():
        members = rollout.group == number
        group = total[members]
        others = (group.sum() - group) / (len(group) - 1)  # for each reply the mean of the others
        advantages[members] = group - others
    advantages = torch.where(rollout.mask, advantages.unsqueeze(1), 0)                      # [B,T]
    return advantages, rollout.values


def exercise_16():
    flags = "--replies_per_prompt 8"
    rows = {
        "PPO": train(),
        f"PPO, `{flags}`": train(flags),
        f"GRPO, `{flags}`": train(flags, estimate_advantages=group_baseline),
        f"RLOO, `{flags}`": train(flags, estimate_advantages=leave_one_out)}
    return table("human, way, kl, entropy", rows)


def kl_penalty(log_probs, rollout, cfg, price=1.0):
    log_ratio = torch.where(rollout.mask, log_probs - rollout.log_probs, 0)
    ratio = log_ratio.exp()
    kl = ratio - 1 - log_ratio  # an estimate of KL(pi_old || pi) that is never negative
    loss = ppo.masked_mean(price * kl - ratio * rollout.advantages, rollout.mask)
    return loss, torch.zeros_like(loss)


def exercise_17():
    rows = {
        "clipped": train(),
        "KL penalty": train(actor_loss=kl_penalty),
        "neither": train("--clip_eps 1000000")}
    return table("human, way, kl, entropy, approx_kl", rows)


def mean_of_replies(log_probs, rollout, cfg):
    losses, fractions = [], []
    for i in range(len(rollout)):
        one = rollout[[i]]
        loss, fraction = ppo.policy_loss(log_probs[[i]], one.log_probs, one.advantages, one.mask,
                                         cfg.clip_eps)
        losses.append(loss)
        fractions.append(fraction)
    return torch.stack(losses).mean(), torch.stack(fractions).mean()


def one_ratio(log_probs, rollout, cfg):
    log_ratio = torch.where(rollout.mask, log_probs - rollout.log_probs, 0)                 # [B,T]
    whole = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)  # each token gets the sum
    return ppo.policy_loss(whole, torch.zeros_like(whole), rollout.advantages, rollout.mask,
                           cfg.clip_eps)


def exercise_18():
    rows = {
        "mean over tokens": train(),
        "mean over replies": train(actor_loss=mean_of_replies),
        "one ratio per reply": train(actor_loss=one_ratio)}
    return table("human, way, kl, reply_length, clip_fraction", rows)


def best_policy(scores, beta):
    """Scores of SFT's replies [prompts,N] -> reward and KL of pi*, which chooses among them."""
    N = scores.shape[1]
    chosen = (scores / beta).softmax(dim=1)  # how often pi* says each reply; SFT says each 1/N
    reward = (chosen * scores).sum(dim=1)
    kl = (chosen * (chosen * N).log()).sum(dim=1)
    return reward.mean().item(), kl.mean().item()


def exercise_19():
    cfg, rows, scores = settings(), {}, sft_scores().double()
    for beta in [2, 0.5, 0.2, 0.1]:
        reward, kl = best_policy(scores, beta)
        j_star, weights = ppo.optimum(scores, torch.zeros_like(scores), beta)
        sizes = scores.shape[1] / (weights ** 2).mean(dim=1)                          # [prompts]
        rows[f"pi*, beta {beta}"] = {
            "reward": reward,
            "kl": kl,
            "objective": reward - beta * kl,
            "beta log Z": j_star.mean().item(),
            "effective samples": sizes.mean().item()}
    rows["PPO, beta 0.1"] = measure(load("policy", cfg), cfg, load("reward_model", cfg).score)
    return table("reward, kl, objective, beta log Z, effective samples", rows)


def dpo_loss(model, pairs, cfg, reference):
    """Rafailov et al. 2023, eq. 7. pairs: two replies to one prompt each, the better one first."""
    replies = []
    for better, worse in pairs:
        replies += [better, worse]
    group = torch.arange(len(replies)) // 2
    rollout = ppo.Rollout(replies, group, *ppo.encode(model, replies))
    log_probs, _, _ = ppo.read_replies(model, rollout, cfg.temperature)                     # [B,T]
    ref_log_probs, _ = ppo.read_without_gradient(reference, rollout, cfg)                   # [B,T]
    log_ratio = torch.where(rollout.mask, log_probs - ref_log_probs, 0).sum(dim=1)          # [B]
    better, worse = log_ratio.view(-1, 2).unbind(dim=1)  # log pi(y|x) - log pi_ref(y|x)
    loss = -F.logsigmoid(cfg.kl_coef * (better - worse)).mean()
    return loss, torch.tensor(len(pairs)), {}


def make_pairs(sft, score_fn, cfg):
    """2000 pairs of SFT's replies. A reward function chooses the better one, and may err."""
    rng = ppo.reseed(cfg, "pairs")
    prompts = rng.choices(ppo.split(ppo.WORLD_PROMPTS)["train"], k=2000)
    pairs = []
    for first, second in ppo.sample_groups(sft, prompts, 2, cfg):
        score, other_score = ppo.score_replies(score_fn, [first, second], cfg)
        chance = torch.sigmoid(score - other_score).item()  # Bradley-Terry
        pairs.append([first, second] if rng.random() < chance else [second, first])
    return pairs


def exercise_20():
    cfg, rows = settings(), {"PPO": train()}
    reference, score_fn = ppo.frozen(load("sft", cfg)), load("reward_model", cfg).score
    pairs = make_pairs(reference, score_fn, cfg)
    steps = cfg.cycles * cfg.ppo_epochs * cfg.minibatches  # as many updates as PPO makes ...
    batch_size = cfg.batch_size // cfg.minibatches // 2    # ... on as many replies each

    def loss_fn(model, part, cfg):
        return dpo_loss(model, part, cfg, reference)

    for lr in [3e-4, 1e-4]:
        actor = load("sft", cfg)
        with contextlib.redirect_stdout(io.StringIO()):
            ppo.train_supervised(actor, loss_fn, pairs, batch_size, steps, lr, "DPO", cfg)
        rows[f"DPO, learning rate {lr:g}"] = measure(actor, cfg, score_fn)
    return table("human, reward, kl, objective, way", rows)


def with_token_price(rollout, cfg, price=0.1):
    rewards = assign_rewards(rollout, cfg)
    return torch.where(rollout.mask, rewards - price, 0)


def exercise_21():
    cfg, rows = settings(), {}
    rows["SFT"] = measure(load("sft", cfg), cfg, load("reward_model", cfg).score)
    rows["price 0"] = train()
    for price in [0.1, 0.5]:
        priced = partial(with_token_price, price=price)
        rows[f"price {price}"] = train(assign_rewards=priced)
    for label, seen in rows.items():
        print(f"    {label}:", seen["replies"][0])
    return table("reply_length, human, reward, kl, helpful, warm", rows)


def right_sum(completions, answer, **others):
    """1 if the reply ends with the answer, which stands in the file of the prompts."""
    scores = []
    for completion, wanted in zip(completions, answer):
        words = completion.strip(" .").split()
        scores.append(float(words[-1:] == [str(wanted)]))
    return scores


def exercise_22():
    """A whole run: its SFT model has read sums, and no English."""
    sums, cycles = Path(__file__).parent / "examples/sums", str(3 * settings().cycles)
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "run")
        with contextlib.redirect_stdout(io.StringIO()):
            ppo.main(["--prompts", str(sums / "prompts.jsonl"), "--demos", str(sums / "demos.jsonl"),
                      "--reward", f"{__file__}:right_sum", "--kl_coef", "0.02", "--cycles", cycles,
                      "--eval_every", cycles, "--out", run])
        cfg = ppo.parse_config(["--init_from", run])
        own = ppo.read_own_data(None, cfg)
        prompts, score_fn = ppo.load_data(own, cfg).prompts, ppo.with_columns(right_sum, own)
        sft = ppo.load_model(ppo.ActorCritic, Path(run) / "sft", cfg)
        policy = ppo.load_model(ppo.ActorCritic, Path(run) / "policy", cfg)
    rows = {}
    for name, model in {"SFT": sft, "PPO": policy}.items():
        ppo.reseed(cfg, "report")
        seen = rows[name] = {}
        for part in ["train", "test"]:
            lines = ppo.evaluate(model, sft, score_fn, prompts[part], 32, cfg)
            seen[part] = ppo.mean([line["reward"] for line in lines])
    return table("train, test", rows)


# ==================================================================================================
EXERCISES = {str(n): globals()[f"exercise_{n}"] for n in range(1, 23)}


def write(number, result):
    """Put the new table of this exercise into exercises.md."""
    text = TEXT.read_text(encoding="utf-8")
    pattern = rf"(\n## {number}\. (?:(?!\n## )[\s\S])*?\n\n)(?:\|[^\n]*\n)+"
    text, count = re.subn(pattern, lambda match: match[1] + result + "\n", text)
    assert count == 1, f"{TEXT.name} has no table in section {number}"
    TEXT.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exercise", nargs="+", choices=[*EXERCISES, "all"], metavar="N",
                        help="1 to 22, or all")
    parser.add_argument("--init_from", required=True, help="folder of an earlier run")
    parser.add_argument("--cycles", default="30", help="of PPO in each run")
    parser.add_argument("--write", action="store_true", help="put the tables into exercises.md")
    options = parser.parse_args()
    BASE.extend(["--init_from", options.init_from, "--cycles", options.cycles,
                 "--eval_every", options.cycles])
    ppo.logging.disable_progress_bar()
    ppo.check((Path(options.init_from) / "report.json").is_file(),
              f"{options.init_from} has no report.json; name the folder of a finished run")
    for number in EXERCISES if "all" in options.exercise else options.exercise:
        print(f"\nExercise {number}", flush=True)
        result = EXERCISES[number]()
        print(result, flush=True)
        if options.write:
            write(number, result)


if __name__ == "__main__":
    try:
        main()
    except ppo.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
