"""The staircase of staircase.md: from REINFORCE to PPO, one change at a time, and what each is for.

    python notes/staircase.py --init_from runs/first             # five seeds; shows the tables
    python notes/staircase.py --init_from runs/first --write     # also writes pages and figure

Every rung repeats PPO's loop from the SFT model and the reward model of one finished run of the
built-in world. A rung replaces up to three of the script's functions; the last one replaces none.
What was measured is kept in RUN/staircase/, a file for each training, so you can stop the program
and go on later; if you change a rung, delete its files. All takes about a quarter of an hour on a
free core. --write needs matplotlib.
"""
import argparse
import ast
import contextlib
import difflib
import inspect
import io
import json
import math
import re
import sys
import textwrap
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where ppo_rlhf.py is
import torch

import ppo_rlhf as ppo
from ppo_rlhf import masked_mean

PAGES = [Path(__file__).with_name("staircase.md"), Path(__file__).with_name("staircase.zh.md")]
# The script's own functions, which the rungs replace.
OWN = {name: getattr(ppo, name) for name in ["token_rewards", "gae", "policy_loss"]}
FIGURES = {".md": "staircase.png", ".zh.md": "staircase.zh.png"}


# ==================================================================================================
# 1  What the rungs put in the place of token_rewards, gae and policy_loss
#
#    Each function has the arguments of the one that it replaces, also if it does not need all.
#    Where it does the same as the script, it has the same lines: the pages show what differs.
# ==================================================================================================
# ---- In place of token_rewards -------------------------------------------------------------------
def score_alone(log_probs, ref_log_probs, scores, mask, kl_coef: float):
    """The score at the last token, and nothing else."""
    score_at_end = torch.zeros_like(log_probs)                                          # [B,T]
    last = mask.sum(dim=1) - 1  # column of the last real token of each reply           # [B]
    score_at_end[torch.arange(len(mask)), last] = scores
    return score_at_end


# ---- In place of gae: advantages and the critic's targets ----------------------------------------
def whole_return(rewards, values, mask, gamma: float, lam: float):
    """R on every token. There is no critic: its target is what it says already."""
    psi = rewards.sum(dim=1, keepdim=True)                                              # [B,1]
    advantages = torch.where(mask, psi, 0)
    return advantages, values


def reward_to_go(rewards, values, mask, gamma: float, lam: float):
    """r_t + ... + r_T: a sum from the right."""
    psi = rewards.flip(1).cumsum(1).flip(1)                                             # [B,T]
    advantages = torch.where(mask, psi, 0)
    return advantages, values


def minus_mean(rewards, values, mask, gamma: float, lam: float):
    """The baseline is one number for the whole batch."""
    psi = rewards.flip(1).cumsum(1).flip(1)                                             # [B,T]
    advantages = torch.where(mask, psi - masked_mean(psi, mask), 0)
    return advantages, values


def minus_value(rewards, values, mask, gamma: float, lam: float):
    """The baseline is V(s_t), and the critic learns the sums of the rewards that came."""
    psi = rewards.flip(1).cumsum(1).flip(1)                                             # [B,T]
    advantages = torch.where(mask, psi - values, 0)
    return advantages, psi


# ---- In place of policy_loss ---------------------------------------------------------------------
def log_prob_loss(log_probs, old_log_probs, advantages, mask, clip_eps: float):
    """REINFORCE: its gradient is the policy gradient of the policy that sampled the batch."""
    loss = -masked_mean(log_probs * advantages, mask)
    return loss, torch.zeros_like(loss)


def ratio_loss(log_probs, old_log_probs, advantages, mask, clip_eps: float):
    """The surrogate without the clip."""
    ratio = torch.exp(torch.where(mask, log_probs - old_log_probs, 0))                  # [B,T]
    unclipped = ratio * advantages
    loss = -masked_mean(unclipped, mask)
    return loss, torch.zeros_like(loss)


