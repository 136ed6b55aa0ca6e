"""The articles' claims, put to the test: variants of PPO, five seeds each, against the script's defaults.

    python notes/experiments.py base               # five runs up to the reward model; all variants start from them
    python notes/experiments.py run                # every variant and seed not done yet; stop it and go on at will
    python notes/experiments.py run beta lam_0     # only some topics or variants
    python notes/experiments.py write              # the results -> notes/experiments.md and notes/figures/
    python notes/experiments.py show               # prints the results of every run, and the tables made of them

A variant is an entry of the table in section 2: flags, and functions of ppo_rlhf.py that are replaced by those of
section 1. Each run is a process of its own, on one thread, and repeats only PPO, in 30 cycles. The claims are typed in,
the verdicts are computed (section 4). To try something out:

    python notes/experiments.py run beta --seeds 1 --flags "--cycles 3 --report_batches 1" --folder runs/trial

(after `base` with the same --seeds and --folder). Needs Linux or macOS; the figures need matplotlib.
"""
import argparse
import copy
import csv
import io
import json
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter, namedtuple
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: one thread per run, several runs at a time
NOTES = Path(__file__).resolve().parent
sys.path.insert(0, str(NOTES.parent))
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import ppo_rlhf as ppo  # noqa: E402

own = SimpleNamespace(**vars(ppo))  # the script's own functions, for replacements that build on them


# ======================================================================================================================
# 1  Replacements: each has the signature of the function in ppo_rlhf.py whose place it takes
# ======================================================================================================================
# ---- actor_loss: other ways to stay near the old policy (T3, T4) -----------------------------------------------------
def rho(log_probs, rollout):
    return torch.exp(torch.where(rollout.mask, log_probs - rollout.log_probs, 0))                       # [B,T]


def unclipped(log_probs, rollout, cfg):
    """L = -mean_t rho_t * A_t"""
    surrogate = rho(log_probs, rollout) * rollout.advantages
    return -ppo.masked_mean(surrogate, rollout.mask), torch.zeros(())


def clip_without_min(log_probs, rollout, cfg):
    """L = -mean_t clip(rho_t, 1-eps, 1+eps) * A_t: a token that went too far the wrong way cannot come back."""
    ratio = rho(log_probs, rollout)
    clipped = ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps)
    loss = -ppo.masked_mean(clipped * rollout.advantages, rollout.mask)
    return loss, ppo.masked_mean((clipped != ratio).float(), rollout.mask)


penalty = SimpleNamespace(weight=1.0, target=0.01)  # c, and the KL per token that the adaptive one aims at


def penalty_to_old(log_probs, rollout, cfg):
    """L = -mean_t (rho_t * A_t - c * KL_t),  KL_t = rho_t - 1 - log rho_t, whose mean is KL(pi_old || pi)"""
    ratio = rho(log_probs, rollout)
    kl = ratio - 1 - ratio.log()
    return -ppo.masked_mean(ratio * rollout.advantages - penalty.weight * kl, rollout.mask), torch.zeros(())


def adapting_penalty(actor, optimizer, rollout, cfg):
    """update_policy, then c doubles if KL > 1.5 * target and halves if KL < target / 1.5 (PPO paper, section 4)."""
    metrics = own.update_policy(actor, optimizer, rollout, cfg)
    ratio = metrics["approx_kl"] / penalty.target
    if ratio > 1.5:
        penalty.weight *= 2
    elif ratio < 1 / 1.5:
        penalty.weight /= 2
    return metrics


def ratio_to_reference(log_probs, rollout, cfg):
    """The clipped surrogate with rho_t = pi / pi_ref, as B says it: the denominator never moves (T5)."""
    return own.policy_loss(log_probs, rollout.ref_log_probs, rollout.advantages, rollout.mask, cfg.clip_eps)


# ---- assign_rewards and actor_loss: KL in the loss and not in the reward (T6) ----------------------------------------
def score_only(rollout, cfg):
    """r_T = r_RM, nothing else."""
    return own.token_rewards(rollout.log_probs, rollout.ref_log_probs, rollout.scores, rollout.mask, kl_coef=0.0)


def kl_in_loss(estimate):
    """L = C_clip + beta * mean_t estimate(log pi - log pi_ref)"""
    def actor_loss(log_probs, rollout, cfg):
        loss, clip_fraction = own.actor_loss(log_probs, rollout, cfg)
        kl = estimate(torch.where(rollout.mask, log_probs - rollout.ref_log_probs, 0))
        return loss + cfg.kl_coef * ppo.masked_mean(kl, rollout.mask), clip_fraction
    return actor_loss


def k2(x):
    """x^2 / 2: its gradient, averaged over tokens drawn from pi, is that of KL(pi || pi_ref) at these states."""
    return x ** 2 / 2


def k3(x):
    """exp(-x) - 1 + x, as in GRPO: its mean is the KL, but its gradient is that of KL(pi_ref || pi)."""
    return torch.exp(-x) - 1 + x


# ---- update_policy: beta follows the KL (T6) -------------------------------------------------------------------------
def kl_target(target):
    """update_policy, then beta changes, by at most 2%, so that the KL of a reply comes nearer to its target.

    The column kl_coef of metrics.csv has the beta of the next cycle, and the other columns of this line use it too.
    """
    def update_policy(actor, optimizer, rollout, cfg):
        metrics = own.update_policy(actor, optimizer, rollout, cfg)
        kl = (rollout.log_probs - rollout.ref_log_probs).sum(dim=1).mean().item()
        error = min(max(kl / target - 1, -0.2), 0.2)
        cfg.kl_coef *= 1 + 0.1 * error
        return metrics
    return update_policy


def keep_the_latest(objectives, log):
    """worth_keeping: objectives under different betas cannot be compared."""
    return True


# ---- assign_rewards and critic_loss: whitened rewards (N7), clipped values (S6) --------------------------------------
def white_rewards(rollout, cfg):
    """Token rewards with variance 1. They keep their mean."""
    rewards = own.assign_rewards(rollout, cfg)
    mean, _ = own.moments(rewards, rollout.mask)
    return torch.where(rollout.mask, own.whiten(rewards, rollout.mask) + mean, 0)


def clipped_values(values, rollout, cfg):
    """The critic's loss with value clipping: the larger one of two errors. epsilon is that of the policy."""
    near = rollout.values + (values - rollout.values).clamp(-cfg.clip_eps, cfg.clip_eps)
    error = torch.where(rollout.mask, values - rollout.returns, 0) ** 2
    near_error = torch.where(rollout.mask, near - rollout.returns, 0) ** 2
    return 0.5 * own.masked_mean(torch.max(error, near_error), rollout.mask)


# ---- estimate_advantages: other things to multiply grad log pi with (T1, T2); the critic, if it is used, learns the
#      same
def monte_carlo_returns(rollout, cfg):
    """G_t with lambda = 1: the sum of the rewards from t on."""
    _, returns = own.gae(rollout.rewards, rollout.values, rollout.mask, cfg.gamma, 1.0)
    return returns


