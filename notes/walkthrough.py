"""The articles' numbers, worked through with the script's own functions. It takes a few seconds.

    python notes/walkthrough.py

Nothing is trained. Steps 1 to 6 follow article E's four tokens, 天空 | 是 | 蔚蓝色 | 的. Parts 7 to
13 are the examples of B, C and D. The numbers are small enough for paper and a pocket calculator;
the column "by hand" shows the sum. notes/walkthrough.md explains the output part by part, in English
and in Chinese.

There is one reply of four tokens, and one column of padding behind it, so all tensors are [1,5].
The padding holds NaN: a result that depended on it would be NaN itself.
"""
import math
import sys
from pathlib import Path
from unicodedata import east_asian_width

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where ppo_rlhf.py is
import ppo_rlhf as ppo

PROMPT = "天空是什么颜色？"
WORDS = ["天空", "是", "蔚蓝色", "的"]  # E shows no end token: here 的 ends the reply
VOCABULARY = 5                          # a language of five words: these, and one more
BETA, GAMMA, LAM, EPS, C_V, C_ENT = 0.1, 1.0, 0.5, 0.2, 0.5, 0.01


def one_reply(*numbers):
    """A number per token, and NaN for the padding -> [1,5], in float64, as exact as on paper."""
    return torch.tensor([[*numbers, math.nan]], dtype=torch.double)


TOKENS = torch.tensor([[0, 1, 2, 3, 0]])
MASK = torch.tensor([[True, True, True, True, False]])
VALUES = one_reply(-0.84, 0.88, 1.96, 3.48)      # E's
SCORE = torch.tensor([4.0], dtype=torch.double)  # E gives no score and no probabilities; we chose


# ---- Printing ------------------------------------------------------------------------------------
def title(name: str, functions: str):
    print(f"\n{name}\n{'-' * width(name)}\n{functions}\n")


def width(text: str) -> int:
    """The columns that a text takes on a terminal: a Chinese character takes two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def texts(values: list, digits: int) -> list[str]:
    """A column's cells. All numbers get as many decimals as one of them needs, `digits` at most."""
    decimals = 0
    for x in values:
        if not isinstance(x, str):
            needed = f"{x:.{digits}f}".rstrip("0").partition(".")[2]
            decimals = max(decimals, len(needed))
    cells = []
    for x in values:
        if not isinstance(x, str):
            x = f"{round(x, digits) + 0.0:.{decimals}f}"  # no "-0.0"
        cells.append(x)
    return cells


def table(columns: dict[str, list], digits: int = 4):
    """Print columns side by side: words from the left, numbers from the right."""
    padded = []
    for name, values in columns.items():
        words = all(isinstance(x, str) for x in values)
        cells = [name, *(values if words else texts(values, digits))]
        widest = max(width(cell) for cell in cells)
        gaps = [" " * (widest - width(cell)) for cell in cells]
        padded.append([cell + gap if words else gap + cell for cell, gap in zip(cells, gaps)])
    for line in zip(*padded):
        print("   ".join(line).rstrip())


def row(x) -> list[float]:
    """[1,5] -> the numbers of the four real tokens."""
    return x[0, :len(WORDS)].tolist()


def per_word(rows: list[list[float]]) -> dict[str, list[float]]:
    """Rows with a number per token -> columns of a table, one for each word."""
    return {word: list(column) for word, column in zip(WORDS, zip(*rows))}


# ---- Article E's six steps -----------------------------------------------------------------------
def policy(log_probs):
    """Logits [1,5,V] of a policy with these log-probs of E's tokens; other words share the rest."""
    taken = log_probs.exp().unsqueeze(-1)                                               # [1,5,1]
    others = ((1 - taken) / (VOCABULARY - 1)).expand(-1, -1, VOCABULARY)                # [1,5,V]
    return others.scatter(-1, TOKENS.unsqueeze(-1), taken).log()