# ==================================================================================================
# 2  The rungs
# ==================================================================================================
ONCE = {"ppo_epochs": 1, "minibatches": 1}


class Rung(NamedTuple):
    """One algorithm: its name in two languages, its settings, and what it replaces."""

    name: str
    name_zh: str
    settings: dict
    functions: dict


RUNGS = [
    Rung("REINFORCE", "REINFORCE", ONCE,
         {"token_rewards": score_alone, "gae": whole_return, "policy_loss": log_prob_loss}),
    Rung("reward to go", "后续奖励之和", ONCE,
         {"token_rewards": score_alone, "gae": reward_to_go, "policy_loss": log_prob_loss}),
    Rung("minus the mean", "减去均值", ONCE,
         {"token_rewards": score_alone, "gae": minus_mean, "policy_loss": log_prob_loss}),
    Rung("minus V(s_t)", "减去 V(s_t)", ONCE,
         {"token_rewards": score_alone, "gae": minus_value, "policy_loss": log_prob_loss}),
    Rung("ratio, several epochs", "概率比，多遍使用", {},
         {"token_rewards": score_alone, "gae": minus_value, "policy_loss": ratio_loss}),
    Rung("clip", "裁剪", {}, {"token_rewards": score_alone, "gae": minus_value}),
    Rung("GAE", "GAE", {}, {"token_rewards": score_alone}),
    Rung("KL in the reward: PPO", "KL 进奖励：PPO", {}, {})]
# One that is not on the staircase, to see what the ratio does: 4 without it.
ALGORITHMS = [*RUNGS, Rung("several epochs, no ratio", "多遍使用，不用概率比", {},
                           RUNGS[3].functions)]


# ==================================================================================================
# 3  Trials: the same change where it matters most
#
#    A small world forgives much. Each trial makes one thing harder, for the rung that has the
#    remedy and for the rung below it.
# ==================================================================================================
def with_luck(token_rewards):
    """Every reply gets 3 points or loses 3, by the fall of a coin, at its first token."""
    def lucky(*given):
        rewards = token_rewards(*given)
        coins = torch.randint(2, (len(rewards),), device=rewards.device)
        rewards[:, 0] += 6 * coins - 3
        return rewards
    return lucky


def with_shift(token_rewards):
    """All scores are 5 lower. No reply is better or worse than before, compared with the others."""
    def shifted(log_probs, ref_log_probs, scores, mask, kl_coef):
        return token_rewards(log_probs, ref_log_probs, scores - 5, mask, kl_coef)
    return shifted


class Trial(NamedTuple):
    """The numbers of the algorithms that take part, and what is changed for all of them."""

    rungs: list
    settings: dict = {}
    rewards: object = None  # a function that changes token_rewards


TRIALS = {
    "stairs": Trial([0, 1, 2, 3, 4, 5, 6, 7]),
    "luck": Trial([0, 1], {"lr": 1e-3}, with_luck),
    "shift": Trial([1, 2, 3], {"lr": 1e-3}, with_shift),
    "steps": Trial([3, 8, 4, 5, 6, 7], {"lr": 1e-3}),
    "small": Trial([5, 6], {"batch_size": 16})}


# ==================================================================================================
# 4  The laboratory
# ==================================================================================================
def settings(run: str, cycles: int, seed: int, **changes):
    """The run's settings with these changes. With one validation, the last policy is kept."""
    flags = ["--init_from", run, "--seed", str(seed), "--cycles", str(cycles),
             "--eval_every", str(cycles + 1), "--ent_coef", "0"]  # no rung has the entropy
    for name, value in changes.items():
        flags += [f"--{name}", str(value)]
    return ppo.parse_config(flags)


def load(name: str, cfg):
    """A model of the run that everything starts from."""
    model_class = ppo.RewardModel if name == "reward_model" else ppo.ActorCritic
    return ppo.load_model(model_class, Path(cfg.init_from) / name, cfg)


