"""What keeps a finished run from the optimum: a few bad replies, or something in all replies?

    python notes/evidence/shortfall.py RUN [RUN ...]        # about a minute for each run

At the optimum r - beta * (log pi - log pi_ref) is the same number for every reply to a prompt. A
reply is called bad here if its number is more than 0.5 below the median of its prompt. The
shortfall J* - J is split in two: what the bad replies cost, and the rest. All this is done for the
prompts that PPO trained on, for those of its validation and for those of the report. If PPO failed
on new prompts only, the line `train` would be better than the others. Only the built-in world.
"""
import argparse
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ppo_rlhf as ppo  # noqa: E402

BAD = 0.5  # below the median; the good replies to a prompt differ by about 0.1
REPLIES = 128  # to each prompt


def split_shortfall(models: dict, score_fn, prompts: list[str], cfg) -> dict[str, float]:
    """The numbers of one line, for one run."""
    cfg.report_batches = REPLIES * len(prompts) // cfg.batch_size
    report, tables = ppo.compare_models(models, score_fn, prompts, cfg)
    N = len(tables["ppo"]) // len(prompts)
    objectives = ppo.column(tables["ppo"], "objective", N)               # [prompts,N]
    below = objectives.median(dim=1, keepdim=True).values - objectives
    bad = below > BAD
    shortfall = report["optimum"]["objective"] - report["ppo"]["objective"]
    cost = (below * bad).mean().item()
    return {
        "fraction": report["optimum"]["fraction"],
        "J* - J": shortfall,
        "share of bad replies": bad.double().mean().item(),
        "what they cost": cost,
        "the rest": shortfall - cost}


def measure(run: Path) -> dict[str, dict[str, float]]:
    """The lines of one run: name of the prompts -> numbers."""
    cfg = ppo.parse_config(["--init_from", str(run)])
    models = {
        "sft": ppo.frozen(ppo.load_model(ppo.ActorCritic, run / "sft", cfg)),
        "ppo": ppo.frozen(ppo.load_model(ppo.ActorCritic, run / "policy", cfg))}
    score_fn = ppo.load_model(ppo.RewardModel, run / "reward_model", cfg).score
    lines = {}
    for name, prompts in ppo.split(ppo.WORLD_PROMPTS).items():
        lines[name] = split_shortfall(models, score_fn, prompts, cfg)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    args = parser.parse_args()
    with ppo.quiet_libraries():
        measured = [measure(run) for run in args.runs]
    print(f"Mean over {len(measured)} runs\n")
    columns = list(measured[0]["train"])
    print("| prompts | " + " | ".join(columns) + " |\n|---" + "|---:" * len(columns) + "|")
    for name in measured[0]:
        cells = []
        for column in columns:
            cells.append(f"{mean(lines[name][column] for lines in measured):.4f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