def step_1():
    title("STEP 1  The actor samples tokens; the frozen reference rates the same tokens  (E, S1)",
          "sample_tokens, token_log_probs")
    logits = policy(one_reply(-0.5, -1.2, -0.7, -1.0))
    ref_logits = policy(one_reply(-1.0, -1.0, -0.7, -2.0))
    log_probs = ppo.token_log_probs(logits, TOKENS)
    ref_log_probs = ppo.token_log_probs(ref_logits, TOKENS)
    table({
        "t": list("1234"),
        "action a_t": WORDS,
        "log P": row(log_probs),
        "log P_ref": row(ref_log_probs),
        "P": row(log_probs.exp()),
        "P_ref": row(ref_log_probs.exp()),
        "state s_t": [" ".join([PROMPT, *WORDS[:t]]) for t in range(len(WORDS))]})
    torch.manual_seed(0)
    sampled = ppo.sample_tokens(logits[0, :1].expand(10_000, -1))
    print(f"\nOf 10000 tokens sampled in s_1, {(sampled == 0).sum()} are {WORDS[0]}; "
          f"P is {log_probs[0, 0].exp():.4f}.")
    return logits, log_probs, ref_log_probs


def step_2(log_probs, ref_log_probs):
    title("STEP 2  A reward for every token: minus beta * KL, and the score at the last one  "
          "(E, S2)", f"token_rewards, beta = {BETA}, score of the whole reply = {SCORE.item()}")
    kl = log_probs - ref_log_probs
    rewards = ppo.token_rewards(log_probs, ref_log_probs, SCORE, MASK, BETA)
    by_hand = []
    for p, ref in zip(row(log_probs), row(ref_log_probs)):
        by_hand.append(f"-{BETA} * ({p:.1f} - {ref:.1f})")
    by_hand[-1] += f" + {SCORE.item()}"
    table({
        "token": [*WORDS, "<pad>"],
        "KL = log P - log P_ref": kl[0].tolist(),
        "r_t": rewards[0].tolist(),
        "by hand": [*by_hand, "masked"]})
    misplaced = ppo.token_rewards(log_probs, ref_log_probs, 0 * SCORE, MASK, BETA)
    misplaced[:, -1] += SCORE
    print(f"\nAll rewards together: {rewards.sum():.2f} = score - beta * KL "
          f"= 4.0 - 0.1 * {sum(row(kl)):.1f}.")
    print("With the score in the last column, on the padding, the reply would get "
          f"{misplaced[MASK].sum():.2f}: the score is lost.")
    return rewards


def step_3(rewards):
    title("STEP 3  The critic values every state, before its token is chosen  (E, S3)",
          "ActorCritic.forward; the values are E's")
    _, to_come = ppo.gae(rewards, VALUES, MASK, gamma=1.0, lam=1.0)
    by_hand = []
    for t in range(len(WORDS)):
        by_hand.append(" + ".join(f"{r:g}" for r in row(rewards)[t:]))
    table({
        "state before": WORDS,
        "V(s_t), predicted": row(VALUES),
        "rewards still to come": row(to_come),
        "by hand": by_hand})


def step_4(rewards):
    title("STEP 4  TD residuals: what came, plus what is expected now, less what was expected "
          "before  (E, S4)", f"td_residuals, gamma = {GAMMA}")
    deltas = ppo.td_residuals(rewards, VALUES, MASK, GAMMA)
    next_values = [*row(VALUES)[1:], 0.0]  # nothing comes after the last token
    by_hand = []
    for r, next_value, value in zip(row(rewards), next_values, row(VALUES)):
        by_hand.append(f"{r:.2f} + {next_value:.2f} - {value:.2f}")
    table({
        "token": WORDS,
        "r_t": row(rewards),
        "V(s_t+1)": next_values,
        "V(s_t)": row(VALUES),
        "delta_t": row(deltas),
        "by hand": by_hand})
    return deltas