def learn(rung: Rung, trial: Trial, cfg):
    """Train one rung -> the actor, the rows of its log, and the reward function that it saw."""
    functions = dict(rung.functions)
    if trial.rewards:
        below = functions.get("token_rewards", OWN["token_rewards"])
        functions["token_rewards"] = trial.rewards(below)
    actor, score_fn = load("sft", cfg), load("reward_model", cfg).score
    prompts = ppo.split(ppo.WORLD_PROMPTS)
    with patch.dict(vars(ppo), functions), contextlib.redirect_stdout(io.StringIO()):
        log = ppo.train_ppo(actor, ppo.frozen(actor), score_fn, prompts, cfg)
    return actor, log, score_fn


CURVES = ["reward", "human", "kl", "objective"]
MEASURES = ["objective", "reward", "human", "kl", "entropy", "clip_fraction", "approx_kl"]


def train(run: str, key: str, number: int, seed: int, cycles: int) -> dict:
    """One training: its curves, and what the last policy does on prompts that no stage has seen."""
    rung, trial = ALGORITHMS[number], TRIALS[key]
    cfg = settings(run, cycles, seed, **rung.settings, **trial.settings)
    result = {"trial": key, "rung": number, "seed": seed, "cycles": cycles}
    try:
        actor, log, score_fn = learn(rung, trial, cfg)
    except ppo.UserError as error:  # NaN: the policy broke
        return result | {"broken": str(error)}
    ppo.reseed(cfg, "report")
    test = ppo.split(ppo.WORLD_PROMPTS)["test"]
    lines = ppo.evaluate(actor, load("sft", cfg), score_fn, test, 32, cfg)
    seen = ppo.column_means(lines)
    seen["entropy"] = log[-1]["entropy"]
    for name in ["clip_fraction", "approx_kl"]:
        seen[name] = mean(line[name] for line in log)
    for name in MEASURES:
        result[name] = round(seen[name], 4)
    result["replies"] = [[test[i].strip(), lines[32 * i]["reply"]] for i in (0, 5, 9)]
    result["curves"] = {name: [round(line[name], 4) for line in log] for name in CURVES}
    return result


PSI = {"whole_return": (whole_return, 1.0), "reward_to_go": (reward_to_go, 1.0),
       "minus_mean": (minus_mean, 1.0), "minus_value": (minus_value, 1.0), "gae": (ppo.gae, 0.95)}


def gradients(run: str, seed: int, batches: int = 16, cycles: int = 5) -> dict:
    """Noise and bias of the policy gradient by each Psi_t, from batches of one policy.

    The policy is PPO's after a few cycles. g_k is the gradient that batch k gives, u is the mean
    gradient of minus_value, which has no bias.
    noise  E|g_k - g|^2 / |u|^2  = (sum |g_k|^2 - |sum g_k|^2 / K) / (K-1) / |u|^2
    bias   |g - u|^2 / |u|^2     = (|sum d_k|^2 - sum |d_k|^2) / (K (K-1)) / |u|^2,  d_k = g_k - u_k
    """
    cfg = settings(run, cycles, seed)
    actor, _, score_fn = learn(RUNGS[-1], TRIALS["stairs"], cfg)
    reference, weights = load("sft", cfg), list(actor.lm.parameters())
    rng, K = ppo.reseed(cfg, "gradients"), batches
    sums = {name: [0.0] * 4 for name in PSI}
    for _ in range(K):
        asked = ppo.draw_prompts(ppo.split(ppo.WORLD_PROMPTS)["train"], rng, cfg)
        r = ppo.collect_rollout(actor, reference, score_fn, asked, cfg)
        log_probs, _, _ = ppo.read_replies(actor, r, cfg.temperature)
        found = {}
        for name, (psi, lam) in PSI.items():
            advantages, _ = psi(r.rewards, r.values, r.mask, cfg.gamma, lam)
            loss, _ = log_prob_loss(log_probs, r.log_probs, advantages, r.mask, cfg.clip_eps)
            parts = torch.autograd.grad(loss, weights, retain_graph=True)
            found[name] = torch.cat([part.flatten() for part in parts])
        for name, g in found.items():
            d = g - found["minus_value"]
            sums[name] = [a + b for a, b in zip(sums[name], (g, g @ g, d, d @ d))]
    u, uu, _, _ = sums["minus_value"]
    signal = (u @ u - uu) / (K * (K - 1))
    result = {"trial": "gradients", "seed": seed, "batches": K}
    for name, (g, gg, d, dd) in sums.items():
        noise, bias = (gg - g @ g / K) / (K - 1), (d @ d - dd) / (K * (K - 1))
        result[name] = [round((x / signal).item(), 4) for x in (noise, bias)]
    return result