def whole_reply(rollout, cfg):
    """Psi_t = sum of all rewards of the reply: vanilla policy gradient, and D's pseudo-code."""
    total = rollout.rewards.sum(dim=1, keepdim=True)                                                    # [B,1]
    return torch.where(rollout.mask, total, 0), monte_carlo_returns(rollout, cfg)


def reward_to_go(rollout, cfg):
    """Psi_t = sum of the rewards from t on. GAE with lambda = 1 is the same minus V(s_t)."""
    returns = monte_carlo_returns(rollout, cfg)
    return returns, returns


def group_baseline(rollout, cfg):
    """Psi_t = reward of the reply - mean reward of the other replies to the same prompt: no critic (L5; RLOO, GRPO)."""
    totals = rollout.rewards.sum(dim=1)                                                                 # [B]
    same_prompt = rollout.group.unsqueeze(0) == rollout.group.unsqueeze(1)                              # [B,B]
    others = same_prompt.float().fill_diagonal_(0)
    baselines = others @ totals / others.sum(dim=1)
    advantages = (totals - baselines).unsqueeze(1)                                                      # [B,1]
    return torch.where(rollout.mask, advantages, 0), monte_carlo_returns(rollout, cfg)


# ---- train_ppo: the same with another critic (T7, N6) ----------------------------------------------------------------
class FreeHead(ppo.ActorCritic):
    """Gives its head the policy's last layer, not detached, and the text: the head may read it by itself."""

    def forward(self, prompt_ids, prompt_mask, reply_ids, reply_mask):
        T = reply_ids.shape[1]
        mask = torch.cat([prompt_mask, reply_mask], dim=1)                                              # [B,P+T]
        text = {"input_ids": torch.cat([prompt_ids, reply_ids], dim=1)[:, :-1],
                "attention_mask": mask[:, :-1].long(), "position_ids": ppo.position_ids(mask)[:, :-1]}
        out = self.lm(**text, logits_to_keep=T, output_hidden_states=True, use_cache=False)
        values = self.head(out.hidden_states[-1], text)[:, -T:].squeeze(-1)                             # [B,T]
        return out.logits.float(), values


class Shared(nn.Linear):
    """V(s_t) = w . h_t + b: the value loss changes the layers that the policy uses."""

    def __init__(self, actor):
        super().__init__(actor.lm.config.hidden_size, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden, text):
        return super().forward(hidden)                                                                  # [B,P+T-1,1]


class Separate(nn.Module):
    """V(s_t) from a language model of its own, which shares nothing with the policy; a copy of another model's."""

    def __init__(self, model):
        super().__init__()
        self.body = copy.deepcopy(model.lm.base_model).requires_grad_()
        self.head = copy.deepcopy(model.head).requires_grad_()

    def forward(self, hidden, text):
        return self.head(self.body(**text, use_cache=False).last_hidden_state)                          # [B,P+T-1,1]


def with_critic(make):
    """train_ppo with the critic that make(actor, reward model) returns."""
    def train_ppo(actor, reference, score_fn, prompts, cfg):
        actor.head, actor.__class__ = make(actor, score_fn.__self__), FreeHead
        return own.train_ppo(actor, reference, score_fn, prompts, cfg)
    return train_ppo


# ---- train_ppo: no training, but something to measure; the measurements take the place of the rows of metrics.csv ----
def best_of_n(actor, reference, score_fn, prompts, cfg, N=256):
    """The best of n replies of SFT, n = 1 ... 64, and KL(best of n || SFT) <= log n - (n-1)/n.

    Of N sampled replies, sorted by the model's score, the i-th (from 0) is the best of n random ones with probability
    C(i, n-1) / C(N, n).
    """
    table = ppo.evaluate(actor, reference, score_fn, prompts["test"], N, cfg)
    groups = [sorted(lines, key=lambda line: line["reward"]) for lines in ppo.chunks(table, N)]
    spread = {f"{name}_spread": stdev(line[name] for line in table) for name in ("reward", "human")}
    log = []
    for n in 1, 2, 4, 8, 16, 32, 64:
        chance = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
        row = {name: mean([sum(p * line[name] for p, line in zip(chance, lines)) for lines in groups])
               for name in ("reward", "human", "reply_length")}
        log.append({"seconds": 0.0, "kl": math.log(n) - (n - 1) / n, **row, **spread})
    ppo.write_metrics(log, cfg)

    def make_report(*given):  # with the best of 64 as what "ppo" has achieved
        report = own.make_report(*given)
        report["ppo"]["length"] = log[-1]["reply_length"]
        report["ppo"].update({name: log[-1][name] for name in ("human", "reward", "kl")})
        return report
    ppo.make_report = make_report
    return log


ESTIMATES = {"psi_whole_reply": (whole_reply, 1.0), "psi_reward_to_go": (reward_to_go, 1.0),
             "psi_lambda_1": (own.estimate_advantages, 1.0), "psi_lambda_0.95": (own.estimate_advantages, 0.95),
             "psi_lambda_0.5": (own.estimate_advantages, 0.5), "psi_lambda_0": (own.estimate_advantages, 0.0)}


def gradients(actor, reference, score_fn, prompts, cfg, K=32):
    """Noise and bias of the policy gradient by each Psi_t, from K batches of one policy, after a few cycles of PPO.

    g_k    the gradient that batch k gives; g is its expectation, u that of psi_lambda_1, which is unbiased
    noise  E|g_k - g|^2 / |u|^2     = (sum |g_k|^2 - |sum g_k|^2 / K) / (K-1) / |u|^2
    bias   |g - u|^2 / |u|^2        = (|sum d_k|^2 - sum |d_k|^2) / (K (K-1)) / |u|^2 with d_k = g_k - u_k
    """
    log, rng = own.train_ppo(actor, reference, score_fn, prompts, cfg), ppo.reseed(cfg, "gradients")
    weights, sums = list(actor.lm.parameters()), {name: [0.0] * 4 for name in ESTIMATES}
    for _ in range(K):
        rollout = ppo.collect_rollout(actor, reference, score_fn, rng.choices(prompts["train"], k=cfg.batch_size), cfg)
        log_probs, _, _ = ppo.read_replies(actor, rollout, cfg.temperature)
        grads = {}
        for name, (estimate, lam) in ESTIMATES.items():
            rollout.advantages, _ = estimate(rollout, replace(cfg, lam=lam))
            loss, _ = own.actor_loss(log_probs, rollout, cfg)  # at rho = 1 its gradient is -psi grad log pi
            grads[name] = nn.utils.parameters_to_vector(torch.autograd.grad(loss, weights, retain_graph=True))
        for name, g in grads.items():
            d = g - grads["psi_lambda_1"]
            sums[name] = [a + b for a, b in zip(sums[name], (g, g @ g, d, d @ d))]
    u, uu, _, _ = sums["psi_lambda_1"]
    signal = (u @ u - uu) / (K * (K - 1))
    log = [{"name": name, "seconds": 0.0, "noise": ((gg - g @ g / K) / (K - 1) / signal).item(),
            "bias": ((d @ d - dd) / (K * (K - 1)) / signal).item() if name != "psi_lambda_1" else 0.0}
           for name, (g, gg, d, dd) in sums.items()]
    with open(Path(cfg.out, "metrics.csv"), "w", newline="") as file:  # write_metrics knows numbers only
        writer = csv.DictWriter(file, log[0])
        writer.writeheader()
        writer.writerows(log)
    return log