def step_5(rewards, deltas):
    title("STEP 5  GAE: advantages, from the last token to the first, and returns  (E, S5)",
          f"gae, gamma = {GAMMA}, lambda = {LAM}")
    advantages, returns = ppo.gae(rewards, VALUES, MASK, GAMMA, LAM)
    later = [*row(advantages)[1:], 0.0]
    table({
        "token": WORDS,
        "delta_t": row(deltas),
        "A_t": row(advantages),
        "by hand": [f"{delta:.2f} + {LAM} * {a:g}" for delta, a in zip(row(deltas), later)],
        "return": row(returns),
        "by hand ": [f"{a:g} + {value}" for a, value in zip(row(advantages), row(VALUES))]})
    return advantages, returns


def step_6(logits, old_log_probs, advantages, returns):
    title("STEP 6  The update: clipped surrogate, value loss, entropy  (E, S6)",
          f"policy_loss, value_loss, entropy; epsilon = {EPS}, c_V = {C_V}, c_ent = {C_ENT}")
    print("Before the first update the actor is the policy that has sampled, so every ratio is 1:")
    show_policy_loss(old_log_probs, advantages, [1.0, 1.0, 1.0, 1.0])
    print("Some updates later, the third token has moved the wrong way:")
    loss = show_policy_loss(old_log_probs, advantages, [1.1, 1.3, 0.6, 1.25])
    v_loss = ppo.value_loss(VALUES, returns, MASK)
    mean_entropy = ppo.masked_mean(ppo.entropy(logits), MASK)
    total = loss + C_V * v_loss - C_ENT * mean_entropy
    print(f"L = L_policy + c_V * L_V - c_ent * H = {loss:.4f} + {C_V} * {v_loss:.4f} "
          f"- {C_ENT} * {mean_entropy:.4f} = {total:.4f}")


def show_policy_loss(old_log_probs, advantages, ratios: list[float]):
    """Print a table for these ratios rho_t; return the loss."""
    log_probs = (old_log_probs + one_reply(*ratios).log()).requires_grad_()
    loss, clip_fraction = ppo.policy_loss(log_probs, old_log_probs, advantages, MASK, EPS)
    loss.backward()
    by_hand = []
    for a, rho, slope in zip(row(advantages), ratios, row(log_probs.grad)):
        by_hand.append(f"-{a:g} * {rho:g} / 4" if slope else f"0: beyond {1 + EPS}, and A > 0")
    print()
    table({
        "token": WORDS,
        "P_old": row(old_log_probs.exp()),
        "P": row(log_probs.detach().exp()),
        "rho_t": ratios,
        "A_t": row(advantages),
        "gradient": row(log_probs.grad),
        "by hand": by_hand})
    print(f"\npolicy loss {loss:.4f}, clip_fraction {clip_fraction:.1f}\n")
    return loss


# ---- What the other articles add -----------------------------------------------------------------
def part_7_lambda(rewards):
    title("7  lambda from 0 to 1: whom does the advantage believe?  (C, S5, T2)",
          "gae on Step 2's rewards")

    def advantages(lam, critic_error=0.0, luck=0.0):
        """A_t when V(s_2) is wrong by critic_error, and the score is higher by luck."""
        values = VALUES + one_reply(0.0, critic_error, 0.0, 0.0)
        lucky = rewards + one_reply(0.0, 0.0, 0.0, luck)
        return row(ppo.gae(lucky, values, MASK, GAMMA, lam)[0])

    columns = {"A_t": [*WORDS, "A_1 if V(s_2) is wrong by 1", "A_1 if the score is 1 luckier"]}
    for lam in [0.0, 0.25, 0.5, 0.75, 0.95, 1.0]:
        plain = advantages(lam)
        by_error = advantages(lam, critic_error=1.0)[0] - plain[0]
        by_luck = advantages(lam, luck=1.0)[0] - plain[0]
        columns[f"lambda {lam:g}"] = [*plain, f"{by_error:+.4f}", f"{by_luck:+.4f}"]
    table(columns)
    print("\nlambda 0 is the TD residual: wrong where the critic is wrong, deaf to luck.\n"
          "lambda 1 is Monte Carlo: no mistake of V(s_2) gets in, all of the luck does.\n"
          "By hand: a mistake of V(s_2) counts 1 - lambda, the luck at the fourth token lambda^3.")