def kept(run: str, name: str, measure, *given) -> dict:
    """What `measure` returns, from the file of an earlier call if there is one."""
    path = Path(run) / "staircase" / f"{name}.json"
    with ppo.explain(f"{path} cannot be used; delete it, or name another run", OSError, ValueError):
        if path.exists():
            return json.loads(path.read_text())
        path.parent.mkdir(exist_ok=True)
    result = measure(run, *given)
    with ppo.replacing(path) as temporary:
        temporary.write_text(json.dumps(result))
    print(f"measured {name}", flush=True)
    return result


def measure_all(run: str, seeds: int, cycles: int) -> list[dict]:
    """All trainings and all gradients: one seed after the other."""
    results = []
    for seed in range(1, seeds + 1):
        results.append(kept(run, f"gradients-{seed}", gradients, seed))
        for key, trial in TRIALS.items():
            for number in trial.rungs:
                name = f"{key}-{number}-{seed}-{cycles}"
                results.append(kept(run, name, train, key, number, seed, cycles))
    return results


# ==================================================================================================
# 5  The pages: code that ran, tables, figure
# ==================================================================================================
def code(function) -> list[str]:
    """The lines of a function as they run, without its docstring."""
    source = textwrap.dedent(inspect.getsource(function))
    first = ast.parse(source).body[0].body[0]
    lines = source.splitlines()
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        del lines[first.lineno - 1:first.end_lineno]
    return lines


def parts(rung: Rung) -> dict[str, list[str]]:
    """What a rung consists of, as lines: its settings, and its three functions."""
    usual = ppo.PPOConfig()
    lines = {"settings": [f"cfg.{name} = {rung.settings.get(name, getattr(usual, name))}"
                          for name in ONCE]}
    for name, function in OWN.items():
        lines[name] = code(rung.functions.get(name, function))
    return lines


def changes(number: int) -> str:
    """What a rung changes in the one below it, as Markdown. The first one is shown whole."""
    new, blocks = parts(RUNGS[number]), []
    if number == 0:
        for lines in new.values():
            blocks.append("\n".join(lines))
        return "```python\n" + "\n\n".join(blocks) + "\n```"
    old = parts(RUNGS[number - 1])
    for name, lines in new.items():
        if lines != old[name]:
            difference = difflib.ndiff(old[name], lines)
            blocks.append("\n".join(line for line in difference if line[0] != "?"))
    return "```diff\n" + "\n\n".join(blocks) + "\n```"


def error(numbers) -> float:
    """The standard error of the mean."""
    return stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan


def cell(numbers, digits: int = 2) -> str:
    """mean ± standard error; an empty list gives an empty cell."""
    if not numbers:
        return ""
    texts = [f"{round(x, digits) + 0.0:.{digits}f}" for x in (mean(numbers), error(numbers))]
    return texts[0] if texts[1] == "nan" else " ± ".join(texts)


def early(curves: dict) -> float:
    """The mean objective of the first ten batches: how fast a rung learns."""
    return mean(curves["objective"][:10])


SHOWN = [("steps", 4, 1), ("steps", 7, 1)]  # trial, rung and seed whose replies are shown