# ---- Smaller ones ----------------------------------------------------------------------------------------------------
def ask_with_bug(score_fn, replies):
    """ask_score_fn: a reward model that likes one word, 3 points each time it occurs (P1; D's "hahaha")."""
    scores = own.ask_score_fn(score_fn, replies)
    return [score + 3 * len(re.findall(r"\bwalk\b", reply.text)) for score, reply in zip(scores, replies)]


def ask_plus_5(score_fn, replies):
    """ask_score_fn: a reward model whose mean was never set to zero (N5)."""
    return [score + 5 for score in own.ask_score_fn(score_fn, replies)]


def update_with_dropout(actor, optimizer, rollout, cfg):
    """update_policy in training mode: GPT-2's dropout of 0.1, which the old log-probs have not seen (N8)."""
    actor.lm.train()
    metrics = own.update_policy(actor, optimizer, rollout, cfg)
    actor.lm.eval()
    return metrics


def by_sequence(x, mask):
    """masked_mean: mean_b (1/T_b sum_t x_bt). Every reply counts the same, so a token of a long one counts little (T8).
    """
    return (torch.where(mask, x, 0).sum(dim=1) / mask.sum(dim=1)).mean()


TEXTS = {name: ppo.write_texts(random.Random(0), prompts, ppo.PRETRAIN_MIX, 2000)  # like those of stage 0
         for name, prompts in ppo.split(ppo.WORLD_PROMPTS).items()}


def step_with_texts(model, optimizer, loss_fn, batch, cfg):
    """optimizer_step on L + 0.1 * L_imitation(as many pretraining texts): PPO-ptx (N10)."""
    def loss_with_texts(model, part, cfg):
        loss, count, metrics = loss_fn(model, part, cfg)
        numbers = torch.randint(len(TEXTS["train"]), [len(part)])
        imitation, _, _ = ppo.imitation_loss(model, [TEXTS["train"][i] for i in numbers], cfg)
        return loss + 0.1 * imitation, count, metrics
    return own.optimizer_step(model, optimizer, loss_with_texts, batch, cfg)


def loss_without_eos(actor, replies, cfg):
    """imitation_loss where padding is EOS: masking out the one masks out the other (N1)."""
    return own.imitation_loss(actor, [reply._replace(finished=False) for reply in replies], cfg)


def again(*stages):
    """finished_model: these stages are repeated, though the run that all start from has their models."""
    return lambda name, cfg: None if name in stages else own.finished_model(name, cfg)


# ======================================================================================================================
# 2  The table: what is claimed, what tests it, what is to be seen if it is true
# ======================================================================================================================
# claim     its letter names the article           beside    rows taken from elsewhere
# measures  columns of the table, see MEASURES     curves    learning curves to draw
# expect    predictions: variant, measure, < or > or = or ! (unlike), and a variant or a number
# note      how to read it: nothing that the next run could make untrue
Topic = namedtuple("Topic", "ids title variants claim measures expect note beside curves", defaults=("default", ""))
TOPICS = {}


def topic(key, ids, title, variants, text):
    fields = re.findall(r"^(\w+)\s+(.+(?:\n .+)*)", text, re.MULTILINE)
    TOPICS[key] = Topic(ids, title, variants, **{name: " ".join(lines.split()) for name, lines in fields})


def v(flags="", **swap):
    """A variant: flags, and function of ppo_rlhf.py = its replacement."""
    return flags.split(), swap


BLIND = "--rankings 50 --label_noise 2"  # a human who is asked seldom and is very unsure
RELABEL = {"finished_model": again("reward_model"), "FIXED": {}}  # stage 2 is repeated, so its settings are free
VANILLA = "--ppo_epochs 1 --minibatches 1 --lr 1e-3 --lam 1"  # one update per batch: the ratio is 1
usual = ppo.Config
topic("cycles", "L1", "Are 30 cycles enough?", {"default": v(), "cycles_60": v("--cycles 60")}, """
claim     Ours: 30 cycles end where 60 do.
measures  fraction human kl seconds
expect    cycles_60 fraction = default
note      The learning rate falls to zero over the run, however long that is. All variants are run for 30, to save
          time: what is slower than the default can come out lower for that alone.""")
topic("pipeline", "L2, L6, L7", "Three models, on prompts that no stage has seen", {}, """
claim     D: the pretrained model has no manners; SFT is correct but mechanical; PPO is warm and useful, and more
          helpful, honest and harmless, on questions it was never trained on too.
beside    pretrained sft default
measures  helpful warm honest harmless human kl
expect    sft human > pretrained; default helpful > sft; default warm > sft; default honest > sft;
          default harmless > sft
note      These are the base runs and `default`.""")
topic("beta", "S2, P2", "The price of KL", {
    f"kl_{beta}": v(f"--kl_coef {beta}") for beta in ("0", "0.001", "0.02", "0.5")}, f"""
claim     D: with beta too small (0.001) the scores rise and the language collapses; too large (0.1), the model dares
          not move, as if it had not been trained. Recommended: 0.01 to 0.04.
beside    sft default
measures  human reward kl length entropy collapsed
curves    human kl
expect    kl_0.001 reward > default; kl_0.001 human < default; kl_0 human < default; kl_0.02 human > default;
          default human = sft; kl_0.5 human = sft; kl_0 kl > default; default kl > kl_0.5
note      The default is {usual.kl_coef}. Every beta has an optimum of its own, so no fractions here. And beta has a
          unit, that of the reward, which is one standard deviation of SFT's replies here: compare betas only together
          with it.""")
topic("hacking", "P1, P2", "Reward hacking", {
    **{f"bug_kl_{beta}": v(f"--kl_coef {beta}", ask_score_fn=ask_with_bug) for beta in ("0", "0.02", "0.1", "0.5")},
    **{f"blind_kl_{beta}": v(f"--kl_coef {beta} {BLIND}", **RELABEL) for beta in ("0", "0.1", "0.5")},
    "best_of_64": v(train_ppo=best_of_n), "best_of_64_bug": v(train_ppo=best_of_n, ask_score_fn=ask_with_bug),
    "best_of_64_blind": v(BLIND, train_ppo=best_of_n, **RELABEL)}, """
claim     D: if the reward model has a bug and likes "hahaha", then without KL the model learns to repeat "ha"; with KL
          it dares not go so far from SFT. A correlation with the human below 0.7 gives a bad reward model away.
beside    sft default
measures  human reward kl length correlation collapsed
expect    bug_kl_0 reward > bug_kl_0.1; bug_kl_0 human < bug_kl_0.1; bug_kl_0.1 human = default;
          blind_kl_0 human < blind_kl_0.1; bug_kl_0 correlation < 0.7; blind_kl_0 correlation < 0.7
note      bug: 3 points for every "walk". blind: 50 rankings by a very unsure human. The correlation is measured on
          SFT's replies, so it cannot show a hole that only PPO falls into. Best of n: sample n replies from SFT, keep
          the one that scores best, no training; its KL is a bound, log n - (n-1)/n.""")
