"""The default run with many seeds: how much of the optimum it reaches, how good its replies are for the human, its KL.

    python notes/evidence/seeds.py                           # seeds 0 to 19, about a minute each
    python notes/evidence/seeds.py --seeds 100 --jobs 2      # those of trust.md
    python notes/evidence/seeds.py --seeds 5 --jobs 2        # fewer; two at a time, each on one thread

Runs that --folder holds already are not repeated. Prints the tables of notes/evidence/trust.md.
"""
import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

SCRIPT = Path(__file__).resolve().parents[2] / "ppo_rlhf.py"
COLUMNS = {  # of the table: where report.json has it. `effective samples` is that of the worst prompt
    "fraction": ("optimum", "fraction"), "its error": ("optimum", "fraction_error"),
    "effective samples": ("optimum", "effective_sample_size"),
    **{name: ("ppo", name) for name in ("helpful", "warm", "honest", "harmless", "human", "kl")},
    "SFT's human": ("sft", "human"), "reward model's accuracy": ("reward_model", "accuracy")}


def run(seed: int, folder: Path, threads: int) -> dict:
    """The report of the default run with this seed."""
    out = folder / f"seed{seed}"
    if not (out / "report.json").exists():
        resume = ["--resume", out] if (out / "config.json").exists() else ["--seed", str(seed), "--out", out]
        subprocess.run([sys.executable, SCRIPT, *resume], check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        (out / "state.pt").unlink()
    return json.loads((out / "report.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        threads = max(os.cpu_count() // args.jobs, 1)
        reports = list(pool.map(lambda seed: run(seed, args.folder, threads), range(args.seeds)))
    table = {}
    for name, (part, key) in COLUMNS.items():
        numbers = [report[part][key] for report in reports]
        table[name] = [math.nan if x is None else x for x in numbers]  # no fraction: too few effective samples
    print("| seed | " + " | ".join(table) + " |\n|---" + "|---" * len(table) + "|")
    for seed, row in enumerate(zip(*table.values())):
        print(f"| {seed} | " + " | ".join(f"{x:#.3g}" for x in row) + " |")
    for name, statistic in (("minimum", min), ("median", median), ("maximum", max)):
        known = [[x for x in column if x == x] for column in table.values()]  # without NaN
        print(f"| **{name}** | " + " | ".join(f"{statistic(column):#.3g}" for column in known) + " |")
    fractions = [x for x in table["fraction"] if x == x]
    print(f"\n{sum(x >= 0.98 for x in fractions)} of {len(fractions)} seeds at 98% of the optimum or above; "
          f"{len(reports) - len(fractions)} without a fraction: too few effective samples")


if __name__ == "__main__":
    main()
