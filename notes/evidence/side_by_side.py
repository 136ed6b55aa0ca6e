"""How long does PPO take alone, and beside other runs of the script, on one machine?

    python notes/evidence/side_by_side.py RUN           # RUN is a finished run; about ten minutes

Starts one, two and four runs of `--init_from RUN --cycles 40` at the same time and prints the
seconds of PPO of each (`seconds` in report.json), for several settings of the threads. A setting
whose runs are not done within the limit is stopped. Nothing else should run on the machine.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SCRIPT = Path(__file__).resolve().parents[2] / "ppo_rlhf.py"
SETTINGS = {
    "as it is": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "GOMP_SPINCOUNT=300000, the library's own": {"GOMP_SPINCOUNT": "300000"}}


def seconds_of(run: Path, variables: dict[str, str], count: int, cycles: int,
               limit: float) -> list[float]:
    """The seconds of PPO of `count` runs that start together; empty if they take too long."""
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place, str(number)) for number in range(count)]
        processes = []
        for folder in folders:
            words = [sys.executable, SCRIPT, "--init_from", run, "--cycles", str(cycles),
                     "--eval_every", str(cycles), "--report_batches", "1", "--out", folder]
            processes.append(subprocess.Popen(words, env=os.environ | variables,
                                              stdout=subprocess.DEVNULL))
        end = time.monotonic() + limit
        try:
            for process in processes:
                process.wait(max(end - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            for process in processes:
                process.kill()
                process.wait()
            return []
        return [json.loads((folder / "report.json").read_text())["seconds"]["ppo"]
                for folder in folders]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--cycles", type=int, default=40)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60, help="seconds for one start")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    found = {}
    for turn in range(args.turns):
        for name, variables in SETTINGS.items():
            for count in args.counts:
                if found.get((name, count)) != []:  # too slow once is too slow
                    seconds = seconds_of(args.run, variables, count, args.cycles, args.limit)
                    before = found.get((name, count), [])
                    found[name, count] = before + seconds if seconds else []
    print("| threads | " + " | ".join(f"{count} at a time" for count in args.counts) + " |")
    print("|---" * (1 + len(args.counts)) + "|")
    for name in SETTINGS:
        cells = []
        for count in args.counts:
            seconds = found[name, count]
            cells.append(f"{median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
                         if seconds else f"not done in {args.limit:.0f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