topic("labels", "P1, L3", "How many labels the reward model needs", {
    f"labels_{n}": v(f"--rankings {n}", **RELABEL) for n in (50, 150, 500, 5000)}, f"""
claim     D: 30,000 to 50,000 rankings; with a bad reward model PPO begins to talk nonsense.
beside    blind_kl_0.1 default
measures  correlation accuracy human reward kl
expect    labels_50 correlation < default; labels_50 human < default; labels_500 human = default;
          labels_5000 human = default; blind_kl_0.1 human < default
note      The default is {usual.rankings}. What a real task needs is another number: this world has a few dozen
          sentences.""")
topic("kl_in_loss", "T6", "KL in the loss, and KL with a target", {
    "kl_in_loss": v(assign_rewards=score_only, actor_loss=kl_in_loss(k2)),
    "kl_in_loss_k3": v(assign_rewards=score_only, actor_loss=kl_in_loss(k3)),
    "kl_target_1": v("--cycles 120", update_policy=kl_target(1.0), worth_keeping=keep_the_latest)}, """
claim     C: KL may be subtracted from the reward or be a penalty in the loss, both have been used with success; an
          adaptive beta keeps KL near its target.
measures  fraction human reward kl
expect    kl_in_loss fraction = default; kl_in_loss_k3 fraction = default; kl_target_1 kl = 1
note      In the loss a token pays for its own KL; in the reward also for that of the tokens it leads to. Beta adapts
          by 2% per cycle at most, so kl_target_1 has 120 cycles.""")
topic("clipping", "T3, T4, S6, P3", "Clipping, and what else could hold the policy back", {
    "eps_0.05": v("--clip_eps 0.05"), "eps_1": v("--clip_eps 1"), "unclipped": v(actor_loss=unclipped),
    "unclipped_16": v("--ppo_epochs 16", actor_loss=unclipped), "unclipped_lr": v("--lr 3e-3", actor_loss=unclipped),
    "no_min": v(actor_loss=clip_without_min), "penalty": v(actor_loss=penalty_to_old),
    "penalty_adaptive": v(actor_loss=penalty_to_old, update_policy=adapting_penalty)}, """
claim     C, after the PPO paper: clipping is more stable and clearly better than nothing and than a KL penalty to the
          old policy, fixed or adaptive; unclipped updates are destructive; the min lets mistakes be undone. D: epsilon
          0.1 to 0.3.
beside    default epochs_16 lr_x10
measures  fraction early kl swing collapsed
expect    unclipped fraction < default; unclipped_16 fraction < epochs_16; unclipped_lr fraction < lr_x10;
          penalty fraction < default; penalty_adaptive fraction < default; no_min fraction < default;
          eps_1 fraction < default; eps_0.05 early < default
note      A clip can only matter where one cycle moves far: unclipped_16 and unclipped_lr take 16 epochs and ten
          times the learning rate; epochs_16 and lr_x10 are the same with clipping.""")
topic("denominator", "T5", "The ratio's denominator", {"ratio_to_reference": v(actor_loss=ratio_to_reference)}, """
claim     B: it is the probability under the initial, frozen model. (C: the old policy.)
measures  fraction human reward kl
expect    ratio_to_reference fraction = default
note      Taken at its word, B's ratio ends learning where a token is epsilon likelier than under SFT.""")
topic("lambda", "S5, T2", "GAE's lambda", {f"lam_{lam}": v(f"--lam {lam}") for lam in ("0", "0.5", "1")}, f"""
claim     C: a small lambda has little variance but is biased, lambda 1 the reverse; GAE balances best in between
          (usual: 0.95).
measures  fraction early kl critic
expect    lam_0 fraction < default; lam_0.5 fraction < default; lam_1 fraction < default
note      The default is {usual.lam}.""")
topic("gradient", "T1, T2", "Noise and bias of the policy gradient", {
    "gradients": v("--cycles 3", train_ppo=gradients)}, """
claim     C: reward-to-go has less variance than the whole reply's reward, with a baseline it has less still, and both
          are unbiased; TD (lambda 0) has the least variance and the most bias.
beside    psi_whole_reply psi_reward_to_go psi_lambda_1 psi_lambda_0.95 psi_lambda_0.5 psi_lambda_0
measures  noise bias
expect    psi_reward_to_go noise < psi_whole_reply; psi_lambda_1 noise < psi_reward_to_go;
          psi_lambda_0.95 noise < psi_lambda_1; psi_lambda_0 noise < psi_lambda_0.95; psi_whole_reply bias = 0;
          psi_reward_to_go bias = 0; psi_lambda_0.95 bias > 0; psi_lambda_0 bias > psi_lambda_0.95
note      Measured on the gradients themselves: 32 batches of one policy, after 3 cycles of PPO. Both are in units of
          the true gradient's squared length. psi_lambda_1 is reward-to-go minus the critic's value.""")
topic("reinforce", "T1", "Vanilla policy gradient", {
    "vanilla_whole_reply": v(VANILLA, estimate_advantages=whole_reply),
    "vanilla_reward_to_go": v(VANILLA, estimate_advantages=reward_to_go),
    "vanilla_baseline": v(VANILLA),
    "ppo_whole_reply": v(estimate_advantages=whole_reply),
    "ppo_reward_to_go": v(estimate_advantages=reward_to_go)}, """
claim     C: it learns better with reward-to-go, better still with a baseline, and needs more data than PPO. D's
          pseudo-code takes the whole reply's reward as the advantage, without a critic.
measures  fraction early human kl collapsed
curves    objective
expect    vanilla_reward_to_go fraction > vanilla_whole_reply; vanilla_baseline fraction > vanilla_reward_to_go;
          vanilla_baseline early < default; ppo_whole_reply fraction < default; ppo_reward_to_go fraction < default
note      vanilla: one update per batch, so the ratio is 1 and nothing is clipped; to make up for the fewer steps,
          its learning rate is 1e-3. ppo: the default without its critic.""")
topic("critic", "T7, N6, S6", "Which critic", {
    "critic_sft": v(train_ppo=with_critic(lambda actor, reward_model: Separate(actor))),
    "critic_rm": v(train_ppo=with_critic(lambda actor, reward_model: Separate(reward_model))),
    "shared_0.5": v("--vf_coef 0.5", train_ppo=with_critic(lambda actor, reward_model: Shared(actor))),
    "shared_0.1": v("--vf_coef 0.1", train_ppo=with_critic(lambda actor, reward_model: Shared(actor)))}, """
claim     C: a model of its own, or to save memory a value head on shared layers; started from the reward model, it is
          stabler at first. E: c_V 0.5, from 0.1 to 1.
measures  fraction early kl critic seconds
expect    critic_rm early > critic_sft; critic_rm critic > critic_sft; critic_sft fraction = default;
          critic_rm fraction = default; shared_0.5 fraction = default; shared_0.1 fraction = shared_0.5
note      The default's critic reads the policy's last layer, and its gradient stops there. In all variants the
          critic's own weights learn at ten times the policy's rate.""")