def record(results: list[dict]) -> list[dict]:
    """What the tables are made of: the results without their curves."""
    lines = []
    for result in results:
        line = {name: x for name, x in result.items()
                if name not in ["curves", "broken", "replies"]}
        if (result["trial"], result.get("rung"), result["seed"]) in SHOWN:
            line["replies"] = result["replies"]
        if "curves" in result:
            line["early"] = round(early(result["curves"]), 4)
        lines.append(line)
    return lines


COLUMNS = {
    "stairs": ["early", "objective", "reward", "human", "kl", "entropy"],
    "luck": ["human", "reward", "kl"],
    "shift": ["human", "reward", "kl", "entropy"],
    "steps": ["objective", "reward", "human", "kl", "entropy", "clip_fraction", "approx_kl"],
    "small": ["early", "objective", "human", "kl"]}
DIGITS = {"entropy": 3, "clip_fraction": 3, "approx_kl": 4}
TITLES = {
    ".md": {"early": "objective, first 10 cycles", "kl": "KL",
            "step": "objective, more than the rung below"},
    ".zh.md": {"early": "目标，前 10 轮", "objective": "目标", "reward": "奖励", "human": "人的评分",
               "kl": "KL", "entropy": "熵", "step": "目标，比前一级高", "noise": "噪声",
               "bias": "偏差"}}


def markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def name_of(number: int, page: str) -> str:
    rung = ALGORITHMS[number]
    return f"{number} {rung.name_zh if page == '.zh.md' else rung.name}"


def table(lines: list[dict], key: str, page: str) -> str:
    """The table of a trial: mean and standard error over the seeds."""
    titles, columns = TITLES[page], COLUMNS[key]
    rows = [["", *[titles.get(name, name) for name in columns]]]
    if key == "stairs":
        rows[0].append(titles["step"])
    below = {}
    for number in TRIALS[key].rungs:
        mine = {line["seed"]: line for line in lines
                if line["trial"] == key and line["rung"] == number and "reward" in line}
        row = [name_of(number, page)]
        for name in columns:
            row.append(cell([line[name] for line in mine.values()], DIGITS.get(name, 2)))
        if key == "stairs":
            row.append(cell([mine[seed]["objective"] - below[seed]["objective"]
                             for seed in mine if seed in below]))
        rows.append(row)
        below = mine
    return markdown(rows)


def gradient_table(lines: list[dict], page: str) -> str:
    """Noise and bias of the gradient by each Psi_t."""
    titles = TITLES[page]
    rows = [["Psi_t", titles.get("noise", "noise"), titles.get("bias", "bias")]]
    for name in PSI:
        found = [line[name] for line in lines if line["trial"] == "gradients"]
        rows.append([f"`{name}`", *[cell([pair[i] for pair in found]) for i in (0, 1)]])
    return markdown(rows)


def replies(lines: list[dict], page: str) -> str:
    """What two policies say to the same prompts: rung 4 with large steps, and PPO with them."""
    shown = []
    for line in lines:
        if "replies" in line:
            shown.append(name_of(line["rung"], page))
            for prompt, reply in line["replies"]:
                shown += textwrap.wrap(f"    {prompt} -> {ppo.one_line(reply)}", 98,
                                       subsequent_indent=" " * 8)
    return "```text\n" + "\n".join(shown) + "\n```"


def blocks(lines: list[dict], page: str) -> dict[str, str]:
    """Everything on a page that is not prose."""
    made = {f"code {number}": changes(number) for number in range(len(RUNGS))}
    for key in TRIALS:
        made[f"table {key}"] = table(lines, key, page)
    made["table gradients"] = gradient_table(lines, page)
    made["replies"] = replies(lines, page)
    if page == ".md":
        rows = [json.dumps(line) for line in lines]
        made["record"] = "```json\n[" + ",\n ".join(rows) + "]\n```"
    return made