def part_8_psi(rewards, old_log_probs, advantages):
    title("8  Psi_t: what else can stand in the place of the advantage  (C, T1)",
          "gae, td_residuals, policy_loss")
    _, to_go = ppo.gae(rewards, VALUES, MASK, gamma=1.0, lam=1.0)
    psi = {
        "whole return (vanilla policy gradient)": [rewards.sum().item()] * len(WORDS),
        "reward-to-go": row(to_go),
        "reward-to-go - V(s_t), a baseline": row(to_go - VALUES),
        "TD residual (lambda 0)": row(ppo.td_residuals(rewards, VALUES, MASK, GAMMA)),
        f"GAE (lambda {LAM})": row(advantages)}
    table({"Psi_t": list(psi), **per_word(list(psi.values()))})

    def vanilla_loss(log_probs):
        return -ppo.masked_mean(log_probs * advantages, MASK)

    def ppo_loss(log_probs):
        return ppo.policy_loss(log_probs, old_log_probs, advantages, MASK, EPS)[0]

    gradients = []
    for loss_of in [vanilla_loss, ppo_loss]:
        log_probs = old_log_probs.clone().requires_grad_()
        loss_of(log_probs).backward()
        gradients.append(row(log_probs.grad))
    print("\nBefore the first update the ratio is 1, and both losses have the same gradient:\n")
    table({"gradient of": ["vanilla, -mean(Psi_t * log P)", "PPO, policy_loss"],
           **per_word(gradients)})

    print("\nWhy a baseline? Two actions, P = 1/2 each, rewards 1 and 0; "
          "d log P / d logit is 0.5 and -0.5:\n")
    columns = {"baseline b": [], "0.5 * (1 - b)": [], "-0.5 * (0 - b)": [], "mean": [],
               "variance": []}
    for b in [0.0, 0.5, 100.0]:
        first, second = 0.5 * (1 - b), -0.5 * (0 - b)
        mean = (first + second) / 2
        variance = ((first - mean) ** 2 + (second - mean) ** 2) / 2
        for column, x in zip(columns.values(), [b, first, second, mean, variance]):
            column.append(x)
    table(columns)


def part_9_value_loss():
    title("9  The value loss, with B's numbers  (B, L8)", "value_loss")

    def loss(value, *outcomes):
        values = torch.full((len(outcomes), 1), value, dtype=torch.double)
        returns = torch.tensor(outcomes, dtype=torch.double).unsqueeze(1)
        return ppo.value_loss(values, returns, torch.ones_like(values, dtype=torch.bool)).item()

    table({
        "": ["after one token", "after the next"],
        "V": [0.34, 1.23],
        "what came": [1.87, 1.87],
        "loss": [loss(0.34, 1.87), loss(1.23, 1.87)],
        "by hand": ["1/2 * (0.34 - 1.87)^2", "1/2 * (1.23 - 1.87)^2"]}, digits=5)
    print("\nThe other reply got -1.24. Suppose that it began with the same token: "
          "what should V have said there?\n")
    guesses = {
        1.87: "right for the first, far off for the other",
        -1.24: "the other way round",
        0.315: "the mean of both: there is no better answer",
        0.34: "B's, close to it"}
    table({
        "V": list(guesses),
        "loss over both": [loss(value, 1.87, -1.24) for value in guesses],
        "": list(guesses.values())})


def slope_of(loss, ratio: float) -> float:
    """d loss / d log P for a token whose log-ratio is log(ratio), from autograd."""
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.double, requires_grad=True)
    loss(log_ratio).backward()
    return log_ratio.grad.item()


def clipped_slope(ratio: float, advantage: float, eps: float = EPS) -> float:
    """The same for policy_loss."""
    one = torch.ones(1, 1, dtype=torch.double)

    def loss(log_ratio):
        return ppo.policy_loss(log_ratio, 0 * one, advantage * one, one.bool(), eps)[0]

    return slope_of(loss, ratio)