topic("zero_mean", "N5", "Reward with mean zero", {"reward_plus_5": v(ask_score_fn=ask_plus_5)}, """
claim     C: subtracting the mean reward on the SFT data makes PPO stabler.
measures  early human kl
expect    reward_plus_5 early < default; reward_plus_5 human < default
note      A constant moves no optimum, but the critic has to learn it first.""")
topic("whitening", "N7, P3", "Whitening", {
    "white_advantages": v("--whiten_advantages"), "white_rewards": v(assign_rewards=white_rewards),
    "white_both": v("--whiten_advantages", assign_rewards=white_rewards)}, """
claim     C: whitening rewards and advantages has no great effect on the final policy. D: training is unstable without
          normalised advantages.
measures  fraction early kl swing collapsed
expect    white_advantages fraction = default; white_rewards fraction = default; white_both fraction = default;
          white_advantages swing < default
note      With whitened rewards beta's unit is another, so PPO aims at another KL.""")
topic("dropout", "N8", "Dropout", {"dropout": v(update_policy=update_with_dropout)}, """
claim     C: dropout makes ratio and KL unreliable, and that tends to matter.
measures  fraction early kl ratio_error
expect    dropout ratio_error > default; dropout fraction < default
note      GPT-2's own 0.1, on in the update only; sampling, old log-probs and evaluation are without.""")
topic("eos", "N1, N3", "The end of a reply", {
    "no_penalty": v("--missing_eos_penalty 0"), "short": v("--max_new_tokens 14"),
    "short_no_penalty": v("--max_new_tokens 14 --missing_eos_penalty 0"),
    "pad_is_eos": v("--cycles 0 --reward human", imitation_loss=loss_without_eos,
                    finished_model=again("pretrain", "sft"))}, """
claim     C: a penalty for replies without EOS teaches the policy to end them. If padding is EOS, ending is never
          learned.
beside    sft default
measures  human reward length finished
expect    no_penalty finished = default; short_no_penalty finished < short; pad_is_eos finished < sft
note      short: 14 tokens at most, too few for many good replies. pad_is_eos is an SFT model without PPO.""")
topic("epochs", "N9", "Passes over each batch", {f"epochs_{n}": v(f"--ppo_epochs {n}") for n in (1, 2, 8, 16)}, f"""
claim     C: 2 to 4 updates per batch.
measures  fraction early kl clipped swing seconds
curves    objective clip_fraction
expect    epochs_1 fraction < default; epochs_2 fraction = default; epochs_8 fraction < default;
          epochs_16 fraction < default
note      The default is {usual.ppo_epochs}, in {usual.minibatches} minibatches each.""")
topic("stability", "P3", "Learning rate and batch", {
    **{f"batch_{n}": v(f"--batch_size {n}") for n in (8, 32, 128)},
    "lr_x0.1": v("--lr 3e-5"), "lr_x10": v("--lr 3e-3")}, f"""
claim     D: unstable if the learning rate is too large (ten times below SFT's is right) or the batch below 32; a larger
          batch is steadier.
measures  fraction early kl swing collapsed
curves    objective
expect    lr_x10 fraction < default; lr_x10 swing > default; lr_x0.1 fraction < default; batch_8 fraction < default;
          batch_32 fraction = default; batch_128 fraction > default
note      The defaults are {usual.batch_size} and {usual.lr}; SFT's rate is {usual.sft_lr}. A larger batch costs more
          samples per cycle; swing falls with it anyway, being that of its mean. In the figures, what is below -2 is
          drawn as -2.""")
topic("entropy", "S6", "Entropy bonus", {f"entropy_{c}": v(f"--ent_coef {c}") for c in ("0.01", "0.1")}, f"""
claim     A, B: entropy keeps the model creative; if it is low, all replies are the same.
beside    sft default
measures  fraction human kl entropy
expect    entropy_0.01 entropy > default; entropy_0.01 fraction = default; entropy_0.1 fraction < default
note      The default is {usual.ent_coef}. The KL term wants variety too, where SFT has it.""")
topic("aggregation", "T8", "Mean over tokens or over replies", {"by_sequence": v(masked_mean=by_sequence)}, """
claim     C: how the loss is aggregated can change results significantly.
measures  fraction early kl length
expect    by_sequence fraction ! default; by_sequence length ! default
note      It can only matter where replies differ in length; these are one or two sentences.""")
topic("ptx", "N10", "Pretraining loss mixed in", {"ptx": v(optimizer_step=step_with_texts)}, """
claim     C: InstructGPT mixes pretraining updates into PPO, so that less is forgotten.
beside    sft default
measures  fraction human kl text_loss
expect    default text_loss > sft; ptx text_loss < default; ptx fraction = default
note      The pretraining texts hold what SFT and PPO are to unlearn: off-topic and dismissive replies.""")
topic("verifier", "L4", "A rule in place of the model", {"reward_human": v("--reward human")}, """
claim     C: RL with verifiable rewards differs from RLHF in the reward only.
measures  human kl length
expect    reward_human human > default
note      The rule is the human itself, so nothing is lost between the two; beta counts in its points.""")
topic("replies", "L5, T1", "Replies per prompt, temperature", {
    "replies_4": v("--replies_per_prompt 4"), "replies_8": v("--replies_per_prompt 8"),
    "group_baseline": v("--replies_per_prompt 4", estimate_advantages=group_baseline),
    "temperature_1": v("--temperature 1")}, """
claim     D: four replies per prompt, temperature 0.7. C: simpler algorithms, such as GRPO, have become alternatives.
measures  fraction early human kl
expect    replies_4 fraction = default; replies_8 fraction = default; group_baseline fraction = replies_4;
          temperature_1 human < default
note      The batch stays as large: more replies for one prompt are fewer prompts. Another temperature is another SFT
          model, with an optimum of its own.""")
topic("best", "L6", "Keep what validates best", {"last": v("--eval_every 1000000")}, """
claim     D: test while training, keep the best model.
measures  fraction human kl
expect    last fraction < default
note      last: the policy of the last cycle is kept.""")
VARIANTS = {name: variant for topic in TOPICS.values() for name, variant in topic.variants.items()}
VARIANTS["value_clip"] = v(critic_loss=clipped_values)  # to try out; the page has no claim about it
# The base runs train PPO too: its replies make the estimate of J* exact, and all variants are measured by that J*.
VARIANTS["base"] = v("--cycles 30 --report_batches 112")
for name, (_, swap) in VARIANTS.items():
    if unknown := swap.keys() - vars(ppo).keys():  # else the variant would be the default, without a word
        sys.exit(f"error: {name} replaces {', '.join(unknown)}, which ppo_rlhf.py does not have")