def filled(text: str, made: dict[str, str]) -> str:
    """A page with these blocks between its marks <!-- NAME --> and <!-- end -->."""
    for name, block in made.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda match: match[1] + block + "\n" + match[2], text,
                              flags=re.DOTALL)
        ppo.check(count == 1, f"the page has {count} places for '{name}'; it needs one")
    return text


# ---- The figure ----------------------------------------------------------------------------------
# The colours of Okabe and Ito, which colour-blind people can tell apart, and dashes.
STYLES = [("#777777", "-"), ("#E69F00", (0, (4, 3))), ("#56B4E9", "-"), ("#009E73", "-."),
          ("#CC79A7", "-"), ("#D55E00", "--"), ("#0072B2", "-"), ("#000000", "-"),
          ("#777777", ":")]
PANELS = {  # trial and curve -> its place in a grid of 2 times 12, and its titles
    ("stairs", "objective"): ((0, 0), "All rungs: objective = reward − 0.1 KL",
                              "所有台阶：目标 = 奖励 − 0.1 KL"),
    ("stairs", "human"): ((0, 6), "All rungs: human, 4 points at best",
                          "所有台阶：人的评分，满分 4 分"),
    ("luck", "human"): ((1, 0), "A coin adds or takes\n3 points: human", "掷硬币加减 3 分：\n人的评分"),
    ("shift", "human"): ((1, 3), "All scores 5 lower:\nhuman", "分数一律减 5：\n人的评分"),
    ("steps", "human"): ((1, 6), "Learning rate 0.001: human\n(8 is 4 without the ratio)",
                         "学习率 0.001：人的评分\n（8：第 4 级去掉概率比）"),
    ("steps", "kl"): ((1, 9), "Learning rate 0.001:\nKL in nats, per reply",
                      "学习率 0.001：\n每条回复的 KL（nat）")}


def chinese_font():
    """Make a Chinese font known to matplotlib -> its name, or None if this machine has none."""
    from matplotlib import font_manager
    for path in font_manager.findSystemFonts():
        if re.search(r"NotoSans(CJK|SC)-?\w*Regular|wqy|simhei|msyh|PingFang", path, re.IGNORECASE):
            font_manager.fontManager.addfont(path)
            return font_manager.FontProperties(fname=path).get_name()


