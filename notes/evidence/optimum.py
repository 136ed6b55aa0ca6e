"""How exact is the estimate of J*, the best objective that any policy can have? Two estimates, several times each.

    python notes/evidence/optimum.py RUN                 # a finished default run; about five minutes
    python notes/evidence/optimum.py RUN --most 400      # quick: no estimate from 6,400 replies

`reference alone` samples only from the SFT model. `both` takes half of the replies from the trained policy, as the
report of ppo_rlhf.py does. The spread over the repetitions says how far a single estimate is off; the standard error
that the script itself computes should agree with it. Only the built-in world.
"""
import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch  # noqa: E402

import ppo_rlhf as ppo  # noqa: E402
from transformers.utils import logging  # noqa: E402


def sample(model, policy, reference, score_fn, prompts, N, cfg):
    """N replies of `model` to each prompt -> scores and log pi - log pi_ref of the policy, [prompts,N] both."""
    scores, log_ratios = [], []
    for rollout in ppo.sample_many(model, reference, score_fn, prompts, N, cfg):
        log_probs, _ = ppo.read_without_gradient(policy, rollout, cfg)
        scores.append(rollout.scores)
        log_ratios.append((log_probs - rollout.ref_log_probs).sum(dim=1))
    return torch.cat(scores).view(-1, N), torch.cat(log_ratios).view(-1, N)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--most", type=int, default=6400, help="replies per prompt of the largest estimate")
    args = parser.parse_args()
    logging.disable_progress_bar()
    cfg = ppo.parse_config(["--init_from", str(args.run)])
    reference = ppo.frozen(ppo.load_model(ppo.ActorCritic, args.run / "sft", cfg))
    policy = ppo.frozen(ppo.load_model(ppo.ActorCritic, args.run / "policy", cfg))
    score_fn = ppo.load_model(ppo.RewardModel, args.run / "reward_model", cfg).score
    prompts = ppo.split(ppo.WORLD_PROMPTS)["test"]

    print("| replies per prompt | from | repetitions | J*, mean | spread of the repetitions | error that the script gives |")
    print("|---|---|---|---|---|---|")
    for total, source, repetitions in [(64, "both", 8), (256, "both", 8), (1024, "both", 3),
                                       (400, "reference alone", 8), (6400, "reference alone", 2)]:
        if total > args.most:
            continue
        estimates, errors = [], []
        for repetition in range(repetitions):
            ppo.reseed(cfg, f"optimum {total} {source} {repetition}")
            first = policy if source == "both" else reference
            halves = [sample(model, policy, reference, score_fn, prompts, total // 2, cfg) for model in (first, reference)]
            scores, log_ratios = (torch.cat(parts, dim=1) for parts in zip(*halves))
            if source != "both":
                log_ratios = torch.zeros_like(log_ratios)  # then both halves have the weights of reference replies
            j_star, weights = ppo.optimum(scores, log_ratios, cfg.kl_coef)
            estimates.append(j_star.mean().item())
            errors.append(ppo.standard_error(cfg.kl_coef * weights))
        print(f"| {total} | {source} | {repetitions} | {mean(estimates):.4f} | {stdev(estimates):.4f} | {mean(errors):.4f} |",
              flush=True)


if __name__ == "__main__":
    main()