# ======================================================================================================================
# 3  Runs
# ======================================================================================================================
COLUMNS = ("name reward human kl objective entropy clip_fraction first_log_ratio explained_variance noise bias "
           "reward_spread human_spread").split()


def number(text):
    """A float where that is possible, else the text; nothing is NaN."""
    try:
        return float(text or "nan")
    except ValueError:
        return text


def read_curve(path):
    """metrics.csv -> a dict per cycle."""
    with open(path, newline="") if path.exists() else io.StringIO() as file:
        return [{name: number(row[name]) for name in COLUMNS if name in row} for row in csv.DictReader(file)]


@torch.no_grad()
def text_loss(folder):
    """How well a saved policy still continues texts like those of pretraining, about unseen prompts."""
    cfg = ppo.Config(device="cpu")
    model = ppo.ActorCritic(*ppo.load_pretrained(folder, cfg), cfg)  # the critic may be of another kind
    return ppo.imitation_loss(model, TEXTS["test"][:500], cfg)[0].item()


def work(job):
    """One run -> a line of results.jsonl. What it writes is deleted, but for the base run that variants start from."""
    (name, seed), usual, folder = job
    (flags, swap), base = VARIANTS[name], folder / f"base{seed}"
    start = ["--seed", str(seed)] if name == "base" else ["--init_from", str(base), *usual.split()]
    record = {"variant": name, "seed": seed, "report": None, "curve": []}
    with (tempfile.TemporaryDirectory(dir=folder) as place, redirect_stdout(io.StringIO()),
          redirect_stderr(io.StringIO())):
        out = Path(place, "run")
        vars(ppo).update(swap)
        try:
            ppo.main([*start, *flags, "--device", "cpu", "--out", str(out)])
            vars(ppo).update(vars(own))
            record |= {"report": json.loads((out / "report.json").read_text()),
                       "curve": read_curve(out / "metrics.csv"),
                       "text_loss": text_loss(out / ("sft" if name == "base" else "policy"))}
            if name == "base":
                os.replace(out, base)
        except ppo.UserError as error:
            if "NaN" not in str(error):  # that would be a result: training has exploded
                raise
    return record | {"seconds": time.process_time()}  # of the processor: does not count what else the machine does


def read_records(folder):
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(names, options):
    """All runs of these variants that are not in results.jsonl yet, `jobs` at a time."""
    done = {(record["variant"], record["seed"]) for record in read_records(options.folder)}
    todo = [((name, seed), options.flags, options.folder) for name in names for seed in range(options.seeds)
            if (name, seed) not in done]
    context, begin = multiprocessing.get_context("forkserver"), time.perf_counter()
    context.set_forkserver_preload(["ppo_rlhf"])  # imported once, not by every run; found in the current folder
    with context.Pool(options.jobs, maxtasksperchild=1) as pool, open(options.folder / "results.jsonl", "a") as file:
        for i, record in enumerate(pool.imap_unordered(work, todo), 1):
            file.write(json.dumps(record) + "\n")
            file.flush()
            left = (time.perf_counter() - begin) / i * (len(todo) - i) / 60
            print(f"{i} of {len(todo)}: {record['variant']}, seed {record['seed']}, {record['seconds']:.0f} s"
                  f"{'' if record['report'] else ', exploded'}; {left:.0f} minutes left", flush=True)


# ======================================================================================================================
# 4  From runs to verdicts
# ======================================================================================================================
Measure = namedtuple("Measure", "least digits meaning")  # the least difference that matters, digits shown, what it is
MEASURES = {
    "fraction": Measure(0.01, 3, "of the way from SFT to J*, on test prompts, below -1 taken as -1 (else one run that "
                        "exploded would hide all others); only where J* is that of the default"),
    "early": Measure(0.1, 2, "human score of the replies of the first 10 cycles: speed"),
    "human": Measure(0.1, 2, "the human's points on test prompts, 4 at best"),
    "reward": Measure(0.1, 2, "what PPO sees, on test prompts, in standard deviations of SFT's replies"),
    "kl": Measure(0.3, 2, "nats per reply from SFT"),
    "length": Measure(1, 1, "tokens per reply"),
    "finished": Measure(0.02, 2, "share of replies that end"),
    **{name: Measure(0.02, 2, f"share of {name} replies") for name in ("helpful", "warm", "honest", "harmless")},
    "entropy": Measure(0.02, 3, "of the policy, nats per token, last 5 cycles"),
    "swing": Measure(0.05, 3, "standard deviation of the training reward over the last 10 cycles"),
    "critic": Measure(0.1, 2, "explained variance in cycles 2 to 10"),
    "clipped": Measure(0.01, 3, "share of tokens whose gradient the clip makes zero"),
    "ratio_error": Measure(0.001, 4, "mean distance of log rho from 0 before the first step of a cycle"),
    "text_loss": Measure(0.05, 3, "negative log-likelihood per token of pretraining texts about unseen prompts"),
    "correlation": Measure(0.05, 2, "of reward and human, on SFT's replies to new prompts"),
    "accuracy": Measure(0.02, 3, "share of pairs of such replies that both order alike"),
    "noise": Measure(0.05, 2, "variance of one batch's gradient, in squared lengths of the true gradient"),
    "bias": Measure(0.02, 3, "squared distance of the mean gradient from the true one, in the same unit"),
    "collapsed": Measure(0.2, 1, "share of seeds that end below SFT's human score, or explode"),
    "seconds": Measure(1, 1, "processor time of the run, loading and report included"),
}
# Flags and replaced functions after which J* is another one, or there is no policy to measure.
OTHER_OPTIMUM = {"--kl_coef", "--reward", "--temperature", "--max_new_tokens", "--missing_eos_penalty", "ask_score_fn",
                 "finished_model", "worth_keeping"}
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t for 95%, by number of seeds


def average(rows, name):
    return mean([row[name] for row in rows if name in row] or [math.nan])


def measures(record, base):
    """{measure: value} of a run; `base` is the record of the run that it started from, and so of J(SFT) and J*."""
    report, curve, sft = record["report"], record["curve"], base["report"]["sft"]
    if not report:
        return {"collapsed": 1.0}
    flags, swap = VARIANTS[record["variant"]]
    j, j_sft, j_star = report["ppo"]["objective"], sft["objective"], base["report"]["optimum"]["objective"]
    tail = [row["reward"] for row in curve[-10:] if "reward" in row]
    same_optimum = OTHER_OPTIMUM.isdisjoint({*flags, *swap}) and swap.get("train_ppo") not in (best_of_n, gradients)
    return report["ppo"] | report["reward_model"] | {
        "fraction": max((j - j_sft) / (j_star - j_sft), -1.0) if same_optimum else math.nan,
        "early": average(curve[:10], "human"), "swing": stdev(tail) if len(tail) > 1 else math.nan,
        "entropy": average(curve[-5:], "entropy"), "critic": average(curve[1:10], "explained_variance"),
        "ratio_error": average(curve, "first_log_ratio"), "clipped": average(curve, "clip_fraction"),
        "text_loss": record["text_loss"], "collapsed": float(report["ppo"]["human"] < sft["human"]),
        "seconds": record["seconds"]}