def spread(heights: list[float], gap: float) -> list[float]:
    """Move the heights of labels apart until no two are nearer than this gap."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for _ in range(200):
        for low, high in zip(order, order[1:]):
            lack = gap - (moved[high] - moved[low])
            if lack > 0:
                moved[low] -= lack / 2
                moved[high] += lack / 2
    return moved


def weight(page: str) -> str:
    """Bold letters; the Chinese font has none."""
    return "normal" if page == ".zh.md" else "bold"


def label(number: int, page: str) -> str:
    """The name of a rung, short enough to stand beside its curve."""
    return re.sub(r"[,，:：].*| in the reward| the(?= mean)", "", name_of(number, page))


def draw_panel(ax, results: list[dict], key: str, curve: str, page: str):
    """Mean and range over the seeds of every rung in a trial, with its name at the end."""
    ends = {}
    for number in TRIALS[key].rungs:
        rows = [result["curves"][curve] for result in results if "curves" in result
                and result["trial"] == key and result["rung"] == number]
        if rows:
            color, dash = STYLES[number]
            by_cycle = list(zip(*rows))
            cycles = range(1, len(by_cycle) + 1)
            ax.fill_between(cycles, [min(x) for x in by_cycle], [max(x) for x in by_cycle],
                            color=color, alpha=0.12, lw=0)
            means = [mean(x) for x in by_cycle]
            ax.plot(cycles, means, color=color, linestyle=dash, lw=2.4)
            ends[number] = (cycles[-1], means[-1])
    if curve == "kl":
        ax.set_yscale("symlog", linthresh=1)  # KL begins with 0
        ax.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    ax.margins(x=0.01)
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = spread([to_axes.transform(end)[1] for end in ends.values()], 0.075)
    for (number, end), height in zip(ends.items(), heights):
        text = label(number, page) if key == "stairs" else str(number)
        ax.annotate(text, end, (1.04 if key == "stairs" else 1.07, height), "data", ax.transAxes,
                    color=STYLES[number][0], fontsize=15, fontweight=weight(page), va="center",
                    annotation_clip=False, arrowprops={"arrowstyle": "-", "lw": 0.9,
                    "color": STYLES[number][0], "shrinkA": 1, "shrinkB": 1,
                    "relpos": (0, 0.5)})  # from the left end of the name, else it crosses it
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=12)


def figure(results: list[dict], page: str, path: Path):
    """All curves in one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    chinese = page == ".zh.md"
    font = chinese_font() if chinese else "DejaVu Sans"
    ppo.check(font, "no Chinese font found for staircase.zh.png; install Noto Sans CJK")
    with plt.rc_context({"font.family": [font, "DejaVu Sans"], "axes.unicode_minus": False}):
        picture = plt.figure(figsize=(17, 10.5))
        grid = picture.add_gridspec(2, 48, left=0.04, right=0.985, top=0.95, bottom=0.06,
                                    hspace=0.42, wspace=0, height_ratios=[1.25, 1])
        for (key, curve), ((row, first), *titles) in PANELS.items():
            width = 17 if row == 0 else 9
            ax = picture.add_subplot(grid[row, 4 * first:4 * first + width])
            draw_panel(ax, results, key, curve, page)
            ax.set_title(titles[chinese], fontsize=15, fontweight=weight(page), loc="left")
            ax.set_xlabel("轮" if chinese else "cycle", fontsize=12)
        picture.savefig(path, dpi=75)
        plt.close(picture)


# ==================================================================================================
def write(results: list[dict]):
    """Put code, tables, record and figure into both pages."""
    lines = record(results)
    for page in PAGES:
        suffix = page.name.removeprefix("staircase")
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text, blocks(lines, suffix)), encoding="utf-8")
        figure(results, suffix, page.parent / "figures" / FIGURES[suffix])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = ppo.refuse
    parser.add_argument("--init_from", required=True, help="folder of a finished run")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each rung, at least 1")
    parser.add_argument("--cycles", type=int, default=30, help="of each training, at least 10")
    parser.add_argument("--write", action="store_true", help="write both pages and the figure")
    options = parser.parse_args(argv)
    ppo.check(options.seeds >= 1, f"--seeds must be 1 or more, not {options.seeds}")
    ppo.check(options.cycles >= 10, f"--cycles must be 10 or more, not {options.cycles}")
    cfg = settings(options.init_from, options.cycles, 1)
    reward_model = Path(cfg.init_from) / "reward_model/heads.safetensors"
    ppo.check(reward_model.is_file() and not cfg.prompts,
              f"--init_from {cfg.init_from} has no reward model of the built-in world; name the "
              "folder of a finished run without data of its own")
    ppo.check(cfg.gamma == 1 and cfg.lam == 0.95,
              f"--init_from {cfg.init_from} has another gamma or lam than the default; name a run "
              "with the default settings")
    if options.write:
        with ppo.explain("--write needs matplotlib: pip install matplotlib", ImportError):
            import matplotlib  # noqa: F401
    ppo.logging.disable_progress_bar()
    torch.set_num_threads(1)  # with two, the last digits differ, and so does what grows from them
    results = measure_all(options.init_from, options.seeds, options.cycles)
    lines = record(results)
    for key in TRIALS:
        print(f"\n{key}\n{table(lines, key, '.md')}")
    print(f"\ngradients\n{gradient_table(lines, '.md')}")
    if options.write:
        write(results)


if __name__ == "__main__":
    try:
        main()
    except ppo.UserError as error_:
        print(f"error: {error_}", file=sys.stderr)
        sys.exit(2)