def part_10_four_cases():
    title("10  The four cases of clipping, and why there is a min  (C, T4)",
          f"policy_loss, epsilon = {EPS}; gradients with respect to log P, from autograd")
    cases = [
        ("1", 1.0, 1.1, "goes on"),
        ("2", 1.0, 1.3, "far enough"),
        ("3", -1.0, 0.9, "goes on"),
        ("4", -1.0, 0.7, "far enough"),
        ("1, wrong way", 1.0, 0.5, "min brings it back"),
        ("3, wrong way", -1.0, 1.5, "min brings it back")]
    names, advantages, ratios, verdicts = map(list, zip(*cases))
    gradients, by_hand, clip_alone = [], [], []
    for _, a, rho, verdict in cases:
        gradients.append(clipped_slope(rho, a))
        by_hand.append("0" if verdict == "far enough" else f"{-a:g} * {rho}")
        clip_alone.append(slope_of(lambda x: -a * x.exp().clamp(1 - EPS, 1 + EPS).sum(), rho))
    table({
        "case": names,
        "A": advantages,
        "rho": ratios,
        "gradient": gradients,
        "by hand": by_hand,
        "clip alone": clip_alone,
        "": verdicts})
    print("\nA negative gradient makes the token likelier: "
          "an update goes against the gradient of the loss.")


def climb(probability: float, old: float) -> float:
    """One batch: raise a token's probability in small steps until policy_loss has no gradient."""
    while slope := clipped_slope(probability / old, advantage=1.0):
        probability *= math.exp(-1e-3 * slope)
    return probability


def part_11_clipping_story():
    title("11  D's story: 5% -> 6% -> 7.2% -> 8.6%  "
          "(D, L9; the reference is not the old policy, T5)",
          f"policy_loss, A = 1, epsilon = {EPS}")
    probabilities = [0.05, 0.055, 0.0599, 0.0601, 0.6]
    ratios = [p / 0.05 for p in probabilities]
    table({
        "P in batch 1": [f"{p:6.2%}" for p in probabilities],
        "rho = P / 5%": ratios,
        "gradient": [clipped_slope(rho, advantage=1.0) for rho in ratios],
        "without clipping": [clipped_slope(rho, advantage=1.0, eps=math.inf) for rho in ratios]})
    right, wrong = [0.05], [0.05]
    for _ in range(3):
        right.append(climb(right[-1], old=right[-1]))
        wrong.append(climb(wrong[-1], old=0.05))
    print("\nWhere each batch stops:\n")
    table({
        "ratio": ["P / P_old, new with every batch", "P / P_ref, always the same (a common bug)"],
        "probability": [" -> ".join(f"{p:.1%}" for p in stops) for stops in [right, wrong]]})


def part_12_kl_estimators():
    title("12  Three estimators of KL(P || P_ref) from sampled tokens  (C, T6)",
          "token_rewards charges k1; the metric kl is k1, the metric approx_kl is k3")
    compare_estimators([0.5, 0.5], [0.9, 0.1])
    compare_estimators([0.5, 0.5], [0.55, 0.45])
    print("k1 is right on average, but noisy, and often negative. "
          "k3 is right on average and never negative. k2\n"
          "is nearly right while the policies are close. "
          "This holds for tokens that P has sampled itself (on-policy).\n"
          "As a loss, only k2 has the slope of the exact KL. "
          "That of k1 is 0: as a loss it does nothing.")