def load(folder):
    """results.jsonl -> {variant: {seed: measures}}, {variant: {seed: curve}}, and the records themselves."""
    records, results, curves = read_records(folder), {}, {}
    bases = {record["seed"]: record for record in records if record["variant"] == "base"}
    for record in records:
        name, seed, report = record["variant"], record["seed"], record["report"]
        found = {name: measures(record, bases[seed])} | {row["name"]: row for row in record["curve"] if "noise" in row}
        if name == "base":
            found = {"pretrained": report["pretrained"], "sft": report["sft"] | {"text_loss": record["text_loss"]}}
        for row, values in found.items():
            results.setdefault(row, {})[seed] = values
        curves.setdefault(name, {})[seed] = record["curve"]
    return results, curves, records


def summary(folder):
    """What the page needs of the runs: a line with totals, then one for every variant and seed, in five digits."""
    results, _, records = load(folder)
    minutes = sum(record["seconds"] for record in records) / 60
    yield {"runs": len(records), "seeds": len({record["seed"] for record in records}), "minutes": round(minutes)}
    for name, runs in results.items():
        for seed in sorted(runs):
            yield {"name": name, "seed": seed, **{measure: float(f"{x:.5g}") for measure, x in runs[seed].items()
                                                  if measure in MEASURES and x is not None and x == x}}


def results_of(lines):
    """The lines of `summary` without the first -> {variant: {seed: measures}}"""
    results = {}
    for line in lines:
        results.setdefault(line["name"], {})[line["seed"]] = line
    return results


def seeds_of(results, name, measure):
    """{seed: value}; without NaN, and without what was not measured."""
    runs = results.get(name, {})
    return {seed: x for seed in sorted(runs) if (x := runs[seed].get(measure)) is not None and x == x}


def difference(results, name, measure, other):
    """Mean of the paired differences over seeds, and half the width of its 95% interval; None with fewer than two."""
    ours, constant = seeds_of(results, name, measure), number(other)
    theirs = seeds_of(results, other, measure) if constant == other else dict.fromkeys(ours, constant)
    gaps = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return (mean(gaps), T95.get(len(gaps), 2.78) * stdev(gaps) / len(gaps) ** 0.5) if len(gaps) > 1 else None


def verdict(gap, sign, least):
    """A difference is seen if its 95% interval leaves out 0 and it is larger than `least`."""
    if gap is None:
        return "too few runs"
    center, half = gap
    seen = abs(center) > max(half, least)
    if sign == "=":
        return "refuted" if seen else "confirmed" if abs(center) + half < least else "no effect seen here"
    expected = sign == "!" or (center > 0) == (sign == ">")
    return "no effect seen here" if not seen else "confirmed" if expected else "refuted"


# ======================================================================================================================
# 5  Figures. Colours: Okabe and Ito's, which the colour-blind can tell apart
# ======================================================================================================================
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def draw_curves(plt, topic, curves):
    """A panel for each of the topic's columns, cut at -2; mean over the seeds, their standard deviation as a band."""
    figure, panels = plt.subplots(1, len(topic.curves.split()), figsize=(5 * len(topic.curves.split()), 3.6))
    for ax, column in zip([panels] if topic.curves.isidentifier() else panels, topic.curves.split()):
        for i, name in enumerate(name for name in ("default", *topic.variants) if name in curves):
            paths = torch.tensor([[row[column] for row in curve] for curve in curves[name].values()])  # [seeds,cycles]
            paths = paths.clamp(min=-2)  # one seed that explodes would hide all others
            center, spread = paths.mean(dim=0), paths.std(dim=0, correction=0)
            cycles, style = range(1, len(center) + 1), ["-", "--", "-.", ":"][i % 4]
            ax.plot(cycles, center, style, color=COLOURS[i], label=name)
            ax.fill_between(cycles, center - spread, center + spread, color=COLOURS[i], alpha=0.15, linewidth=0)
        ax.set(xlabel="cycle", ylabel=column.replace("_", " "), ylim=(max(ax.get_ylim()[0], -2.1), None))
    ax.legend(fontsize=8)
    return figure


