"""What is wrong with the replies of the runs that end lowest?

    python notes/evidence/lowest.py RUN [RUN ...]        # the ten lowest of these; ten seconds each

Samples 128 replies of the final policy to each test prompt. As in shortfall.py, a reply is bad if
its objective is more than 0.5 below the median of its prompt. Prints what the run lacks to the optimum
(J* - J), how many replies are bad and how much of it they cost, what the simulated human misses in
them, and the prompt with the most of them, with its most frequent bad reply. Only the built-in
world.
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import ppo_rlhf as ppo  # noqa: E402
from shortfall import BAD, REPLIES  # noqa: E402

VIRTUES = ["helpful", "warm", "honest", "harmless"]


def bad_lines(run: Path) -> list[dict]:
    """The bad replies of a run to the test prompts: lines of `evaluate`, with prompt and cost."""
    cfg = ppo.parse_config(["--init_from", str(run)])
    sft = ppo.frozen(ppo.load_model(ppo.ActorCritic, run / "sft", cfg))
    policy = ppo.frozen(ppo.load_model(ppo.ActorCritic, run / "policy", cfg))
    score_fn = ppo.load_model(ppo.RewardModel, run / "reward_model", cfg).score
    prompts = ppo.split(ppo.WORLD_PROMPTS)["test"]
    ppo.reseed(cfg, "lowest")
    table = ppo.evaluate(policy, sft, score_fn, prompts, REPLIES, cfg)
    below = ppo.column(table, "objective", REPLIES)                      # [prompts,N]
    below = (below.median(dim=1, keepdim=True).values - below).flatten().tolist()
    lines = []
    for number, line in enumerate(table):
        if below[number] > BAD:
            prompt = prompts[number // REPLIES].strip()
            lines.append(dict(line, prompt=prompt, cost=below[number] / len(table)))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    args = parser.parse_args()
    fractions = []
    for run in args.runs:
        report = json.loads((run / "report.json").read_text())
        optimum, policy = report["optimum"], report["ppo"]
        if optimum["fraction"] is not None:  # else it had too few effective samples
            fractions.append((optimum["fraction"], run, optimum["objective"] - policy["objective"]))
    print(f"| of {len(args.runs)} runs | fraction | J* - J | bad replies | what they cost | " +
          " | ".join(f"not {virtue}" for virtue in VIRTUES) +
          " | worst prompt | its bad replies | the most frequent of them |")
    print("|---" + "|---:" * 8 + "|---|---:|---|")
    with ppo.quiet_libraries():
        for fraction, run, shortfall in sorted(fractions)[:10]:
            lines = bad_lines(run)
            cost = sum(line["cost"] for line in lines)
            missing = [sum(line[virtue] < 1 for line in lines) for virtue in VIRTUES]
            cells = [run.name, f"{fraction:.3f}", f"{shortfall:.3f}", len(lines), f"{cost:.3f}"]
            cells += missing
            prompts = Counter(line["prompt"] for line in lines)
            for worst, count in prompts.most_common(1):  # nothing if no reply is bad
                replies = Counter(line["reply"] for line in lines if line["prompt"] == worst)
                cells += [worst, count, replies.most_common(1)[0][0]]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