def compare_estimators(p, p_ref):
    """Each estimator for two tokens, its mean and deviation under P, and its slope as a loss."""
    logits = torch.tensor(p, dtype=torch.double).log().requires_grad_()                 # [V]
    log_p = logits.log_softmax(dim=-1)                                                  # [V]
    log_ref = torch.tensor(p_ref, dtype=torch.double).log()                             # [V]
    exact = F.kl_div(log_ref, log_p, log_target=True, reduction="sum")
    rewards = ppo.token_rewards(log_p.view(1, 2), log_ref.view(1, 2),
                                scores=torch.zeros(1, dtype=torch.double),
                                mask=torch.ones(1, 2).bool(), kl_coef=1)
    k1 = -rewards[0]
    k = torch.stack([k1, 0.5 * k1 ** 2, (-k1).exp() - 1 + k1])                          # [3,V]

    share = log_p.exp().detach()  # how often each token is sampled: no gradient flows through it
    means = k @ share
    deviations = ((k - means.unsqueeze(1)) ** 2 @ share).sqrt()
    torch.manual_seed(0)
    sampled = ppo.sample_tokens(logits.detach().expand(10_000, -1))
    slopes = []
    for x in [*means, exact]:
        gradient = torch.autograd.grad(x, logits, retain_graph=True)[0]
        slopes.append(gradient[0].item())
    print(f"P = {p}, P_ref = {p_ref}:\n")
    table({
        "": ["k1 = log P - log P_ref", "k2 = 1/2 * k1^2", "k3 = exp(-k1) - 1 + k1", "exact"],
        "token a": [*k[:, 0].tolist(), ""],
        "token b": [*k[:, 1].tolist(), ""],
        "mean": [*means.tolist(), exact.item()],
        "deviation": [*deviations.tolist(), ""],
        "of 10000 samples": [*k[:, sampled].mean(dim=1).tolist(), ""],
        "slope as a loss": slopes}, digits=5)
    print()


def part_13_beta():
    title("13  What beta decides: a reward model with a bug, and the best policy for it  "
          "(D, P1, P2)",
          "optimum; the best policy is P_ref * exp(score / beta), made to sum to 1")
    replies = ["kind and practical", "mechanical", "哈哈哈哈哈"]
    counts = torch.tensor([300, 699, 1])  # of 1000 replies of SFT
    scores = torch.tensor([2.0, 0.0, 4.0], dtype=torch.double)
    share = counts / counts.sum().double()
    thousand = scores.repeat_interleave(counts).unsqueeze(0)                            # [1,1000]
    columns = {
        "SFT's replies": [*replies, "score, mean", "KL to SFT", "J = score - beta * KL",
                          "J* by optimum()"],
        "score": [f"{score:g}" for score in scores] + [""] * 4,
        "SFT": [f"{x:6.1%}" for x in share] + [f"{(share * scores).sum():6.3f}", " 0.000", "", ""]}
    for beta in [2.0, 1.0, 0.5, 0.2, 0.1]:
        best = (share.log() + scores / beta).softmax(dim=0)
        score = (best * scores).sum()
        kl = (best * (best / share).log()).sum()
        # All replies are the reference's, so log P - log P_ref is 0 for each of them.
        j_star, _ = ppo.optimum(thousand, torch.zeros_like(thousand), beta)
        numbers = [score, kl, score - beta * kl, j_star.item()]
        columns[f"beta {beta:g}"] = [f"{x:6.1%}" for x in best] + [f"{x:6.3f}" for x in numbers]
    table(columns)
    print("\nBy hand: always 哈哈哈哈哈 costs log(1/0.001) = 6.9 nats, "
          "always the kind reply log(1/0.3) = 1.2 nats.\n"
          "4 - 6.9 * beta is the larger one below beta = 0.35. "
          "At beta = 0 nothing is left but the score, and its bug.")


def main():
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    logits, log_probs, ref_log_probs = step_1()
    rewards = step_2(log_probs, ref_log_probs)
    step_3(rewards)
    deltas = step_4(rewards)
    advantages, returns = step_5(rewards, deltas)
    step_6(logits, log_probs, advantages, returns)
    part_7_lambda(rewards)
    part_8_psi(rewards, log_probs, advantages)
    part_9_value_loss()
    part_10_four_cases()
    part_11_clipping_story()
    part_12_kl_estimators()
    part_13_beta()


if __name__ == "__main__":
    main()