def draw_hacking(plt, curves):
    """The model's score and the human's against KL, for three reward models; by PPO, cycle by cycle, and best of n."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    titles = "default reward model", "few and noisy labels", 'a bug: likes "walk"'
    trios = (("kl_0", "default", "best_of_64"), ("blind_kl_0", "blind_kl_0.1", "best_of_64_blind"),
             ("bug_kl_0", "bug_kl_0.1", "best_of_64_bug"))
    for ax, title, trio in zip(panels, titles, trios):
        spreads = {seed: curve[0] for seed, curve in curves.get(trio[-1], {}).items()}  # best of 1 is SFT
        for name, colour, label in zip(trio, ("#D55E00", "#0072B2", "#009E73"), ("beta 0", "beta 0.1", "best of n")):
            paths = [[[row["kl"], *((row[x] - spreads[seed][x]) / spreads[seed][f"{x}_spread"]
                                    for x in ("reward", "human"))] for row in curve]
                     for seed, curve in curves.get(name, {}).items() if seed in spreads]
            if paths:
                kl, reward, human = torch.tensor(paths).mean(dim=0).T
                ax.plot(kl, reward, "-o", color=colour, markersize=3, label=f"{label}: model's score")
                ax.plot(kl, human, "--^", color=colour, markersize=3, label=f"{label}: human's score")
        ax.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x ** 2))
        ax.set(title=title, xlabel="KL from SFT, nats per reply (square-root scale)")
    panels[0].set_ylabel("better than SFT's mean, in SFT's standard deviations")
    panels[0].legend(fontsize=8)
    return figure


def draw_overview(plt, results):
    """Every variant that has the default's optimum: how its fraction differs from the default's."""
    rows = [(topic.title, name, gap) for topic in TOPICS.values() for name in topic.variants
            if name != "default" and (gap := difference(results, name, "fraction", "default"))]
    figure, ax = plt.subplots(figsize=(9, 1.2 + 0.2 * len(rows)))
    for y, (_, _, (center, half)) in enumerate(rows):
        ax.errorbar(center, y, xerr=half, fmt="o", color=COLOURS[1], markersize=4, capsize=2)
    for y in (y for y in range(1, len(rows)) if rows[y][0] != rows[y - 1][0]):
        ax.axhline(y - 0.5, color="#CCCCCC", linewidth=0.6)
    ax.axvspan(-MEASURES["fraction"].least, MEASURES["fraction"].least, color="#DDDDDD", zorder=0)
    ax.set_xscale("symlog", linthresh=0.02)
    ax.set_yticks(range(len(rows)), [name for _, name, _ in rows], fontsize=8)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="fraction of the optimum: difference from the default, with its 95% "
           "interval\n(grey: too small to matter; linear between -0.02 and 0.02, logarithmic outside)")
    return figure


def draw(results, curves):
    """Writes figures/*.png -> the names of those that there are results for."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: the figures need matplotlib; install it with: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figures = {key: draw_curves(plt, topic, curves) for key, topic in TOPICS.items() if topic.curves}
    figures |= {"hacking": draw_hacking(plt, curves), "overview": draw_overview(plt, results)}
    (NOTES / "figures").mkdir(exist_ok=True)
    for key, figure in figures.items():
        figure.tight_layout()
        figure.savefig(NOTES / "figures" / f"{key}.png", dpi=100)
    return set(figures)


# ======================================================================================================================
# 6  The page
# ======================================================================================================================
INTRODUCTION = """<!-- numbers: {source} -->
# Experiments: what the articles claim, and what is seen here
<!-- numbers: above; arithmetic {predictions} 512 (counted, a setting) -->

Made by `notes/experiments.py` from {runs} runs, {minutes} minutes on one thread in all. All variants start from the
same SFT and reward model (one pair per seed, {seeds} seeds) and repeat only PPO, in 30 cycles. A variant is made of
flags, or of replacements for functions of `ppo_rlhf.py`; section 2 of `notes/experiments.py` is the table of them.
First, once:

    python notes/experiments.py base

Then the command under each heading, or `run` without a name for all; at last `write`, which makes this page.

**How to read it.** In the tables, means ± standard deviations over the seeds. A difference is that of two variants
with the same seed: its mean ± half of the 95% interval (Student's t). It is *seen* when the interval leaves out 0
**and** it is larger than the least difference that matters (the last table says which). *Confirmed*: seen, with the
expected sign; where the claim is that nothing changes, the whole interval lies within the least difference. *Refuted*:
seen, where nothing was to change or with the other sign. *No effect seen here*: all else, be there none or too little
for so few seeds. One interval in twenty misses the truth, and there are {predictions} predictions: build on none alone.

**What may not carry over.** This is a model of two layers in a world of a few dozen sentences. Its SFT model samples
good replies already, and learning is a matter of a minute. Whatever helps against noise, instability
or forgetting has little to do here. A claim confirmed here has a cause that a small model shows too; one that is not
may still hold for large ones.

**Of which version.** {version}

"""
# After new runs, say here of which version of the script they are, and which record has them. Then `write`.
SOURCE = "experiments"
VERSION = """All runs are of December 1, with the present script, on two cores of an AMD EPYC
processor. J* of a seed comes from its base run: 512 replies of its policy and 512 of the reference to each test prompt.

An earlier version of this page (November 22) had a coarser J*, Adam's usual constants, and no entropy in the loss.
Fourteen verdicts are different now. Seen now and not then: unclipped updates with a large learning rate, dropout, a
large learning rate's swing and temperature 1 do harm; whitened rewards, and both whitened, change the fraction (for
the worse); a critic from the reward model explains more at first; whitened advantages change nothing; the KL target of
1 is kept. Seen then and not now: PPO on a blind reward model is worse for the human; the critic as a model of its own
changes nothing; 0.1 and 0.5 as weight of a shared critic's loss, two epochs, and batches of 32 change the fraction."""
# Numbers in the text of a topic that were not measured: settings, and what the articles say.
TYPED = {"cycles": "60", "labels": "30,000 50,000 2200", "kl_in_loss": "120", "stability": "64"}
SIGNS = {"<": "below", ">": "above", "=": "as", "!": "unlike"}


def table(header, rows):
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, ["---"] * len(header), *rows])


def cell(results, name, measure):
    numbers, digits = [*seeds_of(results, name, measure).values()], MEASURES[measure].digits
    spread = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{spread}" if numbers else "–"


def judged(topic, results):
    """For each prediction what is expected, the difference that was found, and the verdict."""
    for name, measure, sign, other in map(str.split, topic.expect.split(";")):
        gap, (least, digits, _) = difference(results, name, measure, other), MEASURES[measure]
        found = f"{gap[0]:+.{digits}f} ± {gap[1]:.{digits}f}" if gap else "–"
        yield [f"{measure} of {name} {SIGNS[sign]} {other}", found, f"**{verdict(gap, sign, least)}**"]


def page(lines, figures):
    totals, results = lines[0], results_of(lines[1:])
    judgements = [[topic.ids, *row] for topic in TOPICS.values() for row in judged(topic, results)]
    yield INTRODUCTION.format(predictions=len(judgements), version=VERSION, source=SOURCE, **totals)
    counts = Counter(row[-1] for row in judgements)
    counted = " ".join(str(count) for count in counts.values() if count >= 10)
    yield f"## All verdicts\n<!-- numbers: above; arithmetic {counted} (counted) -->\n\n"
    yield ", ".join(f"{count} times {name}" for name, count in counts.most_common()) + ".\n\n"
    yield table(["ids", "expected", "difference", "verdict"], judgements)
    yield "\n![Every variant's difference from the default](figures/overview.png)\n"
    for key, topic in TOPICS.items():
        rows = [name for name in dict.fromkeys([*topic.beside.split(), *topic.variants])
                if any(seeds_of(results, name, measure) for measure in topic.measures.split())]
        typed = f"<!-- numbers: above; arithmetic {TYPED[key]} (settings, quoted) -->\n" if key in TYPED else ""
        yield f"\n## {topic.title} ({topic.ids})\n{typed}\n{topic.claim}\n\n"
        yield f"    python notes/experiments.py run {key}\n\n"
        yield table(["", *topic.measures.split()], ([name, *(cell(results, name, x) for x in topic.measures.split())]
                                                    for name in rows))
        yield f"\n{table(['expected', 'difference', 'verdict'], judged(topic, results))}\n{topic.note}\n"
        yield f"\n![{topic.title}](figures/{key}.png)\n" * (key in figures)
    yield "\n## What is measured\n\n" + table(["measure", "least difference", "what it is"], (
        [name, f"{least:g}", meaning] for name, (least, _, meaning) in MEASURES.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["base", "run", "write", "show"])
    parser.add_argument("names", nargs="*", help="for run: topics or variants; all, if none is named")
    parser.add_argument("--folder", type=Path, default=Path("runs/experiments"), help="where runs and results are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on")
    parser.add_argument("--flags", default="--cycles 30 --report_batches 14", help="of every run but the base")
    options = parser.parse_args()
    if unknown := set(options.names) - {*TOPICS, *VARIANTS}:
        parser.error(f"unknown: {', '.join(unknown)}; topics: {', '.join(TOPICS)}; variants: {', '.join(VARIANTS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.command == "write":
        results, curves, _ = load(options.folder)
        text = "".join(page([*summary(options.folder)], draw(results, curves)))
        (NOTES / "experiments.md").write_text(text, encoding="utf-8")
    elif options.command == "show":
        lines = [*summary(options.folder)]
        print("\n".join(line for line in "".join(page(lines, [])).splitlines() if line.startswith("|")), end="\n\n")
        print("\n".join(json.dumps(line) for line in lines))
    elif options.command == "base":
        run(["base"], options)
    else:
        run([name for word in options.names or TOPICS
             for name in (TOPICS[word].variants if word in TOPICS else [word])], options)


if __name__ == "__main__":
    main()
